"""Pictures: the look they have in common, and report.png, a run at a glance."""

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

from effreason.runtime.files import disk

# Okabe and Ito's colours: told apart with any colour vision, and in grey.
BEFORE, AFTER, CURVE, INK, QUIET = "#999999", "#0072B2", "#56B4E9", "#222222", "#666666"
NARROW = (4.7, 3.0)                 # inches of a chart; 338 points are the width of a phone's page
POINTS = 500                        # a curve is thinned to this many points: more are not seen at this size

STYLE: dict[Any, Any] = {"svg.fonttype": "none",            # text stays text: searched, selected, read aloud
         "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"], "path.simplify": True}


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty white figure that no pyplot knows of. Args: size, in inches."""
    figure = Figure(figsize=size, dpi=200, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as path.png and path.svg. Raises: UserError where it cannot be written."""
    with disk(path.with_suffix(".png")):
        figure.savefig(path.with_suffix(".png"), metadata={"Software": None})
    with disk(path.with_suffix(".svg")):
        path.with_suffix(".svg").write_text(_svg(figure, path.name), encoding="utf-8")


def inline(figure: Figure, name: str) -> str:
    """A figure as an <svg> element to stand in HTML, as wide as the page gives it.

    Args: name, letters and digits, of this figure alone on its page: ids in the element begin with it."""
    text = _svg(figure, name)
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "",
                  text[text.index("<svg"):], flags=re.DOTALL)
    size = re.search(r'viewBox="([^"]*)"', text)
    assert size is not None
    text = re.sub(r"<svg [^>]*>", f'<svg viewBox="{size[1]}" aria-hidden="true">', text, count=1)
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    return re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{name}-", text).strip()


def _svg(figure: Figure, salt: str) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def overview(metrics_rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None, path: Path, *,
             model: str = "") -> None:
    """Draws report.png: accuracy and tokens against steps, and tokens by difficulty.

    Args:
        metrics_rows: of metrics.jsonl; the rollouts of step s are by the policy after s updates.
        summary: of the run, None where nothing was evaluated: then only the curves are drawn.
        path: of the picture.
        model: a name or a path, for the title.
    Raises: UserError where the picture cannot be written.
    """
    figure = Figure(figsize=(11.0, 5.6) if summary else (7.6, 5.6), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = (0.065, 0.975) if summary else (0.095, 0.965)
    grid = figure.add_gridspec(2, 2 if summary else 1, width_ratios=(1.5, 1) if summary else (1,),
                               height_ratios=(1, 1.25), left=left, right=right, bottom=0.095, top=0.79,
                               wspace=0.1, hspace=0.3)
    accuracy = figure.add_subplot(grid[0, 0])
    tokens = figure.add_subplot(grid[1, 0], sharex=accuracy)
    _curve(accuracy, metrics_rows, "accuracy", summary)
    _curve(tokens, metrics_rows, "tokens", summary)
    _finish_accuracy(accuracy)
    _finish_tokens(tokens)
    if summary:
        _bars(figure.add_subplot(grid[:, 1]), summary)
    alpha = summary["alpha"] if summary else _last(metrics_rows, "reward/alpha")
    _title(figure, left, alpha, model, summary)
    handles, labels = tokens.get_legend_handles_labels()
    if handles:
        # Beside the title, where no data can come to lie under it.
        accuracy.legend(handles, labels, loc="lower right", bbox_to_anchor=(1.0, 1.055), ncols=len(handles),
                        frameon=False, fontsize=9, labelcolor=INK, handletextpad=0.4, columnspacing=1.2, borderpad=0,
                        borderaxespad=0)
    with disk(path):
        figure.savefig(path, metadata={"Software": None})


def _title(figure: Figure, left: float, alpha: float | None, model: str, summary: Mapping[str, Any] | None) -> None:
    start = alpha if summary is None else summary.get("alpha_start", alpha)
    moved = "" if start is None or start == alpha else f"{start:.3g} → "
    parts = ["effreason", "" if alpha is None else f"α = {moved}{alpha:.4g}", Path(model).name[:60]]
    figure.text(left, 0.958, "  ·  ".join(filter(None, parts)), fontsize=14, fontweight="bold", color=INK, va="center",
                parse_math=False)
    line = "Not evaluated on held-out problems"
    if summary:
        base, trained = summary["base"], summary["trained"]
        saving = _saving(base, trained)
        line = (f"{abs(saving):.0%} {'fewer' if saving >= 0 else 'more'} tokens on held-out problems, "
                f"accuracy {base['accuracy']:.1%} → {trained['accuracy']:.1%}")
    figure.text(left, 0.9, line, fontsize=10.5, color=QUIET, va="center")


def _saving(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    return 1.0 - after["tokens"] / before["tokens"]


def _curve(axes: Axes, rows: Sequence[Mapping[str, Any]], measure: str, summary: Mapping[str, Any] | None) -> None:
    """One measure against steps: each step faint, their smooth course strong, evaluations as diamonds."""
    pairs = [(row["step"], row[f"rollout/{measure}"]) for row in rows if row.get(f"rollout/{measure}") is not None]
    # A row with rollouts was followed by its update; one with an evaluation alone says how many updates went before.
    updates = [row["step"] + ("rollout/tokens" in row) for row in rows]
    last = max(updates, default=0)
    if pairs:
        steps, values = (thinned(np.asarray(column, np.float64)) for column in zip(*pairs, strict=True))
        strong = smooth(steps, values)
        if strong is not values:
            axes.plot(steps, values, color=CURVE, linewidth=0.9, alpha=0.6, zorder=2)
        axes.plot(steps, strong, color=AFTER, linewidth=2.0, marker="o" if len(steps) < 4 else "", markersize=4,
                  zorder=3, solid_capstyle="round", label="training rollouts")
    between = [(step, row[f"evaluation/{measure}"]) for step, row in zip(updates, rows, strict=True)
               if row.get(f"evaluation/{measure}") is not None]
    if summary:
        # Before and after come from the summary: the rows may hold the same evaluations again.
        between = [(step, value) for step, value in between if 0 < step < last]
        marks = ((0, "base", BEFORE, "held-out: before"), (last, "trained", AFTER, "after"))
        for step, key, color, label in marks:
            axes.plot([step], [summary[key][measure]], linestyle="", marker="D", markersize=7.5, color=color,
                      markeredgecolor="white", markeredgewidth=1.2, zorder=5, label=label)
    if between:
        axes.plot(*zip(*between, strict=True), linestyle="", marker="D", markersize=5, color="white",
                  markeredgecolor=INK, markeredgewidth=1.0, zorder=4, label="between")
    width = max(last, 1)
    axes.set_xlim(-0.025 * width, 1.025 * width)


def smooth(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The course of the values; the values themselves where they are few.

    Each point is read off a line through its neighbours, a tenth of the run: unlike a mean, a line does not bend the
    ends of a steep curve.
    """
    if len(values) < 16:
        return values
    half = max(len(values) // 20, 2)
    course = np.empty_like(values)
    for i in range(len(values)):
        near = slice(max(i - half, 0), i + half + 1)
        course[i] = np.polyfit(steps[near] - steps[i], values[near], 1)[1]
    clipped: np.ndarray = np.clip(course, values.min(), values.max())
    return clipped


def thinned(values: np.ndarray) -> np.ndarray:
    """Means of equal pieces, POINTS at most."""
    size = math.ceil(len(values) / POINTS)
    starts = np.arange(0, len(values), size)
    means: np.ndarray = np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))
    return means


def _finish_accuracy(axes: Axes) -> None:
    clean(axes, "Accuracy")
    low, high = axes.get_ylim()
    # At least ten points high, so that noise of one point does not fill the panel.
    middle, half = (low + high) / 2, max((high - low) / 2, 0.05)
    axes.set_ylim(max(middle - half, -0.01), min(middle + half, 1.01))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.tick_params(labelbottom=False)


def _finish_tokens(axes: Axes) -> None:
    clean(axes, "Tokens per response")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.03)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], min_n_ticks=4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(grouped))
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(grouped))
    axes.set_xlabel("training step", color=QUIET, fontsize=9.5)


def _bars(axes: Axes, summary: Mapping[str, Any]) -> None:
    """Tokens by difficulty: two lying bars for each level under its name, the saving behind the second.

    Names of any length fit above a lying bar, and a number behind it meets no other bar, so no axis is needed.
    """
    before, after = summary["base"]["by_level"], summary["trained"]["by_level"]
    size = 10.0 if len(before) <= 6 else 8.5 if len(before) <= 9 else 6.5
    for place, level in enumerate(before):
        saving = f"{-_saving(before[level], after[level]):+.0%}".replace("-", "−")
        name = level if len(level) <= 48 else level[:47] + "…"
        axes.text(0, place - 0.34, name, fontsize=size, color=INK, va="center_baseline", parse_math=False)
        for bottom, tokens, color, note in ((-0.18, before[level]["tokens"], BEFORE, ""),
                                            (0.10, after[level]["tokens"], AFTER, saving)):
            axes.barh(place + bottom, tokens, 0.26, align="edge", color=color)
            number = axes.annotate(grouped(tokens), (tokens, place + bottom + 0.13), (5, 0),
                                   textcoords="offset points", va="center_baseline", fontsize=size, color=QUIET)
            axes.annotate(note, (1, 0.5), (7, 1), xycoords=number, textcoords="offset points", va="center_baseline",
                          fontsize=size + 1, fontweight="bold", color=AFTER)
    title = "Tokens by difficulty, before and after" if len(before) > 1 else "Tokens, before and after"
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold", pad=8)
    room = max(3 - len(before), 0) / 2                      # one level alone would fill the panel
    axes.set_ylim(len(before) - 0.55 + room, -0.55 - room)
    axes.set_xlim(0, 1.28 * max(results[level]["tokens"] for results in (before, after) for level in results))
    axes.set_axis_off()


def grouped(value: float, position: int | None = None) -> str:
    """A count as an axis writes it. Args: position of the tick, which matplotlib passes and which does not matter."""
    return f"{value:,.0f}"


def clean(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold", pad=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#BBBBBB")
    axes.tick_params(colors=QUIET, labelsize=9, length=3, color="#BBBBBB")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)


def _last(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)
