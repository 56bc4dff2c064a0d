"""What a run or a family left on disk, read for its report: points, curves, and where the responses are.

An unfinished run, or one of an earlier version, holds less: what is not there is empty or None.
"""

import contextlib
import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from effreason.evaluation.statistics import (
    Comparison,
    Summary,
    comparison_from_table,
    summary_from_table,
)
from effreason.runtime.config import Config
from effreason.runtime.config_fields import all_settings
from effreason.runtime.errors import UserError
from effreason.runtime.files import read_json_lines

KINDS = BASE, MEMBER, BASELINE, BLEND = "base", "member", "baseline", "blend"      # of points in family.json
# What of metrics.jsonl is drawn.
DRAWN = ("rollout/", "evaluation/", "reward/", "update/", "update_share/", "length_pull/")


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

    @property
    def wanted(self) -> int:
        """Updates that it is to make; 0 where its configuration does not say."""
        steps = self.settings.get("run.steps")
        return steps if isinstance(steps, int) else 0


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
    """Reads a run or a family.

    Raises: UserError where it is neither, or a family that is not finished, or a file of it is damaged."""
    if (directory / "family.json").is_file():
        return _family(directory)
    if (directory / "config.yaml").is_file():
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
    with _whole(directory / "summary.json", "a run's results"):
        points = [
            Point(name=name, kind=kind, alpha=run.alpha if kind == MEMBER else None, weight=None, seconds=None,
                  responses=run.evaluations.get(step),
                  sets={each: _measured(table[key], table["comparison"] if kind == MEMBER else None)
                        for each, table in tables.items()})
            for name, key, kind, step in (("base", "base", BASE, 0), ("trained", "trained", MEMBER, run.steps))]
    seed = run.settings.get("run.seed")
    return Findings(directory=directory, family=False, model=str(run.settings.get("model.path", "")),
                    seed=seed if isinstance(seed, int) else None, sets=tuple(tables or started),
                    points=tuple(points) if tables else (), runs=(run,), environment=run.environment)


def _family(directory: Path) -> Findings:
    path = directory / "family.json"
    table = _json(path)
    if table.get("points") == []:
        raise UserError(f"{directory} is a family that is not finished yet; its members in there have pages of their "
                        "own")
    points, runs = [], []
    with _whole(path, "a family's results"):
        environment, seed = typed(table["environment"], dict[str, Any]), typed(table["seed"], int | None)
        sets = typed(table["sets"], list[str])
        for row in typed(table["points"], list[dict[str, Any]]):
            own = _inside(directory, typed(row["directory"], str | None))
            run = _run(own) if own is not None and (own / "config.yaml").is_file() else None
            last = run.evaluations.get(max(run.evaluations, default=0)) if run else None
            point = _point(row, sets, last or own)
            points.append(point)
            if run is not None and point.kind in (MEMBER, BASELINE):
                runs.append(replace(run, name=point.label, kind=point.kind))
        base = [point for point in points if point.kind == BASE]
        if not sets or len(base) != 1 or any(name not in base[0].sets for name in sets):
            raise ValueError("expected one base, measured on every set")
    return Findings(directory=directory, family=True, model=str(table.get("model", "")), seed=seed, sets=tuple(sets),
                    runs=tuple(runs), environment=environment,
                    points=(*base, *(point for point in points if point.kind != BASE)))


def _point(row: Mapping[str, Any], sets: Sequence[str], responses: Path | None) -> Point:
    """A point of family.json. Raises: what `_whole` catches."""
    alpha, weight, seconds = (typed(row[key], float | None) for key in ("alpha", "weight", "seconds"))
    kind = typed(row["kind"], str)
    if kind not in KINDS or (kind == MEMBER and alpha is None) or (kind == BLEND and weight is None):
        raise ValueError(f"{kind!r} is no kind of point, or lacks its alpha or weight")
    return Point(name=typed(row["name"], str), kind=kind, alpha=alpha, weight=weight, seconds=seconds,
                 responses=responses, sets={name: _measured(each["summary"], each["comparison"])
                                            for name, each in typed(row["sets"], dict[str, Any]).items()
                                            if name in sets})


def _run(directory: Path) -> Run:
    path = directory / "summary.json"
    summary, settings = _summary(path) if path.exists() else None, _settings(directory / "config.yaml")
    metrics = _metrics(directory / "metrics.jsonl")
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
    if not is_number(alpha) or any(settings.get(field, value) != value for field, value in usual.items()):
        return None, None
    if all(settings.get(field, value) == value for field, value in moving.items()):
        return alpha, alpha
    if summary is None or "alpha_start" not in summary:     # of an earlier version: "alpha" is the configured one
        return None, None
    return summary["alpha_start"], summary["alpha"]


def is_number(value: Any) -> bool:
    """Whether a value can be computed with and drawn: NaN, infinity and true are no such numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


def _summary(path: Path) -> dict[str, Any]:
    """summary.json, of this or an earlier version. Raises: UserError."""
    table = _json(path)
    with _whole(path, "a run's results"):
        for key in ("alpha", "wall_s", "token_ratio", "accuracy_change", *({"alpha_start"} & table.keys())):
            typed(table[key], float)
        for key in ("base", "trained"):
            typed(table[key]["accuracy"], float)
            typed(table[key]["tokens"], float)
        typed(table.get("sets", {}), dict[str, dict[str, Any]])
    return table


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, of which everything that is drawn is a number or missing. Raises: UserError."""
    try:
        rows = read_json_lines(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    for row in rows:
        for key, value in row.items():
            if not is_number(value) and (key == "step" or (value is not None and key.startswith(DRAWN))):
                raise UserError(f"{path}: {key} of step {str(row['step'])[:20]} must be a number, got "
                                f"{str(value)[:40]!r}; repair or remove it")
    return rows


def _inside(directory: Path, named: str | None) -> Path | None:
    """The directory of a point, also where the family was moved as a whole; never one outside it."""
    candidates = [directory / named, directory / Path(named).name] if named else []
    return next((path for path in candidates
                 if path.is_dir() and path.resolve().is_relative_to(directory.resolve())), None)


def _measured(summary: dict[str, Any], comparison: dict[str, Any] | None) -> Measured:
    """A model on a set, of which every value is of its type. Raises: what `_whole` catches."""
    found = Measured(summary=summary_from_table(summary),
                     comparison=None if comparison is None else comparison_from_table(comparison))
    typed(found, Measured)
    if not found.summary.budgets or (found.comparison is not None and not found.comparison.by_difficulty):
        raise ValueError("budgets and by_difficulty must not be empty")
    return found


def typed(value: Any, kind: Any) -> Any:
    """A value of a type, which may be made of others: int | None, dict[str, float], a dataclass.

    A whole number is a float too. Raises: TypeError, with what was expected and found."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        simple = [each for each in inner if each is not type(None)]
        return value if value is None and len(simple) < len(inner) else typed(value, simple[0])
    if dataclasses.is_dataclass(kind):
        matches = isinstance(value, typing.cast(type, kind))
        for name, each in typing.get_type_hints(kind).items() if matches else ():
            typed(getattr(value, name), each)
    elif kind is float or kind is int:
        matches = is_number(value) and (kind is float or isinstance(value, int))
    else:
        matches = isinstance(value, origin or kind)
    if not matches:
        raise TypeError(f"expected {getattr(kind, '__name__', kind)}, got {str(value)[:40]!r}")
    if origin is tuple and inner[-1] is not ...:
        if len(value) != len(inner):
            raise TypeError(f"expected {len(inner)} values, got {str(value)[:40]!r}")
        for each, of in zip(value, inner, strict=True):
            typed(each, of)
    elif origin in (list, tuple):
        for each in value:
            typed(each, inner[0])
    elif origin is dict:
        for key, each in value.items():
            typed(key, inner[0])
            typed(each, inner[1])
    return value


@contextlib.contextmanager
def _whole(path: Path, what: str) -> Iterator[None]:
    """Turns what a damaged table does to its reader into one line that names the file."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path}: not {what}: {error} is missing") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not {what}: {' '.join(str(error).split())}") from None


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
    if not isinstance(table, dict | None):
        raise UserError(f"{path}: must hold sections of settings, got {type(table).__name__}")
    return {f"{section}.{name}": value for section, fields in (table or {}).items() if isinstance(fields, dict)
            for name, value in fields.items()}


def differing(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings that are not at their default."""
    defaults = {setting.field: setting.default for setting in all_settings(Config)}
    return ((field, value) for field, value in settings.items() if field not in defaults or defaults[field] != value)
