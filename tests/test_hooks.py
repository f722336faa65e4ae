"""Plugins are found, loaded one by one, and a broken one is named and stops nobody. One test per hook."""

import importlib.metadata
import inspect
import json
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sb3_grpo_plugin import cli, hookspecs, plugins, rewards

PLUGINS = Path(__file__).parent / "plugins"
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """
    ``install(name)`` puts a package of ``tests/plugins`` where Python finds it, as pip would;
    ``install(name, source)`` one that consists of ``source``. No other plugin is installed.
    """
    monkeypatch.delenv(plugins.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    discover = importlib.metadata.Distribution.discover
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: discover(path=[str(tmp_path)]))
    modules = set(sys.modules)
    rewards.registries.cache_clear()

    def install(name: str, source: str | None = None) -> None:
        module = name.replace("-", "_")
        if source is None:
            shutil.copy(PLUGINS / name / f"{module}.py", tmp_path)
        else:
            (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{module}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(f"[sb3_grpo_plugin]\n{name} = {module}\n")
        rewards.registries.cache_clear()

    yield install
    rewards.registries.cache_clear()
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and Path(str(sys.modules[name].__file__)).parent == tmp_path:
            del sys.modules[name]


def warned(message: str) -> "pytest.WarningsRecorder":
    return pytest.warns(UserWarning, match=message)


# one test per hook


def test_every_hook_has_a_test() -> None:
    hooks = [name for name in vars(hookspecs) if name.startswith("sb3_grpo_")]
    assert sorted(hooks) == sorted(plugins.HOOKS)
    for hook in hooks:
        assert f"test_hook_{hook.removeprefix('sb3_grpo_')}" in globals(), hook
        assert inspect.getdoc(getattr(hookspecs, hook)), hook


def test_hook_rewards(install: Install) -> None:
    install("tiny-rewards")
    assert rewards.get_reward("tiny/upright").description == "keeps the pole upright"
    assert rewards.resolve_reward("auto", "CartPole-v1")[0] == "tiny/upright"


def test_hook_transitions(install: Install) -> None:
    install("tiny-rewards")
    spec = rewards.find_transition("TinyStay-v0")
    assert spec is not None and spec.name == "tiny/stay"


def test_hook_env_wrappers(install: Install) -> None:
    install("tiny-rewards")
    assert [spec.name for spec in rewards.env_wrappers_for("TinyStay-v0")] == ["tiny/slow"]


# finding and picking


def test_nothing_is_loaded_before_it_is_asked_for(install: Install) -> None:
    install("tiny-rewards")
    assert "tiny_rewards" not in sys.modules
    rewards.rewards_for("CartPole-v1")
    assert "tiny_rewards" in sys.modules


def test_metadata_found_twice_counts_once(install: Install, tmp_path: Path) -> None:
    install("tiny-rewards")
    shutil.copytree(tmp_path / "tiny_rewards-0.1.0.dist-info", tmp_path / "Tiny.Rewards-0.1.0.dist-info")
    assert [info.distribution for info in rewards.registries().plugins] == ["tiny-rewards"]
    assert rewards.get_reward("tiny/upright")


def test_empty_variable_turns_all_off(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("tiny-rewards")
    install("broken-import")
    monkeypatch.setenv(plugins.ENVIRONMENT_VARIABLE, "")
    with pytest.raises(ValueError, match=r"Turned off by .* broken-import, tiny-rewards"):
        rewards.get_reward("tiny/upright")
    assert "tiny_rewards" not in sys.modules


def test_variable_picks_some(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("tiny-rewards")
    install("broken-import")
    monkeypatch.setenv(plugins.ENVIRONMENT_VARIABLE, " Tiny_Rewards,")
    assert rewards.get_reward("tiny/upright")
    assert [(info.distribution, info.status) for info in rewards.registries().plugins] == [
        ("broken-import", "off"),
        ("tiny-rewards", "loaded"),
    ]


def test_variable_with_an_unknown_name_warns(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("tiny-rewards")
    monkeypatch.setenv(plugins.ENVIRONMENT_VARIABLE, "tiny-reward")
    with warned("picks 'tiny-reward', .* did you mean 'tiny-rewards'"):
        rewards.registries()


# broken plugins: named, and the others go on


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("broken-import", None, "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("broken-type", None, "sb3_grpo_rewards returned a list with a str; expected RewardSpec"),
        ("exits", "raise SystemExit('bye')", "SystemExit: bye"),
        ("syntax", "def", "SyntaxError"),
        (
            "none",
            "import sb3_grpo_plugin as s\n@s.hookimpl\ndef sb3_grpo_rewards(): pass",
            "returned None; expected a list of RewardSpec",
        ),
        (
            "dict",
            "import sb3_grpo_plugin as s\n@s.hookimpl\ndef sb3_grpo_transitions(): return {}",
            "returned a dict; expected a list of TransitionSpec",
        ),
        (
            "raises",
            "import sb3_grpo_plugin as s\n@s.hookimpl\ndef sb3_grpo_env_wrappers(): return [1 / 0]",
            "sb3_grpo_env_wrappers raised ZeroDivisionError",
        ),
        (
            "bad-name",
            "import sb3_grpo_plugin as s\n@s.hookimpl\ndef sb3_grpo_rewards(): return [s.RewardSpec('x', ('a',), print)]",
            "sb3_grpo_rewards raised ValueError: RewardSpec: the name 'x' must look like",
        ),
        (
            "argument",
            "import sb3_grpo_plugin as s\n@s.hookimpl\ndef sb3_grpo_rewards(registry): return []",
            "PluginValidationError",
        ),
    ],
)
def test_broken_plugin_is_named_and_skipped(install: Install, name: str, source: str | None, problem: str) -> None:
    install(name, source)
    install("tiny-rewards")
    with warned(f"(?s)The plugin {name} 0.1.0 .* is skipped: .*{problem}"):
        assert rewards.get_reward("tiny/upright")
    broken = [info for info in rewards.registries().plugins if info.status == "broken"]
    assert [info.distribution for info in broken] == [name] and problem in broken[0].problem
    with pytest.raises(ValueError, match=f"(?s){name} was skipped: .*{problem}"):
        rewards.get_reward(f"{name}/reward")


def test_misspelled_hook_is_reported_and_the_rest_is_used(install: Install) -> None:
    install("broken-hook")
    with warned("only partly used: there is no hook 'sb3_grpo_reward', did you mean 'sb3_grpo_rewards'"):
        assert rewards.get_reward("broken-hook/fine")


def test_plugin_without_a_hook_is_reported(install: Install) -> None:
    install("forgetful", "def sb3_grpo_rewards(): return []")
    with warned("forgetful implements no hook: is a function lacking its @hookimpl"):
        rewards.registries()


def test_duplicate_names_stop_only_those_who_ask(install: Install) -> None:
    install("tiny-rewards")
    install("broken-duplicate")
    with warned("'tiny/upright' is offered by broken-duplicate and tiny-rewards"):
        assert rewards.get_reward("broken-duplicate/fine")
    with pytest.raises(ValueError, match="offered 2 times, by broken-duplicate and tiny-rewards: neither is used"):
        rewards.get_reward("tiny/upright")
    with pytest.raises(ValueError, match="neither is used"):
        rewards.resolve_reward("auto", "CartPole-v1")


def test_installation_order_decides_nothing(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name in ("tiny-rewards", "broken-duplicate", "broken-hook"):
        install(name)
    found = list(importlib.metadata.distributions())
    for order in (found, found[::-1]):
        monkeypatch.setattr(importlib.metadata, "distributions", lambda order=order: order)
        rewards.registries.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            registries = rewards.registries()
        offers = [(spec.name, spec.env_ids, source) for spec, source in registries.rewards]
        seen.append((registries.plugins, offers, [str(warning.message) for warning in caught]))
    assert seen[0] == seen[1]


def test_reward_that_raises_is_named(install: Install) -> None:
    import torch as th

    install("broken-reward")
    spec = rewards.get_reward("broken-reward/raises")
    with pytest.raises(RuntimeError, match="'broken-reward/raises' raised IndexError"):
        rewards.evaluate_reward(spec.function, spec.name, th.zeros(2, 4), th.zeros(2, 1), th.zeros(2, 4))


# the commands


def test_plugins_command(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plugins"]) == 0
    assert "No plugin is installed" in capsys.readouterr().out
    install("tiny-rewards")
    assert cli.main(["plugins"]) == 0
    assert "loaded  2 rewards, 1 transitions, 1 env wrappers" in capsys.readouterr().out
    install("broken-duplicate")
    install("broken-import")
    assert cli.main(["plugins"]) == 1
    out = capsys.readouterr().out
    assert "broken-import: ModuleNotFoundError" in out
    assert "clash: the reward name 'tiny/upright' is offered by broken-duplicate and tiny-rewards" in out
    assert cli.main(["plugins", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(plugin["distribution"], plugin["status"]) for plugin in found["plugins"]] == [
        ("broken-duplicate", "loaded"),
        ("broken-import", "broken"),
        ("tiny-rewards", "loaded"),
    ]
    assert len(found["clashes"]) == 1


def test_plugins_command_says_what_is_off(
    install: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("tiny-rewards")
    monkeypatch.setenv(plugins.ENVIRONMENT_VARIABLE, "")
    assert cli.main(["plugins"]) == 0
    assert "SB3_GRPO_PLUGINS" in capsys.readouterr().out


def test_rewards_command(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rewards"]) == 0
    assert "No reward function is registered. No plugin is installed" in capsys.readouterr().err
    install("tiny-rewards")
    assert cli.main(["rewards"]) == 0
    out = capsys.readouterr().out
    assert "tiny/upright  CartPole-*" in out and "keeps the pole upright" in out
    assert "tiny/nowhere: no environment that gymnasium knows now matches NoSuchEnvironment-*" in out
    assert cli.main(["rewards", "--env", "CartPole-v1", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["tiny/upright"]
    assert cli.main(["rewards", "--env", "Acrobat-v1"]) == 1
    assert "No reward function is bound to Acrobat-v1 (did you mean Acrobot-v1?)." in capsys.readouterr().err
    with pytest.warns(UserWarning, match="offered by"):
        install("broken-duplicate")
        rewards.registries()
    assert cli.main(["rewards"]) == 0
    assert "tiny/upright: offered by broken-duplicate and tiny-rewards" in capsys.readouterr().out


def test_new_plugin_command(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new-plugin", "my-rewards"]) == 0
    assert "pip install ./my-rewards" in capsys.readouterr().out
    written = {path.name: path.read_text() for path in (tmp_path / "my-rewards").iterdir()}
    assert set(written) == {"pyproject.toml", "my_rewards.py"}
    lines = [line for text in written.values() for line in text.splitlines() if line.strip()]
    assert len(lines) == 15
    install("my-rewards", written["my_rewards.py"])
    assert rewards.resolve_reward("auto", "CartPole-v1")[0] == "my-rewards/upright"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("9lives", "is not a package name"),
        ("my rewards", "is not a package name"),
        ("../up", "is not a package name"),
        ("class", "is not a package name"),
        ("torch", "is taken"),
        ("tiny-rewards", "is taken"),
        ("there", "exists already; nothing was written"),
    ],
)
def test_new_plugin_refuses(
    install: Install,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    message: str,
) -> None:
    install("tiny-rewards")
    (tmp_path / "work" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert cli.main(["new-plugin", name]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["there"]
