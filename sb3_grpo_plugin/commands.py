"""The subcommands ``sb3-grpo plugins``, ``rewards`` and ``new-plugin``; ``cli.py`` imports them when asked for one."""

import argparse
import json
import keyword
import re
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sb3_grpo_plugin.plugins import ENVIRONMENT_VARIABLE, normalize_name
from sb3_grpo_plugin.rewards import Registries, Registry, RewardSpec, nearest_name, registries

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "0.1.0"
dependencies = ["sb3-grpo-plugin"]

[project.entry-points.sb3_grpo_plugin]
{name} = "{module}"
"""

MODULE = """\
from sb3_grpo_plugin import RewardSpec, hookimpl


def upright(state, action, next_state):
    return 1 - next_state[:, 2].abs()


@hookimpl
def sb3_grpo_rewards():
    return [RewardSpec("{name}/upright", ("CartPole-v1",), upright, "keeps the pole upright")]
"""


def plugins_command(arguments: Sequence[str]) -> int:
    """
    List the installed plugins: version, state, hooks and how much they offer.

    :param arguments: of the subcommand
    :return: 1 when a plugin is broken or two share a name, else 0
    """
    parser = argparse.ArgumentParser(prog="sb3-grpo plugins", description="List the installed plugins.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args(arguments).json
    found = _registries()
    offers = {name: Counter(source for _, source in registry) for name, registry in _kinds(found).items()}
    clashes = [
        f"the {registry.kind} name {name!r} is offered by {' and '.join(sources)}: asking for it is an error"
        for registry in _kinds(found).values()
        for name, sources in registry.clashes().items()
    ]
    plugins = [
        {**asdict(info), **{kind: counts[info.distribution] for kind, counts in offers.items()}} for info in found.plugins
    ]
    if as_json:
        _print(json.dumps({"plugins": plugins, "clashes": clashes}, indent=2))
    elif not plugins:
        _print("No plugin is installed. The pack that belongs to this project is sb3-grpo-rewards.")
    else:
        header = ("DISTRIBUTION", "VERSION", "MODULE", "STATUS", "OFFERS")
        _print_table(header, [_plugin_row(plugin, list(offers)) for plugin in plugins])
        for plugin in plugins:
            if plugin["problem"]:
                _print(f"{plugin['distribution']}: {plugin['problem']}")
        for clash in clashes:
            _print(f"clash: {clash}")
        if any(plugin["status"] == "off" for plugin in plugins):
            _print(f"off: not picked by the environment variable {ENVIRONMENT_VARIABLE}")
    return 1 if clashes or any(plugin["problem"] for plugin in plugins) else 0


def _plugin_row(plugin: dict[str, Any], kinds: Sequence[str]) -> tuple[str, ...]:
    offers = ", ".join(f"{plugin[kind]} {kind.replace('_', ' ')}" for kind in kinds if plugin[kind])
    return plugin["distribution"], plugin["version"], plugin["module"], plugin["status"], offers or "-"


def rewards_command(arguments: Sequence[str]) -> int:
    """
    List the registered reward functions.

    :param arguments: of the subcommand
    :return: 1 when none is bound to the asked-for environment, else 0
    """
    parser = argparse.ArgumentParser(prog="sb3-grpo rewards", description="List the registered reward functions.")
    parser.add_argument("--env", metavar="ID", help="only those bound to this environment ID")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(arguments)
    found = _registries()
    offers = [(spec, source) for spec, source in found.rewards if args.env is None or spec.binds(args.env)]
    unmatched = {} if args.env is not None else unmatched_patterns([spec for spec, _ in offers])
    clashes = found.rewards.clashes()
    if args.json:
        rows = [
            {
                "name": spec.name,
                "env_ids": list(spec.env_ids),
                "description": spec.description,
                "distribution": source,
                "clash": spec.name in clashes,
            }
            for spec, source in offers
        ]
        _print(json.dumps(rows, indent=2))
    elif offers:
        _print_table(
            ("NAME", "ENVIRONMENTS", "DISTRIBUTION", "DESCRIPTION"),
            [(spec.name, ", ".join(spec.env_ids), source, spec.description) for spec, source in offers],
        )
        for name in sorted({spec.name for spec, _ in offers} & clashes.keys()):
            _print(f"{name}: offered by {' and '.join(clashes[name])}; asking for it is an error")
        for name, patterns in unmatched.items():
            _print(f"{name}: no environment that gymnasium knows now matches {', '.join(patterns)}")
    if offers:
        return 0
    bound = "" if args.env is None else f" bound to {args.env}{_did_you_mean(args.env)}"
    sys.stderr.write(f"No reward function is{bound or ' registered'}. {found.rewards.missing_plugins()}".rstrip() + "\n")
    return 1 if args.env is not None else 0


def unmatched_patterns(specs: Sequence[RewardSpec]) -> dict[str, list[str]]:
    """
    :param specs: to look at
    :return: for each name, the globs that match no environment ID registered in gymnasium right now. Exact IDs are not
        judged: a package may register its environments only when it is imported.
    """
    import fnmatch

    import gymnasium as gym

    known = list(gym.registry)
    unmatched = {}
    for spec in specs:
        globs = [pattern for pattern in spec.env_ids if any(sign in pattern for sign in "*?[")]
        lonely = [pattern for pattern in globs if not fnmatch.filter(known, pattern)]
        if lonely:
            unmatched[spec.name] = lonely
    return unmatched


def _did_you_mean(env_id: str) -> str:
    """A hint when gymnasium does not know the ID but one that looks like it."""
    import gymnasium as gym

    nearest = None if env_id in gym.registry else nearest_name(env_id, list(gym.registry))
    return f" (did you mean {nearest}?)" if nearest else ""


def new_plugin_command(arguments: Sequence[str]) -> int:
    """
    Write the skeleton of a plugin package into a new folder.

    :param arguments: of the subcommand
    :return: 2 when the name cannot be used, else 0
    """
    parser = argparse.ArgumentParser(
        prog="sb3-grpo new-plugin", description="Write the skeleton of a plugin package into the folder NAME."
    )
    parser.add_argument("name", metavar="NAME", help="of the package, such as my-rewards")
    name = parser.parse_args(arguments).name
    try:
        module = write_skeleton(name, Path.cwd())
    except ValueError as error:
        sys.stderr.write(f"sb3-grpo new-plugin: {error}\n")
        return 2
    _print(
        f"Wrote {name}/pyproject.toml and {name}/{module}.py. Next:\n"
        f"  pip install ./{name}\n"
        f"  sb3-grpo rewards --env CartPole-v1\n"
        f"""  python -m rl_zoo3.train --algo grpo --env CartPole-v1 -params reward_function:"'{name}/upright'" """.rstrip()
    )
    return 0


def write_skeleton(name: str, folder: Path) -> str:
    """
    :param name: of the distribution
    :param folder: where its own folder is made
    :return: the name of its module
    :raises ValueError: when the name is no name, is taken, or the folder exists
    """
    module = re.sub(r"[-.]+", "_", name).lower()
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*[A-Za-z0-9]", name) or not module.isidentifier() or keyword.iskeyword(module):
        raise ValueError(f"{name!r} is not a package name: start with a letter, go on with letters, digits and '-'")
    taken = {info.distribution for info in _registries().plugins}
    if normalize_name(name) in taken or find_spec(module) is not None:
        raise ValueError(f"{name!r} is taken: a package or module of that name is installed here")
    target = folder / name
    if target.exists():
        raise ValueError(f"{target} exists already; nothing was written")
    target.mkdir(parents=True)
    (target / "pyproject.toml").write_text(PYPROJECT.format(name=name, module=module), encoding="utf-8")
    (target / f"{module}.py").write_text(MODULE.format(name=name), encoding="utf-8")
    return module


def _registries() -> Registries:
    # what the warnings say is part of the tables
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return registries()


def _kinds(found: Registries) -> dict[str, Registry[Any]]:
    return {"rewards": found.rewards, "transitions": found.transitions, "env_wrappers": found.env_wrappers}


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        _print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
