"""Attention, rotary positions and the key/value cache, as plain array functions.

B rows, T query positions, S cache slots, H query heads, K key/value heads, R = H / K, h head width.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from effreason.lm import decode_kernels

LayerCache = dict[str, jax.Array]   # "keys" and "values" of one layer

_SEQUENCE_FIRST = ("batch", "sequence", "kv_heads", "head_dim")
_HEADS_FIRST = ("batch", "kv_heads", "sequence", "head_dim")
_SEQUENCE_LAST = ("batch", "kv_heads", "head_dim", "sequence")
_LETTERS = {"batch": "b", "kv_heads": "k", "sequence": "s", "head_dim": "h"}

# How a layer's cache lies in memory, as logical axes: rows first, so that a mesh splits it by sequences, and each
# array in the order in which a decode step reads it on some machine (`choose_layout`).
CACHE_LAYOUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "transposed": {"keys": _SEQUENCE_LAST, "values": _HEADS_FIRST},
    "sequence_last": {"keys": _SEQUENCE_LAST, "values": _SEQUENCE_LAST},
    "sequence_first": {"keys": _SEQUENCE_FIRST, "values": _SEQUENCE_FIRST},
    "paged": {"keys": _HEADS_FIRST, "values": _HEADS_FIRST},
    "cudnn": {"keys": _SEQUENCE_FIRST, "values": _SEQUENCE_FIRST},
}


KERNELS = ("paged", "cudnn")        # layouts in which a decode step is read by a kernel
WITHOUT_KERNEL = {"cpu": "transposed", "gpu": "transposed", "tpu": "sequence_last"}
TRIED_SLOTS, TOLERANCE = 128, 0.05  # of a kernel's trial: its cache, and what bfloat16 may differ by


def works(layout: str, *, rows: int, heads: int, kv_heads: int, head_dim: int, dtype: Any) -> bool:
    """Whether a decode step in this layout compiles on this machine and gives what XLA gives; tried on a small cache.

    Drivers and libraries differ between machines: a kernel that one of them lacks is to be found out before a run.
    Args: rows, of the trial: a multiple of the mesh's batch shards."""
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (rows, 1, heads, head_dim), dtype)
    key, value = (jax.random.normal(each, (rows, TRIED_SLOTS, kv_heads, head_dim), dtype) for each in keys[1:])
    last = jnp.arange(rows) * 37 % TRIED_SLOTS

    def attended(query: jax.Array, key: jax.Array, value: jax.Array, last: jax.Array) -> jax.Array:
        sizes = {"batch": rows, "kv_heads": kv_heads, "sequence": TRIED_SLOTS, "head_dim": head_dim}
        cache = {name: jnp.zeros([sizes[axis] for axis in axes], dtype) for name, axes in CACHE_LAYOUTS[layout].items()}
        cache = write_cache(cache, key, value, jnp.zeros(rows, jnp.int32), layout)
        at = last[:, None, None, None]
        new_key, new_value = (jnp.take_along_axis(x, at, axis=1) for x in (key, value))
        cache = write_cache(cache, new_key, new_value, last, layout)    # as a decode step writes, what stands there
        kernel = cached_attention(query, cache, last[:, None], layout)
        # Two queries of a row are XLA's.
        expected = cached_attention(jnp.repeat(query, 2, axis=1), cache, jnp.repeat(last[:, None], 2, axis=1), layout)
        return jnp.max(jnp.abs(kernel.astype(jnp.float32) - expected[:, :1].astype(jnp.float32)))

    try:
        return bool(jax.jit(attended)(query, key, value, last) <= TOLERANCE)
    except Exception:       # whatever compilers and drivers raise: this kernel is not to be had
        return False


def choose_layout(platform: str, head_dim: int, dtype: Any, context: int = 1) -> str:
    """The cache layout that a decode step is fastest in.

    A kernel where the machine has one and the model fits it. Else XLA: a CPU reads keys fastest along the sequence and
    values along the head; a TPU pads the last axis to 128, so a narrow head must not be last.
    Args: platform, of a device: "cpu", "gpu" or "tpu"; dtype, of the cache; context, parts a sequence is split into."""
    kernel = {"tpu": "paged", "gpu": "cudnn"}.get(platform)
    if kernel and not unsupported_reason(kernel, platform, head_dim, dtype, context):
        return kernel
    return WITHOUT_KERNEL[platform]


def unsupported_reason(layout: str, platform: str, head_dim: int, dtype: Any, context: int = 1) -> str | None:
    """Why the kernel of a layout cannot serve this model on this machine, in words for a user; None where it can."""
    name = jnp.dtype(dtype).name
    if layout == "paged":
        facts = [("platform", platform, platform == "tpu", "tpu"), ("dtype", name, name == "bfloat16", "bfloat16"),
                 ("head_dim", head_dim, head_dim % 128 == 0, "a multiple of 128")]
    elif layout == "cudnn":
        facts = [("platform", platform, platform == "gpu", "gpu"),
                 ("dtype", name, name in ("bfloat16", "float16"), "bfloat16 or float16"),
                 ("head_dim", head_dim, head_dim <= 128 and head_dim % 8 == 0, "a multiple of 8, at most 128")]
    else:
        return None
    facts.append(("mesh.context", context, context == 1, "1"))
    return next((f"{fact} is {found}, the {layout} kernel expects {expected}" for fact, found, fits, expected in facts
                 if not fits), None)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Stretches the slow rotary frequencies, so that a model trained on short contexts reads long ones.

    Source: the `rope_type: llama3` entry of Llama 3.1's config.json."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int


def rope_frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None) -> jax.Array:
    """Radians a position for each of the h / 2 rotary planes, float32[h / 2]. Source: arXiv 2104.09864."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequencies
    turns = scaling.original_positions * frequencies / (2 * math.pi)    # over the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)             # 1: fast plane, untouched; 0: slow, stretched
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rope(positions: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines float32[B, T, 1, h / 2] for positions int32[B, T], broadcast over heads."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Turns x[B, T, heads, h] by its position; plane i is the pair (x[i], x[i + h / 2]), as Hugging Face has it."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Every position attends to itself and what stands before it; padding must stand behind.

    Args: query [B, N, H, h]; key, value [B, N, K, h]. Returns: [B, N, H, h]; softmax in float32."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def write_cache(cache: LayerCache, key: jax.Array, value: jax.Array, start: jax.Array, layout: str) -> LayerCache:
    """The cache with T more tokens in each row, written in place where the cache is donated.

    Args: key, value [B, T, K, h]; start int32[B], the slot of each row's first new token."""
    new = {"keys": key, "values": value}
    axes = CACHE_LAYOUTS[layout]
    new = {name: x.transpose([_SEQUENCE_FIRST.index(axis) for axis in axes[name]]) for name, x in new.items()}
    if layout == "paged" and key.shape[1] == 1:
        return decode_kernels.paged_write(cache, new, start)

    def written(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        # A vmapped dynamic_update_slice, split over rows, needs no collective; a scatter by row number would.
        return jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis - 1))(
            old, new, start)

    return {name: written(cache[name], new[name], axes[name].index("sequence")) for name in cache}


def cached_attention(query: jax.Array, cache: LayerCache, positions: jax.Array, layout: str) -> jax.Array:
    """Attends to the cache slots 0 .. position of each query; the others may hold any finite number.

    Args: query [B, T, H, h]; positions int32[B, T]. A kernel reads a decode step, T = 1; XLA everything else.
    Returns: [B, T, H, h]; softmax in float32."""
    rows, length, heads, head_dim = query.shape
    if length == 1 and layout == "paged":
        return decode_kernels.paged_attention(query, cache["keys"], cache["values"], positions[:, 0] + 1)
    if length == 1 and layout == "cudnn":
        return decode_kernels.cudnn_attention(query, cache["keys"], cache["values"], positions[:, 0] + 1)
    keys, values = ("".join(_LETTERS[axis] for axis in CACHE_LAYOUTS[layout][name]) for name in ("keys", "values"))
    kv_heads, slots = (cache["values"].shape[values.index(letter)] for letter in "ks")
    grouped = query.reshape(rows, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(rows, kv_heads, -1, head_dim)             # [B, K, R * T, h]
    scores = jnp.einsum(f"bkqh,{keys}->bkqs", grouped, cache["keys"], preferred_element_type=jnp.float32)
    visible = jnp.arange(slots)[None, None, :] <= positions[:, :, None]  # [B, T, S]
    visible = jnp.tile(visible, (1, heads // kv_heads, 1))[:, None]      # [B, 1, R * T, S]
    scores = jnp.where(visible, scores / math.sqrt(head_dim), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    mixed = jnp.einsum(f"bkqs,{values}->bkqh", weights, cache["values"])
    mixed = mixed.reshape(rows, kv_heads, heads // kv_heads, length, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, head_dim)
