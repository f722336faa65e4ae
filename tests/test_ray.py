"""A Ray cluster of two nodes on this machine."""

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from sb3_grpo_plugin.benchmark import LOG, RESULTS, collect
from sb3_grpo_plugin.benchmark_matrix import RunSpec
from sb3_grpo_plugin.benchmark_ray import run_there

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

WORDS = "benchmark --algos ppo --envs CartPole-v1 --budget 1024 --evaluations 2 --eval-episodes 1 --episodes 2".split()


def runs_below(process: psutil.Process) -> list[psutil.Process]:
    """The benchmark's runs among the descendants of a process."""
    found = []
    for child in process.children(recursive=True):
        try:
            if "sb3_grpo_plugin.benchmark_run" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


def test_a_node_is_lost_and_every_run_is_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        runner = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "sb3_grpo_plugin",
                *WORDS,
                "--seeds",
                "0-2",
                "--ray",
                cluster.address,
                "--out",
                str(tmp_path),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        raylet = psutil.Process(dict(lost.live_processes())["raylet"].pid)
        deadline = time.monotonic() + 180
        victims: list[psutil.Process] = []
        while not victims:
            assert time.monotonic() < deadline and runner.poll() is None, "no run reached the second node"
            victims = runs_below(raylet)
            time.sleep(0.2)
        cluster.remove_node(lost, allow_graceful=False)
        # The run leaves with the node
        assert not psutil.wait_procs(victims, timeout=60)[1]
        output, _ = runner.communicate(timeout=300)
        assert runner.returncode == 0, output
    finally:
        cluster.shutdown()
    runs = json.loads((tmp_path / RESULTS).read_text())["runs"]
    assert sorted((run["algo"], run["seed"], run["status"]) for run in runs) == [
        *(("ppo", seed, "finished") for seed in range(3)),
        ("random", 0, "finished"),
    ]
    assert runs == collect(tmp_path)
    # Logs and models come back too
    assert len(list(tmp_path.glob(f"runs/CartPole-v1/*/seed-*/{LOG}"))) == 4
    assert len(list(tmp_path.glob("runs/CartPole-v1/ppo/seed-*/ppo/*/CartPole-v1.zip"))) == 3


def test_a_failing_run_brings_its_log_back() -> None:
    spec = RunSpec("dqn", "Pendulum-v1", 0, 100, "dqn")
    problem, archive = run_there(asdict(spec))
    assert problem is not None and "only supports" in problem
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        assert b"only supports" in file.read(LOG)
