"""Offers a name that tiny-rewards offers too."""

from sb3_grpo_plugin import RewardSpec, hookimpl


@hookimpl
def sb3_grpo_rewards():
    return [
        RewardSpec("tiny/upright", ("CartPole-v1",), lambda state, action, next_state: state[:, 0]),
        RewardSpec("broken-duplicate/fine", ("Acrobot-v1",), lambda state, action, next_state: state[:, 0]),
    ]
