"""The charts of a report that show a training: a measure against steps, and what its updates are made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from effreason.runs.report.figures import (
    AFTER,
    CURVE,
    NARROW,
    QUIET,
    clean,
    grouped,
    new_figure,
    smooth,
    thinned,
)
from effreason.runs.report.label_placement import SMALL, name_ends

PARTS = {"accuracy": "#009E73", "length": AFTER, "kl": "#E69F00", "normalisation": "#CC79A7"}
PART_NAMES = {"accuracy": "accuracy", "length": "length", "kl": "KL", "normalisation": "normalisation"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a chart."""

    label: str
    color: str
    steps: np.ndarray
    values: np.ndarray


def course(lines: Sequence[Line], marks: Sequence[Line] = (), *, percent: bool = False, floor: bool = False) -> Figure:
    """A measure against steps, one smoothed line for each run, the values behind it faint.

    Args: marks, held-out evaluations, drawn as diamonds; percent, of values that are shares; floor, start at 0."""
    figure = new_figure((NARROW[0], 2.5))
    several = len(lines) > 1
    axes = figure.add_axes((0.15, 0.19, 0.65 if several else 0.82, 0.76))
    clean(axes, "")
    for line in lines:
        steps, values = thinned(line.steps), thinned(line.values)
        strong = smooth(steps, values)
        if strong is not values and not several:
            axes.plot(steps, values, color=CURVE, linewidth=0.9, alpha=0.6, zorder=2)
        axes.plot(steps, strong, color=line.color, linewidth=1.8, zorder=3, solid_capstyle="round",
                  marker="o" if len(steps) < 4 else "", markersize=4)
    for line in marks:
        axes.plot(line.steps, line.values, linestyle="", marker="D", markersize=6, color=line.color,
                  markeredgecolor="white", markeredgewidth=1.0, zorder=5, clip_on=False)
    low, high = axes.get_ylim()
    if floor:
        axes.set_ylim(min(0.0, low), high)
    elif percent and high - low < 0.06:
        axes.set_ylim(max((low + high) / 2 - 0.03, -0.002), min((low + high) / 2 + 0.03, 1.002))
    _steps(axes)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    low, high = axes.get_ylim()
    decimals = 0 if high - low >= 0.05 else 1 if high - low >= 0.005 else 2
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=decimals) if percent else FuncFormatter(_plain))
    if several:
        name_ends(axes, [(line.label, line.color, float(line.values[-max(len(line.values) // 20, 1):].mean()))
                          for line in lines])
    return figure


def _plain(value: float, position: int | None = None) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}".replace("-", "−")


def _steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(grouped))
    axes.tick_params(labelsize=SMALL)
    axes.set_xlabel("training step", color=QUIET, fontsize=SMALL)


def meter(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The length-pressure meter: what share of the update's advantages comes from where, stacked."""
    def draw(axes: Axes, steps: np.ndarray, values: dict[str, np.ndarray]) -> list[tuple[str, str, float]]:
        heights = np.cumsum([values[part] for part in values], axis=0)
        for part, low, high in zip(values, [np.zeros(len(steps)), *heights], heights, strict=False):
            axes.fill_between(steps, low, high, color=PARTS[part], linewidth=0.6, edgecolor="white")
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        return [(PART_NAMES[part], PARTS[part], float(high[-1] - values[part][-1] / 2))
                for part, high in zip(values, heights, strict=True)]

    return _parts(rows, "update_share", draw)


def pull(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """How hard each part of the advantages pulls on length, in tokens: below 0 towards shorter responses."""
    def draw(axes: Axes, steps: np.ndarray, values: dict[str, np.ndarray]) -> list[tuple[str, str, float]]:
        axes.axhline(0, color="#888888", linewidth=0.9)
        for part, course in values.items():
            axes.plot(steps, course, color=PARTS[part], linewidth=1.8)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        return [(PART_NAMES[part], PARTS[part], float(course[-1])) for part, course in values.items()]

    return _parts(rows, "length_pull", draw)


Draw = Callable[[Axes, np.ndarray, dict[str, np.ndarray]], list[tuple[str, str, float]]]


def _parts(rows: Sequence[Mapping[str, Any]], prefix: str, draw: Draw) -> Figure:
    """A chart of the parts that an update is made of, smoothed against steps, named at their right ends."""
    kept = [row for row in rows if all(row.get(f"{prefix}/{part}") is not None for part in PARTS)]
    steps = thinned(np.array([row["step"] for row in kept], np.float64))
    values = {}
    for part in PARTS:
        found = thinned(np.array([row[f"{prefix}/{part}"] for row in kept], np.float64))
        if np.abs(found).max() > 0:             # a part that is switched off is not shown
            values[part] = smooth(steps, found)
    figure = new_figure((NARROW[0], 2.5))
    axes = figure.add_axes((0.15, 0.19, 0.58, 0.76))
    clean(axes, "")
    ends = draw(axes, steps, values)
    axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
    _steps(axes)
    name_ends(axes, ends)
    return figure
