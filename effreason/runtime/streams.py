"""Standard output and error that may be closed, lose their reader, or be in any encoding."""

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

GONE = (errno.EPIPE, errno.EIO)     # the reader has ended; the terminal is closed


def leave() -> NoReturn:
    """Ends the program: what it would print nobody reads."""
    raise SystemExit(0)


quiet = False                           # notes and progress are not printed; results and errors are
on_lost_output: Callable[[], None] = leave      # called once standard output has no reader


def prepare() -> None:
    """Makes standard output and error safe to print to; to be called first in a program.

    Closed ones lead nowhere, so that no file that is opened later takes their number. What the
    encoding lacks is printed as an escape. A reader that goes away calls `on_lost_output`; without
    it no thread and no library prints a traceback about it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)      # the lowest free number, this one
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")
    sys.stdout, sys.stderr = _guarded(sys.stdout, 1), _guarded(sys.stderr, 2)


class _Guarded(io.TextIOWrapper):
    """A stream that goes on, or ends the program in silence, once it has no reader."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if error.errno not in GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())         # also for what the buffer still holds
        os.close(nowhere)
        if self.fileno() == 1:
            on_lost_output()


def _guarded(stream: TextIO | None, number: int) -> TextIO:
    """Returns the stream with the same encoding and buffering."""
    if stream is None:                                  # it was closed
        return _Guarded(open(number, "wb", closefd=False), encoding="utf-8")
    if type(stream) is not io.TextIOWrapper:
        return stream                   # of the program that runs this one, such as a notebook
    encoding, through = stream.encoding, stream.write_through
    lines = stream.line_buffering
    return _Guarded(stream.detach(), encoding=encoding, errors="backslashreplace",
                    line_buffering=lines, write_through=through)
