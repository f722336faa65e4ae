"""Gymnasium wrappers of this package, and helpers to put them around the environments of a ``VecEnv``.

Every wrapper here works with any algorithm and can be named in an RL Zoo yml by its dotted path, e.g.
``env_wrapper: sb3_grpo_plugin.wrappers.GroupStartWrapper``.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import RecordConstructorArgs
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.util import dict_to_obs, obs_space_info

from sb3_grpo_plugin.rewards import RewardFunction, env_wrappers_for, evaluate_reward, resolve_reward
from sb3_grpo_plugin.snapshots import FAMILIES, Branch, EnvCopier, Episode, GlobalRandom, State


def innermost_vec_env(env: VecEnv) -> VecEnv:
    """
    Take every ``VecEnvWrapper`` off.

    :param env: vectorized environment
    :return: the ``DummyVecEnv``, ``SubprocVecEnv`` or other ``VecEnv`` that holds the environments
    """
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    return env


def ensure_wrapped(
    env: VecEnv,
    wrapper_class: type[gym.Wrapper],
    *,
    outermost: bool = False,
    **kwargs: Any,
) -> None:
    """
    Make sure that each environment inside a ``VecEnv`` carries a wrapper.

    Environments that live in this process (``DummyVecEnv``) get it as their outermost layer if they lack it: nothing is
    reset or stepped, and layers such as ``Monitor`` stay as they are. Environments in other processes cannot be changed
    from here.

    :param env: vectorized environment
    :param wrapper_class: the wrapper that each environment needs
    :param outermost: whether the wrapper has to be the outermost layer
    :param kwargs: constructor arguments for the wrappers that are added
    :raises ValueError: an environment lacks the wrapper (or has it in a wrong place) and cannot be changed from here
    """
    base = innermost_vec_env(env)
    envs = getattr(base, "envs", None)
    if isinstance(envs, list):
        for index, inner in enumerate(envs):
            present = isinstance(inner, wrapper_class) if outermost else _find_layer(inner, wrapper_class) is not None
            if not present:
                envs[index] = wrapper_class(inner, **kwargs)
        return
    path = f"{wrapper_class.__module__}.{wrapper_class.__qualname__}"
    advice = (
        f"Add it where the environments are made: `env_wrapper: {path}` in the zoo's yml (in a list, as the last entry), or "
        f"`make_vec_env(..., wrapper_class={wrapper_class.__name__})`; or use a DummyVecEnv, where it is added for you."
    )
    missing = [index for index, wrapped in enumerate(base.env_is_wrapped(wrapper_class)) if not wrapped]
    if missing:
        raise ValueError(
            f"{len(missing)} of {base.num_envs} environments (the first: number {missing[0]}) in this {type(base).__name__} "
            f"lack {wrapper_class.__name__}, and environments in other processes cannot be wrapped from here. {advice}"
        )
    if outermost:
        outer = set(base.env_method("class_name"))
        if outer != {wrapper_class.class_name()}:
            raise ValueError(
                f"{wrapper_class.__name__} must be the outermost wrapper of each environment, but the outermost ones are: "
                f"{', '.join(sorted(outer))}. {advice}"
            )


def _find_layer(env: gym.Env, wrapper_class: type[gym.Wrapper]) -> gym.Wrapper | None:
    while isinstance(env, gym.Wrapper):
        if isinstance(env, wrapper_class):
            return env
        env = env.env
    return None


class RewardFunctionWrapper(gym.Wrapper, RecordConstructorArgs):
    """
    Let each step return the reward of a registered function, for any algorithm.

    The environment's own reward stays in ``info["env_reward"]``. ``Monitor`` sits inside of the zoo's ``env_wrapper``, so
    ``ep_rew_mean`` and evaluations keep reporting the environment's own return.

    :param env: environment to wrap
    :param reward_function: a registered name (``"package/name"``), ``"auto"`` (the one bound to this environment's ID), a
        callable ``reward_function(state, action, next_state) -> reward`` of torch tensors (CPU, batches of 1), or ``None``
        for the environment's own reward
    :raises ValueError: the name is unknown, or none or several are bound to the ID; at a step: the function returned
        something other than one finite number
    """

    def __init__(self, env: gym.Env, reward_function: str | RewardFunction | None = None) -> None:
        RecordConstructorArgs.__init__(self, reward_function=reward_function)
        gym.Wrapper.__init__(self, env)
        self.reward_name, self._function = resolve_reward(reward_function, _env_id(env))
        self._observation: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._observation = _copied(observation)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        info["env_reward"] = float(reward)
        if self._function is None:
            return observation, reward, terminated, truncated, info
        before, self._observation = self._observation, _copied(observation)
        batch = _action_batch(action, self.env.action_space)
        values = evaluate_reward(self._function, self.reward_name, _batch(before), batch, _batch(self._observation))
        return observation, float(values[0]), terminated, truncated, info


def _env_id(env: gym.Env) -> str | None:
    return None if env.unwrapped.spec is None else env.unwrapped.spec.id


def _copied(observation: Any) -> Any:
    """Numpy arrays that nobody else writes to."""
    if isinstance(observation, dict):
        return {key: _copied(value) for key, value in observation.items()}
    return np.array(observation)


def _batch(observation: Any) -> Any:
    """A batch of one: floats as float32, other dtypes as they are."""
    if isinstance(observation, dict):
        return {key: _batch(value) for key, value in observation.items()}
    tensor = th.as_tensor(observation).unsqueeze(0)
    return tensor.float() if tensor.is_floating_point() else tensor


def _action_batch(action: Any, space: spaces.Space) -> th.Tensor:
    """A batch of one: float32 ``[1, action_dim]`` for ``Box``, int64 ``[1, n]`` for the others."""
    dtype = np.float32 if isinstance(space, spaces.Box) else np.int64
    return th.as_tensor(np.array(action, dtype=dtype).reshape(1, -1))


class RegisteredWrappers(gym.Wrapper, RecordConstructorArgs):
    """
    Put around an environment all wrappers that installed plugins bind to its ID, in the order of their names (the first one
    innermost).

    :param env: environment to wrap, made by ``gymnasium.make``
    :raises ValueError: the environment has no ID, or a plugin's factory returned something other than an environment
    """

    def __init__(self, env: gym.Env) -> None:
        RecordConstructorArgs.__init__(self)
        env_id = _env_id(env)
        if env_id is None:
            raise ValueError(f"RegisteredWrappers looks wrappers up by ID, and {env} has none: use gymnasium.make.")
        specs = env_wrappers_for(env_id)
        if not specs:
            warnings.warn(f"RegisteredWrappers: no installed plugin binds an environment wrapper to {env_id}.", stacklevel=2)
        self._unregistered_spec = env.spec
        for spec in specs:
            wrapped = spec.factory(env)
            if not isinstance(wrapped, gym.Env):
                raise ValueError(
                    f"The environment wrapper {spec.name!r} returned a {type(wrapped).__name__}; expected a gymnasium.Env."
                )
            env = wrapped
        gym.Wrapper.__init__(self, env)
        self.wrapper_names = tuple(spec.name for spec in specs)

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        """Names this wrapper and not those that it adds: ``gymnasium.make(spec)`` would add them twice."""
        spec = self._unregistered_spec
        if spec is None:
            return None
        return dataclasses.replace(spec, additional_wrappers=(*spec.additional_wrappers, self.wrapper_spec()))


class GroupStartWrapper(gym.Wrapper, RecordConstructorArgs):
    """
    Let the e-th episode of every member of a group start from the same state, without forcing any reset.

    A vectorized environment resets its members on its own and without a seed, whenever each of them ends. This wrapper
    seeds those resets with a number made of ``(seed, group, e)``, e counting the episodes of this member: members with equal
    ``seed`` and ``group`` go through the same list of start states, each at its own pace.

    The e-th episodes of a group share their dynamics' noise too, as far as the environment draws it from ``np_random`` and
    as long as their actions make it draw the same numbers: a seeded reset restarts that generator, and what is drawn after
    the start state comes from it. (Common random numbers: they make the comparison sharper and do not bias it.) Noise
    from a global generator is not shared.

    A seed that the caller passes to ``reset`` is used as it is, and makes all that follows reproducible: that episode belongs
    to no group, and the next one has number 1.
    The info of each reset and of each episode's last step holds ``group_start``: ``(group, e)``, or ``None`` if the caller
    seeded that episode.

    :param env: environment to wrap
    :param group: number of the group this environment belongs to, at least 0
    :param seed: base of the start states' seeds, at least 0
    """

    def __init__(self, env: gym.Env, group: int = 0, seed: int = 0) -> None:
        RecordConstructorArgs.__init__(self, group=group, seed=seed)
        gym.Wrapper.__init__(self, env)
        self.set_group_start(group, seed)

    def set_group_start(self, group: int, seed: int, episode: int = 0) -> None:
        """
        Join a group. Takes effect at the next reset; the running episode goes on.

        :param group: number of the group, at least 0
        :param seed: base of the start states' seeds, at least 0
        :param episode: number of the next episode, at least 0
        :raises ValueError: a negative number
        """
        for name, value in (("group", group), ("seed", seed), ("episode", episode)):
            if value < 0:
                raise ValueError(f"GroupStartWrapper: {name} must be at least 0, got {value}.")
        self.group = int(group)
        self.group_seed = int(seed)
        self.next_episode = int(episode)
        self.group_start: tuple[int, int] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.group_start = None
        if seed is not None:
            self.next_episode = 0
        else:
            self.group_start = (self.group, self.next_episode)
            words = np.random.SeedSequence((self.group_seed, self.group, self.next_episode)).generate_state(1)
            seed = int(words[0] >> 1)  # 31 bits: some simulators take a signed 32-bit seed
        self.next_episode += 1
        observation, info = self.env.reset(seed=seed, options=options)
        info["group_start"] = self.group_start
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            info["group_start"] = self.group_start
        return observation, reward, terminated, truncated, info


class SnapshotWrapper(gym.Wrapper, RecordConstructorArgs):
    """
    Take snapshots of an environment, put it back into them, and let branches go on from them without touching it.

    A snapshot is the simulator's state and each wrapper's own state, time limits included; files and records (``Monitor``)
    are not part of it. It has to be the outermost wrapper, or what lies outside of it is not in the snapshot.

    ``set_state`` moves this environment. Branches do not: they run in copies of the layers, without ``Monitor`` and
    ``TimeLimit``, with random generators of their own. A branch draws the noise that the environment itself would have
    drawn next, so the branches of one snapshot share it.

    Out of reach are global variables, threads and files; an attribute that cannot be copied is an error.

    :param env: environment to wrap
    :param family: how the simulator's state is taken: ``"deepcopy"``, ``"mujoco"``, ``"ale"``, ``"replay"`` or ``"auto"``,
        which picks one (or what a SnapshotWrapper further in was told) but never ``"replay"``, whose branches cost the
        length of the episode so far. Replay is for Box2D, and gives those environments a new physics world at each reset
        (see ``snapshots.Replay``).
    :raises ValueError: unknown family. Whether it suits the environment shows when the first snapshot is taken.
    """

    def __init__(self, env: gym.Env, family: str = "auto") -> None:
        RecordConstructorArgs.__init__(self, family=family)
        gym.Wrapper.__init__(self, env)
        if family not in FAMILIES:
            raise ValueError(f"SnapshotWrapper: family is {family!r}; expected one of {', '.join(map(repr, FAMILIES))}.")
        self.family = family
        inner = _find_layer(env, SnapshotWrapper)
        if family == "auto" and isinstance(inner, SnapshotWrapper):
            self.family = inner.family
        self.last_observation: Any = None
        self.last_action: Any = None
        self._copier: EnvCopier | None = None
        self._episode: Episode | None = None
        self._kept: dict[int, State] = {}
        self._branches: dict[int, list[Branch | None]] = {}
        self._randoms: dict[int, GlobalRandom] = {}
        self._n_made = 0
        self._checked = False

    @property
    def copier(self) -> EnvCopier:
        """Made when first used: in a worker process, an error in a constructor would have no one to report to."""
        if self._copier is None:
            self._copier = EnvCopier(self.env, self.family)
        return self._copier

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if self.family == "replay":
            self._episode = self.copier.begin_episode(seed, options)
        self.last_action = None
        self.last_observation, info = self.env.reset(seed=seed, options=options)
        return self.last_observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if self._episode is not None:
            self._episode.actions.append(np.copy(action) if isinstance(action, np.ndarray) else action)
        self.last_action = action
        self.last_observation, reward, terminated, truncated, info = self.env.step(action)
        return self.last_observation, reward, terminated, truncated, info

    def get_state(self) -> State:
        """
        Take a snapshot. Nothing is stepped and no random number is drawn.

        :return: state; picklable unless the environment's attributes are not
        :raises ValueError: the family does not suit the environment
        """
        return self.copier.snapshot(self.last_observation, self.last_action, self._episode, complete=True)

    def set_state(self, state: State) -> None:
        """
        Put the environment into a state that it, or an equal environment, was in. Its future is then the same, random
        numbers included.

        :param state: from ``get_state``
        :raises ValueError: the state is another environment's
        """
        self.copier.restore(state)
        self.last_observation = state.observation
        if state.episode is not None:
            episode = state.episode
            actions = episode.actions[: state.steps]
            self._episode = Episode(episode.layers, episode.generator, episode.seed, episode.options, actions)

    # What follows is called by Brancher, through VecEnv.env_method where the environment lives in another process.

    def branch_call(self, method: str, *args: Any) -> tuple[Any, str | None]:
        """
        Call one of the ``branch_`` methods and hand an error back as a text: raising it would end a worker process.

        :param method: without the prefix
        :param args: its arguments
        :return: result and ``None``, or ``None`` and the error
        """
        try:
            return getattr(self, f"branch_{method}")(*args), None
        except Exception as error:
            return None, f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)

    def branch_prepare(self, observation: Any) -> str:
        """
        Make sure that snapshots can be taken.

        :param observation: the last one, if this wrapper was put around an environment that is already running
        :return: the family's name
        """
        if self.last_observation is None:
            self.last_observation = observation
        if not self.copier.family.is_replayed:
            self.copier.snapshot(None)
        return self.copier.family.name

    def branch_keep(self, forget: Sequence[int], with_observation: bool) -> tuple[int, Any]:
        """
        Take a snapshot and keep it here.

        :param forget: numbers of kept snapshots that are not needed any more
        :param with_observation: whether to return the observation
        :return: its number, and the environment's last observation
        """
        for number in forget:
            self._kept.pop(number, None)
        self._n_made += 1
        observation = self.last_observation if with_observation else None
        to_compare = self.last_observation if self._episode is not None else None
        self._kept[self._n_made] = self.copier.snapshot(to_compare, self.last_action, self._episode)
        return self._n_made, observation

    def branch_open(self, simulation: int, numbers: Sequence[int], close: Sequence[int], isolate: bool) -> int:
        """
        Make branches.

        :param simulation: number for this set of branches
        :param numbers: of kept snapshots, one per branch
        :param close: earlier sets that are not needed any more
        :param isolate: whether the global random generators have to be guarded here
        :return: simulator steps that this took
        """
        for earlier in close:
            self._randoms.pop(earlier, None)
            for branch in self._branches.pop(earlier, []):
                if branch is not None:
                    self.copier.release(branch)
        guard = GlobalRandom()
        if isolate:
            self._randoms[simulation] = guard
        if numbers and not self._checked:
            with GlobalRandom()():
                self.copier.check(self._kept[numbers[0]])
            self._checked = True
        with guard():
            made = [self.copier.branch(self._kept[number]) for number in numbers]
        self._branches[simulation] = [branch for branch, _ in made]
        return sum(steps for _, steps in made)

    def branch_step(self, simulation: int, which: np.ndarray, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
        """
        Step branches.

        :param simulation: number of the set of branches
        :param which: places in that set, ``[n]``
        :param actions: as the environment receives them, ``[n, ...]``
        :return: observations ``[n, ...]`` as ``DummyVecEnv`` returns them, rewards float32 ``[n]``, terminated bool ``[n]``
        """
        if simulation in self._randoms:
            with self._randoms[simulation]():
                return self._branch_step(simulation, which, actions)
        return self._branch_step(simulation, which, actions)

    def _branch_step(self, simulation: int, which: np.ndarray, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
        branches, copier = self._branches[simulation], self.copier
        space = self.observation_space
        keys, shapes, dtypes = obs_space_info(space)
        buffers = {key: np.empty((len(which), *shapes[key]), dtype=dtypes[key]) for key in keys}
        rewards = np.empty(len(which), dtype=np.float32)
        terminated = np.empty(len(which), dtype=bool)
        for row, place in enumerate(which):
            branch = branches[place]
            assert branch is not None, "a terminated branch was stepped"
            observation, rewards[row], terminated[row] = copier.step(branch, actions[row])
            for key in keys:
                buffers[key][row] = observation if key is None else observation[key]
            if terminated[row]:
                copier.release(branch)
                branches[place] = None
        return dict_to_obs(space, buffers), rewards, terminated
