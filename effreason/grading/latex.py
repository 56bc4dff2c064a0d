"""Parses canonical LaTeX with Math-Verify's parser; for workers only."""

import re

import math_verify
import sympy
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig

from effreason.grading import quantities

# Only canonical LaTeX in the box: other extractors pick any number out of a broken answer.
BOX = math_verify.LatexExtractionConfig(boxed_match_priority=0,
                                        normalization_config=NormalizationConfig(boxed="last"))
# What sympy raises for what it cannot compute.
FAILURES = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RecursionError,
            TypeError, ValueError)
CIS = re.compile(
    r"\\(?:text|operatorname)\s*\{\s*cis\s*\}\s*(\([^()]*\)|\{[^{}]*\}|\\frac\{[^{}]*\}\{[^{}]*\}"
    r"|\d+(?:\.\d+)?(?:\s*\^\{\s*\\circ\s*\})?|\\?[a-zA-Z]+)")
COMBINATIONS = re.compile(r"(?:\{\}|\^\{\s*\})?(?:_\{(\d+)\}|\^\{(\d+)\})\s*C_\{(\d+)\}"
                          r"|(?<![a-zA-Z])C(?:_\{(\d+)\}\^\{(\d+)\}|\((\d+),\s*(\d+)\))")
DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?![\d.])")
# The parser takes these for constants, even with a subscript, or not at all.
SUBSCRIPTED = re.compile(
    r"(\\[gG]amma|(?<![a-zA-Z\\])[eEI])_\{([^{}]*)\}|\\Gamma(?![a-zA-Z]|\s*\()")


def parse(text: str):
    """Returns the sympy object that canonical LaTeX tells of, None if the parser finds none.

    Decimals become fractions, and degrees in a function radians."""
    try:
        parsed = math_verify.parse(rf"\boxed{{{_adapted(text)}}}", extraction_config=[BOX],
                           fallback_mode="no_fallback", parsing_timeout=None)
        return _with_constants(parsed[0]) if parsed else None
    except FAILURES:
        return None  # it constructs what it reads, which fails for 2i < 0


def _adapted(text: str) -> str:
    """Adapts canonical notation to the parser."""
    text = CIS.sub(lambda match: rf"e^{{i\cdot {_radians(match[1])}}}",
                   COMBINATIONS.sub(_binomial, text))
    if quantities.TRIGONOMETRY.search(text):
        text = _radians(text)
    text = re.sub(r"\^\{\s*\\circ\s*\}", "", text)
    text = SUBSCRIPTED.sub(_renamed, DECIMAL.sub(_fraction, text))
    text = re.sub(r"\|\|([^|]*)\|\|", r"|\1|", text)  # the norm of a number is its absolute value
    return re.sub(r"\^\{\s*\(([^(){}]*)\)\s*\}", r"^{\1}", text)


def _radians(text: str) -> str:
    return re.sub(r"(\d+(?:\.\d+)?)\s*\^\{\s*\\circ\s*\}", r"{(\\frac{\1 \\pi}{180})}", text)


def _binomial(match: re.Match[str]) -> str:
    top, bottom = (group for group in match.groups() if group)
    return rf"\binom{{{top}}}{{{bottom}}}"


def _fraction(match: re.Match[str]) -> str:
    return rf"\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}}"


def _renamed(match: re.Match[str]) -> str:
    symbol = re.sub(r"\W", "", f"{match[1] or 'alone'}x{match[2] or ''}")
    return rf"q_{{{'capital' if symbol[0] in 'EIG' else 'small'}{symbol}}}"


def _with_constants(side):
    """Turns i and pi into numbers if the parser read them as variables."""
    numbers = {"i": sympy.I, "pi": sympy.pi}
    return side.subs({symbol: numbers[symbol.name] for symbol in side.free_symbols
                      if symbol.name in numbers})
