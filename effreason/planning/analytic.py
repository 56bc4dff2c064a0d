"""The same figures from formulas, without compiling: for GPUs, and to rank candidates before the best are compiled.

L layers, D width, F feed-forward width, H heads, K key/value heads, h head width, V vocabulary, N positions of a row.
`d`, `f`, `t`, `c` are the sizes of the mesh axes data, fsdp, tensor, context. Tests hold the formulas against compiled
programs: FLOPs within a few percent, memory within the factor that docs/scaling.md states.
"""

import dataclasses

import jax.numpy as jnp

from effreason.lm.model import DecoderConfig
from effreason.planning import shapes
from effreason.planning.costs import Collective, Cost
from effreason.planning.estimates import TILE, Function
from effreason.planning.workloads import Workload
from effreason.runtime.config import Config

# Products of attention for each pair of positions, 2 H h FLOPs each: forward, forward again, and backward.
ATTENTION_PRODUCTS = {"splash": (2, 7), "cudnn": (2, 5), "xla": (2, 4), "blockwise": (2, 6)}
# Pairs that are computed, of all N * N: kernels leave out what is above the diagonal by blocks, XLA by eighths.
PAIRS = {"splash": 0.5, "cudnn": 0.5, "xla": 9 / 16, "blockwise": 0.5}
BLOCK_ARRAYS = 9, 14                # arrays of F and of D a token that a block's backward pass holds at once
FORWARD_ARRAYS = 3, 5               # the same of a forward pass alone
ROW_ARRAYS, EXPERIENCE_ARRAYS = 5, 9            # of Rows, and of Experience with its rows
CREDIT_ARRAYS = 10                  # of one number for each response token, on every chip at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of weights, and what one chip has of a step."""

    decoder: DecoderConfig
    data: int
    fsdp: int
    tensor: int
    context: int
    attention: str
    remat: str

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.decoder.dtype).itemsize

    @property
    def table(self) -> int:
        """Weights of the embedding, as many as the head's."""
        return self.decoder.vocabulary * self.decoder.width

    @property
    def products(self) -> int:
        """Weights of all layers that tokens are multiplied by."""
        c = self.decoder
        return c.layers * c.width * (2 * c.head_dim * (c.heads + c.kv_heads) + 3 * c.mlp_width)

    @property
    def weights(self) -> int:
        return shapes.weight_count(self.decoder)

    @property
    def shards(self) -> int:
        """Of weights and optimiser."""
        return self.fsdp * self.tensor

    @property
    def saved(self) -> str:
        """What rematerialisation saves: nothing of cuDNN's attention, whose backward pass needs its own statistics."""
        return "full" if (self.attention, self.remat) == ("cudnn", "attention") else self.remat

    @property
    def again(self) -> float:
        """Share of the products with weights that the backward pass does once more: all but the last of a block."""
        if self.remat == "none":
            return 0.0
        return 1 - self.decoder.layers * self.decoder.width * self.decoder.mlp_width / self.products

    def attention_flops(self, pairs: float, backward: bool) -> float:
        """Of one chip, for pairs of positions in one layer's whole row before the diagonal is thought of."""
        forward, back = ATTENTION_PRODUCTS[self.attention]
        # In zig-zag order XLA's own attention masks instead of leaving out.
        computed = 1.0 if self.attention == "xla" and self.context > 1 else PAIRS[self.attention]
        products = forward * (1 + (backward and self.saved == "full")) + back * backward
        c = self.decoder
        return 2.0 * products * computed * pairs * c.heads * c.head_dim / self.tensor


def make_functions(config: Config, decoder: DecoderConfig, shape: tuple[int, int, int, int], *, slots: int,
                   capacity: int, workload: Workload, attention: str, live_share: float) -> dict[str, Function]:
    """Every function of a training step, by formula."""
    sizes = Sizes(decoder=decoder, data=shape[0], fsdp=shape[1], tensor=shape[2], context=shape[3],
                  attention=attention, remat=decoder.remat)
    held = _held(config, sizes, slots=slots, capacity=capacity)
    updates = config.update.updates_per_batch
    trained = _learning(config, sizes, workload)
    sampled, banks = _sampling(config, sizes, held, slots=slots, capacity=capacity, live_share=live_share)
    state = held["params"] + held["optimizer"]
    tokens, rows = _step_arrays(config, sizes, workload)
    experience = tokens + EXPERIENCE_ARRAYS * rows

    beside_sampler, figures = state + held["reference"], trained | sampled
    calls = {                           # name: what one call is for, calls of a step, what else is on the chip then
        "unstack": ("a step", 1, held["optimizer"] + held["reference"]),
        "read": (f"{banks[0]} prompts", banks[1], beside_sampler + held["slots"]),
        "start": ("a slot", len(workload.lengths), beside_sampler + held["weights"]),
        "decode": ("a token", 0, beside_sampler + held["bank"]),
        "score": ("a step", 1, held["optimizer"] + held["reference"] + tokens),
        "score_reference": ("a step", int(config.kl.form != "none"), state + 2 * tokens),
        "credit": ("a step", 1, beside_sampler),
        "gradients": ("an update", updates, held["optimizer"] + held["reference"] + tokens),
        "apply": ("an update", updates, held["reference"] + experience),
    }
    return {name: Function(name=name, per=per, calls=count, own_bytes=figures[name][0], beside_bytes=beside,
                           cost=figures[name][1], source="analytic")
            for name, (per, count, beside) in calls.items()}


def _held(config: Config, sizes: Sizes, *, slots: int, capacity: int) -> dict[str, float]:
    """Bytes in one chip's memory of what outlives a function."""
    c = sizes.decoder
    weights = sizes.weights
    position = 2 * c.layers * c.kv_heads * c.head_dim * sizes.itemsize / sizes.tensor
    return {
        "params": 4 * weights / sizes.shards,
        "optimizer": 0.0 if config.update.offload_optimizer else 8 * weights / sizes.shards,
        "reference": 0.0 if config.kl.offload_reference else sizes.itemsize * weights / sizes.shards,
        "weights": sizes.itemsize * weights / sizes.tensor,
        "position": position,
        "slots": slots / (sizes.data * sizes.fsdp) * capacity / sizes.context * position,
        "bank": 8 * config.data.max_prompt_tokens * position,
    }


def _step_arrays(config: Config, sizes: Sizes, workload: Workload) -> tuple[float, float]:
    """Bytes on one chip of a number for each response token, which every chip has, and for each position of a row."""
    update = config.update
    positions = update.updates_per_batch * workload.room * workload.rows * workload.width * workload.widths
    shards = sizes.data * sizes.fsdp * sizes.context
    return 4.0 * len(workload.lengths) * config.rollout.max_new_tokens, 4.0 * positions / shards


def _gathered(sizes: Sizes, weights: float, count: float = 1) -> Collective:
    """The gathering of split weights over fsdp, in the compute dtype."""
    sent = sizes.itemsize * weights / sizes.tensor * (sizes.fsdp - 1) / sizes.fsdp
    return Collective("all-gather", sizes.fsdp, count, sent)


def _summed(group: int, size: float, kind: str = "all-reduce", count: float = 1) -> Collective:
    """Sums over a group, of so many bytes a chip all together."""
    factor = 2 if kind == "all-reduce" else 1
    return Collective(kind, group, count, factor * size * (group - 1) / group)


def _learning(config: Config, sizes: Sizes, workload: Workload) -> dict[str, tuple[float, Cost]]:
    """Scoring and the update: (own bytes, cost of a call)."""
    c, s, trips, updates = sizes.decoder, sizes.itemsize, workload.micro_batches, config.update.updates_per_batch
    rows = config.update.rows_per_micro_batch / (sizes.data * sizes.fsdp)
    tokens, pairs = rows * workload.width / sizes.context, rows * workload.width**2 / sizes.context
    pairs *= workload.pair_batches / trips              # of rows that are narrower
    layers, head = 2.0 * tokens * sizes.products / sizes.tensor, 2.0 * tokens * sizes.table / sizes.tensor
    activation = tokens * c.width * s
    keys = 2 * rows * workload.width * c.kv_heads * c.head_dim * s / sizes.tensor

    def passes(count: float) -> list[Collective]:
        """Collectives of so many passes over the layers: weights, sums over tensor, keys and values over context."""
        found = [_gathered(sizes, sizes.products, 7 * c.layers),
                 _summed(sizes.tensor, 2 * c.layers * activation, count=2 * c.layers),
                 _summed(sizes.context, c.layers * keys, "all-gather", 2 * c.layers)]
        return [dataclasses.replace(each, count=each.count * count, bytes=each.bytes * count) for each in found]

    ends = [_gathered(sizes, 2 * sizes.table)]          # embedding and head
    width_f, width_d = c.mlp_width / sizes.tensor, c.width
    moved = tokens * c.layers * s
    forward = Cost(flops=layers + head + c.layers * sizes.attention_flops(pairs, False),
                   bytes=moved * (6 * width_f + 20 * width_d) + s * (sizes.products + 2 * sizes.table) / sizes.tensor,
                   collectives=tuple(passes(1) + ends))
    again = sizes.again > 0
    gradients = [_summed(sizes.fsdp, s * sizes.weights / sizes.tensor, "reduce-scatter"),
                 _summed(sizes.data * sizes.context, s * sizes.weights / sizes.shards)]
    step = Cost(flops=layers * (3 + sizes.again) + 4 * head + c.layers * sizes.attention_flops(pairs, True),
                bytes=moved * (20 * width_f + 60 * width_d) + (3 + again) * s * sizes.weights / sizes.tensor
                + 8 * sizes.weights / sizes.shards,
                collectives=tuple(passes(2 + again) + ends + gradients))
    tile = 4 * tokens * min(config.update.vocabulary_tile, c.vocabulary / sizes.tensor)
    table = sizes.table / sizes.tensor
    of_tokens, of_rows = _step_arrays(config, sizes, workload)
    kept = {"full": 2.0, "attention": 2.0 + c.heads * c.head_dim / sizes.tensor / c.width,
            "none": 12.0 + 5 * width_f / c.width}[sizes.saved] * c.layers * activation

    def working(arrays: tuple[int, int]) -> float:
        one_layer = 2 * s * sizes.products / c.layers / sizes.tensor
        return tokens * s * (arrays[0] * width_f + arrays[1] * width_d) + one_layer

    split = 1 / sizes.shards
    line = of_rows * sizes.data * sizes.fsdp * sizes.context        # every chip has that of all
    scored = (s * table + max(working(FORWARD_ARRAYS), 3 * tile) + (ROW_ARRAYS + 1) * of_rows
              + line + 2 * of_tokens)
    credit = CREDIT_ARRAYS * of_tokens + EXPERIENCE_ARRAYS * of_rows
    sums = 4 * sizes.weights * split
    gradient = (4 + s) * sizes.weights * split + 2 * sums + kept + max(
        working(BLOCK_ARRAYS), 2 * s * table + 3 * tile + 2 * 4 * tokens * c.width)
    gradient += EXPERIENCE_ARRAYS * of_rows + s * table
    host = 16 * sizes.weights * split if config.update.offload_optimizer else 0.0
    fetched = s * sizes.weights * split if config.kl.offload_reference else 0.0
    times = trips * updates
    return {
        "score": ((4 + s) * sizes.weights * split + scored, forward * times),
        "score_reference": (s * sizes.weights * split + scored,
                            dataclasses.replace(forward * times, host_bytes=fetched)),
        "credit": (credit, Cost(bytes=2 * credit)),
        "gradients": (gradient, step * trips),
        "apply": (20 * sizes.weights * split, Cost(bytes=28 * sizes.weights * split, host_bytes=host)),
    }


def _sampling(config: Config, sizes: Sizes, held: dict[str, float], *, slots: int, capacity: int,
              live_share: float) -> tuple[dict[str, tuple[float, Cost]], tuple[int, int]]:
    """The sampler's functions: (own bytes, cost of a call), and (prompts of a bank, banks of a step)."""
    c, s = sizes.decoder, sizes.itemsize
    width = min(max(16, 1 << (config.data.max_prompt_tokens - 1).bit_length()), capacity)
    height = max(min(slots, 8, 8192 // width), 1)
    here = slots / (sizes.data * sizes.fsdp)
    live = live_share * capacity / sizes.context * here             # positions on one chip
    sums = _summed(sizes.tensor, 2 * c.layers * c.width * s * here, count=2 * c.layers)
    read = height * width
    logits = 4 * here * c.vocabulary / sizes.tensor
    without_embedding = held["weights"] - (0 if c.tied else s * sizes.table / sizes.tensor)
    decode = Cost(
        flops=2.0 * here * (sizes.products + sizes.table) / sizes.tensor
        + 4.0 * live * c.layers * c.heads * c.head_dim / sizes.tensor,
        bytes=without_embedding + live * held["position"] + here * TILE * 2 * held["position"] + 3 * logits,
        collectives=(sums,))
    prefill = Cost(flops=2.0 * read * sizes.products / sizes.tensor
                   + 4.0 * read * width * c.layers * c.heads * c.head_dim / sizes.tensor,
                   bytes=held["weights"] + read * c.layers * s * (6 * c.mlp_width / sizes.tensor + 20 * c.width),
                   collectives=(_summed(sizes.tensor, 2 * c.layers * c.width * s * read),))
    scores = 4 * read * width * c.heads / sizes.tensor
    gathered = _gathered(sizes, sizes.weights)
    return {
        "unstack": (held["params"] + held["weights"] * 1.3,
                    Cost(bytes=held["params"] + 2 * held["weights"], collectives=(gathered,))),
        "read": (held["weights"] + held["bank"] + min(scores, 2**27 * c.heads) + read * 8 * c.width * s,
                 prefill),
        "start": (held["slots"] + held["bank"], Cost(bytes=2 * width * held["position"])),
        "decode": (held["weights"] + held["slots"] + 3 * logits, decode),
    }, (height, -(-config.rollout.prompts_per_step // height))
