"""The dial against one run for each of its alphas: the tables and the picture of docs/dial.md.

    python -m benchmarks.dial --seeds 7,8,9 --output runs/dials [--picture FILE.png]
    python -m benchmarks.dial --step --output runs/dial_step

A separate run has the settings of the dial's, one alpha, and in each step as many groups as the
dial has of that alpha: both sides make equally many updates and learn each alpha from equally many
responses. Runs that the directory holds already are read. Accuracy and tokens are means over the
seeds, with 95 % intervals over the held-out problems. --step compares single steps instead: of the
dial, and of a run with one alpha and as many groups.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.shared import print_table, say
from effreason.evaluation import responses, statistics
from effreason.runs.report import figures
from effreason.runtime import config as configuration
from effreason.runtime.files import read_json_lines

FILE = "tiny_dial.yaml"
SHORT = ["--run.steps", "10", "--evaluation.problems", "0"]
COMPILING = 2                       # steps that may compile and are not counted
COST = "cost.json"                  # written by this program into the directory of a run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """Accuracy or tokens at one alpha, over the same problems for every seed."""

    value: float
    interval: tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="7,8,9", help="separated by commas")
    parser.add_argument("--step", action="store_true", help="compare single steps")
    parser.add_argument("--output", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--picture", type=Path, help="a PNG to draw")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    config = configuration.load(configuration.shipped() / FILE)
    if options.step:
        kinds = {"dial": [], "one alpha": ["--reward.alphas", "null"]}
        print_steps({name: train(options.output / name.replace(" ", "_"), [*SHORT, *flags])
                     for name, flags in kinds.items()})
        return
    alphas, prompts = config.reward.dial, config.rollout.prompts_per_step
    assert prompts % len(alphas) == 0, "each alpha needs equally many groups in a step"

    dials = [train(options.output / f"dial_{seed}", ["--run.seed", str(seed)]) for seed in seeds]
    separate = {alpha: [
        train(options.output / f"alpha{alpha:g}_{seed}",
              ["--run.seed", str(seed), "--reward.alphas", "null", "--reward.alpha", f"{alpha:g}",
               "--rollout.prompts_per_step", str(prompts // len(alphas))])
        for seed in seeds] for alpha in alphas}

    last = f"evaluations/step{config.run.steps}"
    of_dial = {point["alpha"]: measured([run / last / f"alpha{point['alpha']:g}" for run in dials])
               for point in json.loads((dials[0] / "dial.json").read_text())["points"]}
    alone = {alpha: measured([run / last for run in runs]) for alpha, runs in separate.items()}
    print_points(of_dial, alone)
    print_costs({"dial": dials, **{f"alpha {alpha:g}": runs for alpha, runs in separate.items()}})
    if options.picture:
        picture(of_dial, alone).savefig(options.picture, metadata={"Software": None})


def train(directory: Path, flags: Sequence[str]) -> Path:
    """Trains in a process of its own, unless the directory holds the run; notes what it cost."""
    if not (directory / COST).exists():
        say(f"training {directory}")
        process = subprocess.Popen([
            sys.executable, "train.py", "--config", str(configuration.shipped() / FILE),
            "--run.directory", str(directory), *flags])
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{directory}: training failed")
        (directory / COST).write_text(json.dumps({"peak_bytes": usage.ru_maxrss * 1024}))
    return directory


def measured(directories: Sequence[Path]) -> dict[str, Point]:
    """Returns accuracy and tokens, means over the seeds, of responses to the same problems."""
    outcomes = [responses.read_outcomes(directory / "tiny.jsonl")[1] for directory in directories]

    def point(columns: Sequence[np.ndarray]) -> Point:
        of_problems = np.mean([column.mean(axis=1) for column in columns], axis=0)
        return Point(value=float(of_problems.mean()),
                     interval=statistics.interval(np.mean, of_problems))

    return {"accuracy": point([100.0 * each.correct for each in outcomes]),
            "tokens": point([each.lengths for each in outcomes])}


def print_points(of_dial: dict[float, dict[str, Point]],
                 alone: dict[float, dict[str, Point]]) -> None:
    """Prints accuracy and tokens of both sides at each alpha."""
    def cells(point: Point) -> str:
        low, high = point.interval
        return f"{point.value:.1f} [{low:.1f}, {high:.1f}]"

    rows = []
    for alpha, points in of_dial.items():
        row = [f"{alpha:g}", cells(points["tokens"]), cells(points["accuracy"])]
        if alpha in alone:
            ratio = points["tokens"].value / alone[alpha]["tokens"].value - 1
            change = points["accuracy"].value - alone[alpha]["accuracy"].value
            row += [cells(alone[alpha]["tokens"]), cells(alone[alpha]["accuracy"]),
                    f"{100 * ratio:+.1f} %", f"{change:+.1f}"]
        rows.append(row + ["–"] * (7 - len(row)))
    print_table(["α", "dial: tokens", "accuracy, %", "alone: tokens", "accuracy, %", "tokens",
                 "points"], rows)


def print_costs(runs: dict[str, Sequence[Path]]) -> None:
    """Prints what the runs of each kind cost, means over the seeds."""
    rows = []
    for name, directories in runs.items():
        costs = [cost(directory) for directory in directories]
        mean = {key: float(np.mean([each[key] for each in costs])) for key in costs[0]}
        rows.append([name, f"{mean['steps']:.0f}", f"{mean['responses']:,.0f}",
                     f"{mean['tokens']:,.0f}", f"{mean['seconds']:.0f} s",
                     f"{mean['peak_bytes'] / 2**30:.2f} GiB"])
    print_table(["run", "updates", "responses", "tokens", "steps took", "peak memory"], rows)


def print_steps(runs: dict[str, Path]) -> None:
    """Prints the speed of the steps of each run, medians, and its peak memory."""
    rows = []
    for name, directory in runs.items():
        steps = list(read_json_lines(directory / "metrics.jsonl"))[COMPILING:]
        speeds = [float(np.median([step[f"{part}/tokens_per_second"] for step in steps]))
                  for part in ("rollout", "update")]
        rows.append([name, *(f"{speed:,.0f}" for speed in speeds),
                     f"{np.median([step['time/step'] for step in steps]):.2f} s",
                     f"{cost(directory)['peak_bytes'] / 2**30:.2f} GiB"])
    print_table(["run", "rollout tokens/s", "update tokens/s", "a step", "peak memory"], rows)


def cost(directory: Path) -> dict[str, float]:
    """Returns what the training steps of a run cost."""
    config = configuration.load(directory / "config.yaml")
    steps = [row for row in read_json_lines(directory / "metrics.jsonl") if "time/step" in row]
    responses_per_step = config.rollout.prompts_per_step * config.rollout.group_size
    return {"steps": len(steps), "responses": len(steps) * responses_per_step,
            "tokens": responses_per_step * sum(row["rollout/tokens"] for row in steps),
            "seconds": sum(row["time/step"] for row in steps),
            **json.loads((directory / COST).read_text())}


def picture(of_dial: dict[float, dict[str, Point]],
            alone: dict[float, dict[str, Point]]) -> Any:
    """Draws tokens and accuracy against alpha: the dial as a curve, the separate runs as points."""
    figure = figures.new_figure((9.0, 3.4))
    for index, (name, label) in enumerate((("tokens", "Tokens of a response"),
                                           ("accuracy", "Accuracy, %"))):
        axes = figure.add_axes((0.05 + 0.5 * index, 0.15, 0.44, 0.74))
        untrained = {alpha: points for alpha, points in of_dial.items() if alpha not in alone}
        draw(axes, name, of_dial, color=figures.AFTER, marker="o", label="the dial, one run")
        axes.plot(list(untrained), [points[name].value for points in untrained.values()], "o",
                  color=figures.AFTER, markerfacecolor="white", zorder=3,
                  label="the dial, never trained on")
        draw(axes, name, alone, color=figures.INK, marker="x", linestyle="none",
             label="one run for each α")
        figures.clean(axes, label)
        # Small alphas differ most: a square root gives them room.
        axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axes.set_xticks(list(alone), [f"{alpha:g}" for alpha in alone])
        axes.set_xlabel("α", color=figures.QUIET)
        if name == "tokens":
            axes.legend(frameon=False, fontsize=9)
    return figure


def draw(axes: Axes, name: str, points: dict[float, dict[str, Point]], **style: Any) -> None:
    """Draws accuracy or tokens at each alpha, with intervals."""
    values = np.array([each[name].value for each in points.values()])
    intervals = np.array([each[name].interval for each in points.values()])
    axes.errorbar(list(points), values, np.abs(intervals.T - values), elinewidth=0.8, linewidth=1.6,
                  clip_on=False, **style)


if __name__ == "__main__":
    main()
