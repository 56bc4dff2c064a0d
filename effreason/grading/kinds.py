"""Reference answers and the kinds of comparison: "math", "choice" (multiple choice) and "text" (the same words)."""

import re
import unicodedata
from dataclasses import dataclass

from effreason.grading.exact import exact

KINDS = ("math", "choice", "text")

# \text{B}, \textbf{(B)}, \boxed{B}: what is round an answer and says nothing.
WRAPPER = re.compile(
    r"\\(?:text[a-z]*|math(?:rm|bf|it|sf|tt)|mbox|hbox|boxed|fbox|underline|emph|operatorname)\s*\{([^{}]*)\}")
NOTHING = re.compile(r"\\(?:(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|[,;:!> ])|~|\*\*|__")
QUOTES = str.maketrans("‘’“”", "''\"\"")
MARKS = ("$$", "$", "*", "`", '"', "'")
INTRODUCED = re.compile(
    r"(?:the\s+)?(?:(?:correct|right|best|final)\s+)?(?:option|choice|answer)\b\s*(?:is\b)?\s*:?\s*", re.IGNORECASE)
LETTER = re.compile(r"(?:\(\s*([A-Za-z])\s*\)|\[\s*([A-Za-z])\s*\]|([A-Za-z]))\s*[.:)]?")
# A letter, the mark that ends it, and what it stands for: (B) bank, B) bank, B. bank, B: bank, B - bank; B bank, but
# not "A bank", where A may be an article.
LETTER_AND_TEXT = re.compile(
    r"(?:\(\s*([A-Za-z])\s*\)|\[\s*([A-Za-z])\s*\]|([A-Za-z])\s*[).:]|([A-Za-z])\s+[-–=]\s|([B-HJ-Z])\s)\s*(\S.*)",
    re.DOTALL)
TEXT_AND_LETTER = re.compile(r"(\S.*?)\s*\(\s*([A-Za-z])\s*\)", re.DOTALL)     # bank (B)
ANOTHER_LETTER = re.compile(
    r"\(\s*[A-Za-z]\s*\)|(?<![a-zA-Z'])[B-HJ-Z](?![a-zA-Z'])|\b(?:not|or|and|nor)\s+\(?[A-Za-z]\b(?!\s+[a-z])")


@dataclass(frozen=True)
class Reference:
    """A reference answer and how to compare with it."""

    answer: str                     # of kind "choice": the letter, or the text of a choice
    kind: str = "math"              # one of KINDS
    choices: tuple[str, ...] = ()   # the texts behind A, B, C, ...; () where unknown


def same_choice(answer: str, reference: Reference) -> bool:
    r"""Whether the answer names the choice: its letter, its text, or both where they agree.

    B, (B), b., \textbf{(B)}, option B, and with the choices known (B) bank and bank are the second of river, bank.
    Several letters, a letter with another's text and a letter beyond the choices are wrong.
    """
    whole, right = _plain(answer), _plain(reference.answer)
    text = whole[introduced.end():] if (introduced := INTRODUCED.match(whole)) else whole
    wanted = _letter(right, len(reference.choices))
    if wanted is None and reference.choices:
        places = [place for place, choice in enumerate(reference.choices) if _same_words(right, choice)]
        if not places:
            return False            # no answer can name a choice that is not there
        wanted = places[0]
    if wanted is None:              # of the choices only the right one's text is known
        return any(_same_words(words, right) for words in (whole, text, _letter_and_text(text)[1]))
    chosen = _letter(text, len(reference.choices))
    if chosen is not None:
        return chosen == wanted
    chosen, rest = _letter_and_text(text)
    if reference.choices and (match := TEXT_AND_LETTER.fullmatch(text)):
        chosen, rest = _place(match[2]), match[1]
    if not reference.choices:
        return chosen == wanted and not ANOTHER_LETTER.search(rest)
    if wanted >= len(reference.choices):
        return False
    if chosen is not None and chosen < len(reference.choices) and _same_words(rest, reference.choices[chosen]):
        return chosen == wanted
    return any(_same_words(words, reference.choices[wanted]) for words in (whole, text))


def same_text(answer: str, reference: Reference) -> bool:
    r"""Whether both are the same words: case, spaces, \text{} and marks round them do not count, every digit does."""
    words = _words(answer)
    return bool(words) and words == _words(reference.answer)


def _letter(text: str, choices: int) -> int | None:
    """The place of the choice that a letter alone names, None where the text is something else."""
    match = LETTER.fullmatch(text)
    if match is None:
        return None
    place = _place(match[match.lastindex or 0])
    return place if not choices or place < choices else None


def _letter_and_text(text: str) -> tuple[int | None, str]:
    match = LETTER_AND_TEXT.fullmatch(text)
    if match is None:
        return None, text
    *letters, rest = match.groups()
    return next(_place(letter) for letter in letters if letter), rest


def _place(letter: str) -> int:
    return ord(letter.upper()) - ord("A")


def _same_words(a: str, b: str) -> bool:
    numbers = any(map(str.isdigit, a)) and exact(a, b) is True
    return bool(_words(a)) and (numbers or _words(a) == _words(b))


def _words(text: str) -> str:
    text = re.sub(r"\s+", " ", _plain(text).casefold())
    return text.strip(" \"'*`").rstrip(".,;:!? \"'*`")


def _plain(text: str) -> str:
    """Without what LaTeX and Markdown put round words."""
    text, before = unicodedata.normalize("NFC", text).translate(QUOTES), None
    while text != before:
        before = text
        text = NOTHING.sub(" ", WRAPPER.sub(r"\1", text)).strip()
        for mark in MARKS:
            inside = text[len(mark):-len(mark)]
            if text == mark + inside + mark and inside and mark not in inside:
                text = inside.strip()
        if re.fullmatch(r"\{[^{}]+\}", text):
            text = text[1:-1]
    return text
