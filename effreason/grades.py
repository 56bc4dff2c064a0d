"""From a response and a reference answer to correct or not, on the host, whatever the response holds.

Cut out the boxed answer, settle what plain Python can settle, and give the rest to sympy in processes that can be
killed. Nothing of a response is ever executed. See `Grade.status` for how each verdict came about.
"""

import concurrent.futures
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from effreason.grading import notation, symbolic
from effreason.grading.exact import exact
from effreason.grading.extraction import extract_answer
from effreason.grading.pool import Pool, Verdict

__all__ = ["Grade", "Grader", "extract_answer"]

STATUSES = ("no_answer", "too_long", "exact", "symbolic", "cached",
            "guard", "soft_timeout", "hard_kill", "memory", "budget", "error")
MAX_ANSWER = notation.MAX_CHARACTERS


@dataclass(frozen=True)
class Grade:
    """The verdict on one response.

    Statuses: no_answer (no box), too_long, exact (decided in plain Python), symbolic (decided by sympy), cached (an
    earlier symbolic verdict); and, always wrong: guard (too large to try), soft_timeout, hard_kill, memory, budget (the
    call's time was over), error.
    """

    correct: bool
    answer: str | None              # what stood in the box
    status: str                     # one of STATUSES
    seconds: float                  # wall time this answer took; 0 where it shared another's verdict


class Grader:
    """Grades responses; a context manager, safe to use from several threads; its workers load while training starts.

    Args: workers, processes for algebra; cpu_seconds, soft limit of one comparison; wall_seconds, after which its
    process is killed; memory_mb, address space of a process; step_budget_seconds, limit of one call of `grade`;
    cache_size, symbolic verdicts kept.
    """

    def __init__(self, *, workers: int = 2, cpu_seconds: float = 2.0, wall_seconds: float = 8.0, memory_mb: int = 2048,
                 step_budget_seconds: float = 30.0, cache_size: int = 65536) -> None:
        self.step_budget_seconds, self.cache_size = step_budget_seconds, cache_size
        self._pool = Pool(workers, cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_mb=memory_mb)
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, str], bool] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._askers = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="grader")
        self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="grader-submit")
        self._finalizer = weakref.finalize(self, Pool.close, self._pool)    # a grader nobody closed leaves no processes

    def grade(self, responses: Sequence[str], golds: Sequence[str]) -> list[Grade]:
        """Grades responses against reference answers, one for one, within step_budget_seconds; no text makes it raise.

        Raises: ValueError for lists of different lengths, RuntimeError when workers cannot be started or the grader is
        closed.
        """
        if len(responses) != len(golds):
            raise ValueError(f"grade needs as many golds as responses, got {len(golds)} and {len(responses)}")
        if self._pool.closed:
            raise RuntimeError("the grader is closed")
        deadline = time.monotonic() + self.step_budget_seconds
        grades: dict[int, Grade] = {}
        waiting: dict[tuple[str, str], list[int]] = {}
        for row, (response, gold) in enumerate(zip(responses, golds, strict=True)):
            grade, pair = self._without_algebra(response, gold, deadline)
            grades[row] = grade
            if pair is not None:
                waiting.setdefault(pair, []).append(row)
        verdicts = {pair: self._ask(pair, deadline) for pair in waiting}
        for pair, rows in waiting.items():
            verdict, seconds = verdicts[pair].result()
            for place, row in enumerate(rows):
                grades[row] = Grade(verdict.correct, grades[row].answer, verdict.status, 0.0 if place else seconds)
        result = [grades[row] for row in range(len(responses))]
        with self._lock:
            self._counts.update(grade.status for grade in result)
        return result

    def submit(self, responses: Sequence[str], golds: Sequence[str]) -> "concurrent.futures.Future[list[Grade]]":
        """The same as `grade`, in the background; calls are worked off in turn, each with a time budget of its own."""
        return self._background.submit(self.grade, list(responses), list(golds))

    def check_golds(self, golds: Sequence[str]) -> list[int]:
        """The places of reference answers that a response can never match, since they do not even match themselves."""
        boxed = [rf"\boxed{{{gold}}}" for gold in golds]
        return [row for row, text in enumerate(boxed)
                if extract_answer(text) != golds[row].strip() or len(golds[row]) > MAX_ANSWER
                or not exact(golds[row], golds[row])]

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

    def _without_algebra(self, response: str, gold: str, deadline: float) -> tuple[Grade, tuple[str, str] | None]:
        """The verdict, and the pair to compare by algebra where it is not final."""
        start = time.monotonic()
        answer = extract_answer(response)
        correct, status, pair = False, "no_answer", None
        if answer is not None:
            correct, status = self._exact(answer, gold, start > deadline)
            if status == "symbolic":
                pair = (answer, gold)
        return Grade(correct, answer, status, time.monotonic() - start), pair

    def _exact(self, answer: str, gold: str, late: bool) -> tuple[bool, str]:
        if len(answer) > MAX_ANSWER or len(gold) > MAX_ANSWER:
            return False, "too_long"
        if late:
            return False, "budget"
        with self._lock:
            if (answer, gold) in self._cache:
                self._cache.move_to_end((answer, gold))
                return self._cache[answer, gold], "cached"
        try:
            verdict = exact(answer, gold)
        except Exception:           # a hole in this package must not stop a training run; the status makes it seen
            return False, "error"
        if verdict is not None:
            return verdict, "exact"
        large = any(symbolic.guard(notation.canonical(text)) for text in (answer, gold))
        return False, "guard" if large else "symbolic"

    def _ask(self, pair: tuple[str, str], deadline: float) -> "concurrent.futures.Future[tuple[Verdict, float]]":
        return self._askers.submit(self._with_algebra, pair, deadline)

    def _with_algebra(self, pair: tuple[str, str], deadline: float) -> tuple[Verdict, float]:
        start = time.monotonic()
        verdict = self._pool.compare(*pair, deadline)
        if verdict.status == "symbolic":            # a verdict that time, memory or luck has not touched
            with self._lock:
                self._cache[pair] = verdict.correct
                if len(self._cache) > self.cache_size:
                    self._cache.popitem(last=False)
        return verdict, time.monotonic() - start
