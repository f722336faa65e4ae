import os
import shutil
import site
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")

# Before torch is imported, here and in subprocesses: workers share the cores already
os.environ.setdefault("OMP_NUM_THREADS", "1")


def eventually(condition: Callable[[], T], seconds: float = 60) -> T:
    """
    :param condition: asked again and again
    :param seconds: to wait at most
    :return: its first true value
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} seconds")


class Environment:
    """
    A fresh virtual environment. It shares the dependencies of the one that runs the tests, but nothing of this project.

    :param path: folder to make it in
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        venv.create(path, symlinks=os.name != "nt")
        self.bin = path / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / ("python.exe" if os.name == "nt" else "python")
        self.site_packages = Path(
            self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=path).stdout.strip()
        )
        # Links to everything but this project's own installation: a path in a .pth file brings modules and metadata,
        # not the start-up lines of the folder
        shared = path / "shared"
        shared.mkdir()
        for folder in site.getsitepackages():
            for entry in Path(folder).iterdir() if Path(folder).is_dir() else ():
                if "sb3_grpo" not in entry.name and not entry.name.endswith(".pth") and entry.name != "__pycache__":
                    (shared / entry.name).symlink_to(entry)
        (self.site_packages / "shared.pth").write_text(f"{shared}\n")

    def command(self, *args: object) -> list[str]:
        return [str(self.python), *map(str, args)]

    def environ(self, **changes: str) -> dict[str, str]:
        """
        :param changes: variables to set
        :return: what a child starts with: no display, no switches of ours, nothing of the running environment's path
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SB3_GRPO", "VIRTUAL"))}
        # The system's programs only, so without this environment's python: it was not activated
        kept["PATH"] = os.defpath
        return {**kept, "MPLBACKEND": "Agg", "SDL_VIDEODRIVER": "dummy", "PYTHONDONTWRITEBYTECODE": "1", **changes}

    def run(
        self, *args: object, cwd: Path, status: int | None = 0, timeout: float = 300, **changes: str
    ) -> "subprocess.CompletedProcess[str]":
        """
        :param args: arguments of this environment's interpreter
        :param cwd: working folder
        :param status: expected exit status, None for any
        :param timeout: in seconds
        :param changes: environment variables
        :return: what it printed
        """
        done = subprocess.run(
            self.command(*args),
            cwd=cwd,
            env=self.environ(**changes),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert status is None or done.returncode == status, f"{args}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def zoo(self, script: str, *args: object, cwd: Path, **changes: str) -> "subprocess.CompletedProcess[str]":
        """Run ``python -m rl_zoo3.SCRIPT`` as a user would, see ``run``."""
        return self.run("-m", f"rl_zoo3.{script}", *args, cwd=cwd, **changes)

    def pip(self, *args: object) -> None:
        """Run the tests' own pip on this environment, offline and without dependencies."""
        offline = ("--no-deps", "--no-index", "--no-build-isolation") if args[0] == "install" else ()
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--python", str(self.python), *map(str, args), *offline],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"pip {args}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def make_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Environment]:
    """``make_environment(*what_to_install)``: a fresh environment."""

    def make(*requirements: object) -> Environment:
        environment = Environment(tmp_path_factory.mktemp("venv"))
        if requirements:
            environment.pip("install", *requirements)
        return environment

    return make


@pytest.fixture(scope="session")
def installed(make_environment: Callable[..., Environment], wheel: Path) -> Environment:
    """A fresh environment with the wheel in it. Not to be changed by a test."""
    return make_environment(wheel)


@pytest.fixture(scope="session")
def bare(make_environment: Callable[..., Environment]) -> Environment:
    """The same environment without the wheel."""
    return make_environment()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from, to install as editable and to move about."""
    copy = tmp_path_factory.mktemp("checkout") / "sb3-grpo-plugin"
    copy.mkdir()
    for name in ("sb3_grpo_plugin", "hyperparams"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy
