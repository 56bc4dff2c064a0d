r"""Reads a number with words round it: 5 cm, three dozen, 1 hour 30 minutes, A total of 35 cookies.

One list has the words that change a number, such as "not" or "squared". Every other word is a noun
or a unit, which only says what is counted.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from effreason.grading import words

# Each line has the names of one unit, its normal name first.
UNITS = {name: names[0] for names in map(str.split, """
mm millimeter millimetre\ncm centimeter centimetre\nm meter metre\nkm kilometer kilometre
in inch inches\nft foot feet\nyd yard\nmi mile\nmg milligram\nkg kilogram\nlb lbs pound\noz ounce
ml mL milliliter millilitre\nl L liter litre\ns sec secs second\nmin mins minute\nh hr hrs hour\nday
week\nmonth\nyear yr yrs\npercent pct percentage\ndegree deg\ncent\ndollar USD\neuro EUR\nrad radian
cl\ncL\ndl\ndL\nkl\nkL\ndm\nnm\ng\ngal\nqt\npt\nGBP\nmph\nkph\nkmh\nHz\nkHz\nMHz\nGHz\nTHz\nPa\nkPa\nMPa\nGPa
kW\nMW\nGW\nWh\nkWh\nkJ\nMJ\nkN\nMN\neV\nkeV\nMeV\nGeV\nKB\nkB\nMB\nGB\nTB\nmA\nmV\nkV\nmW\nms\nns\nmol
mmol\natm\nAU\nly\ndB\ncal\nkcal\nrpm\nppm\nfl\ncc\nsq\ncu\nper""".splitlines()) for name in names}
POWERS = {"square", "squared", "cubic", "cubed", "sq", "cu"}
# Single letters that may be units; next to a number without anything else they may be variables.
LETTERS = set("smghlLVWJNAKCFT")

# Words that change what the number says.
CHANGING = set("""
    or and nor if unless mod modulo more less fewer least most plus minus over under than to by from
    between until up out base half twice double triple squared cubed negative below above before
    after factorial root choose pair pairs pi infinity remainder except without not no none never
    neither is are was were be isn't aren't isn aren doesn't doesn don't don wrong incorrect false
    invalid impossible undefined untrue mistaken maybe perhaps power raised divided multiplied log
    exponent inverse reciprocal am pm a.m p.m bc bce ad ce oder und nicht et ou pas или и не
    """.split())
# Before a number "is" changes nothing, but "the square of" does.
CHANGING_BEFORE = CHANGING - {"is", "are", "was", "were", "be", "by", "and", "to", "after"} | set(
    "square cube sqrt multiple multiples factor factors opposite percent times part sine cosine"
    " tangent logarithm ceiling complement".split())
CHANGING_CHARACTERS = re.compile(
    "[一二三四五六七八九十百千万亿半以上下不非或和负余大小于多少]|分之")

MAX_CHARACTERS = 300                # of a number with its words

LITERAL = re.compile(r"[-+]?\s*(?:[.\d]|\\(?:frac|sqrt)(?![a-zA-Z]))"
                     r"(?:[\d.\s{}()/^!]|\\(?:frac|sqrt|pi|cdot|overline)(?![a-zA-Z]))*")
# 12\frac{m}{s^{2}} and \frac{12\text{ cm}}{\text{s}}: a unit in a fraction.
NAME = r"(\\text\{[^{}]*\}|\\?[A-Za-z]{1,3})(?:\^\{\d\})?"
UNIT_FRACTION = re.compile(rf"(.*?)\\frac\{{\s*(\d[\d.]*)?\s*{NAME}\s*\}}\{{\s*{NAME}\s*\}}",
                           re.DOTALL)
ORDINAL = re.compile(r"(\d+)\s*(?:\^\{\s*)?(?:\\text\{\s*)?(st|nd|rd|th)\s*\}{0,2}")
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|(?:text|operatorname)\s*\{\s*cis)")
TOKEN = re.compile(
    r"\\text\{(?P<text>[^{}]*)\}|(?P<degree>\^\{\s*\\circ\s*\})|(?P<joint>\^\{\s*-?\d\s*\}|/|-|\.|\s+"
    r"|\\cdot(?![a-zA-Z]))|(?P<symbol>k?\s*\\Omega(?![a-zA-Z])|\\mu\s*[a-zA-Z]{1,2}(?![a-zA-Z]))"
    r"|\\(?:[a-zA-Z]+|.)|(?P<word>[^\W\d_]+)|''|.", re.DOTALL)
LETTER_BETWEEN = re.compile(r"\d\s*[hmsg]\s*\d")                             # 1 h 30 min
NUMBER_BEFORE = re.compile(r"(?:[\d)}\]]|\\pi)\s*[(\[]?\s*$")


@dataclass(frozen=True)
class Quantity:
    """A number in canonical notation and the normal names of its unit, () if one is unknown."""

    value: str
    unit: tuple[str, ...] = ()


def read(text: str, *, letters: bool = False) -> tuple[Quantity, ...]:
    """Reads canonical text as a number with a unit or as several that add up, such as 5 ft 6 in.

    Text that is neither is returned unchanged, as a value without unit.

    Args: letters, whether a single letter after a number is a unit: 3s are seconds.
    """
    unchanged = (Quantity(text),)
    if len(text) > MAX_CHARACTERS:
        return unchanged
    if (ordinal := ORDINAL.fullmatch(text)) and ordinal[2] == _ordinal_suffix(ordinal[1]):
        return (Quantity(ordinal[1]),)
    if (fraction := UNIT_FRACTION.fullmatch(text)) and (
            bool(fraction[1].strip()) != bool(fraction[2]) and _may_divide(fraction.groups()[2:])):
        text = rf"{fraction[1] or fraction[2]} \text{{{words.without_text(fraction[3])} per }}"
        text += rf"\text{{{words.without_text(fraction[4])}}}"

    runs = _runs(text, letters or LETTER_BETWEEN.search(text) is not None)
    if runs is None or not any(isinstance(run, list) for run in runs):
        return unchanged
    if len(runs) == 1:
        quantity = _in_words(runs[0])
        return unchanged if quantity is None else (quantity,)

    lead = runs.pop(0) if isinstance(runs[0], list) else []
    if len(runs) > 2:
        return unchanged if lead else (_compound(runs) or unchanged)

    value, names = runs[0].strip(), runs[1] if len(runs) == 2 else []
    if lead:
        if lead[-1] in ("negative", "minus") and not value.startswith("-"):
            value, lead = f"-{value}", lead[:-1]
        if not LITERAL.fullmatch(value) or _changes(lead, CHANGING_BEFORE):
            return unchanged
    quantity = _with_unit(value, names)
    return unchanged if quantity is None else (quantity,)


def differ(p: tuple[Quantity, ...], g: tuple[Quantity, ...]) -> bool:
    """Returns whether known units differ, such as km and m. Nothing is converted."""
    if len(p) != len(g):
        return True
    return any(one.unit != other.unit and bool(one.unit and other.unit)
               for one, other in zip(p, g, strict=True))


def _runs(text: str, letters: bool) -> list | None:
    """Splits text into mathematics (strings) and words (lists); None if a part fits neither."""
    runs: list = []
    level, joint, opened = 0, "", ""
    degrees = TRIGONOMETRY.search(text) is None

    for match in TOKEN.finditer(text):
        token, after_words = match[0], bool(runs) and isinstance(runs[-1], list)
        names = [] if level else _names(match, runs, joint, letters, degrees, '"' in text)
        if names:
            if after_words:
                runs[-1] += (["per"] if "/" in joint else []) + names
            else:
                if runs and runs[-1].rstrip()[-1:] in ("(", "["):
                    runs[-1], opened = runs[-1].rstrip()[:-1], ")" if "(" in runs[-1] else "]"
                runs = [run for run in runs if not isinstance(run, str) or run.strip()]
                runs.append(names)
            joint = ""
        elif after_words and token == opened:
            opened = ""
        elif after_words and (match["joint"] or token in ",:"):
            joint += token
        else:
            if after_words:
                runs.append(joint if joint.strip() else "")
                joint = ""
            runs = runs or [""]
            runs[-1] += token
            level += (token == "{") - (token == "}")

    ended = not re.search(r"[/\-,:]|cdot", re.sub(r"\^\{[^{}]*\}", "", joint))
    return runs if ended and not opened else None


def _names(match: re.Match[str], runs: list, joint: str, letters: bool, degrees: bool,
           inches: bool) -> list[str]:
    """Returns the words of a token; [] if it is mathematics."""
    before = runs[-1] if runs else ""
    token, number = match[0], isinstance(before, str) and NUMBER_BEFORE.search(before[-12:])
    if match["text"] is not None:
        return match["text"].replace("/", " per ").replace("-", " ").replace(",", " ").split()
    if token == "%" or (match["degree"] and degrees):
        return [{"%": "percent"}.get(token, "degree")] if number else []
    if token in ("'", "''", '"') and number:
        return [({"'": "ft"}.get(token, "in")) if inches else "prime"]
    if match["symbol"]:
        return [token] if number or isinstance(before, list) else []
    if not match["word"]:
        return []

    if not token.isascii():
        return [token]
    if isinstance(before, list):
        return [token] if len(token) > 1 or token in LETTERS or token == "a" else []
    spaced = before[-1:] in ("", " ", "(", "[")
    if not before.strip():
        return [token] if len(token) > 3 or token.casefold() == "the" or (
            words.is_number(token)) else []
    known = len(token) > 1 and (_unit_name(token) or words.is_number(token))
    long = token[1:].islower() and len(token) > 3 - spaced
    return [token] if number and (known or long or (letters and token in LETTERS)) else []


def _may_divide(names: Iterable[str]) -> bool:
    """Returns whether all names are units: m and s, but not a and b."""
    return all(name.startswith("\\text") or name in LETTERS or _unit_name(name) for name in names)


def _in_words(names: list[str]) -> Quantity | None:
    """Reads "minus two thirds", "three dozen eggs"; None if no number comes first."""
    names = [name.casefold().strip(".,") for name in names]
    sign = "-" if names[:1] in (["negative"], ["minus"]) else ""
    names = names[len(sign):]
    if names[:1] in (["a"], ["an"]) and len(names) > 1 and words.is_number(names[1]):
        names[0] = "one"
    elif names[:1] == ["half"]:
        names.insert(0, "one")

    for end in range(min(len(names), 15), 0, -1):
        value = words.number(" ".join(names[:end]))
        if value is not None:
            return _with_unit(f"{sign}{value}", names[end:])
    return None


def _with_unit(value: str, names: list[str]) -> Quantity | None:
    """Multiplies by dozen, adds "and a half", drops a unit; None for words that change more."""
    folded = [name.casefold().strip(".,;!") for name in names]
    while folded:
        if folded[0] == "a" and folded[1:2] and folded[1] in words.MULTIPLES:
            folded, names = folded[1:], names[1:]               # half a dozen
        singular = folded[0].removesuffix("s")
        factor = words.MULTIPLES.get(folded[0], words.MULTIPLES.get(singular))
        part = words.PARTS.get(singular)
        more = words.PARTS.get(folded[2].removesuffix("s")) if len(folded) > 2 else None
        if factor:
            value, read = rf"({value})\cdot {factor}", 1
        elif part:
            value, read = rf"\frac{{{value}}}{{{part}}}", 1
        elif folded[0] == "and" and more:                       # and a half
            top = 1 if folded[1] in ("a", "an") else words.number(folded[1])
            if top is None:
                return None
            value, read = rf"{value}+\frac{{{top}}}{{{more}}}", 3
        else:
            break
        folded, names = folded[read:], names[read:]

    if folded and folded[0] not in ("squared", "cubed"):     # 5 cm squared, but not 5 squared
        folded = [name for name in folded if name not in ("squared", "cubed")]
    return None if _changes(folded, CHANGING) else Quantity(value, _unit(names))


def _compound(runs: list) -> tuple[Quantity, ...] | None:
    """Reads 1 hour 30 minutes; None unless every number has a unit of its own."""
    quantities = []
    for value, names in zip(runs[::2], runs[1::2], strict=False):
        names = names[:-1] if names[-1] == "and" else names
        value = value.strip(" ,").removeprefix(r"\land").strip()
        if not re.fullmatch(r"\d+(?:\.\d+)?", value) or len(_unit(names)) != 1:
            return None
        quantities.append(Quantity(value, _unit(names)))

    units = {quantity.unit for quantity in quantities}
    return tuple(quantities) if len(runs) == 2 * len(units) else None


def _changes(names: list[str], changing: set[str]) -> bool:
    folded = [name.casefold().strip(".,;:!") for name in names]
    return any(name in changing or words.is_number(name)
               or CHANGING_CHARACTERS.search(re.sub("千(?=[米克瓦焦卡])", "", name))
               for name in folded)


def _unit(names: list[str]) -> tuple[str, ...]:
    units = [_unit_name(name.strip(".")) for name in names if name.casefold() not in POWERS]
    return tuple(units) if all(units) else ()


def _unit_name(name: str) -> str:
    folded = name.casefold()
    return UNITS.get(name) or UNITS.get(folded) or UNITS.get(folded.removesuffix("s"), "")


def _ordinal_suffix(digits: str) -> str:
    teen = len(digits) > 1 and digits[-2] == "1"
    return "th" if teen else {"1": "st", "2": "nd", "3": "rd"}.get(digits[-1], "th")
