"""Rows of JSONL and Parquet files and of folders written by `save_to_disk`, with their location."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effreason.runtime.errors import UserError

Rows = Iterator[tuple[str, dict[str, Any]]]     # location for messages, and the row
JSONL = "expected JSONL, one object a line"


def file_rows(path: Path, split: str) -> Rows:
    """Returns the rows of an existing file or folder. UserErrors name it, and the line of JSONL."""
    if path.is_dir():
        return _saved_rows(path, split)
    return _parquet_rows(path) if path.suffix == ".parquet" else jsonl_rows(path)


def jsonl_rows(path: Path) -> Rows:
    """Yields the rows of a JSONL file; unlike `datasets`, errors say which line is broken."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            location = f"{path}:{number}"
            yield location, _object(line, location)


def one_line(error: Exception) -> str:
    """Returns the message of a library's error on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _object(line: bytes, location: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{location}: is not UTF-8, byte 0x{line[error.start]:02x} at column "
                        f"{error.start + 1}; {JSONL}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{location}: not valid JSON ({error.msg} at column {error.colno}); "
                        f"{JSONL}") from None
    except (ValueError, RecursionError) as error:   # thousands of digits or brackets
        raise UserError(f"{location}: JSON that cannot be read ({one_line(error)}); {JSONL}"
                        ) from None
    if not isinstance(row, dict):
        raise UserError(f"{location}: {JSONL}, found {type(row).__name__}")
    return row


def _parquet_rows(path: Path) -> Rows:
    """Yields the rows of a Parquet file; unlike `datasets`, an error is one line."""
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path}:{number}", row
                    number += 1
    except Exception as error:      # OSError, UnicodeDecodeError, or pyarrow's own
        raise UserError(f"{path}: cannot be read as Parquet ({one_line(error)})") from None


def _saved_rows(path: Path, split: str) -> Rows:
    """Yields the rows of a folder written by `save_to_disk`."""
    import datasets  # takes half a second

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:      # a damaged folder is also a KeyError or a TypeError
        raise UserError(f"{path}: cannot be read by datasets ({type(error).__name__}: "
                        f"{one_line(error)})") from None

    if not isinstance(saved, datasets.Dataset):
        if split not in saved:
            raise UserError(f"{path}: has no split {split!r}, found {', '.join(saved)}; data.split "
                            "or evaluation.split must name one of them")
        saved = saved[split]
    for number, row in enumerate(saved):
        yield f"{path}:{number}", row
