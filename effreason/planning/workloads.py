"""Models the work of a training step from the mean length: lengths, slots over time, packed rows.

Lengths follow an exponential distribution clipped at the token limit. Most responses are shorter
than the mean and a few are many times longer, as reasoning models behave on problems of mixed
difficulty.
"""

import collections
import dataclasses
import functools
import heapq
import math
from collections.abc import Callable

import numpy as np

from effreason.rl import packing
from effreason.runtime.config import Config
from effreason.sampling.scheduler import CacheLimits

PROMPT_TOKENS = 128                 # default length of a problem with its template


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step."""

    lengths: np.ndarray             # int64[B], response tokens
    prompt_tokens: int              # of every prompt
    width: int                      # N, positions of the widest packed row
    micro_batches: float            # of an optimizer update, the mean, in units of the widest rows
    pair_batches: float             # the same for costs quadratic in the width
    room: int                       # micro-batches allocated for each update: one response per row
    widths: float  # sum of all row widths over the widest; each group of rows has `room`
    rows: int                       # R, of a micro-batch
    packing_efficiency: float       # share of the computed positions that hold a token

    @property
    def tokens(self) -> int:
        """Response tokens of the step."""
        return int(self.lengths.sum())


@functools.cache
def lengths(count: int, mean: float, most: int) -> np.ndarray:
    """Returns int64[count] response lengths with this mean, shuffled, always the same.

    They are quantiles of an exponential clipped at `most`. A mean near the limit leaves no room to
    spread: many lengths then equal the limit.
    """
    shares = (np.arange(count) + 0.5) / count

    def spread(scale: float) -> np.ndarray:
        return np.clip(np.ceil(-scale * np.log1p(-shares)), 1, most)

    low, high = 1e-3, 1e3 * most
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spread(middle).mean() < mean else (low, middle)
    return np.random.default_rng(0).permutation(spread(high)).astype(np.int64)


def make_workload(config: Config, *, mean_tokens: float, prompt_tokens: int = PROMPT_TOKENS,
                  layout: tuple[int, int] | None = None, sequences_per_row: int | None = None,
                  skips_others: bool = False, shares_prompts: bool = False) -> Workload:
    """Returns the work of one step.

    Args: layout, positions of a row and rows of a micro-batch, None = those of the configuration,
        with rows wide enough for the longest possible response; skips_others, whether the attention
        computes no pairs of two sequences in a row; shares_prompts, whether responses of one group
        in one row share their prompt.
    """
    settings, update = config.rollout, config.update
    responses = lengths(settings.prompts_per_step * settings.group_size, mean_tokens,
                        settings.max_new_tokens)
    sizes = responses + prompt_tokens
    shared = (packing.Shared(settings.group_size, np.full_like(sizes, prompt_tokens - 1))
              if shares_prompts else None)
    context = config.mesh.context
    widest, rows = layout or (packing.row_width(
        config.data.max_prompt_tokens + settings.max_new_tokens, context),
        update.rows_per_micro_batch)
    widths = packing.row_widths(widest, context, sequences_per_row)
    layouts = [packing.assign_rows(sizes, range(first, len(sizes), update.updates_per_batch),
                                   widths, rows, sequences_per_row, shared)
               for first in range(update.updates_per_batch)]

    count = pairs = 0.0
    for group, width in enumerate(widths):
        batches = sum(len(bins[group]) for bins in layouts) / (rows * update.updates_per_batch)
        count, pairs = count + batches * width / widest, pairs + batches * (width / widest) ** 2
    if skips_others:
        pairs = float(np.sum(np.square(sizes / widest))) / rows
        pairs /= update.updates_per_batch
    held = sum(packing.positions(row, sizes, shared)
               for bins in layouts for group in bins for row in group)
    computed = count * rows * widest * update.updates_per_batch
    room = -(-len(range(0, len(sizes), update.updates_per_batch)) // rows)
    return Workload(lengths=responses, prompt_tokens=prompt_tokens,
                    width=widest, micro_batches=count, pair_batches=pairs,
                    room=room, widths=sum(widths) / widest, rows=rows,
                    packing_efficiency=float(held / computed))


class _Running:
    """The responses in slots: when each ends, and when it would have started from its prompt."""

    def __init__(self) -> None:
        self._ends: list[tuple[int, int]] = []          # a heap of (end, start)
        self._starts: list[int] = []                    # a heap; those of no response are dropped
        self._counts: collections.Counter[int] = collections.Counter()      # responses by start
        self.start_sum = 0

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, end: int, start: int) -> None:
        heapq.heappush(self._ends, (end, start))
        if not self._counts[start]:
            heapq.heappush(self._starts, start)
        self._counts[start] += 1
        self.start_sum += start

    def first_end(self) -> int:
        return self._ends[0][0]

    def oldest(self) -> int:
        """Returns the start of the longest one."""
        while not self._counts[self._starts[0]]:
            heapq.heappop(self._starts)
        return self._starts[0]

    def pop_ended(self, now: int) -> None:
        while self._ends and self._ends[0][0] == now:
            self._remove(heapq.heappop(self._ends)[1])

    def count_started(self, until: int) -> int:
        """Returns how many have started at this step or before it."""
        return sum(start <= until for _, start in self._ends)

    def pop_longest(self, leave: int, until: int) -> list[tuple[int, int]]:
        """Removes those that have started at this step or before it, but for the longest `leave`;
        returns them."""
        order = sorted((start, end) for end, start in self._ends if start <= until)
        removed = [(end, start) for start, end in order[leave:]]
        gone = collections.Counter(removed)
        self._ends = list((collections.Counter(self._ends) - gone).elements())
        heapq.heapify(self._ends)
        for _, start in removed:
            self._remove(start)
        return removed

    def _remove(self, start: int) -> None:
        self._counts[start] -= 1
        self.start_sum -= start


def generate(lengths: np.ndarray, *, prompt_tokens: int, limits: CacheLimits, smallest: int,
             seconds: Callable[[int, int, float], float]) -> tuple[float, int]:
    """Returns the seconds to generate responses of these lengths, in order, and how many tokens
    are prefilled again because responses outgrew their slots. A free slot takes the next one.

    The slots become larger and fewer as `scheduler.Schedule` does it, and in the tail they are
    halved. Every device is assumed to have an equal share of the running responses.
    Args: smallest, slots of one shard that are not halved further; seconds(slots, positions of
        each, live tokens in all of them), of one decode step.
    """
    waiting = collections.deque((int(length), 0) for length in lengths)     # with tokens drawn
    outgrown: list[tuple[int, int]] = []                # the same
    capacity = limits.capacity(prompt_tokens)
    slots = min(limits.slots_of(capacity), -(-len(waiting) // limits.shards) * limits.shards)
    running, now, again, total = _Running(), 0, 0, 0.0

    while waiting or outgrown or len(running):
        while waiting and len(running) < slots:
            length, drawn = waiting.popleft()
            running.add(now + length - drawn, now - drawn)
            again += prompt_tokens + drawn if drawn else 0

        # Longer ones than this need larger slots.
        room = _room(limits, capacity, prompt_tokens)
        larger = limits.capacity(prompt_tokens + room + 1)
        fits = limits.slots_of(larger)
        longest = now - running.oldest() if len(running) else 0
        if longest > room or (outgrown and not waiting and len(running) <= fits):
            remaining = len(running) + len(waiting) + len(outgrown)
            leaving = running.count_started(now - room - 1)
            if fits < min(slots, remaining) and (waiting or len(running) - leaving > fits):
                outgrown += [(end - start, now - start)
                             for end, start in running.pop_longest(0, now - room - 1)]
                continue
            waiting.extend((end - start, now - start)
                           for end, start in running.pop_longest(fits, now))
            capacity, slots = larger, min(slots, fits)
            waiting.extend(outgrown)
            outgrown.clear()
            continue

        active = slots
        while (not waiting and not outgrown
               and active // 2 >= max(len(running), smallest * limits.shards)):
            active //= 2
        steps = min(running.first_end(), running.oldest() + room + 1) - now
        middle = now + steps / 2
        live = len(running) * (prompt_tokens + middle) - running.start_sum
        total += steps * seconds(active, capacity, live)
        now += steps
        running.pop_ended(now)

    return total, again


def _room(limits: CacheLimits, capacity: int, prompt_tokens: int) -> int:
    """Returns how many tokens a response may have in a slot of this capacity."""
    if limits.largest is not None and capacity >= limits.largest:
        return capacity
    return capacity - limits.chunk - 1 - prompt_tokens
