"""Says which reference answers cannot be read, whatever a response answers."""

import re
import unicodedata

from effreason.grading import notation

# How tools write a missing value. The word "none" in small letters may be an answer.
MISSING = {"nan", "null", "nil", "n/a", "<na>", "[]", '""', "''", "-", "--", "?", "??"}
# What takes the place of an answer in data that was made from proofs and pictures.
NO_ANSWER = re.compile(
    r"(?:the )?(?:proofs?|prove[nd]?|q\.?e\.?d)\b|(?:please )?(?:see|refer to|as shown in)\b"
    r"|(?:answers? )?(?:may|will) vary|(?:no|not|none)(?: answer)? (?:given|provided|available)"
    r"|not ?found\b|(?:solution|answer) (?:omitted|above|below|not found)", re.IGNORECASE)
LIST = re.compile(r"""[\[(]\s*(['"]).*\1\s*,?\s*[\])]|\{\s*(['"])[^'"]*\2\s*:.*\}""", re.DOTALL)
PICTURE = re.compile(r"!\[|https?://|\[asy\]|\\includegraphics|<img\b")


def unreadable_reason(reference: str) -> str | None:
    """Returns why no answer can be compared with this reference, or None if it can be read.

    Backslashes that JSON has eaten (a form feed and `rac{1}{2}`) are mended when answers are
    compared, so such a reference can be read."""
    text = notation.mended(reference).strip()
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip(" .$*")

    if not text:
        return "is empty"
    if text.casefold() in MISSING or text == "None":
        return f"is {text}, no answer"
    if NO_ANSWER.match(bare):
        return "tells of a proof, a solution or a figure, which is no answer"
    if LIST.fullmatch(text):
        return "is a list written as text"
    if PICTURE.search(text):
        return "is a picture or a link"
    if odd := next((character for character in text if _unprintable(character)), None):
        return f"contains the character U+{ord(odd):04X}, which is no text"
    if not notation.braces_match(text):
        return "has braces that do not match"
    if len(text) <= notation.MAX_CHARACTERS and not notation.canonical(text):
        return "contains nothing to compare"
    return None


def _unprintable(character: str) -> bool:
    control = unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn")
    return character == "\ufffd" or control and not character.isspace()
