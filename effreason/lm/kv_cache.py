"""The key/value cache and attention to it, as plain array functions.

The cache of a layer that sees everything has a slot for each position. That of a layer with a
window is a ring: position p is in slot p modulo its length, which is a little more than the window.

B rows, T query positions, S cache slots, H query heads, K key/value heads, R = H / K, h head width.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from effreason.lm import decode_kernels
from effreason.lm.kernels import DECODING, first_supported, unsupported_reason
from effreason.runtime.errors import UserError

LayerCache = dict[str, jax.Array]   # "keys" and "values" of one layer

_SEQUENCE_FIRST = ("batch", "sequence", "kv_heads", "head_dim")
_HEADS_FIRST = ("batch", "kv_heads", "sequence", "head_dim")
_SEQUENCE_LAST = ("batch", "kv_heads", "head_dim", "sequence")
_LETTERS = {"batch": "b", "kv_heads": "k", "sequence": "s", "head_dim": "h"}

# The layouts of a layer's cache in memory, as logical axes: rows first, so that a mesh splits it by
# sequences, then in the order in which a decode step reads it fastest on some machine.
CACHE_LAYOUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "transposed": {"keys": _SEQUENCE_LAST, "values": _HEADS_FIRST},
    "sequence_last": {"keys": _SEQUENCE_LAST, "values": _SEQUENCE_LAST},
    "sequence_first": {"keys": _SEQUENCE_FIRST, "values": _SEQUENCE_FIRST},
    "paged": {"keys": _HEADS_FIRST, "values": _HEADS_FIRST},
    "cudnn": {"keys": _SEQUENCE_FIRST, "values": _SEQUENCE_FIRST},
}
# Without a kernel: a CPU reads keys fastest along the sequence and values along the head; a TPU
# pads the last axis to 128, so a narrow head must not be last.
XLA_LAYOUTS = {"cpu": "transposed", "gpu": "transposed", "tpu": "sequence_last"}
TRIAL_SLOTS, TRIAL_TOLERANCE = 128, 0.05    # the tolerance is for bfloat16
# Of a ring: tokens that may be read at a time and then dropped, and what divides its length.
MOST_READ, RING_UNIT = 128, 128


def choose_layout(platform: str, head_dim: int, dtype: DTypeLike, context: int = 1) -> str:
    """Returns the cache layout with the fastest decode step: a kernel's if one fits, else XLA's.

    Args:
        platform: Of a device: "cpu", "gpu" or "tpu".
        dtype: Of the cache.
        context: Parts a sequence is split into."""
    return first_supported(DECODING, platform, head_dim, dtype, context) or XLA_LAYOUTS[platform]


def resolve_layout(layout: str, platform: str, head_dim: int, dtype: DTypeLike,
                   context: int = 1) -> str:
    """Returns the layout that rollout.cache_layout names, or for auto the one that is chosen.

    Raises:
        UserError: the named layout does not fit the device or the model."""
    if layout == "auto":
        return choose_layout(platform, head_dim, dtype, context)
    if reason := unsupported_reason(layout, platform, head_dim, dtype, context):
        raise UserError(f"rollout.cache_layout {layout} does not fit: {reason}")
    return layout


def passes_trial(layout: str, *, rows: int, heads: int, kv_heads: int, head_dim: int,
                 dtype: DTypeLike) -> bool:
    """Whether a decode step in this layout compiles here and agrees with XLA, on a small cache.

    Drivers and libraries differ between machines: a broken kernel must be noticed before a run.

    Args:
        rows: A multiple of the mesh's batch shards."""
    random = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(random[0], (rows, 1, heads, head_dim), dtype)
    key, value = (jax.random.normal(part, (rows, TRIAL_SLOTS, kv_heads, head_dim), dtype)
                  for part in random[1:])
    last = jnp.arange(rows) * 37 % TRIAL_SLOTS

    def largest_error(query: Array, key: Array, value: Array, last: Array) -> Array:
        cache = empty_layer(layout, dtype, batch=rows, kv_heads=kv_heads, head_dim=head_dim,
                            sequence=TRIAL_SLOTS)
        cache = write_cache(cache, key, value, jnp.zeros(rows, jnp.int32), layout)
        # Write the last token again, as a decode step does.
        index = last[:, None, None, None]
        new_key, new_value = (jnp.take_along_axis(x, index, axis=1) for x in (key, value))
        cache = write_cache(cache, new_key, new_value, last, layout)
        result = cached_attention(query, cache, last[:, None], layout)
        # XLA computes two queries per row.
        expected = cached_attention(jnp.repeat(query, 2, axis=1), cache,
                                    jnp.repeat(last[:, None], 2, axis=1), layout)
        return jnp.max(jnp.abs(result.astype(jnp.float32) - expected[:, :1].astype(jnp.float32)))

    try:
        return bool(jax.jit(largest_error)(query, key, value, last) <= TRIAL_TOLERANCE)
    except Exception:       # whatever compilers and drivers raise: the kernel cannot be used
        return False


def ring_length(window: int | None, positions: int) -> int:
    """Returns the slots of a layer's cache for sequences of at most so many positions."""
    if window is None:
        return positions
    return min(positions, -(-(window + MOST_READ) // RING_UNIT) * RING_UNIT)


def held_position(slot: Int[Array, "..."], newest: Int[Array, "..."],
                  slots: int) -> Int[Array, "..."]:
    """Returns the position that a slot of a ring holds, < 0 if none. Args: newest, position."""
    return newest - (newest - slot) % slots


def empty_layer(layout: str, dtype: DTypeLike, **sizes: int) -> LayerCache:
    """Returns one layer's empty cache. Args: sizes, of batch, kv_heads, head_dim, sequence."""
    return {name: jnp.zeros([sizes[axis] for axis in axes], dtype)
            for name, axes in CACHE_LAYOUTS[layout].items()}


def write_cache(cache: LayerCache, key: Float[Array, "B T K h"], value: Float[Array, "B T K h"],
                start: Int[Array, " B"], layout: str, window: int | None = None) -> LayerCache:
    """Returns the cache with T more tokens in each row, written in place if the cache is donated.

    Args:
        start: The position of each row's first new token.
        window: Of the layer; if it has one, its cache is a ring."""
    axes = CACHE_LAYOUTS[layout]
    new = {name: x.transpose([_SEQUENCE_FIRST.index(axis) for axis in axes[name]])
           for name, x in (("keys", key), ("values", value))}
    if window is not None and key.shape[1] > 1:
        return {name: _write_around(cache[name], new[name], start, axes[name].index("sequence"))
                for name in cache}
    if window is not None:
        start = start % cache["keys"].shape[axes["keys"].index("sequence")]
    if layout == "paged" and key.shape[1] == 1:
        return decode_kernels.paged_write(cache, new, start)

    def write(old: Array, new: Array, axis: int) -> Array:
        # A vmapped dynamic_update_slice, split over rows, needs no collective; a scatter by row
        # number would.
        return jax.vmap(lambda old, new, slot: jax.lax.dynamic_update_slice_in_dim(
            old, new, slot, axis - 1))(old, new, start)

    return {name: write(cache[name], new[name], axes[name].index("sequence")) for name in cache}


def _write_around(ring: Array, new: Array, start: Int[Array, " B"], axis: int) -> Array:
    """Writes several tokens to a ring; they may go on at its beginning."""
    slots, count = ring.shape[axis], new.shape[axis]
    number = (jnp.arange(slots)[None] - start[:, None]) % slots     # of the new token in each slot
    shape = [size if dim in (0, axis) else 1 for dim, size in enumerate(ring.shape)]
    number = number.reshape(shape)
    return jnp.where(number < count, jnp.take_along_axis(
        new, jnp.minimum(number, count - 1), axis=axis), ring)


def cached_attention(query: Float[Array, "B T H h"], cache: LayerCache,
                     positions: Int[Array, "B T"], layout: str,
                     window: int | None = None) -> Float[Array, "B T H h"]:
    """Attends to the cached positions 0 .. that of each query; the softmax is float32.

    A kernel, if the layout has one, reads a decode step, T = 1, of a layer that sees everything.
    XLA does everything else. What comes after the queries may be any finite number.

    Args:
        positions: Consecutive in each row, and the newest that were written.
        window: Positions that a query sees at most, its own and those before; None = all."""
    rows, length, heads, head_dim = query.shape
    slots = cache["values"].shape[CACHE_LAYOUTS[layout]["values"].index("sequence")]
    if window is not None and window >= slots:
        window = None
    if length == 1 and layout in DECODING and window is None:
        kernel = (decode_kernels.paged_attention if layout == "paged"
                  else decode_kernels.cudnn_attention)
        return kernel(query, cache["keys"], cache["values"], positions[:, 0] + 1)

    keys, values = ("".join(_LETTERS[axis] for axis in CACHE_LAYOUTS[layout][name])
                    for name in ("keys", "values"))
    kv_heads = cache["values"].shape[values.index("k")]
    grouped = query.reshape(rows, length, kv_heads, heads // kv_heads, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, -1, head_dim)

    scores = jnp.einsum(f"bkqh,{keys}->bkqs", grouped, cache["keys"],
                        preferred_element_type=jnp.float32)             # [B, K, R * T, S]
    held, own = jnp.arange(slots)[None, None, :], positions[:, :, None]
    if window is None:
        visible = held <= own
    else:
        held = held_position(held, own[:, -1:], slots)
        visible = (held >= 0) & (held <= own) & (held > own - window)
    visible = jnp.tile(visible, (1, heads // kv_heads, 1))[:, None]     # [B, 1, R * T, S]
    scores = jnp.where(visible, scores / math.sqrt(head_dim), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)

    mixed = jnp.einsum(f"bkqs,{values}->bkqh", weights, cache["values"])
    mixed = mixed.reshape(rows, kv_heads, heads // kv_heads, length, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, head_dim)
