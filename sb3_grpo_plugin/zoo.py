"""
How RL Zoo learns of algorithms that pip packages bring: ours, and any other package's.

A package declares them as entry points, the algorithm's id being the name in all groups:

- ``rl_zoo3.algorithms``: the class,
- ``rl_zoo3.hyperparams``: a package (folder) that holds ``<id>.yml``,
- ``rl_zoo3.hyperparams_sampler`` and ``rl_zoo3.hyperparams_converter``: the functions for ``train -optimize``.

What the zoo knows by itself always wins: should it read a group one day, there is nothing left to do for that group here.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from sb3_grpo_plugin import _autoload

ALGORITHMS = "rl_zoo3.algorithms"
HYPERPARAMS = "rl_zoo3.hyperparams"
SAMPLERS = "rl_zoo3.hyperparams_sampler"
CONVERTERS = "rl_zoo3.hyperparams_converter"


def register() -> None:
    """
    Join RL Zoo, before or after its import: by hand what the start-up line does where ``.pth`` files are read.
    """
    _autoload.install()


def distribution(entry_point: EntryPoint) -> str:
    """
    :param entry_point: from an installed package's metadata
    :return: the name of that package as pip knows it
    """
    return entry_point.dist.name if entry_point.dist is not None else entry_point.value


def declared(group: str) -> dict[str, list[EntryPoint]]:
    """
    What installed packages declare, in an order that does not depend on the order of their installation.

    :param group: an entry-point group
    :return: algorithm id -> entries, each distribution and value once
    """
    unique = {(entry.name, distribution(entry), entry.value): entry for entry in entry_points(group=group)}
    entries: dict[str, list[EntryPoint]] = {}
    for key in sorted(unique):
        entries.setdefault(key[0], []).append(unique[key])
    return entries


def load(group: str, check: Callable[[Any], str | None]) -> dict[str, tuple[str, Any]]:
    """
    Load the objects of a group. What cannot be loaded, is not what it should be, or is claimed by several packages is
    reported by the distribution's name and left out.

    :param group: an entry-point group
    :param check: returns what is wrong with a loaded object, or None
    :return: algorithm id -> (distribution, object)
    """
    found: dict[str, tuple[str, Any]] = {}
    for algo, entries in declared(group).items():
        usable = []
        for entry in entries:
            try:
                value = entry.load()
                problem = check(value)
            except Exception as error:
                problem = f"it cannot be imported: {error!r}"
            if problem is None:
                usable.append((distribution(entry), value))
            else:
                _skip(group, algo, distribution(entry), f"{entry.value}: {problem}")
        if len({id(value) for _, value in usable}) > 1:
            # Whichever won, results would depend on what else is installed
            names = " and ".join(name for name, _ in usable)
            _skip(group, algo, names, "they claim the same id; uninstall all but one")
        elif usable:
            found[algo] = usable[0]
    return found


def _skip(group: str, algo: str, name: str, problem: str) -> None:
    warnings.warn(f"{name}: the entry {algo!r} in {group!r} is skipped ({problem})", stacklevel=2)


def _add(table: dict[str, Any], group: str, check: Callable[[Any], str | None]) -> None:
    """
    Add a group's objects to one of the zoo's own tables, in place: the zoo's modules share it.

    :param table: the zoo's table: algorithm id -> object
    :param group: the entry-point group
    :param check: as for ``load``
    """
    for algo, (name, value) in load(group, check).items():
        # The very same object is no clash: we were here before, or the zoo reads the group itself
        if table.setdefault(algo, value) is not value:
            _skip(group, algo, name, "RL Zoo has that id already")


def join_algorithms(rl_zoo3: ModuleType) -> None:
    """
    :param rl_zoo3: the zoo's package, executed
    """
    # Imported by now: the zoo needs it
    from stable_baselines3.common.base_class import BaseAlgorithm

    def check(value: Any) -> str | None:
        return None if isinstance(value, type) and issubclass(value, BaseAlgorithm) else "it is no BaseAlgorithm class"

    _add(rl_zoo3.ALGOS, ALGORITHMS, check)


def join_optimization(hyperparams_opt: ModuleType) -> None:
    """
    :param hyperparams_opt: ``rl_zoo3.hyperparams_opt``, executed
    """

    def check(value: Any) -> str | None:
        return None if callable(value) else "it is not callable"

    _add(hyperparams_opt.HYPERPARAMS_SAMPLER, SAMPLERS, check)
    _add(hyperparams_opt.HYPERPARAMS_CONVERTER, CONVERTERS, check)


def join_hyperparams(exp_manager: ModuleType) -> None:
    """
    Let the experiment manager find ``<id>.yml`` outside of the zoo when no ``--conf-file`` is given.

    :param exp_manager: ``rl_zoo3.exp_manager``, executed
    """
    manager = exp_manager.ExperimentManager
    original = manager.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments.get("config")
        if not given and not Path(self.config).is_file():
            self.config = default_config(self.algo) or self.config

    manager.__init__ = __init__


def default_config(algo: str) -> str | None:
    """
    :param algo: algorithm id
    :return: path of the hyperparameters that a package brings for it, None if no package does
    """
    found: dict[str, str] = {}
    for entry in declared(HYPERPARAMS).get(algo, ()):
        try:
            folders = [Path(folder) for folder in import_module(entry.value).__path__]
        except Exception as error:
            _skip(HYPERPARAMS, algo, distribution(entry), f"{entry.value} is no package: {error!r}")
            continue
        files = [folder / f"{algo}.yml" for folder in folders if (folder / f"{algo}.yml").is_file()]
        if files:
            found.setdefault(str(files[0].resolve()), distribution(entry))
        else:
            _skip(HYPERPARAMS, algo, distribution(entry), f"there is no {algo}.yml in {entry.value}")
    if len(found) > 1:
        _skip(HYPERPARAMS, algo, " and ".join(found.values()), "they bring hyperparameters for the same id")
        return None
    return next(iter(found), None)
