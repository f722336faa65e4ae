"""The losses of GRPO: pure functions of tensors."""

import torch as th

LOSS_TYPES = ("dapo", "grpo", "dr_grpo")


def clipped_surrogate(
    log_prob: th.Tensor, old_log_prob: th.Tensor, advantages: th.Tensor, clip_low: float, clip_high: float
) -> tuple[th.Tensor, th.Tensor]:
    """
    PPO's clipped objective, eq. 7 of https://arxiv.org/abs/1707.06347, with the upper bound free as in DAPO, eq. 10 of
    https://arxiv.org/abs/2503.14476: ``-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)``.

    :param log_prob: of the actions under the policy that learns, any shape
    :param old_log_prob: of the same actions when they were sampled
    :param advantages: of the same shape
    :param clip_low: distance of the lower bound from 1
    :param clip_high: distance of the upper bound from 1
    :return: the loss of each action and the ratio, both of the shape of ``log_prob``
    """
    ratio = th.exp(log_prob - old_log_prob)
    return -th.min(advantages * ratio, advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)), ratio


def k3_kl(log_prob: th.Tensor, reference_log_prob: th.Tensor) -> th.Tensor:
    """
    The non-negative, unbiased estimator ``exp(d) - d - 1``, ``d = log ref - log pi``, of KL(pi || ref) for actions of pi:
    eq. 4 of DeepSeekMath (https://arxiv.org/abs/2402.03300), k3 of http://joschu.net/blog/kl-approx.html.

    :param log_prob: of the actions under the policy that learns, any shape
    :param reference_log_prob: of the same actions under the reference
    :return: of the shape of ``log_prob``
    """
    difference = reference_log_prob - log_prob
    return th.exp(difference) - difference - 1.0


def step_weights(loss_type: str, fragments: th.Tensor) -> th.Tensor:
    """
    The weight of each step in the mean over a rollout's ``n_steps * n_envs`` steps.

    - ``"dapo"``: the plain mean over steps (https://arxiv.org/abs/2503.14476, eq. 8), PPO's loss. TRL's ``"bnpo"`` differs
      from it only under gradient accumulation, which does not exist here, and is left out.
    - ``"grpo"``: the mean within a fragment of an episode, then over fragments (https://arxiv.org/abs/2402.03300, eq. 3).
    - ``"dr_grpo"``: the sum within a fragment over the constant ``n_steps``, then the mean over fragments
      (https://arxiv.org/abs/2503.20783).

    :param loss_type: one of the three
    :param fragments: ids of the fragments, counted from 0, int64 ``[n_steps, n_envs]``
    :return: float32 ``[n_steps, n_envs]``
    """
    if loss_type == "dapo":
        return th.ones(fragments.shape, device=fragments.device)
    lengths = th.bincount(fragments.flatten())
    steps_per_fragment = fragments.numel() / len(lengths)
    if loss_type == "grpo":
        return (steps_per_fragment / lengths.float())[fragments]
    assert loss_type == "dr_grpo"
    return th.full(fragments.shape, steps_per_fragment / len(fragments), device=fragments.device)
