"""What a step has to do, from a mean response length: which lengths, which slots when, how many packed rows.

Lengths are spread as an exponential distribution that is cut off at the token limit: most responses are shorter than
the mean, a few many times as long, which is what reasoning models give on problems of mixed difficulty.
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Callable

import numpy as np

from effreason.rl import packing
from effreason.runtime.config import Config

PROMPT_TOKENS = 128                 # of a problem with its template, unless it is said otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step."""

    lengths: np.ndarray             # int64[B], response tokens
    prompt_tokens: int              # of every prompt
    width: int                      # N, positions of a packed row
    micro_batches: float            # of each optimiser update, of that width
    pair_batches: float             # the same where the cost goes with the square of the width
    room: int                       # micro-batches of each update that there is room for: one response a row
    widths: float                   # of the groups of rows together, each with this room, in that of the widest
    rows: int                       # R, of a micro-batch
    fill: float                     # share of the positions computed on that hold a token

    @property
    def tokens(self) -> int:
        """Response tokens of the step."""
        return int(self.lengths.sum())


@functools.cache
def lengths(count: int, mean: float, most: int) -> np.ndarray:
    """int64[count] response lengths with this mean, in no order: quantiles of an exponential cut off at `most`.

    Always the same ones. A mean near the limit leaves no room to spread: then many are as long as it."""
    shares = (np.arange(count) + 0.5) / count

    def spread(scale: float) -> np.ndarray:
        return np.clip(np.ceil(-scale * np.log1p(-shares)), 1, most)

    low, high = 1e-3, 1e3 * most
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spread(middle).mean() < mean else (low, middle)
    return np.random.default_rng(0).permutation(spread(high)).astype(np.int64)


def make_workload(config: Config, *, mean_tokens: float, prompt_tokens: int = PROMPT_TOKENS,
                  one_sequence_per_row: bool = False) -> Workload:
    """The step of a configuration, with rows as wide as the longest response there can be.

    Args: one_sequence_per_row, each sequence has a row of its own."""
    settings, update = config.rollout, config.update
    drawn = lengths(settings.prompts_per_step * settings.group_size, mean_tokens, settings.max_new_tokens)
    sizes = drawn + prompt_tokens
    context = config.mesh.context
    widest = packing.row_width(config.data.max_prompt_tokens + settings.max_new_tokens, context)
    widths = packing.row_widths(widest, context, one_sequence_per_row)
    laid = [packing.assign_rows(sizes, range(first, len(sizes), update.updates_per_batch), widths,
                                update.rows_per_micro_batch, one_sequence_per_row)
            for first in range(update.updates_per_batch)]
    count = pairs = 0.0
    for group, width in enumerate(widths):
        needed = max(len(bins[group]) for bins in laid) / update.rows_per_micro_batch
        count, pairs = count + needed * width / widest, pairs + needed * (width / widest) ** 2
    computed = count * update.rows_per_micro_batch * widest * update.updates_per_batch
    room = -(-len(range(0, len(sizes), update.updates_per_batch)) // update.rows_per_micro_batch)
    return Workload(lengths=drawn, prompt_tokens=prompt_tokens, width=widest, micro_batches=count, pair_batches=pairs,
                    room=room, widths=sum(widths) / widest, rows=update.rows_per_micro_batch,
                    fill=float(sizes.sum() / computed))


def generate(lengths: np.ndarray, *, prompt_tokens: int, slots: int, shards: int, smallest: int,
             seconds: Callable[[int, float], float]) -> float:
    """Seconds to generate responses of these lengths, in their order, each slot taking the next one when it is free.

    In the tail the slots are halved while half of them are enough, as the engine does. Each device is taken to have its
    share of what is going on.
    Args: slots, at the beginning; shards, devices or groups of them that slots are split over; smallest, slots of one
        shard that are not halved further; seconds(slots, live tokens in all their caches), of one decode step."""
    waiting = list(lengths[::-1])
    slots = min(slots, -(-len(waiting) // shards) * shards)
    running: list[tuple[int, int]] = []                 # (step at which it ends, step at which it began)
    begun = now = 0                                     # begun: the sum over all that run
    total = 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            heapq.heappush(running, (now + int(waiting.pop()), now))
            begun += now
        while not waiting and slots // 2 >= max(len(running), smallest * shards):
            slots //= 2
        steps = running[0][0] - now
        if steps:
            middle = now + steps / 2
            live = len(running) * (prompt_tokens + middle) - begun
            total += steps * seconds(slots, live)
            now += steps
        while running and running[0][0] == now:
            begun -= heapq.heappop(running)[1]
    return total
