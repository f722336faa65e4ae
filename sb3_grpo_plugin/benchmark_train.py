"""
What a run of ``sb3-grpo benchmark`` does: RL Zoo's ``train`` with its own yml, stopped when the budget of simulator steps is
spent, and scored.
"""

import contextlib
import os
import platform
import runpy
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

from sb3_grpo_plugin.benchmark import FORMAT, PROGRESS, RESULT, write_json
from sb3_grpo_plugin.benchmark_matrix import RANDOM, RunSpec

# Away from the seeds of training, and alike for all algorithms: they are scored on the same start states
EVAL_SEED = 1_000_000
# Environments of an evaluation at most: they share the forward passes of the policy
EVAL_ENVS = 20
DISTRIBUTIONS = ("sb3-grpo-plugin", "rl_zoo3", "stable_baselines3", "sb3_contrib", "gymnasium", "torch", "numpy")


class BudgetSpent(Exception):
    """Ends training from where a callback's return value has no say: before the update of a rollout."""


class RandomPolicy:
    """
    Acts at random, where a trained model would act.

    :param action_space: what to sample from
    """

    def __init__(self, action_space: spaces.Space) -> None:
        self.action_space = action_space

    def predict(
        self, observation: Any, state: Any = None, episode_start: np.ndarray | None = None, deterministic: bool = False
    ) -> tuple[np.ndarray, None]:
        assert episode_start is not None
        return np.array([self.action_space.sample() for _ in episode_start]), None


def simulator_steps(model: BaseAlgorithm) -> int:
    """
    :param model: any algorithm
    :return: the steps that simulators made for it: those of training, and those of branches (GRPO's action groups)
    """
    return model.num_timesteps + getattr(model, "branch_steps", 0)


class BudgetCallback(BaseCallback):
    """
    Evaluates the policy along the way, and stops training when no further update fits into the budget.

    :param spec: the run
    :param progress: file to tell the spent steps to who watches
    """

    def __init__(self, spec: RunSpec, progress: Path) -> None:
        super().__init__()
        self.spec = spec
        self.progress = progress
        self.eval_env: VecEnv | None = None
        self.evaluations: list[dict[str, Any]] = []
        self.evaluation_seconds = 0.0
        self.started = self.told = 0.0

    def _on_training_start(self) -> None:
        self.started = time.perf_counter()
        self._evaluate_when_due()

    def _on_step(self) -> bool:
        # At the budget itself a full rollout may still be learned from
        if simulator_steps(self.model) > self.spec.budget:
            raise BudgetSpent
        self._evaluate_when_due()
        now = time.perf_counter()
        if now - self.told > 1:
            self.told = now
            self.progress.write_text(str(simulator_steps(self.model)), encoding="utf-8")
        return True

    def _on_rollout_end(self) -> None:
        # Branches are counted by now, and the update has not begun
        if simulator_steps(self.model) > self.spec.budget:
            raise BudgetSpent
        # A look-ahead may have leapt over plan points, which belong to the policy before this update
        self._evaluate_when_due()

    def _evaluate_when_due(self) -> None:
        # The last one, at the budget, is the score
        due = self.spec.budget * len(self.evaluations) / max(self.spec.evaluations, 1)
        steps = simulator_steps(self.model)
        if len(self.evaluations) >= self.spec.evaluations or steps < due:
            return
        assert self.eval_env is not None
        begin = time.perf_counter()
        returns, _ = evaluate(self.model, self.eval_env, self.spec.eval_episodes, self.training_env)
        while len(self.evaluations) < self.spec.evaluations and steps >= due:
            self.evaluations.append(
                {
                    "due": round(due),
                    "simulator_steps": steps,
                    "model_steps": getattr(self.model, "model_steps", 0),
                    "timesteps": self.model.num_timesteps,
                    "train_seconds": round(begin - self.started - self.evaluation_seconds, 3),
                    "returns": returns,
                }
            )
            due = self.spec.budget * len(self.evaluations) / self.spec.evaluations
        self.evaluation_seconds += time.perf_counter() - begin


def evaluate(policy: Any, env: VecEnv, episodes: int, training_env: VecEnv | None = None) -> tuple[list[float], list[int]]:
    """
    :param policy: a model or whatever has its ``predict``
    :param env: evaluation environments
    :param episodes: how many
    :param training_env: where observation statistics come from
    :return: return and length of each episode, as the environment itself rewards
    """
    if training_env is not None:
        sync_envs_normalization(training_env, env)
    env.seed(EVAL_SEED)
    returns, lengths = evaluate_policy(policy, env, n_eval_episodes=episodes, return_episode_rewards=True)
    assert isinstance(returns, list) and isinstance(lengths, list)
    if not np.isfinite(returns).all():
        raise ValueError(f"The return of an evaluation episode is not a finite number: {returns}")
    return [float(value) for value in returns], [int(length) for length in lengths]


def measured_manager(base: type, spec: RunSpec, folder: Path) -> type:
    """
    :param base: the zoo's ``ExperimentManager``
    :param spec: the run
    :param folder: where its result goes
    :return: the same with our callback behind those of the yml, and the score measured when training is over
    """

    class MeasuredManager(base):  # type: ignore[misc, valid-type]
        def create_callbacks(self) -> None:
            super().create_callbacks()
            self.budget_callback = BudgetCallback(spec, folder / PROGRESS)
            self.callbacks.append(self.budget_callback)

        def learn(self, model: BaseAlgorithm) -> None:
            env = self.create_envs(min(EVAL_ENVS, spec.episodes), eval_env=True)
            if spec.algo == RANDOM:
                # Sampling has a generator of its own, also in spaces inside spaces
                env.action_space.seed(EVAL_SEED)
                self.measured = result(spec, evaluate(RandomPolicy(env.action_space), env, spec.episodes))
            else:
                eval_env = self.create_envs(min(EVAL_ENVS, spec.eval_episodes), eval_env=True)
                self.budget_callback.eval_env = eval_env
                with contextlib.suppress(BudgetSpent):
                    super().learn(model)
                eval_env.close()
                seconds = time.perf_counter() - self.budget_callback.started
                trained = training_figures(model, self.budget_callback, seconds)
                score = evaluate(model, env, spec.episodes, model.get_env())
                self.measured = {**result(spec, score), **trained}
            env.close()

        def save_trained_model(self, model: BaseAlgorithm) -> None:
            if spec.algo != RANDOM:
                super().save_trained_model(model)
            # The last act: a run that has this file is a finished one
            write_json(folder / RESULT, {**self.measured, "wall_seconds": round(time.time() - process_start(), 3)})

    return MeasuredManager


def result(spec: RunSpec, score: tuple[list[float], list[int]]) -> dict[str, Any]:
    """
    :param spec: the run
    :param score: returns and lengths of the final episodes
    :return: what is known of any run
    """
    returns, lengths = score
    return {
        "format": FORMAT,
        "status": "finished",
        "algo": spec.algo,
        "env": spec.env,
        "seed": spec.seed,
        "budget": spec.budget,
        "settings": spec.settings,
        "command": spec.command,
        "score": float(np.mean(returns)),
        "score_std": float(np.std(returns)),
        "returns": returns,
        "lengths": lengths,
        "versions": versions(),
        "machine": machine(),
    }


def training_figures(model: BaseAlgorithm, callback: BudgetCallback, seconds: float) -> dict[str, Any]:
    """
    :param model: trained
    :param callback: what it wrote down
    :param seconds: that training took, evaluation included
    :return: steps, time and memory
    """
    train_seconds = seconds - callback.evaluation_seconds
    return {
        "timesteps": model.num_timesteps,
        "simulator_steps": simulator_steps(model),
        "model_steps": getattr(model, "model_steps", 0),
        "updates": getattr(model, "_n_updates", None),
        "evaluations": callback.evaluations,
        "train_seconds": round(train_seconds, 3),
        "evaluation_seconds": round(callback.evaluation_seconds, 3),
        "steps_per_second": round(model.num_timesteps / max(train_seconds, 1e-9), 1),
        "peak_memory_mb": round(peak_memory() / 2**20, 1),
    }


def peak_memory() -> int:
    """
    :return: the most memory that this process held at once, in bytes
    """
    with contextlib.suppress(OSError):
        # Not getrusage: a new program starts there with the peak of the one that started it
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if os.name == "nt":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def process_start() -> float:
    """
    :return: when this process began, in seconds since the epoch
    """
    return psutil.Process().create_time()


def versions() -> dict[str, str]:
    """
    :return: package -> version, and Python's
    """
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine() -> dict[str, Any]:
    """
    :return: what its speed depends on
    """
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": th.cuda.get_device_name() if th.cuda.is_available() else None,
    }


def train(spec: RunSpec, folder: Path) -> None:
    """
    :param spec: the run
    :param folder: where it lives; the result is the last file that appears there
    """
    from sb3_grpo_plugin.zoo import register

    register()
    from rl_zoo3 import exp_manager

    manager = measured_manager(exp_manager.ExperimentManager, spec, folder)
    # The script imports it from here
    vars(exp_manager)["ExperimentManager"] = manager
    conf = None
    if spec.conf is not None:
        conf = folder / "conf.yml"
        conf.write_text(spec.conf, encoding="utf-8")
    sys.argv = ["rl_zoo3.train", *spec.zoo_arguments(conf), "--log-folder", str(folder)]
    runpy.run_module("rl_zoo3.train", run_name="__main__", alter_sys=True)
