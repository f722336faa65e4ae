"""
Steps per second of GRPO beside SB3's PPO and SBX's (`pip install sbx-rl`): same rollout, batch, epochs and network.

    python benchmarks/throughput.py [--algos ppo sbx grpo bound] [--env CartPole-v1 HalfCheetah-v5] [--rounds 5] [--threads 1]

The algorithms take turns, one process each and on as many cores as threads, so that a slow moment hits all of them; the table
holds medians. `bound` is the environments plus the policy's forward pass: no on-policy learner can be faster. `grpo-adam` is
GRPO with SB3's optimizer instead of the fused one, `grpo-compile` with the network through `torch.compile`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

N_ENVS, N_STEPS, BATCH_SIZE, N_EPOCHS = 8, 256, 256, 10
WARM_UP, MEASURED = 3, 10


def make_model(algo: str, env_id: str) -> Any:
    """
    :param algo: "ppo", "sbx", "grpo", "grpo-adam", "grpo-compile" or "bound"
    :param env_id: environment ID
    :return: an algorithm that is ready to learn
    """
    from stable_baselines3.common.env_util import make_vec_env

    if algo == "sbx":
        from sbx import PPO as Algorithm
    elif algo == "ppo":
        from stable_baselines3 import PPO as Algorithm
    else:
        from sb3_grpo_plugin import GRPO as Algorithm
    options = dict(n_steps=N_STEPS, batch_size=BATCH_SIZE, n_epochs=N_EPOCHS, seed=0, device="cpu")
    if algo == "grpo-adam":
        options["policy_kwargs"] = dict(optimizer_kwargs=dict(eps=1e-5))
    model = Algorithm("MlpPolicy", make_vec_env(env_id, N_ENVS, seed=0), **options)
    if algo == "grpo-compile":
        import torch as th

        model.policy.mlp_extractor.forward_actor = th.compile(model.policy.mlp_extractor.forward_actor)
    return model


def nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in the place of what the bound leaves out."""


def microseconds(model: Any, train: Callable, baseline: Callable | None, warm_up: int, measured: int) -> dict[str, float]:
    """
    :param model: on-policy, ready to learn
    :param train: its update
    :param baseline: what fills its buffer's advantages; ``None``: leave that alone
    :param warm_up: rollouts before the clock starts
    :param measured: rollouts on the clock
    :return: microseconds per step in all, in ``train`` and in ``baseline``; peak memory in MiB
    """
    import resource

    spent = {"train": 0.0, "baseline": 0.0}

    def timed(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            function(*args, **kwargs)
            spent[name] += time.perf_counter() - start

        return call

    model.train = timed("train", train)
    if baseline is not None:
        model.rollout_buffer.compute_returns_and_advantage = timed("baseline", baseline)
    rollout = model.n_envs * model.n_steps
    model.learn(warm_up * rollout)
    spent.update(train=0.0, baseline=0.0)
    start = time.perf_counter()
    model.learn(measured * rollout, reset_num_timesteps=False)
    total = time.perf_counter() - start
    per_step = {name: 1e6 * seconds / (measured * rollout) for name, seconds in (("total", total), *spent.items())}
    return {**per_step, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measure(algo: str, env_id: str, threads: int) -> dict[str, float]:
    """
    :param algo: see :func:`make_model`
    :param env_id: environment ID
    :param threads: of torch
    :return: see :func:`microseconds`
    """
    import torch as th

    # XLA takes as many threads as it has cores
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    th.set_num_threads(threads)
    model = make_model(algo, env_id)
    if algo == "bound":
        return microseconds(model, nothing, nothing, WARM_UP, MEASURED)
    baseline = model._compute_advantages if algo.startswith("grpo") else None
    return microseconds(model, model.train, baseline, WARM_UP, MEASURED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=["CartPole-v1", "HalfCheetah-v5"])
    parser.add_argument("--algos", nargs="+", default=["ppo", "grpo", "bound"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*args.child, args.threads)))
        return
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    print(f"{'env':16} {'algo':12} {'steps/s':>8} {'us/step':>8} {'train':>7} {'baseline':>8} {'MiB':>5} {'x PPO':>6}")
    for env_id in args.env:
        results: dict[str, list[dict[str, float]]] = {algo: [] for algo in args.algos}
        for _ in range(args.rounds):
            for algo in args.algos:
                command = [sys.executable, __file__, "--threads", str(args.threads), "--child", algo, env_id]
                output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
                results[algo].append(json.loads(output.splitlines()[-1]))
        for algo, rows in results.items():
            row = {name: statistics.median(one[name] for one in rows) for name in rows[0]}
            ratios = [ppo["total"] / own["total"] for ppo, own in zip(results.get("ppo", rows), rows, strict=True)]
            print(
                f"{env_id:16} {algo:12} {1e6 / row['total']:8,.0f} {row['total']:8.1f} {row['train']:7.1f} "
                f"{row['baseline']:8.1f} {row['memory']:5.0f} {statistics.median(ratios):6.2f}"
            )


if __name__ == "__main__":
    main()
