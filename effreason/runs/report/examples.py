"""Responses that a report shows: the same problem before and after, and the answers of a group.

They are chosen by rule, never by hand: typical problems, the largest saving, one that got better
and one that got worse. Long thinking is cut in the middle, so that a page stays small.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effreason.evaluation import statistics
from effreason.evaluation.responses import GradedResponse
from effreason.runtime import rows
from effreason.runtime.errors import UserError
from effreason.types import FinishReason

HEAD, TAIL = 3000, 1500             # characters of a long text that are shown
GROUP = 16                          # answers of a group that are shown
THINK, END_OF_THINKING = "<think>", "</think>"

Pair = tuple[GradedResponse, GradedResponse]    # the first and the last response to a problem


@dataclass(frozen=True, kw_only=True)
class Rollout(GradedResponse):
    """A row of rollouts.jsonl."""

    step: int
    reward: float
    advantage: Any = None           # a number; anything else is not shown


@dataclass(frozen=True, kw_only=True)
class ShownResponse:
    """One response as a page shows it."""

    label: str                      # when it was sampled, or by which model
    tokens: int
    correct: bool
    answer: str
    cut_off: bool
    thinking: str
    solution: str                   # the text after the thinking
    omitted: int                    # characters left out of the middle of the thinking
    saved: int                      # tokens fewer than the first response's


@dataclass(frozen=True, kw_only=True)
class Example:
    """One problem with responses side by side, and why it is shown."""

    reason: str
    level: str
    problem: str
    reference_answer: str
    responses: tuple[ShownResponse, ...]


@dataclass(frozen=True, kw_only=True)
class Group:
    """The responses to one prompt of a training step, the shortest first."""

    step: int
    level: str
    problem: str
    reference_answer: str
    responses: tuple[ShownResponse, ...]
    rewards: tuple[float, ...]
    advantages: tuple[float | None, ...]
    size: int                       # of the whole group


def shown(row: GradedResponse, label: str, before: int | None = None) -> ShownResponse:
    """Cuts a response for the page. Args: before, tokens of the response it is compared with."""
    thinking, end, solution = row.response.rpartition(END_OF_THINKING)
    if not end:
        thinking, solution = row.response, ""

    thinking = thinking.removeprefix(THINK).strip("\n")
    omitted = max(len(thinking) - HEAD - TAIL, 0)
    if omitted:
        thinking = f"{thinking[:HEAD]}\n\n[… {omitted:,} characters …]\n\n{thinking[-TAIL:]}"

    return ShownResponse(
        label=label, tokens=row.tokens, correct=row.correct, answer=row.answer or "",
        cut_off=row.finish != FinishReason.EOS, thinking=thinking, solution=solution.strip()[:HEAD],
        omitted=omitted, saved=0 if before is None else before - row.tokens)


def choose_examples(columns: Sequence[tuple[str, Sequence[GradedResponse]]]) -> list[Example]:
    """Chooses problems and shows their responses side by side.

    Args: columns, labels and graded responses to the same problems, the base's first."""
    tables = [{row.uid: row for row in responses if row.sample == 0} for _, responses in columns]
    uids = sorted(set.intersection(*map(set, tables))) if tables else []
    reasons = _choose([(tables[0][uid], tables[-1][uid]) for uid in uids])

    examples = []
    for uid, reason in reasons.items():
        first, *others = [table[uid] for table in tables]
        labels = [label for label, _ in columns]
        examples.append(Example(
            reason=reason, level=first.level, problem=first.problem,
            reference_answer=first.reference_answer,
            responses=(shown(first, labels[0]), *(
                shown(row, label, first.tokens)
                for row, label in zip(others, labels[1:], strict=True)))))
    return examples


def _choose(pairs: Sequence[Pair]) -> dict[int, str]:
    """Chooses which problems to show and why; within a category, the one with the median saving.

    Returns: the reasons by uid."""
    reasons: dict[int, str] = {}

    def saving(pair: Pair) -> tuple[int, int]:
        return pair[0].tokens - pair[1].tokens, pair[0].uid

    def take(candidates: Sequence[Pair], reason: str, rank: int) -> None:
        left = sorted((pair for pair in candidates if pair[0].uid not in reasons), key=saving)
        if left:
            reasons[left[min(rank, len(left) - 1)][0].uid] = reason

    def take_median(candidates: Sequence[Pair], reason: str) -> None:
        take(candidates, reason, (len(candidates) - 1) // 2)

    right = [pair for pair in pairs if pair[0].correct and pair[1].correct]
    if not right:
        take_median(pairs, "the median saving; none is right before and after")

    levels = statistics.level_names({pair[0].level for pair in right})
    few = [levels[0], levels[len(levels) // 2], levels[-1]] if len(levels) > 3 else levels
    for level in few:
        take_median([pair for pair in right if pair[0].level == level],
                    "the median saving" + (f" of {level}" if len(levels) > 1 else ""))
    take(right, "the largest saving of all that are right before and after", len(right) - 1)

    better = [pair for pair in pairs if pair[1].correct > pair[0].correct]
    worse = [pair for pair in pairs if pair[1].correct < pair[0].correct]
    of_all = f"of {len(pairs)} did"
    take_median(better, f"got better: wrong before, right after, as {len(better)} {of_all}")
    if worse:
        take_median(worse, f"got worse: right before, wrong after, as {len(worse)} {of_all}")
    else:
        take([pair for pair in pairs if saving(pair)[0] < 0], "got longer, the most of all", 0)
    return reasons


def choose_groups(path: Path) -> list[Group]:
    """Reads one group of an early and one of a late step of rollouts.jsonl.

    Of each step, it is the group whose rewards differ most. Only the chosen groups are kept in
    memory: the file may be large."""
    if not path.is_file():
        return []

    rewards: dict[int, dict[int, list[float]]] = {}         # by step, then by uid
    for row in _rollouts(path):
        rewards.setdefault(row.step, {}).setdefault(row.uid, []).append(row.reward)

    spreads = {step: {uid: max(values) - min(values) for uid, values in groups.items()
                      if len(values) > 1} for step, groups in rewards.items()}
    steps = sorted(step for step, by_uid in spreads.items() if by_uid)
    chosen: dict[tuple[int, int], list[Rollout]] = {
        (step, min(spreads[step], key=lambda uid: (-spreads[step][uid], uid))): []
        for step in (steps[:1] + steps[1:][-1:])}

    for row in _rollouts(path) if chosen else ():
        if (row.step, row.uid) in chosen:
            chosen[row.step, row.uid].append(row)
    return [_group(sorted(group, key=lambda row: (row.tokens, row.sample)))
            for group in chosen.values()]


def _group(group: Sequence[Rollout]) -> Group:
    first, few = group[0], group[:GROUP]
    return Group(
        step=first.step, level=first.level, problem=first.problem,
        reference_answer=first.reference_answer,
        responses=tuple(shown(row, f"answer {row.sample + 1}") for row in few),
        rewards=tuple(row.reward for row in few), size=len(group),
        advantages=tuple(row.advantage if isinstance(row.advantage, int | float) else None
                         for row in few))


def _rollouts(path: Path) -> Iterator[Rollout]:
    """Yields rows; a damaged one is skipped, as a report needs only some."""
    for place, line in rows.numbered_lines(path):
        with contextlib.suppress(UserError):
            yield rows.decode(line, Rollout, place)
