"""
Repairs of RL Zoo scripts that fail in a fresh install. Each looks for the fault first, so that it ends when upstream mends it.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# A literal that works from any folder and with any interpreter, without an import that the script may lack
THIS_PYTHON = '__import__("sys").executable'


def mend_record_training(source: str) -> str:
    """
    ``rl_zoo3.record_training`` starts children with whatever ``python`` is first on PATH (none, or another environment's, when
    the script itself was started as ``.venv/bin/python``), and calls ``ffmpeg`` without a look whether there is one.

    :param source: the script
    :return: the script, with children that run in this interpreter
    """
    offer_ffmpeg()
    return source.replace('["python", "-m", "rl_zoo3.record_video"', f'[{THIS_PYTHON}, "-m", "rl_zoo3.record_video"')


def mend_benchmark(source: str) -> str:
    """
    ``rl_zoo3.benchmark`` runs ``python enjoy.py``, which exists only in a checkout of the zoo, and writes its table into a
    folder that nobody made when no model could be evaluated.

    :param source: the script
    :return: the script, which works from any folder
    """
    source = source.replace('["python", "enjoy.py", ', f'[{THIS_PYTHON}, "-m", "rl_zoo3.enjoy", ')
    table = 'tmp_path = os.path.join(args.benchmark_dir, "benchmark.md")\n'
    return source.replace(table, table + "os.makedirs(args.benchmark_dir, exist_ok=True)\n")


def mend_push_to_hub(source: str) -> str:
    """
    ``rl_zoo3.push_to_hub`` converts its video with ``ffmpeg``, without a look whether there is one.

    :param source: the script
    :return: the same
    """
    offer_ffmpeg()
    return source


def offer_ffmpeg() -> None:
    """
    Where PATH has no ``ffmpeg``, let child processes find the one that imageio-ffmpeg (a dependency of moviepy) brings.
    """
    if shutil.which("ffmpeg") is not None:
        return
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        binary = get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return
    folder = tempfile.mkdtemp(prefix="sb3-grpo-ffmpeg-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if os.name == "nt":
        # A symbolic link needs a privilege there
        Path(folder, "ffmpeg.cmd").write_text(f'@"{binary}" %*\n')
    else:
        Path(folder, "ffmpeg").symlink_to(binary)
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), folder])
