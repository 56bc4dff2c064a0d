"""Stages 2 and 3 overlapped: responses are graded while others are still being generated.

P prompts, G responses for each prompt (the group), B = P * G responses in the order of prompts,
then samples.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from effreason.data import prompts
from effreason.grading.grader import ANSWERS_PER_BUDGET, Grade, Grader, GradeStatus
from effreason.grading.kinds import Reference
from effreason.grading.status import Undecided
from effreason.rl.learner import Learner
from effreason.runtime import processes, sharding
from effreason.runtime.config import RolloutConfig
from effreason.runtime.errors import Interrupted
from effreason.runtime.progress import GenerationProgress
from effreason.sampling.engine import Generation, Generations, collect
from effreason.sampling.generate import decode
from effreason.sampling.scheduler import Request, make_requests
from effreason.types import Problem, Response, Rollouts

UNDECIDED_LIMIT = 0.02              # share of answers the grader may fail to decide, ...
UNDECIDED_FEW = 2                   # ... beyond so few that they say nothing of a share
# What to raise against it; "" = nothing helps.
UNDECIDED = {GradeStatus.ERROR: "",
             GradeStatus.BUDGET: "grade.step_budget_seconds or grade.workers"}
# With a user's function these are no fault of the answer either.
FUNCTION_UNDECIDED = UNDECIDED | {
    GradeStatus.SOFT_TIMEOUT: "grade.cpu_seconds", GradeStatus.HARD_KILL: "grade.wall_seconds",
    GradeStatus.MEMORY: "grade.memory_mb"}

OnChunk = Callable[[GenerationProgress], None]  # called after every chunk; may raise to stop
# A sampler with its weights, key and distribution.
Generate = Callable[[Sequence[Request]], Generation | Generations]
Name = tuple[int, int]              # of a response: its prompt's index and its sample


class ResponseLog(Protocol):
    """Keeps responses, so that a generation that is stopped can be continued."""

    resumed: list[Response]     # what an interrupted generation has left, finished or not

    def add(self, responses: Sequence[Response]) -> None:
        """Keeps the responses that a chunk has finished."""

    def add_unfinished(self, responses: Sequence[Response]) -> None:
        """Keeps all responses, finished or not, when a signal stops the generation."""


@dataclass(frozen=True, kw_only=True)
class GradedRollouts:
    """Groups of responses with their verdicts."""

    problems: list[Problem]
    rollouts: Rollouts
    texts: list[str]                # B, see sampling.generate.decode
    correct: np.ndarray             # bool[P, G]: the verdict, and an end with EOS if required
    scores: np.ndarray              # float32[P, G]: 1 if correct, less if partly right
    verdicts: list[Grade]           # B, on the text alone
    grading_seconds: float          # that grading took after the generation was over
    generations: tuple[Generation | Generations, ...]     # over; for their counters
    metrics: dict[str, float] = field(default_factory=dict)     # of refilling
    rounds: tuple["GradedRollouts", ...] = ()   # of refilling, each with all its groups

    @property
    def sampled(self) -> tuple["GradedRollouts", ...]:
        """All groups that were sampled, also those that others have replaced."""
        return self.rounds or (self,)


class BackgroundGrader:
    """Grades responses in the background; each process grades a share of them."""

    def __init__(self, grader: Grader, tokenizer: Any, problems: Sequence[Problem],
                 responses: int) -> None:
        self.texts: dict[Name, str] = {}
        self._grader, self._tokenizer, self._problems = grader, tokenizer, problems
        self._budgets = [grader.budget() for _ in range(0, responses, ANSWERS_PER_BUDGET)]
        self._pending: list[tuple[list[Name], Future[list[Grade]]]] = []

    def add(self, responses: Sequence[Response]) -> None:
        """Starts to grade finished responses."""
        budget = self._budgets[len(self.texts) // ANSWERS_PER_BUDGET]
        names = [(response.prompt, response.sample) for response in responses]
        texts = [decode(self._tokenizer, response.tokens, ended=response.ended)
                 for response in responses]
        self.texts.update(zip(names, texts, strict=True))

        own = [name for name in names if sum(name) % processes.count() == processes.index()]
        problems = [self._problems[prompt] for prompt, _ in own]
        # If the prompt has opened the thinking, a response that never closes it has no answer.
        whole = ["<think>" * problem.opens_thinking + self.texts[name]
                 for problem, name in zip(problems, own, strict=True)]
        references = [make_reference(problem) for problem in problems]
        self._pending.append((own, self._grader.submit(whole, references, budget)))

    def result(self) -> dict[Name, Grade]:
        """Waits for the verdicts of all processes; an error in one is raised in all."""
        def own() -> dict[Name, Grade]:
            return {name: grade for names, grades in self._pending
                    for name, grade in zip(names, grades.result(), strict=True)}

        if processes.count() == 1:
            return own()

        shares: list[list[Any]] = processes.all_gather(
            "verdicts", lambda: [[*name, asdict(grade)] for name, grade in own().items()])
        return {(prompt, sample): Grade(**row | {"status": GradeStatus(row["status"])})
                for share in shares for prompt, sample, row in share}


def sample_and_grade(generate: Generate, problems: Sequence[Problem], group_size: int,
                     max_new_tokens: int, *, tokenizer: Any, grader: Grader, require_eos: bool,
                     on_chunk: OnChunk, expected: Mapping[int, float] = MappingProxyType({}),
                     log: ResponseLog | None = None) -> GradedRollouts:
    """Samples and grades a group of responses to each problem.

    Args:
        require_eos: a response that was cut off at the token limit is wrong whatever its text says.
        expected: tokens by uid, for problems with known response lengths.
        log: keeps responses; what it holds is not drawn again.

    Raises:
        Undecided: too many answers are undecided; they would count as wrong through no fault of the
            model.
    """
    background = BackgroundGrader(grader, tokenizer, problems, len(problems) * group_size)
    resumed = log.resumed if log else []
    responses = [response for response in resumed if response.finish]
    for first in range(0, len(responses), ANSWERS_PER_BUDGET):
        background.add(responses[first : first + ANSWERS_PER_BUDGET])

    requests = remaining(make_requests(
        [problem.prompt for problem in problems], group_size, max_new_tokens,
        uids=[problem.uid for problem in problems], expected=expected), resumed)
    generation = generate(requests)
    try:
        for finished in watched(generation, len(requests), on_chunk):
            responses += finished
            if finished:
                background.add(finished)
            if finished and log:
                log.add(finished)
    except Interrupted:
        if log:
            log.add_unfinished(responses + generation.unfinished())
        raise

    rollouts = collect(problems, responses, group_size)
    generated = time.monotonic()
    grades = background.result()
    names = sorted(grades)          # prompt by prompt: `collect` has checked that all are there
    verdicts = [grades[name] for name in names]
    check_decided(verdicts, grader.function)

    shape, counts = rollouts.lengths.shape, rollouts.ended if require_eos else True
    correct = np.array([verdict.correct for verdict in verdicts]).reshape(shape) & counts
    scores = np.array([verdict.score for verdict in verdicts], np.float32).reshape(shape) * counts
    return GradedRollouts(problems=list(problems), rollouts=rollouts,
                          texts=[background.texts[name] for name in names], verdicts=verdicts,
                          correct=correct, scores=scores.astype(np.float32),
                          grading_seconds=time.monotonic() - generated, generations=(generation,))


def watched(generation: Generation | Generations, total: int,
            on_chunk: OnChunk) -> Iterator[list[Response]]:
    """Yields what each chunk has finished; calls on_chunk before the first and after each."""
    count = 0
    on_chunk(_progress(generation, count, total))
    for finished in generation:
        yield finished
        count += len(finished)
        on_chunk(_progress(generation, count, total))


def _progress(generation: Generation | Generations, finished: int,
              total: int) -> GenerationProgress:
    return GenerationProgress(finished=finished, total=total, running=generation.running,
                              waiting=generation.waiting, tokens=generation.tokens)


def remaining(requests: Sequence[Request], resumed: Sequence[Response]) -> list[Request]:
    """Returns the requests still to generate, given responses already finished or started."""
    by_name = {(response.prompt, response.sample): response for response in resumed}
    left = []
    for request in requests:
        response = by_name.get((request.prompt, request.sample))
        if response is None or not response.finish:
            # One that had a slot, but has drawn nothing yet, simply starts.
            prefix = response if response is not None and len(response.tokens) else None
            left.append(replace(request, prefix=prefix))
    return left


def refill(graded: GradedRollouts, sample: Callable[[list[Problem]], GradedRollouts],
           learner: Learner, problems: prompts.Problems, *, alpha: float, settings: RolloutConfig,
           seed_and_step: tuple[int, int]) -> GradedRollouts:
    """Replaces groups without a signal by groups of other problems, in a few rounds.

    Args:
        settings: refill_rounds bounds the rounds.
        sample: samples and grades groups for some problems.
        problems: what to choose others from.
        seed_and_step: decide which problems come.
    """
    taken, rounds = list(graded.problems), [graded]
    lacking = ~has_signal(graded, learner, alpha, settings.min_reward_spread)
    for number in range(settings.refill_rounds):
        without = np.flatnonzero(lacking).tolist()
        others = prompts.others(problems, [graded.problems[index] for index in without], taken,
                                (*seed_and_step, number, len(lacking)))
        chosen = {index: problem for index, problem in zip(without, others, strict=True)
                  if problem is not None}
        if not chosen:
            break

        taken += chosen.values()
        fresh = sample(list(chosen.values()))
        rounds.append(fresh)
        useful = has_signal(fresh, learner, alpha, settings.min_reward_spread)
        rows = np.flatnonzero(useful).tolist()
        filled = [list(chosen)[row] for row in rows]
        graded = replace_groups(graded, filled, fresh, rows)
        lacking[filled] = False

    return replace(graded, rounds=tuple(rounds), metrics={
        "rollout/asked": len(taken) / len(lacking), "rollout/lacking": float(lacking.mean()),
        "kept/accuracy": float(graded.correct.mean()),
        "kept/tokens": float(graded.rollouts.lengths.mean()),
        "kept/truncated": float(1.0 - graded.rollouts.ended.mean())})


def has_signal(graded: GradedRollouts, learner: Learner, alpha: float,
               min_spread: float) -> np.ndarray:
    """Marks the groups that can teach something: bool[P].

    What counts is the spread of the shaped reward: groups that are all correct teach brevity."""
    arguments = sharding.to_device((graded.correct, graded.scores, graded.rollouts.lengths,
                                    np.float32(alpha)), learner.replicated)
    rewards = sharding.to_host(learner.reward(*arguments))
    spread: np.ndarray = rewards.max(axis=-1) - rewards.min(axis=-1)
    return spread > min_spread


def replace_groups(graded: GradedRollouts, indices: Sequence[int], others: GradedRollouts,
                   rows: Sequence[int]) -> GradedRollouts:
    """Replaces groups `indices` by groups `rows` of the others."""
    size = graded.correct.shape[1]
    problems, texts, verdicts = list(graded.problems), list(graded.texts), list(graded.verdicts)
    for index, row in zip(indices, rows, strict=True):
        problems[index] = others.problems[row]
        old, new = slice(index * size, (index + 1) * size), slice(row * size, (row + 1) * size)
        texts[old], verdicts[old] = others.texts[new], others.verdicts[new]

    def replaced(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        # Of [P], [P, S], [P, G] and [P, G, T] the last axes may differ.
        width = max(old.shape[-1], new.shape[-1])
        old, new = (array if array.ndim == 1 else np.pad(
            array, [*[(0, 0)] * (array.ndim - 1), (0, width - array.shape[-1])])
            for array in (old, new))
        old = old.copy()
        old[list(indices)] = new[list(rows)]
        return old

    rollouts = Rollouts(**{item.name: replaced(getattr(graded.rollouts, item.name),
                                               getattr(others.rollouts, item.name))
                           for item in fields(Rollouts)})
    return GradedRollouts(
        problems=problems, rollouts=rollouts, texts=texts, verdicts=verdicts,
        correct=replaced(graded.correct, others.correct),
        scores=replaced(graded.scores, others.scores),
        grading_seconds=graded.grading_seconds + others.grading_seconds,
        generations=graded.generations + others.generations)


def make_reference(problem: Problem) -> Reference:
    """Returns what the grader needs of a problem."""
    return Reference(problem.reference, problem.kind, problem.choices, problem.columns)


def unmatched(grader: Grader, problems: Sequence[Problem]) -> list[int]:
    """Returns the indices of problems whose reference answer the grader cannot match with itself.

    No response to them is ever right."""
    references = [make_reference(problem) for problem in problems]
    # The indices mean nothing to a process with other problems.
    processes.check_same({
        "the number of problems": str(len(references)),
        "the reference answers": hashlib.sha256(repr(references).encode()).hexdigest()[:12]})
    # By one process: what takes too long on one host may not on another.
    return processes.broadcast("reference answers", lambda: grader.check_references(references))


def check_decided(verdicts: Sequence[Grade], function: str | None = None) -> None:
    """Raises Undecided if the grader left more answers undecided than can be passed over.

    Args: function, the user's own grader, whose limits are not the answers' fault."""
    remedies = FUNCTION_UNDECIDED if function else UNDECIDED
    undecided = [verdict for verdict in verdicts if verdict.status in remedies]
    accepted = max(UNDECIDED_FEW, UNDECIDED_LIMIT * len(verdicts))
    if function and len(undecided) == len(verdicts):
        accepted = 0                # it has never worked
    if len(undecided) > accepted:
        (status, reason), count = Counter(
            (verdict.status, verdict.reason) for verdict in undecided).most_common(1)[0]
        raise Undecided(
            f"{f'grade.function {function}' if function else 'the grader'} could not decide "
            f"{len(undecided)} of {len(verdicts)} answers, at most "
            f"{100 * UNDECIDED_LIMIT:.0f} % are accepted; {count} of them: {reason}"
            + (f"; raise {remedies[status]}" if remedies[status] else ""))
