"""
What branching costs, per family: steps per second of branches beside those of the bare simulator, what it takes to make a
snapshot and a branch, memory, and growth with the number of candidates and the horizon.

"bare" steps one simulator without Monitor, TimeLimit and gymnasium's checkers; "training" steps it with them, as training
does. Branches go in lock-step with random actions; no policy is in these numbers. Each number is the median of the rounds,
which take turns. Usage: python benchmarks/branching.py [--rounds N] [--env ID ...] [--growth] [--physics]
"""

import argparse
import copy
import gc
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_grpo_plugin.branching import Brancher, BranchSimulator, Snapshot
from sb3_grpo_plugin.wrappers import SnapshotWrapper

ENVS = ("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "FrozenLake-v1", "Hopper-v5", "HalfCheetah-v5", "Humanoid-v5")
ENVS += ("PongNoFrameskip-v4", "LunarLander-v3")
BOX2D = ("LunarLander", "BipedalWalker", "CarRacing")
N_ENVS = 4


def bare(env_id: str) -> gym.Env:
    env = gym.make(env_id).unwrapped
    return AtariWrapper(env) if "NoFrameskip" in env_id else env


def training(env_id: str, vec_env_cls: type[VecEnv] = DummyVecEnv, n_envs: int = N_ENVS) -> VecEnv:
    layers: list[Callable[[gym.Env], gym.Env]] = [AtariWrapper] if "NoFrameskip" in env_id else []
    family = "replay" if env_id.startswith(BOX2D) else "auto"

    def wrap(env: gym.Env) -> gym.Env:
        for layer in layers:
            env = layer(env)
        return SnapshotWrapper(env, family)

    return make_vec_env(env_id, n_envs=n_envs, seed=0, wrapper_class=wrap, vec_env_cls=vec_env_cls, env_kwargs={})


def steps_per_second(env: gym.Env, n_steps: int) -> float:
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(n_steps)]
    env.reset(seed=0)
    begin = time.perf_counter()
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    return n_steps / (time.perf_counter() - begin)


def visit(env: VecEnv, brancher: Brancher, n_steps: int) -> tuple[list[Snapshot], float]:
    """Random play; a snapshot per step and environment, and the seconds that one takes."""
    env.reset()
    env.action_space.seed(0)
    snapshots, spent = [], 0.0
    for _ in range(n_steps):
        begin = time.perf_counter()
        snapshots += brancher.snapshot()
        spent += time.perf_counter() - begin
        env.step(np.array([env.action_space.sample() for _ in range(env.num_envs)]))
    return snapshots, spent / len(snapshots)


def follow(simulator: BranchSimulator, space: gym.Space, horizon: int) -> float:
    """Seconds per simulator step of branches that act at random."""
    batches = [np.array([space.sample() for _ in range(simulator.n_branches)]) for _ in range(horizon)]
    before = simulator.n_steps
    begin = time.perf_counter()
    for actions in batches:
        simulator.step(actions)
    return (time.perf_counter() - begin) / (simulator.n_steps - before)


def family_row(env_id: str, n_states: int, candidates: int, horizon: int, rounds: int) -> str:
    env = training(env_id)
    brancher = Brancher(env)
    visit(env, brancher, 2)
    alone = bare(env_id)
    member = training(env_id, n_envs=1).envs[0].env
    n_steps = max(200, min(4000, int(0.3 * steps_per_second(alone, 100))))
    numbers: dict[str, list[float]] = {name: [] for name in ("bare", "training", "snapshot", "branch", "step", "replayed")}
    for _ in range(rounds):
        numbers["bare"].append(steps_per_second(alone, n_steps))
        numbers["training"].append(steps_per_second(member, n_steps))
        snapshots, seconds = visit(env, brancher, n_states // N_ENVS)
        numbers["snapshot"].append(seconds * 1e6)
        begin = time.perf_counter()
        simulator = brancher.simulate([snapshot for snapshot in snapshots for _ in range(candidates)])
        numbers["branch"].append((time.perf_counter() - begin) / simulator.n_branches * 1e6)
        numbers["replayed"].append(simulator.n_steps / simulator.n_branches)
        numbers["step"].append(1 / follow(simulator, env.action_space, horizon))
        del simulator, snapshots
    value = {name: statistics.median(numbers[name]) for name in numbers}
    return (
        f"| {env_id} | {brancher.families[0]} | {value['bare']:,.0f} | {value['training']:,.0f} | {value['step']:,.0f} "
        f"({value['step'] / value['bare']:.0%}) | {value['snapshot']:.0f} | {value['branch']:.0f} | {value['replayed']:.0f} "
        f"| {deepcopy_microseconds(alone)} | {memory(env, brancher, n_states, candidates)} |"
    )


def deepcopy_microseconds(env: gym.Env) -> str:
    try:
        begin = time.perf_counter()
        for _ in range(50):
            copy.deepcopy(env)
        return f"{(time.perf_counter() - begin) / 50 * 1e6:.0f}"
    except Exception as error:
        return type(error).__name__


def memory(env: VecEnv, brancher: Brancher, n_states: int, candidates: int) -> str:
    """Kilobytes per snapshot and per branch that Python and numpy allocate (emulators and Box2D worlds do not count)."""
    gc.collect()
    tracemalloc.start()
    snapshots, _ = visit(env, brancher, n_states // N_ENVS)
    kept, _ = tracemalloc.get_traced_memory()
    simulator = brancher.simulate([snapshot for snapshot in snapshots for _ in range(candidates)])
    made, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return f"{kept / len(snapshots) / 1024:.1f} | {(made - kept) / simulator.n_branches / 1024:.1f}"


def growth(env_id: str, n_states: int) -> None:
    print(f"\n{env_id}, {n_states} states: seconds per rollout of look-ahead (microseconds per simulator step)\n")
    horizons = (1, 4, 16, 64)
    print("| candidates | " + " | ".join(f"horizon {horizon}" for horizon in horizons) + " |")
    print("|---" * (len(horizons) + 1) + "|")
    env = training(env_id)
    brancher = Brancher(env)
    snapshots, _ = visit(env, brancher, n_states // N_ENVS)
    for candidates in (2, 4, 8, 16):
        cells = []
        for horizon in horizons:
            begin = time.perf_counter()
            simulator = brancher.simulate([snapshot for snapshot in snapshots for _ in range(candidates)])
            simulator_seconds = time.perf_counter() - begin
            seconds = simulator_seconds + follow(simulator, env.action_space, horizon) * simulator.n_steps
            cells.append(f"{seconds:.2f} ({seconds / simulator.n_steps * 1e6:.1f})")
        print(f"| {candidates} | " + " | ".join(cells) + " |")


def processes(env_id: str, n_states: int, candidates: int, horizon: int) -> None:
    print(f"\n{env_id}, {n_states} states x {candidates} candidates, horizon {horizon}: branch steps per second\n")
    for vec_env_cls in (DummyVecEnv, SubprocVecEnv):
        env = training(env_id, vec_env_cls, n_envs=2)
        brancher = Brancher(env)
        snapshots, seconds = visit(env, brancher, n_states // 2)
        simulator = brancher.simulate([snapshot for snapshot in snapshots for _ in range(candidates)])
        rate = 1 / follow(simulator, env.action_space, horizon)
        print(f"- {vec_env_cls.__name__}, 2 environments: {rate:,.0f}; a snapshot takes {seconds * 1e6:.0f} us")
        env.close()


def physics(env_id: str, n_states: int) -> None:
    """MuJoCo alone: states taking turns in one MjData, against mujoco.rollout on a pool of threads."""
    import mujoco
    from mujoco import rollout

    env = gym.make(env_id).unwrapped
    env.reset(seed=0)
    model, frame_skip = env.model, env.frame_skip
    full = mujoco.mjtState.mjSTATE_FULLPHYSICS
    state = np.empty(mujoco.mj_stateSize(model, full))
    mujoco.mj_getState(model, env.data, state, full)
    states = np.tile(state, (n_states, 1))
    controls = np.random.default_rng(0).uniform(-1, 1, (n_states, 1, model.nu))
    data = mujoco.MjData(model)
    begin = time.perf_counter()
    for row in range(n_states):
        mujoco.mj_setState(model, data, states[row], full)
        data.ctrl[:] = controls[row, 0]
        mujoco.mj_step(model, data, frame_skip)
        mujoco.mj_getState(model, data, state, full)
    cells = [f"taking turns {n_states / (time.perf_counter() - begin):,.0f}"]
    for threads in (1, 2):
        pool = [mujoco.MjData(model) for _ in range(threads)]
        begin = time.perf_counter()
        rollout.rollout(model, pool, states, np.repeat(controls, frame_skip, axis=1))
        cells.append(f"mujoco.rollout with {threads} thread(s) {n_states / (time.perf_counter() - begin):,.0f}")
    print(f"- {env_id}: {', '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--env", nargs="*", default=ENVS)
    parser.add_argument("--states", type=int, default=256)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--horizon", type=int, default=8)
    parser.add_argument("--growth", action="store_true", help="growth with candidates and horizon, and worker processes")
    parser.add_argument("--physics", action="store_true", help="MuJoCo's physics alone, against mujoco.rollout")
    args = parser.parse_args()
    th.set_num_threads(1)
    try:
        import ale_py

        gym.register_envs(ale_py)
    except ImportError:
        args.env = [env_id for env_id in args.env if "NoFrameskip" not in env_id]
    os.chdir(tempfile.mkdtemp())  # MuJoCo writes a log file into the working folder
    if args.growth:
        for env_id in ("CartPole-v1", "HalfCheetah-v5"):
            growth(env_id, 64)
        for env_id in ("CartPole-v1", "HalfCheetah-v5"):
            processes(env_id, args.states, args.candidates, args.horizon)
    if args.physics:
        print("\nMuJoCo's physics alone, environment steps per second\n")
        for env_id in ("Hopper-v5", "HalfCheetah-v5", "Humanoid-v5"):
            physics(env_id, 2000)
    if args.growth or args.physics:
        return
    print(f"{args.states} states x {args.candidates} candidates, horizon {args.horizon}, {args.rounds} rounds\n")
    print(
        "| environment | family | bare steps/s | training steps/s | branch steps/s (of bare) | snapshot us | branch us ",
        end="",
    )
    print("| steps replayed per branch | copy.deepcopy us | KiB per snapshot | KiB per branch |")
    print("|---" * 11 + "|")
    for env_id in args.env:
        print(family_row(env_id, args.states, args.candidates, args.horizon, args.rounds), flush=True)


if __name__ == "__main__":
    main()
