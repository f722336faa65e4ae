"""Environments and spaces as the API shows them. Imports no torch."""

import contextlib
import importlib
import json
import math
import re
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import yaml
from gymnasium import spaces

from sb3_grpo_plugin.rewards import nearest_name, registries
from sb3_grpo_plugin.zoo import default_config

RENDERABLE = "classic_control"
PROBE_SECONDS = 300


def join_registry() -> None:
    """Let packages register their environments: plugins, and ale-py, which leaves that to whoever imports it."""
    registries()
    with contextlib.suppress(ImportError):
        importlib.import_module("ale_py")


def describe(space: spaces.Space) -> dict[str, Any]:
    """
    :param space: of observations or actions
    :return: as JSON; bounds that differ between elements are lists, infinite ones null
    """
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": {key: describe(part) for key, part in space.spaces.items()}}
    if isinstance(space, spaces.Tuple):
        return {"type": "Tuple", "spaces": [describe(part) for part in space.spaces]}
    found: dict[str, Any] = {"type": type(space).__name__}
    if isinstance(space, spaces.Box):
        found |= {"low": bounds(space.low), "high": bounds(space.high)}
    elif isinstance(space, spaces.Discrete):
        found |= {"n": int(space.n), "start": int(space.start)}
    elif isinstance(space, spaces.MultiDiscrete):
        found |= {"nvec": space.nvec.tolist()}
    if space.shape is not None:
        found["shape"] = list(space.shape)
    if space.dtype is not None:
        found["dtype"] = str(space.dtype)
    return found


def bounds(values: Any) -> Any:
    """
    :param values: of one side of a box
    :return: one number when all are alike, else lists
    """
    flat = [float(value) if math.isfinite(value) else None for value in values.flat]
    if len(set(flat)) == 1:
        return flat[0]
    # Of images and the like nobody wants to see them all
    return flat if len(flat) <= 256 else None


def group_of(env_id: str) -> str:
    """
    :param env_id: registered
    :return: such as ``classic_control`` or ``mujoco``; for other packages the name of their module
    """
    entry = gym.registry[env_id].entry_point
    module = entry.partition(":")[0] if isinstance(entry, str) else getattr(entry, "__module__", "")
    match = re.match(r"gymnasium\.envs\.(\w+)", module)
    return match[1] if match else module.partition(".")[0]


@cache
def hyperparameters() -> dict[str, dict[str, Any]]:
    """
    :return: ``grpo.yml``: environment ID, ``atari`` or ``default`` -> settings
    """
    config = default_config("grpo")
    assert config is not None
    return yaml.safe_load(Path(config).read_text(encoding="utf-8"))


def settings_of(env_id: str) -> dict[str, Any]:
    """
    :param env_id: registered
    :return: its settings in ``grpo.yml``, chosen as the zoo does
    """
    table = hyperparameters()
    entry = "atari" if "AtariEnv" in str(gym.registry[env_id].entry_point) else "default"
    return table.get(env_id) or table[entry]


def check_environment(env_id: str, catalogue: "Catalogue") -> None:
    """
    :param env_id: as requested
    :param catalogue: what is known of environments
    :raises ValueError: it is not registered (with the nearest name), or cannot be made here
    """
    if env_id not in gym.registry:
        nearest = nearest_name(env_id, list(gym.registry))
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        raise ValueError(f"There is no environment {env_id!r}.{hint} GET /environments lists them.")
    problem = catalogue.problem(env_id)
    if problem is not None:
        raise ValueError(f"The environment {env_id!r} cannot be made here: {problem}")


class Catalogue:
    """
    What environments there are, and what came of making each of them once: in a process of its own, because some import
    large libraries and some print.
    """

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Any]] = {}
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Try them all, in the background."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sb3_grpo_plugin.api.environments"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        timer = threading.Timer(PROBE_SECONDS, self._process.kill)
        timer.daemon = True
        timer.start()

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    found = json.loads(line)
                    self._found[found["id"]] = found
        process.wait()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()

    def problem(self, env_id: str) -> str | None:
        """
        :param env_id: registered
        :return: why it cannot be made, ``None`` when it can or was not tried yet
        """
        return self._found.get(env_id, {}).get("problem")

    def list(self) -> list[dict[str, Any]]:
        """
        :return: all that can be made, or were not tried yet
        """
        return [
            {
                "id": env_id,
                "group": group_of(env_id),
                "renderable": group_of(env_id) == RENDERABLE,
                "tuned": env_id in hyperparameters(),
                "observation_space": self._found.get(env_id, {}).get("observation_space"),
                "action_space": self._found.get(env_id, {}).get("action_space"),
            }
            for env_id in sorted(gym.registry)
            if self.problem(env_id) is None
        ]


def probe(env_id: str) -> dict[str, Any]:
    """
    :param env_id: registered
    :return: its spaces, or why it cannot be made
    """
    try:
        env = gym.make(env_id)
        found: dict[str, Any] = {
            "id": env_id,
            "observation_space": describe(env.observation_space),
            "action_space": describe(env.action_space),
        }
        env.close()
    except Exception as error:
        return {"id": env_id, "problem": (str(error).strip() or repr(error)).splitlines()[0][:300]}
    for what in ("observation_space", "action_space"):
        kind = found[what]["type"]
        parts = found[what]["spaces"].values() if kind == "Dict" and what == "observation_space" else [found[what]]
        odd = [part["type"] for part in parts if part["type"] not in ("Box", "Discrete", "MultiDiscrete", "MultiBinary")]
        if odd:
            found["problem"] = f"Stable-Baselines3 has no policy for {odd[0]} in its {what.replace('_', ' ')}"
    return found


def main() -> None:
    """Print what came of each environment, a JSON object a line."""
    import os
    import warnings

    from sb3_grpo_plugin.api.worker import step_back
    from sb3_grpo_plugin.benchmark_run import leave_with_parent

    leave_with_parent()
    step_back()
    warnings.simplefilter("ignore")
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    join_registry()
    # What people use first comes first
    for env_id in sorted(gym.registry, key=lambda env_id: (env_id not in hyperparameters(), "/" in env_id, env_id)):
        out.write(json.dumps(probe(env_id)) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
