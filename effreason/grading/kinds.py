"""Defines reference answers and their kinds: "math", "choice" (of several) and "text" (words)."""

import json
import re
import unicodedata
from dataclasses import dataclass, replace

from effreason.grading import choices, words
from effreason.grading.exact import exact

KINDS = ("math", "choice", "text")

TEXT_AND_LETTER = re.compile(r"(\S.*?)\s*\(\s*([A-Za-z])\s*\)", re.DOTALL)     # bank (B)


@dataclass(frozen=True)
class Reference:
    """A reference answer and how responses are compared with it."""

    # For kind "choice", its letter or its text. A JSON list of texts: any of them is right.
    answer: str
    kind: str = "math"              # one of KINDS
    choices: tuple[str, ...] = ()   # the texts of A, B, C, ...; () if unknown
    columns: str = ""               # of the problem, a JSON object, for a user's function

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


def same(answer: str, reference: Reference) -> bool | None:
    """Compares an answer with a reference of any kind; None if that needs algebra."""
    if reference.kind == "choice":
        return same_choice(answer, reference)
    if reference.kind == "text":
        return same_text(answer, reference)
    return exact(answer, reference.answer)


def same_choice(answer: str, reference: Reference) -> bool:
    r"""Returns whether the answer names the choice: by its letter, its text, or both if they agree.

    B, (B), b., \textbf{(B)}, option B and, with the choices river and bank, also (B) bank and bank
    are the second one. Several letters, a letter with another choice's text and a letter beyond the
    choices are wrong.
    """
    plain_answer, plain_reference = choices.plain(answer), choices.plain(reference.answer)
    text = words.without_introduction(plain_answer)

    correct, rest = choices.read(plain_reference)
    if rest or (reference.choices and correct is not None and correct >= len(reference.choices)):
        correct = None
    if correct is None and reference.choices:
        correct = next((index for index, choice in enumerate(reference.choices)
                        if _same_words(plain_reference, choice)), None)
        if correct is None:
            return False            # the reference is none of the choices, so no answer can name it

    if correct is None:             # only the text of the correct choice is known
        candidates = (plain_answer, text, choices.read(text)[1])
        return any(_same_words(candidate, plain_reference) for candidate in candidates)
    if not reference.choices:
        return choices.is_choice(answer, correct)

    chosen, rest = choices.read(text)
    if match := TEXT_AND_LETTER.fullmatch(text):
        chosen, rest = choices.read(match[2])[0], match[1]
    if chosen is not None and chosen < len(reference.choices) and (
            not rest or _same_words(rest, reference.choices[chosen])):
        return chosen == correct
    return any(_same_words(candidate, reference.choices[correct])
               for candidate in (plain_answer, text))


def same_text(answer: str, reference: Reference) -> bool:
    r"""Returns whether the words are the same; case, spaces, \text{}, outer marks do not count."""
    found = _words(answer)
    return bool(found) and found == _words(reference.answer)


def _same_words(a: str, b: str) -> bool:
    numbers = any(map(str.isdigit, a)) and exact(a, b) is True
    return bool(_words(a)) and (numbers or _words(a) == _words(b))


def _words(text: str) -> str:
    text = re.sub(r"\s+", " ", choices.plain(unicodedata.normalize("NFC", text)).casefold())
    return text.strip(" \"'*`").rstrip(".,;:!? \"'*`")
