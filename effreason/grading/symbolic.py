"""Compares two answers with sympy, after Math-Verify has parsed their LaTeX; for workers only.

`symbolic` evaluates no names and no code, but it may take any time and memory, so its process must
be killable.
"""

import re

import sympy
from math_verify import verify
from sympy.core.function import AppliedUndef

from effreason.grading import exact, latex, notation, quantities, sets

NO_VARIABLE = re.compile(
    r"\\(?:text|operatorname|mathbb)\s*\{[^{}]*\}|_\{[^{}]*\}|\\[a-zA-Z]+|\^\{\s*\\circ\s*\}")
# What the parser silently ignores: 5'6 and 5^{\circ}6 are not 56, and < 5 and 5 + are not numbers.
PRIME = re.compile("'")
FOREIGN = re.compile(
    r"[\"#@?$;]|\d\s*'|[^\x00-\x7f]|[\x00-\x1f]|\\circ\s*\}\s*\d|^\s*[<>]|[-+/^_<>]\s*$"
    r"|\\(?:log|ln|sin|cos|tan|lim|sum|prod|int|binom|frac|sqrt|cdot|cup|cap)\s*$")

# Points at which expressions are compared: positive ones, for roots and logarithms; both signs.
POSITIVE = ("0.7390851", "1.3247179", "2.2360679", "0.5671432", "1.7724538", "3.1622776",
            "0.9159655", "2.6854520")
SIGNED = ("-1.2020569", "0.6434105", "-0.3285820", "2.5029078", "-2.8077702", "1.4513692",
          "-0.7642236", "1.9021605")
DIGITS = 200
MAX_DIGITS = 2000                   # of a difference between constants, before it counts as zero
DECIMAL_TOLERANCE = 1e-6            # between a decimal and what it approximates
TOLERANCE = 1e-150                  # between values of expressions with variables
# Variables that count something, and functions whose values at other points say nothing.
INTEGERS = re.compile(r"[j-nN](?:_.*)?")
STEPS = (sympy.floor, sympy.ceiling, sympy.Mod, sympy.factorial, sympy.binomial, sympy.frac)
INTEGER_POINTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 25, 50)
# Sizes that are positive in any problem; sqrt{r^2} is r.
SIZES = re.compile(r".+_.+|[dhlmrDGLMRTV]|rho|sigma|epsilon|lambda|mu|omega")
DECIMAL = re.compile(r"[-+]?\s*(?:\d+\.\d*|\.\d+)(?:\\cdot\s*10\^\{-?\d+\})?\s*(?:\\dots)?")
FUNCTION = re.compile(r"(?<![a-zA-Z\\])[fgFG]'*\s*\(")
WORDS = re.compile(r"(?<!\{)\\text\{(?!\s*cis)")


def symbolic(prediction: str, reference: str) -> bool:
    """Compares by algebra two answers that `exact` left undecided."""
    return bool(exact.compare(notation.canonical(prediction), notation.canonical(reference), _leaf))


def _leaf(prediction: str, reference: str) -> bool:
    verdict = exact.leaf(prediction, reference)
    if verdict is not None:
        return verdict
    if exact.is_set(prediction) or exact.is_set(reference):
        verdict = sets.same(prediction, reference, _same_constants)
        if verdict is not None:
            return verdict

    (p, *_), (g, *_) = quantities.read(prediction), quantities.read(reference)
    prediction, reference = p.value, g.value
    for pattern in (FOREIGN, WORDS):
        if pattern.search(prediction) or pattern.search(reference):
            return False
    if any(len(pattern.findall(prediction)) != len(pattern.findall(reference))
           for pattern in (FUNCTION, PRIME)):
        return False                                # f(x+1) is no product
    if prediction.count("|") % 2 != reference.count("|") % 2:
        return False
    p_letters, g_letters = _letters(prediction), _letters(reference)
    if p_letters != g_letters and {*map(str.lower, p_letters)} == {*map(str.lower, g_letters)}:
        return False                                # the parser reads x and X as one variable

    decimals = [DECIMAL.fullmatch(side) is not None for side in (prediction, reference)]
    p_side, g_side = (latex.parse(re.sub(r"(\.\d+)\s*\\dots", r"\1", side))
                      for side in (prediction, reference))
    return _same(p_side, g_side, decimals[0] != decimals[1], "|" not in prediction + reference)


def _letters(text: str) -> set[str]:
    # E and I may be constants
    return set(re.findall("[a-df-hj-zA-DF-HJ-Z]", NO_VARIABLE.sub("", text)))


def _same(prediction, reference, approximately: bool, sized: bool) -> bool:
    """Compares two sympy objects.

    Args:
        approximately: whether one is a decimal alone.
        sized: whether sizes such as r are positive.
    """
    sides = prediction, reference
    if any(side is None or (isinstance(side, sympy.Basic) and side.has(sympy.nan, sympy.zoo))
           for side in sides):
        return False                                # 1/0

    verdict = None
    if all(isinstance(side, sympy.Expr) for side in sides):
        verdict = _same_values(prediction, reference, approximately, sized)
    elif all(isinstance(side, sympy.Eq) for side in sides):
        verdict = _same_equations(prediction, reference)
    return bool(verify(reference, prediction, timeout_seconds=None)) if verdict is None else verdict


def _same_equations(prediction, reference) -> bool | None:
    """Returns whether one equation is a multiple of the other, from values at points, or None."""
    p, g = prediction.lhs - prediction.rhs, reference.lhs - reference.rhs
    names = sorted({symbol.name for symbol in p.free_symbols | g.free_symbols})
    if not names or len(names) > len(POSITIVE) or p.atoms(AppliedUndef):
        return None
    if {symbol.name for symbol in p.free_symbols} != {symbol.name for symbol in g.free_symbols}:
        return False

    ratios = []
    for points in (POSITIVE, POSITIVE[3:] + POSITIVE[:3], POSITIVE[5:] + POSITIVE[:5]):
        values = _assign(names, points)
        top, bottom = _value(p, values), _value(g, values)
        if top is None or bottom is None or not bottom:
            return None
        ratios.append(sympy.sympify(top / bottom))

    return bool(ratios[0]) and all(_close(ratio, ratios[0], TOLERANCE) for ratio in ratios[1:])


def _same_values(prediction, reference, approximately: bool, sized: bool) -> bool | None:
    """Compares constants by their difference, others by values at fixed points.

    This replaces simplification, which may take minutes and misses identities. None if the sides
    agree only at positive points or cannot be evaluated; algebra then decides.
    """
    heavy = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)
    sides = prediction, reference = _evaluated(prediction), _evaluated(reference)
    names = sorted({symbol.name for side in sides for symbol in side.free_symbols})
    if any(side.has(*heavy) or side.atoms(AppliedUndef) for side in sides) or (
            len(names) > len(POSITIVE)):
        return None

    pairs = [sides]
    if any(_odd_roots(side) for side in sides):
        pairs.append((_with_real_roots(prediction), _with_real_roots(reference)))
    if not names and approximately:
        return not reference.is_Integer and any(
            _close(_value(p, {}), _value(g, {}), DECIMAL_TOLERANCE) for p, g in pairs)
    if not names:
        verdicts = [_same_constants(p, g) for p, g in pairs]
        return True if any(verdicts) else verdicts[0]

    steps = any(side.has(*STEPS) for side in sides)
    alternates = any(side.has(sympy.sin, sympy.cos) or any(
        power.base.is_negative for power in side.atoms(sympy.Pow)) for side in sides)
    counted = (steps or alternates) and all(map(INTEGERS.fullmatch, names))
    if steps or counted:
        whole = [{name: sympy.Integer(point + 3 * index) for index, name in enumerate(names)}
                 for point in INTEGER_POINTS]
        if not all(_close(_value(prediction, values), _value(reference, values), TOLERANCE)
                   for values in whole):
            return False if steps else None
        if counted:
            return True

    return _same_at_points(pairs, names, sized)


def _same_at_points(pairs: list, names: list[str], sized: bool) -> bool | None:
    for left, right in pairs:
        verdicts: list[bool | None] = []
        for points in (POSITIVE, POSITIVE[3:] + POSITIVE[:3], SIGNED, SIGNED[3:] + SIGNED[:3]):
            values = _assign(names, points, sized)
            verdicts.append(_close(_value(left, values), _value(right, values), TOLERANCE))
            if verdicts[-1] is False and len(verdicts) < 3:
                return False
        if all(verdicts):
            return True

    return None


def _same_constants(prediction, reference) -> bool | None:
    """Evaluates the difference to as many digits as it takes to tell it from zero."""
    if prediction == reference:
        return True
    try:
        difference = (prediction - reference).evalf(15, maxn=MAX_DIGITS)
        parts = difference.as_real_imag()
        if not all(part.is_Number and part.is_finite for part in parts):
            return None
        # A part that even MAX_DIGITS digits do not tell from zero has one bit of precision.
        return all(not part or getattr(part, "_prec", 53) <= 1 for part in parts)
    except latex.FAILURES:
        return None


def _assign(names: list[str], points: tuple[str, ...], sized: bool = False):
    """Returns a value for each variable; a positive one for sizes."""
    # Not Rational: for a rational number to a rational power sympy factors huge integers.
    signed = {name: point.lstrip("-") if sized and SIZES.fullmatch(name) else point
              for name, point in zip(names, points, strict=False)}
    return {name: sympy.Float(point, 2 * DIGITS) for name, point in signed.items()}


def _odd_roots(side):
    return {power for power in side.atoms(sympy.Pow)
            if power.exp.is_Rational and power.exp.q > 1 and power.exp.q % 2 == 1
            and (power.base.free_symbols or power.base.is_negative)}


def _with_real_roots(side):
    """Replaces odd roots by real ones: the cube root of -8 is then -2."""
    return side.xreplace({power: sympy.sign(power.base)**power.exp.p
                          * sympy.Abs(power.base)**power.exp for power in _odd_roots(side)})


def _evaluated(side):
    try:
        return side.doit()
    except latex.FAILURES:
        return side


def _value(side, values):
    """Returns an expression's complex value for these values of its variables; None without one."""
    try:
        points = {symbol: values[symbol.name] for symbol in side.free_symbols}
        number = side.subs(points).evalf(DIGITS)
        return number if number.is_number and number.is_finite and not number.free_symbols else None
    except latex.FAILURES:
        return None


def _close(prediction, reference, tolerance: float) -> bool | None:
    if prediction is None or reference is None:
        return None
    difference, size = (sympy.Abs(side).evalf(DIGITS)
                        for side in (prediction - reference, reference))
    if not (difference.is_Number and size.is_Number):
        return None
    return bool(difference <= tolerance * (size if size else 1))
