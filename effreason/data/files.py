"""Rows of data files and of folders of them, with their location. A file is what its content is."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from effreason.runtime.errors import UserError

Rows = Iterator[tuple[str, dict[str, Any]]]     # location for messages, and the row
JSONL = "expected JSONL, one object a line"
SAVED_FILES = ("state.json", "dataset_dict.json")   # only in folders written by save_to_disk
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
TABLES = (PARQUET, ARROW_FILE, ARROW_STREAM)
HEAD_BYTES = 64                     # say what a file is
NO_DATA = {                         # what is found in place of data
    b"version https://git-lfs": "is a Git LFS pointer, not the data: git lfs pull downloads it",
    b"PK\x03\x04": "is a ZIP archive or a spreadsheet: unpack it, or export it as CSV",
    b"<": "is a web page or XML, not data"}


def _unpack_zstd(data: bytes) -> bytes:
    import pyarrow

    with pyarrow.CompressedInputStream(io.BytesIO(data), "zstd") as stream:
        return stream.read()


COMPRESSIONS: dict[bytes, tuple[str, Callable[[bytes], bytes]]] = {     # by their first bytes
    b"\x1f\x8b": (".gz", gzip.decompress), b"BZh": (".bz2", bz2.decompress),
    b"\xfd7zXZ\0": (".xz", lzma.decompress), b"\x28\xb5\x2f\xfd": (".zst", _unpack_zstd)}


def path_rows(path: Path, subset: str | None, split: str) -> Rows:
    """Returns the rows of an existing file or folder.

    UserErrors name the file, and the line of a text or the row of a table."""
    if not path.is_dir():
        return file_rows(path)
    return _saved_rows(path, split) if is_saved(path) else _folder_rows(path, subset, split)


def is_saved(path: Path) -> bool:
    """Returns whether a folder was written by `save_to_disk`."""
    return any((path / name).exists() for name in SAVED_FILES)


def file_rows(path: Path) -> Rows:
    """Returns the rows of a file: JSONL, a JSON array, CSV, TSV, Parquet or Arrow.

    Text may be UTF-8 or UTF-16, and each may be compressed."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            if head.startswith(TABLES):
                return _table_rows(path, path)
            content = head + file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    content = _unpacked(content, path)
    if content.startswith(TABLES) or path.suffix == ".parquet":     # a damaged one by its name
        return _table_rows(io.BytesIO(content), path)
    if delimiter := DELIMITERS.get(_suffix(path)):
        return _csv_rows(_as_utf8(content, path), delimiter, path)
    return _json_rows(_as_utf8(content, path), path)


def one_line(error: Exception) -> str:
    """Returns the message of a library's error on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _unpacked(content: bytes, path: Path) -> bytes:
    """Returns a file's content without compression. UserError if it is no data."""
    try:
        for magic, (_, unpack) in COMPRESSIONS.items():
            if content.startswith(magic):
                content = unpack(content)
                break
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be unpacked ({one_line(error)})") from None

    for magic, description in NO_DATA.items():
        if content[:HEAD_BYTES].lstrip().startswith(magic):
            raise UserError(f"{path}: {description}")
    return content


def _as_utf8(content: bytes, path: Path) -> bytes:
    """Returns text without a byte order mark as UTF-8; what is neither that nor UTF-16 as it is."""
    encoding = json.detect_encoding(content[:4])
    try:
        return (content if encoding == "utf-8" else content.decode(encoding).encode()
                ).removeprefix(b"\xef\xbb\xbf")
    except UnicodeError as error:
        raise UserError(f"{path}: is no text in {encoding.upper()} ({one_line(error)})") from None


def _suffix(path: Path) -> str:
    """Returns a file's suffix, before that of its compression if there is one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes[-1:] in ([suffix] for suffix, _ in COMPRESSIONS.values())
    return "".join(suffixes[-2:-1] if compressed else suffixes[-1:])


def _json_rows(content: bytes, path: Path) -> Rows:
    """Yields the rows of JSONL or of one JSON array; unlike with `datasets`, errors say which line
    is broken. The location of an array's entry is its number, from 1."""
    lines = [(f"{path}:{number}", line) for number, line in enumerate(content.splitlines(), 1)
             if line.strip()]
    values = _document(content, lines)
    if values is None:
        values = ((location, _parse(line, location)) for location, line in lines)
    for location, value in values:
        yield location, _object(value, location)


def _document(content: bytes,
              lines: list[tuple[str, bytes]]) -> Iterable[tuple[str, Any]] | None:
    """Returns the entries of a file that is one JSON value, None if each line is one."""
    if not lines:
        return None
    (first, line), is_array = lines[0], content.lstrip().startswith(b"[")
    try:
        _parse(line, first)
        if len(lines) > 1 or not is_array:
            return None
    except UserError:
        if len(lines) == 1:
            raise

    try:
        value = _parse(content.lstrip(), first)
    except UserError:
        if is_array:
            raise
        return None                 # the error of the line says more
    path = first.rpartition(":")[0]
    entries = value if isinstance(value, list) else [value]
    return [(f"{path}:{number}", entry) for number, entry in enumerate(entries, 1)]


def _parse(text: bytes, location: str) -> Any:
    """Returns the value of a JSON text, which begins in the line of the location."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{location}: is not UTF-8, byte 0x{text[error.start]:02x} at column "
                        f"{error.start + 1}; {JSONL}") from None
    except json.JSONDecodeError as error:
        path, _, line = location.rpartition(":")
        raise UserError(f"{path}:{int(line) + error.lineno - 1}: not valid JSON ({error.msg} at "
                        f"column {error.colno}); {JSONL}") from None
    except (ValueError, RecursionError) as error:   # thousands of digits or brackets
        raise UserError(f"{location}: JSON that cannot be read ({one_line(error)}); {JSONL}"
                        ) from None


def _object(value: Any, location: str) -> dict[str, Any]:
    """Returns a row; that of a list of objects, as of a conversation, has the columns 0, 1, ..."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return {str(number): entry for number, entry in enumerate(value)}
    if not isinstance(value, dict):
        raise UserError(f"{location}: {JSONL}, found {type(value).__name__}")
    return value


def _csv_rows(content: bytes, delimiter: str, path: Path) -> Rows:
    """Yields the rows of a table in text, whose first line has the names of the columns.

    All cells are text: 007 and 10.50 keep their zeros."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8, byte 0x{content[error.start]:02x}"
                        ) from None

    csv.field_size_limit(2**31 - 1)     # a solution may be long
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue
            location = f"{path}:{reader.line_num}"
            if header and len(cells) != len(header):
                raise UserError(f"{location}: has {len(cells)} cells, expected {len(header)} as "
                                "in the first line")
            if header:
                yield location, dict(zip(header, cells, strict=True))
            elif len(set(cells)) < len(cells):
                raise UserError(f"{location}: names a column twice: {', '.join(cells)}")
            else:
                header = cells
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV ({one_line(error)})") from None


def _table_rows(source: Path | io.BytesIO, path: Path) -> Rows:
    """Yields the rows of a Parquet or Arrow file; unlike with `datasets`, an error is one line."""
    import pyarrow.parquet

    number = 0
    with path.open("rb") if isinstance(source, Path) else source as file:
        head = file.read(HEAD_BYTES)
        file.seek(0)
        is_arrow = head.startswith((ARROW_FILE, ARROW_STREAM))
        try:
            if is_arrow:
                read = (pyarrow.ipc.open_file if head.startswith(ARROW_FILE)
                        else pyarrow.ipc.open_stream)
                batches = iter(read(file).read_all().to_batches())
            else:
                batches = pyarrow.parquet.ParquetFile(file).iter_batches()
            for batch in batches:
                for row in batch.to_pylist():
                    yield f"{path}:{number}", row
                    number += 1
        except Exception as error:      # OSError, UnicodeDecodeError, or pyarrow's own
            raise UserError(f"{path}: cannot be read as {'Arrow' if is_arrow else 'Parquet'} "
                            f"({one_line(error)})") from None


def _saved_rows(path: Path, split: str) -> Rows:
    """Yields the rows of a folder written by `save_to_disk`."""
    import datasets  # takes half a second

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:      # a damaged folder is also a KeyError or a TypeError
        raise _unreadable(path, error) from None

    if not isinstance(saved, datasets.Dataset):
        saved = _split(path, saved, split)
    for number, row in enumerate(saved):
        yield f"{path}:{number}", row


def _folder_rows(path: Path, subset: str | None, split: str) -> Rows:
    """Yields the rows of a folder of data files, as a set on the Hub has them.

    `datasets` knows which files belong to which subset and split."""
    import datasets

    try:
        files = datasets.load_dataset_builder(str(path), subset).config.data_files
    except Exception as error:      # of several kinds, without a closer common ancestor
        message = one_line(error)
        if "Config name is missing" in message or "BuilderConfig" in message:
            raise UserError(f"{path}: data.subset must name one of its configurations ({message})"
                            ) from None
        raise _unreadable(path, error) from None

    for file in _split(path, {str(name): files[name] for name in files or ()}, split):
        yield from file_rows(Path(file))


def _split(path: Path, splits: Mapping[str, Any], split: str) -> Any:
    if split not in splits:
        raise UserError(f"{path}: has no split {split!r}, found {', '.join(splits) or 'none'}; "
                        "data.split or evaluation.split must name one of them")
    return splits[split]


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read by datasets ({type(error).__name__}: "
                     f"{one_line(error)})")
