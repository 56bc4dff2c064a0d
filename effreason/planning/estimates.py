"""From what each function costs to seconds, tokens a second, hours, energy and money: a roofline model.

A function takes as long as the slowest of four things that overlap: products, traffic of device memory, collectives,
traffic to the host's memory; each at the share of the peak rate that Efficiency states.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from effreason.data import loading
from effreason.planning import costs
from effreason.planning.chips import Target
from effreason.planning.costs import Cost, Kernel
from effreason.planning.workloads import Workload, generate
from effreason.runtime.config import Config

COMPUTE, MEMORY, LINKS, HOST = "compute", "memory", "links", "host"
TILE = 16                           # positions that lm.kernels.paged_write reads and puts back for one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of the peak rates that programs reach; measured ones replace these guesses from published runs."""

    compute: float = 0.5            # large products: 0.4 to 0.6 in training runs of such models
    memory: float = 0.6             # of HBM bandwidth in decoding: 0.4 to 0.85
    interconnect: float = 0.7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
    """One compiled function of a run, on one chip."""

    name: str
    per: str                        # what one call is for
    calls: float                    # in a training step; of decode: 0, its calls follow from the lengths
    own_bytes: float                # of HBM: arguments, results, temporaries, code
    beside_bytes: float             # what else lives there at that time
    cost: Cost | None               # of one call, without kernels; None: it is too large to be compiled
    source: str                     # compiled | analytic
    live_share: float = 1.0         # of the cache's positions, that a decode step reads
    pair_share: float = 1.0         # of the pairs of rows as wide as those it was compiled with: some are narrower

    @property
    def hbm_bytes(self) -> float:
        """All that is on a chip when it runs."""
        return self.own_bytes + self.beside_bytes

    @property
    def whole_cost(self) -> Cost | None:
        """The cost of one call with that of its kernels."""
        return None if self.cost is None else with_kernels(self.cost, self.live_share, self.pair_share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What the times are worked out for."""

    target: Target
    efficiency: Efficiency
    batch_shards: int               # ways in which slots and rows are split

    def seconds(self, cost: Cost) -> float:
        return roofline(cost, self.target, self.efficiency)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A whole run, by the model."""

    slots: int
    rollout_tokens_per_second: float
    rollout_seconds: float          # of a step: weights for the sampler, prompts, decoding
    score_seconds: float            # with credit
    update_seconds: float
    step_seconds: float
    evaluation_hours: float
    hours: float                    # all steps and evaluations
    chip_hours: float
    energy_kwh: float               # of the chips
    money: float | None
    row_fill: float                 # share of the trained positions that hold a token
    update_mfu: float               # FLOPs that the update's tokens need by 6 N, over those of the chips in its time


def roofline(cost: Cost, target: Target, efficiency: Efficiency) -> tuple[float, str]:
    """Seconds of one call, and which of the four it waits for."""
    chip = target.chip
    crossing = [each for each in cost.collectives if each.group > 1]
    links = sum(each.bytes / target.bandwidth(each.group) for each in crossing) / efficiency.interconnect
    links += sum(each.count for each in crossing) * chip.latency
    times = {COMPUTE: cost.flops / (chip.flops * efficiency.compute),
             MEMORY: cost.bytes / (chip.hbm_bandwidth * efficiency.memory),
             LINKS: links, HOST: cost.host_bytes / chip.host_bandwidth}
    limit = max(times, key=times.__getitem__)
    return times[limit], limit


def kernel_cost(kernel: Kernel, live_share: float, pair_share: float = 1.0) -> Cost:
    """What one call of a kernel costs, by its shapes: XLA says nothing of it.

    Splash leaves out the blocks above the diagonal, whatever the segments; its backward pass computes the scores again
    in each of its two kernels. Paged attention fetches what is live of the cache.
    Args: live_share, of the cache's positions; pair_share, of the pairs of a row, on the mean over narrower ones."""
    path, operands = kernel.name, kernel.operands
    if "splash" in path:
        query, key = [array for array in operands if len(array.dimensions) >= 3 and array.dtype in ("bf16", "f32")][:2]
        products = 4 if "dkv" in path else 3 if "dq" in path else 2
        pairs = math.prod(query.dimensions[:-1]) * key.dimensions[-2] / 2 * pair_share
        return Cost(flops=2.0 * products * pairs * query.dimensions[-1], bytes=kernel.bytes)
    if "paged_attention" in path:
        cache = [array for array in operands if len(array.dimensions) == 4][-2:]
        queries = max((array for array in operands if len(array.dimensions) == 4), key=lambda each: each.dtype == "f32")
        live = sum(array.bytes for array in cache) * live_share
        grouped = queries.dimensions[1]
        return Cost(flops=2.0 * grouped * live / (cache[0].bytes / cache[0].elements), bytes=live)
    aliased = [array for array in kernel.results if len(array.dimensions) == 4 and array in operands]
    if aliased:                         # one position of each row, in place
        tiles = sum(array.bytes / array.dimensions[2] * TILE for array in aliased)
        return Cost(bytes=2 * tiles)
    return Cost(bytes=kernel.bytes)


def with_kernels(cost: Cost, live_share: float = 1.0, pair_share: float = 1.0) -> Cost:
    """The cost with that of the kernels put in."""
    known = costs.total(kernel_cost(each, live_share, pair_share) * each.count for each in cost.kernels)
    return dataclasses.replace(cost, kernels=(), flops=cost.flops + known.flops, bytes=cost.bytes + known.bytes)


def live_share(workload: Workload, capacity: int) -> float:
    """Positions that are live in a slot on the mean over time, of those it has."""
    drawn = workload.lengths.astype(float)
    return float((workload.prompt_tokens + np.sum(drawn**2) / (2 * np.sum(drawn))) / capacity)


def decode_seconds(decode: Function, machine: Machine, *, slots: int, capacity: int, weights_bytes: float,
                   lengths: np.ndarray, prompt_tokens: int, smallest: int) -> float:
    """Seconds to generate responses of these lengths.

    The weights are read whatever the slots; all else of a step goes with them, and the cache with what is live in it.
    Args: slots and capacity, that decode was compiled with; weights_bytes, read by one chip in each step."""
    cost = decode.cost
    assert cost is not None
    idle, full = with_kernels(cost, 0.0), with_kernels(cost, 1.0)
    kept = min(weights_bytes, idle.bytes)

    def seconds(now: int, live: float) -> float:
        share, read = now / slots, live / (slots * capacity)
        flops = idle.flops * share + (full.flops - idle.flops) * read
        moved = kept + (idle.bytes - kept) * share + (full.bytes - idle.bytes) * read
        sent = tuple(dataclasses.replace(each, bytes=each.bytes * share) for each in cost.collectives)
        return machine.seconds(Cost(flops=flops, bytes=moved, collectives=sent))

    return generate(lengths, prompt_tokens=prompt_tokens, slots=slots, shards=machine.batch_shards,
                    smallest=smallest, seconds=seconds)


def make_run(config: Config, functions: Mapping[str, Function], workload: Workload, machine: Machine, *, slots: int,
             capacity: int, weights_bytes: float, flops_per_token: float, smallest: int,
             price: float | None, watts: float | None) -> Run | None:
    """The run that these functions make; None where one of them is missing or too large.

    Grading, which overlaps with generation, checkpoints and compilation are not in it.
    Args: flops_per_token, of a forward pass; smallest, slots of a device that are not halved; price, of a chip-hour;
        watts, of a chip."""
    needed = {"unstack", "read", "start", "decode", "score", "score_reference", "credit", "gradients", "apply"}
    if needed - functions.keys() or any(functions[name].cost is None for name in needed):
        return None
    seconds = {name: machine.seconds(each.whole_cost) * each.calls for name, each in functions.items()
               if each.whole_cost is not None}
    decode = decode_seconds(functions["decode"], machine, slots=slots, capacity=capacity,
                            weights_bytes=weights_bytes, lengths=workload.lengths,
                            prompt_tokens=workload.prompt_tokens, smallest=smallest)
    rollout = seconds["unstack"] + seconds["read"] + seconds["start"] + decode
    score = seconds["score"] + seconds["score_reference"] + seconds["credit"]
    update = seconds["gradients"] + seconds["apply"]
    step = rollout + score + update
    rate = workload.tokens / rollout
    settings = config.evaluation
    evaluations = (2 + ((config.run.steps - 1) // settings.every if settings.every else 0)) if settings.problems else 0
    responses = settings.problems * sum(loading.evaluation_samples(config).values())
    evaluated = evaluations * responses * float(workload.lengths.mean()) / rate
    hours, chips = (config.run.steps * step + evaluated) / 3600, machine.target.chips
    trained = workload.tokens + len(workload.lengths) * workload.prompt_tokens
    drawn = machine.target.chip.watts if watts is None else watts
    return Run(slots=slots, rollout_tokens_per_second=rate, rollout_seconds=rollout, score_seconds=score,
               update_seconds=update, step_seconds=step, evaluation_hours=evaluated / 3600, hours=hours,
               chip_hours=hours * chips, energy_kwh=hours * chips * drawn / 1000,
               money=None if price is None else hours * chips * price, row_fill=workload.fill,
               update_mfu=3 * flops_per_token * trained / (update * chips * machine.target.chip.flops))
