"""A reward that raises when it is called."""

from sb3_grpo_plugin import RewardSpec, hookimpl


def raising(state, action, next_state):
    return state[:, 100]


@hookimpl
def sb3_grpo_rewards():
    return [RewardSpec("broken-reward/raises", ("CartPole-v1",), raising)]
