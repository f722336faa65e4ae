"""
Repairs of RL Zoo scripts that fail in a fresh install. Each looks for the fault first, so that it ends when upstream mends it.
"""

import atexit
import functools
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

# What decides about an agent beside the zoo's hyperparameters, which leave out defaults
CARD_SETTINGS = ("group_by", "group_size", "horizon", "scale_rewards", "loss_type", "clip_range_high", "kl_coef")
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
    ``rl_zoo3.push_to_hub`` converts its video with ``ffmpeg`` without a look whether there is one, its model card says to
    install only the zoo, and an upload that breaks does not say what it leaves behind.

    :param source: the script
    :return: the same; what it imports makes the difference
    """
    offer_ffmpeg()
    from huggingface_hub import HfApi, repocard

    upload = HfApi.upload_folder

    @functools.wraps(upload)
    def upload_folder(self: HfApi, *, repo_id: str, folder_path: str | Path, **options: Any) -> Any:
        try:
            return upload(self, repo_id=repo_id, folder_path=folder_path, **options)
        except Exception as error:
            raise RuntimeError(
                f"The upload to {self.endpoint}/{repo_id} broke off, and no commit was confirmed. The repository remains, "
                f"without the model if it is new: the same command tries again. The log folder is as it was; what was to be "
                f"uploaded is in {Path(folder_path).absolute()}."
            ) from error

    HfApi.upload_folder = upload_folder  # type: ignore[method-assign]

    # The script's last call before the upload, given the finished card
    save = repocard.metadata_save

    @functools.wraps(save)
    def metadata_save(local_path: str | Path, data: dict[str, Any]) -> None:
        complete_card(Path(local_path))
        save(local_path, data)

    repocard.metadata_save = metadata_save
    return source


def supply_generate_metadata(push_to_hub: ModuleType) -> None:
    """
    ``rl_zoo3.push_to_hub`` imports ``generate_metadata``, which sb3-team-hf-integration 3.2 renamed to ``_generate_metadata``
    and which returns an object since then, while ``metadata_save`` wants the dictionary
    (https://github.com/huggingface/huggingface_sb3/issues/54).

    :param push_to_hub: the module ``huggingface_sb3.push_to_hub``, executed
    """
    if hasattr(push_to_hub, "generate_metadata") or not hasattr(push_to_hub, "_generate_metadata"):
        return

    def generate_metadata(model_name: str, env_id: str, mean_reward: float, std_reward: float) -> dict[str, Any]:
        return push_to_hub._generate_metadata(model_name, env_id, mean_reward, std_reward).to_dict()

    push_to_hub.generate_metadata = generate_metadata  # type: ignore[attr-defined]


def let_files_be_absent(huggingface_sb3: ModuleType) -> None:
    """
    ``rl_zoo3.load_from_hub`` expects ``requests.HTTPError`` for a model without ``vec_normalize.pkl``; since huggingface_hub
    left requests (1.0), the error is one of its own, and models without normalization cannot be loaded.

    :param huggingface_sb3: the package, executed
    """
    from huggingface_hub.errors import RemoteEntryNotFoundError
    from requests import HTTPError

    if issubclass(RemoteEntryNotFoundError, HTTPError):
        return
    load = huggingface_sb3.load_from_hub

    @functools.wraps(load)
    def load_from_hub(*args: Any, **kwargs: Any) -> str:
        try:
            return load(*args, **kwargs)
        except RemoteEntryNotFoundError as error:
            # Only where the zoo can go on. A file that could not be looked for (no connection) is another error, and stays one
            if "vec_normalize.pkl" not in (*args, *kwargs.values()):
                raise
            raise HTTPError(str(error)) from error

    huggingface_sb3.load_from_hub = load_from_hub  # type: ignore[attr-defined]


def complete_card(readme: Path) -> None:
    """
    Say in a model card which packages bring the algorithm, and how it was rewarded and grouped.

    :param readme: written by the zoo for one of its algorithms, beside the model's files
    """
    from sb3_grpo_plugin.zoo import ALGORITHMS, declared, distribution

    card = readme.read_text(encoding="utf-8")
    named = re.search(r"rl_zoo3\.load_from_hub --algo (\S+) --env (\S+)", card)
    entries = declared(ALGORITHMS).get(named.group(1), []) if named else []
    if named is None or not entries:
        return
    packages = [distribution(entries[0])]
    lines = []
    data = readme.parent / f"{named.group(1)}-{named.group(2)}" / "data"
    if data.is_file():
        settings = json.loads(data.read_text(encoding="utf-8"))
        lines = [
            f"- `{name}`: `{settings[name]}`" for name in CARD_SETTINGS if isinstance(settings.get(name), str | int | float)
        ]
        reward = settings.get("reward_function")
        if isinstance(reward, str):
            packages += reward_packages(reward)
            lines.insert(0, f"- `reward_function`: `{reward}`. Training on needs the package that offers it, `enjoy` does not")
        elif "reward_function" in settings:
            own = "the environment's own reward" if reward is None else "a function of the author's, not part of the model"
            lines.insert(0, f"- `reward_function`: {own}")
    card = card.replace("pip install rl_zoo3", f"pip install rl_zoo3 {' '.join(packages)}")
    if lines:
        settings_section = "\n".join(["## Reward and groups", *lines, "", ""])
        card = card.replace("## Hyperparameters\n", f"{settings_section}## Hyperparameters\n", 1)
    readme.write_text(card, encoding="utf-8")


def reward_packages(name: str) -> list[str]:
    """
    :param name: of a registered reward function
    :return: the distribution that offers it, if it is installed here
    """
    from sb3_grpo_plugin.rewards import registries

    return sorted({source for spec, source in registries().rewards if spec.name == name})


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
