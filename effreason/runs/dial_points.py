"""The points of a run's dial: what its evaluations at several alphas have left on disk."""

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effreason.data.loading import evaluation_samples
from effreason.evaluation import responses, statistics
from effreason.evaluation.statistics import Summary
from effreason.runs import results
from effreason.runtime.config import Config
from effreason.runtime.files import disk, replacing, write_json
from effreason.types import Outcomes

FILE = "dial.json"                  # in the run directory
PREFIX = "alpha"                    # of the directories of alphas in that of a step


@dataclass(frozen=True, kw_only=True)
class DialPoint:
    """A run's dial at one alpha, on the first evaluation set."""

    alpha: float
    trained: bool                   # whether groups of this alpha were trained
    directory: Path                 # of its graded responses
    outcomes: Outcomes


def directory_of(evaluations: Path, alpha: float) -> Path:
    """Returns the directory of the graded responses at an alpha. Args: evaluations, of a step."""
    return evaluations / f"{PREFIX}{alpha:g}"


def copy_trained(evaluations: Path, config: Config) -> None:
    """Copies the responses at reward.alpha, where a run is evaluated anyway, to those of its dial.

    Raises: UserError if the disk is full."""
    target = directory_of(evaluations, config.reward.alpha) / _file_name(config)
    if not target.exists():
        with disk(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:
            shutil.copyfile(evaluations / target.name, partial)


def read_points(evaluations: Path, config: Config) -> list[DialPoint]:
    """Returns what is complete of a step's evaluations, by alpha. Raises: UserError if a file is
    damaged."""
    points = []
    for path in evaluations.glob(f"{PREFIX}*/{_file_name(config)}"):
        with contextlib.suppress(ValueError):       # another directory of such a name is not ours
            alpha = float(path.parent.name.removeprefix(PREFIX))
            points.append(DialPoint(alpha=alpha, trained=alpha in config.reward.dial,
                                    directory=path.parent,
                                    outcomes=responses.read_outcomes(path)[1]))
    return sorted(points, key=lambda point: point.alpha)


def _file_name(config: Config) -> str:
    """Returns the name of the file of the first evaluation set."""
    names = list(evaluation_samples(config))
    return responses.file_names(names)[names[0]] + responses.SUFFIX


def write_points(directory: Path, points: Sequence[DialPoint]) -> None:
    """Writes dial.json. Raises: UserError if the disk is full."""
    write_json(directory / FILE, {"points": [
        {"alpha": point.alpha, "trained": point.trained,
         "accuracy": float(point.outcomes.correct.mean()),
         "tokens": float(point.outcomes.lengths.mean())} for point in points]})


def summaries(run: Path, config: Config, step: int,
              alpha: float) -> tuple[Summary | None, Summary | None]:
    """Returns what a run has measured on its first set: of the model before training, and after
    `step` updates, with a dial at an alpha. None = not measured."""
    if not config.evaluation.problems:
        return None, None
    after = results.evaluations(run, step)
    if config.reward.dial:
        after = directory_of(after, alpha)
    path = after / _file_name(config)
    before = read_base(run, config)
    return (None if before is None else statistics.summarize(before),
            statistics.summarize(responses.read_outcomes(path)[1]) if path.exists() else None)


def read_base(run: Path, config: Config) -> Outcomes | None:
    """Returns how the model before training did on the first set; None if it was not evaluated."""
    path = results.evaluations(run, 0) / _file_name(config)
    return responses.read_outcomes(path)[1] if path.exists() else None
