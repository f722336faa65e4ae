"""Gymnasium wrappers of this package, and helpers to put them around the environments of a ``VecEnv``.

Every wrapper here works with any algorithm and can be named in an RL Zoo yml by its dotted path, e.g.
``env_wrapper: sb3_grpo_plugin.wrappers.GroupStartWrapper``.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper


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
            present = isinstance(inner, wrapper_class) if outermost else _has_layer(inner, wrapper_class)
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


def _has_layer(env: gym.Env, wrapper_class: type[gym.Wrapper]) -> bool:
    while isinstance(env, gym.Wrapper):
        if isinstance(env, wrapper_class):
            return True
        env = env.env
    return False


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

    A seed that the caller passes to ``reset`` is used as it is; such an episode counts, but belongs to no group.
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
        if seed is None:
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
