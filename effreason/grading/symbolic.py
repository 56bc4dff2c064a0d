"""Compares two answers with sympy, after Math-Verify has parsed their LaTeX; for workers only.

`symbolic` evaluates no names and no code, but it may take any time and memory, so its process must
be killable.
"""

import re

from effreason.grading import exact, notation, units

MAX_CHARACTERS = 400
MAX_DEPTH = 15
MAX_ITEMS = 40
MAX_BARS = 20

POWER_OF_NUMBERS = re.compile(r"\^\{[^a-zA-Z{}]*\^")  # a power of a power, of numbers only
HUGE_EXPONENT = re.compile(r"\^\{?\s*[-+(]*\s*\d{5,}")
POWER_OF_POWER = re.compile(r"\^\{?[^{}]*\d\s*\)?\s*\}?\s*\)\s*\^")   # (9^9)^(9^9)
HUGE_FACTORIAL = re.compile(r"\d{5,}\s*\)?\s*!|\^\{?[^{}]*\}?\s*\)?\s*!|!\s*\)?\s*!")
CIS = re.compile(
    r"\\(?:text|operatorname)\s*\{\s*cis\s*\}\s*(\([^()]*\)|\{[^{}]*\}|\\frac\{[^{}]*\}\{[^{}]*\}"
    r"|\d+(?:\.\d+)?(?:\s*\^\{\s*\\circ\s*\})?|\\?[a-zA-Z]+)")
COMBINATIONS = re.compile(r"(?:\{\})?_\{(\d+)\}\s*C_\{(\d+)\}|(?<![a-zA-Z])C_\{(\d+)\}\^\{(\d+)\}")
NO_VARIABLE = re.compile(
    r"\\(?:text|operatorname|mathbb)\s*\{[^{}]*\}|_\{[^{}]*\}|\\[a-zA-Z]+|\^\{\s*\\circ\s*\}")
# What the parser silently ignores: 5'6 and 5^{\circ}6 are not 56, and < 5 and 5 + are not numbers.
FOREIGN = re.compile(
    r"[\"#@?$;]|\d\s*'|[^\x00-\x7f]|[\x00-\x1f]|\\circ\s*\}\s*\d|^\s*[<>]|[-+/^_<>]\s*$"
    r"|\\(?:log|ln|sin|cos|tan|lim|sum|prod|int|binom|frac|sqrt|cdot|cup|cap)\s*$")
LONG_DIGITS = re.compile(r"\d{120,}")

# Points at which expressions are compared: positive ones, for roots and logarithms; both signs.
POSITIVE = ("0.7390851", "1.3247179", "2.2360679", "0.5671432", "1.7724538", "3.1622776",
            "0.9159655", "2.6854520")
SIGNED = ("-1.2020569", "0.6434105", "-0.3285820", "2.5029078", "-2.8077702", "1.4513692",
          "-0.7642236", "1.9021605")
DIGITS = 60
DECIMAL_TOLERANCE = 1e-6            # between a decimal and what it approximates
BOTH_DECIMAL_TOLERANCE = 1e-14      # the parser reads decimals as binary fractions
TOLERANCE = 1e-40                   # e^{\pi\sqrt{163}} is within 3e-30 of an integer

# Rarely left unevaluated in an answer, and may take any time: gets only part of the CPU limit.
HEAVY = re.compile(
    r"\\(?:int|iint|oint|sum|prod|lim|binom|choose|det|Gamma|zeta|frac\{d)|\\begin|!")
HEAVY_SHARE = 0.5


def cpu_share(prediction: str, reference: str) -> float:
    """Returns the share of the CPU limit that a comparison may use."""
    return HEAVY_SHARE if HEAVY.search(prediction) and not HEAVY.search(reference) else 1.0


def guard(text: str) -> bool:
    """Returns whether a canonical answer is too large for a worker to try.

    It catches the usual cases; the workers' limits are the real protection.
    """
    if len(text) > MAX_CHARACTERS or LONG_DIGITS.search(text):
        return True
    if notation.depth(text) > MAX_DEPTH:
        return True
    if text.count(",") > MAX_ITEMS or text.count("|") > MAX_BARS:
        return True
    huge = (POWER_OF_NUMBERS, HUGE_EXPONENT, POWER_OF_POWER, HUGE_FACTORIAL)
    return any(pattern.search(text) for pattern in huge)


def symbolic(prediction: str, reference: str) -> bool:
    """Compares by algebra two answers that `exact` left undecided."""
    return bool(exact.compare(notation.canonical(prediction), notation.canonical(reference), _leaf))


def _leaf(prediction: str, reference: str) -> bool:
    verdict = exact.leaf(prediction, reference)
    if verdict is not None:
        return verdict

    prediction, reference = units.without_unit(prediction), units.without_unit(reference)
    if FOREIGN.search(prediction) or FOREIGN.search(reference):
        return False
    if prediction.count("'") != reference.count("'"):
        return False
    if prediction.count("|") % 2 != reference.count("|") % 2:
        return False
    p_letters, g_letters = _letters(prediction), _letters(reference)
    if p_letters != g_letters and {*map(str.lower, p_letters)} == {*map(str.lower, g_letters)}:
        return False                                # the parser reads x and X as one variable
    return _same(_parse(_for_parser(prediction)), _parse(_for_parser(reference)), "." in prediction,
                 "." in reference)


def _letters(text: str) -> set[str]:
    # E and I may be constants
    return set(re.findall("[a-df-hj-zA-DF-HJ-Z]", NO_VARIABLE.sub("", text)))


def _for_parser(text: str) -> str:
    """Adapts canonical notation to Math-Verify's parser; degrees in a function become radians."""
    text = CIS.sub(_exponential, COMBINATIONS.sub(_binomial, text))
    if units.TRIGONOMETRY.search(text):
        text = _radians(text)
    text = re.sub(r"\^\{\s*\\circ\s*\}", "", text)
    text = re.sub(r"\|\|([^|]*)\|\|", r"|\1|", text)  # the norm of a number is its absolute value
    text = re.sub(r"\^\{\s*\((.*)\)\s*\}", _unparenthesised, text)
    return re.sub(r"\\text\{([^{}]*)\}", r"\\text{\1}", text)


def _exponential(match: re.Match[str]) -> str:
    return rf"e^{{i\cdot {_radians(match[1])}}}"


def _radians(text: str) -> str:
    return re.sub(r"(\d+(?:\.\d+)?)\s*\^\{\s*\\circ\s*\}", r"{(\\frac{\1 \\pi}{180})}", text)


def _binomial(match: re.Match[str]) -> str:
    return rf"\binom{{{match[1] or match[3]}}}{{{match[2] or match[4]}}}"


def _unparenthesised(match: re.Match[str]) -> str:
    inside = match[1]
    balanced = "(" not in inside and ")" not in inside and "{" not in inside and "}" not in inside
    return f"^{{{inside}}}" if balanced else match[0]


def _parse(text: str):
    """Parses one answer; None if the parser finds no mathematics."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # Only canonical LaTeX in the box: other extractors pick any number out of a broken answer.
    config = LatexExtractionConfig(boxed_match_priority=0,
                                   normalization_config=NormalizationConfig(boxed="last"))
    try:
        parsed = parse(rf"\boxed{{{text}}}", extraction_config=[config],
                       fallback_mode="no_fallback", parsing_timeout=None)
        return _with_constants(parsed[0]) if parsed else None
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError,
            ValueError):
        return None  # it constructs what it reads, which fails for 2i < 0


def _with_constants(side):
    """Turns i and pi into numbers if the parser read them as variables."""
    import sympy

    numbers = {"i": sympy.I, "pi": sympy.pi}
    return side.subs({symbol: numbers[symbol.name] for symbol in side.free_symbols
                      if symbol.name in numbers})


def _same(prediction, reference, prediction_decimal: bool, reference_decimal: bool) -> bool:
    import sympy
    from math_verify import verify

    if prediction is None or reference is None:
        return False
    if any(_undefined(side) for side in (prediction, reference)):
        return False

    verdict = None
    if isinstance(prediction, sympy.Expr) and isinstance(reference, sympy.Expr):
        verdict = _same_values(prediction, reference, prediction_decimal, reference_decimal)
    if isinstance(prediction, sympy.Eq) and isinstance(reference, sympy.Eq):
        verdict = _same_equations(prediction, reference)
    if verdict is not None:
        return verdict
    return bool(verify(reference, prediction, timeout_seconds=None))


def _same_equations(prediction, reference) -> bool | None:
    """Returns whether one equation is a multiple of the other, from values at points, or None."""
    import sympy

    p, g = prediction.lhs - prediction.rhs, reference.lhs - reference.rhs
    names = sorted({symbol.name for symbol in p.free_symbols | g.free_symbols})
    if not names or len(names) > len(POSITIVE) or p.atoms(sympy.core.function.AppliedUndef):
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

    decimals = p.atoms(sympy.Float) or g.atoms(sympy.Float)
    tolerance = BOTH_DECIMAL_TOLERANCE if decimals else TOLERANCE
    return bool(ratios[0]) and all(_close(ratio, ratios[0], tolerance) for ratio in ratios[1:])


def _undefined(side) -> bool:
    import sympy

    return isinstance(side, sympy.Basic) and side.has(sympy.nan, sympy.zoo)


def _same_values(prediction, reference, prediction_decimal: bool,
                 reference_decimal: bool) -> bool | None:
    """Compares two expressions by values at fixed points, with so many digits that others differ.

    If both can be evaluated, this replaces simplification, which may take minutes and misses
    identities. None if they agree only at positive points or cannot be evaluated; algebra then
    decides.
    """
    import sympy

    heavy = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)
    prediction, reference = _evaluated(prediction), _evaluated(reference)
    names = sorted({symbol.name for side in (prediction, reference)
                    for symbol in side.free_symbols})
    undefined = sympy.core.function.AppliedUndef
    functions = prediction.atoms(undefined) | reference.atoms(undefined)
    if prediction.has(*heavy) or reference.has(*heavy) or functions or len(names) > len(POSITIVE):
        return None

    tolerance = TOLERANCE
    if prediction_decimal or reference_decimal:
        approximates = prediction_decimal != reference_decimal and not reference.is_Integer
        tolerance = DECIMAL_TOLERANCE if approximates else BOTH_DECIMAL_TOLERANCE
    sides = [(prediction, reference)]
    verdicts: list[bool | None]
    if any(_odd_roots(side) for side in sides[0]):
        sides.append((_with_real_roots(prediction), _with_real_roots(reference)))
    if not names:
        verdicts = [_close(_value(left, {}), _value(right, {}), tolerance) for left, right in sides]
        return True if any(verdicts) else verdicts[0]

    for left, right in sides:
        verdicts = []
        for points in (POSITIVE, POSITIVE[3:] + POSITIVE[:3], SIGNED, SIGNED[3:] + SIGNED[:3]):
            values = _assign(names, points)
            verdicts.append(_close(_value(left, values), _value(right, values), tolerance))
            if verdicts[-1] is False and len(verdicts) < 3:
                return False
        if all(verdicts):
            return True

    return None


def _assign(names: list[str], points: tuple[str, ...]):
    """Returns a value for each variable."""
    import sympy

    # Not Rational: for a rational number to a rational power sympy factors huge integers.
    return {name: sympy.Float(points[index], 2 * DIGITS) for index, name in enumerate(names)}


def _odd_roots(side):
    import sympy

    return {power for power in side.atoms(sympy.Pow)
            if power.exp.is_Rational and power.exp.q > 1 and power.exp.q % 2 == 1
            and (power.base.free_symbols or power.base.is_negative)}


def _with_real_roots(side):
    """Replaces odd roots by real ones: the cube root of -8 is then -2."""
    import sympy

    return side.xreplace({power: sympy.sign(power.base)**power.exp.p
                          * sympy.Abs(power.base)**power.exp for power in _odd_roots(side)})


def _evaluated(side):
    try:
        return side.doit()
    except (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError,
            ValueError):
        return side


def _value(side, values):
    """Returns an expression's complex value for these values of its variables; None without one."""
    try:
        points = {symbol: values[symbol.name] for symbol in side.free_symbols}
        number = side.subs(points).evalf(DIGITS)
        return number if number.is_number and number.is_finite and not number.free_symbols else None
    except (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError,
            ValueError):
        return None


def _close(prediction, reference, tolerance: float) -> bool | None:
    if prediction is None or reference is None:
        return None
    import sympy

    difference = sympy.Abs(prediction - reference).evalf(DIGITS)
    size = sympy.Abs(reference).evalf(DIGITS)
    if not (difference.is_Float or difference.is_Number) or not size.is_Number:
        return None
    return bool(difference <= tolerance * (size if size else 1))
