"""Problems that must not be trained on twice, or at all: repeated ones, and those of the evaluation set."""

import re
import unicodedata
from collections.abc import Iterable, Sequence, Set
from typing import Protocol, TypeVar

# What two copies of a problem differ in: spacing, $ against \[, and \left(. Signs, brackets and dots stay: without them
# 88/(4/2) is 88/4/2 and tan 225 is tan 22.5.
SPACING = re.compile(r"(?:\\(?:[,;:! \[\]()]|(?:q?quad|left|right)(?![a-z]))|[\s~$])+")
# 2 3 is not 23. But a script is one character: \log_8 2 is \log_82.
NUMBERS = re.compile(rf"(?<=\d)(?<![\^_]\d){SPACING.pattern}(?=\d)")
APART = "\0"
SINGLE = re.compile(r"([\^_])\{(\w)\}")
RAISED = re.compile("[\u00b2\u00b3\u00b9\u2070-\u207f]+")      # which NFKC makes plain digits: 10\u00b2 is not 102
LOWERED = re.compile("[\u2080-\u209c]+")
EXAMPLE_CHARACTERS = 80


class Text(Protocol):
    """A problem or a row of a data set."""

    @property
    def text(self) -> str: ...


Item = TypeVar("Item", bound=Text)


def key(text: str) -> str:
    """What two copies of the same problem have in common: the text without case, spacing and LaTeX for spacing.

    Spacing between two digits stays, as one mark."""
    marked = LOWERED.sub(r"_{\g<0>}", RAISED.sub(r"^{\g<0>}", text))
    plain = unicodedata.normalize("NFKC", marked).casefold()
    return SINGLE.sub(r"\1\2", SPACING.sub("", NUMBERS.sub(APART, plain)))


def keys(problems: Iterable[Text]) -> set[str]:
    """The keys of problems that must not occur elsewhere."""
    return {key(problem.text) for problem in problems}


def duplicates(rows: Sequence[Item], seen: set[str]) -> tuple[list[Item], list[Item]]:
    """Splits rows into the first of their kind and those that repeat an earlier one.

    Args: seen, the keys of all rows before; those of these rows are added to it."""
    first: list[Item] = []
    repeated: list[Item] = []
    for row in rows:
        mark = key(row.text)
        (repeated if mark in seen else first).append(row)
        seen.add(mark)
    return first, repeated


def contaminated(rows: Sequence[Item], held_out: Set[str]) -> tuple[list[Item], list[Item]]:
    """Splits rows into those that are not among the held-out problems, given by their keys, and those that are."""
    clean: list[Item] = []
    found: list[Item] = []
    for row in rows:
        (found if key(row.text) in held_out else clean).append(row)
    return clean, found


def example(problem: Text) -> str:
    """The beginning of a problem, in one line."""
    text = " ".join(problem.text.split())
    return repr(text if len(text) <= EXAMPLE_CHARACTERS else text[: EXAMPLE_CHARACTERS - 3] + "...")
