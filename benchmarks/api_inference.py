"""
Latency of POST /inference on loopback beside ``model.predict`` in process, with and without a training beside it.

    python benchmarks/api_inference.py [--env CartPole-v1] [--requests 3000]
"""

import argparse
import asyncio
import io
import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import psutil
from api_server import Server, running

CLIENTS = (1, 10, 50)


def request(path: str, body: Any) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    return head.encode() + b"\r\n" + data


async def one_client(port: int, message: bytes, count: int, seconds: list[float]) -> int:
    """Send ``count`` requests one after the other on one connection; return how many failed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    failed = 0
    for _ in range(count):
        start = time.perf_counter()
        writer.write(message)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.partition(b":")[2]))
        seconds.append(time.perf_counter() - start)
        failed += not head.startswith(b"HTTP/1.1 200")
    writer.close()
    return failed


def measure(port: int, message: bytes, clients: int, count: int) -> dict[str, float]:
    """``count`` requests, shared by ``clients``."""

    async def all_clients(each: int) -> tuple[list[float], int, float]:
        seconds: list[float] = []
        start = time.perf_counter()
        failed = sum(await asyncio.gather(*(one_client(port, message, each, seconds) for _ in range(clients))))
        return seconds, failed, time.perf_counter() - start

    asyncio.run(all_clients(max(1, 200 // clients)))
    seconds, failed, wall = asyncio.run(all_clients(count // clients))
    return {
        "median": float(np.median(seconds)) * 1e3,
        "p99": float(np.percentile(seconds, 99)) * 1e3,
        "per_second": len(seconds) / wall,
        "failed": failed,
    }


def in_process(data: bytes, observation: Any, count: int) -> dict[str, float]:
    """The same prediction without a server; run in a process of its own, as the server's is."""
    import torch as th

    from sb3_grpo_plugin.api.inference import Agent
    from sb3_grpo_plugin.grpo import GRPO

    th.set_num_threads(1)
    model = GRPO.load(io.BytesIO(data), device="cpu")
    agent = Agent(data)
    array = np.array(observation, dtype=np.float32)
    found = {}
    for name, call in (
        ("predict", lambda: model.predict(array, deterministic=True)),
        ("agent", lambda: agent.predict([observation], True)),
    ):
        seconds = []
        for _ in range(count + 200):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        found[name] = float(np.median(seconds[200:])) * 1e3
        found[name + "_p99"] = float(np.percentile(seconds[200:], 99)) * 1e3
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--in-process", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        path, observation = args.in_process
        with open(path, "rb") as file:
            print(json.dumps(in_process(file.read(), json.loads(observation), args.requests)))
        return
    with running(SB3_GRPO_RATE_LIMIT="0") as server:
        measure_all(server, args.env, args.requests)


def measure_all(server: Server, env_id: str, count: int) -> None:
    job = server.wait(server.train(env_name=env_id, total_timesteps=2000, model_name="measured"))
    assert job["status"] == "completed", job
    info = server.call("GET", "/models/measured")[1]
    observation = np.zeros(info["observation_space"]["shape"]).tolist()
    path = server.folder / "models" / f"{info['sha256']}.zip"
    alone = json.loads(
        subprocess.run(
            [sys.executable, __file__, "--requests", str(count), "--in-process", str(path), json.dumps(observation)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ).stdout
    )
    print(f"{env_id}, {os.cpu_count()} cores, {count} requests each; milliseconds")
    print(f"model.predict in process: median {alone['predict']:.2f}, p99 {alone['predict_p99']:.2f}")
    print(f"the server's prediction in process: median {alone['agent']:.2f}, p99 {alone['agent_p99']:.2f}")
    bare = measure(server.port, request("/", None), 1, count)
    print(f"GET / (HTTP, guard, routing, answer): median {bare['median']:.2f}, p99 {bare['p99']:.2f}")
    body = {"model_name": "measured", "observation": observation}
    refused = measure(server.port, request("/inference", {**body, "model_name": "-"}), 1, count)
    print(f"POST /inference refused by validation: median {refused['median']:.2f}, p99 {refused['p99']:.2f}")
    message = request("/inference", body)
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    # The first prediction loads the model
    measure(server.port, message, 1, 1)
    for what, sent in (("GET /", request("/", None)), ("POST /inference", message)):
        before = sum(process.cpu_times()[:2])
        measure(server.port, sent, 1, count)
        used = sum(process.cpu_times()[:2]) - before
        # `measure` begins with 200 that do not count
        print(f"processor time of the server per {what}: {used / (count + 200) * 1e3:.2f}")
    quiet = {clients: measure(server.port, message, clients, count) for clients in CLIENTS}
    training = server.train(env_name=env_id, total_timesteps=10_000_000)
    while server.call("GET", f"/training/{training}/status")[1]["current_timesteps"] < 5000:
        time.sleep(0.5)
    beside = {clients: measure(server.port, message, clients, count) for clients in CLIENTS}
    server.call("POST", f"/training/{training}/stop")
    server.wait(training)
    columns = "median | p99 | requests/s | failed"
    print(f"| clients | {columns} | beside a training: {columns} | p99 ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for clients in CLIENTS:
        a, b = quiet[clients], beside[clients]
        print(
            f"| {clients} | {a['median']:.2f} | {a['p99']:.2f} | {a['per_second']:.0f} | {a['failed']} | {b['median']:.2f} | "
            f"{b['p99']:.2f} | {b['per_second']:.0f} | {b['failed']} | {b['p99'] / a['p99']:.1f} |"
        )
    print(f"added to the median at 1 client: {quiet[1]['median'] - alone['predict']:.2f} ms")


if __name__ == "__main__":
    main()
