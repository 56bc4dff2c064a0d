"""Several processes, one on each host, that run the same program on the same data and make the same decisions.

What could differ between hosts (a clock, a file that is there, a signal, a grader's time limit) is broadcast by one
process for all, or all_gather from all, through the store of JAX's coordination service: host data, a few kB at a time.
In one process all of this costs nothing and changes nothing.
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
PREFIX = "effreason"
WAIT_MILLISECONDS = 1000            # for a value, before Python looks whether a signal has come
POLL_SECONDS = 0.5                  # between two looks at whether a process has been told to stop
LEAVE_SECONDS = 10.0                # that a process which has failed waits for the others to fail with it


def count() -> int:
    """How many processes there are."""
    return 1 if _group is None else len(_group.hosts)


def index() -> int:
    """Which of them this one is."""
    return 0 if _group is None else _group.index


def is_primary() -> bool:
    """Whether this is process 0: the one that writes and speaks."""
    return index() == 0


def console() -> Console:
    """Where a run speaks to people: standard output, of process 0 alone."""
    return Console() if is_primary() else Console(quiet=True, force_interactive=False)


def broadcast(name: str, make: Callable[[], T]) -> T:
    """What `make` gives in process 0, in all of them; an error there is raised in all of them.

    Args: name, of the decision; make, gives what JSON can hold, and is called in process 0 alone."""
    if _group is None:
        return make()
    return _group.exchange(name, make, among=1)[0]


def all_gather(name: str, make: Callable[[], T]) -> list[T]:
    """What `make` gives in each process, in their order; an error in one is raised in all of them."""
    if _group is None:
        return [make()]
    return _group.exchange(name, make, among=count())


def check_same(facts: dict[str, str]) -> None:
    """Raises UserError, in all processes, where one has other facts than process 0."""
    reference, *others = all_gather("facts", lambda: facts)
    for number, found in enumerate(others, start=1):
        for name, value in reference.items():
            if found.get(name) != value:
                raise UserError(f"{name}: process {number}{_on(number)} has {found.get(name)}, process 0{_on(0)} has "
                                f"{value}; all must have the same")


def check_shared(directory: Path, field: str) -> None:
    """Raises UserError unless all processes see what process 0 writes into a directory."""
    if _group is None:
        return
    token = directory / broadcast("token", lambda: f".shared-{os.getpid()}-{time.time_ns()}")
    broadcast("shared directory", lambda: token.write_text(""))
    seen = all_gather("sight of it", lambda: appears(token.exists))
    if is_primary():
        token.unlink(missing_ok=True)
    if not all(seen):
        blind = ", ".join(f"process {number}{_on(number)}" for number, sees in enumerate(seen) if not sees)
        raise UserError(f"{field}: must be on a disk that all hosts share, {blind} cannot see what process 0 wrote to "
                        f"{directory}")


def appears(seen: Callable[[], bool], seconds: float = 15.0) -> bool:
    """Whether something that another host wrote can be seen: on a network disk some seconds later."""
    deadline = time.monotonic() + seconds
    while not (found := seen()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def agree_on_signal(received: int | None) -> int | None:
    """The signal at which all processes stop at this very call, whichever of them it came to; None to go on.

    Every process makes the same calls in the same order. Args: received, a signal that has come to this one."""
    return received if _group is None else _group.stops.reached(received)


def enter(group: "Group") -> None:
    """From now on this process is one of several."""
    global _group
    _group = group


def leave(code: int) -> None:
    """Parts from the others; see Group.leave."""
    global _group
    if _group is not None:
        _group.leave(code)
    _group = None


def advise(text: str) -> None:
    """What the last line of this process is to say when another one is lost: what to do then."""
    if _group is not None:
        _group.tell(after=text)


class Stops(threading.Thread):
    """Agrees on where to stop: at the first check that no process has passed when all have heard of the signal."""

    def __init__(self, client: Any, index: int, count: int) -> None:
        super().__init__(name="stops", daemon=True)
        self._client, self._index, self._count = client, index, count
        self._lock = threading.Lock()       # held from when this process says where it is until all have said so
        self._checks = 0
        self._received: int | None = None
        self._agreed: tuple[int, int] | None = None       # the check, the signal
        self._over = threading.Event()

    def reached(self, received: int | None) -> int | None:
        """See agree_on_signal."""
        self._received = self._received or received
        with self._lock:
            self._checks += 1
            return self._agreed[1] if self._agreed and self._checks >= self._agreed[0] else None

    def run(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):       # a process is lost: that ends this one anyway
            while not self._over.wait(POLL_SECONDS):
                if signals := self._client.key_value_dir_get_bytes(f"{PREFIX}/signal/"):
                    self._agree(int(signals[0][1]))
                    return
                if self._received is not None:
                    with contextlib.suppress(jax.errors.JaxRuntimeError):   # another one was first
                        self._client.key_value_set_bytes(f"{PREFIX}/signal/first", str(self._received).encode())

    def _agree(self, number: int) -> None:
        with self._lock:
            self._client.key_value_set_bytes(f"{PREFIX}/checks/{self._index}", str(self._checks).encode())
            places: list[tuple[str, bytes]] = []
            while len(places) < self._count and not self._over.wait(0.05):
                places = self._client.key_value_dir_get_bytes(f"{PREFIX}/checks/")
            if len(places) == self._count:      # else it was closed while it waited for the others
                self._agreed = max(int(place) for _, place in places) + 1, number

    def close(self) -> None:
        """Ends the thread; JAX's client must not be used any more after that."""
        self._over.set()
        self.join()


class Group:
    """The processes that have met, as one of them sees it."""

    stops: Stops

    def __init__(self, client: Any, index: int, words: StderrRelay) -> None:
        self.index, self.hosts = index, [""]
        self._client, self._relay = client, words
        self._number = 0                    # of exchanges so far, the same in all processes
        self._keys: list[tuple[int, str]] = []

    def greet(self, processes: int) -> None:
        """Learns who the others are. Raises: UserError where they expect another number of processes."""
        own = [processes, socket.gethostname()]
        self._client.key_value_set_bytes(f"{PREFIX}/hosts/{self.index}", json.dumps(own).encode())
        self.hosts = []
        for number in range(processes):
            expected, name = json.loads(self._get(f"{PREFIX}/hosts/{number}"))
            if expected != processes:
                raise UserError(f"distributed.processes: expected {processes}, found {expected} in process {number} "
                                f"on {name}")
            self.hosts.append(name)
        self.tell(hosts=self.hosts)
        if jax.process_count() != processes:
            raise UserError(f"distributed.processes: expected {processes}, found {jax.process_count()}, by JAX")
        self.stops = Stops(self._client, self.index, processes)
        self.stops.start()

    def tell(self, **table: Any) -> None:
        """What the last line needs to know."""
        self._relay.tell(table)

    def exchange(self, name: str, make: Callable[[], Any], among: int) -> list[Any]:
        """The values of the first `among` processes, in all of them. Raises: UserError where one of these failed."""
        self._number += 1
        failure: Exception | None = None
        if self.index < among:
            try:
                outcome = {"value": make()}
            except Exception as error:
                failure, outcome = error, {"error": str(error) if isinstance(error, UserError) else
                                           f"process {self.index}{_on(self.index)}: {type(error).__name__}: {error}"}
            key = f"{PREFIX}/values/{self._number}/{self.index}"
            self._client.key_value_set_bytes(key, zlib.compress(json.dumps([name, outcome]).encode(), 1))
            self._keys.append((self._number, key))
        values = []
        for number in range(among):
            theirs, outcome = json.loads(zlib.decompress(self._get(f"{PREFIX}/values/{self._number}/{number}")))
            if theirs != name:      # of other code, or of files that say something else on one of the hosts
                raise UserError(f"process {number}{_on(number)} is at {theirs!r} where process {self.index}"
                                f"{_on(self.index)} is at {name!r}; all must have the same code, models and data")
            if "error" in outcome:
                raise failure if failure is not None and number == self.index else UserError(outcome["error"])
            values.append(outcome["value"])
        if among == len(self.hosts):        # all are here, so nobody needs what was exchanged before
            for _, key in [each for each in self._keys if each[0] < self._number]:
                self._client.key_value_delete(key)
            self._keys = [each for each in self._keys if each[0] == self._number]
        return values

    def leave(self, code: int) -> None:
        """Parts from the others when all are done; where they do not fail with this one, it ends the process."""
        self._client.key_value_set_bytes(f"{PREFIX}/ended/{self.index}", str(code).encode())
        together = True
        deadline = None if code == 0 else time.monotonic() + LEAVE_SECONDS
        for number in range(len(self.hosts)):
            together = together and self._get(f"{PREFIX}/ended/{number}", deadline) is not None
        self.stops.close()
        self.tell(quiet=True)
        sys.stdout.flush()
        sys.stderr.flush()
        if together:
            try:
                jax.distributed.shutdown()
            except jax.errors.JaxRuntimeError:
                together = False
        self._relay.close()
        if not together:                    # what JAX does at exit would wait for the others
            os._exit(code)

    def _get(self, key: str, deadline: float | None = None) -> Any:
        """A value of the store, once it is there; None after the deadline. A process that is lost ends this one."""
        while deadline is None or time.monotonic() < deadline:
            try:
                return self._client.blocking_key_value_get_bytes(key, WAIT_MILLISECONDS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        return None


_group: Group | None = None


def _on(number: int) -> str:
    """Where a process runs, for people."""
    return f" on {_group.hosts[number]}" if _group is not None and number < len(_group.hosts) else ""
