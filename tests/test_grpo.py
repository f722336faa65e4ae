"""GRPO as a citizen of Stable-Baselines3."""

import itertools
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize

from sb3_grpo_plugin import GRPO
from sb3_grpo_plugin.groups import EpisodeGroups, ScoreScale, StateGroups, Visits

OBSERVATIONS = {
    "box": spaces.Box(-1.0, 1.0, (3,)),
    "matrix": spaces.Box(-1.0, 1.0, (2, 3)),
    "discrete": spaces.Discrete(5),
    "multi-discrete": spaces.MultiDiscrete([3, 4]),
    "multi-binary": spaces.MultiBinary(4),
    "image": spaces.Box(0, 255, (36, 36, 1), np.uint8),
    "dict": spaces.Dict({"image": spaces.Box(0, 255, (36, 36, 3), np.uint8), "speed": spaces.Box(-1.0, 1.0, (2,))}),
}
ACTIONS = {
    "discrete": spaces.Discrete(3),
    "multi-discrete": spaces.MultiDiscrete([3, 2]),
    "multi-binary": spaces.MultiBinary(2),
    "box": spaces.Box(-2.0, 1.0, (2,)),
}
FAST = dict(n_steps=64, batch_size=32, n_epochs=2, seed=0, device="cpu")


class Draw(gym.Env):
    """
    Random observations from any space; pays for large actions.

    :param observation: name of the observation space
    :param action: name of the action space
    :param length: an episode terminates after so many steps
    """

    def __init__(self, observation: str = "box", action: str = "discrete", length: float = 7):
        self.observation_space = OBSERVATIONS[observation]
        self.action_space = ACTIONS[action]
        self.length = length

    def draw(self) -> Any:
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.time = 0
        return self.draw(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self.time += 1
        return self.draw(), float(np.mean(action) + self.np_random.normal()), self.time >= self.length, False, {}


def draws(n_envs: int = 2, time_limit: int | None = None, **kwargs: Any) -> VecEnv:
    def make() -> gym.Env:
        env: gym.Env = Draw(**kwargs)
        return env if time_limit is None else gym.wrappers.TimeLimit(env, time_limit)

    return make_vec_env(make, n_envs=n_envs, seed=0)


def policy_for(env: VecEnv) -> str:
    if isinstance(env.observation_space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if len(env.observation_space.shape or ()) == 3 else "MlpPolicy"


def weights(model: GRPO) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def same(one: dict[str, th.Tensor], other: dict[str, th.Tensor]) -> bool:
    return one.keys() == other.keys() and all(th.equal(one[name], other[name]) for name in one)


class AtRolloutEnd(BaseCallback):
    """Keeps what a function makes of the model at the end of each rollout."""

    def __init__(self, look: Any):
        super().__init__()
        self.look = look
        self.seen: list[Any] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.seen.append(self.look(self.model))


# spaces


@pytest.mark.parametrize("group_by", ["state", "episode", "action"])
@pytest.mark.parametrize(
    ("observation", "action"),
    [*((name, "discrete") for name in OBSERVATIONS), *(("box", name) for name in ACTIONS if name != "discrete")],
)
def test_every_space_learns(observation: str, action: str, group_by: str) -> None:
    env = draws(4, observation=observation, action=action)
    small = dict(n_steps=32, batch_size=32, n_epochs=1) if "image" in str(env.observation_space) else {}
    kwargs = {**FAST, **small, "policy_kwargs": dict(net_arch=[8])}
    model = GRPO(policy_for(env), env, group_by=group_by, group_size=2, horizon=2, **kwargs)
    before = weights(model)
    model.learn(model.n_steps * 4)
    assert all(not th.equal(before[name], value) for name, value in model.policy.named_parameters())
    assert all(th.isfinite(value).all() for value in model.policy.parameters())
    for deterministic in (True, False):
        actions, _ = model.predict(env.reset(), deterministic=deterministic)
        assert all(env.action_space.contains(single) for single in actions)


@pytest.mark.parametrize("n_envs", [1, 3, 5])
@pytest.mark.parametrize("length", [7, math.inf])
def test_any_number_of_environments_and_episodes_that_never_end(n_envs: int, length: float) -> None:
    model = GRPO("MlpPolicy", draws(n_envs, length=length), **{**FAST, "n_steps": 128})
    before = weights(model)
    model.learn(2 * 128 * n_envs)
    assert not same(before, weights(model))


def test_images_are_compared_by_features() -> None:
    model = GRPO("CnnPolicy", draws(4, observation="image"), **{**FAST, "n_steps": 16})
    callback = AtRolloutEnd(lambda model: model._state_groups._center.shape)
    model.learn(64, callback)
    assert callback.seen == [(model.policy.features_dim,)]


@pytest.mark.parametrize("action", ["box", "discrete"])
def test_generalized_state_dependent_exploration(action: str) -> None:
    if action == "discrete":
        with pytest.raises(ValueError, match="continuous actions"):
            GRPO("MlpPolicy", draws(), use_sde=True, **FAST)
        return
    model = GRPO("MlpPolicy", draws(action=action), use_sde=True, sde_sample_freq=4, **FAST)
    before = weights(model)
    model.learn(128)
    assert not th.equal(before["log_std"], weights(model)["log_std"])


@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("group_by", ["state", "episode", "action"])
def test_cuda(group_by: str) -> None:
    model = GRPO("MlpPolicy", draws(), group_by=group_by, group_size=2, horizon=2, **{**FAST, "device": "cuda"})
    before = weights(model)
    model.learn(256)
    assert not same(before, weights(model)) and model.device.type == "cuda"


# no critic


@pytest.mark.parametrize("net_arch", [[8, 8], dict(pi=[8, 8], vf=[512]), dict(pi=[8, 8])])
@pytest.mark.parametrize("observation", ["box", "dict"])
def test_there_is_no_value_network(net_arch: Any, observation: str) -> None:
    env = draws(4, observation=observation)
    shared = dict(net_arch=net_arch, share_features_extractor=False)
    model = GRPO(policy_for(env), env, **{**FAST, "n_steps": 16}, policy_kwargs=shared)
    model.learn(64)
    extractor = sum(value.numel() for value in model.policy.features_extractor.parameters())
    sizes = [model.policy.features_dim, 8, 8, 3]
    layers = sum(n_in * n_out + n_out for n_in, n_out in itertools.pairwise(sizes))
    assert sum(value.numel() for value in model.policy.parameters()) == extractor + layers
    optimized = [value for group in model.policy.optimizer.param_groups for value in group["params"]]
    assert sum(value.numel() for value in optimized) == extractor + layers
    assert len(model.policy.optimizer.state) == len(optimized)
    assert not [name for name in model.policy.state_dict() if "value" in name]
    model.policy.forward(model.policy.obs_to_tensor(env.reset())[0])


def test_a_value_head_that_a_policy_brings_along_is_neither_trained_nor_used(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ActorCriticPolicy has a value head, which GRPO neither uses nor trains"):
        model = GRPO(ActorCriticPolicy, draws(time_limit=5), **FAST)
    with th.no_grad():
        model.policy.value_net.bias.fill_(1000.0)
    before = weights(model)
    callback = AtRolloutEnd(lambda model: model.rollout_buffer.rewards.copy())
    model.learn(128, callback)
    trained = {name for name, value in weights(model).items() if not th.equal(before[name], value)}
    assert trained == {name for name in before if "value" not in name}
    assert np.abs(callback.seen[0]).max() < 100.0
    model.save(tmp_path / "model.zip")
    with pytest.warns(UserWarning, match="value head"):
        loaded = GRPO.load(tmp_path / "model.zip")
    assert same(weights(loaded), weights(model)) and (loaded.policy.predict_values(th.zeros(2, 3)) == 0).all()


# advantages, rewards


class Recorder(AtRolloutEnd):
    """Keeps what the environment gave, step by step, and shows it at the rollout's end to a function."""

    def _on_rollout_start(self) -> None:
        self.steps: list[tuple] = []

    def _on_step(self) -> bool:
        step = {name: np.copy(self.locals[name]) for name in ("new_obs", "rewards", "dones")}
        before, after = self.model._last_obs.copy(), step["new_obs"]
        terminated = step["dones"].copy()
        for env in np.flatnonzero(step["dones"]):
            after[env] = self.locals["infos"][env]["terminal_observation"]
            terminated[env] = not self.locals["infos"][env]["TimeLimit.truncated"]
        self.steps.append((before, after, step["rewards"], step["dones"], terminated))
        return True

    def _on_rollout_end(self) -> None:
        before, after, rewards, dones, terminated = (
            th.as_tensor(np.array(part), dtype=th.float32) for part in zip(*self.steps, strict=True)
        )
        starts = th.as_tensor(self.model.rollout_buffer.episode_starts)
        assert th.equal(starts[1:], dones[:-1])
        self.seen.append(self.look(self.model, Visits(before, after, rewards, starts, dones, terminated)))


@pytest.mark.parametrize("group_by", ["state", "episode", "action"])
@pytest.mark.parametrize("length", [4, 9])
def test_rewards_in_the_buffer_are_the_environments(group_by: str, length: int) -> None:
    """Time limits included: nothing is added for what could have followed."""
    model = GRPO("MlpPolicy", draws(time_limit=6, length=length), group_by=group_by, group_size=2, horizon=1, **FAST)
    callback = Recorder(lambda model, visits: np.testing.assert_array_equal(model.rollout_buffer.rewards, visits.rewards))
    model.learn(3 * 128, callback)
    assert len(callback.seen) == 3


@pytest.mark.parametrize("length", [4, 9, 31])
def test_advantages_of_state_groups_at_the_end_of_a_rollout(length: int) -> None:
    model = GRPO("MlpPolicy", draws(time_limit=6, length=length), gae_lambda=0.8, **FAST)
    groups, scale = StateGroups(model.gamma, 0.8, seed=0), ScoreScale("batch")

    def look(model: GRPO, visits: Visits) -> None:
        comparison = groups.compare(visits)
        buffer, expected = model.rollout_buffer, scale(comparison.centred, None)
        np.testing.assert_allclose(buffer.advantages, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(buffer.returns, comparison.scores, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(buffer.values, comparison.scores - comparison.centred, rtol=1e-4, atol=1e-4)

    callback = Recorder(look)
    model.learn(3 * 128, callback)
    assert len(callback.seen) == 3


@pytest.mark.parametrize("supervision", ["process", "outcome"])
def test_advantages_of_episode_groups_at_the_end_of_a_rollout(supervision: str) -> None:
    model = GRPO("MlpPolicy", draws(4), group_by="episode", group_size=2, supervision=supervision, **FAST)
    groups, scale = EpisodeGroups(4, 2, model.gamma, supervision), ScoreScale("batch")

    def look(model: GRPO, visits: Visits) -> None:
        comparison = groups.compare(visits.rewards, visits.episode_starts, visits.dones)
        expected = scale(comparison.centred, comparison.group_std)
        np.testing.assert_allclose(model.rollout_buffer.advantages, expected, rtol=1e-4, atol=1e-4)

    callback = Recorder(look)
    model.learn(3 * 256, callback)
    assert len(callback.seen) == 3


def test_members_of_an_episode_group_start_alike() -> None:
    model = GRPO("MlpPolicy", make_vec_env("CartPole-v1", 4), group_by="episode", group_size=2, **FAST)
    starts: list[list[np.ndarray]] = []

    def look(model: GRPO) -> None:
        buffer = model.rollout_buffer
        starts.append([buffer.observations[buffer.episode_starts[:, env] == 1, env] for env in range(4)])

    model.learn(256, AtRolloutEnd(look))
    for one, other in ((0, 1), (2, 3)):
        n_episodes = min(len(starts[0][one]), len(starts[0][other]))
        assert n_episodes > 1
        np.testing.assert_array_equal(starts[0][one][:n_episodes], starts[0][other][:n_episodes])
    assert (starts[0][0][0] != starts[0][2][0]).all()


class Flat(Draw):
    """Pays the same whatever is done."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        observation, _, terminated, truncated, info = super().step(action)
        return observation, 1.0, terminated, truncated, info


@pytest.mark.parametrize(
    ("group_by", "length", "cause"),
    [
        ("state", math.inf, "all returns are alike"),
        ("episode", 7, "the episodes from one start earn the same"),
        ("action", 7, "all candidates score alike"),
    ],
)
def test_groups_without_a_signal_are_said_and_leave_the_policy_as_it_was(group_by: str, length: float, cause: str) -> None:
    model = GRPO("MlpPolicy", make_vec_env(lambda: Flat(length=length), 2), group_by=group_by, group_size=2, horizon=3, **FAST)
    before = weights(model)
    callback = AtRolloutEnd(lambda model: (model.rollout_buffer.advantages.copy(), dict(model.logger.name_to_value)))
    with pytest.warns(UserWarning, match=f"100% of the groups in this rollout carry no signal: {cause}") as warned:
        model.learn(2 * 128, callback)
    assert len([one for one in warned if "no signal" in str(one.message)]) == 1
    for advantages, logs in callback.seen:
        assert (advantages == 0).all() and logs["train/frac_reward_zero_std"] == 1.0
    assert same(before, weights(model))


def test_normalize_advantage_warns() -> None:
    with pytest.warns(UserWarning, match="normalize_advantage=True standardises every minibatch"):
        GRPO("MlpPolicy", draws(), normalize_advantage=True, **FAST).learn(128)


@pytest.mark.parametrize("kwargs", [dict(vf_coef=1.0), dict(clip_range_vf=0.2), dict(group_by="action", gae_lambda=0.9)])
def test_options_without_an_effect_warn(kwargs: dict) -> None:
    with pytest.warns(UserWarning, match="no effect"):
        GRPO("MlpPolicy", draws(), **kwargs, **FAST)


# options of the update


@pytest.mark.parametrize(
    "kwargs",
    [
        *(dict(loss_type=name) for name in ("grpo", "dr_grpo")),
        *(dict(scale_rewards=name) for name in ("group", "none")),
        dict(clip_range_high=0.0),
        dict(kl_coef=0.5),
        dict(ent_coef=0.1),
        dict(normalize_advantage=True),
        dict(supervision="outcome"),
    ],
)
@pytest.mark.filterwarnings("ignore:normalize_advantage")
def test_every_option_changes_what_is_learned(kwargs: dict) -> None:
    learned = [
        weights(GRPO("MlpPolicy", draws(4), group_by="episode", group_size=2, **options, **FAST).learn(512))
        for options in ({}, kwargs)
    ]
    assert not same(*learned)


def test_target_kl_ends_an_update_early() -> None:
    kwargs = {**FAST, "n_epochs": 20, "learning_rate": 0.05}
    free, held = (GRPO("MlpPolicy", draws(), target_kl=target_kl, **kwargs).learn(128) for target_kl in (None, 0.01))
    assert free._n_updates == 20 and held._n_updates < 10


# deterministic, saved and loaded


@pytest.mark.parametrize("group_by", ["state", "episode", "action"])
@pytest.mark.filterwarnings("ignore:No episode ended")
def test_same_seed_same_weights(group_by: str) -> None:
    def learned(seed: int) -> dict[str, th.Tensor]:
        kwargs = {**FAST, "seed": seed}
        model = GRPO("MlpPolicy", make_vec_env("Pendulum-v1", 2), group_by=group_by, group_size=2, horizon=3, **kwargs)
        return weights(model.learn(384))

    first = learned(1)
    assert same(first, learned(1)) and not same(first, learned(2))


@pytest.mark.parametrize("group_by", ["state", "episode", "action"])
def test_save_load_and_learn_on(group_by: str, tmp_path: Path) -> None:
    env = draws()
    model = GRPO("MlpPolicy", env, group_by=group_by, group_size=2, horizon=2, kl_coef=0.1, **FAST).learn(128)
    assert model.num_timesteps == 128
    model.learn(128, reset_num_timesteps=False)
    assert model.num_timesteps == 256
    model.save(tmp_path / "model")
    observations = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    for loaded in (GRPO.load(tmp_path / "model"), GRPO.load(tmp_path / "model", env=draws(4))):
        assert same(weights(loaded), weights(model))
        assert (loaded.group_by, loaded.group_size, loaded.kl_coef, loaded.horizon) == (group_by, 2, 0.1, 2)
        actions = [one.predict(observations, deterministic=True)[0] for one in (loaded, model)]
        np.testing.assert_array_equal(*actions)
        if loaded.env is None:
            loaded.set_env(draws())
        loaded.learn(128, reset_num_timesteps=False)
        assert loaded.num_timesteps > 256 and not same(weights(loaded), weights(model))
    # As the model is, so are its parameters
    other = GRPO("MlpPolicy", env, kl_coef=0.1, **{**FAST, "seed": 5})
    assert not same(weights(other), weights(model))
    other.set_parameters(model.get_parameters())
    assert same(weights(other), weights(model))


def test_the_reference_is_the_policy_at_the_start_of_learn_and_is_saved(tmp_path: Path) -> None:
    model = GRPO("MlpPolicy", draws(), kl_coef=0.1, **FAST)
    start = weights(model)
    kls: list[float] = []
    model.learn(256, AtRolloutEnd(lambda model: kls.append(model.logger.name_to_value.get("train/kl"))))
    assert same(model.reference_policy.state_dict(), start) and not same(weights(model), start)
    assert not [name for name, value in model.reference_policy.named_parameters() if value.grad is not None]
    model.save(tmp_path / "model.zip")
    loaded = GRPO.load(tmp_path / "model.zip", env=draws())
    assert same(loaded.reference_policy.state_dict(), start)
    loaded.learn(128, reset_num_timesteps=False)  # the run goes on: so does its reference
    assert same(loaded.reference_policy.state_dict(), start)
    now = weights(loaded)
    loaded.learn(128)
    assert same(loaded.reference_policy.state_dict(), now)


def test_the_kl_holds_the_policy_near_its_reference() -> None:
    far, near = (GRPO("MlpPolicy", draws(), kl_coef=kl_coef, **FAST).learn(640) for kl_coef in (1e-9, 10.0))
    distances = []
    for model in (far, near):
        reference = model.reference_policy.state_dict()
        distances.append(sum(float((value - reference[name]).square().sum()) for name, value in weights(model).items()))
    assert distances[1] < 0.7 * distances[0]
    assert GRPO("MlpPolicy", draws(), **FAST).learn(128).reference_policy is None


def test_a_callable_reward_is_not_saved_and_is_asked_for(tmp_path: Path) -> None:
    handle = open(tmp_path / "cannot be pickled", "w")

    def higher(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
        assert not handle.closed
        return action[:, :1].float()

    model = GRPO("MlpPolicy", draws(), reward_function=higher, horizon=1, **FAST).learn(128)
    model.save(tmp_path / "model.zip")
    loaded = GRPO.load(tmp_path / "model.zip", env=draws())
    assert loaded.predict(np.zeros((1, 3), dtype=np.float32))[0].shape == (1,)
    with pytest.raises(ValueError, match=r"the callable 'higher', which is not saved.*GRPO.load\(path, env, reward_function"):
        loaded.learn(128)
    GRPO.load(tmp_path / "model.zip", env=draws(), reward_function=higher).learn(128)
    handle.close()


# callbacks, logs, vectorized environments


def test_callbacks_and_logs(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("rich")
    evaluation = EvalCallback(
        draws(1), eval_freq=64, n_eval_episodes=2, best_model_save_path=str(tmp_path / "best"), verbose=0
    )
    logs = AtRolloutEnd(lambda model: set(model.logger.name_to_value))
    callback = CallbackList([evaluation, CheckpointCallback(64, str(tmp_path / "checkpoints")), logs])
    model = GRPO("MlpPolicy", draws(), tensorboard_log=str(tmp_path / "tb"), **FAST)
    model.learn(256, callback, progress_bar=True)
    assert [path.name for path in (tmp_path / "tb").iterdir()] == ["GRPO_1"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2 and evaluation.last_mean_reward != 0
    GRPO.load(tmp_path / "best" / "best_model")
    assert {"train/frac_reward_zero_std", "train/reward_std", "time/simulator_steps", "time/model_steps"} <= logs.seen[0]
    model.learn(10**9, StopTrainingOnMaxEpisodes(10))
    assert model.num_timesteps < 1000
    assert sorted(path.name for path in (tmp_path / "tb").iterdir()) == ["GRPO_1", "GRPO_2"]


@pytest.mark.parametrize("group_by", ["state", "episode", "action"])
@pytest.mark.parametrize("layers", ["normalized", "stacked", "stacked-normalized", "images"])
def test_layers_of_vectorized_environments(layers: str, group_by: str) -> None:
    env: VecEnv = draws(4, observation="image" if layers == "images" else "box", time_limit=6)
    if layers != "normalized":
        env = VecFrameStack(env, 2)
    if "normalized" in layers:
        env = VecNormalize(env)
    kwargs = {**FAST, "n_steps": 32}
    model = GRPO(policy_for(env), env, group_by=group_by, group_size=2, horizon=2, **kwargs)
    before = weights(model)
    model.learn(256)
    assert not same(before, weights(model))


def test_scores_do_not_see_the_moving_divisor_of_vec_normalize() -> None:
    """Neither a rollout nor what is remembered of earlier ones: the advantages are those without it."""
    advantages = []
    for norm_reward in (False, True):
        env = VecNormalize(make_vec_env("Pendulum-v1", 4, seed=0), norm_obs=False, norm_reward=norm_reward)
        model = GRPO("MlpPolicy", env, **{**FAST, "learning_rate": 0.0})
        seen = []
        for rollout in range(3):
            model.learn(4 * 64, reset_num_timesteps=rollout == 0)
            seen.append(model.rollout_buffer.advantages.copy())
        advantages.append(np.stack(seen))
    np.testing.assert_allclose(advantages[1], advantages[0], rtol=1e-3, atol=1e-3)
