"""Computes the figures of compiled programs from formulas: for GPUs, and to rank candidates before
compiling any.

L layers, D width, F feed-forward width, H heads, K key/value heads, h head width, V vocabulary, N
positions of a row. Tests compare the formulas with compiled programs: FLOPs agree within a few
percent, memory within the factor given in docs/scaling.md.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from effreason.lm import model
from effreason.lm.adapters import Adapter
from effreason.lm.architecture import DecoderConfig
from effreason.lm.delta import CHUNK
from effreason.planning import shapes
from effreason.planning.costs import Collective, Cost, KernelCall
from effreason.planning.estimates import TILE, PlannedFunction
from effreason.planning.hlo import Array
from effreason.planning.workloads import Workload
from effreason.rl.learner import make_adapter
from effreason.rl.update import GATHERED_BYTES
from effreason.runtime import sharding
from effreason.runtime.config import Config
from effreason.sampling import capacity as sampler_capacity

# Attention products for each pair of positions, 2 H h FLOPs each: in a forward, a backward pass.
ATTENTION_PRODUCTS = {"splash": (2, 7), "cudnn": (2, 5), "cudnn_packed": (2, 5), "xla": (2, 4),
                      "blockwise": (2, 6)}
# Share of the N * N pairs computed: kernels skip the blocks above the diagonal, XLA skips eighths.
PAIRS = {"splash": 0.5, "cudnn": 0.5, "cudnn_packed": 0.5, "xla": 9 / 16, "blockwise": 0.5}
# Arrays of F and of D values a token alive at once, in a block's backward and in a forward pass.
BLOCK_ARRAYS, FORWARD_ARRAYS = (9, 14), (3, 5)
CUDNN_BLOCK_ARRAYS = (5, 8)         # XLA for GPUs, around cuDNN's attention
ROW_ARRAYS = 5                      # arrays in Rows
EXPERIENCE_ARRAYS = 8               # arrays in Experience, with its Rows
ADVANTAGE_ARRAYS = 10               # arrays of a number for each response token
# Of layers that keep a state, for each token in float32: arrays of a chunk's positions for each
# value head, and of queries, keys and values, in a backward and in a forward pass.
STATE_ARRAYS, STATE_FORWARD_ARRAYS = (8, 10), (4, 6)
# Those that every chip has as a whole for a moment, if they are small, and those that are sent to
# all for it.
WHOLE_ARRAYS, SENT_ARRAYS = 2, 3

Costs = dict[str, tuple[float, Cost]]  # (own bytes, cost of a call) of a function, by its name


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSizes:
    """Parameter counts, and the shards that one chip has in a training step."""

    decoder: DecoderConfig
    data: int
    fsdp: int
    tensor: int
    context: int
    attention: str
    remat: str
    adapter: Adapter | None = None

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.decoder.dtype).itemsize

    @property
    def table(self) -> int:
        """Parameters of the embedding; the head has as many."""
        return self.decoder.vocabulary * self.decoder.width

    @property
    def products(self) -> int:
        """Parameters of all layers in matrix products with a token."""
        c, delta, products = self.decoder, self.decoder.delta, 0
        if delta is not None:
            products = delta.value_heads * (3 * delta.value_dim + 2)
            products += 2 * delta.key_heads * delta.key_dim
        heads = c.heads * (3 if c.gates_attention else 2) + 2 * c.kv_heads
        return c.width * (c.attention_layers * c.head_dim * heads + self.state_layers * products
                          + c.layers * (c.experts + 3 * c.active_mlp_width))

    @property
    def state_layers(self) -> int:
        return self.decoder.layers - self.decoder.attention_layers

    def state_flops(self, *, is_step: bool) -> float:
        """Returns the FLOPs of a position in the products of all states, of a decode step or of
        `delta.mix` on whole rows."""
        delta = self.decoder.delta
        if delta is None:
            return 0.0
        of_a_head = 6.0 * delta.key_dim * delta.value_dim
        if not is_step:     # products within a chunk, and its inverse
            of_a_head += CHUNK * (6.0 * delta.key_dim + 4.0 * delta.value_dim)
            of_a_head += 4.0 * CHUNK**2 * math.log2(CHUNK)
        return self.state_layers * delta.value_heads * of_a_head

    @property
    def held(self) -> int:
        """The same with the experts that a token does not go through."""
        return self.products + self.mlp - self.active_mlp

    def attention_layers(self, width: int) -> float:
        """Returns how many layers without a window would compute as many pairs in such rows."""
        kinds = (self.decoder.kind(layer) for layer in range(self.decoder.layers))
        return sum(1.0 if kind.window is None else min(2 * kind.window / width, 1.0)
                   for kind in kinds if kind.delta is None)

    @property
    def mlp(self) -> int:
        """Parameters of the MLPs of all layers."""
        c = self.decoder
        return 3 * c.layers * c.width * c.mlp_width * (c.experts or 1)

    @property
    def active_mlp(self) -> int:
        """Those that a token goes through."""
        return 3 * self.decoder.layers * self.decoder.width * self.decoder.active_mlp_width

    @property
    def weights(self) -> int:
        return shapes.weight_count(self.decoder)

    @property
    def trained(self) -> int:
        """Parameters that are trained: all of them, or the adapters'."""
        if self.adapter is None:
            return self.weights
        return shapes.weight_count(dataclasses.replace(
            self.decoder, adapter=self.adapter)) - self.weights

    @property
    def frozen(self) -> int:
        """Parameters of the policy that are not trained; they are also the reference."""
        return 0 if self.adapter is None else self.weights

    @property
    def shards(self) -> int:
        """Shards of the weights and of the optimizer."""
        return self.fsdp * self.tensor

    def token_shards(self, responses: int) -> int:
        """Returns the shards of a number for each response token; see update.token_sharding."""
        shards = self.data * self.fsdp
        return shards if responses % shards == 0 else 1

    def mlp_shards(self, platform: str) -> int:
        """Returns the shards of the MLP's weights in the sampler; see sharding.sampling_axes."""
        mesh = AbstractMesh((self.data, self.fsdp, self.tensor, self.context), sharding.MESH_AXES)
        return sampler_capacity.mlp_shards(self.decoder, mesh, platform)

    def sampled_weights(self, platform: str, *, read: bool = False) -> float:
        """Returns the sampler's weights on a chip; if `read`, those that a decode step reads."""
        # A step reads only a few rows of an untied embedding.
        unread = self.table if read and not self.decoder.tied else 0
        return ((self.weights - self.mlp - unread) / self.tensor
                + self.mlp / self.mlp_shards(platform))

    @property
    def saved(self) -> str:
        """What remat saves. It cannot save cuDNN's attention, whose backward pass needs more."""
        cudnn = self.attention.startswith("cudnn")
        return "full" if cudnn and self.remat == "attention" else self.remat

    @property
    def recomputed(self) -> float:
        """Share of the products with weights to repeat: all but the last one of each block."""
        if self.remat == "none":
            return 0.0
        return 1 - self.active_mlp / 3 / self.products

    def attention_flops(self, pairs: float, backward: bool) -> float:
        """Returns one chip's FLOPs in one layer. Args: pairs, of positions, masked or not."""
        forward, back = ATTENTION_PRODUCTS[self.attention]
        # In zig-zag order XLA's own attention masks pairs instead of skipping them.
        computed = 1.0 if self.attention == "xla" and self.context > 1 else PAIRS[self.attention]
        products = forward * (1 + (backward and self.saved == "full")) + back * backward
        c = self.decoder
        return 2.0 * products * computed * pairs * c.heads * c.head_dim / self.tensor


def make_functions(config: Config, decoder: DecoderConfig, shape: tuple[int, int, int, int], *,
                   slots: int, capacity: int, workload: Workload, attention: str,
                   live_share: float, platform: str) -> dict[str, PlannedFunction]:
    """Returns every function of a training step, by formula."""
    sizes = StepSizes(decoder=decoder, data=shape[0], fsdp=shape[1], tensor=shape[2],
                      context=shape[3], attention=attention, remat=decoder.remat,
                      adapter=make_adapter(config))
    resident = _resident_bytes(config, sizes, slots=slots, capacity=capacity,
                               platform=platform)
    updates = config.update.updates_per_batch
    learner_costs = _learner_costs(config, sizes, workload)
    sampler_costs, (height, batches) = _sampler_costs(config, sizes, resident, slots=slots,
                                                      capacity=capacity,
                                                      mlp_shards=sizes.mlp_shards(platform))
    state = resident["params"] + resident["optimizer"]
    tokens, rows = _step_arrays(config, sizes, workload)
    experience = tokens + EXPERIENCE_ARRAYS * rows
    training, costs = state + resident["reference"], learner_costs | sampler_costs
    # With adapters the reference is part of the policy, which its functions count themselves.
    apart = 0.0 if sizes.frozen else resident["reference"]

    # A policy that no step scores is scored before it is saved.
    scored = 1 - config.first_scored_update / updates

    # What one call covers, calls of a step, other bytes in HBM.
    calls = {
        "unstack": ("a step", 1, resident["optimizer"] + apart),
        "prefill": (f"{height} prompts", batches, training + resident["slots"]),
        "insert": ("a slot", len(workload.lengths), training + resident["weights"]),
        "decode": ("a token", 0, training + resident["prefilled"]),
        "score": ("a step" if scored else "a save", scored,
                  resident["optimizer"] + apart + tokens),
        "score_reference": ("a step", int(config.scores_reference), state + 2 * tokens),
        "experience": ("a step", 1, training),
        "gradients": ("an update", updates, resident["optimizer"] + apart + tokens),
        "apply_gradients": ("an update", updates, resident["reference"] + experience),
    }
    return {name: PlannedFunction(name=name, per=per, calls=count, own_bytes=costs[name][0],
                                  other_bytes=other, cost=costs[name][1], source="analytic",
                                  live_share=live_share)
            for name, (per, count, other) in calls.items()}


def _resident_bytes(config: Config, sizes: StepSizes, *, slots: int, capacity: int,
                    platform: str) -> dict[str, float]:
    """Returns the bytes in one chip's memory of the arrays that outlive a function."""
    c = sizes.decoder
    position = model.position_bytes(c) / sizes.tensor
    split = sizes.itemsize * sizes.weights / sizes.shards

    return {
        "params": 4 * sizes.trained / sizes.shards,
        "optimizer": (0.0 if config.update.offload_optimizer
                      else 8 * sizes.trained / sizes.shards),
        "reference": split * (config.keeps_reference and not config.kl.offload_reference),
        "weights": sizes.itemsize * sizes.sampled_weights(platform),
        "position": position,
        "slots": (slots / (sizes.data * sizes.fsdp) * position
                  * model.positions_held(c, capacity, sizes.context) / sizes.context),
        "prefilled": 8 * (config.data.max_prompt_tokens * position
                          + model.state_bytes(c) / sizes.tensor),
    }


def _step_arrays(config: Config, sizes: StepSizes, workload: Workload) -> tuple[float, float]:
    """Returns one chip's bytes of a number for each response token, and for each row position."""
    update = config.update
    rows = update.updates_per_batch * workload.room * workload.rows
    positions = rows * workload.width * workload.widths
    shards = sizes.data * sizes.fsdp
    tokens = len(workload.lengths) * config.rollout.max_new_tokens
    return (4.0 * tokens / sizes.token_shards(len(workload.lengths)),
            4.0 * positions / (shards * sizes.context))


def _weight_gather(sizes: StepSizes, weights: float, count: float = 1) -> Collective:
    """Gathers split weights over fsdp, in the compute dtype."""
    sent = sizes.itemsize * weights / sizes.tensor * (sizes.fsdp - 1) / sizes.fsdp
    return Collective("all-gather", sizes.fsdp, count, sent)


def _reduction(group: int, size: float, kind: str = "all-reduce", count: float = 1) -> Collective:
    """Sums over a group. Args: size, bytes on one chip in all `count` collectives together."""
    factor = 2 if kind == "all-reduce" else 1
    return Collective(kind, group, count, factor * size * (group - 1) / group)


def _learner_costs(config: Config, sizes: StepSizes, workload: Workload) -> Costs:
    """Returns the costs of scoring and of the update."""
    s, trips, updates = sizes.itemsize, workload.micro_batches, config.update.updates_per_batch
    score_bytes, gradient_bytes = _activation_bytes(config, sizes, workload)
    forward, step = _pass_costs(config, sizes, workload)
    of_tokens, of_rows = _step_arrays(config, sizes, workload)

    split = 1 / sizes.shards
    experience = ADVANTAGE_ARRAYS * of_tokens + EXPERIENCE_ARRAYS * of_rows
    parts = sizes.token_shards(len(workload.lengths))
    whole = of_tokens * parts if parts > 1 else 0.0
    gathered = min(whole, GATHERED_BYTES)
    host = 16 * sizes.trained * split if config.update.offload_optimizer else 0.0
    from_host = s * sizes.weights * split if config.kl.offload_reference else 0.0
    times = trips * updates

    return {
        "score": (_policy_bytes(sizes) + score_bytes, forward * times),
        "score_reference": (s * sizes.weights * split + score_bytes,
                            dataclasses.replace(forward * times, host_bytes=from_host)),
        "experience": (experience + WHOLE_ARRAYS * gathered, Cost(
            bytes=2 * (experience + SENT_ARRAYS * whole),
            collectives=(_reduction(parts, SENT_ARRAYS * whole, "all-gather", SENT_ARRAYS),))),
        "gradients": (gradient_bytes, step * trips),
        "apply_gradients": (16 * sizes.trained * split,
                            Cost(bytes=28 * sizes.trained * split, host_bytes=host)),
    }


def _policy_bytes(sizes: StepSizes) -> float:
    """Returns one chip's bytes of the policy's weights, and their copy in the compute dtype."""
    return ((4 + sizes.itemsize) * sizes.trained + sizes.itemsize * sizes.frozen) / sizes.shards


def _pass_costs(config: Config, sizes: StepSizes, workload: Workload) -> tuple[Cost, Cost]:
    """Returns the cost of one micro-batch's forward pass, and of its forward and backward pass."""
    c, s = sizes.decoder, sizes.itemsize
    rows = workload.rows / (sizes.data * sizes.fsdp)
    tokens, pairs = rows * workload.width / sizes.context, rows * workload.width**2 / sizes.context
    pairs *= workload.pair_batches / workload.micro_batches  # averaged over the narrower rows
    attended = sizes.attention_layers(workload.width)

    layers = tokens * (2.0 * sizes.products + sizes.state_flops(is_step=False)) / sizes.tensor
    head = 2.0 * tokens * sizes.table / sizes.tensor
    activation = tokens * c.width * s
    keys = 2 * rows * workload.width * c.kv_heads * c.head_dim * s / sizes.tensor

    def passes(count: float) -> list[Collective]:
        """Returns passes over the layers: weights, sums over tensor, keys, values over context."""
        collectives = [_weight_gather(sizes, sizes.held, 7 * c.layers),
                       _reduction(sizes.tensor, 2 * c.layers * activation, count=2 * c.layers),
                       _reduction(sizes.context, c.attention_layers * keys, "all-gather",
                                  2 * c.attention_layers)]
        return [dataclasses.replace(one, count=one.count * count, bytes=one.bytes * count)
                for one in collectives]

    ends = [_weight_gather(sizes, 2 * sizes.table)]     # embedding and head
    width_f, width_d = c.active_mlp_width / sizes.tensor, c.width
    moved = tokens * c.layers * s
    forward = Cost(flops=layers + head + attended * sizes.attention_flops(pairs, False),
                   bytes=moved * (6 * width_f + 20 * width_d)
                   + s * (sizes.held + 2 * sizes.table) / sizes.tensor,
                   collectives=tuple(passes(1) + ends))

    recomputes = sizes.recomputed > 0
    gradients = [_reduction(sizes.fsdp, s * sizes.trained / sizes.tensor, "reduce-scatter"),
                 _reduction(sizes.data * sizes.context, s * sizes.trained / sizes.shards)]
    backward = 1 if sizes.frozen else 2         # products: of the inputs, and of the weights
    step = Cost(flops=layers * (1 + backward + sizes.recomputed) + (2 + backward) * head
                + attended * sizes.attention_flops(pairs, True),
                bytes=moved * (20 * width_f + 60 * width_d)
                + (3 + recomputes) * s * sizes.weights / sizes.tensor
                + 8 * sizes.trained / sizes.shards,
                collectives=tuple(passes(2 + recomputes) + ends + gradients))
    return forward, step


def _activation_bytes(config: Config, sizes: StepSizes, workload: Workload) -> tuple[float, float]:
    """Returns one chip's bytes for scoring, without the weights, and for gradients, with them."""
    c, s = sizes.decoder, sizes.itemsize
    rows = workload.rows / (sizes.data * sizes.fsdp)
    tokens = rows * workload.width / sizes.context
    activation = tokens * c.width * s
    width_f, width_d = c.active_mlp_width / sizes.tensor, c.width
    tile = 4 * tokens * min(config.update.vocabulary_tile, c.vocabulary / sizes.tensor)
    table = sizes.table / sizes.tensor

    of_tokens, of_rows = _step_arrays(config, sizes, workload)
    saved = {"full": 1.0, "attention": 1.0 + c.heads * c.head_dim / sizes.tensor / c.width,
             "none": 12.0 + 5 * width_f / c.width}[sizes.saved] * c.layers * activation

    def working(arrays: tuple[int, int], of_state: tuple[int, int]) -> float:
        one_layer = 2 * s * sizes.held / c.layers / sizes.tensor
        of_a_token = s * (arrays[0] * width_f + arrays[1] * width_d)
        if c.delta is not None:     # computes whole rows
            heads = of_state[0] * c.delta.value_heads * CHUNK
            streams = sum(count * size for count, size in c.delta.streams)
            of_a_token += 4 * sizes.context * (heads + of_state[1] * streams) / sizes.tensor
        return tokens * of_a_token + one_layer

    score = (s * table + max(working(FORWARD_ARRAYS, STATE_FORWARD_ARRAYS), 3 * tile)
             + ROW_ARRAYS * of_rows + 2 * of_tokens)

    split = 1 / sizes.shards
    sums = 4 * sizes.trained * split
    block = CUDNN_BLOCK_ARRAYS if sizes.attention.startswith("cudnn") else BLOCK_ARRAYS
    # Weights in both dtypes, the sums, and the gradients of one micro-batch.
    gradients = _policy_bytes(sizes) + s * sizes.trained * split + sums + saved + max(
        working(block, STATE_ARRAYS), 2 * s * table + 3 * tile + 2 * 4 * tokens * c.width)
    gradients += EXPERIENCE_ARRAYS * of_rows + s * table
    return score, gradients


def _attention_kernel(sizes: StepSizes, slots: int, capacity: int) -> KernelCall:
    """Returns the attention to the cache in one decode step on one chip."""
    c, kv_heads = sizes.decoder, sizes.decoder.kv_heads // sizes.tensor
    rows = -(-slots // (sizes.data * sizes.fsdp))
    positions = -(-sum(model.cache_lengths(c, capacity)) // c.attention_layers) // sizes.context
    cache = Array({2: "bf16", 4: "f32"}[sizes.itemsize],
                  (rows, kv_heads, positions, c.head_dim))
    queries = Array("f32", (rows * kv_heads, c.heads // c.kv_heads, 1, c.head_dim))
    return KernelCall("paged_attention", (queries, cache, cache), (), c.attention_layers)


def _sampler_costs(config: Config, sizes: StepSizes, resident: dict[str, float], *, slots: int,
                   capacity: int, mlp_shards: int) -> tuple[Costs, tuple[int, int]]:
    """Returns the costs of the sampler's functions, and (prompts of a prefill batch, batches)."""
    c, s = sizes.decoder, sizes.itemsize
    width = min(max(16, 1 << (config.data.max_prompt_tokens - 1).bit_length()), capacity)
    height = max(min(slots, 8, 8192 // width), 1)
    local_slots = slots / (sizes.data * sizes.fsdp)
    position, prefill_tokens = resident["position"], height * width

    def sums(tokens: float) -> tuple[Collective, ...]:
        """Returns the collectives of all layers. Args: tokens, of the rows of all batch shards that
        share the weights of the MLP."""
        size = c.layers * c.width * s * tokens
        of_rows = _reduction(sizes.tensor, 2 * size / sharing, count=2 * c.layers)
        return (of_rows,) if sharing == 1 else (
            of_rows, _reduction(sharing, size, "all-gather", c.layers),
            _reduction(sharing, size, count=c.layers))

    sharing = mlp_shards // sizes.tensor
    logits = 4 * local_slots * c.vocabulary / sizes.tensor
    without_embedding = resident["weights"] - (0 if c.tied else s * sizes.table / sizes.tensor)
    decode = Cost(
        flops=local_slots * (2.0 * (sizes.products + sizes.table)
                             + sizes.state_flops(is_step=True)) / sizes.tensor,
        bytes=without_embedding + local_slots * TILE * 2 * position + 3 * logits
        + 2 * local_slots * model.state_bytes(c) / sizes.tensor,
        collectives=sums(local_slots * sharing),
        kernels=(_attention_kernel(sizes, slots, capacity),))
    prefill = Cost(
        flops=2.0 * prefill_tokens * ((sizes.products - sizes.active_mlp) / sizes.tensor
                                      + sizes.active_mlp / mlp_shards)
        + 4.0 * prefill_tokens * width * sizes.attention_layers(width) * c.heads * c.head_dim
        / sizes.tensor + prefill_tokens * sizes.state_flops(is_step=False) / sizes.tensor,
        bytes=resident["weights"]
        + prefill_tokens * c.layers * s * (6 * c.active_mlp_width / mlp_shards + 20 * c.width),
        collectives=(
            _reduction(sizes.tensor, 2 * c.layers * c.width * s * prefill_tokens),
            _reduction(sharing, c.layers * c.width * s * prefill_tokens, count=c.layers)))

    scores = 4 * prefill_tokens * width * c.heads / sizes.tensor
    frozen = s * sizes.frozen / sizes.shards
    return {
        "unstack": (resident["params"] + frozen + resident["weights"] * 1.3,
                    Cost(bytes=resident["params"] + frozen + 2 * resident["weights"],
                         collectives=(_weight_gather(
                             sizes, sizes.weights - (sharing > 1) * sizes.mlp),))),
        "prefill": (resident["weights"] + resident["prefilled"] + min(scores, 2**27 * c.heads)
                    + prefill_tokens * 8 * c.width * s, prefill),
        "insert": (resident["slots"] + resident["prefilled"], Cost(
            bytes=2 * (width * position + model.state_bytes(c) / sizes.tensor))),
        "decode": (resident["weights"] + resident["slots"] + 3 * logits, decode),
    }, (height, -(-config.rollout.prompts_per_step // height))
