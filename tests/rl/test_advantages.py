"""Baselines and the KL return against NumPy, hand numbers, invariants, and one device against
eight."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from effreason.rl import advantages
from effreason.rl.advantages import (
    group_std,
    kl_return_to_go,
    leave_one_out,
    truncated_importance,
)
from effreason.rl.rewards import length_rewards

loo, by_std = jax.jit(leave_one_out), jax.jit(group_std)

def whiten(values, mask):
    return advantages.whiten(values, mask)[0]


white, return_to_go, importance = jax.jit(whiten), jax.jit(kl_return_to_go), jax.jit(
    truncated_importance)
groups = hnp.arrays(np.float32, (3, 8), elements=st.floats(0, 1, width=32, allow_subnormal=False))
rows = hnp.arrays(np.float32, (8, 6), elements=st.floats(-1, 1, width=16, allow_subnormal=False))
masks = hnp.arrays(np.bool_, (8, 6))


def test_leave_one_out_hand_numbers():
    np.testing.assert_allclose(loo(jnp.array([[1.0, 0.0, 0.5, 0.0]])), [[5 / 6, -0.5, 1 / 6, -0.5]],
                               atol=1e-6)
    np.testing.assert_allclose(loo(jnp.array([[0.9, 0.0]])), [[0.9, -0.9]], atol=1e-6)


@hypothesis.given(groups)
def test_leave_one_out_subtracts_the_mean_of_the_others(rewards):
    expected = [[group[g] - np.delete(group, g).mean() for g in range(8)]
                for group in rewards.astype(np.float64)]
    np.testing.assert_allclose(loo(rewards), expected, atol=1e-6)


@hypothesis.given(groups, st.permutations(range(8)))
def test_leave_one_out_sums_to_zero_and_permutes_with_the_group(rewards, order):
    gains = np.asarray(loo(rewards))
    np.testing.assert_allclose(gains.sum(-1), 0, atol=2e-6)
    np.testing.assert_allclose(loo(rewards[:, order]), gains[:, order], atol=1e-6)


@hypothesis.given(st.floats(0, 1, width=32, allow_subnormal=False))
def test_equal_rewards_give_exactly_zero(reward):
    rewards = np.full((3, 8), reward, np.float32)
    np.testing.assert_array_equal(loo(rewards), np.zeros((3, 8)))
    np.testing.assert_array_equal(by_std(loo(rewards), rewards), np.zeros((3, 8)))


@hypothesis.given(groups)
def test_group_std_divides_by_the_population_std_of_the_rewards(rewards):
    gains = loo(rewards)
    expected = np.asarray(gains) / (rewards.astype(np.float64).std(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(by_std(gains, rewards), expected, rtol=1e-3, atol=1e-3)


def test_group_std_removes_alpha_in_an_all_correct_group():
    correct, lengths = jnp.ones((1, 4), bool), jnp.array([[100, 120, 150, 400]])
    weak, strong = (length_rewards(correct, lengths, alpha=alpha) for alpha in (0.05, 0.4))
    np.testing.assert_allclose(loo(strong), 8 * loo(weak), rtol=1e-4)  # the default keeps alpha
    np.testing.assert_allclose(by_std(loo(strong), strong), by_std(loo(weak), weak), rtol=1e-3)


def test_whiten_weighs_tokens_not_responses():
    # One token of advantage 1, three of -1: mean -0.5, variance 0.75. The last column is padding.
    mask = jnp.array([[True, False, False, False], [True, True, True, False]])
    result = white(jnp.where(mask, jnp.array([[1.0], [-1.0]]), 9.0), mask)
    np.testing.assert_allclose(result[0, 0], 1.5 / np.sqrt(0.75), rtol=1e-6)
    np.testing.assert_allclose(result[1, :3], -0.5 / np.sqrt(0.75), rtol=1e-6)
    np.testing.assert_array_equal(result[~np.asarray(mask)], 0)


@hypothesis.given(rows, masks)
def test_whitened_tokens_have_mean_zero_and_variance_one(values, mask):
    tokens = values[mask].astype(np.float64)
    hypothesis.assume(tokens.size and tokens.var() > 1e-6)
    result = np.asarray(white(values, mask))
    np.testing.assert_allclose(result[mask], (tokens - tokens.mean()) / tokens.std(), atol=2e-3)
    np.testing.assert_allclose([result[mask].mean(), result[mask].var()], [0, 1], atol=2e-3)
    np.testing.assert_array_equal(result[~mask], 0)


@pytest.mark.parametrize("mask", [np.zeros((2, 3), bool), np.ones((2, 3), bool)],
                         ids=["no tokens", "equal advantages"])
def test_whiten_without_spread_is_zero(mask):
    np.testing.assert_allclose(white(np.full((2, 3), 0.7, np.float32), mask), np.zeros((2, 3)),
                               atol=2e-3)


def test_padding_never_reaches_the_result():
    mask = np.array([[False, True, True, False]])
    for function in (white, return_to_go):
        clean = function(np.float32([[0, 1, 3, 0]]), mask)
        np.testing.assert_array_equal(function(np.float32([[np.nan, 1, 3, np.inf]]), mask), clean)


def test_kl_return_to_go_hand_numbers():
    penalty = jnp.array([[100.0, 1.0, 2.0, 4.0, 100.0]])
    mask = jnp.array([[False, True, True, True, False]])
    np.testing.assert_array_equal(return_to_go(penalty, mask), [[0, 7, 6, 4, 0]])


def test_kl_return_to_go_of_a_row_with_two_sequences():
    penalty = jnp.array([[100.0, 1.0, 2.0, 4.0, 8.0, 16.0, 100.0]])
    mask = jnp.array([[False, True, True, False, True, True, False]])
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 0]])
    np.testing.assert_array_equal(return_to_go(penalty, mask, segments), [[0, 3, 2, 0, 24, 16, 0]])


def test_truncated_importance_hand_numbers():
    trained, sampled = np.log([[0.5, 0.2, 0.3, 0.9]]), np.log([[0.5, 0.4, 0.1, 0.1]])
    mask = np.array([[True, True, True, False]])
    weights = importance(trained.astype(np.float32), sampled.astype(np.float32), mask,
                         np.float32(2))
    np.testing.assert_allclose(weights, [[1.0, 0.5, 2.0, 0.0]], rtol=1e-6)


@hypothesis.given(rows, rows, masks, st.floats(0.5, 4))
def test_truncated_importance_is_bounded_and_1_where_both_agree(trained, sampled, mask, cap):
    weights = np.asarray(importance(trained, sampled, mask, np.float32(cap)))
    assert (weights >= 0).all() and (weights <= np.float32(cap)).all() and not weights[~mask].any()
    same = np.asarray(importance(trained, trained, mask, np.float32(1)))
    np.testing.assert_array_equal(same, mask.astype(np.float32))


def test_the_ratio_and_k3_are_their_formulas_up_to_the_bounds():
    drift = np.linspace(-2.5, 10.9, 200, dtype=np.float32)
    exact = drift.astype(np.float64)
    np.testing.assert_allclose(advantages.k3(drift), np.exp(-exact) + exact - 1, rtol=1e-5,
                               atol=1e-6)
    np.testing.assert_array_equal(advantages.k3(drift), jnp.exp(-drift) + drift - 1.0)
    slope = jax.vmap(jax.grad(advantages.k3))
    np.testing.assert_array_equal(slope(drift), 1.0 - jnp.exp(-drift))

    wide = np.linspace(-19.9, 19.9, 200, dtype=np.float32)
    np.testing.assert_array_equal(advantages.probability_ratio(wide), jnp.exp(wide))
    np.testing.assert_array_equal(jax.vmap(jax.grad(advantages.probability_ratio))(wide),
                                  jnp.exp(wide))


@pytest.mark.parametrize("nats", [-np.inf, -90.0, -24.0, 24.0, 90.0, np.inf])
def test_beyond_the_bounds_ratio_and_k3_are_finite_and_flat(nats):
    nats = jnp.float32(nats)
    assert float(advantages.k3(nats)) == 10.0
    assert float(jax.grad(advantages.k3)(nats)) == 0.0
    expected = np.exp(np.float32(20.0) * np.sign(nats))
    np.testing.assert_allclose(advantages.probability_ratio(nats), expected, rtol=1e-6)
    assert float(jax.grad(advantages.probability_ratio)(nats)) == 0.0
    one = jnp.ones((1, 1), jnp.float32)
    weight = float(importance(nats * one, 0 * one, one > 0, np.float32(1e38))[0, 0])
    np.testing.assert_allclose(weight, expected, rtol=1e-6)


@hypothesis.given(rows, masks)
def test_kl_return_to_go_sums_what_follows(penalty, mask):
    kept = np.where(mask, penalty, 0).astype(np.float64)
    expected = [[row[n:].sum() for n in range(row.size)] for row in kept]
    np.testing.assert_allclose(return_to_go(penalty, mask), np.where(mask, expected, 0), atol=1e-6)


def test_one_device_equals_eight():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=(16, 12)).astype(np.float32), rng.random((16, 12)) < 0.6
    for function in (white, return_to_go):
        spread = function(*jax.device_put((values, mask), sharding))
        np.testing.assert_allclose(spread, function(values, mask), rtol=1e-5, atol=1e-6)


def test_each_compiles_once_and_returns_float32():
    group, row, mask = jnp.ones((2, 4)), jnp.ones((2, 4)), jnp.ones((2, 4), bool)
    for function, inputs in ((leave_one_out, (group,)), (group_std, (group, group)),
                             (whiten, (row, mask)), (kl_return_to_go, (row, mask)),
                             (truncated_importance, (row, row, mask, 2.0))):
        compiled = jax.jit(functools.partial(function))     # a cache of its own
        for _ in range(3):
            result = compiled(*inputs)
        assert compiled._cache_size() == 1, function.__name__
        assert result.shape == (2, 4) and result.dtype == jnp.float32, function.__name__
