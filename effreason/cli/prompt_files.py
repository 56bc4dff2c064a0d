"""What a model is to be asked, outside training: a text, messages or token ids, from a file or a command line."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effreason.data import files
from effreason.runtime.errors import UserError

FORMS = ("prompt", "problem", "messages", "tokens")     # the fields of a row that may hold what is asked
NEW_TOKENS = 1024                   # of a response at most, where nothing else is said


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be answered, in one of three forms."""

    name: Any                       # of a row, its id: the field, or its line
    place: str                      # for messages about it
    text: str | None = None         # a user's turn, or with --raw all of it
    messages: list[dict[str, str]] | None = None
    tokens: list[int] | None = None
    max_new_tokens: int | None = None


def read(path: Path) -> Iterator[Question]:
    """The rows of a file of prompts. Raises: UserError that names the line."""
    empty = True
    for place, row in files.jsonl_rows(path):
        empty = False
        yield _question(row, place)
    if empty:
        raise UserError(f"{path}: holds no prompts")


def _question(row: dict[str, Any], place: str) -> Question:
    found = [form for form in FORMS if form in row]
    if len(found) != 1:
        held = " and ".join(found) or ", ".join(map(ascii, list(row)[:8])) or "an empty object"
        raise UserError(f"{place}: expected one of the fields {', '.join(FORMS)}, found {held}")
    name, limit = row.get("id", int(place.rpartition(":")[2])), row.get("max_new_tokens")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise UserError(f"{place}: id must be a string or an integer, found {type(name).__name__}")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or not 0 < limit < 2**31):
        raise UserError(f"{place}: max_new_tokens must be an integer >= 1, found {ascii(limit)[:40]}")
    value = row[found[0]]
    forms: dict[str, Any] = {}
    if found[0] == "tokens":
        if not isinstance(value, list) or not value or not all(type(token) is int and token >= 0 for token in value):
            raise UserError(f"{place}: tokens must be a list of token ids, found {ascii(value)[:40]}")
        forms["tokens"] = value
    elif found[0] == "messages":
        if not isinstance(value, list) or not value or not all(
                isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in value):
            raise UserError(f"{place}: messages must be a list of objects with role and content, found "
                            f"{ascii(value)[:40]}")
        forms["messages"] = [{"role": _text(turn["role"], f"{place}: role"),
                              "content": _text(turn.get("content"), f"{place}: content")} for turn in value]
    else:
        forms["text"] = user_turn(value, f"{place}: {found[0]}")
    return Question(name=name, place=place, max_new_tokens=limit, **forms)


def user_turn(value: Any, place: str) -> str:
    """A text to be answered. Raises: UserError."""
    if not _text(value, place).strip():
        raise UserError(f"{place}: expected a prompt, found nothing")
    return value


def _text(value: Any, place: str) -> str:
    """Raises: UserError for what is no text: JSON and a command line can hold half of a surrogate pair."""
    if not isinstance(value, str):
        raise UserError(f"{place} must be a text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place} holds {ascii(value[error.start])}, which is no character") from None
    return value
