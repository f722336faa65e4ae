"""
What the package's start-up line adds to the start of a Python interpreter.

Makes virtual environments that differ in the start-up line only, and starts their interpreters in random order:

- whole starts, each compared with the neighbouring one without the line, on the clock and on the processor. Other work on the
  machine is in these numbers too;
- the interpreter's own clock around the line: two lines that take the time, before and after it, less what they take with
  nothing between them. Virtual environments run start-up lines twice; both runs are counted.

Nearly every environment with torch has the start-up line of setuptools too; so there is a pair with it and one without.
Usage: python benchmarks/startup.py [ROUNDS]
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


def inside(command: list[str]) -> float:
    """Milliseconds between the two lines that take the time, all runs of them together."""
    show = "import sys; t = sys._times; print(sum(b - a for a, b in zip(t[::2], t[1::2])) * 1e3)"
    return float(subprocess.run([command[0], "-c", show], check=True, capture_output=True, text=True).stdout)


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
        clock_line = 'import sys,time;sys._times=getattr(sys,"_times",[])+[time.perf_counter()]\n'
        clocks = (("hatch_a.pth", clock_line), ("hatch_z.pth", clock_line))
        bracketed = (make(Path(folder, "e"), setuptools, *clocks), make(Path(folder, "f"), setuptools, *clocks, ours))
        lines: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for index in random.sample((0, 1), 2):
                lines[index].append(inside(bracketed[index]))
        times: dict[str, list[tuple[tuple[float, float], tuple[float, float]]]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, pair in random.sample(list(commands.items()), len(commands)):
                first = random.randrange(2)
                measured = {index: start(pair[index]) for index in (first, 1 - first)}
                times[name].append((measured[0], measured[1]))
    print(f"Python {sys.version.split()[0]}, {rounds} starts each, milliseconds; medians")
    without, with_line = (statistics.median(side) for side in lines)
    added = with_line - without
    print(f"{'the line itself':<28} without {without:6.3f}, with {with_line:6.3f}, difference {added:+.3f}")
    for name, pairs in times.items():
        for clock, label in enumerate(("elapsed", "processor")):
            without, with_line = (statistics.median(one[clock] for one in side) for side in zip(*pairs, strict=True))
            added = statistics.median(b[clock] - a[clock] for a, b in pairs)
            print(
                f"{name:<18}{label:<10} without {without:6.2f}, with {with_line:6.2f}, difference of neighbours {added:+.3f}"
            )


if __name__ == "__main__":
    main()
