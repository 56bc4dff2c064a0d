"""Turns the costs of a run's functions into times, energy and money: a roofline model.

A function takes as long as the slowest of four overlapping things: matrix products, device memory
traffic, collectives, and traffic to the host's memory. Each runs at the share of its peak rate
given by `Efficiency`.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from effreason.data import loading
from effreason.planning import costs
from effreason.planning.chips import Target
from effreason.planning.costs import Cost, KernelCall
from effreason.planning.workloads import Workload, generate
from effreason.runtime.config import Config
from effreason.sampling.scheduler import CacheLimits, prefill_rows, prefill_width

COMPUTE, MEMORY, LINKS, HOST = "compute", "memory", "links", "host"
PREFILL_PADDING = 4 / 3             # of a response that is continued, to a power of two: the mean
TILE = 16  # positions that lm.decode_kernels.paged_write rewrites to change one
# All that an estimate of the run needs.
NEEDED = frozenset(("unstack", "prefill", "insert", "decode", "score", "score_reference",
                    "experience", "gradients", "apply_gradients"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of the peak rates that programs reach: guesses, to be replaced by measured ones."""

    compute: float = 0.5  # of FLOP/s in large products: 0.4 to 0.6 in training such models
    memory: float = 0.6             # of HBM bandwidth
    # The same in decoding, at the least and at the most: what published engines reach.
    decode: tuple[float, float] = (0.4, 0.6)
    interconnect: float = 0.7


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedFunction:
    """A function of a training step on one chip: its memory and its cost."""

    name: str
    per: str                        # what one call covers
    calls: float  # in a training step; 0 for decode, whose calls follow from the lengths
    own_bytes: float                # HBM: arguments, results, temporaries, code
    other_bytes: float              # other HBM in use at that time
    cost: Cost | None  # of one call, without kernels; None if it is too large to compile
    source: str                     # compiled | analytic
    live_share: float = 1.0         # share of the cache's positions that a decode step reads
    # share of the pairs of positions that is computed, as some rows are narrower
    pair_share: float = 1.0

    @property
    def hbm_bytes(self) -> float:
        """Everything in a chip's memory while it runs."""
        return self.own_bytes + self.other_bytes

    @property
    def full_cost(self) -> Cost | None:
        """The cost of one call including its kernels."""
        if self.cost is None:
            return None
        return with_kernels(self.cost, self.live_share, self.pair_share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedMachine:
    """The chips that times are estimated for."""

    target: Target
    efficiency: Efficiency

    def seconds(self, cost: Cost) -> float:
        return roofline(cost, self.target, self.efficiency)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """The estimated times, energy and price of a training run."""

    slots: int
    rollout_tokens_per_second: float
    rollout_seconds: float          # of a step: weights for the sampler, prefill, decoding
    score_seconds: float            # with the advantages
    update_seconds: float
    step_seconds: float
    evaluation_hours: float
    hours: float                    # all steps and evaluations
    chip_hours: float
    energy_kwh: float               # of the chips
    money: float | None
    packing_efficiency: float       # share of the trained positions that hold a token
    update_mfu: float  # FLOPs of the update's tokens by the 6 N rule, over the chips' in that time


def roofline(cost: Cost, target: Target, efficiency: Efficiency) -> tuple[float, str]:
    """Returns the seconds of one call and which of the four limits it."""
    chip = target.chip
    collectives = [collective for collective in cost.collectives if collective.group > 1]
    sent = sum(one.bytes / target.bandwidth(one.group) for one in collectives)
    links = sent / efficiency.interconnect
    links += sum(one.count for one in collectives) * chip.latency
    times = {COMPUTE: cost.flops / (chip.flops * efficiency.compute),
             MEMORY: cost.bytes / (chip.hbm_bandwidth * efficiency.memory),
             LINKS: links, HOST: cost.host_bytes / chip.host_bandwidth}
    limit = max(times, key=times.__getitem__)
    return times[limit], limit


def kernel_cost(kernel: KernelCall, live_share: float, pair_share: float = 1.0) -> Cost:
    """Returns the cost of one call of a kernel, from its shapes, because XLA does not report it.

    Splash skips the blocks above the diagonal, whatever the segments; its backward pass recomputes
    the scores in each of its two kernels. Paged attention and cuDNN read the live part of the
    cache. cuDNN skips the pairs above the diagonal, and in packed rows those of other sequences.
    Args: live_share, of the cache's positions; pair_share, of a row's pairs of positions, averaged
        over narrower rows.
    """
    path, operands = kernel.name, kernel.operands
    if "splash" in path:
        query, key = [array for array in operands if len(array.dimensions) >= 3
                      and array.dtype in ("bf16", "f32")][:2]
        products = 4 if "dkv" in path else 3 if "dq" in path else 2
        pairs = math.prod(query.dimensions[:-1]) * key.dimensions[-2] / 2 * pair_share
        return Cost(flops=2.0 * products * pairs * query.dimensions[-1], bytes=kernel.bytes)

    if "paged_attention" in path:
        cache = [array for array in operands if len(array.dimensions) == 4][-2:]
        queries = max((array for array in operands if len(array.dimensions) == 4),
                      key=lambda array: array.dtype == "f32")
        live = sum(array.bytes for array in cache) * live_share
        grouped = queries.dimensions[1]
        return Cost(flops=2.0 * grouped * live / (cache[0].bytes / cache[0].elements), bytes=live)

    if path.startswith(costs.CUDNN):
        return _cudnn_cost(kernel, live_share, pair_share)

    # A cache that is returned in place: one position of each row was written.
    aliased = [array for array in kernel.results
               if len(array.dimensions) == 4 and array in operands]
    if aliased:
        tiles = sum(array.bytes / array.dimensions[2] * TILE for array in aliased)
        return Cost(bytes=2 * tiles)
    return Cost(bytes=kernel.bytes)


def _cudnn_cost(kernel: KernelCall, live_share: float, pair_share: float) -> Cost:
    """Returns the cost of cuDNN's attention: one decode step, or one pass over whole rows.

    Args: as in `kernel_cost`; the operands begin with queries [B, N, H, h] and keys [B, S, K, h].
    """
    query, key = kernel.operands[:2]
    rows, length, heads, head_dim = query.dimensions
    pairs = rows * heads * length * key.dimensions[1]
    if length == 1:
        live = 2 * key.bytes * live_share
        return Cost(flops=4.0 * pairs * live_share * head_dim, bytes=live)

    products = 5 if "Backward" in kernel.name else 2
    return Cost(flops=2.0 * products * pairs / 2 * pair_share * head_dim, bytes=kernel.bytes)


def with_kernels(cost: Cost, live_share: float = 1.0, pair_share: float = 1.0) -> Cost:
    """Returns the cost including that of its kernels."""
    kernels = costs.total(kernel_cost(kernel, live_share, pair_share) * kernel.count
                          for kernel in cost.kernels)
    return dataclasses.replace(cost, kernels=(), flops=cost.flops + kernels.flops,
                               bytes=cost.bytes + kernels.bytes)


def live_share(workload: Workload, capacity: int) -> float:
    """Returns the share of a slot's positions that are live, averaged over time."""
    lengths = workload.lengths.astype(float)
    return float((workload.prompt_tokens + np.sum(lengths**2) / (2 * np.sum(lengths))) / capacity)


def decode_seconds(decode: PlannedFunction, machine: PlannedMachine, *, limits: CacheLimits,
                   weights_bytes: float, lengths: np.ndarray, prompt_tokens: int,
                   smallest: int) -> tuple[float, int]:
    """Returns the seconds to generate responses of these lengths, and the tokens that are prefilled
    again.

    Each decode step reads all weights. Its other costs are proportional to the slots, those of the
    cache to its live positions.
    Args: limits, of the slots: decode was compiled for the largest ones; weights_bytes, read by
        one chip in each step.
    """
    slots, capacity = limits.least_slots, limits.largest
    assert capacity is not None
    cost = decode.cost
    assert cost is not None
    idle, full = with_kernels(cost, 0.0), with_kernels(cost, 1.0)
    fixed_bytes = min(weights_bytes, idle.bytes)

    def seconds(active_slots: int, active_capacity: int, live: float) -> float:
        share, read = active_slots / slots, live / (slots * capacity)
        if decode.live_share == 1:      # XLA reads the whole cache
            read = share * active_capacity / capacity
        flops = idle.flops * share + (full.flops - idle.flops) * read
        moved = fixed_bytes + (idle.bytes - fixed_bytes) * share + (full.bytes - idle.bytes) * read
        sent = tuple(dataclasses.replace(one, bytes=one.bytes * share) for one in cost.collectives)
        return machine.seconds(Cost(flops=flops, bytes=moved, collectives=sent))

    return generate(lengths, prompt_tokens=prompt_tokens, limits=limits, smallest=smallest,
                    seconds=seconds)


def is_whole(functions: Mapping[str, PlannedFunction]) -> bool:
    """Returns whether all functions of a step are there, and none is too large to compile."""
    return functions.keys() >= NEEDED and all(functions[name].cost is not None for name in NEEDED)


def estimate_run(config: Config, functions: Mapping[str, PlannedFunction], workload: Workload,
                 machine: PlannedMachine, *, decode_memory: float, limits: CacheLimits,
                 weights_bytes: float, flops_per_token: float, smallest: int, price: float | None,
                 watts: float | None) -> RunEstimate:
    """Estimates the whole run from functions for which `is_whole` is true.

    Not included: grading, which overlaps with generation, checkpoints and compilation.
    Args: decode_memory, the share of the HBM bandwidth that decoding reaches; flops_per_token, of a
        forward pass; smallest, slots of one device that are not halved further; price, of a
        chip-hour; watts, of a chip.
    """
    seconds = {name: machine.seconds(function.full_cost) * function.calls
               for name, function in functions.items() if function.full_cost is not None}
    decoding = dataclasses.replace(machine, efficiency=dataclasses.replace(
        machine.efficiency, memory=decode_memory))
    decode, again = decode_seconds(functions["decode"], decoding, limits=limits,
                                   weights_bytes=weights_bytes, lengths=workload.lengths,
                                   prompt_tokens=workload.prompt_tokens, smallest=smallest)
    width = prefill_width(config.data.max_prompt_tokens, limits.largest)
    batch = prefill_rows(width, limits.slots) * width
    batches = functions["prefill"].calls + PREFILL_PADDING * again / batch
    prefill = seconds["prefill"] / functions["prefill"].calls * batches
    rollout = seconds["unstack"] + prefill + seconds["insert"] + decode
    score = seconds["score"] + seconds["score_reference"] + seconds["experience"]
    update = seconds["gradients"] + seconds["apply_gradients"]
    step = rollout + score + update

    rate = workload.tokens / rollout
    evaluated = _evaluated_tokens(config, workload) / rate
    hours, chips = (config.run.steps * step + evaluated) / 3600, machine.target.chips
    trained = workload.tokens + len(workload.lengths) * workload.prompt_tokens
    chip_watts = machine.target.chip.watts if watts is None else watts
    return RunEstimate(
        slots=limits.least_slots, rollout_tokens_per_second=rate, rollout_seconds=rollout,
        score_seconds=score, update_seconds=update, step_seconds=step,
        evaluation_hours=evaluated / 3600, hours=hours,
        chip_hours=hours * chips, energy_kwh=hours * chips * chip_watts / 1000,
        money=None if price is None else hours * chips * price,
        packing_efficiency=workload.packing_efficiency,
        update_mfu=3 * flops_per_token * trained / (update * chips * machine.target.chip.flops))


def _evaluated_tokens(config: Config, workload: Workload) -> float:
    """Returns the tokens generated by all evaluations of the run."""
    settings = config.evaluation
    if not settings.problems:
        return 0.0
    evaluations = 2 + ((config.run.steps - 1) // settings.every if settings.every else 0)
    responses = settings.problems * sum(loading.evaluation_samples(config).values())
    return evaluations * responses * float(workload.lengths.mean())
