"""Reads what a row of a data set has in a column: entries of nested ones, numbers, messages."""

import datetime
import json
import re
from decimal import Decimal
from typing import Any

import numpy as np

from effreason.grading import notation

ROLES = {"human": "user", "gpt": "assistant"}       # of the form {from, value}


def lookup(row: dict[str, Any], field: str) -> Any:
    """Returns what a row has in a column, or of the entry a.b or a[0] of a nested one.

    A longer name comes first, as names may have dots. An entry of a null is null; text with JSON is
    nested. Raises LookupError that says what there is instead."""
    value: Any = row
    rest = field
    while rest:
        if isinstance(value, str):
            value = _json(value)
        if value is None:
            return None

        end = None
        if isinstance(value, dict):
            ends = [len(rest), *(mark.start() for mark in re.finditer(r"[.\[]", rest))]
            end = max((end for end in ends if rest[:end] in value), default=None)
            name: str | int = rest[:end]
        elif isinstance(value, list | tuple) and (index := re.match(r"\[?(-?\d+)\]?", rest)):
            name = int(index[1])
            end = index.end() if -len(value) <= name < len(value) else None
        if end is None:
            raise LookupError(f"has no field {field!r}, found {_found(row, value)}")
        value, rest = value[name], rest[end:].removeprefix(".")
    return value


def is_missing(value: Any) -> bool:
    """Returns whether there is no value: null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float | Decimal | np.generic)
                             and bool(value != value))


def as_text(value: Any) -> str:
    r"""Returns a value of a data set as text, "" if there is none. LaTeX that JSON has damaged,
    such as a form feed and rac{1}{2}, is mended: \frac{1}{2}.

    Raises ValueError for anything but text, numbers and dates, and for half of a surrogate pair,
    which JSON can contain as \ud800 and which is no character."""
    if is_missing(value):
        return ""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise ValueError("must be text or a number, found bytes that are not UTF-8") from None
    if isinstance(value, float | Decimal):
        value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, str | int | datetime.date):
        hint = ", name one of its entries: COLUMN.ENTRY" if isinstance(value, dict) else ""
        raise ValueError(f"must be text or a number, found {type(value).__name__}{hint}")

    text = notation.mended(str(value))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"contains half of a surrogate pair, {ascii(text[error.start])}, at "
                         f"character {error.start + 1}, which is no text") from None
    return text


def is_damaged(value: Any) -> bool:
    """Returns whether a value is text, or has text in it, whose LaTeX has to be mended."""
    if isinstance(value, dict | list | tuple):
        return any(map(is_damaged, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and notation.mended(value) != value


def messages(value: Any) -> list[dict[str, Any]] | None:
    """Returns the messages that a value is a list of, also as JSON in a text; None for others."""
    if isinstance(value, str) and value.lstrip().startswith("[") and '"' in value:
        value = _json(value)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        return None
    is_message = all(isinstance(entry, dict)
                     and (entry.keys() >= {"role", "content"} or "from" in entry)
                     for entry in value)
    return list(value) if is_message else None


def user_text(turns: list[dict[str, Any]], *, drop_system: bool = False) -> str:
    """Returns what the user says before the first response: the problem.

    Raises ValueError for a system turn unless it is to be dropped, and for a second question after
    a response."""
    texts, is_answered = [], False
    for number, turn in enumerate(turns):
        role = turn["role"] if "role" in turn else turn["from"]
        role = ROLES.get(role, role)
        if role == "system":
            if drop_system:
                continue
            raise ValueError("has a system turn, which is not used: data.system_prompt must give "
                             "what takes its place, or the column must be the user's turn alone, "
                             f"such as COLUMN[{number + 1}].content")
        if role == "user" and is_answered:
            raise ValueError("has a turn of the user after a response, expected one question")
        if role == "user":
            texts.append(_content(turn["content"] if "content" in turn else turn.get("value")))
        is_answered |= role != "user"
    return "\n\n".join(filter(str.strip, texts))


def _content(value: Any) -> str:
    """Returns the text of a message, which may be a list of parts."""
    if not isinstance(value, list | tuple):
        return as_text(value)
    if any(not isinstance(part, dict) or part.get("type") != "text" for part in value):
        raise ValueError("has a message with parts that are no text")
    return "\n".join(as_text(part.get("text")) for part in value)


def _json(text: str) -> Any:
    """Returns the value of a JSON text; other text as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _plain(number: float | Decimal) -> str:
    """Returns a number without an exponent: 3 for 3.0, which is how pandas writes the whole numbers
    of a column that lacks some."""
    text = f"{Decimal(str(number)):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _found(row: dict[str, Any], value: Any) -> str:
    """Returns what there is instead of a field; JSON may contain names that are not Unicode."""
    if value is row:
        names = ", ".join(row) or "none"
    elif isinstance(value, dict):
        names = f"the entries {', '.join(map(str, value)) or 'none'}"
    elif isinstance(value, list | tuple):
        names = f"{len(value)} entries"
    else:
        names = f"no entries but {type(value).__name__}"
    return names.encode("utf-8", "backslashreplace").decode()
