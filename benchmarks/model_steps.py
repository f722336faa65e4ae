"""
Model steps per second of the CartPole model: alone, and with a 64x64 tanh policy sampled at each step.

    python benchmarks/model_steps.py                     # one CPU thread, batch 16,384
    python benchmarks/model_steps.py --device cuda --batch 262144 4194304 [--compile]

Each number is the best of several repeats of a look-ahead of 32 steps: other programs on the machine only slow it down.
"""

import argparse
import platform
import time
from collections.abc import Callable

import torch as th
from sb3_grpo_rewards.models import cartpole
from torch import nn

HORIZON = 32
Step = Callable[[th.Tensor, th.Tensor], tuple[th.Tensor, th.Tensor]]


class SigmoidTanh(nn.Module):
    """tanh(x) as 2 sigmoid(2x) - 1, to within 2e-7: torch computes a sigmoid six times as fast on a CPU."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return (2 * x).sigmoid_().mul_(2).sub_(1)


def make_policy(device: str, activation: type[nn.Module]) -> nn.Module:
    """
    :param device: of the parameters
    :param activation: of the hidden layers
    :return: logits of both actions from states ``[B, 4]``, SB3's default network
    """
    layers = (nn.Linear(4, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 2))
    return nn.Sequential(*layers).to(device)


def model_alone(state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    :param state: ``[B, 4]``
    :param action: ``[B, 1]``
    :return: the next state and the same action
    """
    return cartpole(state, action)[0], action


def with_policy(policy: nn.Module) -> Step:
    """
    :param policy: logits from states
    :return: a step that samples the next action at the next state
    """

    def step(state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        next_state, _ = cartpole(state, action)
        logits = policy(next_state)
        # the largest of logits plus Gumbel noise is a sample of their softmax
        noise = th.empty_like(logits).exponential_().log_()
        return next_state, (logits - noise).argmax(dim=1, keepdim=True)

    return step


def steps_per_second(step: Step, batch_size: int, device: str, repeats: int) -> float:
    """
    :param step: from (state, action) to the next state and the next action
    :param batch_size: states side by side
    :param device: ``"cpu"`` or ``"cuda"``
    :param repeats: look-aheads to time after two to warm up
    :return: model steps per second of the fastest one
    """
    start = (th.rand(batch_size, 4, device=device) - 0.5) / 10
    first = th.randint(2, (batch_size, 1), device=device)
    best = float("inf")
    for repeat in range(repeats + 2):
        if device == "cuda":
            th.cuda.synchronize()
        begin = time.perf_counter()
        state, action = start, first
        for _ in range(HORIZON):
            state, action = step(state, action)
        if device == "cuda":
            th.cuda.synchronize()
        if repeat >= 2:
            best = min(best, time.perf_counter() - begin)
    return batch_size * HORIZON / best


def keep_freed_memory() -> None:
    """
    Freeing one block of just under 32 MiB teaches glibc to keep blocks up to that size. Otherwise every activation of a
    large batch is returned to the system and faulted in again, page by page: a third of the time. Elsewhere harmless.
    """
    th.empty(31 * 2**20, dtype=th.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, nargs="+", default=[16_384])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile both steps")
    args = parser.parse_args()
    th.set_num_threads(args.threads)
    th.manual_seed(0)
    keep_freed_memory()
    name = th.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU, {args.threads} thread(s)"
    print(f"{name}, torch {th.__version__}, Python {platform.python_version()}{', compiled' if args.compile else ''}")
    print("million model steps per second")
    print(f"{'batch':>10}  {'model alone':>12}  {'with policy':>12}  {'tanh by sigmoid':>16}")
    steps = [model_alone, *(with_policy(make_policy(args.device, activation)) for activation in (nn.Tanh, SigmoidTanh))]
    if args.compile:
        steps = [th.compile(step) for step in steps]
    with th.no_grad():
        for batch_size in args.batch:
            alone, policy, fast = (steps_per_second(step, batch_size, args.device, args.repeats) / 1e6 for step in steps)
            print(f"{batch_size:>10,}  {alone:>12.1f}  {policy:>12.2f}  {fast:>16.2f}")


if __name__ == "__main__":
    main()
