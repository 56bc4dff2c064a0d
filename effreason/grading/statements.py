r"""Where in a response its reference answer is stated for the first time, thinking included.

A cheap look at the places where people state a value: in \boxed{}, behind "answer is" or "answer:", behind the last
equals sign of a line. Those before it are steps, whose small numbers are often the answer's by chance. No algebra: what
only sympy could tell to be equal is passed over.
"""

import re
from collections.abc import Callable

from effreason.grading import kinds, notation
from effreason.grading.exact import exact
from effreason.grading.kinds import Reference

PLACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\banswer(?:\*\*)?\s*(?P<named>is\b|:|=)(?:\*\*)?:?|(?<![<>!:≠])="
                   r"|(?P<stop>\n|</think>|\bwait\b)", re.IGNORECASE)
# Blanks are bounded: unbounded runs of them side by side would be tried in every way.
NUMBER = re.compile(
    r"[\s$*]{0,9}+(?:\\?\(\s?)?(?P<sign>[-−+]?)\s?(?:\\?[$€£])?\s?"
    r"(?:\\[dt]?frac\s*\{\s*(?P<over>\d{1,15})\s*\}\s*\{\s*(?P<under>\d{1,15})\s*\}"
    r"|(?P<whole>\d{1,3}(?:,\d{3}){1,5}(?!\d)|\d{1,20}|(?=\.\d))(?P<part>\.\d{1,20})?(?:\s*/\s*(?P<by>\d{1,15}))?)")
# What makes a number the beginning of something else: 7 + 5, 7x, 7 \cdot 3, 7^2, 7!, 7.5 after 20 digits.
GOES_ON = re.compile(r"\d|\s*[-−+*/^×÷·]\s*[\d(\\$a-z]|[(!^_]|[a-z](?![a-z])|\s*\\(?:times|cdot|div|frac|sqrt|pm|pi)\b"
                     r"|\s+x\s+\d|\s*[*×·]")
SENTENCE = re.compile(r"[^\n]{0,160}?(?=[.!?,;](?:\s|\*|$)|\n|$)")
BRACE = re.compile(r"\\[{}\\]|(?P<brace>[{}])")
LONGEST = 300                       # characters of a box that is looked into


def first_stated(response: str, reference: Reference) -> int | None:
    """The number of characters up to the end of the first statement of the reference answer; None where there is none.

    Behind an equals sign only a number can be told from what follows it, and only a reference that is a number is
    looked for there. It counts where no other equals sign follows before the line, the thinking or the response ends,
    "wait" comes, or a box or "answer". Linear in the length of the response."""
    wanted = _number(reference.answer) if reference.kind == "math" else None
    same = _remembering(reference)
    last: int | None = None         # the end of what stands behind the equals sign before, where it is the reference
    for place in PLACE.finditer(response):
        if place[0] != "=":
            if last is not None:
                return last
            if not place["stop"] and (end := _stated(response, place, wanted, same)) is not None:
                return end
        elif wanted is not None:
            match = NUMBER.match(response, place.end())
            whole = match is not None and not GOES_ON.match(response, match.end())
            last = match.end() if match and whole and _equal(_value(match), wanted) else None
    return last


def _stated(response: str, place: re.Match[str], wanted: float | None, same: Callable[[str], bool]) -> int | None:
    """The end of a box or of what stands behind "answer" where it is the reference, else None."""
    if place["box"]:
        end = _end_of_box(response, place.end())
        return end + 1 if end is not None and _states(response[place.end() : end], wanted, same) else None
    if wanted is not None and (match := NUMBER.match(response, place.end())):
        if not GOES_ON.match(response, match.end()):
            return match.end() if _equal(_value(match), wanted) else None
    sentence = SENTENCE.match(response, place.end())
    return sentence.end() if sentence and _states(sentence[0].strip(" *$"), wanted, same) else None


def end_of_answer(response: str) -> int:
    r"""The number of characters up to the end of the last \boxed{}; all of them where there is none."""
    begins = [place.end() for place in PLACE.finditer(response) if place["box"]]
    end = _end_of_box(response, begins[-1]) if begins else None
    return len(response) if end is None else end + 1


def _states(text: str, wanted: float | None, same: Callable[[str], bool]) -> bool:
    if wanted is not None and (found := _number(text)) is not None:
        return _equal(found, wanted)
    return same(text)


def _remembering(reference: Reference) -> Callable[[str], bool]:
    """Whether a text is the reference, each text looked at once: what repeats itself says the same over and over."""
    known: dict[str, bool] = {}

    def same(text: str) -> bool:
        if text not in known:
            known[text] = _same(text, reference)
        return known[text]

    return same


def _same(text: str, reference: Reference) -> bool:
    if not text.strip() or max(len(text), len(reference.answer)) > min(LONGEST, notation.MAX_CHARACTERS):
        return False
    try:
        if reference.kind == "choice":
            return kinds.same_choice(text, reference)
        if reference.kind == "text":
            return kinds.same_text(text, reference)
        return exact(text, reference.answer) is True
    except Exception:               # a hole in the comparison decides nothing but where an answer was first stated
        return False


def _number(text: str) -> float | None:
    r"""The value of a text that is one number: 1,000, -3.5, 2/3, \frac{2}{3}, $5, 50\%; None for anything else."""
    match = NUMBER.match(text)
    rest = text[match.end():].strip(" $.*") if match else None
    return _value(match) if match and rest in ("", "%", r"\%", r"\)") else None


def _value(match: re.Match[str]) -> float:
    if match["over"]:
        size = float(match["over"]) / (float(match["under"]) or float("nan"))
    else:
        size = float((match["whole"].replace(",", "") or "0") + (match["part"] or ""))
        size /= float(match["by"] or 1) or float("nan")
    return -size if match["sign"] in ("-", "−") else size


def _equal(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-12 * max(abs(a), abs(b))


def _end_of_box(text: str, begin: int) -> int | None:
    """The place of the brace that closes a box; None where it is far off or missing."""
    depth = 1
    for match in BRACE.finditer(text, begin, begin + LONGEST + 1):
        depth += {"{": 1, "}": -1}.get(match["brace"] or "", 0)
        if depth == 0:
            return match.start()
    return None
