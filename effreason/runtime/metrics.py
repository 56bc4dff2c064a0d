"""What a run leaves on disk of what it measures: JSONL, TensorBoard, wandb.

A step is counted from 0: the row of step s holds what was measured on rollouts of the policy after s updates.
"""

import importlib
import math
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from effreason.runtime.errors import UserError
from effreason.runtime.files import append, complete_lines, disk, json_line, replacing


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
        append(self._metrics, json_line({"step": step, **row}))
        if self._events is not None:
            self._events.write(step, finite)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rollouts of a step for people to read."""
        append(self._rollouts, b"".join(json_line({"step": step, **_plain(row)}) for row in rows))

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


def _drop_from(path: Path, start_step: int) -> None:
    """Keeps the rows of steps before start_step; the file is replaced as a whole or stays as it was."""
    if not path.exists():
        return
    with replacing(path) as kept, kept.open("wb") as file:
        file.writelines(line for line, row in complete_lines(path) if row["step"] < start_step)


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
        append(self._path, length + checksums[0] + event + checksums[1])


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
