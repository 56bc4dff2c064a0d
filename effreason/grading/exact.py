"""Compares two answers in plain Python; leaves undecided what needs algebra."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from effreason.grading import forms, intervals, notation, rationals, units, words

# True, False, or None if undecided.
Verdict = bool | None
Leaf = Callable[[str, str], Verdict]

MAX_UNORDERED = 50
MAX_CHAIN = 3
MAX_DEPTH = 50

LETTER = re.compile(r"[A-J]")
CHOICE = re.compile(r"\(?([A-J])\s*(?:\)|[.:])(?=\s|$|\\text|[^\s)]).*|\(?([A-J])\)?", re.DOTALL)
CHOICE_WORD = re.compile(r"^\s*(?:option|choice|answer)\b\s*(?:is\b)?:?", re.IGNORECASE)
EQUALS = re.compile(r"(?<![<>!:])=")
SET_ALGEBRA = re.compile(r"<|>|\\(?:cup|cap|le|ge|setminus|mathbb)(?![a-zA-Z])")
CUP = re.compile(r"\\cup(?![a-zA-Z])")
APPROXIMATELY = re.compile(r"\\approx(?![a-zA-Z])")
CLAIM = re.compile(
    r"\\(?:equiv|to|rightarrow|Rightarrow|implies|iff|sim|cong|ne|mapsto|neg|not)(?![a-zA-Z])")
MATRIX = re.compile(
    r"\\begin\{(?:[pb]|small)matrix\}((?:(?!\\begin).)*)\\end\{(?:[pb]|small)matrix\}", re.DOTALL)
DIGITS_APART = re.compile(r"\d\s+[\d.]")
BASE = re.compile(r"\(?([0-9A-Z]+)\)?_\{(?:\\text\{)?([0-9]+|[a-z]+)\}?\}")
BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
         "ten": 10, "twelve": 12, "sixteen": 16}
NO_SOLUTION = {r"\emptyset", r"\{\}"}
SUBSCRIPT = re.compile(r"_\{[^{}]*\}")
NAMED_VALUE = re.compile(r"[a-z]\s*=")
CONSTANTS = ("e", "i", r"\pi", r"\infty")


class NeedsSetAlgebra:
    """Two lists that cannot be compared element by element."""


NEEDS_SET_ALGEBRA = NeedsSetAlgebra()


@dataclass(frozen=True)
class Bracketed:
    """A list of answers and its brackets: "()", "[)", "{}" for a set, "" for none."""

    brackets: str
    elements: tuple[str, ...]


def exact(prediction: str, reference: str) -> Verdict:
    """Compares two answers without algebra; None leaves the pair to the symbolic stage."""
    p = notation.strip_parentheses(notation.canonical(prediction))
    g = notation.strip_parentheses(notation.canonical(reference))
    if p != g and notation.depth(p) > MAX_DEPTH:
        return None
    return compare(p, g, leaf)


def compare(prediction: str, reference: str, same: Leaf) -> Verdict:
    """Compares two canonical answers part by part, and parts that cannot be divided by `same`.

    A name before "=" may be missing, and every other part of a chain must equal the answer. Lists
    and sets are unordered, tuples are ordered, and the kinds of brackets must agree. An inequality
    in one variable is its interval.
    """
    if not prediction or not reference:
        return False

    prediction, reference = forms.plain(prediction), forms.plain(reference)
    if notation.key(prediction) == notation.key(reference):
        return True
    if {prediction, reference} <= NO_SOLUTION:
        return True

    p_claims, g_claims = (CLAIM.search(SUBSCRIPT.sub("", side)) for side in (prediction, reference))
    if p_claims and not g_claims:
        return False                                # 5 \equiv 6 is neither the answer 5 nor 6
    if LETTER.fullmatch(bare := notation.strip_parentheses(reference)):
        return _is_choice(prediction, bare)

    prediction, reference = _without_approximation(prediction), _without_approximation(reference)
    p = _bracketed(notation.strip_parentheses(prediction))
    g = _bracketed(notation.strip_parentheses(reference))
    if (p.brackets == "()") != (g.brackets == "()"):
        p, g = _vector(p), _vector(g)

    if len(p.elements) > 1 or len(g.elements) > 1 or p.brackets or g.brackets:
        verdict = _compare_lists(p, g, same)
        return same(prediction, reference) if isinstance(verdict, NeedsSetAlgebra) else verdict
    return _compare_single(p.elements[0], g.elements[0], same)


def leaf(prediction: str, reference: str) -> Verdict:
    """Compares two canonical answers without parts: spelling, words, numbers; ignores units."""
    if notation.key(prediction) == notation.key(reference):
        return True
    verdict = _words(prediction, reference)
    if verdict is not None:
        return verdict

    p, g = units.without_unit(prediction), units.without_unit(reference)
    if DIGITS_APART.search(p) and not rationals.MIXED.fullmatch(p):
        return False                                # "5 5" must not become 55
    if notation.key(p) == notation.key(g):
        return True
    if (p_base := BASE.fullmatch(p)) and (g_base := BASE.fullmatch(g)):
        return p_base[1] == g_base[1] and _base(p_base[2]) == _base(g_base[2])

    p_value, g_value = _value(p), _value(g)
    if p_value is None and g_value is not None:
        p_value = _value_of_letter_unit(p)
    if g_value is None and p_value is not None:
        g_value = _value_of_letter_unit(g)

    if p_value is UNDEFINED or g_value is UNDEFINED:
        return False
    if isinstance(p_value, rationals.Value) and isinstance(g_value, rationals.Value):
        return rationals.same(p_value, g_value)
    value, other = (p_value, g) if p_value else (g_value, p)
    if value and (BASE.fullmatch(other) or other.strip("+- ") == r"\infty"):
        return False
    return None


class Undefined:
    """The value of 1/0."""


UNDEFINED = Undefined()


def _value(text: str) -> rationals.Value | Undefined | None:
    base = BASE.fullmatch(text)
    try:
        return rationals.read(base[1] if base and _base(base[2]) == 10 else text)
    except rationals.Undefined:
        return UNDEFINED
    except (rationals.Undecided, RecursionError):
        return None


def _value_of_letter_unit(text: str) -> rationals.Value | Undefined | None:
    """Returns the number in a quantity such as 3s: next to a number s is seconds, no variable."""
    match = units.LETTER_UNIT.fullmatch(text) if len(text) < 200 else None
    return _value(match[1]) if match else None


def _base(name: str) -> int:
    return int(name[:6]) if name.isdigit() else BASES.get(name, 0)


def _words(prediction: str, reference: str) -> Verdict:
    if not (notation.is_word(prediction) or notation.is_word(reference)):
        return None
    p, g = (notation.key(words.bare(text)).casefold() for text in (prediction, reference))
    return p == g                                   # words never equal a formula


def _is_choice(prediction: str, letter: str) -> Verdict:
    r"""Returns whether the prediction names this choice: B, (B), \text{(B)}, B. x = 42, (B) 42."""
    text = re.sub(r"[{}]", "", re.sub(r"\\text\{([^{}]*)\}", r"\1", prediction))
    match = CHOICE.fullmatch(notation.strip_parentheses(CHOICE_WORD.sub("", text)))
    return match is not None and (match[1] or match[2]) == letter


def _without_approximation(text: str) -> str:
    r"""Drops approximations: \sqrt{2} \approx 1.41 is \sqrt{2}; but x \approx 1.41 is x = 1.41."""
    parts = notation.split_top(text, APPROXIMATELY) if r"\approx" in text else [text]
    if len(parts) == 1:
        return text
    first = EQUALS.split(parts[0])[-1]
    if first.strip() and not forms.is_name(first):
        return parts[0]
    return "=".join(part for part in parts[:2] if part)


def _bracketed(text: str) -> Bracketed:
    """Splits an answer into its elements."""
    text, name = forms.without_point(forms.without_member(text)), ""
    pieces = [piece for piece in notation.split_top(text, ",;") if piece] or [text]
    if len(pieces) > 1:
        return Bracketed("", tuple(piece for element in pieces for piece in _signs(element)))

    pieces = EQUALS.split(text) if "=" in text else [text]
    if len(pieces) == 2 and forms.is_name(pieces[0]):
        name, text = pieces[0], pieces[1].strip()

    escaped = text.startswith(r"\{") and text.endswith(r"\}")
    begin, end = (1, len(text) - 2) if escaped else (0, len(text) - 1)
    is_set = escaped or text[:1] == "{"             # {1,2} without its backslashes
    if text and text[begin] in "([{" and notation.matching(text).get(begin) == end + escaped:
        inside = [piece for piece in notation.split_top(text[begin + 1:end], ",;") if piece]
        if len(inside) > 1 or is_set:
            elements = tuple(inside)
            if is_set:
                elements = tuple(piece for element in inside for piece in _signs(element))
            return Bracketed(text[begin] + ("}" if is_set else text[end]), elements)

    signed = _signs(text)
    prefix = f"{name}=" if name and len(signed) == 1 else ""
    return Bracketed("", tuple(prefix + element for element in signed))


def _signs(text: str) -> list[str]:
    r"""Splits a \pm b into a + b and a - b."""
    if text.count(r"\pm") != 1:
        return [text]
    minus, plus = text.replace(r"\mp", "+"), text.replace(r"\mp", "-")
    return [re.sub(r"^\s*\+", "", plus.replace(r"\pm", "+")), minus.replace(r"\pm", "-")]


def _compare_lists(p: Bracketed, g: Bracketed, same: Leaf) -> Verdict | NeedsSetAlgebra:
    predictions, references, kinds = p.elements, g.elements, {p.brackets, g.brackets}
    verdict = _interval_verdict(p, g, same)
    if verdict is not None:
        return verdict
    if len(predictions) != len(references):
        algebra = any(SET_ALGEBRA.search(element) for element in (*predictions, *references))
        return NEEDS_SET_ALGEBRA if algebra else False
    if len(references) == 1:
        return compare(predictions[0], references[0], same)

    if len(kinds) == 1 or kinds == {"", "{}"}:
        names = [EQUALS.split(element)[0] for element in references if "=" in element]
        named = len(set(names)) > 1 and not any("=" in element for element in predictions)
        if p.brackets != g.brackets:
            predictions, references = _by_name(predictions), _by_name(references)
        ordered = p.brackets not in ("", "{}") or named
        return (_all if ordered else _matched)(predictions, references, same)

    return _all(_by_name(predictions), _by_name(references), same) if kinds == {"", "()"} else False


def _by_name(elements: tuple[str, ...]) -> tuple[str, ...]:
    """Sorts y=4, x=3 by name, the order of the tuple (3,4)."""
    named = all(NAMED_VALUE.match(element) for element in elements)
    return tuple(sorted(elements)) if named else elements


def _all(predictions: tuple[str, ...], references: tuple[str, ...], same: Leaf) -> Verdict:
    undecided = False
    for prediction, reference in zip(predictions, references, strict=True):
        verdict = compare(prediction, reference, same)
        if verdict is False:
            return False
        undecided |= verdict is None
    return None if undecided else True


def _matched(predictions: tuple[str, ...], references: tuple[str, ...], same: Leaf) -> Verdict:
    """Returns whether the lists are equal in some order.

    Equality is transitive, so the first match can be taken."""
    if len(references) > MAX_UNORDERED:
        return _all(predictions, references, same)

    left, undecided = list(predictions), False
    for reference in references:
        verdicts = []
        for prediction in left:
            verdicts.append(compare(prediction, reference, same))
            if verdicts[-1]:
                break
        if verdicts and verdicts[-1]:
            left.pop(len(verdicts) - 1)
        elif None in verdicts:
            undecided = True
        else:
            return False

    return None if undecided else True


def _compare_single(prediction: str, reference: str, same: Leaf) -> Verdict:
    matrix, other = MATRIX.fullmatch(prediction), MATRIX.fullmatch(reference)
    if matrix and other:
        return _compare_matrices(_rows(matrix[1]), _rows(other[1]), same)

    if any(CUP.search(side) or intervals.RELATION.search(side) for side in (prediction, reference)):
        parts = _union(prediction), _union(reference)
        verdict = _interval_verdict(Bracketed("", tuple(parts[0])), Bracketed("", tuple(parts[1])),
                                    same)
        return verdict if verdict is not None else same(prediction, reference)

    p_parts, g_parts = _chain(prediction), _chain(reference)
    if len(p_parts) == len(g_parts) == 1:
        return same(prediction, reference)

    p_named, g_named = forms.is_name(p_parts[0]), forms.is_name(g_parts[0])
    if len(g_parts) > 1 and not g_named:            # a real equation: only an equation can equal it
        return same(prediction, reference) if len(p_parts) == len(g_parts) else False
    if (len(p_parts) > 1 and len(g_parts) > 1 and p_named
            and notation.key(p_parts[0]) != notation.key(g_parts[0])):
        return same(prediction, reference) if len(p_parts) == len(g_parts) == 2 else False
    if len(p_parts) > 1 and not p_named and len(g_parts) > 1:
        return same(prediction, reference) if len(p_parts) == 2 else False

    # A chain states that all parts are equal: 3 = 5 is not the answer 5, though its last part is.
    values = p_parts[1:] if p_named and len(p_parts) > 1 else p_parts
    if len(values) > MAX_CHAIN:
        return False
    return _all(tuple(values), (g_parts[-1],) * len(values), same)


def _chain(text: str) -> list[str]:
    """Splits at equals signs; 3 = x becomes x = 3."""
    parts = [text]
    if "=" in text:
        parts = [part for part in notation.split_top(text, EQUALS) if part] or parts
    swapped = (len(parts) == 2 and not forms.is_name(parts[0])
               and re.fullmatch(intervals.VARIABLE, parts[1]))
    return parts[::-1] if swapped and parts[1] not in CONSTANTS else parts


def _vector(side: Bracketed) -> Bracketed:
    """Turns a matrix of one row or one column into a tuple, to compare it with a tuple."""
    single = len(side.elements) == 1 and not side.brackets
    matrix = MATRIX.fullmatch(side.elements[0]) if single else None
    rows = _rows(matrix[1]) if matrix else []
    cells = rows[0] if len(rows) == 1 else [row[0] for row in rows if len(row) == 1]
    is_vector = len(cells) > 1 and len(cells) == sum(map(len, rows))
    return Bracketed("()", tuple(cells)) if is_vector else side


def _compare_matrices(p: list[list[str]], g: list[list[str]], same: Leaf) -> Verdict:
    if [len(row) for row in p] != [len(row) for row in g]:
        return False
    return _all(tuple(sum(p, [])), tuple(sum(g, [])), same)


def _rows(body: str) -> list[list[str]]:
    rows = [row.strip() for row in body.split(r"\\")]
    return [[cell.strip() or "0" for cell in row.split("&")] for row in rows if row]


def _union(text: str) -> list[str]:
    return notation.split_top(forms.without_member(text), CUP)


def _interval_verdict(p: Bracketed, g: Bracketed, same: Leaf) -> Verdict:
    """Compares inequalities and intervals as sets; None if they differ or are anything else."""
    elements = (*p.elements, *g.elements)
    if not any(intervals.RELATION.search(piece) or CUP.search(piece) for piece in elements):
        return None

    variables = [{name for piece in side.elements for name in _variables(piece)} for side in (p, g)]
    if all(variables) and variables[0] != variables[1]:
        return False                                # x < 1 is not y < 1
    predictions, references = _intervals(p), _intervals(g)
    if predictions is None or references is None or len(predictions) != len(references):
        return None
    return _matched(predictions, references, same) or None


def _variables(text: str) -> set[str]:
    terms = intervals.RELATION.split(text)[::2] if intervals.RELATION.search(text) else []
    return {term.strip() for term in terms if intervals.VARIABLE.fullmatch(term.strip())}


def _intervals(side: Bracketed) -> tuple[str, ...] | None:
    text = f"{side.brackets[:1]}{','.join(side.elements)}{side.brackets[1:]}"
    pieces = [part for piece in ([text] if side.brackets else side.elements)
              for part in _union(piece)]
    parsed = [intervals.interval(piece) for piece in pieces]
    if any(piece is None or CUP.search(piece) or intervals.RELATION.search(piece)
           for piece in parsed):
        return None                                 # (3,4\cup) is not an interval
    return tuple(piece for piece in parsed if piece)
