"""
What the package's start-up line adds to the start of a Python interpreter.

Makes virtual environments that differ in the start-up line only, starts their interpreters in random order, and compares
each start with the neighbouring one without the line. Two situations: a machine with no other start-up line, and one with the
line of setuptools, which nearly every environment with torch has. Usage: python benchmarks/startup.py [ROUNDS]
"""

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from importlib.metadata import distribution
from pathlib import Path

SETUPTOOLS = (
    "import os; var = 'SETUPTOOLS_USE_DISTUTILS'; enabled = os.environ.get(var, 'local') == 'local'; "
    "enabled and __import__('_distutils_hack').add_shim();\n"
)


def start_up_line() -> str:
    """The line of the installed package."""
    for file in distribution("sb3-grpo-plugin").files or ():
        if file.name.startswith("hatch_autorun_"):
            return Path(str(file.locate())).read_text(encoding="utf-8")
    raise SystemExit("sb3-grpo-plugin is installed without its start-up line")


def make(path: Path, *lines: tuple[str, str]) -> list[str]:
    """A virtual environment with these .pth files; returns the command that starts its interpreter and does nothing."""
    venv.create(path, symlinks=os.name != "nt")
    python = path / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", show], check=True, capture_output=True, text=True).stdout.strip())
    for name, text in lines:
        (packages / name).write_text(text, encoding="utf-8")
    try:
        shutil.copytree(Path(str(distribution("setuptools").locate_file("_distutils_hack"))), packages / "_distutils_hack")
    except Exception as error:
        print(f"no setuptools here: {error!r}", file=sys.stderr)
    return [str(python), "-c", ""]


def start(command: list[str]) -> tuple[float, float]:
    """Start an interpreter; returns milliseconds on the clock and, where the system tells, on the processor."""
    begin = time.perf_counter()
    process = subprocess.Popen(command)
    if not hasattr(os, "wait4"):
        process.wait()
        return (time.perf_counter() - begin) * 1e3, float("nan")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return (time.perf_counter() - begin) * 1e3, (usage.ru_utime + usage.ru_stime) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=500)
    rounds = parser.parse_args().rounds
    ours = ("hatch_autorun_sb3_grpo_plugin.pth", start_up_line())
    setuptools = ("distutils-precedence.pth", SETUPTOOLS)
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "alone": (make(Path(folder, "a")), make(Path(folder, "b"), ours)),
            "beside setuptools": (make(Path(folder, "c"), setuptools), make(Path(folder, "d"), setuptools, ours)),
        }
        times: dict[str, list[tuple[tuple[float, float], tuple[float, float]]]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, pair in random.sample(list(commands.items()), len(commands)):
                first = random.randrange(2)
                measured = {index: start(pair[index]) for index in (first, 1 - first)}
                times[name].append((measured[0], measured[1]))
    print(f"Python {sys.version.split()[0]}, {rounds} starts each, milliseconds; medians")
    for name, pairs in times.items():
        for clock, label in enumerate(("elapsed", "processor")):
            without, with_line = (statistics.median(one[clock] for one in side) for side in zip(*pairs, strict=True))
            added = statistics.median(b[clock] - a[clock] for a, b in pairs)
            print(
                f"{name:<18}{label:<10} without {without:6.2f}, with {with_line:6.2f}, difference of neighbours {added:+.3f}"
            )


if __name__ == "__main__":
    main()
