"""Attention and rotary positions, as plain array functions.

B rows, T query positions, S cache slots, H query heads, K key/value heads, R = H / K, h head width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


# How a layer's cache lies in memory, as logical axes; rows first, so that a mesh splits it by sequences.
CACHE_LAYOUTS = {
    "transposed": {"keys": ("batch", "kv_heads", "head_dim", "sequence"),
                   "values": ("batch", "kv_heads", "sequence", "head_dim")},
}


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


def cached_attention(query: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array) -> jax.Array:
    """Attends to the cache slots 0 .. position of each query.

    Args: query [B, T, H, h]; keys [B, K, h, S], transposed: a decode step then reads them in the order in which they
        lie, several times faster on a CPU; values [B, K, S, h]; positions int32[B, T].
    Returns: [B, T, H, h]; softmax in float32."""
    rows, length, heads, head_dim = query.shape
    kv_heads, slots = keys.shape[1], keys.shape[3]
    grouped = query.reshape(rows, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(rows, kv_heads, -1, head_dim)             # [B, K, R * T, h]
    scores = jnp.einsum("bkqh,bkhs->bkqs", grouped, keys, preferred_element_type=jnp.float32) / math.sqrt(head_dim)
    visible = jnp.arange(slots)[None, None, :] <= positions[:, :, None]  # [B, T, S]
    visible = jnp.tile(visible, (1, heads // kv_heads, 1))[:, None]      # [B, 1, R * T, S]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bkqs,bksh->bkqh", weights, values)
    mixed = mixed.reshape(rows, kv_heads, heads // kv_heads, length, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, head_dim)
