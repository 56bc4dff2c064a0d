"""The sections of a report: headline, tables, and charts with their texts. page.py renders them.

A cell of a table is a pair: what is read first, and in small type its 95 % interval or a remark.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from effreason.evaluation import responses, wording
from effreason.evaluation.responses import EvaluatedResponse
from effreason.evaluation.statistics import Comparison, Summary
from effreason.evaluation.wording import interval, percent, share
from effreason.runs.report import comparison_charts, training_curves
from effreason.runs.report.comparison_charts import (
    BASE,
    BASELINE,
    BETWEEN,
    BLEND,
    MEMBER,
    Measured,
)
from effreason.runs.report.figures import AFTER, BEFORE, CURVE, held_out
from effreason.runs.report.published import SOURCE, published_points
from effreason.runs.report.reading import Contents, Run, label
from effreason.runs.report.summary import alpha_words
from effreason.runs.results import Measurement, Point
from effreason.runtime.progress import duration

Cell = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure and its texts."""

    name: str                       # of its files, and the beginning of its ids on the page
    title: str
    note: str                       # how to read it
    alt: str                        # what it shows, for readers who cannot see it
    figure: Figure
    wide: Figure | None = None      # the same, drawn for a desktop


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells, of which the first names the row."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A stop of the slider: the dial at one alpha."""

    label: str
    trained: bool
    words: str                      # tokens and accuracy there, and against the base
    first: bool                     # whether the page shows it when it is opened


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The result in a sentence and in a few numbers."""

    kicker: str
    words: str
    line: str
    numbers: tuple[tuple[str, str, str], ...]       # title, number, interval or remark


def members(contents: Contents, set_name: str) -> list[tuple[Point, Measurement, Comparison]]:
    """Returns the members that are compared with the base on a set."""
    return [(point, measurement, measurement.comparison)
            for point, measurement in contents.measured(set_name)
            if point.kind == MEMBER and measurement.comparison is not None]


def best_member(contents: Contents) -> tuple[Point, Measurement, Comparison] | None:
    """Returns the member of the headline.

    It saves most tokens among those that are not shown to be less accurate than the base; if all
    are, it is the most accurate one."""
    candidates = members(contents, contents.sets[0]) if contents.points else []
    accurate = [member for member in candidates if member[2].accuracy_change_interval[1] >= 0]
    if accurate:
        return min(accurate, key=lambda member: member[2].token_ratio)
    return max(candidates, key=lambda member: member[2].accuracy_change, default=None)


def headline(contents: Contents) -> Headline:
    """Puts the results into words and numbers."""
    best, model = best_member(contents), contents.model.rstrip("/").rsplit("/", 1)[-1] or "a model"
    seed = "" if contents.seed is None else f", seed {contents.seed}"
    steps = f", {contents.runs[0].steps:,} steps" if contents.runs else ""
    if best is None:
        return Headline(kicker="In training", words="Not evaluated on held-out problems yet",
                        line=f"{model}{seed}{steps}", numbers=())

    point, measurement, comparison = best
    base, after = contents.measured(contents.sets[0])[0][1].summary, measurement.summary
    alpha = "" if point.alpha is None else f", {alpha_words(point)}"
    words = (f"{wording.findings(comparison)} on {after.problems:,} held-out problems of "
             f"{contents.sets[0]}{alpha}")

    seconds = "" if point.seconds is None else f" in {duration(point.seconds)}"
    kicker, line = "Before and after training", f"{model}{seed}{steps}{seconds}"
    choice = "Most tokens saved by {} that is not measurably less accurate than the base"
    if contents.dial:
        line += f", a dial from α {contents.dial[0]:g} to {contents.dial[-1]:g}"
        kicker = choice.format("a trained α")
        if comparison.accuracy_change_interval[1] < 0:
            kicker = "The most accurate α: all are measurably less accurate than the base"
    if contents.family:
        kinds = [other.kind for other in contents.points]
        line = (f"A family of {model}{seed}: {kinds.count(MEMBER)} members, "
                f"{kinds.count(BASELINE)} baselines, {kinds.count(BLEND)} blends")
        kicker = choice.format("a member")
        if comparison.accuracy_change_interval[1] < 0:
            kicker = "The most accurate member: all are measurably less accurate than the base"
    return Headline(kicker=kicker, words=words, line=line,
                    numbers=_headline_numbers(base, after, comparison))


def _headline_numbers(base: Summary, after: Summary,
                      comparison: Comparison) -> tuple[tuple[str, str, str], ...]:
    solved = [wording.tokens(summary.tokens_per_solved or 0.0) for summary in (base, after)]
    return (
        ("Tokens of a response",
         f"{wording.tokens(base.tokens)} → {wording.tokens(after.tokens)}",
         f"after {interval(after.tokens_interval, wording.tokens)}"),
        ("Accuracy", f"{share(base.accuracy)} → {percent(after.accuracy)}",
         f"after {interval(after.accuracy_interval, share)} %"),
        ("Tokens per solved problem", " → ".join(solved), "all tokens / right responses"),
        ("p of the accuracy change", wording.p_value(comparison.p_value),
         f"{comparison.better:,} problems better, {comparison.worse:,} worse"),
        ("AES", wording.aes(comparison.aes), "accuracy-efficiency score, base 0"),
        ("Cut off", f"{share(base.truncated)} → {percent(after.truncated)}",
         "responses without an end"))


def models_table(contents: Contents, set_name: str) -> Table:
    """Returns the table of all models on one set; empty columns are left out."""
    measured = contents.measured(set_name)
    rows = [_model_cells(point, measurement) for point, measurement in measured]
    head = [column for column in rows[-1] if any(row[column][0] for row in rows)]

    base = measured[0][1].summary
    samples = "one response" if base.samples == 1 else f"{base.samples} responses"
    needed = max((measurement.comparison.problems_to_detect or 0 for _, measurement in measured
                  if measurement.comparison is not None), default=0)
    detect = (f"; to detect a change of 2 points takes about {wording.problems_needed(needed)} "
              "problems" if needed else "")
    return Table(
        caption=f"{set_name}: {base.problems:,} held-out problems, {samples} to each; 95 % "
                f"intervals in brackets{detect}",
        head=tuple(head), rows=tuple(tuple(row[column] for column in head) for row in rows))


def _model_cells(point: Point, measurement: Measurement) -> dict[str, Cell]:
    """Returns a row of `models_table` by column."""
    summary, comparison = measurement.summary, measurement.comparison
    cells = dict.fromkeys(("model", "tokens", "saved", "accuracy", "change, points", "p", "AES",
                           "tokens per solved", "training time"), ("", ""))
    remarks = {BASELINE: BASELINE.value, BETWEEN: "never trained on"}
    cells["model"] = (label(point) if point.kind in (MEMBER, BETWEEN) else point.name,
                      remarks.get(point.kind, ""))
    cells["tokens"] = (wording.tokens(summary.tokens),
                       interval(summary.tokens_interval, wording.tokens))
    cells["accuracy"] = percent(summary.accuracy), interval(summary.accuracy_interval, share)

    if comparison is not None:
        cells["saved"] = _saved_cell(comparison)
        cells["change, points"] = _change_cell(comparison)
        cells["p"] = wording.p_value(comparison.p_value), ""
        cells["AES"] = wording.aes(comparison.aes), ""
    solved = summary.tokens_per_solved
    cells["tokens per solved"] = "–" if solved is None else wording.tokens(solved), ""
    cells["training time"] = "" if point.seconds is None else duration(point.seconds), ""
    return cells


def _saved_cell(comparison: Comparison) -> Cell:
    return (percent(1 - comparison.token_ratio),
            interval(wording.saved_interval(comparison), share))


def _change_cell(comparison: Comparison) -> Cell:
    return (wording.points(comparison.accuracy_change),
            interval(comparison.accuracy_change_interval, wording.points))


def difficulty_table(contents: Contents, point: Point, comparison: Comparison) -> Table:
    """Returns the table of one model by difficulty."""
    rows = []
    for name, row in comparison.by_difficulty.items():
        saving = interval(row.saving_interval, share) if row.problems > 1 else ""
        rows.append(((name, ""), (f"{row.problems:,}", ""), (wording.tokens(row.tokens_base), ""),
                     (wording.tokens(row.tokens), ""), (percent(row.saving), saving),
                     (percent(row.accuracy_base), ""), (percent(row.accuracy), "")))
    return Table(
        caption=f"{contents.sets[0]} by difficulty: {label(point)} against the base",
        head=("difficulty", "problems", "tokens before", "tokens after", "saved", "accuracy before",
              "accuracy after"), rows=tuple(rows))


def generalisation(contents: Contents) -> Table | None:
    """Returns the table of the sets after the first, by which nothing was chosen; None if none."""
    rows = []
    for name in contents.sets[1:]:
        before = contents.measured(name)[0][1].summary
        for point, measurement, comparison in members(contents, name):
            after = measurement.summary
            rows.append((
                (name, f"{after.problems:,} problems"), (label(point), ""),
                (f"{wording.tokens(before.tokens)} → {wording.tokens(after.tokens)}", ""),
                _saved_cell(comparison),
                (f"{share(before.accuracy)} → {percent(after.accuracy)}", ""),
                _change_cell(comparison)))
    return Table(
        caption="Further held-out sets, against the base; 95 % intervals in brackets",
        head=("set", "model", "tokens", "saved", "accuracy", "change, points"),
        rows=tuple(rows)) if rows else None


def tradeoffs(contents: Contents) -> list[Chart]:
    """Returns charts of accuracy against tokens: of each set of a family, of a run's first."""
    charts: list[Chart] = []
    for index, name in enumerate(contents.sets if contents.family else contents.sets[:1]):
        measured, published = contents.measured(name), published_points(contents.model, name)
        if len(measured) < 2:
            continue

        models = "; ".join(f"{label(point)}: {wording.tokens(measurement.summary.tokens)} tokens, "
                           f"{percent(measurement.summary.accuracy)}"
                           for point, measurement in measured)
        alt = f"Accuracy against mean tokens on {name}. {models}"
        title = f"Accuracy against tokens, {name}"

        if index:
            # In a small chart the blends would cover what they are between.
            few = [(point, measurement) for point, measurement in measured if point.kind != BLEND]
            charts.append(Chart(
                name=f"pareto{index + 1}", title=title, alt=alt, note="Marks as on the first set.",
                figure=comparison_charts.pareto(few, published, shape="small")))
        else:
            note = ("Up and to the left is better. Bars: 95 % intervals over problems. Dashed: the "
                    "base's accuracy if its responses were cut off.")
            if any(point.kind == BETWEEN for point, _ in measured):
                note += " Hollow: an α that was never trained on."
            charts.append(Chart(
                name="pareto", title=title, alt=alt,
                note=note + (f" Stars: published, {SOURCE}." if published else ""),
                figure=comparison_charts.pareto(measured, published, shape="narrow"),
                wide=comparison_charts.pareto(measured, published, shape="wide")))
    return charts


def comparisons(contents: Contents) -> list[Chart]:
    """Returns charts by budget, by difficulty and of the lengths of responses, on the first set."""
    if not contents.points:
        return []

    measured = [(point, measurement) for point, measurement in contents.measured(contents.sets[0])
                if point.kind in (BASE, MEMBER)]
    compared = [(point, measurement) for point, measurement in measured
                if measurement.comparison is not None]
    charts = [Chart(
        name="budget", title="Accuracy within a token budget",
        note="Each model's responses cut off at the budget: what is not finished by then counts as "
             "wrong.",
        alt=_each(measured, _sufficient_budget), figure=comparison_charts.budgets(measured))]

    if compared:
        charts.append(Chart(
            name="difficulty", title="Tokens by difficulty", alt=_each(compared, _savings),
            note="Tokens before (grey) and after, with the change and its 95 % interval."
            if len(compared) == 1 else
            "Share of the base's tokens that each model saves, with 95 % intervals.",
            figure=comparison_charts.difficulty(compared)))

    histograms = []
    for (point, _), color in zip(measured, comparison_charts.colors(measured), strict=True):
        graded = graded_responses(contents, contents.responses.get(point.name))
        if graded:
            tokens = np.array([row.tokens for row in graded], float)
            histograms.append((label(point), color, tokens))
    if len(histograms) > 1:
        charts.append(Chart(
            name="lengths", title="How long responses are",
            note="Share of the responses by their length; the dashed line is the median.",
            alt="; ".join(f"{name}: median {np.median(tokens):,.0f} tokens"
                          for name, _, tokens in histograms),
            figure=comparison_charts.lengths(histograms)))
    return charts


def _each(measured: Measured, words: Callable[[Measurement], str]) -> str:
    return "; ".join(f"{label(point)}: {words(measurement)}" for point, measurement in measured)


def _sufficient_budget(measurement: Measurement) -> str:
    """Puts into words the budget that keeps nine tenths of the accuracy."""
    summary = measurement.summary
    enough = [row.budget for row in summary.budgets if row.accuracy >= 0.9 * summary.accuracy]
    return f"nine tenths of its accuracy within {enough[0]:,} tokens" if enough else ""


def _savings(measurement: Measurement) -> str:
    rows = measurement.comparison.by_difficulty if measurement.comparison else {}
    return ", ".join(f"{name} {percent(row.saving)} saved" for name, row in rows.items())


def graded_responses(contents: Contents, directory: Path | None) -> list[EvaluatedResponse]:
    """Reads the graded responses of a directory on the first set; [] if there are none."""
    if directory is None or not contents.sets:
        return []
    name = responses.file_names(contents.sets)[contents.sets[0]]
    path = directory / f"{name}{responses.SUFFIX}"
    return responses.read(path)[1] if path.exists() else []


# What is drawn against steps: name, stage, title, note, is it a share, does the axis start at 0?
MEASURES = (
    ("tokens", "rollout", "Tokens of a response",
     "Of training rollouts; diamonds: held-out problems.", False, True),
    ("accuracy", "rollout", "Accuracy", "Of training rollouts; diamonds: held-out problems.", True,
     False),
    ("alpha", "reward", "Alpha", "Moved towards the target.", False, True),
    ("truncated", "rollout", "Responses cut off",
     "At the token limit or because they repeat themselves.", True, True),
    ("entropy", "update", "Entropy", "Nats a token.", False, True),
    ("kl", "reward", "KL to the starting model", "Nats a token.", False, False),
)


def dial_points(contents: Contents) -> list[tuple[Point, Measurement]]:
    """Returns the points of a dial by alpha; [] without a dial."""
    return [(point, measurement) for point, measurement in contents.measured(contents.sets[0])
            if point.kind != BASE] if contents.dial else []


def stops(contents: Contents) -> list[Stop]:
    """Returns the stops of the slider; the first one shown is that of the exported model."""
    found = []
    for point, measurement in dial_points(contents):
        summary, comparison = measurement.summary, measurement.comparison
        assert comparison is not None
        found.append(Stop(
            label=f"{point.alpha:.4g}", trained=point.kind == MEMBER,
            first=point.directory == ".", words=(
                f"{wording.tokens(summary.tokens)} tokens "
                f"{interval(summary.tokens_interval, wording.tokens)}, accuracy "
                f"{percent(summary.accuracy)} {interval(summary.accuracy_interval, share)}; "
                f"against the base {wording.findings(comparison)}")))
    return found


def trainings(contents: Contents) -> list[Chart]:
    """Returns charts of what moved in training, with a line for each run."""
    runs = sorted((run for run in contents.runs if run.metrics and run.kind == MEMBER),
                  key=lambda run: run.alpha or 0.0)
    charts = []
    for name, stage, title, note, is_share, floor in MEASURES:
        keys = [(run, f"{stage}/{name}", run.name) for run in runs]
        if contents.dial and name in ("tokens", "accuracy"):
            keys = [(run, f"dial/{name}_at_{alpha:g}", f"α {alpha:.4g}") for run in runs
                    for alpha in contents.dial]
        shades = comparison_charts.shades(len(keys))
        lines = [line for (run, key, words), color in zip(keys, shades, strict=True)
                 for line in _lines(run, key, words, color)]
        if not lines or (name == "alpha" and all(np.ptp(line.values) == 0 for line in lines)):
            continue
        if name in ("truncated", "kl") and all(not line.values.any() for line in lines):
            continue                # nothing was ever cut off, or there is no reference model

        evaluated = len(runs) == len(lines) == 1 and name in ("tokens", "accuracy")
        marks = _marks(contents, runs[0], name) if evaluated else []
        ends = "; ".join(
            f"{line.label or 'trained'}: {line.values[0]:.4g} at step {line.steps[0]:.0f}, "
            f"{line.values[-1]:.4g} at step {line.steps[-1]:.0f}" for line in lines)
        charts.append(Chart(
            name=f"training-{name}", title=title, alt=f"{title} against steps. {ends}",
            note=note if marks or ";" not in note else f"{note.split(';')[0]}.",
            figure=training_curves.training_curve(lines, marks, percent=is_share, floor=floor)))
    return charts


def _lines(run: Run, key: str, words: str, color: str) -> Iterable[training_curves.Line]:
    """Yields the curve of a metric, if the run has it. Args: words, its name."""
    pairs = [(row["step"], row[key]) for row in run.metrics if row.get(key) is not None]
    if pairs:
        steps, values = np.array(pairs, np.float64).T
        yield training_curves.Line(label=words, color=color, steps=steps, values=values)


def _marks(contents: Contents, run: Run, measure: str) -> list[training_curves.Line]:
    """Returns the held-out evaluations: before in grey, between in light blue, after in blue."""
    best = best_member(contents)
    base = contents.measured(contents.sets[0])[0][1].summary if best else None
    evaluations = held_out(run.metrics, measure, (base, best[1].summary) if best and base else None)
    colors = {"before": BEFORE, "after": AFTER, "between": CURVE}
    return [training_curves.Line(label=name, color=colors[name], steps=steps, values=values)
            for name, (steps, values) in evaluations.items()]


def meters(run: Run) -> list[Chart]:
    """Returns charts of what a run's updates are made of: the length-pressure meter, the pull."""
    parts = training_curves.PARTS
    charts = []
    for name, prefix, draw, title, note in (
            ("pressure", "update_share", training_curves.update_shares, "Length-pressure meter",
             "Shares of the advantages' size, by their source."),
            ("pull", "length_pull", training_curves.length_pulls, "Pull on length",
             "Advantage times distance from the group's mean length, in tokens: below 0 towards "
             "shorter responses.")):
        rows = [row for row in run.metrics
                if all(row.get(f"{prefix}/{part}") is not None for part in parts)]
        if rows:
            means = ", ".join(
                f"{part_name} {np.mean([row[f'{prefix}/{part}'] for row in rows]):.2f}"
                for part, (part_name, _) in parts.items())
            charts.append(Chart(name=name, title=title, note=note, figure=draw(rows),
                                alt=f"{title}, means over steps: {means}"))
    return charts
