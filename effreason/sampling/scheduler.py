"""What is asked of the engine, in which order it is taken up, and what has to be read for it."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from effreason.types import Problem, Response

READ_ROWS, READ_TOKENS = 8, 8192    # prompts read at once, and padded tokens of them together, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One response to be made."""

    prompt: int                     # index among the prompts; those of one index share their tokens, read once
    tokens: np.ndarray              # int32[S'], the prompt
    uid: int                        # with the sample and the position it makes the key of every token
    sample: int
    max_new_tokens: int
    expected_tokens: float | None = None    # longest first, where it is known; never decides more than the order
    prefix: Response | None = None  # what was drawn already: it goes on from there

    @property
    def known(self) -> np.ndarray:
        """int32[...], the prompt and what was drawn already."""
        return self.tokens if self.prefix is None else np.concatenate([self.tokens, self.prefix.tokens])


def make_requests(problems: Sequence[Problem], group_size: int, max_new_tokens: int,
                  expected: Mapping[int, float] = MappingProxyType({})) -> list[Request]:
    """A group of responses to each problem. Args: expected, tokens by uid, of those of which something is known."""
    return [Request(prompt=index, tokens=problem.prompt, uid=problem.uid, sample=sample, max_new_tokens=max_new_tokens,
                    expected_tokens=expected.get(problem.uid))
            for index, problem in enumerate(problems) for sample in range(group_size)]


def check(requests: Sequence[Request], positions: int | None) -> None:
    """Raises ValueError for a request that cannot be served."""
    for request in requests:
        name, drawn = f"prompt {request.prompt}, sample {request.sample}", len(request.known) - len(request.tokens)
        if not len(request.tokens):
            raise ValueError(f"{name}: the prompt must have at least 1 token, got 0")
        if request.max_new_tokens <= drawn:
            raise ValueError(f"{name}: max_new_tokens must be above the {drawn} drawn already, "
                             f"got {request.max_new_tokens}")
        if positions is not None and len(request.tokens) + request.max_new_tokens > positions:
            raise ValueError(f"{name}: prompt and max_new_tokens must be at most {positions} positions, "
                             f"got {len(request.tokens)} + {request.max_new_tokens}")


@dataclasses.dataclass(frozen=True)
class PrefillKey:
    """Tokens to read before a response can go on; equal ones are read once."""

    name: tuple[int, ...]           # the prompt, and the sample where the response has a prefix of its own
    known: np.ndarray = dataclasses.field(compare=False)

    @classmethod
    def of(cls, request: Request) -> "PrefillKey":
        own = () if request.prefix is None else (request.sample,)
        return cls((request.prompt, *own), request.known)


@dataclasses.dataclass(kw_only=True)
class PrefillBatch:
    """Prompts of about one length that are read together, until all their responses have started."""

    rows: dict[PrefillKey, int]
    waiting: int                    # responses that will still start from it
    width: int                      # positions of a row
    height: int                     # rows, some of them empty
    cache: Any = None               # on the device, once it is read

    def prompts(self) -> np.ndarray:
        """int32[height, width], padded on the right."""
        table = np.zeros((self.height, self.width), np.int32)
        for source, row in self.rows.items():
            # The last token stays out: the first decode step reads it, and draws from what it predicts.
            table[row, : len(source.known) - 1] = source.known[:-1]
        return table


class PrefillQueue:
    """All that is to be read, in the order in which it is needed, by padded length.

    Args: queue, in their order; most, the largest width; rows, of a bank at most."""

    def __init__(self, queue: Sequence[Request], most: int | None, rows: int) -> None:
        self._most, self._rows = most, rows
        self._unread: dict[int, collections.deque[tuple[PrefillKey, int]]] = collections.defaultdict(collections.deque)
        for source, count in collections.Counter(PrefillKey.of(request) for request in queue).items():
            self._unread[self._width(source)].append((source, count))
        self._banks: list[PrefillBatch] = []

    def bank_of(self, source: PrefillKey) -> PrefillBatch:
        """The bank that holds a source; a new one holds the next ones of about its length too."""
        for bank in self._banks:
            if source in bank.rows:
                return bank
        width = self._width(source)
        # Always as many rows, filled or not: what is read does not depend, even by rounding, on what else waits.
        height = max(min(self._rows, READ_ROWS, READ_TOKENS // width), 1)
        unread = self._unread[width]
        taken = [unread.popleft() for _ in range(min(len(unread), height))]
        bank = PrefillBatch(rows={each: row for row, (each, _) in enumerate(taken)}, waiting=sum(count for _, count in taken),
                    width=width, height=height)
        self._banks.append(bank)
        return bank

    def forget(self) -> None:
        """Lets go of banks from which nothing will start any more."""
        self._banks = [bank for bank in self._banks if bank.waiting]

    def _width(self, source: PrefillKey) -> int:
        width = max(16, 1 << (len(source.known) - 1).bit_length())
        return width if self._most is None else min(width, self._most)


def in_order(requests: Sequence[Request]) -> list[Request]:
    """Longest expected first, those of which nothing is known before them; the samples of a prompt stay together."""
    known: dict[int, list[float]] = collections.defaultdict(list)
    for request in requests:
        known[request.prompt].append(float("inf") if request.expected_tokens is None else request.expected_tokens)
    places = {prompt: place for place, prompt in enumerate(known)}
    return sorted(requests, key=lambda request: (-sum(known[request.prompt]) / len(known[request.prompt]),
                                                 places[request.prompt]))
