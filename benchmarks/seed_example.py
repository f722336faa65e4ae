"""
The example of the README by seed: CartPole-v1, one environment, a reward function, groups of all actions.

    python benchmarks/seed_example.py [--seeds 10 11 12 13 14] [--horizon 64] [--source model branches]

Each row: mean return of 20 deterministic evaluation episodes every 5,000 environment steps, and what that took.
`model` takes next states from the reward pack's transition model, `branches` from copies of the simulator.
"""

import argparse
import time

import gymnasium as gym
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_grpo_plugin import GRPO, lookahead


def upright(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
    """1 - |pole angle| - 0.1 |cart position| of the next state, ``[B, 1]``."""
    return (1.0 - next_state[:, 2].abs() - 0.1 * next_state[:, 0].abs()).unsqueeze(-1)


def run(seed: int, horizon: int, steps: int) -> None:
    """
    :param seed: of the run
    :param horizon: steps that each action is followed
    :param steps: environment steps
    """
    env, eval_env = (DummyVecEnv([lambda: gym.make("CartPole-v1")]) for _ in range(2))
    eval_env.seed(10_000 + seed)
    model = GRPO(
        "MlpPolicy",
        env,
        reward_function=upright,
        group_by="action",
        horizon=horizon,
        n_steps=256,
        batch_size=64,
        n_epochs=10,
        learning_rate=3e-4,
        seed=seed,
        device="cpu",
    )
    returns, seconds = [], 0.0
    while model.num_timesteps < steps:
        start = time.perf_counter()
        model.learn(5_000, reset_num_timesteps=model.num_timesteps == 0)
        seconds += time.perf_counter() - start
        returns.append(float(evaluate_policy(model, eval_env, n_eval_episodes=20, warn=False)[0]))
    curve = " ".join(f"{value:6.1f}" for value in returns)
    simulated = model.num_timesteps + model.branch_steps
    print(f"{seed:4} {horizon:7} {curve}  {simulated:13,} {model.model_steps:11,} {seconds:7.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12, 13, 14])
    parser.add_argument("--horizon", nargs="+", type=int, default=[64])
    parser.add_argument("--source", nargs="+", choices=["model", "branches"], default=["model", "branches"])
    parser.add_argument("--steps", type=int, default=20_000)
    args = parser.parse_args()
    th.set_num_threads(1)
    find_transition = lookahead.find_transition
    for source in args.source:
        lookahead.find_transition = find_transition if source == "model" else lambda env_id: None
        marks = " ".join(f"{step // 1000:5}k" for step in range(5_000, args.steps + 1, 5_000))
        print(f"{source}\nseed horizon {marks} simulator steps model steps seconds")
        for horizon in args.horizon:
            for seed in args.seeds:
                run(seed, horizon, args.steps)


if __name__ == "__main__":
    main()
