"""What kill -9 would leave of a directory: its content before each of its file-system events."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path

CHANGING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink",
            "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CLAIM = "claim.json"                # names a process
# Fields that a clock decides.
TIMED = ("time/", "rollout/tokens_per_second", "update/tokens_per_second", "engine/")


class Recorder:
    """Notes the content of a directory before each event in it.

    Attributes: images, by event, without those that are equal to the one before."""

    def __init__(self, directory):
        self._directory, self._lock = directory, threading.RLock()
        self._busy, self._seen = False, set()
        self.events, self.images = 0, []

    def hook(self, event, arguments):
        if event == "open":
            path, _, flags = arguments
            if not (isinstance(flags, int) and flags & WRITING):
                return
        elif event in CHANGING:
            path = arguments[0]
        else:
            return
        with self._lock:
            if not self._busy and self._is_inside(path, arguments[-1]):
                self._busy = True       # what follows has events of its own
                try:
                    self._note(f"{event} {path}")
                finally:
                    self._busy = False

    def _is_inside(self, path, handle):
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fsdecode(path)
        if not os.path.isabs(path) and isinstance(handle, int) and handle >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{handle}"), path)
        return Path(path).is_relative_to(self._directory)

    def _note(self, name):
        self.events += 1
        tree = read_tree(self._directory)
        content = digest(tree)
        if content not in self._seen:
            self._seen.add(content)
            self.images.append((f"{self.events} {name}", tree))


active: list[Recorder] = []
hooked = []


def _hook(event, arguments):
    for recorder in active:
        recorder.hook(event, arguments)


@contextlib.contextmanager
def recording(directory):
    """Yields a Recorder of a directory for the duration of a block."""
    if not hooked:                  # Python has no way to remove it
        hooked.append(sys.addaudithook(_hook))
    active.append(Recorder(directory))
    try:
        yield active[-1]
    finally:
        active.pop()


def read_tree(directory):
    """The content of each file by its name, None for a directory."""
    tree = {}
    for path in sorted(directory.rglob("*")):
        if path.name != CLAIM:
            with contextlib.suppress(FileNotFoundError):        # another thread removes it
                tree[str(path.relative_to(directory))] = None if path.is_dir() else (
                    sys.intern(path.read_bytes().decode("latin-1")))
    return tree


def write_tree(directory, tree):
    """Makes a directory hold a tree and nothing else."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, content in tree.items():
        if content is None:
            (directory / name).mkdir(parents=True, exist_ok=True)
        else:
            (directory / name).write_bytes(content.encode("latin-1"))


def digest(tree):
    return hashlib.sha256(repr(sorted(tree.items(), key=str)).encode()).hexdigest()


def lasting(tree):
    """What two equal runs have in common: everything but times, and how orbax lays out a state."""
    found = {}
    for name, content in tree.items():
        path = Path(name)
        if "checkpoints" in path.parts[:-1]:
            if path.name != "_CHECKPOINT_METADATA":
                continue
            content = json.loads(content)["custom_metadata"]        # with a digest of the state
            content.pop("seconds"), content.pop("facts_digest")
        elif path.name == "metrics.jsonl":
            content = [{key: value for key, value in json.loads(line).items()
                        if not key.startswith(TIMED)} for line in content.splitlines()]
        elif path.name in ("summary.json", "family.json"):
            content = json.loads(content)
            content.pop("environment")
            for point in content["points"]:
                point.pop("seconds")
        elif (content or "").startswith('{"facts"'):
            header, *rows = content.splitlines()
            facts = json.loads(header)["facts"]
            facts.pop("environment")
            content = [facts, *rows]
        elif path.name == "README.md":      # "When it pays" tells the time of the run
            content = re.sub(r"## When it pays\n.*?(?=\n## )", "", content or "", flags=re.DOTALL)
        elif path.suffix in (".html", ".png", ".svg", ".log") or path.name == "environment.json":
            content = "a picture, or what git says"
        found[name] = content
    return found
