"""What is said after a quantity and does not change its number: units, currency, degrees, percent."""

import re

from effreason.grading import notation

DEGREE = re.compile(r"\s*\^\{\s*\\circ\s*\}\s*(?:[CF]|\\text\{[CF]\})?$")
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
PERCENT = re.compile(
    r"\s*(?:%|\\text\{\s*(?:percent|per cent|percentage|pct)\s*\}|(?<![a-zA-Z])(?:percent|per cent|pct))\s*$",
    re.IGNORECASE)


SCALE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SCALED = re.compile(r"(.*?\S)\s*(?:\\text\{\s*)?\b(" + "|".join(SCALE) + r")s?\s*(?:\}|\Z)(.*)", re.DOTALL)
NO_UNIT = re.compile(r"\b(?:or|and|if|mod|more|less|least|most|times|plus|minus|over|pi|not|to|is|by|base|percent|"
                     r"dozen|score|half|a\.?m|p\.?m|AM|PM|" + "|".join(SCALE) + r")\b")
SHORT_UNITS = ("mm cm dm km nm in ft yd mi kg mg lb lbs oz ml mL cl dl dL kL kPa Pa Hz kHz MHz kW kJ kN mph kph kmh hr "
               "hrs min mins sec secs ms sq cu rad deg USD EUR gal qt pt cc").split()
POWER = r"(?:\s*\^\{\s*-?\d\s*\})?"
TEXT_UNIT = re.compile(rf"(.*?\S)\s*((?:\\text\{{[^{{}}]*\}}{POWER}[\s/]*(?:\\cdot\s*)?)+)$", re.DOTALL)
WORD_UNIT = re.compile(
    rf"(.*?(?:[\d)}}]|\\pi(?=\s)))\s*"                                                        # a quantity,
    rf"((?:(?:{'|'.join(SHORT_UNITS)}|[A-Za-z][a-z]{{2,}}|\\text\{{[^{{}}]*\}}){POWER}(?:\s+|\s*/\s*|$)"  # words
    rf"(?:(?:s|h|m|g|l|L|C|F|per|of|a|an)(?![a-zA-Z]){POWER}\s*)?)+)$", re.DOTALL)    # and links
LETTER_UNIT = re.compile(rf"(.*?[\d}}])\s*(?:\\text\{{\s*)?[smghlLVWJNAKCF](?:\s*/\s*[smh])?\}}?{POWER}$", re.DOTALL)


def without_unit(text: str) -> str:
    r"""Removes what is said after a quantity: 5\text{ cm}, 50\%, 90^{\circ}, 10 weeks; 5 million is 5\cdot 10^{6}."""
    text = notation.strip_parentheses(text)
    if match := SCALED.fullmatch(text):
        text = rf"{match[1]}\cdot 10^{{{SCALE[match[2]]}}}{match[3]}"
    text = PERCENT.sub("", text)
    if not TRIGONOMETRY.search(text):
        text = DEGREE.sub("", text)
    for pattern in (TEXT_UNIT, WORD_UNIT):
        match = pattern.fullmatch(text) if len(text) < 1000 else None
        if match and not NO_UNIT.search(match[2]):
            text = match[1].strip()
    return notation.strip_parentheses(text)
