"""The draw: by distribution, against float64, against transformers' filters, and on a mesh."""

import dataclasses
import functools
import re

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as some
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from decoders import mesh
from hypothesis import given
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from effreason.runtime.errors import UserError
from effreason.sampling import draws
from effreason.sampling.draws import SamplingParams

ALMOST_ONE = np.float32(1 - 2**-24)         # the largest number below 1
# 37 in one block; 5003, a prime, filled up; the others in blocks that fit
VOCABULARIES = [1, 24, 37, 5003, 32000]


def sampling(temperature=1.0, **filters):
    return SamplingParams(temperature=temperature, eos_ids=(), **filters)


jitted = functools.cache(lambda setting: jax.jit(functools.partial(draws.draw, sampling=setting)))


def drawn(logits, setting, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(logits))
    return jax.tree.map(np.asarray, jitted(setting)(jnp.asarray(logits), keys))


def uneven(rows, vocabulary, seed=0):
    return 3 * np.random.default_rng(seed).standard_normal((rows, vocabulary)).astype(np.float32)


def log_softmax(logits):
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def filtered(logits, setting):
    """Logits over the temperature, -inf where a filter takes a token out; float64, by sorting."""
    scaled = logits.astype(np.float64) / setting.temperature
    if setting.top_k is not None:
        least = np.sort(scaled, axis=-1)[:, -min(setting.top_k, scaled.shape[-1]), None]
        scaled = np.where(scaled >= least, scaled, -np.inf)
    if setting.top_p < 1:
        descending = -np.sort(-scaled, axis=-1)
        probabilities = np.exp(log_softmax(descending))
        above = np.cumsum(probabilities, axis=-1) - probabilities
        count = np.sum(above < setting.top_p, axis=-1, keepdims=True)
        scaled = np.where(scaled >= np.take_along_axis(descending, count - 1, axis=-1), scaled,
                          -np.inf)
    relative = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.where(relative >= setting.min_p, scaled, -np.inf)


@functools.cache
def threshold(setting):
    """The least logit that the filters leave in, of float32[S, V]."""
    @jax.jit
    def least(logits):
        blocks = draws._blocks(logits)
        return draws.filter_threshold(blocks, jnp.max(blocks, axis=(1, 2)), setting)

    return least


def kept(logits, setting):
    """What the filters leave in, bool[S, V]."""
    return logits >= np.asarray(threshold(setting)(logits))[:, None]


# the distribution


@pytest.mark.parametrize("setting", [sampling(), sampling(0.5), sampling(2.0, top_k=20),
                                     sampling(top_p=0.9), sampling(top_p=0.8, top_k=15, min_p=0.1)],
                         ids=str)
def test_tokens_follow_the_distribution(setting):
    row = uneven(1, 300)
    row[:, ::10] = -np.inf
    row[:, 100:160] = -np.inf  # several blocks in which nothing is possible
    rows = 40_000
    tokens = drawn(np.broadcast_to(row, (rows, 300)), setting).tokens
    expected = rows * np.exp(log_softmax(filtered(row, setting)))[0]
    counts = np.bincount(tokens, minlength=300)
    assert counts[expected == 0].sum() == 0
    # Tokens too rare for the approximation count as one.
    often = expected >= 5
    found = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum())
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    chi_square = np.sum((found - wanted) ** 2 / wanted)
    assert chi_square < scipy.stats.chi2.ppf(0.999, len(wanted) - 1)


def test_rows_are_drawn_independently_of_one_another():
    logits = uneven(16, 5003)
    keys = jax.random.split(jax.random.key(3), 16)
    together = jitted(sampling())(logits, keys).tokens
    for row in (0, 7, 15):
        assert jitted(sampling())(logits[row : row + 1],
                                  keys[row : row + 1]).tokens[0] == together[row]
    assert (jitted(sampling())(logits, keys[::-1]).tokens != together).any()


@functools.cache
def drawn_at(setting):
    """draw with the two uniform numbers given instead of drawn; one row."""
    def at(logits, uniform):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.random, "uniform", lambda key, shape: uniform)
            return draws.draw(logits, jax.random.split(jax.random.key(0), 1), setting)

    return jax.jit(at)


UNIFORM = some.one_of(some.just(np.float32(0)), some.just(ALMOST_ONE),
                      some.floats(0, float(ALMOST_ONE), width=32))
ENTRIES = some.one_of(some.just(np.float32(-np.inf)), some.floats(-200, 200, width=32))
ROWS = arrays.arrays(np.float32, 48, elements=ENTRIES).filter(lambda row: row.max() > -np.inf)
SETTINGS = [sampling(), sampling(0.1), sampling(0.7, top_k=3), sampling(top_p=0.5),
            sampling(1.5, min_p=0.3)]


@given(ROWS, UNIFORM, UNIFORM, some.sampled_from(SETTINGS))
def test_the_draw_never_takes_what_is_impossible(row, first, second, setting):
    found = drawn_at(setting)(row[None], np.array([first, second]))
    token = int(found.tokens[0])
    assert 0 <= token < len(row) and row[token] > -np.inf
    # At the threshold itself float32 and float64 may differ about a token, or about very many of no
    # weight together.
    inside = filtered(row[None], dataclasses.replace(setting, top_p=min(1.0, setting.top_p + 1e-5),
                                                     min_p=setting.min_p * 0.999))[0]
    assert inside[token] > -np.inf
    assert np.isfinite(found.logprobs[0]) and np.isfinite(found.sampling_logprobs[0])


def test_a_long_sum_that_rises_where_nothing_is_added_finds_no_entry_there():
    generator = np.random.default_rng(0)
    # 1187 tokens: a block of 151,936 in 128
    weights = generator.random((1_000, 1187)).astype(np.float32) ** 8
    weights[generator.random(weights.shape) < 0.5] = 0
    weights[:, 0] = 1
    reached = np.asarray(jax.jit(lambda weights: jnp.cumsum(weights, axis=-1))(weights))
    row, place = np.nonzero((np.diff(reached, axis=-1) > 0) & (weights[:, 1:] == 0))
    middle = (reached[row, place].astype(np.float64) + reached[row, place + 1]) / 2
    found = jax.jit(draws._invert)(weights[row], (middle
                                                  / reached[row].max(axis=-1)).astype(np.float32))
    assert (weights[row, found] > 0).all()


def test_the_draw_never_takes_what_is_impossible_in_a_large_vocabulary():
    # Sums of thousands of float32 are rounded: a draw close to 1 must still find an entry that can
    # be drawn.
    generator = np.random.default_rng(0)
    edges = [0.0, 2**-24, 0.25, 0.5, 1 - 2**-20, ALMOST_ONE]
    for round_ in range(6):
        row = generator.standard_normal(32_000).astype(np.float32) * 10 ** (round_ - 2)
        row[generator.random(32_000) < 0.5] = -np.inf
        row[-1_000:] = -np.inf
        for first in edges:
            for second in edges:
                token = drawn_at(sampling())(row[None],
                                             np.array([first, second], np.float32)).tokens[0]
                assert 0 <= token < 32_000 and row[token] > -np.inf


def test_every_token_of_an_unlikely_block_can_be_drawn():
    # 250 tokens of probability 1e-9 each: together they are a block that one number can hit, but
    # not tell apart.
    row = np.full((1, 32_000), -np.inf, np.float32)
    row[0, 0], row[0, -250:] = 0.0, np.log(1e-9)
    tokens = {int(drawn_at(sampling())(row, np.array([ALMOST_ONE, (at + 0.5) / 250],
                                                     np.float32)).tokens[0]) for at in range(250)}
    assert tokens == set(range(31_750, 32_000))


def test_a_random_number_of_0_takes_no_token_that_is_all_but_impossible():
    row = np.full((1, 1024), np.log(1e-12), np.float32)
    row[0, [500, 501, 900]] = 0.0
    # The first block and the first token of a block have a share of 1e-12.
    for second, token in ((0.0, 500), (0.75, 501), (ALMOST_ONE, 501)):
        assert drawn_at(sampling())(row, np.array([0.0, second], np.float32)).tokens[0] == token
    # All other random numbers are what they were: the least of them is 2**-23.
    row[0, 0], row[0, 500:502] = np.log(3 * 2**-23), -np.inf
    for first, block in ((0.0, 0), (2**-23, 0), (2**-22, 0), (2**-21, 28)):
        found = drawn_at(sampling())(row, np.array([first, 0.5], np.float32)).tokens[0]
        assert found // 32 == block


def test_a_block_whose_probabilities_are_all_rounded_to_0_is_never_drawn():
    row = np.full((1, 1024), -150.0, np.float32)
    row[0, 700] = 0.0
    for uniform in (0.0, 0.5, ALMOST_ONE):
        found = drawn_at(sampling())(row, np.array([uniform, 0.5], np.float32))
        assert 672 <= found.tokens[0] < 704                     # in the block of token 700


@pytest.mark.parametrize("setting", [sampling(), sampling(0.0), sampling(top_p=0.9)], ids=str)
@pytest.mark.parametrize("fill", [-np.inf, np.nan])
def test_a_row_without_a_distribution_spoils_no_other_row(setting, fill):
    logits = uneven(3, 300)
    expected = drawn(logits, setting)
    logits[1] = fill
    found = drawn(logits, setting)
    assert 0 <= found.tokens[1] < 300 and not np.isfinite(found.model_logprobs[1])
    np.testing.assert_array_equal(found.tokens[[0, 2]], expected.tokens[[0, 2]])
    np.testing.assert_array_equal(found.logprobs[[0, 2]], expected.logprobs[[0, 2]])


# the log-probs


@pytest.mark.parametrize("setting", [sampling(), sampling(0.6), sampling(top_k=7),
                                     sampling(1.7, top_p=0.8),
                                     sampling(0.7, top_p=0.9, min_p=0.01),], ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_logprobs_of_the_three_kinds_are_those_of_float64(vocabulary, setting):
    logits = uneven(8, vocabulary, seed=vocabulary) + 20
    found = drawn(logits, setting)
    assert found.tokens.dtype == np.int32 and found.tokens.shape == (8,)
    assert {found.logprobs.dtype, found.sampling_logprobs.dtype,
            found.model_logprobs.dtype} == {np.dtype(np.float32)}
    for name, expected in [("model_logprobs", logits), ("logprobs",
                                                        logits.astype(np.float64)
                                                        / setting.temperature),
                           ("sampling_logprobs", filtered(logits, setting))]:
        expected = np.take_along_axis(log_softmax(expected), found.tokens[:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(getattr(found, name), expected, atol=3e-6, rtol=1e-6,
                                   err_msg=name)


# greedy


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_temperature_0_takes_the_most_likely_token(vocabulary):
    logits = uneven(8, vocabulary)
    found = drawn(logits, sampling(0.0, top_k=2, top_p=0.3, min_p=0.5))
    np.testing.assert_array_equal(found.tokens, logits.argmax(axis=-1))
    np.testing.assert_array_equal(found.sampling_logprobs, 0)
    np.testing.assert_array_equal(found.logprobs, found.model_logprobs)
    np.testing.assert_allclose(found.model_logprobs, log_softmax(logits).max(axis=-1), atol=3e-6)


def test_the_first_of_ties_is_the_most_likely_token():
    logits = np.zeros((3, 1024), np.float32)
    logits[1, [40, 41, 900]] = 1.0
    logits[2, [1023, 512]] = 1.0
    np.testing.assert_array_equal(drawn(logits, sampling(0.0)).tokens, [0, 40, 512])


# the filters


TIED = some.one_of(some.sampled_from([0.0, -0.0, 1.0, -1.0, -np.inf]).map(np.float32),
                   some.floats(-100, 100, width=32, allow_subnormal=False))


@given(arrays.arrays(np.float32, (3, 24), elements=TIED).filter(
           lambda logits: (logits.max(axis=-1) > -np.inf).all()),
       some.sampled_from([1, 2, 5, 23]))
def test_top_k_keeps_the_k_most_likely_and_their_ties(logits, top_k):
    least = np.sort(logits, axis=-1)[:, -top_k, None]
    np.testing.assert_array_equal(kept(logits, sampling(top_k=top_k)), logits >= least)


@pytest.mark.parametrize(("top_p", "expected"), [
    (0.97, [0, 1, 2, 3]), (0.9, [0, 1, 2]), (0.79, [0, 1]), (0.6, [0, 1]), (0.45, [1]), (1e-6, [1]),
])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, expected):
    logits = np.log(np.array([[0.3, 0.5, 0.15, 0.05]], np.float32)) + np.float32(7)
    np.testing.assert_array_equal(np.flatnonzero(kept(logits, sampling(top_p=top_p))), expected)


@given(arrays.arrays(np.float32, (3, 24), elements=some.floats(-20, 20, width=32,
                                                               allow_subnormal=False)),
       some.sampled_from([0.01, 0.3, 0.5, 0.9, 0.999]))
def test_top_p_reaches_it_and_would_not_without_its_least(logits, top_p):
    inside = kept(logits, sampling(top_p=top_p))
    probabilities = np.exp(log_softmax(logits))
    for row in range(3):
        chosen = probabilities[row][inside[row]]
        assert chosen.size and chosen.min() >= probabilities[row][~inside[row]].max(initial=0.0)
        # Ties come together; close logits can have equal probabilities in float32.
        assert logits[row][inside[row]].min() > logits[row][~inside[row]].max(initial=-np.inf)
        assert chosen.sum() >= top_p - 1e-5
        assert chosen[logits[row][inside[row]]
                      > logits[row][inside[row]].min()].sum() < top_p + 1e-5


def test_top_p_is_of_what_top_k_left():
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    # Of the whole, 0.6 takes two tokens; of the first two alone, renormalised to 4/7 and 3/7, 0.55
    # takes one.
    assert kept(logits, sampling(top_p=0.6)).sum() == 2
    assert kept(logits, sampling(top_p=0.55)).sum() == 2
    assert kept(logits, sampling(top_p=0.55, top_k=2)).sum() == 1


def test_min_p_is_relative_to_the_most_likely_at_the_temperature():
    logits = np.log(np.array([[0.5, 0.2, 0.2, 0.06, 0.04]], np.float32))
    assert kept(logits, sampling(min_p=0.1)).sum() == 4
    # squares: 1, 0.16, 0.16, 0.0144, 0.0064
    assert kept(logits, sampling(0.5, min_p=0.1)).sum() == 3
    assert kept(logits, sampling(min_p=1.0)).sum() == 1


@pytest.mark.parametrize("vocabulary", [24, 37, 5003, 32000])
@pytest.mark.parametrize("setting", [sampling(0.8, top_k=20), sampling(1.3, top_p=0.7),
                                     sampling(0.7, top_k=15, top_p=0.9, min_p=0.02)], ids=str)
def test_filters_keep_what_sorting_keeps(vocabulary, setting):
    logits = uneven(8, vocabulary, seed=1)
    np.testing.assert_array_equal(kept(logits, setting), filtered(logits, setting) > -np.inf)


def test_filters_that_are_off_cost_nothing():
    compiled = str(jax.make_jaxpr(functools.partial(draws.draw, sampling=sampling(top_k=32_000)))(
        jnp.zeros((2, 32_000)), jax.random.split(jax.random.key(0), 2)))
    assert not re.search(r"\b(while|scan|sort)\[", compiled)
    assert compiled.count(" exp ") == 2  # over the vocabulary, and over one block


@pytest.mark.parity
@pytest.mark.parametrize("setting", [
    sampling(0.6), sampling(top_k=20), sampling(top_p=0.8), sampling(min_p=0.05),
    sampling(1.5, top_k=50, top_p=0.95, min_p=0.01)], ids=str)
def test_filters_are_those_of_transformers(setting):
    torch = pytest.importorskip("torch")
    processing = pytest.importorskip("transformers.generation.logits_process")
    logits = uneven(16, 5003, seed=2)
    scores = torch.tensor(logits)
    for warper in [processing.TemperatureLogitsWarper(setting.temperature),
                   processing.TopKLogitsWarper(setting.top_k or 5003),
                   processing.TopPLogitsWarper(setting.top_p),
                   processing.MinPLogitsWarper(setting.min_p)]:
        scores = warper(None, scores)
    theirs = torch.log_softmax(scores, dim=-1).numpy()
    if setting != sampling(setting.temperature):
        np.testing.assert_array_equal(kept(logits, setting), theirs > -np.inf)
    found = drawn(logits, setting)
    expected = np.take_along_axis(theirs, found.tokens[:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(found.sampling_logprobs, expected, atol=1e-5)


# on a mesh


@pytest.mark.parametrize("vocabulary", [24, 32000])
@pytest.mark.parametrize("setting", [sampling(), sampling(0.0), sampling(0.7, top_k=50, top_p=0.9)],
                         ids=str)
@pytest.mark.parametrize("shape", [dict(data=2, fsdp=2, tensor=2), dict(tensor=8)], ids=str)
def test_a_vocabulary_split_over_devices_gives_the_same_tokens(shape, setting, vocabulary):
    target = mesh(**shape)
    rows = NamedSharding(target, P(("data", "fsdp")))
    split = NamedSharding(target, P(("data", "fsdp"), "tensor"))
    logits, keys = uneven(16, vocabulary), jax.random.split(jax.random.key(0), 16)
    step = jax.jit(functools.partial(draws.draw, sampling=setting), in_shardings=(split, rows),
                   out_shardings=rows)
    found = step(logits, keys)
    expected = drawn(logits, setting)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    for name in ("logprobs", "sampling_logprobs", "model_logprobs"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=3e-6)
    # Between devices go the sums of the blocks, [S, 128], and the tokens of one block, [S, 250]:
    # never all logits.
    sizes = re.findall(r"\w+\[\d+,([\d,]+)\]\S* (?:all-gather|all-to-all|collective-permute)\(",
                       step.lower(logits, keys).compile().as_text())
    assert sizes and all(np.prod([int(size) for size in found.split(",")]) <= 128
                         for found in sizes)


# settings


@pytest.mark.parametrize(("changes", "message"), [
    (dict(temperature=-1.0), "temperature: .* found -1.0"),
    (dict(temperature=np.nan), "temperature: .* found nan"),
    (dict(temperature=np.inf), "temperature: .* found inf"),
    (dict(top_p=0.0), "top_p: .* found 0.0"), (dict(top_p=1.1), "top_p: .* found 1.1"),
    (dict(top_k=0), "top_k: .* found 0"), (dict(min_p=-0.1), "min_p: .* found -0.1"),
    (dict(min_p=2.0), "min_p: .* found 2.0"),
])
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        sampling(**changes)
