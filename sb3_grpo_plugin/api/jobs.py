"""
Starts queued jobs, writes down what their workers tell, and picks up what a killed server or worker left.

One thread does all of it. What a worker tells stays in its list until the database has it, so that a database that goes
away and comes back costs nothing.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sb3_grpo_plugin.api.executors import LOG, Executor, Worker
from sb3_grpo_plugin.api.schemas import ENDED
from sb3_grpo_plugin.api.settings import Settings
from sb3_grpo_plugin.api.store import Conflict, DatabaseDown, Job, Model, Store
from sb3_grpo_plugin.api.worker import LOCK

logger = logging.getLogger("sb3_grpo_plugin.api")

# Starts of a job that brought it no further, before it is given up
ATTEMPTS = 5
TICK_SECONDS = 0.5
# When a database is away, or an earlier worker of a job is not gone yet
PATIENCE_SECONDS = 2.0
SUSPEND_SECONDS = 20.0


class Supervisor:
    """
    :param store: records
    :param settings: of the server
    :param executor: where workers run
    :param changed: called with the name of a model that was replaced
    """

    def __init__(self, store: Store, settings: Settings, executor: Executor, changed: Callable[[str], None]) -> None:
        self.store = store
        self.settings = settings
        self.executor = executor
        self.changed = changed
        self.models = settings.data_dir / "models"
        self.folders = settings.data_dir / "jobs"
        self.workers: dict[str, Worker] = {}
        self._not_before: dict[str, float] = {}
        self._awake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """
        :raises DatabaseDown: the database went away meanwhile
        """
        self.recover()
        self._thread.start()

    def wake(self) -> None:
        """Look for news now."""
        self._awake.set()

    def recover(self) -> None:
        """Pick up what an earlier server left; its workers ended with it, or are about to."""
        for job in self.store.unfinished():
            self._pick_up(job)
        known = {model.sha256 for model in self.store.models()}
        for path in self.models.iterdir():
            if path.stem not in known or path.suffix != ".zip":
                path.unlink()

    def _pick_up(self, job: Job) -> None:
        """A job that is recorded as running, and that nobody runs."""
        if job.status == "queued" or job.job_id in self.workers:
            return
        if job.stop_requested:
            self._end(job.job_id, "stopped", None)
        else:
            # That the server or its database went away says nothing about the job
            self._requeue(job, attempts=max(job.attempts - 1, 0))

    def submit(self, job: Job) -> None:
        """
        :param job: new
        :raises QueueFull: no further job may wait
        :raises Conflict: the name of its model is taken
        """
        self.store.add_job(job, self.settings.queue_limit)
        self.wake()

    def stop(self, job_id: str) -> Job:
        """
        :param job_id: of the job
        :return: how it stands now
        :raises KeyError: there is none
        :raises Conflict: it has ended
        """

        def change(job: Job) -> Job:
            if job.status in ENDED:
                raise Conflict(f"The job has ended already: it is {job.status}.")
            job.stop_requested = True
            if job.status == "queued":
                job.status, job.end_time = "stopped", time.time()
            else:
                job.status = "stopping"
            return job

        job = self.store.change_job(job_id, change)
        if job is None:
            raise KeyError(job_id)
        worker = self.workers.get(job_id)
        if worker is not None:
            worker.send("stop")
        return job

    def close(self) -> None:
        """Let every worker write a checkpoint and end; their jobs go on with the next server."""
        self._closing = True
        for worker in list(self.workers.values()):
            worker.send("suspend")
        self.wake()
        self._thread.join(SUSPEND_SECONDS + 5)
        self.executor.stop()

    def _run(self) -> None:
        deadline = None
        while True:
            self._awake.wait(TICK_SECONDS)
            self._awake.clear()
            if self._closing:
                deadline = deadline or time.monotonic() + SUSPEND_SECONDS
                if not self.workers or time.monotonic() > deadline:
                    for worker in self.workers.values():
                        worker.kill()
                    return
            try:
                for job_id in list(self.workers):
                    self._attend(job_id)
                if not self._closing:
                    self._fill()
            except DatabaseDown as error:
                logger.warning("The database does not answer: %s", error)
                time.sleep(PATIENCE_SECONDS)
            except Exception:
                # One odd job must not end the service of all
                logger.exception("The supervisor stumbled")
                time.sleep(PATIENCE_SECONDS)

    # Starting

    def _fill(self) -> None:
        if len(self.workers) >= self.settings.workers:
            return
        now = time.monotonic()
        for job in self.store.unfinished():
            if len(self.workers) >= self.settings.workers:
                return
            self._pick_up(job)
            if job.status == "queued" and self._not_before.get(job.job_id, 0.0) <= now:
                self._start(job)

    def _start(self, job: Job) -> None:
        model = self.store.model(job.model_name)
        spec: dict[str, Any] = {
            "job_id": job.job_id,
            "env_name": job.env_name,
            "total_timesteps": job.total_timesteps,
            "reward": job.reward,
            "seed": job.seed,
            "hyperparams": job.hyperparams,
            "device": self.settings.device,
            "checkpoint_seconds": self.settings.checkpoint_seconds,
            "memory_mb": self.settings.job_memory_mb,
            "resume": None if model is None else {"sha256": model.sha256, "timesteps": model.total_timesteps},
        }

        def claim(found: Job) -> bool:
            if found.status != "queued":
                return False
            found.status = "running"
            found.attempts += 1
            found.start_time = found.start_time or time.time()
            return True

        # The record goes first: should we die in between, the job is found as running and started anew
        if not self.store.change_job(job.job_id, claim):
            return
        folder = self.folders / job.job_id
        clear(folder)
        resume = None if model is None else self.models / f"{model.sha256}.zip"
        try:
            worker = self.executor.start(spec, folder, resume, self.wake)
        except Exception as error:
            logger.exception("The worker of the job %s could not be started", job.job_id)
            self._not_before[job.job_id] = time.monotonic() + PATIENCE_SECONDS
            if job.attempts + 1 < ATTEMPTS:
                self._requeue(job, attempts=job.attempts + 1)
            else:
                self._end(job.job_id, "failed", f"The worker could not be started: {error}")
            return
        if worker is None:
            self._not_before[job.job_id] = time.monotonic() + PATIENCE_SECONDS
            self._requeue(job, attempts=job.attempts)
            return
        self.workers[job.job_id] = worker
        # A stop or the end of the server may have come in between
        if self._closing:
            worker.send("suspend")
        current = self.store.job(job.job_id)
        if current is not None and current.stop_requested:
            worker.send("stop")

    # What workers tell

    def _attend(self, job_id: str) -> None:
        worker = self.workers[job_id]
        # In this order: a worker that has ended sends nothing more
        ended = worker.ended()
        told_end = False
        while worker.messages:
            message = worker.messages[0]
            told_end = message["kind"] == "end"
            self._apply(job_id, worker, message)
            worker.messages.popleft()
            if told_end:
                break
        if told_end:
            # Its last act; whatever is left of it must not hold anything up
            timer = threading.Timer(PATIENCE_SECONDS, worker.kill)
            timer.daemon = True
            timer.start()
        elif ended is None:
            return
        else:
            worker.kill()
            self._lost(job_id, ended)
        del self.workers[job_id]
        job = self.store.job(job_id)
        if job is not None and job.status in ENDED:
            clear(self.folders / job_id)
        self.wake()

    def _apply(self, job_id: str, worker: Worker, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "progress":
            self.store.update_job(job_id, current_timesteps=message["timesteps"])
        elif kind == "update":
            values = {"current_timesteps": message["timesteps"], "metrics": message["metrics"]}
            if message["point"]:
                self.store.add_point(job_id, message["timesteps"], message["metrics"], **values)
            else:
                self.store.update_job(job_id, **values)
        elif kind == "model":
            self._take_model(job_id, worker, message)
        elif kind == "warning":
            self.store.update_job(job_id, error_message=message["text"])
        elif kind == "end":
            self._finish(job_id, message["status"], message["error"])

    def _take_model(self, job_id: str, worker: Worker, message: dict[str, Any]) -> None:
        job = self.store.job(job_id)
        assert job is not None
        try:
            worker.fetch(message["file"], message["sha256"], self.models)
        except (OSError, ValueError) as error:
            logger.warning("The model of the job %s could not be taken over: %s", job_id, error)
            self.store.update_job(job_id, error_message=f"A checkpoint could not be kept: {error}")
            return
        replaced = self.store.put_model(
            Model(
                name=job.model_name,
                job_id=job_id,
                env_name=job.env_name,
                reward=job.reward,
                total_timesteps=message["timesteps"],
                created=time.time(),
                size=message["size"],
                sha256=message["sha256"],
                mean_reward=message["mean_reward"],
                observation_space=message["observation_space"],
                action_space=message["action_space"],
                versions=message["versions"],
            )
        )
        self.changed(job.model_name)
        if replaced is not None and replaced != message["sha256"]:
            (self.models / f"{replaced}.zip").unlink(missing_ok=True)

    # How jobs end

    def _finish(self, job_id: str, status: str, error: str | None) -> None:
        job = self.store.job(job_id)
        assert job is not None
        if status in ("suspended", "busy"):
            if job.stop_requested:
                self._end(job_id, "stopped", None)
            else:
                self._not_before[job_id] = time.monotonic() + PATIENCE_SECONDS
                self._requeue(job, attempts=max(job.attempts - 1, 0))
        else:
            self._end(job_id, status, error)

    def _lost(self, job_id: str, how: str) -> None:
        """A worker ended without a word."""
        job = self.store.job(job_id)
        assert job is not None
        if job.stop_requested:
            self._end(job_id, "stopped", None)
        elif job.attempts < ATTEMPTS:
            logger.warning("The worker of the job %s was lost (%s); it starts again", job_id, how)
            self._requeue(job, attempts=job.attempts)
        else:
            kept = self.store.model(job.model_name) is not None
            what = "The model is that of the last checkpoint." if kept else "There is no model yet."
            text = f"The worker ended {job.attempts} times in a row without getting on ({how}). {what}"
            self._end(job_id, "interrupted", text)

    def _requeue(self, job: Job, attempts: int) -> None:
        model = self.store.model(job.model_name)
        timesteps = 0 if model is None else model.total_timesteps
        self.store.update_job(job.job_id, status="queued", attempts=attempts, current_timesteps=timesteps)

    def _end(self, job_id: str, status: str, error: str | None) -> None:
        values: dict[str, Any] = {"status": status, "end_time": time.time()}
        if error is not None or status == "completed":
            values["error_message"] = error
        self.store.update_job(job_id, **values)


def clear(folder: Path, kept: Sequence[str] = (LOG, LOCK)) -> None:
    """
    :param folder: of a job, which may not be there
    :param kept: what stays in it
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name in kept:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
