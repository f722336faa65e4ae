"""
Snapshots of one environment, and branches that continue from them without touching it.

An environment is a stack of wrappers around a simulator. A snapshot holds the Python attributes of every layer that
change, and the simulator's own state. A branch is a second stack of the same classes: its layers share what never changes
(constants, spaces, models) with all other branches and own a copy of the rest. That makes a branch some ten times cheaper
than ``copy.deepcopy`` of the environment, and steps of it need no copying at all.

Four families say what "the simulator's own state" is:

- ``deepcopy``: nothing beyond Python attributes (classic control, toy text, most environments written in Python)
- ``mujoco``: the state vector of the physics; all branches take turns in one scratch ``MjData``
- ``ale``: the emulator's state; all branches take turns in one scratch emulator
- ``replay``: how the episode started, and the actions since then; a branch lives all of it again in a simulator of its own

Left out of branches are layers that only keep records or limit time: ``Monitor``, ``TimeLimit``, video recorders, checkers.
"""

import copy
import enum
import random
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces, wrappers
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.monitor import Monitor

FAMILIES = ("auto", "deepcopy", "mujoco", "ale", "replay")

# no influence on what the agent sees or earns
RECORD_LAYERS: tuple[type, ...] = (
    Monitor,
    wrappers.RecordEpisodeStatistics,
    wrappers.RecordVideo,
    wrappers.RenderCollection,
    wrappers.HumanRendering,
)
# these only watch over when and how an episode may be stepped: part of a state, but not of a branch
LIMIT_LAYERS: tuple[type, ...] = (wrappers.TimeLimit, wrappers.OrderEnforcing, wrappers.PassiveEnvChecker)

# Arrays of MjData that lag behind the state vector, and that environments read before they step ("x_position_before")
MUJOCO_DERIVED = ("xpos", "xquat", "xipos", "geom_xpos", "site_xpos", "subtree_com", "cvel", "sensordata")

# Tables that are never written to, by module: FrozenLake's transitions alone would take 0.6 ms to copy
CONSTANT_ATTRIBUTES = {"gymnasium.envs.toy_text": ("P",)}

DISPLAY_MODULES = ("pygame", "glfw", "OpenGL")

Memo = dict[Any, Any]
LayerState = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Copying attributes. copy.deepcopy takes 2 us for a small array and 120 us for a random generator; these take 0.3 and 10.
# Like deepcopy's, the memo maps the ids of originals to their copies.


class _Ref:
    """Stands in a snapshot for something that each branch has its own of, such as a layer of the stack."""

    def __init__(self, key: Any) -> None:
        self.key = key

    def __deepcopy__(self, memo: Memo) -> Any:
        return memo[("ref", self.key)]


@dataclass(frozen=True)
class _GeneratorState:
    """A ``numpy.random.Generator`` in a snapshot."""

    bit_generator: type
    state: Any


@dataclass(frozen=True)
class _Closure:
    """A function in a snapshot that closes over layers or over something that can be written to."""

    function: types.FunctionType
    contents: tuple


class _NoSeed(np.random.bit_generator.ISeedSequence):
    """Makes a bit generator whose state is set right after: seeding one properly takes longer than all the rest."""

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return np.zeros(n_words, dtype=dtype)


_NO_SEED = _NoSeed()


def _keep(value: Any, memo: Memo) -> Any:
    return value


def _own(value: Any, memo: Memo) -> Any:
    # a space has a random generator, which must not be shared with the training environment
    return copy.deepcopy(value) if isinstance(value, spaces.Space) else value


def _drop(value: Any, memo: Memo) -> Any:
    return None


def _array(value: np.ndarray, memo: Memo) -> np.ndarray:
    return copy.deepcopy(value, memo) if value.dtype.hasobject else value.copy()


def _generator(value: np.random.Generator, memo: Memo) -> _GeneratorState:
    return _GeneratorState(type(value.bit_generator), value.bit_generator.state)


def _generator_state(value: _GeneratorState, memo: Memo) -> np.random.Generator:
    bit_generator = value.bit_generator(_NO_SEED)
    bit_generator.state = value.state
    return np.random.Generator(bit_generator)


def _method(value: types.MethodType, memo: Memo) -> types.MethodType:
    return types.MethodType(value.__func__, _copy(value.__self__, memo))


def _function(value: types.FunctionType, memo: Memo) -> Any:
    try:
        contents = tuple(cell.cell_contents for cell in value.__closure__ or ())
    except ValueError:  # a cell that is not filled yet
        return value
    # AddRenderObservation renders the environment in a lambda; what deepcopy would have to copy is left alone
    if all(_copier_of(content) in (_keep, _own, copy.deepcopy) for content in contents):
        return value
    memo[id(value)] = value  # it may close over itself
    return _Closure(value, tuple(_copy(content, memo) for content in contents))


def _closure(value: _Closure, memo: Memo) -> types.FunctionType:
    original = value.function
    cells = tuple(types.CellType(_copy(content, memo)) for content in value.contents)
    function = types.FunctionType(original.__code__, original.__globals__, original.__name__, original.__defaults__, cells)
    function.__kwdefaults__ = original.__kwdefaults__
    return function


def _sequence(value: Any, memo: Memo) -> Any:
    if any(_copier_of(item) is _drop for item in value):
        return None  # a list of sprites: environments load them again when it is None
    items = [_copy(item, memo) for item in value]
    return items if type(value) is list else deque(items, value.maxlen) if type(value) is deque else type(value)(items)


def _mapping(value: dict, memo: Memo) -> dict | None:
    if any(_copier_of(item) is _drop for item in value.values()):
        return None
    return {_copy(key, memo): _copy(item, memo) for key, item in value.items()}


def _ref(value: _Ref, memo: Memo) -> Any:
    return memo[("ref", value.key)]


def _environment(value: gym.Env, memo: Memo) -> Any:
    # known layers are in the memo; deepcopy would silently build EzPickle environments anew
    raise ValueError(f"it refers to {value}, which is not a layer of this environment")


_ATOMS: tuple[type, ...] = (
    *(bool, int, float, complex, str, bytes, type(None), type, range, slice, enum.Enum, np.generic, np.dtype),
    *(th.dtype, th.device, types.BuiltinFunctionType, types.ModuleType),
)
_COPIERS: dict[type, Callable[[Any, Memo], Any]] = {
    np.ndarray: _array,
    np.random.Generator: _generator,
    _GeneratorState: _generator_state,
    types.FunctionType: _function,
    types.MethodType: _method,
    _Closure: _closure,
    list: _sequence,
    tuple: _sequence,
    set: _sequence,
    deque: _sequence,
    dict: _mapping,
    _Ref: _ref,
}


def _copier_of(value: Any) -> Callable[[Any, Memo], Any]:
    """How values of this type are copied; looked up once per type."""
    kind = type(value)
    if kind not in _COPIERS:
        root = kind.__module__.split(".")[0]
        if issubclass(kind, _ATOMS):
            _COPIERS[kind] = _keep
        elif issubclass(kind, gym.Env):
            _COPIERS[kind] = _environment
        elif issubclass(kind, (spaces.Space, EnvSpec)) or _is_mujoco(value, "MjModel") or _is_mujoco(value, "MjData"):
            _COPIERS[kind] = _own
        elif root in DISPLAY_MODULES or kind.__module__.endswith("mujoco_rendering"):
            _COPIERS[kind] = _drop
        else:
            _COPIERS[kind] = copy.deepcopy
    return _COPIERS[kind]


def _copy(value: Any, memo: Memo) -> Any:
    copier = _COPIERS.get(type(value)) or _copier_of(value)
    if copier is _keep:
        return value
    key = id(value)
    if key not in memo:
        memo[key] = copier(value, memo)
    return memo[key]


def _is_mujoco(value: Any, name: str) -> bool:
    return type(value).__name__ == name and type(value).__module__.startswith("mujoco")


# ---------------------------------------------------------------------------------------------------------------------
# The families


class Deepcopy:
    """
    The Python attributes are all there is.

    :param base: the innermost environment
    """

    name = "deepcopy"
    takes_turns = False  # whether branches share one scratch simulator, loaded before and saved after each step
    is_replayed = False
    is_sticky = False  # whether a branch may take another turn than the environment would, by the simulator's own noise

    def __init__(self, base: Any) -> None:
        self.base = base
        self.owned: dict[str, Any] = {}  # attributes of the base that hold the simulator, and what branches have instead

    def begin_episode(self, base: gym.Env) -> None:
        """
        Called before an episode starts.

        :param base: the training environment's base, or a branch's
        """

    def capture(self, action: Any) -> Any:
        """
        :param action: the training environment's last one, ``None`` after a reset
        :return: state of the training environment's simulator
        """
        return None

    def restore(self, state: Any) -> None:
        """
        :param state: for the training environment's simulator
        """

    def load(self, state: Any) -> None:
        """
        :param state: for the scratch simulator
        """

    def save(self, action: Any) -> Any:
        """
        :param action: that the scratch simulator was stepped with
        :return: state of the scratch simulator
        """


class Mujoco(Deepcopy):
    """
    Everything that the integration depends on, as one vector, and the derived arrays that environments read before a step.

    The model is shared and not part of the state: where an environment changes it (domain randomization), branches run with
    the model of the moment they run in.

    :param base: an environment with a MuJoCo ``model`` and ``data``
    """

    name = "mujoco"
    takes_turns = True

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        import mujoco

        self._mujoco = mujoco
        self._signature = mujoco.mjtState.mjSTATE_INTEGRATION
        self._model, self._data = base.model, base.data
        self._scratch = mujoco.MjData(self._model)
        self._size = mujoco.mj_stateSize(self._model, self._signature)
        self._live_arrays = [getattr(self._data, name) for name in MUJOCO_DERIVED]
        self._scratch_arrays = [getattr(self._scratch, name) for name in MUJOCO_DERIVED]
        self.owned = {"model": self._model, "data": self._scratch}

    def _get(self, data: Any, arrays: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        vector = np.empty(self._size)
        self._mujoco.mj_getState(self._model, data, vector, self._signature)
        return (vector, *[array.copy() for array in arrays])

    def _set(self, data: Any, arrays: list[np.ndarray], state: tuple[np.ndarray, ...]) -> None:
        self._mujoco.mj_setState(self._model, data, state[0], self._signature)
        for array, values in zip(arrays, state[1:], strict=True):
            array[...] = values

    def capture(self, action: Any) -> Any:
        if self.base.model is not self._model or self.base.data is not self._data:
            raise ValueError(f"{self.base} replaced its MuJoCo model or data since SnapshotWrapper first looked at them.")
        return self._get(self._data, self._live_arrays)

    def restore(self, state: Any) -> None:
        self._set(self._data, self._live_arrays, state)

    def load(self, state: Any) -> None:
        self._set(self._scratch, self._scratch_arrays, state)

    def save(self, action: Any) -> Any:
        return self._get(self._scratch, self._scratch_arrays)


class Ale(Deepcopy):
    """
    The emulator's state, its random generator included.

    The emulator does not tell which action it would repeat ("sticky actions"), and its state lacks it. Where actions are
    sticky, that of the last step is played into the scratch emulator before a state is loaded. The last step may itself
    have been all repetition, so there (``ALE/...-v5``) about one branch step in a hundred repeats another action than the
    training environment would; without (``...NoFrameskip-v4``) branches are exact.

    :param base: ``ale_py``'s environment
    """

    name = "ale"
    takes_turns = True
    n_primers = 3  # each may be dropped in favour of a repetition, too

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        twin: Any = rebuild(base)
        self._scratch = twin.ale
        self.owned = {"ale": self._scratch}
        self.is_sticky = base.ale.getFloat("repeat_action_probability") > 0 and not base.continuous

    def _get(self, ale: Any, action: Any) -> tuple[Any, int]:
        return ale.cloneState(include_rng=True), 0 if action is None else int(action)

    def _set(self, ale: Any, state: tuple[Any, int]) -> None:
        if self.is_sticky:
            if ale.game_over():  # it would ignore the primers
                ale.restoreState(state[0])
            for _ in range(self.n_primers):
                ale.act(self.base._action_set[state[1]], 1.0)
        ale.restoreState(state[0])

    def capture(self, action: Any) -> Any:
        return self._get(self.base.ale, action if not self.base.continuous else None)

    def restore(self, state: Any) -> None:
        self._set(self.base.ale, state)

    def load(self, state: Any) -> None:
        self._set(self._scratch, state)

    def save(self, action: Any) -> Any:
        return self._get(self._scratch, action if not self.base.continuous else None)


class Replay(Deepcopy):
    """
    How the episode started and what was done since: a branch does the same again in a simulator of its own.

    A Box2D world that has seen other episodes before gives other results in the last digits, and BipedalWalker and
    CarRacing keep theirs over resets. So each episode gets a new world here, in the training environment too.

    :param base: the innermost environment; built again from its constructor's arguments or its spec
    """

    name = "replay"
    is_replayed = True

    def begin_episode(self, base: Any) -> None:
        world: Any = getattr(base, "world", None)
        if type(world).__module__.split(".")[0] == "Box2D" and hasattr(base, "_destroy"):
            base._destroy()
            base.world = type(world)(gravity=world.gravity)


def rebuild(base: gym.Env) -> gym.Env:
    """
    Build the innermost environment a second time, for no display.

    :param base: made by ``gymnasium.make``, or an ``EzPickle``
    :return: a new environment, not reset yet
    :raises ValueError: it says neither how it was constructed nor which registered environment it is
    """
    kwargs = getattr(base, "_ezpickle_kwargs", None)
    if kwargs is not None:
        kwargs = {key: value for key, value in kwargs.items() if not (key == "render_mode" and value == "human")}
        return type(base)(*base._ezpickle_args, **kwargs)  # type: ignore[attr-defined]
    if base.spec is not None:
        return gym.make(base.spec, render_mode=None).unwrapped
    raise ValueError(
        f"{base} cannot be built a second time: construct it with gymnasium.make, or derive it from gymnasium.utils.EzPickle."
    )


def pick_family(base: gym.Env) -> type[Deepcopy]:
    """
    :param base: the innermost environment
    :return: the family that ``"auto"`` stands for
    :raises ValueError: only ``"replay"`` would do, which has to be asked for because of its cost
    """
    values = list(vars(base).values())
    if any(_is_mujoco(value, "MjData") for value in values):
        return Mujoco
    if any(type(value).__name__ == "ALEInterface" for value in values):
        return Ale
    if any(type(value).__module__.split(".")[0] == "Box2D" for value in values):
        raise ValueError(
            f"{base} runs on Box2D, whose state cannot be copied. Its branches can replay the episode from its start, which "
            "costs the episode's length per branch: ask for that with SnapshotWrapper(env, family='replay') (in a zoo yml: "
            "`env_wrapper: [{sb3_grpo_plugin.wrappers.SnapshotWrapper: {family: replay}}]`)."
        )
    return Deepcopy


# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """
    What a replay needs. Snapshots of one episode share it.

    :param layers: attributes of the wrappers before the reset, and of the base what survives one
    :param generator: of the base, before the reset
    :param seed: given to the reset
    :param options: given to the reset
    :param actions: of all steps since
    """

    layers: list[LayerState]
    generator: Any
    seed: int | None
    options: Any
    actions: list[Any]


@dataclass
class State:
    """
    A snapshot of an environment; picklable where the simulator's state is.

    :param kind: which environments it fits: compared by ``set_state``
    :param layers: attributes that changed since the copier was built, per layer, innermost first
    :param simulator: the family's own state
    :param episode: for the replay family, with the number of steps to replay
    :param steps: number of steps since the episode's start (replay)
    :param observation: what the environment last returned
    """

    kind: tuple
    layers: list[LayerState]
    simulator: Any
    observation: Any = None
    episode: Episode | None = None
    steps: int = 0


class Branch:
    """
    One alternative future.

    :param env: stack of layers of its own
    :param simulator: the family's state, where branches take turns in one scratch simulator
    """

    __slots__ = ("env", "simulator")

    def __init__(self, env: gym.Env, simulator: Any) -> None:
        self.env = env
        self.simulator = simulator


class EnvCopier:
    """
    Takes snapshots of an environment and makes branches of them.

    :param env: wrapper stack
    :param family: one of ``FAMILIES``
    :raises ValueError: the family is unknown or does not suit the environment
    """

    def __init__(self, env: gym.Env, family: str = "auto") -> None:
        if family not in FAMILIES:
            raise ValueError(f"family is {family!r}; expected one of {', '.join(map(repr, FAMILIES))}.")
        self.env = env
        base = env.unwrapped
        classes = {"deepcopy": Deepcopy, "mujoco": Mujoco, "ale": Ale, "replay": Replay}
        family_class = pick_family(base) if family == "auto" else classes[family]
        try:
            self.family = family_class(base)
        except (AttributeError, ImportError) as error:
            raise ValueError(f"The snapshot family {family_class.name!r} does not suit {env}: {error}.") from error
        stack = list(_layers(env))
        self._state_layers = [layer for layer in stack if not _keeps_records(layer)]
        self._branch_layers = [layer for layer in self._state_layers if not isinstance(layer, LIMIT_LAYERS)]
        self._refs = self._make_refs(stack)
        self._templates = {id(layer): self._template(layer) for layer in self._state_layers}
        self._pool: list[gym.Env] = []  # simulators for replays, to be used again
        self.kind = self._kind()

    # -- what a layer consists of --------------------------------------------------------------------------------

    def _make_refs(self, stack: Sequence[gym.Env]) -> Memo:
        """Placeholders for the layers (for one that branches leave out: for the next inner one) and the simulator."""
        refs: Memo = {}
        index = -1
        for layer in stack:
            index += layer in self._branch_layers
            refs[id(layer)] = _Ref(index)
        for name in self.family.owned:
            refs[id(getattr(stack[0], name))] = _Ref(name)
        return refs

    def _template(self, layer: gym.Env) -> LayerState:
        """The attributes that all branches share: constants, and scratch versions of spaces and simulators."""
        template = {}
        constant = CONSTANT_ATTRIBUTES.get(type(layer).__module__.rpartition(".")[0], ())
        for name, value in vars(layer).items():
            copier = _copier_of(value)
            if name in constant:
                template[name] = value
            elif id(value) in self._refs:
                key = self._refs[id(value)].key
                if key in self.family.owned:
                    template[name] = self.family.owned[key]
            elif copier in (_keep, _own, _drop):
                template[name] = copier(value, {})
            elif copier is _function and _function(value, dict(self._refs)) is value:
                template[name] = value
        return template

    def _kind(self) -> tuple:
        spec = self.env.unwrapped.spec
        base = type(self.env.unwrapped)
        kwargs = {key: value for key, value in spec.kwargs.items() if key != "render_mode"} if spec else {}
        name = spec.id if spec else f"{base.__module__}.{base.__qualname__}"
        layers = tuple(type(layer).__name__ for layer in self._branch_layers[1:])
        return (name, repr(sorted(kwargs.items())), layers, self.family.name)

    def _capture_layer(self, layer: gym.Env, template: LayerState, memo: Memo, complete: bool = False) -> LayerState:
        """
        :param layer: to look at
        :param template: what all of its branches share
        :param memo: for copying
        :param complete: include what equals the template: another environment's template may differ
        """
        state = {}
        for name, value in vars(layer).items():
            copier = _COPIERS.get(type(value)) or _copier_of(value)
            if copier is _keep:
                if complete or template.get(name, _Ref) is not value:
                    state[name] = value
            elif copier is _own or copier is _drop:
                if not complete and template.get(name) is None:
                    state[name] = copier(value, memo)
            elif name != "env" and (template.get(name, _Ref) is not value or complete):
                try:
                    state[name] = _copy(value, memo)
                except Exception as error:
                    raise ValueError(
                        f"The attribute {name!r} ({type(value).__module__}.{type(value).__qualname__}) of "
                        f"{type(layer).__name__} cannot be copied: {error}. Its branches can replay the episode from its "
                        "start instead: SnapshotWrapper(env, family='replay')."
                    ) from error
        return state

    # -- snapshots -----------------------------------------------------------------------------------------------

    def begin_episode(self, seed: int | None, options: Any) -> Episode | None:
        """
        Note what a replay needs; to be called before the environment is reset.

        :param seed: given to the reset
        :param options: given to the reset
        :return: the episode, or ``None`` for other families
        """
        if not self.family.is_replayed:
            return None
        base = self.env.unwrapped
        self.family.begin_episode(base)
        memo = dict(self._refs)
        # numbers of the base can survive a reset (curricula); its simulator's objects cannot be carried over
        numbers = {name: value for name, value in vars(base).items() if type(value) in (bool, int, float, str)}
        layers = [
            numbers,
            *(self._capture_layer(layer, self._templates[id(layer)], memo) for layer in self._branch_layers[1:]),
        ]
        # reading np_random makes the generator if there is none yet, as the reset would
        generator = None if seed is not None else _generator(base.np_random, {})
        return Episode(layers, generator, seed, copy.deepcopy(options), [])

    def snapshot(self, observation: Any, action: Any = None, episode: Episode | None = None, complete: bool = False) -> State:
        """
        Copy the environment's state. Nothing is stepped, and no random number is drawn.

        :param observation: what the environment last returned
        :param action: the last one, ``None`` after a reset
        :param episode: for the replay family
        :param complete: include the layers that only limit time
        :return: state
        :raises ValueError: something cannot be copied, or there is no episode to replay
        """
        if self.family.is_replayed:
            if episode is None:
                raise ValueError("The replay family has to see an episode from its start: reset the environment first.")
            limits = self._capture(self._limit_layers(), complete) if complete else []
            return State(self.kind, limits, None, observation, episode, len(episode.actions))
        layers = self._capture(self._state_layers if complete else self._branch_layers, complete)
        return State(self.kind, layers, self.family.capture(action), observation)

    def _limit_layers(self) -> list[gym.Env]:
        return [layer for layer in self._state_layers if isinstance(layer, LIMIT_LAYERS)]

    def _capture(self, layers: Sequence[gym.Env], complete: bool) -> list[LayerState]:
        memo = dict(self._refs)
        return [self._capture_layer(layer, self._templates[id(layer)], memo, complete) for layer in layers]

    def restore(self, state: State) -> None:
        """
        Put the environment itself into a state; record-keeping layers such as ``Monitor`` stay as they are.

        :param state: made with ``complete=True``, by this copier or by one of an equal environment
        :raises ValueError: the state is another environment's
        """
        if not isinstance(state, State) or state.kind != self.kind:
            got = state.kind if isinstance(state, State) else type(state).__name__
            raise ValueError(f"This is a state of another environment: {got}; expected {self.kind}.")
        memo = {("ref", ref.key): layer for layer, ref in zip(self._branch_layers, self._layer_refs(), strict=True)}
        for name in self.family.owned:
            memo[("ref", name)] = getattr(self.env.unwrapped, name)
        if state.episode is not None:
            shell, _ = self._replay(state, self.env.unwrapped)
            for layer, twin in zip(self._branch_layers, reversed(list(_outer_to_inner(shell))), strict=True):
                vars(layer).update({name: value for name, value in vars(twin).items() if name != "env"})
            self._fill(self._limit_layers(), state.layers, memo)
        else:
            self._fill(self._state_layers, state.layers, memo)
            self.family.restore(state.simulator)

    def _layer_refs(self) -> list[_Ref]:
        return [self._refs[id(layer)] for layer in self._branch_layers]

    def _fill(self, layers: Sequence[gym.Env], states: Sequence[LayerState], memo: Memo) -> None:
        for layer, state in zip(layers, states, strict=True):
            vars(layer).update({name: _copy(value, memo) for name, value in state.items() if name != "render_mode"})

    # -- branches ------------------------------------------------------------------------------------------------

    def branch(self, state: State) -> tuple[Branch, int]:
        """
        Make a branch.

        :param state: where it starts
        :return: the branch, and the number of simulator steps it took to make it
        """
        if state.episode is None:
            return Branch(self._stack(state.layers), state.simulator), 0
        env, steps = self._replay(state, self._pool.pop() if self._pool else rebuild(self.env.unwrapped))
        return Branch(env, None), steps

    def release(self, branch: Branch) -> None:
        """
        Keep what is expensive to make for later branches.

        :param branch: not to be used any more
        """
        if self.family.is_replayed:
            self._pool.append(branch.env.unwrapped)

    def step(self, branch: Branch, action: Any) -> tuple[Any, Any, bool]:
        """
        Step a branch.

        :param branch: not terminated
        :param action: as the environment receives it
        :return: observation, reward, whether the episode terminated
        """
        family = self.family
        if not family.takes_turns:
            observation, reward, terminated, _, _ = branch.env.step(action)
            return observation, reward, terminated
        family.load(branch.simulator)
        observation, reward, terminated, _, _ = branch.env.step(action)
        branch.simulator = family.save(action)
        return observation, reward, terminated

    def _stack(self, states: Sequence[LayerState], base: gym.Env | None = None) -> gym.Env:
        """
        A stack of new layers.

        :param states: per layer, innermost first
        :param base: innermost environment to use as it is
        :return: the outermost layer
        """
        memo: Memo = {("ref", name): value for name, value in self.family.owned.items()}
        layers = [
            base if base is not None and index == 0 else _shell(layer) for index, layer in enumerate(self._branch_layers)
        ]
        for index, layer in enumerate(layers):
            memo[("ref", index)] = layer
        for index, (original, layer, state) in enumerate(zip(self._branch_layers, layers, states, strict=True)):
            if layer is base:
                continue
            attributes = self._templates[id(original)].copy()
            for name, value in state.items():
                attributes[name] = _copy(value, memo)
            if index:
                attributes["env"] = layers[index - 1]
            elif attributes.get("render_mode") == "human":
                attributes["render_mode"] = None  # a branch must not appear on the screen
            layer.__dict__ = attributes
        return layers[-1]

    def _replay(self, state: State, base: gym.Env) -> tuple[gym.Env, int]:
        episode = state.episode
        assert episode is not None
        vars(base).update(episode.layers[0])
        if base is not self.env.unwrapped and getattr(base, "render_mode", None) == "human":
            base.render_mode = None
        if episode.generator is not None:
            base._np_random = _generator_state(episode.generator, {})
        self.family.begin_episode(base)
        env = self._stack(episode.layers, base)
        observation, _ = env.reset(seed=episode.seed, options=episode.options)
        for action in episode.actions[: state.steps]:
            observation = env.step(action)[0]
        if not _equal(observation, state.observation):
            raise ValueError(
                f"Replaying {state.steps} actions of an episode did not lead {self.env} back to the observation it had made: "
                "its future depends on more than its seed and the actions (on earlier episodes, or on a global random "
                "generator), so it cannot be branched."
            )
        return env, state.steps

    def check(self, state: State) -> None:
        """
        Compare the futures of a branch and of a branch made from a snapshot of that branch, for a few random actions: they
        differ when part of the simulator's state escapes us (for example in an extension module).

        :param state: where to start
        :raises ValueError: the futures differ
        """
        # a replay is compared with the observation it has to lead to
        if self.family.is_replayed or self.family.is_sticky:
            return
        action_space = copy.deepcopy(self.env.action_space)
        action_space.seed(0)
        first, _ = self.branch(state)
        for _ in range(3):
            if self.step(first, action_space.sample())[2]:
                return
        layers = list(reversed(list(_outer_to_inner(first.env))))
        memo: Memo = {id(layer): _Ref(index) for index, layer in enumerate(layers)}
        memo.update({id(value): _Ref(name) for name, value in self.family.owned.items()})
        templates = [self._templates[id(layer)] for layer in self._branch_layers]
        states = [self._capture_layer(layer, template, memo) for layer, template in zip(layers, templates, strict=True)]
        second, _ = self.branch(State(self.kind, states, first.simulator))
        both = ((first, GlobalRandom()), (second, GlobalRandom()))
        for _ in range(3):
            action = action_space.sample()
            steps = []
            for branch, guard in both:
                with guard():
                    steps.append(self.step(branch, action))
            if not _equal(steps[0], steps[1]):
                raise ValueError(
                    f"The snapshot family {self.family.name!r} does not suit {self.env}: a copy of it went another way than "
                    "the original under the same actions. Part of its state is out of reach (in an extension module, say). "
                    "SnapshotWrapper(env, family='replay') replays the episode from its start instead."
                )
            if steps[0][2]:
                return


def _keeps_records(layer: gym.Env) -> bool:
    # SnapshotWrapper, which this module does not know: further in than another one it is not used
    return isinstance(layer, RECORD_LAYERS) or hasattr(type(layer), "branch_call")


def _layers(env: gym.Env) -> Iterator[gym.Env]:
    """Innermost first."""
    return reversed(list(_outer_to_inner(env)))


def _outer_to_inner(env: gym.Env) -> Iterator[gym.Env]:
    yield env
    while isinstance(env, gym.Wrapper):
        env = env.env
        yield env


def _shell(layer: gym.Env) -> gym.Env:
    return object.__new__(type(layer))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(_equal(*pair) for pair in zip(one, other, strict=True))
    return np.array_equal(one, other, equal_nan=np.asarray(one).dtype.kind == "f")


class GlobalRandom:
    """
    Random numbers of their own for branches: environments that draw from the global generators of numpy, Python or torch
    (the zoo's ``ActionNoiseWrapper`` does) must not advance those of the training run. The first use starts from a copy of
    the global generators' states; each later one goes on where the last one ended.
    """

    def __init__(self) -> None:
        self._states: tuple | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        outside = _global_states()
        if self._states is not None:
            _set_global_states(self._states)
        try:
            yield
        finally:
            self._states = _global_states()
            _set_global_states(outside)


def _global_states() -> tuple:
    return np.random.get_state(), random.getstate(), th.get_rng_state()


def _set_global_states(states: tuple) -> None:
    np.random.set_state(states[0])
    random.setstate(states[1])
    th.set_rng_state(states[2])
