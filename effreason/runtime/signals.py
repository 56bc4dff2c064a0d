"""SIGTERM and Ctrl-C end a run at the next safe point, not in the middle of a write."""

import signal
from types import FrameType
from typing import Self

from effreason.runtime import processes
from effreason.runtime.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """Catches the first signal; a second one has its usual effect, at once."""

    def __init__(self) -> None:
        self._received: int | None = None

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def check(self) -> None:
        """Raises Interrupted if a signal has come; to be called at points that are safe to stop at.

        With several processes all stop at the same call, whichever of them got the signal."""
        number = processes.agree_on_signal(self._received)

        if number is not None:
            # Process 0 prints the message for all.
            name = signal.Signals(number).name
            raise Interrupted(number, f"stopped by {name}" if processes.is_primary() else "")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
