"""Reads a data set's answer column: the final answer of a solution, the letter of a choice."""

import ast
import json
import re
import string
import warnings
from typing import Any

import numpy as np

from effreason.data.columns import as_text
from effreason.grading.extraction import extract_answer

OPTION = re.compile(r"^\(([A-Z])\) ?(.*)$", re.MULTILINE)


def reference(value: Any, answer_from: str) -> str:
    """Returns the reference answer in an answer column's value, "" if there is none.

    A list of one answer is that answer. Of several any is right: they are a JSON list, as
    `kinds.Reference` reads it. Raises ValueError for what is no text, number or list of these."""
    found = dict.fromkeys(filter(None, (extract(as_text(entry), answer_from)
                                        for entry in _entries(value))))
    return json.dumps(list(found), ensure_ascii=False) if len(found) > 1 else "".join(found)


def _entries(value: Any) -> list[Any]:
    """Returns the answers in a list, also in the text of one; other values as the only entry.

    Text is a list if its entries are texts or a single number: [1, 2] is an interval."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str) and value.strip().startswith("["):
        for parse in (json.loads, ast.literal_eval):
            try:
                with warnings.catch_warnings(action="ignore"):      # of escapes such as \s
                    listed = parse(value.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            is_number = len(listed) == 1 and isinstance(listed[0], int | float)
            if is_number or all(isinstance(entry, str) for entry in listed):
                value = listed
                break
    if not isinstance(value, list | tuple):
        return [value]
    return [entry for part in value for entry in _entries(part)]


def extract(text: str, answer_from: str) -> str:
    r"""Returns the final answer of an answer column, "" if there is none.

    `answer_from`: whole = the text; hashes = after the last #### (GSM8K); boxed = last \boxed{}."""
    if answer_from == "hashes":
        return text.rpartition("####")[2].strip() if "####" in text else ""
    if answer_from == "boxed":
        return extract_answer(text) or ""
    return text.strip()


def choose(text: str, value: Any, answer: str, listed: Any) -> tuple[str, str, tuple[str, ...]]:
    """Returns a multiple-choice problem: its text with options, the answer's letter, the choices.

    Raises ValueError that says what was found.

    Args:
        value: of the answer column: a letter, a label, the choice itself or its index as a number.
        answer: the same as text.
        listed: the choices: a list, an object from letter to text, an object with lists `label` and
            `text`, or None if they are part of the text."""
    labels, choices = _parse_choices(text, listed)
    options = [f"({letter}) {choice}"
               for letter, choice in zip(string.ascii_uppercase, choices, strict=False)]
    if listed is not None and any(option not in text for option in options):
        text = "\n".join([text.rstrip(), "Options:", *options])
    return text, _letter(value, answer, labels, choices), choices


def _parse_choices(text: str, listed: Any) -> tuple[list[str], tuple[str, ...]]:
    """Returns labels and texts of the choices; both empty if they are unknown."""
    if listed is None:
        _, header, listing = text.rpartition("\nOptions:\n")
        options = OPTION.findall(listing) if header else []
        letters = "".join(letter for letter, _ in options)
        if not options or not string.ascii_uppercase.startswith(letters):
            return [], ()
        labels, texts = list(letters), [choice for _, choice in options]
    elif isinstance(listed, dict) and {"label", "text"} <= listed.keys():
        for name in ("label", "text"):
            if not isinstance(listed[name], list | tuple):
                raise ValueError(f"choices: {name} must be a list, "
                                 f"found {type(listed[name]).__name__}")
        labels, texts = list(listed["label"]), list(listed["text"])
    elif isinstance(listed, dict):
        # A saved table has all letters of any row, with null for those that this row lacks.
        labels = [label for label, choice in listed.items() if choice is not None]
        texts = [choice for choice in listed.values() if choice is not None]
    elif isinstance(listed, list | tuple):
        labels, texts = list(string.ascii_uppercase[: len(listed)]), list(listed)
    else:
        raise ValueError(f"choices must be a list or a table, found {type(listed).__name__}")

    if not 2 <= len(texts) <= len(string.ascii_uppercase) or len(labels) != len(texts):
        raise ValueError("choices must be 2 to 26 answers, each with a label, "
                         f"found {len(texts)} and {len(labels)}")
    return ([_choice_text(label, "label") for label in labels],
            tuple(_choice_text(choice, "choice").strip() for choice in texts))


def _choice_text(value: Any, description: str) -> str:
    try:
        return as_text(value)
    except ValueError as error:
        raise ValueError(f"choices: a {description} {error}") from None


def _letter(value: Any, answer: str, labels: list[str], choices: tuple[str, ...]) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)          # of a column that lacks some
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
    raise ValueError(f"answer {answer!r} is none of the choices "
                     f"{', '.join(labels) or 'A, B, C, ...'}")
