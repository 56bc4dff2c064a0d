"""Marks a response as correct or wrong against a reference answer, on the host, whatever the
response holds.

The boxed answer is cut out, plain Python decides what it can, and sympy decides the rest in
processes that can be killed. Nothing in a response is ever executed. `Grade.status` says how a
verdict came about.
"""

import concurrent.futures
import contextlib
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

from effreason.grading import extraction, functions, guard, kinds, notation
from effreason.grading.extraction import extract_answer
from effreason.grading.kinds import Reference
from effreason.grading.pool import Pool, Verdict, WorkerDied, WorkerStopped, WorkerStuck
from effreason.grading.status import GradeStatus
from effreason.runtime.errors import UserError

__all__ = ["Budget", "Grade", "GradeStatus", "Grader", "Reference", "extract_answer"]

MAX_ANSWER = notation.MAX_CHARACTERS
DAY_SECONDS = 86400.0
ANSWERS_PER_BUDGET = 512            # that share a budget at most; first tries fit into half of it
FIRST_SECONDS = 0.02                # shortest first try
LONGER = 4                          # each try lasts so many times as long as the one before
SLOW = (GradeStatus.SOFT_TIMEOUT, GradeStatus.HARD_KILL)        # worth another try


@dataclass(frozen=True)
class Grade:
    """The verdict on one response."""

    correct: bool
    answer: str | None              # the content of the box
    status: GradeStatus
    seconds: float  # wall time for this answer; 0 if it shared the verdict of an equal one
    # the status in words, or the details if they are known
    reason: str = field(default="", compare=False)
    partial: float = 0.0            # in (0, 1) if a user's function found it partly right

    @property
    def score(self) -> float:
        """What the response earns before its length counts: 1 if it is correct."""
        return 1.0 if self.correct else self.partial


class Budget:
    """Seconds of grading, of each worker, that the calls of one step share.

    Later tries may use half of them, first tries whatever is left: slow answers cannot take the
    time of the others."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._used, self._used_again = 0.0, 0.0
        self._lock = threading.Lock()

    def spend(self, seconds: float, *, again: bool) -> None:
        """Counts a comparison. Args: again, it was not the first try."""
        with self._lock:
            self._used += seconds
            self._used_again += seconds * again

    def is_used_up(self, *, again: bool) -> bool:
        """Returns whether no comparison may begin. Args: again, it is not the first try."""
        return self._used >= self.seconds or (again and self._used_again >= self.seconds / 2)


class Task(NamedTuple):
    """A comparison for a worker; equal tasks of one call run once."""

    prediction: str                 # the answer, or for a user's function the whole response
    reference: str
    columns: str = ""               # for a user's function, see Reference


class Grader:
    """Grades responses; a context manager, safe to use from several threads.

    The workers start at once and load their libraries in the background.

    Args:
        workers: processes for sympy or for the user's function.
        cpu_seconds: limit of one comparison.
        wall_seconds: time after which the process of a comparison is killed if it only sleeps.
        memory_mb: address space of a process.
        step_budget_seconds: of each worker, for one call of `grade`, or for the calls that share a
            `budget`.
        cache_size: symbolic verdicts that are kept.
        function: a user's own grader as module:function; it gets (response, answer), and the
            columns of the problem that it names, and returns True, False or a number in [0, 1].
    Raises: UserError if the function cannot be imported or called.
    """

    def __init__(self, *, workers: int = 2, cpu_seconds: float = 1.0, wall_seconds: float = 8.0,
                 memory_mb: int = 2048, step_budget_seconds: float = 30.0, cache_size: int = 65536,
                 function: str | None = None) -> None:
        self.cpu_seconds, self.step_budget_seconds = cpu_seconds, step_budget_seconds
        self.cache_size, self.function = cache_size, function
        if function is not None:
            try:
                functions.check_name(function)
            except functions.BadFunction as error:
                raise UserError(f"grade.function {function}: {error}") from None

        self._pool = Pool(workers, wall_seconds=wall_seconds, memory_mb=memory_mb,
                          function=function)
        # A grader that nobody closed leaves no processes behind.
        self._finalizer = weakref.finalize(self, Pool.close, self._pool)
        self._lock = threading.Lock()
        self._cache: OrderedDict[Task, bool] = OrderedDict()
        self._askers = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="grader")
        # One more call than workers: while the others wait for sympy, it prepares the next tasks.
        self._background = concurrent.futures.ThreadPoolExecutor(
            workers + 1, thread_name_prefix="grader-submit")
        self._ready = False
        self.function_source = ""       # a hash, see functions.source_sha256
        if function is not None:
            self._wait_for_function(function)

    def grade(self, responses: Sequence[str], references: Sequence[str | Reference],
              budget: Budget | None = None, *, bare: bool = False) -> list[Grade]:
        """Grades each response against its reference, within the budget. No text makes it raise.

        Args:
            references: one for each response; a string is a `Reference` of kind "math". If it has
                several answers, one that is matched is enough.
            budget: None for step_budget_seconds for this call alone.
            bare: the responses are the answers themselves, without a box.
        Raises: ValueError for lists of different lengths or an unknown kind; Undecided if workers
            cannot be started; RuntimeError if the grader is closed.
        """
        if len(responses) != len(references):
            raise ValueError("grade needs as many references as responses, got "
                             f"{len(references)} and {len(responses)}")
        typed = [Reference(reference) if isinstance(reference, str) else reference
                 for reference in references]
        if unknown := {reference.kind for reference in typed} - set(kinds.KINDS):
            raise ValueError(f"a reference's kind must be one of {', '.join(kinds.KINDS)}, "
                             f"got {sorted(unknown)[0]}")
        if self._pool.closed:
            raise RuntimeError("the grader is closed")

        if not self._ready:
            # the first comparison raises the reason
            with contextlib.suppress(WorkerDied, WorkerStuck, WorkerStopped):
                self._pool.wait_ready()  # loading is not grading: it costs nothing of the budget
            self._ready = True

        pairs = [(row, answer) for row, reference in enumerate(typed)
                 for answer in reference.each()]
        grades = self._grade([responses[row] for row, _ in pairs],
                             [answer for _, answer in pairs], budget or self.budget(), bare)
        best: dict[int, Grade] = {}     # of the answers any of which is right
        for (row, _), grade in zip(pairs, grades, strict=True):
            if row not in best or grade.score > best[row].score:
                best[row] = grade
        return list(best.values())

    def submit(self, responses: Sequence[str], references: Sequence[str | Reference],
               budget: Budget | None = None) -> "concurrent.futures.Future[list[Grade]]":
        """Like `grade`, in the background; any number of calls may run at once."""
        return self._background.submit(self.grade, list(responses), list(references), budget)

    def budget(self) -> Budget:
        """Returns step_budget_seconds for the calls of one step to share."""
        return Budget(self.step_budget_seconds)

    def check_references(self, references: Sequence[str | Reference]) -> list[int]:
        r"""Returns the indices of references that no response can match: not even \boxed{} around
        the reference.

        With a user's function nothing is checked, because only the function knows what it accepts.
        """
        return [row for row, grade in enumerate(self.grade_references(references))
                if not grade.correct]

    def grade_references(self, references: Sequence[str | Reference]) -> list[Grade]:
        r"""Grades \boxed{reference} for every reference."""
        answers = [kinds.alternatives(reference if isinstance(reference, str)
                                      else reference.answer)[0] for reference in references]
        if self.function is not None:
            return [Grade(True, answer, GradeStatus.FUNCTION, 0.0, "not checked")
                    for answer in answers]
        return self.grade([rf"\boxed{{{answer}}}" for answer in answers], references,
                          Budget(DAY_SECONDS))

    def close(self) -> None:
        """Kills the workers; calls that are still grading raise RuntimeError in their callers."""
        self._finalizer()
        self._background.shutdown(cancel_futures=True)
        self._askers.shutdown(cancel_futures=True)

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def _wait_for_function(self, function: str) -> None:
        """Waits for the first worker. Raises UserError if it cannot import the function."""
        try:
            self.function_source = self._pool.wait_ready()
        except (WorkerDied, WorkerStuck, WorkerStopped) as error:
            self.close()
            raise UserError(f"grade.function {function}: "
                            f"{str(error) or 'importing it takes minutes'}") from None

    def _grade(self, responses: Sequence[str], references: Sequence[Reference], budget: Budget,
               bare: bool) -> list[Grade]:
        grades: list[Grade] = []
        rows_of_task: dict[Task, list[int]] = {}
        for row, (response, reference) in enumerate(zip(responses, references, strict=True)):
            grade, task = self._without_worker(response, reference, bare)
            grades.append(grade)
            if task is not None:
                rows_of_task.setdefault(task, []).append(row)

        for task, (verdict, seconds) in self._with_workers(rows_of_task, budget).items():
            for index, row in enumerate(rows_of_task[task]):
                grades[row] = Grade(verdict.correct, grades[row].answer, verdict.status,
                                    0.0 if index else seconds,
                                    verdict.reason or verdict.status.words, verdict.partial)

        return grades

    def _with_workers(self, tasks: Iterable[Task],
                      budget: Budget) -> dict[Task, tuple[Verdict, float]]:
        """Has workers compare the pairs: a short try for each, then longer ones for slow pairs.

        Returns: verdict and wall time in seconds. If the budget has no other try for a slow pair,
            the last one counts: the answer was too slow, the grader was not.
        """
        share = budget.seconds * self._pool.workers / 2 / ANSWERS_PER_BUDGET
        limit = min(self.cpu_seconds, max(share, FIRST_SECONDS))
        if self.function is not None:           # one that is interrupted may be left half loaded
            limit = self.cpu_seconds

        results = self._ask(tasks, budget, limit)
        while limit < self.cpu_seconds:
            limit = min(LONGER * limit, self.cpu_seconds)
            slow = [task for task, (verdict, _) in results.items() if verdict.status in SLOW]
            for task, (verdict, seconds) in self._ask(slow, budget, limit, again=True).items():
                if verdict.status != GradeStatus.BUDGET:
                    results[task] = verdict, seconds + results[task][1]
        return results

    def _ask(self, tasks: Iterable[Task], budget: Budget, cpu_seconds: float, *,
             again: bool = False) -> dict[Task, tuple[Verdict, float]]:
        pending = {task: self._askers.submit(self._compare, task, budget, cpu_seconds, again)
                   for task in tasks}
        return {task: future.result() for task, future in pending.items()}

    def _without_worker(self, response: str, reference: Reference,
                        bare: bool) -> tuple[Grade, Task | None]:
        """Returns a grade and, if it is not final, the task for a worker."""
        start = time.monotonic()
        answer = (response.strip() or None) if bare else extract_answer(response)
        correct, status, reason, task = False, GradeStatus.NO_ANSWER, "", None

        if self.function is not None:
            status, task = GradeStatus.FUNCTION, Task(response, reference.answer,
                                                      reference.columns)
        elif answer is None:
            reason = "no answer" if bare else extraction.missing_answer_reason(response)
        else:
            correct, status, reason = self._exact(answer, reference)
            if status == GradeStatus.SYMBOLIC:
                task = Task(answer, reference.answer)

        return Grade(correct, answer, status, time.monotonic() - start,
                     reason or status.words), task

    def _exact(self, answer: str, reference: Reference) -> tuple[bool, GradeStatus, str]:
        """Returns the verdict, its status and, for an error, the reason."""
        if len(answer) > MAX_ANSWER or len(reference.answer) > MAX_ANSWER:
            return False, GradeStatus.TOO_LONG, ""

        task = Task(answer, reference.answer)
        with self._lock:
            if reference.kind == "math" and task in self._cache:
                self._cache.move_to_end(task)
                return self._cache[task], GradeStatus.CACHED, ""

        try:
            verdict = kinds.same(answer, reference)
            if verdict is not None:
                return verdict, GradeStatus.EXACT, ""
            too_large = any(guard.is_too_large(notation.canonical(text)) for text in task[:2])
            return False, GradeStatus.GUARD if too_large else GradeStatus.SYMBOLIC, ""
        # a bug in this package must not stop a training run; the status shows it
        except Exception as error:
            return False, GradeStatus.ERROR, functions.describe(error)

    def _compare(self, task: Task, budget: Budget, cpu_seconds: float,
                 again: bool) -> tuple[Verdict, float]:
        """Has a worker compare the pair. Returns: its verdict and the wall time in seconds."""
        if budget.is_used_up(again=again):
            return Verdict(False, GradeStatus.BUDGET), 0.0

        start = time.monotonic()
        verdict = self._pool.compare(task.prediction, task.reference, cpu_seconds, task.columns)
        budget.spend(verdict.seconds / self._pool.workers, again=again)

        # only verdicts that did not depend on a limit are kept
        if verdict.status == GradeStatus.SYMBOLIC:
            with self._lock:
                self._cache[task] = verdict.correct
                if len(self._cache) > self.cache_size:
                    self._cache.popitem(last=False)
        return verdict, time.monotonic() - start
