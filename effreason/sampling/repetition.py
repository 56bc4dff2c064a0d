"""Responses that repeat themselves word for word until the token limit: found on the host, stopped early.

A response is looked at when it reaches certain lengths, the same ones whatever the chunks it came in and the slot it
came from, so where it is cut depends on its tokens alone. Some of those that could be cut are let go on, to see what
cutting them would have cost: whether any would have found its way out of the loop.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from effreason.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepetitionStopping:
    """When a response counts as a loop, and what is done about it."""

    window: int = 512               # its last tokens, that are to be one block of tokens over and over
    longest_period: int = 128       # tokens in that block at most: at least window / longest_period repeats
    grid: int = 64                  # it is looked at whenever its length is a multiple of this many tokens
    audit_share: float = 0.0        # share of the loops that are not stopped, 0..1

    def __post_init__(self) -> None:
        if self.longest_period < 1:
            raise UserError(f"repetition.longest_period: expected a number from 1 up, found {self.longest_period}")
        if self.window < 2 * self.longest_period:
            raise UserError(f"repetition.window: expected at least 2 x longest_period = {2 * self.longest_period}, "
                            f"found {self.window}")
        if self.grid < 1:
            raise UserError(f"repetition.grid: expected a number from 1 up, found {self.grid}")
        if not 0.0 <= self.audit_share <= 1.0:
            raise UserError(f"repetition.audit_share: expected a number from 0 to 1, found {self.audit_share}")

    def cut(self, pieces: Sequence[np.ndarray], length: int, new: int) -> int | None:
        """The length at which a response became a loop, if it did so within its newest tokens.

        Args: pieces, int32 arrays that joined are the response so far, EOS included if it has come; length, their
            tokens; new, how many of these, at the end, no call has seen yet.
        Returns: the first such length, a multiple of the grid in (length - new, length], or None."""
        first = max((length - new) // self.grid + 1, -(-self.window // self.grid)) * self.grid
        if first > length:
            return None
        tail = _tail(pieces, length - first + self.window)
        for end in range(first, length + 1, self.grid):
            if looping(tail[: len(tail) - (length - end)], window=self.window, longest_period=self.longest_period):
                return end
        return None

    def audited(self, *name: int) -> bool:
        """Whether the response of this name (integers, such as uid and sample) is let go on though it loops."""
        return _fraction(name) < self.audit_share


def looping(tokens: np.ndarray, *, window: int, longest_period: int) -> bool:
    """Whether the last tokens are one block over and over: each the same as that some fixed distance before it.

    Args: tokens int32[T']; window, how many of the last, at least 2 * longest_period; longest_period, the largest
        distance. Returns: False where there are fewer than `window` tokens."""
    if len(tokens) < window:
        return False
    last = tokens[-window:]
    # Row -1 - p: what stands p tokens before the last `longest_period` ones. If it is the same for several p, then the
    # smallest is the period of the window or there is none (periodicity lemma), so one comparison with it decides.
    before = np.lib.stride_tricks.sliding_window_view(last, longest_period)
    same = (before[-1 - longest_period : -1] == last[-longest_period:]).all(axis=-1)
    periods = longest_period - np.flatnonzero(same)
    return len(periods) > 0 and bool((last[periods[-1] :] == last[: -periods[-1]]).all())


def _tail(pieces: Sequence[np.ndarray], count: int) -> np.ndarray:
    """The last `count` tokens of a response, without joining the rest of it."""
    taken: list[np.ndarray] = []
    missing = count
    for piece in reversed(pieces):
        if missing <= 0:
            break
        taken.append(piece)
        missing -= len(piece)
    return np.concatenate(taken[::-1])[-count:]


def _fraction(name: Sequence[int]) -> float:
    """A number in [0, 1) that follows from the integers, on every machine the same, and looks random."""
    state = 0
    for number in name:
        # One step of SplitMix64 for each: https://prng.di.unimi.it/splitmix64.c
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return (state >> 11) / 2**53
