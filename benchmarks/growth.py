"""
How time per environment step and peak memory grow with `n_envs`, observation size, `group_size` and `horizon`.

    python benchmarks/growth.py [--threads 1]

State groups in an environment that does nothing but hand out random numbers; action groups in Pendulum-v1 with the reward
pack's reward and transition model. A process per row. `groups` is the time for advantages, `update` that of the gradient
steps; `order` is the slope of log(groups) against log(value) between the last two rows: 1 is linear.
"""

import argparse
import json
import math
import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from throughput import microseconds

from sb3_grpo_plugin import GRPO

STEPS = {"n_envs": (8, 16, 32, 64, 128), "observation": (4, 16, 64, 256, 1024)}
CANDIDATES = {"group_size": (4, 8, 16, 32, 64), "horizon": (8, 16, 32, 64, 128)}
N_STEPS, WARM_UP, MEASURED = 256, 2, 3


class Noise(gym.Env):
    """
    Random observations and rewards, episodes of 50 steps.

    :param size: of an observation
    """

    def __init__(self, size: int) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def _observe(self) -> np.ndarray:
        return self.np_random.standard_normal(self.observation_space.shape, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.time = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.time += 1
        return self._observe(), float(self.np_random.random()), self.time == 50, False, {}


def make_model(name: str, value: int) -> GRPO:
    """
    :param name: what grows
    :param value: how large it is
    :return: an algorithm that is ready to learn
    """
    common = dict(n_steps=N_STEPS, batch_size=256, n_epochs=10, seed=0, device="cpu")
    if name in STEPS:
        given = {"n_envs": 8, "observation": 16, name: value}
        return GRPO("MlpPolicy", make_vec_env(lambda: Noise(given["observation"]), given["n_envs"], seed=0), **common)
    given = {"group_size": 8, "horizon": 16, name: value}
    return GRPO("MlpPolicy", make_vec_env("Pendulum-v1", seed=0), group_by="action", reward_function="auto", **given, **common)


def measure(name: str, value: int, threads: int) -> dict[str, float]:
    """
    :param name: what grows
    :param value: how large it is
    :param threads: of torch
    :return: see ``throughput.microseconds``; the baseline is the groups
    """
    th.set_num_threads(threads)
    model = make_model(name, value)
    return microseconds(model, model.train, model._compute_advantages, WARM_UP, MEASURED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child[0], int(args.child[1]), args.threads)))
        return
    print(f"{'':12} {'value':>6} {'groups, us/step':>15} {'update, us/step':>15} {'peak MiB':>9} {'order':>6}")
    for name, values in {**STEPS, **CANDIDATES}.items():
        earlier = None
        for value in values:
            command = [sys.executable, __file__, "--threads", str(args.threads), "--child", name, str(value)]
            row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
            # Time per rollout: more environments make a rollout longer
            cost = row["baseline"] * (value if name == "n_envs" else 1)
            order = "" if earlier is None else f"{math.log(cost / earlier[1]) / math.log(value / earlier[0]):6.2f}"
            print(
                f"{name:12} {value:6} {row['baseline']:15.1f} {row['train']:15.1f} {row['memory']:9.0f} {order:>6}", flush=True
            )
            earlier = value, cost


if __name__ == "__main__":
    main()
