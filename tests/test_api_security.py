"""What the web API refuses. The application in process, with workers that never run."""

import json
import logging
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra [api]")

from fastapi.testclient import TestClient
from pydantic import ValidationError

from sb3_grpo_plugin.api import prepare_folder
from sb3_grpo_plugin.api.app import create_app
from sb3_grpo_plugin.api.security import COOKIE, KEY_FAILURES
from sb3_grpo_plugin.api.settings import Settings
from sb3_grpo_plugin.api.store import Store, database_url

KEY = "a-key-that-is-long-enough"
BEARER = {"Authorization": f"Bearer {KEY}"}
TRAIN = {"env_name": "CartPole-v1", "total_timesteps": 1000}


class IdleWorker:
    """Does nothing until it is told to."""

    def __init__(self) -> None:
        self.messages: deque[dict[str, Any]] = deque()
        self.commands: list[str] = []

    def send(self, command: str) -> None:
        self.commands.append(command)
        self.messages.append({"kind": "end", "status": "stopped" if command == "stop" else "suspended", "error": None})

    def ended(self) -> str | None:
        return None

    def fetch(self, name: str, sha256: str, folder: Path) -> None:
        raise AssertionError

    def kill(self) -> None:
        pass


class IdleExecutor:
    def start(self, spec: dict[str, Any], folder: Path, resume: Path | None, wake: Callable[[], None]) -> IdleWorker:
        return IdleWorker()

    def stop(self) -> None:
        pass


@contextmanager
def serving(folder: Path, **values: Any) -> Iterator[TestClient]:
    settings = Settings(data_dir=folder, **values)
    store = Store(database_url(None, folder), prepare_folder(folder))
    app = create_app(settings, store, IdleExecutor())
    # No key and no environment's variables reach the probe of environments
    app.state.server.catalogue.start = lambda: None
    with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with serving(tmp_path / "data") as client:
        yield client


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[TestClient]:
    with serving(tmp_path / "data", api_key=KEY) as client:
        yield client


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"host": "0.0.0.0"}, "needs an API key"),
        ({"host": "192.168.1.5"}, "needs an API key"),
        ({"host": "::"}, "needs an API key"),
        ({"api_key": "short"}, "at least 16"),
        ({"port": 70000}, "less than or equal to 65535"),
        ({"executor": "threads"}, "'process' or 'ray'"),
    ],
)
def test_settings_that_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words) as error:
        Settings(**values)
    assert "short" not in str(error.value)


def test_settings_come_from_the_environment_and_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SB3_GRPO_API_KEY", KEY)
    monkeypatch.setenv("SB3_GRPO_DATABASE_URL", "postgresql://me:hidden-word@there/name")
    monkeypatch.setenv("SB3_GRPO_ALLOWED_HOSTS", "Lab.example, other")
    monkeypatch.setenv("SB3_GRPO_HOST", "0.0.0.0")
    settings = Settings()
    assert {"lab.example", "other", "localhost"} <= settings.host_names()
    assert KEY not in repr(settings) and "password" not in repr(settings)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--host", "0.0.0.0"), 2, "needs an API key"),
        (("--port", "many"), 2, "port: "),
        (("--database-url", "mysql://me:hidden-word@there/name"), 1, "SQLite and PostgreSQL"),
        (("--database-url", "postgresql://me:hidden-word@127.0.0.1:9/name"), 1, "cannot be used"),
        (("--database-url", "nonsense"), 1, "cannot be read"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path: Path, arguments: tuple[str, ...], status: int, words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sb3_grpo_plugin", "serve", "--port", "0", "--data-dir", str(tmp_path / "data"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={name: value for name, value in os.environ.items() if not name.startswith("SB3_GRPO_")},
    )
    assert done.returncode == status, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr and "hidden-word" not in done.stderr


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['fastapi'] = None; from sb3_grpo_plugin.api import serve_command as f; sys.exit(f([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "pip install sb3-grpo-plugin[api]" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "a b", "[::1", "@127.0.0.1"]
)
def test_hosts_that_are_not_ours(client: TestClient, host: str) -> None:
    assert client.get("/health", headers={"Host": host}).status_code == 400


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:8000", "10.1.2.3:80"])
def test_hosts_that_are_ours(client: TestClient, host: str) -> None:
    assert client.get("/health", headers={"Host": host}).status_code == 200


def test_pages_of_other_origins(client: TestClient) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:8000"):
        assert client.post("/train", json=TRAIN, headers={"Origin": origin}).status_code == 400, origin
    assert client.post("/train", json=TRAIN, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 400
    answer = client.post("/train", json=TRAIN, headers={"Origin": "http://127.0.0.1:8000"})
    assert answer.status_code == 202
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_only_json(client: TestClient) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp", ""):
        answer = client.post("/train", content=json.dumps(TRAIN), headers={"Content-Type": kind})
        assert answer.status_code == 415, kind
    kind = "application/json; charset=utf-8"
    assert client.post("/train", content=json.dumps(TRAIN), headers={"Content-Type": kind}).status_code == 202


def test_body_limit(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 100

    with serving(tmp_path / "data", max_body_bytes=2048) as client:
        assert client.post("/train", content=b" " * 3000).status_code == 413
        assert client.post("/train", content=chunks(), headers={"Content-Type": "application/json"}).status_code == 413
        assert client.post("/train", json=TRAIN).status_code == 202


def test_rate_limit(tmp_path: Path) -> None:
    with serving(tmp_path / "data", rate_limit=5) as client:
        answers = [client.get("/health") for _ in range(20)]
    assert [answer.status_code for answer in answers[:5]] == [200] * 5
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused and refused[0].headers["retry-after"]


def test_the_key_opens_all_and_its_lack_only_what_shows_nothing(guarded: TestClient) -> None:
    paths = guarded.get("/openapi.json").json()["paths"]
    public = {"/", "/health", "/session", "/login"}
    for path, methods in paths.items():
        for method in methods:
            where = path.format(job_id="0" * 32, name="x")
            status = guarded.request(method, where).status_code
            assert (status == 401) == (path not in public), (method, path, status)
            assert guarded.request(method, where, headers={"Authorization": "Bearer wrong"}).status_code in (401, 422, 200)
            guarded.get("/models", headers=BEARER)
            assert guarded.request(method, where, headers=BEARER).status_code != 401
    for path in ("/docs", "/redoc", "/dashboard"):
        assert guarded.get(path).status_code == 200


def test_the_key_can_be_guessed_only_so_often(guarded: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for _ in range(KEY_FAILURES):
        assert guarded.post("/login", json={"api_key": "guess-number-one"}).status_code == 401
    answer = guarded.post("/login", json={"api_key": KEY})
    assert answer.status_code == 429 and answer.headers["retry-after"]
    assert guarded.get("/models", headers=BEARER).status_code == 429
    assert KEY not in caplog.text


def test_sessions(guarded: TestClient) -> None:
    assert guarded.get("/session").json() == {"authenticated": False, "key_required": True}
    answer = guarded.post("/login", json={"api_key": KEY})
    cookie = answer.headers["set-cookie"]
    assert answer.status_code == 204 and "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and KEY not in cookie
    assert "secure" not in cookie.lower()
    assert guarded.get("/session").json()["authenticated"] and guarded.get("/models").status_code == 200
    token = guarded.cookies[COOKIE]
    assert guarded.post("/logout").status_code == 204
    # The token is void, not only forgotten by the browser
    guarded.cookies.set(COOKIE, token)
    assert guarded.get("/models").status_code == 401
    answer = guarded.post("/login", json={"api_key": KEY}, headers={"Host": "lab", "Origin": "https://lab"})
    assert answer.status_code == 400
    answer = guarded.post("/login", json={"api_key": KEY}, headers={"Host": "localhost", "Origin": "https://localhost"})
    assert "secure" in answer.headers["set-cookie"].lower()


def test_headers_that_browsers_heed(client: TestClient) -> None:
    for path in ("/health", "/models/nobody", "/dashboard"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and "default-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a/b", "a.zip", "..", ".", "", "a" * 65, "a b", "-a", "\u0430", "a\x00", "CON:", "%2e%2e"]
)
def test_model_names_that_are_no_names(client: TestClient, name: str) -> None:
    assert client.post("/train", json={**TRAIN, "model_name": name}).status_code == 422
    assert client.post("/inference", json={"model_name": name, "observation": [0]}).status_code == 422


def test_paths_that_lead_elsewhere(client: TestClient, tmp_path: Path) -> None:
    for path in ("..%2f..%2fid", "%2e%2e/id", "....//id", "..%5c..%5cid", "id%00"):
        for prefix in ("/models/", "/static/", "/vendor/"):
            answer = client.get(prefix + path)
            assert answer.status_code in (404, 422), (prefix + path, answer.status_code)
            assert (tmp_path / "data" / "id").read_text() not in answer.text


HOSTILE = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"NaN",
    b'{"env_name": NaN}',
    b'{"env_name": "CartPole-v1", "learning_rate": Infinity}',
    b'{"env_name": "CartPole-v1", "learning_rate": 1e999}',
    b'{"env_name": "CartPole-v1", "n_steps": 1e3000}',
    b'{"env_name": "CartPole-v1", "n_steps": ' + b"9" * 5000 + b"}",
    b'{"env_name": "CartPole-v1", "n_steps": "128"}',
    b'{"env_name": "CartPole-v1", "n_steps": true}',
    b'{"env_name": "CartPole-v1", "n_steps": 128.5}',
    b'{"env_name": "CartPole-v1", "n_steps": -1}',
    b'{"env_name": "\\ud800"}',
    b'{"env_name": "CartPole-v1\\u0000"}',
    b'{"env_name": "\xff\xfe"}',
    b"{\"env_name\": \"__import__('os').system('id')\"}",
    b'{"env_name": "os:system"}',
    b'{"env_name": "CartPole-v1", "reward_function_type": "os:system"}',
    b'{"env_name": "CartPole-v1", "\\ud800": 1}',
    b'{"env_name": "CartPole-v1", "__class__": {}}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
]


@pytest.mark.parametrize("body", HOSTILE, ids=range(len(HOSTILE)))
def test_bodies_that_are_no_orders(client: TestClient, body: bytes) -> None:
    for path in ("/train", "/inference", "/inference/batch", "/login"):
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), (path, answer.status_code, answer.text[:200])
        assert answer.json()["detail"] and "Traceback" not in answer.text and "line " not in answer.text
    assert client.get("/health").json()["queue"]["queued"] == 0


def test_a_failure_shows_nothing_of_the_inside(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(client.app.state.server.store, "models", fail)  # type: ignore[attr-defined]
    answer = client.get("/models")
    assert answer.status_code == 500 and "secret" not in answer.text and "Traceback" not in answer.text


def test_no_request_text_reaches_what_evaluates(client: TestClient) -> None:
    """The zoo evaluates strings of hyperparameters; a request can give it numbers and one registered name."""
    properties = client.get("/openapi.json").json()["components"]["schemas"]["TrainRequest"]["properties"]
    kinds = {name: {option["type"] for option in field.get("anyOf", [field])} - {"null"} for name, field in properties.items()}
    texts = {name for name, kind in kinds.items() if kind == {"string"}}
    assert texts == {"env_name", "model_name", "reward_function_type"}
    assert all(kind <= {"integer", "number", "string"} for kind in kinds.values())
    assert all(
        "pattern" in option
        for name in texts
        for option in [*properties[name].get("anyOf", []), properties[name]]
        if option.get("type") == "string"
    )


def test_no_module_evaluates(tmp_path: Path) -> None:
    folder = Path(sys.modules["sb3_grpo_plugin.api"].__path__[0])
    source = "\n".join(path.read_text() for path in folder.glob("*.py"))
    assert not re.search(r"(?<![\w.])(eval|exec|compile|__import__)\(|shell=True|os\.system|yaml\.(unsafe_)?load\(", source)
