"""The command `effreason grade FILE.jsonl`: marks each response in a file, and says why.

A line is an object with a response and a reference answer, or a list of references any of which is
right, and optionally a kind and choices. The whole file is checked before anything is graded. Needs
no jax.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size

from effreason.cli.arguments import Parser, bounded
from effreason.grading import kinds
from effreason.grading.grader import Grade, Grader, GradeStatus, Reference
from effreason.runtime.errors import UserError

CHUNK = 512                         # lines graded at once
# The first name is the usual one; the others are accepted instead.
RESPONSE_FIELDS = ("response", "pred", "prediction", "completion")
REFERENCE_FIELDS = ("reference", "gold", "answer", "target")
WIDTHS = {"line": 5, "verdict": 7, "answer": 16, "reference": 12, "status": 12}
WIDTH = 80
NO_BUDGET_SECONDS = 86400.0         # grading a file may take long

_count = bounded("positive integer", int, lambda value: 0 < value < 1e6)
_seconds = bounded("positive number", float, lambda value: 0 < value < 1e6)


@dataclasses.dataclass(frozen=True)
class Item:
    """One line of the file."""

    line: int
    response: str
    reference: Reference            # of a kind that may be unknown to the grader


def run(argv: Sequence[str], prog: str) -> None:
    """Grades a file and prints the result. Raises: UserError, SystemExit(0) after --help."""
    options = _parser(prog).parse_args(argv)
    items = list(_read(options))
    unknown = sum(item.reference.kind not in kinds.KINDS for item in items)
    if unknown:
        print(f"note: on {unknown} lines the field kind is none of {', '.join(kinds.KINDS)}: it "
              f"must mean something else, so all lines are graded as {options.kind}",
              file=sys.stderr)
        items = [dataclasses.replace(item, reference=dataclasses.replace(
            item.reference, kind=options.kind)) for item in items]

    with Grader(workers=options.workers, cpu_seconds=options.cpu_seconds,
                wall_seconds=options.wall_seconds, step_budget_seconds=NO_BUDGET_SECONDS,
                function=options.function) as grader:
        grades = _grades(grader, items, options.bare)
        if options.json:
            _print_json(grades)
        else:
            _print_table(grades, options.bare)


def _parser(prog: str) -> Parser:
    parser = Parser(prog, "Mark each response in a file as correct or wrong, with the reason. "
                    "The exit code is 0 even if responses are wrong.")
    parser.add_argument("file", metavar="FILE.jsonl", help="one object on each line, with a "
                        "response and a reference answer; - for standard input")
    parser.add_argument("--json", action="store_true", help="print one object on each line: line, "
                        "correct, answer, reference, status, reason, seconds; nothing else")
    parser.add_argument("--kind", choices=kinds.KINDS, default="math", help="how to compare "
                        "answers if a line has no kind of its own; default math")
    parser.add_argument("--bare", action="store_true",
                        help="each response is the answer itself, without a box")
    parser.add_argument("--function", metavar="MODULE:FUNCTION",
                        help="your own grader: (response, reference) -> True, False or a "
                        "number in [0, 1]")
    parser.add_argument("--response-field", metavar="NAME", help="field with the response; "
                        f"default: the first present of {', '.join(RESPONSE_FIELDS)}")
    parser.add_argument("--reference-field", metavar="NAME", help="field with the reference; "
                        f"default: the first present of {', '.join(REFERENCE_FIELDS)}")
    parser.add_argument("--workers", metavar="N", type=_count, default=2,
                        help="processes that compare answers; default 2")
    parser.add_argument("--cpu-seconds", metavar="X", type=_seconds, default=1.0,
                        help="processor time for one comparison; default 1")
    parser.add_argument("--wall-seconds", metavar="X", type=_seconds, default=8.0,
                        help="clock time for one comparison; default 8")
    return parser


def _read(options: argparse.Namespace) -> Iterator[Item]:
    """Yields the lines of the file. Raises: UserError naming the line."""
    name = "stdin" if options.file == "-" else options.file

    try:
        file = sys.stdin.buffer if options.file == "-" else open(options.file, "rb")
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None

    with contextlib.nullcontext() if options.file == "-" else file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{name}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                # Numbers stay text: 10.50 keeps its zero, and no integer is too long.
                row = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
            except UnicodeDecodeError:
                raise UserError(f"{place}: not UTF-8") from None
            except RecursionError:
                raise UserError(f"{place}: nested too deep") from None
            except ValueError as error:
                raise UserError(f"{place}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{place}: expected an object, got {_shown(row)}")
            yield _item(number, row, options, place, text)


def _item(number: int, row: dict[str, Any], options: argparse.Namespace, place: str,
          columns: str) -> Item:
    response_fields = (options.response_field,) if options.response_field else RESPONSE_FIELDS
    reference_fields = (options.reference_field,) if options.reference_field else REFERENCE_FIELDS
    kind = row.get("kind", options.kind)
    reference = Reference(_text(row, reference_fields, place, listed=True), kind,
                          _choices(row, place), columns if options.function else "")
    return Item(number, _text(row, response_fields, place), reference)


def _text(row: dict[str, Any], fields: Sequence[str], place: str, *, listed: bool = False) -> str:
    """Returns the value of the first field, or else of the only other one that the row has.

    Args: listed, a list of texts is accepted too: several references, any of which is right."""
    present = [field for field in fields if field in row]
    if not present:
        others = f" (nor {', '.join(fields[1:])})" if len(fields) > 1 else ""
        raise UserError(f"{place}: no field {fields[0]}{others}, got "
                        f"{', '.join(list(row)[:8]) or 'an empty object'}")
    if present[0] != fields[0] and len(present) > 1:
        raise UserError(f"{place}: no field {fields[0]}, and {' and '.join(present)} could both "
                        "replace it")
    value = row[present[0]]
    if listed and isinstance(value, list) and value and all(
            isinstance(entry, str) for entry in value):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        raise UserError(f"{place}: {present[0]} must be a string or a number, got {_shown(value)}")
    return value


def _choices(row: dict[str, Any], place: str) -> tuple[str, ...]:
    """Returns the texts of the choices, from a list or an object with the letters A, B, C, ..."""
    choices = row.get("choices") or ()
    if isinstance(choices, dict):
        letters = [letter.upper() for letter in choices]
        if letters != [chr(ord("A") + index) for index in range(len(choices))]:
            raise UserError(f"{place}: choices must be a list, or an object with A, B, C, ... in "
                            "this order")
        choices = list(choices.values())

    if not (isinstance(choices, list | tuple)
            and all(isinstance(choice, str) for choice in choices)):
        raise UserError(f"{place}: choices must be a list of strings, got {_shown(choices)}")
    return tuple(choices)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _grades(grader: Grader, items: Sequence[Item], bare: bool) -> Iterator[tuple[Item, Grade]]:
    for start in range(0, len(items), CHUNK):
        chunk = items[start:start + CHUNK]
        grades = grader.grade([item.response for item in chunk],
                              [item.reference for item in chunk], bare=bare)
        yield from zip(chunk, grades, strict=True)


def _print_json(grades: Iterable[tuple[Item, Grade]]) -> None:
    for item, grade in grades:
        print(json.dumps({"line": item.line, "correct": grade.correct, "answer": grade.answer,
                          "reference": item.reference.answer, "status": grade.status,
                          "reason": grade.reason, "seconds": round(grade.seconds, 6)}))


def _print_table(grades: Iterable[tuple[Item, Grade]], bare: bool) -> None:
    statuses: Counter[GradeStatus] = Counter()
    correct = 0
    room = WIDTH - sum(WIDTHS.values()) - len(WIDTHS)
    print(" ".join([*(name.ljust(width) for name, width in WIDTHS.items()), "reason"]))

    for item, grade in grades:
        statuses[grade.status] += 1
        correct += grade.correct
        cells = [str(item.line).rjust(WIDTHS["line"]), "correct" if grade.correct else "wrong",
                 "-" if grade.answer is None else grade.answer, item.reference.answer,
                 grade.status]
        row = " ".join(map(_cell, cells, WIDTHS.values()))
        if len(grade.reason) <= room:
            print(f"{row} {grade.reason}".rstrip())
        else:
            print(f"{row.rstrip()}\n      {_cell(grade.reason, WIDTH - 6)}".rstrip())

    count = sum(statuses.values())
    print(f"\n{count} graded: {correct} correct, {count - correct} wrong")
    for status, number in statuses.most_common():
        print(f"{number:>7}  {status:<12}  {status.words}")
    if count and statuses[GradeStatus.NO_ANSWER] == count and not bare:
        print("no response has a box: with --bare the response is the answer itself")


def _cell(text: str, width: int) -> str:
    """Fits text into columns of a terminal; escapes what could move the cursor."""
    text = "".join(character if character.isprintable() else repr(character)[1:-1]
                   for character in text)
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    return set_cell_size(text, width - 1) + "…"
