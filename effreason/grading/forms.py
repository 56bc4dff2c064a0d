"""Reads the form of an answer: its name, label, clause, and systems, congruences, vectors."""

import re

from effreason.grading import notation, words

NAME = re.compile(r"(?:\\[a-zA-Z]+(?![a-zA-Z])|[a-zA-Z|:,/(){}\s.])+")
MEMBER = re.compile(r"\\in(?![a-zA-Z])")
ANGLED = re.compile(r"\\langle(?![a-zA-Z])(.*)\\rangle|<([^<>]*,[^<>]*)>", re.DOTALL)
LABEL = re.compile(r"[^\W\d_][^\W\d_ ]{0,29}[^\W\d_]:\s*(?=[\d\\(-])|\\text\{[^{}]*:\s*\}\s*(?=\S)"
                   r"|[^\x00-\x7f]+:\s*")                                      # Area: 12
SET_BUILDER = re.compile(
    r"(?:\\?\{\s*)?(\\?[a-zA-Z]+)\s*(?:\\in\s*\\mathbb\{R\}\s*)?[|:](.*?)"
    r"(?:,\s*\1\s*\\in\s*\\mathbb\{R\}\s*)?(?:\\?\})?", re.DOTALL)
RELATION = re.compile(r"<|>|\\(?:le|ge|ne)(?![a-zA-Z])")
RATIO = re.compile(r"(\d+)\s*(?:\\text\{\s*to\s*\}|to)\s*(\d+)")
SYSTEM = re.compile(
    r"(?:\\\{\s*)?\\begin\{(cases|aligned|align\*?|array)\}(?:\{[lcr]+\})?(.*)\\end\{\1\}\s*",
    re.DOTALL)
CONDITION = re.compile(r"&|,|\\text\{\s*(?:if|for|when|as)?\s*\}")
POINT = re.compile(r"[A-Z]'?\s*(?=\()")
CONGRUENCE = re.compile(
    r"(.+?)\\equiv\s*(.+?)[\s,]*\(?\s*(?:\\mod|\\text\{\s*mod(?:ulo)?\s*\}|\bmod)"
    r"\s*\{?\s*([^{}()]+?)\s*\}?\s*\)?", re.DOTALL)
CHOOSE = re.compile(r"C\((\d+),\s*(\d+)\)")
# The last part of "f(x)=cx for any constant c", "2k\pi (k \in Z)", "2^n - 1, n \ge 1".
DOMAIN = (r"(?P<name>[a-zA-Z])(?:_\{\d\})?(?:,\s*[a-zA-Z](?:_\{\d\})?)*\s*"
          r"(?:\\in\s*\\?(?:mathbb\{)?(?P<set>[ZNRQC])\}?(?:\\cdot|\\ge|[*+^_{}>0\d\s])*"
          r"|\\text\{\s*(?:is |are |being )?(?:an? |any )?(?P<kind>[a-z -]+)\}"
          r"|(?<=[i-nN])\s*(?:(?:\\ge|>)\s*\d+|=\s*\d+,.*\\dots.*))")
CLAUSE = re.compile(
    r"(?P<main>.*?\S)\s*[,;]?\s*"
    rf"(?:[,;(\[]\s*(?:\\forall|\\text\{{\s*[a-z ]+\}})?\s*{DOMAIN}\s*[)\]]?"
    r"|[(\[]?\\text\{[\s,]*(?:for|where|with)\b(?P<words>[^{}]*)\}(?P<rest>[^=]*?)[)\]]?)\.?",
    re.DOTALL)
MAX_CLAUSE = 300                    # characters of an answer with a clause
NAMED_SET = re.compile(r"\b(?:an|a|any|is|are) ([a-z ]+?)[\s.]*$")
QUANTIFIED = re.compile(r"(?:all|any|every|each|some|constants?|integers?|real|positive|natural)\b")
SETS = {"integer": "Z", "integers": "Z", "positive integer": "N", "positive integers": "N",
        "natural number": "N", "natural numbers": "N", "real": "R", "real number": "R",
        "real numbers": "R", "constant": "R", "constants": "R", "arbitrary constant": "R"}
UNIT_VECTOR = re.compile(
    r"\s*([+-]?)\s*((?:[^+\-()]|\([^()]*\))*?)\s*(?:\\(?:hat|vec|overrightarrow)\s*\{\s*([ijk])\s*\}"
    r"|(?<![a-zA-Z\\])([ijk])(?![a-zA-Z]))")


def plain(text: str) -> str:
    r"""Rewrites words for mathematics, \langle 1,2\rangle, \{x|x>2\}, systems, ratios plainly."""
    text = words.mathematics(text)
    text = text[label.end():] if (label := LABEL.match(text)) else text

    if angled := ANGLED.fullmatch(text):
        return f"({angled[1] or angled[2]})"
    if (builder := SET_BUILDER.fullmatch(text)) and (
            RELATION.search(builder[2]) or re.match(r"\s*[a-zA-Z]\s*=.*\\in", builder[2])):
        return builder[2].strip()

    rows = system(text)
    if len(rows) > 1 and all("=" in row and "&" not in row for row in rows):
        return ",".join(rows)                       # x=1 and y=2 on two lines

    return f"{ratio[1]}:{ratio[2]}" if (ratio := RATIO.fullmatch(text)) else text


def system(text: str) -> list[str]:
    """Returns the rows of a system of equations or of cases; [] for anything else."""
    match = SYSTEM.fullmatch(text) if r"\begin" in text else None
    rows = match[2].split(r"\\") if match else []
    return [row.replace("&=", "=").strip(" ,;") for row in rows if row.strip()]


def cases(text: str) -> list[tuple[str, str]]:
    r"""Returns value and condition of every row of \begin{cases}; [] for anything else."""
    text = re.sub(r"\b(?:is|are) (?=even|odd)", "", re.sub(r"^[^=]*=\s*(?=\\begin)", "", text))
    rows = [[part for part in notation.split_top(row, CONDITION) if part] for row in system(text)]
    return [(value, condition) for value, condition in rows] if all(
        len(row) == 2 for row in rows) else []


def congruence(text: str) -> tuple[str, str, str] | None:
    r"""Returns n, 1, 4 for n \equiv 1 \pmod 4."""
    match = CONGRUENCE.fullmatch(text) if r"\equiv" in text and len(text) <= MAX_CLAUSE else None
    return (match[1].strip(), match[2].strip(" ,"), match[3]) if match else None


def clause(text: str) -> tuple[str, str]:
    """Splits an answer from what says for which values it holds.

    Returns: the answer; the set of the values: Z, N, R, Q, C, "?" if it is another, "" without a
    clause.
    """
    marked = any(mark in text for mark in (r"\in", r"\text", ",", r"\ge"))
    match = CLAUSE.fullmatch(text) if marked and len(text) <= MAX_CLAUSE else None
    if match is None or RELATION.search(match["main"]):
        return text, ""

    main, kind = match["main"].rstrip(" ,;"), (match["kind"] or "").strip()
    if match["words"] is not None:
        phrase, rest = match["words"].strip(), words.without_text(match["rest"])
        named = NAMED_SET.search(f"{phrase} {rest}")
        says_where = (QUANTIFIED.match(phrase) or named or MEMBER.search(rest)
                      or re.fullmatch(r"\s*[i-nN]\s*(?:\\ge|>)\s*\d+\s*", rest))
        if not says_where or words.DOUBT[True].search(phrase):
            return text, ""
        return main, SETS.get(named[1] if named else phrase, "?")

    if not re.search(rf"(?<![a-zA-Z\\]){match['name']}(?![a-z])", main) or (
            kind and kind not in SETS):
        return text, ""
    return main, match["set"] or SETS.get(kind, "?")


def is_name(text: str) -> bool:
    r"""Returns whether a text names a quantity: f(x), |AB|, S_{2}, \angle ABC, A:B, \text{Area}."""
    text = re.sub(r"_\{[^{}]*\}|_[a-zA-Z0-9]|'|\^\{-1\}|\^\{'+\}", "",
                  re.sub(r"\[([A-Z]{2,})\]", r"\1", text))
    text = re.sub(r"(?<=[a-zA-Z])\s*(?:\([^()]*\)|\[[^\[\]]*\])", "", text)
    return NAME.fullmatch(text) is not None and any(map(str.isalpha, text))


def without_point(text: str) -> str:
    """Removes the name of a point: P(1,2) is (1,2)."""
    match = POINT.match(text)
    rest = text[match.end():] if match else ""
    pair = rest.endswith(")") and notation.matching(rest).get(0) == len(rest) - 1
    return rest if pair and len(notation.split_top(rest[1:-1], ",")) > 1 else text


def without_member(text: str) -> str:
    r"""Removes a variable and its \in: x \in [1,2] is [1,2]."""
    parts = notation.split_top(text, MEMBER) if r"\in" in text else [text]
    return parts[1] if len(parts) == 2 and is_name(parts[0]) else text


def unit_vectors(text: str) -> tuple[str, ...]:
    r"""Returns the components of 2\mathbf{i}-\mathbf{k}: 2, 0, -1; () for anything else."""
    components: dict[str, str] = {}
    index = 0
    while index < len(text.rstrip()):
        match = UNIT_VECTOR.match(text, index)
        letter = (match[3] or match[4]) if match else ""
        if match is None or letter in components:
            return ()
        components[letter] = match[1] + (match[2].strip() or "1")
        index = match.end()

    return tuple(components.get(letter, "0") for letter in ("ijk" if "k" in components else "ij"))
