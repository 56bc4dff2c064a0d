"""Workers that compare answers in separate processes, and the pool that kills and replaces them."""

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from effreason.grading.status import GradeStatus

# sympy caches, so a worker is replaced after this many comparisons or after this growth.
MAX_TASKS = 500
MAX_GROWTH_MB = 650
START_SECONDS = 120.0
MAX_FAILED_STARTS = 3


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison and how it ended."""

    correct: bool
    status: GradeStatus
    reason: str = ""                # what went wrong, for an error


class WorkerDied(Exception):
    """The process ended, or its reply makes no sense."""


class StartFailed(WorkerDied):
    """The process ended before it was ready."""


class WorkerStuck(Exception):
    """No reply within the time allowed."""


class Worker:
    """One process, used by one thread at a time; it starts at once and is ready a moment later."""

    def __init__(self, *, cpu_seconds: float, memory_mb: int, function: str | None = None) -> None:
        directory = _working_directory()
        path = [entry or directory for entry in ("", *sys.path)] if function else []
        settings = json.dumps({"cpu_seconds": cpu_seconds, "memory_mb": memory_mb,
                               "function": function, "path": path})

        # -P: no modules from the working directory; -s: none from the user's site-packages; -B: no
        # .pyc files. In a session of its own Ctrl-C does not reach it, and killing the group kills
        # its children.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-B", "-m", "effreason.grading.worker", settings],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, **_environment()} if function else _environment(),
            cwd=directory if function else "/",
            start_new_session=True, close_fds=True)
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)

        self.function = function
        self.ready, self.tasks = False, 0
        self.start_mb = self.growth_mb = 0
        self.buffer = b""           # what follows the last complete reply

    def compare(self, prediction: str, reference: str, seconds: float) -> Verdict:
        """Compares one pair. Raises: WorkerDied or WorkerStuck; the worker must then be killed."""
        self.tasks += 1
        end = time.monotonic() + seconds
        task = {"id": self.tasks, "prediction": prediction, "reference": reference}
        self._send(json.dumps(task).encode() + b"\n", end)

        reply = self._receive(end)
        if reply.get("id") != self.tasks:
            raise WorkerDied("its replies do not match the tasks")
        self.growth_mb = int(reply["rss_mb"]) - self.start_mb
        return Verdict(bool(reply["correct"]), GradeStatus(reply["status"]),
                       str(reply.get("reason", "")))

    def wait_ready(self, seconds: float) -> None:
        """Waits until the libraries are loaded. Raises: WorkerDied with a reason, WorkerStuck."""
        if not self.ready:
            reply = self._receive(time.monotonic() + seconds)
            if "failed" in reply:
                raise WorkerDied(reply["failed"])
            self.ready, self.start_mb = True, int(reply["rss_mb"])

    def worn(self) -> bool:
        return (self.tasks >= MAX_TASKS and self.function is None) or self.growth_mb > MAX_GROWTH_MB

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):      # bytes that were not sent cannot be sent now
                if pipe is not None:
                    pipe.close()

    def _send(self, data: bytes, end: float) -> None:
        """Writes, but never waits beyond `end`: a stuck worker does not read a long response."""
        assert self.process.stdin is not None
        descriptor = self.process.stdin.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        view = memoryview(data)

        while view:
            if not poll.poll(max(end - time.monotonic(), 0) * 1000):
                raise WorkerStuck
            try:
                view = view[os.write(descriptor, view):]
            except BlockingIOError:
                continue
            except OSError as error:
                raise WorkerDied("it no longer reads") from error

    def _receive(self, end: float) -> dict:
        """Reads one reply."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN | select.POLLHUP)

        while b"\n" not in self.buffer:
            if not poll.poll(max(end - time.monotonic(), 0) * 1000):
                raise WorkerStuck
            data = os.read(descriptor, 65536)
            if not data:
                raise WorkerDied(f"it ended with code {self.process.wait()}")
            self.buffer += data

        line, _, self.buffer = self.buffer.partition(b"\n")
        try:
            reply = json.loads(line)
        except ValueError as error:
            raise WorkerDied("its reply is not JSON") from error
        return reply


class Pool:
    """A fixed number of workers; `compare` may be called from any number of threads."""

    def __init__(self, workers: int, *, cpu_seconds: float, wall_seconds: float, memory_mb: int,
                 function: str | None = None) -> None:
        self.cpu_seconds, self.wall_seconds, self.memory_mb = cpu_seconds, wall_seconds, memory_mb
        self.function = function

        self._lock = threading.Lock()
        self.closed = False
        self._failed_starts = 0
        self._living: set[Worker] = set()
        self._idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(self._start())

    def wait_ready(self) -> None:
        """Waits until one worker is ready. Raises: WorkerDied with the reason, or WorkerStuck."""
        worker = self._take(time.monotonic() + START_SECONDS)
        if worker is not None:
            try:
                worker.wait_ready(START_SECONDS)
            finally:
                self._idle.put(worker)

    def compare(self, prediction: str, reference: str, deadline: float) -> Verdict:
        """Compares two answers; the status is BUDGET if the deadline (time.monotonic) came first.

        If a worker dies by itself, the answer may not be the cause, so a comparison is tried twice.
        Raises: RuntimeError if workers cannot be started or the pool is closed.
        """
        deaths = 0
        while deaths < 2:
            try:
                return self._compare_once(prediction, reference, deadline)
            except StartFailed:
                continue  # `_start_failed` raises RuntimeError after several in a row
            except WorkerDied:
                deaths += 1

        return Verdict(False, GradeStatus.ERROR, "the worker that compared it ended, twice")

    def close(self) -> None:
        """Kills all workers. Calls that are still running raise RuntimeError."""
        with self._lock:
            self.closed = True
            living, self._living = self._living, set()
        for worker in living:
            worker.kill()
        self._idle.put(None)

    def _compare_once(self, prediction: str, reference: str, deadline: float) -> Verdict:
        worker = self._take(deadline)
        if worker is None:
            return Verdict(False, GradeStatus.BUDGET)

        healthy = True
        try:
            try:
                worker.wait_ready(min(max(deadline - time.monotonic(), 0), START_SECONDS))
                self._failed_starts = 0
            except WorkerStuck:
                return Verdict(False, GradeStatus.BUDGET)       # still loading: the worker is kept
            except WorkerDied as error:
                healthy = False
                raise self._start_failed(error) from None

            left = deadline - time.monotonic()
            if left <= 0:
                return Verdict(False, GradeStatus.BUDGET)
            return worker.compare(prediction, reference, min(self.wall_seconds, left))
        except (WorkerDied, WorkerStuck) as error:
            healthy = False
            if self.closed:
                raise RuntimeError("the grader is closed") from None
            if isinstance(error, WorkerDied):
                raise

            late = time.monotonic() >= deadline
            return Verdict(False, GradeStatus.BUDGET if late else GradeStatus.HARD_KILL)
        except BaseException:
            healthy = False  # Ctrl-C in the main thread: the reply would still arrive
            raise
        finally:
            self._give_back(worker, healthy)

    def _take(self, deadline: float) -> Worker | None:
        try:
            worker = self._idle.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            return None

        if worker is None or self.closed:
            self._idle.put(None)                    # so that the next thread in the queue stops too
            raise RuntimeError("the grader is closed")
        return worker

    def _give_back(self, worker: Worker, healthy: bool) -> None:
        """Puts the worker back into the queue, or a new one if it is worn or unhealthy."""
        if healthy and not worker.worn():
            self._idle.put(worker)
            return

        with self._lock:
            self._living.discard(worker)
        worker.kill()
        if not self.closed:
            self._idle.put(self._start())

    def _start(self) -> Worker | None:
        with self._lock:
            if self.closed:
                return None
            worker = Worker(cpu_seconds=self.cpu_seconds, memory_mb=self.memory_mb,
                            function=self.function)
            self._living.add(worker)
            return worker

    def _start_failed(self, error: WorkerDied) -> Exception:
        with self._lock:
            self._failed_starts += 1
            failed = self._failed_starts

        if self.closed:
            return RuntimeError("the grader is closed")
        if failed >= MAX_FAILED_STARTS:
            return RuntimeError(f"grading workers cannot be started: {error}")
        return StartFailed(str(error))


def _environment() -> dict[str, str]:
    """Returns what Python needs from the environment: no keys, proxies or library settings."""
    names = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    inherited = {name: os.environ[name] for name in names if name in os.environ}
    package = str(Path(__file__).resolve().parents[2])
    return {**inherited, "PYTHONPATH": package, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1",
            "LC_ALL": "C"}


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:                 # it has been deleted
        return "/"
