"""The command `effreason grade FILE.jsonl`: the verdict on every response of a file, and its reason.

A line is an object with a response and a gold, the reference answer; it may hold a kind and choices of its own. The
whole file is checked before anything is graded. Needs no jax.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from effreason.cli.arguments import Parser, bounded
from effreason.grading import kinds
from effreason.grading.grader import REASONS, Grade, Grader, GradeStatus, Reference
from effreason.runtime.errors import UserError

CHUNK = 512                         # lines graded at once
RESPONSE_FIELDS = ("response", "pred", "prediction", "completion")      # the first is the name, others stand in for it
GOLD_FIELDS = ("gold", "answer", "target")
WIDTHS = {"line": 5, "verdict": 7, "answer": 16, "gold": 12, "status": 12}
WIDTH = 80
NO_BUDGET_SECONDS = 86400.0         # a file may take its time

_count = bounded("positive integer", int, lambda value: 0 < value < 1e6)
_seconds = bounded("positive number", float, lambda value: 0 < value < 1e6)


@dataclass(frozen=True)
class Item:
    """One line of the file."""

    line: int
    response: str
    gold: Reference
    known_kind: bool                # False: its kind is none of ours


def run(argv: Sequence[str], prog: str) -> None:
    """Grades a file and prints every verdict.

    Args: argv, the arguments after the command; prog, the command's name in the help.
    Raises: UserError, SystemExit(0) after --help.
    """
    options = _parser(prog).parse_args(argv)
    with _opened(options.file) as file, contextlib.suppress(BrokenPipeError):
        odd_kinds = sum(not item.known_kind for item in _items(file, _reader(options), options.file))
        read = _reader(options, kind_field="kind" if odd_kinds == 0 else None)
        file.seek(0)
        with Grader(workers=options.workers, cpu_seconds=options.cpu_seconds, wall_seconds=options.wall_seconds,
                    step_budget_seconds=NO_BUDGET_SECONDS, function=options.function) as grader:
            verdicts = _verdicts(grader, _items(file, read, options.file), options.bare)
            (_print_json if options.json else _print_table)(verdicts, options.bare)
        if odd_kinds:
            print(f"note: on {odd_kinds} lines the field kind is none of {', '.join(kinds.KINDS)}: it must be "
                  f"something else, and all lines were graded as {options.kind}", file=sys.stderr)


def _parser(prog: str) -> Parser:
    made = Parser(prog, "Grade the responses of a file against their golds, the reference answers, and print every "
                  "verdict with its reason. Exit code 0 whatever the verdicts.")
    made.add_argument("file", metavar="FILE.jsonl", help="objects with a response and a gold, one a line; - for stdin")
    made.add_argument("--json", action="store_true", help="print one object a line: line, correct, answer, gold, "
                      "status, reason, seconds; nothing else on stdout")
    made.add_argument("--kind", choices=kinds.KINDS, default="math",
                      help="how answers are compared where a line has no kind of its own; default math")
    made.add_argument("--bare", action="store_true", help="the response is the answer itself, without a box")
    made.add_argument("--function", metavar="MODULE:FUNCTION",
                      help="a grader of your own: (response, gold) -> True or False")
    made.add_argument("--response_field", metavar="NAME",
                      help=f"default response; where it is missing, {', '.join(RESPONSE_FIELDS[1:])}")
    made.add_argument("--gold_field", metavar="NAME",
                      help=f"default gold; where it is missing, {', '.join(GOLD_FIELDS[1:])}")
    made.add_argument("--workers", metavar="N", type=_count, default=2, help="processes; default 2")
    made.add_argument("--cpu_seconds", metavar="X", type=_seconds, default=1.0,
                      help="processor time for one comparison; default 1")
    made.add_argument("--wall_seconds", metavar="X", type=_seconds, default=8.0,
                      help="clock time for one comparison; default 8")
    return made


@contextlib.contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    """The file, or a copy of stdin: it is read twice."""
    if path == "-":
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
            copy.seek(0)
            yield copy
        return
    try:
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    with file:
        if not file.seekable():     # a pipe
            with tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(file, copy)
                copy.seek(0)
                yield copy
        else:
            yield file


Read = Callable[[int, dict[str, Any]], Item]


def _items(file: Iterable[bytes], read: Read, name: str) -> Iterator[Item]:
    """Raises: UserError at a line that is no object with the fields wanted."""
    name = "stdin" if name == "-" else name
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            # Numbers as they are written: a gold of 10.50 stays that, and no integer is too long to be read.
            row = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
            if not isinstance(row, dict):
                raise _Bad(f"expected an object, got {_shown(row)}")
            yield read(number, row)
        except UnicodeDecodeError:
            raise UserError(f"{name}:{number}: not UTF-8") from None
        except RecursionError:
            raise UserError(f"{name}:{number}: nested too deep") from None
        except _Bad as error:
            raise UserError(f"{name}:{number}: {error}") from None
        except ValueError as error:
            raise UserError(f"{name}:{number}: not valid JSON: {error}") from None


class _Bad(Exception):
    """What is wrong with a line."""


def _reader(options: argparse.Namespace, kind_field: str | None = "kind") -> Read:
    response_fields = (options.response_field,) if options.response_field else RESPONSE_FIELDS
    gold_fields = (options.gold_field,) if options.gold_field else GOLD_FIELDS

    def read(number: int, row: dict[str, Any]) -> Item:
        kind = row.get(kind_field, options.kind) if kind_field else options.kind
        gold = Reference(_text(row, gold_fields), kind if kind in kinds.KINDS else options.kind, _choices(row))
        return Item(number, _text(row, response_fields), gold, kind in kinds.KINDS)

    return read


def _text(row: dict[str, Any], fields: Sequence[str]) -> str:
    """The value of the first field, or of the one other that stands in for it."""
    found = [field for field in fields if field in row]
    if not found:
        raise _Bad(f"no field {fields[0]}{' (nor ' + ', '.join(fields[1:]) + ')' if len(fields) > 1 else ''}, "
                   f"got {', '.join(map(str, list(row)[:8])) or 'an empty object'}")
    if found[0] != fields[0] and len(found) > 1:
        raise _Bad(f"no field {fields[0]}, and {' and '.join(found)} might both stand in for it")
    value = row[found[0]]
    if not isinstance(value, str):
        raise _Bad(f"{found[0]} must be a string or a number, got {_shown(value)}")
    return value


def _choices(row: dict[str, Any]) -> tuple[str, ...]:
    """The texts of the choices: a list, or an object with the letters A, B, C, ... in their order."""
    choices = row.get("choices") or ()
    if isinstance(choices, dict):
        if [letter.upper() for letter in choices] != [chr(ord("A") + place) for place in range(len(choices))]:
            raise _Bad("choices must be a list, or an object with A, B, C, ... in their order")
        choices = list(choices.values())
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        raise _Bad(f"choices must be a list of strings, got {_shown(choices)}")
    return tuple(choices)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _verdicts(grader: Grader, items: Iterator[Item], bare: bool) -> Iterator[tuple[Item, Grade]]:
    while chunk := list(itertools.islice(items, CHUNK)):
        grades = grader.grade([item.response for item in chunk], [item.gold for item in chunk], bare=bare)
        yield from zip(chunk, grades, strict=True)


def _print_json(verdicts: Iterable[tuple[Item, Grade]], bare: bool) -> None:
    for item, grade in verdicts:
        _write(json.dumps({"line": item.line, "correct": grade.correct, "answer": grade.answer,
                           "gold": item.gold.answer, "status": grade.status, "reason": grade.reason,
                           "seconds": round(grade.seconds, 6)}))
    sys.stdout.flush()


def _print_table(verdicts: Iterable[tuple[Item, Grade]], bare: bool) -> None:
    statuses: Counter[GradeStatus] = Counter()
    correct = 0
    room = WIDTH - sum(WIDTHS.values()) - len(WIDTHS)
    _write(" ".join([*(name.ljust(width) for name, width in WIDTHS.items()), "reason"]))
    for item, grade in verdicts:
        statuses[grade.status] += 1
        correct += grade.correct
        cells = {"line": str(item.line).rjust(WIDTHS["line"]), "verdict": "correct" if grade.correct else "wrong",
                 "answer": "-" if grade.answer is None else grade.answer, "gold": item.gold.answer,
                 "status": grade.status}
        fits = len(grade.reason) <= room
        cut = " ".join(_cell(cells[name], width) for name, width in WIDTHS.items())
        _write(f"{cut} {grade.reason if fits else ''}".rstrip())
        if not fits:
            _write(f"      {_cell(grade.reason, WIDTH - 6)}".rstrip())
    count = sum(statuses.values())
    _write(f"\n{count} graded: {correct} correct, {count - correct} wrong")
    for status, number in statuses.most_common():
        _write(f"{number:>7}  {status:<12}  {REASONS[status]}")
    if count and statuses[GradeStatus.NO_ANSWER] == count and not bare:
        _write("no response has a box: with --bare the response is the answer itself")
    sys.stdout.flush()


def _cell(text: str, width: int) -> str:
    """The text in so many columns of a terminal, cut where it is longer; what could move the cursor is escaped."""
    shown: list[str] = []
    used = 0
    for character in text:
        character = character if character.isprintable() else repr(character)[1:-1]
        columns = _columns(character)
        if used + columns > width:
            while used > width - 1:
                used -= _columns(shown.pop())
            return "".join([*shown, "…"]) + " " * (width - used - 1)
        shown.append(character)
        used += columns
    return "".join(shown) + " " * (width - used)


def _columns(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def _write(line: str) -> None:
    """Prints a line in whatever the terminal can show; ends quietly where nobody reads any more."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding))
    except BrokenPipeError:
        # The interpreter would fail once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
