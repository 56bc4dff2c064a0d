"""Log-probs of targets tile by tile: against the whole table, on every mesh, and flat in the
vocabulary."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import mesh

from effreason.lm import logprobs
from effreason.lm.logprobs import token_logprobs
from effreason.runtime import sharding

TEMPERATURE, VOCABULARY = 0.7, 40


def inputs(vocabulary=VOCABULARY, rows=8, length=16, width=16):
    generator = np.random.default_rng(3)
    return (generator.standard_normal((rows, length, width), dtype=np.float32),
            generator.standard_normal((vocabulary, width), dtype=np.float32),
            generator.integers(0, vocabulary, (rows, length)).astype(np.int32),
            generator.standard_normal((rows, length), dtype=np.float32))


def naive(hidden, head, targets):
    table = jax.nn.log_softmax(jnp.einsum("bnd,vd->bnv", hidden, head) / TEMPERATURE, axis=-1)
    chosen = jnp.take_along_axis(table, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(table) * table, axis=-1)


def both(score, hidden, head, targets, pull):
    """Log-probs, entropies, and the gradients of a weighted sum of the log-probs."""
    def pulled(hidden, head):
        result = score(hidden, head, targets)
        return jnp.sum(pull * result[0]), result

    gradients, result = jax.jit(jax.grad(pulled, argnums=(0, 1), has_aux=True))(hidden, head)
    return *result, *gradients


def assert_same(result, expected, atol=2e-5):
    for one, other in zip(result, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("tile", [1, 7, 8, 39, 40, 64])
def test_tiles_change_nothing(tile):
    score = functools.partial(token_logprobs, temperature=TEMPERATURE, tile=tile)
    assert_same(both(score, *inputs()), both(naive, *inputs()))


@pytest.mark.parametrize("shape", [dict(data=8), dict(data=2, fsdp=2, tensor=2),
                                   dict(fsdp=2, tensor=2, context=2), dict(tensor=8),
                                   dict(context=8), dict(fsdp=8)], ids=str)
@pytest.mark.parametrize("tile", [4, 64])
def test_eight_devices_score_as_one_does(shape, tile):
    hidden, head, targets, pull = inputs()
    target = mesh(**shape)
    with jax.set_mesh(target):
        placed = (jax.device_put(hidden, sharding.sharding(target, "batch", "sequence", "width")),
                  jax.device_put(head, sharding.sharding(target, "vocab", "embed")), targets, pull)
        result = both(
            functools.partial(token_logprobs, temperature=TEMPERATURE, tile=tile), *placed)
        assert_same(jax.device_get(result), both(naive, hidden, head, targets, pull))


UNUSED = (0, 3), (11, 12), (29, 40)             # rows of a padded vocabulary, and holes in it


def naive_masked(hidden, head, targets):
    scores = jnp.einsum("bnd,vd->bnv", hidden, head) / TEMPERATURE
    is_unused = np.isin(np.arange(VOCABULARY), [entry for range_ in UNUSED
                                                for entry in range(*range_)])
    table = jax.nn.log_softmax(scores, axis=-1, where=~is_unused)
    chosen = jnp.take_along_axis(table, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(table) * table, axis=-1, where=~is_unused)


@pytest.mark.parametrize("shape", [{}, dict(data=2, fsdp=2, tensor=2), dict(tensor=8)], ids=str)
@pytest.mark.parametrize("tile", [3, 4, 64])
def test_unused_entries_have_probability_0_and_no_gradient(shape, tile):
    hidden, head, targets, pull = inputs()
    targets = np.where((targets > 11) & (targets < 29), targets, 5)
    target = mesh(**shape)
    score = functools.partial(token_logprobs, temperature=TEMPERATURE, tile=tile, unused=UNUSED)
    with jax.set_mesh(target):
        placed = (jax.device_put(hidden, sharding.sharding(target, "batch", "sequence", "width")),
                  jax.device_put(head, sharding.sharding(target, "vocab", "embed")))
        result = jax.device_get(both(score, *placed, targets, pull))
    assert_same(result, both(naive_masked, hidden, head, targets, pull))
    head_gradient = result[3]
    assert not any(head_gradient[slice(*range_)].any() for range_ in UNUSED)


def test_an_unused_target_has_log_prob_minus_infinity_and_no_gradient_if_its_weight_is_0():
    hidden, head, targets, _ = inputs()
    score = functools.partial(token_logprobs, temperature=TEMPERATURE, tile=7, unused=UNUSED)
    targets = np.where(targets < 20, 30, 20)
    logprobs, entropy, *gradients = both(score, hidden, head, targets, (targets == 20) * 1.0)
    assert np.array_equal(np.isneginf(logprobs), targets == 30) and np.isfinite(entropy).all()


@pytest.mark.parametrize(("shape", "share"), [
    ({}, 0.0), ({}, 0.05), ({}, 0.4), ({}, 1.0), (dict(data=2, fsdp=2, tensor=2), 0.4),
    (dict(fsdp=2, tensor=2, context=2), 0.05)], ids=str)
def test_positions_that_nobody_reads_are_left_out(shape, share, monkeypatch):
    monkeypatch.setattr(logprobs, "UNIT", 2)        # several sizes, however few the positions
    hidden, head, targets, pull = inputs()
    wanted = np.random.default_rng(5).random(targets.shape) < share

    def masked(hidden, head, targets):
        return tuple(jnp.where(wanted, x, 0.0) for x in naive(hidden, head, targets))

    expected = both(masked, hidden, head, targets, pull)
    for tile in (7, 64):
        score = functools.partial(token_logprobs, wanted=jnp.asarray(wanted),
                                  temperature=TEMPERATURE, tile=tile)
        with jax.set_mesh(mesh(**shape)):
            assert_same(both(score, hidden, head, targets, pull), expected)


def test_there_are_programs_for_eighths_of_the_positions():
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((1, 2048, 8), jnp.float32), ((40, 8), jnp.float32), ((1, 2048), jnp.int32),
        ((1, 2048), jnp.bool))]
    text = jax.jit(lambda *arrays: token_logprobs(*arrays, temperature=1.0, tile=40)).lower(
        *shapes).as_text()
    assert {int(size) for size in re.findall(r"dot_general.*-> tensor<(\d+)x40xf32>", text)} == set(
        range(256, 2049, 256))


def test_the_head_is_gathered_and_its_gradient_summed_outside_the_tiles():
    hidden, head, targets, pull = inputs()
    target = mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(target):
        step = jax.jit(jax.grad(lambda hidden, head: jnp.sum(pull * token_logprobs(
            hidden, head, targets, temperature=1.0, tile=4)[0]), argnums=(0, 1)))
        text = step.lower(
            jax.device_put(hidden, sharding.sharding(target, "batch", "sequence", "width")),
            jax.device_put(head, sharding.sharding(target, "vocab", "embed"))).compile().as_text()
    entry = text[text.index("ENTRY"):]
    collectives = ("all-gather(", "all-reduce(", "reduce-scatter(")
    assert " while(" in entry and all(name in entry for name in collectives[:2])
    assert [text.count(name) for name in collectives] == [entry.count(name) for name in collectives]


@pytest.mark.parametrize("tile", [8, 64])
def test_entropy_of_known_distributions(tile):
    # Scores all alike: log V. One far above the rest: 0.
    head = np.zeros((9, 2), np.float32)
    head[0, 1] = 1_000.0
    hidden = np.array([[[1, 0], [0, 1]]], np.float32)
    logprobs, entropy = jax.jit(functools.partial(token_logprobs, temperature=1.0, tile=tile))(
        hidden, head, np.zeros((1, 2), np.int32))
    np.testing.assert_allclose(entropy, [[math.log(9), 0]], atol=1e-6)
    np.testing.assert_allclose(logprobs, [[-math.log(9), 0]], atol=1e-6)


def test_bfloat16_states_keep_float32_logprobs():
    hidden, head, targets, pull = inputs()
    low = [x.astype(jnp.bfloat16) for x in (hidden, head)]
    expected = both(naive, *(x.astype(np.float32) for x in low), targets, pull)
    result = both(functools.partial(token_logprobs, temperature=TEMPERATURE, tile=8), *low, targets,
                 pull)
    assert [x.dtype.name for x in result] == ["float32", "float32", "bfloat16", "bfloat16"]
    for one, other, atol in zip(result, expected, (1e-5, 1e-5, 0.05, 0.2), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), other, rtol=0.02, atol=atol)


def temporary_bytes(vocabulary, length, tile, gradient):
    """What XLA allocates besides arguments and results for one row of `length` positions at width
    1,536.

    In float32: a CPU would hold a float32 copy of a bfloat16 head."""
    width = 1536
    arrays = (jax.ShapeDtypeStruct((1, length, width), jnp.float32),
              jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
              jax.ShapeDtypeStruct((1, length), jnp.int32))

    def score(hidden, head, targets):
        return token_logprobs(hidden, head, targets, temperature=1.0, tile=tile)[0]

    step = jax.grad(lambda *arrays: jnp.sum(score(*arrays)), argnums=(0, 1)) if gradient else score
    return jax.jit(step).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("gradient", [False, True], ids=["score", "gradient"])
def test_memory_at_32k_positions_is_flat_in_the_vocabulary(gradient):
    small, large = (temporary_bytes(vocabulary, 32_768, 512, gradient)
                    for vocabulary in (16_384, 151_936))
    whole = 4 * 32_768 * 151_936
    print(f"temporary: {small / 2**30:.2f} GiB at 16k, {large / 2**30:.2f} "
          f"GiB at 152k; the table {whole / 2**30:.1f}")
    assert large < 1.05 * small and large < whole / 15
