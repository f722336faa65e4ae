"""Specs, the registry, name resolution, and the checks of what reward functions and models return."""

import subprocess
import sys
from typing import Any

import pytest
import torch as th

from sb3_grpo_plugin import rewards
from sb3_grpo_plugin.rewards import (
    EnvWrapperSpec,
    PluginInfo,
    Registries,
    Registry,
    RewardSpec,
    TransitionSpec,
    check_stateless,
    evaluate_reward,
    evaluate_transition,
    find_transition,
    resolve_reward,
    rewards_for,
)
from sb3_grpo_plugin.testing import check_reward, check_transition


def reward(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
    return next_state[:, :1]


def step(state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    return state + 1, state[:, 0] > 0


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registries:
    """An empty registry in place of the installed plugins."""
    registries = Registries()
    monkeypatch.setattr(rewards, "registries", lambda: registries)
    return registries


def add(registries: Registries, name: str, *env_ids: str, source: str = "a-package") -> None:
    registries.rewards.add(RewardSpec(name, env_ids, reward), source)


# specs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "upright"}, "package/name"),
        ({"name": "a/b/c"}, "package/name"),
        ({"name": "a/ b"}, "package/name"),
        ({"name": None}, "package/name"),
        ({"env_ids": "CartPole-v1"}, r"write a tuple, \('CartPole-v1',\)"),
        ({"env_ids": ()}, "expected a tuple"),
        ({"env_ids": (1,)}, "expected a tuple"),
        ({"env_ids": ("",)}, "expected a tuple"),
        ({"env_ids": None}, "expected a tuple"),
        ({"function": "reward"}, "cannot be called"),
        ({"description": "two\nlines"}, "one line"),
        ({"description": None}, "one line"),
    ],
)
def test_spec_refuses(changes: dict[str, Any], message: str) -> None:
    fields = {"name": "a/b", "env_ids": ("CartPole-v1",), "function": reward, "description": "one line"}
    for spec in (RewardSpec, TransitionSpec):
        with pytest.raises(ValueError, match=message):
            spec(**{**fields, **changes})


def test_spec_is_frozen_and_binds_ids_and_globs() -> None:
    spec = EnvWrapperSpec("a/b", ["ALE/*-v5", "CartPole-v1"], dict)  # type: ignore[arg-type]
    assert spec.env_ids == ("ALE/*-v5", "CartPole-v1")
    assert spec.binds("ALE/Pong-v5") and spec.binds("CartPole-v1")
    assert not spec.binds("ALE/Pong-v4") and not spec.binds("cartpole-v1") and not spec.binds("CartPole-v10")
    with pytest.raises(AttributeError):
        spec.name = "c/d"  # type: ignore[misc]


def test_registry_imports_no_torch() -> None:
    code = "import sys, sb3_grpo_plugin.hookspecs, sb3_grpo_plugin.plugins; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# the registry


def test_unknown_name_suggests_the_nearest(registry: Registries) -> None:
    add(registry, "classic/cartpole-upright", "CartPole-v1")
    for typo in ("classic/cartpole-uprigth", "cartpole-upright", "clasic/cartpole-upright"):
        with pytest.raises(ValueError, match="Did you mean 'classic/cartpole-upright'"):
            rewards.get_reward(typo)


def test_unknown_name_says_what_is_missing(registry: Registries) -> None:
    with pytest.raises(ValueError, match=r"offers a reward 'other/\.\.\.'.*No plugin is installed"):
        rewards.get_reward("other/reward")
    registry.plugins.append(PluginInfo("one", "1", "one", "broken", problem="ImportError: no"))
    registry.plugins.append(PluginInfo("two", "1", "two", "off"))
    with pytest.raises(ValueError, match=r"one was skipped: ImportError: no\. Turned off by .*SB3_GRPO_PLUGINS: two"):
        rewards.get_reward("other/reward")


def test_duplicate_name_is_refused_in_either_order(registry: Registries) -> None:
    messages = set()
    for sources in (("one", "two"), ("two", "one")):
        both: Registry[RewardSpec] = Registry("reward")
        for source in sources:
            both.add(RewardSpec("a/b", ("CartPole-v1",), reward), source)
        both.add(RewardSpec("a/c", ("Pendulum-v1",), reward), "one")
        assert both.clashes() == {"a/b": ["one", "two"]}
        assert both.get("a/c").name == "a/c", "others are not concerned"
        assert [spec.name for spec in both.bound_to("Pendulum-v1")] == ["a/c"]
        for ask, argument in ((both.get, "a/b"), (both.bound_to, "CartPole-v1")):
            with pytest.raises(ValueError, match="one and two") as caught:
                ask(argument)
            messages.add(str(caught.value))
    assert len(messages) == 1


def test_resolve_reward(registry: Registries) -> None:
    add(registry, "a/pole", "CartPole-v*")
    assert resolve_reward(None, "CartPole-v1") == (None, None)
    assert resolve_reward(reward, None) == ("reward", reward)
    assert resolve_reward("a/pole", None) == ("a/pole", reward)
    assert resolve_reward("auto", "CartPole-v1") == ("a/pole", reward)

    class Weighted:
        def __call__(self, state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
            return next_state[:, 0]

    weighted = Weighted()
    assert resolve_reward(weighted, None) == ("Weighted", weighted)
    with pytest.raises(ValueError, match="expected None, a callable"):
        resolve_reward(3, None)  # type: ignore[arg-type]


def test_auto_needs_exactly_one(registry: Registries) -> None:
    with pytest.raises(ValueError, match=r"no reward is bound to CartPole-v1\. Registered: none\. No plugin is installed"):
        resolve_reward("auto", "CartPole-v1")
    add(registry, "a/pole", "CartPole-v1")
    with pytest.raises(ValueError, match=r"no reward is bound to Pendulum-v1\. Registered: a/pole for CartPole-v1"):
        resolve_reward("auto", "Pendulum-v1")
    with pytest.raises(ValueError, match="has none"):
        resolve_reward("auto", None)
    add(registry, "b/pole", "CartPole-*")
    with pytest.raises(ValueError, match=r"2 rewards are bound to CartPole-v1.*: a/pole, b/pole"):
        resolve_reward("auto", "CartPole-v1")
    assert [spec.name for spec in rewards_for("CartPole-v1")] == ["a/pole", "b/pole"]
    assert [spec.name for spec in rewards_for("CartPole-v0")] == ["b/pole"]


def test_find_transition_takes_the_exact_id_first(registry: Registries) -> None:
    assert find_transition("CartPole-v1") is None
    registry.transitions.add(TransitionSpec("a/any", ("*",), step), "a")
    assert find_transition("CartPole-v1").name == "a/any"  # type: ignore[union-attr]
    registry.transitions.add(TransitionSpec("a/pole", ("CartPole-v1",), step), "a")
    assert find_transition("CartPole-v1").name == "a/pole"  # type: ignore[union-attr]
    registry.transitions.add(TransitionSpec("b/pole", ("CartPole-v1",), step), "b")
    with pytest.raises(ValueError, match="2 transition models are bound to CartPole-v1: a/pole, b/pole"):
        find_transition("CartPole-v1")


def test_env_wrappers_are_sorted_by_name(registry: Registries) -> None:
    for name in ("z/one", "a/two"):
        registry.env_wrappers.add(EnvWrapperSpec(name, ("*",), dict), "p")
    assert [spec.name for spec in rewards.env_wrappers_for("CartPole-v1")] == ["a/two", "z/one"]


# what functions return

STATE, ACTION = th.arange(12.0).reshape(4, 3), th.zeros(4, 1, dtype=th.long)


def evaluate(function: Any, **changes: Any) -> th.Tensor:
    return evaluate_reward(function, "a/b", STATE.clone(), ACTION, STATE + 1, **changes)


def test_reward_shapes() -> None:
    expected = th.tensor([1.0, 4.0, 7.0, 10.0])
    assert th.equal(evaluate(lambda s, a, n: n[:, :1]), expected)
    assert th.equal(evaluate(lambda s, a, n: n[:, 0]), expected)
    assert evaluate(lambda s, a, n: n[:, 0].double()).dtype == th.float64


def test_reward_has_no_gradient() -> None:
    weight = th.ones(3, requires_grad=True)
    assert not evaluate(lambda s, a, n: n @ weight).requires_grad


def test_dict_states() -> None:
    state = {"a": STATE, "b": STATE}
    found = evaluate_reward(lambda s, a, n: s["a"][:, 0] + n["b"][:, 0], "a/b", state, ACTION, state)
    assert th.equal(found, 2 * STATE[:, 0])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s, a, n: 1.0, "'a/b' returned a float; expected a floating point tensor"),
        (lambda s, a, n: None, "returned a NoneType"),
        (lambda s, a, n: n.numpy()[:, 0], "returned a ndarray"),
        (lambda s, a, n: n, r"the shape \(4, 3\); expected .*\(4, 1\) or \(4,\)"),
        (lambda s, a, n: n.mean(), r"the shape \(\)"),
        (lambda s, a, n: n[:1, 0], r"the shape \(1,\)"),
        (lambda s, a, n: n[:, 0].long(), "dtype torch.int64; expected .*append .float"),
        (lambda s, a, n: n[:, 0] > 0, "dtype torch.bool"),
        (lambda s, a, n: th.zeros(4, device="meta"), "on meta; its input was on cpu"),
        (lambda s, a, n: th.where(n[:, 0] > 5, th.nan, n[:, 0]), "NaN or infinity as reward in 2 of 4 rows.*row 2: nan"),
        (lambda s, a, n: 1 / (n[:, 0] - 1), "in 1 of 4 rows; the first is row 0: inf"),
        (lambda s, a, n: n.mul_(2)[:, 0], "modified its input in place"),
        (lambda s, a, n: s.zero_()[:, 0], "modified its input in place"),
    ],
)
def test_reward_is_refused(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(function)


def test_reward_that_raises_is_named() -> None:
    def reward(s: th.Tensor, a: th.Tensor, n: th.Tensor) -> th.Tensor:
        return n[:, 7]

    with pytest.raises(RuntimeError, match=r"'a/b' raised IndexError.*float32 \(4, 3\), int64 \(4, 1\)") as caught:
        evaluate(reward)
    assert isinstance(caught.value.__cause__, IndexError)


def test_rows_that_do_not_count_may_hold_anything() -> None:
    where = th.tensor([True, False, True, True])
    found = evaluate(lambda s, a, n: th.where(n[:, 0] == 4, th.nan, n[:, 0]), where=where)
    assert th.equal(found, th.tensor([1.0, 0.0, 7.0, 10.0]))
    with pytest.raises(ValueError, match="row 2"):
        evaluate(lambda s, a, n: th.where(n[:, 0] == 7, th.nan, n[:, 0]), where=where)


def test_inference_tensors_are_fine() -> None:
    with th.inference_mode():
        assert evaluate(lambda s, a, n: n[:, 0]).shape == (4,)


def test_reward_that_keeps_state_is_refused() -> None:
    calls = []

    def counting(s: th.Tensor, a: th.Tensor, n: th.Tensor) -> th.Tensor:
        calls.append(1)
        return n[:, 0] + len(calls)

    with pytest.raises(ValueError, match=r"two answers for one batch.*keeps state or draws random numbers"):
        check_stateless(counting, "a/b", STATE, ACTION, STATE)
    with pytest.raises(ValueError, match="two answers"):
        check_stateless(lambda s, a, n: th.rand(4), "a/b", STATE, ACTION, STATE)
    check_stateless(reward, "a/b", STATE, ACTION, STATE)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s, a: s, r"returned a Tensor; expected a tuple \(next_state, terminated\)"),
        (lambda s, a: (s, s[:, 0] > 0, 1), "returned a tuple; expected a tuple"),
        (lambda s, a: (s[:, :2], s[:, 0] > 0), r"next state float32 \(4, 2\).*given, float32 \(4, 3\)"),
        (lambda s, a: (s.double(), s[:, 0] > 0), r"next state float64 \(4, 3\)"),
        (lambda s, a: (None, s[:, 0] > 0), "next state NoneType"),
        (lambda s, a: (s, s[:, :1] > 0), r"terminated as bool \(4, 1\); expected bool \(4,\)"),
        (lambda s, a: (s, s[:, 0]), r"terminated as float32 \(4,\)"),
        (lambda s, a: (s, False), "terminated as bool; expected"),
        (lambda s, a: (s / 0, s[:, 0] > 0), "NaN or infinity as next state in 4 of 4 rows"),
        (lambda s, a: (s.add_(1), s[:, 0] > 0), "modified its input in place"),
        (lambda s, a: ({"a": s}, s[:, 0] > 0), "next state {a: float32"),
    ],
)
def test_transition_is_refused(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_transition(TransitionSpec("a/b", ("*",), function), STATE.clone(), ACTION)


def test_transition() -> None:
    spec = TransitionSpec("a/b", ("*",), step)
    next_state, terminated = evaluate_transition(spec, STATE, ACTION)
    assert th.equal(next_state, STATE + 1) and terminated.tolist() == [False, True, True, True]
    wild = TransitionSpec("a/b", ("*",), lambda s, a: (th.where(s > 8, th.inf, s), s[:, 0] > 0))
    evaluate_transition(wild, STATE, ACTION, where=th.tensor([True, True, True, False]))
    with pytest.raises(ValueError, match="row 3"):
        evaluate_transition(wild, STATE, ACTION)

    def both(s: dict[str, th.Tensor], a: th.Tensor) -> tuple[dict[str, th.Tensor], th.Tensor]:
        return {key: value + 1 for key, value in s.items()}, s["x"][:, 0] > 0

    found, _ = evaluate_transition(TransitionSpec("a/b", ("*",), both), {"x": STATE, "y": ACTION}, ACTION)
    assert th.equal(found["y"], ACTION + 1)
    with pytest.raises(ValueError, match=r"expected \{x:"):
        evaluate_transition(TransitionSpec("a/b", ("*",), lambda s, a: ({}, s["x"][:, 0] > 0)), {"x": STATE}, ACTION)


# the checks for authors


def test_check_transition_finds_each_fault() -> None:
    pole = find_transition("CartPole-v1")
    assert pole is not None

    def check(function: Any) -> None:
        check_transition(TransitionSpec("a/b", ("CartPole-v1",), function), "CartPole-v1", n_steps=200)

    def shifted(s: th.Tensor, a: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        next_state, terminated = pole.function(s, a)
        return next_state + 2e-5, terminated

    def immortal(s: th.Tensor, a: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return pole.function(s, a)[0], th.zeros(len(s), dtype=th.bool)

    def crosstalk(s: th.Tensor, a: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        next_state, terminated = pole.function(s, a)
        return next_state + (len(s) == 1), terminated

    check(pole.function)
    with pytest.raises(ValueError, match=r"is off by 2.*e-05 in step"):
        check(shifted)
    with pytest.raises(ValueError, match=r"terminates differently in \d+ of 200 steps"):
        check(immortal)
    with pytest.raises(ValueError, match="rows must not depend on each other"):
        check(crosstalk)
    with pytest.raises(ValueError, match="is bound to CartPole-v0, CartPole-v1, not to Pendulum-v1"):
        check_transition(pole, "Pendulum-v1")
    with pytest.raises(ValueError, match="n_steps is 1"):
        check_transition(pole, "CartPole-v1", n_steps=1)


def test_check_reward() -> None:
    spec = RewardSpec("a/b", ("Pendulum-v1",), lambda s, a, n: -a.square())
    found = check_reward(spec, "Pendulum-v1", n_steps=50)
    assert found.n_steps == 50 and found.std > 0 and abs(found.correlation) <= 1
    with pytest.raises(ValueError, match=r"shape \(50, 3\)"):
        check_reward(RewardSpec("a/b", ("*",), lambda s, a, n: n), "Pendulum-v1", n_steps=50)
