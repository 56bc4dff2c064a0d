"""Several processes, one on each host, that run one program on the same data in lockstep.

Whatever could differ between hosts (a clock, a file, a signal, a grader's time limit) is decided by
one process and broadcast, or gathered from all. These are host data of a few kB; they travel
through the key-value store of JAX's coordination service. With one process nothing is sent.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
from rich.console import Console

from effreason.runtime.errors import UserError
from effreason.runtime.stderr_relay import StderrRelay

T = TypeVar("T")
PREFIX = "effreason"                # of all keys in the store
SIGHT = ".shared-"                  # of the files by which all see that they share a directory
WAIT_MILLISECONDS = 1000            # in one call to the store: Python handles signals in between
POLL_SECONDS = 0.5                  # between two checks whether a process was told to stop
LEAVE_SECONDS = 10.0                # how long a failed process waits for the others to fail too


def count() -> int:
    """Returns the number of processes."""
    return 1 if _group is None else len(_group.hosts)


def index() -> int:
    """Returns the number of this process, from 0."""
    return 0 if _group is None else _group.index


def is_primary() -> bool:
    """Returns whether this is process 0, the one that writes files and prints."""
    return index() == 0


def console() -> Console:
    """Returns the console of a run: standard output in process 0, nothing in the others."""
    return Console() if is_primary() else Console(quiet=True, force_interactive=False)


def broadcast(name: str, make: Callable[[], T]) -> T:
    """Returns in all processes what `make` returns in process 0; an error there is raised in all.

    Args: name, of the decision; make, called in process 0 only, returns what JSON can hold."""
    if _group is None:
        return make()
    return _group.exchange(name, make, among=1)[0]


def all_gather(name: str, make: Callable[[], T]) -> list[T]:
    """Returns what `make` returns in each process, in order; an error in one is raised in all."""
    if _group is None:
        return [make()]
    return _group.exchange(name, make, among=count())


def check_same(facts: dict[str, str]) -> None:
    """Raises UserError, in all processes, if one has other facts than process 0."""
    expected, *others = all_gather("facts", lambda: facts)
    for number, theirs in enumerate(others, start=1):
        for name, value in expected.items():
            if theirs.get(name) != value:
                raise UserError(f"{name}: {_label(number)} has {theirs.get(name)}, {_label(0)} has "
                                f"{value}; all must have the same")


def check_shared(directory: Path, field: str) -> None:
    """Raises UserError unless all processes see what process 0 writes into a directory."""
    if _group is None:
        return
    token = directory / broadcast("token", lambda: f"{SIGHT}{os.getpid()}-{time.time_ns()}")
    broadcast("shared directory", lambda: token.write_text(""))

    visible = all_gather("sight of it", lambda: appears(token.exists))
    if is_primary():
        token.unlink(missing_ok=True)

    if not all(visible):
        blind = ", ".join(_label(number) for number, sees in enumerate(visible) if not sees)
        raise UserError(f"{field}: must be on a disk that all hosts share, {blind} cannot see what "
                        f"process 0 wrote to {directory}")


def appears(is_visible: Callable[[], bool], seconds: float = 15.0) -> bool:
    """Waits until something that another host wrote is visible; False after a timeout.

    On a network disk this can take some seconds."""
    deadline = time.monotonic() + seconds
    while not (visible := is_visible()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return visible


def agree_on_signal(received: int | None) -> int | None:
    """Returns the signal at which all processes stop at this call; None to continue.

    All processes make the same calls in the same order, so they stop at the same one, whichever of
    them received the signal. Args: received, the number of a signal that this process received."""
    return received if _group is None else _group.stop.check(received)


def enter(group: "Group") -> None:
    """Makes this process one of several."""
    global _group
    _group = group


def leave(code: int) -> None:
    """Parts from the other processes; exits the process if they do not end with it."""
    global _group
    if _group is not None:
        _group.leave(code)
    _group = None


def advise(text: str) -> None:
    """Sets what the last line of this process recommends if another process is lost later."""
    if _group is not None:
        _group.tell(after=text)


class SignalAgreement(threading.Thread):
    """Agrees on the check at which all processes stop: the first one that none has passed yet."""

    def __init__(self, client: Any, index: int, count: int) -> None:
        super().__init__(name="signal agreement", daemon=True)
        self._client, self._index, self._count = client, index, count
        # Held from when this process publishes its number of checks until all have done so.
        self._lock = threading.Lock()
        self._checks = 0
        self._received: int | None = None
        self._agreed: tuple[int, int] | None = None       # the number of the check, the signal
        self._closed = threading.Event()

    def check(self, received: int | None) -> int | None:
        """Counts one check; see agree_on_signal."""
        self._received = self._received or received
        with self._lock:
            self._checks += 1
            if self._agreed is not None and self._checks >= self._agreed[0]:
                return self._agreed[1]
            return None

    def run(self) -> None:
        """Waits for a signal to any process, then agrees on the check."""
        # An error means that a process is lost, which ends this one anyway.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while not self._closed.wait(POLL_SECONDS):
                if signals := self._client.key_value_dir_get_bytes(f"{PREFIX}/signal/"):
                    self._agree(int(signals[0][1]))
                    return
                if self._received is not None:
                    # Setting the key fails if another process was first.
                    with contextlib.suppress(jax.errors.JaxRuntimeError):
                        self._client.key_value_set_bytes(f"{PREFIX}/signal/first",
                                                         str(self._received).encode())

    def _agree(self, signum: int) -> None:
        with self._lock:
            self._client.key_value_set_bytes(f"{PREFIX}/checks/{self._index}",
                                             str(self._checks).encode())
            checks: list[tuple[str, bytes]] = []
            while len(checks) < self._count and not self._closed.wait(0.05):
                checks = self._client.key_value_dir_get_bytes(f"{PREFIX}/checks/")
            if len(checks) == self._count:      # otherwise it was closed while waiting
                self._agreed = max(int(number) for _, number in checks) + 1, signum

    def close(self) -> None:
        """Ends the thread; JAX's client must not be used any more after that."""
        self._closed.set()
        self.join()


class Group:
    """The processes that have joined, as seen by one of them."""

    stop: SignalAgreement

    def __init__(self, client: Any, index: int, relay: StderrRelay) -> None:
        self.index, self.hosts = index, [""]
        self._client, self._relay = client, relay
        self._number = 0                    # of exchanges so far, the same in all processes
        self._keys: list[tuple[int, str]] = []

    def greet(self, processes: int) -> None:
        """Learns the names of all hosts. Raises: UserError if the numbers of processes differ."""
        own = [processes, socket.gethostname()]
        self._client.key_value_set_bytes(f"{PREFIX}/hosts/{self.index}", json.dumps(own).encode())
        self.hosts = []

        for number in range(processes):
            expected, name = json.loads(self._get(f"{PREFIX}/hosts/{number}"))
            if expected != processes:
                raise UserError(f"distributed.processes: expected {processes}, found {expected} in "
                                f"process {number} on {name}")
            self.hosts.append(name)

        self.tell(hosts=self.hosts)
        if jax.process_count() != processes:
            raise UserError(f"distributed.processes: expected {processes}, JAX found "
                            f"{jax.process_count()}")

        self.stop = SignalAgreement(self._client, self.index, processes)
        self.stop.start()

    def tell(self, **table: Any) -> None:
        """Tells the relay of standard error what the last line may need; see stderr_relay."""
        self._relay.tell(table)

    def exchange(self, name: str, make: Callable[[], Any], among: int) -> list[Any]:
        """Returns in all processes the values of the first `among` of them.

        Raises: UserError if one of these failed; in that process its own error."""
        self._number += 1

        failure: Exception | None = None
        if self.index < among:
            try:
                outcome = {"value": make()}
            except Exception as error:
                failure, text = error, str(error)
                if not isinstance(error, UserError):
                    text = f"{_label(self.index)}: {type(error).__name__}: {error}"
                outcome = {"error": text}

            key = f"{PREFIX}/values/{self._number}/{self.index}"
            value = zlib.compress(json.dumps([name, outcome]).encode(), 1)
            self._client.key_value_set_bytes(key, value)
            self._keys.append((self._number, key))

        values = []

        for number in range(among):
            value = self._get(f"{PREFIX}/values/{self._number}/{number}")
            other_name, outcome = json.loads(zlib.decompress(value))
            if other_name != name:          # another version of the code, or other files
                raise UserError(f"{_label(number)} is at {other_name!r}, but {_label(self.index)} "
                                f"is at {name!r}; all must have the same code, models and data")
            if "error" in outcome:
                if failure is not None and number == self.index:
                    raise failure
                raise UserError(outcome["error"])
            values.append(outcome["value"])

        if among == len(self.hosts):        # all are here: nobody needs earlier values any more
            for exchange, key in self._keys:
                if exchange < self._number:
                    self._client.key_value_delete(key)
            self._keys = [item for item in self._keys if item[0] == self._number]

        return values

    def leave(self, code: int) -> None:
        """Waits until all processes are done, then parts; exits if they do not fail with this."""
        self._client.key_value_set_bytes(f"{PREFIX}/ended/{self.index}", str(code).encode())
        deadline = None if code == 0 else time.monotonic() + LEAVE_SECONDS
        together = True

        for number in range(len(self.hosts)):
            ended = self._get(f"{PREFIX}/ended/{number}", deadline) if together else None
            together = ended is not None

        self.stop.close()
        self.tell(quiet=True)
        sys.stdout.flush()
        sys.stderr.flush()
        if together:
            try:
                jax.distributed.shutdown()
            except jax.errors.JaxRuntimeError:
                together = False

        self._relay.close()
        if not together:                    # JAX's own exit would wait for the others
            os._exit(code)

    def _get(self, key: str, deadline: float | None = None) -> Any:
        """Waits for a value of the store; returns None after the deadline.

        If a process is lost, JAX ends this one while it waits."""
        while deadline is None or time.monotonic() < deadline:
            try:
                return self._client.blocking_key_value_get_bytes(key, WAIT_MILLISECONDS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        return None


_group: Group | None = None


def _label(number: int) -> str:
    """Names a process and its host for messages."""
    known = _group is not None and number < len(_group.hosts)
    return f"process {number}" + (f" on {_group.hosts[number]}" if _group and known else "")
