"""From a data.path to rows: presets, ids on the Hugging Face Hub, JSONL, Parquet, saved folders, the tiny world."""

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

from effreason.errors import UserError
from effreason.problems import answers
from effreason.problems.presets import PRESETS, Preset
from effreason.runtime.config import DataConfig
from effreason.tiny import tasks

TINY_PROBLEMS = 3000                # the training set of the tiny world
TINY_HELD_OUT = 1500                # and of its held-out problems
ONE_LEVEL = "all"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".arrow", ".txt")
SAVED = ("state.json", "dataset_dict.json")      # what tells a folder written by save_to_disk
CONNECT_SECONDS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One problem of a data set, before it is a prompt."""

    number: int                     # of its row in the source
    text: str
    answer: str
    level: str = ONE_LEVEL
    kind: str = "math"              # math | choice | text
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Spec:
    """One of the sets that a path names."""

    name: str
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
    answer_must: bool = True        # no answer (null) is an error, not a row to leave out


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


def check(path: str, data: DataConfig, field: str, *, held_out: bool = False) -> None:
    """Raises UserError for a set that is surely not there, before anything is read; the Hub is not asked."""
    for spec in parse(path, field, weights=not held_out):
        if spec.name in PRESETS:
            _local_copy(spec.name, data, held_out, data.split if not held_out else None)
        elif spec.name != "tiny" and not Path(spec.name).exists():
            _check_id(spec.name, field)


def read(name: str, data: DataConfig, *, held_out: bool, split: str | None = None,
         field: str = "data.path") -> tuple[list[Row], int]:
    """The rows of one set, and how many it has beyond those because they have no answer.

    Args: name, as `parse` gives it; held_out, the part to evaluate on and not the one to train on; split, instead of
        the set's own; field, of the configuration, for messages. A preset's name comes before a path, a path before an
        id on the Hub.
    Raises: UserError that names the set, or file and line."""
    if name == "tiny":
        return _tiny_rows(held_out), 0
    if name in PRESETS:
        columns, rows = _preset_rows(name, data, held_out, split)
    else:
        columns = _Columns(data.problem_field, data.answer_field, data.answer_from, data.answer_kind,
                           data.choices_field, level=data.level_field)
        if os.path.exists(name):
            rows = _file_rows(Path(name), split, "test" if held_out else "train")
        else:
            _check_id(name, field)
            columns = dataclasses.replace(columns, answer_must=False)
            rows = _hub_rows(name, data.subset, split or ("test" if held_out else "train"))
    found, missing, place = [], 0, name
    for number, (place, row) in enumerate(rows):
        made = _row(number, row, columns, place)
        if made is None:
            missing += 1
        else:
            found.append(made)
    if not found and missing:
        raise UserError(f"{place}: no answer in column {columns.answer!r} as data.answer_from = {columns.answer_from} "
                        f"reads it, and so in all {missing} rows of {name}")
    if not found:
        raise UserError(f"{name}: has no rows")
    return found, missing


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


def _check_id(name: str, field: str) -> None:
    """A name that is no preset and no path must at least look like an id on the Hub."""
    if HUB_ID.fullmatch(name) and not name.lower().endswith(SUFFIXES):
        return
    if Path(name).suffix.lower() in SUFFIXES or name.count("/") > 1 or name.startswith(("/", ".", "~")):
        raise UserError(f"{field}: {name} does not exist")
    near = difflib.get_close_matches(name.lower(), ["tiny", *PRESETS], n=1)
    raise UserError(f"{field} names {name!r}, which is no preset, no file and no id on the Hugging Face Hub; "
                    + (f"did you mean {near[0]}?" if near else f"presets are {', '.join(PRESETS)}"))


def _tiny_rows(held_out: bool) -> list[Row]:
    drawn = tasks.distinct(0, held_out=held_out)
    return [Row(number=number, text=task.text, answer=task.answer, level=task.level)
            for number, task in enumerate(itertools.islice(drawn, TINY_HELD_OUT if held_out else TINY_PROBLEMS))]


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
                 split: str | None) -> tuple[_Columns, Iterator[tuple[str, dict[str, Any]]]]:
    preset, file = PRESETS[name], _local_copy(name, data, held_out, split)
    if file is not None:
        return _Columns("problem", "answer", "whole", preset.kind, "choices", choices_must=False,
                        level="level", level_must=False), _jsonl_rows(file)
    assert preset.hub is not None
    own = preset.test if held_out else preset.train
    rows: Iterator[tuple[str, dict[str, Any]]] = itertools.chain.from_iterable(
        _hub_rows(preset.hub, subset, split or str(own)) for subset in preset.subsets)
    return _hub_columns(preset), rows if preset.shape is None else _shaped(rows, preset)


def _hub_columns(preset: Preset) -> _Columns:
    problem, answer = ("problem", "answer") if preset.shape else (preset.problem, preset.answer)
    return _Columns(problem, answer, preset.answer_from, preset.kind, preset.choices, level=preset.level,
                    level_must=False, answer_must=False)


def _shaped(rows: Iterator[tuple[str, dict[str, Any]]], preset: Preset) -> Iterator[tuple[str, dict[str, Any]]]:
    assert preset.shape is not None
    for place, row in rows:
        try:
            yield place, preset.shape(row)
        except KeyError as error:
            raise UserError(f"{place}: has no field {error}, found {', '.join(row)}") from None


def _row(number: int, row: dict[str, Any], columns: _Columns, place: str) -> Row | None:
    """The row as a problem, or None where it has no answer."""
    text = _text(row, columns.problem, place)
    if row.get(columns.answer, "") is None and not columns.answer_must:
        return None
    answer = answers.extract(_text(row, columns.answer, place), columns.answer_from)
    if not answer:
        return None
    level = ONE_LEVEL
    if columns.level is not None and (columns.level_must or row.get(columns.level) is not None):
        level = _text(row, columns.level, place)
    if columns.kind != "choice":
        return Row(number=number, text=text, answer=answer, level=level, kind=columns.kind)
    listed = None
    if columns.choices is not None and (columns.choices_must or columns.choices in row):
        if columns.choices not in row:
            raise UserError(f"{place}: has no field {columns.choices!r}, found {', '.join(row) or 'none'}")
        listed = row[columns.choices]
    try:
        text, answer, choices = answers.choose(text, row[columns.answer], answer, listed)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
    return Row(number=number, text=text, answer=answer, level=level, kind="choice", choices=choices)


def _file_rows(path: Path, split: str | None, usual: str) -> Iterator[tuple[str, dict[str, Any]]]:
    is_saved = path.is_dir() or path.suffix == ".parquet"
    return _saved_rows(path, split or usual) if is_saved else _jsonl_rows(path)


def _saved_rows(path: Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a Parquet file or of a folder written by `save_to_disk`."""
    import datasets  # half a second: only where it is needed

    try:
        saved = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_parquet(str(path))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{path}: cannot be read by datasets ({_one_line(error)})") from None
    if not isinstance(saved, datasets.Dataset):
        if split not in saved:
            raise UserError(f"{path}: has no split {split!r}, found {', '.join(saved)}; data.split or evaluation.split "
                            "must name one of them")
        saved = saved[split]
    for number, row in enumerate(saved):
        yield f"{path}:{number}", row


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a JSONL file, read here and not by `datasets`, which cannot say which line is broken."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        yield f"{path}:{number}", row


def _hub_rows(name: str, subset: str | None, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a data set on the Hub."""
    for number, row in enumerate(_load_hub(name, subset, split)):
        yield f"{name}:{split}:{number}", row


def _load_hub(name: str, subset: str | None, split: str) -> Sequence[dict[str, Any]]:
    """Downloads a data set, or finds it in the cache where the Hub is switched off by HF_HUB_OFFLINE=1."""
    import datasets
    import huggingface_hub

    offline = huggingface_hub.constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE
    try:
        revision, saved = _hub_state(name, offline)
        if not saved:
            return datasets.load_dataset(name, subset, split=split, revision=revision)
        folder = datasets.load_from_disk(huggingface_hub.snapshot_download(
            name, repo_type="dataset", revision=revision, local_files_only=offline))
        return folder if isinstance(folder, datasets.Dataset) else folder[split]
    except Exception as error:      # of three libraries, which have no common ancestor but this
        raise UserError(f"{name}: {_hub_problem(error, subset, split, offline)}") from None


def _hub_state(name: str, offline: bool) -> tuple[str | None, bool]:
    """The commit of a data set's main branch, and whether it is a folder written by `save_to_disk`.

    Asked first, and once: `datasets` tries for half a minute before it says that the Hub is out of reach."""
    import huggingface_hub

    if offline:
        return None, any(isinstance(huggingface_hub.try_to_load_from_cache(name, mark, repo_type="dataset"), str)
                         for mark in SAVED)
    info = huggingface_hub.HfApi().dataset_info(name, timeout=CONNECT_SECONDS)
    return info.sha, any(sibling.rfilename in SAVED for sibling in info.siblings or ())


def _hub_problem(error: Exception, subset: str | None, split: str, offline: bool) -> str:
    """What went wrong with the Hub, and what to do about it."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    message = _one_line(error)
    if "GatedRepoError" in kinds or "gated" in message:
        return ("is gated: accept its conditions on its page on the Hugging Face Hub, then log in (hf auth login) or "
                "set HF_TOKEN")
    if "RepositoryNotFoundError" in kinds:
        return ("is no file here and not on the Hugging Face Hub, or private: check the name, or log in "
                "(hf auth login)")
    if "Config name is missing" in message or "BuilderConfig" in message:
        return (f"needs data.subset{'' if subset is None else f', which has no {subset!r}'} ({message})")
    if "Unknown split" in message or isinstance(error, KeyError):
        return f"has no split {split!r} ({message}); data.split or evaluation.split must name one"
    if offline:
        return "is no file here and not in the cache, and HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set"
    if {"TransportError", "ConnectionError", "TimeoutError"} & kinds:
        return ("is no file here, and the Hugging Face Hub cannot be reached: check the network, set HF_HUB_OFFLINE=1 "
                "to use the cache, or name local files")
    return f"cannot be read from the Hugging Face Hub ({message})"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _text(row: dict[str, Any], field: str, place: str) -> str:
    if field not in row:
        raise UserError(f"{place}: has no field {field!r}, found {', '.join(row) or 'none'}")
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{place}: field {field!r} must be text or a number, found {type(value).__name__}")
    return str(value)
