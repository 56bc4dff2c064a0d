"""What a run leaves on disk of what it measures: JSONL, TensorBoard, wandb.

A step is counted from 0: the row of step s holds what was measured on rollouts of the policy after s updates.
"""

import contextlib
import importlib
import json
import math
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from effreason.runtime.errors import UserError


class MetricsWriter:
    """Writes what a run measures into its directory, and to wandb where asked.

    `metrics.jsonl` has one object for each call of `write`, `rollouts.jsonl` one for each sample; both carry "step".
    After a resume the rows of steps that will be run again (step >= start_step) are dropped first, as is a line that a
    crash cut off; a number that is not finite is written as null.

    Args:
        directory: of the run; made if it is not there.
        tensorboard: also write event files under directory/tensorboard.
        wandb: also log to wandb, which must then be installed.
        start_step: the first step this process will write.
        config: of the run, for wandb.
    Raises: UserError where wandb is missing, a file of the run is damaged or cannot be written.
    """

    def __init__(self, directory: Path, *, tensorboard: bool, wandb: bool, start_step: int,
                 config: Mapping[str, Any]) -> None:
        # wandb first: a missing package must not cost the rows of an earlier run.
        self._wandb = _start_wandb(directory, start_step, config) if wandb else None
        self._metrics = directory / "metrics.jsonl"
        self._rollouts = directory / "rollouts.jsonl"
        with disk(directory):
            directory.mkdir(parents=True, exist_ok=True)
        for path in (self._metrics, self._rollouts):
            _drop_from(path, start_step)
        self._events = _Events(directory / "tensorboard", start_step) if tensorboard else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends the metrics of a step; they are on their way to the disk when this returns."""
        row = {name: _plain(value) for name, value in metrics.items()}
        finite = {name: value for name, value in row.items() if value is not None}
        _append(self._metrics, _jsonl([{"step": step, **row}]))
        if self._events is not None:
            self._events.write(step, finite)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rollouts of a step for people to read."""
        _append(self._rollouts, _jsonl({"step": step, **_plain(row)} for row in rows))

    def close(self) -> None:
        """Ends the wandb run, where there is one; the files are complete after each write."""
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()


class Unwritten:
    """What the other processes have for a MetricsWriter: process 0 alone writes."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes nothing."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        pass


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file of MetricsWriter, without a last line that a crash cut off; [] where there is no file."""
    return [row for _, row in _lines(path)] if path.exists() else []


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Whole lines of a JSONL file, as bytes and as the object they hold.

    Only the last line may be broken: each write ends in a newline, so nothing but a crash in the middle of one breaks
    it.
    """
    broken = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if broken:
                raise UserError(f"{path}: line {broken} must be a JSON object with a step; repair or remove it")
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int):
                yield line, row
            else:
                broken = number


def _drop_from(path: Path, start_step: int) -> None:
    """Keeps the rows of steps before start_step; the file is replaced as a whole or stays as it was."""
    if not path.exists():
        return
    kept = path.with_suffix(".jsonl.part")
    try:
        with disk(kept), kept.open("wb") as file:
            file.writelines(line for line, row in _lines(path) if row["step"] < start_step)
        with disk(path):
            kept.replace(path)
    finally:
        kept.unlink(missing_ok=True)


def _append(path: Path, data: bytes) -> None:
    """Adds to a file all or nothing, also on a full disk: half a row must not stand before the next one."""
    with disk(path):
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as file:
                file.write(data)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise


def _jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    # A lone surrogate is no UTF-8, but the escape that takes its place is how JSON spells it.
    return text.encode("utf-8", "backslashreplace")


def _plain(value: Any) -> Any:
    """A value as JSON has it: arrays as lists, numbers that are not finite as None."""
    if hasattr(value, "tolist"):                            # an array or scalar of NumPy or JAX
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turns a failure of the file system, a full disk above all, into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    """Writes a JSON file as a whole: a full disk or a crash leaves the one before. Raises: UserError."""
    partial = path.with_name(path.name + ".partial")
    try:
        with disk(path):
            partial.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class _Events:
    """A TensorBoard event file, written in the calling thread.

    tensorboardX's SummaryWriter hands events to a thread through a bounded queue; when that thread dies of a full disk,
    the next writes fill the queue and the run hangs. So only its records are used here; a failure is raised at once.
    """

    def __init__(self, directory: Path, start_step: int) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

        self._event, self._summary, self._checksum = event_pb2.Event, summary_pb2.Summary, masked_crc32c
        with disk(directory):
            directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names, which therefore begin with the time.
        self._path = directory / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._add(file_version="brain.Event:2")
        if start_step:
            # A session that starts at a step hides what earlier files hold from that step on.
            self._add(step=start_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step=step, summary=self._summary(value=values))

    def _add(self, **content: Any) -> None:
        """Appends one record: its length, the checksum of that, the event, the checksum of that."""
        event = self._event(wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(event))
        checksums = [struct.pack("<I", self._checksum(part)) for part in (length, event)]
        _append(self._path, length + checksums[0] + event + checksums[1])


class _WandbRun(Protocol):
    id: str

    def log(self, data: dict[str, Any], step: int | None = None) -> None: ...

    def finish(self) -> None: ...


def _start_wandb(directory: Path, start_step: int, config: Mapping[str, Any]) -> _WandbRun:
    """Starts a wandb run named after the directory, or goes on with the one that a resumed directory remembers."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise UserError("log.wandb is true, but the package wandb is not installed: "
                        "pip install 'effreason[wandb]', or set log.wandb to false") from None
    name_of_run = directory / "wandb-run-id.txt"
    known = name_of_run.read_text().strip() if start_step and name_of_run.exists() else None
    with disk(directory):
        directory.mkdir(parents=True, exist_ok=True)
    run: _WandbRun = wandb.init(project="effreason", name=directory.resolve().name, dir=str(directory),
                                config=dict(config), id=known, resume="allow")
    with disk(name_of_run):
        name_of_run.write_text(run.id + "\n")
    return run
