"""Rows of the data sets of a path: presets, Hub ids, files and folders, tiny."""

import contextlib
import dataclasses
import difflib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from effreason.data import answers, columns, files
from effreason.data.files import Rows
from effreason.data.hub import hub_rows
from effreason.data.presets import PRESETS, Preset
from effreason.data.tiny import tasks
from effreason.runtime.config import Config, DataConfig
from effreason.runtime.errors import UserError

TINY_PROBLEMS = 3000                # of tiny, to train on
TINY_HELD_OUT = 1500                # of tiny, to evaluate on
TINY_NOVEL = 200                    # of each tiny set that training never sees
BUILT_IN = ("tiny", *tasks.NOVEL)
SINGLE_LEVEL = "all"                # of a set without levels
NO_LEVEL = "none"                   # of a row without one in a set that has them
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow", ".txt", ".gz", ".bz2", ".xz",
            ".zst")
WITHOUT_TEXT, WITHOUT_ANSWER = "has no problem text", "has no answer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One problem of a data set, before it is a prompt."""

    number: int                     # of its row in the source
    text: str
    reference: str
    level: str = SINGLE_LEVEL
    kind: str = "math"              # math | choice | text
    choices: tuple[str, ...] = ()
    is_messages: bool = False       # the problem is the user's turn of a conversation
    is_mended: bool = False         # LaTeX had lost its backslashes
    columns: str = ""               # the whole row, a JSON object; "" = not kept


@dataclasses.dataclass(frozen=True)
class Unusable:
    """A row that has no problem or no answer."""

    number: int                     # of its row in the source
    location: str                   # file and line, or data set and row
    reason: str                     # WITHOUT_TEXT | WITHOUT_ANSWER
    text: str                       # of the problem, "" if it has none


@dataclasses.dataclass(frozen=True)
class Spec:
    """One of the data sets that a path names."""

    name: str                       # org/name@revision for a commit, tag or branch on the Hub
    weight: float | None = None     # share of a mixture, relative to the others; None = no weights


@dataclasses.dataclass(frozen=True)
class _Columns:
    """How to read a row."""

    problem: str
    answer: str
    answer_from: str
    kind: str
    choices: str | None = None
    require_choices: bool = True    # a row without them is an error
    level: str | None = None
    require_level: bool = True      # a set in which no row has one is an error
    drop_system: bool = False       # of messages: data.system_prompt takes the place of theirs
    keeps_row: bool = False         # as text, for a grader of the user's


def parse(path: str, field: str, *, weights: bool = True) -> tuple[Spec, ...]:
    """Returns the data sets of a path: `gsm8k`, `gsm8k,math`, `gsm8k=0.3,math=0.7`.

    A path that exists is one data set, whatever characters its name contains. `field` of the
    configuration is for messages; without `weights` none may be given."""
    if os.path.exists(path):
        return (Spec(path),)

    specs = []
    for part in path.split(","):
        part = part.strip()
        is_plain = os.path.exists(part) or "=" not in part
        name, equals, number = (part, "", "") if is_plain else part.rpartition("=")
        name = name.strip()
        if not name:
            raise UserError(f"{field} must name data sets with commas between them, got {path!r}")
        if equals and not weights:
            raise UserError(f"{field} takes no weights, got {part!r}")
        weight = _parse_weight(number, f"{field}: the weight of {name}") if equals else None
        specs.append(Spec(name, weight))

    if len({spec.weight is None for spec in specs}) > 1:
        raise UserError(f"{field} must give a weight to each set or to none, got {path!r}")
    if len({spec.name for spec in specs}) < len(specs):
        raise UserError(f"{field} must name each set once, got {path!r}")
    return tuple(specs)


def evaluation_path(config: Config) -> str | None:
    """Returns evaluation.path; if it is null the sets of data.path, if all have a test split.

    Returns None if there are none and evaluation.problems is 0. Raises: UserError."""
    if config.evaluation.path is not None:
        return config.evaluation.path
    names = [spec.name for spec in parse(config.data.path, "data.path")]
    if all(name == "tiny" or name in PRESETS and has_test(name) for name in names):
        return ",".join(names)
    if config.evaluation.problems:
        raise UserError("evaluation.path must name held-out problems, or evaluation.problems must "
                        "be 0, when data.path is not tiny or a preset with a test split, got null "
                        f"and {config.evaluation.problems}")
    return None


def check(path: str, data: DataConfig, field: str, *, held_out: bool = False,
          split: str | None = None) -> None:
    """Raises UserError for a data set that cannot exist, before anything is read or downloaded.

    Args:
        held_out: the part to evaluate on.
        split: instead of the sets' own; None = data.split for the part to train on. The field
            data.exclude uses the part to evaluate on if there is one, and the sets' own splits."""
    training = not held_out and field != "data.exclude"
    specs = parse(path, field, weights=training)
    if field == "data.exclude":
        split = None
    elif training and split is None:
        split = data.split

    if split is not None and all(spec.name not in PRESETS and os.path.isfile(spec.name)
                                 for spec in specs):
        raise UserError(f"{'data' if training else 'evaluation'}.split is for sets of several "
                        f"splits; {field} names {'a file' if len(specs) == 1 else 'files'} "
                        f"without, got {split!r}")
    for spec in specs:
        if spec.name in PRESETS:
            is_test = has_test(spec.name) if field == "data.exclude" else held_out
            _local_copy(spec.name, data, is_test, split)
        elif spec.name in BUILT_IN:
            if training:
                _check_trainable(spec.name, field)
        elif not Path(spec.name).exists():
            _check_hub_id(spec.name, field)


def takes_subset(name: str) -> bool:
    """Returns whether data.subset applies to a set: an id on the Hub, or a folder of data files."""
    return (name not in BUILT_IN and name not in PRESETS and not os.path.isfile(name)
            and not files.is_saved(Path(name)))


def has_test(name: str) -> bool:
    """Returns whether a set can be evaluated on: all but presets without a test split."""
    return name not in PRESETS or PRESETS[name].test is not None


def read(name: str, data: DataConfig, *, held_out: bool, split: str | None = None,
         field: str = "data.path",
         keeps_rows: bool = False) -> tuple[list[Row], list[Unusable]]:
    """Returns the rows of a data set, and those without a problem or an answer.

    A preset's name takes precedence over a path, a path over an id on the Hub.

    Args:
        name: as `parse` returns it.
        held_out: the part to evaluate on, not the one to train on.
        split: instead of the set's own.
        field: of the configuration, for messages.
        keeps_rows: each row is kept as text, with all its columns."""
    if name in BUILT_IN:
        if not held_out:
            _check_trainable(name, field)
        return _built_in_rows(name, held_out), []

    if name in PRESETS:
        layout, rows = _preset_rows(name, data, held_out, split)
    else:
        layout = _Columns(data.problem_field, data.answer_field, data.answer_from,
                          data.answer_kind, data.choices_field, level=data.level_field,
                          drop_system=data.system_prompt is not None)
        split = split or ("test" if held_out else "train")
        if os.path.exists(name):
            rows = files.path_rows(Path(name), data.subset, split)
        else:
            _check_hub_id(name, field)
            rows = hub_rows(name, data.subset, split)

    layout = dataclasses.replace(layout, keeps_row=keeps_rows)
    usable: list[Row] = []
    unusable: list[Unusable] = []
    for number, (location, values) in enumerate(rows):
        row = _parse_row(number, values, layout, location)
        if isinstance(row, Row):
            usable.append(row)
        else:
            unusable.append(row)
    if not usable:
        raise UserError(_all_unusable(name, unusable, layout))
    if layout.level is not None and all(row.level == NO_LEVEL for row in usable):
        if layout.require_level:
            raise UserError(f"{name}: no row has a level in column {layout.level!r}")
        usable = [dataclasses.replace(row, level=SINGLE_LEVEL) for row in usable]
    return usable, unusable


def _all_unusable(name: str, unusable: Sequence[Unusable], layout: _Columns) -> str:
    if not unusable:
        return f"{name}: has no rows"

    last, scope = unusable[-1], f"and so in all {len(unusable)} rows of {name}"
    if any(row.reason != last.reason for row in unusable):
        scope = f"and one or the other in all {len(unusable)} rows of {name}"
    if last.reason == WITHOUT_TEXT:
        return f"{last.location}: no problem in column {layout.problem!r}, {scope}"
    return (f"{last.location}: no answer in column {layout.answer!r} as data.answer_from = "
            f"{layout.answer_from} reads it, {scope}")


def _parse_weight(number: str, description: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(f"{description} must be a positive number, got {number.strip()!r}")
    return weight


def _check_hub_id(name: str, field: str) -> None:
    """Raises UserError for a name that is no preset, no path, and does not look like a Hub id."""
    bare, at, revision = name.partition("@")
    if at and (bare in BUILT_IN or bare in PRESETS):
        hub = PRESETS[bare].hub if bare in PRESETS else None
        raise UserError(f"{field}: {bare} takes no revision, got {name!r}"
                        + (f"; the set itself is {hub}@{revision}" if hub else ""))

    if HUB_ID.fullmatch(name) and not bare.lower().endswith(SUFFIXES):
        return
    if (Path(bare).suffix.lower() in SUFFIXES or bare.count("/") > 1
            or name.startswith(("/", ".", "~"))):
        raise UserError(f"{field}: {name} does not exist")

    similar = difflib.get_close_matches(bare.lower(), [*BUILT_IN, *PRESETS], n=1)
    hint = f"did you mean {similar[0]}?" if similar else f"presets are {', '.join(PRESETS)}"
    raise UserError(f"{field} names {name!r}, which is no preset, no file and no id on the "
                    f"Hugging Face Hub; {hint}")


def _check_trainable(name: str, field: str) -> None:
    if name in tasks.NOVEL:
        raise UserError(f"{field}: {name} is only for evaluation; the set to train on is tiny")


def _built_in_rows(name: str, held_out: bool) -> list[Row]:
    if name == "tiny":
        stream = tasks.distinct(0, held_out=held_out)
        count = TINY_HELD_OUT if held_out else TINY_PROBLEMS
    else:
        stream, count = tasks.novel(name), TINY_NOVEL
    return [Row(number=number, text=task.text, reference=task.answer, level=task.level)
            for number, task in enumerate(itertools.islice(stream, count))]


def _local_copy(name: str, data: DataConfig, held_out: bool, split: str | None) -> Path | None:
    """Returns the file of a preset's local copy, None for the Hub; UserError without the split."""
    preset = PRESETS[name]
    own_split, purpose = (preset.test, "evaluate on") if held_out else (preset.train, "train on")
    if split is None and own_split is None:
        raise UserError(f"{name}: the set has no split to {purpose}")

    if data.directory is not None:
        file_name = f"{split or ('test' if held_out else 'train')}.jsonl"
        file = Path(data.directory) / (preset.folder or name) / file_name
        if not file.exists():
            raise UserError(f"{file}: does not exist; data.directory must contain the local copy "
                            f"of {name}")
        return file
    if preset.hub is None:
        raise UserError(f"{name}: is not on the Hugging Face Hub; data.directory must name the "
                        "folder of local copies")
    return None


def _preset_rows(name: str, data: DataConfig, held_out: bool,
                 split: str | None) -> tuple[_Columns, Rows]:
    preset, file = PRESETS[name], _local_copy(name, data, held_out, split)
    if file is not None:
        layout = _Columns("problem", "answer", "whole", preset.kind, "choices",
                          require_choices=False, level="level", require_level=False)
        return layout, files.file_rows(file)

    assert preset.hub is not None
    split = split or str(preset.test if held_out else preset.train)
    rows: Rows = itertools.chain.from_iterable(
        hub_rows(preset.hub, subset, split) for subset in preset.subsets)
    is_shaped = preset.shape is not None
    layout = _Columns(
        "problem" if is_shaped else preset.problem, "answer" if is_shaped else preset.answer,
        preset.answer_from, preset.kind, preset.choices, level=preset.level, require_level=False)
    return layout, _shaped(rows, preset) if is_shaped else rows


def _shaped(rows: Rows, preset: Preset) -> Rows:
    assert preset.shape is not None
    for location, row in rows:
        try:
            yield location, preset.shape(row)
        except KeyError as error:
            raise UserError(f"{location}: has no field {error}, found {', '.join(row)}"
                            ) from None


def _parse_row(number: int, row: dict[str, Any], layout: _Columns,
               location: str) -> Row | Unusable:
    value = _field(row, layout.problem, location)
    turns = columns.messages(value)
    with _located(location, layout.problem):
        text = columns.as_text(value) if turns is None else columns.user_text(
            turns, drop_system=layout.drop_system)
    if not text.strip():
        return Unusable(number, location, WITHOUT_TEXT, text)

    answer = _field(row, layout.answer, location)
    choices: tuple[str, ...] = ()
    with _located(location, layout.answer):
        reference = answers.reference(answer, layout.answer_from)
    if not reference:
        return Unusable(number, location, WITHOUT_ANSWER, text)

    if layout.kind == "choice":
        listed = None
        if layout.choices is not None and (layout.require_choices or layout.choices in row):
            listed = _field(row, layout.choices, location)
        with _located(location):
            text, reference, choices = answers.choose(text, answer, reference, listed)
    return Row(number=number, text=text, reference=reference, level=_level(row, layout, location),
               kind=layout.kind, choices=choices, is_messages=turns is not None,
               is_mended=columns.is_damaged(value) or columns.is_damaged(answer),
               columns=json.dumps(row, ensure_ascii=False, default=str) if layout.keeps_row else "")


def _level(row: dict[str, Any], layout: _Columns, location: str) -> str:
    if layout.level is None:
        return SINGLE_LEVEL
    try:
        value = columns.lookup(row, layout.level)
    except LookupError:
        return NO_LEVEL
    with _located(location, layout.level):
        return columns.as_text(value).strip() or NO_LEVEL


def _field(row: dict[str, Any], field: str, location: str) -> Any:
    try:
        return columns.lookup(row, field)
    except LookupError as error:
        raise UserError(f"{location}: {error.args[0]}") from None


@contextlib.contextmanager
def _located(location: str, field: str | None = None) -> Iterator[None]:
    """Turns a ValueError about a value into a UserError that says which one it is."""
    try:
        yield
    except ValueError as error:
        name = "" if field is None else f"field {field!r} "
        raise UserError(f"{location}: {name}{error}") from None
