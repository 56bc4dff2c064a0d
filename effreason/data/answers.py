"""What a data set's answer column says: the final answer of a solution, and the letter of a choice."""

import re
import string
from typing import Any

from effreason.grading.extraction import extract_answer

OPTION = re.compile(r"^\(([A-Z])\) ?(.*)$", re.MULTILINE)


def as_text(value: Any) -> str:
    """A value of a data set as text.

    Raises: ValueError for what is neither text nor a number, or half of a surrogate pair, which JSON can write as
        \\ud800 and which is no character."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"must be text or a number, found {type(value).__name__}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half of a surrogate pair, {ascii(text[error.start])}, at character {error.start + 1}, "
                         "which is no text") from None
    return text


def extract(text: str, answer_from: str) -> str:
    r"""The final answer in an answer column, "" where there is none.

    Args: answer_from, whole = the text; hashes = what is behind the last #### (GSM8K); boxed = the last \boxed{}."""
    if answer_from == "hashes":
        return text.rpartition("####")[2].strip() if "####" in text else ""
    if answer_from == "boxed":
        return extract_answer(text) or ""
    return text.strip()


def choose(text: str, value: Any, answer: str, listed: Any) -> tuple[str, str, tuple[str, ...]]:
    """A multiple-choice problem: its text with the options in it, the letter of the answer, the answers to choose from.

    Args: value, of the answer column, and answer, the same as text: a letter, a label, the choice itself or, as a
        number, its place from 0; listed, the choices: a list, a table from letter to text, a table of lists label and
        text, or None where they stand in the text.
    Raises: ValueError that says what was found."""
    labels, choices = _listed(text, listed)
    if listed is not None and any(f"({letter}) {choice}" not in text
                                  for letter, choice in zip(string.ascii_uppercase, choices, strict=False)):
        options = [f"({letter}) {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False)]
        text = "\n".join([text.rstrip(), "Options:", *options])
    return text, _letter(value, answer, labels, choices), choices


def _listed(text: str, listed: Any) -> tuple[list[str], tuple[str, ...]]:
    """Labels and texts of the choices; both empty where nothing is known of them."""
    if listed is None:
        found = OPTION.findall(text.rpartition("\nOptions:\n")[2]) if "\nOptions:\n" in text else []
        letters = "".join(letter for letter, _ in found)
        if not found or not string.ascii_uppercase.startswith(letters):
            return [], ()
        labels, texts = list(letters), [choice for _, choice in found]
    elif isinstance(listed, dict) and {"label", "text"} <= listed.keys():
        for name in ("label", "text"):
            if not isinstance(listed[name], list | tuple):
                raise ValueError(f"choices: {name} must be a list, found {type(listed[name]).__name__}")
        labels, texts = list(listed["label"]), list(listed["text"])
    elif isinstance(listed, dict):
        # A saved table has all letters that any row has, with null for those that this one lacks.
        labels = [label for label, choice in listed.items() if choice is not None]
        texts = [choice for choice in listed.values() if choice is not None]
    elif isinstance(listed, list | tuple):
        labels, texts = list(string.ascii_uppercase[: len(listed)]), list(listed)
    else:
        raise ValueError(f"choices must be a list or a table, found {type(listed).__name__}")
    if not 2 <= len(texts) <= len(string.ascii_uppercase) or len(labels) != len(texts):
        raise ValueError(f"choices must be 2 to 26 answers, each with a label, found {len(texts)} and {len(labels)}")
    return [_part(label, "label") for label in labels], tuple(_part(choice, "choice").strip() for choice in texts)


def _part(value: Any, what: str) -> str:
    try:
        return as_text(value)
    except ValueError as error:
        raise ValueError(f"choices: a {what} {error}") from None


def _letter(value: Any, answer: str, labels: list[str], choices: tuple[str, ...]) -> str:
    if isinstance(value, int) and str(value) not in labels and 0 <= value < len(choices):
        return string.ascii_uppercase[value]
    bare = answer.strip().strip("().").strip()
    if bare in labels:
        return string.ascii_uppercase[labels.index(bare)]
    if not choices and len(bare) == 1 and bare.upper() in string.ascii_uppercase:
        return bare.upper()
    if bare.upper() in labels:
        return string.ascii_uppercase[labels.index(bare.upper())]
    if choices.count(answer.strip()) == 1:
        return string.ascii_uppercase[choices.index(answer.strip())]
    raise ValueError(f"answer {answer!r} is none of the choices {', '.join(labels) or 'A, B, C, ...'}")
