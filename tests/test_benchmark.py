import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_grpo_plugin import benchmark, benchmark_matrix
from sb3_grpo_plugin.benchmark import FAILURE, FORMAT, LOG, PROGRESS, RESULT, RESULTS, SPEC, benchmark_command, collect
from sb3_grpo_plugin.benchmark_matrix import RANDOM, RunSpec, parse_budgets, parse_seeds

CONF = """
default:
  n_envs: 4
  n_timesteps: 512
  policy: MlpPolicy
  n_steps: 64
  batch_size: 64
  normalize: true
  frame_stack: 2
  learning_rate: lin_0.001
"""


def command(*arguments: object, cwd: Path, **changes: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **changes},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the real command ran: one algorithm that works, and one that refuses the environment."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "ppo.yml").write_text(CONF)
    done = command(
        *("sb3_grpo_plugin", "benchmark", "--algos", "ppo", "dqn", "--envs", "Pendulum-v1", "--seeds", "3", "--jobs", "3"),
        *("--budget", "512", "--conf", "ppo=ppo.yml", "dqn=ppo.yml", "--out", "out"),
        *("--evaluations", "2", "--eval-episodes", "2", "--episodes", "6"),
        cwd=folder,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return folder


def test_runs_and_what_is_known_of_them(folder: Path) -> None:
    runs = {run["algo"]: run for run in json.loads((folder / "out" / RESULTS).read_text())["runs"]}
    assert set(runs) == {"ppo", "dqn", RANDOM}
    ppo = runs["ppo"]
    assert (ppo["status"], ppo["env"], ppo["seed"], ppo["budget"]) == ("finished", "Pendulum-v1", 3, 512)
    assert ppo["timesteps"] == ppo["simulator_steps"] == 512 and ppo["model_steps"] == 0
    assert [point["simulator_steps"] for point in ppo["evaluations"]] == [0, 256]
    assert all(len(point["returns"]) == 2 for point in ppo["evaluations"])
    assert len(ppo["returns"]) == 6 and ppo["lengths"] == [200] * 6
    assert ppo["score"] == pytest.approx(np.mean(ppo["returns"]))
    assert 0 < ppo["train_seconds"] < ppo["wall_seconds"] and ppo["peak_memory_mb"] > 50 and ppo["steps_per_second"] > 0
    assert ppo["versions"]["stable_baselines3"] and ppo["machine"]["cores"]
    assert ppo["settings"]["hyperparams"]["normalize"] is True
    # Both start from the same states, in the environment's own reward
    assert len(runs[RANDOM]["returns"]) == 6 and -2000 < runs[RANDOM]["score"] < -300
    assert runs["dqn"]["status"] == "failed" and "only supports" in runs["dqn"]["error"]


def test_report_shows_failures_and_keeps_logs(folder: Path) -> None:
    report = (folder / "out" / "benchmark.md").read_text()
    assert "**1 failed**" in report and "only supports" in report
    assert "--algo ppo --env Pendulum-v1 --seed SEED --n-timesteps 512" in report
    assert (folder / "out" / "learning_curves.png").stat().st_size > 1000
    assert "policy_gradient_loss" in (folder / "out" / "runs" / "Pendulum-v1" / "ppo" / "seed-3" / LOG).read_text()


def test_a_run_is_the_run_of_the_zoos_own_command(folder: Path) -> None:
    run = next(run for run in collect(folder / "out") if run["algo"] == "ppo")
    python, *words = run["command"].split()
    assert python == "python"
    done = command(*words[1:], "--log-folder", "bare", cwd=folder, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    ours = next((folder / "out").glob("runs/*/ppo/*/ppo/*/Pendulum-v1.zip"))
    models = [load_from_zip_file(path)[1]["policy"] for path in (ours, next(folder.glob("bare/ppo/*/Pendulum-v1.zip")))]
    for name, value in models[0].items():
        assert th.equal(value, models[1][name]), name


def test_the_same_command_repeats_no_finished_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.glob(f"out/runs/**/{RESULT}")}
    arguments = "--algos ppo --envs Pendulum-v1 --seeds 3 --budget 512 --conf ppo=ppo.yml --out out --evaluations 2"
    rest = ["--eval-episodes", "2", "--episodes", "6"]
    assert benchmark_command([*arguments.split(), *rest]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before} and len(before) == 2
    # The failed run of the other algorithm is still reported, and so is the command that made it
    report = (folder / "out" / "benchmark.md").read_text()
    assert "only supports" in report
    commands = json.loads((folder / "out" / RESULTS).read_text())["commands"]
    assert len(commands) == 2 and all(f"    {words}\n" in report for words in commands)


def test_other_settings_do_not_pass_for_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    words = "--algos ppo --envs Pendulum-v1 --seeds 3 --conf ppo=ppo.yml --out out --evaluations 2 --eval-episodes 2".split()
    assert benchmark_command([*words, "--episodes", "6", "--budget", "600"]) == 2
    assert "--budget Pendulum-v1=512" in capsys.readouterr().err
    assert benchmark_command([*words, "--episodes", "7"]) == 2
    assert "episodes 6 instead of 7" in capsys.readouterr().err.replace("\n", " ")


def test_the_runs_end_with_the_runner(tmp_path: Path) -> None:
    words = "benchmark --algos a2c --envs CartPole-v1 --seeds 0 --budget 1e7 --episodes 1 --jobs 2".split()
    runner = psutil.Popen([sys.executable, "-m", "sb3_grpo_plugin", *words, "--out", str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(f"runs/*/a2c/*/{PROGRESS}")):
            assert time.monotonic() < deadline and runner.poll() is None
            time.sleep(0.1)
        children = runner.children(recursive=True)
        assert children
    finally:
        runner.kill()
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert not list(tmp_path.glob(f"runs/*/a2c/*/{RESULT}"))


def spec_of(algo: str = "ppo", env: str = "CartPole-v1", seed: int = 0, **changes: object) -> RunSpec:
    return RunSpec(algo, env, seed, budget=1000, zoo_algo="ppo", **changes)  # type: ignore[arg-type]


def fake_result(spec: RunSpec, score: float = 1.0, **changes: object) -> dict:
    evaluations = [
        {"due": 100 * i, "simulator_steps": 100 * i + 4, "model_steps": 0, "returns": [score * i / 10] * 5} for i in range(10)
    ]
    return {
        **{name: getattr(spec, name) for name in ("algo", "env", "seed", "budget", "settings", "command")},
        **{"format": FORMAT, "status": "finished", "score": score, "score_std": 0.0, "returns": [score], "lengths": [1]},
        **{"versions": {"python": "3"}, "machine": {"cores": 2}, "wall_seconds": 1.0, "evaluations": evaluations},
        **{"simulator_steps": 1000, "model_steps": 0, "updates": 1, "timesteps": 1000, "train_seconds": 1.0},
        **{"steps_per_second": 1.0, "peak_memory_mb": 1.0, **changes},
    }


class FakeRuns:
    """Counts runs, and finishes those that are not in ``fail``."""

    def __init__(self, fail: tuple[RunSpec, ...] = ()) -> None:
        self.fail, self.made, self.stopped = fail, [], False

    def __call__(self, spec: RunSpec, folder: Path) -> str | None:
        self.made.append(spec)
        folder.mkdir(parents=True, exist_ok=True)
        if spec in self.fail:
            return "out of luck"
        benchmark.write_json(folder / RESULT, fake_result(spec))
        return None

    def stop(self) -> None:
        self.stopped = True


ABOUT = {"format": FORMAT, "commands": ["sb3-grpo benchmark"]}
SPECS = [spec_of(algo, env, seed) for algo in ("ppo", "grpo") for env in ("CartPole-v1", "ALE/Pong-v5") for seed in (0, 1)]


def test_every_run_is_there_once_whatever_happened_before(tmp_path: Path) -> None:
    runs = FakeRuns(fail=(SPECS[1],))
    benchmark.run_all(SPECS, tmp_path, runs, jobs=3, about=ABOUT)
    assert sorted(map(str, runs.made)) == sorted(map(str, SPECS))
    failed = [run for run in collect(tmp_path) if run["status"] == "failed"]
    assert len(collect(tmp_path)) == len(SPECS) and [run["error"] for run in failed] == ["out of luck"]
    # Half a run, as a crash leaves it
    half = tmp_path / SPECS[4].folder
    (half / RESULT).unlink()
    (half / f"{RESULT}.77.part").write_text("{")
    (half / SPEC).write_text(json.dumps(asdict(SPECS[4])))
    again = FakeRuns()
    benchmark.run_all(SPECS, tmp_path, again, jobs=1, about=ABOUT)
    assert again.made == [SPECS[1], SPECS[4]]
    assert [run["status"] for run in collect(tmp_path)] == ["finished"] * len(SPECS)
    # Also while runs are under way
    results = json.loads((tmp_path / RESULTS).read_text())
    assert len(results["runs"]) == len(SPECS) and results["commands"] == ABOUT["commands"]


def test_a_full_disk_stops_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = FakeRuns()
    write_json = benchmark.write_json

    def full(path: Path, content: object) -> None:
        if path.name == RESULTS:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_json(path, content)

    monkeypatch.setattr(benchmark, "write_json", full)
    monkeypatch.setattr(benchmark, "LocalRuns", lambda: runs)
    assert benchmark_command(["--algos", "ppo", "--seeds", "0", "--budget", "10", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "No space left" in said and "repeat the command" in said and "Traceback" not in said
    assert runs.stopped


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / RESULT
    benchmark.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        benchmark.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--algos grop", "did you mean 'grpo'"),
        ("--envs CartPol-v1", "did you mean 'CartPole-v1'"),
        ("--seeds 4-0", "--seeds '4-0'"),
        ("--seeds x", "--seeds 'x'"),
        ("--budget many", "--budget 'many'"),
        ("--budget 0", "at least 1 step"),
        ("--budget CartPole-v2=10", "did you mean 'CartPole-v1'"),
        ("--jobs 0", "--jobs 0: at least 1"),
        ("--conf ppo=missing.yml", "is not a yml file"),
        ("--conf a2c=missing.yml", "ALGO=FILE.yml: the algorithm 'a2c'"),
        ("--ray 127.0.0.1:1", "nobody answers there|--ray: No module named 'ray'"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    arguments: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "run_all", lambda *_: pytest.fail("it started"))
    assert benchmark_command([*arguments.split(), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert any(part in said for part in expected.split("|")), said


def test_an_environment_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "Box2D", None)
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=r"'LunarLander-v3' cannot be made: Box2D is not installed.*pip install"):
        benchmark_matrix.check_environment("LunarLander-v3")


def test_an_algorithm_without_hyperparameters_for_the_environment(tmp_path: Path) -> None:
    (tmp_path / "one.yml").write_text("Acrobot-v1: {n_timesteps: 10}")
    with pytest.raises(ValueError, match="No hyperparameters for ppo on CartPole-v1"):
        benchmark_matrix.read_hyperparams("ppo", "CartPole-v1", str(tmp_path / "one.yml"))


@pytest.mark.parametrize(
    ("text", "expected"), [('{"format": 99}', "format 99"), ("[]", "format None"), ("{", "damaged"), ("", "damaged")]
)
def test_results_of_another_version_or_damaged(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / RESULTS).write_text(text)
    assert benchmark_command(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert expected in said and "--out" in said
    assert (tmp_path / RESULTS).read_text() == text


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert benchmark_command(["--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_one_runner_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with benchmark.locked_folder(tmp_path):
        assert benchmark_command(["--out", str(tmp_path)]) == 2
    assert "Another benchmark is running" in capsys.readouterr().err


def test_seeds_and_budgets() -> None:
    assert parse_seeds(["0-2", "7,9", "1"]) == [0, 1, 2, 7, 9]
    assert parse_budgets(["b=5", "1e3"], ["a", "b"]) == {"a": 1000, "b": 5}
    assert parse_budgets(["b=5"], ["a", "b"]) == {"b": 5}


def test_the_budget_without_a_word_is_the_least_of_the_ymls(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("default: {n_timesteps: !!float 3e3, policy: MlpPolicy}")
    words = ["--algos", "ppo", "a2c", "--envs", "CartPole-v1", "--seeds", "0-1", "--conf", f"a2c={tmp_path / 'a.yml'}"]
    specs = benchmark_matrix.make_specs(benchmark.make_parser().parse_args(words))
    assert {spec.budget for spec in specs} == {3000}
    assert [str(spec) for spec in specs][:3] == [
        "random CartPole-v1 seed 0",
        "ppo CartPole-v1 seed 0",
        "a2c CartPole-v1 seed 0",
    ]
    assert specs[1].conf is None and specs[2].conf and specs[1].hyperparams["n_envs"] == 8


@pytest.mark.parametrize("budget", [64, 70, 100, 128])
@pytest.mark.parametrize("branch_steps", [0, 40])
def test_no_update_learns_from_more_than_the_budget(budget: int, branch_steps: int, tmp_path: Path) -> None:
    from sb3_grpo_plugin.benchmark_train import BudgetCallback, BudgetSpent, simulator_steps

    used = []

    class Branching(PPO):
        branch_steps = 0

        def train(self) -> None:
            used.append(simulator_steps(self))

    class Look(BudgetCallback):
        def _on_rollout_end(self) -> None:
            self.model.branch_steps += branch_steps
            super()._on_rollout_end()

    model = Branching("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2), n_steps=16, batch_size=16, device="cpu")
    callback = Look(spec_of(evaluations=4, eval_episodes=1), tmp_path / PROGRESS)
    callback.spec = RunSpec("ppo", "CartPole-v1", 0, budget, "ppo", evaluations=4, eval_episodes=1)
    callback.eval_env = make_vec_env("CartPole-v1")
    try:
        model.learn(budget, callback=callback)
    except BudgetSpent:
        pass
    rollout = 32 + branch_steps
    assert used == [rollout * (i + 1) for i in range(budget // rollout)]
    points = callback.evaluations
    assert [point["due"] for point in points] == [round(budget * i / 4) for i in range(len(points))]
    assert all(point["simulator_steps"] >= point["due"] for point in points)


def many_results() -> list[dict]:
    runs = []
    for env in ("A-v1", "B-v1"):
        runs.append(fake_result(spec_of(RANDOM, env), 10.0))
        runs += [fake_result(spec_of("ppo", env, seed), 100.0 + 10 * seed) for seed in range(3)]
        runs += [fake_result(spec_of("grpo", env, seed), 190.0, model_steps=500) for seed in range(3)]
    return runs


def test_scores_are_normalized_by_random_and_ppo() -> None:
    from sb3_grpo_plugin.benchmark_figures import normalized_scores

    runs = many_results()
    reference, envs, scores = normalized_scores(runs)
    assert (reference, envs) == ("ppo", ["A-v1", "B-v1"])
    assert scores["grpo"] == [pytest.approx(np.full(3, 180 / 100))] * 2
    assert scores["ppo"][0] == pytest.approx([0.9, 1.0, 1.1])
    # All seeds count that finished; an environment where the reference learned nothing does not
    assert [len(column) for column in normalized_scores(runs[:-1])[2]["grpo"]] == [3, 2]
    runs[0]["score"] = 1000.0
    assert normalized_scores(runs)[1] == ["B-v1"]


def test_seeds_are_counted_per_algorithm() -> None:
    from sb3_grpo_plugin.benchmark_report import score_table

    runs = [{**run, "seed": run["seed"] + 10} if run["algo"] == "grpo" else run for run in many_results()]
    assert [line.split("|")[3].strip() for line in score_table(runs).splitlines()[2:]] == ["3", "3"]
    assert [line.split("|")[3].strip() for line in score_table(runs[:-1]).splitlines()[2:]] == ["3", "2 to 3"]


def test_the_interquartile_mean_is_rliables_and_weighs_environments_alike() -> None:
    from rliable import metrics

    from sb3_grpo_plugin.benchmark_figures import interquartile_mean

    matrix = np.random.default_rng(0).normal(size=(4, 5))
    assert interquartile_mean(list(matrix.T)) == pytest.approx(metrics.aggregate_iqm(matrix))
    # The same seeds twice are no more of an environment
    assert interquartile_mean([matrix[:, 0].repeat(2), *matrix.T[1:]]) == pytest.approx(metrics.aggregate_iqm(matrix))
    stacked = interquartile_mean([np.stack((column, 2 * column)) for column in matrix.T])
    assert stacked == pytest.approx([metrics.aggregate_iqm(matrix), 2 * metrics.aggregate_iqm(matrix)])


def test_intervals_hold_the_noise_of_both_sides() -> None:
    from sb3_grpo_plugin.benchmark_figures import aggregates

    rng = np.random.default_rng(0)
    sure, unsure = [np.ones(10), np.ones(5)], [1 + 0.2 * rng.normal(size=n) for n in (10, 5)]
    unsure = [column / column.mean() for column in unsure]

    def width(algo: list[np.ndarray], reference: list[np.ndarray]) -> np.ndarray:
        points, intervals = aggregates({"grpo": algo, "ppo": reference}, "ppo")
        assert points["grpo"] == pytest.approx([points["grpo"][0], 1, 1, 1, 1])
        return intervals["grpo"][1] - intervals["grpo"][0]

    assert (width(sure, sure) == 0).all()
    one_side = width(unsure, sure)
    assert (width(sure, unsure) > 0).all() and (width(unsure, unsure) > 1.2 * one_side).all()
    # Ten seeds: the interval of a mean, 2 * 1.96 standard errors
    assert one_side[3] == pytest.approx(2 * 1.96 * unsure[0].std() / 10**0.5, rel=0.1)


def test_learning_curves_end_with_the_score() -> None:
    from sb3_grpo_plugin.benchmark_figures import learning_curve

    run = fake_result(spec_of(), 50.0, model_steps=7)
    steps, all_steps, returns = learning_curve(run)
    assert steps == [*range(0, 1000, 100), 1000] and returns[-1] == 50 and all_steps[-1] == 1007
    # Branches may leap over the last points of the plan: the policy there is the last one
    del run["evaluations"][8:]
    assert learning_curve(run)[0] == steps and learning_curve(run)[2][8:] == [50.0, 50.0, 50.0]


def test_report_of_several_environments(tmp_path: Path) -> None:
    from sb3_grpo_plugin.benchmark_report import write_report

    failed = {**{key: fake_result(spec_of("grpo", "C-v1"))[key] for key in ("algo", "env", "seed", "budget", "command")}}
    runs = [*many_results(), {**failed, "status": "failed", "error": "boom | boom"}]
    summary = write_report(tmp_path, runs, ["sb3-grpo benchmark"])
    point, low, high = summary["normalized"]["grpo"]["iqm"]
    assert point == pytest.approx(1.8) and low < 1.8 < high
    text = (tmp_path / "benchmark.md").read_text()
    assert summary["by_environment"]["ppo"]["B-v1"][0] == 1
    for part in ("| A-v1 | 1000 | 3 | 190.0 +/- 0.0 | 110.0 +/- 10.0 | 10.0 |", "boom \\| boom", "| A-v1 | 1.80 [1."):
        assert part in text
    names = {"learning_curves", "learning_curves_model_steps", "aggregates", "performance_profiles"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names and all(f"({name}.png)" in text for name in names)


def test_report_of_nothing_but_failures(tmp_path: Path) -> None:
    from sb3_grpo_plugin.benchmark_report import write_report

    failed = {"algo": "grpo", "env": "A-v1", "seed": 0, "budget": 5, "command": "c", "status": "failed", "error": "boom"}
    assert write_report(tmp_path, [failed], ["sb3-grpo benchmark"]) == {}
    assert "**1 failed**" in (tmp_path / "benchmark.md").read_text()


def test_a_failure_is_forgotten_when_the_run_is_made_again(tmp_path: Path) -> None:
    spec = SPECS[0]
    benchmark.run_all([spec], tmp_path, FakeRuns(fail=(spec,)), jobs=1, about=ABOUT)
    assert (tmp_path / spec.folder / FAILURE).is_file()
    benchmark.run_all([spec], tmp_path, FakeRuns(), jobs=1, about=ABOUT)
    assert [run["status"] for run in collect(tmp_path)] == ["finished"]
