"""``sb3-grpo benchmark --ray``: the same runs on the machines of a Ray cluster. Imported only when asked for."""

import io
import logging
import os
import shutil
import socket
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sb3_grpo_plugin.benchmark import LocalRuns
from sb3_grpo_plugin.benchmark_matrix import RunSpec

# Times that a run starts anew elsewhere when its machine is lost
RETRIES = 5
# To say that nobody answers; Ray itself would try for minutes
TIMEOUT = 10.0


def run_there(spec: dict[str, Any]) -> tuple[str | None, bytes]:
    """
    Make a run on the machine that this is called on.

    :param spec: fields of a ``RunSpec``
    :return: what went wrong, and the folder of the run as a zip archive
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "run")
        problem = LocalRuns()(RunSpec(**spec), folder)
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(folder.rglob("*")):
                file.write(path, path.relative_to(folder))
        return problem, archive.getvalue()


class RayRuns:
    """
    Runs on a Ray cluster. Their folders come back as they would be after a local run.

    :param address: of the cluster; empty for the one that ``RAY_ADDRESS`` names, or else a cluster of this machine alone
    :param threads: of a run, the CPUs that Ray keeps for it
    """

    def __init__(self, address: str, threads: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError(f'--ray: {error}. Install it with `pip install "sb3-grpo-plugin[ray]"`.') from error
        self.ray = ray
        # A cluster that we start reports to nobody
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        check_reachable(address)
        try:
            ray.init(address=address or None, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            raise ValueError(f"--ray {address}: the cluster cannot be used. {error}") from error
        self.task = ray.remote(run_there).options(num_cpus=threads, max_retries=RETRIES)

    def __call__(self, spec: RunSpec, folder: Path) -> str | None:
        """
        :param spec: the run
        :param folder: where it comes to live
        :return: what went wrong, None when the result is there
        """
        try:
            problem, archive = self.ray.get(self.task.remote(asdict(spec)))
        except self.ray.exceptions.RayError as error:
            return f"Ray: {str(error).splitlines()[0]}"
        # A folder is there as a whole or not at all
        part = folder.with_name(f".part-{folder.name}")
        for old in (part, folder):
            shutil.rmtree(old, ignore_errors=True)
        with zipfile.ZipFile(io.BytesIO(archive)) as file:
            file.extractall(part)
        part.rename(folder)
        return problem

    def stop(self) -> None:
        """Leave the cluster, which ends what runs there for us."""
        self.ray.shutdown()


def check_reachable(address: str) -> None:
    """
    :param address: ``host:port`` or ``ray://host:port``; names such as ``auto`` are left to Ray
    :raises ValueError: nobody listens there
    """
    if ":" not in address:
        return
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        socket.create_connection((parts.hostname or "", parts.port or 0), TIMEOUT).close()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--ray {address}: nobody answers there ({error}). Is the cluster up (`ray start --head`), and is the address the "
            "one that it printed?"
        ) from error
