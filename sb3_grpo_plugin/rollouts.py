"""What SB3's rollout buffer does not keep of a rollout: where episodes really ended, and observations in real units."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize, is_vecenv_wrapped, unwrap_vec_normalize

Array = TypeVar("Array", np.ndarray, th.Tensor)
Observation = np.ndarray | dict[str, np.ndarray]


def map_observation(function: Callable[..., Any], *observations: Any) -> Any:
    """Apply a function to observations, key by key if they are dictionaries."""
    if isinstance(observations[0], dict):
        return {key: function(*(observation[key] for observation in observations)) for key in observations[0]}
    return function(*observations)


def stack_observations(*observations: Any) -> Any:
    """Observations along a new first dimension, key by key if they are dictionaries."""
    return map_observation(lambda *rows: np.stack(rows), *observations)


def follow(values: Array, last: Array, ends: Sequence[tuple[int, int]], end_values: Array | None) -> Array:
    """
    What came after each step: the next row, except where an episode ended.

    :param values: ``[n_steps, n_envs, ...]``
    :param last: ``[n_envs, ...]``, what came after the last step
    :param ends: step and environment of the steps whose successor is not in the next row
    :param end_values: ``[len(ends), ...]``, their successors; ``None`` if there are none
    :return: ``[n_steps, n_envs, ...]``
    """
    after = th.cat((values[1:], last[None])) if isinstance(values, th.Tensor) else np.concatenate((values[1:], last[None]))
    if end_values is not None:
        steps, envs = zip(*ends, strict=True)
        after[list(steps), list(envs)] = end_values
    return after


class RolloutRecord:
    """
    Filled while a rollout is collected, step by step.

    :ivar ends: ``(step, env, terminated, observation, state)`` of each episode's end: the observation as the policy would
        have seen it, and in the environment's own units
    """

    def __init__(self) -> None:
        self.ends: list[tuple[int, int, bool, Observation, Observation]] = []
        self._raw: list[Observation] = []
        self._rewards: list[np.ndarray] = []
        self._normalizer: VecNormalize | None = None
        self._reward_normalizer: VecNormalize | None = None

    def start(self, env: VecEnv, keep_states: bool) -> None:
        """
        :param env: the environment, before the first step of the rollout
        :param keep_states: whether observations in the environment's own units are wanted
        :raises ValueError: frames that were normalised before they were stacked
        """
        self.ends.clear()
        self._raw.clear()
        self._rewards.clear()
        normalizer = unwrap_vec_normalize(env)
        self._reward_normalizer = normalizer if normalizer is not None and normalizer.norm_reward else None
        self._normalizer = normalizer if keep_states and normalizer is not None and normalizer.norm_obs else None
        if self._normalizer is not None:
            if is_vecenv_wrapped(env, VecFrameStack):
                raise ValueError(
                    "A reward function needs observations in the environment's own units, which VecFrameStack on top of "
                    "VecNormalize(norm_obs=True) no longer has: use `normalize: {'norm_obs': False}`, or stack frames inside "
                    "the environment (gymnasium.wrappers.FrameStackObservation)."
                )
            self._raw.append(self._normalizer.get_original_obs())

    def add(self, step: int, infos: list[dict[str, Any]], dones: np.ndarray) -> None:
        """
        :param step: position in the rollout
        :param infos: of this step, one per environment
        :param dones: bool ``[n_envs]``
        """
        for index in np.flatnonzero(dones):
            observation = infos[index]["terminal_observation"]
            # Only in this very step do the statistics still undo what was done to this observation
            state = observation if self._normalizer is None else self._normalizer.unnormalize_obs(observation)
            self.ends.append((step, int(index), not infos[index].get("TimeLimit.truncated", False), observation, state))
        if self._normalizer is not None:
            self._raw.append(self._normalizer.get_original_obs())
        if self._reward_normalizer is not None:
            self._rewards.append(self._reward_normalizer.get_original_reward())

    def rewards(self, rewards: np.ndarray) -> np.ndarray:
        """
        :param rewards: of the rollout as the buffer holds them, ``[n_steps, n_envs]``
        :return: the same in the environment's own units. ``VecNormalize`` changes its divisor at every step, which would
            make equal rewards differ and returns that are alike a signal
        """
        return rewards if self._reward_normalizer is None else np.stack(self._rewards).astype(rewards.dtype)

    def end_observations(self) -> Observation:
        """The last observation of each ended episode as the policy would have seen it, ``[len(ends), ...]``."""
        return stack_observations(*(end[3] for end in self.ends))

    def states(self, observations: Observation, last_observation: Observation) -> tuple[Observation, Observation]:
        """
        :param observations: of the rollout, as the policy saw them, ``[n_steps, n_envs, ...]``
        :param last_observation: after the last step, ``[n_envs, ...]``
        :return: the states before and after each step in the environment's own units, both ``[n_steps, n_envs, ...]``
        """
        if self._normalizer is not None:
            observations = stack_observations(*self._raw[:-1])
            last_observation = self._raw[-1]
        ends = [(step, env) for step, env, *_ in self.ends]
        end_states = stack_observations(*(end[-1] for end in self.ends)) if ends else None

        def after(values: np.ndarray, last: np.ndarray, *end_values: np.ndarray) -> np.ndarray:
            shape = values.shape[2:]
            return follow(values, last.reshape(-1, *shape), ends, end_values[0].reshape(-1, *shape) if ends else None)

        parts = (observations, last_observation) if end_states is None else (observations, last_observation, end_states)
        return observations, map_observation(after, *parts)


class TrainingData(NamedTuple):
    """
    A rollout, ready for the update. ``n`` visited states with ``k`` actions each: 1, or the candidates of an action group.

    :param observations: ``[n, ...]``, or a dictionary
    :param actions: ``[n, k, ...]``
    :param old_log_prob: of the actions when they were sampled, ``[n, k]``
    :param advantages: ``[n, k]``
    :param weights: of the states in the loss, ``[n]``
    :param reference_log_prob: of the actions under the frozen reference, ``[n, k]``, or ``None``
    :param enumerated: whether the candidates are all the actions there are
    """

    observations: Any
    actions: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    weights: th.Tensor
    reference_log_prob: th.Tensor | None = None
    enumerated: bool = False

    def take(self, index: th.Tensor) -> "TrainingData":
        """
        :param index: of states, int64 ``[batch]``
        :return: these states only
        """
        reference = self.reference_log_prob
        return TrainingData(
            map_observation(lambda values: values.index_select(0, index), self.observations),
            self.actions.index_select(0, index),
            self.old_log_prob.index_select(0, index),
            self.advantages.index_select(0, index),
            self.weights.index_select(0, index),
            reference if reference is None else reference.index_select(0, index),
            self.enumerated,
        )

    def expectation(self, values: th.Tensor) -> th.Tensor:
        """
        :param values: of each action, ``[n, k]``
        :return: their mean under the policy that collected the rollout, ``[n]``
        """
        return (values * self.old_log_prob.exp()).sum(1) if self.enumerated else values.mean(1)
