"""Places the names of marks and lines in a chart so that they overlap nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SMALL, NUMBER = 9.5, 9.0            # font sizes in a chart, in points
# Candidate positions of a name, best first: its offset from the mark in halves of its own size.
OFFSETS = ((1, 1), (-1, 1), (1, -1), (-1, -1), (1.1, 0), (-1.1, 0), (0, 1.6), (0, -1.6),
           (1, 2.4), (-1, 2.4), (1, -2.4), (-1, -2.4),
           *((across, up) for up in (4, -4, 5.5, -5.5, 7, -7, 9, -9)
             for across in (1, -1, 1.8, -1.8)))
MARK, GAP = 6.0, 7.0                # half the size of a mark, its distance to its name, in points
FAR = 10.0                          # a name this far from its mark, in points, is joined to it
NAME_COST, FRAME_COST = 4.0, 9.0    # of covering a name, of leaving the axes; of a line it is 1
NAME_LENGTH, LINE_HEIGHT = 16, 12.5     # of names at the ends of lines: characters, points


@dataclass(frozen=True, kw_only=True)
class NamedMark:
    """A mark and its name, at x, y in data coordinates."""

    name: str
    x: float
    y: float
    color: str


def name_points(axes: Axes, marks: Sequence[NamedMark], lines: Sequence[np.ndarray]) -> None:
    """Writes each name at the candidate position that covers least of names, marks and lines.

    A name that is far from its mark is joined to it by a line.
    Args: lines, float64[n, 2] each, x and y of error bars and curves in data coordinates."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    scale = figure.dpi / 72
    centres = [axes.transData.transform((mark.x, mark.y)) for mark in marks]
    obstacles = np.array([_box(x, y, MARK * scale, MARK * scale) for x, y in centres] + [
        _box(x, y, 1.5 * scale, 1.5 * scale)
        for line in lines for x, y in _points_along(axes.transData.transform(line))])
    frame = np.array([axes.get_window_extent().extents])
    names = np.empty((0, 4))        # boxes of the names placed so far, and of the lines to them

    for mark, centre in zip(marks, centres, strict=True):
        text = axes.annotate(
            mark.name, (mark.x, mark.y), xytext=(0, 0), textcoords="offset points", fontsize=SMALL,
            color=mark.color, fontweight="bold", parse_math=False, zorder=6)
        size = text.get_window_extent()
        half = np.array([size.width, size.height]) / 2
        boxes = [_box(*(centre + offset * (half + np.array([GAP, 0.6 * GAP]) * scale)), *half)
                 for offset in np.array(OFFSETS)]

        costs = []
        for rank, box in enumerate(boxes):
            outside = size.width * size.height - _overlap(box, frame)
            covered = sum(_overlap(part, names) for part in (box, *_joint(centre, box, scale)))
            costs.append(_overlap(box, obstacles) + NAME_COST * covered + FRAME_COST * outside
                         + rank * scale**2)

        best = boxes[int(np.argmin(costs))]
        text.set_position((best[:2] - centre) / scale)
        joint = _joint(centre, best, scale)
        names = np.vstack([names, best, *joint])
        if joint:
            nearest = np.clip(centre, best[:2], best[2:])
            ends = axes.transData.inverted().transform([centre, nearest])
            axes.plot(*ends.T, color=mark.color, linewidth=0.6, zorder=1.5, scalex=False,
                      scaley=False)


def _joint(centre: np.ndarray, box: np.ndarray, scale: float) -> list[np.ndarray]:
    """Returns boxes along the line from a mark to its name; [] if the name is near."""
    end = np.clip(centre, box[:2], box[2:])
    if np.hypot(*(end - centre)) <= FAR * scale:
        return []
    return [_box(x, y, 2 * scale, 2 * scale) for x, y in _points_along(np.array([centre, end]))]


def _box(x: float, y: float, half_width: float, half_height: float) -> np.ndarray:
    """Returns left, bottom, right and top."""
    return np.array([x - half_width, y - half_height, x + half_width, y + half_height])


def _points_along(line: np.ndarray) -> np.ndarray:
    """Returns 16 points on each piece of a line [n, 2], ends included."""
    shares = np.linspace(0, 1, 16)[:, None]
    pieces = [start + shares * (end - start) for start, end in zip(line, line[1:], strict=False)]
    return np.concatenate([line[:1], *pieces])


def _overlap(box: np.ndarray, others: np.ndarray) -> float:
    """Returns the area that a box shares with others, float64[n, 4]."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(np.prod(np.maximum(sides, 0.0), axis=1).sum())


def name_ends(axes: Axes, ends: Sequence[tuple[str, str, float]]) -> None:
    """Writes names to the right of the ends of lines, moved apart if they would overlap.

    Args: ends, the name, colour and y of each line's end."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    low, high = axes.get_ylim()
    step = (high - low) * LINE_HEIGHT / (axes.get_position().height * figure.get_figheight() * 72)
    ends = sorted(ends, key=lambda end: end[2])

    heights: list[float] = []
    for _, _, height in ends:
        heights.append(max(min(max(height, low), high), heights[-1] + step if heights else low))
    for index in range(len(heights)):               # what was pushed above the top comes down again
        heights[index] = min(heights[index], high - (len(heights) - 1 - index) * step)

    for (name, color, _), height in zip(ends, heights, strict=True):
        axes.annotate(
            name if len(name) <= NAME_LENGTH else name[:NAME_LENGTH - 1] + "…",
            (1, (height - low) / (high - low)), (5, 0), xycoords="axes fraction",
            textcoords="offset points", va="center", fontsize=NUMBER, color=color,
            fontweight="bold", annotation_clip=False, parse_math=False)
