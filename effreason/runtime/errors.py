"""The errors that the command line turns into one line and an exit code."""

import contextlib
import sys
import threading
from collections.abc import Iterator

from effreason.runtime import streams


class UserError(Exception):
    """Bad input. The message is one line: the field or file, what was expected, what was found.

    The command line prints `error: <message>` and exits with code 2, without a traceback."""


class Interrupted(Exception):
    """A signal told the run to stop, and the run has saved its state.

    The command line prints the message, which says how to resume, and exits with 128 + signum. With
    several processes only one has a message."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.message = message


LINE_CHARACTERS = 2000              # of a message; what is longer holds a user's long value
# Errors that need no traceback; any other one is a defect.
REPORTED = (UserError, Interrupted, KeyboardInterrupt, FloatingPointError, OSError)


def report(error: BaseException) -> int:
    """Prints one of the REPORTED errors as one line on standard error; returns the exit code."""
    code, line = 1, f"error: {error}"
    if isinstance(error, UserError):
        code = 2
    elif isinstance(error, Interrupted):
        code, line = 128 + error.signum, error.message
    elif isinstance(error, KeyboardInterrupt):
        code, line = 130, "interrupted"
    elif isinstance(error, OSError):
        named = error.filename is not None and error.strerror
        text = f"{error.filename}: {error.strerror}" if named else str(error)
        line = f"error: {' '.join(text.split())}"

    if len(line) > LINE_CHARACTERS:
        line = f"{line[: LINE_CHARACTERS - 150]} ... {line[-140:]}"
    if line:
        print(line, file=sys.stderr)
    return code


def prepare() -> None:
    """Prepares a program's standard streams, and its threads to end as it does: with one line."""
    streams.prepare()
    threading.excepthook = _report_of_thread


def _report_of_thread(arguments: threading.ExceptHookArgs) -> None:
    if isinstance(arguments.exc_value, REPORTED):
        report(arguments.exc_value)
    else:
        threading.__excepthook__(arguments)


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Ends the program with one line and an exit code if one of the REPORTED errors is raised."""
    prepare()
    try:
        yield
        sys.stdout.flush()          # a full disk is an error too
    except REPORTED as error:
        sys.exit(report(error))
