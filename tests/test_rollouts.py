"""The sampling engine: against the full forward pass, against itself in other arrangements, and by distribution."""

import functools
import logging
import re

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as some
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import QWEN2, VOCABULARY, mesh, place, weights
from hypothesis import given

from effreason import rollouts
from effreason.lm import model
from effreason.records import Problem, Response
from effreason.runtime import sharding

EOS = (3, 18)
LIMIT = 24
GROUP = 4
ALMOST_ONE = np.float32(1 - 2**-24)          # the largest number that a float32 uniform draw gives
MESHES = {"data": dict(data=8), "all": dict(data=2, fsdp=2, tensor=2)}


def problem(uid, length):
    prompt = np.random.default_rng(uid).integers(0, VOCABULARY, length).astype(np.int32)
    return Problem(uid=uid, prompt=prompt, text="", answer="", level="all")


# Lengths 1 and 2; both sides of the smallest bucket, 16; uids in no order.
PROBLEMS = [problem(uid, length) for uid, length in [(31, 1), (7, 2), (2_000_000_011, 9), (90, 16), (0, 20)]]


@functools.cache
def sampler(shape=(), *, slots=8, chunk=4, **changes):
    sampling = dict(temperature=1.0, top_p=1.0, eos_ids=EOS) | changes
    target = mesh(**dict(shape))
    return target, rollouts.make_sampler(QWEN2, target, rollouts.Sampling(**sampling), slots=slots, chunk=chunk)


def sampled(problems=PROBLEMS, group_size=GROUP, seed=0, max_new_tokens=LIMIT, **settings):
    """{(uid, sample): response}"""
    target, sample = sampler(**settings)
    chunks = sample(place(QWEN2, weights(QWEN2), target), problems, group_size, jax.random.key(seed),
                    max_new_tokens)
    responses = [response for chunk in chunks for response in chunk]
    by_name = {(problems[response.prompt].uid, response.sample): response for response in responses}
    assert len(by_name) == len(responses)
    return by_name


@jax.jit
def full_logits(params, tokens):
    return model.logits(params, model.forward(QWEN2, params, tokens))


def predictions(problem, response):
    """Logits of the full forward pass at each position of a response, float32[T', V]."""
    row = np.concatenate([problem.prompt, response.tokens])
    logits = full_logits(weights(QWEN2), np.pad(row, (0, 96 - len(row)))[None])[0]
    return np.asarray(logits)[len(problem.prompt) - 1 : len(row) - 1]


def log_softmax(logits):
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def assert_logprobs_are_the_forward_pass(responses, problems, temperature=1.0):
    for problem_ in problems:
        for sample in range(GROUP):
            response = responses[problem_.uid, sample]
            expected = log_softmax(predictions(problem_, response) / temperature)
            expected = np.take_along_axis(expected, response.tokens[:, None], axis=-1)[:, 0]
            np.testing.assert_allclose(response.logprobs, expected, atol=2e-5)


def assert_same(found, expected):
    for name, response in found.items():
        np.testing.assert_array_equal(response.tokens, expected[name].tokens, err_msg=str(name))
        np.testing.assert_allclose(response.logprobs, expected[name].logprobs, atol=2e-5)
        assert response.ended == expected[name].ended


@pytest.fixture(scope="module")
def baseline():
    """20 responses through 8 slots: every slot is refilled, at its own time."""
    return sampled()


def test_every_response_comes_once_and_well_formed(baseline):
    assert baseline.keys() == {(problem.uid, sample) for problem in PROBLEMS for sample in range(GROUP)}
    for response in baseline.values():
        assert response.tokens.dtype == np.int32 and response.logprobs.dtype == np.float32
        assert response.tokens.shape == response.logprobs.shape and 1 <= len(response.tokens) <= LIMIT
        is_eos = np.isin(response.tokens, EOS)
        assert not is_eos[:-1].any()                            # stops at the first EOS, whichever it is
        assert response.ended == is_eos[-1]
        assert response.ended or len(response.tokens) == LIMIT
    # The cases this batch is to hold: both EOS ids, and a response cut at the limit.
    assert {response.tokens[-1] for response in baseline.values() if response.ended} == set(EOS)
    assert not all(response.ended for response in baseline.values())


def test_recorded_logprobs_are_those_of_the_full_forward_pass(baseline):
    assert_logprobs_are_the_forward_pass(baseline, PROBLEMS)


def test_a_cache_that_grows_past_its_bucket_loses_nothing():
    # The prompt of 20 starts in a cache of 64; with 60 tokens more it needs the next bucket, 96. No EOS: all are cut.
    responses = sampled(problems=PROBLEMS[3:], eos_ids=(), max_new_tokens=60, chunk=16)
    assert all(len(response.tokens) == 60 and not response.ended for response in responses.values())
    assert_logprobs_are_the_forward_pass(responses, PROBLEMS[3:])


def test_a_temperature_near_zero_takes_the_most_likely_token():
    responses = sampled(temperature=1e-4)
    for problem_ in PROBLEMS:
        for sample in range(GROUP):
            response = responses[problem_.uid, sample]
            np.testing.assert_array_equal(response.tokens, predictions(problem_, response).argmax(axis=-1))


def test_tokens_come_from_the_nucleus_and_their_logprobs_from_the_whole_distribution():
    responses = sampled(temperature=0.7, top_p=0.8)
    assert_logprobs_are_the_forward_pass(responses, PROBLEMS, temperature=0.7)
    for problem_ in PROBLEMS:
        response = responses[problem_.uid, 0]
        kept = rollouts.nucleus(jnp.asarray(predictions(problem_, response)) / 0.7, 0.8)
        assert np.isfinite(np.take_along_axis(np.asarray(kept), response.tokens[:, None], axis=-1)).all()


def test_a_shorter_limit_cuts_the_same_responses_and_compiles_nothing(baseline, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        cut = sampled(max_new_tokens=5)
    assert "jit(decode_chunk)" not in caplog.text
    for name, response in cut.items():
        np.testing.assert_array_equal(response.tokens, baseline[name].tokens[:5])
        assert response.ended == (baseline[name].ended and len(baseline[name].tokens) <= 5)


@pytest.mark.parametrize("arrangement", [dict(slots=2), dict(slots=64), dict(chunk=7)], ids=str)
def test_a_response_does_not_depend_on_slots_or_chunk(baseline, arrangement):
    assert_same(sampled(**arrangement), baseline)


def test_a_response_does_not_depend_on_the_other_prompts_or_the_group_size(baseline):
    assert_same(sampled(problems=PROBLEMS[::-1]), baseline)
    assert_same(sampled(problems=PROBLEMS[1:4], group_size=3), baseline)


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
def test_eight_devices_sample_what_one_does(baseline, shape):
    assert_same(sampled(shape=tuple(shape.items())), baseline)


def test_samples_of_a_prompt_and_steps_differ(baseline):
    first, second = baseline[0, 0].tokens, baseline[0, 1].tokens
    assert len(first) != len(second) or (first != second).any()
    other_step = sampled(seed=1)
    assert any(len(other_step[name].tokens) != len(baseline[name].tokens) for name in baseline)


@pytest.mark.parametrize("limit", [1, LIMIT])
def test_eos_as_the_first_token_is_a_response_of_length_one(limit):
    # At a limit of 1 the last token allowed is EOS: ended, not cut.
    responses = sampled(eos_ids=tuple(range(VOCABULARY)), max_new_tokens=limit)
    assert all(len(response.tokens) == 1 and response.ended for response in responses.values())


def test_an_iterator_yields_after_every_chunk_and_may_be_dropped():
    target, sample = sampler()
    before = jax.sharding.get_abstract_mesh()
    chunks = sample(place(QWEN2, weights(QWEN2), target), PROBLEMS[:1], GROUP, jax.random.key(0), LIMIT)
    first = next(chunks)
    assert all(isinstance(response, Response) for response in first)
    assert jax.sharding.get_abstract_mesh() == before           # what the consumer runs meanwhile sees its own mesh
    chunks.close()
    assert jax.sharding.get_abstract_mesh() == before


@pytest.mark.parametrize("shape", [{}, MESHES["all"]], ids=["one device", "eight devices"])
def test_host_and_device_meet_only_where_they_say_so(shape):
    target, sample = sampler(tuple(shape.items()))
    params, key = place(QWEN2, weights(QWEN2), target), jax.device_put(jax.random.key(0), sharding.sharding(target))
    with jax.transfer_guard("disallow"):
        assert sum(len(chunk) for chunk in sample(params, PROBLEMS, GROUP, key, LIMIT)) == GROUP * len(PROBLEMS)


def test_ragged_batches_share_compiled_functions(caplog):
    sampler.cache_clear()
    slots = 8
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for seed in range(3):
            lengths = np.random.default_rng(seed).permutation([3, 5, 9, 12, 16])
            sampled([problem(seed * 10 + row, length) for row, length in enumerate(lengths)], seed=seed, slots=slots)
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
    assert compiled.count("decode_chunk") == 1
    # The number of prompts read at once is rounded up to 4 or 16. `insert` may have been compiled by another sampler.
    assert 1 <= compiled.count("prefill") <= 2
    assert compiled.count("insert") <= 2


# draw and nucleus


def test_draw_follows_the_softmax():
    logits = jnp.array([1.0, -jnp.inf, 0.0, 2.0, -3.0, 1.5, -jnp.inf, 0.5])
    rows = 20_000
    keys = jax.random.split(jax.random.key(0), rows)
    tokens = jax.jit(rollouts.draw)(jnp.broadcast_to(logits, (rows, 8)), keys)
    expected = np.exp(log_softmax(np.asarray(logits)))
    counts = np.bincount(tokens, minlength=8)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = np.sum((counts - rows * expected)[possible] ** 2 / (rows * expected[possible]))
    assert chi_square < 20.5                                    # 5 degrees of freedom: 1 in 1,000


@functools.cache
def drawn_at():
    """draw with the uniform number given instead of drawn."""
    def at(logits, uniform):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.random, "uniform", lambda key: uniform[0])
            return rollouts.draw(logits, jax.random.split(jax.random.key(0), len(logits)))

    return jax.jit(at)


@given(arrays.arrays(np.float32, 37, elements=some.one_of(
           some.just(np.float32(-np.inf)), some.floats(-100, 100, width=32))).filter(lambda row: row.max() > -np.inf),
       some.one_of(some.just(np.float32(0)), some.just(ALMOST_ONE), some.floats(0, float(ALMOST_ONE), width=32)))
def test_draw_never_takes_what_is_impossible(row, uniform):
    tokens = drawn_at()(row[None], np.full(1, uniform, np.float32))
    assert 0 <= tokens[0] < len(row) and row[tokens[0]] > -np.inf


def test_draw_never_takes_what_is_impossible_in_a_large_vocabulary():
    # Sums of thousands of float32 are rounded: a draw close to 1 must still find an entry that can be drawn.
    generator = np.random.default_rng(0)
    for _ in range(20):
        row = generator.standard_normal(5_000).astype(np.float32)
        row[generator.random(5_000) < 0.5] = -np.inf
        row[-1_000:] = -np.inf
        for uniform in (0.0, 0.25, 0.5, 1 - 2**-20, ALMOST_ONE):
            tokens = drawn_at()(row[None], np.full(1, uniform, np.float32))
            assert tokens[0] < 5_000 and row[tokens[0]] > -np.inf


@pytest.mark.parametrize(("top_p", "kept"), [
    (1.0, [0, 1, 2, 3]), (0.97, [0, 1, 2, 3]), (0.9, [0, 1, 2]), (0.79, [0, 1]), (0.6, [0, 1]), (0.45, [1]),
    (1e-6, [1]),
])
def test_nucleus_keeps_the_smallest_set_that_reaches_top_p(top_p, kept):
    logits = jnp.log(jnp.array([[0.3, 0.5, 0.15, 0.05]])) + 7.0
    expected = np.where(np.isin(np.arange(4), kept), logits[0], -np.inf)
    np.testing.assert_array_equal(rollouts.nucleus(logits, top_p)[0], expected)


@given(arrays.arrays(np.float32, (3, 11), elements=some.floats(-20, 20, width=32)), some.floats(0.01, 0.999))
def test_nucleus_reaches_top_p_and_would_not_without_its_least(logits, top_p):
    kept = np.isfinite(np.asarray(rollouts.nucleus(jnp.asarray(logits), top_p)))
    probabilities = np.exp(log_softmax(logits))
    for row in range(3):
        inside = probabilities[row][kept[row]]
        assert inside.size and inside.min() >= probabilities[row][~kept[row]].max(initial=0.0) - 1e-7
        assert inside.sum() >= top_p - 1e-5
        least = inside[inside <= inside.min() * (1 + 1e-6)]         # ties with the least come in together
        assert inside.sum() - least.sum() < top_p + 1e-5


# collect


def response(prompt, sample, length, ended=True):
    tokens = np.arange(1, length + 1, dtype=np.int32) + 10 * prompt + 5 * sample
    return Response(prompt=prompt, sample=sample, tokens=tokens, logprobs=-tokens.astype(np.float32), ended=ended)


def test_collect_puts_each_response_in_its_place():
    responses = [response(1, 0, 3), response(0, 1, 1), response(1, 1, 2, ended=False), response(0, 0, 2)]
    found = rollouts.collect([problem(1, 2), problem(2, 4)], responses, 2)
    np.testing.assert_array_equal(found.prompt_lengths, [2, 4])
    np.testing.assert_array_equal(found.prompts[0], [*problem(1, 2).prompt, 0, 0])
    np.testing.assert_array_equal(found.lengths, [[2, 1], [3, 2]])
    np.testing.assert_array_equal(found.ended, [[True, True], [True, False]])
    np.testing.assert_array_equal(found.tokens, [[[1, 2, 0], [6, 0, 0]], [[11, 12, 13], [16, 17, 0]]])
    np.testing.assert_array_equal(found.logprobs, -found.tokens)


@pytest.mark.parametrize("broken", [lambda all: all[:-1], lambda all: [*all, all[0]], lambda all: [all[0], *all[:-1]]],
                         ids=["missing", "one too many", "twice instead of another"])
def test_collect_complains_about_an_incomplete_step(broken):
    responses = [response(prompt, sample, 2) for prompt in range(2) for sample in range(2)]
    with pytest.raises(ValueError, match="2 x 2 responses"):
        rollouts.collect([problem(1, 2), problem(2, 4)], broken(responses), 2)
