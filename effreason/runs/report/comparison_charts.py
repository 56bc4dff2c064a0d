"""The charts that compare models: operating points, token budgets, difficulty, lengths.

Each is drawn for the width of a phone; names are written next to the marks.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from effreason.runs.report import figures
from effreason.runs.report.figures import AFTER, CURVE, INK, NARROW, QUIET, clean, grouped
from effreason.runs.report.label_placement import NUMBER, SMALL, NamedMark, name_ends, name_points
from effreason.runs.report.published import Published
from effreason.runs.report.reading import label
from effreason.runs.results import Measurement, Point, PointKind

BASE, MEMBER, BETWEEN, BASELINE, BLEND = PointKind
# Inches of the figure, place of the axes in it, and columns of the legend.
SHAPES = {"narrow": ((NARROW[0], 4.6), (0.15, 0.115, 0.835, 0.685), 2),
          "wide": ((8.6, 5.3), (0.085, 0.1, 0.905, 0.825), 8),
          "small": ((NARROW[0], 3.3), (0.15, 0.16, 0.835, 0.82), 0)}
COLORS = {BASE: "#6E6E6E", MEMBER: AFTER, BETWEEN: AFTER, BASELINE: "#D55E00", BLEND: "#A9558A"}
MARKERS = {BASE: "D", MEMBER: "o", BETWEEN: "o", BASELINE: "s", BLEND: "^"}
LEGEND = {BASE: "base model", MEMBER: "trained", BETWEEN: "never trained on",
          BASELINE: "baselines", BLEND: "blends"}
# From light to dark, so that members are told apart in grey.
RAMP = LinearSegmentedColormap.from_list("members", ["#4AA5E0", "#0072B2", "#00294A"])

Measured = Sequence[tuple[Point, Measurement]]


def shades(count: int) -> list[str]:
    """Returns the colours of `count` members, light to dark."""
    return [AFTER] if count == 1 else [to_hex(RAMP(i / (count - 1))) for i in range(count)]


def colors(measured: Measured) -> list[str]:
    """Returns a colour for each model: members light to dark by alpha, others by their kind."""
    members = sorted((point.alpha or 0.0, point.name) for point, _ in measured
                     if point.kind == MEMBER)
    ramp = dict(zip((name for _, name in members), shades(len(members)), strict=True))
    return [ramp.get(point.name, COLORS[point.kind]) for point, _ in measured]


def pareto(measured: Measured, published: Sequence[Published] = (), *,
           shape: str = "narrow") -> Figure:
    """Draws accuracy against mean tokens, with 95 % intervals both ways.

    A line joins the members, or the points of a dial, by alpha; what was never trained on is
    hollow. A dashed curve shows the base with its responses cut off at each budget.
    Args: shape, narrow, wide or small, which has no legend."""
    size, place, columns = SHAPES[shape]
    figure = figures.new_figure(size)
    axes = figure.add_axes(place)
    clean(axes, "")
    axes.grid(axis="x", color="#EEEEEE", linewidth=0.8)

    bars = [bar for point, measurement in measured
            for bar in _error_bars(axes, point, measurement, 8.0 if shape == "wide" else 6.5)]
    stars = [NamedMark(name="published " + ("base" if star.alpha is None else f"α {star.alpha:g}"),
                       x=star.tokens, y=star.accuracy, color=INK) for star in published]
    for star in stars:
        axes.plot(star.x, star.y, linestyle="", marker="*", markersize=11, color="white",
                  markeredgecolor=INK, zorder=3)
    _frame(axes)

    members = sorted((each for each in measured if each[0].kind in (MEMBER, BETWEEN)),
                     key=lambda each: each[0].alpha or 0.0)
    front = _line((member.summary.tokens, member.summary.accuracy) for _, member in members)
    cut_off = _line((row.tokens, row.accuracy) for row in measured[0][1].summary.budgets)
    axes.plot(*front.T, color=CURVE, linewidth=1.6, zorder=2)
    axes.plot(*cut_off.T, color=COLORS[BASE], linewidth=1.3, linestyle=(0, (4, 2)), zorder=1,
              label="base, cut off at a budget" if len(cut_off) else None)

    if columns:
        handles, names = axes.get_legend_handles_labels()
        entries = dict(zip(names, handles, strict=True))        # one for each kind of mark
        axes.legend(list(entries.values()), list(entries), loc="lower left", frameon=False,
                    bbox_to_anchor=(-0.01, 1.0), ncols=columns, fontsize=SMALL, labelcolor=INK,
                    borderpad=0.3, handletextpad=0.5, columnspacing=1.4)
    _label_axes(axes, "mean tokens of a response", "accuracy")
    marks = [NamedMark(name=label(point), x=measurement.summary.tokens, color=COLORS[point.kind],
                       y=measurement.summary.accuracy) for point, measurement in measured]
    name_points(axes, [*marks, *stars], [*bars, front, cut_off])
    return figure


def _line(points: Iterable[tuple[float, float]]) -> np.ndarray:
    """Returns float64[n, 2], also of no points."""
    return np.array(list(points), np.float64).reshape(-1, 2)


def _error_bars(axes: Axes, point: Point, measurement: Measurement,
                size: float) -> list[np.ndarray]:
    """Draws one model with its error bars. Returns: both bars, float64[2, 2] each."""
    summary, hollow = measurement.summary, point.kind == BETWEEN
    axes.errorbar(
        summary.tokens, summary.accuracy, xerr=_error(summary.tokens, summary.tokens_interval),
        yerr=_error(summary.accuracy, summary.accuracy_interval), fmt=MARKERS[point.kind],
        color=COLORS[point.kind], markersize=size, elinewidth=1.1,
        markerfacecolor="white" if hollow else COLORS[point.kind],
        markeredgecolor=COLORS[point.kind] if hollow else "white",
        markeredgewidth=1.5 if hollow else 0.8, zorder=4, label=LEGEND[point.kind])
    return [_line((tokens, summary.accuracy) for tokens in summary.tokens_interval),
            _line((summary.tokens, accuracy) for accuracy in summary.accuracy_interval)]


def _error(value: float, interval: tuple[float, float]) -> np.ndarray:
    """Returns the lengths of an error bar's halves; a bootstrap may just miss its own point."""
    return np.maximum([[value - interval[0]], [interval[1] - value]], 0.0)


def _frame(axes: Axes) -> None:
    """Leaves room around the points, more below for the base's curve.

    At least six points of accuracy are shown, so that noise does not fill the picture."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    middle, half = (low + high) / 2, max((high - low) / 2, 0.03)
    axes.set_ylim(max(middle - 1.5 * half, -0.01), min(middle + 1.1 * half, 1.005))
    axes.set_xlim(max(left - 0.06 * (right - left), 0.0), right + 0.05 * (right - left))

    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(grouped))
    axes.yaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if half > 0.02 else 1))


def _label_axes(axes: Axes, x: str, y: str = "") -> None:
    axes.tick_params(labelsize=SMALL)
    axes.set_xlabel(x, color=QUIET, fontsize=SMALL)
    axes.set_ylabel(y, color=QUIET, fontsize=SMALL)


def budgets(measured: Measured) -> Figure:
    """Draws each model's accuracy if its responses were cut off at a token budget."""
    figure = figures.new_figure((NARROW[0], 3.4))
    axes = figure.add_axes((0.155, 0.15, 0.635, 0.82))
    clean(axes, "")
    curves = [_line((row.budget, row.accuracy) for row in measurement.summary.budgets)
              for _, measurement in measured]
    every = np.concatenate(curves)
    longest = every[:, 0].max()

    ends = []
    for (point, measurement), color, curve in zip(measured, colors(measured), curves, strict=True):
        ends.append((label(point), color, measurement.summary.accuracy))
        # Level beyond the budget that no response exceeds.
        axes.plot(*np.vstack([curve, (longest, curve[-1, 1])]).T, color=color, linewidth=1.8,
                  zorder=3, linestyle=(0, (4, 2)) if point.kind == BASE else "-")

    first = every[every[:, 1] > 0.01, 0].min(initial=longest)
    axes.set_xscale("log", base=2)
    axes.set_xlim(first / 1.4, longest)
    top = min(1.02, 1.15 * every[:, 1].max() + 0.01)
    axes.set_ylim(-0.01 * top, top)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top > 0.05 else 1))
    axes.xaxis.set_major_formatter(FuncFormatter(grouped))
    axes.xaxis.set_minor_locator(NullLocator())
    _label_axes(axes, "budget, tokens", "accuracy")
    name_ends(axes, ends)
    return figure


def difficulty(measured: Measured) -> Figure:
    """Draws tokens by difficulty: bars before and after for one model, else the share saved.

    Args: measured, models that are compared with the base."""
    return _bars(measured[0][1]) if len(measured) == 1 else _dots(measured)


def _bars(measurement: Measurement) -> Figure:
    assert measurement.comparison is not None
    rows = []
    for name, row in measurement.comparison.by_difficulty.items():
        low, high = row.saving_interval         # of the saving; the change is what is shown
        interval = f" [{_percent(-high, '+')}, {_percent(-low, '+')}]" if row.problems > 1 else ""
        rows.append((name, row.tokens_base, row.tokens, f"{_percent(-row.saving, '+')}%{interval}"))

    figure = figures.new_figure((NARROW[0], 0.1 + 0.76 * len(rows)))
    figures.paired_bars(figure.add_axes((0.03, 0.0, 0.94, 1.0)), rows, size=SMALL, room=1.42)
    return figure


def _dots(measured: Measured) -> Figure:
    compared = [(label(point), measurement.comparison.by_difficulty, color)
                for (point, measurement), color in zip(measured, colors(measured), strict=True)
                if measurement.comparison is not None]
    names = list(compared[0][1])
    height = 0.75 + 0.18 * len(names) * (len(compared) + 1.6)
    figure = figures.new_figure((NARROW[0], height))
    axes = figure.add_axes((0.03, 0.47 / height, 0.94, 1 - 0.52 / height))
    clean(axes, "")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)

    y = 0.0
    for name in names:
        axes.annotate(name if len(name) <= 44 else name[:43] + "…", (0, y), (2, 0), va="center",
                      xycoords=axes.get_yaxis_transform(), textcoords="offset points", color=INK,
                      fontsize=SMALL + 0.5, fontweight="bold", parse_math=False)
        for model, by_difficulty, color in compared:
            y += 1
            row = by_difficulty.get(name)
            if row is None:
                continue

            axes.errorbar(row.saving, y, xerr=_error(row.saving, row.saving_interval), fmt="o",
                          color=color, markersize=5.5, elinewidth=1.6, markeredgecolor="white",
                          markeredgewidth=0.6)
            axes.annotate(f"{_percent(row.saving)}%  {model}", (row.saving_interval[1], y), (6, 0),
                          textcoords="offset points", va="center", fontsize=NUMBER, color=color,
                          parse_math=False)
        y += 1.6

    axes.set_ylim(y - 0.9, -0.8)
    low, high = min(0.0, axes.get_xlim()[0]), axes.get_xlim()[1]
    axes.set_xlim(low, high + 0.34 * (high - low))          # room for the names
    axes.axvline(0, color="#BBBBBB", linewidth=0.8)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, position: f"{_percent(share)}%"))
    _label_axes(axes, "tokens saved against the base")
    return figure


def _percent(share: float, sign: str = "") -> str:
    """Formats a share as whole per cent, with a true minus sign. Args: sign, "+" = of gains too."""
    value = round(100 * share)
    return f"{value:{sign if value else ''},}".replace("-", "−")


def lengths(histograms: Sequence[tuple[str, str, np.ndarray]]) -> Figure:
    """Draws a histogram of response lengths for each model, all on one scale.

    Args: histograms, name, colour and lengths float64[n] in tokens of each model."""
    height = 0.55 + 0.68 * len(histograms)
    figure = figures.new_figure((NARROW[0], height))
    grid = figure.add_gridspec(len(histograms), 1, left=0.03, right=0.97, bottom=0.5 / height,
                               top=1 - 0.05 / height, hspace=0.12)

    every = np.concatenate([tokens for _, _, tokens in histograms])
    low, high = max(float(every.min()), 1.0), float(every.max())
    log = high / max(float(np.median(every)), 1.0) > 12     # a long tail would flatten the rest
    edges = np.geomspace(low, high + 1, 49) if log else np.linspace(0.0, high + 1, 49)

    for index, (name, color, tokens) in enumerate(histograms):
        shares, median = np.histogram(tokens, edges)[0] / len(tokens), float(np.median(tokens))
        axes = figure.add_subplot(grid[index])
        axes.stairs(shares, edges, fill=True, color=color, alpha=0.85)
        axes.axvline(median, ymax=0.67, color=INK, linewidth=1.0, linestyle=(0, (2, 2)))
        axes.set_ylim(0, 1.5 * shares.max())                # the upper third is for the name
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xscale("log" if log else "linear")
        axes.annotate(f"{name}, median {grouped(median)}", (1, 1), (-2, -3), va="top", ha="right",
                      xycoords="axes fraction", textcoords="offset points", fontsize=SMALL,
                      color=INK, parse_math=False)

        last = index == len(histograms) - 1
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#BBBBBB")
        axes.tick_params(left=False, labelleft=False, bottom=last, labelbottom=last, colors=QUIET,
                         labelsize=SMALL, color="#BBBBBB", which="both")
        axes.xaxis.set_major_formatter(FuncFormatter(grouped))
        if log:
            axes.xaxis.set_minor_locator(NullLocator())

    axes.set_xlabel("tokens of a response", color=QUIET, fontsize=SMALL)
    return figure
