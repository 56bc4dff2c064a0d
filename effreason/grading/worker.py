"""The process that compares answers with sympy, or by a user's function: JSON lines in and out.

`python -m effreason.grading.worker SETTINGS`, with cpu_seconds, memory_mb, function (module:function or null) and path.

Started, timed and killed by `effreason.grading.pool`. Limits are the system's: they hold whatever sympy is made to do.
"""

import functools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from effreason.grading import functions

RETRY_SECONDS = 0.1                 # sympy swallows an exception here and there: the soft stop is raised again
HARD_SECONDS = 20                   # of CPU for one task, for the case that the parent is gone and cannot kill
START_BYTES = 512 << 20             # address space that the libraries need before any task


class SoftStop(BaseException):
    """The task has used its CPU time. Not an Exception, so that `except Exception` in a library lets it pass."""


armed = False


@dataclass(frozen=True)
class Judge:
    """What the worker is asked: how it compares, and the share of the CPU limit it gives to a pair."""

    status: str                     # of its verdicts
    compare: Callable[[str, str], bool]
    cpu_share: Callable[[str, str], float]


def main() -> None:
    os.umask(0o077)
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    tasks = os.fdopen(os.dup(0), "rb")
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 0)               # nothing a library reads may be a task,
    os.dup2(quiet, 1)               # and nothing it prints may be taken for a verdict
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, _on_cpu_time)
    settings = json.loads(sys.argv[1])
    try:
        _limit(resource.RLIMIT_CORE, 0)
        judge = _function(settings) if settings["function"] else _algebra(settings)
    except Exception as error:      # whatever it is, the parent has to hear of it: it raises it where the user sees it
        _reply(replies, {"failed": functions.described(error)})
        return
    _reply(replies, {"ready": True, "rss_mb": _rss_mb()})
    for line in tasks:
        task = json.loads(line)
        _reply(replies, {"id": task["id"], **_verdict(judge, task, settings["cpu_seconds"]), "rss_mb": _rss_mb()})


def _algebra(settings: dict[str, Any]) -> Judge:
    _limit(resource.RLIMIT_FSIZE, 0)
    import logging

    import math_verify  # noqa: F401

    from effreason.grading import symbolic

    logging.disable(logging.CRITICAL)
    _limit(resource.RLIMIT_AS, max(settings["memory_mb"] << 20, START_BYTES))
    return Judge("symbolic", symbolic.symbolic, symbolic.cpu_share)


def _function(settings: dict[str, Any]) -> Judge:
    function = functions.load(settings["function"], settings["path"])
    # Its libraries may reserve any amount of address space before the first response: the limit is on what comes after.
    _limit(resource.RLIMIT_AS, _address_space() + (settings["memory_mb"] << 20))
    return Judge("function", functools.partial(functions.verdict, function), lambda response, answer: 1.0)


def _verdict(judge: Judge, task: dict[str, Any], cpu_seconds: float) -> dict[str, Any]:
    global armed
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + cpu_seconds + HARD_SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
    cpu_seconds *= judge.cpu_share(task["prediction"], task["reference"])
    try:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds, RETRY_SECONDS)
            return {"correct": judge.compare(task["prediction"], task["reference"]), "status": judge.status}
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_PROF, 0)
    except SoftStop:
        armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        return {"correct": False, "status": "soft_timeout"}
    except MemoryError:
        return {"correct": False, "status": "memory"}
    except (Exception, SystemExit) as error:    # an answer that the code chokes on is a wrong answer, and counted
        return {"correct": False, "status": "error", "reason": functions.described(error)}


def _on_cpu_time(number: int, frame: FrameType | None) -> None:
    if armed:
        raise SoftStop


def _limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def _address_space() -> int:
    try:
        return _pages()[0] * os.sysconf("SC_PAGE_SIZE")
    except OSError:                 # no /proc
        return START_BYTES


def _pages() -> list[int]:
    """Pages of address space, pages in memory, and more."""
    with open("/proc/self/statm") as file:
        return [int(number) for number in file.read().split()]


def _rss_mb() -> int:
    try:
        return _pages()[1] * os.sysconf("SC_PAGE_SIZE") >> 20
    except OSError:                 # no /proc: the peak, in kilobytes on Linux and bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def _reply(replies: Any, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
