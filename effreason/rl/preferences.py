"""The two baselines the paper compares with, as credit: imitating the shortest correct response, or preferring it.

P prompts, G responses for each prompt (the group). Needs nothing but jax. Both are written as what each token of a
response is worth in the policy gradient of one update: at the policy that was scored, its gradient is theirs.
"""

import jax
import jax.numpy as jnp


def shortest_correct(correct: jax.Array, lengths: jax.Array) -> jax.Array:
    """Chooses the shortest correct response of each group, the first of equally short ones.

    With weight 1 on what is chosen, the policy gradient is that of supervised learning on it (rejection sampling).
    Args: correct bool[P, G]; lengths int32[P, G], response tokens through EOS.
    Returns: bool[P, G], at most one of a group; none where no response is correct. Source: arXiv 2502.04463, its SFT
        baseline."""
    return _first_least(lengths, correct)


def longest_correct(correct: jax.Array, lengths: jax.Array) -> jax.Array:
    """As shortest_correct, but the longest, and only where it is longer than the shortest: a pair of two."""
    longest = _first_least(-lengths, correct)
    least = jnp.min(lengths, axis=-1, keepdims=True, where=correct, initial=jnp.iinfo(jnp.int32).max)
    return longest & (lengths > least)


def preference_advantages(chosen: jax.Array, rejected: jax.Array, margins: jax.Array, *, beta: float) -> jax.Array:
    """What each response is worth under direct preference optimisation (DPO): beta * sigmoid(-beta * margin), signed.

    The loss of a pair is -log sigmoid(beta * (margin of the chosen - margin of the rejected)), a margin being the sum
    over its tokens of log pi - log reference. Its gradient is that of -sum_t A log pi with A = +w on the tokens of the
    chosen and -w on those of the rejected response, w = beta * sigmoid(-beta * difference).

    Args: chosen, rejected bool[P, G], at most one of each in a group; margins float32[P, G]; beta > 0.
    Returns: float32[P, G], 0 outside the pairs and in groups that lack one of the two. Source: arXiv 2305.18290."""
    weight = beta * jax.nn.sigmoid(-beta * difference(chosen, rejected, margins))
    return jnp.where(chosen, weight, 0.0) - jnp.where(rejected, weight, 0.0)


def difference(chosen: jax.Array, rejected: jax.Array, margins: jax.Array) -> jax.Array:
    """The chosen response's margin less the rejected one's: float32[P, 1]."""
    def of(which: jax.Array) -> jax.Array:
        return jnp.sum(margins, axis=-1, keepdims=True, where=which)

    return of(chosen) - of(rejected)


def pairs(chosen: jax.Array, rejected: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both, but for groups that lack one of the two: bool[P, G] twice."""
    whole = jnp.any(chosen, axis=-1, keepdims=True) & jnp.any(rejected, axis=-1, keepdims=True)
    return chosen & whole, rejected & whole


def _first_least(values: jax.Array, among: jax.Array) -> jax.Array:
    """True on the first least value of each group among those, nowhere where there are none."""
    least = jnp.argmin(jnp.where(among, values, jnp.iinfo(jnp.int32).max), axis=-1, keepdims=True)
    return among & (jnp.arange(values.shape[-1])[None, :] == least)
