"""What a run measures, written to disk: JSON lines, TensorBoard, wandb.

Steps are counted from 0: the row of step s holds what was measured on rollouts of the policy after
s updates.
"""

import importlib
import math
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from effreason.runtime.errors import UserError
from effreason.runtime.files import append, complete_lines, disk, json_line, replacing

METRICS, ROLLOUTS = "metrics.jsonl", "rollouts.jsonl"


class MetricsWriter:
    """Writes metrics into the directory of a run, and to wandb if configured.

    `metrics.jsonl` has one object for each call of `write`, `rollouts.jsonl` one for each sample;
    both have a "step". On resume the rows of steps that will run again (step >= start_step) are
    dropped first, as is a line that a crash cut off. Numbers that are not finite become null.

    Args:
        directory: of the run, created if missing; None = write nothing, for processes but 0.
        tensorboard: also write event files into directory/tensorboard.
        wandb: also log to wandb, which must then be installed.
        start_step: the first step this process will write.
        config: of the run, for wandb.
    Raises: UserError if wandb is missing, or if a file is damaged or cannot be written.
    """

    def __init__(self, directory: Path | None, *, tensorboard: bool, wandb: bool,
                 start_step: int, config: Mapping[str, Any]) -> None:
        self._directory = directory
        self._wandb: _WandbRun | None = None
        self._events: _Events | None = None
        if directory is None:
            return

        # wandb first: a missing package must not cost the rows of an earlier run.
        if wandb:
            self._wandb = _start_wandb(directory, start_step, config)
        with disk(directory):
            directory.mkdir(parents=True, exist_ok=True)

        for path in (directory / METRICS, directory / ROLLOUTS):
            if path.exists():
                with replacing(path) as kept, kept.open("wb") as file:
                    file.writelines(line for line, row in complete_lines(path)
                                    if row["step"] < start_step)

        if tensorboard:
            self._events = _Events(directory / "tensorboard", start_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends the metrics of a step; they are handed to the system when this returns."""
        if self._directory is None:
            return
        row = {name: _plain(value) for name, value in metrics.items()}
        finite = {name: value for name, value in row.items() if value is not None}
        append(self._directory / METRICS, json_line({"step": step, **row}))

        if self._events is not None:
            self._events.write(step, finite)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rollouts of a step, for people to read."""
        if self._directory is not None:
            lines = [json_line({"step": step, **_plain(row)}) for row in rows]
            append(self._directory / ROLLOUTS, b"".join(lines))

    def close(self) -> None:
        """Ends the wandb run; the files are complete after each write."""
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _plain(value: Any) -> Any:
    """Returns a value as JSON has it: arrays as lists, numbers that are not finite as None."""
    if hasattr(value, "tolist"):                # an array or scalar of NumPy or JAX
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

    tensorboardX's SummaryWriter hands events to a thread through a bounded queue. When a full disk
    kills that thread, the next writes fill the queue and the run hangs. So only its record formats
    are used here, and a failure is raised at once.
    """

    def __init__(self, directory: Path, start_step: int) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._checksum = masked_crc32c
        with disk(directory):
            directory.mkdir(parents=True, exist_ok=True)

        # TensorBoard reads the files in the order of their names, so these begin with the time.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = directory / name
        self._add(file_version="brain.Event:2")

        if start_step:
            # A session that starts at a step hides what earlier files hold from that step on.
            status = event_pb2.SessionLog.START
            self._add(step=start_step, session_log=event_pb2.SessionLog(status=status))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value)
                  for name, value in metrics.items()]
        self._add(step=step, summary=self._summary(value=values))

    def _add(self, **content: Any) -> None:
        """Appends a record: its length, the checksum of that, the event, the checksum of that."""
        event = self._event(wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(event))
        checksums = [struct.pack("<I", self._checksum(part)) for part in (length, event)]
        append(self._path, length + checksums[0] + event + checksums[1])


class _WandbRun(Protocol):
    id: str

    def log(self, data: dict[str, Any], step: int | None = None) -> None: ...

    def finish(self) -> None: ...


def _start_wandb(directory: Path, start_step: int, config: Mapping[str, Any]) -> _WandbRun:
    """Starts a wandb run named after the directory, or resumes the one that it remembers."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise UserError("log.wandb is true, but the package wandb is not installed: pip install "
                        "'effreason[wandb]', or set log.wandb to false") from None

    id_file = directory / "wandb-run-id.txt"
    known = id_file.read_text().strip() if start_step and id_file.exists() else None
    with disk(directory):
        directory.mkdir(parents=True, exist_ok=True)

    log = config["log"]
    run: _WandbRun = wandb.init(
        project=log["wandb_project"] or os.environ.get("WANDB_PROJECT") or "effreason",
        group=log["wandb_group"], name=directory.resolve().name, dir=str(directory),
        config=dict(config), id=known, resume="allow")
    with disk(id_file):
        id_file.write_text(run.id + "\n")
    return run
