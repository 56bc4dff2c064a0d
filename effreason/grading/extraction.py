"""Which part of a response is its answer."""

import re

THINK, END_OF_THINK = "<think>", "</think>"
# A box with its brace, an escaped brace (text, not grouping), a grouping brace. \\boxed is \boxed escaped once more.
TOKEN = re.compile(r"(?P<box>\\{1,4}(?:boxed|fbox)\s*\{)|\\[{}\\]|(?P<brace>[{}])")
NAMED = re.compile(r"\s*(?:[^{}=]{1,100}=\s*)?")     # nothing, or x =


def extract_answer(response: str) -> str | None:
    r"""Returns what stands in the last \boxed{} after the thinking, or None.

    The last box decides, whatever stands in it: None when it is empty or never closed, when the thinking is not closed,
    or when there is no box. Nothing else in the text counts: a number that happens to be there is no answer. Linear in
    the length.

    Args: response, which may begin inside the thinking (the prompt opened it) or have none at all.
    Returns: the content of the box, stripped.
    """
    answer = response[response.rfind(END_OF_THINK) + len(END_OF_THINK):] if END_OF_THINK in response else response
    if THINK in answer:
        return None
    return _last_box(answer)


def reason(response: str) -> str:
    """Says in words why `extract_answer` finds no answer in a response."""
    answer = response[response.rfind(END_OF_THINK) + len(END_OF_THINK):] if END_OF_THINK in response else response
    if THINK in answer:
        return "thinking not closed"
    if _first_box(answer) < len(answer):
        return "last box empty or open"
    return "no box after </think>" if END_OF_THINK in response else "no box"


def _last_box(text: str) -> str | None:
    r"""Finds the outermost last \boxed{} or \fbox{}; a box that is all another holds, but for x =, stands for it."""
    boxes: list[list[int]] = []                     # start of the command, start and end of the content; end -1: open
    open_braces: list[int | None] = []              # index into boxes, None for a brace that only groups
    for match in TOKEN.finditer(text, _first_box(text)):
        if match["box"]:
            open_braces.append(len(boxes))
            boxes.append([match.start(), match.end(), -1])
        elif match["brace"] == "{":
            open_braces.append(None)
        elif match["brace"] == "}" and open_braces:
            box = open_braces.pop()
            if box is not None:
                boxes[box][2] = match.start()
    last: list[int] | None = None
    for start, begin, end in boxes:
        inside = last is not None and last[2] >= 0 and start < last[2]
        if last is None or not inside or (
                NAMED.fullmatch(text, last[1], start) and not text[end + 1:last[2]].strip()):
            last = [start, begin, end]
    if last is None or last[2] < 0:
        return None
    return text[last[1]:last[2]].strip() or None


def _first_box(text: str) -> int:
    places = [place for place in (text.find(r"\boxed"), text.find(r"\fbox")) if place >= 0]
    return max(min(places) - 3, 0) if places else len(text)
