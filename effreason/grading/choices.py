"""Reads the letter of a multiple choice, and what follows it."""

import re

from effreason.grading import words

# \text{B}, \textbf{(B)}, \boxed{B}: formatting around an answer.
WRAPPER = re.compile(r"\\(?:text[a-z]*|math(?:rm|bf|it|sf|tt)|mbox|hbox|boxed|fbox|underline|emph"
                     r"|operatorname)\s*\{([^{}]*)\}")
NOTHING = re.compile(r"\\(?:(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|[,;:!> ])|~|\*\*|__")
MARKS = ("$$", "$", "*", "`", '"', "'")
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | dict(
    zip(map(ord, "‘’“”"), "''\"\"", strict=True))
# A letter alone, or with its punctuation and the text of the choice: (B) bank, B) bank, B. bank,
# B: bank, B - bank; B bank, but not "A bank", because A may be an article.
CHOICE = re.compile(
    r"(?:(?:\(\s*([A-Za-z])\s*\)|\[\s*([A-Za-z])\s*\]|([A-Za-z]))\s*[.:)]?"
    r"|(?:\(\s*([A-Za-z])\s*\)|\[\s*([A-Za-z])\s*\]|([A-Za-z])\s*[).:]|([A-Za-z])\s+[-–=]\s"
    r"|([B-HJ-Z])\s)\s*(?P<rest>\S.*))", re.DOTALL)
# What takes the letter back: another letter, a negation.
TAKEN_BACK = re.compile(
    r"\(\s*[A-Za-z]\s*\)|(?<![a-zA-Z'\\])[B-HJ-Z](?![a-zA-Z'])|^A$"
    r"|\b(?:not|or|and|nor)\s+\(?[A-Za-z]\b(?!\s+[a-z])|^(?:wrong|incorrect)\b"
    r"|^(?:is|are)\s*(?:not\b|n't|wrong|incorrect|false)|\\l(?:and|or)\b")


def read(text: str) -> tuple[int | None, str]:
    """Returns the index of the choice that a plain text begins with, None without, and the rest."""
    match = CHOICE.fullmatch(text)
    if match is None:
        return None, text
    letter = next(group for group in match.groups()[:8] if group)
    return ord(letter.upper()) - ord("A"), match["rest"] or ""


def is_choice(text: str, index: int) -> bool:
    r"""Returns whether text chooses this letter alone: B, (B), \text{B}, option B, (B) 42."""
    found, rest = read(words.without_introduction(plain(text)))
    return found == index and not TAKEN_BACK.search(rest)


def without_letter(text: str) -> str:
    """Returns the value of "(A) 12" and of "A) 12"; other text unchanged."""
    match = re.match(r"(?:\([A-Z]\)(?=[\s\\])|[A-Z]\)(?=\s))\s*(?=\S)", text)
    return text[match.end():] if match and not TAKEN_BACK.search(text[match.end():]) else text


def plain(text: str) -> str:
    """Removes LaTeX and Markdown formatting around words."""
    text, previous = text.translate(FULL_WIDTH), None
    while text != previous:
        previous = text
        text = NOTHING.sub(" ", WRAPPER.sub(r"\1", text)).strip()
        for mark in MARKS:
            inside = text[len(mark):-len(mark)]
            if text == mark + inside + mark and inside and mark not in inside:
                text = inside.strip()
        if re.fullmatch(r"\{[^{}]+\}", text):
            text = text[1:-1]

    return text
