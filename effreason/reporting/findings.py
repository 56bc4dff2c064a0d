"""What a run or a family left on disk, read for its report: points, curves, and where the responses are.

An unfinished run, or one of an earlier version, holds less: what is not there is empty or None.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from effreason.errors import UserError
from effreason.runtime.config import Config
from effreason.runtime.metrics import read_rows
from effreason.runtime.settings import all_settings
from effreason.statistics import Comparison, Summary, comparison_from_table, summary_from_table

BASE, MEMBER, BASELINE, BLEND = "base", "member", "baseline", "blend"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model on one set of problems."""

    summary: Summary
    comparison: Comparison | None   # with the base; None for the base


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model: an operating point."""

    name: str
    kind: str                       # base | member | baseline | blend
    alpha: float | None
    weight: float | None            # of the trained weights in a blend
    seconds: float | None           # that its training took
    responses: Path | None          # directory of its graded responses, SET.jsonl
    sets: Mapping[str, Measured]

    @property
    def label(self) -> str:
        """What stands beside a mark: the name as far as its first comma."""
        return f"α {self.alpha:.4g}" if self.kind == MEMBER and self.alpha is not None else self.name.split(",")[0]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training."""

    name: str                       # its point's label
    kind: str                       # member | baseline
    directory: Path
    alpha: float | None             # the last one, where it moved
    alpha_start: float | None
    steps: int                      # updates made
    metrics: list[dict[str, Any]]
    summary: Mapping[str, Any] | None               # summary.json
    settings: Mapping[str, Any]                     # config.yaml as "section.field": value
    environment: Mapping[str, Any]
    evaluations: Mapping[int, Path]                 # directories of graded responses, by the updates before them


@dataclass(frozen=True, kw_only=True)
class Findings:
    """A run, or a family of runs."""

    directory: Path
    family: bool
    model: str
    seed: int | None
    sets: tuple[str, ...]           # the first is the headline's
    points: tuple[Point, ...]       # the base first; none where nothing was evaluated
    runs: tuple[Run, ...]           # of a family, its members in the order of alpha, then the baselines
    environment: Mapping[str, Any]

    @property
    def title(self) -> str:
        return self.directory.resolve().name

    def on(self, name: str) -> list[tuple[Point, Measured]]:
        """The points that were measured on a set, the base first."""
        return [(point, point.sets[name]) for point in self.points if name in point.sets]


def read(directory: Path) -> Findings:
    """Reads a run or a family. Raises: UserError where it is neither, or a file of it is damaged."""
    if (directory / "family.json").is_file():
        return _family(directory)
    if (directory / "config.yaml").is_file():
        if list(directory.glob("*/config.yaml")) and not (directory / "metrics.jsonl").exists():
            raise UserError(f"{directory}: a family that is not finished yet holds no family.json; its members in "
                            "there have pages of their own")
        return _single(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: must be the directory of a run or of a family, it "
                        f"{'is a file' if directory.exists() else 'does not exist'}")
    raise UserError(f"{directory}: must be the directory of a run or of a family, it holds neither config.yaml nor "
                    "family.json")


def _single(directory: Path) -> Findings:
    run = _run(directory)
    tables = (run.summary or {}).get("sets", {})
    # Not concluded yet: what was evaluated before training says which sets there are.
    started = sorted(path.stem for path in run.evaluations.get(0, directory / "evaluations").glob("*.jsonl"))
    points = [
        Point(name=name, kind=kind, alpha=run.alpha if kind == MEMBER else None, weight=None, seconds=None,
              responses=run.evaluations.get(step),
              sets={each: _measured(run.directory / "summary.json", table[key],
                                    table["comparison"] if kind == MEMBER else None)
                    for each, table in tables.items()})
        for name, key, kind, step in (("base", "base", BASE, 0), ("trained", "trained", MEMBER, run.steps))]
    return Findings(directory=directory, family=False, model=str(run.settings.get("model.path", "")),
                    seed=run.settings.get("run.seed"), sets=tuple(tables or started),
                    points=tuple(points) if tables else (), runs=(run,), environment=run.environment)


def _family(directory: Path) -> Findings:
    path = directory / "family.json"
    table = _json(path)
    try:
        points, runs = [], []
        for row in table["points"]:
            own = _inside(directory, row["directory"])
            run = _run(own) if own is not None and (own / "config.yaml").is_file() else None
            last = run.evaluations.get(max(run.evaluations, default=0)) if run else None
            point = Point(
                name=row["name"], kind=row["kind"], alpha=row["alpha"], weight=row["weight"], seconds=row["seconds"],
                responses=last or own, sets={name: _measured(path, each["summary"], each["comparison"])
                                             for name, each in row["sets"].items()})
            points.append(point)
            if run is not None and point.kind in (MEMBER, BASELINE):
                runs.append(replace(run, name=point.label, kind=point.kind))
        base = [point for point in points if point.kind == BASE]
        return Findings(directory=directory, family=True, model=str(table["model"]), seed=table["seed"],
                        sets=tuple(table["sets"]), runs=tuple(runs), environment=table["environment"],
                        points=(*base, *(point for point in points if point.kind != BASE)))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a family's results: {error}") from None


def _run(directory: Path) -> Run:
    path = directory / "summary.json"
    summary, settings = _json(path) if path.exists() else None, _settings(directory / "config.yaml")
    metrics = read_rows(directory / "metrics.jsonl")
    evaluations = {int(path.name.removeprefix("step")): path for path in directory.glob("evaluations/step*")
                   if path.is_dir() and path.name.removeprefix("step").isdecimal()}
    environment = directory / "environment.json"
    alpha_start, alpha = _alphas(settings, summary)
    return Run(
        name="trained", kind=MEMBER, directory=directory, alpha=alpha, alpha_start=alpha_start,
        # A row with rollouts was followed by its update.
        steps=max((row["step"] + ("rollout/tokens" in row) for row in metrics), default=0), metrics=metrics,
        summary=summary, settings=settings,
        environment=_json(environment) if environment.exists() else {},
        evaluations=dict(sorted(evaluations.items())))


def _alphas(settings: Mapping[str, Any], summary: Mapping[str, Any] | None) -> tuple[float | None, float | None]:
    """The first and the last alpha of a run; None where it has another objective or reward, or where alpha moves and
    the last one is not known."""
    usual = {"update.objective": "policy_gradient", "reward.form": "efficient"}
    moving = {"reward.target_tokens": None, "reward.max_accuracy_drop": None}
    alpha = settings.get("reward.alpha")
    if not _is_number(alpha) or any(settings.get(field, value) != value for field, value in usual.items()):
        return None, None
    if all(settings.get(field, value) == value for field, value in moving.items()):
        return alpha, alpha
    if summary is None or "alpha_start" not in summary:     # of an earlier version: "alpha" is the configured one
        return None, None
    return summary["alpha_start"], summary["alpha"]


def _is_number(value: Any) -> bool:
    """Whether a value can be computed with and drawn: NaN, infinity and true are no such numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


def _inside(directory: Path, named: str | None) -> Path | None:
    """The directory of a point, also where the family was moved as a whole."""
    candidates = [directory / named, directory / Path(named).name] if named else []
    return next((path for path in candidates if path.is_dir()), None)


def _measured(path: Path, summary: dict[str, Any], comparison: dict[str, Any] | None) -> Measured:
    try:
        return Measured(summary=summary_from_table(summary),
                        comparison=None if comparison is None else comparison_from_table(comparison))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not what an evaluation writes: {error}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: must hold an object, got {type(table).__name__}")
    return table


def _settings(path: Path) -> dict[str, Any]:
    """A configuration as it was written, also where a field has another meaning by now. Raises: UserError."""
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    return {f"{section}.{name}": value for section, fields in (table or {}).items() if isinstance(fields, dict)
            for name, value in fields.items()}


def differing(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings that are not at their default."""
    defaults = {setting.field: setting.default for setting in all_settings(Config)}
    return ((field, value) for field, value in settings.items() if field not in defaults or defaults[field] != value)
