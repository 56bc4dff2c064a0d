"""The sampler's state on the device and what changes it: prefill, insert, decode, grow, compact.

S slots hold one response each. R prompts wait in a prefill cache until all their responses have
started. C is the number of cache positions. Slots are split over the mesh's batch axes and heads
over tensor, so nothing here moves a cache between devices.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped
from jaxtyping import Array, Bool, Float, Int, Key

from effreason.lm import kv_cache, model
from effreason.lm.architecture import DecoderConfig
from effreason.lm.precision import products_of
from effreason.runtime import sharding
from effreason.sampling import speculation
from effreason.sampling.draws import SamplingParams, draw, recorded_logprobs

PREFILL_CHUNK = 512                 # prompt positions per forward pass, at most
PREFILL_SCORES = 2**22              # attention scores of one head per forward pass, at most
CHECK_EVERY = 4                     # decode steps, on an accelerator
HEAD_FIRST_ROWS = 32                # on a CPU, up to this many rows, the head is the left factor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """S responses in progress."""

    cache: model.Cache
    token: Int[Array, " S"]         # newest token of each row; not yet in the cache
    length: Int[Array, " S"]        # tokens in the cache, which is the position of `token`
    generated: Int[Array, " S"]     # response tokens drawn so far
    limit: Int[Array, " S"]         # maximum response tokens
    active: Bool[Array, " S"]
    key: Key[Array, " S"]           # of the response; folded with `generated` for each token


# Responses to start, as rows of one int32[8, S] array: one transfer from the host instead of eight.
INSERT_FIELDS = ("slot",            # destination; -1: nothing more follows
                 "row",             # of the prefill cache
                 "token",           # last known token, of the prompt or of what was drawn before
                 "length",          # tokens before it
                 "generated",       # response tokens known
                 "limit",           # maximum response tokens
                 "uid", "sample")   # of the problem, and which of its responses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The sampler's functions, compiled once for each combination of shapes."""

    unstack: Wrapped                # params -> weights as the decoder reads them token by token
    prefill: Wrapped                # (weights, int32[R, W], int32[R]) -> prefill cache
    insert: Wrapped                 # (slots, prefill cache, int32[8, S], step key) -> slots
    decode: Wrapped                 # (weights, slots, control, sampling=, chunk=) -> slots, outputs
    speculate: Wrapped              # (weights, slots, control, texts, ..., drafted=) -> the same
    grow: Wrapped                   # (keys and values of a layer, positions=) -> the same, larger
    compact_cache: list[Wrapped]    # of each layer: (its cache, rows) -> these rows of it
    compact: Wrapped                # (slots without a cache, rows) -> these rows of them
    empty: Wrapped                  # (count=, capacity=) -> slots
    cache_lengths: Callable[[int], list[int]]   # capacity -> positions in the cache of each layer
    mesh: Mesh
    shards: int                     # the slots are split this many ways
    replicated: NamedSharding       # of what the host hands over
    by_rows: NamedSharding          # of [S]

    def compilations(self) -> int:
        """Returns how many programs have been compiled so far."""
        functions: list[Any] = [self.unstack, self.prefill, self.insert, self.decode,
                                self.speculate, self.grow, *set(self.compact_cache), self.compact,
                                self.empty]
        return sum(function._cache_size() for function in functions)


def next_token_logits(weights: model.Params, hidden: Float[Array, "S D"],
                      unused: tuple[tuple[int, int], ...] = ()) -> Float[Array, "S V"]:
    """Returns float32 logits. Args: unused, see `model.mask_unused`."""
    def head_first(head: jax.Array, hidden: jax.Array) -> jax.Array:
        # With few rows a CPU is bound by reading the head, which it would rearrange at each step if
        # it were the right factor. Without the barrier XLA turns this into the other product.
        product = jnp.einsum("vd,sd->vs", head, hidden, preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(product).T

    def hidden_first(head: jax.Array, hidden: jax.Array) -> jax.Array:
        # Without the barrier XLA for TPUs moves the draw's split of the vocabulary into blocks onto
        # the head, and copies the whole head in each step.
        return jax.lax.optimization_barrier(
            jnp.einsum("vd,sd->sv", head, hidden, preferred_element_type=jnp.float32))

    head = model.head(weights).astype(hidden.dtype)
    with products_of(hidden.dtype):
        if hidden.shape[0] > HEAD_FIRST_ROWS:
            logits = hidden_first(head, hidden)
        else:
            logits = jax.lax.platform_dependent(head, hidden, cpu=head_first, default=hidden_first)
    return model.mask_unused(logits, np.arange(head.shape[0]), unused)


def decode(weights: model.Params, slots: Slots, control: Int[Array, " S_plus_1"], *,
           config: DecoderConfig, platform: str, sampling: SamplingParams, chunk: int,
           ) -> tuple[Slots, dict[str, jax.Array]]:
    """Runs at most `chunk` decode steps for all slots; rows that end stay idle until it is over.

    Args:
        control: stops when at most control[0] rows are active; rows with a nonzero
            control[1 + s] are given up before the first step.
        platform: of the devices.

    Returns:
        The slots, and for the host `tokens` int32[chunk, S] with their log-probs
        float32[chunk, S], of which the first `count` int32[S] of each row are valid;
        `active` bool[S]; `steps` int32[]."""
    rows, generated_before = slots.token.shape[0], slots.generated
    slots, min_active = _give_up(slots, control)
    undrafted = jnp.zeros((rows, 0), jnp.int32)
    outputs = {"tokens": jnp.zeros((chunk, rows), jnp.int32)} | {
        name: jnp.zeros((chunk, rows), jnp.float32) for name in recorded_logprobs(sampling)}

    def is_running(carry: tuple[Any, ...]) -> jax.Array:
        step, slots, _ = carry
        return (step < chunk) & (jnp.sum(slots.active) > min_active)

    def decode_step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, slots, outputs = carry
        slots, drawn = draw_next(weights, slots, undrafted, config=config, sampling=sampling)
        update = jax.lax.dynamic_update_index_in_dim
        outputs = {name: update(output, drawn[name][:, 0], step, 0)
                   for name, output in outputs.items()}
        return step + 1, slots, outputs

    between = steps_between_checks(platform, chunk)

    def decode_steps(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        if between == 1:
            return decode_step(carry)
        return jax.lax.fori_loop(0, between, lambda _, carry: decode_step(carry), carry)

    steps, slots, outputs = jax.lax.while_loop(
        is_running, decode_steps, (jnp.zeros((), jnp.int32), slots, outputs))
    return slots, outputs | {"count": slots.generated - generated_before, "active": slots.active,
                             "steps": steps}


def speculate(weights: model.Params, slots: Slots, control: Int[Array, " S_plus_1"],
              texts: Int[Array, "S W"], *, config: DecoderConfig, sampling: SamplingParams,
              chunk: int, drafted: int) -> tuple[Slots, dict[str, jax.Array]]:
    """Runs at most `chunk` steps as `decode` does, each for the newest token of a row and a draft.

    It also ends if the cache has no room for another draft.

    Args:
        texts: what the drafts come from, with the prompt and response of a row at the end.
        drafted: tokens of a draft.

    Returns:
        As `decode`, with chunk * (drafted + 1) in the place of chunk."""
    (rows, width), generated_before = texts.shape, slots.generated
    slots, min_active = _give_up(slots, control)
    longest = chunk * (drafted + 1)
    capacity = max(layer["keys"].shape[axes["keys"].index("sequence")]
                   for layer, axes in zip(slots.cache, model.cache_axes(config), strict=True))
    # Its last part are the tokens of this chunk: the next drafts may come from them.
    texts = jnp.pad(texts, ((0, 0), (0, longest)))
    logprobs = {name: jnp.zeros((rows, longest), jnp.float32)
                for name in recorded_logprobs(sampling)}

    def is_running(carry: tuple[Any, ...]) -> jax.Array:
        step, slots, _, _ = carry
        newest = jnp.max(jnp.where(slots.active, slots.length, 0))
        return ((step < chunk) & (jnp.sum(slots.active) > min_active)
                & (newest + drafted < capacity))

    def verify_step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, slots, texts, logprobs = carry
        count = slots.generated - generated_before
        drafts = speculation.find_drafts(texts, width + count, drafted)
        slots, drawn = draw_next(weights, slots, drafts, config=config, sampling=sampling)
        # All are written. Those that are not the row's are overwritten by its next ones.
        write = jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))
        return (step + 1, slots, write(texts, drawn["tokens"], width + count, 0),
                {name: write(values, drawn[name], count, 0) for name, values in logprobs.items()})

    steps, slots, texts, logprobs = jax.lax.while_loop(
        is_running, verify_step, (jnp.zeros((), jnp.int32), slots, texts, logprobs))
    outputs = {"tokens": texts[:, width:]} | logprobs
    return slots, {name: output.T for name, output in outputs.items()} | {
        "count": slots.generated - generated_before, "active": slots.active, "steps": steps}


def _give_up(slots: Slots, control: Int[Array, " S_plus_1"]) -> tuple[Slots, Int[Array, ""]]:
    """Returns the slots without the rows that `control` gives up, and how few may be active."""
    return dataclasses.replace(slots, active=slots.active & (control[1:] == 0)), control[0]


def draw_next(weights: model.Params, slots: Slots, drafts: Int[Array, "S K"], *,
              config: DecoderConfig, sampling: SamplingParams,
              ) -> tuple[Slots, dict[str, jax.Array]]:
    """Reads the newest token of each row and K drafted to follow it, and draws the next of each.

    The row keeps those up to the first that differs from the draft, that is EOS, or that reaches
    its limit. Keys and values of the positions after these are overwritten before they are seen.

    Returns:
        The slots, `tokens` int32[S, K + 1] and their log-probs float32[S, K + 1]."""
    rows, positions = drafts.shape[0], drafts.shape[1] + 1
    eos = jnp.array(sampling.eos_ids, jnp.int32)
    tokens = jnp.concatenate([slots.token[:, None], jnp.maximum(drafts, 0)], axis=1)
    hidden, cache = model.decode(config, weights, tokens, slots.length, slots.cache)

    numbers = slots.generated[:, None] + jnp.arange(positions)[None]
    keys = jax.vmap(jax.random.fold_in)(jnp.repeat(slots.key, positions), numbers.reshape(-1))
    logits = next_token_logits(weights, hidden.reshape(rows * positions, -1), config.unused_ids)
    sampled = draw(logits, keys, sampling)
    drawn = {name: getattr(sampled, name).reshape(rows, positions)
             for name in ("tokens", *recorded_logprobs(sampling))}

    if positions == 1:                      # the same as below, in fewer operations
        count, newest = slots.active.astype(jnp.int32), drawn["tokens"][:, 0]
    else:
        accepted = speculation.count_accepted(drawn["tokens"], drafts, eos)
        count = jnp.where(slots.active, jnp.minimum(accepted, slots.limit - slots.generated), 0)
        newest = jnp.take_along_axis(drawn["tokens"], jnp.maximum(count - 1, 0)[:, None],
                                     axis=1)[:, 0]
    generated = slots.generated + count
    return dataclasses.replace(
        slots, cache=cache, token=jnp.where(slots.active, newest, slots.token),
        length=slots.length + count, generated=generated,
        active=slots.active & ~jnp.isin(newest, eos) & (generated < slots.limit)), drawn


def steps_between_checks(platform: str, chunk: int) -> int:
    """Returns after how many steps of a chunk to look if enough rows have ended.

    A look is a sum over all devices and, on a GPU, a copy to the host, which waits for it; a step
    too many costs more on a CPU."""
    return 1 if platform == "cpu" else math.gcd(chunk, CHECK_EVERY)


def prefill(weights: model.Params, prompts: Int[Array, "R W"], lengths: Int[Array, " R"], *,
            config: DecoderConfig) -> model.Cache:
    """Returns the cache of prompts padded on the right; what it holds of the padding is never read.

    Works chunk by chunk: the scores of all positions against all would be W * W for each head.

    Args:
        lengths: Of the prompts."""
    rows, width = prompts.shape
    chunk = min(math.gcd(width, PREFILL_CHUNK), max(PREFILL_SCORES // (rows * width), 16))
    chunk = math.gcd(width, 1 << chunk.bit_length() - 1)

    def prefill_chunk(index: jax.Array, cache: model.Cache) -> model.Cache:
        start = index * chunk
        tokens = jax.lax.dynamic_slice_in_dim(prompts, start, chunk, axis=1)
        return model.decode(config, weights, tokens, jnp.full(rows, start, jnp.int32), cache,
                            jnp.clip(lengths - start, 0, chunk))[1]

    # No rings: the padding after a shorter prompt would overwrite what it still sees.
    cache = model.empty_cache(config, rows, width, has_rings=False)
    if chunk == width:
        return prefill_chunk(jnp.zeros((), jnp.int32), cache)
    return jax.lax.fori_loop(0, width // chunk, prefill_chunk, cache)


def insert(slots: Slots, prefill_cache: model.Cache, table: Int[Array, "8 S"],
           step_key: Key[Array, ""], *, mesh: Mesh,
           layout: list[dict[str, tuple[str, ...]]]) -> Slots:
    """Puts responses into free slots: the cache of their prompt, and all else of a slot.

    Args:
        table: rows as in INSERT_FIELDS.
        step_key: of the training step.
        layout: logical axes of each layer's arrays in the cache, by name."""
    new = dict(zip(INSERT_FIELDS, table, strict=True))
    # Which column of the table a slot takes, or none: a comparison instead of a scatter keeps the
    # rows on their devices.
    matches = new["slot"][None, :] == jnp.arange(slots.token.shape[0])[:, None]
    is_new, column = jnp.any(matches, axis=1), jnp.argmax(matches, axis=1)

    def merge(name: str) -> jax.Array:
        return jnp.where(is_new, new[name][column], getattr(slots, name))

    response_key = jax.vmap(
        lambda uid, sample: jax.random.fold_in(jax.random.fold_in(step_key, uid), sample))
    cache = _copy_rows(slots.cache, prefill_cache, new, mesh, layout)
    return Slots(cache=cache, token=merge("token"), length=merge("length"),
                 generated=merge("generated"), limit=merge("limit"), active=slots.active | is_new,
                 key=jnp.where(is_new, response_key(new["uid"], new["sample"])[column], slots.key))


def _copy_rows(cache: model.Cache, prefill_cache: model.Cache, table: dict[str, Array],
               mesh: Mesh, layout: list[dict[str, tuple[str, ...]]]) -> model.Cache:
    """Copies rows of the prefill cache into slots, until the first slot -1.

    Each device writes its own rows one by one: a scatter over the slots would gather the cache. Of
    a prompt that is longer than a ring, its end is copied."""
    parts = mesh.shape["context"]

    def is_ring(new: jax.Array, old: jax.Array, axes: tuple[str, ...]) -> bool:
        """Whether the slot holds a part of the prompt's positions: a ring that is full."""
        if "sequence" not in axes:
            return False
        axis = axes.index("sequence")
        return parts * old.shape[axis] < new.shape[axis]

    specs, prefill_specs = ([{name: of_axes(axes) for name, axes in layer.items()}
                             for layer in layout]
                            for of_axes in (lambda axes: sharding.spec(*axes), prefill_spec))

    def local_positions(new: jax.Array, old: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """Returns the prompt positions that this device holds: all, unless sequences are split, or
        the slot is a ring."""
        if parts == 1 or "sequence" not in axes or is_ring(new, old, axes):
            return new
        axis = axes.index("sequence")
        size = old.shape[axis]
        padding = [(0, max(parts * size - new.shape[axis], 0) if dim == axis else 0)
                   for dim in range(new.ndim)]
        start = jax.lax.axis_index("context") * size
        return jax.lax.dynamic_slice_in_dim(jnp.pad(new, padding), start, size, axis)

    @partial(
        jax.shard_map, mesh=mesh, check_vma=False, out_specs=specs,
        in_specs=(specs, prefill_specs, (PartitionSpec(), PartitionSpec(), PartitionSpec())))
    def copy(cache: model.Cache, prompts: model.Cache,
             indices: tuple[jax.Array, jax.Array, jax.Array]) -> model.Cache:
        slot, row, length = indices
        local_slots = jax.tree.leaves(cache)[0].shape[0]
        first = local_slots * jax.lax.axis_index(sharding.AXES["batch"])
        prompts = [{name: local_positions(new[name], array, axes[name])
                    for name, array in layer.items()}
                   for new, layer, axes in zip(prompts, cache, layout, strict=True)]

        def copy_one(index: jax.Array, cache: model.Cache) -> model.Cache:
            local = slot[index] - first
            is_local = (local >= 0) & (local < local_slots)
            local = jnp.clip(local, 0, local_slots - 1)

            def write(old: jax.Array, new: jax.Array, axes: tuple[str, ...]) -> jax.Array:
                corner = (local,) + (0,) * (old.ndim - 1)
                prompt = jax.lax.dynamic_index_in_dim(new, row[index], 0)
                if is_ring(new, old, axes):
                    axis = axes.index("sequence")
                    held = jnp.arange(old.shape[axis])
                    if parts > 1:
                        held = held + jax.lax.axis_index("context") * len(held)
                    held = kv_cache.held_position(held, length[index] - 1, parts * len(held))
                    prompt = jnp.take(prompt, jnp.maximum(held, 0), axis=axis)
                current = jax.lax.dynamic_slice(old, corner, prompt.shape)
                return jax.lax.dynamic_update_slice(
                    old, jnp.where(is_local, prompt, current), corner)

            return [{name: write(array, new[name], axes[name]) for name, array in layer.items()}
                    for layer, new, axes in zip(cache, prompts, layout, strict=True)]

        return jax.lax.fori_loop(0, jnp.sum(slot >= 0), copy_one, cache)

    return copy(cache, prefill_cache, (table["slot"], table["row"], table["length"]))


def prefill_spec(axes: tuple[str, ...]) -> PartitionSpec:
    """Returns the spec of prompts waiting for a slot: replicated, except for the heads."""
    return sharding.spec(*("prefill" if axis in ("batch", "sequence") else axis for axis in axes))


def grow(layer: dict[str, jax.Array], *, axes: dict[str, int],
         positions: int) -> dict[str, jax.Array]:
    """Pads the cache of a layer to `positions`. A ring that has its full length does not grow, so
    no position has another slot afterwards.

    Args:
        axes: the sequence axis of each array."""
    def pad(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, positions - x.shape[axis] if dim == axis else 0)
                           for dim in range(x.ndim)])

    return {name: pad(array, axes[name]) for name, array in layer.items()}


def compact(tree: Any, rows: Int[Array, " kept"], *, mesh: Mesh, shardings: Any) -> Any:
    """Selects rows of arrays [S, ...].

    Args:
        rows: indices local to each device's shard.
        shardings: of `tree`."""
    specs = jax.tree.map(lambda target: target.spec, shardings)

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, sharding.spec("batch")),
                       out_specs=specs, check_vma=False)
    def select(tree: Any, rows: jax.Array) -> Any:
        return jax.tree.map(lambda x: x[rows], tree)

    return select(tree, rows)


def empty(*, config: DecoderConfig, count: int, capacity: int) -> Slots:
    """Returns `count` idle slots of `capacity` positions."""
    zeros = jnp.zeros(count, jnp.int32)
    return Slots(cache=model.empty_cache(config, count, capacity), token=zeros, length=zeros,
                 generated=zeros, limit=zeros, active=jnp.zeros(count, bool),
                 key=jax.random.split(jax.random.key(0), count))


def make_programs(config: DecoderConfig, mesh: Mesh) -> Programs:
    """Returns the functions with their shardings; nothing is compiled before its first call."""
    policy, config = config, dataclasses.replace(config, adapter=None)      # unstack merges them
    axes = model.cache_axes(config)
    replicated, by_rows = sharding.sharding(mesh), sharding.sharding(mesh, "batch")
    prompts = [{name: NamedSharding(mesh, prefill_spec(names)) for name, names in layer.items()}
               for layer in axes]
    attending = next(number for number, layer in enumerate(axes) if "keys" in layer)
    sequence_axes = {name: names.index("sequence") for name, names in axes[attending].items()}

    rows: Any = by_rows             # shardings in the place of arrays
    cache: Any = [{name: sharding.sharding(mesh, *names) for name, names in layer.items()}
                  for layer in axes]
    compact_cache = {tuple(layer): jax.jit(partial(compact, mesh=mesh, shardings=layer),
                                           out_shardings=layer) for layer in cache}
    slots = Slots(cache=cache, token=rows, length=rows, generated=rows, limit=rows, active=rows,
                  key=rows)
    without_cache = dataclasses.replace(slots, cache=[])
    platform = mesh.devices.flat[0].platform
    weights = sharding.tree_sharding(
        mesh, _unstacked_axes(config), sharding.sampling_axes(mesh, config.mlp_width, platform))

    return Programs(
        unstack=jax.jit(partial(model.unstack, policy), out_shardings=weights),
        prefill=jax.jit(partial(prefill, config=config), out_shardings=prompts),
        insert=jax.jit(partial(insert, mesh=mesh, layout=axes), out_shardings=slots,
                       donate_argnums=0),
        decode=jax.jit(partial(decode, config=config, platform=platform),
                       static_argnames=("sampling", "chunk"),
                       out_shardings=(slots, replicated), donate_argnums=1),
        speculate=jax.jit(partial(speculate, config=config),
                          static_argnames=("sampling", "chunk", "drafted"),
                          out_shardings=(slots, replicated), donate_argnums=1),
        grow=jax.jit(partial(grow, axes=sequence_axes), static_argnames="positions",
                     out_shardings=cache[attending]),
        compact_cache=[compact_cache[tuple(layer)] for layer in cache],
        compact=jax.jit(partial(compact, mesh=mesh, shardings=without_cache),
                        out_shardings=without_cache),
        empty=jax.jit(partial(empty, config=config), static_argnames=("count", "capacity"),
                      out_shardings=slots),
        cache_lengths=partial(model.cache_lengths, config),
        mesh=mesh, shards=sharding.batch_shards(mesh), replicated=replicated, by_rows=by_rows)


def _unstacked_axes(config: DecoderConfig) -> Any:
    """Returns the logical axes of the weights with one subtree for each layer."""
    logical, having = model.logical_axes(config), model.stacks(config)
    return logical | {"layers": [{name: axes[1:] for name, axes in logical["layers"].items()
                                  if layer in having[name]} for layer in range(config.layers)]}
