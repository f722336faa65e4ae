"""Mistakes get a clear error, and nothing is lost."""

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from sb3_grpo_plugin import GRPO

FAST = dict(n_steps=64, batch_size=32, n_epochs=1, seed=0, device="cpu")


class Faulty(gym.Env):
    """
    Goes wrong in one step.

    :param what: ``"reward"``, ``"observation"`` or nothing
    :param at: the step, counted from 0
    :param value: what it gives then
    :param length: of an episode
    :param keys: whether observations are dictionaries
    """

    action_space = spaces.Discrete(2)

    def __init__(self, what: str = "", at: int = -1, value: float = math.nan, length: float = 10, keys: bool = False):
        box = spaces.Box(-10.0, 10.0, (2,))
        self.observation_space = spaces.Dict({"a": box, "b": box}) if keys else box
        self.what, self.at, self.value, self.length, self.keys = what, at, value, length, keys
        self.total = self.time = 0

    def observe(self, faulty: bool = False) -> Any:
        observation = self.np_random.normal(size=2).astype(np.float32)
        if faulty and self.what == "observation":
            observation[1] = self.value
        return {"a": np.zeros(2, np.float32), "b": observation} if self.keys else observation

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.time = 0
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        faulty = self.total == self.at
        self.time, self.total = self.time + 1, self.total + 1
        reward = self.value if faulty and self.what == "reward" else float(self.np_random.normal() + action)
        return self.observe(faulty), reward, self.time >= self.length, False, {}


def faulty(n_envs: int = 4, culprit: int = 2, **kwargs: Any) -> VecEnv:
    """Environments of which one is faulty."""
    options = [kwargs if index == culprit else {"keys": kwargs.get("keys", False)} for index in range(n_envs)]
    return DummyVecEnv([lambda index=index: Monitor(Faulty(**options[index])) for index in range(n_envs)])


@pytest.mark.parametrize("group_by", ["state", "episode"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rollout", [0, 1])
@pytest.mark.parametrize(("what", "keys"), [("reward", False), ("observation", False), ("observation", True)])
def test_numbers_that_are_not_finite_name_environment_and_step(
    what: str, keys: bool, rollout: int, value: float, group_by: str
) -> None:
    at = 64 * rollout + 37
    env = faulty(what=what, at=at, value=value, keys=keys)
    model = GRPO("MultiInputPolicy" if keys else "MlpPolicy", env, group_by=group_by, group_size=2, **FAST)
    # An observation belongs to the step that is taken from it
    step = 37 + (what == "observation")
    total = 256 * rollout + 4 * step
    message = rf"Environment 2 gave a {what} that is NaN or infinite at step {step} of the rollout \(after {total} "
    with pytest.raises(ValueError, match=message):
        model.learn(512)
    assert all(th.isfinite(value).all() for value in model.policy.parameters())


@pytest.mark.parametrize("what", ["reward", "observation"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_statistics_spread_a_fault_and_still_it_is_found(what: str, value: float) -> None:
    model = GRPO("MlpPolicy", VecNormalize(faulty(what=what, at=37, value=value)), **FAST)
    with pytest.raises(ValueError, match=f"Environment 2 gave a {what} that is NaN or infinite at step 3[78] of"):
        model.learn(512)


@pytest.mark.parametrize("what", ["reward", "observation"])
@pytest.mark.parametrize("at", [63, 9])
def test_the_last_observation_of_a_rollout_or_an_episode_is_checked_too(what: str, at: int) -> None:
    model = GRPO("MlpPolicy", faulty(what=what, at=at, length=10), **FAST)
    with pytest.raises(ValueError, match=f"Environment 2 gave a .*{what} that is NaN or infinite"):
        model.learn(512)
    assert all(th.isfinite(value).all() for value in model.policy.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(group_by="stat"), "`group_by` must be one of .* Did you mean 'state'?"),
        (dict(group_by="epsiode"), "Did you mean 'episode'?"),
        (dict(scale_rewards="grp"), "`scale_rewards` must be one of .* Did you mean 'group'?"),
        (dict(scale_rewards=None), "`scale_rewards` must be one of 'batch', 'group', 'none', got None"),
        (dict(loss_type="dr-grpo"), "`loss_type` must be one of .* Did you mean 'dr_grpo'?"),
        (dict(supervision="proces"), "`supervision` must be one of .* Did you mean 'process'?"),
        (dict(group_size=1), "`group_size` must be at least 2, got 1"),
        (dict(horizon=0), "`horizon` must be at least 1, got 0"),
        (dict(n_epochs=0), "`n_epochs` must be at least 1"),
        (dict(kl_coef=-0.1), "`kl_coef` must not be negative, got -0.1"),
        (dict(clip_range_high=-0.1), "`clip_range_high` must not be negative"),
        (dict(group_by="episode", group_size=3), "multiple of `group_size`.*3 environments, and there are 4. Use n_envs=6"),
        (dict(group_by="episode", group_size=8), "Use n_envs=8 or another group_size"),
        (dict(reward_function="no/such"), "no/such"),
        (dict(reward_function=3), "expected None, a callable, a registered name or 'auto'"),
    ],
)
def test_options_are_refused_by_name(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPO("MlpPolicy", faulty(), **{**FAST, **kwargs})


@pytest.mark.parametrize("n_envs", [1, 2])
def test_rollouts_too_small_to_form_a_group_are_refused(n_envs: int) -> None:
    def build(n_steps: int) -> GRPO:
        return GRPO("MlpPolicy", faulty(n_envs, length=math.inf), **{**FAST, "n_steps": n_steps, "batch_size": 8})

    with pytest.raises(ValueError, match=f"with n_envs={n_envs} below 4, gamma=0.99 and gae_lambda=0.95 that takes") as error:
        build(16)
    needed = int(str(error.value).split("takes ")[1].split(" ")[0])
    with pytest.raises(ValueError, match="State groups need four stretches"):
        build(needed - 1)
    model = build(needed)
    before = model.policy.action_net.weight.clone()
    model.learn(2 * needed * n_envs)
    assert not th.equal(before, model.policy.action_net.weight)


@pytest.mark.parametrize("supervision", ["process", "outcome"])
def test_episodes_that_never_end_are_said_once(supervision: str) -> None:
    env = make_vec_env(lambda: Faulty(length=math.inf), 2)
    model = GRPO("MlpPolicy", env, group_by="episode", group_size=2, supervision=supervision, **FAST)
    with pytest.warns(UserWarning) as warned:
        model.learn(3 * 128)
    assert len(warned) == 1
    assert "No episode ended in this rollout of 64 steps of 2 environments" in str(warned[0].message)
    assert "use group_by='state'" in str(warned[0].message)


def test_what_fits_is_checked_again_when_learning_starts(tmp_path: Path) -> None:
    model = GRPO("MlpPolicy", faulty(4), group_by="episode", group_size=4, **FAST)
    model.save(tmp_path / "model.zip")
    loaded = GRPO.load(tmp_path / "model.zip", env=faulty(6))
    loaded.predict(np.zeros((1, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="Use n_envs=8"):
        loaded.learn(128)


def damaged(content: bytes, kind: str) -> bytes:
    if kind == "no zip":
        return b"not a model"
    if kind == "cut off":
        return content[: len(content) // 2]
    if kind == "overwritten":
        return content[:200] + bytes(2000) + content[2200:]
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            if not (kind == "without data" and name == "data") and not (kind == "without weights" and name == "policy.pth"):
                new.writestr(name, b"{}" if kind == "empty data" and name == "data" else old.read(name))
    return changed.getvalue()


@pytest.mark.parametrize("kind", ["no zip", "cut off", "overwritten", "without data", "empty data", "without weights"])
def test_a_damaged_model_is_said_to_be_one(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    GRPO("MlpPolicy", faulty(), **FAST).save(path)
    path.write_bytes(damaged(path.read_bytes(), kind))
    with pytest.raises(ValueError, match=r"model\.zip|Names of parameters do not match"):
        GRPO.load(path)


@pytest.mark.parametrize("with_env", [True, False])
def test_a_model_of_another_algorithm_is_refused(with_env: bool, tmp_path: Path) -> None:
    DQN("MlpPolicy", faulty(1, culprit=0)).save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"model\.zip cannot be loaded as a GRPO model.*saved by another algorithm"):
        GRPO.load(tmp_path / "model.zip", env=faulty(1, culprit=0) if with_env else None)


def test_a_policy_of_ppo_is_taken_over_with_a_warning(tmp_path: Path) -> None:
    ppo = PPO("MlpPolicy", faulty(), **FAST)
    ppo.save(tmp_path / "model.zip")
    with pytest.warns(UserWarning, match="ActorCriticPolicy has a value head"):
        model = GRPO.load(tmp_path / "model.zip", env=faulty())
    observations = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    actions = [one.predict(observations, deterministic=True)[0] for one in (model, ppo)]
    np.testing.assert_array_equal(*actions)
    model.learn(256)
    assert th.equal(model.policy.value_net.weight, ppo.policy.value_net.weight)
    assert not th.equal(model.policy.action_net.weight, ppo.policy.action_net.weight)


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GRPO.load(tmp_path / "model")


def test_other_processes_need_the_wrapper_for_episode_groups() -> None:
    env = make_vec_env(Faulty, 2, vec_env_cls=SubprocVecEnv)
    try:
        model = GRPO("MlpPolicy", env, group_by="episode", group_size=2, **FAST)
        with pytest.raises(ValueError, match=r"lack GroupStartWrapper.*env_wrapper: sb3_grpo_plugin\.wrappers\.Group"):
            model.learn(128)
    finally:
        env.close()


class Interrupt(BaseCallback):
    def _on_step(self) -> bool:
        if self.n_calls == 100:
            raise KeyboardInterrupt
        return True


@pytest.mark.parametrize("group_by", ["state", "episode", "action"])
def test_an_interrupted_training_can_be_saved_and_goes_on(group_by: str, tmp_path: Path) -> None:
    model = GRPO("MlpPolicy", faulty(), group_by=group_by, group_size=2, horizon=1, **FAST)
    with pytest.raises(KeyboardInterrupt):
        model.learn(10**9, Interrupt())
    model.save(tmp_path / "model.zip")
    loaded = GRPO.load(tmp_path / "model.zip", env=faulty())
    for one in (loaded, model):
        assert one.learn(256, reset_num_timesteps=False).num_timesteps == 400 + 256
