"""Trains the tiny reasoner for several alphas and seeds and prints the table of docs/tiny.md, as Markdown.

    python benchmarks/tiny_family.py --runs 0:0,1 0.2:0,1,2 --output runs/family

Each ALPHA:SEED,SEED is a set of runs of the default configuration; finished ones are not run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", metavar="ALPHA:SEEDS", required=True, help="such as 0.2:0,1,2")
    parser.add_argument("--output", type=Path, required=True, help="directory of the run directories")
    parser.add_argument("overrides", nargs="*", help="flags of train.py, behind --")
    arguments = parser.parse_args()
    wanted = [(float(alpha), int(seed)) for alpha, seeds in (entry.split(":") for entry in arguments.runs)
              for seed in seeds.split(",")]
    print_table([train(arguments.output, alpha, seed, arguments.overrides) for alpha, seed in wanted])


def train(output: Path, alpha: float, seed: int, overrides: list[str]) -> dict:
    """The summary of one run, which is made unless it is there already."""
    directory = output / f"alpha{alpha:g}-seed{seed}"
    if not (directory / "summary.json").exists():
        flags = ["--reward.alpha", str(alpha), "--run.seed", str(seed), "--run.directory", str(directory)]
        resume = ["--run.resume", "true"] if (directory / "config.yaml").exists() else []
        subprocess.run([sys.executable, ROOT / "train.py", *flags, *resume, *overrides], check=True, stdout=sys.stderr)
    return json.loads((directory / "summary.json").read_text())


def print_table(summaries: list[dict]) -> None:
    """A line a run, and a line for the mean of each alpha that has several."""
    levels = list(summaries[0]["base"]["by_level"])
    headings = ["α", "seed", "tokens", "saved", *(f"saved, {level}" for level in levels), "accuracy", "change, points",
                *(f"{level}, points" for level in levels), "seconds"]
    print("| " + " | ".join(headings) + " |\n|" + "---|" * len(headings))
    for alpha in dict.fromkeys(summary["alpha"] for summary in summaries):
        runs = [summary for summary in summaries if summary["alpha"] == alpha]
        rows = [cells(run, levels) for run in runs]
        for run, row in zip(runs, rows, strict=True):
            print_row(f"{alpha:g}", str(run["seed"]), row)
        if len(runs) > 1:
            print_row(f"**{alpha:g}**", "mean", np.mean(rows, axis=0))


def cells(summary: dict, levels: list[str]) -> list[float]:
    base, trained = summary["base"], summary["trained"]
    before, after = base["by_level"], trained["by_level"]
    saved = [100 * (1 - after[level]["tokens"] / before[level]["tokens"]) for level in levels]
    change = [100 * (after[level]["accuracy"] - before[level]["accuracy"]) for level in levels]
    return [base["tokens"], trained["tokens"], 100 * (1 - summary["token_ratio"]), *saved, 100 * base["accuracy"],
            100 * trained["accuracy"], 100 * summary["accuracy_change"], *change, summary["wall_s"]]


def print_row(alpha: str, seed: str, row) -> None:
    levels = (len(row) - 7) // 2
    base, trained, *saved = row[: 3 + levels]
    accuracy_before, accuracy_after, *change, seconds = row[3 + levels :]
    columns = [alpha, seed, f"{base:.1f} → {trained:.1f}", *(f"{value:.1f} %" for value in saved),
               f"{accuracy_before:.1f} → {accuracy_after:.1f} %", *(f"{value:+.1f}" for value in change),
               f"{seconds:.0f}"]
    print("| " + " | ".join(columns) + " |")


if __name__ == "__main__":
    main()
