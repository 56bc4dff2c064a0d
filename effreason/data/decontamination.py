"""Finds problems not to train on: repeated ones, and those of the evaluation sets."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Protocol, TypeVar

# What copies of a problem differ in: spacing, $ instead of \[, and \left(. Signs, brackets and dots
# stay: without them 88/(4/2) is 88/4/2 and tan 225 is tan 22.5.
SPACING = re.compile(r"(?:\\(?:[,;:! \[\]()]|(?:q?quad|left|right)(?![a-z]))|[\s~$])+")
# 2 3 is not 23. But a script is one character: \log_8 2 is \log_82.
NUMBERS = re.compile(rf"(?<=\d)(?<![\^_]\d){SPACING.pattern}(?=\d)")
SEPARATOR = "\0"
SINGLE = re.compile(r"([\^_])\{(\w)\}")
# NFKC turns these into plain digits, but 10\u00b2 is not 102.
RAISED = re.compile("[\u00b2\u00b3\u00b9\u2070-\u207f]+")
LOWERED = re.compile("[\u2080-\u209c]+")
EXAMPLE_CHARACTERS = 80


class Text(Protocol):
    """A problem or a row of a data set."""

    @property
    def text(self) -> str: ...


class WithAnswer(Text, Protocol):
    """The same with its reference answer."""

    @property
    def reference(self) -> str: ...


Item = TypeVar("Item", bound=Text)
Graded = TypeVar("Graded", bound=WithAnswer)


def key(text: str) -> str:
    """Returns what copies of a problem share: the text without case, spacing and LaTeX spacing.

    Spacing between two digits becomes one separator."""
    marked = LOWERED.sub(r"_{\g<0>}", RAISED.sub(r"^{\g<0>}", text))
    plain = unicodedata.normalize("NFKC", marked).casefold()
    return SINGLE.sub(r"\1\2", SPACING.sub("", NUMBERS.sub(SEPARATOR, plain)))


def keys(problems: Iterable[Text]) -> set[str]:
    """Returns the keys of problems that must not occur elsewhere."""
    return {key(problem.text) for problem in problems}


def duplicates(rows: Sequence[Graded], seen: dict[str, str]) -> tuple[list[Graded], list[Graded]]:
    """Splits rows into those that are new and those that repeat an earlier one.

    `seen` has the answers of all earlier rows by their keys; those of the new rows are added."""
    first: list[Graded] = []
    repeated: list[Graded] = []
    for row in rows:
        row_key = key(row.text)
        (repeated if row_key in seen else first).append(row)
        seen.setdefault(row_key, row.reference)
    return first, repeated


def contradictions(repeated: Iterable[Graded], seen: Mapping[str, str]) -> list[tuple[Graded, str]]:
    """Returns the repeated rows whose answer is another text, each with the earlier answer."""
    pairs = [(row, seen[key(row.text)]) for row in repeated]
    return [(row, answer) for row, answer in pairs if key(row.reference) != key(answer)]


def contaminated(rows: Sequence[Item], held_out: Set[str]) -> tuple[list[Item], list[Item]]:
    """Splits rows into those that are not among the held-out keys, and those that are."""
    is_held_out = [key(row.text) in held_out for row in rows]
    return ([row for row, flag in zip(rows, is_held_out, strict=True) if not flag],
            [row for row, flag in zip(rows, is_held_out, strict=True) if flag])


def example(problem: Text) -> str:
    """Returns the beginning of a problem on one line."""
    text = " ".join(problem.text.split())
    if len(text) > EXAMPLE_CHARACTERS:
        text = text[: EXAMPLE_CHARACTERS - 3] + "..."
    return repr(text)
