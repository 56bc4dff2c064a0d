"""From a response and a reference answer to correct or not, on the host, whatever the response holds.

Cut out the boxed answer, settle what plain Python can settle, and give the rest to sympy in processes that can be
killed. Nothing of a response is ever executed. See `Grade.status` for how each verdict came about.
"""

import concurrent.futures
import contextlib
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

from effreason.grading import extraction, functions, kinds, notation, symbolic
from effreason.grading.exact import exact
from effreason.grading.extraction import extract_answer
from effreason.grading.kinds import Reference
from effreason.grading.pool import Pool, Verdict, WorkerDied, WorkerStuck
from effreason.runtime.errors import UserError

__all__ = ["Budget", "Reference", "Grade", "Grader", "extract_answer"]

MAX_ANSWER = notation.MAX_CHARACTERS
A_DAY = 86400.0
# Every status, and what it means.
REASONS = {
    "no_answer": "no box",
    "too_long": f"over {MAX_ANSWER} characters",
    "exact": "decided exactly",
    "symbolic": "compared by algebra",
    "cached": "algebra, as before",
    "function": "by your function",
    "guard": "too large to compare",
    "soft_timeout": "out of processor time",
    "hard_kill": "stuck, worker killed",
    "memory": "out of memory",
    "budget": "out of the step's time",
    "error": "the comparison failed",
}
STATUSES = tuple(REASONS)


@dataclass(frozen=True)
class Grade:
    """The verdict on one response.

    Statuses: no_answer (no box), too_long, exact (decided in plain Python), symbolic (decided by sympy), cached (an
    earlier symbolic verdict), function (decided by the user's function); and, always wrong: guard (too large to try),
    soft_timeout, hard_kill, memory, budget (the time was over), error.
    """

    correct: bool
    answer: str | None              # what stood in the box
    status: str                     # one of STATUSES
    seconds: float                  # wall time this answer took; 0 where it shared another's verdict
    reason: str = field(default="", compare=False)      # the status in words, more exactly where more is known


class Budget:
    """Seconds of grading that several calls share. Time runs only while one of them is under way."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._used, self._calls, self._since = seconds, 0.0, 0, 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> float:
        """Begins a call. Returns: when the budget will be spent if calls go on without a pause (time.monotonic)."""
        with self._lock:
            if self._calls == 0:
                self._since = time.monotonic()
            self._calls += 1
            return self._since + self._seconds - self._used

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        with self._lock:
            self._calls -= 1
            if self._calls == 0:
                self._used += time.monotonic() - self._since


class Task(NamedTuple):
    """What a worker is asked; equal tasks of one call are asked once."""

    prediction: str                 # the answer, or for a user's function the whole response
    reference: str


class Grader:
    """Grades responses; a context manager, safe to use from several threads; its workers load while training starts.

    Args: workers, processes for algebra or for the function; cpu_seconds, soft limit of one comparison; wall_seconds,
    after which its process is killed; memory_mb, address space of a process; step_budget_seconds, limit of one call of
    `grade` or of the calls that share a `budget`; cache_size, symbolic verdicts kept; function, module:function of a
    user's own grader, which gets (response, answer) and returns True or False.
    Raises: UserError when the function cannot be imported or called.
    """

    def __init__(self, *, workers: int = 2, cpu_seconds: float = 1.0, wall_seconds: float = 8.0, memory_mb: int = 2048,
                 step_budget_seconds: float = 30.0, cache_size: int = 65536, function: str | None = None) -> None:
        self.step_budget_seconds, self.cache_size, self.function = step_budget_seconds, cache_size, function
        if function is not None:
            _check_name(function)
        self._pool = Pool(workers, cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_mb=memory_mb,
                          function=function)
        self._finalizer = weakref.finalize(self, Pool.close, self._pool)    # a grader nobody closed leaves no processes
        self._lock = threading.Lock()
        self._cache: OrderedDict[Task, bool] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._askers = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="grader")
        # One call more than there are workers: while some wait for algebra, the next brings the workers more of it.
        self._background = concurrent.futures.ThreadPoolExecutor(workers + 1, thread_name_prefix="grader-submit")
        self._ready = False
        if function is not None:
            self._check_function(function)

    def grade(self, responses: Sequence[str], references: Sequence[str | Reference], budget: Budget | None = None, *,
              bare: bool = False) -> list[Grade]:
        """Grades responses against reference answers, one for one, within the budget; no text makes it raise.

        Args: references, a plain string is a `Reference` of kind "math"; budget, None = step_budget_seconds for this call alone;
        bare, the responses are answers themselves, without a box.
        Raises: ValueError for lists of different lengths or an unknown kind, RuntimeError when workers cannot be
        started or the grader is closed.
        """
        if len(responses) != len(references):
            raise ValueError(f"grade needs as many references as responses, got {len(references)} and {len(responses)}")
        wanted = [Reference(reference) if isinstance(reference, str) else reference for reference in references]
        if unknown := {reference.kind for reference in wanted} - set(kinds.KINDS):
            raise ValueError(f"a reference's kind must be one of {', '.join(kinds.KINDS)}, got {sorted(unknown)[0]}")
        if self._pool.closed:
            raise RuntimeError("the grader is closed")
        if not self._ready:
            with contextlib.suppress(WorkerDied, WorkerStuck):      # asking a worker tells the reason
                self._pool.wait_ready()             # loading is no grading: it costs nothing of the budget
            self._ready = True
        with budget or self.budget() as deadline:
            grades = self._grade(responses, wanted, deadline, bare)
        with self._lock:
            self._counts.update(grade.status for grade in grades)
        return grades

    def submit(self, responses: Sequence[str], references: Sequence[str | Reference],
               budget: Budget | None = None) -> "concurrent.futures.Future[list[Grade]]":
        """The same as `grade`, in the background; any number of calls may be under way."""
        return self._background.submit(self.grade, list(responses), list(references), budget)

    def budget(self) -> Budget:
        """step_budget_seconds for the calls of one step that share it."""
        return Budget(self.step_budget_seconds)

    def check_references(self, references: Sequence[str | Reference]) -> list[int]:
        r"""The places of reference answers that no response can match: not even \boxed{} round the answer itself.

        With a user's function none is checked: what it accepts is its own affair.
        """
        return [row for row, grade in enumerate(self.grade_references(references)) if not grade.correct]

    def grade_references(self, references: Sequence[str | Reference]) -> list[Grade]:
        r"""The verdict on \boxed{reference} for every reference answer."""
        answers = [reference if isinstance(reference, str) else reference.answer for reference in references]
        if self.function is not None:
            return [Grade(True, answer, "function", 0.0, "not checked") for answer in answers]
        return self.grade([rf"\boxed{{{answer}}}" for answer in answers], references, Budget(A_DAY))

    def stats(self) -> dict[str, int]:
        """How often each status came up, and how workers ended: killed (stuck), died (by themselves), recycled."""
        with self._lock:
            counts = Counter({status: self._counts[status] for status in STATUSES})
        return {**counts, **{what: self._pool.counts[what] for what in ("killed", "died", "recycled")}}

    def close(self) -> None:
        """Kills the workers; what is still being graded raises RuntimeError in its caller."""
        self._finalizer()
        self._background.shutdown(cancel_futures=True)
        self._askers.shutdown(cancel_futures=True)

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def _check_function(self, function: str) -> None:
        """Waits for the first worker. Raises UserError when it cannot import the function."""
        try:
            self._pool.wait_ready()
        except (WorkerDied, WorkerStuck) as error:
            self.close()
            raise UserError(f"grade.function {function}: {str(error) or 'importing it takes minutes'}") from None

    def _grade(self, responses: Sequence[str], references: Sequence[Reference], deadline: float, bare: bool) -> list[Grade]:
        grades: list[Grade] = []
        rows_of: dict[Task, list[int]] = {}
        for row, (response, reference) in enumerate(zip(responses, references, strict=True)):
            grade, task = self._without_worker(response, reference, deadline, bare)
            grades.append(grade)
            if task is not None:
                rows_of.setdefault(task, []).append(row)
        asked = {task: self._askers.submit(self._ask, task, deadline) for task in rows_of}
        for task, rows in rows_of.items():
            verdict, seconds = asked[task].result()
            for place, row in enumerate(rows):
                grades[row] = Grade(verdict.correct, grades[row].answer, verdict.status, 0.0 if place else seconds,
                                    verdict.reason or REASONS[verdict.status])
        return grades

    def _without_worker(self, response: str, reference: Reference, deadline: float, bare: bool) -> tuple[Grade, Task | None]:
        """The verdict, and what to ask a worker where it is not final."""
        start = time.monotonic()
        answer = (response.strip() or None) if bare else extract_answer(response)
        correct, status, reason, task = False, "no_answer", "", None
        if self.function is not None:
            status, task = "function", Task(response, reference.answer)
        elif answer is None:
            reason = "no answer" if bare else extraction.reason(response)
        else:
            correct, status, reason = self._exact(answer, reference, start > deadline)
            if status == "symbolic":
                task = Task(answer, reference.answer)
        return Grade(correct, answer, status, time.monotonic() - start, reason or REASONS[status]), task

    def _exact(self, answer: str, reference: Reference, late: bool) -> tuple[bool, str, str]:
        """Correct, the status and, of an error, the reason."""
        if len(answer) > MAX_ANSWER or len(reference.answer) > MAX_ANSWER:
            return False, "too_long", ""
        if late:
            return False, "budget", ""
        try:
            if reference.kind == "choice":
                return kinds.same_choice(answer, reference), "exact", ""
            if reference.kind == "text":
                return kinds.same_text(answer, reference), "exact", ""
            return *self._mathematics(Task(answer, reference.answer)), ""
        except Exception as error:  # a hole in this package must not stop a training run; the status makes it seen
            return False, "error", functions.described(error)

    def _mathematics(self, task: Task) -> tuple[bool, str]:
        with self._lock:
            if task in self._cache:
                self._cache.move_to_end(task)
                return self._cache[task], "cached"
        verdict = exact(*task)
        if verdict is not None:
            return verdict, "exact"
        large = any(symbolic.guard(notation.canonical(text)) for text in task)
        return False, "guard" if large else "symbolic"

    def _ask(self, task: Task, deadline: float) -> tuple[Verdict, float]:
        start = time.monotonic()
        verdict = self._pool.compare(*task, deadline)
        if verdict.status == "symbolic":            # a verdict that time, memory or luck has not touched
            with self._lock:
                self._cache[task] = verdict.correct
                if len(self._cache) > self.cache_size:
                    self._cache.popitem(last=False)
        return verdict, time.monotonic() - start


def _check_name(function: str) -> None:
    try:
        functions.check_name(function)
    except functions.BadFunction as error:
        raise UserError(f"grade.function {function}: {error}") from None
