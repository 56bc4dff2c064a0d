"""Layers that keep a state, against the rule written out position by position in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import mesh

from effreason.lm import attention, delta
from effreason.lm.delta import DeltaShape
from effreason.runtime import sharding

SHAPE = DeltaShape(key_heads=2, value_heads=4, key_dim=6, value_dim=5, taps=4)
LENGTH = 150        # two chunks of 64 and a part of one
# Sequences that end in a chunk, at its end, and after a single position; and padding.
LENGTHS = ([64, 1, 70], [150], [3, 60, 65, 22])


def inputs(rows=3, length=LENGTH, seed=0):
    """Streams, taps, the logarithm of decay, and beta."""
    generator = np.random.default_rng(seed)

    def normal(*shape):
        return generator.standard_normal(shape, np.float32)

    streams = tuple(normal(rows, length, *heads) for heads in SHAPE.streams)
    taps = tuple(normal(*heads, SHAPE.taps) for heads in SHAPE.streams)
    # From a state that fades at once to one that stays.
    log_decay = -np.exp(2.0 * normal(rows, length, SHAPE.value_heads) - 2.0)
    return streams, taps, log_decay, 1 / (1 + np.exp(-normal(rows, length, SHAPE.value_heads)))


def segments_of(lengths=LENGTHS):
    return np.stack([np.pad(np.repeat(np.arange(len(row)) + 1, row), (0, LENGTH - sum(row)))
                     for row in lengths]).astype(np.int32)


def by_hand(streams, taps, log_decay, beta):
    """What the queries of one sequence read, float64[N, H, v], and the last state."""
    mixed = []
    for x, weights in zip(streams, taps, strict=True):
        x = np.pad(np.float64(x), ((SHAPE.taps - 1, 0), (0, 0), (0, 0)))
        total = sum(x[tap : len(x) - SHAPE.taps + 1 + tap] * weights[..., tap]
                    for tap in range(SHAPE.taps))
        mixed.append(total / (1 + np.exp(-total)))
    query, key = (x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6) for x in mixed[:2])
    share = SHAPE.value_heads // SHAPE.key_heads
    query, key = (np.repeat(x, share, axis=1) for x in (query / np.sqrt(SHAPE.key_dim), key))
    state = np.zeros((SHAPE.value_heads, SHAPE.key_dim, SHAPE.value_dim))
    read = []
    for at, value in enumerate(mixed[2]):
        state = state * np.exp(log_decay[at])[:, None, None]
        change = beta[at][:, None] * (value - np.einsum("hkv,hk->hv", state, key[at]))
        state = state + np.einsum("hk,hv->hkv", key[at], change)
        read.append(np.einsum("hkv,hk->hv", state, query[at]))
    return np.stack(read), state


def expected(arrays, segments):
    streams, taps, log_decay, beta = arrays
    result = np.zeros(streams[2].shape)
    for row in range(len(segments)):
        for number in np.unique(segments[row][segments[row] > 0]):
            own = segments[row] == number
            result[row, own] = by_hand([x[row, own] for x in streams], taps, log_decay[row, own],
                                       beta[row, own])[0]
    return result


def test_packed_rows_are_their_sequences_one_by_one():
    arrays, segments = inputs(), segments_of()
    found = jax.jit(delta.mix_rows)(*arrays, segments)
    np.testing.assert_allclose(found, expected(arrays, segments), rtol=1e-4, atol=1e-5)
    whole = jax.jit(functools.partial(delta.mix_rows, segments=None))(*arrays)
    np.testing.assert_allclose(whole, expected(arrays, np.ones_like(segments)), rtol=1e-4,
                               atol=1e-5)


def test_gradients_are_those_of_one_position_after_another():
    arrays, segments = inputs(), segments_of()
    cotangent = np.random.default_rng(1).standard_normal(arrays[0][2].shape, np.float32)

    def chunks(*arrays):
        return jnp.sum(delta.mix_rows(*arrays, segments) * cotangent)

    def steps(streams, taps, log_decay, beta):
        """Each sequence token by token through the cache, whose gradient needs no chunks."""
        total = 0.0
        for row in range(len(segments)):
            for number in np.unique(segments[row][segments[row] > 0]):
                at = np.flatnonzero(segments[row] == number)

                def step(cache, position, row=row):
                    now = (tuple(x[row, position][None, None] for x in streams), taps,
                           log_decay[row, position][None, None], beta[row, position][None, None])
                    mixed, cache = delta.extend(*now, cache, None)
                    return cache, jnp.sum(mixed[0, 0] * jnp.asarray(cotangent)[row, position])

                total += jnp.sum(jax.lax.scan(
                    step, delta.empty_state(SHAPE, jnp.float32, 1), at)[1])
        return total

    found, wanted = (jax.jit(jax.grad(function, argnums=(0, 1, 2, 3)))(*arrays)
                     for function in (chunks, steps))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(
        one, other, rtol=1e-3, atol=1e-5 * np.abs(other).max()), found, wanted)


def test_padding_has_no_value_and_no_gradient():
    arrays, segments = inputs(), segments_of()
    is_padding = segments == 0
    assert is_padding.any()
    assert not np.asarray(jax.jit(delta.mix_rows)(*arrays, segments))[is_padding].any()
    gradients = jax.jit(jax.grad(
        lambda streams: jnp.sum(delta.mix_rows(streams, *arrays[1:], segments))))(arrays[0])
    assert all(np.abs(x[is_padding]).max() == 0 for x in map(np.asarray, gradients))


def test_a_row_continues_after_those_positions_that_are_its_own():
    """70 positions, of which each row has another number, then single ones."""
    arrays = inputs(rows=4)
    counts = np.array([0, 2, 33, 70], np.int32)
    streams, taps, log_decay, beta = arrays
    extend = jax.jit(delta.extend)
    rubbish = jax.tree.map(lambda x: x[:, :70], (streams, log_decay, beta))
    mixed, cache = extend(rubbish[0], taps, *rubbish[1:], delta.empty_state(SHAPE, jnp.float32, 4),
                          counts)
    pieces = [[mixed[row, :count]] for row, count in enumerate(counts)]
    rows = np.arange(4)
    for step in range(5):
        now = jax.tree.map(lambda x, at=counts + step: x[rows, at][:, None],
                           (streams, log_decay, beta))
        mixed, cache = extend(now[0], taps, *now[1:], cache, None)
        for row in rows:
            pieces[row].append(mixed[row])

    for row, count in enumerate(counts):
        own = slice(0, count + 5)
        read, state = by_hand([x[row, own] for x in streams], taps, log_decay[row, own],
                              beta[row, own])
        np.testing.assert_allclose(np.concatenate(pieces[row]), read, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(cache["state"][row], state, rtol=1e-4, atol=1e-5)
        inputs_kept = np.pad(streams[1][row, own], ((3, 0), (0, 0), (0, 0)))[-3:]
        np.testing.assert_array_equal(cache["key"][row], inputs_kept)


@pytest.mark.parametrize("size", [7, 64, 150])
def test_the_size_of_a_chunk_changes_nothing(monkeypatch, size):
    monkeypatch.setattr(delta, "CHUNK", size)
    arrays, segments = inputs(), segments_of()
    found = jax.jit(lambda *arrays: delta.mix_rows(*arrays, segments))(*arrays)
    np.testing.assert_allclose(found, expected(arrays, segments), rtol=1e-4, atol=1e-5)


def test_states_that_fade_at_once_and_keys_that_are_all_the_same_stay_finite():
    streams, taps, _, beta = inputs()
    segments = segments_of()
    for log_decay in (np.zeros_like(beta), np.full_like(beta, -200.0)):
        for same in (False, True):
            key = np.ones_like(streams[1]) if same else streams[1]
            arrays = ((streams[0], key, streams[2]), taps, log_decay, np.ones_like(beta))
            value, gradients = jax.jit(jax.value_and_grad(
                lambda *arrays: jnp.sum(jnp.square(delta.mix_rows(*arrays, segments))),
                argnums=(0, 1, 2, 3)))(*arrays)
            assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, gradients)))
            np.testing.assert_allclose(jax.jit(delta.mix_rows)(*arrays, segments),
                                       expected(arrays, segments), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("shape", [dict(data=2, fsdp=2, tensor=2),
                                   dict(fsdp=2, tensor=2, context=2), dict(context=4)], ids=str)
def test_a_mesh_computes_what_one_device_does(shape):
    target = mesh(**shape)
    arrays = tuple(jax.tree.map(lambda x: np.resize(x, (4, 160, *x.shape[2:])), part)
                   if index != 1 else part for index, part in enumerate(inputs()))
    segments = np.resize(segments_of(), (4, 160)).astype(np.int32)
    segments[:, 150:] = 0
    cotangent = np.random.default_rng(1).standard_normal(arrays[0][2].shape, np.float32)

    @jax.jit
    def value_and_gradients(arrays, segments, cotangent):
        return jax.value_and_grad(lambda arrays: jnp.sum(
            delta.mix_rows(*arrays, segments) * cotangent))(arrays)

    wanted = value_and_gradients(arrays, segments, cotangent)
    columns = attention.zigzag(160, shape.get("context", 1))
    rows = sharding.sharding(target, "batch", "sequence")

    def place(x):
        return jax.device_put(x[:, columns], rows)

    placed = tuple(jax.tree.map(place, part) if index != 1 else part
                   for index, part in enumerate(arrays))
    with jax.set_mesh(target):
        value, gradients = value_and_gradients(placed, place(segments), place(cotangent))
    np.testing.assert_allclose(value, wanted[0], rtol=1e-4)
    for index, (found, expected_part) in enumerate(zip(gradients, wanted[1], strict=True)):
        ordered = jax.tree.map(lambda x, index=index: x if index == 1 else x[:, columns],
                               expected_part)
        jax.tree.map(lambda one, other: np.testing.assert_allclose(
            one, other, rtol=1e-3, atol=1e-5 * np.abs(other).max()), found, ordered)


def test_a_state_is_float32_and_its_axes_have_places():
    cache = delta.empty_state(SHAPE, jnp.bfloat16, 3)
    assert {name: x.dtype.name for name, x in cache.items()} == {
        "state": "float32", "query": "bfloat16", "key": "bfloat16", "value": "bfloat16"}
    assert {name: len(axes) for name, axes in delta.STATE_AXES.items()} == {
        name: x.ndim for name, x in cache.items()}
    wide = dataclasses.replace(SHAPE, taps=2)
    assert delta.empty_state(wide, jnp.float32, 1)["value"].shape == (1, 1, 4, 5)
