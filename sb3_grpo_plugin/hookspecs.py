"""
The hooks that other pip packages implement: three functions, each of which returns a list.

A package declares a module under the entry-point group ``sb3_grpo_plugin``; functions in it that carry ``@hookimpl``
and one of the names below are called once, when a reward, model or wrapper is first asked for. Nothing is called at
import, and a package that fails is named, skipped and stops nobody else. ``docs/plugins.md`` walks through it.
"""

import pluggy

from sb3_grpo_plugin.rewards import EnvWrapperSpec, RewardSpec, TransitionSpec

PROJECT_NAME = "sb3_grpo_plugin"

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec
def sb3_grpo_rewards() -> list[RewardSpec]:  # type: ignore[empty-body]
    """
    Offer reward functions ``reward_function(state, action, next_state) -> reward``.

    GRPO scores alternatives with them (``reward_function="package/name"``), and ``RewardFunctionWrapper`` gives them to
    any other algorithm. ``reward_function="auto"`` finds the one that is bound to an environment ID.

    :return: one ``RewardSpec`` per reward function; an empty list is fine
    """


@hookspec
def sb3_grpo_transitions() -> list[TransitionSpec]:  # type: ignore[empty-body]
    """
    Offer batched transition models ``transition(state, action) -> (next_state, terminated)``.

    GRPO follows alternatives with the one that is bound to the training environment's ID instead of branching the
    simulator: a whole batch per call, on the policy's device. ``sb3_grpo_plugin.testing.check_transition`` compares a
    model with its environment.

    :return: one ``TransitionSpec`` per model; an empty list is fine
    """


@hookspec
def sb3_grpo_env_wrappers() -> list[EnvWrapperSpec]:  # type: ignore[empty-body]
    """
    Offer environment wrappers ``factory(env) -> env``.

    ``RegisteredWrappers`` puts around an environment all those that are bound to its ID, in the order of their names,
    in any zoo yml and with any algorithm.

    :return: one ``EnvWrapperSpec`` per wrapper; an empty list is fine
    """
