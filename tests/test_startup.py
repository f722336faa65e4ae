"""What the start-up line does to an interpreter that never sees RL Zoo, and what it survives."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Environment

SHOW_MODULES = "import sys; print(*sorted(sys.modules)); print(len(sys.meta_path))"


def start_up_file(environment: Environment) -> Path:
    return next(environment.site_packages.glob("hatch_autorun_*.pth"))


def imported(environment: Environment, cwd: Path, code: str = "") -> set[str]:
    """Modules that an interpreter of this environment imports, from its own import log."""
    log = environment.run("-X", "importtime", "-c", code, cwd=cwd).stderr
    return {line.rpartition("|")[2].strip() for line in log.splitlines() if line.startswith("import time:")}


def test_starting_imports_nothing_more(installed: Environment, bare: Environment, tmp_path: Path) -> None:
    with_line, without = imported(installed, tmp_path), imported(bare, tmp_path)
    assert with_line == without
    assert {name.partition(".")[0] for name in with_line - {"imported package"}} <= set(sys.stdlib_module_names) | {
        "sitecustomize"
    }


def test_the_line_adds_a_finder_that_finds_nothing(installed: Environment, bare: Environment, tmp_path: Path) -> None:
    modules, finders = installed.run("-c", SHOW_MODULES, cwd=tmp_path).stdout.splitlines()
    modules_without, finders_without = bare.run("-c", SHOW_MODULES, cwd=tmp_path).stdout.splitlines()
    assert modules == modules_without
    # Virtual environments run the line twice
    assert int(finders) - int(finders_without) in (1, 2)
    code = "import sys; find = sys.meta_path[0].find_spec; assert find('torch', None, None) is None and find('x') is None"
    installed.run("-c", code, cwd=tmp_path)


@pytest.mark.parametrize("library", ["gymnasium", "stable_baselines3"])
def test_other_imports_do_not_load_us(installed: Environment, tmp_path: Path, library: str) -> None:
    code = f"import sys, {library}; print([name for name in sys.modules if name.startswith('sb3_grpo')])"
    assert installed.run("-c", code, cwd=tmp_path).stdout.strip() == "[]"


def test_package_imports_no_torch(installed: Environment, tmp_path: Path) -> None:
    code = (
        "import sys, sb3_grpo_plugin, sb3_grpo_plugin.zoo, sb3_grpo_plugin._autoload; "
        "print([name for name in ('torch', 'numpy', 'gymnasium', 'stable_baselines3', 'pluggy') if name in sys.modules], "
        "sb3_grpo_plugin.__version__, *dir(sb3_grpo_plugin))"
    )
    words = installed.run("-c", code, cwd=tmp_path).stdout.split()
    assert words[0] == "[]"
    assert {"GRPO", "hookimpl", "RewardSpec", "TransitionSpec", "EnvWrapperSpec", "register"} <= set(words)


def test_names_of_the_package() -> None:
    import sb3_grpo_plugin

    for name in sb3_grpo_plugin.__all__:
        assert getattr(sb3_grpo_plugin, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'GRPPO'"):
        _ = sb3_grpo_plugin.GRPPO


def test_switched_off(installed: Environment, tmp_path: Path) -> None:
    code = "import sys, rl_zoo3; print('grpo' in rl_zoo3.ALGOS, 'sb3_grpo_plugin.zoo' in sys.modules)"
    assert installed.run("-c", code, cwd=tmp_path, SB3_GRPO_AUTOLOAD="0").stdout.split() == ["False", "False"]


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
def test_register_by_hand(installed: Environment, tmp_path: Path, early: bool) -> None:
    lines = ["import sb3_grpo_plugin; sb3_grpo_plugin.register()", "import rl_zoo3.exp_manager, rl_zoo3.hyperparams_opt"]
    code = "\n".join([*(lines if early else lines[::-1]), SHOW_JOINED])
    done = installed.run("-c", code, cwd=tmp_path, SB3_GRPO_AUTOLOAD="0")
    assert done.stdout.split() == ["GRPO", "True", "True"], done.stderr


SHOW_JOINED = """
from rl_zoo3 import ALGOS, hyperparams_opt as opt
print(ALGOS["grpo"].__name__, "grpo" in opt.HYPERPARAMS_SAMPLER, "grpo" in opt.HYPERPARAMS_CONVERTER)
"""


def test_editable_install(make_environment: Callable[..., Environment], checkout: Path, tmp_path: Path) -> None:
    environment = make_environment("-e", checkout)
    code = "import sys, sb3_grpo_plugin.zoo as zoo; print(zoo.default_config('grpo'))"
    assert Path(environment.run("-c", code, cwd=tmp_path).stdout.strip()) == checkout / "hyperparams" / "grpo.yml"
    done = environment.run("-c", "import rl_zoo3, rl_zoo3.hyperparams_opt" + SHOW_JOINED, cwd=tmp_path)
    assert done.stdout.split() == ["GRPO", "True", "True"], done.stderr
    # Without a word at the start, and with one line and no algorithm where RL Zoo is used
    shutil.move(checkout, tmp_path / "elsewhere")
    try:
        assert environment.run("-c", "", cwd=tmp_path).stderr == ""
        done = environment.run("-c", "import rl_zoo3; print('grpo' in rl_zoo3.ALGOS)", cwd=tmp_path)
        assert done.stdout.strip() == "False"
        assert "sb3-grpo-plugin is off: No module named 'sb3_grpo_plugin'" in done.stderr
    finally:
        shutil.move(tmp_path / "elsewhere", checkout)


def test_broken_installation_does_not_stop_the_interpreter(
    make_environment: Callable[..., Environment], wheel: Path, tmp_path: Path
) -> None:
    environment = make_environment(wheel)
    (environment.site_packages / "sb3_grpo_plugin" / "zoo.py").write_text("raise SystemError('broken')")
    done = environment.run("-c", "import rl_zoo3; print('ppo' in rl_zoo3.ALGOS)", cwd=tmp_path)
    assert done.stdout.strip() == "True"
    assert "could not join rl_zoo3: SystemError('broken')" in done.stderr
