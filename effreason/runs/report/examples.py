"""Responses that a report shows: the same prompt before and after, and the answers of a group.

What is shown is chosen by rule, never by hand: typical problems, the largest saving, one that got better and one that
got worse. Long thinking is cut in the middle, so that a page stays small.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effreason.evaluation import statistics
from effreason.runs.report.results import is_number, typed
from effreason.types import FinishReason

HEAD, TAIL = 3000, 1500             # characters of a long text that are shown
GROUP = 16                          # answers of a group that are shown
THINK, END_OF_THINKING = "<think>", "</think>"

Row = Mapping[str, Any]
# What is shown of a row of rollouts.jsonl.
SHOWN = {"step": int, "uid": int, "sample": int, "level": str, "problem": str, "reference_answer": str, "response": str,
         "answer": str | None, "correct": bool, "tokens": int, "reward": float}


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response as a page shows it."""

    label: str                      # when, or by whom
    tokens: int
    correct: bool
    answer: str
    cut_off: bool
    thinking: str
    behind: str                     # the thinking
    omitted: int                    # characters in the middle that are left out
    saved: int                      # tokens less than the first one's


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One problem, answered at several times, and why it is shown."""

    why: str
    level: str
    problem: str
    reference_answer: str
    responses: tuple[Response, ...]


@dataclass(frozen=True, kw_only=True)
class Group:
    """The answers to one prompt of a training step, the shortest first."""

    step: int
    level: str
    problem: str
    reference_answer: str
    answers: tuple[Response, ...]
    rewards: tuple[float, ...]
    advantages: tuple[float | None, ...]
    size: int                       # of the group, of which the answers are the first ones


def shown(row: Row, label: str, before: int | None = None) -> Response:
    """A graded row as a page shows it. Args: before, tokens of the response that this one is held against."""
    text = row["response"]
    thinking, mark, behind = text.rpartition(END_OF_THINKING)
    if not mark:
        thinking, behind = text, ""
    thinking = thinking.removeprefix(THINK).strip("\n")
    omitted = max(len(thinking) - HEAD - TAIL, 0)
    if omitted:
        thinking = f"{thinking[:HEAD]}\n\n[… {omitted:,} characters …]\n\n{thinking[-TAIL:]}"
    return Response(label=label, tokens=row["tokens"], correct=row["correct"], answer=row["answer"] or "",
                    cut_off=row.get("finish", FinishReason.EOS) != FinishReason.EOS, thinking=thinking, behind=behind.strip()[:HEAD],
                    omitted=omitted, saved=0 if before is None else before - row["tokens"])


def prompts(columns: Sequence[tuple[str, Sequence[Row]]]) -> list[Prompt]:
    """Problems side by side. Args: columns, what each is called and its graded rows, the first being the base."""
    tables = [(label, {row["uid"]: row for row in rows if row["sample"] == 0}) for label, rows in columns]
    common = sorted(set.intersection(*(set(table) for _, table in tables))) if tables else []
    chosen = _chosen([(tables[0][1][uid], tables[-1][1][uid]) for uid in common])
    found = []
    for uid, why in chosen.items():
        first = tables[0][1][uid]
        found.append(Prompt(
            why=why, level=first["level"], problem=first["problem"], reference_answer=first["reference_answer"],
            responses=tuple(shown(table[uid], label, first["tokens"] if place else None)
                            for place, (label, table) in enumerate(tables))))
    return found


def _chosen(pairs: Sequence[tuple[Row, Row]]) -> dict[int, str]:
    """Uids and why they are shown; those of a kind are in the middle of it by saving.

    Args: pairs, of the first and the last response to each problem."""
    def saving(pair: tuple[Row, Row]) -> tuple[int, int]:
        return pair[0]["tokens"] - pair[1]["tokens"], pair[0]["uid"]

    chosen: dict[int, str] = {}

    def take(candidates: Sequence[tuple[Row, Row]], why: str, place: int = -1) -> None:
        left = sorted((pair for pair in candidates if pair[0]["uid"] not in chosen), key=saving)
        if left:
            chosen[left[min(place, len(left) - 1)][0]["uid"]] = why

    right = [pair for pair in pairs if pair[0]["correct"] and pair[1]["correct"]]
    if not right:
        take(pairs, "the median saving; none is right before and after", (len(pairs) - 1) // 2)
    levels = statistics.level_names({pair[0]["level"] for pair in right})
    for level in [levels[0], levels[len(levels) // 2], levels[-1]] if len(levels) > 3 else levels:
        of_level = [pair for pair in right if pair[0]["level"] == level]
        take(of_level, "the median saving" + (f" of {level}" if len(levels) > 1 else ""), (len(of_level) - 1) // 2)
    take(right, "the largest saving of all that are right before and after")
    won = [pair for pair in pairs if pair[1]["correct"] > pair[0]["correct"]]
    lost = [pair for pair in pairs if pair[1]["correct"] < pair[0]["correct"]]
    take(won, f"got better: wrong before, right after, as {len(won)} of {len(pairs)} did", (len(won) - 1) // 2)
    if lost:
        take(lost, f"got worse: right before, wrong after, as {len(lost)} of {len(pairs)} did", (len(lost) - 1) // 2)
    else:
        take([pair for pair in pairs if saving(pair)[0] < 0], "got longer, the most of all", 0)
    return chosen


def _is_whole(row: Any) -> bool:
    """Whether a row has what is shown of it."""
    try:
        for name, kind in SHOWN.items():
            typed(row[name], kind)
    except (KeyError, TypeError):
        return False
    return bool(row["tokens"] >= 0)


def groups(path: Path) -> list[Group]:
    """One group of an early and one of a late step of rollouts.jsonl: of each, the one whose rewards differ most."""
    if not path.is_file():
        return []
    places: dict[int, dict[int, list[tuple[int, float]]]] = {}      # by step, then uid: where, and the reward
    for place, row in _rows(path):
        places.setdefault(row["step"], {}).setdefault(row["uid"], []).append((place, row["reward"]))
    steps = sorted(step for step, uids in places.items() if any(len(rows) > 1 for rows in uids.values()))
    found = []
    with path.open("rb") as file:
        for step in sorted({steps[0], steps[-1]} if steps else ()):
            spreads = {uid: max(rewards) - min(rewards) for uid, rows in places[step].items() if len(rows) > 1
                       for rewards in [[reward for _, reward in rows]]}
            uid = min(spreads, key=lambda each: (-spreads[each], each))
            rows = []
            for place, _ in places[step][uid]:
                file.seek(place)
                rows.append(json.loads(file.readline()))
            found.append(_group(step, sorted(rows, key=lambda row: (row["tokens"], row["sample"]))))
    return found


def _group(step: int, rows: Sequence[Row]) -> Group:
    first, kept = rows[0], rows[:GROUP]
    return Group(step=step, level=first["level"], problem=first["problem"], reference_answer=first["reference_answer"],
                 answers=tuple(shown(row, f"answer {row['sample'] + 1}") for row in kept),
                 rewards=tuple(row["reward"] for row in kept),
                 advantages=tuple(_advantage(row) for row in kept), size=len(rows))


def _advantage(row: Row) -> float | None:
    value = row.get("advantage")
    return value if is_number(value) else None


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows and where they begin. A line that is damaged or lacks something is passed over: to show is not to repair."""
    with path.open("rb") as file:
        place = 0
        for line in file:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if _is_whole(row):
                    yield place, row
            place += len(line)
