"""The points of a run's dial: what its evaluations at several alphas have left on disk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from effreason.data.loading import evaluation_samples
from effreason.evaluation import responses, statistics
from effreason.evaluation.statistics import Summary
from effreason.runtime.config import Config
from effreason.runtime.files import write_json
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


def directory_of(evaluations: Path, alpha: float, config: Config) -> Path:
    """Returns the directory of the graded responses at an alpha.

    At reward.alpha it is that of the step: the run is evaluated there anyway, on all sets.
    Args: evaluations, of a step."""
    own = evaluations / f"{PREFIX}{alpha:g}"
    return evaluations if alpha == config.reward.alpha and not own.is_dir() else own


def read_points(evaluations: Path, config: Config) -> list[DialPoint]:
    """Returns what is complete of a step's evaluations, by alpha. Raises: UserError if a file is
    damaged."""
    file_name = _file_name(config)
    return [DialPoint(alpha=alpha, trained=alpha in config.reward.dial, directory=directory,
                      outcomes=responses.read_outcomes(directory / file_name)[1])
            for alpha, directory in sorted(_directories(evaluations, config))
            if (directory / file_name).exists()]


def _directories(evaluations: Path, config: Config) -> Iterator[tuple[float, Path]]:
    main = config.reward.alpha
    yield main, directory_of(evaluations, main, config)
    for directory in evaluations.glob(f"{PREFIX}*"):
        try:
            alpha = float(directory.name.removeprefix(PREFIX))
        except ValueError:          # not ours
            continue
        if f"{alpha:g}" != f"{main:g}":
            yield alpha, directory


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
    after = run / "evaluations" / f"step{step}"
    if config.reward.dial:
        after = directory_of(after, alpha, config)
    path = after / _file_name(config)
    before = read_base(run, config)
    return (None if before is None else statistics.summarize(before),
            statistics.summarize(responses.read_outcomes(path)[1]) if path.exists() else None)


def read_base(run: Path, config: Config) -> Outcomes | None:
    """Returns how the model before training did on the first set; None if it was not evaluated."""
    path = run / "evaluations/step0" / _file_name(config)
    return responses.read_outcomes(path)[1] if path.exists() else None
