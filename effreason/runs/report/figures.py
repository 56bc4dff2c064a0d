"""What all pictures share: their look, how they are written, and report.png, a run at a glance."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from effreason.evaluation.statistics import Summary
from effreason.runs.results import Results
from effreason.runtime.files import disk

# Colours of Okabe and Ito: distinct for every kind of colour vision, and in grey.
BEFORE, AFTER, CURVE, INK, QUIET = "#999999", "#0072B2", "#56B4E9", "#222222", "#666666"
NARROW = (4.7, 3.0)                 # inches of a chart; 338 points are the width of a phone's page
POINTS = 500                        # of a thinned curve: more are not visible at this size
STYLE: dict[Any, Any] = {           # text stays text in an SVG: searched, selected, read aloud
    "svg.fonttype": "none", "path.simplify": True,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"]}
Marks = dict[str, tuple[np.ndarray, np.ndarray]]


def new_figure(size: tuple[float, float], dpi: int = 200) -> Figure:
    """Returns an empty white figure that pyplot does not know. Args: size, in inches."""
    figure = Figure(figsize=size, dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as path.png and path.svg. Raises: UserError if it cannot be written."""
    with disk(path.with_suffix(".png")):
        figure.savefig(path.with_suffix(".png"), metadata={"Software": None})
    with disk(path.with_suffix(".svg")):
        path.with_suffix(".svg").write_text(_svg(figure, path.name), encoding="utf-8")


def inline(figure: Figure, name: str) -> str:
    """Returns a figure as an <svg> element for HTML that fills the width it is given.

    Args: name, letters and digits, unique on the page: the element's ids begin with it."""
    text = _svg(figure, name)
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "",
                  text[text.index("<svg"):], flags=re.DOTALL)
    size = re.search(r'viewBox="([^"]*)"', text)
    assert size is not None
    text = re.sub(r"<svg [^>]*>", f'<svg viewBox="{size[1]}" aria-hidden="true">', text, count=1)

    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"',
                  lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", text)
    return re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{name}-", text).strip()


def _svg(figure: Figure, salt: str) -> str:
    buffer = io.StringIO()
    unwritten = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata=unwritten)
    return buffer.getvalue()


def overview(metrics: Sequence[Mapping[str, Any]], results: Results | None, path: Path, *,
             model: str = "") -> None:
    """Draws report.png: accuracy and tokens against steps, and tokens by difficulty.

    Args: metrics, rows of metrics.jsonl; results, None if nothing was evaluated: then only the
        curves are drawn; model, a name or a path, for the title.
    Raises: UserError if the picture cannot be written."""
    figure = new_figure((11.0, 5.6) if results else (7.6, 5.6), dpi=160)
    left, right = (0.065, 0.975) if results else (0.095, 0.965)
    grid = figure.add_gridspec(
        2, 2 if results else 1, width_ratios=(1.5, 1) if results else (1,), height_ratios=(1, 1.25),
        left=left, right=right, bottom=0.095, top=0.79, wspace=0.1, hspace=0.3)
    accuracy = figure.add_subplot(grid[0, 0])
    tokens = figure.add_subplot(grid[1, 0], sharex=accuracy)

    before_after = None
    if results:
        base, trained = (point.sets[results.sets[0]].summary for point in results.points[:2])
        before_after = base, trained
        _difficulty(figure.add_subplot(grid[:, 1]), base, trained)

    _curve(accuracy, metrics, "accuracy", before_after)
    _curve(tokens, metrics, "tokens", before_after)
    _format_accuracy(accuracy)
    _format_tokens(tokens)

    moved = [row["reward/alpha"] for row in metrics if row.get("reward/alpha") is not None]
    start = alpha = moved[-1] if moved else None
    if results:
        start, alpha = results.points[1].alpha_start, results.points[1].alpha
    words = "" if start is None or start == alpha else f"{start:.3g} → "
    parts = ["" if alpha is None else f"α = {words}{alpha:.4g}", Path(model).name[:60]]
    _title(figure, left, "  ·  ".join(filter(None, ["effreason", *parts])), before_after)

    handles, labels = tokens.get_legend_handles_labels()
    if handles:
        # Next to the title, so that no data can be under it.
        accuracy.legend(
            handles, labels, loc="lower right", bbox_to_anchor=(1.0, 1.055), ncols=len(handles),
            frameon=False, fontsize=9, labelcolor=INK, handletextpad=0.4, columnspacing=1.2,
            borderpad=0, borderaxespad=0)
    with disk(path):
        figure.savefig(path, metadata={"Software": None})


def _title(figure: Figure, left: float, title: str,
           before_after: tuple[Summary, Summary] | None) -> None:
    line = "Not evaluated on held-out problems"
    if before_after:
        base, trained = before_after
        saving = 1.0 - trained.tokens / base.tokens
        line = (f"{abs(saving):.0%} {'fewer' if saving >= 0 else 'more'} tokens on held-out "
                f"problems, accuracy {base.accuracy:.1%} → {trained.accuracy:.1%}")

    figure.text(left, 0.958, title, fontsize=14, fontweight="bold", color=INK, va="center",
                parse_math=False)
    figure.text(left, 0.9, line, fontsize=10.5, color=QUIET, va="center")


def _curve(axes: Axes, metrics: Sequence[Mapping[str, Any]], measure: str,
           before_after: tuple[Summary, Summary] | None) -> None:
    """Draws a measure against steps: the steps faint, smoothed strong, evaluations as diamonds."""
    pairs = [(row["step"], row[f"rollout/{measure}"]) for row in metrics
             if row.get(f"rollout/{measure}") is not None]
    if pairs:
        steps, values = np.array(pairs, np.float64).T
        draw_smoothed(axes, steps, values, AFTER, width=2.0, label="training rollouts")

    looks = {"before": (7.5, BEFORE, "white", 1.2, "held-out: before"),
             "after": (7.5, AFTER, "white", 1.2, "after"),
             "between": (5, "white", INK, 1.0, "between")}
    for name, (steps, values) in held_out(metrics, measure, before_after).items():
        size, color, edge, width, label = looks[name]
        axes.plot(steps, values, linestyle="", marker="D", markersize=size, color=color, zorder=5,
                  markeredgecolor=edge, markeredgewidth=width, label=label)

    last = max(updates(metrics), default=1)
    axes.set_xlim(-0.025 * max(last, 1), 1.025 * max(last, 1))


def draw_smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, *, width: float,
                  faint: bool = True, label: str = "") -> None:
    """Draws values smoothed, over the faint values themselves. Args: width, in points."""
    steps, values = thinned(steps), thinned(values)
    curve = smooth(steps, values)
    if faint and curve is not values:
        axes.plot(steps, values, color=CURVE, linewidth=0.9, alpha=0.6, zorder=2)
    axes.plot(steps, curve, color=color, linewidth=width, marker="o" if len(steps) < 4 else "",
              markersize=4, zorder=3, solid_capstyle="round", label=label or None)


def updates(metrics: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns for each row of metrics.jsonl the number of updates made when it was written.

    A row with rollouts was followed by its update; one with an evaluation alone was not."""
    return [row["step"] + ("rollout/tokens" in row) for row in metrics]


def held_out(metrics: Sequence[Mapping[str, Any]], measure: str,
             before_after: tuple[Summary, Summary] | None) -> Marks:
    """Returns steps and values of the evaluations before, after and between, those that exist.

    Args: measure, a field of Summary; before_after, None if training is not finished."""
    steps, key = updates(metrics), f"evaluation/{measure}"
    last = max(steps, default=0)
    pairs = [(step, row[key]) for step, row in zip(steps, metrics, strict=True)
             if row.get(key) is not None]
    marks = {}
    if before_after:
        # The rows may hold the evaluations before and after training again.
        pairs = [(step, value) for step, value in pairs if 0 < step < last]
        marks = {name: (np.array([float(step)]), np.array([getattr(summary, measure)]))
                 for name, step, summary in zip(("before", "after"), (0, last), before_after,
                                                strict=True)}
    if pairs:
        between, values = np.array(pairs, np.float64).T
        marks["between"] = between, values
    return marks


def smooth(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns the values smoothed; the values themselves if they are few.

    Each value is read off a line through its neighbours, a tenth of the run: unlike a mean, a line
    does not bend the ends of a steep curve."""
    if len(values) < 16:
        return values
    half = max(len(values) // 20, 2)
    curve = np.empty_like(values)

    for i in range(len(values)):
        near = slice(max(i - half, 0), i + half + 1)
        curve[i] = np.polyfit(steps[near] - steps[i], values[near], 1)[1]
    clipped: np.ndarray = np.clip(curve, values.min(), values.max())
    return clipped


def thinned(values: np.ndarray) -> np.ndarray:
    """Returns the means of equal pieces, at most POINTS."""
    size = math.ceil(len(values) / POINTS)
    starts = np.arange(0, len(values), size)
    means: np.ndarray = np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))
    return means


def _format_accuracy(axes: Axes) -> None:
    clean(axes, "Accuracy")
    low, high = axes.get_ylim()
    # At least ten points high, so that noise of one point does not fill the panel.
    middle, half = (low + high) / 2, max((high - low) / 2, 0.05)
    axes.set_ylim(max(middle - half, -0.01), min(middle + half, 1.01))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.tick_params(labelbottom=False)


def _format_tokens(axes: Axes) -> None:
    clean(axes, "Tokens per response")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.03)
    axes.yaxis.set_major_locator(
        MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], min_n_ticks=4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(grouped))
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(grouped))
    axes.set_xlabel("training step", color=QUIET, fontsize=9.5)


def _difficulty(axes: Axes, base: Summary, trained: Summary) -> None:
    rows = [(level, before.tokens, after.tokens,
             f"{after.tokens / before.tokens - 1.0:+.0%}".replace("-", "−"))
            for level, before in base.by_level.items() for after in [trained.by_level[level]]]
    title = f"Tokens{' by difficulty' if len(rows) > 1 else ''}, before and after"
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold", pad=8)
    size = 10.0 if len(rows) <= 6 else 8.5 if len(rows) <= 9 else 6.5
    paired_bars(axes, rows, size=size, room=1.28)
    blank = max(3 - len(rows), 0) / 2                   # one level alone would fill the panel
    axes.set_ylim(len(rows) - 0.55 + blank, -0.55 - blank)


def paired_bars(axes: Axes, rows: Sequence[tuple[str, float, float, str]], *, size: float,
                room: float) -> None:
    """Draws two horizontal bars for each row, before and after, with a note after the second.

    Names of any length fit above a bar, and a number to its right meets no other bar, so no axis is
    needed. Args: rows of name, tokens before and after, and note; size of the text in points; room,
    width of the axes in lengths of the longest bar."""
    for index, (name, before, after, note) in enumerate(rows):
        axes.text(0, index - 0.34, name if len(name) <= 44 else name[:43] + "…", fontsize=size,
                  fontweight="bold", color=INK, va="center_baseline", parse_math=False)
        for offset, tokens, color, text in ((-0.2, before, BEFORE, ""), (0.08, after, AFTER, note)):
            axes.barh(index + offset, tokens, 0.26, align="edge", color=color)
            number = axes.annotate(
                grouped(tokens), (tokens, index + offset + 0.13), (5, 0), color=QUIET,
                textcoords="offset points", va="center_baseline", fontsize=size)
            axes.annotate(
                text, (1, 0.5), (7, 0.5), xycoords=number, textcoords="offset points", color=AFTER,
                va="center_baseline", fontsize=size, fontweight="bold")

    axes.set_ylim(len(rows) - 0.55, -0.55)
    axes.set_xlim(0, room * max(max(before, after) for _, before, after, _ in rows))
    axes.set_axis_off()


def grouped(value: float, position: int | None = None) -> str:
    """Formats a count for an axis. Args: position of the tick, passed by matplotlib, not used."""
    return f"{value:,.0f}"


def clean(axes: Axes, title: str) -> None:
    """Gives axes the common look: a bold title on the left, no frame, faint horizontal lines."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold", pad=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#BBBBBB")
    axes.tick_params(colors=QUIET, labelsize=9, length=3, color="#BBBBBB")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
