"""Which positions of a row are response tokens.

Masks come from where a response ended, never from `tokens != pad`: many tokenizers pad with EOS, or with a token that a
response may hold. B rows, N token positions of a row.
"""

import jax
import jax.numpy as jnp


def response_mask(prompt_lengths: jax.Array, lengths: jax.Array, positions: int) -> jax.Array:
    """Marks the response tokens of rows that hold a prompt, its response and then padding.

    Args: prompt_lengths int32[B]; lengths int32[B], response tokens through EOS; positions N, static under jit.
    Returns: bool[B, N], True through EOS; a response that does not fit into N is cut at N.
    """
    start = prompt_lengths[:, None]
    position = jnp.arange(positions, dtype=jnp.int32)[None, :]
    return (start <= position) & (position < start + lengths[:, None])


def padded_length(length: int, smallest: int = 64) -> int:
    """The least of 64, 96, 128, 192, 256, ... that holds `length`: few shapes to compile, at most a third of padding.

    Args: smallest, a power of two."""
    size = smallest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
