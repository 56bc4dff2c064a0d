"""The process that compares answers with sympy or a user's function; reads and writes JSON lines.

`python -m effreason.grading.worker SETTINGS` is started, timed and killed by
`effreason.grading.pool`. SETTINGS is a JSON object with memory_mb, function (module:function or
null) and path. The limits are those of the operating system, so they hold whatever sympy does.
"""

import ctypes
import functools
import json
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from effreason.grading import functions
from effreason.grading.status import GradeStatus

RETRY_SECONDS = 0.1  # sympy may swallow the soft stop, so it is raised again and again
# Processor time after the soft stop. Then the system ends the process: C code that does not return
# to Python cannot be stopped otherwise.
GRACE_SECONDS = 0.3
PR_SET_PDEATHSIG = 1                # of Linux's prctl.h
WATCH_SECONDS = 1.0                 # between two looks whether the parent is alive
START_BYTES = 512 << 20             # address space that the libraries need before any task


class SoftStop(BaseException):
    """The task used up its CPU time. Not an Exception, which a library would catch."""


WARM_UP = (r"\sqrt{8}", r"2\sqrt{2}")
armed = False                       # whether SoftStop may be raised: only during a comparison


@dataclass(frozen=True)
class Comparator:
    """How a worker compares a pair."""

    status: GradeStatus             # of its verdicts
    # Of prediction, reference and the columns of the problem: 1 if they agree, less in part.
    score: Callable[[str, str, str], float]
    clock: Callable[[], float]      # measures what a comparison costs: a function may wait


def main() -> None:
    die_with_parent()
    os.umask(0o077)
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    tasks = os.fdopen(os.dup(0), "rb")

    # A library must neither read tasks from stdin nor print what would look like a verdict.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, _on_cpu_time)
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    settings = json.loads(sys.argv[1])

    try:
        _limit(resource.RLIMIT_CORE, 0)
        comparator = _function(settings) if settings["function"] else _algebra(settings)
    except Exception as error:      # whatever it is, the parent reports it to the user
        _reply(replies, {"failed": functions.describe(error)})
        return

    name = settings["function"]
    _reply(replies, {"ready": True, "rss_mb": _rss_mb(),
                     "source": functions.source_sha256(name) if name else ""})

    for line in tasks:
        task = json.loads(line)
        started = comparator.clock()
        verdict = _verdict(comparator, task)
        _reply(replies, {"id": task["id"], **verdict, "seconds": comparator.clock() - started,
                         "rss_mb": _rss_mb()})


def die_with_parent() -> None:
    """Ends this process, whatever it is doing, when the one that started it has ended."""
    if sys.platform == "linux":     # when the thread that started it has ended, to be exact
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch_parent, args=[os.getppid()], daemon=True).start()

    pipe = select.poll()
    pipe.register(0, 0)
    if pipe.poll(0):                # nobody can write to it: the parent had ended before this
        os._exit(1)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _algebra(settings: dict[str, Any]) -> Comparator:
    _limit(resource.RLIMIT_FSIZE, 0)
    import logging

    from effreason.grading import symbolic

    logging.disable(logging.CRITICAL)
    _limit(resource.RLIMIT_AS, max(settings["memory_mb"] << 20, START_BYTES))
    # What a library does at its first use must not count as the first answer's time.
    symbolic.symbolic(*WARM_UP)
    return Comparator(GradeStatus.SYMBOLIC,
                      lambda prediction, reference, _: symbolic.symbolic(prediction, reference),
                      time.process_time)


def _function(settings: dict[str, Any]) -> Comparator:
    function = functions.load(settings["function"], settings["path"])
    # Its libraries may reserve any amount of address space while they load: the limit is on top.
    _limit(resource.RLIMIT_AS, _address_space() + (settings["memory_mb"] << 20))
    return Comparator(GradeStatus.FUNCTION, functools.partial(functions.score, function),
                      time.monotonic)


def _verdict(comparator: Comparator, task: dict[str, Any]) -> dict[str, Any]:
    global armed
    cpu_seconds = task["cpu_seconds"]
    try:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds, RETRY_SECONDS)
            signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds + GRACE_SECONDS)
            score = comparator.score(task["prediction"], task["reference"], task["columns"])
            return {"score": float(score), "status": comparator.status}
        finally:
            _disarm()
    except SoftStop:
        _disarm()
        return {"score": 0.0, "status": GradeStatus.SOFT_TIMEOUT}
    except MemoryError:
        return {"score": 0.0, "status": GradeStatus.MEMORY}
    # an answer that crashes the comparison is wrong, and counted
    except (Exception, SystemExit) as error:
        return {"score": 0.0, "status": GradeStatus.ERROR, "reason": functions.describe(error)}


def _disarm() -> None:
    global armed
    armed = False
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _on_cpu_time(number: int, frame: FrameType | None) -> None:
    if armed:
        raise SoftStop


def _limit(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _address_space() -> int:
    try:
        return _pages()[0] * os.sysconf("SC_PAGE_SIZE")
    except OSError:                 # no /proc
        return START_BYTES


def _pages() -> list[int]:
    """Returns the pages of address space, the pages in memory, and more."""
    with open("/proc/self/statm") as file:
        return [int(number) for number in file.read().split()]


def _rss_mb() -> int:
    try:
        return _pages()[1] * os.sysconf("SC_PAGE_SIZE") >> 20
    except OSError:  # no /proc: the peak instead, in kilobytes on Linux, in bytes on macOS
        shift = 20 if sys.platform == "darwin" else 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> shift


def _reply(replies: Any, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
