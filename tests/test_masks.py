"""Response masks come from where the response ended."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from effreason.masks import padded_length, response_mask

pytestmark = pytest.mark.usefixtures("strict")
POSITIONS = 12
masks = jax.jit(functools.partial(response_mask, positions=POSITIONS))
EOS = 2


def row(prompt, response, pad):
    """A row as the update packs it: prompt, response, padding."""
    return np.array(prompt + response + [pad] * (POSITIONS - len(prompt) - len(response)))


def mask_of(prompt, response):
    return np.asarray(masks(jnp.array([len(prompt)]), jnp.array([len(response)])))[0]


def test_hand_row():
    np.testing.assert_array_equal(
        response_mask(jnp.array([2, 0, 3]), jnp.array([3, 1, 0]), 6),
        [[0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
    )


@pytest.mark.parametrize("pad", [0, EOS], ids=["pad id of its own", "pad id is eos id"])
def test_final_eos_is_kept_and_padding_dropped(pad):
    tokens, mask = row([5, 6], [7, 8, EOS], pad), mask_of([5, 6], [7, 8, EOS])
    assert tokens[mask].tolist() == [7, 8, EOS]


def test_eos_as_first_token_is_one_response_token():
    assert row([5, 6], [EOS], EOS)[mask_of([5, 6], [EOS])].tolist() == [EOS]


def test_pad_id_inside_prompt_and_response_changes_nothing():
    tokens, mask = row([EOS, 5], [7, 0, 8], 0), mask_of([EOS, 5], [7, 0, 8])
    assert tokens[mask].tolist() == [7, 0, 8]


def test_truncated_response_is_kept_to_its_last_token():
    prompt, response = [5, 6], [7] * (POSITIONS - 2)
    assert row(prompt, response, EOS)[mask_of(prompt, response)].tolist() == response


@hypothesis.given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=4, max_size=4))
def test_each_row_holds_its_response_and_nothing_else(spans):
    mask = np.asarray(masks(*jnp.array(spans, jnp.int32).T))
    for marked, (start, length) in zip(mask, spans, strict=True):
        assert np.flatnonzero(marked).tolist() == list(range(start, start + length))


def test_padded_lengths_are_few_and_waste_at_most_a_third():
    assert sorted({padded_length(length) for length in range(1000)}) == [64, 96, 128, 192, 256, 384, 512, 768, 1024]
    for length in range(64, 5000):
        assert length <= padded_length(length) <= 1.5 * length
    assert padded_length(5, smallest=16) == 16


def test_compiles_once_and_returns_bool():
    compiled = jax.jit(functools.partial(response_mask, positions=POSITIONS))
    for length in range(3):
        mask = compiled(jnp.array([1, 2]), jnp.array([length, length]))
    assert mask.shape == (2, POSITIONS) and mask.dtype == jnp.bool_
    assert compiled._cache_size() == 1
