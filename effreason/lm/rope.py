"""Rotary positions: pairs of a head's entries are rotated by angles that grow with the position.

B rows, N positions, h head width, r entries of a head that are rotated.

Source: arXiv 2104.09864; the ways to stretch the angles for longer contexts are those of
transformers' `rope_type`.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

Angles = tuple[Float32[Array, "B N 1 r/2"], Float32[Array, "B N 1 r/2"]]    # cosines and sines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Stretches all angles: position p is read as p / factor. Source: arXiv 2306.15595."""

    factor: float

    def stretch(self, frequencies: Float32[Array, " r/2"], theta: float) -> Float32[Array, " r/2"]:
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
    """Stretches the slow angles: a model trained on short contexts reads long ones.

    Source: the `rope_type: llama3` entry of Llama 3.1's config.json."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int

    def stretch(self, frequencies: Float32[Array, " r/2"], theta: float) -> Float32[Array, " r/2"]:
        turns = self.original_positions * frequencies / (2 * math.pi)  # over the original context
        low, high = self.low_frequency_factor, self.high_frequency_factor
        # 1: a fast plane, unchanged; 0: a slow plane, stretched.
        unchanged = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return frequencies * (unchanged + (1.0 - unchanged) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """Stretches the slow angles, with a ramp over the planes. Source: arXiv 2309.00071."""

    factor: float
    original_positions: int
    fast_turns: float = 32.0        # over the original context: planes as fast are unchanged,
    slow_turns: float = 1.0         # and those as slow are stretched in full
    whole_planes: bool = True       # the ramp begins and ends at a plane, not between two

    def stretch(self, frequencies: Float32[Array, " r/2"], theta: float) -> Float32[Array, " r/2"]:
        rotated = 2 * len(frequencies)

        def plane(turns: float) -> float:
            span = self.original_positions / (turns * 2 * math.pi)
            return rotated * math.log(span) / (2 * math.log(theta))

        first, last = plane(self.fast_turns), plane(self.slow_turns)
        if self.whole_planes:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotated - 1)
        width = last - first or 0.001
        planes = jnp.arange(len(frequencies), dtype=jnp.float32)
        stretched = jnp.clip((planes - first) / width, 0.0, 1.0)
        return frequencies * (stretched / self.factor + 1.0 - stretched)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divided:
    """Stretches each plane by a factor of its own. Source: LongRoPE, arXiv 2402.13753."""

    factors: tuple[float, ...]      # r / 2

    def stretch(self, frequencies: Float32[Array, " r/2"], theta: float) -> Float32[Array, " r/2"]:
        return frequencies / jnp.array(self.factors, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How a layer rotates its queries and keys."""

    theta: float
    scaling: Linear | Llama3 | Yarn | Divided | None = None
    rotated: float = 1.0            # share of a head's entries that are rotated, the first ones
    magnitude: float = 1.0          # of cosines and sines

    def frequencies(self, head_dim: int) -> Float32[Array, " r/2"]:
        """Returns radians per position of the r / 2 rotary planes."""
        rotated = int(head_dim * self.rotated)
        frequencies = self.theta ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
        return (frequencies if self.scaling is None
                else self.scaling.stretch(frequencies, self.theta))

    def angles(self, positions: Int[Array, "B N"], head_dim: int) -> Angles:
        """Returns cosines and sines, to be broadcast over heads."""
        frequencies = self.frequencies(head_dim)
        angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
        cosine, sine = jnp.cos(angles), jnp.sin(angles)
        if self.magnitude == 1.0:
            return cosine, sine
        return cosine * self.magnitude, sine * self.magnitude


def rotate(x: Float[Array, "B N heads h"], angles: Angles | None) -> Float[Array, "B N heads h"]:
    """Rotates x by its position; plane i is the pair (x[i], x[i + r / 2]), as in Hugging Face.

    Args:
        angles: None leaves x as it is."""
    if angles is None:
        return x
    cosine, sine = angles
    rotated = 2 * cosine.shape[-1]
    first, second = jnp.split(x[..., :rotated].astype(jnp.float32), 2, axis=-1)
    parts = [first * cosine - second * sine, second * cosine + first * sine]
    result = jnp.concatenate(parts, axis=-1).astype(x.dtype)
    if rotated == x.shape[-1]:
        return result
    return jnp.concatenate([result, x[..., rotated:]], axis=-1)
