"""
``sb3-grpo benchmark``: algorithms x environments x seeds, each run through RL Zoo with its own yml, compared at equal
simulator steps.

Every run is a process with a folder of its own. A run is finished when its result is there, which appears as a whole or not
at all, so the same command continues after whatever ended it. ``benchmark_matrix.py`` says which runs there are,
``benchmark_run.py`` and ``benchmark_train.py`` are such a process, and ``benchmark_report.py`` makes tables and figures of
the results.
"""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from sb3_grpo_plugin import __version__
from sb3_grpo_plugin.benchmark_matrix import RANDOM, RUNS, RunSpec, make_specs
from sb3_grpo_plugin.files import write_whole

# Raised whenever results are written in another way or mean something else
FORMAT = 1
RESULTS = "results.json"
# In the folder of a run
SPEC, RESULT, FAILURE, LOG, LOCK, PROGRESS = "spec.json", "result.json", "failure.json", "log.txt", ".lock", "progress"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def write_json(path: Path, content: Any) -> None:
    """
    Write a file that is there as a whole or not at all, also when the machine goes down.

    :param path: the file
    :param content: without NaN or infinity
    """
    write_whole(path, json.dumps(content, indent=1, allow_nan=False).encode())


class Executor(Protocol):
    """Makes runs, somewhere."""

    def __call__(self, spec: RunSpec, folder: Path) -> str | None:
        """Make one; return what went wrong, None when its result is in the folder."""

    def stop(self) -> None:
        """End all that run, and start no more."""


class LocalRuns:
    """Runs in processes of this machine."""

    def __init__(self) -> None:
        self.children: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def __call__(self, spec: RunSpec, folder: Path) -> str | None:
        """
        :param spec: the run
        :param folder: where it lives, made when missing
        :return: what went wrong, None when the result is there
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name in (FAILURE, PROGRESS):
            (folder / name).unlink(missing_ok=True)
        write_json(folder / SPEC, asdict(spec))
        with open(folder / LOG, "wb") as log:
            with self.lock:
                if self.stopped:
                    return "stopped"
                child = subprocess.Popen(
                    [sys.executable, "-m", "sb3_grpo_plugin.benchmark_run", str(folder.resolve())],
                    # Held open as long as this process lives: the run ends with it
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **{name: str(spec.threads) for name in THREADS}},
                )
                self.children.add(child)
            try:
                status = child.wait()
            finally:
                with self.lock:
                    self.children.discard(child)
                assert child.stdin is not None
                child.stdin.close()
        if (folder / RESULT).is_file():
            return None
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        return f"exit status {status}: {last[:500]}"

    def stop(self) -> None:
        """End all that run, and start no more."""
        with self.lock:
            self.stopped = True
            for child in self.children:
                child.kill()


def finished(spec: RunSpec, folder: Path) -> bool:
    """
    :param spec: the run
    :param folder: where it lives
    :return: whether its result is there already
    :raises ValueError: there is one, of another run than this
    """
    if not (folder / RESULT).is_file():
        return False
    result = load_json(folder / RESULT)
    # As the file has it: tuples are lists there
    wanted = json.loads(json.dumps(spec.settings))
    differing = [name for name in wanted if result["settings"].get(name) != wanted[name]]
    if differing:
        found = ", ".join(f"{name} {result['settings'].get(name)!r} instead of {wanted[name]!r}" for name in differing)
        raise ValueError(f"{folder} holds a finished run with {found}. Remove that folder, or choose another with --out.")
    return True


def load_json(path: Path) -> dict[str, Any]:
    """
    :param path: a file of results
    :return: its content
    :raises ValueError: it is damaged, or of another version
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it, or choose another folder with --out.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} has results of format {found}, and this version {__version__} of sb3-grpo-plugin writes format "
            f"{FORMAT}. Choose another folder with --out, or go on with the version that wrote it."
        )
    return content


def collect(out: Path) -> list[dict[str, Any]]:
    """
    :param out: the output folder
    :return: what is known of all runs in there, failed ones included
    """
    found = []
    for folder in sorted(out.glob(f"{RUNS}/*/*/seed-*"), key=lambda path: (*path.parts[:-1], int(path.name[5:]))):
        for name in (RESULT, FAILURE):
            if (folder / name).is_file():
                found.append(load_json(folder / name))
                break
    return found


def run_all(specs: Sequence[RunSpec], out: Path, execute: Executor, jobs: int, about: dict[str, Any]) -> None:
    """
    Run what is not finished, with live progress; results and reports grow with every run.

    :param specs: the matrix
    :param out: the output folder
    :param execute: makes one run, returns what went wrong with it
    :param jobs: runs at a time
    :param about: what results say beside the runs
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    left = [spec for spec in specs if not finished(spec, out / spec.folder)]
    with Progress(*columns) as progress, ThreadPoolExecutor(max_workers=jobs) as pool:
        total = progress.add_task("runs", total=len(specs), completed=len(specs) - len(left))
        if len(left) < len(specs):
            progress.console.print(f"{len(specs) - len(left)} of {len(specs)} runs are finished already")
        futures = {pool.submit(execute, spec, out / spec.folder): spec for spec in left}
        bars: dict[Future[str | None], Any] = {}
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    progress.console.print(_outcome(futures[future], out, future), markup=False, highlight=False)
                    progress.advance(total)
                    if future in bars:
                        progress.remove_task(bars.pop(future))
                if done:
                    write_json(out / RESULTS, {**about, "runs": collect(out)})
                for future in pending:
                    spec = futures[future]
                    spent = _spent(out / spec.folder) if future.running() else None
                    if spent is not None and future not in bars:
                        bars[future] = progress.add_task(str(spec), total=spec.budget)
                    if spent is not None:
                        progress.update(bars[future], completed=spent)
        except BaseException:
            # The pool would wait for runs that nobody collects
            pool.shutdown(wait=False, cancel_futures=True)
            execute.stop()
            raise


def _spent(folder: Path) -> int | None:
    """Simulator steps of a run that trains, None for one that does not yet, or not here."""
    try:
        return int((folder / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _outcome(spec: RunSpec, out: Path, future: "Future[str | None]") -> str:
    """Write down a failure; a result is written by the run itself."""
    folder = out / spec.folder
    error = future.result()
    if error is None:
        result = load_json(folder / RESULT)
        return f"finished  {spec}: {result['score']:.1f} ({result['wall_seconds']:.0f} s)"
    names = ("algo", "env", "seed", "budget", "settings", "command")
    about = {name: getattr(spec, name) for name in names}
    write_json(folder / FAILURE, {"format": FORMAT, "status": "failed", "error": error, **about})
    return f"failed    {spec}: {error} (see {folder / LOG})"


def check_budgets(specs: Sequence[RunSpec], found: Sequence[dict[str, Any]]) -> None:
    """
    :param specs: the matrix
    :param found: runs of the output folder
    :raises ValueError: the folder would compare at different budgets
    """
    for spec in specs:
        for run in found:
            if run["env"] == spec.env and run["algo"] != RANDOM and run["budget"] != spec.budget:
                raise ValueError(
                    f"The folder holds runs on {spec.env} with a budget of {run['budget']} steps, and {spec.budget} are asked "
                    f"for: they cannot be compared. Give --budget {spec.env}={run['budget']}, or choose another --out."
                )


@contextlib.contextmanager
def locked_folder(out: Path) -> Iterator[None]:
    """
    Make the output folder, and keep other runners out.

    :param out: the folder
    """
    import filelock

    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"The folder {out} cannot be written: {error}. Choose another with --out.") from error
    try:
        with filelock.FileLock(out / LOCK, timeout=0):
            yield
    except filelock.Timeout:
        raise ValueError(f"Another benchmark is running in {out}. Wait for it, or choose another folder with --out.") from None


def make_parser() -> argparse.ArgumentParser:
    """
    :return: of the command's arguments
    """
    parser = argparse.ArgumentParser(
        prog="sb3-grpo benchmark",
        description="Compare algorithms over environments and seeds at equal simulator steps. Each run goes through RL Zoo "
        "with its own yml. The same command continues where it was stopped.",
    )
    add = parser.add_argument
    add("--algos", nargs="+", default=["grpo", "ppo"], metavar="ALGO", help="default: grpo ppo")
    add("--envs", nargs="+", default=["CartPole-v1"], metavar="ENV", help="default: CartPole-v1")
    add("--seeds", nargs="+", default=["0-4"], metavar="SEED", help="numbers and ranges, default: 0-4")
    add(
        "--budget",
        nargs="+",
        default=[],
        metavar="[ENV=]STEPS",
        help="simulator steps of each run, for all or for one environment; default: the least n_timesteps in the ymls",
    )
    add("--conf", nargs="+", default=[], metavar="ALGO=FILE.yml", help="hyperparameters; default: those that the zoo finds")
    add("--jobs", type=int, help="runs at a time, default: 1, or as many as the Ray cluster has room for")
    add(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="run on a Ray cluster: host:port, or ray://host:port from outside of it; without an address the one of "
        "RAY_ADDRESS, or else one of this machine",
    )
    add("--threads", type=int, default=1, help="threads of a run, default: 1")
    add("--device", default="auto", help="as the zoo takes it, default: auto")
    add("--evaluations", type=int, default=10, help="evaluations on the way, default: 10")
    add("--eval-episodes", type=int, default=5, help="episodes of each of them, default: 5")
    add("--episodes", type=int, default=100, help="episodes of the score at the end, default: 100")
    add("--gym-packages", nargs="+", default=[], metavar="MODULE", help="modules that register environments")
    add("--out", type=Path, default=Path("benchmark"), metavar="FOLDER", help="default: benchmark")
    return parser


def benchmark_command(arguments: Sequence[str]) -> int:
    """
    :param arguments: of the subcommand
    :return: exit status: 0, 1 when a run failed or results cannot be written, 2 for a mistake in the command
    """
    from rich.console import Console

    parser = make_parser()
    args = parser.parse_args(arguments)
    console = Console(stderr=True)

    def tell(problem: object) -> None:
        console.print(f"sb3-grpo benchmark: {problem}", markup=False, highlight=False, soft_wrap=True)

    try:
        for name in ("jobs", "threads", "eval_episodes", "episodes"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
        with locked_folder(args.out):
            return _benchmark(args, ["sb3-grpo", "benchmark", *arguments])
    except ValueError as error:
        tell(error)
        return 2
    except OSError as error:
        tell(f"{args.out}: {error}. Finished runs are kept; repeat the command when this is mended.")
        return 1
    except KeyboardInterrupt:
        tell("stopped. Finished runs are kept; repeat the command to go on.")
        return 130


def _executor(args: argparse.Namespace, count: int) -> tuple[Executor, int]:
    """What makes the runs, and how many at a time."""
    if args.ray is None:
        return LocalRuns(), args.jobs or 1
    from sb3_grpo_plugin.benchmark_ray import RayRuns

    # Ray holds back what has no room yet; each run has a thread here that waits for it
    return RayRuns(args.ray, args.threads), args.jobs or min(count, 1000)


def _benchmark(args: argparse.Namespace, words: Sequence[str]) -> int:
    from sb3_grpo_plugin.benchmark_report import write_report

    # Of this folder, each once: its report covers them all
    commands = load_json(args.out / RESULTS).get("commands", []) if (args.out / RESULTS).is_file() else []
    commands = list(dict.fromkeys([*commands, shlex.join(words)]))
    about = {"format": FORMAT, "version": __version__, "commands": commands}
    specs = make_specs(args)
    check_budgets(specs, collect(args.out))
    execute, jobs = _executor(args, len(specs))
    try:
        run_all(specs, args.out, execute, jobs, about)
    finally:
        execute.stop()
    runs = collect(args.out)
    write_json(args.out / RESULTS, {**about, "runs": runs})
    write_json(args.out / RESULTS, {**about, "runs": runs, "summary": write_report(args.out, runs, commands)})
    asked = {(spec.algo, spec.env, spec.seed) for spec in specs}
    failed = [run for run in runs if run["status"] == "failed" and (run["algo"], run["env"], run["seed"]) in asked]
    return 1 if failed else 0
