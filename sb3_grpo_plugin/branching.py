"""
Branching a vectorized environment: many alternative futures, from states that the training run has visited.

The training environment is not stepped, and nothing in it changes: see ``snapshots``. All branches go in lock-step, so that
the policy acts on all of them at once.
"""

import contextlib
import copy
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import (
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

from sb3_grpo_plugin.snapshots import GlobalRandom
from sb3_grpo_plugin.wrappers import SnapshotWrapper, ensure_wrapped, innermost_vec_env

PASSIVE_VEC_WRAPPERS = (VecCheckNan, VecMonitor, VecVideoRecorder)
KNOWN_VEC_WRAPPERS = (*PASSIVE_VEC_WRAPPERS, VecExtractDictObs, VecFrameStack, VecNormalize, VecTransposeImage)

Observation = np.ndarray | dict[str, np.ndarray]


class Snapshot:
    """
    One environment at one time. The state itself stays where the environment lives and goes when this object goes.

    :param env_index: number of the environment
    :param number: of the state, at its ``SnapshotWrapper``
    :param observation: raw observation of one environment; ``None`` where ``stacks`` hold it
    :param stacks: per ``VecFrameStack``, the environment's frames as they are and in raw units
    :param forget: collects the numbers of states that nobody needs any more
    """

    __slots__ = ("_forget", "env_index", "number", "observation", "stacks")

    def __init__(
        self,
        env_index: int,
        number: int,
        observation: Any,
        stacks: list[tuple[Observation, Observation]],
        forget: list[int],
    ) -> None:
        self.env_index = env_index
        self.number = number
        self.observation = observation
        self.stacks = stacks
        self._forget = forget

    def __del__(self) -> None:
        self._forget.append(self.number)


class Brancher:
    """
    Takes snapshots of a vectorized environment and makes branches from them.

    Environments in a ``DummyVecEnv`` get a ``SnapshotWrapper`` if they lack one.

    :param env: the training environment, ``VecEnvWrapper`` layers included
    :raises ValueError: an environment cannot be branched, lacks ``SnapshotWrapper`` and cannot get it from here, or a
        ``VecEnvWrapper`` does something unknown to observations
    """

    def __init__(self, env: VecEnv) -> None:
        self.env = env
        self.base = innermost_vec_env(env)
        self.num_envs = env.num_envs
        self._ops = _observation_ops(env)
        self._stack_ops = [op for op in self._ops if isinstance(op, VecFrameStack)]
        normalizers = [op for op in self._ops if isinstance(op, VecNormalize)]
        self.is_normalized = any(op.norm_obs for op in normalizers)
        # raw frames are not to be had from a VecFrameStack that stacks normalized ones
        self._raw_stacks: list[StackedObservations] | None = None
        self._forget: list[list[int]] = [[] for _ in range(self.num_envs)]
        self._close: list[int] = []
        self._simulations = itertools.count(1)
        envs = getattr(self.base, "envs", None)
        before = list(envs) if isinstance(envs, list) else None
        ensure_wrapped(env, SnapshotWrapper, outermost=True)
        try:
            arguments = {index: (self._last_raw(index),) for index in range(self.num_envs)}
            self.families = list(self.call("prepare", arguments).values())
        except ValueError:
            if before is not None:
                envs[:] = before  # type: ignore[index]
            raise

    def _last_raw(self, index: int) -> Any:
        """Last observation of an environment of a ``DummyVecEnv``; a wrapper that was just added has not seen it."""
        buffers = getattr(self.base, "buf_obs", None)
        if buffers is None:
            return None
        rows = {key: buffer[index].copy() for key, buffer in buffers.items()}
        return rows[None] if None in rows else rows

    def call(self, method: str, arguments: dict[int, tuple]) -> dict[int, Any]:
        """
        Call a ``branch_`` method of some environments' ``SnapshotWrapper``, those in other processes at the same time.

        :param method: name without the prefix
        :param arguments: per environment number
        :return: results per environment number
        :raises ValueError: with the message of what went wrong there
        """
        if isinstance(self.base, SubprocVecEnv):
            # env_method would wait for each answer before it asks the next worker something else
            for index, args in arguments.items():
                self.base.remotes[index].send(("env_method", ("branch_call", (method, *args), {})))
            answers = {index: self.base.remotes[index].recv() for index in arguments}
        else:
            answers = {
                index: self.base.env_method("branch_call", method, *args, indices=index)[0]
                for index, args in arguments.items()
            }
        for index, (_, error) in answers.items():
            if error is not None:
                raise ValueError(f"Branching environment {index} failed. {error}")
        return {index: result for index, (result, _) in answers.items()}

    def snapshot(self) -> list[Snapshot]:
        """
        Take a snapshot of each environment. Call it after the reset, then once after each step of the vectorized
        environment: raw frames below a ``VecNormalize`` are collected here.

        :return: one per environment
        """
        needs_observation = not self._stack_ops or self._tracks_raw_frames
        arguments: dict[int, tuple] = {}
        for index in range(self.num_envs):
            arguments[index] = (self._forget[index].copy(), needs_observation)
            self._forget[index].clear()  # the same list: snapshots hold it
        kept = self.call("keep", arguments)
        stacks = self._frame_rows([observation for _, observation in kept.values()])
        snapshots = []
        for index, (number, observation) in kept.items():
            observation = None if self._stack_ops else copy.deepcopy(observation)
            snapshots.append(Snapshot(index, number, observation, stacks[index], self._forget[index]))
        return snapshots

    @property
    def _tracks_raw_frames(self) -> bool:
        return self.is_normalized and bool(self._stack_ops)

    def _frame_rows(self, observations: list[Any]) -> list[list[tuple[Observation, Observation]]]:
        """Per environment and ``VecFrameStack``: its frames as they are, and in raw units."""
        if not self._stack_ops:
            return [[] for _ in range(self.num_envs)]
        rows = range(self.num_envs)
        if not self._tracks_raw_frames:
            frames = [[_take(op.stacked_obs, index) for op in self._stack_ops] for index in rows]
            return [[(frame, frame) for frame in row] for row in frames]
        self._push_raw_frames(observations)
        assert self._raw_stacks is not None
        pairs = list(zip(self._stack_ops, self._raw_stacks, strict=True))
        return [[(_take(op.stacked_obs, index), _take(raw, index)) for op, raw in pairs] for index in rows]

    def _push_raw_frames(self, observations: list[Any]) -> None:
        """Do to raw observations what the ``VecFrameStack`` layers did to normalized ones in this step."""
        space = self.base.observation_space
        batch: Any = _stack_rows(observations, space)
        if self._raw_stacks is None:
            self._raw_stacks = [_empty_like(op.stacked_obs, self.num_envs) for op in self._stack_ops]
        stacks = dict(zip(self._stack_ops, self._raw_stacks, strict=True))
        for op in self._ops:
            if isinstance(op, VecFrameStack):
                batch, _ = stacks[op].update(batch, np.zeros(self.num_envs, dtype=bool), [])
                # frames from before the episode are exactly 0 there
                _zero_where_zero(stacks[op], op.stacked_obs)
                batch = _arrays(stacks[op])
            else:
                batch = _transform(op, batch, False)

    def simulate(self, snapshots: Sequence[Snapshot], device: th.device | str = "cpu") -> "BranchSimulator":
        """
        Make a branch per snapshot. A snapshot can be given many times.

        :param snapshots: where the branches start; from this object's ``snapshot``
        :param device: of the tensors
        :return: the branches
        """
        return BranchSimulator(self, snapshots, th.device(device))

    def open(self, numbers: dict[int, list[int]], isolate: bool) -> tuple[int, int]:
        """
        :param numbers: of the states that branches start from, per environment number
        :param isolate: whether each environment guards its process's random generators itself
        :return: number of this set of branches, and simulator steps spent
        """
        simulation = next(self._simulations)
        close, self._close = self._close, []
        arguments = {index: (simulation, numbers.get(index, []), close, isolate) for index in range(self.num_envs)}
        return simulation, sum(self.call("open", arguments).values())

    def close(self, simulation: int) -> None:
        """
        Let go of a set of branches; takes effect when the next one is made.

        :param simulation: its number
        """
        self._close.append(simulation)


class BranchSimulator:
    """
    Branches that go in lock-step.

    :param brancher: made the snapshots
    :param snapshots: where the branches start, ``B`` of them
    :param device: of the tensors
    """

    def __init__(self, brancher: Brancher, snapshots: Sequence[Snapshot], device: th.device) -> None:
        if not snapshots:
            raise ValueError("There is no snapshot to branch from.")
        self.brancher = brancher
        self.device = device
        self.n_branches = len(snapshots)
        self._in_process = not isinstance(brancher.base, SubprocVecEnv)
        self._random = GlobalRandom()
        owners = np.array([snapshot.env_index for snapshot in snapshots])
        self._rows = {int(index): np.flatnonzero(owners == index) for index in np.unique(owners)}
        self._places = np.empty(self.n_branches, dtype=int)  # of a branch among those of its environment
        for rows in self._rows.values():
            self._places[rows] = np.arange(len(rows))
        numbers = {index: [snapshots[int(row)].number for row in rows] for index, rows in self._rows.items()}
        with self._guard():
            self._simulation, self.n_steps = brancher.open(numbers, not self._in_process)
        self._finalizer = weakref.finalize(self, brancher.close, self._simulation)
        self.terminated = np.zeros(self.n_branches, dtype=bool)
        self._stacks = self._initial_stacks(snapshots, 0)
        self._raw_stacks = self._initial_stacks(snapshots, 1) if brancher._tracks_raw_frames else self._stacks
        first: Any = None
        if not brancher._stack_ops:
            first = _stack_rows([snapshot.observation for snapshot in snapshots], brancher.base.observation_space)
        self._state = self._transform(first, self._raw_stacks, normalize=False, push=False)
        self._input = self._state
        if brancher.is_normalized:
            self._input = self._transform(first, self._stacks, normalize=True, push=False)

    def _guard(self) -> Any:
        return self._random() if self._in_process else contextlib.nullcontext()

    def _initial_stacks(self, snapshots: Sequence[Snapshot], which: int) -> dict[VecFrameStack, StackedObservations]:
        stacks = {}
        for position, op in enumerate(self.brancher._stack_ops):
            stack = _empty_like(op.stacked_obs, self.n_branches)
            for row, snapshot in enumerate(snapshots):
                _put(stack, row, snapshot.stacks[position][which])
            stacks[op] = stack
        return stacks

    def _transform(
        self, observations: Any, stacks: dict, normalize: bool, push: bool = True, rows: np.ndarray | None = None
    ) -> Any:
        """What the ``VecEnvWrapper`` layers make of observations of the environments (of some rows)."""
        for op in self.brancher._ops:
            if isinstance(op, VecFrameStack):
                stack = stacks[op]
                if push:
                    part = stack if rows is None else _part(stack, rows)
                    count = self.n_branches if rows is None else len(rows)
                    part.update(observations, np.zeros(count, dtype=bool), [])
                    if rows is not None:
                        _put(stack, rows, _arrays(part))
                    observations = _copy_arrays(part)
                else:
                    observations = _copy_arrays(stack)
            elif observations is not None:  # None: a VecFrameStack further out holds what we start from
                observations = _transform(op, observations, normalize)
        return observations

    @property
    def state(self) -> Any:
        """Raw observations ``[B, ...]``, frames stacked: floats as float32, other dtypes as they are; or a dict of them."""
        return _raw_tensors(self._state, self.device)

    def policy_input(self) -> Any:
        """
        :return: observations ``[B, ...]`` as the policy gets them in training (normalized, stacked, transposed)
        """
        return obs_as_tensor(self._input, self.device)

    def step(self, action: np.ndarray | th.Tensor) -> tuple[Any, th.Tensor, th.Tensor]:
        """
        Step every branch that has not terminated. The others keep their last state and earn 0. Time limits do not count.

        :param action: as the environments receive them, ``[B, ...]`` (``[B]`` or ``[B, 1]`` for ``Discrete``)
        :return: next state as in ``state``, the simulator's own reward float32 ``[B]``, terminated bool ``[B]``
        """
        space = self.brancher.base.action_space
        values = action.cpu().numpy() if isinstance(action, th.Tensor) else np.asarray(action)
        values = values.reshape(self.n_branches, *(space.shape or ()))
        n_alive = int((~self.terminated).sum())
        reward = np.zeros(self.n_branches, dtype=np.float32)
        if n_alive:
            self._step_alive(values, reward)
        self.n_steps += n_alive
        return self.state, th.as_tensor(reward, device=self.device), th.as_tensor(self.terminated.copy(), device=self.device)

    def _step_alive(self, action: np.ndarray, reward: np.ndarray) -> None:
        rows = {index: own[~self.terminated[own]] for index, own in self._rows.items()}
        rows = {index: own for index, own in rows.items() if len(own)}
        arguments = {index: (self._simulation, self._places[own], action[own]) for index, own in rows.items()}
        with self._guard():
            results = self.brancher.call("step", arguments)
        order = np.concatenate(list(rows.values()))
        observations = _concatenate([observation for observation, _, _ in results.values()])
        reward[order] = np.concatenate([rewards for _, rewards, _ in results.values()])
        self.terminated[order] = np.concatenate([ended for _, _, ended in results.values()])
        everyone = len(order) == self.n_branches
        part = None if everyone and len(rows) == 1 else order
        state = self._transform(observations, self._raw_stacks, normalize=False, rows=part)
        if self.brancher.is_normalized:
            normalized = self._transform(observations, self._stacks, normalize=True, rows=part)
            self._input = normalized if part is None else _merge(self._input, part, normalized)
        self._state = state if part is None else _merge(self._state, part, state)
        if not self.brancher.is_normalized:
            self._input = self._state


# ---------------------------------------------------------------------------------------------------------------------


def _observation_ops(env: VecEnv) -> list[VecEnvWrapper]:
    """The layers that change observations, innermost first."""
    ops: list[VecEnvWrapper] = []
    while isinstance(env, VecEnvWrapper):
        if not isinstance(env, KNOWN_VEC_WRAPPERS):
            known = ", ".join(layer.__name__ for layer in KNOWN_VEC_WRAPPERS)
            raise ValueError(
                f"Branching has to rebuild what each VecEnvWrapper does to observations, and does not know "
                f"{type(env).__name__}. Known are {known}. Do it in a gymnasium wrapper (env_wrapper) instead."
            )
        if not isinstance(env, PASSIVE_VEC_WRAPPERS):
            ops.append(env)
        env = env.venv
    return ops[::-1]


def _transform(op: VecEnvWrapper, observations: Any, normalize: bool) -> Any:
    if isinstance(op, VecNormalize):
        return op.normalize_obs(observations) if normalize else observations
    if isinstance(op, VecTransposeImage):
        return op.transpose_observations(observations)
    assert isinstance(op, VecExtractDictObs)
    return observations[op.key]


def _stack_rows(rows: Sequence[Any], space: spaces.Space) -> Any:
    """One array (or dict of arrays) of the space's dtype, as ``DummyVecEnv`` makes it."""
    if isinstance(space, spaces.Dict):
        return {key: _stack_rows([row[key] for row in rows], part) for key, part in space.spaces.items()}
    return np.stack([np.asarray(row, dtype=space.dtype) for row in rows])


def _concatenate(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)


def _merge(old: Any, rows: np.ndarray, new: Any) -> Any:
    """A copy of ``old`` with some rows replaced: callers may still hold the old one."""
    if isinstance(old, dict):
        return {key: _merge(old[key], rows, new[key]) for key in old}
    merged = old.copy()
    merged[rows] = new
    return merged


def _raw_tensors(observations: Any, device: th.device) -> Any:
    if isinstance(observations, dict):
        return {key: _raw_tensors(value, device) for key, value in observations.items()}
    tensor = th.as_tensor(observations, device=device)
    return tensor.float() if tensor.is_floating_point() else tensor


# StackedObservations is SB3's own; dicts hold one per key


def _each(stack: StackedObservations, function: Callable[[StackedObservations], Any]) -> Any:
    if isinstance(stack.observation_space, spaces.Dict):
        return {key: function(part) for key, part in stack.sub_stacked_observations.items()}
    return function(stack)


def _take(stack: StackedObservations, row: int) -> Any:
    return _each(stack, lambda part: part.stacked_obs[row].copy())


def _arrays(stack: StackedObservations) -> Any:
    return _each(stack, lambda part: part.stacked_obs)


def _copy_arrays(stack: StackedObservations) -> Any:
    return _each(stack, lambda part: part.stacked_obs.copy())


def _replaced(stack: StackedObservations, arrays: Any) -> StackedObservations:
    """A stack of the same kind that holds other frames."""
    twin = copy.copy(stack)
    if isinstance(arrays, dict):
        parts = stack.sub_stacked_observations
        twin.sub_stacked_observations = {key: _replaced(part, arrays[key]) for key, part in parts.items()}
    else:
        twin.stacked_obs = arrays
    return twin


def _empty_like(stack: StackedObservations, count: int) -> StackedObservations:
    def zeros(part: StackedObservations) -> np.ndarray:
        return np.zeros((count, *part.stacked_shape), dtype=part.observation_space.dtype)

    return _replaced(stack, _each(stack, zeros))


def _part(stack: StackedObservations, rows: np.ndarray) -> StackedObservations:
    return _replaced(stack, _each(stack, lambda part: part.stacked_obs[rows]))


def _put(stack: StackedObservations, rows: Any, values: Any) -> None:
    if isinstance(values, dict):
        for key, part in stack.sub_stacked_observations.items():
            part.stacked_obs[rows] = values[key]
    else:
        stack.stacked_obs[rows] = values


def _zero_where_zero(raw: StackedObservations, normalized: StackedObservations) -> None:
    """Frames that a reset blanked are blank in raw units too; the newest frame never is."""
    if isinstance(raw.observation_space, spaces.Dict):
        for key, part in raw.sub_stacked_observations.items():
            _zero_where_zero(part, normalized.sub_stacked_observations[key])
        return
    older = (slice(None), slice(0, -(raw.stacked_shape[raw.repeat_axis] // raw.n_stack)))
    if not raw.channels_first:
        older = (Ellipsis, older[1])  # type: ignore[assignment]
    blank = ~normalized.stacked_obs[older].reshape(len(normalized.stacked_obs), -1).any(axis=1)
    kept = raw.stacked_obs[older]
    kept[blank] = 0
    raw.stacked_obs[older] = kept
