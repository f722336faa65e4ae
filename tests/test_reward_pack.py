"""The reward pack: models against the real environments, rewards against what the environments pay."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from sb3_grpo_plugin.rewards import (
    RewardSpec,
    TransitionSpec,
    check_stateless,
    evaluate_reward,
    evaluate_transition,
    find_transition,
    resolve_reward,
)
from sb3_grpo_plugin.testing import check_reward, check_transition

sb3_grpo_rewards = pytest.importorskip("sb3_grpo_rewards")
REWARDS: dict[str, RewardSpec] = {spec.name: spec for spec in sb3_grpo_rewards.sb3_grpo_rewards()}
MODELS: dict[str, TransitionSpec] = {spec.name: spec for spec in sb3_grpo_rewards.sb3_grpo_transitions()}

# v0 and v4 environments say that they are old
pytestmark = pytest.mark.filterwarnings("ignore:.*out of date.*:DeprecationWarning")


def make(env_id: str) -> gym.Env:
    try:
        return gym.make(env_id)
    except gym.error.DependencyNotInstalled as error:
        pytest.skip(str(error))


def pairs(specs: dict[str, "RewardSpec"] | dict[str, "TransitionSpec"]) -> list[tuple[str, str]]:
    return [(name, env_id) for name, spec in specs.items() for env_id in spec.env_ids]


@pytest.mark.parametrize(("name", "env_id"), pairs(MODELS))
def test_model_steps_as_its_environment(name: str, env_id: str) -> None:
    found = check_transition(MODELS[name], env_id)
    assert found.n_steps == 1000 and found.largest_error <= 1e-5
    assert find_transition(env_id) == MODELS[name]


# States that random play does not reach: walls, speed limits, goals. In the environments' own state variables.
STATES = {
    "CartPole-v1": ((-2.41, -3.0, -0.21, -3.0), (2.41, 3.0, 0.21, 3.0)),
    "Acrobot-v1": ((-np.pi, -np.pi, -12.5, -28.0), (np.pi, np.pi, 12.5, 28.0)),
    "MountainCar-v0": ((-1.2, -0.07), (0.6, 0.07)),
    "MountainCarContinuous-v0": ((-1.2, -0.07), (0.6, 0.07)),
    "Pendulum-v1": ((-np.pi, -8.0), (np.pi, 8.0)),
}

# in float64: at full speed one step of Acrobot magnifies the rounding of a float32 observation a thousandfold
OBSERVE = {
    "Acrobot-v1": lambda s: np.array([np.cos(s[0]), np.sin(s[0]), np.cos(s[1]), np.sin(s[1]), s[2], s[3]]),
    "Pendulum-v1": lambda s: np.array([np.cos(s[0]), np.sin(s[0]), s[1]]),
}


@pytest.mark.parametrize("env_id", STATES)
def test_model_at_the_borders(env_id: str) -> None:
    env = gym.make(env_id).unwrapped
    env.reset(seed=0)
    env.action_space.seed(0)
    rng = np.random.default_rng(0)
    low, high = map(np.array, STATES[env_id])
    states, actions, next_states, ends = [], [], [], []
    for _ in range(2000):
        # beyond the limits, then cut off: a good part of the states lies on a border
        state = np.clip(rng.uniform(1.2 * low, 1.2 * high), low, high).astype(np.float32).astype(np.float64)
        env.state = state  # type: ignore[attr-defined]
        states.append(OBSERVE.get(env_id, lambda state: state)(state))
        env.steps_beyond_terminated = None  # type: ignore[attr-defined]
        actions.append(np.atleast_1d(env.action_space.sample()))
        observation, _, terminated, _, _ = env.step(actions[-1] if actions[-1].dtype == np.float32 else actions[-1][0])
        next_states.append(observation)
        ends.append(terminated)
    found, terminated = evaluate_transition(
        find_transition(env_id) or pytest.fail(env_id), th.as_tensor(np.array(states)), th.as_tensor(np.array(actions))
    )
    errors = (found - th.as_tensor(np.array(next_states))).abs().amax(dim=1)
    assert errors.max() <= 1e-5
    # a rounded observation within 1e-6 of the line may fall on its other side
    assert int((terminated != th.tensor(ends)).sum()) <= 2
    assert env_id == "Pendulum-v1" or 20 < sum(ends) < 1980


@pytest.mark.parametrize("name", MODELS)
def test_model_keeps_dtype_and_device(name: str) -> None:
    env = gym.make(MODELS[name].env_ids[-1])
    state = th.as_tensor(np.stack([env.observation_space.sample().clip(-1, 1) for _ in range(8)]))
    action = th.as_tensor(np.stack([np.atleast_1d(env.action_space.sample()) for _ in range(8)]))
    single, _ = evaluate_transition(MODELS[name], state, action)
    double, _ = evaluate_transition(MODELS[name], state.double(), action)
    assert double.dtype == th.float64 and th.allclose(double.float(), single, atol=1e-5)
    devices = ["meta"] + (["cuda"] if th.cuda.is_available() else [])
    for device in devices:
        next_state, terminated = MODELS[name].function(state.to(device), action.to(device))
        assert next_state.device.type == terminated.device.type == device
        if device != "meta":
            assert th.allclose(next_state.cpu(), single, atol=1e-5)


@pytest.mark.parametrize(("name", "env_id"), pairs(REWARDS))
def test_reward_is_usable_and_the_only_one(name: str, env_id: str) -> None:
    make(env_id).close()
    found = check_reward(REWARDS[name], env_id, n_steps=200)
    assert found.std > 0
    assert resolve_reward("auto", env_id)[0] == name


@pytest.mark.parametrize(("name", "env_id"), [(name, env_id) for name, env_id in pairs(REWARDS) if name.startswith("mujoco/")])
def test_locomotion_reward_follows_the_environments(name: str, env_id: str) -> None:
    make(env_id).close()
    found = check_reward(REWARDS[name], env_id)
    # Humanoid-v4 pays for being healthy by another rule: it goes on paying after the fall
    least = {"Humanoid-v4": -1.0, "Humanoid-v5": 0.7}.get(env_id, 0.85)
    assert found.correlation > least


def test_pendulum_cost_is_the_environments_reward() -> None:
    env = gym.make("Pendulum-v1")
    state, _ = env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(200):
        action = env.action_space.sample()
        next_state, reward, _, _, _ = env.step(action)
        found = REWARDS["classic/pendulum-cost"].function(*(th.as_tensor(x)[None] for x in (state, action, next_state)))
        # the angle from a float32 observation: near the bottom cosine and sine lose digits
        assert abs(float(found) - float(reward)) < 1e-4
        state = next_state


def test_cartpole_reward_is_the_readmes() -> None:
    next_state = th.tensor([[0.5, 9.0, -0.1, 9.0], [-2.0, 0.0, 0.2, 0.0]])
    found = REWARDS["classic/cartpole-upright"].function(next_state, th.zeros(2, 1), next_state)
    assert th.allclose(found, th.tensor([1 - 0.1 - 0.05, 1 - 0.2 - 0.2]))


@pytest.mark.parametrize(
    ("name", "worst", "best"),
    [
        ("classic/acrobot-swing-up", [1, 0, 1, 0, 0, 0], [-1, 0, 1, 0, 0, 0]),
        ("classic/mountain-car-energy", [-np.pi / 6, 0], [np.pi / 6, 0]),
        ("classic/mountain-car-continuous-energy", [-np.pi / 6, 0], [np.pi / 6, 0]),
    ],
)
def test_goal_rewards_are_costs(name: str, worst: list[float], best: list[float]) -> None:
    """An alternative that terminates stops earning: a step may never pay where ending is the aim."""
    states = th.tensor([worst, best], dtype=th.float32)
    low, high = evaluate_reward(REWARDS[name].function, name, states, th.zeros(2, 1), states).tolist()
    assert low < high <= 0 and -1.2 <= low <= -0.9
    wild = th.randn(1000, len(worst)) * 2
    assert REWARDS[name].function(wild, th.zeros(1000, 1), wild).max() <= 0


@pytest.mark.parametrize("name", ["classic/mountain-car-energy", "classic/mountain-car-continuous-energy"])
def test_pumping_beats_resting(name: str) -> None:
    """Along the trajectory that pushes in the direction of travel the reward rises until the goal is reached."""
    env_id = REWARDS[name].env_ids[0]
    model = find_transition(env_id)
    assert model is not None
    state = th.tensor([[-0.5, 0.0]])
    rewards = []
    for _ in range(200):
        forward = state[:, 1:] >= 0
        action = th.where(forward, 2, 0) if env_id == "MountainCar-v0" else th.where(forward, 1.0, -1.0)
        next_state, terminated = evaluate_transition(model, state, action)
        rewards.append(evaluate_reward(REWARDS[name].function, name, state, action, next_state).item())
        state = next_state
        if terminated:
            break
    assert terminated, "the goal is within reach of 200 steps"
    assert np.mean(rewards[-20:]) > np.mean(rewards[:20]) + 0.8


def test_lander_reward_takes_both_action_spaces() -> None:
    function = REWARDS["box2d/lander-landing"].function
    state = th.zeros(4, 8)
    engines = function(state, th.tensor([[0], [1], [2], [3]]), state)
    assert th.allclose(engines, th.tensor([0.0, -0.03, -0.3, -0.03]))
    thrust = th.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 0.4]])
    assert th.allclose(function(state, thrust, state), th.tensor([0.0, -0.3, -0.03, 0.0]))
    out = state.clone()
    out[0, 0] = 1.01
    out[1, 3] = -0.5  # stopped by the ground
    assert function(out, th.zeros(4, 1, dtype=th.long), state)[1] == -100
    assert function(state, th.zeros(4, 1, dtype=th.long), out)[0] == -100


def test_lander_reward_is_the_environments_in_the_air() -> None:
    env = make("LunarLander-v3")
    env.action_space.seed(0)
    state, _ = env.reset(seed=0)
    compared = 0
    for _ in range(300):
        action = env.action_space.sample()
        next_state, reward, terminated, _, _ = env.step(action)
        if not terminated and state[6:].sum() == next_state[6:].sum() == 0:
            batch = (th.as_tensor(np.atleast_1d(x))[None] for x in (state, action, next_state))
            assert abs(float(REWARDS["box2d/lander-landing"].function(*batch)) - float(reward)) < 1e-3
            compared += 1
        state = env.reset()[0] if terminated else next_state
    env.close()
    assert compared > 100


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_keep_no_state_and_take_both_precisions(name: str) -> None:
    env = make(REWARDS[name].env_ids[-1])
    batch = [th.as_tensor(np.stack([np.atleast_1d(env.action_space.sample()) for _ in range(8)]))]
    batch = [th.randn(8, *env.observation_space.shape), *batch, th.randn(8, *env.observation_space.shape)]
    check_stateless(REWARDS[name].function, name, *batch)
    for dtype in (th.float32, th.float64):
        state, action, next_state = batch[0].to(dtype), batch[1], batch[2].to(dtype)
        assert evaluate_reward(REWARDS[name].function, name, state, action, next_state).shape == (8,)
    assert REWARDS[name].function(*(tensor.to("meta") for tensor in batch)).device.type == "meta"


def test_specs_describe_themselves() -> None:
    for spec in [*REWARDS.values(), *MODELS.values()]:
        assert 3 < len(spec.description) < 60
        assert spec.function.__doc__ and ":return:" in spec.function.__doc__
