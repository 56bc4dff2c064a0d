"""Numbers to publish: accuracy and tokens of a model on a set, and a comparison with another model.

Problems are the random sample: intervals are 95 % bootstraps over problems, the responses to a
problem stay together, and a comparison is paired. docs/statistics.md says what each number means
and when not to trust it. P problems, n samples of each.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import signal, stats

from effreason.types import FinishReason, LevelResult, Outcomes

Interval = tuple[float, float]

CONFIDENCE, POWER = 0.95, 0.8
RESAMPLES = 10_000
RESAMPLED_AT_ONCE = 2_000_000       # numbers of a bootstrap that are in memory together
SUBSETS = 256                       # of a problem's samples that are voted on, at most
CHANGE_TO_DETECT = 0.02             # of accuracy
SMALLEST_BUDGET = 16                # tokens
AES_GAIN, AES_LOSS = 3.0, 5.0
KNOWN_LEVELS = ("easy", "medium", "hard")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Accuracy and tokens if responses were cut off at a number of tokens."""

    budget: int                     # tokens
    accuracy: float                 # right and no longer than the budget, 0..1
    tokens: float                   # mean tokens, none beyond the budget


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A model on one set.

    Accuracies are 0..1, means over samples, then problems. None: there are no such responses."""

    problems: int
    samples: int                    # for each problem
    accuracy: float
    accuracy_interval: Interval
    tokens: float                   # mean response tokens through EOS
    tokens_interval: Interval
    tokens_median: float            # of all responses
    tokens_right: float | None      # mean over right responses
    tokens_wrong: float | None
    truncated: float                # share of responses cut off, at the limit or as repetitions
    pass_at: dict[int, float]       # at least one of k samples is right
    majority_at: dict[int, float]   # the most frequent answer of k samples is right
    tokens_per_solved: float | None     # all tokens / right responses
    tokens_after_answer: float | None   # mean tokens after the first statement of the right answer
    budgets: tuple[Budget, ...]
    by_level: dict[str, LevelResult]


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """Two models on the problems of one difficulty."""

    problems: int
    accuracy_base: float
    accuracy: float
    tokens_base: float
    tokens: float
    saving: float                   # 1 - tokens / tokens_base
    saving_interval: Interval


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model against the base, on the same problems."""

    accuracy_change: float          # of shares: 0.02 = 2 points
    accuracy_change_interval: Interval
    token_ratio: float              # mean tokens / the base's
    token_ratio_interval: Interval
    p_value: float                  # of the accuracy change, two-sided
    test: str                       # mcnemar | sign-flip permutation
    better: int                     # problems with a higher share of right responses than the base
    worse: int
    aes: float | None               # accuracy-efficiency score; None if the base is never right
    problems_to_detect: int | None  # that would show a change of 2 points with 80 % power; None if
                                    # no problem differs
    by_difficulty: dict[str, Difficulty]


def summarize(outcomes: Outcomes, *, seed: int = 0) -> Summary:
    """Describes a model on one set. The order of the problems does not matter.

    Args: seed, of the bootstrap and of the votes. Raises: ValueError without responses."""
    if outcomes.correct.size == 0:
        raise ValueError(f"statistics need responses, got an array of {outcomes.correct.shape}")

    ordered = sorted_by_uid(outcomes)
    correct, lengths = ordered.correct, ordered.lengths
    accuracy, tokens = correct.mean(axis=1), lengths.mean(axis=1)
    after_answer = (lengths - ordered.first_answer_token)[~np.isnan(ordered.first_answer_token)]

    return Summary(
        problems=correct.shape[0], samples=correct.shape[1],
        accuracy=float(accuracy.mean()), accuracy_interval=share_interval(accuracy, seed=seed),
        tokens=float(tokens.mean()), tokens_interval=interval(np.mean, tokens, seed=seed),
        tokens_median=float(np.median(lengths)), tokens_right=_mean(lengths[correct]),
        tokens_wrong=_mean(lengths[~correct]),
        truncated=float(np.mean(ordered.finish != FinishReason.EOS)),
        pass_at={k: pass_at(correct, k) for k in sample_counts(correct.shape[1])},
        majority_at=majority_at(correct, ordered.answers, seed=seed),
        tokens_per_solved=float(lengths.sum() / correct.sum()) if correct.any() else None,
        tokens_after_answer=_mean(after_answer), budgets=budgets(correct, lengths),
        by_level={level: LevelResult(accuracy=float(accuracy[mask].mean()),
                                     tokens=float(tokens[mask].mean()), problems=int(mask.sum()))
                  for level in level_names(outcomes.levels.tolist())
                  for mask in [ordered.levels == level]})


def compare(base: Outcomes, other: Outcomes, *, seed: int = 0) -> Comparison:
    """Compares a model with the base, problem by problem; their numbers of samples may differ.

    Raises: ValueError unless both have the same problems."""
    levels = level_names(base.levels.tolist())
    base, other = sorted_by_uid(base), sorted_by_uid(other)
    if (base.correct.size == 0 or other.correct.size == 0
            or not np.array_equal(base.uids, other.uids)):
        raise ValueError(
            f"a comparison needs the same problems, got {len(base.uids)} and {len(other.uids)}, "
            f"{len(np.intersect1d(base.uids, other.uids))} of them in both")

    right_base, right = base.correct.mean(axis=1), other.correct.mean(axis=1)
    tokens_base, tokens = base.lengths.mean(axis=1), other.lengths.mean(axis=1)
    change = float((right - right_base).mean())
    ratio = float(ratio_of_sums(tokens, tokens_base, axis=-1))

    # In whole numbers: exact, unlike means of thirds.
    differences = (other.correct.sum(axis=1) * base.correct.shape[1]
                   - base.correct.sum(axis=1) * other.correct.shape[1])
    single = base.correct.shape[1] == other.correct.shape[1] == 1

    return Comparison(
        accuracy_change=change,
        accuracy_change_interval=interval(np.mean, right - right_base, seed=seed),
        token_ratio=ratio,
        token_ratio_interval=interval(ratio_of_sums, tokens, tokens_base, seed=seed),
        p_value=sign_flip_p_value(differences),
        test="mcnemar" if single else "sign-flip permutation",
        better=int((differences > 0).sum()), worse=int((differences < 0).sum()),
        aes=aes(float(right_base.mean()), change, ratio),
        problems_to_detect=problems_to_detect(right - right_base),
        by_difficulty={name: _difficulty(right_base[mask], right[mask], tokens_base[mask],
                                         tokens[mask], seed)
                       for name, mask in _difficulty_masks(base, levels).items()})


def sorted_by_uid(outcomes: Outcomes) -> Outcomes:
    """Sorts the problems by uid, so that no number depends on their order."""
    order = np.argsort(outcomes.uids, kind="stable")
    return Outcomes(**{name: np.asarray(column)[order] for name, column in vars(outcomes).items()})


def level_names(levels: Iterable[Any]) -> list[str]:
    """Returns the levels from easy to hard, each once.

    Order: the words this project uses, then names by the number in them, then other names."""
    def order(level: str) -> tuple[int, float, str]:
        if level in KNOWN_LEVELS:
            return 0, KNOWN_LEVELS.index(level), level
        number = re.search(r"\d+", level)
        return (1, float(number[0]), level) if number else (2, 0.0, level)

    return sorted({str(level) for level in levels}, key=order)


def interval(statistic: Callable[..., Any], *columns: np.ndarray, seed: int = 0,
             resamples: int = RESAMPLES) -> Interval:
    """Returns a 95 % bootstrap interval over problems, by percentiles widened for few problems.

    If all problems are equal it is the point itself. For ratios with long tails it covers the truth
    more often than BCa (docs/statistics.md).

    Args: statistic(*columns, axis) of paired columns float64[P]; resamples, draws of P problems.
    Source: Hesterberg 2015, arXiv 1411.5279, the expanded percentile interval."""
    point, count = float(statistic(*columns, axis=-1)), len(columns[0])
    if all(np.all(column == column[0]) for column in columns):
        return point, point

    outermost = math.sqrt(count / (count - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    bounds = stats.bootstrap(
        columns, statistic, n_resamples=resamples, batch=max(1, RESAMPLED_AT_ONCE // count),
        paired=True, vectorized=True, confidence_level=1 - 2 * stats.norm.sf(outermost),
        rng=np.random.default_rng(seed), method="percentile").confidence_interval
    return float(bounds.low), float(bounds.high)


def share_interval(shares: np.ndarray, *, seed: int = 0) -> Interval:
    """Returns the interval of a mean of shares; if each is 0 or 1, the exact binomial one.

    Near 0 and 1 a bootstrap is too narrow: 0 right of 8 does not prove that none ever would be.

    Args: shares float64[P], in 0..1. Source: Clopper and Pearson 1934."""
    if np.all((shares == 0) | (shares == 1)):
        exact = stats.binomtest(int(shares.sum()), len(shares)).proportion_ci(CONFIDENCE)
        return float(exact.low), float(exact.high)
    return interval(np.mean, shares, seed=seed)


def sample_counts(samples: int) -> list[int]:
    """Returns the k of pass@k and maj@k: powers of two up to the samples, and the samples."""
    return sorted({*(2**power for power in range(samples.bit_length())), samples})


def pass_at(correct: np.ndarray, k: int) -> float:
    """Returns pass@k, the chance that k of a problem's samples include a right one.

    With c of n samples right: 1 - C(n - c, k) / C(n, k).

    Args: correct bool[P, n]; k in [1, n]. Source: Chen et al. 2021, arXiv 2107.03374."""
    samples = correct.shape[1]
    misses = np.array([math.comb(samples - right, k) / math.comb(samples, k)
                       for right in range(samples + 1)])
    return float(1.0 - misses[correct.sum(axis=1)].mean())


def majority_at(correct: np.ndarray, answers: np.ndarray, *, seed: int = 0) -> dict[int, float]:
    """Returns maj@k for each k: how often the most frequent answer of k samples is right.

    It is the mean over all subsets of k samples, or over random ones if there are many. Right
    answers are one answer whatever their form, wrong ones differ by their text, and no answer, "",
    loses against any. Tied answers share the win.

    Args: correct bool[P, n]; answers str[P, n]. Source: self-consistency, arXiv 2203.11171."""
    problems, samples = correct.shape
    ballots = np.array([_ballots(*row) for row in zip(correct, answers, strict=True)])
    rng = np.random.default_rng(seed)
    # One order of the samples serves every k: its first k are a random subset.
    orders = [rng.random((problems, samples)).argsort(axis=1) for _ in range(SUBSETS)]

    shares = {}
    for k in sample_counts(samples):
        if math.comb(samples, k) <= SUBSETS:
            chosen = [ballots[:, subset] for subset in itertools.combinations(range(samples), k)]
        else:
            chosen = [np.take_along_axis(ballots, order[:, :k], axis=1) for order in orders]
        shares[k] = float(np.mean([vote(subset, samples) for subset in chosen]))
    return shares


def _ballots(correct: np.ndarray, answers: np.ndarray) -> list[int]:
    """Numbers the answers to a problem, int[n]: 0 = right, 1.. = wrong answers, -1 = none."""
    numbers: dict[str, int] = {}
    return [0 if right else -1 if answer == "" else numbers.setdefault(answer, len(numbers) + 1)
            for right, answer in zip(correct, answers.tolist(), strict=True)]


def vote(ballots: np.ndarray, wrong_answers: int) -> float:
    """Returns how often the right answer wins the vote.

    Args: ballots int[P, k], 0 = right, 1..wrong_answers = wrong answers, -1 = none."""
    problems, candidates = len(ballots), wrong_answers + 1
    rows, columns = np.nonzero(ballots >= 0)
    votes = np.bincount(rows * candidates + ballots[rows, columns],
                        minlength=problems * candidates).reshape(problems, candidates)

    most = votes.max(axis=1)
    winners = (votes == most[:, None]).sum(axis=1)
    return float(np.mean(np.where((most > 0) & (votes[:, 0] == most), 1.0 / winners, 0.0)))


def budgets(correct: np.ndarray, lengths: np.ndarray) -> tuple[Budget, ...]:
    """Returns accuracy and tokens at budgets of 16 times powers of sqrt(2), up to the longest.

    Nothing is sampled again: the first tokens of a response do not depend on its limit.

    Args: correct bool[P, n]; lengths int32[P, n]."""
    table: list[Budget] = []
    while not table or table[-1].budget < lengths.max():
        budget = round(SMALLEST_BUDGET * 2 ** (len(table) / 2))
        table.append(Budget(budget=budget, accuracy=float(np.mean(correct & (lengths <= budget))),
                            tokens=float(np.minimum(lengths, budget).mean())))
    return tuple(table)


def sign_flip_p_value(differences: np.ndarray) -> float:
    """Returns the exact two-sided p-value of paired differences whose signs could all be flipped.

    The sum over differences of one size is binomial; the distributions of the sizes are convolved.
    If all differences have one size, this is McNemar's exact test. Args: differences int[P]."""
    sizes = Counter(np.abs(differences[differences != 0]).tolist())
    chances = np.ones(1)            # of the sums -total, -total + 2, ..., total
    for size, count in sorted(sizes.items()):
        flips = np.zeros(size * count + 1)
        flips[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = signal.convolve(chances, flips)

    as_far = (len(chances) - 1 + abs(int(differences.sum()))) // 2
    return float(np.clip(2.0 * chances[as_far:].sum(), 0.0, 1.0))


def aes(accuracy_base: float, accuracy_change: float, token_ratio: float) -> float | None:
    """Returns the accuracy-efficiency score; None if the base is never right.

    It is the share of tokens saved, plus 3 times the relative gain in accuracy or minus 5 times the
    loss. Source: O1-Pruner, arXiv 2501.12570."""
    if accuracy_base == 0.0:
        return None
    factor = AES_GAIN if accuracy_change >= 0 else AES_LOSS
    return 1.0 - token_ratio + factor * accuracy_change / accuracy_base


def problems_to_detect(differences: np.ndarray) -> int | None:
    """Returns how many such problems would show a change of 2 points at 5 % with 80 % power.

    None if the differences do not scatter.
    Args: differences float64[P], of the paired shares of right responses."""
    deviation = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    if deviation == 0.0:
        return None
    quantiles = stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)
    return math.ceil((quantiles * deviation / CHANGE_TO_DETECT) ** 2)


def _difficulty_masks(base: Outcomes, levels: list[str]) -> dict[str, np.ndarray]:
    """Returns a mask bool[P] for each level; for a single level, one for each base accuracy."""
    if len(levels) > 1:
        return {level: base.levels == level for level in levels}

    rate = base.correct.mean(axis=1)
    if base.correct.shape[1] == 1:
        buckets = {"base wrong": rate == 0, "base right": rate == 1}
    else:
        buckets = {"base right 0 %": rate == 0, "base right < 50 %": (rate > 0) & (rate < 0.5),
                   "base right >= 50 %": (rate >= 0.5) & (rate < 1), "base right 100 %": rate == 1}
    return {name: mask for name, mask in buckets.items() if mask.any()}


def _difficulty(right_base: np.ndarray, right: np.ndarray, tokens_base: np.ndarray,
                tokens: np.ndarray, seed: int) -> Difficulty:
    low, high = interval(ratio_of_sums, tokens, tokens_base, seed=seed)
    return Difficulty(
        problems=len(right), accuracy_base=float(right_base.mean()), accuracy=float(right.mean()),
        tokens_base=float(tokens_base.mean()), tokens=float(tokens.mean()),
        saving=1.0 - float(ratio_of_sums(tokens, tokens_base, axis=-1)),
        saving_interval=(1.0 - high, 1.0 - low))


def ratio_of_sums(tokens: np.ndarray, tokens_base: np.ndarray, axis: int) -> np.ndarray:
    """Returns mean tokens over the base's; long problems count by their length, as they cost."""
    return np.sum(tokens, axis=axis) / np.sum(tokens_base, axis=axis)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None
