"""
Random ``kill -9`` of the server and its workers under load: no job lost, none doubled, every model file loads.

    python benchmarks/api_soak.py [--kills 30] [--seed 0] [--database-url URL]
"""

import argparse
import collections
import hashlib
import io
import random
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from api_server import ENDED, Server, running

ENVS = ("CartPole-v1", "Pendulum-v1", "MountainCarContinuous-v0")
STEPS = 20_000


def trainers(folder: Path) -> dict[str, list[psutil.Process]]:
    """Job -> processes that work in its folder and are past its lock: torch comes after that."""
    found: dict[str, list[psutil.Process]] = collections.defaultdict(list)
    for process in psutil.process_iter(["cmdline"]):
        try:
            if "sb3_grpo_plugin.api.worker" in (process.info["cmdline"] or ()):
                place = Path(process.cwd())
                if place.parent == folder / "jobs" and "libtorch" in Path(f"/proc/{process.pid}/maps").read_text():
                    found[place.name].append(process)
        except (psutil.Error, OSError):
            continue
    return found


class Watch(threading.Thread):
    """Looks for jobs that two processes train at once, ten times a second."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.looks = 0
        self.doubled: set[str] = set()
        self.over = False

    def run(self) -> None:
        while not self.over:
            self.looks += 1
            for job_id, processes in trainers(self.folder).items():
                # One that is being killed has no memory any more a moment later
                if len(processes) > 1 and len([p for p in processes if p.is_running() and p.status() != "zombie"]) > 1:
                    time.sleep(0.2)
                    if len(trainers(self.folder).get(job_id, [])) > 1:
                        self.doubled.add(job_id)
            time.sleep(0.1)


def soak(server: Server, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    submitted: list[str] = []
    counts: collections.Counter[str] = collections.Counter()
    watch = Watch(server.folder)
    watch.start()
    while counts["server"] + counts["worker"] < kills:
        jobs = server.call("GET", "/training/jobs?limit=1000")[1]["jobs"]
        for _ in range(4 - sum(job["status"] not in ENDED for job in jobs)):
            env_id = draw.choice(ENVS)
            submitted.append(server.train(env_name=env_id, total_timesteps=STEPS, n_steps=64, seed=len(submitted)))
        # From before a worker trains until well into it
        time.sleep(draw.uniform(0.1, 15.0))
        busy = [process for processes in trainers(server.folder).values() for process in processes]
        if busy and draw.random() < 0.5:
            draw.choice(busy).kill()
            counts["worker"] += 1
        else:
            server.kill()
            server.start()
            counts["server"] += 1
        print(f"kill {counts['server'] + counts['worker']}: {dict(counts)}, {len(submitted)} jobs so far", flush=True)
    ended = {job_id: server.wait(job_id, 600) for job_id in submitted}
    watch.over = True
    watch.join()
    report(server, submitted, ended, counts, watch)


def report(
    server: Server, submitted: list[str], ended: dict[str, Any], counts: "collections.Counter[str]", watch: Watch
) -> None:
    from sb3_grpo_plugin.grpo import GRPO

    listed = [job["job_id"] for job in server.call("GET", "/training/jobs?limit=1000")[1]["jobs"]]
    assert sorted(listed) == sorted(submitted), "jobs were lost or doubled"
    models = server.call("GET", "/models")[1]["models"]
    assert {model["job_id"] for model in models} == {job_id for job_id, job in ended.items() if job["current_timesteps"]}
    for model in models:
        status, data = server.call("GET", f"/models/{model['name']}/download")
        assert status == 200 and hashlib.sha256(data).hexdigest() == model["sha256"], model
        assert GRPO.load(io.BytesIO(data), device="cpu").num_timesteps == model["total_timesteps"]
        zeros = [0.0] * model["observation_space"]["shape"][0]
        assert server.call("POST", "/inference", {"model_name": model["name"], "observation": zeros})[0] == 200
    for job_id, job in ended.items():
        assert job["status"] in ("completed", "interrupted"), job
        assert job["status"] == "interrupted" or job["current_timesteps"] >= STEPS, job
        timesteps = server.call("GET", f"/training/{job_id}/curve")[1]["timesteps"]
        assert timesteps == sorted(set(timesteps)), job_id
    files = list((server.folder / "models").iterdir())
    assert not watch.doubled, watch.doubled
    print(f"{dict(counts)} kills; {len(submitted)} jobs: {dict(collections.Counter(j['status'] for j in ended.values()))}")
    print(f"lost 0, doubled 0 ({watch.looks} looks); {len(models)} models, {len(files)} files, all load with their SHA-256")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--database-url", default="")
    args = parser.parse_args()
    environ = {"SB3_GRPO_WORKERS": "2", "SB3_GRPO_CHECKPOINT_SECONDS": "2", "SB3_GRPO_DATABASE_URL": args.database_url}
    with running(**environ) as server:
        soak(server, args.kills, args.seed)


if __name__ == "__main__":
    main()
