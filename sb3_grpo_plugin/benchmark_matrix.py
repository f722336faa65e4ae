"""Which runs ``sb3-grpo benchmark`` makes: the matrix, and what can be known to be wrong with it beforehand."""

import argparse
import contextlib
import io
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from sb3_grpo_plugin.rewards import nearest_name

RUNS = "runs"
# Stands where an algorithm's name does: acting at random, measured once per environment
RANDOM = "random"
# What of a yml changes the environment, and so what acting at random earns
ENVIRONMENT_KEYS = ("env_kwargs", "env_wrapper", "frame_stack", "monitor_kwargs", "vec_env_wrapper")


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
    except Exception as error:
        # Where a package is missing, gymnasium says which, and how it is installed
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
