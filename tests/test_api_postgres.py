"""The web API on a real PostgreSQL server, which these tests start, kill and start again."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually

pytest.importorskip("fastapi", reason="needs the extra [api]")
pytest.importorskip("psycopg", reason="needs the extra [postgres]")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from api_server import Server, running  # noqa: E402

# Debian keeps them out of PATH
FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
PROGRAMS = shutil.which("initdb", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, FOLDERS)]))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAMS is None, reason="needs PostgreSQL, for example Debian's package postgresql"),
]


class Postgres:
    """
    A PostgreSQL server of its own. It refuses to run as root, so root runs it as ``nobody``.

    :param folder: of its data
    """

    def __init__(self, folder: Path) -> None:
        assert PROGRAMS is not None
        self.bin = Path(PROGRAMS).resolve().parent
        self.folder = folder
        folder.mkdir(mode=0o700)
        self.user: dict[str, Any] = {}
        if os.geteuid() == 0:
            import pwd

            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            self.user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._run("initdb", "-D", folder / "db", "-U", "grpo", "--auth=trust", "--no-sync")
        self.url = f"postgresql://grpo:hidden-word@127.0.0.1:{self.port}/postgres"
        self.start()

    def _run(self, program: str, *arguments: object) -> None:
        subprocess.run(
            [str(self.bin / program), *map(str, arguments)],
            check=True,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            env={"PATH": os.defpath, "LC_ALL": "C"},
            **self.user,
        )

    def start(self) -> None:
        options = f"-p {self.port} -k '' -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run("pg_ctl", "-D", self.folder / "db", "-l", self.folder / "log", "-o", options, "-w", "start")

    def stop(self, mode: str = "immediate") -> None:
        self._run("pg_ctl", "-D", self.folder / "db", "-m", mode, "-w", "stop")


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    # Not in pytest's folder, which only its owner can enter
    folder = Path("/tmp") / f"sb3-grpo-postgres-{os.getpid()}"
    server = Postgres(folder)
    yield server
    with contextlib.suppress(subprocess.CalledProcessError):
        server.stop()
    shutil.rmtree(folder)


def test_a_job_from_order_to_model_across_a_crash_of_the_database(postgres: Postgres) -> None:
    with running(SB3_GRPO_DATABASE_URL=postgres.url, SB3_GRPO_CHECKPOINT_SECONDS="0.5") as server:
        job_id = server.train(env_name="CartPole-v1", total_timesteps=10_000_000, n_steps=32, model_name="m")

        def status() -> dict[str, Any]:
            return server.call("GET", f"/training/{job_id}/status")[1]

        def steps() -> int:
            return server.call("GET", "/models/m")[1].get("total_timesteps", 0)

        eventually(steps)
        ask = {"model_name": "m", "observation": [0, 0, 0, 0]}
        assert server.call("POST", "/inference", ask)[0] == 200
        postgres.stop()
        code, answer = server.call("GET", "/models")
        assert code == 503 and "does not answer" in answer["detail"]
        assert server.call("POST", "/train", {"env_name": "CartPole-v1"})[0] == 503
        code, health = server.call("GET", "/health")
        assert (code, health["status"], health["database"]) == (200, "degraded", "down")
        # The training goes on meanwhile
        time.sleep(3)
        postgres.start()
        before = eventually(steps)
        eventually(lambda: steps() > before)
        assert status()["status"] == "running"
        curve = server.call("GET", f"/training/{job_id}/curve")[1]["timesteps"]
        assert curve == sorted(set(curve))
        server.call("POST", f"/training/{job_id}/stop")
        assert server.wait(job_id)["status"] == "stopped" and server.call("POST", "/inference", ask)[0] == 200
        assert server.call("GET", "/health")[1]["database"] == "ok"
        assert "hidden-word" not in server.log.read_text()
        # And the records outlast the server
        server.kill()
        server.start()
        assert status()["status"] == "stopped" and steps() > before
        assert server.call("DELETE", "/models/m")[0] == 200


def test_a_database_that_is_down_at_start(postgres: Postgres, tmp_path: Path) -> None:
    postgres.stop("fast")
    try:
        server = Server(tmp_path / "data", SB3_GRPO_DATABASE_URL=postgres.url)
        with pytest.raises(RuntimeError, match="cannot be used") as error:
            server.start()
        assert "hidden-word" not in str(error.value) and "Traceback" not in str(error.value)
    finally:
        postgres.start()


def test_the_store_behaves_alike(postgres: Postgres, tmp_path: Path) -> None:
    """What the routes and the supervisor rely on, on both databases."""
    from sb3_grpo_plugin.api.store import Conflict, Model, QueueFull, Store, database_url, new_job

    subprocess.run(
        [str(postgres.bin / "createdb"), "-h", "127.0.0.1", "-p", str(postgres.port), "-U", "grpo", "alike"], check=True
    )
    for url in (None, postgres.url.rpartition("/")[0] + "/alike"):
        store = Store(database_url(url, tmp_path), "folder-one")
        job = new_job("CartPole-v1", "m", 10**10, None, 0, {"n_steps": 4})
        job_id = job.job_id
        store.add_job(job, 2)
        with pytest.raises(Conflict):
            store.add_job(new_job("CartPole-v1", "m", 10, None, 0, {}), 2)
        store.add_job(new_job("ALE/Pong-v5", None, 10, "a/b", 0, {}), 2)
        with pytest.raises(QueueFull):
            store.add_job(new_job("CartPole-v1", None, 10, None, 0, {}), 2)
        for timesteps in (10, 20, 30):
            store.add_point(job_id, timesteps, {"fps": 1.5}, current_timesteps=timesteps)
        # Gone on from a checkpoint at 15
        store.add_point(job_id, 20, {"fps": 2.5})
        assert [(point.timesteps, point.fps, point.episode_reward) for point in store.points(job_id)] == [
            (10, 1.5, None),
            (20, 2.5, None),
        ]
        for number in range(700):
            store.add_point(job_id, 100 + number, {})
        points = store.points(job_id)
        assert len(points) == 500 and (points[0].timesteps, points[-1].timesteps) == (10, 799)
        shared = {"job_id": job_id, "env_name": "e", "total_timesteps": 5, "created": 1.0, "size": 1, "versions": {}}
        spaces = {"observation_space": {}, "action_space": {}}
        assert store.put_model(Model(name="m", sha256="a", **shared, **spaces)) is None
        assert store.put_model(Model(name="m", sha256="b", **shared, **spaces)) == "a"
        assert store.put_model(Model(name="n", sha256="b", **{**shared, "job_id": "0"}, **spaces)) is None
        with pytest.raises(Conflict):
            store.delete_model("m")
        store.update_job(job_id, status="completed")
        # The file is that of the other model too
        assert store.delete_model("m") is None and store.delete_model("n") == "b"
        with pytest.raises(KeyError):
            store.delete_model("m")
        rows, total = store.jobs(1, 0)
        assert total == 2 and rows[0].env_name == "ALE/Pong-v5" and rows[0].model_name.startswith("ALE-Pong-v5-")
        assert store.counts() == {"completed": 1, "queued": 1}
        store.close()
        # The same folder may come back, another may not
        Store(database_url(url, tmp_path), "folder-one").close()
        with pytest.raises(Exception, match="another data folder"):
            Store(database_url(url, tmp_path), "folder-two")
