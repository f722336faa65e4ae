"""
Action groups: in one visited state, what would each of several actions have led to?

The score of a candidate ``a`` in state ``s`` is what it earns in ``horizon`` steps, the first with ``a``, the others with the
current policy, each candidate from *its own* next state::

    score(s, a) = sum_{h < horizon} gamma^h * r(s_h, a_h, s_{h + 1}),    s_0 = s, a_0 = a, a_h ~ pi(s_h)

A candidate that terminates stops earning; time limits are ignored. With ``k`` candidates the advantage of each is its score
minus the mean over the group, and the loss takes all of them, each with its own old log-probability. Where the candidates
are all actions there are, they weigh alike: the gradient at the old policy is ``1/k sum_a A(s, a) grad log pi(a | s)``, which
pushes a good action that the policy hardly takes as hard as a common one. Where they are samples of the policy (the
executed action among them), the mean over them estimates the policy gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_grpo_plugin.branching import Brancher, Snapshot
from sb3_grpo_plugin.rewards import RewardFunction, TransitionSpec, evaluate_reward, evaluate_transition, find_transition
from sb3_grpo_plugin.rollouts import TrainingData, map_observation
from sb3_grpo_plugin.wrappers import innermost_vec_env

MODEL_CHUNK = 2**18
BRANCH_CHUNK = 2**10


class Simulator(Protocol):
    """
    ``B`` states that can be stepped: of a batched model, or branches of the training environment.

    :ivar n_steps: steps spent so far
    """

    n_steps: int

    @property
    def state(self) -> Any:
        """In the environment's own units, ``[B, ...]``."""
        ...

    def policy_input(self) -> Any:
        """The states as the policy sees them, ``[B, ...]``."""
        ...

    def step(self, action: Any) -> tuple[Any, th.Tensor | None, th.Tensor]:
        """Next state, the simulator's own reward ``[B]`` if it has one, and whether the episode terminated, bool ``[B]``."""
        ...


class ModelSimulator:
    """
    A registered batched transition model.

    :param spec: the model
    :param state: in the environment's own units, ``[B, ...]``
    :param observe: makes the policy's input of states
    """

    def __init__(self, spec: TransitionSpec, state: Any, observe: Callable[[Any], Any]) -> None:
        self.spec = spec
        self._state = state
        self.observe = observe
        self.n_steps = 0
        self._terminated: th.Tensor | None = None

    @property
    def state(self) -> Any:
        return self._state

    def policy_input(self) -> Any:
        return self.observe(self._state)

    def step(self, action: th.Tensor) -> tuple[Any, None, th.Tensor]:
        alive = None if self._terminated is None else ~self._terminated
        next_state, terminated = evaluate_transition(self.spec, self._state, action, alive)
        if alive is None or self._terminated is None:
            self.n_steps += len(terminated)
        else:
            self.n_steps += int(alive.sum())
            ended = self._terminated
            next_state = map_observation(lambda new, old: th.where(_rows(ended, new), old, new), next_state, self._state)
            terminated = terminated | ended
        self._state, self._terminated = next_state, terminated
        return next_state, None, terminated


def _rows(flags: th.Tensor, values: th.Tensor) -> th.Tensor:
    return flags.view(-1, *(1,) * (values.dim() - 1))


def frozen_normalization(env: VecEnv, device: th.device) -> Callable[[Any], Any]:
    """
    :param env: the training environment
    :param device: of the tensors
    :return: what its ``VecNormalize``, if any, makes of raw observations, with the statistics of this moment
    """
    normalizer = unwrap_vec_normalize(env)
    if normalizer is None or not normalizer.norm_obs:
        return lambda state: state
    clip = normalizer.clip_obs

    def constants(moments: Any) -> tuple[th.Tensor, th.Tensor]:
        mean, scale = moments.mean, np.sqrt(moments.var + normalizer.epsilon)
        return tuple(th.as_tensor(values, dtype=th.float32, device=device) for values in (mean, scale))  # type: ignore[return-value]

    if isinstance(normalizer.obs_rms, dict):
        by_key = {key: constants(moments) for key, moments in normalizer.obs_rms.items()}

        def normalize_keys(state: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
            normalized = dict(state)
            for key, (mean, scale) in by_key.items():
                normalized[key] = ((state[key] - mean) / scale).clamp(-clip, clip)
            return normalized

        return normalize_keys
    mean, scale = constants(normalizer.obs_rms)
    return lambda state: ((state - mean) / scale).clamp(-clip, clip)


@contextmanager
def own_randomness(seed: int, device: th.device) -> Iterator[None]:
    """Draw random numbers that leave the global generators of torch as they were."""
    with th.random.fork_rng(devices=[device] if device.type == "cuda" else [], device_type="cuda"):
        th.manual_seed(seed)
        yield


def actor_distribution(policy: ActorCriticPolicy, observations: Any, repeat: int = 1) -> Any:
    """
    :param policy: any actor of SB3's
    :param observations: as the policy sees them, ``[B, ...]``
    :param repeat: how many times each row is wanted
    :return: SB3's action distribution for ``B * repeat`` rows
    """
    features = BasePolicy.extract_features(policy, observations, policy.pi_features_extractor)
    latent = policy.mlp_extractor.forward_actor(features)
    return policy._get_action_dist_from_latent(latent if repeat == 1 else latent.repeat_interleave(repeat, dim=0))


def received(actions: th.Tensor, policy: ActorCriticPolicy) -> th.Tensor:
    """
    :param actions: of the policy, ``[B, ...]``
    :param policy: the policy
    :return: the actions as the environment receives them: clipped or unscaled float32 ``[B, n]``, or int64 ``[B, n]``
    """
    space = policy.action_space
    if not isinstance(space, spaces.Box):
        return actions.long().reshape(len(actions), -1)
    low, high = (th.as_tensor(bound, device=actions.device) for bound in (space.low, space.high))
    if policy.squash_output:
        return low + 0.5 * (actions + 1.0) * (high - low)
    return th.clamp(actions, low, high)


def is_enumerated(space: spaces.Space, group_size: int) -> TypeGuard[spaces.Discrete]:
    """Whether the candidates are all the actions there are."""
    return isinstance(space, spaces.Discrete) and bool(space.n <= group_size)


def draw_candidates(
    policy: ActorCriticPolicy, observations: Any, executed: th.Tensor, log_prob: th.Tensor, group_size: int
) -> tuple[th.Tensor, th.Tensor]:
    """
    The actions to compare in each visited state.

    :param policy: collected the rollout
    :param observations: as the policy saw them, ``[n, ...]``
    :param executed: actions taken, ``[n, ...]``
    :param log_prob: of the actions taken, ``[n]``
    :param group_size: how many to compare; a ``Discrete`` space no larger than this is enumerated
    :return: candidates ``[n, k, ...]`` and their log-probabilities ``[n, k]``
    """
    space = policy.action_space
    n = len(executed)
    if is_enumerated(space, group_size):
        candidates = th.arange(int(space.n), device=executed.device).expand(n, -1)
        logits = actor_distribution(policy, observations).distribution.logits
        return candidates[..., None], logits
    if policy.use_sde:
        policy.reset_noise(n * (group_size - 1))
    distribution = actor_distribution(policy, observations, repeat=group_size - 1)
    drawn = distribution.get_actions()
    drawn_log_prob = distribution.log_prob(drawn).view(n, -1)
    drawn = drawn.view(n, group_size - 1, *executed.shape[1:])
    return th.cat((executed[:, None].to(drawn), drawn), dim=1), th.cat((log_prob[:, None], drawn_log_prob), dim=1)


def look_ahead(
    simulator: Simulator,
    first_actions: th.Tensor,
    policy: ActorCriticPolicy,
    reward: tuple[str | None, RewardFunction] | None,
    horizon: int,
    gamma: float,
) -> th.Tensor:
    """
    :param simulator: in the states where the candidates are to be taken, one row each
    :param first_actions: the candidates, as the policy gives actions, ``[B, ...]``
    :param policy: chooses the actions after the first
    :param reward: name and function that scores steps; ``None`` for the simulator's own reward
    :param horizon: steps to follow each candidate
    :param gamma: discount factor
    :return: scores, float32 ``[B]``
    """
    scores = th.zeros(len(first_actions), device=first_actions.device)
    alive = th.ones_like(scores, dtype=th.bool)
    actions = first_actions
    if policy.use_sde:
        policy.reset_noise(len(scores))
    for step in range(horizon):
        if step > 0:
            actions = actor_distribution(policy, simulator.policy_input()).get_actions()
        state, action = simulator.state, received(actions, policy)
        next_state, step_reward, terminated = simulator.step(action)
        if reward is not None:
            step_reward = evaluate_reward(reward[1], reward[0], state, action, next_state, alive)
        assert step_reward is not None
        scores += gamma**step * th.where(alive, step_reward.to(scores), 0.0)
        alive = ~terminated
        if not alive.any():
            break
    return scores


class ActionGroups:
    """
    The groups of other actions in one environment: where next states come from, and the scores of a rollout's candidates.

    :param env: the training environment
    :param env_id: its ID, where it has one
    :param reward: name and function that scores steps; ``None`` for the simulator's own reward
    :param group_size: candidates per state; a ``Discrete`` space no larger than this is enumerated
    :param horizon: steps to follow each candidate
    :param gamma: discount factor
    :raises ValueError: next states cannot be had
    :ivar branch_steps: simulator steps spent on the last rollout's candidates
    :ivar model_steps: model steps spent on them
    """

    def __init__(
        self,
        env: VecEnv,
        env_id: str | None,
        reward: tuple[str | None, RewardFunction] | None,
        group_size: int,
        horizon: int,
        gamma: float,
    ) -> None:
        self.env = env
        self.reward = reward
        self.group_size = group_size
        self.horizon = horizon
        self.gamma = gamma
        self.branch_steps = self.model_steps = 0
        self._snapshots: list[list[Snapshot]] = []
        # A model computes what the environment itself shows: no frames stacked, no images transposed
        comparable = innermost_vec_env(env).observation_space == env.observation_space
        model = find_transition(env_id) if env_id is not None and comparable else None
        self._model = model if reward is not None else None
        self._brancher = None if self._model is not None else self._make_brancher(env_id, model)

    def _make_brancher(self, env_id: str | None, model: TransitionSpec | None) -> Brancher:
        try:
            return Brancher(self.env)
        except ValueError as error:
            hint = "" if model is None else f" {model.name} gives no rewards: pass a reward_function to use it."
            raise ValueError(
                f"group_by='action' needs the next states of {env_id or 'this environment'} for actions that were not "
                "taken. There are three ways to have them: (1) a plugin with a transition model for it, beside a "
                "reward_function; (2) an environment that can be copied (classic control, MuJoCo, ALE, most Python "
                "environments); (3) SnapshotWrapper(env, family='replay') around it: exact for any seeded environment, but "
                f"slow. group_by='state' works without.{hint} What stood in the way: {error}"
            ) from error

    @property
    def source(self) -> str:
        """Where next states come from, for people to read."""
        if self._model is not None:
            return f"next states from the transition model {self._model.name}"
        assert self._brancher is not None
        return f"next states from branches of the simulator ({', '.join(sorted(set(self._brancher.families)))})"

    def begin_rollout(self) -> None:
        """Call it before the first step of a rollout."""
        self._snapshots.clear()
        self.after_step()

    def after_step(self) -> None:
        """Call it after every step of the training environment."""
        if self._brancher is not None:
            self._snapshots.append(self._brancher.snapshot())

    @th.no_grad()
    def compare(
        self, policy: ActorCriticPolicy, observations: Any, executed: th.Tensor, log_prob: th.Tensor, states: Any
    ) -> tuple[th.Tensor, TrainingData]:
        """
        :param policy: collected the rollout
        :param observations: as the policy saw them, ``[n_steps * n_envs, ...]``
        :param executed: actions taken, alike
        :param log_prob: of the actions taken, alike
        :param states: observations in the environment's own units, alike; not needed where the simulator is branched
        :return: scores ``[n_steps * n_envs, k]`` and the candidates as training data that lack advantages and weights
        """
        actions, old_log_prob = draw_candidates(policy, observations, executed, log_prob, self.group_size)
        n, k = old_log_prob.shape
        self.branch_steps = self.model_steps = 0
        scores = []
        for rows in th.arange(n).split(max(1, (BRANCH_CHUNK if self._model is None else MODEL_CHUNK) // k)):
            simulator = self._simulator(rows.repeat_interleave(k), states, log_prob.device)
            first = actions[rows].flatten(0, 1)
            scores.append(look_ahead(simulator, first, policy, self.reward, self.horizon, self.gamma).view(-1, k))
            if self._model is None:
                self.branch_steps += simulator.n_steps
            else:
                self.model_steps += simulator.n_steps
        enumerated = is_enumerated(policy.action_space, self.group_size)
        empty = th.empty(0, device=old_log_prob.device)
        return th.cat(scores), TrainingData(observations, actions, old_log_prob, empty, empty, enumerated=enumerated)

    def _simulator(self, rows: th.Tensor, states: Any, device: th.device) -> Simulator:
        """Simulators in these visited states, ready to be stepped."""
        if self._model is not None:
            observe = frozen_normalization(self.env, device)
            return ModelSimulator(self._model, map_observation(lambda values: values[rows], states), observe)
        assert self._brancher is not None
        steps, envs = (rows // self.env.num_envs).tolist(), (rows % self.env.num_envs).tolist()
        return self._brancher.simulate([self._snapshots[step][env] for step, env in zip(steps, envs, strict=True)], device)
