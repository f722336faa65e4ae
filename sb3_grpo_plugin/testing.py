"""
Checks for plugin authors: does a transition model step as its environment does, is a reward function usable?

>>> from sb3_grpo_plugin.rewards import find_transition
>>> from sb3_grpo_plugin.testing import check_transition
>>> check_transition(find_transition("CartPole-v1"), "CartPole-v1")  # doctest: +SKIP
TransitionCheck(n_steps=1000, n_terminated=43, largest_error=2.4e-07)
"""

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th

from sb3_grpo_plugin.rewards import RewardSpec, TransitionSpec, check_stateless, evaluate_reward, evaluate_transition


@dataclass(frozen=True)
class TransitionCheck:
    """
    What :func:`check_transition` found.

    :param n_steps: compared steps
    :param n_terminated: those that ended an episode: 0 means that termination was compared on negatives only
    :param largest_error: largest absolute difference of any component of the next observation
    """

    n_steps: int
    n_terminated: int
    largest_error: float


@dataclass(frozen=True)
class RewardCheck:
    """
    What :func:`check_reward` found.

    :param n_steps: evaluated steps
    :param mean: of the rewards
    :param std: of the rewards: 0 means that nothing can be learned from them
    :param correlation: with the environment's own reward, NaN where one of them is constant
    """

    n_steps: int
    mean: float
    std: float
    correlation: float


def check_transition(
    spec: TransitionSpec, env_id: str, n_steps: int = 1000, atol: float = 1e-5, seed: int = 0
) -> TransitionCheck:
    """
    Compare a transition model with the real environment over random steps, one step at a time from each true
    observation.

    :param spec: of the model
    :param env_id: for ``gymnasium.make``
    :param n_steps: to compare
    :param atol: how far a component of the next observation may be off, in the environment's units
    :param seed: of the environment and of the random actions
    :return: what was compared, and the largest error
    :raises ValueError: when a next observation is further off, a termination differs, or the model answers differently
        for one row than for a batch
    """
    steps = _random_steps(spec, env_id, n_steps, seed)
    next_state, terminated = evaluate_transition(spec, steps.state, steps.action)
    errors = th.stack([_row_errors(new, true) for new, true in _pairs(next_state, steps.next_state)]).amax(dim=0)
    worst = int(errors.argmax())
    if errors[worst] > atol:
        raise ValueError(
            f"The transition model {spec.name!r} is off by {errors[worst].item():.3g} in step {worst} of {env_id} (allowed: "
            f"{atol:g}): state {_row(steps.state, worst)}, action {steps.action[worst].tolist()}, model "
            f"{_row(next_state, worst)}, environment {_row(steps.next_state, worst)}"
        )
    differing = th.nonzero(terminated != steps.terminated)[:, 0].tolist()
    if differing:
        row = differing[0]
        raise ValueError(
            f"The transition model {spec.name!r} terminates differently in {len(differing)} of {n_steps} steps of {env_id}; "
            f"first in step {row}: state {_row(steps.state, row)}, action {steps.action[row].tolist()}, model "
            f"{bool(terminated[row])}, environment {bool(steps.terminated[row])}"
        )
    for row in range(0, n_steps, max(1, n_steps // 10)):
        alone, _ = evaluate_transition(spec, _rows(steps.state, row), steps.action[row : row + 1])
        off = max(float((new - both).abs().max()) for new, both in _pairs(alone, _rows(next_state, row)))
        if off > atol:
            raise ValueError(
                f"The transition model {spec.name!r} answers differently for one state than for a batch (by {off:.3g} in "
                f"step {row}): rows must not depend on each other"
            )
    return TransitionCheck(n_steps, int(steps.terminated.sum()), float(errors[worst]))


def check_reward(spec: RewardSpec, env_id: str, n_steps: int = 1000, seed: int = 0) -> RewardCheck:
    """
    Call a reward function on random steps of the real environment.

    :param spec: of the reward
    :param env_id: for ``gymnasium.make``
    :param n_steps: to evaluate
    :param seed: of the environment and of the random actions
    :return: a few numbers about the rewards
    :raises ValueError: when what it returns is wrong, it keeps state or modifies its input
    """
    steps = _random_steps(spec, env_id, n_steps, seed)
    check_stateless(spec.function, spec.name, steps.state, steps.action, steps.next_state)
    reward = evaluate_reward(spec.function, spec.name, steps.state, steps.action, steps.next_state).double().cpu()
    correlation = float("nan")
    if reward.std() > 0 and steps.reward.std() > 0:
        correlation = float(th.corrcoef(th.stack((reward, steps.reward)))[0, 1])
    return RewardCheck(n_steps, float(reward.mean()), float(reward.std()), correlation)


@dataclass(frozen=True)
class _Steps:
    """Random steps of an environment, as a batch ``B`` in the conventions of ``sb3_grpo_plugin.rewards``."""

    state: Any
    action: th.Tensor
    next_state: Any
    reward: th.Tensor
    terminated: th.Tensor


def _random_steps(spec: RewardSpec | TransitionSpec, env_id: str, n_steps: int, seed: int) -> _Steps:
    if n_steps < 2:
        raise ValueError(f"n_steps is {n_steps}; at least 2 are needed to compare anything")
    if not spec.binds(env_id):
        raise ValueError(f"{type(spec).__name__} {spec.name!r} is bound to {', '.join(spec.env_ids)}, not to {env_id}")
    env = gym.make(env_id)
    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    before, actions, after, rewards, ends = [], [], [], [], []
    for _ in range(n_steps):
        action = env.action_space.sample()
        new, reward, terminated, truncated, _ = env.step(action)
        # copies: an environment may hand out one array again and again
        before.append(_copy(observation))
        after.append(_copy(new))
        actions.append(np.array(action).reshape(-1))
        rewards.append(float(reward))
        ends.append(bool(terminated))
        observation = env.reset()[0] if terminated or truncated else new
    env.close()
    action_dtype = th.float32 if isinstance(env.action_space, gym.spaces.Box) else th.int64
    return _Steps(
        _batch(before),
        th.as_tensor(np.stack(actions)).to(action_dtype),
        _batch(after),
        th.tensor(rewards, dtype=th.float64),
        th.tensor(ends),
    )


def _copy(observation: Any) -> Any:
    if isinstance(observation, dict):
        return {key: np.array(value) for key, value in observation.items()}
    return np.array(observation)


def _batch(observations: list[Any]) -> Any:
    """Tensors ``[B, *observation_shape]``; floating point as the float32 that policies see."""
    if isinstance(observations[0], dict):
        return {key: _batch([observation[key] for observation in observations]) for key in observations[0]}
    tensor = th.as_tensor(np.stack(observations))
    return tensor.float() if tensor.is_floating_point() else tensor


def _pairs(first: Any, second: Any) -> list[tuple[th.Tensor, th.Tensor]]:
    if isinstance(first, dict):
        return [(first[key].double(), second[key].double()) for key in first]
    return [(first.double(), second.double())]


def _row_errors(new: th.Tensor, true: th.Tensor) -> th.Tensor:
    """Largest absolute difference in each row, ``[B]``."""
    return (new - true).abs().reshape(len(new), -1).amax(dim=1)


def _rows(state: Any, row: int) -> Any:
    """One row as a batch of its own."""
    if isinstance(state, dict):
        return {key: value[row : row + 1] for key, value in state.items()}
    return state[row : row + 1]


def _row(state: Any, row: int) -> Any:
    """One row, to print."""
    if isinstance(state, dict):
        return {key: value[row].tolist() for key, value in state.items()}
    return state[row].tolist()
