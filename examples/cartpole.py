"""
Score every action in every visited state with a reward function of your own, and learn from the comparison.

CartPole-v1, one environment, 20,000 steps. With the reward pack (`pip install ./rewards`) the next states come from its
batched transition model; without it, from copies of the simulator, which takes longer and learns the same.
"""

import gymnasium as gym
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_grpo_plugin import GRPO


def upright(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
    """
    Pole upright, cart in the middle.

    :param state: ``[B, 4]``: cart position, cart velocity, pole angle (rad), pole angular velocity
    :param action: int64 ``[B, 1]``
    :param next_state: ``[B, 4]``
    :return: ``[B, 1]``
    """
    position, angle = next_state[:, 0], next_state[:, 2]
    return (1.0 - angle.abs() - 0.1 * position.abs()).unsqueeze(-1)


def main() -> None:
    env = DummyVecEnv([lambda: gym.make("CartPole-v1")])
    model = GRPO(
        "MlpPolicy",
        env,
        reward_function=upright,
        n_steps=256,
        batch_size=64,
        n_epochs=10,
        learning_rate=3e-4,
        verbose=1,
    )
    model.learn(total_timesteps=20_000)

    mean, std = evaluate_policy(model, DummyVecEnv([lambda: gym.make("CartPole-v1")]), n_eval_episodes=20, warn=False)
    print(f"Mean return of 20 episodes: {mean:.1f} +/- {std:.1f} (the maximum is 500)")


if __name__ == "__main__":
    main()
