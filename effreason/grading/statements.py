r"""Finds the first statement of the reference answer in a response, including its thinking.

It looks only at the places where a value is usually stated: in \boxed{}, after "answer is" or
"answer:", and after the last equals sign of a line. Earlier equals signs belong to steps, whose
small numbers often equal the answer by chance. It uses no algebra: a statement that only sympy
could recognise is missed.
"""

import functools
import re
from collections.abc import Callable
from fractions import Fraction

from effreason.grading import kinds, notation, rationals
from effreason.grading.extraction import outermost_boxes
from effreason.grading.kinds import Reference

STATEMENT = re.compile(
    r"(?P<box>\\{1,4}(?:boxed|fbox))|\banswer(?:\*\*)?\s*(?P<named>is\b|:|=)(?:\*\*)?:?"
    r"|(?<![<>!:≠])=|(?P<stop>\n|</think>|\bwait\b)", re.IGNORECASE)
# Runs of blanks are bounded, because adjacent unbounded ones would backtrack over every split.
NUMBER = re.compile(
    r"[\s$*]{0,9}+(?:\\?\(\s?)?(?P<sign>[-−+]?)\s?(?:\\?[$€£])?\s?"
    r"(?P<size>\\[dt]?frac\s*\{\s*\d{1,15}\s*\}\s*\{\s*\d{1,15}\s*\}"
    r"|(?:\d{1,3}(?:,\d{3}){1,5}(?!\d)|\d{1,20}|(?=\.\d))(?:\.\d{1,20})?(?:\s*/\s*\d{1,15})?)")
# The rest of a longer expression: 7 + 5, 7x, 7 \cdot 3, 7^2, 7!, a digit after 20 digits.
CONTINUATION = re.compile(
    r"\d|\s*[-−+*/^×÷·]\s*[\d(\\$a-z]|[(!^_]|[a-z](?![a-z])"
    r"|\s*\\(?:times|cdot|div|frac|sqrt|pm|pi)\b|\s+x\s+\d|\s*[*×·]")
SENTENCE = re.compile(r"[^\n]{0,160}?(?=[.!?,;](?:\s|\*|$)|\n|$)")
MAX_STATEMENT = 300                 # characters of a box that are compared


def first_stated(response: str, reference: Reference) -> int | None:
    """Returns the characters up to the end of the reference's first statement; None without one.

    After an equals sign only a number can be separated from the text that follows, so equals signs
    count only for a numeric reference. One counts if it is the last before the end of the line, of
    the thinking or of the response, or before "wait", "answer" or a box. Linear in the length of
    the response.
    """
    number = _number(reference.answer) if reference.kind == "math" else None
    same = functools.cache(functools.partial(_same, reference=reference))   # many texts repeat
    boxes = {start: (begin, end) for start, begin, end in outermost_boxes(response)}

    # end of the value after the previous equals sign, if it is the reference
    last: int | None = None
    for match in STATEMENT.finditer(response):
        if match[0] != "=":
            if last is not None:
                return last
            if match["box"]:
                begin, close = boxes.get(match.start(), (0, -1))
                if close >= 0 and same(response[begin:close]):
                    return min(close + 1, len(response))
            elif not match["stop"]:
                end = _end_of_sentence(response, match.end(), number, same)
                if end is not None:
                    return end
        elif number is not None:
            value = _complete_number(response, match.end())
            last = value.end() if value and _value(value) == number else None

    return last


def _end_of_sentence(response: str, begin: int, number: Fraction | None,
                     same: Callable[[str], bool]) -> int | None:
    """Returns the end of the text after "answer", if it states the reference."""
    if number is not None and (value := _complete_number(response, begin)):
        return value.end() if _value(value) == number else None
    sentence = SENTENCE.match(response, begin)
    return sentence.end() if sentence and same(sentence[0].strip(" *$")) else None


def end_of_answer(response: str) -> int:
    r"""Returns the characters up to the end of the last \boxed{}, or all if there is none."""
    boxes = outermost_boxes(response)
    end = boxes[-1][2] if boxes else -1
    return len(response) if end < 0 else min(end + 1, len(response))


def _same(text: str, reference: Reference) -> bool:
    longest = max(len(text), len(reference.answer))
    if not text.strip() or longest > min(MAX_STATEMENT, notation.MAX_CHARACTERS):
        return False

    try:
        return kinds.same(text, reference) is True
    except Exception:               # a bug in the comparison may only miss a statement
        return False


def _number(text: str) -> Fraction | None:
    r"""Returns the value of a text that is one number, such as 1,000, \frac{2}{3}, $5 or 50\%."""
    match = NUMBER.match(text)
    rest = text[match.end():].strip(" $.*") if match else None
    return _value(match) if match and rest in ("", "%", r"\%", r"\)") else None


def _complete_number(text: str, begin: int) -> re.Match[str] | None:
    match = NUMBER.match(text, begin)
    return None if match and CONTINUATION.match(text, match.end()) else match


def _value(match: re.Match[str]) -> Fraction | None:
    size = rationals.read(re.sub(r",|(?<=\\)[dt]", "", match["size"])).number
    return -size if size and match["sign"] in ("-", "−") else size
