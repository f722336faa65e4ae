"""A server of the web API, for the measuring scripts beside this one and for tests: a process of its own, on a free port."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ENDED = ("completed", "stopped", "failed", "interrupted")


class Server:
    """
    :param folder: of its data
    :param environ: variables of the server, such as ``SB3_GRPO_WORKERS``
    """

    def __init__(self, folder: Path, **environ: str) -> None:
        self.folder = folder
        self.environ = environ
        self.port = 0
        self.log = folder.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        environ = {
            "OMP_NUM_THREADS": "1",
            "SB3_GRPO_DATA_DIR": str(self.folder),
            "SB3_GRPO_PORT": str(self.port),
            **self.environ,
        }
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sb3_grpo_plugin", "serve"],
                env={**os.environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(r"http://\S+:(\d+)/", self.log.read_text())
            self.port = int(found[1]) if found else self.port
            with contextlib.suppress(OSError):
                if found and self.call("GET", "/health")[0] == 200:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"The server does not answer: {self.log.read_text()}")

    def kill(self) -> None:
        """As a power cut would end it."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End it in order."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(60)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """
        :param method: such as ``GET``
        :param path: with its query
        :param body: to send as JSON; bytes are sent as they are
        :param headers: further ones, ``_`` for ``-``
        :return: status and content
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            if data is not None:
                named.setdefault("Content-Type", "application/json")
            connection.request(method, path, data, named)
            response = connection.getresponse()
            content = response.read()
            is_json = response.headers.get_content_type() == "application/json"
            return response.status, json.loads(content) if is_json and content else content
        finally:
            connection.close()

    def train(self, **order: Any) -> str:
        """
        :param order: body of ``POST /train``
        :return: the job's ID
        """
        status, answer = self.call("POST", "/train", order)
        if status != 202:
            raise RuntimeError(f"{status}: {answer}")
        return answer["job_id"]

    def wait(self, job_id: str, seconds: float = 300) -> dict[str, Any]:
        """
        :param job_id: of the job
        :param seconds: to wait at most
        :return: its status when it has ended
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                status = self.call("GET", f"/training/{job_id}/status")[1]
                if status.get("status") in ENDED:
                    return status
            time.sleep(0.3)
        raise TimeoutError(f"The job {job_id} has not ended after {seconds} seconds: {status}")


@contextlib.contextmanager
def running(**environ: str) -> Iterator[Server]:
    """
    :param environ: variables of the server
    :return: a server, ended with the block
    """
    with tempfile.TemporaryDirectory(prefix="sb3-grpo-api-") as folder:
        server = Server(Path(folder, "data"), **environ)
        server.start()
        try:
            yield server
        finally:
            server.stop()
