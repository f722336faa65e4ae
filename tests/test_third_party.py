"""Plugins of third parties for real: installed with pip into a fresh environment, used by the zoo, and removed again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import Environment

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = ROOT / "tests" / "plugins"
BROKEN = ("broken-duplicate", "broken-hook", "broken-import", "broken-reward", "broken-type")
SHORT = ("--env", "CartPole-v1", "-n", "128", "--eval-freq", "-1", "--device", "cpu", "--seed", "1")
SMALL = ("n_envs:1", "n_steps:64", "batch_size:64", "n_epochs:1", "n_timesteps:128")

pytestmark = pytest.mark.slow


def test_package_is_listed_trained_with_and_missed(
    make_environment: Callable[..., Environment],
    wheel: Path,
    tmp_path: Path,
) -> None:
    environment = make_environment(wheel, PLUGINS / "tiny-rewards")
    plugins = json.loads(environment.run("-m", "sb3_grpo_plugin", "plugins", "--json", cwd=tmp_path).stdout)["plugins"]
    assert [(plugin["distribution"], plugin["status"]) for plugin in plugins] == [("tiny-rewards", "loaded")]
    assert (plugins[0]["rewards"], plugins[0]["transitions"], plugins[0]["env_wrappers"]) == (2, 1, 1)

    train = ("train", "--algo", "grpo", *SHORT, "-f", "logs", "-params", *SMALL, "reward_function:'tiny/upright'")
    environment.zoo(*train, cwd=tmp_path)
    config = next((tmp_path / "logs").rglob("config.yml")).read_text()
    assert dict(yaml.unsafe_load(config))["reward_function"] == "tiny/upright"
    assert list((tmp_path / "logs").rglob("CartPole-v1.zip"))

    environment.pip("uninstall", "-y", "tiny-rewards")
    done = environment.zoo(*train, cwd=tmp_path, status=None)
    assert done.returncode != 0
    assert "There is no reward named 'tiny/upright'" in done.stderr
    assert "offers a reward 'tiny/...': is the package that does installed?" in done.stderr
    # what was trained with it can still be loaded and used
    code = (
        "import sys; from sb3_grpo_plugin import GRPO; model = GRPO.load(sys.argv[1], device='cpu');"
        "assert model.reward_function == 'tiny/upright'; model.predict(model.observation_space.sample())"
    )
    environment.run("-c", code, next((tmp_path / "logs").rglob("CartPole-v1.zip")), cwd=tmp_path)


def test_broken_packages_are_named_and_stop_nobody(
    make_environment: Callable[..., Environment],
    wheel: Path,
    tmp_path: Path,
) -> None:
    environment = make_environment(wheel, PLUGINS / "tiny-rewards", *(PLUGINS / name for name in BROKEN))
    done = environment.run("-m", "sb3_grpo_plugin", "plugins", cwd=tmp_path, status=1)
    for line in (
        "broken-import: ModuleNotFoundError: No module named 'a_package_that_is_not_there'",
        "broken-type: sb3_grpo_rewards returned a list with a str; expected RewardSpec",
        "broken-hook: there is no hook 'sb3_grpo_reward', did you mean 'sb3_grpo_rewards'?",
        "clash: the reward name 'tiny/upright' is offered by broken-duplicate and tiny-rewards",
    ):
        assert line in done.stdout

    # nobody else notices: no warning, let alone an error
    done = environment.zoo("train", "--algo", "ppo", *SHORT, "-f", "ppo", "-params", *SMALL, cwd=tmp_path)
    assert "broken-" not in done.stdout + done.stderr
    assert list((tmp_path / "ppo").rglob("CartPole-v1.zip"))

    # a fault shows where somebody asks for what is broken
    code = """
from sb3_grpo_plugin import GRPO
for name in ("tiny/upright", "broken-reward/raises"):
    try:
        GRPO("MlpPolicy", "CartPole-v1", reward_function=name, n_steps=64, batch_size=64).learn(64)
    except (ValueError, RuntimeError) as error:
        print(type(error).__name__, error)
"""
    printed = environment.run("-W", "ignore", "-c", code, cwd=tmp_path).stdout
    assert "ValueError The reward name 'tiny/upright' is offered 2 times, by broken-duplicate and tiny-rewards" in printed
    assert "RuntimeError The reward function 'broken-reward/raises' raised IndexError" in printed


def test_new_plugin_is_a_package_beside_our_own_pack(
    make_environment: Callable[..., Environment],
    wheel: Path,
    tmp_path: Path,
) -> None:
    environment = make_environment(wheel)
    environment.run("-m", "sb3_grpo_plugin", "new-plugin", "my-rewards", cwd=tmp_path)
    environment.pip("install", tmp_path / "my-rewards", ROOT / "rewards")
    rows = json.loads(
        environment.run("-m", "sb3_grpo_plugin", "rewards", "--env", "CartPole-v1", "--json", cwd=tmp_path).stdout
    )
    assert [(row["name"], row["distribution"]) for row in rows] == [
        ("classic/cartpole-upright", "sb3-grpo-rewards"),
        ("my-rewards/upright", "my-rewards"),
    ]
