"""Group Relative Policy Optimization for Stable-Baselines3."""

import difflib
import pickle
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import explained_variance, obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_grpo_plugin import groups, lookahead, losses
from sb3_grpo_plugin.lookahead import ActionGroups
from sb3_grpo_plugin.policies import ActorPolicy, CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_grpo_plugin.rewards import check_stateless, evaluate_reward, resolve_reward
from sb3_grpo_plugin.rollouts import RolloutRecord, TrainingData, follow, map_observation
from sb3_grpo_plugin.wrappers import GroupStartWrapper, ensure_wrapped, innermost_vec_env

SelfGRPO = TypeVar("SelfGRPO", bound="GRPO")

GROUPINGS = ("auto", "action", "state", "episode")
FEATURE_CHUNK = 4096
NOT_SAVED = (
    "_action_groups",
    "_candidates",
    "_episode_groups",
    "_record",
    "_reward",
    "_scale",
    "_state_groups",
)
DAMAGED_ZIP_ERRORS = (
    AssertionError,
    AttributeError,
    EOFError,
    KeyError,
    RuntimeError,
    TypeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
FLAT_CAUSES = {
    "state": "all returns are alike. The reward may be constant, or not earned yet: let a rollout reach it (n_steps, n_envs, "
    "more exploration), or give a reward_function that tells states apart.",
    "episode": "the episodes from one start earn the same. The reward may be constant, not earned yet, or the policy "
    "deterministic: raise group_size or ent_coef, or use group_by='state'.",
    "action": "all candidates score alike. The reward may not depend on what the action changes within `horizon` steps "
    "(raise horizon), or the candidates may be the same actions.",
}


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """
    :param name: of the option
    :param value: what was given
    :param allowed: what may be given
    :raises ValueError: anything else, naming the nearest
    """
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.3)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.{hint}")


class GRPO(PPO):
    """
    Group Relative Policy Optimization (GRPO): PPO without a critic.

    The advantage of an action is its return relative to a group of comparable alternatives, one of:

    - ``group_by="state"``: visits of other episodes to similar states, see :class:`~sb3_grpo_plugin.groups.StateGroups`;
    - ``group_by="episode"``: episodes of other environments from the same start, the groups of the paper, see
      :class:`~sb3_grpo_plugin.groups.EpisodeGroups`;
    - ``group_by="action"``: other actions in the same state, each followed for ``horizon`` steps from its own next state,
      see :mod:`sb3_grpo_plugin.lookahead`.

    Paper: DeepSeekMath, https://arxiv.org/abs/2402.03300 (section 4.1). Code: the rollout loop, callbacks and the shape of
    ``train`` are those of Stable-Baselines3's PPO.

    The policy has no value head. Arguments about a critic (``vf_coef``, ``clip_range_vf``, and ``gae_lambda`` outside
    state groups) are accepted and do nothing.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy or a class)
    :param env: The environment to learn from (if registered in Gymnasium, can be str)
    :param learning_rate: The learning rate, it can be a function of the current progress remaining (from 1 to 0)
    :param n_steps: The number of steps to run for each environment per update
    :param batch_size: Minibatch size, in visited states
    :param n_epochs: Number of passes over a rollout (mu of the paper)
    :param gamma: Discount factor
    :param gae_lambda: State groups: lambda of the returns that are compared
    :param clip_range: Clipping parameter (epsilon of the paper), it can be a function of the current progress remaining
    :param clip_range_vf: Accepted from PPO; there is no value function to clip
    :param normalize_advantage: Whether to standardise advantages in every minibatch as PPO does. Off: ``scale_rewards``
        scales once per rollout, with a floor, and leaves groups without a signal at exactly 0
    :param ent_coef: Entropy coefficient for the loss calculation
    :param vf_coef: Accepted from PPO; there is no value loss
    :param max_grad_norm: The maximum value for the gradient clipping
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE)
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE (-1: only at the start of a rollout)
    :param rollout_buffer_class: Rollout buffer class to use
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer
    :param target_kl: Stop the update early when the approximate KL to the rollout's policy exceeds 1.5 times this
    :param stats_window_size: Window size for the rollout logging, in episodes
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run
    :param reward_function: ``None`` (the environment's reward), a callable
        ``reward_function(state, action, next_state) -> reward`` (see :mod:`sb3_grpo_plugin.rewards`), a registered name, or
        ``"auto"`` (the one bound to this environment's ID). A callable is not saved with the model: pass it to ``load``
        (``GRPO.load(path, env, reward_function=...)``) before learning on
    :param group_by: ``"action"``, ``"state"``, ``"episode"`` or ``"auto"`` (action groups when a reward function is given and
        next states can be had, else state groups)
    :param group_size: Action groups: candidates per state (``Discrete`` actions no more than this are all taken). Episode
        groups: episodes per group; divides ``n_envs``. State groups weigh all remembered visits and have no such number
    :param horizon: Action groups: steps that each candidate is followed under the current policy
    :param scale_rewards: What centred scores are divided by, once per rollout: ``"batch"`` (their standard deviation over
        the rollout), ``"group"`` (over the group; state groups overlap and take ``"batch"``) or ``"none"`` (Dr. GRPO)
    :param loss_type: ``"dapo"`` (mean over steps), ``"grpo"`` (over an episode fragment, then over fragments) or
        ``"dr_grpo"`` (sum over the constant ``n_steps``), see :func:`~sb3_grpo_plugin.losses.step_weights`
    :param clip_range_high: Upper clipping parameter when it differs from ``clip_range`` (DAPO)
    :param kl_coef: Weight of the k3 estimate of the KL to a frozen reference: the policy when ``learn`` started (beta of
        the paper). 0 keeps no reference
    :param supervision: Episode groups: ``"process"`` compares returns to go at the same step of an episode, ``"outcome"``
        the returns of whole episodes (DeepSeekMath, sections 4.1.3 and 4.1.2)
    :param novelty_coef: State groups: weight of a bonus, at most 1 per step and fading with visits, for coming to states
        unlike those visited so far. For rewards that chance does not find (MountainCar). 0: equal returns are no signal
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: options that contradict each other, or from which no group can be formed
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = False,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        reward_function: str | Callable[..., th.Tensor] | None = None,
        group_by: str = "auto",
        group_size: int = 8,
        horizon: int = 64,
        scale_rewards: str = "batch",
        loss_type: str = "dapo",
        clip_range_high: float | None = None,
        kl_coef: float = 0.0,
        supervision: str = "process",
        novelty_coef: float = 0.0,
    ):
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            clip_range=clip_range,
            clip_range_vf=clip_range_vf,
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            target_kl=target_kl,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.reward_function = reward_function
        self.group_by = group_by
        self.group_size = group_size
        self.horizon = horizon
        self.scale_rewards = scale_rewards
        self.loss_type = loss_type
        self.clip_range_high = clip_range_high
        self.kl_coef = kl_coef
        self.supervision = supervision
        self.novelty_coef = novelty_coef
        self.branch_steps = 0
        self.model_steps = 0
        self._callable_name = getattr(reward_function, "__name__", type(reward_function).__name__)
        if reward_function is None or isinstance(reward_function, str):
            self._callable_name = None

        self._check_options()
        if _init_setup_model:
            self._setup_model()
            self._check_groups()

    def _check_options(self) -> None:
        """What can be judged without an environment, a plugin or a number of environments."""
        for name, allowed in (
            ("group_by", GROUPINGS),
            ("scale_rewards", groups.SCALES),
            ("loss_type", losses.LOSS_TYPES),
            ("supervision", groups.SUPERVISIONS),
        ):
            check_choice(name, getattr(self, name), allowed)
        for name, least in (("group_size", 2), ("horizon", 1), ("n_epochs", 1), ("n_steps", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        for name in ("kl_coef", "clip_range_high", "novelty_coef"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")
        if self.normalize_advantage:
            warnings.warn(
                "normalize_advantage=True standardises every minibatch: groups without a signal (advantage 0) get one, and "
                "the floor of `scale_rewards` is undone. GRPO scales once per rollout by itself.",
                stacklevel=3,
            )
        if self.clip_range_vf is not None or self.vf_coef != 0.5:
            warnings.warn("`clip_range_vf` and `vf_coef` have no effect: GRPO has no value function.", stacklevel=3)

    def _check_groups(self) -> None:
        """Whether groups can be formed in this environment; finds the reward function and what ``"auto"`` stands for."""
        if self.reward_function is None and self._callable_name is not None:
            raise ValueError(
                f"This model learned from the callable {self._callable_name!r}, which is not saved with it. Give it again: "
                "GRPO.load(path, env, reward_function=...)."
            )
        env_id = self._env_id()
        self._reward_name, self._reward = resolve_reward(self.reward_function, env_id)
        self._grouping, self._action_groups = self._choose_grouping(env_id)
        if self._grouping != "state" and self.gae_lambda != 0.95:
            warnings.warn(f"`gae_lambda` has no effect with group_by='{self._grouping}'.", stacklevel=3)
        if self._grouping != "state" and self.novelty_coef > 0:
            warnings.warn(f"`novelty_coef` has no effect with group_by='{self._grouping}'.", stacklevel=3)
        if self.env is None:
            return
        if self._grouping == "state":
            groups.check_state_groups(self.n_steps, self.n_envs, self.gamma, self.gae_lambda)
        if self._grouping == "episode" and self.n_envs % self.group_size:
            fitting = -(-self.n_envs // self.group_size) * self.group_size
            raise ValueError(
                f"Episode groups need `n_envs` to be a multiple of `group_size`: each group is {self.group_size} "
                f"environments, and there are {self.n_envs}. Use n_envs={fitting} or another group_size."
            )

    def _choose_grouping(self, env_id: str | None) -> tuple[str, ActionGroups | None]:
        """What ``group_by`` stands for in this environment."""
        wanted = self.group_by == "action" or (self.group_by == "auto" and self._reward is not None)
        if not wanted or self.env is None:
            return ("state" if self.group_by == "auto" else self.group_by), None
        reward = None if self._reward is None else (self._reward_name, self._reward)
        try:
            return "action", ActionGroups(self.env, env_id, reward, self.group_size, self.horizon, self.gamma)
        except ValueError:
            if self.group_by == "action":
                raise
            return "state", None

    def _env_id(self) -> str | None:
        if self.env is None:
            return None
        spec = innermost_vec_env(self.env).get_attr("spec", indices=0)[0]
        return None if spec is None else spec.id

    def _setup_model(self) -> None:
        super()._setup_model()
        self._adopt_policy(self.policy)
        moving_features = any(True for _ in self.policy.pi_features_extractor.parameters())
        self._state_groups = groups.StateGroups(
            self.gamma, self.gae_lambda, self.seed or 0, remember=not moving_features, novelty_coef=self.novelty_coef
        )
        self._scale = groups.ScoreScale(self.scale_rewards)
        self._record = RolloutRecord()
        self._candidates: TrainingData | None = None
        self.reference_policy = self._make_reference() if self.kl_coef > 0 else None
        # SB3 calls this between the last step of a rollout and the callbacks' on_rollout_end
        self.rollout_buffer.compute_returns_and_advantage = self._compute_advantages  # type: ignore[method-assign]

    @staticmethod
    def _adopt_policy(policy: ActorCriticPolicy) -> None:
        """Silence the value head that a policy class brings along: its values are 0 and it is not trained."""
        if isinstance(policy, ActorPolicy):
            return
        warnings.warn(
            f"{type(policy).__name__} has a value head, which GRPO neither uses nor trains; "
            "sb3_grpo_plugin.policies has policies without one.",
            stacklevel=2,
        )

        def predict_values(obs: Any) -> th.Tensor:
            return ActorPolicy.predict_values(policy, obs)  # type: ignore[arg-type]

        policy.predict_values = predict_values  # type: ignore[method-assign]

    def _make_reference(self) -> ActorCriticPolicy:
        """A frozen copy of the current policy."""
        reference = self.policy_class(
            self.observation_space, self.action_space, self.lr_schedule, use_sde=self.use_sde, **self.policy_kwargs
        ).to(self.device)
        reference.load_state_dict(self.policy.state_dict())
        reference.set_training_mode(False)
        return reference  # type: ignore[return-value]

    def learn(
        self: SelfGRPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "GRPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfGRPO:
        self._check_groups()
        if self._grouping == "episode":
            self._start_episode_groups()
        if self.kl_coef > 0 and (reset_num_timesteps or self.reference_policy is None):
            self.reference_policy = self._make_reference()
        if reset_num_timesteps:
            self.branch_steps = self.model_steps = 0
        if self.verbose >= 1:
            source = "" if self._action_groups is None else f", {self._action_groups.source}"
            rewards = "" if self._reward is None else f", rewards from {self._reward_name}"
            print(f"Groups by {self._grouping}{rewards}{source}")  # noqa: T201
        self._warned_of_flat_groups = self._warned_of_endless_episodes = False
        self._reward_is_checked = False
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def _start_episode_groups(self) -> None:
        """Let the e-th episodes of each ``group_size`` neighbouring environments begin alike."""
        assert self.env is not None
        ensure_wrapped(self.env, GroupStartWrapper)
        seed = self.seed if self.seed is not None else int(np.random.SeedSequence().generate_state(1)[0] >> 1)
        for index in range(self.n_envs):
            self.env.env_method("set_group_start", index // self.group_size, seed, indices=index)
        # A seed that waits for the next reset would give each member a start of its own
        innermost_vec_env(self.env)._reset_seeds()
        self._last_obs = None
        self._episode_groups = groups.EpisodeGroups(self.n_envs, self.group_size, self.gamma, self.supervision)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        self._record.start(env, keep_states=self._reward is not None)
        if self._action_groups is not None:
            self._action_groups.begin_rollout()
        try:
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        except (RuntimeError, ValueError):
            # A policy fed with NaN fails in a place that says nothing about the environment
            self._check_finite("observation", self._last_raw_obs(), rollout_buffer.pos)
            raise

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        if dones is not None:
            if self._vec_normalize_env is not None and self._vec_normalize_env.norm_reward:
                self._check_finite("reward", self._vec_normalize_env.get_original_reward(), self.rollout_buffer.pos)
            self._record.add(self.rollout_buffer.pos, infos, dones)
            if self._action_groups is not None:
                self._action_groups.after_step()

    def _last_raw_obs(self) -> Any:
        """What the environment gave last: in VecNormalize's statistics one NaN spreads to all environments."""
        return self._last_obs if self._vec_normalize_env is None else self._vec_normalize_env.get_original_obs()

    def _check_finite(self, what: str, values: Any, step: int | None = None, env: int | None = None) -> None:
        """
        :param what: the name of the values
        :param values: ``[n_steps, n_envs, ...]``, or ``[n_envs, ...]`` of the given step, or of one environment there, or a
            dictionary of such arrays
        :param step: position in the rollout, if values hold only one
        :param env: number of the environment, if values hold only one
        :raises ValueError: NaN or infinity, naming the environment and the step
        """
        for array in values.values() if isinstance(values, dict) else (values,):
            rows = np.asarray(array)
            rows = rows if step is None else rows[None] if env is None else rows[None, None]
            if not np.issubdtype(rows.dtype, np.floating) or np.isfinite(rows).all():
                continue
            first, index, *_ = np.argwhere(~np.isfinite(rows))[0]
            at, owner = first if step is None else step, index if env is None else env
            total = self.num_timesteps - (self.rollout_buffer.pos - at) * self.n_envs
            raise ValueError(
                f"Environment {owner} gave a {what} that is NaN or infinite at step {at} of the rollout (after {total} "
                f"timesteps): {rows[first, index]}. Mend the environment; stable_baselines3's VecCheckNan helps to find the "
                "cause."
            )

    def _features(self, observation: Any) -> th.Tensor:
        """
        What state groups compare states by: the policy's extracted features (for vectors: the observation itself).

        :param observation: as the rollout buffer holds it, ``[batch, ...]``
        :return: ``[batch, features_dim]``
        """
        size = len(next(iter(observation.values()))) if isinstance(observation, dict) else len(observation)
        chunks = []
        with th.no_grad():
            for start in range(0, size, FEATURE_CHUNK):
                rows = map_observation(lambda values, start=start: values[start : start + FEATURE_CHUNK], observation)
                tensors = obs_as_tensor(rows, self.device)
                chunks.append(BasePolicy.extract_features(self.policy, tensors, self.policy.pi_features_extractor))
        return th.cat(chunks).float()

    def _compute_advantages(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """
        Compare the rollout's steps with their groups; stands in the place of the buffer's GAE.

        :param last_values: zeros, not used
        :param dones: whether an episode ended at the last step, bool ``[n_envs]``
        """
        buffer = self.rollout_buffer
        assert self._last_obs is not None
        self._check_finite("observation", buffer.observations)
        self._check_finite("observation", self._last_raw_obs(), buffer.pos)
        self._check_finite("reward", buffer.rewards)
        for step, env, _, observation, _ in self._record.ends:
            self._check_finite("terminal observation", observation, step, env)
        self._candidates = None
        if self._action_groups is not None:
            comparison = self._compare_actions(self._action_groups)
        else:
            if self._reward is not None:
                self._replace_rewards()
            in_own_units = buffer.rewards if self._reward is not None else self._record.rewards(buffer.rewards)
            rewards = th.as_tensor(in_own_units, device=self.device)
            starts = th.as_tensor(buffer.episode_starts, device=self.device)
            ended = th.cat((starts[1:], th.as_tensor(dones, dtype=starts.dtype, device=self.device)[None]))
            if self._grouping == "episode":
                self._warn_of_endless_episodes(bool(ended.any()))
                comparison = self._episode_groups.compare(rewards.cpu(), starts.cpu(), ended.cpu())
            else:
                comparison = self._state_groups.compare(self._visits(rewards, starts, ended))
        advantages = self._scale(comparison.centred, comparison.group_std)
        if self._candidates is not None:
            self._candidates = self._candidates._replace(advantages=advantages)
            # The buffer keeps the candidate that was executed, for callbacks and the explained variance
            taken = (
                (self._candidates.actions == flat(buffer.actions, self.device)[:, None]).flatten(2).all(2).float().argmax(1)
            )
            comparison, advantages = comparison.of_candidate(taken), advantages.gather(1, taken[:, None])
        shape = buffer.rewards.shape
        buffer.advantages[:] = advantages.view(shape).cpu().numpy()
        buffer.returns[:] = comparison.scores.view(shape).cpu().numpy()
        buffer.values[:] = (comparison.scores - comparison.centred).view(shape).cpu().numpy()
        self._log_groups(comparison)

    def _states(self) -> tuple[Any, th.Tensor, Any]:
        """The rollout as reward functions see it: states, actions and next states, ``[n_steps * n_envs, ...]``."""
        buffer = self.rollout_buffer
        assert self._last_obs is not None
        states, next_states = self._record.states(buffer.observations, self._last_obs)
        actions = lookahead.received(flat(buffer.actions, self.device), self.policy)
        return flat(states, self.device), actions, flat(next_states, self.device)

    def _replace_rewards(self) -> None:
        """Put the reward function's scores in the place of the environment's rewards."""
        assert self._reward is not None
        rollout = self._states()
        self._check_reward(*rollout)
        rewards = evaluate_reward(self._reward, self._reward_name, *rollout)
        self.rollout_buffer.rewards[:] = rewards.view(self.rollout_buffer.rewards.shape).cpu().numpy()

    def _check_reward(self, states: Any, actions: th.Tensor, next_states: Any) -> None:
        if not self._reward_is_checked:
            assert self._reward is not None
            check_stateless(self._reward, self._reward_name, states, actions, next_states)
            self._reward_is_checked = True

    def _compare_actions(self, action_groups: ActionGroups) -> groups.Comparison:
        """Follow the candidates of every visited state; leaves them in ``_candidates``."""
        buffer = self.rollout_buffer
        states = None
        if self._reward is not None:
            rollout = self._states()
            self._check_reward(*rollout)
            states = rollout[0]
        self.policy.set_training_mode(False)
        with lookahead.own_randomness((self.seed or 0) + self.num_timesteps, self.device):
            scores, self._candidates = action_groups.compare(
                self.policy,
                flat(buffer.observations, self.device),
                flat(buffer.actions, self.device),
                flat(buffer.log_probs, self.device),
                states,
            )
        self.branch_steps += action_groups.branch_steps
        self.model_steps += action_groups.model_steps
        return groups.compare_candidates(scores)

    def _visits(self, rewards: th.Tensor, episode_starts: th.Tensor, dones: th.Tensor) -> groups.Visits:
        """The rollout as state groups see it."""
        buffer = self.rollout_buffer
        n_steps, n_envs = rewards.shape
        merged = map_observation(lambda values: values.reshape(-1, *values.shape[2:]), buffer.observations)
        features = self._features(merged).view(n_steps, n_envs, -1)
        ends = [(step, env) for step, env, *_ in self._record.ends]
        terminated = dones.clone()
        end_features = None
        if ends:
            steps, envs = map(list, zip(*ends, strict=True))
            terminated[steps, envs] = th.tensor([float(end[2]) for end in self._record.ends], device=self.device)
            end_features = self._features(self._record.end_observations())
        after = follow(features, self._features(self._last_obs), ends, end_features)
        return groups.Visits(features, after, rewards, episode_starts, dones, terminated)

    def _warn_of_endless_episodes(self, ended: bool) -> None:
        if not (ended or self._warned_of_endless_episodes):
            self._warned_of_endless_episodes = True
            warnings.warn(
                f"No episode ended in this rollout of {self.n_steps} steps of {self.n_envs} environments, and episode groups "
                "compare episodes from their start to their end. If they are longer than that, raise n_steps; if they never "
                "end, use group_by='state'.",
                stacklevel=2,
            )

    def _log_groups(self, comparison: groups.Comparison) -> None:
        compared = comparison.compared
        flat = float(comparison.alike[compared].float().mean()) if compared.any() else 1.0
        self.logger.record("train/frac_reward_zero_std", flat)
        self.logger.record("train/reward_std", float(comparison.centred[compared].std()) if compared.sum() > 1 else 0.0)
        self.logger.record("time/simulator_steps", self.num_timesteps + self.branch_steps, exclude="tensorboard")
        self.logger.record("time/model_steps", self.model_steps, exclude="tensorboard")
        if flat > 0.5 and compared.any() and not self._warned_of_flat_groups:
            self._warned_of_flat_groups = True
            warnings.warn(
                f"{flat:.0%} of the groups in this rollout carry no signal: {FLAT_CAUSES[self._grouping]}", stacklevel=2
            )

    def train(self) -> None:
        """
        Update policy using the currently gathered rollout.
        """
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        clip_range_high = clip_range if self.clip_range_high is None else self.clip_range_high
        data = self._training_data()
        parameters = list(self.policy.parameters())
        logs: dict[str, list[th.Tensor]] = defaultdict(list)
        ratios = []

        continue_training = True
        for epoch in range(self.n_epochs):
            # Of the last epoch, unless each one has to be watched
            needs_kl = self.target_kl is not None or epoch == self.n_epochs - 1
            logs["train/approx_kl"].clear()
            for index in th.randperm(len(data.actions), device=self.device).split(self.batch_size):
                batch = data.take(index)
                log_prob, entropy = log_prob_and_entropy(self.policy, batch)
                advantages = batch.advantages
                if self.normalize_advantage and advantages.numel() > 1:
                    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                step_losses, ratio = losses.clipped_surrogate(
                    log_prob, batch.old_log_prob, advantages, clip_range, clip_range_high
                )
                policy_loss = (step_losses * batch.weights[:, None]).mean()
                # Approximate entropy when no analytical form
                entropy_loss = log_prob.mean() if entropy is None else -entropy.mean()
                loss = policy_loss
                if self.ent_coef != 0.0:
                    loss = loss + self.ent_coef * entropy_loss
                if batch.reference_log_prob is not None:
                    kl = batch.expectation(losses.k3_kl(log_prob, batch.reference_log_prob)).mean()
                    loss = loss + self.kl_coef * kl
                    logs["train/kl"].append(kl.detach())
                ratios.append(ratio.detach())
                logs["train/policy_gradient_loss"].append(policy_loss.detach())
                logs["train/entropy_loss"].append(entropy_loss.detach())
                if needs_kl:
                    # KL(old || new) from samples of old: k3 with the roles exchanged
                    approx_kl = batch.expectation(losses.k3_kl(batch.old_log_prob, log_prob.detach())).mean()
                    logs["train/approx_kl"].append(approx_kl)
                if self.target_kl is not None and approx_kl > 1.5 * self.target_kl:
                    continue_training = False
                    if self.verbose >= 1:
                        print(f"Early stopping at step {epoch} due to reaching max kl: {approx_kl:.2f}")  # noqa: T201
                    break

                self.policy.optimizer.zero_grad()
                loss.backward()
                th.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
                self.policy.optimizer.step()

            self._n_updates += 1
            if not continue_training:
                break

        for key, values in logs.items():
            self.logger.record(key, th.stack(values).mean().item())
        ratio = th.cat(ratios)
        outside = (ratio < 1 - clip_range) | (ratio > 1 + clip_range_high)
        self.logger.record("train/clip_fraction", outside.float().mean().item())
        self.logger.record("train/loss", loss.item())
        self.logger.record(
            "train/explained_variance",
            explained_variance(self.rollout_buffer.values.flatten(), self.rollout_buffer.returns.flatten()),
        )
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", th.exp(self.policy.log_std).mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip_range)
        if self.clip_range_high is not None:
            self.logger.record("train/clip_range_high", self.clip_range_high)

    def _training_data(self) -> TrainingData:
        """The rollout as tensors on the policy's device; on the CPU they share the buffer's memory."""
        buffer = self.rollout_buffer
        weights = losses.step_weights(
            self.loss_type, groups.fragment_ids(th.as_tensor(buffer.episode_starts, device=self.device))
        )
        if self._candidates is not None:
            data = self._candidates._replace(weights=weights.flatten())
        else:
            actions = flat(buffer.actions, self.device)[:, None]
            data = TrainingData(
                flat(buffer.observations, self.device),
                # In float32 as SB3's buffer samples them: Bernoulli takes no integers
                actions.long() if isinstance(self.action_space, spaces.Discrete) else actions.float(),
                flat(buffer.log_probs, self.device)[:, None],
                flat(buffer.advantages, self.device)[:, None],
                weights.flatten(),
            )
        return data._replace(reference_log_prob=self._reference_log_prob(data))

    def _reference_log_prob(self, data: TrainingData) -> th.Tensor | None:
        if self.reference_policy is None:
            return None
        with th.no_grad():
            chunks = th.arange(len(data.actions)).split(FEATURE_CHUNK)
            return th.cat([log_prob_and_entropy(self.reference_policy, data.take(index))[0] for index in chunks])

    def _excluded_save_params(self) -> list[str]:
        excluded = [*super()._excluded_save_params(), "reference_policy", *NOT_SAVED]
        return excluded if self._callable_name is None else [*excluded, "reward_function"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, *(["reference_policy"] if self.reference_policy is not None else [])], tensors

    @classmethod
    def load(cls: type[SelfGRPO], path: Any, env: GymEnv | None = None, *args: Any, **kwargs: Any) -> SelfGRPO:
        """
        See :meth:`BaseAlgorithm.load`.

        :raises ValueError: the file is no model of this algorithm, or is damaged
        """
        try:
            return super().load(path, env, *args, **kwargs)
        except DAMAGED_ZIP_ERRORS as error:
            raise ValueError(
                f"{path} cannot be loaded as a {cls.__name__} model: it is damaged, or it was saved by another algorithm or "
                f"version ({type(error).__name__}: {error})."
            ) from error


def flat(values: Any, device: th.device) -> Any:
    """
    :param values: array ``[n_steps, n_envs, ...]``, or a dictionary of such arrays
    :param device: of the tensors
    :return: tensors ``[n_steps * n_envs, ...]``; on the CPU they share the arrays' memory
    """
    return map_observation(lambda array: th.as_tensor(array.reshape(-1, *array.shape[2:]), device=device), values)


def log_prob_and_entropy(policy: ActorCriticPolicy, batch: TrainingData) -> tuple[th.Tensor, th.Tensor | None]:
    """
    :param policy: any actor of SB3's
    :param batch: visited states and their actions
    :return: log probability of each action ``[n, k]`` and entropy ``[n * k]`` (``None`` if it has no analytical form)
    """
    n, k = batch.actions.shape[:2]
    distribution = lookahead.actor_distribution(policy, batch.observations, repeat=k)
    actions = batch.actions.flatten(0, 1)
    if isinstance(policy.action_space, spaces.Discrete):
        actions = actions.squeeze(-1)
    return distribution.log_prob(actions).view(n, k), distribution.entropy()
