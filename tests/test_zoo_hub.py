"""Pushing a model with ``rl_zoo3.push_to_hub`` and pulling it with ``rl_zoo3.load_from_hub``, through the real client."""

import re
from collections.abc import Iterator
from pathlib import Path

import hub
import pytest
import yaml
from conftest import Environment

ENV = ("--algo", "grpo", "--env", "CartPole-v1", "-f", "logs")
ORGANIZATION = ("-orga", "somebody")
REPO = "somebody/grpo-CartPole-v1"


@pytest.fixture
def server() -> Iterator[hub.Hub]:
    with hub.serve() as running:
        yield running


@pytest.fixture(scope="module")
def trained(installed: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the same agent: the first without normalization, the second with."""
    folder = tmp_path_factory.mktemp("trained")
    options = ("-n", "300", "--eval-freq", "250", "--eval-episodes", "1", "--num-threads", "1")
    installed.zoo("train", *ENV, *options, "-params", "group_by:'state'", cwd=folder)
    installed.zoo("train", *ENV, *options, "-params", "normalize:True", cwd=folder)
    return folder


def settings(server: hub.Hub, folder: Path, token: str = hub.TOKEN) -> dict[str, str]:
    return {
        "HF_ENDPOINT": server.endpoint,
        "HF_TOKEN": token,
        "HF_HOME": str(folder / "hf"),
        # The server speaks the older way of uploading
        "HF_HUB_DISABLE_XET": "1",
        "TRUST_REMOTE_CODE": "True",
        "no_proxy": "127.0.0.1,localhost",
    }


def work_in(trained: Path, folder: Path) -> None:
    (folder / "logs").symlink_to(trained / "logs")


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
def test_push_and_pull(installed: Environment, trained: Path, server: hub.Hub, tmp_path: Path, normalize: bool) -> None:
    work_in(trained, tmp_path)
    variables = settings(server, tmp_path)
    # One of the two with a video
    video = ("-n", "20") if normalize else ("--no-render",)
    run = ("--exp-id", "2" if normalize else "1")
    installed.zoo("push_to_hub", *ENV, *run, *ORGANIZATION, *video, cwd=tmp_path, **variables)
    files = server.files(REPO)
    assert {"grpo-CartPole-v1.zip", "config.yml", "args.yml", "env_kwargs.yml", "train_eval_metrics.zip"} <= set(files)
    assert ("vec_normalize.pkl" in files) == normalize
    assert ("replay.mp4" in files) == normalize
    check_card(files["README.md"].decode())

    done = installed.zoo("load_from_hub", *ENV[:-1], "pulled", *ORGANIZATION, cwd=tmp_path, **variables)
    assert ("No normalization file" in done.stdout) != normalize
    pulled = tmp_path / "pulled" / "grpo" / "CartPole-v1_1"
    assert (pulled / "CartPole-v1" / "vecnormalize.pkl").is_file() == normalize
    done = installed.zoo("enjoy", *ENV[:-1], "pulled", "--no-render", "-n", "600", cwd=tmp_path)
    assert "Mean reward:" in done.stdout


def check_card(card: str) -> None:
    _, metadata, text = card.split("---\n", 2)
    data = yaml.safe_load(metadata)
    assert data["library_name"] == "stable-baselines3"
    assert {"CartPole-v1", "reinforcement-learning"} <= set(data["tags"])
    (index,) = data["model-index"]
    assert index["name"] == "GRPO"
    assert index["results"][0]["metrics"][0]["type"] == "mean_reward"
    assert "pip install rl_zoo3 sb3-grpo-plugin" in text
    assert "- `reward_function`: the environment's own reward" in text
    assert "- `group_by`: `" in text


def test_wrong_token(installed: Environment, trained: Path, server: hub.Hub, tmp_path: Path) -> None:
    work_in(trained, tmp_path)
    before = sorted(path.name for path in trained.rglob("*"))
    variables = settings(server, tmp_path, token="hf_wrong")
    done = installed.zoo("push_to_hub", *ENV, *ORGANIZATION, "--no-render", cwd=tmp_path, status=1, **variables)
    assert "401" in done.stderr.splitlines()[-1] or "Invalid" in done.stderr
    assert server.repos == {}
    assert sorted(path.name for path in trained.rglob("*")) == before


def test_connection_cut_in_an_upload(installed: Environment, trained: Path, server: hub.Hub, tmp_path: Path) -> None:
    work_in(trained, tmp_path)
    server.cut_uploads = True
    # The client tries again with pauses that grow; nothing here depends on their length
    (tmp_path / "hurry").mkdir()
    (tmp_path / "hurry" / "sitecustomize.py").write_text(
        "import time\nsleep = time.sleep\ntime.sleep = lambda s: sleep(s / 100)\n"
    )
    push = ("push_to_hub", *ENV, *ORGANIZATION, "--no-render")
    variables = settings(server, tmp_path)
    done = installed.zoo(*push, cwd=tmp_path, status=1, **variables, PYTHONPATH=str(tmp_path / "hurry"))
    assert any(request.startswith("PUT /uploads/") for request in server.requests)
    assert re.search("(Read|Write|RemoteProtocol)Error", done.stderr), done.stderr
    # An empty repository remains, which the message names, and no half-made commit
    assert len(server.repos[REPO]) == 1
    assert f"The upload to {server.endpoint}/{REPO} broke off" in done.stderr
    server.cut_uploads = False
    installed.zoo(*push, cwd=tmp_path, **variables)
    assert "grpo-CartPole-v1.zip" in server.files(REPO)


def test_no_token_for_xet(installed: Environment, trained: Path, server: hub.Hub, tmp_path: Path) -> None:
    work_in(trained, tmp_path)
    variables = {**settings(server, tmp_path), "HF_HUB_DISABLE_XET": "0"}
    done = installed.zoo("push_to_hub", *ENV, *ORGANIZATION, "--no-render", cwd=tmp_path, status=1, **variables)
    assert any("/xet-write-token/" in request for request in server.requests)
    assert f"The upload to {server.endpoint}/{REPO} broke off" in done.stderr
    assert len(server.repos[REPO]) == 1
    installed.zoo("push_to_hub", *ENV, *ORGANIZATION, "--no-render", cwd=tmp_path, **settings(server, tmp_path))
    assert "grpo-CartPole-v1.zip" in server.files(REPO)


def test_missing_repository(installed: Environment, server: hub.Hub, tmp_path: Path) -> None:
    done = installed.zoo("load_from_hub", *ENV, *ORGANIZATION, cwd=tmp_path, status=1, **settings(server, tmp_path))
    assert "RepositoryNotFoundError" in done.stderr and REPO in done.stdout + done.stderr
    assert not (tmp_path / "logs").exists()
