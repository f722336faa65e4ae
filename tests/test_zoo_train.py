"""``python -m rl_zoo3.train`` as a user types it, with the wheel installed, from a folder that has nothing to do with it."""

import os
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import optuna
import pytest
import torch as th
import yaml
from conftest import Environment

CARTPOLE = ("--algo", "grpo", "--env", "CartPole-v1", "--num-threads", "1", "-f", "logs")
RUN = Path("logs", "grpo", "CartPole-v1_1")
# Small trials: evaluated once, with one episode
OPTIMIZE = (
    *(*CARTPOLE, "-optimize", "-n", "600", "--sampler", "random", "--pruner", "none", "--n-evaluations", "1"),
    *("--eval-episodes", "1", "--no-optim-plots", "--storage", "study.log", "--study-name", "cartpole"),
)


@pytest.fixture(scope="module")
def trained(installed: Environment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("trained")
    options = ("-n", "300", "--seed", "1", "--eval-freq", "250", "--eval-episodes", "1", "-tb", "boards", "-P")
    done = installed.zoo("train", *CARTPOLE, *options, cwd=folder)
    return folder, done.stdout + done.stderr


def saved_config(folder: Path, run: Path = RUN) -> dict:
    return dict(yaml.unsafe_load((folder / run / "CartPole-v1" / "config.yml").read_text()))


def test_train(trained: tuple[Path, str], installed: Environment) -> None:
    folder, output = trained
    assert (
        f"Loading hyperparameters from: {installed.site_packages / 'sb3_grpo_plugin' / 'hyperparams' / 'grpo.yml'}" in output
    )
    for name in ("CartPole-v1.zip", "best_model.zip", "evaluations.npz", "0.monitor.csv"):
        assert (folder / RUN / name).is_file(), name
    # -P: a progress bar that reached the end
    assert "100%" in output


def test_tensorboard_log_is_named_after_the_algorithm(trained: tuple[Path, str]) -> None:
    boards = list(Path(trained[0], "boards", "CartPole-v1").iterdir())
    assert [board.name for board in boards] == ["GRPO_1"]


def test_continue(trained: tuple[Path, str], installed: Environment, tmp_path: Path) -> None:
    agent = trained[0] / RUN / "CartPole-v1.zip"
    done = installed.zoo("train", *CARTPOLE, "-n", "300", "--eval-freq", "-1", "-i", agent, cwd=tmp_path)
    assert "Loading pretrained agent" in done.stdout
    assert (tmp_path / RUN / "CartPole-v1.zip").is_file()


def test_params_and_conf_file_and_subproc(installed: Environment, tmp_path: Path) -> None:
    entry = {"n_envs": 2, "n_timesteps": 300, "policy": "MlpPolicy", "n_steps": 1024, "n_epochs": 1, "ent_coef": 0.5}
    (tmp_path / "mine.yml").write_text(yaml.safe_dump({"CartPole-v1": entry}))
    params = ("-params", "ent_coef:0.01", "learning_rate:'lin_0.001'", "policy_kwargs:dict(net_arch=[8])")
    installed.zoo(
        "train", *CARTPOLE, "--eval-freq", "-1", "--conf-file", "mine.yml", "--vec-env", "subproc", *params, cwd=tmp_path
    )
    config = saved_config(tmp_path)
    assert config["ent_coef"] == 0.01
    assert config["learning_rate"] == "lin_0.001"
    assert config["n_steps"] == 1024


def test_optimize_and_train_with_a_trial(installed: Environment, tmp_path: Path) -> None:
    installed.zoo("train", *OPTIMIZE, "--n-trials", "2", cwd=tmp_path)
    study = load_study(tmp_path)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    assert list((tmp_path / "logs" / "grpo").glob("report_CartPole-v1_*.csv"))
    trial = ("--storage", "study.log", "--study-name", "cartpole", "--trial-id", "1")
    installed.zoo("train", *CARTPOLE, "-n", "100", "--eval-freq", "-1", *trial, cwd=tmp_path)
    # The study itself is the first run in this folder
    config = saved_config(tmp_path, RUN.with_name("CartPole-v1_2"))
    assert config["gamma"] == study.trials[1].user_attrs["gamma"]
    assert config["n_steps"] == study.trials[1].user_attrs["n_steps"]


def test_two_processes_share_a_study(installed: Environment, tmp_path: Path) -> None:
    command = installed.command("-m", "rl_zoo3.train", *OPTIMIZE, "--n-trials", "2")
    processes = [
        subprocess.Popen(command, cwd=tmp_path, env=installed.environ(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output.decode()
    assert [trial.state.name for trial in load_study(tmp_path).trials] == ["COMPLETE"] * 4


def load_study(folder: Path) -> optuna.Study:
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.log"))
    return optuna.load_study(study_name="cartpole", storage=optuna.storages.JournalStorage(backend))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
def test_interrupted_training_is_saved(installed: Environment, tmp_path: Path) -> None:
    command = installed.command("-u", "-m", "rl_zoo3.train", *CARTPOLE, "--eval-freq", "-1", "-n", "10000000")
    process = subprocess.Popen(
        command, cwd=tmp_path, env=installed.environ(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "total_timesteps" in line:
            process.send_signal(signal.SIGINT)
            break
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "Saving to logs" in output
    assert (tmp_path / RUN / "CartPole-v1.zip").is_file()


def test_unwritable_log_folder(installed: Environment, tmp_path: Path) -> None:
    # Permission bits do not stop root, a file in the place of a folder stops anybody
    (tmp_path / "logs").write_text("")
    start = time.monotonic()
    done = installed.zoo("train", *CARTPOLE, "-n", "10000000", cwd=tmp_path, status=None)
    assert done.returncode != 0
    assert "Error: " in done.stderr and "logs/grpo" in done.stderr.replace(os.sep, "/")
    # Before the training, not after it
    assert "total_timesteps" not in done.stdout and time.monotonic() - start < 60


def test_other_algorithms_are_bit_identical(installed: Environment, bare: Environment, tmp_path: Path) -> None:
    weights = []
    for name, environment in (("with", installed), ("without", bare)):
        options = ("--algo", "ppo", "--env", "CartPole-v1", "-n", "600", "--seed", "3", "--num-threads", "1", "-f", name)
        environment.zoo("train", *options, "--eval-freq", "500", "--eval-episodes", "2", cwd=tmp_path)
        with zipfile.ZipFile(tmp_path / name / "ppo" / "CartPole-v1_1" / "CartPole-v1.zip") as archive:
            weights.append(th.load(archive.open("policy.pth")))
    assert weights[0].keys() == weights[1].keys()
    assert all(th.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert bare.run("-c", "import rl_zoo3; print('grpo' in rl_zoo3.ALGOS)", cwd=tmp_path).stdout.strip() == "False"
