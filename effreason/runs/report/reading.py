"""Reads what a run or a family left in its directory, for its report.

A run that is not finished has less: what does not exist yet is empty.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from effreason.runs import dial_points
from effreason.runs.report.figures import updates
from effreason.runs.results import (
    FAMILY_FILE,
    RUN_FILE,
    Measurement,
    Point,
    PointKind,
    measure,
    read_object,
    read_results,
)
from effreason.runtime import config as configuration
from effreason.runtime.config import Config
from effreason.runtime.config_fields import all_settings
from effreason.runtime.config_parser import read_yaml
from effreason.runtime.errors import UserError
from effreason.runtime.files import read_json_lines

# The metrics that are drawn.
DRAWN = ("rollout/", "evaluation/", "reward/", "update/", "update_share/", "length_pull/", "dial/")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training."""

    name: str                       # the label of its model in a family; "" of a single run
    kind: PointKind                 # member | baseline
    alpha: float | None
    directory: Path
    metrics: list[dict[str, Any]]   # rows of metrics.jsonl
    settings: Mapping[str, Any]     # config.yaml as "section.field": value
    evaluations: Mapping[int, Path]     # directories of graded responses, by updates before them

    @property
    def steps(self) -> int:
        """Returns the number of updates made."""
        return max(updates(self.metrics), default=0)

    @property
    def planned_steps(self) -> int:
        """Returns the number of updates to make; 0 if the configuration does not say."""
        steps = self.settings.get("run.steps")
        return steps if isinstance(steps, int) else 0


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What the directory of a run or of a family holds."""

    directory: Path
    family: bool
    model: str                      # before training
    seed: int | None
    sets: list[str]                 # the first is the one of the headline
    points: list[Point]             # the base first; [] if nothing was evaluated
    responses: Mapping[str, Path]   # directories of graded responses, by the name of their point
    runs: list[Run]                 # in the order of the points
    environment: Mapping[str, Any]
    dial: Sequence[float] = ()      # the alphas that a run with a dial was trained at

    @property
    def title(self) -> str:
        """Returns the name of the directory."""
        return self.directory.resolve().name

    def measured(self, set_name: str) -> list[tuple[Point, Measurement]]:
        """Returns the points that were measured on a set, the base first."""
        return [(point, point.sets[set_name]) for point in self.points if set_name in point.sets]


def label(point: Point) -> str:
    """Returns a short name, to be written next to a mark."""
    if point.kind in (PointKind.MEMBER, PointKind.BETWEEN) and point.alpha is not None:
        return f"α {point.alpha:.4g}"
    return point.name.split(",")[0]


def read(directory: Path) -> Contents:
    """Reads a run or a family.

    Raises: UserError if it is neither, if a family is not finished, or if a file is damaged."""
    family = (directory / FAMILY_FILE).is_file()
    if not family and not (directory / "config.yaml").is_file():
        reason = ("holds neither config.yaml nor family.json" if directory.is_dir() else
                  "is a file" if directory.exists() else "does not exist")
        raise UserError(f"{directory}: must be the directory of a run or of a family, it {reason}")
    path = directory / (FAMILY_FILE if family else RUN_FILE)
    results = read_results(path) if path.exists() else None
    if family and (results is None or not results.points):
        raise UserError(f"{directory} is a family that is not finished yet; its finished members "
                        "have pages of their own")

    responses: dict[str, Path] = {}
    runs = []
    for point in results.points if results else []:
        own = _inside(directory, point.directory)
        if own and (own / "config.yaml").is_file():
            run = _read_run(own, "" if own == directory else label(point), point.kind, point.alpha)
            runs += [run] if point.kind in (PointKind.MEMBER, PointKind.BASELINE) else []
            own = run.evaluations.get(max(run.evaluations, default=0), own)
        if own:
            responses[point.name] = own

    if not results:
        runs = [_read_run(directory, "", PointKind.MEMBER, None)]

    points: list[Point] = results.points if results else []
    alphas: Sequence[float] = ()
    if points and not family and runs[0].settings.get("reward.alphas"):
        points, alphas = _with_dial(points, runs[0], responses)

    environment = directory / "environment.json"
    settings = runs[0].settings if runs else {}
    seed = results.seed if results else settings.get("run.seed")
    before = runs[0].evaluations.get(0) if not results else None
    started = before.glob("*.jsonl") if before else ()
    return Contents(
        directory=directory, family=family, seed=seed if isinstance(seed, int) else None,
        model=results.model if results else str(settings.get("model.path", "")),
        sets=results.sets if results else sorted(path.stem for path in started),
        points=points, dial=alphas, responses=responses, runs=runs,
        environment=read_object(environment) if environment.exists() else
        results.environment if results else {})


def _with_dial(points: list[Point], run: Run,
               responses: dict[str, Path]) -> tuple[list[Point], Sequence[float]]:
    """Returns the points of a run with those of its dial among them, and the alphas of the dial.

    Args: points, the base and the model at reward.alpha; responses, to which theirs are added."""
    config = configuration.load(run.directory / "config.yaml")
    base, trained = points
    stored = dial_points.read_points(run.evaluations[max(run.evaluations)], config)
    before = dial_points.read_base(run.directory, config)
    if before is None:
        return points, []

    name, found = next(iter(base.sets)), [trained]
    for point in stored:
        if point.alpha == trained.alpha:
            continue
        found.append(Point(
            name=f"α = {point.alpha:g}", alpha=point.alpha,
            kind=PointKind.MEMBER if point.trained else PointKind.BETWEEN,
            directory=point.directory.relative_to(run.directory).as_posix(),
            sets=measure({name: before}, {name: point.outcomes})))
        responses[found[-1].name] = point.directory
    return [base, *sorted(found, key=lambda point: point.alpha or 0.0)], config.reward.dial


def _inside(directory: Path, name: str) -> Path | None:
    """Returns the directory of a point, also of a family that was moved; None if it is outside."""
    for path in (directory / name, directory / Path(name).name):
        if path.is_dir() and path.resolve().is_relative_to(directory.resolve()):
            return path
    return None


def _read_run(directory: Path, name: str, kind: PointKind, alpha: float | None) -> Run:
    evaluations = {int(number): path for path in directory.glob("evaluations/step*")
                   if path.is_dir() and (number := path.name.removeprefix("step")).isdecimal()}
    return Run(name=name, kind=kind, alpha=alpha, directory=directory,
               metrics=_read_metrics(directory / "metrics.jsonl"),
               settings=_read_settings(directory / "config.yaml"),
               evaluations=dict(sorted(evaluations.items())))


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl, in which everything that is drawn is a number or null."""
    try:
        table = read_json_lines(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None

    for row in table:
        for key, value in row.items():
            drawn = key == "step" or (value is not None and key.startswith(DRAWN))
            # NaN and infinity cannot be drawn, and true is not a number.
            if drawn and (not isinstance(value, int | float) or isinstance(value, bool)
                          or not abs(value) < 1e100):
                raise UserError(f"{path}: {key} of step {str(row['step'])[:20]} must be a number, "
                                f"got {str(value)[:40]!r}; repair or remove it")
    return table


def _read_settings(path: Path) -> dict[str, Any]:
    """Reads a configuration as it was written, also if a field has another meaning today."""
    try:
        table = read_yaml(path.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(table, dict | None):
        raise UserError(f"{path}: must hold sections of settings, got {type(table).__name__}")

    return {f"{section}.{name}": value for section, fields in (table or {}).items()
            if isinstance(fields, dict) for name, value in fields.items()}


def not_default(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yields the fields whose values are not the defaults."""
    defaults = {setting.field: setting.default for setting in all_settings(Config)}
    return (field for field, value in settings.items()
            if field not in defaults or defaults[field] != value)
