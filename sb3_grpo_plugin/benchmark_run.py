"""
The process of one run of ``sb3-grpo benchmark``: ends with whoever started it, and clears away what an earlier attempt left.

What takes seconds to import comes after that: ``benchmark_train.py``.
"""

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import filelock

from sb3_grpo_plugin.benchmark import LOCK, LOG, SPEC
from sb3_grpo_plugin.benchmark_matrix import RunSpec


def leave_with_parent() -> None:
    """End this process when the one that started it is gone, however that ended: its end of our stdin closes."""

    def wait() -> None:
        # Not sys.stdin, whose lock a thread must not hold when the interpreter ends
        while os.read(0, 1):
            pass
        os._exit(3)

    threading.Thread(target=wait, daemon=True).start()


def main(folder: Path) -> None:
    """
    :param folder: of the run; its specification is in there
    """
    leave_with_parent()
    # The zoo takes an interrupt for the end of training; here it would pass a half run for a whole one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Should an earlier attempt still be on its way out, it ends before its traces are removed
    with filelock.FileLock(folder / LOCK, timeout=60):
        for entry in folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in (SPEC, LOG, LOCK):
                entry.unlink()
        spec = RunSpec(**json.loads((folder / SPEC).read_text(encoding="utf-8")))

        from sb3_grpo_plugin.benchmark_train import train

        train(spec, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
