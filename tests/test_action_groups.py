"""Action groups: what would each of several actions have led to?"""

import copy
import random
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_grpo_plugin import GRPO, RewardSpec, TransitionSpec, rewards
from sb3_grpo_plugin.lookahead import ActionGroups, ModelSimulator, draw_candidates, look_ahead
from sb3_grpo_plugin.policies import ActorPolicy
from sb3_grpo_plugin.rewards import Registries
from sb3_grpo_plugin.wrappers import SnapshotWrapper

# CartPole's own reward, or one step, often tells no candidates apart
pytestmark = pytest.mark.filterwarnings("ignore:.*carry no signal")

FAST = dict(n_steps=32, batch_size=32, n_epochs=1, seed=0, device="cpu")


def upright(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
    return (1.0 - next_state[:, 2].abs() - 0.1 * next_state[:, 0].abs())[:, None]


def cartpole(state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """Euler's method, as the environment does it."""
    x, x_dot, theta, theta_dot = state.T
    force = 20.0 * action[:, 0] - 10.0
    push = (force + 0.05 * theta_dot**2 * theta.sin()) / 1.1
    theta_acc = (9.8 * theta.sin() - theta.cos() * push) / (0.5 * (4.0 / 3.0 - 0.1 * theta.cos() ** 2 / 1.1))
    x_acc = push - 0.05 * theta_acc * theta.cos() / 1.1
    moved = th.stack((x + 0.02 * x_dot, x_dot + 0.02 * x_acc, theta + 0.02 * theta_dot, theta_dot + 0.02 * theta_acc), dim=1)
    return moved, (moved[:, 0].abs() > 2.4) | (moved[:, 2].abs() > 12 * 2 * np.pi / 360)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Registries:
    """No plugin is installed."""
    registries = Registries()
    monkeypatch.setattr(rewards, "registries", lambda: registries)
    return registries


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """What was compared in each rollout: observations, candidates, scores."""
    compare, rollouts = ActionGroups.compare, []

    def spy(self: ActionGroups, policy: Any, observations: Any, *args: Any) -> Any:
        scores, data = compare(self, policy, observations, *args)
        rollouts.append(SimpleNamespace(observations=observations, scores=scores.clone(), actions=data.actions, data=data))
        return scores, data

    monkeypatch.setattr(ActionGroups, "compare", spy)
    return rollouts


def grpo(env: Any, **kwargs: Any) -> GRPO:
    return GRPO("MlpPolicy", env, group_by="action", **{**FAST, **kwargs})


def deterministic(model: GRPO) -> None:
    """Make a policy of two actions take 1 when the pole leans right, else 0, whatever it samples."""
    for parameter in model.policy.parameters():
        parameter.data.zero_()
    layers = [layer for layer in model.policy.mlp_extractor.policy_net if isinstance(layer, th.nn.Linear)]
    layers[0].weight.data[0, 2] = layers[1].weight.data[0, 0] = 1e3
    model.policy.action_net.weight.data[:, 0] = th.tensor([-1e3, 1e3])
    model.policy.action_net.bias.data[:] = th.tensor([1e-3, 0.0])


# the seed's example


@pytest.mark.parametrize("source", ["model", "branches"])
def test_the_seeds_example_learns(source: str, registry: Registries) -> None:
    if source == "model":
        registry.transitions.add(TransitionSpec("test/cartpole", ("CartPole-v1",), cartpole), "test")
    env = DummyVecEnv([lambda: Monitor(gym.make("CartPole-v1"))])
    kwargs = dict(n_steps=256, batch_size=64, n_epochs=10, learning_rate=3e-4, horizon=64 if source == "model" else 16)
    model = GRPO("MlpPolicy", env, reward_function=upright, **kwargs, seed=0)
    random_play, _ = evaluate_policy(model, env, n_eval_episodes=5)
    model.learn(2000 if source == "model" else 1500)
    mean, _ = evaluate_policy(model, env, n_eval_episodes=5)
    assert mean > max(150.0, 2.0 * random_play)
    assert (model.model_steps > 0) == (source == "model") and (model.branch_steps > 0) == (source == "branches")


# candidates


@pytest.mark.parametrize("group_size", [2, 8])
def test_small_discrete_spaces_are_enumerated(group_size: int, seen: list[SimpleNamespace]) -> None:
    model = grpo("CartPole-v1", group_size=group_size, horizon=1)
    before = copy.deepcopy(model.policy)
    model.learn(32)
    assert seen[0].data.enumerated and seen[0].actions.tolist() == [[[0], [1]]] * 32
    expected = [before.evaluate_actions(seen[0].observations, th.full((32,), action))[1] for action in (0, 1)]
    th.testing.assert_close(seen[0].data.old_log_prob, th.stack(expected, dim=1))


@pytest.mark.parametrize(
    "space",
    [spaces.Discrete(9), spaces.Box(-1.0, 2.0, (2,)), spaces.MultiDiscrete([3, 4]), spaces.MultiBinary(3)],
    ids=lambda space: type(space).__name__,
)
def test_others_are_sampled_with_their_own_log_probabilities(space: spaces.Space) -> None:
    policy = ActorPolicy(spaces.Box(-1.0, 1.0, (3,)), space, lambda _: 1e-3)
    observations = th.randn(50, 3)
    with th.no_grad():
        executed, _, log_prob = policy(observations)
        actions, old_log_prob = draw_candidates(policy, observations, executed.view(50, -1), log_prob, 5)
        assert actions.shape[:2] == old_log_prob.shape == (50, 5)
        th.testing.assert_close(actions[:, 0].view_as(executed), executed.to(actions))
        for index in range(5):
            expected = policy.evaluate_actions(observations, actions[:, index].view_as(executed))[1]
            th.testing.assert_close(old_log_prob[:, index], expected, rtol=1e-4, atol=1e-4)
    assert (actions.flatten(2).float().std(1) > 0).any()


# scores


def naive_score(env: gym.Env, first: int, horizon: int, gamma: float, reward: Any) -> float:
    """Follow one candidate in a copy of the environment under the policy of ``deterministic``."""
    env = copy.deepcopy(env)
    score, action = 0.0, first
    for step in range(horizon):
        before = th.tensor(np.array(env.state, dtype=np.float32))[None]
        observation, own, terminated, *_ = env.step(action)
        after = th.tensor(observation)[None]
        score += gamma**step * (own if reward is None else float(reward(before, th.tensor([[action]]), after)))
        if terminated:
            break
        action = int(observation[2] > 0)
    return score


@pytest.mark.parametrize("reward", [None, upright])
@pytest.mark.parametrize("horizon", [1, 3, 30])
def test_scores_are_those_of_a_loop(horizon: int, reward: Any, seen: list[SimpleNamespace]) -> None:
    """Candidates that terminate stop earning, and each goes on from its own next state."""
    model = grpo("CartPole-v1", reward_function=reward, horizon=horizon, gamma=0.9)
    deterministic(model)
    model.learn(32)
    env = gym.make("CartPole-v1").unwrapped
    env.reset()
    for observation, scores in zip(seen[0].observations, seen[0].scores, strict=True):
        env.state, env.steps_beyond_terminated = tuple(observation.double().tolist()), None
        expected = [naive_score(env, action, horizon, 0.9, reward) for action in (0, 1)]
        assert scores.tolist() == pytest.approx(expected, abs=1e-4)
    terminated = len(seen[0].scores.unique()) > 2
    assert terminated or horizon < 30


def test_what_has_terminated_stays_terminated() -> None:
    """A model that counts, and terminates on the way from 1 to 2 only."""
    space = spaces.Box(-9.0, 9.0, (1,))
    policy = ActorPolicy(space, spaces.Discrete(2), lambda _: 1e-3)
    spec = TransitionSpec("test/counter", ("Counter-v0",), lambda state, action: (state + 1.0, state[:, 0] == 1.0))
    simulator = ModelSimulator(spec, th.tensor([[0.0], [1.0], [2.0]]), lambda state: state)
    reward = ("test/one", lambda state, action, next_state: next_state)
    scores = look_ahead(simulator, th.zeros(3, 1), policy, reward, horizon=4, gamma=0.5)
    assert scores.tolist() == [1.0 + 0.5 * 2.0, 2.0, 3.0 + 0.5 * 4.0 + 0.25 * 5.0 + 0.125 * 6.0]
    assert simulator.n_steps == 2 + 1 + 4


@pytest.mark.parametrize("normalize", [False, True])
def test_model_and_branches_agree(normalize: bool, registry: Registries, seen: list[SimpleNamespace]) -> None:
    registry.rewards.add(RewardSpec("test/upright", ("CartPole-*",), upright), "test")
    models = []
    for with_model in (False, True):
        if with_model:
            registry.transitions.add(TransitionSpec("test/cartpole", ("CartPole-v1",), cartpole), "test")
        env = make_vec_env("CartPole-v1", 2, seed=0)
        model = grpo(VecNormalize(env) if normalize else env, reward_function="auto", horizon=20)
        deterministic(model)
        models.append(model.learn(64))
    th.testing.assert_close(seen[0].observations, seen[1].observations)
    th.testing.assert_close(seen[0].scores, seen[1].scores, rtol=1e-4, atol=1e-4)
    assert models[0].branch_steps == models[1].model_steps > 0 == models[0].model_steps == models[1].branch_steps


@pytest.mark.parametrize("with_model", [True, False])
def test_rewards_see_real_units_under_vec_normalize(with_model: bool, registry: Registries) -> None:
    if with_model:
        registry.transitions.add(TransitionSpec("test/cartpole", ("CartPole-v1",), cartpole), "test")
    errors = []

    def checks_units(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
        errors.append(float((cartpole(state, action)[0] - next_state).abs().max()))
        return upright(state, action, next_state)

    model = grpo(VecNormalize(make_vec_env("CartPole-v1", 2, seed=0)), reward_function=checks_units, horizon=1)
    model.learn(3 * 64)
    assert len(errors) >= 3 and max(errors) < 1e-4


def test_other_processes_give_the_same_scores(seen: list[SimpleNamespace]) -> None:
    for vec_env_cls in (DummyVecEnv, SubprocVecEnv):
        env = make_vec_env("CartPole-v1", 2, seed=0, vec_env_cls=vec_env_cls, wrapper_class=SnapshotWrapper)
        model = grpo(env, reward_function=upright, horizon=5)
        deterministic(model)
        model.learn(64)
        env.close()
    assert th.equal(seen[0].scores, seen[1].scores)


def test_growth_with_horizon_is_linear() -> None:
    steps = [grpo("Pendulum-v1", horizon=horizon, group_size=3).learn(32).branch_steps for horizon in (1, 4)]
    assert steps == [32 * 3, 4 * 32 * 3]


# no trace


class Trace(BaseCallback):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        self.seen += [buffer.observations.copy(), buffer.actions.copy(), buffer.rewards.copy(), buffer.log_probs.copy()]
        self.seen += [np.array([list(episode.values())[:2] for episode in self.model.ep_info_buffer])]


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_the_main_trajectory_is_bit_identical_to_one_without_branches(env_id: str) -> None:
    def trace(group_by: str) -> list[Any]:
        env = VecNormalize(make_vec_env(env_id, 2, seed=0))
        model = GRPO(
            "MlpPolicy", env, group_by=group_by, learning_rate=0.0, horizon=3, group_size=3, **{**FAST, "n_steps": 128}
        )
        callback = Trace()
        model.learn(3 * 256, callback)
        generators = [th.get_rng_state().numpy(), np.random.get_state()[1], np.array(random.getstate()[1])]
        return [*callback.seen, *generators, env.obs_rms.mean, env.ret_rms.var]

    plain, branched = trace("state"), trace("action")
    assert len(plain) == len(branched) == 3 * 5 + 5
    for one, other in zip(plain, branched, strict=True):
        np.testing.assert_array_equal(one, other)


# mistakes


class Unsuited(gym.Env):
    """Cannot be copied."""

    observation_space = spaces.Box(-1.0, 1.0, (2,))
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.steps = (number for number in range(10**6))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        return np.full(2, 1.0 / (1 + next(self.steps)), np.float32), 0.0, False, False, {}


def test_without_next_states_the_ways_to_have_them_are_listed() -> None:
    with pytest.raises(ValueError) as error:
        grpo(DummyVecEnv([Unsuited]))
    for hint in ("transition model", "SnapshotWrapper(env, family='replay')", "group_by='state' works without"):
        assert hint in str(error.value)
    assert GRPO("MlpPolicy", DummyVecEnv([Unsuited]), reward_function=upright, **{**FAST, "n_steps": 128})._grouping == "state"


def test_a_model_alone_gives_no_rewards(registry: Registries) -> None:
    registry.transitions.add(TransitionSpec("test/cartpole", ("Test/Unsuited-v0",), cartpole), "test")
    gym.register("Test/Unsuited-v0", Unsuited)
    try:
        with pytest.raises(ValueError, match=r"test/cartpole gives no rewards: pass a reward_function to use it"):
            grpo("Test/Unsuited-v0")
    finally:
        gym.registry.pop("Test/Unsuited-v0")


def test_auto_needs_one_reward(registry: Registries) -> None:
    with pytest.raises(ValueError, match="no reward is bound to CartPole-v1"):
        grpo("CartPole-v1", reward_function="auto")
    for name in ("test/one", "test/two"):
        registry.rewards.add(RewardSpec(name, ("CartPole-v1",), upright), "test")
    with pytest.raises(ValueError, match=r"2 rewards are bound to CartPole-v1.*test/one, test/two"):
        grpo("CartPole-v1", reward_function="auto")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda state, action, next_state: next_state, r"'<lambda>' returned .*expected"),
        (lambda state, action, next_state: next_state[:, 0] / 0.0, "'<lambda>' returned NaN or infinity"),
        (lambda state, action, next_state: th.rand(len(state)), "'<lambda>' gave two answers for one batch"),
        (lambda state, action, next_state: next_state.mul_(2.0)[:, 0], "'<lambda>' modified its input"),
    ],
)
def test_rewards_are_checked_before_anything_is_learned(reward: Any, message: str) -> None:
    model = grpo("CartPole-v1", reward_function=reward, horizon=1)
    with pytest.raises(ValueError, match=message):
        model.learn(32)


def test_other_processes_without_the_wrapper_say_where_it_goes() -> None:
    env = make_vec_env("CartPole-v1", 2, vec_env_cls=SubprocVecEnv)
    try:
        with pytest.raises(ValueError, match=r"lack SnapshotWrapper.*env_wrapper: sb3_grpo_plugin\.wrappers\.SnapshotWrapper"):
            grpo(env)
    finally:
        env.close()


def test_frames_of_normalized_observations_have_no_real_units() -> None:
    env = VecFrameStack(VecNormalize(make_vec_env("CartPole-v1", 2)), 2)
    with pytest.raises(ValueError, match="VecFrameStack on top of VecNormalize"):
        grpo(env, reward_function=upright).learn(64)
