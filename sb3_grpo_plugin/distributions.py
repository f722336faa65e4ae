"""SB3's two most common action distributions without the detour over ``torch.distributions``, which takes twice the time."""

import math
from typing import Any

import torch as th
from stable_baselines3.common import distributions

LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)


class CategoricalDistribution(distributions.CategoricalDistribution):
    """SB3's distribution of discrete actions; ``distribution`` is made when it is asked for."""

    log_probs: th.Tensor

    @property
    def distribution(self) -> th.distributions.Categorical:  # type: ignore[override]
        """The same as an object of torch."""
        return th.distributions.Categorical(logits=self.log_probs)

    def proba_distribution(self, action_logits: th.Tensor) -> "CategoricalDistribution":
        """
        :param action_logits: log probabilities up to a constant, ``[batch, n]``
        :return: self
        """
        self.log_probs = action_logits.log_softmax(dim=1)
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: numbers of actions, ``[batch]``
        :return: ``[batch]``
        """
        return self.log_probs.gather(1, actions.long()[:, None]).squeeze(1)

    def entropy(self) -> th.Tensor:
        """
        :return: ``[batch]``
        """
        return -(self.log_probs.exp() * self.log_probs).sum(dim=1)

    def sample(self) -> th.Tensor:
        """
        :return: int64 ``[batch]``, drawn as torch's ``Categorical`` draws
        """
        return self.log_probs.exp().multinomial(1, replacement=True).squeeze(1)

    def mode(self) -> th.Tensor:
        """
        :return: int64 ``[batch]``
        """
        return self.log_probs.argmax(dim=1)


class DiagGaussianDistribution(distributions.DiagGaussianDistribution):
    """SB3's distribution of continuous actions; ``distribution`` is made when it is asked for."""

    mean: th.Tensor
    log_std: th.Tensor

    @property
    def distribution(self) -> th.distributions.Normal:  # type: ignore[override]
        """The same as an object of torch."""
        return th.distributions.Normal(self.mean, self.log_std.exp().expand_as(self.mean))

    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor) -> "DiagGaussianDistribution":
        """
        :param mean_actions: ``[batch, n]``
        :param log_std: of every state, ``[n]``
        :return: self
        """
        self.mean, self.log_std = mean_actions, log_std
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: ``[batch, n]``
        :return: ``[batch]``
        """
        deviations = (actions - self.mean) * (-self.log_std).exp()
        return -0.5 * (deviations * deviations).sum(dim=1) - (self.log_std + LOG_SQRT_2PI).sum()

    def entropy(self) -> th.Tensor:
        """
        :return: ``[batch]``
        """
        return (self.log_std + 0.5 + LOG_SQRT_2PI).sum().expand(len(self.mean))

    def sample(self) -> th.Tensor:
        """
        :return: float ``[batch, n]``, drawn as torch's ``Normal`` draws
        """
        return self.mean + self.log_std.exp() * th.randn_like(self.mean)

    def mode(self) -> th.Tensor:
        """
        :return: ``[batch, n]``
        """
        return self.mean


DIRECT: dict[type, type] = {
    distributions.CategoricalDistribution: CategoricalDistribution,
    distributions.DiagGaussianDistribution: DiagGaussianDistribution,
}


def direct(distribution: Any) -> Any:
    """
    :param distribution: SB3's, of a policy
    :return: this module's in its place, where there is one
    """
    fast = DIRECT.get(type(distribution))
    return distribution if fast is None else fast(distribution.action_dim)
