"""Removes what follows a number without changing it: units, degrees, percent, ordinals."""

import re

from effreason.grading import notation

DEGREE = re.compile(r"\s*\^\{\s*\\circ\s*\}\s*(?:[CF]|\\text\{[CF]\})?$")
FEET = re.compile(r"([^'\"]*\d)\s*(?:''|['\"])")  # 12' and 12"
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|(?:text|operatorname)\s*\{\s*cis)")
PERCENT = re.compile(
    r"\s*(?:%|\\text\{\s*(?:percent|per cent|percentage|pct)\s*\}|(?<![a-zA-Z])(?:percent|per "
    r"cent|pct))\s*$", re.IGNORECASE)
ORDINAL = re.compile(r"(\d+)\s*(?:\^\{\s*)?(?:\\text\{\s*)?(st|nd|rd|th)\s*\}{0,2}")

SCALE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SCALED = re.compile(r"(.*?\S)\s*(?:\\text\{\s*)?\b(" + "|".join(SCALE)
                    + r")s?(\s+[A-Za-z ]*)?\s*(?:\}|\Z)(.*)", re.DOTALL)
# Words that change the number next to them.
NO_UNIT = re.compile(
    r"\b(?:or|and|if|mod|more|less|fewer|least|most|times|plus|minus|over|under|pi|not|to|is|by|"
    r"base|percent|dozen|score|half|halves|thirds?|quarters?|fifths?|tenths?|hundredths?|"
    r"thousandths?|squared|cubed|negative|below|before|after|factorial|root|choose|double|triple|"
    r"twice|pairs?|remainder|except|wrong|incorrect|false|invalid|never|no|none|impossible|isn|"
    r"undefined|a\.?m|p\.?m|AM|PM|am|pm|BC|BCE|AD|CE|"
    + "|".join(SCALE) + r")\b")
SHORT = ("mm cm dm km nm in ft yd mi kg mg lb lbs oz ml mL cl dl dL kL kPa Pa Hz kHz MHz GHz THz "
         "kW MW GW kJ MJ kN MN mph kph kmh hr hrs min mins sec secs ms ns sq cu rad deg USD EUR "
         "GBP gal qt pt cc eV keV MeV GeV KB kB MB GB TB mA mV kV mW Wh kWh mol mmol atm AU ly dB "
         "MPa GPa cal kcal rpm ppm fl").split()
LETTERS = (r"(?:[smghlLVWJNAKCFT](?![a-zA-Z\\])|\\Omega|k\s*\\Omega"
           r"|(?:\\mu|\\text\{\s*\\mu\s*\}|µ)\s*[a-zA-Z]{1,2})")
POWER = r"(?:\s*\^\{\s*-?\d\s*\})?"
JOINT = r"(?:\s+|\s*/\s*|\s*\\cdot\s*|-|\.\s*|$)"
TEXT_UNIT = re.compile(rf"(.*?\S)\s*((?:\\text\{{[^{{}}]*\}}{POWER}[\s/.]*(?:\\cdot\s*)?)+)$",
                       re.DOTALL)
# A quantity, then words for units with linking words: 5 km per hour.
WORD_UNIT = re.compile(
    rf"(.*?(?:[\d)}}]|\\pi(?=\s)))\s*"
    rf"((?:(?:{'|'.join(SHORT)}|(?<=[\s/-])[A-Za-z][a-z]{{2,}}|[A-Za-z][a-z]{{3,}}"
    rf"|\\text\{{[^{{}}]*\}}){POWER}{JOINT}"
    rf"(?:(?:s|h|m|g|l|L|C|F|per|of|a|an)(?![a-zA-Z]){POWER}\s*)?)+)$", re.DOTALL)
ASIDE = re.compile(                 # 15 (students)
    rf"(.*?[\d)}}])\s*[(\[]\s*"
    rf"(\\text\{{[^{{}}]*\}}|{'|'.join(SHORT)}|[A-Za-z][a-z]{{2,}}(?: [a-z]{{2,}})*)\s*[)\]]$",
    re.DOTALL)
# Units that could also be variables.
SYMBOL = rf"(?:{LETTERS}|{'|'.join(SHORT)}|\\text\{{[^{{}}]*\}}){POWER}"
SYMBOLS = rf"(?:{SYMBOL}(?:\s*(?:/|\\cdot|\s)\s*{SYMBOL}){{0,3}})"
LETTER_UNIT = re.compile(
    rf"(.*?[\d}}])\s*(?:\\text\{{\s*)?"
    rf"(?:{SYMBOLS}|\\frac\{{\s*{SYMBOLS}\s*\}}\{{\s*{SYMBOLS}\s*\}})\s*\}}?$", re.DOTALL)


def without_unit(text: str) -> str:
    r"""Removes what follows a quantity: 5\text{ cm}, 50\%, 10 weeks; 5 million is 5\cdot 10^{6}."""
    text = notation.strip_parentheses(text)
    if (match := SCALED.fullmatch(text)) and not NO_UNIT.search(match[3] or ""):
        text = rf"{match[1]}\cdot 10^{{{SCALE[match[2]]}}}{match[4]}"
    text = _without_ordinal(PERCENT.sub("", text))
    text = feet[1] if (feet := FEET.fullmatch(text)) else text
    if not TRIGONOMETRY.search(text):
        text = DEGREE.sub("", text)

    for pattern in (TEXT_UNIT, WORD_UNIT, ASIDE):
        match = pattern.fullmatch(text) if len(text) < 1000 else None
        if match and not NO_UNIT.search(match[2]):
            text = match[1].strip()
    return notation.strip_parentheses(text)


def _without_ordinal(text: str) -> str:
    """Removes an ordinal suffix: 5th is 5, but 5st is a product."""
    match = ORDINAL.fullmatch(text) if len(text) < 100 else None
    if match is None:
        return text

    teen = len(match[1]) > 1 and match[1][-2] == "1"
    suffix = "th" if teen else {"1": "st", "2": "nd", "3": "rd"}.get(match[1][-1], "th")
    return match[1] if match[2] == suffix else text
