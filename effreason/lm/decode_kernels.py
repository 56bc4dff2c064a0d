"""Kernels for one decode step: they read the live part of the cache alone, and write one token a row in place.

B rows, S cache slots, H query heads, K key/value heads, R = H / K, h head width.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effreason.runtime import sharding

TILE = 16   # cache slots that lie in one tile of a TPU's memory, in bfloat16: what a write reads and puts back


def cudnn_attention(query: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array) -> jax.Array:
    """cuDNN's fused attention, which leaves out what stands behind each row's length.

    Args: query [B, 1, H, h]; keys, values [B, S, K, h]; lengths int32[B], slots that each row sees.
    Returns: [B, 1, H, h]."""
    return jax.nn.dot_product_attention(query, keys, values, key_value_seq_lengths=lengths, implementation="cudnn")


def on_each_device(function: Callable[..., Any], inputs: tuple[tuple[str, ...], ...],
                   output: tuple[str, ...]) -> Callable[..., Any]:
    """The function on each device's own rows and heads: the partitioner cannot see into a kernel.

    Args: inputs, output: the logical axes of the arrays; several outputs have the same ones."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=tuple(sharding.spec(*axes) for axes in inputs),
                         out_specs=sharding.spec(*output), check_vma=False)


def paged_attention(query: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array) -> jax.Array:
    """JAX's paged attention for TPU, on a cache that is not paged: blocks behind a row's length are never fetched.

    Args: query [B, 1, H, h]; keys, values [B, K, S, h], finite everywhere; lengths int32[B], slots that each row sees.
    Returns: [B, 1, H, h]."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as kernel

    def local(query: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array) -> jax.Array:
        rows, kv_heads, slots, head_dim = keys.shape
        block = block_size(slots)
        # The kernel has heads outside of pages. Each head of each row is a sequence with one head to it, so that the
        # cache as it lies is a list of pages: a view, not a copy.
        pages = jnp.arange(rows * kv_heads * (slots // block), dtype=jnp.int32)
        keys, values = (x.reshape(1, len(pages), block, head_dim) for x in (keys, values))
        grouped = query.reshape(rows * kv_heads, -1, head_dim).astype(jnp.float32) / math.sqrt(head_dim)
        mixed = kernel(grouped, keys, values, jnp.repeat(lengths, kv_heads), pages.reshape(rows * kv_heads, -1),
                       pages_per_compute_block=1)
        return mixed.reshape(query.shape).astype(query.dtype)

    heads, cache = ("batch", "width", "heads", "head_dim"), ("batch", "kv_heads", "width", "head_dim")
    return on_each_device(local, (heads, cache, cache, ("batch",)), heads)(query, keys, values, lengths)


def block_size(slots: int) -> int:
    """Slots that the paged kernel fetches at a time: the largest power of two that divides `slots`, at most 512.

    Raises: ValueError where that is less than a tile."""
    if slots % TILE:
        raise ValueError(f"a paged cache of {slots} slots, expected a multiple of {TILE}")
    return min(slots & -slots, 512)


def paged_write(cache: dict[str, jax.Array], new: dict[str, jax.Array], start: jax.Array) -> dict[str, jax.Array]:
    """Puts one token a row into a layer's cache, in place, for all rows in one call.

    Where each row has a slot of its own, XLA's update on a TPU is a loop over the rows, twice in every layer.
    Args: cache, keys and values [B, K, S, h]; new, the same with S = 1; start int32[B], the slot of each row."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def put(start: Any, key: Any, value: Any, old_keys: Any, old_values: Any, keys: Any, values: Any) -> None:
        slot = jax.lax.broadcasted_iota(jnp.int32, old_keys.shape, 2)
        here = slot == start[pl.program_id(0)] % TILE
        keys[...] = jnp.where(here, key[...], old_keys[...])
        values[...] = jnp.where(here, value[...], old_values[...])

    def local(start: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows, kv_heads, _, head_dim = arrays[-1].shape
        one = pl.BlockSpec((1, kv_heads, 1, head_dim), lambda row, start: (row, 0, 0, 0))
        tile = pl.BlockSpec((1, kv_heads, TILE, head_dim), lambda row, start: (row, 0, start[row] // TILE, 0))
        grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(rows,), in_specs=[one, one, tile, tile],
                                            out_specs=(tile, tile))
        shape = jax.ShapeDtypeStruct(arrays[-1].shape, arrays[-1].dtype)
        return pl.pallas_call(put, grid_spec=grid, out_shape=(shape, shape), input_output_aliases={3: 0, 4: 1})(
            start, *arrays)

    axes = ("batch", "kv_heads", "width", "head_dim")
    keys, values = on_each_device(local, (("batch",), axes, axes, axes, axes), axes)(
        start, new["keys"], new["values"], cache["keys"], cache["values"])
    return {"keys": keys, "values": values}
