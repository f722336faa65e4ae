"""
Where workers run: processes of this machine, or those of a Ray cluster. Either way a worker is a process that ends when
nobody holds its input any more.
"""

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sb3_grpo_plugin.files import write_whole

if TYPE_CHECKING:
    # Nodes of a cluster need no web framework
    from sb3_grpo_plugin.api.settings import Settings

LOG, RESUME = "log.txt", "resume.zip"
# What a worker needs not know
SECRETS = ("SB3_GRPO_API_KEY", "SB3_GRPO_DATABASE_URL")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
RAY_WAIT = 10.0


class Worker(Protocol):
    """One running job."""

    messages: "deque[dict[str, Any]]"

    def send(self, command: str) -> None:
        """Tell it ``stop`` or ``suspend``."""

    def ended(self) -> str | None:
        """``None`` while messages may come; else how it ended, such as ``exit status -9``."""

    def fetch(self, name: str, sha256: str, folder: Path) -> None:
        """Move a model's file into ``folder`` under the name ``<sha256>.zip``; nothing happens when it is there already."""

    def kill(self) -> None:
        """End it now."""


class Executor(Protocol):
    """Starts workers."""

    def start(self, spec: dict[str, Any], folder: Path, resume: Path | None, wake: Callable[[], None]) -> Worker | None:
        """Start one; ``wake`` is called when it has news. ``None`` when an earlier one of this job is not gone yet."""

    def stop(self) -> None:
        """Leave."""


def hash_file(path: Path) -> str:
    """
    :param path: of a file
    :return: its SHA-256 in hexadecimal
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Let a rename in a folder outlast a power cut."""
    # Not every system opens folders
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class ProcessWorker:
    """
    A child process.

    :param spec: of the job
    :param folder: of the job; the log of the worker stays there
    :param wake: called when there is news
    """

    def __init__(self, spec: dict[str, Any], folder: Path, wake: Callable[[], None]) -> None:
        self.folder = folder
        self.messages: deque[dict[str, Any]] = deque()
        self.wake = wake
        environ = {name: value for name, value in os.environ.items() if name not in SECRETS}
        with open(folder / LOG, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sb3_grpo_plugin.api.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env={**environ, "MPLBACKEND": "Agg", "SDL_VIDEODRIVER": "dummy", **dict.fromkeys(THREADS, "1")},
                start_new_session=True,
            )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.send(json.dumps(spec))

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                # The last line of a killed one may be half a line
                with contextlib.suppress(ValueError):
                    self.messages.append(json.loads(line))
                    self.wake()
        self.process.wait()
        self.wake()

    def send(self, command: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(command.encode() + b"\n")
            self.process.stdin.flush()

    def ended(self) -> str | None:
        if self.reader.is_alive():
            return None
        status = self.process.poll()
        if status is not None:
            assert self.process.stdin is not None
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        return None if status is None else f"exit status {status}"

    def fetch(self, name: str, sha256: str, folder: Path) -> None:
        target = folder / f"{sha256}.zip"
        source = self.folder / name
        if target.exists() and not source.exists():
            return
        if hash_file(source) != sha256:
            raise ValueError(f"The worker's file {name} is not what the worker announced.")
        os.replace(source, target)
        sync_folder(folder)

    def kill(self) -> None:
        # Its own session: what it started goes with it
        if self.process.poll() is None:
            with contextlib.suppress(OSError, AttributeError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()


class Processes:
    """Workers as processes of this machine."""

    def start(self, spec: dict[str, Any], folder: Path, resume: Path | None, wake: Callable[[], None]) -> Worker | None:
        folder.mkdir(parents=True, exist_ok=True)
        if resume is not None:
            spec["resume"]["file"] = os.path.relpath(resume, folder)
        return ProcessWorker(spec, folder, wake)

    def stop(self) -> None:
        pass


class Host:
    """
    What Ray keeps on the machine of a worker: the worker's parent, and its messages. A class of its own process.

    :param spec: of the job
    :param resume: content of the checkpoint to go on from
    """

    def __init__(self, spec: dict[str, Any], resume: bytes | None) -> None:
        self.scratch = tempfile.TemporaryDirectory(prefix="sb3-grpo-")
        folder = Path(self.scratch.name)
        if resume is not None:
            (folder / RESUME).write_bytes(resume)
            spec["resume"]["file"] = RESUME
        self.worker = ProcessWorker(spec, folder, lambda: None)

    def poll(self, commands: list[str]) -> tuple[list[dict[str, Any]], str | None, str]:
        """
        :param commands: for the worker
        :return: its messages since the last call, how it ended, and the end of its log then
        """
        for command in commands:
            self.worker.send(command)
        # In this order: what comes between the two is found at the next call
        ended = self.worker.ended()
        messages = []
        while self.worker.messages:
            messages.append(self.worker.messages.popleft())
        log = (self.worker.folder / LOG).read_text(errors="replace")[-20_000:] if ended else ""
        return messages, ended, log

    def read(self, name: str) -> bytes:
        return (self.worker.folder / name).read_bytes()

    def drop(self, name: str) -> None:
        (self.worker.folder / name).unlink(missing_ok=True)

    def kill(self) -> None:
        self.worker.kill()


class RayWorker:
    """
    A worker somewhere on a Ray cluster.

    :param ray: the module
    :param actor: of ``Host``
    :param folder: of the job, for its log
    :param wake: called when there is news
    """

    def __init__(self, ray: Any, actor: Any, folder: Path, wake: Callable[[], None]) -> None:
        self.ray = ray
        self.actor = actor
        self.folder = folder
        self.messages: deque[dict[str, Any]] = deque()
        self.wake = wake
        self._commands: deque[str] = deque()
        self._end: str | None = None
        self._idle = threading.Event()
        threading.Thread(target=self._poll, daemon=True).start()

    def _poll(self) -> None:
        end = None
        while end is None:
            commands = []
            while self._commands:
                commands.append(self._commands.popleft())
            try:
                messages, end, log = self.ray.get(self.actor.poll.remote(commands))
            except Exception as error:
                # Its machine or the cluster is gone
                messages, end, log = [], f"Ray: {str(error).splitlines()[0] if str(error) else error!r}", ""
            self.messages.extend(messages)
            if log:
                (self.folder / LOG).write_text(log)
            if messages or end:
                self.wake()
            self._idle.wait(0.2)
            self._idle.clear()
        self._end = end
        self.wake()

    def send(self, command: str) -> None:
        self._commands.append(command)
        self._idle.set()

    def ended(self) -> str | None:
        return self._end

    def fetch(self, name: str, sha256: str, folder: Path) -> None:
        target = folder / f"{sha256}.zip"
        if target.exists():
            return
        try:
            data = self.ray.get(self.actor.read.remote(name))
        except self.ray.exceptions.RayError as error:
            raise ValueError(f"The worker's machine went away before its model was fetched: {error!r}") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(f"The worker's file {name} is not what the worker announced.")
        write_whole(target, data)
        sync_folder(folder)
        self.actor.drop.remote(name)

    def kill(self) -> None:
        # It may be gone already, or the cluster
        with contextlib.suppress(Exception):
            self.ray.kill(self.actor)


class RayCluster:
    """
    Workers on a Ray cluster. An actor's name is the lock of its job: a cluster has each name once.

    :param settings: of the server
    :param data_id: of the data folder, the namespace of the names
    :raises ValueError: there is no Ray, or no cluster
    """

    def __init__(self, settings: "Settings", data_id: str) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError(
                f'SB3_GRPO_EXECUTOR=ray: {error}. Install it with `pip install "sb3-grpo-plugin[ray]"`.'
            ) from error
        from sb3_grpo_plugin.benchmark_ray import check_reachable

        self.ray = ray
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = settings.ray_address or os.environ.get("RAY_ADDRESS", "")
        try:
            check_reachable(address)
            # Its processes inherit our environment
            with without_secrets():
                ray.init(
                    address=address or None, namespace=f"sb3-grpo-{data_id}", log_to_driver=False, logging_level=logging.ERROR
                )
        except Exception as error:
            raise ValueError(f"SB3_GRPO_RAY_ADDRESS={address}: the cluster cannot be used. {error}") from error
        self.host = ray.remote(num_cpus=1, max_restarts=0)(Host)

    def start(self, spec: dict[str, Any], folder: Path, resume: Path | None, wake: Callable[[], None]) -> Worker | None:
        folder.mkdir(parents=True, exist_ok=True)
        data = None if resume is None else resume.read_bytes()
        try:
            actor = self.host.options(name=spec["job_id"]).remote(spec, data)
        except ValueError:
            # The name is taken: the actor of a killed server ends when the cluster notices
            return None
        return RayWorker(self.ray, actor, folder, wake)

    def stop(self) -> None:
        self.ray.shutdown()


@contextlib.contextmanager
def without_secrets() -> Any:
    """Hide our secrets from the processes that start inside."""
    hidden = {name: os.environ.pop(name) for name in SECRETS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def make_executor(settings: "Settings", data_id: str) -> Executor:
    """
    :param settings: of the server
    :param data_id: of the data folder
    :return: what ``SB3_GRPO_EXECUTOR`` asks for
    :raises ValueError: it cannot be had
    """
    return RayCluster(settings, data_id) if settings.executor == "ray" else Processes()
