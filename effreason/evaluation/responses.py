"""Graded responses on disk: JSON lines, one object a response, after a first line with the facts.

The facts say what the responses were sampled and graded with. P problems, k samples of each.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from effreason.grading.statements import end_of_answer, first_stated
from effreason.rl.rollouts import GradedRollouts, make_reference
from effreason.runtime import files
from effreason.runtime import rows as json_rows
from effreason.runtime.config_fields import written
from effreason.runtime.errors import UserError
from effreason.types import FinishReason, Outcomes, Problem

SUFFIX = ".jsonl"
FACTS = "facts"                     # the key of the first line
NEUTRAL = ("set", "model", "template", "environment")   # facts that decide no response or verdict

Int32 = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Int64 = Annotated[int, Meta(ge=0, le=2**63 - 1)]


@dataclass(frozen=True, kw_only=True)
class GradedResponse:
    """A response with its verdict, as rollouts.jsonl and the files of an evaluation hold it."""

    uid: Int64                      # of the problem
    sample: Int32
    level: str
    problem: str                    # its text
    reference_answer: str
    response: str                   # text without EOS, see sampling.generate.decode
    answer: str | None              # as the grader found it
    status: str                     # see grader.GradeStatus
    correct: bool
    tokens: Int32                   # through EOS
    finish: FinishReason


@dataclass(frozen=True, kw_only=True)
class EvaluatedResponse(GradedResponse):
    """A response of an evaluation."""

    set: str
    first_answer_token: float | None    # tokens until the reference is first stated; None = never


@dataclass(frozen=True, kw_only=True)
class _Header:
    facts: dict[str, Any]


def graded_response(problems: Sequence[Problem], graded: GradedRollouts, prompt: int,
                    sample: int) -> GradedResponse:
    """Returns one response of graded rollouts.

    Its status does not say whether the verdict came from the grader's cache, which depends on what
    was graded before."""
    problem = problems[prompt]
    index = prompt * graded.correct.shape[1] + sample
    verdict = graded.verdicts[index]
    return GradedResponse(
        uid=problem.uid, sample=sample, level=problem.level, problem=problem.text,
        reference_answer=problem.reference, response=graded.texts[index], answer=verdict.answer,
        status="symbolic" if verdict.status == "cached" else verdict.status,
        correct=bool(graded.correct[prompt, sample]),
        tokens=int(graded.rollouts.lengths[prompt, sample]),
        finish=FinishReason(graded.rollouts.finish[prompt, sample]))


def evaluated_responses(set_name: str, problems: Sequence[Problem],
                        graded: GradedRollouts) -> list[EvaluatedResponse]:
    """Returns all responses to the problems of a set, prompt by prompt."""
    rows = [(problem, graded_response(problems, graded, prompt, sample))
            for prompt, problem in enumerate(problems)
            for sample in range(graded.correct.shape[1])]
    return [EvaluatedResponse(**vars(row), set=set_name,
                              first_answer_token=first_answer_token(problem, row))
            for problem, row in rows]


def first_answer_token(problem: Problem, row: GradedResponse) -> float | None:
    """Returns the tokens until the reference is first stated, thinking included; None = never.

    The position is known in characters and converted by the response's mean length of a token:
    exact offsets would need every prefix decoded. A correct response states the reference with its
    final answer at the latest."""
    text = row.response
    stated = [first_stated(text, answer) for answer in make_reference(problem).each()]
    characters = min((end for end in stated if end is not None), default=None)
    if row.correct:
        characters = min(characters or len(text), end_of_answer(text))
    return None if characters is None or not text else round(row.tokens * characters / len(text), 1)


def outcomes(rows: Iterable[EvaluatedResponse]) -> Outcomes:
    """Converts the rows of one set to arrays, with the problems in the order of their first rows.

    Raises: ValueError unless every problem has the same samples, each once."""
    by_uid: dict[int, list[EvaluatedResponse]] = {}
    for row in rows:
        by_uid.setdefault(row.uid, []).append(row)
    groups = [sorted(group, key=lambda row: row.sample) for group in by_uid.values()]

    if not groups:
        raise ValueError("expected responses, found none")
    if any([row.sample for row in group] != list(range(len(groups[0]))) for group in groups):
        raise ValueError(f"expected the same samples of each of {len(groups)} problems, "
                         f"found {sum(map(len, groups))} rows")

    def column(field: str, dtype: Any, missing: Any = None) -> np.ndarray:
        values = [[getattr(row, field) for row in group] for group in groups]
        return np.array([[missing if value is None else value for value in group]
                         for group in values], dtype)

    return Outcomes(
        uids=np.array(list(by_uid), np.int64),
        levels=np.array([group[0].level for group in groups], str),
        correct=column("correct", bool), lengths=column("tokens", np.int32),
        finish=column("finish", str), answers=column("answer", str, ""),
        first_answer_token=column("first_answer_token", np.float32, math.nan))


def write(path: Path, facts: Mapping[str, Any], rows: Iterable[EvaluatedResponse]) -> None:
    """Writes facts and rows, completely or not at all. Raises: UserError."""
    with files.disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as partial, partial.open("wb") as file:
        file.write(files.json_line({FACTS: facts}))
        file.writelines(files.json_line(asdict(row)) for row in rows)


def read(path: Path) -> tuple[dict[str, Any], list[EvaluatedResponse]]:
    """Reads facts and rows, all of them. Raises: UserError for a damaged file or another kind."""
    facts = read_facts(path)
    lines = list(json_rows.numbered_lines(path))[1:]
    try:
        rows = [json_rows.decode(line, EvaluatedResponse, place) for place, line in lines]
    except UserError as error:
        raise UserError(f"{error}; repair or remove the file") from None

    problems, samples = facts.get("problems"), facts.get("evaluation.samples")
    if type(problems) is int and type(samples) is int and len(rows) != problems * samples:
        raise UserError(f"{path}: holds {len(rows)} of {problems * samples} responses; remove it "
                        "to sample them again")
    return facts, rows


def read_outcomes(path: Path) -> tuple[dict[str, Any], Outcomes]:
    """Reads facts and rows, these as arrays. Raises: UserError as `read` does."""
    facts, rows = read(path)
    try:
        return facts, outcomes(rows)
    except ValueError as error:
        raise UserError(f"{path}: {error}; repair or remove the file") from None


def read_facts(path: Path) -> dict[str, Any]:
    """Reads the facts alone. Raises: UserError as `read` does."""
    place, line = next(json_rows.numbered_lines(path), (f"{path}:1", b""))
    try:
        return json_rows.decode(line, _Header, place).facts
    except UserError:
        raise UserError(f"{path}: expected a first line with facts, then graded responses; repair "
                        "or remove the file") from None


def check_facts(path: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises UserError, naming what differs, if a file was made with other facts than expected."""
    different = [f"{name} {_short(stored.get(name))}, now {_short(expected.get(name))}"
                 for name in dict.fromkeys([*expected, *stored])
                 if name not in NEUTRAL and stored.get(name) != expected.get(name)]
    if different:
        raise UserError(f"{path}: was made with {'; '.join(different)}; choose another directory, "
                        "or remove the file to sample its responses again")


def _short(value: Any) -> str:
    """Formats a fact, of a SHA-256 the beginning."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else written(value)


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Returns a file name for each name of a set or model.

    Names may be paths: their last two parts count. Equal results are numbered."""
    chosen: dict[str, str] = {}
    taken: set[str] = set()
    for name in dict.fromkeys(names):
        parts = [part for part in name.split("/") if part.strip(".")][-2:]
        stem = re.sub(r"[^\w.-]+", "_", "_".join(parts).removesuffix(SUFFIX)).strip("._")[-100:]
        stem, count = stem or "unnamed", 1
        while (candidate := stem if count == 1 else f"{stem}-{count}").casefold() in taken:
            count += 1
        chosen[name] = candidate
        taken.add(candidate.casefold())
    return chosen
