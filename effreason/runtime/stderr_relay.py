"""What a process says when the JAX runtime ends it because another one is lost: one line, not a page of C++.

The runtime aborts the process from within, so the line must come from somewhere else: from this script, a process of
its own that passes on what is written to standard error. It needs nothing but the standard library.

A line that begins with a zero byte is meant for this script: a JSON table of `hosts` (names by process), `missing`
(what to say where the processes did not meet) and `after` (what to do when one is lost later), or `quiet`.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
from typing import Any

CONTROL = b"\0"
NATIVE = re.compile(rb"[EFWI]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (coordination_service\w*|client)\.(cc|h):\d+\]")
CHATTER = re.compile(rb"\[external/\S*gloo/\S+\] ")      # connections between CPUs, one line for each attempt
STARTS = (CONTROL, b"[", b"E", b"F", b"W", b"I")
HELD_SECONDS = 5.0                  # what the runtime says of others is kept back so long: it may be about to abort
SILENT = re.compile(r"unhealthy \(stopped sending heartbeats\):\s*((?:[^\n]*\d\n)+)")
FIRST = re.compile(r"first task at the barrier: \S*?(\d+)\.")


def cause(said: str, hosts: list[str]) -> str | None:
    """Which process is lost, as the runtime's own words have it; None where the processes have never met."""
    def named(numbers: list[int]) -> str:
        names = [f"process {number}" + (f" on {hosts[number]}" if number < len(hosts) else "") for number in numbers]
        return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} lost"

    if silent := SILENT.search(said):
        return named([int(number) for number in re.findall(r"(\d+)\n", silent[1])])
    if "Shutdown barrier has failed" in said and (first := FIRST.search(said)):
        return named([int(first[1])])
    if "RegisterTask" in said or "registration failed" in said:
        return None
    if "Failed to send RPC" in said or "Socket closed" in said or "Connection refused" in said:
        return named([0])
    return "another process is lost"


def last_line(said: str, table: dict[str, Any]) -> str:
    """What takes the place of the runtime's own words."""
    lost = cause(said, table.get("hosts", []))
    if lost is None or "after" not in table:
        return f"error: {table.get('missing', 'the processes did not meet')}\n"
    return f"error: {lost}; this process ends too: {table['after']}\n"


class Relay:
    """Passes text on, but for what the runtime says before it aborts."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._table: dict[str, Any] = {}
        self._rest = b""            # of a line that has begun
        self._held = b""            # what the runtime says of others
        self._fatal = False

    def feed(self, data: bytes) -> None:
        """Takes more text."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line + b"\n")
        if self._rest and not (self._held or self._fatal) and self._rest[:1] not in STARTS:
            self._write(self._rest)         # a prompt or a bar, which no newline ends
            self._rest = b""

    def release(self) -> None:
        """Passes on what was held back: the process lives."""
        if self._held and not self._fatal:
            self._write(self._held)
            self._held = b""

    def end(self) -> None:
        """The process is gone."""
        if not self._fatal:
            self._write(self._held + self._rest)
        elif not self._table.get("quiet"):
            if os.isatty(self._target):
                self._write(b"\x1b[?25h")   # a live display has hidden the cursor
            self._write(last_line(self._held.decode(errors="replace"), self._table).encode())

    def _line(self, line: bytes) -> None:
        if line.startswith(CONTROL):
            self._table |= json.loads(line[len(CONTROL):])
        elif CHATTER.match(line):
            return
        elif self._held or NATIVE.match(line):
            self._held += line
            self._fatal |= NATIVE.match(line) is not None and line.startswith(b"F")
        else:
            self._write(line)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._target, data):]

    @property
    def holds(self) -> bool:
        """Whether something waits for what comes next."""
        return bool(self._held) and not self._fatal


class StderrRelay:
    """Standard error, read by a process of its own that speaks for this one when JAX aborts it."""

    def __init__(self) -> None:
        sys.stderr.flush()
        self._own = os.dup(2)
        self._relay = subprocess.Popen([sys.executable, "-I", __file__], stdin=subprocess.PIPE,
                                       stdout=subprocess.DEVNULL, stderr=self._own)
        assert self._relay.stdin is not None
        os.dup2(self._relay.stdin.fileno(), 2)
        self._relay.stdin.close()

    def tell(self, table: dict[str, Any]) -> None:
        """Hands over what the last line needs to know."""
        sys.stderr.flush()
        os.write(2, CONTROL + json.dumps(table).encode() + b"\n")

    def close(self) -> None:
        """Standard error is itself again, when all that was written is passed on."""
        sys.stderr.flush()
        os.dup2(self._own, 2)
        os.close(self._own)
        self._relay.wait()


def main() -> None:
    """Reads standard input to its end; what others send to the process's group is not for this one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    relay, parent = Relay(2), os.getppid()
    while True:
        ready, _, _ = select.select([0], [], [], HELD_SECONDS if relay.holds else 2.0)
        data = os.read(0, 65536) if ready else b""
        if data:
            relay.feed(data)
        elif ready or os.getppid() != parent:       # the end, or a child of the process still holds its output
            relay.end()
            return
        else:
            relay.release()


if __name__ == "__main__":
    main()
