"""
The process of one training job: ``python -m sb3_grpo_plugin.api.worker`` in the job's folder.

Its first line of input is the job as JSON; further lines are commands (``stop``, ``suspend``). When the input closes, whoever
started it is gone, and so is this process. Its output is one JSON object a line: what happened, in order. It knows no
database, and writes nothing outside of its folder. What takes seconds to import comes after the lock: ``training.py``.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any

import filelock

LOCK = "lock"
LOCK_SECONDS = 60
NICENESS = 10
GONE, TOO_LARGE = 3, 4


class Line:
    """
    The two pipes to whoever started this process.

    :param source: file descriptor to read commands from
    :param target: file descriptor to write messages to
    """

    def __init__(self, source: int, target: int) -> None:
        self.source = source
        self.target = target
        self.command = ""
        self._rest = b""
        self._writing = threading.Lock()

    def read(self) -> str:
        """
        :return: the next line; ends this process when there will be none
        """
        while b"\n" not in self._rest:
            # Not sys.stdin, whose lock a thread must not hold when the interpreter ends
            chunk = os.read(self.source, 65536)
            if not chunk:
                os._exit(GONE)
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def watch(self) -> None:
        """Take commands from now on, in a thread."""

        def take() -> None:
            while True:
                self.command = self.read()

        threading.Thread(target=take, daemon=True).start()

    def tell(self, kind: str, **content: Any) -> None:
        """
        :param kind: of the message
        :param content: without NaN or infinity
        """
        data = json.dumps({"kind": kind, **content}, allow_nan=False).encode() + b"\n"
        with self._writing:
            try:
                while data:
                    data = data[os.write(self.target, data) :]
            except OSError:
                os._exit(GONE)


def step_back() -> None:
    """Let whoever answers requests go first: what is left of the processor is still enough to train."""
    with contextlib.suppress(AttributeError, OSError):
        os.nice(NICENESS)
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def watch_memory(limit_mb: int, line: Line) -> None:
    """
    :param limit_mb: that this process may take, in MiB
    :param line: to say so when it takes more
    """
    import psutil

    process = psutil.Process()

    def watch() -> None:
        while True:
            used = process.memory_info().rss / 2**20
            if used > limit_mb:
                line.tell("end", status="failed", error=out_of_memory(limit_mb, f"it took {used:.0f} MiB"))
                os._exit(TOO_LARGE)
            time.sleep(0.5)

    threading.Thread(target=watch, daemon=True).start()


def out_of_memory(limit_mb: int, what: str) -> str:
    return (
        f"The job needs more than the {limit_mb} MiB that a job may take ({what}). Lower n_steps or batch_size; the server's "
        "limit is SB3_GRPO_JOB_MEMORY_MB."
    )


def main() -> None:
    """Run the job that the first line of input describes."""
    # What environments and libraries print goes to the log
    line = Line(os.dup(0), os.dup(1))
    os.dup2(2, 1)
    # An interrupt at the terminal is for the server, which stops its workers in order
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = json.loads(line.read())
    line.watch()
    step_back()
    # Held until this process ends, however it ends: should an earlier one of this job still be on its way out, wait for it
    try:
        lock = filelock.FileLock(LOCK, timeout=LOCK_SECONDS)
        lock.acquire()
    except filelock.Timeout:
        line.tell("end", status="busy", error=None)
        sys.exit()
    line.tell("started", pid=os.getpid())
    watch_memory(spec["memory_mb"], line)
    from sb3_grpo_plugin.api.training import run

    status, error = run(spec, line)
    line.tell("end", status=status, error=error)


if __name__ == "__main__":
    main()
