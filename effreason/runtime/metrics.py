"""What a run shows while it works, and what it leaves on disk: a progress display, JSONL, TensorBoard, wandb.

A step is counted from 0: the row of step s holds what was measured on rollouts of the policy after s updates.
"""

import collections
import contextlib
import importlib
import json
import math
import os
import socket
import statistics
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from effreason.errors import UserError

ETA_STEPS = 20                      # how many of the last steps the ETA is the median of
LINE_WIDTH = 80                     # a plain line is kept within this
# A plain line that would be too long takes the next form and keeps it, so that the lines below each other align.
LINE_FORMS = (("accuracy", "  "), ("acc", "  "), ("acc", " "))


def duration(seconds: float) -> str:
    """Seconds in at most six characters: 0:07, 12:34, 1h02m, 3d04h."""
    if not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def rate(per_second: float) -> str:
    """A rate in at most five characters: 850, 5,012, 12.3k, 456k, 1.2M."""
    if not math.isfinite(per_second):
        return "-"
    for bound, divisor, form in ((9_999.5, 1, ",.0f"), (99_950, 1e3, ".1f"), (999_500, 1e3, ".0f")):
        if per_second < bound:
            return f"{per_second / divisor:{form}}" + ("k" if divisor > 1 else "")
    return f"{per_second / 1e6:.1f}M"


def say(text: str, console: Console) -> None:
    """Prints a line as it stands, however long; above a live display where there is one."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Generation:
    """How far the generation of one step is, and how fast."""

    def __init__(self, total: int, tokens: int) -> None:
        self.total, self.finished, self.tokens = total, 0, tokens
        self.over = False
        self._first_tokens = tokens
        self._started = self._changed = time.monotonic()

    def rate(self) -> float:
        """Tokens per second since the first report, up to the moment all responses were there."""
        if self.finished < self.total:
            self._changed = time.monotonic()
        elapsed = self._changed - self._started
        sampled = self.tokens - self._first_tokens
        return sampled / elapsed if sampled and elapsed else math.nan


class Progress:
    """A live bar on a terminal, one plain line for each step otherwise.

    Args:
        total_steps: steps of the whole run.
        start_step: the first step of this process; > 0 after a resume.
        console: where to print; None = standard output.
    """

    def __init__(self, total_steps: int, *, start_step: int = 0, console: Console | None = None) -> None:
        # FORCE_COLOR makes rich take a pipe for a terminal: colours are then wanted, a moving bar is not.
        self._console = console or Console(force_interactive=None if os.isatty(1) else False)
        self._total = total_steps
        self._done = start_step
        self._metrics: Mapping[str, float] = {}
        self._durations: collections.deque[float] = collections.deque(maxlen=ETA_STEPS)
        self._first = True                                  # True until a second step has ended
        self._form = 0                                      # index into LINE_FORMS
        self._started = self._step_started = time.monotonic()
        self._ended: float | None = None
        self._rollout: _Generation | None = None
        self._live: Live | None = None
        if self._console.is_interactive:
            self._live = Live(self, console=self._console, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._started = self._step_started = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._ended = time.monotonic()
        if self._live is not None:
            self._live.stop()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows that a training step has ended.

        Args: step, counted from 0; metrics of this step, of which rollout/accuracy, rollout/tokens, the two
            tokens_per_second and time/step are shown or used where they are there.
        """
        now = time.monotonic()
        if len(self._durations) == 1 and self._first:
            self._durations.clear()                         # the first step compiled: it says nothing about the others
            self._first = False
        self._durations.append(float(metrics.get("time/step", now - self._step_started)))
        self._step_started = now
        self._done = step + 1
        self._metrics = metrics
        if self._rollout is not None:
            self._rollout.over = True
        if self._live is None:
            self.say(self._line())

    def rollout(self, finished: int, total: int, tokens: int) -> None:
        """Shows how far the generation within this step is.

        Args: finished and total responses; tokens sampled since this generation began.
        """
        current = self._rollout
        if current is None or current.over or finished < current.finished or total != current.total:
            current = self._rollout = _Generation(total, tokens)
        current.finished, current.tokens = finished, tokens

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        say(text, self._console)

    def _value(self, key: str) -> float:
        return float(self._metrics.get(key, math.nan))

    def _eta(self) -> float:
        if not self._durations:
            return math.nan
        return statistics.median(self._durations) * max(self._total - self._done, 0)

    def _line(self) -> str:
        line = self._line_as(*LINE_FORMS[self._form])
        while len(line) > LINE_WIDTH and self._form + 1 < len(LINE_FORMS):
            self._form += 1
            line = self._line_as(*LINE_FORMS[self._form])
        return line

    def _line_as(self, accuracy: str, gap: str) -> str:
        return gap.join((
            _counted("step", self._done, self._total),
            f"{accuracy} {_number(self._value('rollout/accuracy'), '.2f')}",
            f"tokens {_number(self._value('rollout/tokens'), ',.0f'):>3}",
            f"rollout {rate(self._value('rollout/tokens_per_second')):>5}/s",
            f"update {rate(self._value('update/tokens_per_second')):>5}/s",
            f"eta {duration(self._eta())}",
        ))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # The bars stand in one column, so both rows take the width of the longer label and the longer text.
        rows = [(_counted("step", self._done, self._total), self._done, self._total, self._step_text())]
        if (generation := self._rollout) is not None and self._ended is None:
            label = _counted("rollout", generation.finished, generation.total)
            rows.append((label, generation.finished, generation.total, self._rate_text(generation)))
        elif self._metrics:
            rows.append(("", 0, 0, self._rate_text(None)))
        used = max(len(row[0]) for row in rows) + max(row[3].cell_len for row in rows) + 3
        width = min(options.max_width - used, 40)
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True)
        if width >= 4:
            grid.add_column(width=width)
        grid.add_column(no_wrap=True)
        for label, completed, total, text in rows:
            bar = ProgressBar(total=total, completed=completed, width=width, complete_style="cyan",
                              finished_style="cyan") if total else ""
            grid.add_row(label, *([bar] if width >= 4 else []), text)
        yield grid

    def _step_text(self) -> Text:
        parts: list[tuple[str, str]] = []
        if self._metrics:
            parts += _pair("accuracy", _number(self._value("rollout/accuracy"), ".2f"))
            parts += _pair("tokens", f"{_number(self._value('rollout/tokens'), ',.0f'):>3}")
        if self._ended is not None:
            parts += _pair("took", duration(self._ended - self._started))
        elif self._durations:
            parts += _pair("eta", duration(self._eta()))
        else:
            parts += _pair("elapsed", duration(time.monotonic() - self._started))
        return Text.assemble(*parts)

    def _rate_text(self, generation: _Generation | None) -> Text:
        sampled = self._value("rollout/tokens_per_second")
        if generation is not None and not generation.over:
            sampled = generation.rate()
        parts = _pair("rollout", f"{rate(sampled):>5} tok/s")
        if self._metrics:
            parts += _pair("update", f"{rate(self._value('update/tokens_per_second')):>5} tok/s")
        return Text.assemble(*parts)


def _counted(name: str, done: int, total: int) -> str:
    return f"{name} {done:>{len(str(total))}}/{total}"


def _number(value: float, form: str) -> str:
    return f"{value:{form}}" if math.isfinite(value) else "-"


def _pair(name: str, value: str) -> list[tuple[str, str]]:
    return [(f" {name} ", "dim"), (f"{value} ", "")]


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
