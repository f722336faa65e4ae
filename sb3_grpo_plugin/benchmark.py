"""
``sb3-grpo benchmark``: algorithms x environments x seeds, each run through RL Zoo with its own yml, compared at equal
simulator steps.

Every run is a process with a folder of its own. A run is finished when its result is there, which appears as a whole or not
at all, so the same command continues after whatever ended it. ``benchmark_run.py`` is what such a process does,
``benchmark_report.py`` makes tables and figures of the results.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from sb3_grpo_plugin import __version__
from sb3_grpo_plugin.rewards import nearest_name

# Raised whenever results are written in another way or mean something else
FORMAT = 1
RESULTS = "results.json"
RUNS = "runs"
# In the folder of a run
SPEC, RESULT, FAILURE, LOG, LOCK, PROGRESS = "spec.json", "result.json", "failure.json", "log.txt", ".lock", "progress"
# Stands where an algorithm's name does: acting at random, measured once per environment
RANDOM = "random"
# What of a yml changes the environment, and so what acting at random earns
ENVIRONMENT_KEYS = ("env_kwargs", "env_wrapper", "frame_stack", "monitor_kwargs", "vec_env_wrapper")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class RunSpec:
    """
    One run.

    :param algo: the zoo's id of the algorithm, or ``"random"``
    :param env: environment ID
    :param seed: of training
    :param budget: simulator steps that may be learned from
    :param zoo_algo: whose yml describes the run; another one than ``algo`` for ``"random"``
    :param evaluations: how often the policy is evaluated on the way, the untrained one included
    :param eval_episodes: episodes of each of these evaluations
    :param episodes: episodes of the score, at the end
    :param threads: of torch and its libraries
    :param device: as the zoo takes it
    :param gym_packages: modules that register environments
    :param hyperparams: what the yml says about this environment
    :param conf: text of the yml, None for the one that the zoo finds by itself
    :param conf_name: how the user named it
    """

    algo: str
    env: str
    seed: int
    budget: int
    zoo_algo: str
    evaluations: int = 10
    eval_episodes: int = 5
    episodes: int = 100
    threads: int = 1
    device: str = "auto"
    gym_packages: Sequence[str] = ()
    hyperparams: dict[str, Any] = field(default_factory=dict)
    conf: str | None = None
    conf_name: str | None = None

    def __str__(self) -> str:
        return f"{self.algo} {self.env} seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Where the run lives, relative to the output folder."""
        return Path(RUNS, self.env.replace("/", "-"), self.algo, f"seed-{self.seed}")

    @property
    def settings(self) -> dict[str, Any]:
        """What a finished run must have in common with this one to stand for it."""
        if self.algo == RANDOM:
            return {"episodes": self.episodes}
        names = ("budget", "evaluations", "eval_episodes", "episodes", "hyperparams")
        return {name: getattr(self, name) for name in names}

    @property
    def command(self) -> str:
        """The zoo's own command for this run, without the budget's stop and the evaluations."""
        conf = None if self.conf_name is None else Path(self.conf_name)
        return shlex.join(["python", "-m", "rl_zoo3.train", *self.zoo_arguments(conf)])

    def zoo_arguments(self, conf: Path | None) -> list[str]:
        """
        :param conf: the yml, None for the one that the zoo finds by itself
        :return: arguments of ``rl_zoo3.train``
        """
        arguments = {
            "--algo": self.zoo_algo,
            "--env": self.env,
            "--seed": self.seed,
            "--n-timesteps": self.budget,
            "--eval-freq": -1,
            "--num-threads": self.threads,
            "--device": self.device,
        }
        words = [str(word) for pair in arguments.items() for word in pair]
        words += ["--gym-packages", *self.gym_packages] if self.gym_packages else []
        return words + (["--conf-file", str(conf)] if conf is not None else [])


def write_json(path: Path, content: Any) -> None:
    """
    Write a file that is there as a whole or not at all, also when the machine goes down.

    :param path: the file
    :param content: without NaN or infinity
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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


def run_all(specs: Sequence[RunSpec], out: Path, execute: Callable[[RunSpec, Path], str | None], jobs: int) -> None:
    """
    Run what is not finished, with live progress; results and reports grow with every run.

    :param specs: the matrix
    :param out: the output folder
    :param execute: makes one run, returns what went wrong with it
    :param jobs: runs at a time
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
                    write_json(out / RESULTS, {"format": FORMAT, "version": __version__, "runs": collect(out)})
                for future in pending:
                    if future.running():
                        if future not in bars:
                            bars[future] = progress.add_task(str(futures[future]), total=futures[future].budget)
                        progress.update(bars[future], completed=_spent(out / futures[future].folder))
        except BaseException:
            # The pool would wait for runs that nobody collects
            pool.shutdown(wait=False, cancel_futures=True)
            getattr(execute, "stop", lambda: None)()
            raise


def _spent(folder: Path) -> int:
    try:
        return int((folder / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


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


def parse_seeds(words: Iterable[str]) -> list[int]:
    """
    :param words: such as ``0-4``, ``7`` or ``1,2``
    :return: the seeds, each once
    """
    seeds: dict[int, None] = {}
    for word in ",".join(words).split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"--seeds {word!r} is not a number such as 3 or a range such as 0-4")
        seeds.update(dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1)))
    return list(seeds)


def parse_budgets(words: Sequence[str], envs: Sequence[str]) -> dict[str, int]:
    """
    :param words: a number for all environments, ``ENV=NUMBER`` for one
    :param envs: the environments
    :return: environment -> simulator steps, where given
    """
    budgets: dict[str, int] = {}
    for word in sorted(words, key=lambda word: "=" in word):
        env, _, number = word.rpartition("=")
        try:
            steps = int(float(number))
        except (ValueError, OverflowError):
            raise ValueError(f"--budget {word!r} is not a number of steps such as 1e5 or CartPole-v1=1e5") from None
        if steps < 1:
            raise ValueError(f"--budget {word!r}: at least 1 step is needed")
        if env:
            check_known("--budget", env, envs)
        budgets.update({env: steps} if env else dict.fromkeys(envs, steps))
    return budgets


def check_known(what: str, name: str, known: Iterable[str], cure: str = "") -> None:
    """
    :param what: what the name is of, for the message
    :param name: as the user wrote it
    :param known: the names there are
    :param cure: what else may help
    """
    known = sorted(known)
    if name not in known:
        nearest = nearest_name(name, known)
        hint = f"did you mean {nearest!r}?" if nearest else f"there are {', '.join(known[:30])}"
        raise ValueError(f"{what} {name!r} is not known; {hint}{cure}")


def check_environment(env: str) -> None:
    """
    :param env: a registered environment ID
    :raises ValueError: it cannot be made, for want of a package for instance
    """
    import gymnasium as gym

    try:
        gym.make(env).close()
    except ImportError as error:
        # gymnasium.error.DependencyNotInstalled is one
        raise ValueError(f"The environment {env!r} cannot be made: a package is missing. {error}") from error
    except Exception as error:
        raise ValueError(f"The environment {env!r} cannot be made: {error}") from error


def read_hyperparams(algo: str, env: str, conf: str | None) -> dict[str, Any]:
    """
    :param algo: the zoo's id of an algorithm
    :param env: environment ID
    :param conf: path of a yml, None for the one that the zoo finds by itself
    :return: what the zoo would read from it
    """
    from rl_zoo3.exp_manager import ExperimentManager

    try:
        # It prints what it reads
        with contextlib.redirect_stdout(io.StringIO()):
            return dict(ExperimentManager(argparse.Namespace(), algo, env, "", config=conf).read_hyperparameters()[0])
    except Exception as error:
        raise ValueError(f"No hyperparameters for {algo} on {env}: {error}") from error


def make_specs(args: argparse.Namespace) -> list[RunSpec]:
    """
    Everything that can be known to be wrong is found here, before anything starts.

    :param args: of the command
    :return: the matrix, seed by seed: a stopped benchmark has all algorithms and environments
    """
    from sb3_grpo_plugin.zoo import register

    register()
    for package in args.gym_packages:
        import_module(package)
    import gymnasium as gym
    import rl_zoo3.import_envs  # noqa: F401
    from rl_zoo3.utils import ALGOS

    envs, algos = list(dict.fromkeys(args.envs)), list(dict.fromkeys(args.algos))
    for algo in algos:
        check_known("The algorithm", algo, ALGOS)
    for env in envs:
        check_known("The environment", env, gym.envs.registry, " (--gym-packages imports what registers more)")
        check_environment(env)
    confs = {}
    for word in args.conf:
        algo, _, path = word.partition("=")
        check_known("--conf ALGO=FILE.yml: the algorithm", algo, algos)
        if not path.endswith((".yml", ".yaml")) or not Path(path).is_file():
            raise ValueError(f"--conf {word!r}: {path!r} is not a yml file")
        confs[algo] = path
    budgets = parse_budgets(args.budget, envs)
    specs: list[RunSpec] = []
    options = {name: getattr(args, name) for name in ("evaluations", "eval_episodes", "episodes", "threads", "device")}
    for env in envs:
        read = {algo: read_hyperparams(algo, env, confs.get(algo)) for algo in algos}
        # No algorithm is trained for longer than its yml was made for
        budget = budgets.get(env) or min(int(float(entry["n_timesteps"])) for entry in read.values())
        for algo, entry in read.items():
            text = Path(confs[algo]).read_text(encoding="utf-8") if algo in confs else None
            about = {
                **options,
                "zoo_algo": algo,
                "conf": text,
                "conf_name": confs.get(algo),
                "gym_packages": args.gym_packages,
            }
            entry = {name: value for name, value in entry.items() if name != "n_timesteps"}
            if algo == algos[0]:
                kept = {name: entry[name] for name in ENVIRONMENT_KEYS if name in entry}
                specs.append(RunSpec(RANDOM, env, 0, budget, hyperparams=kept, **about))
            specs += [RunSpec(algo, env, seed, budget, hyperparams=entry, **about) for seed in parse_seeds(args.seeds)]
    return sorted(specs, key=lambda spec: spec.seed)


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
    add("--jobs", type=int, default=1, help="runs at a time, default: 1")
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
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
        with locked_folder(args.out):
            return _benchmark(args, ["sb3-grpo", "benchmark", *arguments])
    except ValueError as error:
        tell(error)
        return 2
    except OSError as error:
        tell(f"{error}. Finished runs are kept; repeat the command when this is mended.")
        return 1
    except KeyboardInterrupt:
        tell("stopped. Finished runs are kept; repeat the command to go on.")
        return 130


def _benchmark(args: argparse.Namespace, words: Sequence[str]) -> int:
    from sb3_grpo_plugin.benchmark_report import write_report

    if (args.out / RESULTS).is_file():
        load_json(args.out / RESULTS)
    specs = make_specs(args)
    check_budgets(specs, collect(args.out))
    run_all(specs, args.out, LocalRuns(), args.jobs)
    runs = collect(args.out)
    results = {"format": FORMAT, "version": __version__, "command": shlex.join(words), "runs": runs}
    write_json(args.out / RESULTS, results)
    write_json(args.out / RESULTS, {**results, "summary": write_report(args.out, runs, shlex.join(words))})
    asked = {(spec.algo, spec.env, spec.seed) for spec in specs}
    failed = [run for run in runs if run["status"] == "failed" and (run["algo"], run["env"], run["seed"]) in asked]
    return 1 if failed else 0
