"""Removes what surrounds an answer: names of quantities, labels, set builders, points."""

import re

from effreason.grading import intervals, notation, words

NAME = re.compile(r"(?:\\[a-zA-Z]+(?![a-zA-Z])|[a-zA-Z|:,/(){}\s.])+")
MEMBER = re.compile(r"\\in(?![a-zA-Z])")
ANGLED = re.compile(r"\\langle(?![a-zA-Z])(.*)\\rangle|<([^<>]*,[^<>]*)>", re.DOTALL)
LABEL = re.compile(r"[A-Za-z][A-Za-z ]{2,30}:\s*(?=[\d\\(-])")                 # Area: 12
SET_BUILDER = re.compile(
    r"(?:\\?\{\s*)?(\\?[a-zA-Z]+)\s*(?:\\in\s*\\mathbb\{R\}\s*)?[|:](.*?)"
    r"(?:,\s*\1\s*\\in\s*\\mathbb\{R\}\s*)?(?:\\?\})?", re.DOTALL)
RATIO = re.compile(r"(\d+)\s*(?:\\text\{\s*to\s*\}|to)\s*(\d+)")
SYSTEM = re.compile(
    r"(?:\\\{\s*)?\\begin\{(cases|aligned|align\*?|array)\}(?:\{[lcr]+\})?(.*)\\end\{\1\}\s*",
    re.DOTALL)
POINT = re.compile(r"[A-Z]'?\s*(?=\()")


def plain(text: str) -> str:
    r"""Rewrites words for mathematics, \langle 1,2\rangle, \{x|x>2\}, systems, ratios plainly."""
    text = words.mathematics(text)
    text = text[label.end():] if (label := LABEL.match(text)) else text

    if angled := ANGLED.fullmatch(text):
        return f"({angled[1] or angled[2]})"
    if (builder := SET_BUILDER.fullmatch(text)) and intervals.RELATION.search(builder[2]):
        return builder[2].strip()

    if (system := SYSTEM.fullmatch(text)) is not None:
        rows = [row.replace("&=", "=").strip(" ,;") for row in system[2].split(r"\\")
                if row.strip()]
        if len(rows) > 1 and all("=" in row and "&" not in row for row in rows):
            return ",".join(rows)                   # x=1 and y=2 on two lines

    return f"{ratio[1]}:{ratio[2]}" if (ratio := RATIO.fullmatch(text)) else text


def is_name(text: str) -> bool:
    r"""Returns whether a text names a quantity: f(x), |AB|, S_{2}, \angle ABC, A:B, \text{Area}."""
    text = re.sub(r"_\{[^{}]*\}|_[a-zA-Z0-9]|'|\^\{-1\}|\^\{'+\}", "",
                  re.sub(r"\[([A-Z]{2,})\]", r"\1", text))
    text = re.sub(r"(?<=[a-zA-Z])\s*\([^()]*\)", "", text)
    return NAME.fullmatch(text) is not None and any(map(str.isalpha, text))


def without_point(text: str) -> str:
    """Removes the name of a point: P(1,2) is (1,2)."""
    match = POINT.match(text)
    rest = text[match.end():] if match else ""
    pair = rest.endswith(")") and notation.matching(rest).get(0) == len(rest) - 1
    return rest if pair and len(notation.split_top(rest[1:-1], ",")) > 1 else text


def without_member(text: str) -> str:
    r"""Removes a variable and its \in: x \in [1,2] is [1,2]."""
    parts = notation.split_top(text, MEMBER) if r"\in" in text else [text]
    return parts[1] if len(parts) == 2 and is_name(parts[0]) else text
