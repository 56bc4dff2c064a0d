"""Names beside marks and lines of a chart, put where they meet nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SMALL, NUMBER = 9.5, 9.0            # sizes of text in a chart, in points
# Where a name may stand: sides and heights in halves of its own size, the best first.
AROUND = ((1, 1), (-1, 1), (1, -1), (-1, -1), (1.1, 0), (-1.1, 0), (0, 1.6), (0, -1.6), (1, 2.4), (-1, 2.4), (1, -2.4),
          (-1, -2.4), *((side, rise) for rise in (4, -4, 5.5, -5.5, 7, -7, 9, -9) for side in (1, -1, 1.8, -1.8)))
MARK, GAP = 6.0, 7.0                # half a mark's size, and its distance to its name, in points
FAR = 10.0                          # a name this far from its mark, in points, has a line to it
NAMES = 4.0                         # how much worse it is to cover a name than a line


@dataclass(frozen=True, kw_only=True)
class Named:
    """A mark and its name, at x, y of the data."""

    name: str
    x: float
    y: float
    color: str


def name_points(axes: Axes, marks: Sequence[Named], lines: Sequence[np.ndarray]) -> None:
    """Writes each name where it covers no other name, no mark and no line, or the least; joins it to a far mark.

    Args: lines, float64[n, 2] each, x and y of the data: error bars and curves."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure) and isinstance(figure.canvas, FigureCanvasAgg)
    renderer, scale = figure.canvas.get_renderer(), figure.dpi / 72
    places = [axes.transData.transform((mark.x, mark.y)) for mark in marks]
    taken = [_box(x, y, MARK * scale, MARK * scale) for x, y in places]
    taken += [_box(x, y, 1.5 * scale, 1.5 * scale) for line in lines for x, y in _along(axes.transData.transform(line))]
    frame = np.array([axes.get_window_extent(renderer).extents])
    names = np.empty((0, 4))                                # and the lines to them
    for mark, (x, y) in zip(marks, places, strict=True):
        text = axes.annotate(mark.name, (mark.x, mark.y), xytext=(0, 0), textcoords="offset points", fontsize=SMALL,
                             color=mark.color, fontweight="bold", parse_math=False, zorder=6)
        size = text.get_window_extent(renderer)
        boxes = [_box(x + side * (size.width / 2 + GAP * scale), y + rise * (size.height / 2 + 0.6 * GAP * scale),
                      size.width / 2, size.height / 2) for side, rise in AROUND]
        costs = [_overlap(box, np.array(taken)) + NAMES * sum(_overlap(each, names) for each in (box, *joined))
                 + 9 * (size.width * size.height - _overlap(box, frame)) + rank * scale**2
                 for rank, box in enumerate(boxes) for joined in [_joined(x, y, box, scale)]]
        best = boxes[int(np.argmin(costs))]
        text.set_position(((best[0] - x) / scale, (best[1] - y) / scale))
        joined = _joined(x, y, best, scale)
        names = np.vstack([names, best, *joined])
        if joined:
            line = axes.transData.inverted().transform([(x, y), np.clip((x, y), best[:2], best[2:])])
            axes.plot(*line.T, color=mark.color, linewidth=0.6, zorder=1.5, scalex=False, scaley=False)


def _joined(x: float, y: float, box: np.ndarray, scale: float) -> list[np.ndarray]:
    """Boxes along the line from a mark to the nearest point of its name; none where the name is near."""
    end = np.clip((x, y), box[:2], box[2:])
    near = np.hypot(*(end - (x, y))) <= FAR * scale
    return [] if near else [_box(across, up, 2 * scale, 2 * scale) for across, up in _along(np.array([(x, y), end]))]


def _box(x: float, y: float, half_width: float, half_height: float) -> np.ndarray:
    """Left, bottom, right and top."""
    return np.array([x - half_width, y - half_height, x + half_width, y + half_height])


def _along(line: np.ndarray) -> np.ndarray:
    """Points along a line, close enough to stand for it."""
    shares = np.linspace(0, 1, 16)[:, None]
    pieces = [start + shares * (end - start) for start, end in zip(line, line[1:], strict=False)]
    return np.concatenate([line[:1], *pieces])


def _overlap(box: np.ndarray, others: np.ndarray) -> float:
    """The area that a box has in common with others. Args: others float64[n, 4]."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(np.prod(np.maximum(sides, 0.0), axis=1).sum())


def name_ends(axes: Axes, ends: Sequence[tuple[str, str, float]]) -> None:
    """Writes names behind the right ends of lines, moved apart where they would meet. Args: name, colour, height."""
    low, high = axes.get_ylim()
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    step = (high - low) * 12.5 / (axes.get_position().height * figure.get_figheight() * 72)
    heights: list[float] = []
    ordered = sorted(ends, key=lambda each: each[2])
    for _, _, height in ordered:
        heights.append(max(min(max(height, low), high), heights[-1] + step if heights else low))
    for place in range(len(heights) - 1, -1, -1):           # what was pushed over the top comes down again
        heights[place] = min(heights[place], high - (len(heights) - 1 - place) * step)
    for (name, color, _), height in zip(ordered, heights, strict=True):
        axes.annotate(name if len(name) <= 16 else name[:15] + "…", (1, (height - low) / (high - low)), (5, 0),
                      xycoords="axes fraction", textcoords="offset points", va="center", fontsize=NUMBER, color=color,
                      fontweight="bold", annotation_clip=False, parse_math=False)
