"""
Reward functions, transition models and environment wrappers by name: what plugins offer, how a name is
resolved, and the one place where what they return is checked.

Conventions of every function registered here (``B`` is the size of the batch):

- ``state``, ``next_state``: tensors ``[B, *observation_shape]`` in the environment's own units, on the policy's
  device (dicts of such tensors for ``Dict`` spaces)
- ``action``: as the environment received it, int64 ``[B, 1]`` (``Discrete``) or ``[B, n]`` (``MultiDiscrete``,
  ``MultiBinary``), float32 ``[B, action_dim]`` (``Box``)
- ``reward``: floating point ``[B, 1]`` (``[B]`` is accepted)
- ``terminated``: bool ``[B]``

Importing this module imports no torch: listing rewards stays quick.
"""

import difflib
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import gymnasium as gym
    import torch as th

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


class RewardFunction(Protocol):
    """
    How good a step was.

    :param state: before the step, ``[B, *observation_shape]``
    :param action: as the environment received it, ``[B, 1]`` or ``[B, n]``
    :param next_state: after the step, ``[B, *observation_shape]``
    :return: reward, floating point, ``[B, 1]`` or ``[B]``
    """

    def __call__(self, state: Any, action: Any, next_state: Any, /) -> Any: ...


class TransitionFunction(Protocol):
    """
    One step of an environment, for a whole batch of states.

    :param state: ``[B, *observation_shape]``
    :param action: as the environment receives it, ``[B, 1]`` or ``[B, n]``
    :return: the next state, alike in shape, dtype and device, and whether the episode terminated there,
        bool ``[B]`` (time limits are not part of a model)
    """

    def __call__(self, state: Any, action: Any, /) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class _Spec:
    """
    What every registered thing has.

    :param name: ``package/name``
    :param env_ids: the environment IDs it is bound to, exact or glob (``("Hopper-v4", "Hopper-v5")``, ``("ALE/*",)``)
    """

    name: str
    env_ids: tuple[str, ...]

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if not isinstance(self.name, str) or not NAME_PATTERN.fullmatch(self.name):
            raise ValueError(
                f"{kind}: the name {self.name!r} must look like 'package/name' (letters, digits, '.', '_' and '-')"
            )
        if isinstance(self.env_ids, str):
            raise ValueError(f"{kind} {self.name!r}: env_ids is a string; write a tuple, ({self.env_ids!r},)")
        env_ids = tuple(self.env_ids) if isinstance(self.env_ids, Iterable) else ()
        if not env_ids or not all(isinstance(env_id, str) and env_id for env_id in env_ids):
            raise ValueError(
                f"{kind} {self.name!r}: env_ids is {self.env_ids!r}; expected a tuple of environment IDs or globs"
            )
        object.__setattr__(self, "env_ids", env_ids)
        for attribute in [item.name for item in fields(self)[2:]]:
            value = getattr(self, attribute)
            if attribute != "description" and not callable(value):
                raise ValueError(f"{kind} {self.name!r}: {attribute} is {value!r}, which cannot be called")
            if attribute == "description" and (not isinstance(value, str) or "\n" in value):
                raise ValueError(f"{kind} {self.name!r}: the description must be one line, not {value!r}")

    def binds_exactly(self, env_id: str) -> bool:
        return env_id in self.env_ids

    def binds(self, env_id: str) -> bool:
        return self.binds_exactly(env_id) or any(fnmatch.fnmatchcase(env_id, pattern) for pattern in self.env_ids)


@dataclass(frozen=True)
class RewardSpec(_Spec):
    """
    A reward function with a name.

    :param name: ``package/name``; saved models keep this name, not the function
    :param env_ids: the environment IDs it is meant for, exact or glob
    :param function: ``reward_function(state, action, next_state) -> reward``, see :class:`RewardFunction`
    :param description: one line
    """

    function: RewardFunction
    description: str = ""


@dataclass(frozen=True)
class TransitionSpec(_Spec):
    """
    A batched transition model with a name.

    :param name: ``package/name``
    :param env_ids: the environment IDs whose steps it computes, exact or glob
    :param function: ``transition(state, action) -> (next_state, terminated)``, see :class:`TransitionFunction`
    :param description: one line
    """

    function: TransitionFunction
    description: str = ""


@dataclass(frozen=True)
class EnvWrapperSpec(_Spec):
    """
    An environment wrapper with a name.

    :param name: ``package/name``
    :param env_ids: the environment IDs it is put around, exact or glob
    :param factory: ``factory(env) -> env``: a ``gymnasium.Wrapper`` class or a function that returns one
    :param description: one line
    """

    factory: "Callable[[gym.Env], gym.Env]"
    description: str = ""


Spec = TypeVar("Spec", bound=_Spec)


@dataclass(frozen=True)
class PluginInfo:
    """
    One entry point of the group ``sb3_grpo_plugin``, for people to read.

    :param distribution: what ``pip`` calls it
    :param version: of the distribution
    :param module: the entry point's value
    :param status: ``"loaded"``, ``"broken"`` (skipped) or ``"off"`` (left out by ``SB3_GRPO_PLUGINS``)
    :param hooks: the hooks it implements
    :param problem: why it is broken, or what is odd about it; empty when all is well
    """

    distribution: str
    version: str
    module: str
    status: str
    hooks: tuple[str, ...] = ()
    problem: str = ""


class Registry(Generic[Spec]):
    """
    The specs of one kind, by name. Two specs of one name are an error for whoever asks for that name, and for
    nobody else: neither wins, so the order of installation decides nothing.

    :param kind: what one entry is called in messages, ``"reward"``
    :param plugins: all plugins that were looked at, to say what may be missing; shared and filled by the loader
    """

    def __init__(self, kind: str, plugins: "list[PluginInfo] | None" = None) -> None:
        self.kind = kind
        self.plugins = [] if plugins is None else plugins
        self._offers: dict[str, list[tuple[Spec, str]]] = {}

    def add(self, spec: Spec, source: str) -> None:
        """
        :param spec: to register
        :param source: the distribution that offers it
        """
        self._offers.setdefault(spec.name, []).append((spec, source))

    def __iter__(self) -> Iterator[tuple[Spec, str]]:
        """Every spec and its distribution, sorted; those that share a name too."""
        for name in sorted(self._offers):
            yield from sorted(self._offers[name], key=lambda offer: (offer[1], offer[0].env_ids))

    @property
    def names(self) -> list[str]:
        return sorted(self._offers)

    def clashes(self) -> dict[str, list[str]]:
        """
        :return: names that are offered more than once, and the distributions that do so
        """
        return {
            name: sorted(source for _, source in offers) for name, offers in sorted(self._offers.items()) if len(offers) > 1
        }

    def get(self, name: str) -> Spec:
        """
        :param name: ``package/name``
        :return: the spec of that name
        :raises ValueError: when no plugin offers it (with the nearest name), or several do
        """
        if name not in self._offers:
            raise ValueError(self._unknown(name))
        self._refuse_clash(name)
        return self._offers[name][0][0]

    def bound_to(self, env_id: str) -> list[Spec]:
        """
        :param env_id: as given to ``gymnasium.make``
        :return: the specs bound to it, by exact ID or glob, sorted by name
        :raises ValueError: when one of them shares its name with another
        """
        names = [name for name in self.names if any(spec.binds(env_id) for spec, _ in self._offers[name])]
        for name in names:
            self._refuse_clash(name)
        return [self._offers[name][0][0] for name in names]

    def missing_plugins(self) -> str:
        """
        :return: one sentence about plugins that could have offered more: broken, turned off, or none installed
        """
        sentences = [f"{info.distribution} was skipped: {info.problem}." for info in self.plugins if info.status == "broken"]
        off = sorted({info.distribution for info in self.plugins if info.status == "off"})
        if off:
            sentences.append(f"Turned off by the environment variable SB3_GRPO_PLUGINS: {', '.join(off)}.")
        if not self.plugins:
            sentences.append("No plugin is installed; the pack that belongs to this project is sb3-grpo-rewards.")
        return " ".join(sentences)

    def _refuse_clash(self, name: str) -> None:
        sources = sorted(source for _, source in self._offers[name])
        if len(sources) > 1:
            raise ValueError(
                f"The {self.kind} name {name!r} is offered {len(sources)} times, by {' and '.join(sources)}: neither is "
                "used. Uninstall one, rename it, or pick plugins with SB3_GRPO_PLUGINS=<distribution>,..."
            )

    def _unknown(self, name: str) -> str:
        parts = [f"There is no {self.kind} named {name!r}."]
        nearest = nearest_name(name, self.names)
        if nearest:
            parts.append(f"Did you mean {nearest!r}?")
        prefix = name.partition("/")[0] + "/"
        if "/" not in name:
            parts.append("Names look like 'package/name'.")
        elif not any(known.startswith(prefix) for known in self.names):
            parts.append(f"No loaded plugin offers a {self.kind} '{prefix}...': is the package that does installed?")
        parts.append(self.missing_plugins())
        parts.append("`sb3-grpo plugins` lists the installed plugins, `sb3-grpo rewards` what they offer.")
        return " ".join(part for part in parts if part)


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """
    :param name: as the user wrote it, with or without its ``package/``
    :param known: the names there are
    :return: the one that was probably meant
    """
    known = list(known)
    whole = difflib.get_close_matches(name, known, n=1)
    if whole:
        return whole[0]
    by_tail = {full.rpartition("/")[2]: full for full in known}
    tail = difflib.get_close_matches(name.rpartition("/")[2], by_tail, n=1)
    return by_tail[tail[0]] if tail else None


@dataclass
class Registries:
    """All that the installed plugins offer."""

    plugins: list[PluginInfo] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rewards: Registry[RewardSpec] = Registry("reward", self.plugins)
        self.transitions: Registry[TransitionSpec] = Registry("transition model", self.plugins)
        self.env_wrappers: Registry[EnvWrapperSpec] = Registry("environment wrapper", self.plugins)


@functools.cache
def registries() -> Registries:
    """
    :return: what the installed plugins offer; they are loaded at the first call.
        ``registries.cache_clear()`` makes the next call look again.
    """
    # imported late: the registry knows no plugin, and without this call none is ever imported
    from sb3_grpo_plugin.plugins import load_plugins

    return load_plugins()


def get_reward(name: str) -> RewardSpec:
    """
    :param name: ``package/name``
    :return: the registered reward
    :raises ValueError: when there is none of that name; says the nearest name and what may be missing
    """
    return registries().rewards.get(name)


def rewards_for(env_id: str) -> list[RewardSpec]:
    """
    :param env_id: as given to ``gymnasium.make``
    :return: the rewards bound to it, by exact ID or glob, sorted by name
    """
    return registries().rewards.bound_to(env_id)


def env_wrappers_for(env_id: str) -> list[EnvWrapperSpec]:
    """
    :param env_id: as given to ``gymnasium.make``
    :return: the environment wrappers bound to it, sorted by name
    """
    return registries().env_wrappers.bound_to(env_id)


def find_transition(env_id: str) -> TransitionSpec | None:
    """
    :param env_id: as given to ``gymnasium.make``
    :return: the transition model bound to it, or ``None``; an exact ID goes before a glob
    :raises ValueError: when several are bound equally closely
    """
    specs = registries().transitions.bound_to(env_id)
    specs = [spec for spec in specs if spec.binds_exactly(env_id)] or specs
    if len(specs) > 1:
        raise ValueError(
            f"{len(specs)} transition models are bound to {env_id}: {', '.join(spec.name for spec in specs)}. "
            "Pick plugins with SB3_GRPO_PLUGINS=<distribution>,..."
        )
    return specs[0] if specs else None


def resolve_reward(
    reward_function: str | RewardFunction | None, env_id: str | None
) -> tuple[str | None, RewardFunction | None]:
    """
    :param reward_function: ``None`` (the environment's own reward), a callable, a registered name, or ``"auto"``: the
        one that is bound to ``env_id``
    :param env_id: the environment's ID, where it is known
    :return: its name and the function; ``(None, None)`` for ``None``
    :raises ValueError: when the name is unknown, or ``"auto"`` finds none or several
    """
    if reward_function is None:
        return None, None
    if callable(reward_function):
        return getattr(reward_function, "__name__", type(reward_function).__name__), reward_function
    if not isinstance(reward_function, str):
        raise ValueError(f"reward_function is {reward_function!r}; expected None, a callable, a registered name or 'auto'")
    if reward_function != "auto":
        return reward_function, get_reward(reward_function).function
    if env_id is None:
        raise ValueError(
            "reward_function='auto' looks a reward up by environment ID, and this environment has none (it was not "
            "built with gymnasium.make): give the reward's name or a callable"
        )
    specs = rewards_for(env_id)
    if len(specs) > 1:
        raise ValueError(
            f"reward_function='auto': {len(specs)} rewards are bound to {env_id}, give one of them by name: "
            + ", ".join(spec.name for spec in specs)
        )
    if not specs:
        known = registries().rewards
        offers = "; ".join(f"{spec.name} for {', '.join(spec.env_ids)}" for spec, _ in known)
        raise ValueError(
            f"reward_function='auto': no reward is bound to {env_id}. Registered: {offers or 'none'}. "
            f"{known.missing_plugins()}".rstrip()
        )
    return specs[0].name, specs[0].function


def _tensors(*states: Any) -> "list[th.Tensor]":
    """Every tensor in the arguments, those inside dicts too."""
    return [tensor for state in states for tensor in (state.values() if isinstance(state, dict) else (state,))]


def _versions(tensors: "list[th.Tensor]") -> list[int]:
    # inference tensors keep no version
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def _call(kind: str, name: str | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a plugin's function without gradients; say whose fault it was when it raises or writes to its input."""
    import torch as th

    tensors = _tensors(*arguments)
    before = _versions(tensors)
    with th.no_grad():
        try:
            result = function(*arguments)
        except Exception as error:
            raise RuntimeError(
                f"The {kind} {name!r} raised {type(error).__name__}: {error}. It was given "
                + ", ".join(_describe(argument) for argument in arguments)
            ) from error
    if _versions(tensors) != before:
        raise ValueError(
            f"The {kind} {name!r} modified its input in place; the tensors belong to the caller: work on a copy "
            "(x = x.clone()) or use operations that return a new tensor"
        )
    return result


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_describe(item)}" for key, item in value.items()) + "}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def _check_finite(kind: str, name: str | None, what: str, values: "th.Tensor", where: "th.Tensor | None") -> None:
    """``values`` is ``[B, ...]``; rows outside of ``where`` (bool ``[B]``) may hold anything."""
    import torch as th

    finite = th.isfinite(values)
    if where is None and bool(finite.all()):
        return
    rows = finite.reshape(len(finite), -1).all(dim=1)
    if where is not None:
        rows = rows | ~where
    if bool(rows.all()):
        return
    bad = th.nonzero(~rows)[:, 0]
    row = int(bad[0])
    raise ValueError(
        f"The {kind} {name!r} returned NaN or infinity as {what} in {len(bad)} of {len(rows)} rows; "
        f"the first is row {row}: {values[row].tolist()}"
    )


def evaluate_reward(
    function: RewardFunction,
    name: str | None,
    state: Any,
    action: "th.Tensor",
    next_state: Any,
    where: "th.Tensor | None" = None,
) -> "th.Tensor":
    """
    Call a reward function without gradients and check what it returns.

    :param function: see :class:`RewardFunction`
    :param name: for messages
    :param state: ``[B, *observation_shape]``, the environment's units
    :param action: as the environment received it, ``[B, 1]`` or ``[B, n]``
    :param next_state: ``[B, *observation_shape]``, the environment's units
    :param where: bool ``[B]``: the rows that count, all by default. Others may hold anything (a candidate that
        terminated earlier), and their reward is returned as 0.
    :return: rewards ``[B]``, of the dtype that the function returned
    :raises ValueError: when the shape, dtype or device is wrong, a value is NaN or infinite, or the input was modified
    :raises RuntimeError: when the function itself raises
    """
    import torch as th

    reward = _call("reward function", name, function, state, action, next_state)
    batch_size, device = len(action), action.device
    expected = f"a floating point tensor of shape ({batch_size}, 1) or ({batch_size},): one number per row of the batch"
    if not isinstance(reward, th.Tensor):
        raise ValueError(f"The reward function {name!r} returned a {type(reward).__name__}; expected {expected}")
    if reward.shape not in ((batch_size, 1), (batch_size,)):
        raise ValueError(f"The reward function {name!r} returned the shape {tuple(reward.shape)}; expected {expected}")
    if not reward.is_floating_point():
        raise ValueError(
            f"The reward function {name!r} returned the dtype {reward.dtype}; expected {expected} (append .float())"
        )
    if reward.device != device:
        raise ValueError(
            f"The reward function {name!r} returned a tensor on {reward.device}; its input was on {device}: make new "
            "tensors there (torch.zeros_like, or device=state.device)"
        )
    reward = reward.reshape(batch_size)
    _check_finite("reward function", name, "reward", reward, where)
    return reward if where is None else th.where(where, reward, th.zeros_like(reward))


def check_stateless(function: RewardFunction, name: str | None, state: Any, action: "th.Tensor", next_state: Any) -> None:
    """
    Refuse a reward function that keeps state or draws random numbers: look-ahead calls it for alternatives that never
    happen, in an order of its own. Two calls on one batch must agree; once per ``learn`` is enough.

    :param function: see :class:`RewardFunction`
    :param name: for messages
    :param state: ``[B, *observation_shape]``
    :param action: ``[B, 1]`` or ``[B, n]``
    :param next_state: ``[B, *observation_shape]``
    :raises ValueError: when the two calls differ
    """
    import torch as th

    first, second = (evaluate_reward(function, name, state, action, next_state).clone() for _ in range(2))
    if not th.allclose(first, second, rtol=1e-6, atol=1e-9):
        row = int((first - second).abs().argmax())
        raise ValueError(
            f"The reward function {name!r} gave two answers for one batch (row {row}: {first[row].item():.6g}, then "
            f"{second[row].item():.6g}): it keeps state or draws random numbers. A reward must depend on state, action "
            "and next_state alone"
        )


def evaluate_transition(
    spec: TransitionSpec, state: Any, action: "th.Tensor", where: "th.Tensor | None" = None
) -> "tuple[Any, th.Tensor]":
    """
    Call a transition model without gradients and check what it returns.

    :param spec: of the model
    :param state: ``[B, *observation_shape]``, the environment's units
    :param action: as the environment receives it, ``[B, 1]`` or ``[B, n]``
    :param where: bool ``[B]``: the rows that must be finite, all by default
    :return: next state, alike in shape, dtype and device, and ``terminated``, bool ``[B]``
    :raises ValueError: when a shape, dtype or device is wrong, a value is NaN or infinite, or the input was modified
    :raises RuntimeError: when the model itself raises
    """
    import torch as th

    kind = "transition model"
    result = _call(kind, spec.name, spec.function, state, action)
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(
            f"The {kind} {spec.name!r} returned a {type(result).__name__}; expected a tuple (next_state, terminated)"
        )
    next_state, terminated = result
    if isinstance(state, dict):
        if not isinstance(next_state, dict) or next_state.keys() != state.keys():
            raise ValueError(
                f"The {kind} {spec.name!r} returned the next state {_describe(next_state)}; expected {_describe(state)}"
            )
        pairs = [(f"next state {key!r}", state[key], next_state[key]) for key in state]
    else:
        pairs = [("next state", state, next_state)]
    for what, old, new in pairs:
        if not isinstance(new, th.Tensor) or (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
            where_to = f" on {new.device}" if isinstance(new, th.Tensor) else ""
            raise ValueError(
                f"The {kind} {spec.name!r} returned the {what} {_describe(new)}{where_to}; "
                f"expected what it was given, {_describe(old)} on {old.device}"
            )
        if new.is_floating_point():
            _check_finite(kind, spec.name, what, new, where)
    batch_size, device = len(action), action.device
    if not isinstance(terminated, th.Tensor) or (terminated.shape, terminated.dtype, terminated.device) != (
        (batch_size,),
        th.bool,
        device,
    ):
        raise ValueError(
            f"The {kind} {spec.name!r} returned terminated as {_describe(terminated)}; expected bool ({batch_size},) "
            f"on {device}"
        )
    return next_state, terminated
