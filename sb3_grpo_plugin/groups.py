"""Advantages of actions relative to a group of comparable alternatives: pure functions of tensors.

Time runs along the first dimension everywhere: ``[n_steps, n_envs, ...]``. Every function works on any device.
"""

import itertools
import math
from dataclasses import dataclass, field

import torch as th

SCALES = ("batch", "group", "none")
SUPERVISIONS = ("process", "outcome")
N_FOLDS = 4
N_BLOCK_FOLDS = 8
SCALE_FLOOR = 0.1
SCALE_DECAY = 0.99
ALIKE_TOLERANCE = 1e-5
N_FEATURES = 256
MATERN_DF = 3
RIDGE = 1.0
RIDGE_RANGE = (0.01, 10.0)
MEMORY = 4096
CLIP = 5.0
UNITS_FACTOR = 2.0
MAX_OPEN_GROUPS = 64


def reverse_scan(x: th.Tensor, decay: th.Tensor) -> th.Tensor:
    """
    Solve ``y[t] = x[t] + decay[t] * y[t + 1]`` along the first dimension in ``log2(n_steps)`` vectorised passes.

    :param x: ``[n_steps, ...]``
    :param decay: broadcastable to ``x``; the last row is not used
    :return: ``y``, the shape of ``x``
    """
    y, decay, later = x.clone(), decay.clone(), th.empty_like(x)
    stride = 1
    while stride < len(x):
        # A row only reads rows after it, as they were: they are read before any is written
        y[:-stride] += th.mul(decay[:-stride], y[stride:], out=later[stride:])
        decay[:-stride] = decay[:-stride] * decay[stride:]
        decay[-stride:] = 0.0
        stride *= 2
    return y


def fragment_ids(episode_starts: th.Tensor) -> th.Tensor:
    """
    Number the fragments of a rollout: the stretches of one environment between resets or rollout borders.

    :param episode_starts: ``[n_steps, n_envs]``, 1 where an episode begins
    :return: int64 ``[n_steps, n_envs]``, numbered from 0 environment by environment
    """
    starts = episode_starts.bool().clone()
    starts[0] = True
    return (starts.T.flatten().cumsum(0) - 1).view(starts.shape[1], starts.shape[0]).T


def assign_folds(fragments: th.Tensor, block_length: float) -> tuple[th.Tensor, th.Tensor]:
    """
    Deal a rollout's fragments into folds; a step's group is what lies outside the folds that its own fold excludes.

    With at least four fragments a fold holds whole fragments and excludes itself. With fewer, fragments are cut into
    blocks of at least ``block_length`` steps dealt round-robin, and a fold also excludes its neighbours.

    :param fragments: ``[n_steps, n_envs]``, see :func:`fragment_ids`
    :param block_length: the number of steps after which a step's own return no longer matters
    :return: the fold of each step, int64 ``[n_steps, n_envs]``, and which folds exclude which, bool ``[n_folds, n_folds]``
    """
    sizes = th.bincount(fragments.flatten())
    if len(sizes) >= N_FOLDS:
        load, fold_of = [0] * N_FOLDS, [0] * len(sizes)
        size_list = sizes.tolist()
        for fragment in sorted(range(len(size_list)), key=lambda i: -size_list[i]):
            fold = load.index(min(load))
            fold_of[fragment] = fold
            load[fold] += size_list[fragment]
        return th.tensor(fold_of, device=fragments.device)[fragments], th.eye(N_FOLDS, dtype=th.bool, device=fragments.device)
    blocks_of = [max(1, int(size / block_length)) for size in sizes.tolist()]
    block_ids, n_blocks = [], 0
    for size, n in zip(sizes.tolist(), blocks_of, strict=True):
        block_ids.append(n_blocks + th.arange(size, device=fragments.device) * n // size)
        n_blocks += n
    n_folds = min(N_BLOCK_FOLDS, n_blocks)
    folds = (th.cat(block_ids) % n_folds).view(fragments.shape[1], fragments.shape[0]).T
    ring = th.arange(n_folds, device=fragments.device)
    distance = (ring[:, None] - ring[None, :]).abs()
    if n_blocks > n_folds:
        return folds, th.minimum(distance, n_folds - distance) <= 1
    # A fold is one block: only blocks of one fragment are neighbours, or the few blocks of a short rollout had no group
    owner = th.arange(len(sizes), device=fragments.device).repeat_interleave(th.tensor(blocks_of, device=fragments.device))
    return folds, (distance <= 1) & (owner[:, None] == owner[None, :])


@dataclass
class Comparison:
    """
    A rollout's scores beside those of their groups.

    :param centred: scores minus the mean of their group, exactly 0 where all its members score alike, ``[n_steps, n_envs]``
    :param scores: the scores themselves
    :param group_std: standard deviation within the group, or ``None`` where groups overlap
    :param compared: bool, whether there was a group to compare with
    :param alike: bool, whether its members scored alike
    """

    centred: th.Tensor
    scores: th.Tensor
    group_std: th.Tensor | None
    compared: th.Tensor
    alike: th.Tensor

    def of_candidate(self, index: th.Tensor) -> "Comparison":
        """
        :param index: of one candidate per state, int64 ``[n]``, where scores are ``[n, k]``
        :return: the comparison of these candidates only, ``[n, 1]``
        """
        row = index[:, None]
        return Comparison(self.centred.gather(1, row), self.scores.gather(1, row), self.group_std, self.compared, self.alike)


def compare_candidates(scores: th.Tensor) -> Comparison:
    """
    Action groups: the candidates of one state against their mean.

    :param scores: ``[n, k]``
    :return: the scores and groups; ``compared`` and ``alike`` are ``[n, 1]``
    """
    centred = scores - scores.mean(1, keepdim=True)
    spread = scores.amax(1, keepdim=True) - scores.amin(1, keepdim=True)
    alike = spread <= ALIKE_TOLERANCE * scores.abs().amax(1, keepdim=True)
    group_std = centred.square().mean(1, keepdim=True).sqrt()
    return Comparison(th.where(alike, 0.0, centred), scores, group_std, th.ones_like(alike), alike)


def without_mean(centred: th.Tensor) -> th.Tensor:
    """
    What a rollout's centred scores have in common says nothing of one action against another, but it would make all that was
    done more likely, or less. Groups that overlap leave it, others have none.

    :param centred: scores minus the mean of their group, any shape
    :return: the same minus their mean; 0 where there is no signal stays exactly 0
    """
    signal = centred != 0.0
    return th.where(signal, centred - centred.sum() / signal.sum().clamp(min=1), 0.0)


@dataclass
class ScoreScale:
    """
    What centred scores are divided by, once per rollout.

    A rollout whose scores hardly differ within their groups carries hardly a signal; dividing by its own tiny spread would
    turn rounding into advantages of full size. The divisor is therefore at least ``SCALE_FLOOR`` times the largest standard
    deviation of centred scores so far, which is forgotten by 1 % per rollout. A constant added to all scores changes nothing.

    :param scale_rewards: ``"batch"``, ``"group"`` or ``"none"``
    """

    scale_rewards: str
    largest: float = 0.0

    def __call__(self, centred: th.Tensor, group_std: th.Tensor | None) -> th.Tensor:
        """
        :param centred: scores minus the mean of their group, any shape
        :param group_std: standard deviation within the group, broadcastable to ``centred``; ``None``: use the batch's
        :return: advantages, the shape of ``centred``
        """
        if group_std is None:
            centred = without_mean(centred)
        if self.scale_rewards == "none" or centred.numel() < 2:
            return centred
        batch_std = centred.std()
        self.largest = max(SCALE_DECAY * self.largest, float(batch_std))
        floor = max(SCALE_FLOOR * self.largest, 1e-8)
        spread = group_std if self.scale_rewards == "group" and group_std is not None else batch_std
        return centred / spread.clamp(min=floor)


@dataclass
class Visits:
    """
    A rollout as state groups see it.

    :param features: ``[n_steps, n_envs, dim]``: where the environment was
    :param next_features: ``[n_steps, n_envs, dim]``: where it came to, before any reset
    :param rewards: ``[n_steps, n_envs]``
    :param episode_starts: ``[n_steps, n_envs]``, 1 where an episode begins
    :param dones: ``[n_steps, n_envs]``, 1 where an episode ended, by termination or time limit
    :param terminated: ``[n_steps, n_envs]``, 1 where nothing can be earned any more
    """

    features: th.Tensor
    next_features: th.Tensor
    rewards: th.Tensor
    episode_starts: th.Tensor
    dones: th.Tensor
    terminated: th.Tensor


def block_length(gamma: float, gae_lambda: float) -> float:
    """
    :param gamma: discount factor
    :param gae_lambda: lambda of the returns that are compared
    :return: the steps after which a step has little say in a return, 1 / (1 - gamma * gae_lambda)
    """
    return 1.0 / max(1.0 - gamma * gae_lambda, 1e-12)


def check_state_groups(n_steps: int, n_envs: int, gamma: float, gae_lambda: float) -> None:
    """
    :param n_steps: steps of a rollout
    :param n_envs: number of environments
    :param gamma: discount factor
    :param gae_lambda: lambda of the returns that are compared
    :raises ValueError: fewer than four fragments in a rollout whose episodes do not end, and too few steps to cut it
    """
    length = block_length(gamma, gae_lambda)
    if n_envs < N_FOLDS and n_steps * n_envs < N_FOLDS * length:
        needed = f"{math.ceil(N_FOLDS * length / n_envs)}" if length < 1e6 else "more than any number of"
        raise ValueError(
            f"State groups need four stretches of a rollout that do not overlap: with n_envs={n_envs} below {N_FOLDS}, "
            f"gamma={gamma} and gae_lambda={gae_lambda} that takes {needed} steps, and n_steps is {n_steps}. "
            f"Raise n_steps, use n_envs >= {N_FOLDS}, or lower gae_lambda."
        )


@dataclass
class StateGroups:
    """
    Visits of *other* fragments to similar states, of this rollout and, fading, of earlier ones.

    The mean lambda-return of a step's group is the solution of a linear system: least-squares temporal differences,
    LSTD(lambda) (Bradtke & Barto 1996, https://doi.org/10.1007/BF00114723; Boyan 2002,
    https://doi.org/10.1023/A:1017936530646). Similarity is a Matern kernel of whitened states, in the random Fourier
    features of Rahimi & Recht (2007), beside linear terms. The system is cross-fitted (Chernozhukov et al. 2018,
    https://arxiv.org/abs/1608.00060): for each fold of fragments it is solved from all the others, so that a step never
    sees its own episode's return in its baseline. Own-episode visits would cancel the advantage.

    A rollout is remembered as the sums that make up its system, fading by ``exp(-steps / MEMORY)``: time and space per step
    are constant, and no observation is kept. Fragments that border
    on the next rollout are remembered from the one after it on.

    :param gamma: discount factor
    :param gae_lambda: lambda of the returns that are compared
    :param seed: of the random features; the global generators are not used
    :param remember: whether earlier rollouts count; not where the features themselves are learned
    :param novelty_coef: weight of a bonus for coming to states unlike those visited so far, see :meth:`_novelty`
    """

    gamma: float
    gae_lambda: float
    seed: int = 0
    remember: bool = True
    novelty_coef: float = 0.0
    _frequencies: th.Tensor | None = field(default=None, repr=False)
    _offsets: th.Tensor | None = field(default=None, repr=False)
    _center: th.Tensor | None = field(default=None, repr=False)
    _width: th.Tensor | None = field(default=None, repr=False)
    _remembered: th.Tensor | None = field(default=None, repr=False)
    _bordering: th.Tensor | None = field(default=None, repr=False)
    _visited: th.Tensor | None = field(default=None, repr=False)
    _ridge: float = field(default=RIDGE, repr=False)

    def compare(self, visits: Visits) -> Comparison:
        """
        :param visits: one rollout
        :return: the rollout's lambda-returns and how they compare with those of their groups
        """
        self._whiten(visits.features)
        phi, after = self._embed_steps(visits)
        rewards = visits.rewards
        if self.novelty_coef > 0:
            rewards = rewards + self.novelty_coef * self._novelty(after)
        after *= (self.gamma * (1.0 - visits.terminated))[..., None]
        decay = (self.gamma * self.gae_lambda * (1.0 - visits.dones))[..., None]
        fragments = fragment_ids(visits.episode_starts)
        folds, excludes = assign_folds(fragments, block_length(self.gamma, self.gae_lambda))
        borders = th.isin(fragments, fragments[-1][visits.dones[-1] == 0])

        # Baselines are solved as differences from one constant, which keeps rounding out of returns that are alike
        step = 1.0 - self.gamma * (1.0 - visits.terminated)
        offset = rewards.sum() / step.sum()
        rewards = rewards - offset * step

        # What a step's features are worth beyond what comes after it; large, so it takes the place of `after`
        differences = after.neg_().add_(phi)
        weights = self._solve(phi, differences, rewards, decay, borders, folds, excludes, offset)
        own = folds[..., None]
        baseline = (phi @ weights.T).gather(-1, own).squeeze(-1)
        residuals = rewards[..., None] - differences @ weights.T
        centred = reverse_scan(residuals, decay).gather(-1, own).squeeze(-1)
        scores = centred + baseline + offset
        alike = centred.abs() <= ALIKE_TOLERANCE * scores.abs().max()
        if not alike.all():
            self._choose_ridge(centred, baseline)
        return Comparison(th.where(alike, 0.0, centred), scores, None, th.ones_like(alike), alike)

    def _choose_ridge(self, centred: th.Tensor, baseline: th.Tensor) -> None:
        """The more of the scores a baseline explains, the less the next one is held back: noise over signal."""
        signal = float(baseline.std())
        if signal > 0.0:
            self._ridge = min(max(float(centred.std()) / signal, RIDGE_RANGE[0]), RIDGE_RANGE[1])

    def _novelty(self, phi: th.Tensor) -> th.Tensor:
        """
        How little is known of a state, ``phi . (ridge + sum of phi phi^T over all visits so far)^-1 phi``, from 1 down to 0.

        The uncertainty of a linear estimate, as in LSVI-UCB (Jin et al. 2020, https://arxiv.org/abs/1907.05388) and, without
        the root as here, in E3B (Henaff et al. 2022, https://arxiv.org/abs/2210.05805).

        :param phi: the states' features, ``[n_steps, n_envs, n_features]``
        :return: ``[n_steps, n_envs]``
        """
        rows = phi.flatten(0, 1)
        if self._visited is None or not self.remember:
            self._visited = RIDGE * th.eye(rows.shape[-1], dtype=th.float64, device=rows.device)
        self._visited += (rows.T @ rows).double()
        factor = th.linalg.cholesky(self._visited).to(rows)
        return th.linalg.solve_triangular(factor, rows.T, upper=False).square().sum(0).view(phi.shape[:2])

    def _whiten(self, features: th.Tensor) -> None:
        """
        Fix the units of states. Where rollouts are remembered they are those of one rollout, until states have outgrown them;
        then everything begins anew, for what is remembered is in the old ones.
        """
        flat = features.flatten(0, 1)
        center, width = flat.mean(0), flat.std(0) + 1e-4
        if self._center is not None and self._width is not None and self.remember:
            moved = (center - self._center).abs() > UNITS_FACTOR * self._width
            grown = (width / self._width).log().abs() > math.log(UNITS_FACTOR)
            if not (moved | grown).any():
                return
            self._remembered = self._bordering = self._visited = None
        self._center, self._width = center, width
        if self._frequencies is None:
            dim = features.shape[-1]
            generator = th.Generator().manual_seed(self.seed)
            # The spectrum of a Matern kernel is a multivariate Student t; chi2 makes it from a normal one
            chi2 = th.randn(MATERN_DF, N_FEATURES, generator=generator).square().mean(0)
            normal = th.randn(dim, N_FEATURES, generator=generator)
            self._frequencies = (normal / (chi2 * dim).sqrt()).to(features)
            self._offsets = (2 * math.pi * th.rand(N_FEATURES, generator=generator)).to(features)

    def _embed_steps(self, visits: Visits) -> tuple[th.Tensor, th.Tensor]:
        """Both embedded. Where no episode ended, the next state is that of the next step: it is embedded once."""
        phi = self._embed(th.cat((visits.features, visits.next_features[-1:])))
        after, ended = phi[1:].clone(), visits.dones[:-1].bool()
        after[:-1][ended] = self._embed(visits.next_features[:-1][ended])
        return phi[:-1], after

    def _embed(self, features: th.Tensor) -> th.Tensor:
        """``[..., dim]`` -> ``[..., 1 + dim + N_FEATURES]``: a constant, linear terms and random Fourier features."""
        assert self._center is not None and self._width is not None
        assert self._frequencies is not None and self._offsets is not None
        whitened = ((features - self._center) / self._width).clamp(-CLIP, CLIP)
        waves = (whitened @ self._frequencies).add_(self._offsets).cos_().mul_(math.sqrt(2.0 / N_FEATURES))
        linear = whitened / math.sqrt(whitened.shape[-1])
        return th.cat((th.ones_like(waves[..., :1]), linear, waves), dim=-1)

    def _solve(
        self,
        phi: th.Tensor,
        differences: th.Tensor,
        rewards: th.Tensor,
        decay: th.Tensor,
        borders: th.Tensor,
        folds: th.Tensor,
        excludes: th.Tensor,
        offset: th.Tensor,
    ) -> th.Tensor:
        """
        The coefficients of each fold's baseline, ``[n_folds, n_features]``, from the visits that the fold does not exclude.

        A row of the system says that a visit's features are worth what the differences ``phi - gamma * phi'`` that follow it
        within its fold, faded by ``gamma * lambda``, are worth, and that this is equal to the rewards, faded alike.
        """
        within = th.cat((folds[1:] == folds[:-1], th.zeros_like(borders[:1])))[..., None]
        rows = reverse_scan(th.cat((differences, rewards[..., None]), dim=-1), decay * within).flatten(0, 1)
        phi = phi.flatten(0, 1)
        part, order = (2 * folds + borders).flatten().sort()
        chunks = order.split(th.bincount(part, minlength=2 * len(excludes)).tolist())
        sums = th.stack([phi[chunk].T @ rows[chunk] for chunk in chunks]).unflatten(0, (-1, 2))
        # What is solved next is as large: it takes their place in memory
        del rows
        others = (~excludes).to(phi)
        system = (others @ sums.sum(1).flatten(1)).view(len(others), *sums.shape[2:]).double()
        if self.remember:
            if self._remembered is not None:
                system += self._remembered
                system[..., -1] -= offset * self._remembered[:, 0]
            # The constant's column says how much of the offset each row of rewards lacks
            closed, bordering = memories = sums.sum(0).double()
            memories[..., -1] += offset * memories[..., 0]
            fade = math.exp(-len(phi) / MEMORY)
            if self._remembered is not None and self._bordering is not None:
                closed += self._remembered
                closed += self._bordering
            self._remembered, self._bordering = fade * closed, fade * bordering
        matrices = system[..., :-1]
        matrices.diagonal(dim1=-2, dim2=-1)[:, 1:] += self._ridge
        # The constant is free; this only keeps the system solvable
        matrices[:, 0, 0] += 1e-6 * len(phi)
        # One by one: in batches, MKL's LU fails on several threads once torch.set_num_threads was called (torch 2.13)
        return th.stack([th.linalg.solve(*fold) for fold in zip(matrices, system[..., -1], strict=True)]).to(phi.dtype)


@dataclass
class _Member:
    """An episode as far as it was watched."""

    rewards: list[float] = field(default_factory=list)
    ended: bool = False


@dataclass
class EpisodeGroups:
    """
    Episodes of ``group_size`` neighbouring environments from one start: the groups of DeepSeekMath (section 4.1).

    The e-th episode of each member belongs to group e, whenever it takes place: what was seen of it in earlier rollouts is
    remembered until all members have ended theirs.

    - ``"outcome"``: the score of every step is the return of its whole episode; episodes cut by the rollout's end are left
      out.
    - ``"process"``: the score of a step is its return to go, compared at the same step of the episodes; a member that has
      ended earns 0 from there. Two members of which one was cut are compared over the steps that both were watched.

    :param n_envs: number of environments, a multiple of ``group_size``
    :param group_size: members of a group
    :param gamma: discount factor
    :param supervision: ``"outcome"`` or ``"process"``
    """

    n_envs: int
    group_size: int
    gamma: float
    supervision: str = "process"
    _running: list[int] = field(default_factory=list)
    _open: dict[tuple[int, int], dict[int, _Member]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._running = [-1] * self.n_envs

    def compare(self, rewards: th.Tensor, episode_starts: th.Tensor, dones: th.Tensor) -> Comparison:
        """
        :param rewards: ``[n_steps, n_envs]``
        :param episode_starts: ``[n_steps, n_envs]``, 1 where an episode begins
        :param dones: ``[n_steps, n_envs]``, 1 where an episode ended
        :return: the rollout's scores and groups
        """
        flags = th.zeros(rewards.shape, dtype=th.bool)
        result = Comparison(th.zeros(rewards.shape), th.zeros(rewards.shape), th.ones(rewards.shape), flags.clone(), flags)
        stretches = self._watch(rewards.tolist(), episode_starts.bool().tolist(), dones.bool().tolist())
        for (env, first, last), (episode, offset) in stretches.items():
            group, member = divmod(env, self.group_size)
            self._score(result, self._open[group, episode], member, slice(first, last), env, offset)
        for key, members in list(self._open.items()):
            if len(members) == self.group_size and all(member.ended for member in members.values()):
                del self._open[key]
        running = {(env // self.group_size, episode) for env, episode in enumerate(self._running)}
        waiting = sorted((key for key in self._open if key not in running), key=lambda key: key[1])
        for key in waiting[: -MAX_OPEN_GROUPS * self.n_envs // self.group_size]:
            del self._open[key]
        return result

    def _watch(
        self, rewards: list[list[float]], starts: list[list[bool]], dones: list[list[bool]]
    ) -> dict[tuple[int, int, int], tuple[int, int]]:
        """Take a rollout in; returns (env, first step, end) of each stretch of an episode -> (episode, steps seen before)."""
        stretches = {}
        for env in range(self.n_envs):
            group, member = divmod(env, self.group_size)
            borders = [0, *(step for step in range(1, len(rewards)) if starts[step][env]), len(rewards)]
            for first, last in itertools.pairwise(borders):
                if starts[first][env]:
                    self._running[env] += 1
                key = (group, self._running[env])
                seen = self._open.setdefault(key, {}).setdefault(member, _Member())
                stretches[env, first, last] = (self._running[env], len(seen.rewards))
                seen.rewards += [rewards[step][env] for step in range(first, last)]
                seen.ended = dones[last - 1][env]
        return stretches

    def _score(self, result: Comparison, members: dict[int, _Member], own: int, steps: slice, env: int, offset: int) -> None:
        """Compare a stretch of one member's episode with what is known of the others."""
        outcome = self.supervision == "outcome"
        known = [member for index, member in members.items() if index != own and (member.ended or not outcome)]
        known.insert(0, members[own])
        if len(known) < 2 or (outcome and not known[0].ended):
            return
        length = max(len(member.rewards) for member in known)
        padded = th.zeros(length + 1, len(known), dtype=th.float64)
        for column, member in enumerate(known):
            padded[: len(member.rewards), column] = th.tensor(member.rewards, dtype=th.float64)
        to_go = reverse_scan(padded, th.full((length + 1, 1), self.gamma, dtype=th.float64))
        watched = th.tensor([length if member.ended else len(member.rewards) for member in known])
        time = th.arange(offset, offset + steps.stop - steps.start)[:, None]
        if outcome:
            time = th.zeros_like(time)
        # Each pair is compared up to the step where either of the two was cut
        until = watched.clamp(max=int(watched[0]))[None, :]
        both = time < until
        discount = self.gamma ** (until - time).clamp(min=0).double()
        at_until = to_go[until[0], th.arange(len(known))]
        scores = to_go[time[:, 0]] - discount * at_until
        own_scores = to_go[time, 0] - discount * to_go[until[0], 0]
        difference = th.where(both, own_scores - scores, 0.0)
        n = both.sum(1)
        mean = difference.sum(1) / n
        spread = th.where(both, difference - mean[:, None], 0.0).square().sum(1).div(n).sqrt()
        size = th.where(both, scores, 0.0).abs().amax(1)
        alike = difference.abs().amax(1) <= ALIKE_TOLERANCE * size
        result.scores[steps, env] = own_scores[:, 0].float()
        result.compared[steps, env] = n > 1
        result.alike[steps, env] = alike & (n > 1)
        result.centred[steps, env] = th.where(alike, 0.0, mean).float()
        assert result.group_std is not None
        result.group_std[steps, env] = spread.float()
