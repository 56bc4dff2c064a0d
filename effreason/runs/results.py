"""Results of a run or a family, as summary.json and family.json hold them.

A run is a family of one member: the model before training, and what became of it.
"""

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effreason.evaluation import statistics
from effreason.evaluation.statistics import Comparison, Summary
from effreason.runtime.files import write_json
from effreason.types import Outcomes

RUN_FILE, FAMILY_FILE = "summary.json", "family.json"


class PointKind(enum.StrEnum):
    """What a model of a family is."""

    BASE = "base"
    """The model before training."""
    MEMBER = "member"
    """Trained with one alpha; the trained model of a run."""
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
