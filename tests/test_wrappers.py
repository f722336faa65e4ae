"""The environment wrappers: what they add, what they leave alone, and where they can go."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_grpo_plugin import rewards
from sb3_grpo_plugin.rewards import EnvWrapperSpec, Registries, RewardSpec
from sb3_grpo_plugin.wrappers import (
    GroupStartWrapper,
    RegisteredWrappers,
    RewardFunctionWrapper,
    SnapshotWrapper,
    ensure_wrapped,
)


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


def test_an_explicit_seed_wins_and_starts_the_count_again():
    env = GroupStartWrapper(gym.make("CartPole-v1"), group=0, seed=1)
    env.reset(), env.reset()
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


def _upright(state, action, next_state):
    """The seed's example: pole upright, cart near the middle."""
    return 1.0 - next_state[:, 2].abs() - 0.1 * next_state[:, 0].abs()


def _bonus(env):
    return gym.wrappers.TransformReward(env, lambda reward: reward + 1)


def _limit(env):
    return gym.wrappers.TimeLimit(env, 3)


@pytest.fixture
def registered(monkeypatch):
    """Two rewards for Pendulum, one for CartPole, and two wrappers for CartPole."""
    registries = Registries()
    for name, env_ids in (("test/upright", ("CartPole-*",)), ("test/one", ("Pendulum-v1",)), ("test/two", ("Pendulum-v1",))):
        registries.rewards.add(RewardSpec(name, env_ids, _upright), "test")
    registries.env_wrappers.add(EnvWrapperSpec("test/bonus", ("CartPole-v1",), _bonus), "test")
    registries.env_wrappers.add(EnvWrapperSpec("test/limit", ("CartPole-*",), _limit), "test")
    monkeypatch.setattr(rewards, "registries", lambda: registries)
    return registries


@pytest.mark.parametrize("reward_function", ["test/upright", "auto", _upright])
def test_reward_wrapper_returns_the_named_reward(registered, reward_function):
    env = RewardFunctionWrapper(gym.make("CartPole-v1"), reward_function)
    env.reset(seed=0)
    for _ in range(5):
        obs, reward, _, _, info = env.step(env.action_space.sample())
        assert reward == pytest.approx(1.0 - abs(obs[2]) - 0.1 * abs(obs[0]), abs=1e-6) and isinstance(reward, float)
        assert info["env_reward"] == 1.0


def test_reward_wrapper_without_a_function_keeps_the_reward():
    env = RewardFunctionWrapper(gym.make("Pendulum-v1"))
    env.reset(seed=0)
    _, reward, _, _, info = env.step(env.action_space.sample())
    assert info["env_reward"] == reward != 0


@pytest.mark.parametrize(
    ("space", "shape", "dtype"),
    [
        (gym.spaces.Discrete(3), (1, 1), "int64"),
        (gym.spaces.MultiDiscrete([2, 3]), (1, 2), "int64"),
        (gym.spaces.MultiBinary(4), (1, 4), "int64"),
        (gym.spaces.Box(-1, 1, (2,)), (1, 2), "float32"),
    ],
)
def test_reward_wrapper_gives_tensors_as_documented(space, shape, dtype):
    seen = []

    def reward_function(state, action, next_state):
        seen.append((state, action, next_state))
        return next_state["position"][:, :1]

    env = RewardFunctionWrapper(_DictEnv(space), reward_function)
    env.reset(seed=0)
    obs, reward, *_ = env.step(space.sample())
    state, action, next_state = seen[0]
    assert action.shape == shape and str(action.dtype) == f"torch.{dtype}"
    assert state["position"].shape == (1, 2) and str(state["position"].dtype) == "torch.float32"
    assert state["image"].shape == (1, 3) and str(state["image"].dtype) == "torch.uint8"
    assert reward == pytest.approx(float(next_state["position"][0, 0])) == pytest.approx(obs["position"][0])


class _DictEnv(gym.Env):
    """Random walk with a dict of a float64 and a uint8 array."""

    def __init__(self, action_space: gym.Space) -> None:
        self.action_space = action_space
        position = gym.spaces.Box(-np.inf, np.inf, (2,), dtype=np.float64)
        self.observation_space = gym.spaces.Dict(position=position, image=gym.spaces.Box(0, 255, (3,), dtype=np.uint8))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = np.zeros(2)
        return self._observe(), {}

    def step(self, action):
        self.position = self.position + self.np_random.normal(size=2)
        return self._observe(), 0.0, False, False, {}

    def _observe(self):
        return {"position": self.position.copy(), "image": np.arange(3, dtype=np.uint8)}


@pytest.mark.parametrize(
    ("env_id", "reward_function", "message"),
    [
        ("Pendulum-v1", "auto", "2 rewards are bound to Pendulum-v1.*test/one, test/two"),
        ("Acrobot-v1", "auto", "no reward is bound to Acrobot-v1"),
        ("CartPole-v1", "test/uprigth", "test/upright"),
        ("CartPole-v1", 3, "expected None, a callable"),
    ],
)
def test_reward_wrapper_refuses_what_it_cannot_resolve(registered, env_id, reward_function, message):
    with pytest.raises(ValueError, match=message):
        RewardFunctionWrapper(gym.make(env_id), reward_function)


def test_reward_wrapper_names_a_reward_of_the_wrong_shape():
    def two(state, action, next_state):
        return next_state[:, :2]

    env = RewardFunctionWrapper(gym.make("CartPole-v1"), two)
    env.reset()
    with pytest.raises(ValueError, match=r"'two' returned the shape \(1, 2\)"):
        env.step(0)


def test_ppo_trains_with_a_plugged_in_reward_and_reports_the_environments_own(registered):
    env = make_vec_env(
        "CartPole-v1", n_envs=2, wrapper_class=RewardFunctionWrapper, wrapper_kwargs={"reward_function": "test/upright"}
    )
    model = PPO("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=1, seed=0, device="cpu").learn(128)
    assert 0 < model.rollout_buffer.rewards.max() < 1  # what PPO learned from
    assert all(info["r"] == info["l"] for info in model.ep_info_buffer)  # Monitor: CartPole pays 1 per step


def test_registered_wrappers_applies_what_is_bound(registered):
    env = RegisteredWrappers(gym.make("CartPole-v1"))
    assert env.wrapper_names == ("test/bonus", "test/limit")
    env.reset(seed=0)
    steps = [env.step(step % 2) for step in range(3)]
    assert [step[1] for step in steps] == [2.0] * 3
    assert [step[3] for step in steps] == [False, False, True]
    with pytest.warns(UserWarning, match="no installed plugin binds an environment wrapper to Acrobot-v1"):
        RegisteredWrappers(gym.make("Acrobot-v1"))


def test_registered_wrappers_is_rebuilt_once(registered):
    env = gym.make(RegisteredWrappers(gym.make("CartPole-v1")).spec)
    env.reset(seed=0)
    assert isinstance(env, RegisteredWrappers) and env.step(0)[1] == 2.0


def test_registered_wrappers_refuses_environments_without_id_and_odd_factories(registered):
    with pytest.raises(ValueError, match="has none: use gymnasium"):
        RegisteredWrappers(_DictEnv(gym.spaces.Discrete(2)))
    registered.env_wrappers.add(EnvWrapperSpec("test/zero", ("CartPole-v1",), lambda env: None), "test")
    with pytest.raises(ValueError, match="'test/zero' returned a NoneType"):
        RegisteredWrappers(gym.make("CartPole-v1"))


WRAPPERS = [
    (GroupStartWrapper, {"group": 1}),
    (SnapshotWrapper, {}),
    (RewardFunctionWrapper, {"reward_function": "test/upright"}),
    (RegisteredWrappers, {}),
]


@pytest.mark.parametrize(("wrapper", "kwargs"), WRAPPERS)
def test_wrappers_can_be_rebuilt_from_the_spec(registered, wrapper, kwargs):
    env = wrapper(gym.make("CartPole-v1"), **kwargs)
    again = gym.make(env.spec)
    assert type(again) is wrapper and {key: again.spec.additional_wrappers[-1].kwargs[key] for key in kwargs} == kwargs


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("wrapper", "kwargs"), WRAPPERS)
def test_wrappers_pass_gymnasiums_checker(registered, wrapper, kwargs):
    check_env(wrapper(gym.make("CartPole-v1").unwrapped, **kwargs), skip_render_check=True)


@pytest.mark.parametrize(("wrapper", "kwargs"), WRAPPERS)
def test_wrappers_work_by_dotted_path_in_the_zoo(registered, wrapper, kwargs):
    from rl_zoo3.utils import get_wrapper_class  # joins our algorithm to the zoo, which the other tests can do without

    path = f"sb3_grpo_plugin.wrappers.{wrapper.__name__}"
    wrap = get_wrapper_class({"env_wrapper": [{path: kwargs}] if kwargs else path})
    assert isinstance(wrap(gym.make("CartPole-v1")), wrapper)
