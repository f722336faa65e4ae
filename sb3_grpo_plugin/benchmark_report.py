"""The tables of ``sb3-grpo benchmark``, and where its figures go (``benchmark_figures.py``)."""

import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from sb3_grpo_plugin.benchmark_matrix import RANDOM

Run = dict[str, Any]
REPORT = "benchmark.md"


def by_algorithm(runs: Sequence[Run], env: str) -> dict[str, list[Run]]:
    """
    :param runs: of all environments
    :param env: environment ID
    :return: algorithm -> its runs there; acting at random comes last
    """
    algos = sorted({run["algo"] for run in runs}, key=lambda algo: (algo == RANDOM, algo))
    return {algo: [run for run in runs if run["env"] == env and run["algo"] == algo] for algo in algos}


def cell(runs: Sequence[Run]) -> str:
    """
    :param runs: of one algorithm in one environment
    :return: mean and standard deviation over seeds, and what failed
    """
    scores = [run["score"] for run in runs if run["status"] == "finished"]
    failed = len(runs) - len(scores)
    words = []
    if scores:
        spread = f" +/- {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        words.append(f"{statistics.mean(scores):.1f}{spread}")
    if failed:
        words.append(f"**{failed} failed**")
    return ", ".join(words) or "-"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """
    :param header: column names
    :param rows: the cells
    :return: Markdown
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(word).replace("|", "\\|") for word in line) + " |" for line in lines)


def span(numbers: Collection[int]) -> str:
    """
    :param numbers: how many seeds each algorithm or environment has
    :return: the least to the greatest
    """
    least, most = min(numbers, default=0), max(numbers, default=0)
    return str(least) if least == most else f"{least} to {most}"


def score_table(runs: Sequence[Run]) -> str:
    """
    :param runs: finished and failed ones
    :return: environments x algorithms
    """
    envs = list(dict.fromkeys(run["env"] for run in runs))
    algos = list(by_algorithm(runs, ""))
    rows = []
    for env in envs:
        found = by_algorithm(runs, env)
        trained = [run for run in runs if run["env"] == env and run["algo"] != RANDOM]
        seeds = span(Counter(algo for algo, _ in {(run["algo"], run["seed"]) for run in trained}).values())
        rows.append([env, trained[0]["budget"] if trained else "-", seeds, *(cell(found[algo]) for algo in algos)])
    return markdown_table(["environment", "simulator steps", "seeds", *algos], rows)


def run_table(runs: Sequence[Run]) -> str:
    """
    :param runs: finished and failed ones
    :return: one line each
    """
    header = ["environment", "algorithm", "seed", "score", "std of episodes", "simulator steps", "model steps", "updates"]
    header += ["training s", "steps/s", "peak MB", "note"]
    rows = []
    for run in runs:
        row = [run["env"], run["algo"], run["seed"]]
        if run["status"] == "failed":
            rows.append([*row, *["-"] * 8, f"failed: {run['error']}"])
            continue
        names = ("simulator_steps", "model_steps", "updates", "train_seconds", "steps_per_second", "peak_memory_mb")
        figures = ["-" if run.get(name) is None else run[name] for name in names]
        note = "never updated: the budget is less than its first rollout" if run.get("updates") == 0 else ""
        rows.append([*row, f"{run['score']:.1f}", f"{run['score_std']:.1f}", *figures, note])
    return markdown_table(header, rows)


def interval(values: Sequence[float]) -> str:
    """
    :param values: a point and its interval
    :return: for a table
    """
    point, low, high = values
    return f"{point:.2f} [{low:.2f}, {high:.2f}]"


def summary_table(summary: dict[str, Any]) -> str:
    """
    :param summary: of ``benchmark_figures.draw``
    :return: algorithms x statistics
    """
    rows = []
    for algo, values in summary["normalized"].items():
        rows.append([algo, span(summary["seeds"][algo]), *map(interval, values.values())])
    return markdown_table(["algorithm", "seeds", "interquartile mean", "median", "mean"], rows)


def environment_table(summary: dict[str, Any]) -> str:
    """
    :param summary: of ``benchmark_figures.draw``
    :return: environments x algorithms, means over seeds
    """
    found = summary["by_environment"]
    rows = [[env, *(interval(found[algo][env]) for algo in found)] for env in summary["environments"]]
    return markdown_table(["environment", *found], rows)


def text_report(
    runs: Sequence[Run], called: Sequence[str], pictures: Sequence[str] = (), summary: dict[str, Any] | None = None
) -> str:
    """
    :param runs: finished and failed ones
    :param called: the commands that made them
    :param pictures: file names
    :param summary: statistics over environments
    :return: Markdown
    """
    done = [run for run in runs if run["status"] == "finished"]
    versions = list(dict.fromkeys(", ".join(f"{name} {number}" for name, number in run["versions"].items()) for run in done))
    machines = list(dict.fromkeys(", ".join(f"{name} {value}" for name, value in run["machine"].items()) for run in done))
    episodes = sorted({len(run["returns"]) for run in done})
    commands = list(dict.fromkeys(_any_seed(run) for run in runs if run["algo"] != RANDOM))
    parts = [
        "# Benchmark",
        "\n".join(f"    {command}" for command in called),
        "Mean +/- standard deviation over seeds. A run's score is the mean return of "
        f"{' or '.join(map(str, episodes)) or 'no'} deterministic episodes of its last policy: the one after the "
        "last update that fitted into the simulator steps. "
        f"`{RANDOM}` acts at random.",
        score_table(runs),
        *_statistics(summary),
        *(f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures),
        "## Runs",
        run_table(runs),
        "## Commands",
        "The zoo's own command of each run, which the benchmark stops at the budget and evaluates:",
        "\n".join(f"    {line}" for line in commands),
        "## Versions and machines",
        "\n".join(f"- {line}" for line in [*versions, *machines]),
    ]
    if len(versions) > 1:
        parts.append("**Not all runs were made with the same versions.**")
    return "\n\n".join(parts) + "\n"


def _statistics(summary: dict[str, Any] | None) -> list[str]:
    if not summary:
        return []
    reference = summary["reference"]
    return [
        f"Over {', '.join(summary['environments'])}, where 0 is acting at random and 1 the mean of {reference}, with 95 % "
        f"bootstrap intervals over the seeds of the algorithm and of {reference}. The row of {reference} is itself against "
        "itself with other seeds:",
        summary_table(summary),
        "The same in each environment, means:",
        environment_table(summary),
    ]


def _any_seed(run: Run) -> str:
    return run["command"].replace(f"--seed {run['seed']} ", "--seed SEED ")


def write_report(out: Path, runs: Sequence[Run], called: Sequence[str]) -> dict[str, Any]:
    """
    :param out: the output folder
    :param runs: finished and failed ones
    :param called: the commands that made them
    :return: statistics over environments
    """
    (out / REPORT).write_text(text_report(runs, called), encoding="utf-8")

    # Imported only when used: half a plotting stack
    from sb3_grpo_plugin.benchmark_figures import draw

    pictures, summary = draw(out, runs)
    (out / REPORT).write_text(text_report(runs, called, pictures, summary), encoding="utf-8")
    return summary
