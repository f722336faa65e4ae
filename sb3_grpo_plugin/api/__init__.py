"""
``sb3-grpo serve``: train agents and use them over HTTP.

Only this command imports what is in here; it needs the extra ``[api]``.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket

    from sb3_grpo_plugin.api.settings import Settings

ARGUMENTS = {
    "host": "address to bind to (127.0.0.1)",
    "port": "to bind to (8000)",
    "data-dir": "folder that the server keeps everything in",
    "database-url": "of PostgreSQL; by default SQLite in the data folder",
    "api-key": "that requests must carry. Others on this machine can read arguments: better set the variable",
}


def serve_command(arguments: Sequence[str]) -> int:
    """
    :param arguments: of the subcommand
    :return: exit status: 2 for wrong settings, 1 when the server cannot start
    """
    parser = argparse.ArgumentParser(
        prog="sb3-grpo serve",
        description="Serve the web API. Each option has an environment variable: SB3_GRPO_HOST, SB3_GRPO_DATA_DIR, ... "
        "docs/api.md lists the others.",
    )
    for name, text in ARGUMENTS.items():
        parser.add_argument(f"--{name}", metavar=name.rpartition("-")[2].upper(), help=text)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    # One thread is fastest for small networks, and leaves the other cores to the workers
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        import fastapi  # noqa: F401
        import fastapi_offline  # noqa: F401
        import sqlalchemy  # noqa: F401
        import uvicorn  # noqa: F401
        from pydantic import ValidationError

        from sb3_grpo_plugin.api.settings import Settings
    except ModuleNotFoundError as error:
        return _fail(f"the web API needs {error.name!r}: pip install sb3-grpo-plugin[api]")
    try:
        settings = Settings(**given)
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"])
            _fail(f"{name}: {problem['msg']}" if name else problem["msg"].removeprefix("Value error, "))
        return 2
    return _serve(settings)


def _fail(text: str) -> int:
    sys.stderr.write(f"sb3-grpo serve: {text}\n")
    return 1


def _serve(settings: "Settings") -> int:
    """Check all that can keep the server from working, then run it."""
    import filelock

    from sb3_grpo_plugin.api.executors import make_executor
    from sb3_grpo_plugin.api.store import Store, StoreError, database_url

    try:
        data_id = prepare_folder(settings.data_dir)
    except OSError as error:
        return _fail(f"the data folder {settings.data_dir} cannot be used: {error.strerror or error}")
    lock = filelock.FileLock(settings.data_dir / "server.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return _fail(f"another server works with the data folder {settings.data_dir}")
    try:
        sock = bind(settings.host, settings.port)
    except OSError as error:
        return _fail(f"{settings.host}:{settings.port} cannot be bound: {error.strerror or error}")
    url = settings.database_url
    try:
        store = Store(database_url(None if url is None else url.get_secret_value(), settings.data_dir), data_id)
        executor = make_executor(settings, data_id)
    except (StoreError, ValueError) as error:
        return _fail(str(error))
    return _run(settings, store, executor, sock)


def _run(settings: "Settings", store: Any, executor: Any, sock: "socket.socket") -> int:
    import uvicorn

    from sb3_grpo_plugin.api.app import create_app

    app = create_app(settings, store, executor)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            # Event streams end by themselves, or they would hold the server up
            app.state.server.closing = True
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app,
        # Headers of a proxy could name any address; a proxy has to limit rates itself
        proxy_headers=False,
        server_header=False,
        # Addresses of requests hold no secret, but a line for each costs more than the request
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    server = Server(config)
    host, port = sock.getsockname()[:2]
    sys.stderr.write(f"sb3-grpo serve: http://{f'[{host}]' if ':' in host else host}:{port}/dashboard\n")
    server.run(sockets=[sock])
    return 0 if server.started else 1


def prepare_folder(folder: Path) -> str:
    """
    :param folder: of the server's data; made when it is not there, readable by its owner only
    :return: its identity
    :raises OSError: it cannot be made or written
    """
    import uuid

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    present = {path.name for path in folder.iterdir()} - {"lost+found", "id.part"}
    if present and "id" not in present:
        # Closing it to others would be a bad surprise
        raise OSError(f"it holds other files ({min(present)}, ...); name an empty folder or a new one")
    # Also when it was there
    folder.chmod(0o700)
    path = folder / "id"
    if not path.exists():
        part = folder / "id.part"
        part.write_text(uuid.uuid4().hex, encoding="ascii")
        part.replace(path)
    for name in ("models", "jobs"):
        (folder / name).mkdir(mode=0o700, exist_ok=True)
    return path.read_text(encoding="ascii").strip()


def bind(host: str, port: int) -> "socket.socket":
    """
    :param host: name or address
    :param port: 0 for any free one
    :return: a listening socket
    :raises OSError: it is taken, or not ours
    """
    import socket

    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    sock = socket.socket(family, kind, protocol)
    if os.name != "nt":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(128)
    except OSError:
        sock.close()
        raise
    return sock
