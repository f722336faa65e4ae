"""Predictions of the server for every kind of space, beside the model's own; and what observations it refuses."""

import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra [api]")

import gymnasium as gym
from gymnasium import spaces
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_grpo_plugin.api.environments import describe
from sb3_grpo_plugin.api.inference import Agent
from sb3_grpo_plugin.api.observations import ObservationError, stack
from sb3_grpo_plugin.api.training import write_model
from sb3_grpo_plugin.grpo import GRPO


class Toy(gym.Env):
    """Observations and actions at random."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space = observation_space
        self.action_space = action_space
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self.observation_space.sample(), float(self.steps % 3), False, self.steps == 8, {}


VECTOR = spaces.Box(-2, 2, (3,), np.float32)
TWO = spaces.Discrete(2)
CASES: dict[str, tuple[spaces.Space, spaces.Space]] = {
    "box to discrete": (VECTOR, spaces.Discrete(5)),
    "box to box": (VECTOR, spaces.Box(-1, 1, (2, 2), np.float32)),
    "box to multi-discrete": (VECTOR, spaces.MultiDiscrete([2, 3])),
    "box to multi-binary": (VECTOR, spaces.MultiBinary(4)),
    "discrete": (spaces.Discrete(7), TWO),
    "multi-discrete": (spaces.MultiDiscrete([3, 4]), TWO),
    "multi-binary": (spaces.MultiBinary(5), TWO),
    "float64": (spaces.Box(-np.inf, np.inf, (2, 3), np.float64), TWO),
    "dict": (spaces.Dict({"a": VECTOR, "b": spaces.Discrete(4), "c": spaces.MultiBinary(2)}), TWO),
}


def plain(observation: Any) -> Any:
    """As a client sends it."""
    if isinstance(observation, dict):
        return {key: plain(value) for key, value in observation.items()}
    return np.asarray(observation).tolist()


def make(env: Any, policy: str = "MlpPolicy", **options: Any) -> GRPO:
    model = GRPO(policy, env, n_steps=16, batch_size=16, n_epochs=1, group_by="state", device="cpu", seed=0, **options)
    with warnings.catch_warnings():
        # Some of these environments earn nothing
        warnings.simplefilter("ignore")
        return model.learn(64)


def save(model: GRPO, folder: Path) -> bytes:
    sha256, size = write_model(model, folder / "model.zip")
    data = (folder / "model.zip").read_bytes()
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (sha256, size)
    assert [path.name for path in folder.iterdir()] == ["model.zip"]
    return data


@pytest.mark.parametrize("name", CASES)
def test_every_space(name: str, tmp_path: Path) -> None:
    observation_space, action_space = CASES[name]
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    model = make(DummyVecEnv([lambda: Toy(observation_space, action_space)] * 4), policy)
    data = save(model, tmp_path)
    agent = Agent(data)
    observations = [observation_space.sample() for _ in range(6)]
    expected = [model.predict(observation, deterministic=True)[0] for observation in observations]
    actions, probabilities = agent.predict([plain(observation) for observation in observations], True)
    np.testing.assert_allclose(np.array(actions), np.array(expected), rtol=1e-5, atol=1e-6)
    assert (probabilities is not None) == isinstance(action_space, spaces.Discrete)
    if probabilities is not None:
        assert np.argmax(probabilities, axis=1).tolist() == actions
        np.testing.assert_allclose(np.sum(probabilities, axis=1), 1, rtol=1e-5)
    # And it is a model like any other
    assert GRPO.load(io.BytesIO(data), device="cpu").num_timesteps == model.num_timesteps


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_as_the_environment_gives_them(channels_last: bool, tmp_path: Path) -> None:
    def env() -> gym.Env:
        return FakeImageEnv(36, 40, n_channels=3, discrete=True, channel_first=not channels_last)

    model = make(DummyVecEnv([env] * 4), "CnnPolicy", policy_kwargs={"features_extractor_kwargs": {"features_dim": 8}})
    agent = Agent(save(model, tmp_path))
    assert not agent.quick
    observation = env().observation_space.sample()
    assert agent.predict([plain(observation)], True)[0] == [model.predict(observation, deterministic=True)[0]]
    for wrong in (plain(observation[..., :1]), plain(observation.astype(float) + 0.5), plain(observation.astype(int) + 256)):
        with pytest.raises(ObservationError):
            agent.predict([wrong], True)


def test_a_dictionary_with_an_image(tmp_path: Path) -> None:
    model = make(DummyVecEnv([SimpleMultiObsEnv] * 4), "MultiInputPolicy")
    agent = Agent(save(model, tmp_path))
    observation = {key: np.asarray(value) for key, value in model.env.observation_space.sample().items()}  # type: ignore[union-attr]
    sample = SimpleMultiObsEnv().reset()[0]
    assert agent.predict([plain(sample)], True)[0] == [model.predict(sample, deterministic=True)[0]]
    assert set(observation) == set(sample)
    with pytest.raises(ObservationError, match="keys"):
        agent.predict([{"vec": plain(sample["vec"])}], True)


@pytest.mark.parametrize("kind", ["vector", "dict", "image"])
def test_normalization_as_in_training(kind: str, tmp_path: Path) -> None:
    policy = {"vector": "MlpPolicy", "dict": "MultiInputPolicy", "image": "MlpPolicy"}[kind]
    space: spaces.Space = {
        "vector": VECTOR,
        "dict": spaces.Dict({"a": VECTOR, "b": spaces.Box(0, 9, (2,), np.float32)}),
        "image": spaces.Box(0, 255, (6, 5, 3), np.uint8),
    }[kind]
    env = VecNormalize(DummyVecEnv([lambda: Toy(space, TWO)] * 4))
    model = make(env, policy)
    agent = Agent(save(model, tmp_path))
    for _ in range(5):
        observation = space.sample()
        many = {key: value[None] for key, value in observation.items()} if kind == "dict" else observation[None]
        expected = model.policy.get_distribution(model.policy.obs_to_tensor(env.normalize_obs(many))[0]).distribution.probs
        actual = agent.predict([plain(observation)], True)[1]
        np.testing.assert_allclose(actual, expected.detach(), rtol=1e-5)


def test_stacked_frames(tmp_path: Path) -> None:
    model = make(VecFrameStack(DummyVecEnv([lambda: Toy(VECTOR, TWO)] * 4), 4))
    agent = Agent(save(model, tmp_path))
    assert agent.space.shape == (12,)
    assert agent.predict([[0.0] * 12], True)[0] == [model.predict(np.zeros(12, np.float32), deterministic=True)[0]]
    stacked = make(VecFrameStack(VecNormalize(DummyVecEnv([lambda: Toy(VECTOR, TWO)] * 4)), 4))
    with pytest.raises(ValueError, match="normalized first and stacked then"):
        write_model(stacked, tmp_path / "other.zip")
    assert not (tmp_path / "other.zip").exists()


@pytest.mark.parametrize(
    ("space", "observation"),
    [
        (VECTOR, [1, 2]),
        (VECTOR, [1, 2, "3"]),
        (VECTOR, [1, 2, None]),
        (VECTOR, [1, 2, float("nan")]),
        (VECTOR, [1, 2, 1e39]),
        (VECTOR, [1, 2, 10**400]),
        (VECTOR, [[1], [2, 3], 4]),
        (VECTOR, {"a": 1}),
        (spaces.Discrete(3), 3),
        (spaces.Discrete(3), -1),
        (spaces.Discrete(3), 1.5),
        (spaces.Discrete(3), [1]),
        (spaces.MultiDiscrete([2, 3]), [1, 3]),
        (spaces.MultiBinary(2), [0, 2]),
        (spaces.Dict({"a": TWO}), [1]),
        (spaces.Dict({"a": TWO}), {"a": 1, "b": 1}),
    ],
)
def test_observations_that_do_not_fit(space: spaces.Space, observation: Any) -> None:
    with pytest.raises(ObservationError):
        stack(space, [observation])


def test_observations_that_fit() -> None:
    # Beyond the bounds of a box of floats: environments leave them at times
    assert stack(VECTOR, [[1, 2, 30]]).dtype == np.float32
    assert stack(spaces.MultiBinary(2), [[True, False]]).tolist() == [[1, 0]]
    assert stack(spaces.Discrete(3), [0, 2.0]).tolist() == [0, 2]


def test_spaces_in_words() -> None:
    described = describe(spaces.Dict({"a": spaces.Box(np.array([-np.inf, 0]), np.array([1, 2]), dtype=np.float32), "b": TWO}))
    assert described["spaces"]["a"] == {
        "type": "Box", "low": [None, 0.0], "high": [1.0, 2.0], "shape": [2], "dtype": "float32",
    }  # fmt: skip
    assert described["spaces"]["b"]["n"] == 2
    assert describe(spaces.Box(0, 255, (84, 84, 4), np.uint8))["high"] == 255.0
