"""The sections of a report: headline, tables, charts with their words. pages.py puts them into HTML.

A number in a table is a pair: what is read first, and its 95 % interval or a remark in small type.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from effreason.evaluation import responses
from effreason.evaluation.statistics import Difficulty, Interval
from effreason.runs.report import comparison_charts, published, training_curves
from effreason.runs.report import summary as report
from effreason.runs.report.figures import AFTER, BEFORE
from effreason.runs.report.results import (
    BASE,
    BASELINE,
    BLEND,
    MEMBER,
    Findings,
    Measured,
    Point,
    Run,
)
from effreason.runtime.progress import duration

Cell = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure with its words."""

    name: str                       # of its files, and of its ids on the page
    title: str
    note: str                       # how to read it
    alt: str                        # what it shows, for those who cannot see it
    figure: Figure
    wide: Figure | None = None      # drawn for a desktop's width too


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells; the first of each names the row."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Headline:
    """What was found, in a line and in a few numbers."""

    kicker: str
    words: str
    line: str
    numbers: tuple[tuple[str, str, str], ...]       # what it is, the number, its interval or a remark


def chosen(findings: Findings) -> tuple[Point, Measured] | None:
    """The member that a headline is about: the one that saves most of those not shown to be less accurate than the
    base; where all are, the most accurate one."""
    members = [(point, measured) for point, measured in findings.on(findings.sets[0]) if point.kind == MEMBER
               and measured.comparison is not None] if findings.points else []
    kept = [each for each in members if _comparison(each).accuracy_change_interval[1] >= 0]
    if kept:
        return min(kept, key=lambda each: _comparison(each).token_ratio)
    return max(members, key=lambda each: _comparison(each).accuracy_change, default=None)


def _comparison(result: tuple[Point, Measured]) -> Any:
    return result[1].comparison


def headline(findings: Findings) -> Headline:
    """The report in words and numbers."""
    found, model = chosen(findings), findings.model.rstrip("/").rsplit("/", 1)[-1] or "a model"
    seed = "" if findings.seed is None else f", seed {findings.seed}"
    if found is None or (comparison := found[1].comparison) is None:
        return _bare_headline(findings, model, seed)
    point, measured = found
    base, after = findings.on(findings.sets[0])[0][1].summary, measured.summary
    start = None if findings.family else findings.runs[0].alpha_start
    alpha = "" if point.alpha is None else f", {report.alpha_in_words(point.alpha, start)}"
    words = (f"{report.findings_in_words(comparison)} on {after.problems:,} held-out problems of {findings.sets[0]}"
             f"{alpha}")
    kinds = [each.kind for each in findings.points]
    line = _training(findings.runs[0], model, seed) if not findings.family else (
        f"A family of {model}{seed}: {kinds.count(MEMBER)} members, {kinds.count(BASELINE)} baselines, "
        f"{kinds.count(BLEND)} blends")
    lost = comparison.accuracy_change_interval[1] < 0
    kicker = ("The most accurate member: all are measurably less accurate than the base" if lost else
              "Most tokens saved by a member that is not measurably less accurate than the base")
    solved = [(each.tokens_per_solved or 0.0) for each in (base, after)]
    numbers = (
        ("Tokens of a response", f"{report.count(base.tokens)} → {report.count(after.tokens)}",
         f"after {_span(after.tokens_interval, report.count)}"),
        ("Accuracy", f"{_share(base.accuracy)} → {_percent(after.accuracy)}",
         f"after {_span(after.accuracy_interval, _share)} %"),
        ("Tokens per solved problem", " → ".join(map(report.count, solved)), "all tokens / right responses"),
        ("p of the accuracy change", _p_value(comparison.p_value),
         f"{comparison.better:,} problems better, {comparison.worse:,} worse"),
        ("AES", "–" if comparison.aes is None else f"{comparison.aes:.2f}", "accuracy-efficiency score, base 0"),
        ("Cut off", f"{_share(base.truncated)} → {_percent(after.truncated)}", "responses without an end"))
    return Headline(kicker=kicker if findings.family else "Before and after training", words=words, line=line,
                    numbers=numbers)


def _training(run: Run, model: str, seed: str) -> str:
    took = "" if run.summary is None else f" in {duration(run.summary['wall_s'])}"
    return f"{model}{seed}, {run.steps:,} steps{took}"


def _bare_headline(findings: Findings, model: str, seed: str) -> Headline:
    """Of a run without intervals: of an earlier version, not finished, or without held-out problems."""
    summary = findings.runs[0].summary if findings.runs else None
    words = "Not evaluated on held-out problems yet"
    if summary:
        ratio = summary["token_ratio"]
        words = (f"{abs(100 * (1 - ratio)):.1f} % {'fewer' if ratio <= 1 else 'more'} tokens, accuracy "
                 f"{report.signed(100 * summary['accuracy_change'])} points on held-out problems, "
                 f"{report.alpha_in_words(summary['alpha'], summary.get('alpha_start'))}")
    return Headline(kicker="Before and after training" if summary else "In training", words=words,
                    line=_training(findings.runs[0], model, seed) if findings.runs else f"{model}{seed}", numbers=())


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


def _percent(value: float) -> str:
    return f"{_share(value)} %"


def _points(value: float) -> str:
    return report.signed(100 * value)


def _span(interval: Interval, text: Callable[[float], str]) -> str:
    return f"[{text(interval[0])}, {text(interval[1])}]"


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def points(findings: Findings, name: str) -> Table:
    """All points on one set."""
    rows = []
    for point, measured in findings.on(name):
        summary, comparison = measured.summary, measured.comparison
        model = point.label if point.kind == MEMBER else point.name
        row: list[Cell] = [(model, point.kind if point.kind == BASELINE else ""),
                           (report.count(summary.tokens), _span(summary.tokens_interval, report.count))]
        row += [("", "")] if comparison is None else [
            (_percent(1 - comparison.token_ratio), _span(report.saved_interval(comparison), _share))]
        row.append((_percent(summary.accuracy), _span(summary.accuracy_interval, _share)))
        row += [("", "")] * 3 if comparison is None else [
            (_points(comparison.accuracy_change), _span(comparison.accuracy_change_interval, _points)),
            (_p_value(comparison.p_value), ""),
            ("–" if comparison.aes is None else f"{comparison.aes:.2f}", "")]
        solved = summary.tokens_per_solved
        rows.append((*row, ("–" if solved is None else report.count(solved), ""),
                     ("" if point.seconds is None else duration(point.seconds), "")))
    first = findings.on(name)[0][1].summary
    head = ("model", "tokens", "saved", "accuracy", "change, points", "p", "AES", "tokens per solved", "training time")
    keep = [place for place in range(len(head)) if any(row[place][0] for row in rows)]
    each = "one response" if first.samples == 1 else f"{first.samples} responses"
    needed = max((measured.comparison.problems_to_detect or 0 for _, measured in findings.on(name)
                  if measured.comparison is not None), default=0)
    detected = f"; a change of 2 points takes about {float(f'{needed:.2g}'):,.0f} problems to be seen" if needed else ""
    return Table(caption=f"{name}: {first.problems:,} held-out problems, {each} to each; 95 % intervals in brackets"
                         f"{detected}",
                 head=tuple(head[place] for place in keep),
                 rows=tuple(tuple(row[place] for place in keep) for row in rows))


def difficulties(findings: Findings, result: tuple[Point, Measured]) -> Table:
    """One model by difficulty."""
    by_difficulty: Mapping[str, Difficulty] = _comparison(result).by_difficulty
    return Table(
        caption=f"{findings.sets[0]} by difficulty: {result[0].label} against the base",
        head=("difficulty", "problems", "tokens before", "tokens after", "saved", "accuracy before", "accuracy after"),
        rows=tuple(((name, ""), (f"{each.problems:,}", ""), (report.count(each.tokens_base), ""),
                    (report.count(each.tokens), ""),
                    (_percent(each.saving), _span(each.saving_interval, _share) if each.problems > 1 else ""),
                    (_percent(each.accuracy_base), ""), (_percent(each.accuracy), ""))
                   for name, each in by_difficulty.items()))


def generalisation(findings: Findings) -> Table | None:
    """The sets beyond the first, which training and settings were not chosen by; None where there are none."""
    rows: list[tuple[Cell, ...]] = []
    for name in findings.sets[1:]:
        results = findings.on(name)
        for point, measured in results:
            comparison = measured.comparison
            if comparison is None or point.kind != MEMBER:
                continue
            before, after = results[0][1].summary, measured.summary
            rows.append((
                (name, f"{after.problems:,} problems"), (point.label, ""),
                (f"{report.count(before.tokens)} → {report.count(after.tokens)}", ""),
                (_percent(1 - comparison.token_ratio), _span(report.saved_interval(comparison), _share)),
                (f"{_share(before.accuracy)} → {_percent(after.accuracy)}", ""),
                (_points(comparison.accuracy_change), _span(comparison.accuracy_change_interval, _points))))
    return Table(caption="Further held-out sets, against the base; 95 % intervals in brackets", rows=tuple(rows),
                 head=("set", "model", "tokens", "saved", "accuracy", "change, points")) if rows else None


def tradeoffs(findings: Findings) -> list[Chart]:
    """Accuracy against tokens: for each set of a family, for a run's first."""
    found = []
    for place, name in enumerate(findings.sets if findings.family else findings.sets[:1]):
        results, figures = findings.on(name), published.figures(findings.model, name)
        if len(results) < 2:
            continue
        said = "; ".join(f"{point.label}: {report.count(each.summary.tokens)} tokens, {_percent(each.summary.accuracy)}"
                         for point, each in results)
        if place:                   # in a small chart the blends would cover what they lie between
            results = [each for each in results if each[0].kind != BLEND]
        source = f" Stars: published, {published.SOURCE}." if figures else ""
        found.append(Chart(
            name="pareto" if place == 0 else f"pareto{place + 1}", title=f"Accuracy against tokens, {name}",
            note="Marks as on the first set." if place else
                 "Up and to the left is better. Bars: 95 % intervals over problems. Dashed: what is left of the base's "
                 f"accuracy where its responses are cut off.{source}",
            alt=f"Accuracy against mean tokens on {name}. {said}",
            figure=comparison_charts.pareto(results, figures, shape="small" if place else "narrow"),
            wide=None if place else comparison_charts.pareto(results, figures, shape="wide")))
    return found


def comparisons(findings: Findings) -> list[Chart]:
    """By budget, by difficulty, and the lengths of responses, on the first set."""
    if not findings.points:
        return []
    results = [(point, each) for point, each in findings.on(findings.sets[0]) if point.kind in (BASE, MEMBER)]
    members = [(point, each) for point, each in results if each.comparison is not None]
    found = [Chart(name="budget", title="Accuracy within a token budget", figure=comparison_charts.budgets(results),
                   note="Each model's responses cut off at the budget: what is not finished by then counts as wrong.",
                   alt=_said(results, lambda each: _within(each)))]
    if members:
        found.append(Chart(
            name="difficulty", title="Tokens by difficulty", figure=comparison_charts.difficulty(members),
            note="Tokens before (grey) and after, with the change and its 95 % interval." if len(members) == 1 else
                 "Share of the base's tokens that each model saves, with 95 % intervals.",
            alt=_said(members, lambda each: ", ".join(
                f"{name} {_percent(level.saving)} saved" for name, level in each.comparison.by_difficulty.items()
                ) if each.comparison else "")))
    drawn = [(point.label, color, np.array([row["tokens"] for row in rows], float))
             for (point, _), color in zip(results, comparison_charts.colors(results), strict=True)
             if (rows := graded_rows(findings, point.responses))]
    if len(drawn) > 1:
        found.append(Chart(
            name="lengths", title="How long responses are", figure=comparison_charts.lengths(drawn),
            note="Share of the responses by their length; the dashed line is the median.",
            alt="; ".join(f"{name}: median {np.median(each):,.0f} tokens" for name, _, each in drawn)))
    return found


def _said(results: Sequence[tuple[Point, Measured]], words: Callable[[Measured], str]) -> str:
    return "; ".join(f"{point.label}: {words(each)}" for point, each in results)


def _within(measured: Measured) -> str:
    """The budget that keeps nine tenths of the accuracy."""
    kept = [each.budget for each in measured.summary.budgets if each.accuracy >= 0.9 * measured.summary.accuracy]
    return f"nine tenths of its accuracy within {kept[0]:,} tokens" if kept else ""


def graded_rows(findings: Findings, directory: Path | None) -> list[dict[str, Any]]:
    """Graded responses of a directory on the first set; [] where there are none. Raises: UserError."""
    if directory is None or not findings.sets:
        return []
    path = directory / f"{responses.file_names(findings.sets)[findings.sets[0]]}{responses.SUFFIX}"
    return [dataclasses.asdict(row) for row in responses.read(path)[1]] if path.exists() else []


MEASURES = (                        # what is drawn against steps: key, title, note, percent, from zero
    ("tokens", "rollout/tokens", "Tokens of a response", "Of training rollouts; diamonds: held-out problems.", False,
     True),
    ("accuracy", "rollout/accuracy", "Accuracy", "Of training rollouts; diamonds: held-out problems.", True, False),
    ("alpha", "reward/alpha", "Alpha", "Moved towards the target.", False, True),
    ("truncated", "rollout/truncated", "Responses cut off", "At the token limit or as loops.", True, True),
    ("entropy", "update/entropy", "Entropy", "Nats a token.", False, True),
    ("kl", "reward/kl", "KL to the starting model", "Nats a token.", False, False),
)


def trainings(findings: Findings) -> list[Chart]:
    """What moved in training, a line for each run."""
    members = sorted((run for run in findings.runs if run.metrics and run.kind == MEMBER),
                     key=lambda run: run.alpha or 0.0)
    found = []
    for name, key, title, note, percent, floor in MEASURES:
        lines = [_line(run, key, color) for run, color in zip(members, comparison_charts.shades(len(members)), strict=True)]
        drawn = [line for line in lines if line is not None]
        if not drawn or (name == "alpha" and all(np.ptp(line.values) == 0 for line in drawn)):
            continue
        if name in ("truncated", "kl") and all(not line.values.any() for line in drawn):
            continue                # nothing was ever cut off, or there is no reference
        marks = _marks(members[0], f"evaluation/{name}") if len(members) == 1 else []
        ends = "; ".join(f"{line.label}: {line.values[0]:.4g} at step {line.steps[0]:.0f}, {line.values[-1]:.4g} at "
                         f"step {line.steps[-1]:.0f}" for line in drawn)
        found.append(Chart(name=f"training-{name}", title=title, alt=f"{title} against steps. {ends}",
                           note=note if marks or ";" not in note else f"{note.split(';')[0]}.",
                           figure=training_curves.course(drawn, marks, percent=percent, floor=floor)))
    return found


def _line(run: Run, key: str, color: str) -> training_curves.Line | None:
    pairs = [(row["step"], row[key]) for row in run.metrics if row.get(key) is not None]
    if not pairs:
        return None
    steps, values = np.array(pairs, np.float64).T
    return training_curves.Line(label=run.name, color=color, steps=steps, values=values)


def _marks(run: Run, key: str) -> list[training_curves.Line]:
    """Held-out evaluations: before in grey, between in white, after in blue."""
    measure = key.partition("/")[2]
    found = [(row["step"] + ("rollout/tokens" in row), row[key]) for row in run.metrics if row.get(key) is not None]
    if run.summary is not None and measure in run.summary["base"]:
        between = [(step, value) for step, value in found if 0 < step < run.steps]
        ends = [(0, "base", BEFORE), (run.steps, "trained", AFTER)]
        marks = [training_curves.Line(label=name, color=color, steps=np.array([float(step)]),
                              values=np.array([run.summary[name][measure]])) for step, name, color in ends]
    else:
        between, marks = found, []
    if between:
        steps, values = np.array(between, np.float64).T
        marks.append(training_curves.Line(label="between", color="#56B4E9", steps=steps, values=values))
    return marks


def meters(run: Run) -> list[Chart]:
    """Where a run's updates come from: the length-pressure meter, and the pull on length."""
    found = []
    for name, key, draw, title, note in (
            ("pressure", "update_share", training_curves.meter, "Length-pressure meter",
             "Shares of the advantages' size, by where they come from."),
            ("pull", "length_pull", training_curves.pull, "Pull on length",
             "Advantage times distance from the group's mean length, in tokens: below 0 towards shorter responses.")):
        rows = [row for row in run.metrics if all(row.get(f"{key}/{part}") is not None for part in training_curves.PARTS)]
        if rows:
            means = ", ".join(f"{training_curves.PART_NAMES[part]} {np.mean([row[f'{key}/{part}'] for row in rows]):.2f}"
                              for part in training_curves.PARTS)
            found.append(Chart(name=name, title=f"{title}", note=note, alt=f"{title}, means over steps: {means}",
                               figure=draw(rows)))
    return found
