"""The distributions of actions against SB3's own: the same numbers, gradients and draws."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common import distributions as sb3
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_grpo_plugin.distributions import CategoricalDistribution, DiagGaussianDistribution, direct
from sb3_grpo_plugin.policies import ActorPolicy

BATCH, SIZE = 64, 5
Kind = type[sb3.Distribution]


def parameters(kind: Kind) -> list[th.Tensor]:
    """Parameters of a batch of distributions, from near uniform to nearly certain."""
    rows = th.randn(BATCH, SIZE) * th.logspace(-3, 2, BATCH)[:, None]
    tensors = [rows] if kind is sb3.CategoricalDistribution else [rows, th.linspace(-5.0, 1.0, SIZE)]
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("kind", [sb3.CategoricalDistribution, sb3.DiagGaussianDistribution])
@pytest.mark.parametrize("value", ["log_prob", "entropy"])
def test_values_and_gradients_are_those_of_sb3(kind: Kind, value: str) -> None:
    th.manual_seed(0)
    tensors = parameters(kind)
    arguments = (kind(SIZE).proba_distribution(*tensors).sample().detach(),) if value == "log_prob" else ()
    ours = direct(kind(SIZE))
    assert type(ours) is not kind
    expected, found = (getattr(one.proba_distribution(*tensors), value)(*arguments) for one in (kind(SIZE), ours))
    assert found.shape == (BATCH,)
    th.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    expected, found = (th.autograd.grad(one.square().sum(), tensors, materialize_grads=True) for one in (expected, found))
    th.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", [sb3.CategoricalDistribution, sb3.DiagGaussianDistribution])
def test_draws_and_modes_are_those_of_sb3(kind: Kind) -> None:
    th.manual_seed(0)
    tensors = parameters(kind)
    theirs, ours = kind(SIZE).proba_distribution(*tensors), direct(kind(SIZE)).proba_distribution(*tensors)
    for seed in range(5):
        drawn = []
        for one in (theirs, ours):
            th.manual_seed(seed)
            drawn.append(one.get_actions())
        th.testing.assert_close(drawn[1], drawn[0])
    th.testing.assert_close(ours.mode(), theirs.mode())


@pytest.mark.parametrize("kind", [sb3.CategoricalDistribution, sb3.DiagGaussianDistribution])
def test_torchs_distribution_is_there_for_who_asks(kind: Kind) -> None:
    th.manual_seed(0)
    tensors, others = parameters(kind), parameters(kind)
    expected = sb3.kl_divergence(kind(SIZE).proba_distribution(*tensors), kind(SIZE).proba_distribution(*others))
    found = sb3.kl_divergence(direct(kind(SIZE)).proba_distribution(*tensors), direct(kind(SIZE)).proba_distribution(*others))
    th.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("space", "use_sde", "kind"),
    [
        (spaces.Discrete(3), False, CategoricalDistribution),
        (spaces.Box(-1.0, 1.0, (2,)), False, DiagGaussianDistribution),
        (spaces.Box(-1.0, 1.0, (2,)), True, sb3.StateDependentNoiseDistribution),
        (spaces.MultiDiscrete([2, 3]), False, sb3.MultiCategoricalDistribution),
        (spaces.MultiBinary(3), False, sb3.BernoulliDistribution),
    ],
)
def test_policies_take_the_direct_distribution_where_there_is_one(space: spaces.Space, use_sde: bool, kind: Kind) -> None:
    observations = spaces.Box(-1.0, 1.0, (4,))
    policy = ActorPolicy(observations, space, lambda _: 1e-3, use_sde=use_sde)
    assert type(policy.action_dist) is kind
    theirs = ActorCriticPolicy(observations, space, lambda _: 1e-3, use_sde=use_sde)
    theirs.load_state_dict(policy.state_dict(), strict=False)
    sample = np.stack([observations.sample() for _ in range(6)])
    np.testing.assert_allclose(
        policy.predict(sample, deterministic=True)[0], theirs.predict(sample, deterministic=True)[0], atol=1e-6
    )
