"""The command lines that are not a configuration: argparse, with errors that are the user's."""

import argparse
from typing import NoReturn

from effreason.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError where argparse would print its usage and exit."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))
