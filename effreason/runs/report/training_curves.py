"""The charts of a training: a measure against steps, and what the updates are made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from effreason.runs.report import figures
from effreason.runs.report.figures import AFTER, NARROW, QUIET, clean, grouped, smooth
from effreason.runs.report.label_placement import SMALL, name_ends

# What advantages are made of: the part of a metric's key, its name and its colour.
PARTS = {"accuracy": ("accuracy", "#009E73"), "length": ("length", AFTER), "kl": ("KL", "#E69F00"),
         "normalisation": ("normalisation", "#CC79A7")}
Curves = dict[str, np.ndarray]
Ends = list[tuple[str, str, float]]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a chart."""

    label: str
    color: str
    steps: np.ndarray
    values: np.ndarray


def training_curve(lines: Sequence[Line], marks: Sequence[Line] = (), *, percent: bool = False,
                   floor: bool = False) -> Figure:
    """Draws a measure against steps: one smoothed line for each run, over faint values.

    Args: marks, held-out evaluations, drawn as diamonds; percent, the values are shares; floor,
        the axis starts at 0."""
    figure = figures.new_figure((NARROW[0], 2.5))
    several = len(lines) > 1
    axes = figure.add_axes((0.15, 0.19, 0.65 if several else 0.82, 0.76))
    clean(axes, "")

    for line in lines:
        figures.draw_smoothed(axes, line.steps, line.values, line.color, width=1.8,
                              faint=not several)
    for mark in marks:
        axes.plot(mark.steps, mark.values, linestyle="", marker="D", markersize=6, color=mark.color,
                  markeredgecolor="white", markeredgewidth=1.0, zorder=5, clip_on=False)

    low, high = axes.get_ylim()
    if floor:
        axes.set_ylim(min(0.0, low), high)
    elif percent and high - low < 0.06:
        middle = (low + high) / 2
        axes.set_ylim(max(middle - 0.03, -0.002), min(middle + 0.03, 1.002))

    _format_steps(axes)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    low, high = axes.get_ylim()
    decimals = 0 if high - low >= 0.05 else 1 if high - low >= 0.005 else 2
    axes.yaxis.set_major_formatter(
        PercentFormatter(1.0, decimals=decimals) if percent else FuncFormatter(_number))

    if several:
        last = [float(line.values[-max(len(line.values) // 20, 1):].mean()) for line in lines]
        name_ends(axes, [(line.label, line.color, height)
                         for line, height in zip(lines, last, strict=True)])
    return figure


def _number(value: float, position: int | None = None) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}".replace("-", "−")


def _format_steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(grouped))
    axes.tick_params(labelsize=SMALL)
    axes.set_xlabel("training step", color=QUIET, fontsize=SMALL)


def update_shares(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the length-pressure meter: what the update's advantages are made of, stacked."""
    return _parts_figure(rows, "update_share", _stack)


def _stack(axes: Axes, steps: np.ndarray, curves: Curves) -> Ends:
    tops = np.cumsum(list(curves.values()), axis=0)
    for part, low, high in zip(curves, [np.zeros(len(steps)), *tops], tops, strict=False):
        axes.fill_between(steps, low, high, color=PARTS[part][1], linewidth=0.6, edgecolor="white")

    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return [(*PARTS[part], float(top[-1] - curves[part][-1] / 2))
            for part, top in zip(curves, tops, strict=True)]


def length_pulls(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws how hard each part of the advantages pulls on length; below 0 towards shorter."""
    return _parts_figure(rows, "length_pull", _overlay)


def _overlay(axes: Axes, steps: np.ndarray, curves: Curves) -> Ends:
    axes.axhline(0, color="#888888", linewidth=0.9)
    for part, curve in curves.items():
        axes.plot(steps, curve, color=PARTS[part][1], linewidth=1.8)

    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(_number))
    return [(*PARTS[part], float(curve[-1])) for part, curve in curves.items()]


def _parts_figure(rows: Sequence[Mapping[str, Any]], prefix: str,
                  draw: Callable[[Axes, np.ndarray, Curves], Ends]) -> Figure:
    """Draws the parts of an update against steps, smoothed, with names at their right ends."""
    complete = [row for row in rows
                if all(row.get(f"{prefix}/{part}") is not None for part in PARTS)]
    steps = figures.thinned(np.array([row["step"] for row in complete], np.float64))
    curves = {}
    for part in PARTS:
        values = np.array([row[f"{prefix}/{part}"] for row in complete], np.float64)
        if np.abs(values).max() > 0:        # a part that is switched off is not shown
            curves[part] = smooth(steps, figures.thinned(values))

    figure = figures.new_figure((NARROW[0], 2.5))
    axes = figure.add_axes((0.15, 0.19, 0.58, 0.76))
    clean(axes, "")
    ends = draw(axes, steps, curves)
    axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
    _format_steps(axes)
    name_ends(axes, ends)
    return figure
