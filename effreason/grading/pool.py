"""Workers that compare answers in processes of their own, and the supervision that kills and replaces them."""

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
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

MAX_TASKS = 500                     # sympy caches: a worker is replaced after so many comparisons,
MAX_GROWTH_MB = 650                 # or when an answer has left it larger by this
START_SECONDS = 120.0
MAX_FAILED_STARTS = 3


@dataclass(frozen=True)
class Verdict:
    """A comparison and how it ended: symbolic, function, soft_timeout, hard_kill, memory, budget or error."""

    correct: bool
    status: str
    reason: str = ""                # of an error, what went wrong


class WorkerDied(Exception):
    """The process has ended or answers nonsense."""


class StartFailed(WorkerDied):
    """The process has ended before it was ready."""


class WorkerStuck(Exception):
    """No answer within the time allowed."""


class Worker:
    """One process. Started at once and ready some tenths of a second later; used by one thread at a time."""

    def __init__(self, *, cpu_seconds: float, memory_mb: int, function: str | None = None) -> None:
        here = _directory()
        path = [place or here for place in ("", *sys.path)] if function else []
        settings = json.dumps({"cpu_seconds": cpu_seconds, "memory_mb": memory_mb, "function": function, "path": path})
        # -P: no module of the working directory; -s: none of the user's; -B: nothing is written. A session of its own:
        # Ctrl-C in the terminal does not reach it, and killing the group takes its children too.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-B", "-m", "effreason.grading.worker", settings],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, **_environment()} if function else _environment(), cwd=here if function else "/",
            start_new_session=True, close_fds=True)
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        self.ready, self.tasks, self.growth_mb, self.start_mb, self.rest = False, 0, 0, 0, b""
        self.function = function

    def compare(self, prediction: str, reference: str, seconds: float) -> Verdict:
        """Asks for one verdict. Raises WorkerDied or WorkerStuck, after which the worker has to be killed."""
        self.tasks += 1
        end = time.monotonic() + seconds
        self._send(json.dumps({"id": self.tasks, "prediction": prediction, "reference": reference}).encode() + b"\n", end)
        reply = self._line(end)
        if reply.get("id") != self.tasks:
            raise WorkerDied("its answers do not match the questions")
        self.growth_mb = int(reply["rss_mb"]) - self.start_mb
        return Verdict(bool(reply["correct"]), str(reply["status"]), str(reply.get("reason", "")))

    def wait_ready(self, seconds: float) -> None:
        """Waits until the libraries are loaded. Raises WorkerDied with the reason, or WorkerStuck."""
        if not self.ready:
            reply = self._line(time.monotonic() + seconds)
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
            with contextlib.suppress(OSError):      # what was not yet sent cannot be sent any more
                if pipe is not None:
                    pipe.close()

    def _send(self, data: bytes, end: float) -> None:
        """Writes without ever waiting beyond the end: a stuck worker does not read, and a response may be long."""
        assert self.process.stdin is not None
        target = self.process.stdin.fileno()
        poll = select.poll()
        poll.register(target, select.POLLOUT)
        view = memoryview(data)
        while view:
            if not poll.poll(max(end - time.monotonic(), 0) * 1000):
                raise WorkerStuck
            try:
                view = view[os.write(target, view):]
            except BlockingIOError:
                continue
            except OSError as error:
                raise WorkerDied("it no longer reads") from error

    def _line(self, end: float) -> dict:
        assert self.process.stdout is not None
        source = self.process.stdout.fileno()
        poll = select.poll()
        poll.register(source, select.POLLIN | select.POLLHUP)
        while b"\n" not in self.rest:
            if not poll.poll(max(end - time.monotonic(), 0) * 1000):
                raise WorkerStuck
            data = os.read(source, 65536)
            if not data:
                raise WorkerDied(f"it ended with code {self.process.wait()}")
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        try:
            reply = json.loads(line)
        except ValueError as error:
            raise WorkerDied("it answers nonsense") from error
        return reply


class Pool:
    """A fixed number of workers; `compare` may be called from any number of threads."""

    def __init__(self, workers: int, *, cpu_seconds: float, wall_seconds: float, memory_mb: int,
                 function: str | None = None) -> None:
        self.cpu_seconds, self.wall_seconds, self.memory_mb = cpu_seconds, wall_seconds, memory_mb
        self.function = function
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.closed = False
        self._failed_starts = 0
        self._living: set[Worker] = set()
        self._idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(self._start())

    def wait_ready(self) -> None:
        """Waits until a worker is ready. Raises WorkerDied with the reason why it is not, or WorkerStuck."""
        worker = self._take(time.monotonic() + START_SECONDS)
        if worker is not None:
            try:
                worker.wait_ready(START_SECONDS)
            finally:
                self._idle.put(worker)

    def compare(self, prediction: str, reference: str, deadline: float) -> Verdict:
        """Compares two answers; ends by the deadline (time.monotonic), with "budget" where that cut it short.

        A worker that dies of itself may not be the answer's fault, so the question is asked a second time.
        Raises: RuntimeError when workers cannot be started, or the pool is closed.
        """
        deaths = 0
        while deaths < 2:
            try:
                return self._compare_once(prediction, reference, deadline)
            except StartFailed:
                continue                            # `_start_failed` ends this when it happens again and again
            except WorkerDied:
                self._count("died")
                deaths += 1
        return Verdict(False, "error", "the worker that compared it ended, twice")

    def close(self) -> None:
        """Kills all workers. Calls that are under way raise RuntimeError."""
        with self._lock:
            self.closed = True
            living, self._living = self._living, set()
        for worker in living:
            worker.kill()
        self._idle.put(None)

    def _compare_once(self, prediction: str, reference: str, deadline: float) -> Verdict:
        worker = self._take(deadline)
        if worker is None:
            return Verdict(False, "budget")
        healthy = True
        try:
            try:
                worker.wait_ready(min(max(deadline - time.monotonic(), 0), START_SECONDS))
                self._failed_starts = 0
            except WorkerStuck:
                return Verdict(False, "budget")     # still loading: not its fault, it stays
            except WorkerDied as error:
                healthy = False
                raise self._start_failed(error) from None
            return self._ask(worker, prediction, reference, deadline)
        except (WorkerDied, WorkerStuck) as error:
            healthy = False
            if self.closed:
                raise RuntimeError("the grader is closed") from None
            if isinstance(error, WorkerDied):
                raise
            self._count("killed")
            return Verdict(False, "budget" if time.monotonic() >= deadline else "hard_kill")
        except BaseException:
            healthy = False                         # Ctrl-C in the main thread: the reply is still on its way
            raise
        finally:
            self._give(worker, healthy)

    def _ask(self, worker: Worker, prediction: str, reference: str, deadline: float) -> Verdict:
        left = deadline - time.monotonic()
        if left <= 0:
            return Verdict(False, "budget")
        return worker.compare(prediction, reference, min(self.wall_seconds, left))

    def _take(self, deadline: float) -> Worker | None:
        try:
            worker = self._idle.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            return None
        if worker is None or self.closed:
            self._idle.put(None)                    # the next one in the queue has to hear of it too
            raise RuntimeError("the grader is closed")
        return worker

    def _give(self, worker: Worker, healthy: bool) -> None:
        """Puts a worker back into the queue, or another in its place."""
        if healthy and not worker.worn():
            self._idle.put(worker)
            return
        if healthy:
            self._count("recycled")
        with self._lock:
            self._living.discard(worker)
        worker.kill()
        if not self.closed:
            self._idle.put(self._start())

    def _start(self) -> Worker | None:
        with self._lock:
            if self.closed:
                return None
            worker = Worker(cpu_seconds=self.cpu_seconds, memory_mb=self.memory_mb, function=self.function)
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

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1


def _environment() -> dict[str, str]:
    """Nothing of the trainer's environment but what a Python needs: no keys, no proxies, no library's settings."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    package = str(Path(__file__).resolve().parents[2])
    return {**kept, "PYTHONPATH": package, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "LC_ALL": "C"}


def _directory() -> str:
    try:
        return os.getcwd()
    except OSError:                 # it has been deleted
        return "/"
