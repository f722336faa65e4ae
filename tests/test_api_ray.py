"""Jobs of the web API on a Ray cluster of this machine."""

import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually

pytest.importorskip("fastapi", reason="needs the extra [api]")
pytest.importorskip("ray", reason="needs the extra [ray]")
psutil = pytest.importorskip("psutil", reason="needs psutil to find worker processes")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from api_server import Server  # noqa: E402

pytestmark = pytest.mark.slow

ENDLESS = {"env_name": "CartPole-v1", "total_timesteps": 10_000_000, "n_steps": 32}
# Seconds: a cluster starts slowly
PATIENCE = 120
KEY = "a-key-that-is-long-enough"


def workers() -> list[Any]:
    """Processes that train somewhere below Ray."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if "sb3_grpo_plugin.api.worker" in (process.info["cmdline"] or ()) and "sb3-grpo-" in process.cwd():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return [process for process in found if "jobs" not in Path(process.cwd()).parts]


def test_a_node_and_the_server_are_lost_and_the_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    server = Server(
        tmp_path / "data",
        SB3_GRPO_EXECUTOR="ray",
        SB3_GRPO_RAY_ADDRESS=cluster.address,
        SB3_GRPO_CHECKPOINT_SECONDS="0.5",
        SB3_GRPO_API_KEY=KEY,
    )

    def call(method: str, path: str, body: Any = None) -> Any:
        return server.call(method, path, body, Authorization=f"Bearer {KEY}")[1]

    def steps() -> int:
        return call("GET", "/models/m").get("total_timesteps", 0)

    try:
        server.start()
        job_id = call("POST", "/train", {**ENDLESS, "model_name": "m"})["job_id"]
        eventually(lambda: steps() > 500, PATIENCE)
        (worker,) = workers()
        assert "SB3_GRPO_API_KEY" not in worker.environ()
        # The worker
        worker.kill()
        before = steps()
        eventually(lambda: steps() > before, PATIENCE)
        # Its node
        (worker,) = workers()
        cluster.remove_node(node, allow_graceful=False)
        psutil.wait_procs([worker], timeout=60)
        assert not worker.is_running()
        before = steps()
        node = cluster.add_node(num_cpus=1)
        eventually(lambda: steps() > before, PATIENCE)
        # The server
        server.kill()
        server.start()
        before = steps()
        assert before > 0
        eventually(lambda: steps() > before, PATIENCE)
        assert len(workers()) == 1
        call("POST", f"/training/{job_id}/stop")
        status = eventually(lambda: call("GET", f"/training/{job_id}/status") if not workers() else None, PATIENCE)
        assert status["status"] == "stopped" and status["current_timesteps"] == steps()
        assert call("POST", "/inference", {"model_name": "m", "observation": [0, 0, 0, 0]})["action"] in (0, 1)
        assert "hyperparameters" in (server.folder / "jobs" / job_id / "log.txt").read_text()
    finally:
        if server.process is not None and server.process.poll() is None:
            server.stop()
        cluster.shutdown()


def test_a_cluster_that_does_not_answer(tmp_path: Path) -> None:
    server = Server(tmp_path / "data", SB3_GRPO_EXECUTOR="ray", SB3_GRPO_RAY_ADDRESS="127.0.0.1:9")
    with pytest.raises(RuntimeError, match="nobody answers there") as error:
        server.start()
    assert "Traceback" not in str(error.value)
