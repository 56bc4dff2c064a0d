"""From rewards to advantages: how much better a response did than the others of its group.

P prompts, G responses for each prompt (the group), B = P * G responses, T response tokens.
Imports jax alone: copy the file into a notebook and it runs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

# What an advantage is the sum of: the advantage that correctness alone would give, what the rest of
# the reward adds to it, what the KL penalty adds, and what whitening subtracts from every token.
PARTS = ("accuracy", "length", "kl", "normalisation")

# Bounds on what exp() is taken of, as verl and NeMo-RL have them: float32 overflows at 88 nats, and
# long before that a single token would outweigh all others.
MAX_LOG_RATIO = 20.0                # nats
MAX_K3 = 10.0                       # nats


def leave_one_out(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """Subtracts from each reward the mean of the other G - 1 rewards of its group (RLOO).

    Args:
        rewards: float32, G >= 2.

    Returns:
        float32; exactly 0 for a group of equal rewards. Source: arXiv 2402.14740.
    """
    # Offsets from the first reward are exactly 0 if all are equal; sums of 0.95 are rounded.
    offsets = rewards - rewards[..., :1]
    others = (jnp.sum(offsets, axis=-1, keepdims=True) - offsets) / (rewards.shape[-1] - 1)
    return offsets - others


def group_std(advantages: Float[Array, "P G"], rewards: Float[Array, "P G"],
              eps: float = 1e-6) -> Float[Array, "P G"]:
    """Divides each advantage by the population std of its group's rewards (GRPO).

    Warning: this removes alpha. The rewards of an all-correct group differ only by
    alpha * sigmoid(z), so their std is proportional to alpha and the quotient is the same for
    alpha = 0.05 and 0.4: turning alpha up changes nothing.

    Args:
        rewards: float32, before any baseline.
        eps: added to the std.

    Returns:
        float32; 0 for a group of equal rewards. Source: arXiv 2402.03300.
    """
    offsets = rewards - rewards[..., :1]                    # equal rewards: std 0, as above
    return advantages / (jnp.std(offsets, axis=-1, keepdims=True) + eps)


def split_rewards(correct: Shaped[Array, "P G"], rewards: Float[Array, "P G"], *,
                  by_group_std: bool = False,
                  length_weight: Float[Array, ""] | Float[Array, " P"] | None = None,
                  ) -> tuple[Float[Array, "P G"], dict[str, Float[Array, "P G"]]]:
    """Computes the advantage of each response, and how much of it is accuracy and how much length.

    Args:
        correct: bool, or the scores of responses that may be partly right.
        by_group_std: also divide by the std of each group, see `group_std`.
        length_weight: divide accuracy and length each by its own std in the group, and multiply
            length by this weight. So the weight decides what length is worth, whatever the size of
            the rewards. Source: GDPO, arXiv 2601.05242. None = both as the reward has them.

    Returns:
        The advantages, and their parts by the names in PARTS; kl and normalisation are 0.
    """
    right = correct.astype(jnp.float32)
    accuracy = leave_one_out(right)
    total = leave_one_out(rewards)
    length = total - accuracy

    if by_group_std:
        total, accuracy, length = (group_std(part, rewards) for part in (total, accuracy, length))
    if length_weight is not None:
        rest = rewards - right
        weight = jnp.broadcast_to(length_weight[..., None], rest[..., :1].shape)
        accuracy = group_std(accuracy, right)
        length = weight * group_std(leave_one_out(rest), rest)
        total = accuracy + length

    zeros = jnp.zeros_like(total)
    return total, {"accuracy": accuracy, "length": length, "kl": zeros, "normalisation": zeros}


def split_advantages(total: Float[Array, "*shape"], parts: dict[str, Float[Array, "*shape"]],
                     mask: Bool[Array, "*shape"], *, tokens: Float[Array, "*shape"] | int = 1
                     ) -> tuple[Float[Array, "*shape"], dict[str, Float[Array, "*shape"]]]:
    """Whitens advantages, and their parts with them.

    Training passes the advantages of tokens, [B, T]. The preview passes those of whole responses,
    [P, G], with their lengths as `tokens`: the result is the same.

    Returns:
        The whitened advantages and the parts they are the sum of; see `whiten`.
    """
    total, shift, scale = whiten(total, mask, tokens=tokens)
    parts = parts | {"normalisation": jnp.where(mask, -shift, 0.0)}
    return total, {name: scale * part for name, part in parts.items()}


def whiten(advantages: Float[Array, "*shape"], mask: Bool[Array, "*shape"], *,
           tokens: Float[Array, "*shape"] | int = 1, eps: float = 1e-8
           ) -> tuple[Float[Array, "*shape"], Float[Array, ""], Float[Array, ""]]:
    """Shifts and scales a batch of advantages to mean 0 and variance 1 over its response tokens.

    The mean over tokens is a mean over responses weighted by length. Under a loss that averages
    over sequences this pulls on length even at alpha = 0: compare with a control at alpha = 0.

    Args:
        mask: the entries that count.
        tokens: response tokens of each entry.
        eps: the least variance to divide by.

    Returns:
        The whitened advantages, 0 outside the mask; the shift that was subtracted; the scale that
        the difference was multiplied by.
    """
    count = jnp.maximum(jnp.sum(jnp.where(mask, tokens, 0)), 1).astype(jnp.float32)
    mean = jnp.sum(tokens * advantages, where=mask) / count
    variance = jnp.sum(tokens * jnp.where(mask, advantages - mean, 0.0) ** 2) / count

    scale = jax.lax.rsqrt(jnp.maximum(variance, eps))
    return jnp.where(mask, (advantages - mean) * scale, 0.0), mean, scale


def probability_ratio(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes exp(log_ratio), with log_ratio clamped to +-MAX_LOG_RATIO; no gradient beyond.

    Args:
        log_ratio: difference of two log-probs of the same token, in nats.
    """
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def k3(drift: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Estimates KL(policy || reference) from one token: exp(-drift) + drift - 1.

    The drift is clamped to +-MAX_LOG_RATIO and the estimate to MAX_K3, which it reaches at a drift
    of -2.6 and of 11 nats. Beyond that it has no gradient; before, its slope is at most 13.

    Args:
        drift: log-prob by the policy less that by the reference, in nats.

    Returns:
        Nats, in [0, MAX_K3]. Source: joschu.net/blog/kl-approx.
    """
    drift = jnp.clip(drift, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.minimum(jnp.exp(-drift) + drift - 1.0, MAX_K3)


def truncated_importance(trained: Float[Array, "B T"], sampled: Float[Array, "B T"],
                         mask: Bool[Array, "B T"], cap: float) -> Float[Array, "B T"]:
    """Weighs tokens by how far sampler and trainer disagree: min(pi_trainer / pi_sampler, cap).

    The ratio makes the gradient that of the trainer's own policy; the cap bounds a token's weight.

    Args:
        trained: log-probs by the trainer.
        sampled: log-probs of the same tokens by the sampler.
        mask: True on response tokens.
        cap: > 0; the ratio is also at most exp(MAX_LOG_RATIO), see `probability_ratio`.

    Returns:
        float32 in [0, cap], 0 outside the mask. Source: arXiv 1802.01561; between sampler and
        trainer: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
        Training".
    """
    log_ratio = jnp.where(mask, trained - sampled, 0.0)
    return jnp.where(mask, jnp.minimum(probability_ratio(log_ratio), cap), 0.0)


def kl_return_to_go(penalty: Float[Array, "R N"], mask: Bool[Array, "R N"],
                    segments: Int[Array, "R N"] | None = None) -> Float[Array, "R N"]:
    """Sums the penalty of each response token and all response tokens after it (no discount).

    With penalty = coefficient * (policy log-prob - reference log-prob), subtract the result from
    the advantages: a token answers for the drift from the reference that it and its successors
    cause, not for what came before it.

    Args:
        mask: True on response tokens.
        segments: the sequence of each token, if a row holds several; each has a sum of its own.

    Returns:
        float32, 0 outside the mask.
    """
    response = jnp.where(mask, penalty, 0.0)
    if segments is None:
        segments = jnp.zeros_like(mask, jnp.int32)
    is_last = jnp.concatenate([segments[..., 1:] != segments[..., :-1],
                               jnp.ones_like(mask[..., :1])], axis=-1)

    def add(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        (after, ends_after), (own, ends) = later, earlier
        return own + jnp.where(ends, 0.0, after), ends | ends_after

    sums, _ = jax.lax.associative_scan(add, (response, is_last), reverse=True,
                                       axis=response.ndim - 1)
    return jnp.where(mask, sums, 0.0)


def length_pull(advantages: Float[Array, "P G"], lengths: Int[Array, "P G"]) -> Float[Array, ""]:
    """Measures how hard advantages pull on length: mean of advantage * (length - group's mean).

    It is the first-order change of the expected length, per unit of step, if each response is one
    action. It is linear in the advantages, so the pulls of their parts add up.

    Args:
        lengths: response tokens through EOS.

    Returns:
        float32[], tokens; negative pulls towards shorter responses.
    """
    tokens = lengths.astype(jnp.float32)
    return jnp.mean(advantages * (tokens - jnp.mean(tokens, axis=-1, keepdims=True)))
