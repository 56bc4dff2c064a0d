"""Log-probs of given tokens over a large vocabulary, tile by tile: no [N, V] scores in memory.

N positions, D width, V vocabulary. The forward pass goes over the tiles once, with a running
log-sum-exp. The backward pass computes each tile's scores again, and from them its rows of the
head's gradient, written once, and its part of the gradient of the hidden states. A vocabulary of
one tile keeps its scores instead.

Positions without a target that anybody reads, those of prompts and padding, are left out: the
others are put first, and the least of a few sizes that holds them is computed.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from effreason.lm.model import mask_unused
from effreason.lm.precision import products_of
from effreason.runtime import sharding

SIZES, UNIT = 8, 128  # most numbers of positions to compile for, all multiples of UNIT
NO_TARGET = jnp.iinfo(jnp.int32).min    # an entry that no target names, on no device


def token_logprobs(hidden: Float[Array, "B N D"], head: Float[Array, "V D"],
                   targets: Int[Array, "B N"], wanted: Bool[Array, "B N"] | None = None, *,
                   temperature: float, tile: int, unused: tuple[tuple[int, int], ...] = (),
                   ) -> tuple[Float32[Array, "B N"], Float32[Array, "B N"]]:
    """Scores targets, with a gradient, and measures the entropy of their distributions, without.

    On a mesh each device scores its own positions by its own share of the vocabulary. The head is
    gathered over fsdp once, before the tiles, and its gradient leaves the device once, after them.

    Args:
        wanted: The positions to score; None = all. Of the others, both results are 0.
        tile: Entries of the vocabulary scored at a time.
        unused: Ranges of entries that have probability 0, see `model.mask_unused`.

    Returns:
        Log-probs and entropies in nats. Source: the running sum is that of arXiv 1805.02867."""
    def local(hidden: Array, head: Array, targets: Array, wanted: Array, axis: str | None) -> Any:
        score = functools.partial(
            _score, 1.0 / temperature, min(tile, head.shape[0]), axis, unused)
        (order,) = jnp.nonzero(wanted.reshape(-1), size=wanted.size, fill_value=wanted.size)
        first = functools.partial(jnp.take, indices=order, axis=0, mode="fill", fill_value=0)
        scored = score(first(hidden.reshape(-1, hidden.shape[-1])), head,
                       first(targets.reshape(-1)) - _first(axis, head), jnp.sum(wanted))
        zeros = jnp.zeros_like(scored[0])
        return tuple(zeros.at[order].set(x, mode="drop").reshape(targets.shape) for x in scored)

    if wanted is None:
        wanted = jnp.ones_like(targets, jnp.bool)
    if jax.sharding.get_abstract_mesh().empty:
        return local(hidden, head, targets, wanted, None)

    def on_device(hidden: Array, head: Array, targets: Array, wanted: Array) -> Any:
        gathered = jax.lax.all_gather(head, "fsdp", axis=1, tiled=True)
        # From here on every device has its own head and gradient: transposition sums them.
        gathered = jax.lax.pcast(gathered, ("data", "context"), to="varying")
        hidden = jax.lax.pcast(hidden, ("tensor",), to="varying")
        return local(hidden, gathered, targets, wanted, "tensor")

    rows = sharding.spec("batch", "sequence")
    in_specs = PartitionSpec(*rows, None), sharding.spec("vocab", "embed"), rows, rows
    scored = jax.shard_map(on_device, in_specs=in_specs, out_specs=(rows, rows))
    return scored(hidden, head, targets, wanted)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _score(scale: float, tile: int, axis: str | None, unused: Any, hidden: Float[Array, "N D"],
           head: Float[Array, "V D"], targets: Int[Array, " N"],
           count: Int[Array, ""]) -> tuple[Float32[Array, " N"], Float32[Array, " N"]]:
    """Returns log-probs and entropies of targets, which count from this head's first row.

    Args:
        axis: The mesh axis whose devices hold the rest of the vocabulary.
        count: Positions that are wanted, the first ones."""
    return _forward(scale, tile, axis, unused, hidden, head, targets, count)[0]


def _with_the_least(size: int, count: Int[Array, ""], compute: Callable[[int], Any]) -> Any:
    """Returns compute(n) for the least n of a few sizes that is at least `count`."""
    unit = -(-size // SIZES // UNIT) * UNIT
    sizes = [min(size, unit * (index + 1)) for index in range(-(-size // unit))]
    if len(sizes) == 1:
        return compute(size)
    return jax.lax.switch(jnp.minimum(jnp.maximum(count - 1, 0) // unit, len(sizes) - 1),
                          [functools.partial(compute, size) for size in sizes])


def _padded(x: Shaped[Array, "n ..."], size: int) -> Shaped[Array, "N ..."]:
    """Pads the first axis with zeros."""
    return jnp.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)])


def _forward(scale: float, tile: int, axis: str | None, unused: Any, hidden: Float[Array, "N D"],
             head: Float[Array, "V D"], targets: Int[Array, " N"],
             count: Int[Array, ""]) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    def compute(size: int) -> Any:
        return jax.tree.map(lambda x: _padded(x, len(hidden)), _scan_tiles(
            scale, tile, axis, unused, hidden[:size], head, targets[:size]))

    (running_max, total, weighted, chosen), saved_scores = _with_the_least(
        len(hidden), count, compute)
    if axis is not None:
        new_max = jax.lax.pmax(running_max, axis)
        shrink = jnp.exp(running_max - new_max)
        total, weighted, chosen = jax.lax.psum((total * shrink, weighted * shrink, chosen), axis)
        running_max = new_max
    # Of positions that are not computed, the sums are 0.
    total = jnp.where(total > 0, total, 1.0)
    normalizer = running_max + jnp.log(total)
    scored = chosen - normalizer, normalizer - weighted / total
    return scored, (hidden, head, targets, count, normalizer, saved_scores)


def _scan_tiles(scale: float, tile: int, axis: str | None, unused: Any,
                hidden: Float[Array, "N D"], head: Float[Array, "V D"],
                targets: Int[Array, " N"]) -> tuple[tuple[Array, ...], Array | None]:
    """Returns each position's largest score, the sums of exp(score - largest), also weighted by the
    scores, and the target's score; and the scores if there is one tile."""
    tile_scores = functools.partial(_tile_scores, scale, tile, axis, unused, hidden, head)

    def add(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        running_max, total, weighted, chosen = carry
        if is_one_tile:
            scores, column = saved_scores, jnp.arange(tile)
        else:
            scores, column = tile_scores(index)
        new_max = jnp.maximum(running_max, jnp.max(scores, axis=-1))
        shrink, terms = jnp.exp(running_max - new_max), jnp.exp(scores - new_max[:, None])
        # A comparison and a sum instead of a gather: it splits over the vocabulary.
        is_target = column[None, :] == targets[:, None]
        return (new_max, total * shrink + jnp.sum(terms, axis=-1),
                weighted * shrink + jnp.sum(jnp.where(terms > 0, terms * scores, 0.0), axis=-1),
                chosen + jnp.sum(jnp.where(is_target, scores, 0.0), axis=-1))

    is_one_tile = tile == head.shape[0]
    saved_scores: Any = None
    if is_one_tile:
        saved_scores = tile_scores(jnp.zeros((), jnp.int32))[0]
    # Derived from `hidden`, so that under shard_map the carry varies over the same mesh axes as its
    # increments.
    zeros = (jnp.zeros_like(hidden, jnp.float32, shape=hidden.shape[:1])
             + 0.0 * hidden[:, 0].astype(jnp.float32))
    return _fold_tiles(head, tile, add, (zeros - 1e30, zeros, zeros, zeros)), saved_scores


def _backward(scale: float, tile: int, axis: str | None, unused: Any, saved: tuple[Any, ...],
              cotangents: tuple[Array, Array]) -> tuple[Array, Array, None, None]:
    hidden, head, targets, count, normalizer, saved_scores = saved
    by_position = hidden, targets, normalizer, cotangents[0], saved_scores

    def compute(size: int) -> tuple[Array, Array]:
        hidden_grad, head_grad = _scan_tiles_back(
            scale, tile, axis, unused, head, *jax.tree.map(lambda x: x[:size], by_position))
        return _padded(hidden_grad, len(hidden)), head_grad

    hidden_grad, head_grad = _with_the_least(len(hidden), count, compute)
    return hidden_grad, head_grad, None, None


def _scan_tiles_back(scale: float, tile: int, axis: str | None, unused: Any,
                     head: Float[Array, "V D"], hidden: Float[Array, "N D"],
                     targets: Int[Array, " N"], normalizer: Float32[Array, " N"],
                     cotangent: Float32[Array, " N"],
                     saved_scores: Float32[Array, "N V"] | None) -> tuple[Array, Array]:
    """Returns the gradients of the hidden states and of the head."""
    cotangent = cotangent[:, None]
    tile_scores = functools.partial(_tile_scores, scale, tile, axis, unused, hidden, head)

    def add(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden_grad, head_grad = carry
        if saved_scores is not None:
            scores, column = saved_scores, jnp.arange(tile)
        else:
            scores, column = tile_scores(index)
        is_target = (column[None, :] == targets[:, None]).astype(jnp.float32)
        grad = cotangent * (is_target - jnp.exp(scores - normalizer[:, None])) * scale
        grad = grad.astype(hidden.dtype)

        start = _tile_start(tile, index, head)
        rows = jax.lax.dynamic_slice_in_dim(head, start, tile)
        with products_of(hidden.dtype):
            hidden_grad += jnp.einsum("nv,vd->nd", grad, rows, preferred_element_type=jnp.float32)
            rows_grad = jnp.einsum("nv,nd->vd", grad, hidden, preferred_element_type=jnp.float32)
        # Added, not set: the last tile overlaps the one before it, with a gradient of 0 there.
        rows_grad = (rows_grad.astype(head.dtype)
                     + jax.lax.dynamic_slice_in_dim(head_grad, start, tile))
        return hidden_grad, jax.lax.dynamic_update_slice_in_dim(head_grad, rows_grad, start, 0)

    hidden_grad, head_grad = _fold_tiles(
        head, tile, add, (0.0 * hidden.astype(jnp.float32), 0.0 * head))
    return hidden_grad.astype(hidden.dtype), head_grad


_score.defvjp(_forward, _backward)


def _fold_tiles(head: Float[Array, "V D"], tile: int, add: Any, carry: Any) -> Any:
    """Folds `add` over the tiles of the vocabulary."""
    count = -(-head.shape[0] // tile)
    if count == 1:
        return add(jnp.zeros((), jnp.int32), carry)
    return jax.lax.fori_loop(0, count, add, carry)


def _tile_start(tile: int, index: Array, head: Float[Array, "V D"]) -> Array:
    """Returns a tile's first entry; the last tile overlaps the one before it, to be as wide."""
    return jnp.minimum(index * tile, head.shape[0] - tile)


def _first(axis: str | None, head: Float[Array, "V D"]) -> Int[Array, ""]:
    """Returns the entry of the whole vocabulary that is the first of this device's head."""
    return jax.lax.axis_index(axis) * head.shape[0] if axis else jnp.zeros((), jnp.int32)


def _tile_scores(scale: float, tile: int, axis: str | None, unused: Any,
                 hidden: Float[Array, "N D"], head: Float[Array, "V D"],
                 index: Array) -> tuple[Float32[Array, "N tile"], Int[Array, " tile"]]:
    """Returns a tile's scores, -inf if an earlier tile had the entry or it is unused, and its
    entries."""
    start = _tile_start(tile, index, head)
    rows = jax.lax.dynamic_slice_in_dim(head, start, tile)
    with products_of(hidden.dtype):
        scores = jnp.einsum("nd,vd->nv", hidden, rows, preferred_element_type=jnp.float32) * scale
    column = start + jnp.arange(tile)
    scores = mask_unused(scores, _first(axis, head) + column, unused)
    if head.shape[0] % tile:
        is_new = column >= index * tile
        scores = jnp.where(is_new[None, :], scores, -jnp.inf)
        column = jnp.where(is_new, column, NO_TARGET)
    return scores, column
