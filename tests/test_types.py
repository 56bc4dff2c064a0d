"""Response masks come from the lengths of responses."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from effreason.types import padded_length, response_mask

POSITIONS = 12
masks = jax.jit(functools.partial(response_mask, positions=POSITIONS))
EOS = 2


def test_hand_rows():
    np.testing.assert_array_equal(response_mask(jnp.array([3, 1, 0, 9]), 4),
                                  [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("pad", [0, EOS], ids=["pad id of its own", "pad id is eos id"])
@pytest.mark.parametrize("response", [[7, 8, EOS], [EOS], [7, 0, 8], [7] * POSITIONS],
                         ids=["ended", "EOS first", "pad id inside", "cut off"])
def test_padding_is_dropped_and_nothing_else_whatever_it_is(response, pad):
    row = np.array(response + [pad] * (POSITIONS - len(response)))
    assert row[np.asarray(masks(jnp.array([len(response)])))[0]].tolist() == response


@hypothesis.given(st.lists(st.integers(0, POSITIONS), min_size=4, max_size=4))
def test_each_row_holds_its_response_and_nothing_else(lengths):
    for marked, length in zip(np.asarray(masks(jnp.array(lengths, jnp.int32))), lengths,
                              strict=True):
        assert np.flatnonzero(marked).tolist() == list(range(length))


def test_padded_lengths_are_few_and_waste_at_most_a_third():
    assert sorted({padded_length(length) for length in range(1000)}) == [64, 96, 128, 192, 256, 384,
                                                                         512, 768, 1024]
    for length in range(64, 5000):
        assert length <= padded_length(length) <= 1.5 * length
    assert padded_length(5, smallest=16) == 16


def test_compiles_once_and_returns_bool():
    compiled = jax.jit(functools.partial(response_mask, positions=POSITIONS))
    for length in range(3):
        mask = compiled(jnp.array([length, length]))
    assert mask.shape == (2, POSITIONS) and mask.dtype == jnp.bool_
    assert compiled._cache_size() == 1
