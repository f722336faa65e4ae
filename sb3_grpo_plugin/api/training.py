"""What a worker does: RL Zoo's environments and hyperparameters, GRPO, progress, checkpoints."""

import argparse
import contextlib
import hashlib
import importlib
import io
import math
import pickle
import sys
import time
import traceback
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize, VecTransposeImage

from sb3_grpo_plugin.api.environments import describe, join_registry
from sb3_grpo_plugin.api.worker import Line, out_of_memory
from sb3_grpo_plugin.benchmark_train import versions
from sb3_grpo_plugin.files import write_whole

CHECKPOINT = "checkpoint.zip"
# Members of a model's file beside SB3's own, which ignores them
NORMALIZATION, INPUT_SPACE = "vecnormalize.pkl", "observation_space.pkl"
TELL_SECONDS = 0.5
CURVE_POINTS = 1000
METRICS = {
    "rollout/ep_rew_mean": "episode_reward",
    "rollout/ep_len_mean": "episode_length",
    "rollout/success_rate": "success_rate",
    "time/fps": "fps",
    "time/simulator_steps": "simulator_steps",
    "time/model_steps": "model_steps",
}
ERROR_LENGTH = 1000


class Reporter(KVWriter):
    """
    Passes on what the algorithm logs at each update.

    :param line: to the server
    :param total: timesteps of the job
    """

    def __init__(self, line: Line, total: int) -> None:
        self.line = line
        self.spacing = total / CURVE_POINTS
        self.due = 0.0

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        metrics = {}
        for key, value in key_values.items():
            name = METRICS.get(key) or (key.removeprefix("train/") if key.startswith("train/") else None)
            if name is not None and isinstance(value, int | float | np.number):
                metrics[name] = float(value) if math.isfinite(value) else None
        # Long runs have more updates than a curve can show
        point = step >= self.due
        if point:
            self.due = step + self.spacing
        self.line.tell("update", timesteps=step, metrics=metrics, point=point)

    def close(self) -> None:
        pass


class Watch(BaseCallback):
    """
    Tells progress, makes checkpoints, and stops when told to.

    :param line: to the server
    :param checkpoint_seconds: between two checkpoints
    :param save: makes one
    """

    def __init__(self, line: Line, checkpoint_seconds: float, save: Any) -> None:
        super().__init__()
        self.line = line
        self.checkpoint_seconds = checkpoint_seconds
        self.save = save
        self.told = 0.0
        # The first one right after the first update: from then on there is a model
        self.saved = -math.inf

    def _on_rollout_start(self) -> None:
        # The policy and the timesteps belong together here: no rollout waits for its update
        if self.model.num_timesteps and time.monotonic() - self.saved >= self.checkpoint_seconds:
            self.save(final=False)
            self.saved = time.monotonic()

    def _on_step(self) -> bool:
        now = time.monotonic()
        if now - self.told >= TELL_SECONDS:
            self.told = now
            self.line.tell("progress", timesteps=self.model.num_timesteps)
        return not self.line.command


def limit_memory(limit_mb: int) -> None:
    """
    Let an allocation beyond the limit fail where it is made. A GPU's driver reserves far more than it takes, so there only
    the worker's watch on its memory counts.

    :param limit_mb: in MiB
    """
    if th.cuda.is_available():
        return
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limit_mb * 2**20, limit_mb * 2**20))


def input_space(model: BaseAlgorithm) -> spaces.Space:
    """
    :param model: with its environment
    :return: what an observation looks like before normalization and transposition: as the environment gives it (frames
        stacked)
    :raises ValueError: frames are stacked after they were normalized
    """
    env: Any = model.env
    if isinstance(env, VecTransposeImage):
        env = env.venv
    if isinstance(env, VecFrameStack) and (normalize := model.get_vec_normalize_env()) and normalize.norm_obs:
        raise ValueError("The server has no model whose observations are normalized first and stacked then.")
    return env.venv.observation_space if isinstance(env, VecNormalize) else env.observation_space


def write_model(model: BaseAlgorithm, path: Path) -> tuple[str, int]:
    """
    Write a model with all that inference and further training need, as a whole or not at all.

    :param model: with its environment
    :param path: the file
    :return: its SHA-256 and its size in bytes
    """
    content = io.BytesIO()
    model.save(content)
    normalize = model.get_vec_normalize_env()
    with zipfile.ZipFile(content, "a") as archive:
        if normalize is not None:
            archive.writestr(NORMALIZATION, pickle.dumps(normalize))
        archive.writestr(INPUT_SPACE, pickle.dumps(input_space(model)))
    data = content.getvalue()
    write_whole(path, data)
    return hashlib.sha256(data).hexdigest(), len(data)


def setup(spec: dict[str, Any], folder: Path) -> BaseAlgorithm:
    """
    :param spec: of the job
    :param folder: of the job
    :return: a model with its environments, new or from the job's last checkpoint
    """
    from sb3_grpo_plugin.zoo import register

    register()
    from rl_zoo3.exp_manager import ExperimentManager

    # Registers what installed packages bring, as the zoo's own scripts do
    importlib.import_module("rl_zoo3.import_envs")
    join_registry()
    agent, seed = "", spec["seed"]
    if spec["resume"] is not None:
        data = (folder / spec["resume"]["file"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != spec["resume"]["sha256"]:
            raise ValueError("The checkpoint changed since it was written; it is not loaded.")
        agent = str(folder / "agent.zip")
        Path(agent).write_bytes(data)
        # Not the episodes again that it began with
        seed = (seed + spec["resume"]["timesteps"]) % 2**31
    manager = ExperimentManager(
        argparse.Namespace(),
        "grpo",
        spec["env_name"],
        str(folder / "zoo"),
        n_timesteps=spec["total_timesteps"],
        eval_freq=-1,
        save_freq=-1,
        # Typed and bounded scalars: a string is a registered reward's name, and nothing here is evaluated
        hyperparams={**spec["hyperparams"], **({"reward_function": spec["reward"]} if spec["reward"] else {})},
        trained_agent=agent,
        log_interval=1,
        seed=seed,
        verbose=0,
        device=spec["device"],
    )
    if agent:
        with zipfile.ZipFile(agent) as archive:
            if NORMALIZATION in archive.namelist():
                # Where the zoo looks for it
                target = folder / manager.env_name / "vecnormalize.pkl"
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(archive.read(NORMALIZATION))
    experiment = manager.setup_experiment()
    assert experiment is not None
    return experiment[0]


def train(spec: dict[str, Any], folder: Path, line: Line) -> None:
    """
    :param spec: of the job
    :param folder: of the job
    :param line: to the server
    """
    model = setup(spec, folder)

    def save(final: bool) -> None:
        path = folder / CHECKPOINT
        if path.exists() and not final:
            # The server has not fetched the last one yet
            return
        path = path.with_stem("final") if final else path
        try:
            sha256, size = write_model(model, path)
        except OSError as error:
            # A full disk costs a checkpoint, not the training; the last model must be there
            if final:
                raise
            traceback.print_exc()
            line.tell("warning", text=f"A checkpoint could not be written: {error.strerror or error}")
            return
        rewards = [info["r"] for info in model.ep_info_buffer or ()]
        line.tell(
            "model",
            file=path.name,
            sha256=sha256,
            size=size,
            timesteps=model.num_timesteps,
            mean_reward=float(np.mean(rewards)) if rewards and np.isfinite(rewards).all() else None,
            observation_space=describe(input_space(model)),
            action_space=describe(model.action_space),
            versions=versions(),
        )

    model.set_logger(Logger(None, [Reporter(line, spec["total_timesteps"])]))
    left = spec["total_timesteps"] - model.num_timesteps
    if left > 0 and not line.command:
        # What SB3 is given on top of the timesteps so far
        model.learn(left, Watch(line, spec["checkpoint_seconds"], save), 1, reset_num_timesteps=spec["resume"] is None)
    line.tell("progress", timesteps=model.num_timesteps)
    save(final=True)


def run(spec: dict[str, Any], line: Line) -> tuple[str, str | None]:
    """
    :param spec: of the job
    :param line: to the server
    :return: how the job ended, and what went wrong
    """
    th.set_num_threads(1)
    limit_memory(spec["memory_mb"])
    try:
        train(spec, Path.cwd(), line)
    except Exception as error:
        traceback.print_exc()
        return "failed", explain(error, spec)
    finally:
        sys.stderr.flush()
    return {"stop": "stopped", "suspend": "suspended"}.get(line.command, "completed"), None


def explain(error: Exception, spec: dict[str, Any]) -> str:
    """
    :param error: what ended the training
    :param spec: of the job
    :return: a sentence for the person who started it
    """
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "Unable to allocate" in str(error):
        return out_of_memory(spec["memory_mb"], str(error).strip()[:200] or "out of memory")
    text = str(error).strip() or repr(error)
    # Ours and gymnasium's say what to do; others need their kind
    known = isinstance(error, ValueError) or type(error).__module__.startswith("gymnasium")
    return (text if known else f"{type(error).__name__}: {text}")[:ERROR_LENGTH]
