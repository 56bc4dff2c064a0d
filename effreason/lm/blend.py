"""Models between a base and what was trained from it: the weighted mean of their weights.

Source: WiSE-FT, arXiv 2109.01903; between short and long reasoners, Kimi k1.5, arXiv 2501.12599.
"""

import jax

from effreason.lm.model import Params


def blend(base: Params, trained: Params, weight: float | jax.Array) -> Params:
    """Returns (1 - weight) * base + weight * trained, in float32; at 0 and 1 exactly one of them.

    Args:
        base: Weights.
        trained: A tree of arrays of the same shapes.
        weight: A number or float32[]; outside [0, 1] the result is an extrapolation.
    """
    def mix(one: jax.Array, other: jax.Array) -> jax.Array:
        return (1.0 - weight) * one.astype("float32") + weight * other.astype("float32")

    return jax.tree.map(mix, base, trained)
