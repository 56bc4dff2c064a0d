"""The engine's state on the device and the functions that change it: read prompts, start, decode, grow, shrink.

S slots hold one response each; R prompts stand in a bank until all their responses have started; C cache positions.
Slots are split over the mesh's batch axes, heads over tensor: nothing here moves a cache from one device to another.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effreason.lm import model
from effreason.runtime import sharding
from effreason.sampling import draws

PIECE, PIECE_SCORES = 512, 2**22     # positions read at once, and scores of a head that they may have together
HEAD_FIRST = 32                     # rows up to which it pays, on a CPU, to have the head as the left factor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """S responses on their way."""

    cache: model.Cache
    token: jax.Array                # int32[S], the newest token of each row: not yet in the cache
    length: jax.Array               # int32[S], tokens in the cache, so the position of `token`
    generated: jax.Array            # int32[S], response tokens drawn so far
    limit: jax.Array                # int32[S], response tokens to draw at most
    active: jax.Array               # bool[S]
    key: jax.Array                  # key[S], of the response; folded with `generated` for each token


# Responses to start, as rows of one int32[8, S] array: one transfer from the host instead of eight.
FRESH = ("slot",                    # where to; -1: nothing more follows
         "source",                  # the row of the bank
         "token",                   # the last token known: of the prompt, or of what was drawn before
         "length",                  # tokens before it
         "generated",               # response tokens known
         "limit",                   # response tokens to draw at most
         "uid", "sample")           # of the problem, and which of its responses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The engine's functions, compiled once for each combination of shapes they meet."""

    unstack: Callable[..., Any]     # params -> weights as the decoder reads them token by token
    read: Callable[..., Any]        # (weights, int32[rows, W]) -> bank
    start: Callable[..., Any]       # (slots, bank, fresh, step key) -> slots
    advance: Callable[..., Any]     # (weights, slots, control, sampling=, chunk=) -> (slots, what was drawn)
    grow: Callable[..., Any]        # (a layer's cache, capacity=) -> the same, larger
    shrink: Callable[..., Any]      # (a layer's cache, rows) -> the same of these rows
    narrow: Callable[..., Any]      # (slots without a cache, rows) -> the same of these rows
    empty: Callable[..., Any]       # (count=, capacity=) -> slots
    mesh: Mesh
    shards: int                     # ways in which the slots are split
    replicated: Any                 # sharding of what the host hands over
    by_rows: Any                    # sharding of [S]

    def compiled(self) -> int:
        """How many programs have been compiled so far."""
        made: list[Any] = [self.unstack, self.read, self.start, self.advance, self.grow, self.shrink, self.narrow,
                            self.empty]
        return sum(program._cache_size() for program in made)


def logprob_names(sampling: draws.SamplingParams) -> list[str]:
    """The log-probs of draws.SampledTokens that differ from one another under this sampling; `logprobs` stands for the rest."""
    narrowed = sampling.temperature == 0 or sampling.top_p < 1 or sampling.top_k is not None or sampling.min_p > 0
    return ["logprobs", *["sampling_logprobs"] * narrowed, *["model_logprobs"] * (sampling.temperature not in (0, 1))]


def logits(weights: model.Params, hidden: jax.Array) -> jax.Array:
    """float32[S, V] for hidden states [S, D]."""
    def head_first(head: jax.Array, hidden: jax.Array) -> jax.Array:
        # With few rows a CPU is bound by reading the head, and as the right factor it would be rearranged each time.
        product = jnp.einsum("vd,sd->vs", head, hidden, preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(product).T      # without the barrier it is the other product again

    def plain(head: jax.Array, hidden: jax.Array) -> jax.Array:
        return jnp.einsum("vd,sd->sv", head, hidden, preferred_element_type=jnp.float32)

    head = model.head(weights).astype(hidden.dtype)
    if hidden.shape[0] > HEAD_FIRST:
        return plain(head, hidden)
    return jax.lax.platform_dependent(head, hidden, cpu=head_first, default=plain)


def decode(weights: model.Params, slots: Slots, control: jax.Array, *, config: model.DecoderConfig,
           sampling: draws.SamplingParams, chunk: int) -> tuple[Slots, dict[str, jax.Array]]:
    """At most `chunk` decode steps of all slots; rows that end idle until it is over.

    Args: control int32[1 + S]: it stops as soon as no more rows than control[0] are active; rows whose entry behind
        that is not 0 are given up first.
    Returns: the slots, and what the host needs: `tokens` int32[chunk, S] and their log-probs float32[chunk, S], of
        which the first `count` int32[S] of each row are meant; `active` bool[S]; `steps` int32[]."""
    eos = jnp.array(sampling.eos_ids, jnp.int32)
    rows = slots.token.shape[0]
    before = slots.generated
    keep, halted = control[0], control[1:] != 0
    slots = dataclasses.replace(slots, active=slots.active & ~halted)
    outputs = {"tokens": jnp.zeros((chunk, rows), jnp.int32)} | {
        name: jnp.zeros((chunk, rows), jnp.float32) for name in logprob_names(sampling)}

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        step, slots, _ = carry
        return (step < chunk) & (jnp.sum(slots.active) > keep)

    def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, slots, outputs = carry
        hidden, cache = model.extend(config, weights, slots.token[:, None], slots.length, slots.cache)
        keys = jax.vmap(jax.random.fold_in)(slots.key, slots.generated)
        drawn = draws.draw(logits(weights, hidden[:, 0]), keys, sampling)
        outputs = {name: jax.lax.dynamic_update_index_in_dim(output, getattr(drawn, name), step, 0)
                   for name, output in outputs.items()}
        ahead = slots.active.astype(jnp.int32)
        generated = slots.generated + ahead
        ended = jnp.any(drawn.tokens[:, None] == eos[None, :], axis=-1)
        after = dataclasses.replace(
            slots, cache=cache, token=jnp.where(slots.active, drawn.tokens, slots.token), length=slots.length + ahead,
            generated=generated, active=slots.active & ~ended & (generated < slots.limit))
        return step + 1, after, outputs

    steps, slots, outputs = jax.lax.while_loop(unfinished, advance, (jnp.zeros((), jnp.int32), slots, outputs))
    return slots, outputs | {"count": slots.generated - before, "active": slots.active, "steps": steps}


def read(weights: model.Params, prompts: jax.Array, *, config: model.DecoderConfig) -> model.Cache:
    """Keys and values of int32[R, W] prompts, padded on the right; what stands in the padding is never seen.

    Piece by piece: the scores of all positions against all others would be W times W for each head."""
    rows, width = prompts.shape
    piece = min(math.gcd(width, PIECE), max(PIECE_SCORES // (rows * width), 16))
    piece = math.gcd(width, 1 << piece.bit_length() - 1)

    def one(index: jax.Array, cache: model.Cache) -> model.Cache:
        first = index * piece
        tokens = jax.lax.dynamic_slice_in_dim(prompts, first, piece, axis=1)
        return model.extend(config, weights, tokens, jnp.full(rows, first, jnp.int32), cache)[1]

    cache = model.empty_cache(config, rows, width)
    if piece == width:
        return one(jnp.zeros((), jnp.int32), cache)
    return jax.lax.fori_loop(0, width // piece, one, cache)


def start(slots: Slots, bank: model.Cache, fresh: jax.Array, step_key: jax.Array, *, mesh: Mesh,
          layout: dict[str, tuple[str, ...]]) -> Slots:
    """Puts responses into free slots: keys and values of their prompt from the bank, and where they stand.

    Args: fresh int32[8, S], rows as FRESH names them; step_key, of the training step. Each device writes the rows that
        are its own, one after another: a scatter over the slots would gather the cache."""
    parts = mesh.shape["context"]
    of_bank = {name: bank_spec(axes) for name, axes in layout.items()}
    specs = {name: sharding.spec(*axes) for name, axes in layout.items()}
    new = dict(zip(FRESH, fresh, strict=True))

    def ours_of(new: jax.Array, old: jax.Array, axis: int) -> jax.Array:
        """The positions of the bank that this device holds: all, unless sequences are split."""
        if parts == 1:
            return new
        size = old.shape[axis]
        padding = [(0, max(parts * size - new.shape[axis], 0) if at == axis else 0) for at in range(new.ndim)]
        return jax.lax.dynamic_slice_in_dim(jnp.pad(new, padding), jax.lax.axis_index("context") * size, size, axis)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=([specs] * len(bank), [of_bank] * len(bank),
                                                             (PartitionSpec(), PartitionSpec())),
                       out_specs=[specs] * len(bank), check_vma=False)
    def copied(cache: model.Cache, bank: model.Cache, where: tuple[jax.Array, jax.Array]) -> model.Cache:
        to, source = where
        here = jax.tree.leaves(cache)[0].shape[0]
        first = here * jax.lax.axis_index(sharding.AXES["batch"])
        bank = [{name: ours_of(prompts[name], old, layout[name].index("sequence")) for name, old in layer.items()}
                for prompts, layer in zip(bank, cache, strict=True)]

        def one(index: jax.Array, cache: model.Cache) -> model.Cache:
            slot = to[index] - first
            ours = (slot >= 0) & (slot < here)
            at = jnp.clip(slot, 0, here - 1)

            def written(old: jax.Array, new: jax.Array) -> jax.Array:
                corner = (at,) + (0,) * (old.ndim - 1)
                chosen = jax.lax.dynamic_index_in_dim(new, source[index], 0)
                kept = jax.lax.dynamic_slice(old, corner, chosen.shape)
                return jax.lax.dynamic_update_slice(old, jnp.where(ours, chosen, kept), corner)

            return jax.tree.map(written, cache, bank)

        return jax.lax.fori_loop(0, jnp.sum(to >= 0), one, cache)

    # Which row of `fresh` a slot takes, or none: a comparison instead of a scatter keeps the rows where they are.
    matches = new["slot"][None, :] == jnp.arange(slots.token.shape[0])[:, None]
    is_fresh, row = jnp.any(matches, axis=1), jnp.argmax(matches, axis=1)

    def chosen(name: str) -> jax.Array:
        return jnp.where(is_fresh, new[name][row], getattr(slots, name))

    key = jax.vmap(lambda uid, sample: jax.random.fold_in(jax.random.fold_in(step_key, uid), sample))
    return Slots(cache=copied(slots.cache, bank, (new["slot"], new["source"])), token=chosen("token"),
                 length=chosen("length"), generated=chosen("generated"), limit=chosen("limit"),
                 active=slots.active | is_fresh,
                 key=jnp.where(is_fresh, key(new["uid"], new["sample"])[row], slots.key))


def bank_spec(axes: tuple[str, ...]) -> PartitionSpec:
    """Of prompts that wait for a slot: whole on every device that may need them, but for the heads."""
    return sharding.spec(*("bank" if axis in ("batch", "sequence") else axis for axis in axes))


def grow(layer: dict[str, jax.Array], *, axes: dict[str, int], capacity: int) -> dict[str, jax.Array]:
    """One layer's cache with room for `capacity` positions. Args: axes, the sequence axis of each array."""
    def padded(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, capacity - x.shape[axis] if at == axis else 0) for at in range(x.ndim)])

    return {name: padded(array, axes[name]) for name, array in layer.items()}


def some_of(tree: Any, rows: jax.Array, *, mesh: Mesh, targets: Any) -> Any:
    """Some rows of arrays [S, ...]. Args: rows int32[kept], on each device places among its own; targets, shardings."""
    specs = jax.tree.map(lambda target: target.spec, targets)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs, sharding.spec("batch")), out_specs=specs,
                       check_vma=False)
    def taken(tree: Any, rows: jax.Array) -> Any:
        return jax.tree.map(lambda x: x[rows], tree)

    return taken(tree, rows)


def empty(*, config: model.DecoderConfig, count: int, capacity: int) -> Slots:
    """`count` idle slots."""
    zeros = jnp.zeros(count, jnp.int32)
    return Slots(cache=model.empty_cache(config, count, capacity), token=zeros, length=zeros, generated=zeros,
                 limit=zeros, active=jnp.zeros(count, bool), key=jax.random.split(jax.random.key(0), count))


def make_programs(config: model.DecoderConfig, mesh: Mesh) -> Programs:
    """The functions with their shardings; nothing is compiled before its first call."""
    axes = model.cache_axes(config)
    replicated, by_rows = sharding.sharding(mesh), sharding.sharding(mesh, "batch")
    layer: Any = {name: sharding.sharding(mesh, *names) for name, names in axes.items()}
    of_bank = {name: NamedSharding(mesh, bank_spec(names)) for name, names in axes.items()}
    rows: Any = by_rows
    targets = Slots(cache=[layer] * config.layers, token=rows, length=rows, generated=rows, limit=rows, active=rows,
                    key=rows)
    alone = dataclasses.replace(targets, cache=[])
    sequence = {name: names.index("sequence") for name, names in axes.items()}
    weights = sharding.tree_sharding(mesh, _unstacked_axes(config), sharding.SAMPLING_AXES)
    return Programs(
        unstack=jax.jit(functools.partial(model.unstack, config), out_shardings=weights),
        read=jax.jit(functools.partial(read, config=config), out_shardings=[of_bank] * config.layers),
        start=jax.jit(functools.partial(start, mesh=mesh, layout=axes), out_shardings=targets, donate_argnums=0),
        advance=jax.jit(functools.partial(decode, config=config), static_argnames=("sampling", "chunk"),
                        out_shardings=(targets, replicated), donate_argnums=1),
        grow=jax.jit(functools.partial(grow, axes=sequence), static_argnames="capacity", out_shardings=layer),
        shrink=jax.jit(functools.partial(some_of, mesh=mesh, targets=layer), out_shardings=layer),
        narrow=jax.jit(functools.partial(some_of, mesh=mesh, targets=alone), out_shardings=alone),
        empty=jax.jit(functools.partial(empty, config=config), static_argnames=("count", "capacity"),
                      out_shardings=targets),
        mesh=mesh, shards=sharding.batch_shards(mesh), replicated=replicated, by_rows=by_rows)


def _unstacked_axes(config: model.DecoderConfig) -> Any:
    logical = model.logical_axes(config)
    layer = jax.tree.map(lambda axes: axes[1:], logical["layers"], is_leaf=lambda node: isinstance(node, tuple))
    return logical | {"layers": [layer] * config.layers}
