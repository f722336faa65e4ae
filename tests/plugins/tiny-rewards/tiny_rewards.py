"""One of everything, as small as it gets."""

import gymnasium as gym
import torch as th

from sb3_grpo_plugin import EnvWrapperSpec, RewardSpec, TransitionSpec, hookimpl


class Slow(gym.ActionWrapper):
    """Does nothing, under a name."""

    def action(self, action: int) -> int:
        return action


def upright(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
    return 1 - next_state[:, 2].abs()


def stay(state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    return state.clone(), th.zeros(len(state), dtype=th.bool)


@hookimpl
def sb3_grpo_rewards() -> list[RewardSpec]:
    return [
        RewardSpec("tiny/upright", ("CartPole-*",), upright, "keeps the pole upright"),
        RewardSpec("tiny/nowhere", ("NoSuchEnvironment-*",), upright, "bound to nothing"),
    ]


@hookimpl
def sb3_grpo_transitions() -> list[TransitionSpec]:
    return [TransitionSpec("tiny/stay", ("TinyStay-v0",), stay, "stays where it is")]


@hookimpl
def sb3_grpo_env_wrappers() -> list[EnvWrapperSpec]:
    return [EnvWrapperSpec("tiny/slow", ("TinyStay-v0",), Slow, "changes nothing")]
