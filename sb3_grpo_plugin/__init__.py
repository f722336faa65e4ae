"""Critic-free GRPO for Stable-Baselines3, and the way RL Zoo finds it. Importing this package imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sb3_grpo_plugin._version import __version__

if TYPE_CHECKING:
    from sb3_grpo_plugin.grpo import GRPO
    from sb3_grpo_plugin.hookspecs import EnvWrapperSpec, RewardSpec, TransitionSpec, hookimpl
    from sb3_grpo_plugin.zoo import register

# Name -> module that defines it, imported at first use (PEP 562)
_HOME = {
    "GRPO": "grpo",
    "EnvWrapperSpec": "hookspecs",
    "RewardSpec": "hookspecs",
    "TransitionSpec": "hookspecs",
    "hookimpl": "hookspecs",
    "register": "zoo",
}

__all__ = ["GRPO", "EnvWrapperSpec", "RewardSpec", "TransitionSpec", "__version__", "hookimpl", "register"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
