"""Stages 2 and 3 at once: responses are graded while others are still being generated.

B = P * G rows, in the order of prompts, then samples.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from effreason.grading.grader import Grade, Grader
from effreason.grading.kinds import Reference
from effreason.runtime import processes
from effreason.runtime.errors import Interrupted, UserError
from effreason.runtime.progress import GenerationProgress
from effreason.sampling.engine import Generation, collect
from effreason.sampling.scheduler import Request, make_requests
from effreason.types import Problem, Response, Rollouts

GRADED_AT_ONCE = 512                # responses under one grade.step_budget_seconds
UNDECIDED_LIMIT = 0.02              # share of answers the grader may fail to decide, ...
UNDECIDED_FEW = 2                   # ... beyond so many, which say nothing of a share

OnChunk = Callable[[GenerationProgress], None]           # called after every chunk; stops a generation by raising
Start = Callable[[Sequence[Request]], Generation]       # a sampler with its weights, key and distribution


class Undecided(UserError):
    """The grader is too slow or broken for its verdicts to mean anything."""


@dataclass(frozen=True, kw_only=True)
class GradedRollouts:
    """Groups of responses with what the grader says of them."""

    rollouts: Rollouts
    texts: list[str]                # B, without special tokens; think tags are ordinary tokens and stay
    correct: np.ndarray             # bool[P, G]: the verdict, and that the response ended where EOS is required
    verdicts: list[Grade]           # B, on the text alone
    grading_seconds: float          # that grading took beyond the generation
    generations: tuple[Generation, ...]     # over; for their counters


def generate(start: Start, requests: Sequence[Request], watch: OnChunk, *,
             submit: Callable[[list[Response]], None] = lambda finished: None,
             keep: Callable[[list[Response]], None] = lambda responses: None) -> tuple[list[Response], Generation]:
    """Runs a sampler to its end; the responses in the order in which they ended.

    Args: watch, called after every chunk, may raise to stop it; submit, given the responses of each chunk; keep, given
        all responses, finished and not, when it is stopped by a signal."""
    responses: list[Response] = []
    generation = start(requests)

    def report() -> None:
        watch(GenerationProgress(finished=len(responses), total=len(requests), running=generation.running,
                      waiting=generation.waiting, tokens=generation.tokens))

    try:
        report()
        for finished in generation:
            responses += finished
            if finished:
                submit(finished)
            report()
    except Interrupted:
        keep(responses + generation.unfinished())
        raise
    return responses, generation


def attempt(start: Start, problems: Sequence[Problem], group_size: int, max_new_tokens: int, *, tokenizer: Any,
            grader: Grader, require_eos: bool, watch: OnChunk, expected: Mapping[int, float] = MappingProxyType({}),
            drawn: Sequence[Response] = (),
            record: Callable[[list[Response]], None] = lambda finished: None,
            keep: Callable[[list[Response]], None] = lambda responses: None) -> GradedRollouts:
    """Samples and grades a group of responses to each problem.

    With several processes each grades a share of the responses, and all get all verdicts.
    Args: require_eos, a response that was cut off at the token limit is wrong whatever its text holds; expected, tokens
        by uid, where something is known of a problem's responses; drawn, what an interrupted generation had kept, which
        is not drawn again; record, given the new responses of each chunk that has finished some; keep, given what
        `drawn` is to be the next time when this one is interrupted.
    Raises: Undecided when too many answers stay undecided: they would count as wrong for no fault of the model."""
    texts: dict[tuple[int, int], str] = {}
    waiting: list[tuple[list[tuple[int, int]], Any]] = []
    budgets = [grader.budget() for _ in range(0, len(problems) * group_size, GRADED_AT_ONCE)]

    def submit(finished: Sequence[Response]) -> None:
        budget = budgets[len(texts) // GRADED_AT_ONCE]
        names = [(response.prompt, response.sample) for response in finished]
        decoded = tokenizer.batch_decode([response.tokens for response in finished], skip_special_tokens=True)
        texts.update(zip(names, decoded, strict=True))
        shared = [(name, text) for name, text in zip(names, decoded, strict=True)
                  if sum(name) % processes.count() == processes.index()]
        asked = [problems[prompt] for (prompt, _), _ in shared]
        # Where the prompt has opened the thinking, a response that never closes it has no answer.
        whole = ["<think>" * problem.opens_thinking + text for problem, (_, text) in zip(asked, shared, strict=True)]
        waiting.append(([name for name, _ in shared],
                        grader.submit(whole, [gold(problem) for problem in asked], budget)))

    def take(finished: list[Response]) -> None:
        record(finished)
        submit(finished)

    before = [response for response in drawn if response.finish]
    for first in range(0, len(before), GRADED_AT_ONCE):
        submit(before[first : first + GRADED_AT_ONCE])
    requests = make_requests([problem.prompt for problem in problems], group_size, max_new_tokens,
                             uids=[problem.uid for problem in problems], expected=expected)
    requests = remaining(requests, drawn)
    responses, generation = generate(start, requests, watch, submit=take, keep=lambda now: keep([*before, *now]))
    rollouts = collect(problems, [*before, *responses], group_size)
    generated = time.monotonic()
    graded = together(lambda: {name: grade for names, grades in waiting
                               for name, grade in zip(names, grades.result(), strict=True)})
    rows = sorted(graded)           # prompt by prompt: `collect` has checked that all are there
    verdicts = [graded[row] for row in rows]
    check_decided(verdicts)
    correct = np.array([verdict.correct for verdict in verdicts]).reshape(rollouts.lengths.shape)
    return GradedRollouts(rollouts=rollouts, texts=[texts[row] for row in rows], verdicts=verdicts,
                    correct=correct & rollouts.ended if require_eos else correct,
                    grading_seconds=time.monotonic() - generated, generations=(generation,))


def replaced(tried: GradedRollouts, places: Sequence[int], others: GradedRollouts, rows: Sequence[int]) -> GradedRollouts:
    """Some groups in the place of others. Args: places, of the groups that go; rows, of `others`, those that come."""
    group = tried.correct.shape[1]
    texts, verdicts = list(tried.texts), list(tried.verdicts)
    for place, row in zip(places, rows, strict=True):
        there, here = slice(place * group, (place + 1) * group), slice(row * group, (row + 1) * group)
        texts[there], verdicts[there] = others.texts[here], others.verdicts[here]

    def exchanged(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        width = max(old.shape[-1], new.shape[-1])           # of [P], [P, S], [P, G] and [P, G, T] the last ones differ
        old, new = (array if array.ndim == 1 else np.pad(
            array, [*[(0, 0)] * (array.ndim - 1), (0, width - array.shape[-1])]) for array in (old, new))
        old = old.copy()
        old[list(places)] = new[list(rows)]
        return old

    names = [field.name for field in fields(Rollouts)]
    rollouts = Rollouts(**{name: exchanged(getattr(tried.rollouts, name), getattr(others.rollouts, name))
                           for name in names})
    return GradedRollouts(rollouts=rollouts, texts=texts, verdicts=verdicts, correct=exchanged(tried.correct, others.correct),
                    grading_seconds=tried.grading_seconds + others.grading_seconds,
                    generations=tried.generations + others.generations)


def together(graded: Callable[[], dict[tuple[int, int], Grade]]) -> dict[tuple[int, int], Grade]:
    """What each process has graded, in all of them; an error in one is raised in all of them."""
    if processes.count() == 1:
        return graded()
    shares: list[list[Any]] = processes.all_gather(
        "verdicts", lambda: [[*name, asdict(grade)] for name, grade in graded().items()])
    return {(prompt, sample): Grade(**table) for share in shares for prompt, sample, table in share}


def mean_lengths(problems: Sequence[Problem], rollouts: Rollouts) -> dict[int, float]:
    """Mean response tokens of each problem, by uid: what to expect of it the next time."""
    return {problem.uid: float(mean) for problem, mean in zip(problems, rollouts.lengths.mean(axis=1), strict=True)}


def remaining(requests: Sequence[Request], drawn: Sequence[Response]) -> list[Request]:
    """What is left to do of some requests when these responses, finished or begun, are there already."""
    known = {(response.prompt, response.sample): response for response in drawn}
    left = []
    for request in requests:
        response = known.get((request.prompt, request.sample))
        if response is None or not response.finish:
            # One that was given a slot, and drew nothing, simply starts.
            prefix = response if response is not None and len(response.tokens) else None
            left.append(replace(request, prefix=prefix))
    return left


def gold(problem: Problem) -> Reference:
    """What the grader needs of a problem."""
    return Reference(problem.reference, problem.kind, problem.choices)


def unmatched(grader: Grader, problems: Sequence[Problem]) -> list[int]:
    """The places of problems whose reference answer the grader cannot match with itself: no response is ever right."""
    golds = [gold(problem) for problem in problems]
    # The places mean nothing to a process with other problems.
    processes.check_same({"the number of problems": str(len(golds)),
                          "the reference answers": hashlib.sha256(repr(golds).encode()).hexdigest()[:12]})
    # By one process: what takes too long on one host may not on another.
    return processes.broadcast("reference answers", lambda: grader.check_references(golds))


def check_decided(verdicts: Sequence[Grade]) -> None:
    """Raises Undecided when the grader has left more answers undecided than can be passed over."""
    undecided = [verdict for verdict in verdicts if verdict.status in ("error", "budget")]
    if len(undecided) > max(UNDECIDED_FEW, UNDECIDED_LIMIT * len(verdicts)):
        reason, count = Counter(verdict.reason for verdict in undecided).most_common(1)[0]
        late = undecided[0].status == "budget"
        raise Undecided(f"the grader could not decide {len(undecided)} of {len(verdicts)} answers, at most "
                        f"{100 * UNDECIDED_LIMIT:.0f} % are accepted; {count} of them: {reason}"
                        + ("; raise grade.step_budget_seconds or grade.workers" if late else ""))
