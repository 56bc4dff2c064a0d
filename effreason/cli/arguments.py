"""The command lines that are not a configuration: argparse, with errors that are the user's."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

from effreason.runtime.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError where argparse would print its usage and exit."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def bounded(name: str, kind: type, fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """What argparse reads a bounded number with. Args: name, for its message: "invalid NAME value"."""
    def read(text: str) -> Any:
        value = kind(text)
        if not fits(value):
            raise ValueError
        return value

    read.__name__ = name
    return read


def numbers(text: str, field: str, fits: Callable[[float], bool], bound: str) -> list[float]:
    """Numbers with commas between them; none for "none". Args: bound, in words. Raises: UserError."""
    found: list[float] = []
    names = set()
    for part in [] if text == "none" else text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not fits(number):
            raise UserError(f"{field} must be numbers in {bound} with commas between them, got {part.strip()!r} in "
                            f"{text!r}")
        if f"{number:g}" in names:
            raise UserError(f"{field} must name each number once, in six digits, got {text!r}")
        found.append(number)
        names.add(f"{number:g}")
    return found
