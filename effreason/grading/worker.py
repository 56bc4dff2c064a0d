"""The process that compares answers with sympy: `python -m effreason.grading.worker LIMITS`, JSON lines in and out.

Started, timed and killed by `effreason.grading.pool`. Limits are the system's: they hold whatever sympy is made to do.
"""

import json
import os
import resource
import signal
import sys
from types import FrameType
from typing import Any

RETRY_SECONDS = 0.1                 # sympy swallows an exception here and there: the soft stop is raised again
HARD_SECONDS = 20                   # of CPU for one task, for the case that the parent is gone and cannot kill
START_BYTES = 512 << 20             # address space that the libraries need before any task


class SoftStop(BaseException):
    """The task has used its CPU time. Not an Exception, so that `except Exception` in a library lets it pass."""


armed = False


def main() -> None:
    os.umask(0o077)
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)               # nothing a library prints may be taken for a verdict
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, _on_cpu_time)
    limits = json.loads(sys.argv[1])
    try:
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_FSIZE, 0)
        import logging

        import math_verify  # noqa: F401

        from effreason.grading import symbolic  # noqa: F401

        logging.disable(logging.CRITICAL)
        _limit(resource.RLIMIT_AS, max(limits["memory_mb"] << 20, START_BYTES))
    except Exception as error:      # whatever it is, the parent has to hear of it: it raises it where the user sees it
        _reply(replies, {"failed": f"{type(error).__name__}: {error}"})
        return
    _reply(replies, {"ready": True})
    for line in sys.stdin.buffer:
        task = json.loads(line)
        _reply(replies, {"id": task["id"], **_verdict(task, limits["cpu_seconds"]), "rss_mb": _rss_mb()})


def _verdict(task: dict[str, Any], cpu_seconds: float) -> dict[str, Any]:
    from effreason.grading import symbolic

    global armed
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + cpu_seconds + HARD_SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
    cpu_seconds *= symbolic.cpu_share(task["prediction"], task["gold"])
    try:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds, RETRY_SECONDS)
            return {"correct": symbolic.symbolic(task["prediction"], task["gold"]), "status": "symbolic"}
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_PROF, 0)
    except SoftStop:
        armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        return {"correct": False, "status": "soft_timeout"}
    except MemoryError:
        return {"correct": False, "status": "memory"}
    except Exception:               # an answer that the libraries choke on is a wrong answer, and counted
        return {"correct": False, "status": "error"}


def _on_cpu_time(number: int, frame: FrameType | None) -> None:
    if armed:
        raise SoftStop


def _limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def _rss_mb() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    except OSError:                 # no /proc: the peak, in kilobytes on Linux and bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def _reply(replies: Any, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
