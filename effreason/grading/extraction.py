"""Finds the answer in a response."""

import re

THINK, END_OF_THINK = "<think>", "</think>"
# \boxed with its brace or what it takes without one, an escaped brace (text, not grouping), a
# grouping brace. \\boxed is \boxed escaped twice.
TOKEN = re.compile(
    r"(?P<box>\\{1,4}(?:boxed|fbox)\s*(?:\{|(?P<bare>[-+]?\d+(?:\.\d+)?"
    r"|[a-zA-Z](?![a-zA-Z])(?<=\s.)|\\(?:[dt]?frac|sqrt)(?:\s*(?:\{[^{}]*\}|\d)){1,2}"
    r"|\\[a-zA-Z]{2,20}(?:\{[^{}]*\})*)))"
    r"|\\[{}\\]|(?P<brace>[{}])")
# Between two boxes of one list: \boxed{3}, \boxed{5} and \boxed{7}.
BETWEEN = re.compile(r"[\s$]*(?:[,;]|,?[\s$]*(?:\\text\{\s*)?(?:and|or)\b\s*\}?)[\s$]*")
NAMED = re.compile(r"\s*(?:[^{}=]{1,100}=\s*)?")     # nothing, or "x ="
APPROXIMATELY = re.compile(r"[\s$]*(?:\\approx|\\simeq|≈)[\s$]*")


def extract_answer(response: str) -> str | None:
    r"""Returns the content of the last \boxed{} after the thinking, stripped, or None.

    Only the last box counts, or the last list of boxes: None if it is empty or never closed, if the
    thinking is not closed, or if there is no box. Nothing else in the text counts, not even the
    last number. Linear in the length.

    Args: response, which may begin inside the thinking (if the prompt opened it) or have none at
        all.
    """
    answer = _after_thinking(response)
    return None if THINK in answer else _last_box(answer)


def missing_answer_reason(response: str) -> str:
    """Says why `extract_answer` returns None for this response."""
    answer = _after_thinking(response)
    if THINK in answer:
        return "thinking not closed"
    if _first_box(answer) < len(answer):
        return "last box empty or open"
    return "no box after </think>" if END_OF_THINK in response else "no box"


def _after_thinking(response: str) -> str:
    return response.rpartition(END_OF_THINK)[2]


def _last_box(text: str) -> str | None:
    r"""Returns the content of the last outermost \boxed{} or \fbox{}.

    If a box contains nothing but another one, with or without "x =", the inner one counts. Boxes of
    one list are joined, and a box with nothing but an approximation belongs to the one before it.
    """
    boxes = outermost_boxes(text)
    if not boxes or boxes[-1][2] < 0:
        return None

    contents: list[str] = []
    start = None
    for begin, inside, end in reversed(boxes):
        if start is not None and (end < 0 or not BETWEEN.fullmatch(text, end + 1, start)):
            sign = APPROXIMATELY.match(contents[0]) or (
                APPROXIMATELY.fullmatch(text, end + 1, start) if end >= 0 else None)
            if end >= 0 and sign:
                rounded = APPROXIMATELY.sub("", contents[0], count=1)
                contents[0] = rf"{text[inside:end].strip()} \approx {rounded}"
            break
        contents.insert(0, text[inside:end].strip())
        start = begin

    return ", ".join(dict.fromkeys(contents)) if all(contents) else None


def outermost_boxes(text: str) -> list[list[int]]:
    """Returns the start of each box, the start of its content and its end, -1 if it is open."""
    boxes: list[list[int]] = []
    open_braces: list[int | None] = []  # index into boxes, None for a brace that only groups

    for match in TOKEN.finditer(text, _first_box(text)):
        if match["bare"]:
            boxes.append([match.start(), match.start("bare"), match.end()])
        elif match["box"]:
            open_braces.append(len(boxes))
            boxes.append([match.start(), match.end(), -1])
        elif match["brace"] == "{":
            open_braces.append(None)
        elif match["brace"] == "}" and open_braces:
            box = open_braces.pop()
            if box is not None:
                boxes[box][2] = match.start()

    outermost: list[list[int]] = []
    for start, begin, end in boxes:
        last = outermost[-1] if outermost else [0, 0, -2]
        inside = last[2] >= 0 and start < last[2]
        if inside and NAMED.fullmatch(text, last[1], start) and not text[end + 1:last[2]].strip():
            outermost[-1] = [start, begin, end]
        elif not inside:
            outermost.append([start, begin, end])

    return outermost


def _first_box(text: str) -> int:
    """Returns an index shortly before the first box, or the length of the text if there is none."""
    indices = [index for index in (text.find(r"\boxed"), text.find(r"\fbox")) if index >= 0]
    return max(min(indices) - 3, 0) if indices else len(text)
