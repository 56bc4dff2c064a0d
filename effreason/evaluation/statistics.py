"""Numbers to publish: what a model made of a set of problems, and how it compares with another on the same ones.

Problems are what is drawn at random: intervals are 95 % bootstraps over problems, the samples of a problem stay
together, and a comparison is paired. docs/statistics.md says what each number means and when not to trust it.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import signal, stats

from effreason.types import FinishReason, LevelResult, Outcomes

Interval = tuple[float, float]

CONFIDENCE, POWER = 0.95, 0.8
RESAMPLES = 10_000
RESAMPLED_AT_ONCE = 2_000_000       # numbers of a bootstrap that are in memory together
SUBSETS = 256                       # of a problem's samples that are voted on, where there are more
CHANGE_TO_DETECT = 0.02             # of accuracy
SMALLEST_BUDGET = 16                # tokens
AES_GAIN, AES_LOSS = 3.0, 5.0
KNOWN_LEVELS = ("easy", "medium", "hard")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What is left where responses are cut off at a number of tokens."""

    budget: int                     # tokens
    accuracy: float                 # right and no longer than the budget, 0..1
    tokens: float                   # mean tokens, none beyond the budget


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A model on one set. Accuracies are 0..1, means over samples, then problems; None: there are no such responses."""

    problems: int
    samples: int                    # for each problem
    accuracy: float
    accuracy_interval: Interval
    tokens: float                   # mean response tokens through EOS
    tokens_interval: Interval
    tokens_median: float            # of all responses
    tokens_right: float | None      # mean over right responses
    tokens_wrong: float | None
    truncated: float                # share of responses that were cut off, at the token limit or as loops
    pass_at: dict[int, float]       # at least one of k samples is right
    majority_at: dict[int, float]   # the most frequent answer of k samples is right
    tokens_per_solved: float | None     # all tokens / right responses
    tokens_after_answer: float | None   # mean tokens behind the first statement of the right answer
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
    better: int                     # problems with a higher share of right responses than the base's
    worse: int
    aes: float | None               # accuracy-efficiency score; None where the base is never right
    problems_to_detect: int | None  # that would show a change of 2 points with 80 % power; None where none differs
    by_difficulty: dict[str, Difficulty]


def summarize(outcomes: Outcomes, *, seed: int = 0) -> Summary:
    """Describes a model on one set. The order of the problems does not matter.

    Args: seed, of the bootstrap and of the votes. Raises: ValueError without responses."""
    if outcomes.correct.size == 0:
        raise ValueError(f"statistics need responses, got an array of {outcomes.correct.shape}")
    sorted_ones = by_uid(outcomes)
    correct, lengths = sorted_ones.correct, sorted_ones.lengths
    accuracy, tokens = correct.mean(axis=1), lengths.mean(axis=1)
    after = (lengths - sorted_ones.first_answer_token)[~np.isnan(sorted_ones.first_answer_token)]
    return Summary(
        problems=correct.shape[0], samples=correct.shape[1],
        accuracy=float(accuracy.mean()), accuracy_interval=share_interval(accuracy, seed=seed),
        tokens=float(tokens.mean()), tokens_interval=interval(np.mean, tokens, seed=seed),
        tokens_median=float(np.median(lengths)), tokens_right=_mean(lengths[correct]),
        tokens_wrong=_mean(lengths[~correct]), truncated=float(np.mean(sorted_ones.finish != FinishReason.EOS)),
        pass_at={k: pass_at(correct, k) for k in sample_counts(correct.shape[1])},
        majority_at=majority_at(correct, sorted_ones.answers, seed=seed),
        tokens_per_solved=float(lengths.sum() / correct.sum()) if correct.any() else None,
        tokens_after_answer=_mean(after), budgets=budgets(correct, lengths),
        by_level={level: LevelResult(accuracy=float(accuracy[at].mean()), tokens=float(tokens[at].mean()),
                                     problems=int(at.sum()))
                  for level in level_names(outcomes.levels.tolist()) for at in [sorted_ones.levels == level]})


def compare(base: Outcomes, other: Outcomes, *, seed: int = 0) -> Comparison:
    """Compares a model with the base, problem by problem; they may have different numbers of samples.

    Raises: ValueError unless both are of the same problems."""
    levels = level_names(base.levels.tolist())
    base, other = by_uid(base), by_uid(other)
    if base.correct.size == 0 or other.correct.size == 0 or not np.array_equal(base.uids, other.uids):
        raise ValueError(f"a comparison needs the same problems, got {len(base.uids)} and {len(other.uids)}, "
                         f"{len(np.intersect1d(base.uids, other.uids))} of them in both")
    right_base, right = base.correct.mean(axis=1), other.correct.mean(axis=1)
    tokens_base, tokens = base.lengths.mean(axis=1), other.lengths.mean(axis=1)
    change, ratio = float((right - right_base).mean()), float(ratio_of_sums(tokens, tokens_base, axis=-1))
    single = base.correct.shape[1] == other.correct.shape[1] == 1
    # In whole numbers: exact, where the means of thirds would not be.
    differences = (other.correct.sum(axis=1) * base.correct.shape[1]
                   - base.correct.sum(axis=1) * other.correct.shape[1])
    return Comparison(
        accuracy_change=change, accuracy_change_interval=interval(np.mean, right - right_base, seed=seed),
        token_ratio=ratio, token_ratio_interval=interval(ratio_of_sums, tokens, tokens_base, seed=seed),
        p_value=sign_flip_p_value(differences), test="mcnemar" if single else "sign-flip permutation",
        better=int((differences > 0).sum()), worse=int((differences < 0).sum()),
        aes=aes(float(right_base.mean()), change, ratio),
        problems_to_detect=problems_to_detect(right - right_base),
        by_difficulty={name: _difficulty(right_base[at], right[at], tokens_base[at], tokens[at], seed)
                       for name, at in _difficulties(base, levels).items()})


def by_uid(outcomes: Outcomes) -> Outcomes:
    """The problems in the order of their uids: nothing then depends on the order they came in."""
    order = np.argsort(outcomes.uids, kind="stable")
    return replace(outcomes, **{name: np.asarray(column)[order] for name, column in vars(outcomes).items()})


def level_names(levels: Iterable[Any]) -> list[str]:
    """Levels from easy to hard, each once: by the words this project uses, then by the number in the name, then by the
    name."""
    def place(level: str) -> tuple[int, float, str]:
        if level in KNOWN_LEVELS:
            return 0, KNOWN_LEVELS.index(level), level
        number = re.search(r"\d+", level)
        return (1, float(number[0]), level) if number else (2, 0.0, level)

    return sorted({str(level) for level in levels}, key=place)


def interval(statistic: Callable[..., Any], *columns: np.ndarray, seed: int = 0,
             resamples: int = RESAMPLES) -> Interval:
    """A 95 % bootstrap interval over problems, by percentiles that are widened where problems are few.

    The point where all problems are alike. Of ratios with long tails this covers the truth
    more often than BCa does (docs/statistics.md).
    Args: statistic(*columns, axis) of paired columns float64[P]; resamples, draws of P problems.
    Source: Hesterberg 2015, arXiv 1411.5279, the expanded percentile interval."""
    point, count = float(statistic(*columns, axis=-1)), len(columns[0])
    if all(np.all(column == column[0]) for column in columns):
        return point, point
    outermost = math.sqrt(count / (count - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    found = stats.bootstrap(
        columns, statistic, n_resamples=resamples, batch=max(1, RESAMPLED_AT_ONCE // count), paired=True,
        vectorized=True, confidence_level=1 - 2 * stats.norm.sf(outermost), rng=np.random.default_rng(seed),
        method="percentile").confidence_interval
    return float(found.low), float(found.high)


def share_interval(shares: np.ndarray, *, seed: int = 0) -> Interval:
    """`interval` of a mean of shares, where each is 0 or 1 the exact binomial one: near 0 and 1 a bootstrap is too
    narrow, and that none of 8 problems is right does not say that none ever would be.

    Args: shares float64[P], in 0..1. Source: Clopper and Pearson 1934."""
    if np.all((shares == 0) | (shares == 1)):
        exact = stats.binomtest(int(shares.sum()), len(shares)).proportion_ci(CONFIDENCE)
        return float(exact.low), float(exact.high)
    return interval(np.mean, shares, seed=seed)


def sample_counts(samples: int) -> list[int]:
    """The k of pass@k and maj@k: powers of two up to the samples, and the samples themselves."""
    return sorted({*(2**power for power in range(samples.bit_length())), samples})


def pass_at(correct: np.ndarray, k: int) -> float:
    """The chance that k of a problem's n samples, c of them right, hold a right one: 1 - C(n - c, k) / C(n, k).

    Args: correct bool[P, n]; k in [1, n]. Source: Chen et al. 2021, arXiv 2107.03374."""
    samples = correct.shape[1]
    misses = np.array([math.comb(samples - right, k) / math.comb(samples, k) for right in range(samples + 1)])
    return float(1.0 - misses[correct.sum(axis=1)].mean())


def majority_at(correct: np.ndarray, answers: np.ndarray, *, seed: int = 0) -> dict[int, float]:
    """For each k, how often the most frequent answer of k samples is right: the mean over all subsets, or random ones.

    Right answers are one answer whatever their form, wrong ones are told apart by their text, and no answer, "", loses
    against any. Of tied winners each wins as often.
    Args: correct bool[P, n]; answers str[P, n]. Source: self-consistency, arXiv 2203.11171."""
    problems, samples = correct.shape
    ballots = np.array([_ballots(*row) for row in zip(correct, answers, strict=True)])
    rng = np.random.default_rng(seed)
    # One order of the samples serves every k: its first k are a random subset.
    orders = [rng.random((problems, samples)).argsort(axis=1) for _ in range(SUBSETS)]
    found = {}
    for k in sample_counts(samples):
        few = math.comb(samples, k) <= SUBSETS
        chosen = ([ballots[:, subset] for subset in itertools.combinations(range(samples), k)] if few else
                  [np.take_along_axis(ballots, order[:, :k], axis=1) for order in orders])
        found[k] = float(np.mean([vote(each, samples) for each in chosen]))
    return found


def _ballots(correct: np.ndarray, answers: np.ndarray) -> list[int]:
    """int[n]: 0 = right, 1.. = the wrong answers, -1 = none."""
    numbers: dict[str, int] = {}
    return [0 if right else -1 if answer == "" else numbers.setdefault(str(answer), len(numbers) + 1)
            for right, answer in zip(correct, answers, strict=True)]


def vote(ballots: np.ndarray, wrong_answers: int) -> float:
    """How often the right answer wins. Args: ballots int[P, k], 0 = right, 1..wrong_answers = wrong ones, -1 = none."""
    problems, places = len(ballots), wrong_answers + 1
    rows, columns = np.nonzero(ballots >= 0)
    cast = np.bincount(rows * places + ballots[rows, columns], minlength=problems * places).reshape(problems, places)
    most = cast.max(axis=1)
    winners = (cast == most[:, None]).sum(axis=1)
    return float(np.mean(np.where((most > 0) & (cast[:, 0] == most), 1.0 / winners, 0.0)))


def budgets(correct: np.ndarray, lengths: np.ndarray) -> tuple[Budget, ...]:
    """Accuracy and tokens if responses were cut off: budgets of half powers of two, 16 to where none is cut any more.

    Nothing is sampled again: the first tokens of a response do not depend on where it would be cut.
    Args: correct bool[P, k]; lengths int32[P, k]."""
    found: list[Budget] = []
    while not found or found[-1].budget < lengths.max():
        budget = round(SMALLEST_BUDGET * 2 ** (len(found) / 2))
        found.append(Budget(budget=budget, accuracy=float(np.mean(correct & (lengths <= budget))),
                            tokens=float(np.minimum(lengths, budget).mean())))
    return tuple(found)


def sign_flip_p_value(differences: np.ndarray) -> float:
    """Two-sided p-value of paired differences if each could as well have had the other sign: exact, without sampling.

    The sum over differences of one size is binomial; the sizes' distributions are convolved. With differences of one
    size alone it is McNemar's exact test. Args: differences int[P]."""
    sizes = Counter(np.abs(differences[differences != 0]).tolist())
    chances = np.ones(1)            # of the sums -total, -total + 2, ..., total, moved to start at 0
    for size, count in sorted(sizes.items()):
        flips = np.zeros(size * count + 1)
        flips[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = signal.convolve(chances, flips)
    as_far = (len(chances) - 1 + abs(int(differences.sum()))) // 2
    return float(np.clip(2.0 * chances[as_far:].sum(), 0.0, 1.0))


def aes(accuracy_base: float, accuracy_change: float, token_ratio: float) -> float | None:
    """Accuracy-efficiency score: the share of tokens saved, plus 3 times the relative gain in accuracy or minus 5 times
    the loss; None where the base is never right. Source: O1-Pruner, arXiv 2501.12570."""
    if accuracy_base == 0.0:
        return None
    return 1.0 - token_ratio + (AES_GAIN if accuracy_change >= 0 else AES_LOSS) * accuracy_change / accuracy_base


def problems_to_detect(differences: np.ndarray) -> int | None:
    """Problems that show a change of 2 points at 5 % with 80 % power, differences scattering as these do.

    None where they do not scatter. Args: differences float64[P], of the paired shares of right responses."""
    deviation = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    if deviation == 0.0:
        return None
    quantiles = stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)
    return math.ceil((quantiles * deviation / CHANGE_TO_DETECT) ** 2)


def _difficulties(base: Outcomes, levels: list[str]) -> dict[str, np.ndarray]:
    """bool[P] for each level, or where there is one alone, for each share of the base's responses that is right."""
    if len(levels) > 1:
        return {level: base.levels == level for level in levels}
    rate = base.correct.mean(axis=1)
    if base.correct.shape[1] == 1:
        buckets = {"base wrong": rate == 0, "base right": rate == 1}
    else:
        buckets = {"base right 0 %": rate == 0, "base right < 50 %": (rate > 0) & (rate < 0.5),
                   "base right >= 50 %": (rate >= 0.5) & (rate < 1), "base right 100 %": rate == 1}
    return {name: at for name, at in buckets.items() if at.any()}


def _difficulty(right_base: np.ndarray, right: np.ndarray, tokens_base: np.ndarray, tokens: np.ndarray,
                seed: int) -> Difficulty:
    low, high = interval(ratio_of_sums, tokens, tokens_base, seed=seed)
    return Difficulty(problems=len(right), accuracy_base=float(right_base.mean()), accuracy=float(right.mean()),
                      tokens_base=float(tokens_base.mean()), tokens=float(tokens.mean()),
                      saving=1.0 - float(ratio_of_sums(tokens, tokens_base, axis=-1)),
                      saving_interval=(1.0 - high, 1.0 - low))


def ratio_of_sums(tokens: np.ndarray, tokens_base: np.ndarray, axis: int) -> np.ndarray:
    """Mean tokens of one model over those of another: long problems count by their length, as they cost."""
    return np.sum(tokens, axis=axis) / np.sum(tokens_base, axis=axis)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def summary_from_table(table: dict[str, Any]) -> Summary:
    """The inverse of dataclasses.asdict, through JSON too."""
    return Summary(**table | {
        "accuracy_interval": _pair(table["accuracy_interval"]), "tokens_interval": _pair(table["tokens_interval"]),
        "pass_at": {int(k): share for k, share in table["pass_at"].items()},
        "majority_at": {int(k): share for k, share in table["majority_at"].items()},
        "budgets": tuple(Budget(**row) for row in table["budgets"]),
        "by_level": {level: LevelResult(**row) for level, row in table["by_level"].items()}})


def comparison_from_table(table: dict[str, Any]) -> Comparison:
    """The inverse of dataclasses.asdict, through JSON too."""
    return Comparison(**table | {
        "accuracy_change_interval": _pair(table["accuracy_change_interval"]),
        "token_ratio_interval": _pair(table["token_ratio_interval"]),
        "by_difficulty": {name: Difficulty(**row | {"saving_interval": _pair(row["saving_interval"])})
                          for name, row in table["by_difficulty"].items()}})


def _pair(values: list[float]) -> Interval:
    low, high = values
    return low, high
