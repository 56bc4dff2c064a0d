r"""Turns inequalities in one variable into intervals: 1 < x \le 5 is (1,5]."""

import re

from effreason.grading import notation

RELATION = re.compile(r"(<|>|\\le(?![a-zA-Z])|\\ge(?![a-zA-Z]))")
VARIABLE = re.compile(r"\\?[a-zA-Z]+(?:_\{[^{}]*\})?")


def interval(text: str) -> str | None:
    r"""Returns (1,5] for 1 < x \le 5, (2,\infty) for x > 2, an interval itself, otherwise None."""
    text = text.strip()
    pieces = RELATION.split(text)
    if len(pieces) == 1:
        pair = text[:1] in ("(", "[") and text[-1:] in (")", "]")
        enclosed = pair and notation.matching(text).get(0) == len(text) - 1
        return text if enclosed and len(notation.split_top(text[1:-1], ",")) == 2 else None

    terms, signs = [piece.strip() for piece in pieces[::2]], pieces[1::2]
    if not all(terms):
        return None
    if len(terms) == 2 and VARIABLE.fullmatch(terms[1]):
        terms, signs = terms[::-1], [{"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}[signs[0]]]
    if len(terms) == 2 and VARIABLE.fullmatch(terms[0]):
        closed = signs[0].startswith("\\")
        if signs[0] in ("<", r"\le"):
            return rf"(-\infty,{terms[1]}{']' if closed else ')'}"
        return rf"{'[' if closed else '('}{terms[1]},\infty)"

    if len(terms) == 3 and VARIABLE.fullmatch(terms[1]):
        if all(sign in (">", r"\ge") for sign in signs):
            terms, signs = terms[::-1], signs[::-1]
        elif not all(sign in ("<", r"\le") for sign in signs):
            return None
        left, right = "[" if len(signs[0]) > 1 else "(", "]" if len(signs[1]) > 1 else ")"
        return f"{left}{terms[0]},{terms[2]}{right}"

    return None
