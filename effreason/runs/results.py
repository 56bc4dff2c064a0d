"""Results of a run or a family, as summary.json and family.json hold them.

A run is a family of one member: the model before training, and what became of it.
"""

import dataclasses
import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effreason.evaluation import statistics
from effreason.evaluation.statistics import Comparison, Summary
from effreason.runtime import rows
from effreason.runtime.errors import UserError
from effreason.runtime.files import write_json
from effreason.types import Outcomes

RUN_FILE, FAMILY_FILE = "summary.json", "family.json"


def evaluations(directory: Path, step: int) -> Path:
    """Returns the directory of a run's graded responses after `step` updates, a file a set."""
    return directory / "evaluations" / f"step{step}"


class PointKind(enum.StrEnum):
    """What a model of a family is."""

    BASE = "base"
    """The model before training."""
    MEMBER = "member"
    """Trained with one alpha; the trained model of a run; a dial at an alpha of its training."""
    BETWEEN = "between"
    """A dial at an alpha that it was never trained at."""
    BASELINE = "baseline"
    """Trained with another objective."""
    BLEND = "blend"
    """A weighted mean of the weights of the base and a member."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """A model on one set of problems."""

    summary: Summary
    comparison: Comparison | None   # with the base; None for the base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One model of a run or a family: an operating point."""

    name: str                       # base | trained, of a family also: α = 0.1, SFT, blend 0.5
    kind: PointKind
    directory: str                  # of its run or its responses, relative to that of the results
    sets: dict[str, Measurement]    # by name; the first is the one of the headline
    alpha: float | None = None      # the last one; of a blend, the member's; None if it has none
    alpha_start: float | None = None    # the first one, of a run whose alpha may move
    weight: float | None = None     # of the trained weights in a blend
    seconds: float | None = None    # that its training took


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """What a run or a family found. A family that is not finished has no points."""

    model: str                      # before training, as the configuration names it
    seed: int
    steps: int
    points: list[Point]             # the base first
    origin: dict[str, Any]          # hashes of the base model, template and problems
    sampling: dict[str, Any]        # settings of the evaluation
    environment: dict[str, Any]     # versions and hardware

    @property
    def sets(self) -> list[str]:
        """The names of the sets."""
        return list(self.points[0].sets) if self.points else []


def measure(base: Mapping[str, Outcomes],
            other: Mapping[str, Outcomes] | None = None) -> dict[str, Measurement]:
    """Summarises a model on each set and compares it with the base.

    Args: other, None = the base itself."""
    return {name: Measurement(
        summary=statistics.summarize(outcomes),
        comparison=None if other is None else statistics.compare(base[name], outcomes))
        for name, outcomes in (base if other is None else other).items()}


def write(path: Path, results: Results) -> None:
    """Writes summary.json or family.json. Raises: UserError if the disk is full."""
    write_json(path, dataclasses.asdict(results))


def read_results(path: Path) -> Results:
    """Reads summary.json or family.json. Raises: UserError if it is damaged."""
    table = read_object(path)
    if "points" not in table:
        raise UserError(f"{path}: has no points; was it written by another version of effreason?")
    results = rows.convert(table, Results, str(path))

    for index, point in enumerate(results.points):
        is_base = point.kind == PointKind.BASE
        if is_base != (index == 0) or not point.sets.keys() <= set(results.sets):
            raise UserError(f"{path}: points must be one base, measured on every set, then others")
        for measurement in point.sets.values():
            comparison = measurement.comparison
            if not measurement.summary.budgets or (comparison and not comparison.by_difficulty):
                raise UserError(f"{path}: budgets and by_difficulty must not be empty")
    return results


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises: UserError."""
    def reject(constant: str) -> float:
        raise ValueError(f"{constant} is not a number")

    try:
        table = json.loads(path.read_text(encoding="utf-8"), parse_constant=reject)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: must hold an object, got {type(table).__name__}")
    return table
