"""Rotary positions: hand numbers, and what rotation must leave as it is."""

import jax.numpy as jnp
import numpy as np
import pytest

from effreason.lm.rope import Divided, Linear, Llama3, Rope, Yarn, rotate

POSITIONS = np.array([[0, 1, 5, 40]], np.int32)
X = np.random.default_rng(0).standard_normal((1, 4, 2, 8)).astype(np.float32)
Y = np.random.default_rng(1).standard_normal((1, 4, 2, 8)).astype(np.float32)
SCALINGS = [None, Linear(factor=4.0), Yarn(factor=4.0, original_positions=16),
            Divided(factors=(1.0, 2.0, 3.0, 4.0)),
            Llama3(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0,
                   original_positions=16)]


def test_angles_by_hand():
    rope = Rope(theta=100.0)
    np.testing.assert_allclose(rope.frequencies(4), [1.0, 0.1])
    cosine, sine = rope.angles(POSITIONS, 4)
    np.testing.assert_allclose(cosine[0, :, 0], np.cos([[0, 0], [1, 0.1], [5, 0.5], [40, 4]]),
                               atol=1e-5)
    # Planes are (0, 2) and (1, 3); position 1.
    rotated = rotate(jnp.array([[[[1.0, 0.0, 0.0, 2.0]]]]), rope.angles(np.array([[1]]), 4))
    np.testing.assert_allclose(rotated[0, 0, 0], [np.cos(1), -2 * np.sin(0.1), np.sin(1),
                                                  2 * np.cos(0.1)], rtol=1e-6)


def test_scalings_by_hand():
    plain = np.array(Rope(theta=10_000.0).frequencies(8))
    np.testing.assert_allclose(Rope(theta=10_000.0, scaling=Linear(factor=4.0)).frequencies(8),
                               plain / 4)
    np.testing.assert_allclose(
        Rope(theta=10_000.0, scaling=Divided(factors=(1.0, 2.0, 3.0, 4.0))).frequencies(8),
        plain / [1, 2, 3, 4], rtol=1e-6)
    # 32 turns over 2,048 positions are 0.098 radians a position, between the first two planes of
    # 1, 0.1, 0.01, 0.001; one turn is 0.003, between the last two. The ramp goes from plane 1 to 3.
    yarn = Rope(theta=10_000.0, scaling=Yarn(factor=4.0, original_positions=2048)).frequencies(8)
    np.testing.assert_allclose(yarn, plain * [1, 1, (1 + 1 / 4) / 2, 1 / 4], rtol=1e-6)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: type(scaling).__name__)
def test_scores_depend_on_the_distance_alone(scaling):
    rope = Rope(theta=10_000.0, scaling=scaling)

    def scores(shift):
        query, key = (rotate(jnp.asarray(x), rope.angles(POSITIONS + shift, 8)) for x in (X, Y))
        return np.einsum("bqhd,bkhd->bhqk", query, key)

    np.testing.assert_allclose(scores(0), scores(1000), rtol=1e-3, atol=1e-3)
    assert np.abs(scores(0) - np.einsum("bqhd,bkhd->bhqk", X, Y)).max() > 0.1


def test_a_part_of_a_head_may_know_no_positions():
    rope = Rope(theta=10_000.0, rotated=0.5)
    rotated = np.asarray(rotate(jnp.asarray(X), rope.angles(POSITIONS, 8)))
    np.testing.assert_array_equal(rotated[..., 4:], X[..., 4:])
    whole = rotate(jnp.asarray(X[..., :4]), Rope(theta=10_000.0).angles(POSITIONS, 4))
    np.testing.assert_array_equal(rotated[..., :4], whole)
    np.testing.assert_array_equal(rotate(jnp.asarray(X), None), X)


def test_magnitude_is_of_queries_and_keys():
    one, two = (rotate(jnp.asarray(X), Rope(theta=50.0, magnitude=magnitude).angles(POSITIONS, 8))
                for magnitude in (1.0, 1.5))
    np.testing.assert_allclose(two, 1.5 * one, rtol=1e-5, atol=1e-6)
