"""Kernels for one decode step: they read only the live part of the cache, and write in place.

B rows, S cache slots, H query heads, K key/value heads, R = H / K, h head width.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effreason.runtime import sharding

TILE = 16   # cache slots in one tile of a TPU's memory, in bfloat16: what a write reads and stores


def cudnn_attention(query: Float[Array, "B 1 H h"], keys: Float[Array, "B S K h"],
                    values: Float[Array, "B S K h"],
                    lengths: Int[Array, " B"]) -> Float[Array, "B 1 H h"]:
    """cuDNN's fused attention. Args: lengths, slots that each row sees; later ones are not read."""
    return jax.nn.dot_product_attention(query, keys, values, key_value_seq_lengths=lengths,
                                        implementation="cudnn")


def on_each_device(function: Callable[..., Any], inputs: tuple[tuple[str, ...], ...],
                   output: tuple[str, ...]) -> Callable[..., Any]:
    """Maps a function over each device's own rows and heads: XLA cannot partition a kernel.

    Args:
        inputs: The logical axes of each argument.
        output: The logical axes of the result; several results have the same ones."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=tuple(sharding.spec(*axes) for axes in inputs),
                         out_specs=sharding.spec(*output), check_vma=False)


def paged_attention(query: Float[Array, "B 1 H h"], keys: Float[Array, "B K S h"],
                    values: Float[Array, "B K S h"],
                    lengths: Int[Array, " B"]) -> Float[Array, "B 1 H h"]:
    """JAX's paged attention for TPU, on a cache that is not paged: only live blocks are fetched.

    Args:
        keys, values: Finite everywhere.
        lengths: Slots that each row sees."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as kernel

    def local(query: Array, keys: Array, values: Array, lengths: Array) -> Array:
        rows, kv_heads, slots, head_dim = keys.shape
        block = block_size(slots)
        # The kernel expects heads outside of pages. Each head of each row is passed as a sequence
        # with a single head, so that the cache is a list of pages already: a view, not a copy.
        pages = jnp.arange(rows * kv_heads * (slots // block), dtype=jnp.int32)
        keys, values = (x.reshape(1, len(pages), block, head_dim) for x in (keys, values))
        grouped = query.reshape(rows * kv_heads, -1, head_dim).astype(jnp.float32)
        grouped = grouped / math.sqrt(head_dim)
        mixed = kernel(grouped, keys, values, jnp.repeat(lengths, kv_heads),
                       pages.reshape(rows * kv_heads, -1), pages_per_compute_block=1)
        return mixed.reshape(query.shape).astype(query.dtype)

    heads = "batch", "width", "heads", "head_dim"
    cache = "batch", "kv_heads", "width", "head_dim"
    return on_each_device(local, (heads, cache, cache, ("batch",)), heads)(
        query, keys, values, lengths)


def block_size(slots: int) -> int:
    """Returns how many slots the paged kernel fetches at a time.

    That is the largest power of two that divides `slots`, at most 512.

    Raises:
        ValueError: It would be less than a tile."""
    if slots % TILE:
        raise ValueError(f"a paged cache of {slots} slots, expected a multiple of {TILE}")
    return min(slots & -slots, 512)


def paged_write(cache: dict[str, jax.Array], new: dict[str, jax.Array],
                start: Int[Array, " B"]) -> dict[str, jax.Array]:
    """Writes one token per row into a layer's cache, in place, for all rows in one call.

    If each row has its own slot, XLA's update on a TPU is a loop over rows, twice in every layer.

    Args:
        cache: Keys and values [B, K, S, h].
        new: The same with S = 1.
        start: The slot of each row."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def kernel(start: Any, key: Any, value: Any, old_keys: Any, old_values: Any, keys: Any,
               values: Any) -> None:
        slot = jax.lax.broadcasted_iota(jnp.int32, old_keys.shape, 2)
        is_new = slot == start[pl.program_id(0)] % TILE
        keys[...] = jnp.where(is_new, key[...], old_keys[...])
        values[...] = jnp.where(is_new, value[...], old_values[...])

    def local(start: Array, *arrays: Array) -> tuple[Array, Array]:
        rows, kv_heads, _, head_dim = arrays[-1].shape
        one = pl.BlockSpec((1, kv_heads, 1, head_dim), lambda row, start: (row, 0, 0, 0))
        tile = pl.BlockSpec((1, kv_heads, TILE, head_dim),
                            lambda row, start: (row, 0, start[row] // TILE, 0))
        grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(rows,),
                                            in_specs=[one, one, tile, tile], out_specs=(tile, tile))
        shape = jax.ShapeDtypeStruct(arrays[-1].shape, arrays[-1].dtype)
        return pl.pallas_call(kernel, grid_spec=grid, out_shape=(shape, shape),
                              input_output_aliases={3: 0, 4: 1})(start, *arrays)

    axes = "batch", "kv_heads", "width", "head_dim"
    write = on_each_device(local, (("batch",), axes, axes, axes, axes), axes)
    keys, values = write(start, new["keys"], new["values"], cache["keys"], cache["values"])
    return {"keys": keys, "values": values}
