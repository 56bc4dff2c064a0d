"""Replaces what the JAX runtime prints when it aborts because another process is lost by one line.

The runtime aborts the process from within, after a page of C++ output. So the line must come from
elsewhere: from this script, a child process that passes on whatever is written to standard error.
It needs only the standard library.

A line that begins with a zero byte is a message to this script: a JSON table of `hosts` (names by
process), `missing` (what to say if the processes did not meet), `after` (what to do if one is lost
later) or `quiet`.
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
NATIVE = re.compile(
    rb"[EFWI]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (coordination_service\w*|client)\.(cc|h):\d+\]")
CHATTER = re.compile(rb"\[external/\S*gloo/\S+\] ")      # one line for each attempt to connect
STARTS = (CONTROL, b"[", b"E", b"F", b"W", b"I")
HELD_SECONDS = 5.0                  # native lines are held back as long: an abort may follow
SILENT = re.compile(r"unhealthy \(stopped sending heartbeats\):\s*((?:[^\n]*\d\n)+)")
FIRST = re.compile(r"first task at the barrier: \S*?(\d+)\.")


def cause(text: str, hosts: list[str]) -> str | None:
    """Says which process is lost, from the runtime's own words; None if they have never met."""
    if silent := SILENT.search(text):
        numbers = [int(number) for number in re.findall(r"(\d+)\n", silent[1])]
    elif "Shutdown barrier has failed" in text and (first := FIRST.search(text)):
        numbers = [int(first[1])]
    elif "RegisterTask" in text or "registration failed" in text:
        return None
    elif any(words in text for words in ("Failed to send RPC", "Socket closed",
                                         "Connection refused")):
        numbers = [0]
    else:
        return "another process is lost"

    names = [f"process {number}" + (f" on {hosts[number]}" if number < len(hosts) else "")
             for number in numbers]
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} lost"


class Relay:
    """Passes text on, except for what the runtime says before it aborts."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._table: dict[str, Any] = {}
        self._rest = b""            # the beginning of an unfinished line
        self._held = b""            # native lines
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
        """Passes on the lines held back: the process is alive."""
        if self._held and not self._fatal:
            self._write(self._held)
            self._held = b""

    def end(self) -> None:
        """Writes the last line: the process has ended."""
        if not self._fatal:
            self._write(self._held + self._rest)
        elif not self._table.get("quiet"):
            if os.isatty(self._target):
                self._write(b"\x1b[?25h")   # show the cursor that a live display has hidden

            lost = cause(self._held.decode(errors="replace"), self._table.get("hosts", []))
            if lost is None or "after" not in self._table:
                line = self._table.get("missing", "the processes did not meet")
            else:
                line = f"{lost}; this process ends too: {self._table['after']}"
            self._write(f"error: {line}\n".encode())

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
        """Whether lines are held back until more is known."""
        return bool(self._held) and not self._fatal


class StderrRelay:
    """Sends this process's standard error through a child process that runs this script."""

    def __init__(self) -> None:
        sys.stderr.flush()
        self._own = os.dup(2)
        self._relay = subprocess.Popen([sys.executable, "-I", __file__], stdin=subprocess.PIPE,
                                       stdout=subprocess.DEVNULL, stderr=self._own)

        assert self._relay.stdin is not None
        os.dup2(self._relay.stdin.fileno(), 2)
        self._relay.stdin.close()

    def tell(self, table: dict[str, Any]) -> None:
        """Sends what the last line may need."""
        sys.stderr.flush()
        os.write(2, CONTROL + json.dumps(table).encode() + b"\n")

    def close(self) -> None:
        """Restores standard error, once everything written is passed on."""
        sys.stderr.flush()
        os.dup2(self._own, 2)
        os.close(self._own)
        self._relay.wait()


def main() -> None:
    """Relays standard input to its end, ignoring signals that the terminal sends to the group."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    relay, parent = Relay(2), os.getppid()

    while True:
        ready, _, _ = select.select([0], [], [], HELD_SECONDS if relay.holds else 2.0)
        data = os.read(0, 65536) if ready else b""
        if data:
            relay.feed(data)
        # The end of input, or the parent is gone and one of its children holds the pipe open.
        elif ready or os.getppid() != parent:
            relay.end()
            return
        else:
            relay.release()


if __name__ == "__main__":
    main()
