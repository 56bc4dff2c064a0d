"""Which positions are response tokens.

Masks come from where a response ended, never from `tokens != pad`: many tokenizers pad with EOS, or with a token that a
response may hold. B responses, T response tokens at most.
"""

import jax
import jax.numpy as jnp


def response_mask(lengths: jax.Array, positions: int) -> jax.Array:
    """Marks the tokens of responses that are padded on the right.

    Args: lengths int32[B], tokens through EOS; positions T, static under jit.
    Returns: bool[B, T], True through EOS; a response that does not fit into T is cut at T."""
    return jnp.arange(positions, dtype=jnp.int32)[None, :] < lengths[:, None]


def padded_length(length: int, smallest: int = 64) -> int:
    """The least of 64, 96, 128, 192, 256, ... that holds `length`: few shapes to compile, at most a third of padding.

    Args: smallest, a power of two."""
    size = smallest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
