"""Advantages from groups, against loops that do it one step at a time."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch as th

from sb3_grpo_plugin.groups import (
    RIDGE,
    RIDGE_RANGE,
    SCALE_FLOOR,
    SCALES,
    SUPERVISIONS,
    EpisodeGroups,
    ScoreScale,
    StateGroups,
    Visits,
    assign_folds,
    block_length,
    check_state_groups,
    compare_candidates,
    fragment_ids,
    reverse_scan,
    without_mean,
)

GAMMA, GAE_LAMBDA = 0.9, 0.8
BLOCK = block_length(GAMMA, GAE_LAMBDA)


def rollout(
    n_steps: int = 48, n_envs: int = 2, p_done: float = 0.15, dim: int = 3, seed: int = 0, continues: bool = False
) -> Visits:
    """A made-up rollout: random states and rewards, episodes that terminate or are cut off by a time limit."""
    generator = th.Generator().manual_seed(seed)
    draw = {name: th.rand(n_steps, n_envs, generator=generator) for name in ("rewards", "dones", "kinds")}
    features = th.randn(n_steps + 1, n_envs, dim, generator=generator)
    dones = (draw["dones"] < p_done).float()
    starts = th.cat((th.zeros(1, n_envs) if continues else th.ones(1, n_envs), dones[:-1]))
    after = th.where(dones.bool()[..., None], th.randn(n_steps, n_envs, dim, generator=generator), features[1:])
    return Visits(features[:-1], after, draw["rewards"], starts, dones, dones * (draw["kinds"] < 0.5))


def endless(n_steps: int = 240, n_envs: int = 1, **kwargs) -> Visits:
    return rollout(n_steps, n_envs, p_done=-1.0, **kwargs)


def state_groups(**kwargs) -> StateGroups:
    return StateGroups(GAMMA, GAE_LAMBDA, **kwargs)


def baselines(groups: StateGroups, visits: Visits) -> th.Tensor:
    comparison = groups.compare(visits)
    return comparison.scores - comparison.centred


def shifted(rewards: th.Tensor, terminated: th.Tensor, constant: float) -> th.Tensor:
    """Rewards that make every return larger by ``constant``."""
    return rewards + constant * (1.0 - GAMMA * (1.0 - terminated))


# building blocks


@pytest.mark.parametrize("n_steps", [1, 2, 7, 64])
def test_reverse_scan_is_a_loop(n_steps: int) -> None:
    x, decay = th.randn(2, n_steps, 3, 4, dtype=th.float64)
    decay = decay[..., :1]
    expected, later = th.empty_like(x), 0.0
    for step in reversed(range(n_steps)):
        later = x[step] + (decay[step] * later if step < n_steps - 1 else 0.0)
        expected[step] = later
    th.testing.assert_close(reverse_scan(x, decay), expected)


def test_fragments_begin_at_resets_and_at_the_border() -> None:
    starts = th.tensor([[0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0]]).T
    assert fragment_ids(starts).T.tolist() == [[0, 1, 1, 1, 2, 3], [4] * 6, [5, 5, 6, 6, 6, 6]]


def test_folds_hold_whole_fragments_and_are_of_like_size() -> None:
    fragments = fragment_ids(rollout(100, 4).episode_starts)
    folds, excludes = assign_folds(fragments, BLOCK)
    assert th.equal(excludes, th.eye(4, dtype=th.bool))
    assert all(len(folds[fragments == fragment].unique()) == 1 for fragment in fragments.unique())
    sizes = th.bincount(folds.flatten())
    assert sizes.max() - sizes.min() <= th.bincount(fragments.flatten()).max()


@pytest.mark.parametrize("cuts", [[], [7], [19], [9, 20], [1, 28], [50]])
@pytest.mark.parametrize("n_steps", [math.ceil(4 * BLOCK), 100])
def test_a_block_and_its_neighbours_are_never_in_one_group(n_steps: int, cuts: list[int]) -> None:
    starts = th.zeros(n_steps, 1)
    starts[[cut for cut in cuts if cut < n_steps]] = 1
    fragments = fragment_ids(starts)
    folds, excludes = assign_folds(fragments, BLOCK)
    assert excludes.diagonal().all() and th.equal(excludes, excludes.T)
    for step, (fold, fragment) in enumerate(zip(folds[:, 0], fragments[:, 0], strict=True)):
        group = ~excludes[fold][folds[:, 0]]
        assert group.any()
        near = (th.arange(n_steps) - step).abs() < math.floor(BLOCK)
        assert not (group & near & (fragments[:, 0] == fragment)).any()


def test_too_few_steps_for_four_blocks_are_refused() -> None:
    enough = math.ceil(4 * BLOCK)
    check_state_groups(enough, 1, GAMMA, GAE_LAMBDA)
    check_state_groups(1, 4, GAMMA, GAE_LAMBDA)
    with pytest.raises(ValueError, match=f"takes {enough} steps, and n_steps is {enough - 1}"):
        check_state_groups(enough - 1, 1, GAMMA, GAE_LAMBDA)
    with pytest.raises(ValueError, match="lower gae_lambda"):
        check_state_groups(10_000, 1, 1.0, 1.0)


# state groups


def naive_state_groups(groups: StateGroups, visits: Visits) -> tuple[th.Tensor, th.Tensor]:
    """Centred scores and scores of a first rollout: LSTD(lambda) and lambda-returns with loops."""
    groups._whiten(visits.features)
    phi, after = groups._embed(visits.features).double(), groups._embed(visits.next_features).double()
    folds, excludes = assign_folds(fragment_ids(visits.episode_starts), BLOCK)
    n_steps, n_envs = visits.rewards.shape
    centred, scores = th.zeros(2, n_steps, n_envs, dtype=th.float64)
    for fold in range(len(excludes)):
        system = RIDGE * th.eye(phi.shape[-1], dtype=th.float64)
        system[0, 0] = 0.0
        target = th.zeros(phi.shape[-1], dtype=th.float64)
        for env in range(n_envs):
            trace = th.zeros(phi.shape[-1], dtype=th.float64)
            for step in range(n_steps):
                if step > 0 and (visits.dones[step - 1, env] or folds[step, env] != folds[step - 1, env]):
                    trace = th.zeros_like(trace)
                trace = GAMMA * GAE_LAMBDA * trace + phi[step, env]
                if not excludes[fold, folds[step, env]]:
                    alive = 1.0 - visits.terminated[step, env]
                    system += trace[:, None] * (phi[step, env] - GAMMA * alive * after[step, env])[None]
                    target += trace * visits.rewards[step, env]
        weights = th.linalg.solve(system, target)
        for env in range(n_envs):
            later = 0.0
            for step in reversed(range(n_steps)):
                alive, goes_on = 1.0 - visits.terminated[step, env], 1.0 - visits.dones[step, env]
                mixed = after[step, env] @ weights
                if goes_on and step < n_steps - 1:
                    mixed = (1 - GAE_LAMBDA) * mixed + GAE_LAMBDA * later
                later = visits.rewards[step, env] + GAMMA * alive * mixed
                if folds[step, env] == fold:
                    scores[step, env], centred[step, env] = later, later - phi[step, env] @ weights
    return centred, scores


@pytest.mark.parametrize("visits", [rollout(), rollout(continues=True), endless(60), endless(20, 3)])
def test_state_groups_are_a_loop(visits: Visits) -> None:
    centred, scores = naive_state_groups(state_groups(), visits)
    comparison = state_groups().compare(visits)
    th.testing.assert_close(comparison.centred.double(), centred, rtol=1e-3, atol=1e-3)
    th.testing.assert_close(comparison.scores.double(), scores, rtol=1e-3, atol=1e-3)
    assert comparison.compared.all() and not comparison.alike.any()


def test_the_baseline_is_the_mean_of_other_visits_to_the_state() -> None:
    """Four hundred episodes of one step, in one of two states."""
    visits = rollout(100, 4, p_done=2.0, dim=1)
    state = (visits.rewards < 0.3).float()
    visits = replace(
        visits, features=state[..., None], terminated=th.ones(100, 4), rewards=10.0 * state + th.randn_like(state)
    )
    folds, _ = assign_folds(fragment_ids(visits.episode_starts), BLOCK)
    found = baselines(state_groups(), visits)
    for fold, kind in th.cartesian_prod(th.arange(4), th.arange(2)):
        others = visits.rewards[(folds != fold) & (state == kind)].mean()
        own = found[(folds == fold) & (state == kind)]
        th.testing.assert_close(own, others.expand_as(own), rtol=0.0, atol=0.15)


@pytest.mark.parametrize("env", range(4))
def test_a_step_never_sees_its_own_episodes_return(env: int) -> None:
    visits = rollout(64, 4)
    fragments = fragment_ids(visits.episode_starts)
    own = fragments == fragments[30, env]
    changed = replace(visits, rewards=visits.rewards + 100.0 * own)
    before, after = baselines(state_groups(), visits), baselines(state_groups(), changed)
    th.testing.assert_close(after[own], before[own], rtol=0.0, atol=0.01)
    assert (after - before).abs().max() > 1.0  # the others do


def test_a_block_sees_neither_its_own_nor_its_neighbours_rewards() -> None:
    visits = endless()
    folds, excludes = assign_folds(fragment_ids(visits.episode_starts), BLOCK)
    for fold in range(len(excludes)):
        unseen = excludes[fold][folds]
        changed = replace(visits, rewards=visits.rewards + 100.0 * (folds == fold))
        difference = (baselines(state_groups(), changed) - baselines(state_groups(), visits)).abs()
        assert difference[unseen].max() < 0.01 < 1.0 < difference[~unseen].max()


def test_what_borders_on_a_rollout_is_remembered_from_the_one_after_it_on() -> None:
    first, second, third = (rollout(64, 4, seed=seed, continues=seed > 0) for seed in range(3))
    fragments = fragment_ids(first.episode_starts)
    bordering = th.isin(fragments, fragments[-1][first.dones[-1] == 0])

    def memory_of(rewards: th.Tensor) -> list[th.Tensor]:
        groups, found = state_groups(), []
        for visits in (replace(first, rewards=rewards), second, third):
            found.append(baselines(groups, visits))
            groups._ridge = RIDGE  # one number of all rewards, no memory of visits
        return found[1:]

    plain = memory_of(first.rewards)
    in_second, in_third = (
        [float((now - before).abs().max()) for now, before in zip(memory_of(first.rewards + 100.0 * rows), plain, strict=True)]
        for rows in (~bordering, bordering)
    )
    assert min(in_second) > 1.0
    assert in_third[0] < 0.01 < 1.0 < in_third[1]


def test_the_next_ridge_is_noise_over_signal() -> None:
    groups, visits = state_groups(), rollout()
    comparison = groups.compare(visits)
    noise, signal = comparison.centred.std(), (comparison.scores - comparison.centred).std()
    assert groups._ridge == pytest.approx(float(noise / signal), rel=1e-3)
    # It holds the next baseline back, and has no unit
    held = groups.compare(visits).scores
    groups._ridge = RIDGE_RANGE[1]
    assert not th.allclose(groups.compare(visits).scores, held, atol=1e-3)
    thousandfold = state_groups()
    thousandfold.compare(replace(visits, rewards=1000.0 * visits.rewards))
    assert thousandfold._ridge == pytest.approx(float(noise / signal), rel=1e-3)
    # Returns that are alike say nothing about it
    unmoved = state_groups()
    unmoved.compare(replace(visits, rewards=shifted(th.zeros_like(visits.rewards), visits.terminated, 1.0)))
    assert unmoved._ridge == RIDGE


def test_features_that_move_are_not_remembered() -> None:
    forgetful = state_groups(remember=False)
    forgetful.compare(rollout(seed=1))
    forgetful._ridge = RIDGE
    assert th.equal(forgetful.compare(rollout()).centred, state_groups().compare(rollout()).centred)
    remembering = state_groups()
    remembering.compare(rollout(seed=1))
    assert not th.allclose(remembering.compare(rollout()).centred, state_groups().compare(rollout()).centred, atol=1e-3)


@pytest.mark.parametrize(
    ("factor", "shift", "outgrown"), [(1.2, 0.5, False), (3.0, 0.0, True), (0.3, 0.0, True), (1.0, 4.0, True)]
)
def test_units_hold_until_states_outgrow_them_and_memory_with_them(factor: float, shift: float, outgrown: bool) -> None:
    first, later = rollout(seed=1), rollout()
    later = replace(later, features=factor * later.features + shift, next_features=factor * later.next_features + shift)
    groups = state_groups()
    groups.compare(first)
    width = groups._width
    groups._ridge = RIDGE
    found, anew = groups.compare(later).centred, state_groups().compare(later).centred
    assert th.equal(found, anew) == outgrown
    assert (groups._width is not width) == outgrown


@pytest.mark.parametrize("make", [rollout, endless])
@pytest.mark.parametrize("constant", [0.0, 1.0, -37.0])
def test_equal_returns_give_exactly_zero(make: Callable[[], Visits], constant: float) -> None:
    visits, groups = make(), state_groups()
    for _ in range(3):
        comparison = groups.compare(
            replace(visits, rewards=shifted(th.zeros_like(visits.rewards), visits.terminated, constant))
        )
        assert (comparison.centred == 0.0).all() and comparison.alike.all() and comparison.compared.all()
        assert (ScoreScale("batch")(comparison.centred, None) == 0.0).all()


def advantages_of_rollouts(scale_rewards: str, change: Callable[[Visits], Visits]) -> list[th.Tensor]:
    groups, scale, advantages = state_groups(), ScoreScale(scale_rewards), []
    for seed in range(3):
        comparison = groups.compare(change(rollout(seed=seed)))
        advantages.append(scale(comparison.centred, comparison.group_std))
    return advantages


@pytest.mark.parametrize("scale_rewards", SCALES)
def test_state_groups_ignore_a_constant_and_a_factor(scale_rewards: str) -> None:
    plain = advantages_of_rollouts(scale_rewards, lambda visits: visits)
    moved = advantages_of_rollouts(
        scale_rewards, lambda visits: replace(visits, rewards=shifted(visits.rewards, visits.terminated, 10.0))
    )
    th.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-4)
    factor = 1.0 if scale_rewards == "none" else 1000.0
    larger = advantages_of_rollouts(scale_rewards, lambda visits: replace(visits, rewards=factor * visits.rewards))
    th.testing.assert_close(larger, plain, rtol=1e-4, atol=1e-4)


def test_novelty_is_what_visits_have_left_unknown() -> None:
    groups, rollouts = state_groups(novelty_coef=1.0), [rollout(seed=1), rollout(seed=2)]
    groups.compare(rollouts[0])
    phi = [groups._embed(visits.next_features).double() for visits in rollouts]
    visited = th.cat(phi).flatten(0, 1)
    known = (RIDGE * th.eye(visited.shape[-1]) + visited.T @ visited).inverse()
    expected = (phi[1] @ known * phi[1]).sum(-1)
    assert th.allclose(groups._novelty(phi[1].float()).double(), expected, rtol=1e-3)
    assert 0 < expected.min() and expected.max() < 1


def test_novelty_makes_equal_returns_a_signal_and_fades() -> None:
    alike = replace(rollout(), rewards=th.zeros(48, 2))
    assert state_groups().compare(alike).alike.all()
    groups = state_groups(novelty_coef=1.0)
    spreads = [float(groups.compare(alike).scores.std()) for _ in range(40)]
    assert not groups.compare(alike).alike.any()
    assert spreads[-1] < 0.2 * spreads[0]
    # Twice the weight is twice the bonus
    twice = state_groups(novelty_coef=2.0).compare(alike)
    assert th.allclose(twice.scores, 2 * state_groups(novelty_coef=1.0).compare(alike).scores, rtol=1e-3, atol=1e-5)


def test_the_global_generator_is_left_alone() -> None:
    before = th.get_rng_state()
    state_groups(seed=3).compare(rollout())
    assert th.equal(th.get_rng_state(), before)


# action groups


def test_candidates_are_compared_with_their_mean() -> None:
    scores = th.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0], [-1e6, -1e6, -1e6 + 0.1]])
    comparison = compare_candidates(scores)
    assert comparison.centred.tolist() == [[-2.0, -1.0, 3.0], [0.0] * 3, [0.0] * 3]
    assert comparison.alike.tolist() == [[False], [True], [True]] and comparison.compared.all()
    assert comparison.group_std is not None
    th.testing.assert_close(comparison.group_std[0], th.tensor([math.sqrt(14 / 3)]))
    taken = comparison.of_candidate(th.tensor([2, 0, 1]))
    assert taken.scores.tolist() == [[6.0], [5.0], [-1e6]] and taken.centred.tolist() == [[3.0], [0.0], [0.0]]


@pytest.mark.parametrize("scale_rewards", SCALES)
def test_candidates_ignore_a_constant_and_a_factor(scale_rewards: str) -> None:
    scores = th.randn(50, 4, generator=th.Generator().manual_seed(0))

    def advantages(scores: th.Tensor) -> th.Tensor:
        comparison = compare_candidates(scores)
        return ScoreScale(scale_rewards)(comparison.centred, comparison.group_std)

    plain = advantages(scores)
    th.testing.assert_close(advantages(scores + 10.0), plain, rtol=1e-4, atol=1e-5)
    factor = 300.0 if scale_rewards == "none" else 1.0
    th.testing.assert_close(advantages(300.0 * scores), factor * plain, rtol=1e-4, atol=1e-5)


# scale


def test_scales_by_hand() -> None:
    scores = th.tensor([[0.0, 2.0], [0.0, 6.0]])
    comparison = compare_candidates(scores)
    apply = {name: ScoreScale(name)(comparison.centred, comparison.group_std) for name in SCALES}
    assert apply["none"].tolist() == [[-1.0, 1.0], [-3.0, 3.0]]
    assert apply["group"].tolist() == [[-1.0, 1.0], [-1.0, 1.0]]
    th.testing.assert_close(apply["batch"], comparison.centred / math.sqrt(20 / 3))


def test_what_all_steps_have_in_common_is_no_advantage() -> None:
    centred = th.tensor([[1.0, 3.0], [0.0, 5.0]])
    assert without_mean(centred).tolist() == [[-2.0, 0.0], [0.0, 2.0]]
    assert (without_mean(th.zeros(3, 2)) == 0.0).all()
    assert ScoreScale("none")(centred, None).tolist() == [[-2.0, 0.0], [0.0, 2.0]]
    # Groups that are complete have no mean of their own
    assert th.equal(ScoreScale("none")(centred, th.ones(2, 1)), centred)


@pytest.mark.parametrize("scale_rewards", ["batch", "group"])
def test_tiny_differences_do_not_become_full_advantages(scale_rewards: str) -> None:
    scale = ScoreScale(scale_rewards)
    scores = 100.0 * th.randn(100, 2, generator=th.Generator().manual_seed(0))
    largest = float(compare_candidates(scores).centred.std())
    for factor in (1.0, 1e-3):
        comparison = compare_candidates(factor * scores)
        advantages = scale(comparison.centred, comparison.group_std)
    th.testing.assert_close(advantages, comparison.centred / (SCALE_FLOOR * 0.99 * largest), rtol=1e-4, atol=0.0)
    for _ in range(2000):  # and the floor is forgotten
        advantages = scale(comparison.centred, comparison.group_std)
    assert advantages.std() == pytest.approx(1.0, abs=0.1)


# episode groups


@dataclass
class Episode:
    """As far as it was watched."""

    rewards: list[float] = field(default_factory=list)
    ended: bool = False

    def to_go(self, time: int, until: float) -> float:
        return sum(GAMMA ** (t - time) * reward for t, reward in enumerate(self.rewards) if time <= t < until)


def naive_difference(own: Episode, members: list[Episode], time: int, supervision: str) -> float | None:
    """How much more than its group (itself included) an episode earns, from one step on; None without a group."""
    differences = []
    for other in members:
        until = min([len(episode.rewards) for episode in (own, other) if not episode.ended], default=math.inf)
        if supervision == "outcome" and own.ended and other.ended:
            differences.append(own.to_go(0, math.inf) - other.to_go(0, math.inf))
        elif supervision == "process" and time < until:
            differences.append(own.to_go(time, until) - other.to_go(time, until))
    return sum(differences) / len(differences) if len(differences) > 1 else None


@pytest.mark.parametrize("supervision", SUPERVISIONS)
@pytest.mark.parametrize("p_done", [0.2, 0.03])
def test_episode_groups_are_a_loop(supervision: str, p_done: float) -> None:
    """Three rollouts, across whose borders episodes go on."""
    n_envs, size = 6, 3
    groups = EpisodeGroups(n_envs, size, GAMMA, supervision)
    watched: list[list[Episode]] = [[] for _ in range(n_envs)]
    starts, n_compared = th.ones(1, n_envs), 0
    for seed in range(3):
        visits = rollout(30, n_envs, p_done, seed=seed)
        starts = th.cat((starts[-1:], visits.dones[:-1]))
        comparison = groups.compare(visits.rewards, starts, visits.dones)
        scored = []
        for step, env in itertools.product(range(30), range(n_envs)):
            if starts[step, env]:
                watched[env].append(Episode())
            episode = watched[env][-1]
            scored.append((step, env, len(watched[env]) - 1, len(episode.rewards)))
            episode.rewards.append(float(visits.rewards[step, env]))
            episode.ended = bool(visits.dones[step, env])
        for step, env, number, time in scored:
            group = watched[env // size * size : env // size * size + size]
            members = [episodes[number] for episodes in group if number < len(episodes)]
            difference = naive_difference(watched[env][number], members, time, supervision)
            assert bool(comparison.compared[step, env]) == (difference is not None)
            assert float(comparison.centred[step, env]) == pytest.approx(difference or 0.0, abs=1e-5)
            n_compared += difference is not None
        starts = visits.dones
    assert n_compared > 20


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_equal_episodes_give_exactly_zero_whatever_their_steps_pay(supervision: str) -> None:
    rewards = th.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [1.0, 5.0]])
    dones = th.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    starts = th.cat((th.ones(1, 2), dones[:-1]))
    comparison = EpisodeGroups(2, 2, GAMMA, supervision).compare(rewards, starts, dones)
    assert comparison.alike.tolist() == [[True, True]] * 2 + [[False, False]] * 2
    assert (comparison.centred[:2] == 0).all() and (comparison.centred[2:] != 0).all()


def test_an_episode_that_ended_goes_on_earning_nothing() -> None:
    """CartPole pays 1 at every step: it is the longer episode that is the better one."""
    dones = th.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    starts = th.cat((th.ones(1, 2), dones[:-1]))
    comparison = EpisodeGroups(2, 2, 1.0, "process").compare(th.ones(4, 2), starts, dones)
    assert comparison.centred[:2].tolist() == [[-1.0, 1.0], [-1.0, 1.0]]
    assert comparison.centred[2:, 1].tolist() == [1.0, 0.5]


@pytest.mark.parametrize("supervision", SUPERVISIONS)
@pytest.mark.parametrize("scale_rewards", ["batch", "group"])
def test_episode_groups_ignore_a_factor(supervision: str, scale_rewards: str) -> None:
    visits = rollout(60, 4)

    def advantages(rewards: th.Tensor) -> th.Tensor:
        comparison = EpisodeGroups(4, 2, GAMMA, supervision).compare(rewards, visits.episode_starts, visits.dones)
        assert comparison.compared.any()
        return ScoreScale(scale_rewards)(comparison.centred, comparison.group_std)

    th.testing.assert_close(advantages(50.0 * visits.rewards), advantages(visits.rewards), rtol=1e-4, atol=1e-5)


def test_several_threads_compare_as_one_does() -> None:
    visits, threads = endless(n_envs=8), th.get_num_threads()
    one = state_groups().compare(visits)
    try:
        th.set_num_threads(2)
        two = state_groups().compare(visits)
    finally:
        th.set_num_threads(threads)
    th.testing.assert_close(two.centred, one.centred, rtol=1e-3, atol=1e-4)
