"""The charts of a report that compare models: operating points, budgets, difficulty, lengths.

Each is drawn once, as wide as a phone shows it, and saved as often as wanted; names stand beside the marks.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from effreason.runs.report.figures import (
    AFTER,
    BEFORE,
    CURVE,
    INK,
    NARROW,
    QUIET,
    clean,
    grouped,
    new_figure,
)
from effreason.runs.report.label_placement import NUMBER, SMALL, Named, name_ends, name_points
from effreason.runs.report.published import Figure as Published
from effreason.runs.report.results import BASE, BASELINE, BLEND, MEMBER, Measured, Point

# Inches, where the axes are in them, and the columns of the legend.
SHAPES = {"narrow": ((NARROW[0], 4.6), (0.15, 0.115, 0.835, 0.685), 2),
          "wide": ((8.6, 5.3), (0.085, 0.1, 0.905, 0.825), 8),
          "small": ((NARROW[0], 3.3), (0.15, 0.16, 0.835, 0.82), 0)}
COLORS = {BASE: "#6E6E6E", MEMBER: AFTER, BASELINE: "#D55E00", BLEND: "#A9558A"}
MARKERS = {BASE: "D", MEMBER: "o", BASELINE: "s", BLEND: "^"}
KINDS = {BASE: "base model", MEMBER: "trained", BASELINE: "baselines", BLEND: "blends"}
# From light to dark, so that they are told apart in grey.
RAMP = LinearSegmentedColormap.from_list("members", ["#4AA5E0", "#0072B2", "#00294A"])

Results = Sequence[tuple[Point, Measured]]


def shades(count: int) -> list[str]:
    """Colours of so many members, light to dark."""
    return [AFTER] if count == 1 else [to_hex(RAMP(place / (count - 1))) for place in range(count)]


def colors(results: Results) -> list[str]:
    """A colour for each model: grey for the base, light to dark for the members by alpha, their own for others."""
    members = sorted((point.alpha or 0.0, point.name) for point, _ in results if point.kind == MEMBER)
    ramp = dict(zip((name for _, name in members), shades(len(members)), strict=True))
    return [ramp.get(point.name, COLORS[point.kind]) for point, _ in results]


def pareto(results: Results, published: Sequence[Published] = (), *, shape: str = "narrow") -> Figure:
    """Accuracy against mean tokens with 95 % intervals both ways; the base cut off at its budgets as a curve.

    Args: shape, narrow; wide; or small, without a legend, to stand beside one that has it."""
    size, place, columns = SHAPES[shape]
    figure = new_figure(size)
    axes = figure.add_axes(place)
    clean(axes, "")
    axes.grid(axis="x", color="#EEEEEE", linewidth=0.8)
    bars = [_cross(axes, point, measured, 8.0 if shape == "wide" else 6.5) for point, measured in results]
    stars = [Named(name="published base" if each.alpha is None else f"published α {each.alpha:g}", x=each.tokens,
                   y=each.accuracy, color=INK) for each in published]
    for star in stars:
        axes.plot(star.x, star.y, linestyle="", marker="*", markersize=11, color="white", markeredgecolor=INK, zorder=3)
    _frame(axes)
    front = np.array([(measured.summary.tokens, measured.summary.accuracy) for point, measured in
                      sorted(results, key=lambda each: each[0].alpha or 0.0) if point.kind == MEMBER]).reshape(-1, 2)
    cut = np.array([(each.tokens, each.accuracy) for each in results[0][1].summary.budgets]).reshape(-1, 2)
    axes.plot(*front.T, color=CURVE, linewidth=1.6, zorder=2)
    axes.plot(*cut.T, color=COLORS[BASE], linewidth=1.3, linestyle=(0, (4, 2)), zorder=1,
              label="base, cut off at a budget" if len(cut) else None)
    if columns:
        _legend(axes, columns)
    axes.set_xlabel("mean tokens of a response", color=QUIET, fontsize=SMALL)
    axes.set_ylabel("accuracy", color=QUIET, fontsize=SMALL)
    marks = [Named(name=point.label, x=measured.summary.tokens, y=measured.summary.accuracy, color=COLORS[point.kind])
             for point, measured in results]
    name_points(axes, [*marks, *stars], [*(bar for pair in bars for bar in pair), front, cut])
    return figure


def _cross(axes: Axes, point: Point, measured: Measured, size: float) -> tuple[np.ndarray, np.ndarray]:
    """One model with its error bars. Returns: both bars, [2, 2] each."""
    summary, color = measured.summary, COLORS[point.kind]
    axes.errorbar(summary.tokens, summary.accuracy, xerr=_around(summary.tokens, summary.tokens_interval),
                  yerr=_around(summary.accuracy, summary.accuracy_interval), fmt=MARKERS[point.kind], color=color,
                  markersize=size, elinewidth=1.1, markeredgecolor="white", markeredgewidth=0.8, zorder=4,
                  label=KINDS[point.kind])
    return (np.array([(tokens, summary.accuracy) for tokens in summary.tokens_interval]),
            np.array([(summary.tokens, accuracy) for accuracy in summary.accuracy_interval]))


def _around(value: float, interval: tuple[float, float]) -> np.ndarray:
    """Lengths of the two halves of an error bar; a bootstrap's interval may leave its point outside by a hair."""
    return np.maximum([[value - interval[0]], [interval[1] - value]], 0.0)


def _frame(axes: Axes) -> None:
    """Room around the points, more below for the cut-off; six points high at least: noise must not fill the picture."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    middle, half = (low + high) / 2, max((high - low) / 2, 0.03)
    axes.set_ylim(max(middle - 1.5 * half, -0.01), min(middle + 1.1 * half, 1.005))
    axes.set_xlim(max(left - 0.06 * (right - left), 0.0), right + 0.05 * (right - left))
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(grouped))
    axes.yaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if half > 0.02 else 1))
    axes.tick_params(labelsize=SMALL)


def _legend(axes: Axes, columns: int) -> None:
    """One entry for each kind of mark, above the chart."""
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(list(found.values()), list(found), loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns,
                frameon=False, fontsize=SMALL, labelcolor=INK, borderpad=0.3, handletextpad=0.5, columnspacing=1.4)


def budgets(results: Results) -> Figure:
    """Accuracy against a token budget: what is left of each model's accuracy where its responses are cut off there."""
    figure = new_figure((NARROW[0], 3.4))
    axes = figure.add_axes((0.155, 0.15, 0.635, 0.82))
    clean(axes, "")
    courses = [[(each.budget, each.accuracy) for each in measured.summary.budgets] for _, measured in results]
    longest = max(course[-1][0] for course in courses)
    for (point, _), color, course in zip(results, colors(results), courses, strict=True):
        # Level from where no response is longer.
        axes.plot(*zip(*course, (longest, course[-1][1]), strict=True), color=color, linewidth=1.8, zorder=3,
                  linestyle=(0, (4, 2)) if point.kind == BASE else "-")
    first = min((budget for course in courses for budget, accuracy in course if accuracy > 0.01), default=1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(first, longest) / 1.4, longest)
    top = min(1.02, 1.15 * max(accuracy for course in courses for _, accuracy in course) + 0.01)
    axes.set_ylim(-0.01 * top, top)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top > 0.05 else 1))
    axes.xaxis.set_major_formatter(FuncFormatter(grouped))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=SMALL)
    axes.set_xlabel("budget, tokens", color=QUIET, fontsize=SMALL)
    axes.set_ylabel("accuracy", color=QUIET, fontsize=SMALL)
    name_ends(axes, [(point.label, color, measured.summary.accuracy)
                     for (point, measured), color in zip(results, colors(results), strict=True)])
    return figure


def difficulty(results: Results) -> Figure:
    """Tokens by difficulty: bars before and after for one model, for several the share saved with its 95 % interval.

    Args: results, of models that are compared with the base."""
    return _bars(results[0][1]) if len(results) == 1 else _dots(results)


def _bars(measured: Measured) -> Figure:
    assert measured.comparison is not None
    found = measured.comparison.by_difficulty
    figure = new_figure((NARROW[0], 0.1 + 0.76 * len(found)))
    axes = figure.add_axes((0.03, 0.0, 0.94, 1.0))
    for place, (name, each) in enumerate(found.items()):
        axes.text(0, place - 0.34, _short(name), fontsize=SMALL + 0.5, fontweight="bold", color=INK,
                  va="center_baseline", parse_math=False)
        low, high = each.saving_interval                    # of the saving; what is shown is the change
        interval = f" [{_whole(-high, '+')}, {_whole(-low, '+')}]" if each.problems > 1 else ""
        note = f"{_whole(-each.saving, '+')}%{interval}"
        for bottom, tokens, color, text in ((-0.2, each.tokens_base, BEFORE, ""), (0.08, each.tokens, AFTER, note)):
            axes.barh(place + bottom, tokens, 0.26, align="edge", color=color)
            number = axes.annotate(grouped(tokens), (tokens, place + bottom + 0.13), (5, 0),
                                   textcoords="offset points", va="center_baseline", fontsize=SMALL, color=QUIET)
            axes.annotate(text, (1, 0.5), (7, 0.5), xycoords=number, textcoords="offset points",
                          va="center_baseline", fontsize=SMALL, fontweight="bold", color=AFTER)
    axes.set_ylim(len(found) - 0.55, -0.55)
    axes.set_xlim(0, 1.42 * max(max(each.tokens_base, each.tokens) for each in found.values()))
    axes.set_axis_off()
    return figure


def _dots(results: Results) -> Figure:
    compared = [(point, measured.comparison.by_difficulty, color) for (point, measured), color
                in zip(results, colors(results), strict=True) if measured.comparison is not None]
    names = list(compared[0][1])
    height = 0.75 + 0.18 * len(names) * (len(compared) + 1.6)
    figure = new_figure((NARROW[0], height))
    axes = figure.add_axes((0.03, 0.47 / height, 0.94, 1 - 0.52 / height))
    clean(axes, "")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    row = 0.0
    for name in names:
        axes.annotate(_short(name), (0, row), (2, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                      va="center", fontsize=SMALL + 0.5, fontweight="bold", color=INK, parse_math=False)
        for point, by_difficulty, color in compared:
            row += 1
            if (found := by_difficulty.get(name)) is not None:
                axes.errorbar(found.saving, row, xerr=_around(found.saving, found.saving_interval), fmt="o",
                              color=color, markersize=5.5, elinewidth=1.6, markeredgecolor="white", markeredgewidth=0.6)
                axes.annotate(f"{_whole(found.saving)}%  {point.label}", (found.saving_interval[1], row), (6, 0),
                              textcoords="offset points", va="center", fontsize=NUMBER, color=color, parse_math=False)
        row += 1.6
    axes.set_ylim(row - 0.9, -0.8)
    low, high = min(0.0, axes.get_xlim()[0]), axes.get_xlim()[1]
    axes.set_xlim(low, high + 0.34 * (high - low))
    axes.axvline(0, color="#BBBBBB", linewidth=0.8)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, place: f"{_whole(share)}%"))
    axes.tick_params(labelsize=SMALL)
    axes.set_xlabel("tokens saved against the base", color=QUIET, fontsize=SMALL)
    return figure


def _whole(share: float, sign: str = "") -> str:
    """A share as a whole number of per cent, with a real minus sign. Args: sign, "+" = with that one too."""
    value = round(100 * share)
    return f"{value:{sign if value else ''},}".replace("-", "−")


def _short(name: str) -> str:
    return name if len(name) <= 44 else name[:43] + "…"


def lengths(drawn: Sequence[tuple[str, str, np.ndarray]]) -> Figure:
    """How long responses are: a histogram for each model on one scale. Args: name, colour, int[n] tokens of each."""
    height = 0.55 + 0.68 * len(drawn)
    figure = new_figure((NARROW[0], height))
    every = np.concatenate([tokens for _, _, tokens in drawn])
    low, high = max(float(every.min()), 1.0), float(every.max())
    spread = high / max(float(np.median(every)), 1.0) > 12      # a long tail would leave the rest a single bar
    edges = np.geomspace(low, high + 1, 49) if spread else np.linspace(0.0, high + 1, 49)
    grid = figure.add_gridspec(len(drawn), 1, left=0.03, right=0.97, bottom=0.5 / height, top=1 - 0.05 / height,
                               hspace=0.12)
    shares = [np.histogram(tokens, edges)[0] / len(tokens) for _, _, tokens in drawn]
    for place, ((name, color, tokens), share) in enumerate(zip(drawn, shares, strict=True)):
        axes = figure.add_subplot(grid[place])
        axes.stairs(share, edges, fill=True, color=color, alpha=0.85)
        axes.axvline(float(np.median(tokens)), ymax=0.67, color=INK, linewidth=1.0, linestyle=(0, (2, 2)))
        axes.set_ylim(0, 1.5 * share.max())                 # the upper third is for the name
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xscale("log" if spread else "linear")
        axes.annotate(f"{name}, median {grouped(float(np.median(tokens)))}", (1, 1), (-2, -3), va="top", ha="right",
                      xycoords="axes fraction", textcoords="offset points", fontsize=SMALL, color=INK, parse_math=False)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#BBBBBB")
        last = place == len(drawn) - 1
        axes.tick_params(left=False, labelleft=False, bottom=last, labelbottom=last, colors=QUIET, labelsize=SMALL,
                         color="#BBBBBB", which="both")
        axes.xaxis.set_major_formatter(FuncFormatter(grouped))
        if spread:
            axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens of a response", color=QUIET, fontsize=SMALL)
    return figure
