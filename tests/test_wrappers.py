"""The environment wrappers: what they add, what they leave alone, and where they can go."""

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_grpo_plugin.wrappers import GroupStartWrapper, ensure_wrapped


def _starts(env, n_steps: int, rng: np.random.Generator) -> dict:
    """Start observations seen per (group, episode) while every member acts at random."""
    starts: dict = {}
    env.reset()
    for _ in range(n_steps):
        obs, _, dones, _ = env.step(rng.integers(2, size=env.num_envs))
        for index in np.flatnonzero(dones):
            starts.setdefault(env.reset_infos[index]["group_start"], []).append(obs[index])
    return starts


def test_group_members_share_the_start_of_each_episode():
    env = make_vec_env("CartPole-v1", n_envs=4, seed=0)
    ensure_wrapped(env, GroupStartWrapper)
    for index in range(4):
        env.env_method("set_group_start", index // 2, 7, indices=index)
    starts = _starts(env, 150, np.random.default_rng(0))
    shared = {label: obs for label, obs in starts.items() if len(obs) == 2}
    assert {group for group, _ in shared} == {0, 1}
    for obs in shared.values():
        np.testing.assert_array_equal(obs[0], obs[1])
    firsts = np.stack([obs[0] for obs in starts.values()])
    assert len(np.unique(firsts, axis=0)) == len(starts)  # another group or episode is another start


def test_group_members_share_noise_after_the_start():
    members = [GroupStartWrapper(gym.make("FrozenLake-v1", is_slippery=True), group=1, seed=2) for _ in range(2)]
    for _ in range(5):
        futures = []
        for member in members:
            member.reset()
            futures.append([member.step(2)[:3] for _ in range(3)])
        assert futures[0] == futures[1]


def test_an_explicit_seed_wins_and_counts():
    env = GroupStartWrapper(gym.make("CartPole-v1"), group=0, seed=1)
    expected, _ = gym.make("CartPole-v1").reset(seed=5)
    obs, info = env.reset(seed=5)
    np.testing.assert_array_equal(obs, expected)
    assert info["group_start"] is None
    _, info = env.reset()
    assert info["group_start"] == (0, 1)


def test_group_start_leaves_the_running_episode_alone_when_joined():
    env, twin = (make_vec_env("CartPole-v1", n_envs=1, seed=0) for _ in range(2))
    env.reset(), twin.reset()
    ensure_wrapped(env, GroupStartWrapper)
    actions = np.array([[0], [1], [1]])
    for action in actions:
        np.testing.assert_array_equal(env.step(action)[0], twin.step(action)[0])


@pytest.mark.parametrize("kwargs", [{"group": -1}, {"seed": -3}])
def test_group_start_refuses_negative_numbers(kwargs):
    with pytest.raises(ValueError, match="at least 0, got -"):
        GroupStartWrapper(gym.make("CartPole-v1"), **kwargs)


def test_ensure_wrapped_adds_once_and_below_vec_wrappers():
    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=2))
    ensure_wrapped(env, GroupStartWrapper, seed=1)
    layers = list(env.venv.envs)
    ensure_wrapped(env, GroupStartWrapper, seed=2)
    assert env.venv.envs == layers and all(isinstance(layer, GroupStartWrapper) for layer in layers)


def _make_cartpole():
    return gym.make("CartPole-v1")


def test_ensure_wrapped_names_the_cure_for_other_processes():
    env = SubprocVecEnv([_make_cartpole] * 2, start_method="fork")
    try:
        with pytest.raises(
            ValueError,
            match=r"2 of 2 .*env_wrapper: sb3_grpo_plugin\.wrappers\.GroupStartWrapper",
        ):
            ensure_wrapped(env, GroupStartWrapper)
    finally:
        env.close()


@pytest.mark.parametrize("wrapper", [GroupStartWrapper])
def test_wrappers_can_be_rebuilt_from_the_spec(wrapper):
    env = wrapper(DummyVecEnv([_make_cartpole]).envs[0])
    again = gym.make(env.spec)
    assert type(again) is wrapper
