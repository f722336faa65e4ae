"""The documentation says what the code does: hooks, and the examples that authors copy."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from sb3_grpo_plugin import commands, hookspecs, plugins, rewards
from sb3_grpo_plugin.testing import check_reward, check_transition

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = PAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def section(hook: str) -> str:
    heading = re.search(rf"^### {hook}\(.*?(?=^##)", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert heading, f"docs/plugins.md has no section for {hook}"
    return heading.group()


def signature(hook: str) -> str:
    """As it is written in ``hookspecs.py``: ``name() -> list[Spec]``."""
    for node in ast.parse(inspect.getsource(hookspecs)).body:
        if isinstance(node, ast.FunctionDef) and node.name == hook:
            assert node.returns is not None
            return f"{hook}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
    raise AssertionError(hook)


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("hook", plugins.HOOKS)
def test_every_hook_has_its_section(hook: str) -> None:
    assert f"### {signature(hook)}\n" in section(hook)


def test_no_section_without_a_hook() -> None:
    assert sorted(re.findall(r"^### (\w+)\(", PAGE, flags=re.MULTILINE)) == sorted(plugins.HOOKS)


@pytest.mark.parametrize("hook", plugins.HOOKS)
def test_the_example_of_every_hook_runs(hook: str) -> None:
    specs = run(blocks("python", section(hook))[0])[hook]()
    assert specs and all(isinstance(spec, plugins.HOOKS[hook]) for spec in specs)
    for spec in specs:
        if isinstance(spec, rewards.RewardSpec):
            assert check_reward(spec, spec.env_ids[0], n_steps=100).std > 0
        elif isinstance(spec, rewards.TransitionSpec):
            assert check_transition(spec, spec.env_ids[0]).largest_error < 1e-5
        else:
            import gymnasium as gym

            env = spec.factory(gym.make(spec.env_ids[0]))
            env.reset(seed=0)
            env.step(env.action_space.sample())


def test_the_first_example_is_what_new_plugin_writes() -> None:
    written = {
        "toml": commands.PYPROJECT.format(name="my-rewards", module="my_rewards"),
        "python": commands.MODULE.format(name="my-rewards"),
    }
    for language, text in written.items():
        assert blocks(language)[0] == text
    lines = [line for text in written.values() for line in text.splitlines() if line.strip()]
    assert len(lines) == 15, "the page promises 15 lines"


def test_every_python_block_parses() -> None:
    for block in blocks("python"):
        ast.parse(block)


def test_the_page_names_what_exists() -> None:
    from sb3_grpo_plugin import wrappers

    for name in re.findall(r"sb3_grpo_plugin\.wrappers\.(\w+)", PAGE):
        assert hasattr(wrappers, name), name
    assert plugins.ENVIRONMENT_VARIABLE in PAGE and plugins.GROUP in PAGE


@pytest.mark.parametrize("spec", plugins.HOOKS.values())
def test_specs_are_shown_with_their_fields(spec: type) -> None:
    parameters = inspect.signature(spec).parameters
    shown = ", ".join(name if p.default is p.empty else f'{name}="{p.default}"' for name, p in parameters.items())
    assert f"{spec.__name__}({shown})" in PAGE


def test_the_packs_readme_lists_what_it_offers() -> None:
    pack = pytest.importorskip("sb3_grpo_rewards")
    readme = (ROOT / "rewards" / "README.md").read_text(encoding="utf-8")
    for spec in [*pack.sb3_grpo_rewards(), *pack.sb3_grpo_transitions()]:
        shown = "mujoco/*-forward" if spec.name.startswith("mujoco/") else spec.name
        assert f"`{shown}`" in readme, spec.name
