"""
Statistics and figures of ``sb3-grpo benchmark``, as Agarwal et al. (https://arxiv.org/abs/2108.13264) recommend for a few
seeds: rliable does the sums. Imported only when a report is written.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from sb3_grpo_plugin.benchmark_matrix import RANDOM

# Before rliable imports pyplot, which would look for a screen
matplotlib.use("Agg")

from matplotlib import pyplot as plt
from rliable import library, plot_utils

Run = dict[str, Any]
# Resamples of each bootstrap interval (95 %, percentile)
REPEATS = 2000
# Over environments
STATISTICS = ("iqm", "median", "mean")


def finished_runs(runs: Sequence[Run]) -> dict[tuple[str, str], dict[int, Run]]:
    """
    :param runs: finished and failed ones
    :return: (algorithm, environment) -> seed -> finished run
    """
    found: dict[tuple[str, str], dict[int, Run]] = {}
    for run in runs:
        if run["status"] == "finished":
            found.setdefault((run["algo"], run["env"]), {})[run["seed"]] = run
    return found


def trained_algorithms(runs: Sequence[Run]) -> list[str]:
    """
    :param runs: finished and failed ones
    :return: all but acting at random
    """
    return sorted({run["algo"] for run in runs if run["algo"] != RANDOM and run["status"] == "finished"})


def normalized_scores(runs: Sequence[Run]) -> tuple[str, list[str], dict[str, list[np.ndarray]]]:
    """
    (score - random) / (mean score of the reference - random): 0 is acting at random, 1 the reference.

    :param runs: finished and failed ones
    :return: the reference (PPO where it took part, else the first algorithm), the environments that all algorithms have
        finished runs in and the reference learned something in, and algorithm -> ``[seeds]`` of each of them
    """
    found = finished_runs(runs)
    algos = trained_algorithms(runs)
    reference = "ppo" if "ppo" in algos else algos[0]
    envs: list[str] = []
    scores: dict[str, list[np.ndarray]] = {algo: [] for algo in algos}
    for env in dict.fromkeys(run["env"] for run in runs):
        if not all((algo, env) in found for algo in [*algos, RANDOM]):
            continue
        low = found[RANDOM, env][0]["score"]
        high = statistics.mean(run["score"] for run in found[reference, env].values())
        if high > low:
            envs.append(env)
            for algo in algos:
                seeds = sorted(found[algo, env].items())
                scores[algo].append(np.array([(run["score"] - low) / (high - low) for _, run in seeds]))
    return reference, envs, scores if envs else {}


def interquartile_mean(columns: Sequence[np.ndarray]) -> np.ndarray:
    """
    The mean of the middle half of all runs (Agarwal et al.), where each environment counts alike however many seeds it has.

    :param columns: of each environment, ``[..., seeds]``
    :return: ``[...]``
    """
    values = np.concatenate(columns, axis=-1)
    weights = np.concatenate([np.full(column.shape[-1], 1.0 / column.shape[-1]) for column in columns]) / len(columns)
    order = values.argsort(axis=-1)
    weights = weights[order]
    ends = weights.cumsum(axis=-1)
    inside = (np.minimum(ends, 0.75) - np.maximum(ends - weights, 0.25)).clip(min=0.0)
    return (np.take_along_axis(values, order, axis=-1) * inside).sum(axis=-1) / inside.sum(axis=-1)


def aggregates(scores: dict[str, list[np.ndarray]], reference: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """
    Statistics over environments, and how far they would move with other seeds: those of the algorithm are drawn anew, and so
    are those of the reference that it is measured by. The reference's own row is thus itself against itself with other seeds.

    :param scores: of ``normalized_scores``
    :param reference: whose mean is 1
    :return: algorithm -> interquartile mean, median, mean, and the mean in each environment: ``[3 + environments]``; and
        their 95 % intervals ``[2, 3 + environments]``
    """

    def statistics_of(columns: Sequence[np.ndarray]) -> np.ndarray:
        means = np.stack([column.mean(axis=-1) for column in columns], axis=-1)
        over_all = (interquartile_mean(columns), np.median(means, axis=-1), means.mean(axis=-1))
        return np.concatenate((np.stack(over_all, axis=-1), means), axis=-1)

    rng = np.random.default_rng(0)

    def drawn(column: np.ndarray) -> np.ndarray:
        return rng.choice(column, (REPEATS, len(column)))

    units = [drawn(column).mean(axis=1, keepdims=True) for column in scores[reference]]
    points = {algo: statistics_of(columns) for algo, columns in scores.items()}
    intervals = {}
    for algo, columns in scores.items():
        samples = statistics_of([drawn(column) / unit for column, unit in zip(columns, units, strict=True)])
        intervals[algo] = np.percentile(samples, (2.5, 97.5), axis=0)
    return points, intervals


def learning_curve(run: Run) -> tuple[list[float], list[float], list[float]]:
    """
    :param run: a finished run
    :return: simulator steps as planned, simulator + model steps as they were, mean returns
    """
    # The end is the score; a plan point that the run ended before shows the last policy too
    ends = (run["budget"], run["simulator_steps"] + run["model_steps"], run["score"])
    points = [
        (point["due"], point["simulator_steps"] + point["model_steps"], float(np.mean(point["returns"])))
        for point in run["evaluations"]
    ]
    count = run["settings"]["evaluations"]
    late = [(round(run["budget"] * index / count), *ends[1:]) for index in range(len(points), count)]
    steps, all_steps, returns = zip(*points, *late, ends, strict=True)
    return list(steps), list(all_steps), list(returns)


def plot_learning_curves(runs: Sequence[Run], path: Path, model_steps: bool = False) -> None:
    """
    One panel per environment: mean over seeds and its bootstrap interval.

    :param runs: finished and failed ones
    :param path: of the picture
    :param model_steps: draw against simulator + model steps
    """
    found = finished_runs(runs)
    algos = trained_algorithms(runs)
    envs = [env for env in dict.fromkeys(run["env"] for run in runs) if any((algo, env) in found for algo in algos)]
    columns = min(3, len(envs))
    height = -(-len(envs) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(5 * columns, 4 * height), squeeze=False, layout="constrained")
    for axis, env in zip(axes.flat, envs, strict=False):
        for color, algo in enumerate(algos):
            if (algo, env) not in found:
                continue
            curves = [learning_curve(run) for run in found[algo, env].values()]
            returns = np.array([curve[2] for curve in curves])
            steps = np.mean([curve[1 if model_steps else 0] for curve in curves], axis=0)
            means, intervals = _mean_over_seeds(returns)
            axis.plot(steps, means, color=f"C{color}", label=f"{algo} ({len(curves)} seeds)")
            axis.fill_between(steps, *intervals, color=f"C{color}", alpha=0.2, linewidth=0)
        if (RANDOM, env) in found:
            axis.axhline(found[RANDOM, env][0]["score"], color="gray", linestyle=":", label=RANDOM)
        axis.set(title=env, xlabel="simulator + model steps" if model_steps else "simulator steps", ylabel="return")
        if model_steps:
            # The untrained policy, at 0, is not on it
            axis.set_xscale("log")
        else:
            axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
        axis.legend()
    for axis in axes.flat[len(envs) :]:
        axis.set_axis_off()
    _save(figure, path)


def _mean_over_seeds(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    np.random.seed(0)
    mean: Callable[[np.ndarray], np.ndarray] = lambda values: values.mean(axis=(0, 1))  # noqa: E731
    points, intervals = library.get_interval_estimates({"": returns[:, None]}, mean, reps=REPEATS)
    return points[""], intervals[""]


def plot_aggregates(points: dict[str, np.ndarray], intervals: dict[str, np.ndarray], reference: str, path: Path) -> None:
    """
    :param points: of ``aggregates``
    :param intervals: of ``aggregates``
    :param reference: whose score is 1
    :param path: of the picture
    """
    figure, axes = plot_utils.plot_interval_estimates(
        {algo: values[: len(STATISTICS)] for algo, values in points.items()},
        {algo: values[:, : len(STATISTICS)] for algo, values in intervals.items()},
        metric_names=["IQM", "Median", "Mean"],
        algorithms=list(points),
        colors={algo: f"C{color}" for color, algo in enumerate(points)},
        xlabel="",
    )
    # rliable's own label is placed for its paper's figures, and its figures grow with the algorithms
    figure.supxlabel(f"score (0: random, 1: {reference})", y=-1.4 / len(points))
    for axis in np.atleast_1d(axes).flat:
        axis.locator_params(axis="x", nbins=4)
    _save(figure, path)


def plot_profiles(scores: dict[str, list[np.ndarray]], reference: str, path: Path) -> None:
    """
    :param scores: of ``normalized_scores``; as many seeds are drawn as there are in every environment
    :param reference: whose score is 1
    :param path: of the picture
    """
    matrices = {
        algo: np.stack([column[: min(map(len, columns))] for column in columns], axis=1) for algo, columns in scores.items()
    }
    values = np.concatenate([matrix.ravel() for matrix in matrices.values()])
    span = max(float(np.ptp(values)), 0.1)
    thresholds = np.linspace(values.min() - 0.05 * span, values.max() + 0.05 * span, 101)
    np.random.seed(0)
    profiles, intervals = library.create_performance_profile(matrices, thresholds, reps=REPEATS)
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    plot_utils.plot_performance_profiles(
        profiles,
        thresholds,
        performance_profile_cis=intervals,
        colors={algo: f"C{color}" for color, algo in enumerate(profiles)},
        ax=axis,
        xlabel=f"score $\\tau$ (0: random, 1: {reference})",
        ylabel=r"fraction of runs above $\tau$",
        labelsize="medium",
        ticklabelsize="medium",
        legend=True,
        legendsize="medium",
    )
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def draw(out: Path, runs: Sequence[Run]) -> tuple[list[str], dict[str, Any]]:
    """
    :param out: the output folder
    :param runs: finished and failed ones
    :return: names of the pictures, and the statistics that they show
    """
    pictures: list[str] = []
    summary: dict[str, Any] = {}
    if not trained_algorithms(runs):
        return pictures, summary

    def picture(name: str) -> Path:
        pictures.append(name)
        return out / name

    plot_learning_curves(runs, picture("learning_curves.png"))
    if any(run.get("model_steps") for run in runs):
        plot_learning_curves(runs, picture("learning_curves_model_steps.png"), model_steps=True)
    reference, envs, scores = normalized_scores(runs)
    if scores:
        points, intervals = aggregates(scores, reference)
        plot_aggregates(points, intervals, reference, picture("aggregates.png"))
        plot_profiles(scores, reference, picture("performance_profiles.png"))
        values = {
            algo: [[round(float(x), 4) for x in column] for column in np.vstack((points[algo], intervals[algo])).T]
            for algo in scores
        }
        summary = {
            "reference": reference,
            "environments": envs,
            "seeds": {algo: [len(column) for column in columns] for algo, columns in scores.items()},
            "normalized": {algo: dict(zip(STATISTICS, rows, strict=False)) for algo, rows in values.items()},
            "by_environment": {algo: dict(zip(envs, rows[len(STATISTICS) :], strict=True)) for algo, rows in values.items()},
        }
    return pictures, summary
