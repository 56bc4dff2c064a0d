"""Rewards for a group of responses: correct ones score, and more the shorter they are.

`length_rewards` is the method's. The others are published alternatives, each with its published
numbers as defaults. All take correct bool[P, G] and lengths int32[P, G] (response tokens through
EOS; a truncated response is wrong) and return float32[P, G].

P prompts, G responses for each prompt (the group). Imports jax and jaxtyping alone: copy the file
into a notebook and it runs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def length_rewards(correct: Bool[Array, "P G"], lengths: Int[Array, "P G"], *,
                   alpha: float | jax.Array, eps: float = 1e-7) -> Float[Array, "P G"]:
    """Rewards correct answers, less for long ones: 1 - alpha * sigmoid(z).

    z = (length - mean) / (std + eps), with mean and population std over the correct responses to
    the same prompt. One correct response, or several of equal length, have z = 0 and score
    1 - alpha / 2. The length of a wrong response enters no mean.

    Args:
        correct: right and ended with EOS (a truncated response is wrong whatever its text holds).
        lengths: response tokens through EOS.
        alpha: in [0, 1); 0 rewards correctness alone. Below 1 a correct response always beats a
            wrong one.
        eps: keeps z finite if all correct responses are equally long.

    Returns:
        float32 in [0, 1], 0 for wrong responses. Source: arXiv 2502.04463.
    """
    # Tokens beyond the shortest correct response are small whole numbers, whose float32 sums are
    # exact. So equal lengths have z = 0 to the last bit (rounding noise over eps would not), and
    # adding a constant to all lengths changes nothing.
    shortest = jnp.min(lengths, axis=-1, keepdims=True, where=correct,
                       initial=jnp.iinfo(jnp.int32).max)
    extra = jnp.where(correct, lengths - shortest, 0).astype(jnp.float32)

    count = jnp.maximum(jnp.sum(correct, axis=-1, keepdims=True), 1).astype(jnp.float32)
    deviation = extra - jnp.sum(extra, axis=-1, keepdims=True) / count
    std = jnp.sqrt(jnp.sum(deviation**2, axis=-1, keepdims=True, where=correct) / count)
    return jnp.where(correct, 1.0 - alpha * jax.nn.sigmoid(deviation / (std + eps)), 0.0)


def kimi(correct: Bool[Array, "P G"], lengths: Int[Array, "P G"], *,
         weight: float = 1.0) -> Float[Array, "P G"]:
    """Adds up to weight / 2 for the shortest of a group, subtracts it for the longest.

    correct + weight * place, with place = 0.5 - (length - min) / (max - min) over all responses of
    the group, right or wrong; 0 if all are equally long. A wrong response never gains by it: it
    scores weight * min(0, place).

    Args:
        weight: of the length against correctness; none is published.

    Returns:
        float32 in [-weight / 2, 1 + weight / 2]. Source: Kimi k1.5, arXiv 2501.12599.
    """
    shortest = jnp.min(lengths, axis=-1, keepdims=True)
    span = jnp.max(lengths, axis=-1, keepdims=True) - shortest
    share = (lengths - shortest).astype(jnp.float32) / jnp.maximum(span, 1).astype(jnp.float32)
    place = jnp.where(span > 0, 0.5 - share, 0.0)
    return jnp.where(correct, 1.0 + weight * place, weight * jnp.minimum(place, 0.0))


def l1_exact(correct: Bool[Array, "P G"], lengths: Int[Array, "P G"], *, target: float,
             scale: float = 3e-4) -> Float[Array, "P G"]:
    """Punishes the distance from a target length: correct - scale * |target - length|.

    Args:
        target: tokens; the source names one in each prompt, here it is one for all.
        scale: for each token.

    Returns:
        float32, at most 1. Source: L1-Exact (LCPO), arXiv 2503.04697.
    """
    return _float(correct) - scale * jnp.abs(target - _float(lengths))


def l1_max(correct: Bool[Array, "P G"], lengths: Int[Array, "P G"], *, target: float,
           scale: float = 3e-4, offset: float = 0.5) -> Float[Array, "P G"]:
    """Rewards a correct response by what it leaves of a target.

    correct * clip(scale * (target - length) + offset, 0, 1): a long one scores no more than a
    wrong one.

    Args:
        target: tokens, one for all prompts.
        scale: for each token.
        offset: the score at the target.

    Returns:
        float32 in [0, 1]. Source: L1-Max (LCPO), arXiv 2503.04697.
    """
    return jnp.where(correct, jnp.clip(scale * (target - _float(lengths)) + offset, 0.0, 1.0), 0.0)


def soft_overlong(correct: Bool[Array, "P G"], lengths: Int[Array, "P G"], *,
                  limit: float = 20480, buffer: float = 4096) -> Float[Array, "P G"]:
    """Subtracts up to 1 near the token limit: correct + clip((limit - buffer - length) / buffer).

    The clip is to [-1, 0]. In the source a wrong answer scores -1, here 0, so that against
    correctness the loss weighs twice as much.

    Args:
        limit: tokens at which the loss reaches 1.
        buffer: tokens before the limit over which the loss grows from 0.

    Returns:
        float32 in [-1, 1]. Source: soft overlong punishment of DAPO, arXiv 2503.14476.
    """
    left = (limit - buffer - _float(lengths)) / jnp.maximum(buffer, 1.0)
    return _float(correct) + jnp.clip(left, -1.0, 0.0)


def limit(correct: Bool[Array, "P G"], lengths: Int[Array, "P G"], *,
          limit: float) -> Float[Array, "P G"]:
    """Counts a response longer than `limit` tokens as wrong: correct * [length <= limit].

    Returns:
        float32, 0 or 1. Source: ThinkPrune, arXiv 2504.01296, which lowers the limit from round to
        round; DLER, arXiv 2510.15110.
    """
    return _float(correct & (_float(lengths) <= limit))


def adaptive_limit(correct: Bool[Array, "P G"], lengths: Int[Array, "P G"], *, limit: float = 4000,
                   tight: float = 2000, share: float = 0.5) -> Float[Array, "P G"]:
    """Counts a response beyond a limit as wrong, and beyond a lower one on easy problems.

    A problem is easy if at least `share` of its group is correct within `limit` tokens; its limit
    is `tight`.

    Returns:
        float32, 0 or 1. Source: DA-DLER, arXiv 2510.15110.
    """
    within = correct & (_float(lengths) <= limit)
    is_easy = jnp.mean(_float(within), axis=-1, keepdims=True) >= share
    return _float(within & (~is_easy | (_float(lengths) <= tight)))


def group_max(correct: Bool[Array, "P G"], lengths: Int[Array, "P G"], *,
              weight: float = 0.25) -> Float[Array, "P G"]:
    """Charges more for length the easier the problem: correct - weight * rate * length / longest.

    The rate is the share of the group that is correct, longest its longest response. Wrong
    responses pay too, but nothing in groups without a correct one.

    Returns:
        float32 in [-weight, 1]. Source: the linear length penalty of prime-rl.
    """
    longest = jnp.maximum(jnp.max(lengths, axis=-1, keepdims=True), 1)
    rate = jnp.mean(_float(correct), axis=-1, keepdims=True)
    return _float(correct) - weight * rate * _float(lengths) / _float(longest)


def laser(correct: Bool[Array, "P G"], lengths: Int[Array, "P G"], *, target: float,
          bonus: float = 0.5) -> Float[Array, "P G"]:
    """Adds a bonus to correct responses of at most `target` tokens.

    Returns:
        float32 in [0, 1 + bonus]. Source: LASER, arXiv 2505.15612.
    """
    return jnp.where(correct, 1.0 + bonus * _float(_float(lengths) <= target), 0.0)


def alp(correct: Bool[Array, "P G"], lengths: Int[Array, "P G"], *,
        scale: float = 1e-7) -> Float[Array, "P G"]:
    """Charges more for tokens the easier the problem: correct - scale * length * pass rate.

    Wrong responses pay too. The pass rate is the share of the group that is correct, at least
    1 / G.

    Args:
        scale: for each token of a problem that is always solved.

    Returns:
        float32, at most 1. Source: ALP, arXiv 2506.05256.
    """
    rate = jnp.mean(_float(correct), axis=-1, keepdims=True)
    return _float(correct) - scale * _float(lengths) * jnp.maximum(rate, 1.0 / lengths.shape[-1])


def gr3(correct: Bool[Array, "P G"], lengths: Int[Array, "P G"], *,
        weight: float = 0.33) -> Float[Array, "P G"]:
    """Scales correct responses down by relative length: correct / (1 + weight * length / mean).

    Args:
        weight: of the length; the mean is over all responses of the group, right or wrong.

    Returns:
        float32 in [0, 1]. Source: GR3, arXiv 2603.10535.
    """
    tokens = _float(lengths)
    mean = jnp.maximum(jnp.mean(tokens, axis=-1, keepdims=True), 1.0)
    return _float(correct) / (1.0 + weight * tokens / mean)


def shorter_better(correct: Bool[Array, "P G"], lengths: Int[Array, "P G"], *, value: float = 2.0,
                   scale: float = 1e-3) -> Float[Array, "P G"]:
    """Punishes the distance from the best length: value * correct - scale * |length - best|.

    best is the length of the shortest correct response, or the mean of all if none is correct. So
    wrong responses are pulled to it too, and groups without a correct one to their own mean.

    Args:
        value: of being correct.
        scale: for each token away from the best length.

    Returns:
        float32, at most `value`. Source: ShorterBetter, arXiv 2504.21370.
    """
    shortest = jnp.min(lengths, axis=-1, keepdims=True, where=correct,
                       initial=jnp.iinfo(jnp.int32).max)
    mean = jnp.mean(_float(lengths), axis=-1, keepdims=True)
    best = jnp.where(jnp.any(correct, axis=-1, keepdims=True), _float(shortest), mean)
    return value * _float(correct) - scale * jnp.abs(_float(lengths) - best)


def _float(values: jax.Array) -> jax.Array:
    return values.astype(jnp.float32)
