"""Models the work of a training step from the mean length: lengths, slots over time, packed rows.

Lengths follow an exponential distribution clipped at the token limit. Most responses are shorter
than the mean and a few are many times longer, as reasoning models behave on problems of mixed
difficulty.
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Callable

import numpy as np

from effreason.rl import packing
from effreason.runtime.config import Config

PROMPT_TOKENS = 128                 # default length of a problem with its template


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step."""

    lengths: np.ndarray             # int64[B], response tokens
    prompt_tokens: int              # of every prompt
    width: int                      # N, positions of the widest packed row
    micro_batches: float            # of each optimizer update, in units of the widest rows
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
                  sequences_per_row: int | None = None, skips_others: bool = False) -> Workload:
    """Returns the work of one step, with rows wide enough for the longest possible response.

    Args: skips_others, whether the attention computes no pairs of two sequences in a row.
    """
    settings, update = config.rollout, config.update
    responses = lengths(settings.prompts_per_step * settings.group_size, mean_tokens,
                        settings.max_new_tokens)
    sizes = responses + prompt_tokens
    context = config.mesh.context
    widest = packing.row_width(config.data.max_prompt_tokens + settings.max_new_tokens, context)
    widths = packing.row_widths(widest, context, sequences_per_row)
    layouts = [packing.assign_rows(sizes, range(first, len(sizes), update.updates_per_batch),
                                   widths, update.rows_per_micro_batch, sequences_per_row)
               for first in range(update.updates_per_batch)]

    count = pairs = 0.0
    for group, width in enumerate(widths):
        batches = max(len(bins[group]) for bins in layouts) / update.rows_per_micro_batch
        count, pairs = count + batches * width / widest, pairs + batches * (width / widest) ** 2
    if skips_others:
        pairs = float(np.sum(np.square(sizes / widest))) / update.rows_per_micro_batch
        pairs /= update.updates_per_batch
    computed = count * update.rows_per_micro_batch * widest * update.updates_per_batch
    room = -(-len(range(0, len(sizes), update.updates_per_batch)) // update.rows_per_micro_batch)
    return Workload(lengths=responses, prompt_tokens=prompt_tokens,
                    width=widest, micro_batches=count, pair_batches=pairs,
                    room=room, widths=sum(widths) / widest, rows=update.rows_per_micro_batch,
                    packing_efficiency=float(sizes.sum() / computed))


def generate(lengths: np.ndarray, *, prompt_tokens: int, slots: int, shards: int, smallest: int,
             seconds: Callable[[int, float], float]) -> float:
    """Returns the seconds to generate responses of these lengths, in order; a free slot takes the
    next one.

    In the tail the slots are halved while half of them suffice, as the sampler does. Every device
    is assumed to have an equal share of the running responses.
    Args: slots, at the beginning; shards, devices or groups of them that slots are split over;
        smallest, slots of one shard that are not halved further; seconds(slots, live tokens in all
        their caches), of one decode step.
    """
    waiting = list(lengths[::-1])
    slots = min(slots, -(-len(waiting) // shards) * shards)
    running: list[tuple[int, int]] = []  # (step at which it ends, step at which it started)
    now = start_sum = 0                                 # start_sum: over the running responses
    total = 0.0

    while waiting or running:
        while waiting and len(running) < slots:
            heapq.heappush(running, (now + int(waiting.pop()), now))
            start_sum += now
        while not waiting and slots // 2 >= max(len(running), smallest * shards):
            slots //= 2

        steps = running[0][0] - now
        if steps:
            middle = now + steps / 2
            live = len(running) * (prompt_tokens + middle) - start_sum
            total += steps * seconds(slots, live)
            now += steps
        while running and running[0][0] == now:
            start_sum -= heapq.heappop(running)[1]

    return total
