"""Graded responses on disk: JSONL, one object a response, behind a first line with what they were made with.

A row has the keys set, uid, sample, level, problem, reference_answer, response, answer, status, correct, tokens, finish
and stated. P problems, k samples of each.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effreason.grading.statements import end_of_answer, first_stated
from effreason.rl.rollouts import GradedRollouts, gold
from effreason.runtime.errors import UserError
from effreason.runtime.files import disk
from effreason.types import Outcomes, Problem

FACTS = "facts"                     # the one key of the first line
SUFFIX = ".jsonl"

# What the rows of an evaluation hold: the types, and words for them.
TEXT, COUNT = ((str,), "a text"), ((int,), "a whole number")
FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "set": TEXT, "uid": COUNT, "sample": COUNT, "level": TEXT, "problem": TEXT, "reference_answer": TEXT,
    "response": TEXT, "answer": ((str, type(None)), "a text or null"), "status": TEXT,
    "correct": ((bool,), "true or false"), "tokens": COUNT, "finish": TEXT,
    "stated": ((int, float, type(None)), "a number or null")}
BOUNDS = {"tokens": 2**31, "sample": 2**31}     # what an array of them takes


def row(problems: Sequence[Problem], tried: GradedRollouts, prompt: int, sample: int) -> dict[str, Any]:
    """One response with its verdict, for people and programs to read.

    Its status does not say whether the comparison was remembered: that depends on what was graded before."""
    problem, at = problems[prompt], (prompt, sample)
    place = prompt * tried.correct.shape[1] + sample
    verdict = tried.verdicts[place]
    return {"uid": problem.uid, "sample": sample, "level": problem.level, "problem": problem.text,
            "reference_answer": problem.reference, "response": tried.texts[place], "answer": verdict.answer,
            "status": "symbolic" if verdict.status == "cached" else verdict.status,
            "correct": bool(tried.correct[at]), "tokens": int(tried.rollouts.lengths[at]),
            "finish": str(tried.rollouts.finish[at])}


def rows(set_name: str, problems: Sequence[Problem], tried: GradedRollouts) -> list[dict[str, Any]]:
    """All responses to the problems of a set, prompt by prompt."""
    found = []
    for prompt, problem in enumerate(problems):
        for sample in range(tried.correct.shape[1]):
            made = row(problems, tried, prompt, sample)
            found.append({"set": set_name} | made | {"stated": stated(problem, made)})
    return found


def stated(problem: Problem, made: Mapping[str, Any]) -> float | None:
    """Tokens until the reference answer was first stated, in the thinking or behind it; None = never.

    The place is known in characters and taken as a share of the tokens: exact offsets would need each prefix decoded.
    A correct response has stated it with its final answer at the latest."""
    text = made["response"]
    characters = first_stated(text, gold(problem))
    if made["correct"]:
        characters = min(characters or len(text), end_of_answer(text))
    return None if characters is None or not text else round(made["tokens"] * characters / len(text), 1)


def outcomes(rows: Sequence[Mapping[str, Any]]) -> Outcomes:
    """Rows of one set as arrays, the problems in the order of their first rows.

    Raises: ValueError unless there are rows, and every problem has the same samples, each once."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for each in rows:
        groups.setdefault(each["uid"], []).append(each)
    table = [sorted(group, key=lambda each: each["sample"]) for group in groups.values()]
    if not table:
        raise ValueError("expected responses, found none")
    if any([each["sample"] for each in group] != list(range(len(table[0]))) for group in table):
        raise ValueError(f"expected the same samples of each of {len(table)} problems, found {len(rows)} rows")

    def column(name: str, dtype: Any, missing: Any = None) -> np.ndarray:
        values = [[missing if each[name] is None else each[name] for each in group] for group in table]
        return np.array(values, dtype).reshape(len(table), -1)

    return Outcomes(uids=np.array(list(groups), np.int64), levels=np.array([group[0]["level"] for group in table], str),
                    correct=column("correct", bool), lengths=column("tokens", np.int32), finish=column("finish", str),
                    answers=column("answer", str, ""), first_answer_token=column("stated", np.float32, math.nan))


def write(path: Path, facts: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes facts and rows as a whole: a crash or a full disk leaves what was there. Raises: UserError."""
    partial = path.with_name(path.name + ".partial")
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with disk(path):
            with partial.open("wb") as file:
                for line in ({FACTS: facts}, *rows):
                    # A lone surrogate is no UTF-8, but the escape that takes its place is how JSON spells it.
                    text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
                    file.write(text.encode("utf-8", "backslashreplace"))
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `write` wrote: the facts, and the rows, all of them. Raises: UserError for another or a damaged file."""
    try:
        with path.open(encoding="utf-8") as file:
            first, *others = [json.loads(line) for line in file]
        facts = _facts(first)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: expected graded responses, a line with facts and one for each response; repair or "
                        "remove it") from None
    for number, row in enumerate(others, start=2):
        wrong = _wrong(row)
        if wrong is not None:
            raise UserError(f"{path}: line {number}: {wrong}; repair or remove it")
    problems, samples = facts.get("problems"), facts.get("evaluation.samples")
    if type(problems) is int and type(samples) is int and len(others) != problems * samples:
        raise UserError(f"{path}: holds {len(others)} of {problems * samples} responses; remove it to sample them "
                        "again")
    return facts, others


def read_outcomes(path: Path) -> tuple[dict[str, Any], Outcomes]:
    """What `write` wrote, as arrays. Raises: UserError for another or a damaged file."""
    facts, rows = read(path)
    try:
        return facts, outcomes(rows)
    except ValueError as error:
        raise UserError(f"{path}: {error}; repair or remove it") from None


def read_facts(path: Path) -> dict[str, Any]:
    """The facts alone. Raises: UserError for another or a damaged file."""
    try:
        with path.open(encoding="utf-8") as file:
            return _facts(json.loads(file.readline()))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: expected graded responses behind a line with facts; repair or remove it") from None


def _facts(line: Any) -> dict[str, Any]:
    if not isinstance(line[FACTS], dict):
        raise TypeError
    return line[FACTS]


def _wrong(row: Any) -> str | None:
    """What is wrong with a row, None where nothing is."""
    if not isinstance(row, dict):
        return f"expected a JSON object, found {json.dumps(row)[:40]}"
    for field, (kinds, words) in FIELDS.items():
        if field not in row or type(row[field]) not in kinds:
            got = json.dumps(row[field])[:40] if field in row else f"no {field}"
            return f"{field} must be {words}, got {got}"
        if type(row[field]) is int and not 0 <= row[field] < BOUNDS.get(field, 2**63):
            return f"{field} must be within [0, {BOUNDS.get(field, 2**63)}), got {row[field]}"
    return None


def safe_names(names: Sequence[str]) -> dict[str, str]:
    """Names of files for names of sets or models, which may be paths: their last two parts; equal ones are numbered."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        parts = [part for part in name.split("/") if part.strip(".")][-2:]
        safe = re.sub(r"[^\w.-]+", "_", "_".join(parts).removesuffix(SUFFIX)).strip("._")[-100:] or "unnamed"
        count = 1
        while (made := safe if count == 1 else f"{safe}-{count}").casefold() in map(str.casefold, found.values()):
            count += 1
        found[name] = made
    return found
