"""Statistics: hand numbers, enumeration, scipy's tests, closed forms, coverage of the intervals."""

import dataclasses
import itertools
import json
import math
import warnings
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from effreason.evaluation import statistics
from effreason.evaluation.statistics import Budget
from effreason.runtime import rows
from effreason.types import LevelResult, Outcomes


def outcomes(correct, lengths, *, levels=None, answers=None, finish=None, first_answer_token=None,
             uids=None):
    """Outcomes from lists; what is not given is all alike."""
    correct = np.array(correct, bool)
    return Outcomes(uids=np.arange(len(correct), dtype=np.int64) if uids is None
                    else np.array(uids, np.int64),
                    levels=np.array(["all"] * len(correct) if levels is None else levels),
                    correct=correct, lengths=np.array(lengths, np.int32),
                    finish=np.full(correct.shape, "eos") if finish is None else np.array(finish),
                    answers=np.where(correct, "7", "8") if answers is None else np.array(answers),
                    first_answer_token=np.full(correct.shape, np.nan, np.float32)
                    if first_answer_token is None else np.array(first_answer_token, np.float32))


def drawn(problems, samples, *, seed=0, rate=0.6, tokens=300.0, levels=1):
    """A model as one would measure it: problems differ in difficulty, responses in length."""
    rng = np.random.default_rng(seed)
    correct = rng.random((problems, samples)) < rng.beta(4 * rate, 4 - 4 * rate, problems)[:, None]
    lengths = 1 + rng.gamma(2.0, tokens / 2, (problems, samples)).astype(np.int32)
    return outcomes(correct, lengths,
                    levels=[f"level {1 + uid % levels}" for uid in range(problems)],
                    answers=np.where(correct, "7", rng.choice(["", "1", "2"], correct.shape)),
                    finish=np.where(rng.random(correct.shape) < 0.9, "eos", "length"),
                    first_answer_token=np.where(correct, lengths // 2, np.nan))


def shuffled(found, seed=0):
    order = np.random.default_rng(seed).permutation(len(found.uids))
    return dataclasses.replace(found,
                               **{name: column[order] for name, column in vars(found).items()})


def test_a_summary_by_hand():
    found = statistics.summarize(outcomes([[True, True], [True, False], [False, False]],
                                          [[2, 4], [10, 30], [6, 8]],
                                          levels=["hard", "easy", "hard"],
                                          answers=[["7", "7.0"], ["5", ""], ["1", "2"]],
                                          finish=[["eos", "eos"], ["eos", "length"],
                                                  ["repetition", "eos"]],
                                          first_answer_token=[[1, 4], [5, np.nan], [np.nan, 3]]))
    assert (found.problems, found.samples, found.accuracy, found.tokens) == (3, 2, 0.5, 10.0)
    assert found.tokens_median == 7.0 and found.truncated == pytest.approx(2 / 6)
    assert found.tokens_right == pytest.approx(16 / 3) and found.tokens_wrong == pytest.approx(
        44 / 3)
    assert found.tokens_per_solved == 60 / 3 and found.tokens_after_answer == (1 + 0 + 5 + 5) / 4
    assert found.pass_at == {1: 0.5, 2: pytest.approx(2 / 3)}
    # "" loses against the right answer
    assert found.majority_at == {1: 0.5, 2: pytest.approx(2 / 3)}
    assert found.budgets == (Budget(budget=16, accuracy=0.5, tokens=pytest.approx(46 / 6)),
                             Budget(budget=23, accuracy=0.5, tokens=pytest.approx(53 / 6)),
                             Budget(budget=32, accuracy=0.5, tokens=10.0))
    assert found.by_level == {"hard": LevelResult(accuracy=0.5, tokens=5.0, problems=2),
                              "easy": LevelResult(accuracy=0.5, tokens=20.0, problems=1)}
    assert list(found.by_level) == ["easy", "hard"]
    assert 0.0 <= found.accuracy_interval[0] < 0.5 < found.accuracy_interval[1] <= 1.0
    assert 3.0 <= found.tokens_interval[0] < 10.0 < found.tokens_interval[1] <= 20.0


def test_levels_are_in_the_order_of_their_numbers():
    levels = ["Level 5", "Level 10", "Level 1", "Level 5"]
    found = statistics.summarize(outcomes([[True]] * 4, [[1]] * 4, levels=levels))
    assert list(found.by_level) == ["Level 1", "Level 5", "Level 10"]


def test_what_there_are_no_responses_for_is_none():
    nothing = statistics.summarize(outcomes([[False], [False]], [[5], [7]]))
    assert nothing.tokens_right is None and nothing.tokens_per_solved is None
    assert nothing.tokens_after_answer is None
    assert nothing.tokens_wrong == 6.0 and nothing.accuracy_interval[0] == 0.0
    assert statistics.summarize(outcomes([[True]], [[5]])).tokens_wrong is None
    with pytest.raises(ValueError, match=r"need responses, got an array of \(0, 3\)"):
        statistics.summarize(outcomes(np.zeros((0, 3)), np.zeros((0, 3))))


@pytest.mark.parametrize("samples", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples):
    correct = np.array(list(itertools.product([False, True], repeat=samples)))
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(range(samples), k))
        wanted = np.mean([[row[list(subset)].any() for subset in subsets] for row in correct])
        assert statistics.pass_at(correct, k) == pytest.approx(wanted, abs=1e-12)


@given(st.integers(1, 40), st.data())
def test_pass_at_k_rises_with_k_from_the_accuracy(samples, data):
    counts = data.draw(st.lists(st.integers(0, samples), min_size=1, max_size=5))
    correct = np.arange(samples) < np.array(counts)[:, None]
    chances = [statistics.pass_at(correct, k) for k in range(1, samples + 1)]
    assert chances[0] == pytest.approx(correct.mean()) and chances[-1] == pytest.approx(
        correct.any(axis=1).mean())
    assert all(one <= other + 1e-12 for one, other in itertools.pairwise(chances))


def test_the_numbers_of_samples():
    assert [statistics.sample_counts(samples) for samples in (1, 2, 3, 8, 10)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 10]]


def majority(correct, answers, k):
    """The same by counting every subset, in fractions."""
    shares = []
    for right, texts in zip(correct, answers, strict=True):
        for subset in itertools.combinations(range(len(right)), k):
            votes = Counter("right" if right[place] else f"wrong {texts[place]}" for place in subset
                            if right[place] or texts[place])
            winners = [name for name, count in votes.items() if count == max(votes.values())]
            shares.append(Fraction("right" in winners, max(len(winners), 1)))
    return float(sum(shares) / len(shares))


@given(st.lists(st.lists(st.sampled_from(["right", "right too", "a", "b", ""]), min_size=5,
                         max_size=5), min_size=1, max_size=4))
def test_the_majority_of_k_by_counting_every_subset(answers):
    correct = [[text.startswith("right") for text in row] for row in answers]
    found = statistics.majority_at(np.array(correct), np.array(answers))
    assert found == {k: pytest.approx(majority(correct, answers, k), abs=1e-12)
                     for k in (1, 2, 4, 5)}


def test_the_majority_of_many_samples_is_near_that_of_all_subsets():
    found = drawn(40, 12)
    by_subsets = statistics.majority_at(found.correct, found.answers, seed=3)
    assert math.comb(12, 4) > statistics.SUBSETS            # drawn, not counted
    assert by_subsets[4] == pytest.approx(majority(found.correct, found.answers, 4), abs=0.01)
    assert by_subsets[12] == pytest.approx(majority(found.correct, found.answers, 12), abs=1e-12)
    assert by_subsets == statistics.majority_at(found.correct, found.answers, seed=3)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3000)), min_size=1, max_size=20))
def test_a_larger_budget_never_hurts(responses):
    correct, lengths = (np.array(column)[:, None] for column in zip(*responses, strict=True))
    found = statistics.budgets(correct, lengths)
    for one, other in itertools.pairwise(found):
        assert one.budget < other.budget and one.accuracy <= other.accuracy
        assert one.tokens <= other.tokens
    assert found[-1].budget >= lengths.max() and found[-1].accuracy == pytest.approx(correct.mean())
    assert found[-1].tokens == pytest.approx(lengths.mean())


def test_budgets_are_half_powers_of_two():
    found = statistics.budgets(np.array([[True]]), np.array([[130]]))
    assert [each.budget for each in found] == [16, 23, 32, 45, 64, 91, 128, 181]
    assert [each.accuracy for each in found] == [0.0] * 7 + [1.0]


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (3, 3), (2, 9), (0, 90), (400, 330)])
def test_with_one_sample_the_p_value_is_mcnemars(better, worse):
    differences = np.array([1] * better + [-1] * worse + [0] * 50)
    wanted = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert statistics.sign_flip_p_value(differences) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_with_several_samples_the_p_value_is_that_of_every_flip_of_signs(seed):
    differences = np.random.default_rng(seed).integers(-3, 5, 11)
    wanted = stats.permutation_test((differences,), np.sum, permutation_type="samples",
                                    n_resamples=np.inf).pvalue
    assert statistics.sign_flip_p_value(differences) == pytest.approx(wanted, rel=1e-9)


def test_a_comparison_by_hand():
    base = outcomes([[True], [False], [False], [True]], [[10], [20], [30], [40]],
                    levels=list("eehh"))
    other = outcomes([[True], [True], [True], [False]], [[5], [10], [15], [50]],
                     levels=list("eehh"))
    found = statistics.compare(base, other)
    assert (found.accuracy_change, found.token_ratio) == (0.25, 0.8)
    assert (found.better, found.worse, found.test, found.p_value) == (2, 1, "mcnemar", 1.0)
    assert found.aes == pytest.approx(0.2 + 3 * 0.25 / 0.5)
    deviation = np.array([0.0, 1.0, 1.0, -1.0]).std(ddof=1)
    assert found.problems_to_detect == math.ceil(((1.959964 + 0.841621) * deviation / 0.02) ** 2)
    easy, hard = found.by_difficulty["e"], found.by_difficulty["h"]
    assert (easy.problems, easy.accuracy_base, easy.accuracy, easy.tokens_base, easy.tokens) == (
        2, 0.5, 1, 15, 7.5)
    # half of each: no doubt of the ratio
    assert easy.saving == 0.5 and easy.saving_interval == (0.5, 0.5)
    assert hard.saving == pytest.approx(1 - 65 / 70)
    assert hard.saving_interval[0] < hard.saving < hard.saving_interval[1]


@pytest.mark.parametrize(("accuracy", "change", "ratio", "score"),
                         [(0.5, 0.0, 0.6, 0.4), (0.5, 0.05, 0.6, 0.4 + 0.3),
                          (0.5, -0.05, 0.6, 0.4 - 0.5), (0.8, 0.0, 1.2, -0.2),
                          (0.0, 0.1, 0.5, None)])
def test_the_accuracy_efficiency_score(accuracy, change, ratio, score):
    assert statistics.aes(accuracy, change, ratio) == (None if score is None
                                                       else pytest.approx(score))


def test_so_many_problems_detect_two_points_four_times_in_five():
    shares = np.array([0.11, 0.80, 0.09])  # better by one, the same, worse by one: 2 points
    problems = statistics.problems_to_detect(np.repeat([1.0, 0.0, -1.0],
                                                       (shares * 10_000).astype(int)))
    better, _, worse = np.random.default_rng(0).multinomial(problems, shares, 20_000).T
    change = (better - worse) / problems
    error = np.sqrt(((better + worse) / problems - change**2) / problems)
    assert np.mean(np.abs(change / error) > stats.norm.ppf(0.975)) == pytest.approx(0.8, abs=0.02)


def test_without_levels_difficulty_is_how_often_the_base_is_right():
    base = outcomes([[False] * 4, [True, False, False, False], [True, True, False, False],
                     [True] * 4], [[10] * 4] * 4)
    other = outcomes([[True] * 4] * 4, [[4] * 4, [6] * 4, [8] * 4, [2] * 4])
    found = statistics.compare(base, other)
    assert found.test == "sign-flip permutation"
    assert {name: (row.problems, row.saving) for name, row in found.by_difficulty.items()} == {
        "base right 0 %": (1, pytest.approx(0.6)), "base right < 50 %": (1, pytest.approx(0.4)),
        "base right >= 50 %": (1, pytest.approx(0.2)), "base right 100 %": (1, pytest.approx(0.8))}
    single = statistics.compare(outcomes([[True], [False], [True]], [[1]] * 3),
                                outcomes([[True]] * 3, [[1]] * 3))
    assert {name: row.problems for name, row in single.by_difficulty.items()} == {
        "base wrong": 1, "base right": 2}


@pytest.mark.parametrize("samples", [1, 3])
def test_a_model_against_itself_shows_no_difference(samples):
    base = drawn(200, samples, levels=3)
    found = statistics.compare(base, shuffled(base))
    assert found.accuracy_change_interval == (0.0, 0.0) and found.token_ratio_interval == (1.0, 1.0)
    assert (found.p_value, found.better, found.worse, found.aes) == (1.0, 0, 0, 0.0)
    assert found.problems_to_detect is None
    assert all(row.saving_interval == (0.0, 0.0) for row in found.by_difficulty.values())


def test_the_order_of_the_problems_changes_nothing():
    base, other = drawn(150, 4, levels=3), drawn(150, 4, seed=1, tokens=200.0, levels=3)
    assert statistics.summarize(shuffled(base, 1)) == statistics.summarize(base)
    assert statistics.compare(shuffled(base, 1), shuffled(other, 2)) == statistics.compare(
        base, other)
    assert statistics.compare(base, other, seed=1) != statistics.compare(base, other)


def test_samples_may_be_of_different_numbers():
    base, other = drawn(60, 3), drawn(60, 4, seed=1)
    found = statistics.compare(base, other)
    assert found.accuracy_change == pytest.approx(other.correct.mean() - base.correct.mean())
    differences = 3 * other.correct.sum(axis=1) - 4 * base.correct.sum(axis=1)
    assert found.better == (differences > 0).sum()
    assert found.p_value == statistics.sign_flip_p_value(differences)


def test_different_problems_are_not_compared():
    base = outcomes([[True], [True]], [[1], [1]], uids=[3, 5])
    with pytest.raises(ValueError, match="needs the same problems, got 2 and 2, 1 of them in both"):
        statistics.compare(base, dataclasses.replace(base, uids=np.array([3, 6])))


@pytest.mark.parametrize("problems", [1, 2, 3, 40])
def test_small_and_uniform_sets_give_numbers_without_a_warning(problems):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for correct in (np.zeros((problems, 2)), np.ones((problems, 2)),
                        np.arange(problems * 2).reshape(-1, 2) < 1):
            base, other = outcomes(correct, np.full((problems, 2), 9)), outcomes(
                correct, [[3, 4]] * problems)
            found = [dataclasses.asdict(each)
                     for each in (statistics.summarize(base), statistics.compare(base, other),
                                  statistics.compare(other, base))]
            json.dumps(found, allow_nan=False)
    assert found[0]["tokens_interval"] == (9.0, 9.0)


def test_summaries_and_comparisons_come_back_from_json():
    base, other = drawn(50, 4, levels=2), drawn(50, 4, seed=1, levels=2)
    summary, comparison = statistics.summarize(base), statistics.compare(base, other)
    for record in (summary, comparison):
        table = json.loads(json.dumps(dataclasses.asdict(record)))
        assert rows.convert(table, type(record), "table") == record
    assert rows.convert(dataclasses.asdict(summary), statistics.Summary, "table") == summary


def test_an_interval_of_a_mean_is_students_where_the_data_are_normal():
    values = np.random.default_rng(0).normal(5.0, 2.0, 40)
    wanted = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    assert statistics.interval(np.mean, values) == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize(("shares", "bound"),
                         [(np.zeros(8), 1 - 0.025 ** (1 / 8)), (np.ones(8), 0.025 ** (1 / 8))])
def test_none_or_all_of_a_few_right_says_little(shares, bound):
    low, high = statistics.share_interval(shares)
    assert (low, high) == pytest.approx((0, bound) if shares[0] == 0 else (bound, 1))


@pytest.mark.parametrize("right", range(41))
def test_with_one_sample_the_interval_is_that_of_binomial_tests(right):
    shares = np.random.default_rng(right).permutation(np.arange(40) < right).astype(float)
    low, high = statistics.share_interval(shares)
    # Its ends are the rates at which so many right ones, or more, or fewer, come up once in 40
    # times.
    assert low == 0.0 if right == 0 else stats.binom.sf(right - 1, 40, low) == pytest.approx(0.025)
    assert high == 1.0 if right == 40 else stats.binom.cdf(right, 40, high) == pytest.approx(0.025)
    found = statistics.summarize(outcomes(shares[:, None] == 1, np.ones((40, 1))))
    assert found.accuracy_interval == (low, high)


def test_with_several_samples_the_interval_is_a_bootstrap():
    shares = np.array([0.0, 0.5, 1.0, 1.0] * 10)
    assert statistics.share_interval(shares) == statistics.interval(np.mean, shares)


@pytest.mark.parametrize(("rate", "problems"), [(0.6, 200), (0.95, 30)])
def test_19_of_20_intervals_of_one_model_hold_the_truth(rate, problems):
    times, held = 1000, 0
    for seed in range(times):
        right = np.random.default_rng(seed).random(problems) < rate
        low, high = statistics.share_interval(right.astype(float))
        held += low <= rate <= high
    assert held / times >= 0.94  # wider where problems are few: right ones come in whole numbers


def test_an_interval_of_a_ratio_is_that_of_the_delta_method_where_problems_are_many():
    rng = np.random.default_rng(0)
    hard = rng.gamma(4.0, 50.0, 2000)
    base, other = hard * rng.gamma(4.0, 0.25, 2000), 0.6 * hard * rng.gamma(4.0, 0.25, 2000)
    ratio = other.mean() / base.mean()
    error = stats.sem(other - ratio * base) / base.mean()
    wanted = (ratio - 1.96 * error, ratio + 1.96 * error)
    assert statistics.interval(statistics.ratio_of_sums, other, base) == pytest.approx(
        wanted, abs=0.05 * error * 2)


def accuracy_changes(rng, problems):
    """Differences between two models, one sample each; the second knows a fifth of what the first
    does not."""
    rate = rng.beta(2.0, 1.0, problems)
    return np.mean, (rng.binomial(1, rate + 0.2 * (1 - rate)) - rng.binomial(1, rate).astype(
        float),), 0.2 / 3


def token_ratios(rng, problems):
    """Lengths of two models, of a long tail, shared by the two as far as the problem makes it."""
    hard = 500.0 * rng.gamma(2.0, 1.0, problems)
    lengths = [hard * rng.gamma(4.0, 0.25, problems) for _ in range(2)]
    return statistics.ratio_of_sums, (0.6 * lengths[0], lengths[1]), 0.6


@pytest.mark.slow
@pytest.mark.parametrize("problems", [30, 200])
@pytest.mark.parametrize("made", [accuracy_changes, token_ratios])
def test_19_of_20_intervals_hold_the_truth(made, problems):
    times, held = 1000, 0
    for seed in range(times):
        statistic, columns, truth = made(np.random.default_rng(seed), problems)
        low, high = statistics.interval(statistic, *columns, seed=seed, resamples=1000)
        held += low <= truth <= high
    assert 0.93 <= held / times <= 0.97
