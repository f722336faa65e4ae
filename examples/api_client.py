"""
Train over HTTP, watch, and use the agent: a client of `sb3-grpo serve` that needs nothing but Python.

    sb3-grpo serve &
    python examples/api_client.py --env CartPole-v1 --steps 20000

The key of a server that asks for one is read from SB3_GRPO_API_KEY.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen


class Client:
    """
    :param url: of the server
    :param key: its API key, empty for a server without one
    """

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url.rstrip("/")
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"

    def open(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """
        :param method: of HTTP
        :param path: begins with a slash
        :param body: is sent as JSON
        :return: the answer, to be read
        :raises SystemExit: the server refused; says what it said
        """
        data = None if body is None else json.dumps(body).encode()
        try:
            return urlopen(Request(self.url + path, data, self.headers, method=method), timeout=60)
        except HTTPError as error:
            sys.exit(f"{method} {path}: {error.code} {json.load(error)['detail']}")

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """
        :param method: of HTTP
        :param path: begins with a slash
        :param body: is sent as JSON
        :return: the answer's JSON
        """
        with self.open(method, path, body) as answer:
            return json.load(answer)

    def events(self, path: str) -> Iterator[tuple[str, Any]]:
        """
        :param path: of a stream of server-sent events
        :return: name and data of each, until the stream ends
        """
        name = ""
        with self.open("GET", path) as stream:
            for line in stream:
                field, _, value = line.decode().rstrip("\r\n").partition(": ")
                if field == "event":
                    name = value
                elif field == "data":
                    yield name, json.loads(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an agent through the web API and ask it for actions.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--reward", help="a name that GET /rewards lists (default: the environment's own)")
    args = parser.parse_args()
    client = Client(args.url, os.environ.get("SB3_GRPO_API_KEY", ""))

    request = {"env_name": args.env, "total_timesteps": args.steps, "reward_function_type": args.reward}
    job = client.call("POST", "/train", request)["job_id"]
    print(f"job {job}")

    # The stream also ends when the server is restarted; the status says whether the job has
    status = client.call("GET", f"/training/{job}/status")
    while status["status"] in ("queued", "running", "stopping"):
        for name, event in client.events(f"/training/{job}/events"):
            if name == "point" and event["episode_reward"] is not None:
                print(f"{event['timesteps']:>9,} steps  episode reward {event['episode_reward']:8.1f}")
        time.sleep(0.5)
        status = client.call("GET", f"/training/{job}/status")
    print(f"{status['status']} after {status['current_timesteps']:,} steps")
    if status["error_message"]:
        sys.exit(status["error_message"])

    model = client.call("GET", f"/models/{status['model_name']}")
    print(f"model {model['name']}, {model['size']:,} bytes, SHA-256 {model['sha256'][:12]}...")
    shape = model["observation_space"].get("shape")
    if model["observation_space"]["type"] == "Box" and len(shape) == 1:
        answer = client.call("POST", "/inference", {"model_name": model["name"], "observation": [0.0] * shape[0]})
        print(f"action {answer['action']}, probabilities {answer['action_probs']}")


if __name__ == "__main__":
    main()
