"""Snapshots and branches: they go the way the environment goes, and leave no trace on it."""

import pickle
import random
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.utils import EzPickle
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_grpo_plugin.branching import Brancher
from sb3_grpo_plugin.wrappers import GroupStartWrapper, SnapshotWrapper

REPLAY = {"wrapper_class": SnapshotWrapper, "wrapper_kwargs": {"family": "replay"}}


class NoisyActions(gym.Wrapper):
    """Draws from the three global generators, and counts its steps."""

    n_steps = 0

    def step(self, action):
        self.n_steps += 1
        flip = np.random.rand() + random.random() + float(th.rand(())) > 2.0
        return self.env.step(1 - action if flip else action)


class Scribbles(gym.Wrapper):
    """State of many kinds: arrays changed in place, containers, generators, methods, closures, references to layers."""

    def __init__(self, env):
        super().__init__(env)
        self.sums = np.zeros(3)
        self.history = {"actions": [], "pairs": {(0, 1): [np.zeros(2)]}}
        self.alias = self.sums
        self.rng = np.random.default_rng(5)
        self.rewards = self.history["actions"]
        self.core = env.unwrapped
        self.method = self.bump
        calls = []
        self.closure = lambda: calls.append(self.alias[0]) or len(calls)

    def bump(self):
        self.sums[0] += 1
        return self.rng.random()

    def step(self, action):
        obs, _, terminated, truncated, info = self.env.step(action)
        self.rewards.append(int(action))
        value = self.method() + self.alias[0] + len(self.history["actions"]) + self.core.state[0] + self.closure()
        return obs, value, terminated, truncated, info


def _noisy_cartpole():
    return NoisyActions(gym.make("CartPole-v1"))


def _scribbling_cartpole():
    return Scribbles(gym.make("CartPole-v1"))


def _pong():
    ale_py = pytest.importorskip("ale_py")
    gym.register_envs(ale_py)
    return AtariWrapper(gym.make("PongNoFrameskip-v4"), noop_max=3)


# one or more environments per family: arguments of make_vec_env
FAMILIES = {
    "deepcopy": ("CartPole-v1", {}),
    "deepcopy-stochastic": ("FrozenLake-v1", {}),
    "deepcopy-global-noise": (_noisy_cartpole, {}),
    "deepcopy-scribbles": (_scribbling_cartpole, {}),
    "deepcopy-groups": ("Pendulum-v1", {"wrapper_class": GroupStartWrapper, "wrapper_kwargs": {"group": 1}}),
    "mujoco": ("Hopper-v5", {}),
    "mujoco-derived": ("Ant-v5", {}),  # its reward reads xpos from before the step
    "ale": (_pong, {}),
    "replay": ("LunarLander-v3", REPLAY),
    "replay-worlds": ("BipedalWalker-v3", REPLAY),  # keeps one physics world over resets
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log file into the working folder


def _make(case: str, **kwargs):
    env_id, own = FAMILIES[case]
    if "mujoco" in case:
        pytest.importorskip("mujoco")
    if "replay" in case:
        pytest.importorskip("Box2D")
    return make_vec_env(env_id, n_envs=2, seed=3, **own, **kwargs)


def _actions(env, count: int, seed: int = 0) -> np.ndarray:
    env.action_space.seed(seed)
    actions = [[env.action_space.sample() for _ in range(env.num_envs)] for _ in range(count)]
    return np.array(actions, dtype=env.action_space.dtype)


def _as_state(obs: np.ndarray) -> np.ndarray:
    return obs.astype(np.float32) if obs.dtype.kind == "f" else obs


@pytest.mark.parametrize("case", [case for case in FAMILIES if "global" not in case])
def test_a_branch_goes_the_way_the_environment_goes(case):
    env = _make(case)
    brancher = Brancher(env)
    actions = _actions(env, 60)
    horizon, last, snapshots, steps = 4, env.reset(), [], []
    for action in actions:
        snapshots += brancher.snapshot()
        before = last
        last, rewards, dones, infos = env.step(action)
        after = last.copy()
        for index in np.flatnonzero(dones):
            after[index] = infos[index]["terminal_observation"]
        steps.append((before, after, rewards, dones))
    simulator = brancher.simulate(snapshots[: -2 * horizon])
    n_branches = simulator.n_branches
    over = np.zeros(n_branches, dtype=bool)
    taken = simulator.n_steps
    for offset in range(horizon):
        own = [(steps[branch // 2 + offset], branch % 2) for branch in range(n_branches)]
        state = simulator.state.numpy()
        action = np.stack([actions[branch // 2 + offset, branch % 2] for branch in range(n_branches)])
        next_state, reward, terminated = simulator.step(action)
        assert reward.dtype == th.float32 and terminated.dtype == th.bool
        for branch, ((before, after, rewards, dones), index) in enumerate(own):
            if over[branch]:
                assert reward[branch] == 0 and terminated[branch]
                np.testing.assert_array_equal(next_state[branch], state[branch])
                continue
            taken += 1
            np.testing.assert_array_equal(state[branch], _as_state(before)[index])
            np.testing.assert_array_equal(next_state[branch], _as_state(after)[index])
            assert float(reward[branch]) == rewards[index] and bool(terminated[branch]) == dones[index]
            over[branch] = dones[index]
    assert simulator.n_steps == taken
    env.close()


def _run(case: str, folder: Path, branch: bool) -> dict:
    """Three rollouts; everything that branching could have left a trace on."""
    random.seed(1), np.random.seed(1), th.manual_seed(1)
    env = _make(case, monitor_dir=str(folder))
    env = VecNormalize(VecCheckNan(env)) if "ale" not in case and "Lake" not in str(FAMILIES[case][0]) else env
    brancher = Brancher(env) if branch else None
    actions = _actions(env, 3 * 40)
    candidates = _actions(env, 3, seed=9)
    obs = [env.reset()]
    outcomes, snapshots = [], []
    for step, action in enumerate(actions):
        if brancher:
            snapshots += brancher.snapshot()
        observation, rewards, dones, infos = env.step(action)
        obs.append(observation.copy())
        episodes = [{key: info["episode"][key] for key in "rl"} for info in infos if "episode" in info]
        outcomes.append((rewards.tolist(), dones.tolist(), episodes))
        if brancher and step % 40 == 39:
            snapshots += brancher.snapshot()
            simulator = brancher.simulate(snapshots * 2)
            for candidate in candidates:
                simulator.policy_input()
                simulator.step(np.resize(candidate, (simulator.n_branches, *candidate.shape[1:])))
            snapshots = []
    generators = [inner.unwrapped.np_random.bit_generator.state for inner in env.unwrapped.envs]
    spaces = [space._np_random.bit_generator.state for inner in env.unwrapped.envs if (space := inner.action_space)]
    global_states = (random.getstate(), np.random.get_state()[1].tolist(), th.get_rng_state().tolist())
    counters = env.get_attr("n_steps") if "noise" in case else None
    env.close()
    files = [[line.rsplit(",", 1)[0] for line in path.read_text().splitlines()[1:]] for path in sorted(folder.iterdir())]
    assert len(files) == 2
    statistics = (env.obs_rms.mean.tolist(), env.ret_rms.var) if isinstance(env, VecNormalize) else None
    return {
        "obs": [o.tobytes() for o in obs],
        **{"outcomes": outcomes, "generators": generators, "spaces": spaces, "global": global_states},
        **{"counters": counters, "files": files, "statistics": statistics},
    }


@pytest.mark.parametrize("case", FAMILIES)
def test_branching_leaves_no_trace(case, tmp_path):
    with_branches = _run(case, tmp_path / "with", branch=True)
    without = _run(case, tmp_path / "without", branch=False)
    for key, value in without.items():
        assert with_branches[key] == value, key


# -- what the policy sees ------------------------------------------------------------------------------------------------


class Pictures(gym.Env):
    """A walk in small pictures, some pixels of it random."""

    def __init__(self, dictionary: bool = False):
        image = gym.spaces.Box(0, 255, (6, 5, 1), dtype=np.uint8)
        vector = gym.spaces.Box(-np.inf, np.inf, (3,), dtype=np.float32)
        self.observation_space = gym.spaces.Dict(image=image, vector=vector) if dictionary else image
        self.action_space = gym.spaces.Discrete(3)
        self.dictionary = dictionary

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0
        return self._observe(), {}

    def step(self, action):
        self.place += int(action)
        return self._observe(), float(self.place), self.place > 12, False, {}

    def _observe(self):
        image = self.np_random.integers(256, size=(6, 5, 1), dtype=np.uint8)
        vector = np.full(3, self.place, dtype=np.float32) + np.arange(1, 4, dtype=np.float32)
        return {"image": image, "vector": vector} if self.dictionary else image


STACKS = {
    "plain": lambda: DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2),
    "normalized": lambda: VecNormalize(VecMonitor(STACKS["plain"]())),
    "stacked": lambda: VecFrameStack(STACKS["plain"](), 3),
    "stacked-normalized": lambda: VecNormalize(VecFrameStack(STACKS["plain"](), 3)),
    "normalized-stacked": lambda: VecFrameStack(VecNormalize(STACKS["plain"]()), 3),
    "pictures": lambda: VecTransposeImage(VecFrameStack(DummyVecEnv([Pictures] * 2), 4)),
    "dict": lambda: VecTransposeImage(
        VecNormalize(VecFrameStack(DummyVecEnv([lambda: Pictures(True)] * 2), 2), norm_obs_keys=["vector"])
    ),
}


def _items(obs):
    return obs.items() if isinstance(obs, dict) else [(None, obs)]


@pytest.mark.parametrize("stack", STACKS)
def test_branches_show_the_policy_what_training_shows_it(stack):
    env, twin = STACKS[stack](), STACKS[stack]()
    normalizer = _find(env, VecNormalize)
    brancher = Brancher(env)
    for each in (env, twin):
        each.seed(4)
    actions = _actions(env, 40)
    obs, raw = [env.reset()], [twin.reset()]
    if normalizer is not None:
        _find(twin, VecNormalize).norm_obs = False  # shows the same in raw units
        raw = [twin.reset()] if twin.seed(4) else []
    snapshots, ends = [], []
    for action in actions:
        if normalizer is not None and len(snapshots) == 20:
            normalizer.training = False  # from here on the statistics are those that branches see
        snapshots.append(brancher.snapshot())
        observation, _, dones, _ = env.step(action)
        obs.append(_copies(observation))
        raw.append(_copies(twin.step(action)[0]))
        ends.append(dones)
    frozen = 20 if normalizer is not None else 0
    if normalizer is not None:
        normalizer.training = False
    # newly normalized frames must agree where the statistics did not move any more
    starts = [step for step in range(frozen, len(actions) - 3)]
    simulator = brancher.simulate([snapshots[step][index] for step in starts for index in range(2)])
    for offset in range(3):
        action = np.stack([actions[step + offset, index] for step in starts for index in range(2)])
        shown, state = simulator.policy_input(), simulator.state
        for row, (step, index) in enumerate((step, index) for step in starts for index in range(2)):
            if any(ends[past][index] for past in range(step, step + offset)):
                continue
            for key, value in _items(raw[step + offset]):
                mine = state[key] if key else state
                np.testing.assert_array_equal(mine[row], value[index])
            for key, value in _items(obs[step + offset]):
                mine = shown[key] if key else shown
                if normalizer is None or step + offset > 20:
                    np.testing.assert_allclose(mine[row], value[index], rtol=1e-6, atol=1e-6)
        simulator.step(action)


def _find(env, kind):
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, kind):
            return env
        env = env.venv
    return None


def _copies(obs):
    return {key: value.copy() for key, value in obs.items()} if isinstance(obs, dict) else obs.copy()


# -- other processes -----------------------------------------------------------------------------------------------------


def _snapshot_noisy():
    random.seed(1), np.random.seed(1), th.manual_seed(1)  # of the worker: a fork gets a new state of Python's generator
    return SnapshotWrapper(_noisy_cartpole())


def _futures(env) -> list:
    random.seed(2), np.random.seed(2), th.manual_seed(2)
    brancher = Brancher(env)
    env.seed(0)
    env.reset()
    snapshots = []
    for action in np.array([[0, 1], [1, 1], [0, 0]]):
        snapshots += brancher.snapshot()
        env.step(action)
    simulator = brancher.simulate(snapshots * 2)
    result = [simulator.state]
    for _ in range(12):
        result += simulator.step(np.arange(12) % 2)
    env.close()
    return [simulator.n_steps, *[value.numpy() for value in result]]


def test_branches_in_other_processes_go_the_same_way():
    make = [lambda: SnapshotWrapper(gym.make("CartPole-v1"))] * 2
    here, there = _futures(DummyVecEnv(make)), _futures(SubprocVecEnv(make, start_method="fork"))
    for mine, theirs in zip(here, there, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def _subproc_obs(branch: bool) -> list:
    env = SubprocVecEnv([_snapshot_noisy] * 2, start_method="fork")
    env.seed(0)
    obs = [env.reset()]
    brancher = Brancher(env) if branch else None
    for step in range(30):
        if brancher:
            snapshots = brancher.snapshot()
            brancher.simulate(snapshots).step(np.array([1, 0]))
        obs.append(env.step(np.array([step % 2, 1]))[0])
    env.close()
    return obs


def test_branching_in_other_processes_leaves_no_trace():
    with_branches = _subproc_obs(True)
    np.testing.assert_array_equal(with_branches, _subproc_obs(False))


def test_an_error_in_another_process_is_reported_and_does_not_end_it():
    pytest.importorskip("Box2D")
    env = SubprocVecEnv([lambda: SnapshotWrapper(gym.make("LunarLander-v3"))], start_method="fork")
    with pytest.raises(ValueError, match=r"Box2D.*family='replay'"):
        Brancher(env)
    assert env.reset().shape == (1, 8)
    env.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gym.make("CartPole-v1"), r"2 of 2 .*lack SnapshotWrapper.*env_wrapper: sb3_grpo_plugin\.wrappers"),
        (lambda: NoisyActions(SnapshotWrapper(gym.make("CartPole-v1"))), "must be the outermost .* are: NoisyActions"),
    ],
)
def test_other_processes_need_the_wrapper_outermost(make, message):
    env = SubprocVecEnv([make] * 2, start_method="fork")
    try:
        with pytest.raises(ValueError, match=message):
            Brancher(env)
    finally:
        env.close()


# -- get_state and set_state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in FAMILIES if "global" not in case])
def test_set_state_brings_the_future_back(case):
    env = _make(case)
    env.reset()
    member = env.envs[0] if isinstance(env.envs[0], SnapshotWrapper) else SnapshotWrapper(env.envs[0])
    member.reset(seed=1)
    actions = [member.action_space.sample() for _ in range(8)]
    for action in actions[:3]:
        member.step(action)
    state = member.get_state()
    futures = []
    for _ in range(2):
        futures.append([member.step(action)[:3] for action in actions[3:]])
        member.reset()
        member.step(actions[0])
        member.set_state(state)
    for one, other in zip(*futures, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1:] == other[1:]
    assert member.get_state().steps == state.steps
    env.close()


def test_a_state_includes_the_time_limit_and_can_be_pickled():
    env = SnapshotWrapper(gym.make("CartPole-v1", max_episode_steps=5))
    env.reset(seed=0)
    for step in range(3):
        env.step(step % 2)
    state = pickle.loads(pickle.dumps(env.get_state()))
    for _ in range(2):
        env.reset()
        env.set_state(state)
        assert [env.step(step % 2)[3] for step in range(2)] == [False, True]


def test_set_state_fits_equal_environments_only():
    one, twin = (SnapshotWrapper(gym.make("CartPole-v1")) for _ in range(2))
    others = [
        SnapshotWrapper(gym.make("Pendulum-v1")),
        SnapshotWrapper(gym.make("CartPole-v1", sutton_barto_reward=True)),
        SnapshotWrapper(NoisyActions(gym.make("CartPole-v1"))),
    ]
    one.reset(seed=0)
    state = one.get_state()
    twin.set_state(state)  # without any reset
    np.testing.assert_array_equal(one.step(1)[0], twin.step(1)[0])
    for other in others:
        other.reset(seed=0)
        with pytest.raises(ValueError, match=r"state of another environment: .*'CartPole-v1'"):
            other.set_state(state)
    with pytest.raises(ValueError, match="another environment: int"):
        one.set_state(3)


# -- what cannot be branched ---------------------------------------------------------------------------------------------


class Shuttle(EzPickle, gym.Env):
    """Pickles as its constructor's arguments, like environments around an extension module."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, counter=None, resource=None):
        EzPickle.__init__(self, counter)
        self.counter = counter
        self.resource = resource

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.counter.value = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        self.counter.value += 1
        return np.full(1, self.counter.value, dtype=np.float32), 0.0, False, False, {}


class ForgetfulCounter:
    value = 0

    def __deepcopy__(self, memo):
        return ForgetfulCounter()


def test_a_copy_that_goes_another_way_is_an_error():
    env = DummyVecEnv([lambda: Shuttle(ForgetfulCounter())])
    brancher = Brancher(env)
    env.reset()
    snapshots = brancher.snapshot()
    with pytest.raises(ValueError, match=r"'deepcopy' does not suit .*went another way.*family='replay'"):
        brancher.simulate(snapshots)


def test_attributes_that_cannot_be_copied_are_named_and_the_environments_stay_as_they_were(tmp_path):
    counter = ForgetfulCounter()
    with open(tmp_path / "log", "w") as file:
        for resource, message in [(file, "'resource' .*TextIOWrapper"), (gym.make("CartPole-v1"), "is not a layer")]:
            env = DummyVecEnv([lambda resource=resource: Shuttle(counter, resource)])
            before = list(env.envs)
            with pytest.raises(ValueError, match=message):
                Brancher(env)
            assert env.envs == before


def test_box2d_has_to_be_asked_for():
    pytest.importorskip("Box2D")
    with pytest.raises(ValueError, match=r"runs on Box2D.*SnapshotWrapper\(env, family='replay'\)"):
        Brancher(make_vec_env("LunarLander-v3"))


def test_a_replay_that_does_not_come_back_is_an_error():
    pytest.importorskip("Box2D")

    class Dither(gym.ObservationWrapper):
        def observation(self, observation):
            return observation + np.random.rand(8).astype(np.float32)

    env = DummyVecEnv([lambda: SnapshotWrapper(Dither(gym.make("LunarLander-v3")), family="replay")])
    brancher = Brancher(env)
    env.reset()
    snapshots = brancher.snapshot()
    with pytest.raises(ValueError, match=r"did not lead .* back to the observation"):
        brancher.simulate(snapshots)


@pytest.mark.parametrize("family", ["mujoco", "ale"])
def test_a_family_that_does_not_suit_is_an_error(family):
    env = SnapshotWrapper(gym.make("CartPole-v1"), family=family)
    env.reset()
    with pytest.raises(ValueError, match=f"family '{family}' does not suit"):
        env.get_state()


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="family is 'copy'; expected one of 'auto', 'deepcopy'"):
        SnapshotWrapper(gym.make("CartPole-v1"), family="copy")
    replay = SnapshotWrapper(gym.make("CartPole-v1"), family="replay")
    with pytest.raises(ValueError, match="reset the environment first"):
        replay.get_state()
    brancher = Brancher(STACKS["plain"]())
    with pytest.raises(ValueError, match="no snapshot"):
        brancher.simulate([])


def test_unknown_vec_wrappers_are_named():
    class Squared(VecEnvWrapper):
        def reset(self):
            return self.venv.reset() ** 2

        def step_wait(self):
            obs, *rest = self.venv.step_wait()
            return obs**2, *rest

    with pytest.raises(ValueError, match="does not know Squared"):
        Brancher(Squared(STACKS["plain"]()))


# -- the rest ------------------------------------------------------------------------------------------------------------


def test_a_rendered_environment_can_be_branched():
    pytest.importorskip("pygame")
    for env_id, layer in [("CartPole-v1", None), ("FrozenLake-v1", None), ("CartPole-v1", gym.wrappers.AddRenderObservation)]:

        def make(env_id=env_id, layer=layer):
            env = gym.make(env_id, render_mode="rgb_array")
            return layer(env) if layer else env

        env = DummyVecEnv([make])
        brancher = Brancher(env)
        env.reset()
        env.envs[0].render()
        for _ in range(5):
            env.step(np.array([1]))
        simulator = brancher.simulate(brancher.snapshot() * 2)
        next_state, _, _ = simulator.step(np.array([0, 1]))
        obs, _, dones, infos = env.step(np.array([1]))
        np.testing.assert_array_equal(next_state[1], infos[0]["terminal_observation"] if dones[0] else obs[0])
        assert env.envs[0].render().any()
        env.close()


def test_states_and_branches_go_when_nobody_needs_them():
    env = STACKS["plain"]()
    brancher = Brancher(env)
    env.reset()
    for _ in range(5):
        simulator = brancher.simulate([snapshot for _ in range(10) for snapshot in brancher.snapshot()])
        simulator.step(np.zeros(20, dtype=int))
    brancher.snapshot()
    assert all(len(inner._kept) <= 11 and len(inner._branches) <= 2 for inner in env.envs)


def test_branching_can_start_in_a_running_episode():
    env = STACKS["plain"]()
    env.reset()
    for _ in range(3):
        obs, *_ = env.step(np.array([0, 1]))
    brancher = Brancher(env)
    simulator = brancher.simulate(brancher.snapshot())
    np.testing.assert_array_equal(simulator.state, obs)
    np.testing.assert_array_equal(simulator.step(np.array([1, 1]))[0], env.step(np.array([1, 1]))[0])


def test_a_wrapper_further_in_says_which_family():
    env = DummyVecEnv([lambda: NoisyActions(SnapshotWrapper(gym.make("CartPole-v1"), family="replay"))])
    brancher = Brancher(env)
    assert brancher.families == ["replay"] and brancher.base.envs[0].copier.kind[2] == ("NoisyActions",)


def test_branches_ignore_time_limits():
    env = DummyVecEnv([lambda: gym.make("Pendulum-v1", max_episode_steps=2)])
    brancher = Brancher(env)
    env.reset()
    simulator = brancher.simulate(brancher.snapshot())
    for _ in range(5):
        _, reward, terminated = simulator.step(np.zeros((1, 1), dtype=np.float32))
        assert reward != 0 and not terminated
    assert simulator.n_steps == 5
