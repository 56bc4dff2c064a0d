"""A mixture of experts: each token goes through the few MLPs that a router chooses for it.

Every device of the mesh axis `tensor` holds some of the experts, and computes them for all tokens
of its rows; their results are added up. Tokens of one expert are next to one another, so that each
expert is one matrix product.

B rows, N positions, T = B * N tokens, D width, E experts, F width of an expert, k experts that a
token goes through.

Source: arXiv 2101.03961 (routing); arXiv 2505.09388 (Qwen3).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effreason.runtime.sharding import AXES, spec

Activation = Callable[[Array], Array]


def route(tokens: Float[Array, "T D"], router: Float[Array, "D E"], count: int, *,
          normalizes: bool) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
    """Returns the weights of the experts that each token goes through, and their numbers.

    Scores and softmax are float32: in bfloat16 sampler and trainer would often disagree.

    Args:
        count: k.
        normalizes: the weights of a token add up to 1."""
    scores = jnp.einsum("td,de->te", tokens.astype(jnp.float32),
                        router.astype(jnp.float32))
    weights, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), count)
    if normalizes:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights.astype(tokens.dtype), chosen


def mixture(x: Float[Array, "B N D"], router: Float[Array, "D E"], gate: Float[Array, "E D F"],
            up: Float[Array, "E D F"], down: Float[Array, "E F D"], *, count: int,
            normalizes: bool, activation: Activation) -> Float[Array, "B N D"]:
    """Returns the weighted sum of the experts' results for each token. Args: see `route`."""
    def local(x: Array, router: Array, gate: Array, up: Array, down: Array, first: Array) -> Array:
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = route(tokens, router, count, normalizes=normalizes)
        held = chosen - first       # among the experts of this device
        return _weighted_sum(tokens, weights, jnp.where(held < 0, len(gate), held), gate, up, down,
                             activation).reshape(x.shape)

    if jax.sharding.get_abstract_mesh().empty:
        return local(x, router, gate, up, down, jnp.zeros((), jnp.int32))

    def on_device(x: Array, router: Array, gate: Array, up: Array, down: Array) -> Array:
        first = jax.lax.axis_index(AXES["experts"]) * len(gate)
        return jax.lax.psum(local(x, router, gate, up, down, first), AXES["experts"])

    rows, experts = spec("batch", "sequence", "width"), spec("experts", "width", "width")
    return jax.shard_map(on_device, in_specs=(rows, spec("width", "width"), *[experts] * 3),
                         out_specs=rows, check_vma=False)(x, router, gate, up, down)


def _weighted_sum(tokens: Float[Array, "T D"], weights: Float[Array, "T k"],
                  chosen: Int[Array, "T k"], gate: Float[Array, "E D F"],
                  up: Float[Array, "E D F"], down: Float[Array, "E F D"],
                  activation: Activation) -> Float[Array, "T D"]:
    """Computes the experts that are here. Args: chosen, E and more are somewhere else."""
    experts, count = len(gate), chosen.shape[1]
    numbers = jnp.minimum(chosen, experts).reshape(-1)
    order = jnp.argsort(numbers)                    # by expert; those somewhere else come last
    sizes = jnp.bincount(numbers, length=experts + 1)[:experts].astype(jnp.int32)

    # What a product leaves in rows after its last group is not specified.
    is_here = (jnp.arange(len(order)) < jnp.sum(sizes))[:, None]
    rows = jnp.where(is_here, tokens[order // count], 0)
    hidden = activation(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(
        rows, up, sizes)
    results = jnp.where(is_here, jax.lax.ragged_dot(hidden, down, sizes), 0)
    of_tokens = results[jnp.argsort(order)].reshape(len(tokens), count, -1)
    return jnp.einsum("tk,tkd->td", weights, of_tokens)
