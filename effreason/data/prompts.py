"""Stage 1: the problems of a training step, which are a pure function of seed and step."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np

from effreason.runtime.errors import UserError
from effreason.types import Problem

ROWS_PER_SOURCE = 2**26             # uids of a source; 32 sources make 2**31


@dataclasses.dataclass(frozen=True)
class Source:
    """The problems of one data set."""

    name: str
    weight: float | None            # share of each step, relative to the others; None = one pool
    problems: tuple[Problem, ...]


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A row of a data set that is not trained on."""

    source: str                     # name of the data set
    number: int                     # of the row in it, from 0
    reason: str
    text: str                       # of the problem, "" if it has none


@dataclasses.dataclass(frozen=True)
class Problems:
    """The problems that a run trains on."""

    sources: tuple[Source, ...]
    notes: tuple[str, ...] = ()     # lines for the log: how many, and what was left out
    left_out: tuple[LeftOut, ...] = ()

    def __len__(self) -> int:
        return sum(len(source.problems) for source in self.sources)


def batch(problems: Problems, size: int, seed: int, step: int) -> list[Problem]:
    """Returns the problems of a training step.

    Each problem comes once an epoch of its source, in an order that depends on (seed, source,
    epoch) alone. Sources with weights contribute the same number of problems to every step; sources
    without weights are one pool. An epoch's remainder of fewer problems than a step needs is left
    out, so that no problem comes twice in one step: two groups of one problem would be the same
    responses.

    Raises UserError for fewer problems than a step needs, or a weight too small for one problem."""
    pools = _pools(problems)
    chosen = []
    for index, (pool, count) in enumerate(zip(pools, _counts(pools, size), strict=True)):
        steps = len(pool.problems) // count
        if steps == 0:
            raise UserError(_too_few(problems, pool, count, size, one_pool=len(pools) == 1))

        epoch, step_of_epoch = divmod(step, steps)
        order = np.random.default_rng([seed, epoch, index]).permutation(len(pool.problems))
        first = step_of_epoch * count
        chosen += [pool.problems[row] for row in order[first : first + count]]

    if len(pools) > 1:
        # Mixed, so that each update of a step gets its share of every source.
        order = np.random.default_rng([seed, step, len(pools)]).permutation(size)
        chosen = [chosen[row] for row in order]
    return chosen


def others(problems: Problems, replaced: Sequence[Problem], used: Sequence[Problem],
           key: Sequence[int]) -> list[Problem | None]:
    """Returns an unused problem of the same pool for each problem to replace, None if it has none.

    The order depends on the key alone.

    Args:
        used: every problem the step has had so far.
        key: integers >= 0, such as seed, step and round."""
    used_uids = {problem.uid for problem in used}

    def unused(pool: Source, index: int) -> Iterator[Problem]:
        order = np.random.default_rng([*key, index]).permutation(len(pool.problems))
        return (pool.problems[row] for row in order if pool.problems[row].uid not in used_uids)

    candidates = [unused(pool, index) for index, pool in enumerate(_pools(problems))]
    pool_indices = [problem.uid // ROWS_PER_SOURCE if len(candidates) > 1 else 0
                    for problem in replaced]
    return [next(candidates[index], None) for index in pool_indices]


def fingerprint(problems: Problems | Sequence[Problem]) -> str:
    """Returns the SHA-256, in hexadecimal, of everything about the problems that a run depends on.

    Their order counts; weights, levels and the text of the problem do not."""
    if isinstance(problems, Problems):
        problems = [problem for source in problems.sources for problem in source.problems]

    digest = hashlib.sha256()
    for problem in problems:
        # The prompt's length comes first, so that no two lists of problems give the same bytes.
        facts = [problem.uid, len(problem.prompt), problem.reference, problem.kind, problem.choices]
        digest.update(json.dumps(facts).encode() + b"\n" + problem.prompt.astype("<i4").tobytes())
    return digest.hexdigest()


def _pools(problems: Problems) -> tuple[Source, ...]:
    """Returns the sources, or a single one with the problems of all if they have no weights."""
    if any(source.weight is not None for source in problems.sources):
        return problems.sources
    return (Source("", None, tuple(
        problem for source in problems.sources for problem in source.problems)),)


def _counts(pools: Sequence[Source], size: int) -> list[int]:
    """Returns each pool's problems in a step; the largest remainders of weight * size round up."""
    if len(pools) == 1:
        return [size]

    weights = np.array([pool.weight for pool in pools], np.float64)
    shares = weights / weights.sum() * size
    counts = np.floor(shares + 1e-9).astype(int)
    order = np.argsort(-(shares - counts), kind="stable")
    counts[order[: size - counts.sum()]] += 1

    for pool, count, share in zip(pools, counts, shares, strict=True):
        if count == 0:
            raise UserError(f"data.path: the weight of {pool.name} is {share:.2g} of the "
                            f"rollout.prompts_per_step = {size} problems of a step, which is none; "
                            "raise one or the other")
    return [int(count) for count in counts]


def _too_few(problems: Problems, pool: Source, count: int, size: int, *, one_pool: bool) -> str:
    """Returns the message for a pool with fewer problems than a step needs."""
    reasons = collections.Counter(
        row.reason for row in problems.left_out if one_pool or row.source == pool.name)
    left_out = ""
    if reasons:
        total = reasons.total()
        left_out = f"; {total} of {total + len(pool.problems)} were left out: " + ", ".join(
            f"{reason} ({number})" for reason, number in reasons.most_common())

    if one_pool:
        return ("rollout.prompts_per_step must be at most the number of problems, "
                f"{len(pool.problems)}, got {size}{left_out}")
    return (f"rollout.prompts_per_step = {size} takes {count} problems of {pool.name} for a step, "
            f"which has {len(pool.problems)}{left_out}; lower its weight in data.path")
