"""Losses, by hand-computed numbers."""

import math

import pytest
import torch as th

from sb3_grpo_plugin.losses import LOSS_TYPES, clipped_surrogate, k3_kl, step_weights

# One environment: episodes of 1 and 3 steps; the other: one of 4. A rollout of 4 steps, and the loss of each step.
FRAGMENTS = th.tensor([[0, 1, 1, 1], [2, 2, 2, 2]]).T
STEP_LOSSES = th.tensor([[6.0, 3.0, 3.0, 6.0], [1.0, 1.0, 1.0, 3.0]]).T

EXPECTED = {
    "dapo": 24 / 8,
    "grpo": (6 / 1 + 12 / 3 + 6 / 4) / 3,
    "dr_grpo": (6 + 12 + 6) / 4 / 3,
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types_by_hand(loss_type: str) -> None:
    weights = step_weights(loss_type, FRAGMENTS)
    assert float((weights * STEP_LOSSES).mean()) == pytest.approx(EXPECTED[loss_type])
    assert len({round(value, 6) for value in EXPECTED.values()}) == len(LOSS_TYPES)


def test_loss_types_agree_on_whole_rollouts_without_ends() -> None:
    fragments = th.arange(3).expand(5, 3)
    for loss_type in LOSS_TYPES:
        th.testing.assert_close(step_weights(loss_type, fragments), th.ones(5, 3))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 1.0, -1.1, -1.1),  # within the range
        (1.5, 1.0, -1.28, 0.0),  # above, clipped: no gradient
        (1.5, -1.0, 1.5, 1.5),  # above, but worse: not clipped
        (0.5, 1.0, -0.5, -0.5),  # below, but better: not clipped
        (0.5, -1.0, 0.8, 0.0),  # below, clipped
        (3.0, 0.0, 0.0, 0.0),  # no signal
    ],
)
def test_clip_higher_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    log_prob = th.tensor([math.log(ratio) - 1.0], requires_grad=True)
    found, ratios = clipped_surrogate(log_prob, th.tensor([-1.0]), th.tensor([advantage]), 0.2, 0.28)
    found.sum().backward()
    assert log_prob.grad is not None
    assert [value.item() for value in (found, ratios, log_prob.grad)] == pytest.approx([loss, ratio, gradient], abs=1e-6)


def test_k3_is_an_unbiased_kl_that_is_never_negative() -> None:
    policy, reference = (th.randn(6, generator=th.Generator().manual_seed(seed)).log_softmax(0) for seed in (0, 1))
    estimates = k3_kl(policy, reference)
    assert (estimates > 0).all() and (k3_kl(policy, policy) == 0).all()
    exact = th.distributions.kl_divergence(
        th.distributions.Categorical(logits=policy), th.distributions.Categorical(logits=reference)
    )
    th.testing.assert_close((policy.exp() * estimates).sum(), exact)
    assert float(k3_kl(th.tensor(0.0), th.tensor(1.0))) == pytest.approx(math.e - 2)
