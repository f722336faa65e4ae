"""
Hostile inputs to a running server: each must be refused with the right status, and the server must go on.

    python benchmarks/api_hostile.py
"""

import collections
import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any

from api_server import Server, running

KEY = "a-key-that-is-long-enough"
BEARER = {"Authorization": f"Bearer {KEY}"}
JSON = {"Content-Type": "application/json"}
MB = 2**20

# name, method, path, body, headers, statuses that are right
Case = tuple[str, str, str, bytes | None, dict[str, str], tuple[int, ...]]

NAMES = (
    "../../etc/passwd", "..", ".", "/", "a/b", "a\\b", "a.zip", "a\x00b", "", " ", "a" * 65, "a" * 100_000, "-rf", "_a",
    "~root", "CON:", "a\nb", "\u0430dmin", "\u202eabc", "caf\u00e9", "\U0001f4a9", "a\u200bb", "\ufeffa", "%2e%2e%2f",
    "${HOME}", "$(id)", "`id`", "a;id", "a|id", "{{7*7}}", "<script>", "' OR 1=1--",
)  # fmt: skip
ENVS = (
    "os:system", "os.path:join", "CartPole-v1:x", "builtins:eval", "__import__('os')", "CartPole-v1\x00", "CartPole-v1\n",
    "../CartPole-v1", "CartPole", "CartPole-v999", "cartpole-v1", "", "CartPole-v1 ", "CartPole\u2010v1", "a" * 129, "file:///x",
    "GymV21Environment-v0/../x", "ALE/../CartPole-v1", "json:loads", "sb3_grpo_plugin.api.worker:main",
)  # fmt: skip
REWARDS = (
    "os:system",
    "classic/",
    "/x",
    "classic/none",
    "a/b/c",
    "../x",
    "auto",
    "lambda s: 0",
    "classic/cartpole-upright\x00",
    "",
)
NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1", "0", "1e308", '"8"', "true", "[]", "{}", "9" * 5000, "0.5")
OBSERVATIONS = (
    "NaN", "[NaN, 0, 0, 0]", "[Infinity, 0, 0, 0]", "[-Infinity, 0, 0, 0]", "[1e999, 0, 0, 0]", "[]", "[[]]", "[0, 0, 0]",
    "[0, 0, 0, 0, 0]", "[[0, 0, 0, 0]]", "[[0], [0, 0], 0, 0]", '["0", 0, 0, 0]', "[null, 0, 0, 0]", "[{}, 0, 0, 0]", "{}",
    '{"a": [0, 0, 0, 0]}', "null", '"text"', "0", "true", "[1e39, 0, 0, 0]", "[" + "9" * 400 + ", 0, 0, 0]", 
    "[" * 500 + "]" * 500, '{"__class__": "x"}', "[0, 0, 0, [0]]", "[" + "0," * 99_999 + "0]",
)  # fmt: skip
FIELDS = (
    "env_kwargs", "policy_kwargs", "normalize", "env_wrapper", "vec_env_wrapper", "callback", "policy", "conf_file",
    "hyperparams", "device", "tensorboard_log", "__proto__", "job_id", "data_dir", "n_envs", "gamma",
)  # fmt: skip
FORBIDDEN = ("total_timesteps", "learning_rate", "n_steps", "batch_size", "n_epochs", "seed")


POST = {**BEARER, **JSON}


def order(**fields: Any) -> bytes:
    return json.dumps({"env_name": "CartPole-v1", **fields}).encode()


def names() -> Iterator[Case]:
    for name in NAMES:
        yield f"model_name {name[:20]!r}", "POST", "/train", order(model_name=name), POST, (422,)
        yield (
            f"inference of {name[:20]!r}",
            "POST",
            "/inference",
            json.dumps({"model_name": name, "observation": []}).encode(),
            POST,
            (422,),
        )
    for name in ("..%2f..%2fetc%2fpasswd", "%2e%2e", "..%5c..", "a%00b", "%ff%fe", "a" * 4000):
        for rest in ("", "/download", "/rollout"):
            yield f"path {name[:20]!r}{rest}", "GET", f"/models/{name}{rest}", None, BEARER, (404, 422)
        yield f"static {name[:20]!r}", "GET", f"/static/{name}", None, {}, (404,)


def orders() -> Iterator[Case]:
    for env in ENVS:
        yield f"env_name {env[:20]!r}", "POST", "/train", order(env_name=env), POST, (400, 422)
    for reward in REWARDS:
        yield f"reward {reward!r}", "POST", "/train", order(reward_function_type=reward), POST, (400, 422)
    for field in FORBIDDEN:
        for number in NUMBERS:
            # What these are allowed to be
            if (field, number) in (("learning_rate", "0.5"), ("seed", "0")):
                continue
            body = f'{{"env_name": "CartPole-v1", "{field}": {number}}}'.encode()
            yield f"{field} {number[:20]}", "POST", "/train", body, POST, (400, 422)
    for field in FIELDS:
        yield f"field {field}", "POST", "/train", order(**{field: "dict(a=__import__('os').system('id'))"}), POST, (422,)


def observations() -> Iterator[Case]:
    for observation in OBSERVATIONS:
        body = f'{{"model_name": "m", "observation": {observation}}}'.encode()
        yield f"observation {observation[:20]}", "POST", "/inference", body, POST, (400, 422)
        body = f'{{"model_name": "m", "observations": [{observation}]}}'.encode()
        yield f"batch {observation[:20]}", "POST", "/inference/batch", body, POST, (400, 422)
    many = json.dumps({"model_name": "m", "observations": [[0, 0, 0, 0]] * 5000}).encode()
    yield "batch of 5000", "POST", "/inference/batch", many, POST, (422,)


def bodies(limit: int) -> Iterator[Case]:
    for path in ("/train", "/inference", "/login", "/training/" + "0" * 32 + "/stop"):
        yield f"huge body {path}", "POST", path, b" " * (limit + 1), POST, (413,)
        yield f"body of 100 MB {path}", "POST", path, b"[" * (100 * MB), POST, (413,)
    for text in (b"", b"{", b"\xff\xfe{}", b"[" * 200_000, b'{"a":' * 200_000, b"\x00" * 1000, b'{"env_name": "\\ud800"}'):
        yield f"body {text[:20]!r}", "POST", "/train", text, POST, (400, 422)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml", ""):
        yield f"content type {kind!r}", "POST", "/train", order(), {**BEARER, "Content-Type": kind}, (415,)


def heads() -> Iterator[Case]:
    for host in ("evil.example", "127.0.0.1.evil.example", "", "a b", "localhost@evil.example"):
        yield f"host {host!r}", "GET", "/models", None, {**BEARER, "Host": host}, (400,)
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "file://"):
        yield f"origin {origin!r}", "POST", "/train", order(), {**POST, "Origin": origin}, (400,)
    for key in ("", "Bearer", "Bearer ", "Basic " + KEY, "Bearer " + KEY[:-1], "Bearer " + KEY + "x", "Bearer \u00e9"):
        yield f"key {key!r}", "GET", "/models", None, {"Authorization": key}, (401,)
    yield "cookie", "GET", "/models", None, {"Cookie": "sb3_grpo_session=x"}, (401,)
    for job in ("x", "..", "0" * 31, "0" * 33, "A" * 32, "%2e%2e"):
        yield f"job {job!r}", "GET", f"/training/{job}/status", None, BEARER, (404, 422)
    for query in (
        "limit=0",
        "limit=-1",
        "limit=1e9",
        "offset=-1",
        "limit=9999999999999999999",
        "offset=" + "9" * 30,
        "limit=x",
    ):
        yield f"query {query[:20]}", "GET", f"/training/jobs?{query}", None, BEARER, (422,)
    for query in ("seed=-1", "seed=99999999999", "max_steps=0", "max_steps=1000000", "seed=NaN"):
        yield f"rollout {query}", "GET", f"/models/m/rollout?{query}", None, BEARER, (422,)
    for method in ("PUT", "PATCH", "DELETE", "TRACE", "OPTIONS"):
        yield f"method {method}", method, "/train", None, BEARER, (405,)


def ask(server: Server, case: Case) -> tuple[int, bytes]:
    _, method, path, body, headers, _ = case
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value.encode("utf-8"))
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        try:
            if body:
                connection.send(body)
        except (BrokenPipeError, ConnectionResetError):
            # It answered before it had all
            pass
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def raw(server: Server) -> Iterator[tuple[str, bytes, tuple[bytes, ...]]]:
    """Bytes that are no HTTP, and what the answer may begin with."""
    refused = (b"HTTP/1.1 400", b"HTTP/1.1 431", b"HTTP/1.1 404", b"")
    yield "no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", refused
    yield "huge header", b"GET / HTTP/1.1\r\nX: " + b"a" * (2 * MB) + b"\r\n\r\n", refused
    yield "huge line", b"GET /" + b"a" * MB + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", refused
    yield (
        "two lengths",
        b"POST /train HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nxxxxx",
        refused,
    )
    smuggled = b"POST /train HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    yield "length and chunks", smuggled, (*refused, b"HTTP/1.1 401", b"HTTP/1.1 415")
    yield "negative length", b"POST /train HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", refused
    yield "null in header", b"GET / HTTP/1.1\r\nHost: local\x00host\r\n\r\n", refused


def main() -> None:
    environ = {"SB3_GRPO_API_KEY": KEY, "SB3_GRPO_RATE_LIMIT": "0", "SB3_GRPO_QUEUE_LIMIT": "100"}
    with running(**environ) as server:
        order = {"env_name": "CartPole-v1", "total_timesteps": 256, "n_steps": 32, "model_name": "m"}
        assert server.call("POST", "/train", order, **BEARER)[0] == 202
        while not server.call("GET", "/models", **BEARER)[1]["models"] or server.call("GET", "/health")[1]["queue"]["running"]:
            pass
        wrong, statuses = [], collections.Counter[int]()
        number = 0
        for case in (*names(), *orders(), *observations(), *bodies(8 * MB), *heads()):
            number += 1
            status, content = ask(server, case)
            statuses[status] += 1
            if status not in case[-1] or b"Traceback" in content or b'File "' in content:
                wrong.append((case[0], status, content[:200]))
        for name, data, expected in raw(server):
            number += 1
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                try:
                    connection.sendall(data)
                    begin = connection.recv(12)
                except (ConnectionResetError, BrokenPipeError):
                    begin = b""
                if begin not in expected and not begin.startswith(expected[:-1]):
                    wrong.append((name, 0, begin))
        print(f"{number} hostile inputs, {len(wrong)} answered wrongly; statuses {dict(sorted(statuses.items()))}")
        print(*wrong, sep="\n")
        queued(server)
        health = server.call("GET", "/health")[1]
        print("server alive:", health["status"], "tracebacks in its log:", server.log.read_text().count("Traceback"))
        assert not wrong


def queued(server: Server) -> None:
    """10,000 jobs at once."""
    answers = collections.Counter(
        server.call("POST", "/train", {"env_name": "CartPole-v1", "total_timesteps": 10_000_000}, **BEARER)[0]
        for _ in range(10_000)
    )
    print(f"10,000 jobs: {dict(answers)}, queue {server.call('GET', '/health')[1]['queue']}")
    assert set(answers) == {202, 429} and answers[202] <= 102
    jobs = server.call("GET", "/training/jobs?limit=1000", **BEARER)[1]["jobs"]
    for job in jobs:
        server.call("POST", f"/training/{job['job_id']}/stop", **BEARER)


if __name__ == "__main__":
    main()
