"""Returns names where specs are expected."""

from sb3_grpo_plugin import hookimpl


@hookimpl
def sb3_grpo_rewards():
    return ["broken-type/reward"]
