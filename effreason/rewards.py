"""The reward of a group of responses: right answers score, a little less the longer they are than their siblings.

P prompts, G responses for each prompt (the group). Needs nothing but jax: copy the file into a notebook and it runs.
"""

import jax
import jax.numpy as jnp


def length_rewards(correct: jax.Array, lengths: jax.Array, *, alpha: float | jax.Array, eps: float = 1e-7) -> jax.Array:
    """Rewards correct answers, less for long ones: 1 - alpha * sigmoid(z), z over the prompt's correct answers.

    z = (length - mean) / (std + eps), mean and population std over the correct responses of the same prompt. One
    correct response, or several of equal length, have z = 0 and score 1 - alpha / 2. A wrong response's length enters
    nobody's mean.

    Args:
        correct: bool[P, G], right and ended with EOS (a truncated response is wrong whatever its text holds).
        lengths: int32[P, G], response tokens through EOS.
        alpha: in [0, 1), the dial: 0 rewards correctness alone. Below 1 a correct response always beats a wrong one.
        eps: keeps z finite where all correct responses are equally long.

    Returns: float32[P, G] in [0, 1], 0 where wrong.
    Source: arXiv 2502.04463.
    """
    # Tokens beyond the shortest correct response: small whole numbers whose float32 sums are exact. So equal lengths
    # have z = 0 to the last bit (rounding noise over eps would not), and adding a constant to all changes nothing.
    shortest = jnp.min(lengths, axis=-1, keepdims=True, where=correct, initial=jnp.iinfo(jnp.int32).max)
    extra = jnp.where(correct, lengths - shortest, 0).astype(jnp.float32)

    count = jnp.maximum(jnp.sum(correct, axis=-1, keepdims=True), 1).astype(jnp.float32)
    deviation = extra - jnp.sum(extra, axis=-1, keepdims=True) / count
    std = jnp.sqrt(jnp.sum(deviation**2, axis=-1, keepdims=True, where=correct) / count)
    return jnp.where(correct, 1.0 - alpha * jax.nn.sigmoid(deviation / (std + eps)), 0.0)
