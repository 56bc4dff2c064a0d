r"""Reads rational numbers: 12, -0.5, \frac{1}{2}, 2\frac{1}{2}, 1.5\cdot 10^{-3}, (1+2)/3, 4!."""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import factorial

# Larger numbers stay undecided, so that no answer can cost minutes of big-integer arithmetic.
MAX_BITS = 8192
MAX_CHARACTERS = 1200
MAX_DEPTH = 40
MAX_FACTORIAL = 300

TOKEN = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:\\overline\{\d+\})?"
                   r"|\\(?:frac|cdot|times|div)(?![a-zA-Z])|[-+*/^!(){}\[\]])")
# A decimal alone may approximate; in a formula it is exact.
DECIMAL = re.compile(r"[-+]?\s*(?:\d+\.\d*|\.\d+)(?:\s*\\(?:cdot|times)\s*10\s*\^\{\s*-?\d+\s*\})?")
SCIENTIFIC = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+))[eE]([-+]?\d{1,3})")
MIXED = re.compile(r"([-+]?)\s*(\d{1,100})\s+(\d{1,100})\s*/\s*(\d{1,100})")


class Undecided(Exception):
    """Not a rational number that this module can read, or too large."""


@dataclass(frozen=True)
class Value:
    """A rational number."""

    number: Fraction | None         # None for a division by zero
    decimal: bool                   # written with a decimal point
    alone: bool                     # and nothing but one decimal, which may approximate


def read(text: str) -> Value:
    """Reads the whole text, in canonical notation, as one rational number.

    Raises: Undecided for anything else.
    """
    text = text.strip()
    if len(text) > MAX_CHARACTERS:
        raise Undecided

    if match := SCIENTIFIC.fullmatch(text):
        return Value(Fraction(match[1]) * _power(Fraction(10), int(match[2])), True, True)
    if match := MIXED.fullmatch(text):
        text = rf"{match[1]}({match[2]}+{match[3]}/{match[4]})"

    tokens = TOKEN.findall(text)
    if "".join(tokens) != "".join(text.split()):
        raise Undecided
    reader = _Reader(tokens)
    try:
        number = reader.sum()
    except ZeroDivisionError:
        number = None
    if number is not None and reader.next():
        raise Undecided
    return Value(number, "." in text, DECIMAL.fullmatch(text) is not None)


def same(a: Value, b: Value) -> bool:
    """Compares two values exactly, but a decimal and a fraction to a relative 1e-6."""
    if a.number is None or b.number is None:
        return False
    if a.number == b.number or a.decimal == b.decimal or a.alone == b.alone:
        return a.number == b.number

    decimal, other = (a.number, b.number) if a.decimal else (b.number, a.number)
    return other.denominator != 1 and abs(decimal - other) <= abs(other) / 10**6


class _Reader:
    """A recursive-descent parser of bounded depth and numbers."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.index, self.depth = [*tokens, ""], 0, 0

    def next(self) -> str:
        return self.tokens[self.index]

    def take(self, *tokens: str) -> str:
        """Returns the next token and moves on if it is one of these, otherwise ""."""
        token = self.next()
        self.index += token in tokens
        return token if token in tokens else ""

    def sum(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Undecided

        total = self.product()
        while self.next() in ("+", "-"):
            total = _bounded(total + self.product())

        self.depth -= 1
        return total

    def product(self) -> Fraction:
        total = self.signed_factor()
        while True:
            if self.take("*", r"\cdot", r"\times"):
                total = _bounded(total * self.signed_factor())
            elif self.take("/", r"\div"):
                total = _bounded(total / self.signed_factor())
            elif self.next() in ("(", r"\frac") or (
                    self.next()[:1].isdigit() and self.tokens[self.index - 1] == ")"):
                total = _bounded(total * self.factor())
            else:
                return total

    def signed_factor(self) -> Fraction:
        sign = 1
        while token := self.take("+", "-"):
            sign = -sign if token == "-" else sign
        return sign * self.factor()

    def factor(self) -> Fraction:
        base = self.atom()
        while self.take("!"):
            if base.denominator != 1 or not 0 <= base <= MAX_FACTORIAL:
                raise Undecided
            base = Fraction(factorial(int(base)))

        if self.take("^"):
            exponent = self.signed_factor()         # right-associative: 2^3^2 = 2^9
            if exponent.denominator != 1:
                raise Undecided
            base = _power(base, int(exponent))

        return base

    def atom(self) -> Fraction:
        if self.next()[:1].isdigit() or self.next()[:1] == ".":
            return self.number()
        return _bounded(self.group() / self.group()) if self.take(r"\frac") else self.group()

    def group(self) -> Fraction:
        closing = {"(": ")", "{": "}", "[": "]"}.get(self.take("(", "{", "["))
        inside = self.sum() if closing else Fraction()
        if not closing or not self.take(closing):
            raise Undecided
        return inside

    def number(self) -> Fraction:
        digits, _, cycle = self.next().rstrip("}").partition(r"\overline{")
        self.index += 1
        if cycle and "." not in digits:
            raise Undecided

        value = Fraction(digits)
        if cycle:
            decimals = len(digits.partition(".")[2])
            return value + Fraction(int(cycle), (10 ** len(cycle) - 1) * 10**decimals)
        if "." in digits or not self.take(r"\frac"):
            return value

        # 2\frac{1}{2} is two and a half, 2\frac{3}{2} may be a product
        top, bottom = self.group(), self.group()
        if not (top.denominator == bottom.denominator == 1 and 0 < top < bottom):
            raise Undecided
        return value + top / bottom


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise Undecided
    return value


def _power(base: Fraction, exponent: int) -> Fraction:
    if (base.numerator.bit_length() + base.denominator.bit_length()) * abs(exponent) > 2 * MAX_BITS:
        raise Undecided
    return _bounded(base**exponent)
