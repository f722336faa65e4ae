"""
Time until action groups with the reward pack's rewards and transition models solve a task, and what that time consists of.

    python benchmarks/solve.py [--env CartPole-v1 Pendulum-v1 Acrobot-v1] [--device cpu cuda] [--seeds 10 11 12]
    python benchmarks/solve.py --device cuda --group-size 16 --n-envs 16

Solved: 20 deterministic episodes reach the goal on average, looked at every 1,000 steps; looking is not counted. `groups` is
the share of the time that following the candidates took. `GPU` is the share in which a kernel ran, over two more rollouts.
"""

import argparse
import time
from typing import Any

import torch as th
import yaml
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_grpo_plugin import GRPO

GOALS = {"CartPole-v1": 475.0, "Pendulum-v1": -200.0, "Acrobot-v1": -100.0}
SETTINGS = "docs/benchmark/grpo-actions.yml"
MOST_STEPS = 40_000


class TimedGRPO(GRPO):
    """
    GRPO with a clock on its groups.

    :ivar group_seconds: spent on advantages so far
    """

    group_seconds = 0.0

    def _compute_advantages(self, **kwargs: Any) -> None:
        start = time.perf_counter()
        super()._compute_advantages(**kwargs)
        self.group_seconds += time.perf_counter() - start


def gpu_share(model: GRPO) -> float:
    """
    :param model: on a GPU
    :return: the share of two rollouts and their updates in which a kernel ran
    """
    with th.profiler.profile(activities=[th.profiler.ProfilerActivity.CUDA]) as profile:
        start = time.perf_counter()
        model.learn(2 * model.n_steps * model.n_envs, reset_num_timesteps=False)
        th.cuda.synchronize()
        seconds = time.perf_counter() - start
    return sum(event.self_device_time_total for event in profile.key_averages()) * 1e-6 / seconds


def solve(env_id: str, seed: int, device: str, changes: dict[str, Any]) -> None:
    """
    :param env_id: the task
    :param seed: of the run
    :param device: of policy and model
    :param changes: to the settings
    """
    with open(SETTINGS, encoding="utf-8") as file:
        entries = yaml.safe_load(file)
    settings = {**entries.get(env_id, entries["default"]), **changes}
    n_envs, _ = settings.pop("n_envs"), settings.pop("n_timesteps")
    env, eval_env = make_vec_env(env_id, n_envs, seed=seed), make_vec_env(env_id, 20, seed=10_000 + seed)
    model = TimedGRPO(env=env, seed=seed, device=device, **settings)
    seconds, score = 0.0, float("-inf")
    while score < GOALS[env_id] and model.num_timesteps < MOST_STEPS:
        start = time.perf_counter()
        model.learn(1_000, reset_num_timesteps=model.num_timesteps == 0)
        seconds += time.perf_counter() - start
        score = float(evaluate_policy(model, eval_env, n_eval_episodes=20)[0])
    share = f"{gpu_share(model):5.0%}" if device != "cpu" else "    -"
    print(
        f"{env_id:12} {device:6} {seed:4} {score:8.1f} {model.num_timesteps:7,} {model.model_steps:12,} {seconds:8.1f} "
        f"{model.group_seconds / seconds:6.0%} {share}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--device", nargs="+", default=["cpu"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12])
    parser.add_argument("--n-envs", type=int)
    parser.add_argument("--group-size", type=int)
    args = parser.parse_args()
    th.set_num_threads(1)
    given = {"n_envs": args.n_envs, "group_size": args.group_size}
    changes = {name: value for name, value in given.items() if value is not None}
    print(f"torch {th.__version__}", th.cuda.get_device_name() if th.cuda.is_available() else "no GPU", sep=", ")
    print("task         device seed    score   steps  model steps  seconds groups   GPU")
    for env_id in args.env:
        for device in args.device:
            for seed in args.seeds:
                solve(env_id, seed, device, changes)


if __name__ == "__main__":
    main()
