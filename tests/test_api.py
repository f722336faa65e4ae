"""The web API as its clients see it: a real server that trains for real."""

import http.client
import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra [api]")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from api_server import Server, running  # noqa: E402

pytestmark = pytest.mark.slow

# CartPole-v1 in grpo.yml has 8 environments
SHORT = {"env_name": "CartPole-v1", "total_timesteps": 1024, "n_steps": 32}
ENDLESS = {"env_name": "CartPole-v1", "total_timesteps": 10_000_000, "n_steps": 32}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(SB3_GRPO_WORKERS="2", SB3_GRPO_QUEUE_LIMIT="5", SB3_GRPO_CHECKPOINT_SECONDS="1") as server:
        yield server


@pytest.fixture(scope="module")
def trained(server: Server) -> dict[str, Any]:
    """The status of a finished job whose model is called ``trained``."""
    return server.wait(server.train(**SHORT, model_name="trained", reward_function_type=None))


@pytest.fixture(scope="module")
def normalized(server: Server) -> dict[str, Any]:
    """The status of a finished job on an environment that grpo.yml normalizes."""
    return server.wait(
        server.train(env_name="MountainCarContinuous-v0", total_timesteps=256, n_steps=64, model_name="normalized")
    )


def download(server: Server, name: str) -> bytes:
    status, data = server.call("GET", f"/models/{name}/download")
    assert status == 200
    return data


def test_the_contract_of_old_clients(server: Server) -> None:
    assert server.call("GET", "/")[0] == 200
    order = {
        "env_name": "CartPole-v1",
        "total_timesteps": 512,
        "model_name": "all_fields",
        "learning_rate": 0.001,
        "n_steps": 16,
        "batch_size": 32,
        "n_epochs": 2,
        "reward_function_type": "classic/cartpole-upright",
    }
    status, answer = server.call("POST", "/train", order)
    assert (status, set(answer)) == (202, {"job_id", "message"})
    job = server.wait(answer["job_id"])
    assert job["status"] == "completed", job
    assert {
        "job_id",
        "status",
        "progress",
        "current_timesteps",
        "total_timesteps",
        "start_time",
        "end_time",
        "error_message",
        "metrics",
    } <= set(job)
    assert (job["progress"], job["total_timesteps"], job["error_message"]) == (1.0, 512, None)
    status, answer = server.call("POST", "/inference", {"model_name": "all_fields", "observation": [0.1, 0.0, 0.05, 0.0]})
    assert (status, set(answer)) == (200, {"action", "action_probs", "value"})
    assert answer["action"] in (0, 1) and answer["value"] is None
    assert np.argmax(answer["action_probs"]) == answer["action"] and abs(sum(answer["action_probs"]) - 1) < 1e-5
    assert "all_fields" in [model["name"] for model in server.call("GET", "/models")[1]["models"]]
    assert server.call("GET", "/training/jobs")[1]["total"] >= 1
    # The hyperparameters reached the algorithm
    from sb3_grpo_plugin.grpo import GRPO

    model = GRPO.load(io.BytesIO(download(server, "all_fields")), device="cpu")
    assert (model.n_steps, model.batch_size, model.n_epochs, model.n_envs) == (16, 32, 2, 8)
    assert model.lr_schedule(0.5) == 0.001 and model.reward_function == "classic/cartpole-upright"
    assert server.call("DELETE", "/models/all_fields")[0] == 200
    assert server.call("GET", "/models/all_fields")[0] == 404
    assert server.call("POST", "/inference", {"model_name": "all_fields", "observation": [0, 0, 0, 0]})[0] == 404
    assert not any(server.folder.glob("models/*.part"))


def test_hyperparameters_come_from_grpo_yml(server: Server, trained: dict[str, Any]) -> None:
    from sb3_grpo_plugin.grpo import GRPO

    model = GRPO.load(io.BytesIO(download(server, "trained")), device="cpu")
    assert (model.n_envs, model.batch_size, model.n_epochs, model.gamma) == (8, 256, 20, 0.98)
    # lin_0.001
    assert model.lr_schedule(0.5) == pytest.approx(0.0005)


def test_metrics_and_curve(server: Server, trained: dict[str, Any]) -> None:
    metrics = trained["metrics"]
    assert {"episode_reward", "episode_length", "fps", "frac_reward_zero_std", "reward_std", "explained_variance"} <= set(
        metrics
    )
    assert metrics["episode_reward"] > 5 and metrics["fps"] > 0
    curve = server.call("GET", f"/training/{trained['job_id']}/curve")[1]
    assert curve["timesteps"] == [256, 512, 768, 1024]
    assert {len(values) for values in curve.values()} == {4}
    assert curve["episode_reward"][-1] == metrics["episode_reward"]


def read_events(server: Server, job_id: str) -> list[tuple[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", f"/training/{job_id}/events")
    response = connection.getresponse()
    assert response.headers.get_content_type() == "text/event-stream"
    found = []
    for block in response.read().decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def test_events_follow_a_job_to_its_end(server: Server) -> None:
    job_id = server.train(**SHORT)
    events = read_events(server, job_id)
    kinds = [kind for kind, _ in events]
    assert kinds[-1] == "end" and kinds.count("end") == 1
    points = [content["timesteps"] for kind, content in events if kind == "point"]
    assert points == [256, 512, 768, 1024]
    statuses = [content["status"] for kind, content in events if kind == "status"]
    assert statuses[-1] == "completed" and statuses == sorted(statuses, key=["queued", "running", "completed"].index)
    assert events[-2][1] == server.call("GET", f"/training/{job_id}/status")[1]


def test_inference_is_the_models_own_prediction(server: Server, trained: dict[str, Any]) -> None:
    from sb3_grpo_plugin.grpo import GRPO

    model = GRPO.load(io.BytesIO(download(server, "trained")), device="cpu")
    observations = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    expected = model.predict(observations, deterministic=True)[0].tolist()
    status, answer = server.call("POST", "/inference/batch", {"model_name": "trained", "observations": observations.tolist()})
    assert status == 200 and answer["actions"] == expected and np.shape(answer["action_probs"]) == (32, 2)
    for observation, action in zip(observations[:4].tolist(), expected, strict=False):
        assert server.call("POST", "/inference", {"model_name": "trained", "observation": observation})[1]["action"] == action
    drawn = [
        server.call("POST", "/inference", {"model_name": "trained", "observation": [0, 0, 0, 0], "deterministic": False})[1][
            "action"
        ]
        for _ in range(40)
    ]
    assert set(drawn) == {0, 1}


def test_inference_normalizes_as_training_did(server: Server, normalized: dict[str, Any], tmp_path: Path) -> None:
    import gymnasium as gym
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    from sb3_grpo_plugin.grpo import GRPO

    assert normalized["status"] == "completed", normalized
    data = download(server, "normalized")
    model = GRPO.load(io.BytesIO(data), device="cpu")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extract("vecnormalize.pkl", tmp_path)
    env = VecNormalize.load(str(tmp_path / "vecnormalize.pkl"), DummyVecEnv([lambda: gym.make("MountainCarContinuous-v0")]))
    observation = np.array([[-0.9, 0.03]], dtype=np.float32)
    expected = model.predict(env.normalize_obs(observation), deterministic=True)[0][0]
    answer = server.call("POST", "/inference", {"model_name": "normalized", "observation": observation[0].tolist()})[1]
    assert answer["action"] == pytest.approx(expected.tolist()) and answer["action_probs"] is None
    assert answer["action"] != pytest.approx(model.predict(observation, deterministic=True)[0][0].tolist())


def test_rollout_shows_classic_control(server: Server, trained: dict[str, Any], normalized: dict[str, Any]) -> None:
    import base64

    from PIL import Image

    answer = server.call("GET", "/models/trained/rollout?seed=3&max_steps=20")[1]
    assert set(answer) == {"frames", "rewards", "return", "fps", "terminated"}
    assert len(answer["frames"]) == len(answer["rewards"]) + 1 and answer["return"] == sum(answer["rewards"]) > 0
    assert Image.open(io.BytesIO(base64.b64decode(answer["frames"][0]))).format == "JPEG"
    assert server.call("GET", "/models/trained/rollout?seed=3&max_steps=20")[1] == answer
    assert len(server.call("GET", "/models/normalized/rollout?max_steps=5")[1]["rewards"]) == 5


def test_stop_keeps_the_model_so_far(server: Server) -> None:
    job_id = server.train(**ENDLESS, model_name="stopped")
    for kind, content in iterate_events(server, job_id):
        if kind == "point" and content["timesteps"] >= 1024:
            break
    status, answer = server.call("POST", f"/training/{job_id}/stop")
    assert status == 200 and answer["status"] == "stopping"
    before = server.call("GET", f"/training/{job_id}/status")[1]["current_timesteps"]
    job = server.wait(job_id, 30)
    assert job["status"] == "stopped" and job["end_time"] is not None and job["progress"] < 1
    # What was told is at most half a second old, so some rollouts may lie between
    assert before <= job["current_timesteps"] < 1_000_000
    model = server.call("GET", "/models/stopped")[1]
    assert model["total_timesteps"] == job["current_timesteps"] >= 1024
    assert server.call("POST", "/inference", {"model_name": "stopped", "observation": [0, 0, 0, 0]})[0] == 200
    assert server.call("POST", f"/training/{job_id}/stop")[0] == 409


def iterate_events(server: Server, job_id: str) -> Iterator[tuple[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", f"/training/{job_id}/events")
    with connection.getresponse() as response:
        kind = ""
        for line in response:
            name, _, text = line.decode().strip().partition(": ")
            if name == "event":
                kind = text
            elif name == "data":
                yield kind, json.loads(text)


def test_queue_its_limit_and_names(server: Server) -> None:
    """Two workers, five may wait."""
    jobs = [server.train(**ENDLESS, model_name=f"queue{number}") for number in range(2)]
    while server.call("GET", "/health")[1]["queue"]["running"] < 2:
        pass
    jobs += [server.train(**ENDLESS, model_name=f"queue{number}") for number in range(2, 7)]
    status, answer = server.call("POST", "/train", ENDLESS)
    assert status == 429 and "5 jobs wait" in answer["detail"]
    status, answer = server.call("POST", f"/training/{jobs[-1]}/stop")
    assert status == 200 and answer["status"] == "stopped"
    status, answer = server.call("POST", "/train", {**ENDLESS, "model_name": "queue3"})
    assert status == 409 and jobs[3] in answer["detail"]
    for job_id in reversed(jobs[:-1]):
        assert server.call("POST", f"/training/{job_id}/stop")[0] == 200
    assert {server.wait(job_id, 60)["status"] for job_id in jobs} == {"stopped"}
    # Those that waited never ran
    assert all(server.call("GET", f"/training/{job_id}/status")[1]["start_time"] is None for job_id in jobs[2:])


def test_wrong_orders_are_explained(server: Server, trained: dict[str, Any]) -> None:
    def ask(**order: Any) -> tuple[int, str]:
        status, answer = server.call("POST", "/train", order)
        return status, str(answer["detail"])

    status, text = ask(env_name="CartPole-v2")
    assert status == 400 and "Did you mean 'CartPole-v1'" in text
    status, text = ask(env_name="CartPole-v1", reward_function_type="classic/cartpole-uprigth")
    assert status == 400 and "Did you mean 'classic/cartpole-upright'" in text
    status, text = ask(env_name="CartPole-v1", reward_function_type="classic/pendulum-swing-up")
    assert status == 400
    assert ask(env_name="os:CartPole-v1")[0] == 422
    assert ask(env_name="CartPole-v1", total_timesteps=10**9)[0] == 400
    status, text = ask(env_name="CartPole-v1", n_steps=65536)
    assert status == 400 and "8 environments" in text and "16384" in text
    status, text = ask(env_name="CartPole-v1", model_name="trained")
    assert status == 409 and "delete it" in text
    for field in ("policy_kwargs", "env_kwargs", "normalize", "policy", "env_wrapper", "callback", "config", "hyperparams"):
        status, text = ask(env_name="CartPole-v1", **{field: "dict()"})
        assert status == 422 and field in text


def test_wrong_observations_are_explained(server: Server, trained: dict[str, Any]) -> None:
    def ask(observation: Any) -> tuple[int, str]:
        status, answer = server.call("POST", "/inference", {"model_name": "trained", "observation": observation})
        return status, str(answer)

    for observation in ([0, 0, 0], [[0, 0, 0, 0]], 3, "text", None, {}, [0, 0, 0, "x"], [0, 0, 0, None], [[0], [0, 0]], []):
        status, text = ask(observation)
        assert status == 422 and "[4]" in text, (observation, text)
    raw = b'{"model_name": "trained", "observation": [NaN, 0, 0, 0]}'
    assert server.call("POST", "/inference", raw)[0] == 422
    raw = b'{"model_name": "trained", "observation": [1e999, 0, 0, 0]}'
    assert server.call("POST", "/inference", raw)[0] == 422
    assert server.call("POST", "/inference", {"model_name": "nobody", "observation": []})[0] == 404


def test_environments_and_rewards(server: Server, trained: dict[str, Any]) -> None:
    found = {entry["id"]: entry for entry in server.call("GET", "/environments")[1]["environments"]}
    assert found["CartPole-v1"] == {
        "id": "CartPole-v1",
        "group": "classic_control",
        "renderable": True,
        "tuned": True,
        "observation_space": found["CartPole-v1"]["observation_space"],
        "action_space": {"type": "Discrete", "n": 2, "start": 0, "shape": [], "dtype": "int64"},
    }
    rewards = {entry["name"]: entry for entry in server.call("GET", "/rewards")[1]["rewards"]}
    assert "CartPole-v1" in rewards["classic/cartpole-upright"]["envs"]


def test_an_environment_whose_package_is_missing(server: Server) -> None:
    """Of those that gymnasium still registers, these moved to gymnasium-robotics."""
    status, answer = server.call("POST", "/train", {"env_name": "Hopper-v3", "total_timesteps": 100})
    # Refused when it was tried before; else the job says so
    text = answer["detail"] if status == 400 else server.wait(answer["job_id"])["error_message"]
    assert status in (202, 400) and "gymnasium-robotics" in text


def test_documentation_needs_nothing_from_outside(server: Server) -> None:
    import re

    for page in ("/docs", "/redoc"):
        text = server.call("GET", page)[1].decode()
        links = re.findall(r"""(?:src|href)=["']([^"'#]+)["']""", text)
        assert links and not [link for link in links if link.startswith(("http", "//"))], links
        for link in links:
            assert server.call("GET", link)[0] == 200, link
    document = server.call("GET", "/openapi.json")[1]
    assert {"/train", "/inference", "/models", "/training/{job_id}/status"} <= set(document["paths"])
    assert server.call("GET", "/dashboard")[0] == 200


def test_workers_know_no_secret_and_step_back(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    with running(SB3_GRPO_API_KEY="a-key-that-is-long-enough") as server:
        key = {"Authorization": "Bearer a-key-that-is-long-enough"}
        status, answer = server.call("POST", "/train", ENDLESS, **key)
        assert status == 202
        assert server.call("POST", "/train", ENDLESS)[0] == 401
        while server.call("GET", f"/training/{answer['job_id']}/status", **key)[1]["current_timesteps"] == 0:
            pass
        assert server.process is not None
        workers = [child for child in psutil.Process(server.process.pid).children() if "worker" in " ".join(child.cmdline())]
        assert len(workers) == 1 and "SB3_GRPO_API_KEY" not in workers[0].environ() and workers[0].nice() > 0
        assert "long-enough" not in server.log.read_text()
        assert (server.folder.stat().st_mode & 0o777) == 0o700
