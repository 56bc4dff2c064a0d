"""What a run or a family found: the numbers of summary.json, the headline in words, the tables of the terminal."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from effreason.evaluation.statistics import (
    Comparison,
    Interval,
    Summary,
    comparison_from_table,
    level_names,
)
from effreason.runtime.config import Config
from effreason.runtime.progress import duration

Results = Mapping[str, tuple[Summary, Summary, Comparison]]    # by set: before, after, and compared


def summary(config: Config, results: Results, wall_seconds: float, *, alpha: float | None = None) -> dict[str, Any]:
    """The content of summary.json.

    Args: results, of each set of problems, the headline's first; wall_seconds of the whole run; alpha, the last one,
        None = as configured.
    Returns: of the first set: accuracies in 0..1; accuracy_change = trained - base; token_ratio = trained / base;
        levels easy to hard. Under "sets" everything that was measured on each."""
    base, trained, comparison = next(iter(results.values()))
    return {
        "alpha": config.reward.alpha if alpha is None else alpha,
        "alpha_start": config.reward.alpha,
        "seed": config.run.seed,
        "base": _result(base),
        "trained": _result(trained),
        "token_ratio": comparison.token_ratio,
        "accuracy_change": comparison.accuracy_change,
        "wall_s": wall_seconds,
        "sets": {name: {"base": dataclasses.asdict(base), "trained": dataclasses.asdict(trained),
                        "comparison": dataclasses.asdict(comparison)}
                 for name, (base, trained, comparison) in results.items()},
    }


def _result(measured: Summary) -> dict[str, Any]:
    levels = {level: measured.by_level[level] for level in level_names(measured.by_level)}
    return {
        "accuracy": measured.accuracy,
        "tokens": measured.tokens,
        "by_level": {level: {"accuracy": result.accuracy, "tokens": result.tokens} for level, result in levels.items()},
    }


def signed(value: float) -> str:
    """A number with its sign and one decimal; what rounds to nothing has none."""
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text


def count(tokens: float) -> str:
    """A mean number of tokens: with a decimal where one could be seen."""
    return f"{tokens:,.1f}" if abs(tokens) < 999.95 else f"{tokens:,.0f}"


def change(comparison: Comparison) -> str:
    """The change of accuracy in points, with its interval: "+3.5 [+1.2, +5.9]"."""
    low, high = comparison.accuracy_change_interval
    return f"{signed(100 * comparison.accuracy_change)} [{signed(100 * low)}, {signed(100 * high)}]"


def saved_interval(comparison: Comparison) -> Interval:
    """The share of tokens saved, its interval."""
    low, high = comparison.token_ratio_interval
    return 1.0 - high, 1.0 - low


def saved(comparison: Comparison) -> str:
    """The tokens saved in per cent, with their interval: "57.9% [55.1, 60.4]"."""
    low, high = saved_interval(comparison)
    return f"{100 * (1 - comparison.token_ratio):.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def findings_in_words(comparison: Comparison) -> str:
    """The two numbers that matter: "57.9 % fewer tokens [55.1, 60.4], accuracy +3.5 points [+1.2, +5.9]"."""
    saving, (low, high) = 1.0 - comparison.token_ratio, saved_interval(comparison)
    if saving < 0:
        saving, low, high = -saving, -high, -low
    word = "fewer" if comparison.token_ratio <= 1 else "more"
    points, interval = change(comparison).split(" ", 1)
    return (f"{100 * saving:.1f} % {word} tokens [{100 * low:.1f}, {100 * high:.1f}], "
            f"accuracy {points} points {interval}")


def print_table(console: Console, summary: Mapping[str, Any]) -> None:
    """Prints accuracy and tokens before and after, for each level and over all problems, within 80 columns; below it
    the two changes with their intervals, and those on further sets, where there are any."""
    base, trained = summary["base"], summary["trained"]
    levels = list(base["by_level"])
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("level", max_width=16, overflow="ellipsis", no_wrap=True, vertical="bottom")
    for name in ("accuracy\nbefore", "\nafter", "change\n(points)", "tokens\nbefore", "\nafter", "tokens\nsaved"):
        table.add_column(name, justify="right", no_wrap=True)
    if len(levels) > 1:
        for level in levels:
            table.add_row(level, *_cells(base["by_level"][level], trained["by_level"][level]))
        table.add_section()
    table.add_row("all", *_cells(base, trained), style="bold")
    alpha = alpha_in_words(summary["alpha"], summary.get("alpha_start"))
    heading = "Held-out problems, before and after training"
    made = f"({alpha}, seed {summary['seed']}, {duration(summary['wall_s'])})"
    gap = " " if len(heading) + len(made) < 80 else "\n"
    console.print(f"{heading}{gap}{made}", style="bold", highlight=False, markup=False)
    console.print(table, highlight=False, markup=False)
    compared = {name: (results["trained"], comparison_from_table(results["comparison"]))
                for name, results in summary["sets"].items()}
    _, comparison = next(iter(compared.values()))
    console.print(f"{findings_in_words(comparison)}\n(95 % intervals over {_problems(summary)} problems)",
                  highlight=False, markup=False)
    if len(compared) > 1:
        console.print("\nOther sets of problems, against the base", style="bold", highlight=False, markup=False)
        further = list(compared.items())[1:]
        console.print(_comparisons("set", [(name, after, each) for name, (after, each) in further]),
                      highlight=False, markup=False)


def alpha_in_words(alpha: float, start: float | None) -> str:
    """The alpha of a run: "alpha 0.2". Args: alpha, the last one; start, the first one, None = the same."""
    if start is None or start == alpha:
        return f"alpha {alpha:g}"
    return f"alpha moved from {start:.3g} to {alpha:.3g}"


def _problems(summary: Mapping[str, Any]) -> str:
    return f"{next(iter(summary['sets'].values()))['trained']['problems']:,}"


def print_family(console: Console, family: Mapping[str, Any]) -> None:
    """Prints the points of family.json on each of its sets, within 80 columns."""
    for place, name in enumerate(family["sets"]):
        rows = [(point["name"], results["summary"], results["comparison"] and comparison_from_table(
            results["comparison"])) for point in family["points"] if (results := point["sets"].get(name))]
        if not rows:
            continue
        measured = rows[0][1]
        each = "" if measured["samples"] == 1 else f", {measured['samples']} responses each"
        console.print(f"{'' if place == 0 else chr(10)}{name}: {measured['problems']:,} held-out problems{each}; in "
                      "brackets 95 % intervals", style="bold", highlight=False, markup=False, no_wrap=True,
                      overflow="ellipsis")
        console.print(_comparisons("", rows), highlight=False, markup=False)


def _comparisons(title: str, rows: Sequence[tuple[str, Mapping[str, Any], Comparison | None]]) -> Table:
    """A table of models against their base, 80 columns at most. Args: rows of name, Summary as a table, comparison."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(title, max_width=28, overflow="fold")      # gives way where the numbers are wide
    for column in ("accuracy", "change, points", "tokens", "saved", "AES"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, measured, comparison in rows:
        cells = (("", "", "") if comparison is None else
                 (change(comparison), saved(comparison), "-" if comparison.aes is None else f"{comparison.aes:.2f}"))
        table.add_row(name, f"{measured['accuracy']:.1%}", cells[0], count(measured["tokens"]), *cells[1:])
    return table


def _cells(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[str, ...]:
    points = 100 * (after["accuracy"] - before["accuracy"])
    return (f"{before['accuracy']:.1%}", f"{after['accuracy']:.1%}", f"{points:+.1f}",
            f"{before['tokens']:,.1f}", f"{after['tokens']:,.1f}", f"{1.0 - after['tokens'] / before['tokens']:.1%}")
