"""Log-probs of given tokens over a large vocabulary, a tile of it at a time: [N, V] scores never stand in memory.

N positions, D width, V vocabulary. Forward: one pass over the tiles with a running log-sum-exp. Backward: each tile's
scores once more, and from them its rows of the head's gradient, written once, and its part of the hidden states'. A
vocabulary of one tile keeps its scores instead.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from effreason.runtime import sharding

NOWHERE = jnp.iinfo(jnp.int32).min  # no target is that entry, on no device


def token_logprobs(hidden: jax.Array, head: jax.Array, targets: jax.Array, *, temperature: float,
                   tile: int) -> tuple[jax.Array, jax.Array]:
    """Log-probs of targets and the entropies of the distributions they are drawn from; no gradient through the latter.

    On a mesh each device scores its own positions by its own share of the vocabulary. The head is gathered over fsdp
    once, before the tiles, and its gradient leaves the device once, behind them.
    Args: hidden [B, N, D]; head [V, D]; targets int32[B, N]; tile, entries of the vocabulary scored at a time.
    Returns: log-probs and entropies in nats, float32[B, N]. Source: the running sum is that of arXiv 1805.02867."""
    def local(hidden: jax.Array, head: jax.Array, targets: jax.Array, axes: tuple[str, ...]) -> Any:
        split = "tensor" if axes else None
        first = jax.lax.axis_index(split) * head.shape[0] if split else jnp.zeros((), jnp.int32)
        score = functools.partial(_score, 1.0 / temperature, min(tile, head.shape[0]), split)
        scored = score(hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1) - first)
        return tuple(x.reshape(targets.shape) for x in scored)

    if jax.sharding.get_abstract_mesh().empty:
        return local(hidden, head, targets, ())

    def on_device(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> Any:
        whole = jax.lax.all_gather(head, "fsdp", axis=1, tiled=True)
        # From here on every device has a head, and a gradient, of its own: they are summed when this is transposed.
        whole = jax.lax.pcast(whole, ("data", "context"), to="varying")
        return local(jax.lax.pcast(hidden, ("tensor",), to="varying"), whole, targets, sharding.MESH_AXES)

    rows = sharding.spec("batch", "sequence")
    scored = jax.shard_map(on_device, in_specs=(PartitionSpec(*rows, None), sharding.spec("vocab", "embed"), rows),
                           out_specs=(rows, rows))
    return scored(hidden, head, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _score(scale: float, tile: int, axis: str | None, hidden: jax.Array, head: jax.Array,
           targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies float32[N] of targets int32[N], which count from this head's first row.

    Args: axis, of the mesh, whose devices hold the rest of the vocabulary."""
    return _forward(scale, tile, axis, hidden, head, targets)[0]


def _forward(scale: float, tile: int, axis: str | None, hidden: jax.Array, head: jax.Array,
             targets: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    def add(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        most, total, weighted, chosen = carry
        scores, column = (kept, jnp.arange(tile)) if is_whole else _scores(scale, tile, index, hidden, head)
        higher = jnp.maximum(most, jnp.max(scores, axis=-1))
        shrink, terms = jnp.exp(most - higher), jnp.exp(scores - higher[:, None])
        # A comparison and a sum instead of a gather: it splits over the vocabulary, and only one entry is not 0.
        is_target = column[None, :] == targets[:, None]
        return (higher, total * shrink + jnp.sum(terms, axis=-1),
                weighted * shrink + jnp.sum(jnp.where(terms > 0, terms * scores, 0.0), axis=-1),
                chosen + jnp.sum(jnp.where(is_target, scores, 0.0), axis=-1))

    is_whole = tile == head.shape[0]
    kept: Any = _scores(scale, tile, jnp.zeros((), jnp.int32), hidden, head)[0] if is_whole else None
    # Made of the hidden states, so that on a mesh they are each device's own, as what is added to them.
    nothing = jnp.zeros_like(hidden, jnp.float32, shape=hidden.shape[:1]) + 0.0 * hidden[:, 0].astype(jnp.float32)
    most, total, weighted, chosen = _tiles(head, tile, add, (nothing - 1e30, nothing, nothing, nothing))
    if axis is not None:
        highest = jax.lax.pmax(most, axis)
        shrink = jnp.exp(most - highest)
        total, weighted, chosen = jax.lax.psum((total * shrink, weighted * shrink, chosen), axis)
        most = highest
    normalizer = most + jnp.log(total)
    return (chosen - normalizer, normalizer - weighted / total), (hidden, head, targets, normalizer, kept)


def _backward(scale: float, tile: int, axis: str | None, kept: tuple[Any, ...],
              pulls: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, None]:
    hidden, head, targets, normalizer, whole = kept
    pull = pulls[0][:, None]

    def add(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        to_hidden, to_head = carry
        scores, column = (whole, jnp.arange(tile)) if whole is not None else _scores(scale, tile, index, hidden, head)
        is_target = (column[None, :] == targets[:, None]).astype(jnp.float32)
        slope = (pull * (is_target - jnp.exp(scores - normalizer[:, None])) * scale).astype(hidden.dtype)
        start = _start(tile, index, head)
        rows = jax.lax.dynamic_slice_in_dim(head, start, tile)
        to_hidden += jnp.einsum("nv,vd->nd", slope, rows, preferred_element_type=jnp.float32)
        added = jnp.einsum("nv,nd->vd", slope, hidden, preferred_element_type=jnp.float32).astype(head.dtype)
        # Added, not set: the last tile reaches back over entries that the one before has had, with a slope of 0.
        added += jax.lax.dynamic_slice_in_dim(to_head, start, tile)
        return to_hidden, jax.lax.dynamic_update_slice_in_dim(to_head, added, start, 0)

    to_hidden, to_head = _tiles(head, tile, add, (0.0 * hidden.astype(jnp.float32), 0.0 * head))
    return to_hidden.astype(hidden.dtype), to_head, None


_score.defvjp(_forward, _backward)


def _tiles(head: jax.Array, tile: int, add: Any, carry: Any) -> Any:
    """Folds `add` over the tiles of the vocabulary."""
    count = -(-head.shape[0] // tile)
    return add(jnp.zeros((), jnp.int32), carry) if count == 1 else jax.lax.fori_loop(0, count, add, carry)


def _start(tile: int, index: jax.Array, head: jax.Array) -> jax.Array:
    """The first entry of a tile; the last tile reaches back, so that none is narrower."""
    return jnp.minimum(index * tile, head.shape[0] - tile)


def _scores(scale: float, tile: int, index: jax.Array, hidden: jax.Array,
            head: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A tile's scores float32[N, tile], -inf where an earlier tile has had the entry, and which entries int32[tile]."""
    start = _start(tile, index, head)
    rows = jax.lax.dynamic_slice_in_dim(head, start, tile)
    scores = jnp.einsum("nd,vd->nv", hidden, rows, preferred_element_type=jnp.float32) * scale
    column = start + jnp.arange(tile)
    if head.shape[0] % tile:
        is_new = column >= index * tile
        scores, column = jnp.where(is_new[None, :], scores, -jnp.inf), jnp.where(is_new, column, NOWHERE)
    return scores, column
