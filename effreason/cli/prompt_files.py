"""Prompts for `effreason generate`: texts, messages or token ids, from a file or an option."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec

from effreason.data import files
from effreason.runtime import rows
from effreason.runtime.errors import UserError

FORMS = ("prompt", "problem", "messages", "tokens")     # fields of a row, of which it has one
NEW_TOKENS = 1024                   # default length limit of a response

Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, msgspec.Meta(ge=0)]


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a file of prompts."""

    prompt: str | None = None
    problem: str | None = None      # the same as prompt
    messages: list[Message] | None = None
    tokens: list[TokenId] | None = None
    id: str | int = ""              # default: the number of the line
    max_new_tokens: Count | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What to respond to, in one of three forms."""

    name: str | int
    place: str                      # FILE:LINE or the option, for error messages
    text: str | None = None         # the user's message, or with --raw the whole text
    messages: list[Message] | None = None
    tokens: list[int] | None = None
    max_new_tokens: int | None = None


def read(path: Path) -> Iterator[Prompt]:
    """Yields the prompts of a file. Raises: UserError naming the line."""
    empty = True
    for place, values in files.file_rows(path):
        empty = False
        yield _prompt(values, place)
    if empty:
        raise UserError(f"{path}: holds no prompts")


def _prompt(values: dict[str, Any], place: str) -> Prompt:
    forms = [form for form in FORMS if form in values]
    if len(forms) != 1:
        present = " and ".join(forms) or ", ".join(map(ascii, list(values)[:8]))
        raise UserError(f"{place}: expected one of the fields {', '.join(FORMS)}, found "
                        f"{present or 'an empty object'}")
    row, form = rows.convert(values, Row, place), forms[0]
    if not getattr(row, form):
        raise UserError(f"{place}: {form}: expected a prompt, found nothing")

    prompt = Prompt(name=row.id or int(place.rpartition(":")[2]), place=place,
                    messages=row.messages, tokens=row.tokens, max_new_tokens=row.max_new_tokens)
    for message in row.messages or ():
        check_text(message.role + message.content, f"{place}: messages")
    if row.messages is None and row.tokens is None:
        text = user_message(row.prompt or row.problem or "", f"{place}: {form}")
        return dataclasses.replace(prompt, text=text)
    return prompt


def user_message(text: str, place: str) -> str:
    """Returns a text to respond to. Raises: UserError if it is blank."""
    check_text(text, place)
    if not text.strip():
        raise UserError(f"{place}: expected a prompt, found nothing")
    return text


def check_text(text: str, place: str) -> None:
    """Raises UserError for half of a surrogate pair, which JSON and a command line can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = ascii(text[error.start])
        raise UserError(f"{place} holds {character}, which is no character") from None
