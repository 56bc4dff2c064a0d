"""The claim on a run directory: one process at a time writes there.

The claim is a lock on a file, which the system frees when its process ends, however it ends. So the
claim of a process that was killed is in nobody's way. Disks of several hosts pass such locks on;
on one that has no locks at all only two new runs exclude one another, by who creates the file.
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from effreason.runtime.errors import UserError
from effreason.runtime.files import disk

FILE = "claim.json"                 # in the run directory, as long as a process trains there


@contextlib.contextmanager
def claimed(directory: Path, *, resume: bool) -> Iterator[None]:
    """Claims an existing directory for the duration of a block.

    Raises: UserError if another process has it."""
    path = directory / FILE
    descriptor = _lock(path, directory, resume)
    try:
        with disk(path):
            owner = {"process": os.getpid(), "host": socket.gethostname(),
                     "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode() + b"\n", 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _lock(path: Path, directory: Path, resume: bool) -> int:
    """Returns a descriptor of the file, which it locks. Raises: UserError."""
    while True:
        with disk(path):
            try:
                descriptor, is_new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), True
            except FileExistsError:
                descriptor, is_new = os.open(path, os.O_RDWR | os.O_CREAT), False

        refusal = None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refusal = f"uses {directory}; wait for it, or choose another directory"
        except OSError:             # a disk without locks
            if not (is_new or resume):
                refusal = f"has claimed {directory}; if it has ended, remove {path}"
        if refusal:
            owner = _owner(descriptor)
            os.close(descriptor)
            raise UserError(f"run.directory: {owner} {refusal}")

        # The file may have been removed by its owner between the two calls.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def _owner(descriptor: int) -> str:
    """Names the process that has the claim."""
    try:
        owner = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {owner['process']} on {owner['host']}, since {owner['since']},"
    except (OSError, ValueError, TypeError, KeyError):      # it is about to write it
        return "another process"
