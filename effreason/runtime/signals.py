"""Signals, and a reader that goes away, end a run at the next safe point, not in a write."""

import contextlib
import os
import signal
from types import FrameType
from typing import Self

from effreason.runtime import processes, streams
from effreason.runtime.errors import Interrupted

NOTICE = ("\nstopping at the next safe point; a second time stops at once, without saving "
          "anything\n")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupts:
    """Catches the first signal; a second one has its usual effect, at once.

    A hang-up that is ignored, as by nohup, stays so; more than one are one: a terminal that is
    closed sends it from the shell and once more from the kernel.

    Args:
        with_output: standard output without a reader counts as SIGPIPE, which Python itself
            ignores; otherwise it ends the program."""

    def __init__(self, *, with_output: bool = False) -> None:
        self._received: int | None = None
        self._with_output = with_output

    def __enter__(self) -> Self:
        caught = [number for number in SIGNALS if number != signal.SIGHUP
                  or signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._receive) for number in caught}
        self._on_lost_output = streams.on_lost_output
        if self._with_output:
            streams.on_lost_output = self._lose_output
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()
        streams.on_lost_output = self._on_lost_output

    def check(self) -> None:
        """Raises Interrupted if a signal has come; to be called at points that are safe to stop at.

        With several processes all stop at the same call, whichever of them got the signal."""
        number = processes.agree_on_signal(self._received)

        if number is not None:
            # Process 0 prints the message for all.
            cause = f"stopped by {signal.Signals(number).name}"
            if number == signal.SIGPIPE:
                cause = "stopped because nobody reads standard output any more"
            raise Interrupted(number, cause if processes.is_primary() else "")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number
        if number == signal.SIGHUP:
            self._previous[signal.SIGHUP] = signal.SIG_IGN
        elif processes.is_primary():
            # Not print(): a handler may run in the middle of another one.
            with contextlib.suppress(OSError):
                os.write(2, NOTICE.encode())
        self._restore()

    def _lose_output(self) -> None:
        self._received = self._received or signal.SIGPIPE

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
