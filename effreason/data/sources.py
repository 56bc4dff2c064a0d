"""From a data.path to rows: presets, ids on the Hugging Face Hub, JSONL, Parquet, saved folders, the tiny world."""

import dataclasses
import difflib
import itertools
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effreason.data import answers, files
from effreason.data import hub as downloads
from effreason.data.files import Rows
from effreason.data.presets import PRESETS, Preset
from effreason.data.tiny import tasks
from effreason.runtime.config import DataConfig
from effreason.runtime.errors import UserError

TINY_PROBLEMS = 3000                # the training set of the tiny world
TINY_HELD_OUT = 1500                # and of its held-out problems
TINY_NOVEL = 200                    # each of its sets that training never sees
EMBEDDED = ("tiny", *tasks.NOVEL)
ONE_LEVEL = "all"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".arrow", ".txt")
WITHOUT_TEXT, WITHOUT_ANSWER = "has no problem text", "has no answer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One problem of a data set, before it is a prompt."""

    number: int                     # of its row in the source
    text: str
    reference: str
    level: str = ONE_LEVEL
    kind: str = "math"              # math | choice | text
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Unusable:
    """A row that is no problem."""

    number: int                     # of its row in the source
    place: str                      # file and line, or set and row
    reason: str                     # WITHOUT_TEXT | WITHOUT_ANSWER
    text: str                       # of the problem, "" where it has none


@dataclasses.dataclass(frozen=True)
class Spec:
    """One of the sets that a path names."""

    name: str                       # org/name@revision for a commit, tag or branch of a set on the Hub
    weight: float | None = None     # share of a mixture, relative to the others; None = the path gives no weights


@dataclasses.dataclass(frozen=True)
class _Columns:
    """How a row is read."""

    problem: str
    answer: str
    answer_from: str
    kind: str
    choices: str | None = None
    choices_must: bool = True       # a row without them is an error
    level: str | None = None
    level_must: bool = True
    nulls: bool = False             # a null as text or answer is a row to leave out, not an error


def parse(path: str, field: str, *, weights: bool = True) -> tuple[Spec, ...]:
    """The sets that a path names: `gsm8k`, `gsm8k,math`, `gsm8k=0.3,math=0.7`.

    Args: path, one or more sets with commas between them; field, of the configuration, for messages; weights, whether
        they may be given. A path that exists is one set, whatever its name holds.
    Raises: UserError for an empty name, a weight that is no positive number, or weights for only some."""
    if os.path.exists(path):
        return (Spec(path),)
    specs = []
    for part in path.split(","):
        part = part.strip()
        name, equals, number = (part, "", "") if os.path.exists(part) or "=" not in part else part.rpartition("=")
        if not name.strip():
            raise UserError(f"{field} must name data sets with commas between them, got {path!r}")
        if equals and not weights:
            raise UserError(f"{field} takes no weights, got {part!r}")
        specs.append(Spec(name.strip(), _weight(number, f"{field}: the weight of {name.strip()}") if equals else None))
    if len({spec.weight is None for spec in specs}) > 1:
        raise UserError(f"{field} must give a weight to each set or to none, got {path!r}")
    if len({spec.name for spec in specs}) < len(specs):
        raise UserError(f"{field} must name each set once, got {path!r}")
    return tuple(specs)


def check(path: str, data: DataConfig, field: str, *, held_out: bool = False, split: str | None = None) -> None:
    """Raises UserError for a set that is surely not there, before anything is read; the Hub is not asked.

    Args: held_out, the part to evaluate on; split, instead of the sets' own, None = data.split for the part to train
        on. The field data.exclude has the part to evaluate on of sets that have one, and the sets' own splits."""
    training = not held_out and field != "data.exclude"
    specs = parse(path, field, weights=training)
    if field == "data.exclude":
        split = None
    elif training and split is None:
        split = data.split
    if split is not None and all(_is_file(spec.name) for spec in specs):
        raise UserError(f"{'data' if training else 'evaluation'}.split is for sets of several splits; {field} names "
                        f"{'a file' if len(specs) == 1 else 'files'} without, got {split!r}")
    for spec in specs:
        if spec.name in PRESETS:
            _local_copy(spec.name, data, has_test(spec.name) if field == "data.exclude" else held_out, split)
        elif spec.name in EMBEDDED:
            if training:
                _check_trainable(spec.name, field)
        elif not Path(spec.name).exists():
            _check_id(spec.name, field)


def takes_subset(name: str) -> bool:
    """A set that data.subset is for: on the Hub, by its id."""
    return name not in EMBEDDED and name not in PRESETS and not os.path.exists(name)


def read(name: str, data: DataConfig, *, held_out: bool, split: str | None = None,
         field: str = "data.path") -> tuple[list[Row], list[Unusable]]:
    """The rows of one set, and those that have no problem's text or no answer.

    Args: name, as `parse` gives it; held_out, the part to evaluate on and not the one to train on; split, instead of
        the set's own; field, of the configuration, for messages. A preset's name comes before a path, a path before an
        id on the Hub.
    Raises: UserError that names the set, or file and line."""
    if name in EMBEDDED:
        if not held_out:
            _check_trainable(name, field)
        return _embedded_rows(name, held_out), []
    if name in PRESETS:
        columns, rows = _preset_rows(name, data, held_out, split)
    else:
        columns = _Columns(data.problem_field, data.answer_field, data.answer_from, data.answer_kind,
                           data.choices_field, level=data.level_field)
        usual = "test" if held_out else "train"
        if os.path.exists(name):
            rows = files.file_rows(Path(name), split or usual)
        else:
            _check_id(name, field)
            columns = dataclasses.replace(columns, nulls=True)
            rows = downloads.hub_rows(name, data.subset, split or usual)
    found: list[Row] = []
    unusable: list[Unusable] = []
    for number, (place, row) in enumerate(rows):
        made = _row(number, row, columns, place)
        if isinstance(made, Row):
            found.append(made)
        else:
            unusable.append(made)
    if not found:
        raise UserError(_all_unusable(name, unusable, columns))
    return found, unusable


def _all_unusable(name: str, unusable: Sequence[Unusable], columns: _Columns) -> str:
    if not unusable:
        return f"{name}: has no rows"
    last, which = unusable[-1], f"and so in all {len(unusable)} rows of {name}"
    if any(row.reason != last.reason for row in unusable):
        which = f"and one or the other in all {len(unusable)} rows of {name}"
    if last.reason == WITHOUT_TEXT:
        return f"{last.place}: no problem in column {columns.problem!r}, {which}"
    return (f"{last.place}: no answer in column {columns.answer!r} as data.answer_from = {columns.answer_from} reads "
            f"it, {which}")


def has_test(name: str) -> bool:
    """A set to evaluate on: all but those presets that are for training alone."""
    return name not in PRESETS or PRESETS[name].test is not None


def _weight(number: str, what: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(f"{what} must be a positive number, got {number.strip()!r}")
    return weight


def _is_file(name: str) -> bool:
    return name not in PRESETS and os.path.isfile(name)


def _check_id(name: str, field: str) -> None:
    """A name that is no preset and no path must at least look like an id on the Hub."""
    bare, at, revision = name.partition("@")
    if at and (bare in EMBEDDED or bare in PRESETS):
        hub = PRESETS[bare].hub if bare in PRESETS else None
        raise UserError(f"{field}: {bare} takes no revision, got {name!r}"
                        + (f"; the set itself is {hub}@{revision}" if hub else ""))
    if HUB_ID.fullmatch(name) and not bare.lower().endswith(SUFFIXES):
        return
    if Path(bare).suffix.lower() in SUFFIXES or bare.count("/") > 1 or name.startswith(("/", ".", "~")):
        raise UserError(f"{field}: {name} does not exist")
    near = difflib.get_close_matches(bare.lower(), [*EMBEDDED, *PRESETS], n=1)
    raise UserError(f"{field} names {name!r}, which is no preset, no file and no id on the Hugging Face Hub; "
                    + (f"did you mean {near[0]}?" if near else f"presets are {', '.join(PRESETS)}"))


def _check_trainable(name: str, field: str) -> None:
    if name in tasks.NOVEL:
        raise UserError(f"{field}: {name} is a set to evaluate on alone; the one to train on is tiny")


def _embedded_rows(name: str, held_out: bool) -> list[Row]:
    if name == "tiny":
        drawn, count = tasks.distinct(0, held_out=held_out), TINY_HELD_OUT if held_out else TINY_PROBLEMS
    else:
        drawn, count = tasks.novel(name), TINY_NOVEL
    return [Row(number=number, text=task.text, reference=task.answer, level=task.level)
            for number, task in enumerate(itertools.islice(drawn, count))]


def _local_copy(name: str, data: DataConfig, held_out: bool, split: str | None) -> Path | None:
    """The file of a preset's local copy, None for the Hub. Raises: UserError where the set has no such part."""
    preset = PRESETS[name]
    own, role = (preset.test, "evaluate on") if held_out else (preset.train, "train on")
    if split is None and own is None:
        raise UserError(f"{name}: the set has no split to {role}")
    if data.directory is not None:
        file = Path(data.directory) / (preset.folder or name) / f"{split or ('test' if held_out else 'train')}.jsonl"
        if not file.exists():
            raise UserError(f"{file}: not there, and data.directory says that the local copy of {name} is")
        return file
    if preset.hub is None:
        raise UserError(f"{name}: is not on the Hugging Face Hub; data.directory must name the folder of local copies")
    return None


def _preset_rows(name: str, data: DataConfig, held_out: bool,
                 split: str | None) -> tuple[_Columns, Rows]:
    preset, file = PRESETS[name], _local_copy(name, data, held_out, split)
    if file is not None:
        return _Columns("problem", "answer", "whole", preset.kind, "choices", choices_must=False,
                        level="level", level_must=False), files.jsonl_rows(file)
    assert preset.hub is not None
    own = preset.test if held_out else preset.train
    rows: Rows = itertools.chain.from_iterable(
        downloads.hub_rows(preset.hub, subset, split or str(own)) for subset in preset.subsets)
    return _hub_columns(preset), rows if preset.shape is None else _shaped(rows, preset)


def _hub_columns(preset: Preset) -> _Columns:
    problem, answer = ("problem", "answer") if preset.shape else (preset.problem, preset.answer)
    return _Columns(problem, answer, preset.answer_from, preset.kind, preset.choices, level=preset.level,
                    level_must=False, nulls=True)


def _shaped(rows: Rows, preset: Preset) -> Rows:
    assert preset.shape is not None
    for place, row in rows:
        try:
            yield place, preset.shape(row)
        except KeyError as error:
            raise UserError(f"{place}: has no field {error}, found {_names(row)}") from None


def _row(number: int, row: dict[str, Any], columns: _Columns, place: str) -> Row | Unusable:
    """The row as a problem, if it is one."""
    text = _text(row, columns.problem, place, null=columns.nulls)
    if not text.strip():
        return Unusable(number, place, WITHOUT_TEXT, text)
    reference = answers.extract(_text(row, columns.answer, place, null=columns.nulls), columns.answer_from)
    if not reference:
        return Unusable(number, place, WITHOUT_ANSWER, text)
    level = ONE_LEVEL
    if columns.level is not None and (columns.level_must or row.get(columns.level) is not None):
        level = _text(row, columns.level, place)
    if columns.kind != "choice":
        return Row(number=number, text=text, reference=reference, level=level, kind=columns.kind)
    listed = None
    if columns.choices is not None and (columns.choices_must or columns.choices in row):
        if columns.choices not in row:
            raise UserError(f"{place}: has no field {columns.choices!r}, found {_names(row)}")
        listed = row[columns.choices]
    try:
        text, reference, choices = answers.choose(text, row[columns.answer], reference, listed)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
    return Row(number=number, text=text, reference=reference, level=level, kind="choice", choices=choices)


def _text(row: dict[str, Any], field: str, place: str, *, null: bool = False) -> str:
    """A field as text. Args: null, whether a null is "" and not an error."""
    if field not in row:
        raise UserError(f"{place}: has no field {field!r}, found {_names(row)}")
    if null and row[field] is None:
        return ""
    try:
        return answers.as_text(row[field])
    except ValueError as error:
        raise UserError(f"{place}: field {field!r} {error}") from None


def _names(row: dict[str, Any]) -> str:
    """Of a row's fields; JSON may name them by what is no Unicode."""
    return ", ".join(row).encode("utf-8", "backslashreplace").decode() or "none"
