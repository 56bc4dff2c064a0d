"""Compares two answers in plain Python; leaves undecided what needs algebra."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from effreason.grading import choices, forms, notation, quantities, rationals, words

# True, False, or None if undecided.
Verdict = bool | None
Leaf = Callable[[str, str], Verdict]

MAX_UNORDERED = 50
MAX_CHAIN = 3
MAX_DEPTH = 50

LETTER = re.compile(r"[A-J]")
NAME_OF_LETTERS = re.compile(r"[A-Z]{2,}")
EQUALS = re.compile(r"(?<![<>!:])=")
SETS = re.compile(r"<|>|\\(?:le|ge|ne|cup|cap|setminus)(?![a-zA-Z])|\\mathbb\{R\}")
APPROXIMATELY = re.compile(r"\\approx(?![a-zA-Z])")
CLAIM = re.compile(
    r"\\(?:equiv|to|rightarrow|Rightarrow|implies|iff|sim|cong|mapsto|neg|not)(?![a-zA-Z])")
MATRIX = re.compile(
    r"\\begin\{(?:[pb]|small)matrix\}((?:(?!\\begin).)*)\\end\{(?:[pb]|small)matrix\}", re.DOTALL)
DIGITS_APART = re.compile(r"\d\s+[\d.]")
BASE = re.compile(r"\(?([0-9A-Z]+)\)?_\{(?:\\text\{)?([0-9]+|[a-z]+)\}?\}")
OTHERWISE = re.compile(r"otherwise|else")
NO_SOLUTION = {r"\emptyset", r"\{\}"}
SUBSCRIPT = re.compile(r"_\{[^{}]*\}")
VARIABLE = re.compile(r"\\?[a-zA-Z]+(?:_\{[^{}]*\})?")
LONE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])")
NAMED_VALUE = re.compile(r"([a-zA-Z](?:_\{\d+\})?)\s*=")
TUPLE_OF_NAMES = re.compile(r"\(([a-zA-Z](?:\s*[,;]\s*[a-zA-Z])+)\)")
CONSTANTS = ("e", "i", r"\pi", r"\infty")


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
    and sets are unordered, tuples are ordered, and the kinds of brackets must agree. Inequalities
    and unions are left to `same`, which compares sets.
    """
    if not prediction or not reference:
        return False

    prediction, reference = forms.plain(prediction), forms.plain(reference)
    if notation.key(prediction) == notation.key(reference):
        return True
    if {prediction, reference} <= NO_SOLUTION:
        return True

    if LETTER.fullmatch(bare := notation.strip_parentheses(reference)):
        return bare in prediction and choices.is_choice(prediction, ord(bare) - ord("A"))
    if NAME_OF_LETTERS.fullmatch(reference) and NAME_OF_LETTERS.fullmatch(prediction):
        return False                                # ABC is a name, not the product CBA
    prediction, reference = words.verdict(prediction), words.verdict(reference)
    prediction = choices.without_letter(prediction)
    if "," not in reference:                        # otherwise C may be a point
        prediction = forms.CHOOSE.sub(r"\\binom{\1}{\2}", prediction)

    congruences = forms.congruence(prediction), forms.congruence(reference)
    if congruences[0] and congruences[1]:
        return _same_congruence(congruences[0], congruences[1], same)
    if _claims(prediction) and not _claims(reference):
        return False                                # 5 \equiv 6 is neither the answer 5 nor 6
    p_cases, g_cases = forms.cases(prediction), forms.cases(reference)
    if p_cases and g_cases:
        return _matched(p_cases, g_cases, same, _same_case)
    (prediction, p_values), (reference, g_values) = map(forms.clause, (prediction, reference))
    if "?" != p_values != g_values != "?" and p_values and g_values:
        return False                                # k \in \mathbb{N} is not k \in \mathbb{Z}

    p_quantities, g_quantities = map(quantities.read, (prediction, reference))
    if p_quantities[0].unit or g_quantities[0].unit:
        with_letters = [quantities.read(side, letters=True) for side in (prediction, reference)]
        if quantities.differ(*with_letters):
            return False
        if len(with_letters[0]) > 1:                # 5 ft 6 in
            parts = [[one.value for one in side] for side in with_letters]
            return _all(parts[0], parts[1], same)
    prediction, reference = p_quantities[0].value, g_quantities[0].value
    if is_set(prediction) or is_set(reference):
        return same(prediction, reference)

    p, g = (_bracketed(notation.strip_parentheses(_without_approximation(side)))
            for side in (prediction, reference))
    matrices = [any(map(MATRIX.fullmatch, side.elements[:1])) for side in (p, g)]
    if (p.brackets == "()") != (g.brackets == "()") or matrices[0] != matrices[1]:
        vectors = _vector(p), _vector(g)
        p, g = vectors if vectors[0].brackets == vectors[1].brackets == "()" else (p, g)

    if len(p.elements) > 1 or len(g.elements) > 1 or p.brackets or g.brackets:
        return _compare_lists(p, g, same)
    return _compare_single(p.elements[0], g.elements[0], same)


def leaf(prediction: str, reference: str) -> Verdict:
    """Compares two canonical answers without parts: spelling, words, numbers; ignores units."""
    if notation.key(prediction) == notation.key(reference):
        return True
    verdict = _words(prediction, reference)
    if verdict is not None:
        return verdict

    (p_quantity, *more), (g_quantity, *_) = map(quantities.read, (prediction, reference))
    p, g = (notation.strip_parentheses(side.value) for side in (p_quantity, g_quantity))
    if more or quantities.differ((p_quantity,), (g_quantity,)):
        return False
    if DIGITS_APART.search(p) and not rationals.MIXED.fullmatch(p):
        return False                                # "5 5" must not become 55
    if notation.key(p) == notation.key(g):
        return True
    p_base, g_base = BASE.fullmatch(p), BASE.fullmatch(g)
    if p_base and g_base:
        return p_base[1] == g_base[1] and _base(p_base[2]) == _base(g_base[2])
    if g_base and p == g_base[1]:
        return True                                 # the problem says the base

    p_value, g_value = _value(p), _value(g)
    if (p_value is None) != (g_value is None):      # 3s: next to a number s is seconds
        p_read, g_read = (
            quantities.read(side.value, letters=True) if value is None else (side,)
            for side, value in ((p_quantity, p_value), (g_quantity, g_value)))
        if quantities.differ(p_read, g_read):
            return False
        p_value, g_value = _value(p_read[0].value), _value(g_read[0].value)

    if p_value and g_value:
        return rationals.same(p_value, g_value)
    value, other = (p_value, g) if p_value else (g_value, p)
    if value and (value.number is None or BASE.fullmatch(other)
                  or other.strip("+- ") in (r"\infty", *NO_SOLUTION)):
        return False
    return None


def _value(text: str) -> rationals.Value | None:
    base = BASE.fullmatch(text)
    try:
        return rationals.read(base[1] if base and _base(base[2]) == 10 else text)
    except (rationals.Undecided, RecursionError):
        return None


def _base(name: str) -> int:
    return int(name[:6]) if name.isdigit() else words.ONES.get(name, 0)


def _words(prediction: str, reference: str) -> Verdict:
    if not (notation.is_word(prediction) or notation.is_word(reference)):
        return None
    p, g = (notation.key(words.bare(text)).casefold() for text in (prediction, reference))
    return p == g                                   # words never equal a formula


def _claims(text: str) -> bool:
    """Returns whether an answer states more than a value: a congruence, a limit, a conclusion."""
    return CLAIM.search(SUBSCRIPT.sub("", text)) is not None


def _same_congruence(p: tuple[str, str, str], g: tuple[str, str, str], same: Leaf) -> Verdict:
    r"""Compares x \equiv 1, 2 and x \equiv 5, 4 modulo 3."""
    return p[2] == g[2] and notation.key(p[0]) == notation.key(g[0]) and _matched(
        _residues(p[1], p[2]), _residues(g[1], g[2]), same)


def _residues(residues: str, modulus: str) -> list[str]:
    parts, by = notation.elements(residues), _value(modulus)
    if not by or not by.number:
        return parts
    values = list(map(_value, parts))
    return [str(value.number % by.number) if value and value.number is not None else part
            for part, value in zip(parts, values, strict=True)]


def _same_case(p: tuple[str, str], g: tuple[str, str], same: Leaf) -> Verdict:
    """Compares the values of two cases, then their conditions; one may be "otherwise"."""
    verdict = compare(p[0], g[0], same)
    if verdict is False or any(OTHERWISE.search(side[1]) for side in (p, g)):
        return verdict
    condition = compare(p[1], g[1], same)
    return condition if verdict or condition is False else None


def is_set(text: str) -> bool:
    """Returns whether an answer is an inequality, a union or the like in one variable."""
    if not SETS.search(text):
        return False
    sides = [side for piece in notation.split_top(text, notation.SEPARATORS)
             if forms.RELATION.search(piece) for side in notation.split_top(piece, forms.RELATION)]
    return len({name for side in sides for name in LONE.findall(side)} - {"e", "i"}) <= 1


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
    pieces = notation.elements(text)
    if len(pieces) > 1:
        return Bracketed("", tuple(piece for element in pieces for piece in _signs(element)))

    pieces = EQUALS.split(text) if "=" in text else [text]
    if len(pieces) == 2 and forms.is_name(pieces[0]):
        name, text = pieces[0].strip(), pieces[1].strip()

    escaped = text.startswith(r"\{") and text.endswith(r"\}")
    begin, end = (1, len(text) - 2) if escaped else (0, len(text) - 1)
    is_set = escaped or text[:1] == "{"             # {1,2} without its backslashes
    if text and text[begin] in "([{" and notation.matching(text).get(begin) == end + escaped:
        inside = notation.elements(text[begin + 1:end])
        names = TUPLE_OF_NAMES.fullmatch(name)
        if names and len(letters := re.findall("[a-zA-Z]", names[1])) == len(inside):
            inside = [f"{letter}={piece}" for letter, piece in zip(letters, inside, strict=True)]
        if is_set:
            inside = [piece for element in inside for piece in _signs(element)]
            if all(NAMED_VALUE.match(piece) for piece in inside) and len(inside) > 1:
                return Bracketed("", tuple(inside))
            return Bracketed("{}", tuple({notation.key(piece): piece for piece in inside}.values()))
        if len(inside) > 1:
            return Bracketed(text[begin] + text[end], tuple(inside))

    signed = _signs(text)
    prefix = f"{name}=" if name and len(signed) == 1 else ""
    return Bracketed("", tuple(prefix + element for element in signed))


def _signs(text: str) -> list[str]:
    r"""Splits a \pm b into a + b and a - b."""
    if text.count(r"\pm") != 1:
        return [text]
    minus, plus = text.replace(r"\mp", "+"), text.replace(r"\mp", "-")
    return [re.sub(r"^\s*\+", "", plus.replace(r"\pm", "+")), minus.replace(r"\pm", "-")]


def _compare_lists(p: Bracketed, g: Bracketed, same: Leaf) -> Verdict:
    predictions, references, kinds = p.elements, g.elements, {p.brackets, g.brackets}
    if len(predictions) != len(references):
        return False
    if len(references) == 1:
        if p.brackets != g.brackets and NO_SOLUTION & {predictions[0], references[0]}:
            return False                            # the set that contains the empty set
        return compare(predictions[0], references[0], same)

    if kinds <= {"", "{}"} or (len(kinds) == 1 and "" in kinds):
        names = [EQUALS.split(element)[0] for element in references if "=" in element]
        named = len(set(names)) > 1 and not any("=" in element for element in predictions)
        return (_all if named else _matched)(predictions, references, same)
    if len(kinds) == 1 or kinds == {"", "()"}:
        return _all(*_by_name(predictions, references), same)
    return False


def _by_name(predictions: tuple[str, ...],
             references: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Orders named elements like the other side's; without names there, by the alphabet.

    x=4, y=3 and (y,x)=(3,4) are the tuple (4,3). Only names that follow one another in the alphabet
    have its order: (m,b)=(2,1) is (2,1).
    """
    names = [[match[1] if match else "" for match in map(NAMED_VALUE.match, side)]
             for side in (predictions, references)]
    if all(names[0]) and sorted(names[0]) == sorted(names[1]):
        return tuple(sorted(predictions)), tuple(sorted(references))

    sides = []
    for side, letters in zip((predictions, references), names, strict=True):
        neighbours = len(set(letters)) == len(side) and all(letters) and (
            ord(max(letters)[0]) - ord(min(letters)[0]) == len(side) - 1)
        sides.append(tuple(sorted(side)) if neighbours else side)
    return sides[0], sides[1]


def _all(predictions: Sequence[str], references: Sequence[str], same: Leaf) -> Verdict:
    verdicts = []
    for prediction, reference in zip(predictions, references, strict=True):
        verdicts.append(compare(prediction, reference, same))
        if verdicts[-1] is False:
            return False
    return None if None in verdicts else True


def _matched(predictions: Sequence, references: Sequence, same: Leaf,
             compare_: Callable[..., Verdict] = compare) -> Verdict:
    """Returns whether the lists are equal in some order.

    Equality is transitive, so the first match can be taken."""
    if len(predictions) != len(references):
        return False
    if len(references) > MAX_UNORDERED:
        return _all(predictions, references, same)

    left, undecided = list(predictions), False
    for reference in references:
        verdicts: list[Verdict] = []
        while len(verdicts) < len(left) and True not in verdicts:
            verdicts.append(compare_(left[len(verdicts)], reference, same))
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            undecided = True
        else:
            return False

    return None if undecided else True


def _compare_single(prediction: str, reference: str, same: Leaf) -> Verdict:
    matrix, other = MATRIX.fullmatch(prediction), MATRIX.fullmatch(reference)
    if matrix and other:
        p_rows, g_rows = _rows(matrix[1]), _rows(other[1])
        return list(map(len, p_rows)) == list(map(len, g_rows)) and _all(
            sum(p_rows, []), sum(g_rows, []), same)

    p_parts, g_parts = _chain(prediction), _chain(reference)
    if len(p_parts) == len(g_parts) == 1:
        return same(prediction, reference)

    if len(p_parts) == len(g_parts) == 2 and sorted(map(words.without_text, p_parts)) == sorted(
            map(words.without_text, g_parts)):
        return True                                 # MR = SRMC and SRMC = MR
    p_named, g_named = forms.is_name(p_parts[0]), forms.is_name(g_parts[0])
    # An equation that names no value: only an equation can equal it.
    if len(g_parts) > 1 and not (g_named and (len(p_parts) == 1 or p_named and (
            notation.key(p_parts[0]) == notation.key(g_parts[0])))):
        return same(prediction, reference) if len(p_parts) == len(g_parts) else False

    # A chain states that all parts are equal: 3 = 5 is not the answer 5, though its last part is.
    # A part with dots, 1+2+\dots+10 = 55, states nothing that can be checked.
    values = p_parts[1:] if p_named and len(p_parts) > 1 else p_parts
    values = [part for part in values[:-1] if r"\dots" not in part] + values[-1:]
    if len(values) > MAX_CHAIN:
        return False
    return _all(tuple(values), (g_parts[-1],) * len(values), same)


def _chain(text: str) -> list[str]:
    """Splits at equals signs; 3 = x becomes x = 3."""
    parts = [text]
    if "=" in text:
        parts = [part for part in notation.split_top(text, EQUALS) if part] or parts
    swapped = (len(parts) == 2 and not forms.is_name(parts[0])
               and VARIABLE.fullmatch(parts[1]))
    return parts[::-1] if swapped and parts[1] not in CONSTANTS else parts


def _vector(side: Bracketed) -> Bracketed:
    """Turns unit vectors or a matrix of one row or column into a tuple, to compare with a tuple."""
    if len(side.elements) != 1 or side.brackets:
        return side
    matrix = MATRIX.fullmatch(side.elements[0])
    rows = _rows(matrix[1]) if matrix else []
    cells = rows[0] if len(rows) == 1 else [row[0] for row in rows if len(row) == 1]
    if len(cells) > 1 and len(cells) == sum(map(len, rows)):
        return Bracketed("()", tuple(cells))
    components = forms.unit_vectors(EQUALS.split(side.elements[0])[-1])
    return Bracketed("()", components) if components else side


def _rows(body: str) -> list[list[str]]:
    rows = [row.strip() for row in body.split(r"\\")]
    return [[cell.strip() or "0" for cell in row.split("&")] for row in rows if row]
