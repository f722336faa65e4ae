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
from rliable import library, metrics, plot_utils

Run = dict[str, Any]
# Resamples of each bootstrap interval (95 %, percentile)
REPEATS = 2000


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


def normalized_scores(runs: Sequence[Run]) -> tuple[str, list[str], dict[str, np.ndarray]]:
    """
    (score - random) / (mean score of the reference - random): 0 is acting at random, 1 the reference.

    :param runs: finished and failed ones
    :return: the reference (PPO where it took part, else the first algorithm), the environments that all algorithms have
        finished runs in and the reference learned something in, and algorithm -> ``[seeds, environments]``
    """
    found = finished_runs(runs)
    algos = trained_algorithms(runs)
    reference = "ppo" if "ppo" in algos else algos[0]
    bounds = {}
    for env in dict.fromkeys(run["env"] for run in runs):
        if all((algo, env) in found for algo in [*algos, RANDOM]):
            low = found[RANDOM, env][0]["score"]
            high = statistics.mean(run["score"] for run in found[reference, env].values())
            if high > low:
                bounds[env] = (low, high)
    scores = {}
    for algo in algos:
        # A matrix has no gaps: only seeds that finished everywhere
        seeds = sorted(set.intersection(*(set(found[algo, env]) for env in bounds))) if bounds else []
        if seeds:
            columns = [
                [(found[algo, env][seed]["score"] - low) / (high - low) for seed in seeds]
                for env, (low, high) in bounds.items()
            ]
            scores[algo] = np.array(columns).T
    return reference, list(bounds), scores


def aggregates(scores: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """
    :param scores: algorithm -> ``[seeds, environments]``
    :return: algorithm -> interquartile mean, median and mean, and their intervals ``[2, 3]``
    """

    def aggregate(values: np.ndarray) -> np.ndarray:
        return np.array([function(values) for function in (metrics.aggregate_iqm, metrics.aggregate_median, np.mean)])

    # rliable draws from the global generator
    np.random.seed(0)
    return library.get_interval_estimates(scores, aggregate, reps=REPEATS)


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
        points,
        intervals,
        metric_names=["IQM", "Median", "Mean"],
        algorithms=list(points),
        colors={algo: f"C{color}" for color, algo in enumerate(points)},
        xlabel="",
    )
    # rliable's own label is placed for its paper's figures
    figure.supxlabel(f"score (0: random, 1: {reference})", y=-0.5)
    for axis in np.atleast_1d(axes).flat:
        axis.locator_params(axis="x", nbins=4)
    _save(figure, path)


def plot_profiles(scores: dict[str, np.ndarray], reference: str, path: Path) -> None:
    """
    :param scores: algorithm -> ``[seeds, environments]``
    :param reference: whose score is 1
    :param path: of the picture
    """
    values = np.concatenate([matrix.ravel() for matrix in scores.values()])
    span = max(float(np.ptp(values)), 0.1)
    thresholds = np.linspace(values.min() - 0.05 * span, values.max() + 0.05 * span, 101)
    np.random.seed(0)
    profiles, intervals = library.create_performance_profile(scores, thresholds, reps=REPEATS)
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
        points, intervals = aggregates(scores)
        plot_aggregates(points, intervals, reference, picture("aggregates.png"))
        plot_profiles(scores, reference, picture("performance_profiles.png"))
        names = ("iqm", "median", "mean")
        values = {
            algo: {
                name: [round(float(x), 4) for x in (points[algo][i], *intervals[algo][:, i])] for i, name in enumerate(names)
            }
            for algo in scores
        }
        shapes = {algo: matrix.shape[0] for algo, matrix in scores.items()}
        summary = {"reference": reference, "environments": envs, "seeds": shapes, "normalized": values}
    return pictures, summary
