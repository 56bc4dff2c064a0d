"""Files on disk: written completely or not at all; every failure is one line naming the file."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from effreason.runtime.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turns an OSError, a full disk above all, into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, whose file replaces `path` when the block ends.

    The file is flushed to the disk (fsync) before it is renamed, so that a crash or a full disk
    leaves the previous file intact. After an error in the block the temporary file is removed.
    Raises: UserError if the file system refuses."""
    partial = path.with_name(path.name + ".partial")

    try:
        with disk(path):
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def check_present(path: Path) -> None:
    """Raises UserError if a file is missing, or only says where its content is.

    A clone without git-lfs leaves pointers, a copy of a cache without its blobs leaves links."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: is a link to {os.readlink(path)}, which does not exist; copy the "
                        "files themselves, as `cp -L` does")
    if not path.exists():
        raise UserError(f"{path}: file not found")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{path}: is a pointer of Git LFS, not the file itself; run `git "
                                "lfs pull` in its folder, or download it with `hf download`")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file. Raises: UserError that names the file."""
    try:
        check_present(path)
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:   # not UTF-8, or thousands of digits or brackets
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(table).__name__}")
    return table


def is_json(value: Any) -> bool:
    """Returns whether JSON can hold a value."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def append(path: Path, data: bytes) -> None:
    """Appends all of `data` or nothing: half a row must never precede the next one.

    Raises: UserError if the file system refuses."""
    with disk(path):
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as file:
                file.write(data)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise


def digest(path: Path) -> str | None:
    """Returns the SHA-256 of a file in hexadecimal; None if there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    """Writes an indented JSON file, completely or not at all. Raises: UserError."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def json_line(row: Mapping[str, Any]) -> bytes:
    """Returns an object as one line of UTF-8 JSON, newline included. Raises: ValueError for NaN."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    # A lone surrogate is not valid UTF-8, but the escape that replaces it is how JSON spells it.
    return text.encode("utf-8", "backslashreplace")


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads metrics.jsonl or rollouts.jsonl; [] if there is no file. Raises: UserError.

    Every row is an object with a "step". A last line that a crash cut off is left out."""
    path = Path(path)
    return [row for _, row in complete_lines(path)] if path.exists() else []


def complete_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields the lines of such a file, each as bytes and as the object it holds.

    Every write ends in a newline, so only a crash breaks a line, and only the last one."""
    broken = 0

    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if broken:
                raise UserError(f"{path}: line {broken} must be a JSON object with a step; "
                                "repair or remove it")
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None

            complete = isinstance(row, dict) and isinstance(row.get("step"), int)
            if complete and line.endswith(b"\n"):
                yield line, row
            else:
                broken = number
