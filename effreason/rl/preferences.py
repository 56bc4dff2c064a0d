"""The paper's two baselines as advantages: imitate the shortest correct response, or prefer it.

P prompts, G responses for each prompt (the group). Imports jax alone. At the policy that was
scored, the policy gradient with these advantages is the gradient of the baseline's own loss.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def shortest_correct(correct: Bool[Array, "P G"], lengths: Int[Array, "P G"]) -> Bool[Array, "P G"]:
    """Chooses the shortest correct response of each group, the first of equally short ones.

    With weight 1 on these, the policy gradient is supervised learning on them (rejection sampling).

    Args:
        lengths: response tokens through EOS.

    Returns:
        At most one True in a group; none if no response is correct. Source: arXiv 2502.04463, its
        SFT baseline.
    """
    return _first_least(lengths, correct)


def longest_correct(correct: Bool[Array, "P G"], lengths: Int[Array, "P G"]) -> Bool[Array, "P G"]:
    """Chooses the longest correct response of groups with correct ones of several lengths."""
    longest = _first_least(-lengths, correct)
    least = jnp.min(lengths, axis=-1, keepdims=True, where=correct,
                    initial=jnp.iinfo(jnp.int32).max)
    return longest & (lengths > least)


def preference_advantages(chosen: Bool[Array, "P G"], rejected: Bool[Array, "P G"],
                          margins: Float[Array, "P G"], *, beta: float) -> Float[Array, "P G"]:
    """Computes the advantages of direct preference optimization (DPO).

    The loss of a pair is -log sigmoid(beta * (margin of the chosen - margin of the rejected)); a
    margin is the sum over a response's tokens of log pi - log reference. The loss has the gradient
    of -sum_t A log pi with A = +w on the tokens of the chosen and -w on those of the rejected
    response, w = beta * sigmoid(-beta * difference of the margins).

    Args:
        chosen: at most one True in a group.
        rejected: at most one True in a group.
        beta: > 0.

    Returns:
        float32; 0 outside the pairs and in groups that lack one of the two.
        Source: arXiv 2305.18290.
    """
    weight = beta * jax.nn.sigmoid(-beta * difference(chosen, rejected, margins))
    return jnp.where(chosen, weight, 0.0) - jnp.where(rejected, weight, 0.0)


def difference(chosen: Bool[Array, "P G"], rejected: Bool[Array, "P G"],
               margins: Float[Array, "P G"]) -> Float[Array, "P 1"]:
    """Subtracts the rejected response's margin from the chosen one's."""
    def margin(which: jax.Array) -> jax.Array:
        return jnp.sum(margins, axis=-1, keepdims=True, where=which)

    return margin(chosen) - margin(rejected)


def pairs(chosen: Bool[Array, "P G"], rejected: Bool[Array, "P G"]
          ) -> tuple[Bool[Array, "P G"], Bool[Array, "P G"]]:
    """Drops both in groups that lack one of the two."""
    whole = jnp.any(chosen, axis=-1, keepdims=True) & jnp.any(rejected, axis=-1, keepdims=True)
    return chosen & whole, rejected & whole


def _first_least(values: Int[Array, "P G"], among: Bool[Array, "P G"]) -> Bool[Array, "P G"]:
    """Marks the first of the least values among those marked; nothing in a group without any."""
    least = jnp.argmin(jnp.where(among, values, jnp.iinfo(jnp.int32).max), axis=-1, keepdims=True)
    return among & (jnp.arange(values.shape[-1])[None, :] == least)
