"""Rows of files: JSONL, Parquet, folders written by `save_to_disk`. Each comes with its place, for messages."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effreason.runtime.errors import UserError

Rows = Iterator[tuple[str, dict[str, Any]]]
JSONL = "expected JSONL, one object a line"


def file_rows(path: Path, split: str) -> Rows:
    """Rows of a file or folder that exists. Raises: UserError that names it, and the line of a JSONL file."""
    if path.is_dir():
        return _saved_rows(path, split)
    return _parquet_rows(path) if path.suffix == ".parquet" else jsonl_rows(path)


def jsonl_rows(path: Path) -> Rows:
    """Rows of a JSONL file, read here and not by `datasets`, which cannot say which line is broken."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, _object(line, place)


def one_line(error: Exception) -> str:
    """What a library says, in one line of its message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: is not UTF-8, byte 0x{line[error.start]:02x} at column {error.start + 1}; {JSONL}"
                        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON ({error.msg} at column {error.colno}); {JSONL}") from None
    except (ValueError, RecursionError) as error:      # a number of thousands of digits, thousands of brackets
        raise UserError(f"{place}: JSON that cannot be read ({one_line(error)}); {JSONL}") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: {JSONL}, found {type(row).__name__}")
    return row


def _parquet_rows(path: Path) -> Rows:
    """Rows of a Parquet file, read without `datasets`, which logs more than the one line that is its error."""
    import pyarrow.parquet  # with `datasets`; only where it is needed

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path}:{number}", row
                    number += 1
    except Exception as error:      # OSError, one of pyarrow's, UnicodeDecodeError
        raise UserError(f"{path}: cannot be read as Parquet ({one_line(error)})") from None


def _saved_rows(path: Path, split: str) -> Rows:
    """Rows of a folder written by `save_to_disk`."""
    import datasets  # half a second: only where it is needed

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:      # a damaged folder is also a KeyError or a TypeError
        raise UserError(f"{path}: cannot be read by datasets ({type(error).__name__}: {one_line(error)})") from None
    if not isinstance(saved, datasets.Dataset):
        if split not in saved:
            raise UserError(f"{path}: has no split {split!r}, found {', '.join(saved)}; data.split or evaluation.split "
                            "must name one of them")
        saved = saved[split]
    for number, row in enumerate(saved):
        yield f"{path}:{number}", row
