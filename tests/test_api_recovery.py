"""What outlasts kill -9, a database that goes away, a full disk and files that somebody changed."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually

pytest.importorskip("fastapi", reason="needs the extra [api]")
psutil = pytest.importorskip("psutil", reason="needs psutil to find worker processes")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from api_server import Server, running  # noqa: E402

pytestmark = pytest.mark.slow

ENDLESS = {"env_name": "CartPole-v1", "total_timesteps": 10_000_000, "n_steps": 32}


def workers(job_id: str) -> list[Any]:
    """Processes that work in the folder of a job."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if "sb3_grpo_plugin.api.worker" in (process.info["cmdline"] or ()) and Path(process.cwd()).name == job_id:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def status(server: Server, job_id: str) -> dict[str, Any]:
    return server.call("GET", f"/training/{job_id}/status")[1]


def model_steps(server: Server, name: str) -> int:
    return server.call("GET", f"/models/{name}")[1].get("total_timesteps", 0)


def test_a_killed_worker_goes_on_from_its_checkpoint() -> None:
    with running(SB3_GRPO_CHECKPOINT_SECONDS="0.5") as server:
        job_id = server.train(env_name="MountainCarContinuous-v0", total_timesteps=1_000_000, n_steps=64, model_name="m")
        steps = eventually(lambda: model_steps(server, "m") if model_steps(server, "m") > 500 else 0)
        (worker,) = workers(job_id)
        worker.kill()
        eventually(lambda: [process for process in workers(job_id) if process.pid != worker.pid])
        # Its normalization goes on too: the log tells where the zoo found it
        assert eventually(lambda: model_steps(server, "m") > steps)
        assert "Loading saved VecNormalize stats" in (server.folder / "jobs" / job_id / "log.txt").read_text()
        assert status(server, job_id)["status"] == "running"
        server.call("POST", f"/training/{job_id}/stop")
        assert server.wait(job_id)["status"] == "stopped"
        eventually(lambda: not workers(job_id), 10)


def test_a_job_that_dies_again_and_again_is_given_up_with_its_model() -> None:
    with running(SB3_GRPO_CHECKPOINT_SECONDS="3600") as server:
        job_id = server.train(**ENDLESS, model_name="m")
        steps = eventually(lambda: model_steps(server, "m"))
        seen: set[int] = set()

        def unseen() -> list[Any]:
            return [process for process in workers(job_id) if process.pid not in seen]

        for _ in range(8):
            # Before the first update, which writes a checkpoint
            fresh = eventually(lambda: unseen() or status(server, job_id)["status"] == "interrupted")
            if fresh is True:
                break
            seen |= {process.pid for process in fresh}
            fresh[0].kill()
        job = server.wait(job_id, 10)
        assert job["status"] == "interrupted" and "in a row" in job["error_message"]
        assert job["current_timesteps"] == steps == model_steps(server, "m")
        assert server.call("POST", "/inference", {"model_name": "m", "observation": [0, 0, 0, 0]})[0] == 200


def test_a_killed_server_finds_its_jobs_again() -> None:
    with running(SB3_GRPO_CHECKPOINT_SECONDS="0.5", SB3_GRPO_WORKERS="2") as server:
        jobs = [server.train(**ENDLESS, model_name=f"m{number}") for number in range(3)]
        eventually(lambda: model_steps(server, "m0") > 500 and model_steps(server, "m1") > 500)
        server.call("POST", f"/training/{jobs[1]}/stop")
        server.kill()
        # The workers end with it
        eventually(lambda: not any(workers(job_id) for job_id in jobs), 10)
        server.start()
        steps = model_steps(server, "m0")
        assert steps > 500
        assert server.wait(jobs[1])["status"] == "stopped" and model_steps(server, "m1") > 500
        assert eventually(lambda: model_steps(server, "m0") > steps)
        assert eventually(lambda: model_steps(server, "m2"))
        assert all(len(workers(jobs[number])) == 1 for number in (0, 2))
        kept = {model["sha256"] for model in server.call("GET", "/models")[1]["models"]}
        assert {path.stem for path in (server.folder / "models").iterdir()} >= kept


def test_a_stopped_server_lets_its_jobs_write_a_checkpoint() -> None:
    with running(SB3_GRPO_CHECKPOINT_SECONDS="3600") as server:
        job_id = server.train(**ENDLESS, model_name="m")
        first = eventually(lambda: model_steps(server, "m"))
        eventually(lambda: status(server, job_id)["current_timesteps"] > first + 1000)
        server.stop()
        server.start()
        assert model_steps(server, "m") > first + 1000
        eventually(lambda: status(server, job_id)["status"] == "running")


def test_no_job_runs_while_its_lock_is_held(tmp_path: Path) -> None:
    import filelock

    with running() as server:
        first = server.train(**ENDLESS)
        eventually(lambda: status(server, first)["current_timesteps"])
        second = server.train(**ENDLESS, model_name="m")
        folder = server.folder / "jobs" / second
        folder.mkdir()
        with filelock.FileLock(folder / "lock"):
            server.call("POST", f"/training/{first}/stop")
            eventually(lambda: workers(second))
            time.sleep(5)
            assert status(server, second)["current_timesteps"] == 0 and not (folder / "zoo").exists()
        assert eventually(lambda: status(server, second)["current_timesteps"])


def test_a_model_that_somebody_changed_is_not_loaded() -> None:
    with running() as server:
        server.wait(server.train(env_name="CartPole-v1", total_timesteps=256, n_steps=32, model_name="m"))
        (path,) = (server.folder / "models").iterdir()
        ask = {"model_name": "m", "observation": [0, 0, 0, 0]}
        data = path.read_bytes()
        path.write_bytes(data + b" ")
        code, answer = server.call("POST", "/inference", ask)
        assert code == 409 and "changed since it was written" in answer["detail"]
        path.unlink()
        code, answer = server.call("POST", "/inference", ask)
        assert code == 409 and "cannot be read" in answer["detail"]
        assert server.call("GET", "/models/m/download")[0] == 409
        path.write_bytes(data)
        assert server.call("POST", "/inference", ask)[0] == 200


def test_a_model_of_another_version_is_explained(tmp_path: Path) -> None:
    """The record and the file agree; what is in the file cannot be read here."""
    import hashlib
    import io

    from sb3_grpo_plugin.api.inference import Inference, UnusableModel
    from sb3_grpo_plugin.api.store import Model, Store, database_url

    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("observation_space.pkl", b"cno_such_module\nSpace\n.")
    sha256 = hashlib.sha256(content.getvalue()).hexdigest()
    (tmp_path / f"{sha256}.zip").write_bytes(content.getvalue())
    store = Store(database_url(None, tmp_path), "id")
    store.put_model(
        Model(name="m", job_id="0", env_name="CartPole-v1", total_timesteps=1, created=0.0, size=1, sha256=sha256,
              observation_space={}, action_space={}, versions={"stable_baselines3": "1.0"})
    )  # fmt: skip
    with pytest.raises(UnusableModel, match=r"ModuleNotFoundError.*stable_baselines3 1\.0"):
        Inference(store, tmp_path).agent("m")


def test_the_port_and_the_folder_are_taken_once(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = Server(tmp_path / "data", SB3_GRPO_PORT=str(other.getsockname()[1]))
        with pytest.raises(RuntimeError, match="cannot be bound"):
            server.start()
    with running() as server:
        with pytest.raises(RuntimeError, match="another server works with the data folder"):
            Server(server.folder, SB3_GRPO_PORT="0").start()


def test_a_database_belongs_to_one_data_folder(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.sqlite'}"
    first = Server(tmp_path / "one", SB3_GRPO_DATABASE_URL=url)
    first.start()
    first.stop()
    with pytest.raises(RuntimeError, match="belongs to another data folder"):
        Server(tmp_path / "two", SB3_GRPO_DATABASE_URL=url).start()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(RuntimeError, match="cannot be used"):
        Server(tmp_path / "data").start()
    # Somebody else's folder is not closed to others
    other = tmp_path / "other"
    other.mkdir(mode=0o755)
    (other / "thesis.txt").write_text("")
    with pytest.raises(RuntimeError, match=r"it holds other files \(thesis\.txt"):
        Server(other).start()
    assert other.stat().st_mode & 0o777 == 0o755


def test_a_job_beyond_its_memory_fails_and_says_so() -> None:
    with running(SB3_GRPO_JOB_MEMORY_MB="600") as server:
        job = server.wait(server.train(env_name="ALE/Pong-v5", total_timesteps=100_000, n_steps=4096))
        assert job["status"] == "failed" and "SB3_GRPO_JOB_MEMORY_MB" in job["error_message"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_costs_checkpoints_not_the_server(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr}")
    server = Server(disk / "data", SB3_GRPO_CHECKPOINT_SECONDS="0.5")
    server.log = tmp_path / "log"
    try:
        server.start()
        job_id = server.train(**ENDLESS, model_name="m")
        steps = eventually(lambda: model_steps(server, "m"))
        with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(b"x" * 4096)
        time.sleep(3)
        assert server.call("GET", "/health")[0] == 200
        assert server.call("POST", "/inference", {"model_name": "m", "observation": [0, 0, 0, 0]})[0] == 200
        (disk / "filler").unlink()
        eventually(lambda: model_steps(server, "m") > steps, 90)
        server.call("POST", f"/training/{job_id}/stop")
        assert server.wait(job_id)["status"] == "stopped"
    finally:
        assert server.process is not None
        if server.process.poll() is None:
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
        # Lazily: a worker may still be on its way out of it
        subprocess.run(["umount", "-l", str(disk)], check=True)
