"""Policies without a value head: SB3's actor-critic policies, the critic left out."""

from typing import Any

import torch as th
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.torch_layers import MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from sb3_grpo_plugin.distributions import direct


class ActorPolicy(ActorCriticPolicy):
    """
    An SB3 policy with an actor and no critic: no parameter, optimizer state or forward pass for a value.

    Takes the arguments of ``ActorCriticPolicy``. A ``vf`` entry in ``net_arch`` and ``share_features_extractor`` are
    accepted and have nothing to act on. Adam, the default optimizer, is the fused one. Discrete actions and
    Gaussians are computed without ``torch.distributions``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["share_features_extractor"] = True
        if kwargs.get("optimizer_kwargs") is None and kwargs.get("optimizer_class", th.optim.Adam) is th.optim.Adam:
            kwargs["optimizer_kwargs"] = dict(eps=1e-5, fused=True)
        super().__init__(*args, **kwargs)
        self.action_dist = direct(self.action_dist)

    def _build_mlp_extractor(self) -> None:
        layers = self.net_arch.get("pi", []) if isinstance(self.net_arch, dict) else self.net_arch
        self.mlp_extractor = MlpExtractor(
            self.features_dim,
            net_arch=dict(pi=layers, vf=[]),
            activation_fn=self.activation_fn,
            device=self.device,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        del self.value_net
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param obs: Observation
        :param deterministic: Whether to sample or use deterministic actions
        :return: action, zeros ``[batch, 1]`` in the place of a value, and log probability of the action
        """
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        log_prob = distribution.log_prob(actions)
        return actions.reshape((-1, *self.action_space.shape)), log_prob.new_zeros(len(log_prob), 1), log_prob  # type: ignore[misc]

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        :param obs: Observation
        :param actions: Actions
        :return: zeros ``[batch, 1]`` in the place of a value, log likelihood of the actions, entropy of the distribution
        """
        distribution = self.get_distribution(obs)
        log_prob = distribution.log_prob(actions)
        return log_prob.new_zeros(len(log_prob), 1), log_prob, distribution.entropy()

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Observation
        :return: zeros ``[batch, 1]``, so that nothing is added to the reward of a step cut off by a time limit
        """
        first = next(iter(obs.values())) if isinstance(obs, dict) else obs
        return th.zeros(len(first), 1, device=self.device)


class ActorCnnPolicy(ActorPolicy, ActorCriticCnnPolicy):
    """:class:`ActorPolicy` for images."""


class MultiInputActorPolicy(ActorPolicy, MultiInputActorCriticPolicy):
    """:class:`ActorPolicy` for dictionaries of observations."""


MlpPolicy = ActorPolicy
CnnPolicy = ActorCnnPolicy
MultiInputPolicy = MultiInputActorPolicy
