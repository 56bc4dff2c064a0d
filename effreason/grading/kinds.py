"""Defines reference answers and their kinds: "math", "choice" (of several) and "text" (words)."""

import json
import re
import unicodedata
from dataclasses import dataclass, replace

from effreason.grading.exact import exact

KINDS = ("math", "choice", "text")

# \text{B}, \textbf{(B)}, \boxed{B}: formatting around an answer.
WRAPPER = re.compile(r"\\(?:text[a-z]*|math(?:rm|bf|it|sf|tt)|mbox|hbox|boxed|fbox|underline|emph"
                     r"|operatorname)\s*\{([^{}]*)\}")
NOTHING = re.compile(r"\\(?:(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|[,;:!> ])|~|\*\*|__")
QUOTES = str.maketrans("‘’“”", "''\"\"")
MARKS = ("$$", "$", "*", "`", '"', "'")
INTRODUCED = re.compile(
    r"(?:the\s+)?(?:(?:correct|right|best|final)\s+)?(?:option|choice|answer)\b\s*(?:is\b)?"
    r"\s*:?\s*", re.IGNORECASE)
LETTER = re.compile(r"(?:\(\s*([A-Za-z])\s*\)|\[\s*([A-Za-z])\s*\]|([A-Za-z]))\s*[.:)]?")
# A letter, its punctuation, and the text of the choice: (B) bank, B) bank, B. bank, B: bank, B -
# bank; B bank, but not "A bank", because A may be an article.
LETTER_AND_TEXT = re.compile(
    r"(?:\(\s*([A-Za-z])\s*\)|\[\s*([A-Za-z])\s*\]|([A-Za-z])\s*[).:]|([A-Za-z])\s+[-–=]\s"
    r"|([B-HJ-Z])\s)\s*(\S.*)", re.DOTALL)
TEXT_AND_LETTER = re.compile(r"(\S.*?)\s*\(\s*([A-Za-z])\s*\)", re.DOTALL)     # bank (B)
ANOTHER_LETTER = re.compile(
    r"\(\s*[A-Za-z]\s*\)|(?<![a-zA-Z'])[B-HJ-Z](?![a-zA-Z'])"
    r"|\b(?:not|or|and|nor)\s+\(?[A-Za-z]\b(?!\s+[a-z])")


@dataclass(frozen=True)
class Reference:
    """A reference answer and how responses are compared with it."""

    # For kind "choice", its letter or its text. A JSON list of texts: any of them is right.
    answer: str
    kind: str = "math"              # one of KINDS
    choices: tuple[str, ...] = ()   # the texts of A, B, C, ...; () if unknown

    def each(self) -> "list[Reference]":
        """Returns a reference for each of the answers any of which is right."""
        return [replace(self, answer=answer) for answer in alternatives(self.answer)]


def alternatives(answer: str) -> list[str]:
    """Returns the texts of a JSON list, any of which is right; another answer alone."""
    if answer.startswith('["'):
        try:
            listed = json.loads(answer)
        except (ValueError, RecursionError):
            return [answer]
        if all(isinstance(entry, str) for entry in listed):
            return listed
    return [answer]


def same_choice(answer: str, reference: Reference) -> bool:
    r"""Returns whether the answer names the choice: by its letter, its text, or both if they agree.

    B, (B), b., \textbf{(B)}, option B and, with the choices river and bank, also (B) bank and bank
    are the second one. Several letters, a letter with another choice's text and a letter beyond the
    choices are wrong.
    """
    plain_answer, plain_reference = _plain(answer), _plain(reference.answer)
    introduction = INTRODUCED.match(plain_answer)
    text = plain_answer[introduction.end():] if introduction else plain_answer

    correct = _letter(plain_reference, len(reference.choices))
    if correct is None and reference.choices:
        matches = [index for index, choice in enumerate(reference.choices)
                   if _same_words(plain_reference, choice)]
        if not matches:
            return False            # the reference is none of the choices, so no answer can name it
        correct = matches[0]

    if correct is None:             # only the text of the correct choice is known
        candidates = (plain_answer, text, _letter_and_text(text)[1])
        return any(_same_words(words, plain_reference) for words in candidates)

    chosen = _letter(text, len(reference.choices))
    if chosen is not None:
        return chosen == correct
    chosen, rest = _letter_and_text(text)
    if reference.choices and (match := TEXT_AND_LETTER.fullmatch(text)):
        chosen, rest = _index(match[2]), match[1]

    if not reference.choices:
        return chosen == correct and not ANOTHER_LETTER.search(rest)
    if correct >= len(reference.choices):
        return False
    if (chosen is not None and chosen < len(reference.choices)
            and _same_words(rest, reference.choices[chosen])):
        return chosen == correct
    return any(_same_words(words, reference.choices[correct]) for words in (plain_answer, text))


def same_text(answer: str, reference: Reference) -> bool:
    r"""Returns whether the words are the same; case, spaces, \text{}, outer marks do not count."""
    words = _words(answer)
    return bool(words) and words == _words(reference.answer)


def _letter(text: str, choices: int) -> int | None:
    """Returns the index of the choice if the text is its letter alone, otherwise None."""
    match = LETTER.fullmatch(text)
    if match is None:
        return None
    index = _index(match[match.lastindex or 0])
    return index if not choices or index < choices else None


def _letter_and_text(text: str) -> tuple[int | None, str]:
    match = LETTER_AND_TEXT.fullmatch(text)
    if match is None:
        return None, text
    *letters, rest = match.groups()
    return next(_index(letter) for letter in letters if letter), rest


def _index(letter: str) -> int:
    return ord(letter.upper()) - ord("A")


def _same_words(a: str, b: str) -> bool:
    numbers = any(map(str.isdigit, a)) and exact(a, b) is True
    return bool(_words(a)) and (numbers or _words(a) == _words(b))


def _words(text: str) -> str:
    text = re.sub(r"\s+", " ", _plain(text).casefold())
    return text.strip(" \"'*`").rstrip(".,;:!? \"'*`")


def _plain(text: str) -> str:
    """Removes LaTeX and Markdown formatting around words."""
    text, previous = unicodedata.normalize("NFC", text).translate(QUOTES), None
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
