"""What an installation brings and takes away, and algorithms that other packages bring."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Environment

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "{name}"
version = "1.0"
[tool.hatch.build.targets.wheel]
packages = ["{module}"]
{entries}
"""


def make_package(folder: Path, name: str, code: str, **groups: str) -> Path:
    """
    :param folder: where to put it
    :param name: the distribution's name
    :param code: its module
    :param groups: group of RL Zoo's entry points, without ``rl_zoo3.`` -> one line of it
    :return: a project to install
    """
    module = name.replace("-", "_")
    entries = "\n".join(f'[project.entry-points."rl_zoo3.{group}"]\n{line}' for group, line in groups.items())
    package = folder / name / module
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    (package.parent / "pyproject.toml").write_text(PROJECT.format(name=name, module=module, entries=entries))
    return package.parent


def tree(folder: Path) -> set[str]:
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {path for path in paths if not path.startswith("shared/")}


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    version = wheel.name.split("-")[1]
    assert tops == {"sb3_grpo_plugin", "hatch_autorun_sb3_grpo_plugin.pth", f"sb3_grpo_plugin-{version}.dist-info"}
    assert {"sb3_grpo_plugin/hyperparams/grpo.yml", "sb3_grpo_plugin/py.typed"} <= set(names)


@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_uninstall_leaves_nothing(
    make_environment: Callable[..., Environment], wheel: Path, checkout: Path, tmp_path: Path, how: str
) -> None:
    environment = make_environment()
    before = tree(environment.path)
    environment.pip("install", *([wheel] if how == "wheel" else ["-e", checkout]))
    code = "import rl_zoo3; print('grpo' in rl_zoo3.ALGOS)"
    assert environment.run("-c", code, cwd=tmp_path).stdout.strip() == "True"
    assert tree(environment.path) > before
    environment.pip("uninstall", "-y", "sb3-grpo-plugin")
    assert tree(environment.path) == before
    assert environment.run("-c", code, cwd=tmp_path).stdout.strip() == "False"


TINY = """
from stable_baselines3 import PPO

class Tiny(PPO):
    pass

def sample(trial, n_actions, n_envs, additional_args):
    return convert({"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)})

def convert(sampled_params):
    return sampled_params
"""


def test_algorithms_of_other_packages(make_environment: Callable[..., Environment], wheel: Path, tmp_path: Path) -> None:
    tiny = make_package(
        tmp_path,
        "tiny-algo",
        # An algorithm may use the zoo
        "from rl_zoo3 import linear_schedule\n" + TINY,
        algorithms='tiny = "tiny_algo:Tiny"',
        hyperparams='tiny = "tiny_algo"',
        hyperparams_sampler='tiny = "tiny_algo:sample"',
        hyperparams_converter='tiny = "tiny_algo:convert"',
    )
    yml = "CartPole-v1:\n  n_timesteps: 100\n  n_steps: 64\n  policy: 'MlpPolicy'\n"
    (tiny / "tiny_algo" / "tiny.yml").write_text(yml)
    environment = make_environment(
        wheel,
        tiny,
        make_package(tmp_path, "takes-ppo", TINY, algorithms='ppo = "takes_ppo:Tiny"'),
        make_package(tmp_path, "not-there", "", algorithms='gone = "not_there.nowhere:Tiny"'),
        make_package(tmp_path, "raises", "raise RuntimeError('on import')", algorithms='raising = "raises:Tiny"'),
        make_package(tmp_path, "no-algorithm", "Tiny = dict", algorithms='none = "no_algorithm:Tiny"'),
        make_package(tmp_path, "twin-a", TINY, algorithms='twin = "twin_a:Tiny"'),
        make_package(tmp_path, "twin-b", TINY, algorithms='twin = "twin_b:Tiny"'),
        make_package(tmp_path, "same-again", "", algorithms='grpo = "sb3_grpo_plugin.grpo:GRPO"'),
    )
    options = ("--algo", "tiny", "--env", "CartPole-v1", "--eval-freq", "-1", "--num-threads", "1")
    done = environment.zoo("train", *options, cwd=tmp_path)
    assert (tmp_path / "logs" / "tiny" / "CartPole-v1_1" / "CartPole-v1.zip").is_file()
    expected = {
        "takes-ppo": "RL Zoo has that id already",
        "not-there": "cannot be imported: ModuleNotFoundError",
        "raises": "cannot be imported: RuntimeError('on import')",
        "no-algorithm": "no BaseAlgorithm class",
        "twin-a and twin-b": "claim the same id",
    }
    warned = [line for line in done.stderr.splitlines() if "UserWarning: " in line and "is skipped" in line]
    for name, problem in expected.items():
        assert any(f"UserWarning: {name}: " in line and problem in line for line in warned), (name, warned)
    assert len(warned) == len(expected), warned
    code = (
        "from rl_zoo3 import ALGOS as a; print(a['ppo'].__module__, 'grpo' in a, {'gone', 'raising', 'none', 'twin'} & {*a})"
    )
    assert environment.run("-W", "ignore", "-c", code, cwd=tmp_path).stdout.strip() == "stable_baselines3.ppo.ppo True set()"
