"""Sampling from a model whose layers keep a state: slots, refills and what is prefilled again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import QWEN3_5, weights
from generations import (
    ANY,
    ENDLESS,
    GROUP,
    LIMIT,
    MESHES,
    PROBLEMS,
    assert_same,
    completed,
    long_and_short,
    requests_for,
)

from effreason.lm import model
from effreason.runtime.errors import UserError

# What a query reads from a state may be next to nothing; the norm after it enlarges the rounding.
ATOL = 2e-4


@functools.cache
def one_by_one(is_long):
    """Each response in a slot of its own, from its start to its end."""
    requests = long_and_short() if is_long else requests_for(PROBLEMS, GROUP, LIMIT)
    return completed(QWEN3_5, requests, sampling=ENDLESS if is_long else ANY, slots=32, chunk=64,
                     min_positions=256)[0]


def test_the_sampler_gives_the_log_probs_of_the_trainer():
    prompts = {problem.uid: problem.prompt for problem in PROBLEMS}
    params = jax.tree.map(jnp.asarray, weights(QWEN3_5))
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model.logits(
        params, model.forward(QWEN3_5, params, tokens))))
    for (uid, _), response in one_by_one(True).items():
        tokens = np.concatenate([prompts[uid], response.tokens])
        padded = np.pad(tokens, (0, 192 - len(tokens)))[None]
        logprobs = forward(padded)[0, len(prompts[uid]) - 1 : len(tokens) - 1]
        wanted = np.take_along_axis(np.asarray(logprobs), response.tokens[:, None], 1)[:, 0]
        np.testing.assert_allclose(response.model_logprobs, wanted, atol=ATOL)


@pytest.mark.parametrize("shape", [MESHES["all"], MESHES["context"]], ids=str)
def test_slots_that_are_refilled_begin_with_their_prompt(shape):
    found, _ = completed(QWEN3_5, requests_for(PROBLEMS, GROUP, LIMIT), shape=tuple(shape.items()))
    assert_same(found, one_by_one(False), ATOL)


def test_responses_that_are_given_up_and_prefilled_again_go_on():
    """Limits of 2 to 150 tokens, and memory for few long ones."""
    held = model.positions_held(QWEN3_5, 192)
    found, _ = completed(QWEN3_5, long_and_short(), sampling=ENDLESS, slots=16, max_positions=170,
                         budget=2 * held)
    assert_same(found, one_by_one(True), ATOL)


def test_memory_is_counted_as_it_is():
    for positions in (8, 64):
        leaves = jax.tree.leaves(model.empty_cache(QWEN3_5, 1, positions))
        assert model.cache_bytes(QWEN3_5, positions) == sum(leaf.nbytes for leaf in leaves)
    # One of the three layers attends, with 2 heads of 8 for keys and values; two keep 4 states of
    # 6 x 5 and three inputs of 2 x 6 queries and keys and 4 x 5 values.
    assert model.position_bytes(QWEN3_5) == 4 * 2 * 2 * 8
    assert model.cache_bytes(QWEN3_5, 64) == 64 * 128 + 2 * 4 * (120 + 3 * 44)
    assert model.positions_held(QWEN3_5, 64) == 64 + -(-2 * 4 * 252 // 128)
    assert model.cache_lengths(QWEN3_5, 64) == [0, 64, 0]


def test_idle_slots_stay_finite():
    """A row that has ended goes on until the chunk does; its state must not grow."""
    config = QWEN3_5
    params = jax.tree.map(jnp.asarray, model.unstack(config, weights(config)))
    step = jax.jit(lambda tokens, start, cache: model.decode(config, params, tokens, start, cache))
    cache = model.empty_cache(config, 1, 16)
    for _ in range(300):
        _, cache = step(np.array([[5]], np.int32), np.array([15], np.int32), cache)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(cache))


def test_drafts_are_refused():
    with pytest.raises(UserError, match="draft_tokens must be 0 for a model whose layers keep"):
        completed(QWEN3_5, requests_for(PROBLEMS, 1, 1), draft_tokens=4)
