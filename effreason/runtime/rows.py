"""Typed rows of JSON: a dataclass says what a row holds, and a wrong row is one clear line.

Types are strict: true is not a number, 1.0 is not a whole number, and text is never parsed. A whole
number is accepted as a float. Bounds are written `Annotated[int, msgspec.Meta(ge=1)]`. Keys that
the dataclass does not have are ignored.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from effreason.runtime.errors import UserError

T = TypeVar("T")
SHOWN = 60                          # characters of a wrong value that a message quotes
WORDS = {inspect.IntType: "a whole number", inspect.FloatType: "a number",
         inspect.StrType: "a text", inspect.BoolType: "true or false", inspect.NoneType: "null",
         inspect.ListType: "a list", inspect.VarTupleType: "a list", inspect.TupleType: "a list"}


def read(path: Path, kind: type[T]) -> list[T]:
    """Reads a file of JSON lines; skips empty lines. Raises: UserError naming file and line."""
    return [decode(line, kind, place) for place, line in numbered_lines(path)]


def numbered_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields the lines of a file that are not empty, each after its place, "FILE:LINE".

    Raises: UserError if the file cannot be read."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def decode(line: bytes | str, kind: type[T], place: str) -> T:
    """Parses one line of JSON into a dataclass; see `convert`."""
    # msgspec's own parser rejects lone surrogates, which texts from models may hold.
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        start = line[:40].decode("utf-8", "replace") if isinstance(line, bytes) else line[:40]
        raise UserError(f"{place}: expected a JSON object, found {start!r}") from None
    return convert(value, kind, place)


def convert(value: Any, kind: type[T], place: str) -> T:
    """Checks a parsed JSON value and builds the type from it.

    Args: kind, a dataclass or another type; place, of the value, such as FILE:LINE.
    Raises: UserError with the place, the field, what was expected and what was found."""
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise UserError(f"{place}: {_explained(str(error), value, kind)}") from None


def _explained(message: str, value: Any, kind: Any) -> str:
    """Rewords an error of msgspec, such as "Expected `int`, got `str` - at `$.tokens`"."""
    path = re.search(r" - at .*`\$(.*)`$", message)
    keys = re.findall(r"[^.\[\]]+|\.\.\.", path[1]) if path else []
    missing = re.match(r"Object missing required field `(.*?)`", message)
    keys += [missing[1]] if missing else []
    if not keys:
        return f"expected a JSON object, found {json.dumps(value)[:SHOWN]}"

    expected = inspect.type_info(kind)
    for key in keys:
        expected, value = _member(expected, key), _item(value, key)

    got = f"no {keys[-1]}" if missing else json.dumps(value)[:SHOWN]
    return f"{'.'.join(keys)} must be {_words(expected)}, got {got}"


def _member(kind: Any, key: str) -> Any:
    """Returns the type of a field, item or value of another type."""
    if isinstance(kind, inspect.UnionType):
        kind = next(part for part in kind.types if not isinstance(part, inspect.NoneType))

    match kind:
        case inspect.DataclassType(fields=fields):
            return next(field.type for field in fields if field.encode_name == key)
        case inspect.DictType(value_type=inner):
            return inner
        case inspect.TupleType(item_types=types):
            return types[int(key)]

    return kind.item_type


def _item(value: Any, key: str) -> Any:
    """Returns what a JSON value holds under a key; the value itself if the key is not known."""
    if isinstance(value, list):
        return value[int(key)]
    return value.get(key, value)


def _words(kind: Any) -> str:
    match kind:
        case inspect.UnionType(types=types):
            return " or ".join(sorted(map(_words, types), key=lambda words: words == "null"))
        case inspect.EnumType(cls=members):
            return f"one of {', '.join(member.value for member in members)}"
        case inspect.IntType(ge=int() as low, le=int() as high):
            return f"a whole number in [{low}, {high}]"
        case inspect.IntType(ge=int() as low):
            return f"a whole number >= {low}"

    return next((words for type_, words in WORDS.items() if isinstance(kind, type_)), "an object")
