"""docs/api.md and its Japanese version say what the server does: routes, statuses, fields, variables, and the same in both."""

import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra [api]")

from sb3_grpo_plugin.api import app, schemas
from sb3_grpo_plugin.api.security import PUBLIC
from sb3_grpo_plugin.api.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("api.md", "api_ja.md")}
# What any route may answer, said once
COMMON = {400, 401, 429, 503}

both = pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))


def rows(page: str) -> dict[str, tuple[bool, set[int]]]:
    """Method and path -> is public, statuses."""
    found = re.findall(r"^\| `([A-Z]+ /\S*)`( ○)? \|.*\| ([\d, ]+) \|$", page, flags=re.MULTILINE)
    return {route: (bool(public), {int(status) for status in statuses.split(",")}) for route, public, statuses in found}


@both
def test_every_route_with_its_statuses(page: str) -> None:
    documented = rows(page)
    real = {}
    for route in app.router.routes:
        for method in route.methods - {"HEAD"}:
            statuses = {route.status_code or 200} | {int(status) for status in route.responses}
            # FastAPI adds it where something is checked
            if route.dependant.path_params or route.dependant.query_params or route.body_field:
                statuses.add(422)
            real[f"{method} {route.path}"] = statuses
    assert documented.keys() == real.keys()
    for route, (public, statuses) in documented.items():
        assert statuses <= real[route], route
        left_out = real[route] - statuses - COMMON
        # A route that takes no body may still be sent one
        assert left_out <= ({413, 415} if "train`" not in route else set()), route
        assert public == (route.split()[1] in PUBLIC), route


@both
def test_every_setting_with_its_default(page: str) -> None:
    table = dict(re.findall(r"^\| `SB3_GRPO_(\w+)` \| (.*?) \|", page, flags=re.MULTILINE))
    assert table.keys() == {name.upper() for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        if isinstance(field.default, str | int | float) and field.default != "":
            shown = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
            assert table[name.upper()] == f"`{shown}`"


@both
def test_every_field_and_status_of_a_job(page: str) -> None:
    fields = re.findall(r"^\| `(\w+)` \|", page[page.index("### POST /train") :], flags=re.MULTILINE)
    assert set(schemas.TrainRequest.model_fields) <= set(fields)
    for model in (schemas.JobStatus, schemas.ModelInfo, schemas.InferenceAnswer, schemas.BatchAnswer):
        for field in model.model_fields:
            assert re.search(rf"\b{field}\b", page), field
    for status in schemas.STATUSES:
        assert f"`{status}`" in page


def test_both_languages_have_the_same_parts() -> None:
    english, japanese = PAGES.values()
    for pattern in (r"^#+ ", r"^\|", r"^- ", r"```"):
        assert len(re.findall(pattern, english, re.MULTILINE)) == len(re.findall(pattern, japanese, re.MULTILINE)), pattern
    assert set(re.findall(r"\]\((.+?)\)", english)) - {"api_ja.md"} == set(re.findall(r"\]\((.+?)\)", japanese)) - {"api.md"}


@both
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (ROOT / "docs" / target).exists(), target
