"""The other scripts of the zoo, on what one short training left, from another folder than the zoo's or ours."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
from conftest import Environment

AGENT = ("--algo", "grpo", "--env", "CartPole-v1", "-f", "logs")
RUN = Path("logs", "grpo", "CartPole-v1_1")


@pytest.fixture(scope="module")
def trained(installed: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    options = ("-n", "300", "--eval-freq", "250", "--eval-episodes", "2", "--save-freq", "1000", "--num-threads", "1")
    # One rollout of 1024 steps: one checkpoint and four evaluations
    installed.zoo("train", *AGENT, *options, "-params", "n_envs:2", "n_steps:512", cwd=folder)
    return folder


@pytest.fixture
def logs(trained: Path, tmp_path: Path) -> Path:
    """A working folder of the test's own with the trained agent in it."""
    shutil.copytree(trained / "logs", tmp_path / "logs")
    return tmp_path


def test_enjoy(installed: Environment, trained: Path) -> None:
    done = installed.zoo("enjoy", *AGENT, "--no-render", "-n", "600", cwd=trained)
    assert "Mean reward:" in done.stdout


def test_console_command(installed: Environment, trained: Path) -> None:
    # What the command's file does; the file itself belongs to the environment that the dependencies are shared from
    code = "from importlib.metadata import entry_points as e; e(group='console_scripts', name='rl_zoo3')['rl_zoo3'].load()()"
    done = installed.run("-c", code, "enjoy", *AGENT, "--no-render", "-n", "100", "--load-best", cwd=trained)
    assert "Loading " in done.stdout and "best_model.zip" in done.stdout


def test_record_video(installed: Environment, logs: Path) -> None:
    installed.zoo("record_video", *AGENT, "-n", "20", "-o", "videos", cwd=logs)
    assert [path.suffix for path in (logs / "videos").iterdir()] == [".mp4"]


def test_record_training_without_python_and_ffmpeg_on_path(installed: Environment, logs: Path) -> None:
    (logs / RUN / "best_model.zip").unlink()
    assert list((logs / RUN).glob("rl_model_*.zip"))
    done = installed.zoo("record_training", *AGENT, "-n", "20", "-o", logs / "videos", "-g", cwd=logs)
    assert (logs / "videos" / "training.mp4").stat().st_size > 0, done.stdout + done.stderr
    assert (logs / "videos" / "training.gif").stat().st_size > 0, done.stdout + done.stderr


def test_command_joins_child_processes_where_start_up_lines_are_not_read(
    make_environment, wheel: Path, logs: Path, tmp_path: Path
) -> None:
    environment: Environment = make_environment(wheel)
    next(environment.site_packages.glob("hatch_autorun_*.pth")).unlink()
    # A sitecustomize of the user's own must still run, in the children too
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sitecustomize.py").write_text("open('ran', 'a').write('x')\n")
    # A child per model: leave one
    for left_out in ((logs / RUN / "best_model.zip"), *(logs / RUN).glob("rl_model_*.zip")):
        left_out.unlink()
    done = environment.run("-m", "rl_zoo3.enjoy", *AGENT, "--no-render", cwd=logs, status=2, SB3_GRPO_AUTOLOAD="0")
    assert "invalid choice: 'grpo'" in done.stderr
    changes = {"SB3_GRPO_AUTOLOAD": "0", "PYTHONPATH": str(tmp_path / "mine")}
    arguments = ("zoo", "record_training", *AGENT, "-n", "20", "-o", logs / "videos")
    environment.run("-m", "sb3_grpo_plugin", *arguments, cwd=logs, **changes)
    assert (logs / "videos" / "training.mp4").stat().st_size > 0
    # The command itself and one child
    assert (logs / "ran").read_text() == "xx"


def test_plots(installed: Environment, logs: Path) -> None:
    # The script wants two runs at least
    shutil.copytree(logs / RUN, logs / RUN.with_name("CartPole-v1_2"))
    installed.zoo("plots.plot_train", "-a", "grpo", "-e", "CartPole-v1", "-f", "logs", cwd=logs)
    options = ("-a", "grpo", "-e", "CartPole-v1", "-f", "logs", "--no-million", "-min", "0", "-o", "results")
    done = installed.zoo("plots.all_plots", *options, cwd=logs)
    assert "CartPole-v1" in done.stdout
    with open(logs / "results.pkl", "rb") as file:
        assert pickle.load(file)
    installed.zoo("plots.plot_from_file", "-i", "results.pkl", "-l", "GRPO", "-o", "figure.png", "--format", "png", cwd=logs)
    assert (logs / "figure.png").stat().st_size > 0


def test_benchmark_from_any_folder(installed: Environment, logs: Path) -> None:
    ppo = ("--algo", "ppo", "--env", "CartPole-v1", "-f", "logs", "-n", "300", "--eval-freq", "-1", "--num-threads", "1")
    installed.zoo("train", *ppo, cwd=logs)
    done = installed.zoo("benchmark", "--log-dir", "logs", "-n", "600", "--no-hub", "--num-threads", "1", cwd=logs)
    table = (logs / "benchmark.md").read_text()
    rows = [line for line in table.splitlines() if "CartPole-v1" in line]
    assert [row.split("|")[1].strip() for row in rows] == ["grpo", "ppo"], done.stdout + done.stderr


def test_benchmark_of_nothing(installed: Environment, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    installed.zoo("benchmark", "--log-dir", "logs", "--no-hub", cwd=tmp_path)
    assert (tmp_path / "logs" / "benchmark" / "benchmark.md").is_file()


def test_command_names_the_nearest_script(installed: Environment, tmp_path: Path) -> None:
    done = installed.run("-m", "sb3_grpo_plugin", "zoo", "trian", cwd=tmp_path, status=2)
    assert "did you mean 'train'?" in done.stderr
    assert os.listdir(tmp_path) == []
