"""Stops responses that repeat themselves word for word, which would go on until the token limit.

A response is checked on the host whenever it reaches certain lengths, whatever the chunks and the
slot it came from, so its stop depends on its tokens alone. Some responses that could be stopped are
audited instead: they continue, to measure whether any would have ended by itself.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from effreason.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepetitionStopping:
    """When a response counts as repeating itself, and the share that is audited."""

    window: int = 512               # its last tokens, which must be one block over and over
    longest_period: int = 128       # of that block: at least window / longest_period repeats
    grid: int = 64                  # checked whenever its length is a multiple of this
    audit_share: float = 0.0        # share of the repeating responses that are not stopped, 0..1

    def __post_init__(self) -> None:
        if self.longest_period < 1:
            raise UserError("repetition.longest_period: expected a number from 1 up, "
                            f"found {self.longest_period}")
        if self.window < 2 * self.longest_period:
            raise UserError("repetition.window: expected at least 2 x longest_period = "
                            f"{2 * self.longest_period}, found {self.window}")
        if self.grid < 1:
            raise UserError(f"repetition.grid: expected a number from 1 up, found {self.grid}")
        if not 0.0 <= self.audit_share <= 1.0:
            raise UserError("repetition.audit_share: expected a number from 0 to 1, "
                            f"found {self.audit_share}")

    def stop_length(self, pieces: Sequence[np.ndarray], length: int, new: int) -> int | None:
        """Returns the length at which a response began to count as repeating, if that is new.

        Args:
            pieces: int32 arrays that joined are the response so far, EOS included.
            length: their tokens.
            new: how many of these, at the end, no call has seen yet.

        Returns:
            The first such length, a multiple of the grid in (length - new, length], or None."""
        first = max((length - new) // self.grid + 1, -(-self.window // self.grid)) * self.grid
        if first > length:
            return None

        tail = _tail(pieces, length - first + self.window)
        for end in range(first, length + 1, self.grid):
            if is_repeating(tail[: len(tail) - (length - end)], window=self.window,
                            longest_period=self.longest_period):
                return end
        return None

    def is_audited(self, *name: int) -> bool:
        """Returns whether the response of this name, such as (uid, sample), continues anyway."""
        return _hash_to_unit(name) < self.audit_share


def is_repeating(tokens: Int[np.ndarray, " T"], *, window: int, longest_period: int) -> bool:
    """Returns whether the last tokens all equal the token a fixed distance before them.

    Args:
        window: number of last tokens to compare, at least 2 * longest_period; False if there are
            fewer tokens.
        longest_period: the largest distance."""
    if len(tokens) < window:
        return False

    last = tokens[-window:]
    # Row -1 - p holds the tokens p before the last `longest_period` ones. If it equals them for
    # several p, then the smallest p is the period of the window or there is none (periodicity
    # lemma), so one comparison with it decides.
    shifted = np.lib.stride_tricks.sliding_window_view(last, longest_period)
    equal = (shifted[-1 - longest_period : -1] == last[-longest_period:]).all(axis=-1)
    periods = longest_period - np.flatnonzero(equal)
    return len(periods) > 0 and bool((last[periods[-1] :] == last[: -periods[-1]]).all())


def _tail(pieces: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Returns the last `count` tokens of a response without joining the rest of it."""
    last: list[np.ndarray] = []
    missing = count
    for piece in reversed(pieces):
        if missing <= 0:
            break
        last.append(piece)
        missing -= len(piece)
    return np.concatenate(last[::-1])[-count:]


def _hash_to_unit(name: Sequence[int]) -> float:
    """Returns a pseudo-random number in [0, 1) that depends on the integers alone."""
    state = 0
    for number in name:
        # One step of SplitMix64 for each: https://prng.di.unimi.it/splitmix64.c
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return (state >> 11) / 2**53
