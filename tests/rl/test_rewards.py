"""The reward kernel against a NumPy oracle, hand numbers, the method's edge cases and its
invariants."""

import doctest
import functools
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from effreason.rl import advantages, rewards
from effreason.rl.rewards import length_rewards

kernel = jax.jit(length_rewards)  # alpha is an array here: one compilation for every alpha
GROUP = 8
alphas = st.floats(0.0, 0.99, allow_subnormal=False)
lengths_of_a_group = st.lists(st.integers(1, 32_768), min_size=GROUP, max_size=GROUP)
verdicts_of_a_group = st.lists(st.booleans(), min_size=GROUP, max_size=GROUP)


def rewards_of(correct, lengths, alpha):
    """float32[P, G] on the host, from nested lists."""
    return np.asarray(kernel(np.asarray(correct, bool), np.asarray(lengths, np.int32),
                             alpha=np.float32(alpha)))


def sigmoid(z):
    return 1.0 / (1.0 + np.exp(-np.asarray(z, np.float64)))


def oracle(correct, lengths, alpha, eps=1e-7):
    """The formula, one group and one response at a time, in float64."""
    correct, lengths = np.asarray(correct, bool), np.asarray(lengths, np.float64)
    rewards = np.zeros(correct.shape)
    for prompt, sample in zip(*np.nonzero(correct), strict=True):
        siblings = lengths[prompt][correct[prompt]]
        z = (lengths[prompt, sample] - siblings.mean()) / (siblings.std() + eps)
        rewards[prompt, sample] = 1.0 - alpha * sigmoid(z)
    return rewards


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.1, 0.2, 0.4, 0.9])
def test_equals_the_numpy_oracle(alpha):
    rng = np.random.default_rng(0)
    correct = rng.random((64, GROUP)) < rng.random((64, 1))
    lengths = np.exp(rng.normal(6.0, 1.0, (64, GROUP))).astype(np.int32) + 1
    np.testing.assert_allclose(rewards_of(correct, lengths, alpha), oracle(correct, lengths, alpha),
                               atol=2e-6)


def test_hand_numbers():
    # Correct lengths 10, 20, 30: mean 20, population std sqrt(200 / 3) = 8.16497, z = -1.224745, 0,
    # 1.224745.
    rewards = rewards_of([[True, True, False, True]], [[10, 20, 1000, 30]], 0.4)
    np.testing.assert_allclose(rewards, [[1 - 0.4 * 0.2271004, 0.8, 0.0, 1 - 0.4 * 0.7728996]],
                               atol=1e-6)


def test_two_correct_lie_one_std_from_the_mean_whatever_the_gap():
    rewards = rewards_of([[True, True]] * 2, [[5, 6], [5, 5000]], 0.2)
    np.testing.assert_allclose(rewards, [[1 - 0.2 * sigmoid(-1), 1 - 0.2 * sigmoid(1)]] * 2,
                               atol=1e-6)


def test_one_correct_response_scores_one_minus_half_alpha():
    rewards = rewards_of([[False, True, False, False]], [[1, 777, 3, 9000]], 0.2)
    np.testing.assert_array_equal(rewards, np.float32([[0, 0.9, 0, 0]]))


@pytest.mark.parametrize("group", [2, 3, 7, 8, 256])
@pytest.mark.parametrize("length", [1, 333, 32_767])
def test_equally_long_correct_responses_score_one_minus_half_alpha(group, length):
    rewards = rewards_of([[True] * group], [[length] * group], 0.2)
    np.testing.assert_array_equal(rewards, np.full((1, group), 0.9, np.float32))


def test_no_correct_response_scores_zero_for_all_and_gives_no_signal():
    rewards = rewards_of([[False] * 4], [[3, 5, 8, 13]], 0.9)
    np.testing.assert_array_equal(rewards, np.zeros((1, 4)))
    np.testing.assert_array_equal(advantages.leave_one_out(rewards), np.zeros((1, 4)))


def test_all_correct_are_separated_by_length_alone():
    rewards = rewards_of([[True] * 4], [[10, 20, 30, 40]], 0.1)[0]
    assert np.all(np.diff(rewards) < 0)
    gains = np.asarray(advantages.leave_one_out(rewards[None]))[0]
    assert gains[0] > 0 > gains[-1]


def test_truncated_response_scores_zero_and_enters_no_mean():
    # The last response stopped at the token limit: not correct, whatever its text holds.
    lengths = np.array([[10, 20, 30, 4096]])
    truncated = rewards_of([[True, True, True, False]], lengths, 0.4)
    assert truncated[0, 3] == 0
    np.testing.assert_array_equal(truncated[:, :3], rewards_of([[True] * 3], lengths[:, :3], 0.4))


def test_eos_as_first_token_is_length_one():
    rewards = rewards_of([[True, True]], [[1, 3]], 0.2)
    np.testing.assert_allclose(rewards, [[1 - 0.2 * sigmoid(-1), 1 - 0.2 * sigmoid(1)]], atol=1e-6)


def test_lengths_beyond_float32_whole_numbers():
    # Two lengths that float32 cannot tell apart, and a sum beyond int32.
    rewards = rewards_of([[True, True]], [[2**31 - 3, 2**31 - 2]], 0.2)
    np.testing.assert_allclose(rewards, [[1 - 0.2 * sigmoid(-1), 1 - 0.2 * sigmoid(1)]], atol=1e-6)


def test_groups_do_not_touch_each_other():
    correct, lengths = [[True, False, True], [True, True, True]], [[9, 9, 20], [4, 5, 6]]
    both = rewards_of(correct, lengths, 0.4)
    alone = [rewards_of(correct[row : row + 1], lengths[row : row + 1], 0.4)[0] for row in (0, 1)]
    np.testing.assert_array_equal(both, alone)


@hypothesis.given(verdicts_of_a_group, lengths_of_a_group, alphas)
def test_rewards_lie_in_zero_to_one_and_correct_never_scores_below_wrong(correct, lengths, alpha):
    rewards, right = rewards_of([correct], [lengths], alpha)[0], np.array(correct)
    assert np.all((rewards >= 0) & (rewards <= 1))
    assert np.all(rewards[~right] == 0) and np.all(rewards[right] > 0)


@hypothesis.given(verdicts_of_a_group, lengths_of_a_group, alphas, st.permutations(range(GROUP)))
def test_permuting_a_group_permutes_its_rewards(correct, lengths, alpha, order):
    rewards = rewards_of([correct], [lengths], alpha)
    permuted = rewards_of([np.take(correct, order)], [np.take(lengths, order)], alpha)
    np.testing.assert_allclose(permuted, rewards[:, order], atol=1e-6)


@hypothesis.given(verdicts_of_a_group, lengths_of_a_group, alphas, st.integers(0, 100_000))
def test_adding_a_constant_to_all_lengths_changes_nothing(correct, lengths, alpha, constant):
    shifted = rewards_of([correct], [np.add(lengths, constant)], alpha)
    np.testing.assert_array_equal(shifted, rewards_of([correct], [lengths], alpha))


@hypothesis.given(verdicts_of_a_group, lengths_of_a_group)
def test_alpha_zero_is_correctness(correct, lengths):
    np.testing.assert_array_equal(rewards_of([correct], [lengths], 0.0), np.float32([correct]))


@hypothesis.given(verdicts_of_a_group, lengths_of_a_group, alphas)
def test_shorter_never_scores_below_longer_among_the_correct(correct, lengths, alpha):
    right = np.array(correct)
    rewards = rewards_of([correct], [lengths],
                         alpha)[0][right][np.argsort(np.array(lengths)[right])]
    assert np.all(np.diff(rewards) <= 0)


@hypothesis.given(verdicts_of_a_group, lengths_of_a_group, alphas)
def test_z_is_at_most_the_root_of_the_other_correct_responses(correct, lengths, alpha):
    right = np.array(correct)
    bound = np.sqrt(max(right.sum() - 1, 0))
    rewards = rewards_of([correct], [lengths], alpha)[0][right]
    assert np.all(rewards >= 1 - alpha * sigmoid(bound) - 1e-6)
    assert np.all(rewards <= 1 - alpha * sigmoid(-bound) + 1e-6)


# With 8 responses and leave-one-out, the fewest correct ones among which a correct one can have a
# negative advantage.
FEWEST = {0.05: 8, 0.1: 8, 0.2: 8, 0.4: 7, 0.6: 6, 0.9: 4}


@hypothesis.given(st.sampled_from(sorted(FEWEST)), verdicts_of_a_group, lengths_of_a_group)
def test_correct_response_has_negative_advantage_only_in_easy_groups(alpha, correct, lengths):
    rewards = rewards_of([correct], [lengths], alpha)
    negative = np.asarray(advantages.leave_one_out(rewards))[0][np.array(correct)] < -1e-6
    assert not negative.any() or sum(correct) >= FEWEST[alpha]


@pytest.mark.parametrize(("alpha", "fewest"), sorted(FEWEST.items()))
def test_that_bound_is_reached_by_one_long_response_among_equal_short_ones(alpha, fewest):
    correct = [[sample < right for sample in range(GROUP)] for right in range(2, GROUP + 1)]
    lengths = [[1000] + [10] * (GROUP - 1)] * len(correct)
    gains = np.asarray(advantages.leave_one_out(rewards_of(correct, lengths, alpha)))
    assert [right for right in range(2, GROUP + 1) if gains[right - 2, 0] < 0] == list(range(fewest,
                                                                                             GROUP
                                                                                             + 1))


def test_compiles_once_and_returns_float32():
    reward = jax.jit(functools.partial(length_rewards, alpha=0.1))
    for step in range(3):
        rewards = reward(jnp.ones((2, 4), bool), jnp.full((2, 4), step + 1, jnp.int32))
    assert rewards.shape == (2, 4) and rewards.dtype == jnp.float32
    assert reward._cache_size() == 1
    assert jax.jit(length_rewards)(np.ones((1, 2), bool), np.ones((1, 2), np.int64),
                                   alpha=0.1).dtype == jnp.float32


# The published others: each with parameters of its own, and the formula as its source has it, in
# float64.

def kimi_oracle(right, tokens, weight):
    if tokens.max() == tokens.min():
        return right.astype(float)
    place = 0.5 - (tokens - tokens.min()) / (tokens.max() - tokens.min())
    return np.where(right, 1 + weight * place, weight * np.minimum(place, 0))


def alp_oracle(right, tokens, scale):
    return right - scale * tokens * max(right.mean(), 1 / len(right))


def shorter_better_oracle(right, tokens, value, scale):
    best = tokens[right].min() if right.any() else tokens.mean()
    return value * right - scale * np.abs(tokens - best)


def adaptive_limit_oracle(right, tokens, limit, tight, share):
    within = right & (tokens <= limit)
    return within & (tokens <= (tight if within.mean() >= share else limit))


OTHERS = {
    "adaptive_limit": ({"limit": 3000, "tight": 800, "share": 0.5}, adaptive_limit_oracle),
    "group_max": ({"weight": 0.25}, lambda right, tokens, weight: right
                  - weight * right.mean() * tokens / tokens.max()),
    "kimi": ({"weight": 0.4}, kimi_oracle),
    "l1_exact": ({"target": 300, "scale": 3e-4},
                 lambda right, tokens, target, scale: right - scale * np.abs(target - tokens)),
    "l1_max": ({"target": 300, "scale": 3e-3, "offset": 0.5}, lambda right, tokens, target, scale,
               offset: right * np.clip(scale * (target - tokens) + offset, 0, 1)),
    "soft_overlong": ({"limit": 1000, "buffer": 600}, lambda right, tokens, limit,
                      buffer: right + np.select([tokens <= limit - buffer, tokens <= limit],
                                                [0, (limit - buffer - tokens) / buffer], -1)),
    "limit": ({"limit": 300}, lambda right, tokens, limit: right * (tokens <= limit)),
    "laser": ({"target": 300, "bonus": 0.5}, lambda right, tokens, target,
              bonus: right + bonus * (right & (tokens <= target))),
    "alp": ({"scale": 1e-4}, alp_oracle),
    "gr3": ({"weight": 0.33}, lambda right, tokens, weight: right
            / (1 + weight * tokens / tokens.mean())),
    "shorter_better": ({"value": 2.0, "scale": 1e-3}, shorter_better_oracle),
}
forms = pytest.mark.parametrize("form", sorted(OTHERS))
kernels = {form: jax.jit(functools.partial(getattr(rewards, form), **parameters))
           for form, (parameters, _) in OTHERS.items()}


def other(form, correct, lengths, **parameters):
    """float32[P, G] on the host; without parameters, with the source's."""
    function = functools.partial(getattr(rewards, form), **parameters)
    return np.asarray(jax.jit(function)(np.asarray(correct, bool), np.asarray(lengths, np.int32)))


@forms
@hypothesis.given(verdicts_of_a_group, lengths_of_a_group)
def test_others_equal_their_numpy_oracles(form, correct, lengths):
    parameters, oracle = OTHERS[form]
    right, tokens = np.array(correct), np.array(lengths)
    found = np.asarray(kernels[form](right[None], tokens[None].astype(np.int32)))[0]
    np.testing.assert_allclose(found, oracle(right, tokens.astype(float), **parameters), rtol=1e-5,
                               atol=1e-5)


@forms
@hypothesis.given(verdicts_of_a_group, lengths_of_a_group, st.permutations(range(GROUP)))
def test_permuting_a_group_permutes_the_rewards_of_others(form, correct, lengths, order):
    right, tokens = np.array([correct]), np.array([lengths], np.int32)
    permuted = np.asarray(kernels[form](right[:, order], tokens[:, order]))
    np.testing.assert_allclose(permuted, np.asarray(kernels[form](right, tokens))[:, order],
                               rtol=1e-5, atol=1e-5)


@forms
def test_groups_of_others_do_not_touch_each_other_and_compile_once(form):
    rng = np.random.default_rng(1)
    right, tokens = rng.random((5, 4)) < 0.5, rng.integers(1, 2000, (5, 4)).astype(np.int32)
    kernel = jax.jit(functools.partial(getattr(rewards, form), **OTHERS[form][0]))
    whole = np.asarray(kernel(right, tokens))
    assert whole.dtype == np.float32 and whole.shape == (5, 4)
    np.testing.assert_allclose(np.asarray(kernel(right, tokens + 0)), whole)
    assert kernel._cache_size() == 1
    np.testing.assert_array_equal(np.concatenate([kernel(right[row:row + 1], tokens[row:row + 1])
                                                  for row in range(5)]), whole)


@forms
@pytest.mark.parametrize("verdict", [True, False])
def test_equally_long_responses_of_one_verdict_get_one_reward_from_others(form, verdict):
    found = np.asarray(kernels[form](np.full((1, 4), verdict), np.full((1, 4), 500, np.int32)))
    assert np.unique(found).size == 1
    np.testing.assert_array_equal(np.asarray(advantages.leave_one_out(found)), np.zeros((1, 4)))


# form, parameters, correct, lengths, rewards worked out by hand
HAND = [
    ("kimi", {}, [1, 1, 0, 0], [100, 200, 100, 500], [1.5, 1.25, 0.0, -0.5]),
    ("kimi", {"weight": 0.0}, [1, 0], [1, 9], [1, 0]),
    ("kimi", {}, [1, 0, 1], [7, 7, 7], [1, 0, 1]),
    ("l1_exact", {"target": 1000}, [1, 1, 0], [1000, 2000, 500], [1, 0.7, -0.15]),
    ("l1_max", {"target": 1000}, [1, 1, 1, 1, 0], [1000, 2000, 9000, 1, 1],
     [0.5, 0.2, 0, 0.7997, 0]),
    ("l1_max", {"target": 9000}, [1], [1], [1]),
    ("soft_overlong", {}, [1, 1, 1, 0, 0], [16384, 18432, 20480, 20480, 99999],
     [1, 0.5, 0, -1, -1]),
    ("soft_overlong", {"limit": 10, "buffer": 0}, [1, 1], [10, 11], [1, 0]),
    ("limit", {"limit": 4000}, [1, 1, 0], [4000, 4001, 10], [1, 0, 0]),
    ("adaptive_limit", {}, [1, 1, 1, 0], [2000, 2001, 4000, 10], [1, 0, 0, 0]),
    ("adaptive_limit", {}, [1, 1, 0, 0], [3000, 4001, 10, 10], [1, 0, 0, 0]),
    ("group_max", {}, [1, 1, 0, 0], [500, 1000, 1000, 2000], [0.96875, 0.9375, -0.0625, -0.125]),
    ("group_max", {}, [0, 0], [500, 1000], [0, 0]),
    ("laser", {"target": 4096}, [1, 1, 0], [4096, 4097, 10], [1.5, 1, 0]),
    ("alp", {"scale": 1e-4}, [1, 1, 0, 0], [1000, 2000, 1000, 4000], [0.95, 0.9, -0.05, -0.2]),
    ("alp", {"scale": 1e-4}, [0, 0, 0, 0], [1000, 2000, 1000, 4000], [-0.025, -0.05, -0.025, -0.1]),
    ("gr3", {}, [1, 1, 0], [100, 300, 200], [1 / 1.165, 1 / 1.495, 0]),
    ("gr3", {}, [0, 0], [3, 5], [0, 0]),
    ("shorter_better", {}, [1, 1, 0], [300, 800, 100], [2, 1.5, -0.2]),
    ("shorter_better", {}, [0, 0], [100, 300], [-0.1, -0.1]),
]


@pytest.mark.parametrize(("form", "parameters", "correct", "lengths", "expected"), HAND)
def test_hand_numbers_of_others(form, parameters, correct, lengths, expected):
    np.testing.assert_allclose(other(form, [correct], [lengths], **parameters), [expected],
                               atol=2e-6)


def test_alp_of_the_source_is_exact_to_a_token_of_a_long_response():
    found = other("alp", [[True, True]], [[16_000, 32_000]])[0]
    np.testing.assert_allclose(found, [1 - 1.6e-3, 1 - 3.2e-3], atol=6e-8)


@forms
@hypothesis.given(verdicts_of_a_group, lengths_of_a_group)
def test_no_other_rewards_a_longer_of_two_correct_responses_more(form, correct, lengths):
    if form == "l1_exact":                                  # it wants its target, from below too
        lengths = [length + 300 for length in lengths]
    right = np.array(correct)
    found = np.asarray(kernels[form](right[None], np.array([lengths], np.int32)))[0]
    assert np.all(np.diff(found[right][np.argsort(np.array(lengths)[right])]) <= 1e-6)


@pytest.mark.parametrize("form", ["kimi", "limit", "adaptive_limit", "l1_max", "laser", "gr3"])
@hypothesis.given(verdicts_of_a_group, lengths_of_a_group)
def test_these_never_score_a_wrong_response_above_a_correct_one(form, correct, lengths):
    right = np.array(correct)
    found = np.asarray(kernels[form](right[None], np.array([lengths], np.int32)))[0]
    assert right.all() or not right.any() or found[right].min() >= found[~right].max()


def test_the_example_of_the_documentation_shows_the_edge_cases():
    found = doctest.testfile(str(Path(__file__).parents[2] / "docs" / "rewards.md"),
                             module_relative=False)
    assert (found.failed, found.attempted) == (0, 11)
