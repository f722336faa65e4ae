"""Files that are there as a whole or not at all. Imports the standard library only."""

import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """
    Write a file that is there as a whole or not at all, also when the machine goes down.

    :param path: the file
    :param data: its content
    :raises OSError: it cannot be written; what was there before is still there
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
