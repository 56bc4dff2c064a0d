"""What a data set's answer column says: the final answer of a solution, and the letter of a choice."""

import re
import string
from typing import Any

from effreason.grading.extraction import extract_answer

OPTION = re.compile(r"^\(([A-Z])\) ?(.*)$", re.MULTILINE)


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
        labels, texts = [str(label) for label in listed["label"]], list(listed["text"])
    elif isinstance(listed, dict):
        # A saved table has all letters that any row has, with null for those that this one lacks.
        labels = [str(label) for label, choice in listed.items() if choice is not None]
        texts = [choice for choice in listed.values() if choice is not None]
    elif isinstance(listed, list | tuple):
        labels, texts = list(string.ascii_uppercase[: len(listed)]), list(listed)
    else:
        raise ValueError(f"choices must be a list or a table, found {type(listed).__name__}")
    if not 2 <= len(texts) <= len(string.ascii_uppercase) or len(labels) != len(texts):
        raise ValueError(f"choices must be 2 to 26 answers, each with a label, found {len(texts)} and {len(labels)}")
    return labels, tuple(str(choice).strip() for choice in texts)


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
