"""Speculative decoding without another model: drafts from what has been said, exactly as drawn.

S slots, K drafted tokens, W tokens of text. A response says again what its prompt, the other
responses to it and its own beginning say. What followed there the last time is the draft, and one
step of the model reads the newest token and the draft at once. Each of these positions draws its
token with its own key, as a step of its own would: a drafted token is right if it is the one that
is drawn. So the tokens are the same as without drafts, except for rounding of float sums.

Source: arXiv 2304.04487, with draws from the model in the place of its most likely tokens.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

CONTEXT = 4                         # tokens that are looked up: more find places less like this one
# Positions of one device in a step: up to here it costs less than the tokens it saves. A CPU is
# soon bound by its arithmetic, an accelerator by reading the weights.
MOST_POSITIONS = {"cpu": 24, "gpu": 128, "tpu": 128}
TEXT_SHARE, MOST_TEXT = 4, 2**16    # tokens of text: slot capacities, and at most
NOTHING = -1                        # in the place of a token


def draft_lengths(most: int) -> tuple[int, ...]:
    """Returns the lengths of drafts that are compiled: `most`, its half and its quarter."""
    return tuple(length for length in (most, most // 2, most // 4) if length)


def text_width(capacity: int, samples: int) -> int:
    """Returns the tokens to draft from in each slot: fixed, so that it adds no shapes to compile.

    Args:
        capacity: positions of a slot.
        samples: responses to a prompt."""
    return min(min(samples, TEXT_SHARE) * capacity, max(MOST_TEXT, capacity))


def make_text(responses: Sequence[Int[np.ndarray, " T"]], own: Int[np.ndarray, " length"],
              width: int) -> Int[np.ndarray, " W"]:
    """Returns the text to draft a response from, the response last; NOTHING separates and pads it.

    Args:
        responses: others to the same prompt; the last ones are kept if not all fit.
        own: the prompt and the response so far."""
    pieces = [own]
    for response in reversed(responses):
        if sum(map(len, pieces)) >= width:
            break
        pieces += [np.array([NOTHING], np.int32), response]
    text = np.concatenate(pieces[::-1])[-width:]
    return np.pad(text, (width - len(text), 0), constant_values=NOTHING)


def find_drafts(texts: Int[Array, "S W"], ends: Int[Array, " S"],
                length: int) -> Int[Array, "S K"]:
    """Returns what followed, in each text, the newest of the longest repeats of its last tokens.

    Args:
        ends: tokens of each text; what is after them is not read."""
    return jax.vmap(partial(_find_draft, length=length))(texts, ends)


def _find_draft(text: Int[Array, " W"], end: Int[Array, ""], length: int) -> Int[Array, " K"]:
    positions = jnp.arange(text.shape[0])
    is_before = positions < end - 1
    same, repeated = is_before, jnp.zeros_like(positions)
    for back in range(CONTEXT):
        same &= jnp.roll(text, back) == text[end - 1 - back]
        repeated += same.astype(jnp.int32)
    newest = jnp.argmax(jnp.where(is_before, repeated * text.shape[0] + positions, -1))
    # A text that goes round in a circle continues to do so.
    return text[newest + 1 + jnp.arange(length) % (end - 1 - newest)]


def count_accepted(drawn: Int[Array, "S K_plus_1"], drafts: Int[Array, "S K"],
                   eos: Int[Array, " E"]) -> Int[Array, " S"]:
    """Returns how many of the tokens drawn are the response's: all through the first that differs
    from its draft, because the next ones follow another token, or that is an EOS."""
    is_last = (drawn[:, :-1] != drafts) | jnp.isin(drawn[:, :-1], eos)
    last = jnp.ones((drawn.shape[0], 1), bool)
    return 1 + jnp.argmax(jnp.concatenate([is_last, last], axis=1), axis=1)
