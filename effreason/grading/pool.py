"""Workers that compare answers in separate processes, and the pool that kills and replaces them."""

import concurrent.futures
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

from effreason.grading.status import GradeStatus, Undecided

# sympy caches, so a worker is replaced after this many comparisons or after this growth.
MAX_TASKS = 500
MAX_GROWTH_MB = 650
START_SECONDS = 120.0
MAX_FAILED_STARTS = 3
LOOK_SECONDS = 1.0                  # between two looks at what a silent worker does
# A worker that waits for a processor or a disk of a busy host gets this many times its clock time.
PATIENCE = 4
STOPPED, WAITING = "T", "RDU"       # states of a process: by SIGSTOP; for a processor or a disk


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison and how it ended."""

    correct: bool
    status: GradeStatus
    reason: str = ""                # what went wrong, for an error
    seconds: float = 0.0            # of processor time; of clock time for a user's function
    partial: float = 0.0            # in (0, 1) if a user's function found it partly right


class WorkerDied(Exception):
    """The process ended, or its reply makes no sense."""


class StartFailed(WorkerDied):
    """The process ended before it was ready."""


class WorkerStuck(Exception):
    """No reply within the time allowed."""


class WorkerStopped(Exception):
    """The process does not run, through no fault of the answer: SIGSTOP, a debugger."""


class Worker:
    """One process, used by one thread at a time; it starts at once and is ready a moment later."""

    def __init__(self, *, memory_mb: int, function: str | None = None) -> None:
        directory = _working_directory()
        path = [entry or directory for entry in ("", *sys.path)] if function else []
        settings = json.dumps({"memory_mb": memory_mb, "function": function, "path": path})

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
        self.source = ""            # a hash of the function's, once it is ready
        self.start_mb = self.growth_mb = 0
        self.buffer = b""           # what follows the last complete reply

    def compare(self, prediction: str, reference: str, columns: str = "", *, cpu_seconds: float,
                wall_seconds: float) -> Verdict:
        """Compares one pair. Raises: WorkerDied, WorkerStuck or WorkerStopped; the worker must then
        be killed."""
        self.tasks += 1
        task = {"id": self.tasks, "prediction": prediction, "reference": reference,
                "columns": columns, "cpu_seconds": cpu_seconds}
        self._send(json.dumps(task).encode() + b"\n", wall_seconds)

        reply = self._receive(wall_seconds)
        if reply.get("id") != self.tasks:
            raise WorkerDied("its replies do not match the tasks")
        self.growth_mb = int(reply["rss_mb"]) - self.start_mb
        score = float(reply["score"])
        return Verdict(score == 1, GradeStatus(reply["status"]), str(reply.get("reason", "")),
                       float(reply["seconds"]), score if score < 1 else 0.0)

    def wait_ready(self) -> None:
        """Waits until the libraries are loaded.

        Raises: WorkerDied with a reason, WorkerStuck, WorkerStopped."""
        if not self.ready:
            reply = self._receive(START_SECONDS)
            if "failed" in reply:
                raise WorkerDied(reply["failed"])
            self.ready, self.start_mb = True, int(reply["rss_mb"])
            self.source = str(reply["source"])

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

    def _send(self, data: bytes, seconds: float) -> None:
        """Writes; a stuck worker does not read a long response."""
        assert self.process.stdin is not None
        descriptor = self.process.stdin.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        view = memoryview(data)

        while view:
            self._wait(poll, seconds)
            try:
                view = view[os.write(descriptor, view):]
            except BlockingIOError:
                continue
            except OSError as error:
                raise WorkerDied("it no longer reads") from error

    def _receive(self, seconds: float) -> dict:
        """Reads one reply."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN | select.POLLHUP)

        while b"\n" not in self.buffer:
            self._wait(poll, seconds)
            data = os.read(descriptor, 65536)
            if not data and self.process.wait() == -signal.SIGVTALRM:
                raise WorkerStuck           # the worker's own limit, if C code cannot be stopped
            if not data:
                raise WorkerDied(f"it ended with code {self.process.wait()}")
            self.buffer += data

        line, _, self.buffer = self.buffer.partition(b"\n")
        try:
            reply = json.loads(line)
        except ValueError as error:
            raise WorkerDied("its reply is not JSON") from error
        return reply

    def _wait(self, poll: select.poll, seconds: float) -> None:
        """Waits until a pipe is ready. Raises: WorkerStuck, WorkerStopped.

        On a busy host the clock decides nothing: the processor time, which the worker limits by
        itself, does."""
        started = time.monotonic()
        while True:
            left = started + seconds - time.monotonic()
            look = min(left, LOOK_SECONDS) if left > 0 else LOOK_SECONDS
            if poll.poll(look * 1000):
                return

            waited, state = time.monotonic() - started, _state(self.process.pid)
            if state == STOPPED:
                raise WorkerStopped
            if waited >= seconds and (state not in WAITING or waited >= PATIENCE * seconds):
                raise WorkerStuck


class Pool:
    """A fixed number of workers; `compare` may be called from any number of threads."""

    def __init__(self, workers: int, *, wall_seconds: float, memory_mb: int,
                 function: str | None = None) -> None:
        self.workers, self.wall_seconds, self.memory_mb = workers, wall_seconds, memory_mb
        self.function = function

        self._lock = threading.Lock()
        self.closed = False
        self._failed_starts = 0
        self._living: set[Worker] = set()
        self._idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        # One thread starts them all: they die with it, see worker.die_with_parent.
        self._starter = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="grader-start")
        for _ in range(workers):
            self._idle.put(self._start())

    def wait_ready(self) -> str:
        """Waits until one worker is ready. Returns: the hash of the function's source.

        Raises: WorkerDied, with the reason, WorkerStuck or WorkerStopped."""
        worker = self._take()
        try:
            worker.wait_ready()
            return worker.source
        finally:
            self._idle.put(worker)

    def compare(self, prediction: str, reference: str, cpu_seconds: float,
                columns: str = "") -> Verdict:
        """Compares two answers. Args: columns, of the problem, for a user's function.

        If a worker dies or is stopped, the answer may not be the cause, so a comparison is tried
        twice. Raises: Undecided if workers cannot be started, RuntimeError if the pool is closed.
        """
        failures: list[Exception] = []
        while len(failures) < 2:
            try:
                return self._compare_once(prediction, reference, cpu_seconds, columns)
            except StartFailed:
                continue  # `_start_failed` returns Undecided after several in a row
            except (WorkerDied, WorkerStopped) as error:
                failures.append(error)

        how = "ended" if isinstance(failures[-1], WorkerDied) else "was stopped"
        return Verdict(False, GradeStatus.ERROR, f"the worker that compared it {how}, twice")

    def close(self) -> None:
        """Kills all workers. Calls that are still running raise RuntimeError."""
        with self._lock:
            self.closed = True
            living, self._living = self._living, set()
        for worker in living:
            worker.kill()
        self._idle.put(None)
        self._starter.shutdown()

    def _compare_once(self, prediction: str, reference: str, cpu_seconds: float,
                      columns: str) -> Verdict:
        worker = self._take()
        started, healthy = time.monotonic(), False
        try:
            try:
                worker.wait_ready()
                self._failed_starts = 0
            except (WorkerDied, WorkerStuck) as error:
                raise self._start_failed(error) from None

            started = time.monotonic()
            verdict = worker.compare(prediction, reference, columns, cpu_seconds=cpu_seconds,
                                     wall_seconds=self.wall_seconds)
            healthy = True
            return verdict
        except (WorkerDied, WorkerStuck, WorkerStopped) as error:
            if self.closed:
                raise RuntimeError("the grader is closed") from None
            if not isinstance(error, WorkerStuck):
                raise
            return Verdict(False, GradeStatus.HARD_KILL,
                           seconds=min(time.monotonic() - started, self.wall_seconds))
        finally:
            # Unhealthy after Ctrl-C in the main thread too: the reply would still arrive.
            self._give_back(worker, healthy)

    def _take(self) -> Worker:
        worker = self._idle.get()
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
        self._idle.put(self._start())

    def _start(self) -> Worker | None:
        """Starts a worker; returns None if the pool is closed."""
        def start() -> Worker | None:
            with self._lock:
                if self.closed:
                    return None
                worker = Worker(memory_mb=self.memory_mb, function=self.function)
                self._living.add(worker)
                return worker

        try:
            return self._starter.submit(start).result()
        except RuntimeError:        # it has been shut down
            return None

    def _start_failed(self, error: WorkerDied | WorkerStuck) -> Exception:
        with self._lock:
            self._failed_starts += 1
            failed = self._failed_starts

        reason = str(error) or f"one was not ready within {START_SECONDS:.0f} s"
        if self.closed:
            return RuntimeError("the grader is closed")
        if failed >= MAX_FAILED_STARTS:
            return Undecided(f"grading workers cannot be started: {reason}")
        return StartFailed(reason)


def _state(pid: int) -> str:
    """Returns the state of a process as one letter, as ps names it; "" if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0].upper()
    with contextlib.suppress(OSError):          # no /proc: macOS
        return subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True,
                              text=True).stdout.strip()[:1]
    return ""


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
