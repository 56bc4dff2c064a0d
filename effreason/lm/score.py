"""Log-probs of given texts, for your own programs."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from effreason.lm import model
from effreason.lm.architecture import DecoderConfig
from effreason.lm.logprobs import token_logprobs


def score(params: model.Params, sequences: Sequence[Sequence[int] | np.ndarray], *,
          config: DecoderConfig, temperature: float = 1.0,
          tile: int = 2048) -> list[np.ndarray]:
    """Returns the log-prob of each token of each sequence, given the tokens before it.

    The sequences form one batch, padded to the longest: score many of them in several calls.

    Args:
        params: Weights, as `load_weights` returns them.
        sequences: Lists of token ids, such as a prompt followed by a response.
        temperature: Divides the logits.
        tile: Vocabulary entries scored at a time; never [B, N, V] in memory.
    Returns: For a sequence of n tokens float32[n - 1]: the first token has none. -inf for an id
        that `config.unused_ids` names.
    Raises: ValueError for a sequence of less than two tokens or an id outside the vocabulary.
    """
    arrays = [np.asarray(sequence, np.int32) for sequence in sequences]
    for index, array in enumerate(arrays):
        if len(array) < 2 or not 0 <= array.min() <= array.max() < config.vocabulary:
            raise ValueError(f"sequence {index} must have at least two token ids in [0, "
                             f"{config.vocabulary}), got {len(array)} tokens")

    tokens = np.zeros((len(arrays), max(map(len, arrays), default=2)), np.int32)
    for row, array in zip(tokens, arrays, strict=True):
        row[:len(array)] = array        # padding comes last, so causal attention never reads it
    logprobs = np.asarray(_score(params, tokens[:, :-1], tokens[:, 1:], config=config,
                                 temperature=temperature, tile=tile))
    return [row[:len(array) - 1] for row, array in zip(logprobs, arrays, strict=True)]


@functools.partial(jax.jit, static_argnames=("config", "temperature", "tile"))
def _score(params: model.Params, tokens: jax.Array, targets: jax.Array, *,
           config: DecoderConfig, temperature: float, tile: int) -> jax.Array:
    hidden = model.forward(config, params, tokens)
    head = model.head(params).astype(config.dtype)
    return token_logprobs(hidden, head, jnp.asarray(targets), temperature=temperature,
                          tile=tile, unused=config.unused_ids)[0]
