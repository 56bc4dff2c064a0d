"""Prints the results of a run or a family: tables for the terminal, within 80 columns."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from effreason.evaluation import wording
from effreason.evaluation.statistics import Summary
from effreason.runs.results import Measurement, Point, Results
from effreason.runtime.progress import duration, show
from effreason.types import LevelResult


def print_results(console: Console, results: Results) -> None:
    """Prints accuracy and tokens of every model on every set.

    If one model was trained, the first set is shown before and after training, by level."""
    names = results.sets
    if len(results.points) == 2:
        _print_levels(console, results)
        names = names[1:]

    for index, name in enumerate(names):
        models = [(point, point.sets[name]) for point in results.points if name in point.sets]
        base = models[0][1].summary
        samples = "" if base.samples == 1 else f", {base.samples} responses each"
        blank = "\n" if index or len(results.points) == 2 else ""
        console.print(f"{blank}{name}: {base.problems:,} held-out problems{samples}; in brackets "
                      "95 % intervals", style="bold", highlight=False, markup=False, no_wrap=True,
                      overflow="ellipsis")
        show(_models_table(models), console)


def _print_levels(console: Console, results: Results) -> None:
    """Prints a table before and after training, and the two changes with their intervals."""
    base, trained = (point.sets[results.sets[0]] for point in results.points)
    before, after = base.summary, trained.summary
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("level", max_width=16, overflow="ellipsis", no_wrap=True, vertical="bottom")
    for heading in ("accuracy\nbefore", "\nafter", "change\n(points)", "tokens\nbefore", "\nafter",
                    "tokens\nsaved"):
        table.add_column(heading, justify="right", no_wrap=True)

    if len(before.by_level) > 1:
        for level in before.by_level:
            table.add_row(level, *_level_cells(before.by_level[level], after.by_level[level]))
        table.add_section()
    table.add_row("all", *_level_cells(before, after), style="bold")

    point = results.points[1]
    facts = [f"seed {results.seed}"]
    if point.alpha is not None:
        facts.insert(0, alpha_words(point))
    if point.seconds is not None:
        facts.append(duration(point.seconds))
    heading, remark = "Held-out problems, before and after training", f"({', '.join(facts)})"
    gap = " " if len(heading) + len(remark) < 80 else "\n"
    console.print(f"{heading}{gap}{remark}", style="bold", highlight=False, markup=False)
    show(table, console)

    if trained.comparison is not None:
        console.print(f"{wording.findings(trained.comparison)}\n(95 % intervals over "
                      f"{after.problems:,} problems)", highlight=False, markup=False)


def _level_cells(before: Summary | LevelResult, after: Summary | LevelResult) -> tuple[str, ...]:
    return (f"{before.accuracy:.1%}", f"{after.accuracy:.1%}",
            f"{100 * (after.accuracy - before.accuracy):+.1f}", f"{before.tokens:,.1f}",
            f"{after.tokens:,.1f}", f"{1.0 - after.tokens / before.tokens:.1%}")


def _models_table(models: Sequence[tuple[Point, Measurement]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", max_width=28, overflow="fold")         # gives way to wide numbers
    for heading in ("accuracy", "change, points", "tokens", "saved", "AES"):
        table.add_column(heading, justify="right", no_wrap=True)

    for point, measurement in models:
        summary, comparison = measurement.summary, measurement.comparison
        change, saved, aes = ("", "", "") if comparison is None else (
            wording.change(comparison), wording.saved(comparison), wording.aes(comparison.aes))
        table.add_row(point.name, f"{summary.accuracy:.1%}", change, wording.tokens(summary.tokens),
                      saved, aes)
    return table


def alpha_words(point: Point) -> str:
    """Returns the alpha of a model in words: "alpha 0.2", "alpha moved from 0.1 to 0.2"."""
    if point.alpha_start is None or point.alpha_start == point.alpha:
        return f"alpha {point.alpha:g}"
    return f"alpha moved from {point.alpha_start:.3g} to {point.alpha:.3g}"
