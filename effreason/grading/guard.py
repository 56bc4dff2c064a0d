"""Says which answers are too large for a worker to try."""

import re

from effreason.grading import notation

MAX_CHARACTERS = 400
MAX_DEPTH = 15
MAX_ITEMS = 40
MAX_BARS = 20
HUGE = re.compile(
    r"\d{120,}|\^\{[^a-zA-Z{}]*\^"                          # a power of a power, of numbers only
    r"|\^\{?\s*[-+(]*\s*\d{5,}|\^\{?[^{}]*\d\s*\)?\s*\}?\s*\)\s*\^"             # (9^9)^(9^9)
    r"|\d{5,}\s*\)?\s*!|\^\{?[^{}]*\}?\s*\)?\s*!|!\s*\)?\s*!")


def is_too_large(text: str) -> bool:
    """Returns whether a canonical answer is too large for a worker to try.

    It catches the usual cases; the workers' limits are the real protection.
    """
    return (len(text) > MAX_CHARACTERS or notation.depth(text) > MAX_DEPTH
            or text.count(",") > MAX_ITEMS or text.count("|") > MAX_BARS
            or HUGE.search(text) is not None)
