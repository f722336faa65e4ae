"""
Find the installed plugins, load them one by one, and collect what they offer.

A plugin that fails is named and skipped with a warning; the rest go on. Plugins are sorted before they are loaded, so
the order of installation decides nothing. The environment variable ``SB3_GRPO_PLUGINS`` picks some by the name of their
distribution (``SB3_GRPO_PLUGINS=sb3-grpo-rewards,my-rewards``); set but empty, it turns all off.
"""

import importlib.metadata
import os
import re
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple

import pluggy

from sb3_grpo_plugin import hookspecs
from sb3_grpo_plugin.rewards import (
    EnvWrapperSpec,
    PluginInfo,
    Registries,
    Registry,
    RewardSpec,
    TransitionSpec,
    nearest_name,
)

GROUP = "sb3_grpo_plugin"
ENVIRONMENT_VARIABLE = "SB3_GRPO_PLUGINS"
HOOKS = {
    "sb3_grpo_rewards": RewardSpec,
    "sb3_grpo_transitions": TransitionSpec,
    "sb3_grpo_env_wrappers": EnvWrapperSpec,
}


class Found(NamedTuple):
    """An entry point and the distribution that declares it."""

    distribution: str
    version: str
    entry_point: importlib.metadata.EntryPoint


class BrokenPluginError(Exception):
    """A plugin cannot be used; the text says why."""


def build_manager() -> pluggy.PluginManager:
    """
    :return: a fresh manager that knows our hooks and no plugin
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    return manager


def normalize_name(distribution: str) -> str:
    """
    :param distribution: as its author or a user wrote it
    :return: as ``pip`` compares it
    """
    return re.sub(r"[-_.]+", "-", distribution).lower()


def find_plugins() -> list[Found]:
    """
    :return: every entry point of the group, sorted by distribution; one that two folders of ``sys.path`` declare alike
        (an editable checkout and its metadata) is listed once
    """
    found: dict[tuple[str, str, str], Found] = {}
    for distribution in importlib.metadata.distributions():
        for entry_point in distribution.entry_points:
            if entry_point.group == GROUP:
                name = normalize_name(distribution.metadata["Name"] if "Name" in distribution.metadata else "unknown")
                key = (name, entry_point.name, entry_point.value)
                found.setdefault(key, Found(name, distribution.version, entry_point))
    return [found[key] for key in sorted(found)]


def picked_distributions(installed: Iterable[str]) -> set[str] | None:
    """
    :param installed: distributions that have plugins
    :return: those that ``SB3_GRPO_PLUGINS`` picks, or ``None`` when it is not set, and all are on
    """
    text = os.environ.get(ENVIRONMENT_VARIABLE)
    if text is None:
        return None
    installed = set(installed)
    picked = {normalize_name(part.strip()) for part in text.split(",") if part.strip()}
    for name in sorted(picked - installed):
        nearest = nearest_name(name, sorted(installed))
        warnings.warn(
            f"{ENVIRONMENT_VARIABLE} picks {name!r}, and no plugin of that name is installed"
            + (f"; did you mean {nearest!r}?" if nearest else f" (installed: {', '.join(sorted(installed)) or 'none'})"),
            stacklevel=2,
        )
    return picked


def load_plugins() -> Registries:
    """
    Load every plugin that is installed and not turned off. Each gets a manager of its own, so that whatever goes wrong
    has a name.

    :return: what they offer
    """
    found = find_plugins()
    picked = picked_distributions(plugin.distribution for plugin in found)
    registries = Registries()
    for plugin in found:
        if picked is not None and plugin.distribution not in picked:
            registries.plugins.append(_info(plugin, "off"))
            continue
        try:
            hooks, specs, problem = collect(plugin.entry_point.load)
        except BrokenPluginError as error:
            problem = str(error)
            registries.plugins.append(_info(plugin, "broken", problem=problem))
        else:
            registries.plugins.append(_info(plugin, "loaded", hooks, problem))
            _register(registries, specs, plugin.distribution)
        if problem:
            skipped = "is skipped" if registries.plugins[-1].status == "broken" else "is only partly used"
            warnings.warn(
                f"The plugin {plugin.distribution} {plugin.version} ({plugin.entry_point.value}) {skipped}: {problem}",
                stacklevel=2,
            )
    _warn_about_clashes(registries)
    return registries


def collect(load: Callable[[], Any]) -> tuple[tuple[str, ...], list[Any], str]:
    """
    Ask one plugin for all that it offers.

    :param load: a function that imports and returns the plugin, a module or an object
    :return: the names of its hooks, its specs, and what is odd about it (empty when nothing is)
    :raises BrokenPluginError: when it cannot be imported, a hook raises, or something else than specs comes back
    """
    manager = build_manager()
    try:
        plugin = load()
        manager.register(plugin)
    except (Exception, SystemExit) as error:  # even a plugin that calls sys.exit stops nobody else
        raise BrokenPluginError(_reason(error)) from error
    callers = manager.get_hookcallers(plugin) or []
    hooks = tuple(sorted(caller.name for caller in callers if caller.has_spec()))
    specs = [spec for hook in hooks for spec in _call_hook(manager, hook)]
    problem = ""
    try:
        manager.check_pending()
    except pluggy.PluginValidationError:
        unknown = sorted(caller.name for caller in callers if not caller.has_spec())
        problem = "; ".join(f"there is no hook {name!r}, did you mean {_nearest_hook(name)!r}?" for name in unknown)
    if not callers:
        what = plugin.__name__ if isinstance(plugin, ModuleType) else repr(plugin)
        problem = f"{what} implements no hook: is a function lacking its @hookimpl?"
    return hooks, specs, problem


def _call_hook(manager: pluggy.PluginManager, hook: str) -> list[Any]:
    """The specs that one plugin returns from one hook."""
    expected = HOOKS[hook].__name__
    try:
        results = getattr(manager.hook, hook)()
    except (Exception, SystemExit) as error:
        raise BrokenPluginError(f"{hook} raised {_reason(error)}") from error
    # pluggy drops a None on its way; a hook that forgot to return is not an empty offer
    if not results:
        raise BrokenPluginError(f"{hook} returned None; expected a list of {expected}")
    specs = results[0]
    if not isinstance(specs, list | tuple):
        raise BrokenPluginError(f"{hook} returned a {type(specs).__name__}; expected a list of {expected}")
    for spec in specs:
        if not isinstance(spec, HOOKS[hook]):
            raise BrokenPluginError(f"{hook} returned a list with a {type(spec).__name__}; expected {expected}")
    return list(specs)


def _nearest_hook(name: str) -> str:
    return nearest_name(name, HOOKS) or "sb3_grpo_rewards"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _info(plugin: Found, status: str, hooks: tuple[str, ...] = (), problem: str = "") -> PluginInfo:
    return PluginInfo(plugin.distribution, plugin.version, plugin.entry_point.value, status, hooks, problem)


def _register(registries: Registries, specs: Iterable[Any], source: str) -> None:
    for spec in specs:
        if isinstance(spec, RewardSpec):
            registries.rewards.add(spec, source)
        elif isinstance(spec, TransitionSpec):
            registries.transitions.add(spec, source)
        else:
            assert isinstance(spec, EnvWrapperSpec)
            registries.env_wrappers.add(spec, source)


def _warn_about_clashes(registries: Registries) -> None:
    kinds: tuple[Registry[Any], ...] = (registries.rewards, registries.transitions, registries.env_wrappers)
    for registry in kinds:
        for name, sources in registry.clashes().items():
            warnings.warn(
                f"The {registry.kind} name {name!r} is offered by {' and '.join(sources)}: asking for it is an error",
                stacklevel=3,
            )
