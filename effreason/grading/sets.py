r"""Compares inequalities, intervals and unions as sets of real numbers; for workers only."""

import re
from collections.abc import Callable

import sympy

from effreason.grading import forms, latex, notation

OR = re.compile(r"\\(?:lor|cup)(?![a-zA-Z])")
AND = re.compile(r"\\(?:land|cap)(?![a-zA-Z])")
WITHOUT = re.compile(r"\\setminus(?![a-zA-Z])")
RELATIONS = re.compile(r"(<|>|=|\\(?:le|ge|ne)(?![a-zA-Z]))")


class NotASet(Exception):
    """A text that is no set of real numbers."""


def same(prediction: str, reference: str, same_value: Callable) -> bool | None:
    """Returns whether two texts tell of the same set of real numbers; None if one is no such set.

    Args: same_value, compares two end points.
    """
    try:
        (p, p_variable), (g, g_variable) = (_Reader().read(side)
                                            for side in (prediction, reference))
    except NotASet:
        return None
    if p_variable and g_variable and p_variable != g_variable:
        return False                                # x < 1 is not y < 1
    if p == g:
        return True

    pieces = [sorted(side.args if isinstance(side, sympy.Union) else (side,), key=_position)
              for side in (p, g)]
    return len(pieces[0]) == len(pieces[1]) and all(
        _same_piece(one, other, same_value) for one, other in zip(*pieces, strict=True))


def _position(piece) -> float:
    try:
        return float(piece.inf.evalf())
    except (TypeError, NotImplementedError, AttributeError):
        return 0.0


def _same_piece(p, g, same_value: Callable) -> bool:
    if isinstance(p, sympy.Interval) and isinstance(g, sympy.Interval):
        return ((p.left_open, p.right_open) == (g.left_open, g.right_open)
                and same_value(p.start, g.start) and same_value(p.end, g.end))
    if isinstance(p, sympy.FiniteSet) and isinstance(g, sympy.FiniteSet) and len(p) == len(g):
        return all(map(same_value, *(sorted(side, key=lambda value: float(value.evalf()))
                                     for side in (p, g))))
    return False


class _Reader:
    """Reads one set; remembers the variable of its inequalities."""

    def __init__(self) -> None:
        self.variable = ""

    def read(self, text: str):
        """Returns the set and its variable, "" without one. Raises NotASet."""
        try:
            return self._set(text), self.variable
        except latex.FAILURES:
            raise NotASet from None

    def _set(self, text: str):
        text = forms.plain(forms.without_member(notation.strip_parentheses(text.strip())))
        for separator, combine in ((OR, sympy.Union), (AND, sympy.Intersection)):
            if len(parts := notation.split_top(text, separator)) > 1:
                return combine(*map(self._set, self._complete(parts)))
        if len(parts := notation.split_top(text, WITHOUT)) == 2:
            return sympy.Complement(*map(self._set, parts))
        if len(parts := notation.split_top(text, ",;")) > 1:
            parts = self._complete(parts)
            sets = list(map(self._set, parts))
            # Conditions all hold if they can; otherwise, and for intervals, one of them does.
            conditions = all(RELATIONS.search(part) or r"\mathbb" in part for part in parts)
            both = sympy.Intersection(*sets) if conditions else None
            return both if both and both is not sympy.S.EmptySet else sympy.Union(*sets)

        if text == r"\mathbb{R}":
            return sympy.S.Reals
        if text in (r"\emptyset", r"\{\}"):
            return sympy.S.EmptySet
        if len(pieces := RELATIONS.split(text)) > 1:
            return self._relations([piece.strip() for piece in pieces[::2]], pieces[1::2])
        return self._brackets(text)

    def _complete(self, parts: list[str]) -> list[str]:
        r"""Completes x \ne 1, 2 and x = 1 or 2."""
        head = re.match(r"(.*?(?:=|\\ne(?![a-zA-Z])))", parts[0])
        return [part if not head or RELATIONS.search(part) or part.strip()[:1] in tuple("([\\")
                else f"{head[1]} {part}" for part in parts if part]

    def _relations(self, terms: list[str], signs: list[str]):
        sides = [self._value(term) for term in terms]
        symbols = set().union(*(side.free_symbols for side in sides))
        if len(symbols) != 1 or self.variable not in ("", (symbol := symbols.pop()).name):
            raise NotASet
        self.variable = symbol.name
        kinds = {"<": sympy.Lt, ">": sympy.Gt, "=": sympy.Eq, r"\le": sympy.Le, r"\ge": sympy.Ge,
                 r"\ne": sympy.Ne}
        if "=" in signs and not any(side.is_Symbol for side in sides):
            raise NotASet                           # an equation to solve is no answer
        real = sympy.Symbol("x", real=True)
        sides = [side.subs(symbol, real) for side in sides]
        relations = [kinds[sign](left, right)
                     for left, sign, right in zip(sides, signs, sides[1:], strict=False)]
        return sympy.Intersection(*(sympy.solveset(relation, real, sympy.S.Reals)
                                    for relation in relations))

    def _brackets(self, text: str):
        escaped = text.startswith(r"\{") and text.endswith(r"\}")
        inside = notation.split_top(text[1 + escaped:-1 - escaped], ",;")
        if escaped:
            return sympy.FiniteSet(*map(self._value, inside))
        if text[:1] not in ("(", "[") or text[-1:] not in (")", "]") or len(inside) != 2:
            raise NotASet
        start, end = map(self._value, inside)
        return sympy.Interval(start, end, text[0] == "(", text[-1] == ")")

    def _value(self, text: str):
        value = latex.parse(text)
        if not isinstance(value, sympy.Expr):
            raise NotASet
        return value
