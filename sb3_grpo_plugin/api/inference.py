"""Trained models in the server: loading them, predictions, rendered rollouts."""

import asyncio
import base64
import hashlib
import io
import logging
import os
import pickle
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sb3_grpo_plugin.api.environments import RENDERABLE, group_of, join_registry
from sb3_grpo_plugin.api.observations import stack
from sb3_grpo_plugin.api.store import Model, Store, UnknownModel

logger = logging.getLogger("sb3_grpo_plugin.api")

CACHED = 16
QUICK_PARAMETERS = 200_000
ROLLOUTS_WAITING = 4
JPEG_QUALITY = 80
T = TypeVar("T")


class UnusableModel(Exception):
    """The model's file is not what was trained here, or does not load; the text says which."""


class Busy(Exception):
    """Too many wait for the same thing."""


class Agent:
    """
    A loaded model.

    :param data: content of its file, checked
    """

    def __init__(self, data: bytes) -> None:
        # Imported here: the server answers before it can predict
        import torch as th
        from gymnasium import spaces

        from sb3_grpo_plugin.api.training import INPUT_SPACE, NORMALIZATION
        from sb3_grpo_plugin.grpo import GRPO

        self.th = th
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            self.space = pickle.loads(archive.read(INPUT_SPACE))
            has_statistics = NORMALIZATION in archive.namelist()
            self.normalize = pickle.loads(archive.read(NORMALIZATION)) if has_statistics else None
        # Without the buffers of training
        self.policy = GRPO.load(io.BytesIO(data), device="cpu", custom_objects={"n_steps": 2, "n_envs": 1}).policy
        self.policy.set_training_mode(False)
        parameters = sum(values.numel() for values in self.policy.parameters())
        # SB3's policies keep the distribution of a prediction in themselves
        self.lock = threading.RLock()
        # A vector through a small network takes a fraction of a millisecond
        self.quick = parameters < QUICK_PARAMETERS and len(self.space.shape or (0, 0)) <= 1
        self.discrete = isinstance(self.policy.action_space, spaces.Discrete)

    def predict(self, observations: list[Any], deterministic: bool) -> tuple[Any, Any]:
        """
        :param observations: as JSON gives them
        :param deterministic: take the likeliest action
        :return: actions ``[batch, ...]`` and, of a ``Discrete`` space, the probabilities ``[batch, n]``
        :raises ObservationError: an observation does not fit
        """
        with self.lock:
            return self._predict(stack(self.space, observations), deterministic)

    def _predict(self, batch: Any, deterministic: bool) -> tuple[Any, Any]:
        if self.normalize is not None:
            batch = self.normalize.normalize_obs(batch)
        if not self.discrete:
            return self.policy.predict(batch, deterministic=deterministic)[0].tolist(), None
        # As `predict` does it, with the distribution kept
        with self.th.no_grad():
            distribution = self.policy.get_distribution(self.policy.obs_to_tensor(batch)[0])
            actions = distribution.get_actions(deterministic=deterministic)
            categorical: Any = distribution.distribution
        return actions.tolist(), categorical.probs.tolist()

    def rollout(self, env_id: str, seed: int, max_steps: int) -> dict[str, Any]:
        """
        :param env_id: of classic control
        :param seed: of the episode
        :param max_steps: to show at most
        :return: frames as base64 JPEG, rewards, their sum, frames per second
        """
        import gymnasium as gym
        from PIL import Image

        env = gym.make(env_id, render_mode="rgb_array")
        frames, rewards, terminated = [], [], False
        try:
            observation, _ = env.reset(seed=seed)
            for step in range(max_steps + 1):
                file = io.BytesIO()
                picture: Any = env.render()
                Image.fromarray(picture).save(file, "JPEG", quality=JPEG_QUALITY)
                frames.append(base64.b64encode(file.getvalue()).decode())
                if step == max_steps:
                    break
                action = self.predict([observation], True)[0][0]
                observation, reward, terminated, truncated, _ = env.step(as_action(env.action_space, action))
                rewards.append(float(reward))
                if terminated or truncated:
                    max_steps = step + 1
            return {
                "frames": frames,
                "rewards": rewards,
                "return_": sum(rewards),
                "fps": int(env.metadata.get("render_fps", 30)),
                "terminated": bool(terminated),
            }
        finally:
            env.close()


def as_action(space: Any, action: Any) -> Any:
    """
    :param space: of the action
    :param action: as lists and numbers
    :return: as the environment takes it
    """
    import numpy as np

    return np.asarray(action, dtype=space.dtype)[()]


class Inference:
    """
    Loads models, checks them, and keeps the last few.

    Predictions have a thread of their own, so that a large batch does not hold up the server; rollouts have another.

    :param store: records
    :param folder: of the model files
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.folder = folder
        self._agents: OrderedDict[str, Agent] = OrderedDict()
        self._generation: dict[str, int] = {}
        self._lock = threading.Lock()
        self._predictions = ThreadPoolExecutor(1, "predictions", initializer=warm_up)
        self._rollouts = ThreadPoolExecutor(1, "rollouts")
        self._waiting = 0

    def warm_up(self) -> None:
        """Import in the background what the first prediction needs."""
        self._predictions.submit(int)

    def close(self) -> None:
        self._predictions.shutdown(wait=False, cancel_futures=True)
        self._rollouts.shutdown(wait=False, cancel_futures=True)

    def forget(self, name: str) -> None:
        """
        :param name: of a model that was replaced or deleted
        """
        with self._lock:
            self._agents.pop(name, None)
            self._generation[name] = self._generation.get(name, 0) + 1

    def agent(self, name: str) -> Agent:
        """
        :param name: of the model
        :return: it, loaded
        :raises UnknownModel: there is none
        :raises UnusableModel: it cannot be loaded
        """
        with self._lock:
            found = self._agents.get(name)
            generation = self._generation.get(name, 0)
            if found is not None:
                self._agents.move_to_end(name)
                return found
        agent = self._load(*self.read(name))
        with self._lock:
            # Unless it was replaced while it was read
            if self._generation.get(name, 0) == generation:
                self._agents[name] = agent
                while len(self._agents) > CACHED:
                    self._agents.popitem(last=False)
        return agent

    def read(self, name: str) -> tuple[Model, bytes]:
        """
        :param name: of the model
        :return: its record and the content of its file
        :raises UnknownModel: there is none
        :raises UnusableModel: its file cannot be read
        """
        before = None
        while True:
            model = self.store.model(name)
            if model is None:
                raise UnknownModel(name)
            try:
                return model, (self.folder / f"{model.sha256}.zip").read_bytes()
            except OSError as error:
                # A newer checkpoint may have taken its place between the two
                if model.sha256 == before:
                    raise UnusableModel(f"The file of the model {name!r} cannot be read: {error.strerror}.") from error
                before = model.sha256

    def _load(self, model: Model, data: bytes) -> Agent:
        # A model's file holds pickles: only what this server wrote is opened
        if hashlib.sha256(data).hexdigest() != model.sha256:
            raise UnusableModel(f"The file of the model {model.name!r} changed since it was written; it is not loaded.")
        try:
            return Agent(data)
        except Exception as error:
            logger.exception("The model %s does not load", model.name)
            with_versions = ", ".join(f"{name} {version}" for name, version in model.versions.items())
            raise UnusableModel(
                f"The model {model.name!r} does not load with the packages installed here ({type(error).__name__}). It was "
                f"trained with {with_versions}."
            ) from error

    async def predict(self, name: str, observations: list[Any], deterministic: bool) -> tuple[Any, Any]:
        """
        See ``Agent.predict`` and ``agent``.
        """
        agent = self._agents.get(name)
        if agent is not None and agent.quick and len(observations) == 1 and agent.lock.acquire(blocking=False):
            # Two changes of threads would take longer than the prediction
            try:
                return agent.predict(observations, deterministic)
            finally:
                agent.lock.release()
        return await self._in(self._predictions, lambda: self.agent(name).predict(observations, deterministic))

    async def rollout(self, name: str, seed: int, max_steps: int) -> dict[str, Any]:
        """
        See ``Agent.rollout`` and ``agent``.

        :raises ValueError: its environment cannot be shown
        :raises Busy: others wait for theirs
        """
        if self._waiting >= ROLLOUTS_WAITING:
            raise Busy(f"{self._waiting} rollouts are being made or wait; try again later.")
        self._waiting += 1
        try:
            return await self._in(self._rollouts, lambda: self._rollout(name, seed, max_steps))
        finally:
            self._waiting -= 1

    def _rollout(self, name: str, seed: int, max_steps: int) -> dict[str, Any]:
        model = self.store.model(name)
        if model is None:
            raise UnknownModel(name)
        join_registry()
        if group_of(model.env_name) != RENDERABLE:
            raise ValueError(f"Only classic-control environments are shown; this model is for {model.env_name}.")
        return self.agent(name).rollout(model.env_name, seed, max_steps)

    @staticmethod
    async def _in(executor: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, function)


def warm_up() -> None:
    """What makes the first prediction slow."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    import torch as th

    from sb3_grpo_plugin.grpo import GRPO  # noqa: F401

    # More would wait for each other, and for the training beside them
    th.set_num_threads(1)
