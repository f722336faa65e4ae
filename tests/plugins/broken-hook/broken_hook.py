"""One hook is spelled wrongly, the other is fine."""

from sb3_grpo_plugin import RewardSpec, hookimpl


@hookimpl
def sb3_grpo_reward():
    return []


@hookimpl
def sb3_grpo_rewards():
    return [RewardSpec("broken-hook/fine", ("Acrobot-v1",), lambda state, action, next_state: state[:, 0])]
