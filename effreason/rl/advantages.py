"""From rewards to advantages: how much better a response did than its siblings, less what the KL penalty takes.

P prompts, G responses for each prompt (the group), B = P * G rows, N token positions of a row. Needs nothing but jax.
"""

import jax
import jax.numpy as jnp


def leave_one_out(rewards: jax.Array) -> jax.Array:
    """Subtracts from each reward the mean of the other G - 1 rewards of its group (RLOO).

    Args: rewards float32[P, G], G >= 2.
    Returns: float32[P, G]; a group of equal rewards gives exactly 0. Source: arXiv 2402.14740.
    """
    # Measured from the first reward, equal rewards are exactly 0; sums of 0.95 would leave rounding noise.
    offsets = rewards - rewards[..., :1]
    others = (jnp.sum(offsets, axis=-1, keepdims=True) - offsets) / (rewards.shape[-1] - 1)
    return offsets - others


def group_std(advantages: jax.Array, rewards: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Divides each advantage by the population std of its group's rewards (GRPO).

    Warning: this removes alpha. Where all responses are correct the rewards differ by alpha * sigmoid(z) alone, so
    their std is proportional to alpha and the quotient is the same for alpha = 0.05 and 0.4: the dial turns and
    nothing moves.

    Args: advantages float32[P, G]; rewards float32[P, G], before any baseline; eps, added to the std.
    Returns: float32[P, G]; 0 where the group's rewards are equal. Source: arXiv 2402.03300.
    """
    offsets = rewards - rewards[..., :1]                    # as above: equal rewards have std 0, not rounding noise
    return advantages / (jnp.std(offsets, axis=-1, keepdims=True) + eps)


def whiten(advantages: jax.Array, mask: jax.Array, eps: float = 1e-8) -> jax.Array:
    """Shifts and scales the batch's advantages to mean 0 and variance 1, each response token weighing the same.

    The mean over tokens is a mean over responses weighted by length. Under a loss that averages over sequences this
    adds a pull on length even at alpha = 0: compare with a control at alpha = 0.

    Args: advantages float32[B, N]; mask bool[B, N], True on response tokens; eps, the least variance divided by.
    Returns: float32[B, N], 0 outside the mask.
    """
    mean, scale = whitening(advantages, mask, eps)
    return jnp.where(mask, (advantages - mean) * scale, 0.0)


def whitening(advantages: jax.Array, mask: jax.Array, eps: float = 1e-8) -> tuple[jax.Array, jax.Array]:
    """What whiten subtracts, and multiplies by then: float32[] each."""
    tokens = jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
    mean = jnp.sum(advantages, where=mask) / tokens
    variance = jnp.sum(jnp.where(mask, advantages - mean, 0.0) ** 2) / tokens
    return mean, jax.lax.rsqrt(jnp.maximum(variance, eps))


def truncated_importance(trained: jax.Array, sampled: jax.Array, mask: jax.Array, cap: float) -> jax.Array:
    """How much each token counts where sampler and trainer disagree a little: min(pi_trainer / pi_sampler, cap).

    The ratio makes the gradient that of the trainer's own policy; the cap bounds what one token can weigh.

    Args: trained, sampled float32[B, N], log-probs of the same tokens; mask bool[B, N], True on response tokens;
        cap > 0.
    Returns: float32[B, N] in [0, cap], 0 outside the mask. Source: arXiv 1802.01561; between sampler and trainer:
        Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    log_ratio = jnp.where(mask, trained - sampled, 0.0)
    return jnp.where(mask, jnp.minimum(jnp.exp(log_ratio), cap), 0.0)


def kl_return_to_go(penalty: jax.Array, mask: jax.Array) -> jax.Array:
    """Sums the penalty of each response token and all response tokens after it (no discount).

    With penalty = coefficient * (policy log-prob - reference log-prob), subtract the result from the advantages: a
    token answers for the drift from the reference that it and its successors cause, not for what stood before it.

    Args: penalty float32[B, N]; mask bool[B, N], True on response tokens.
    Returns: float32[B, N], 0 outside the mask.
    """
    response = jnp.where(mask, penalty, 0.0)
    return jnp.where(mask, jax.lax.cumsum(response, axis=response.ndim - 1, reverse=True), 0.0)


def length_pull(advantages: jax.Array, lengths: jax.Array) -> jax.Array:
    """How hard advantages pull on length, in tokens: the mean over responses of advantage * (length - group's mean).

    It is the first-order change of the expected length, per unit of step, where each response is one action: negative
    pulls towards shorter responses. Being linear in the advantages, it splits as they do.

    Args: advantages float32[P, G]; lengths int32[P, G], response tokens through EOS.
    Returns: float32[].
    """
    tokens = lengths.astype(jnp.float32)
    return jnp.mean(advantages * (tokens - jnp.mean(tokens, axis=-1, keepdims=True)))
