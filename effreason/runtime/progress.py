"""What a run shows while it works: a live bar on a terminal, otherwise one line for each step.

Steps are counted from 0: what is shown for step s was measured on rollouts of the policy after s
updates.
"""

import collections
import contextlib
import dataclasses
import datetime
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self, TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from effreason.runtime import streams
from effreason.runtime.files import disk

ETA_STEPS = 20                      # the ETA is the median over this many last steps
LINE_WIDTH = 80                     # of plain lines
# If a plain line gets too long, it and all later ones take the next form, so that lines align.
LINE_FORMS = (("accuracy", "  "), ("acc", "  "), ("acc", " "))


def duration(seconds: float) -> str:
    """Formats seconds in at most six characters: 0:07, 12:34, 1h02m, 3d04h."""
    if not math.isfinite(seconds):
        return "-"

    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def rate(per_second: float) -> str:
    """Formats a rate in at most five characters: 850, 5,012, 12.3k, 456k, 1.2M."""
    if not math.isfinite(per_second):
        return "-"

    for bound, divisor, form in ((9_999.5, 1, ",.0f"), (99_950, 1e3, ".1f"),
                                 (999_500, 1e3, ".0f")):
        if per_second < bound:
            return f"{per_second / divisor:{form}}" + ("k" if divisor > 1 else "")
    return f"{per_second / 1e6:.1f}M"


_kept: list[TextIO] = []            # files that get what is said


@contextlib.contextmanager
def kept(path: Path) -> Iterator[None]:
    """Appends what is said in the block to a file, with the time, and what ends the block early.

    Raises: UserError if the file cannot be opened."""
    with disk(path):
        opened = path.open("a", encoding="utf-8", buffering=1)
    with opened as file:
        _kept.append(file)
        try:
            yield
        except BaseException as error:
            _keep(str(error) or type(error).__name__)
            raise
        finally:
            _kept.remove(file)


def _keep(text: str) -> None:
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    for file in _kept:
        with contextlib.suppress(OSError):      # what is worth more will say that the disk is full
            file.write(f"{now}  {text}\n")


def say(text: str, console: Console) -> None:
    """Prints a line unchanged, however long; above a live display if there is one."""
    _keep(text)
    if streams.quiet and not text.startswith("warning"):
        return
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show(table: RenderableType, console: Console) -> None:
    """Prints a table; on a terminal that is too narrow for it, each row as lines of their own."""
    if isinstance(table, Group):
        for part in table.renderables:
            show(part, console)
        return
    if not isinstance(table, Table):
        console.print(table)
        return
    # The columns that do not wrap decide how narrow it can be; one space is between any two.
    needed = sum(max(map(cell_len, "\n".join(map(str, (column.header, *column.cells))).split("\n")))
                 for column in table.columns if column.no_wrap) + len(table.columns)
    if needed <= console.width:
        console.print(table, highlight=False, markup=False)
        return

    names, group = [], ""
    for column in table.columns:        # a heading that begins with an empty line continues a group
        first, _, rest = str(column.header).partition("\n")
        group = first or group
        names.append(f"{group} {rest}".strip())
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        console.print(str(cells[0]), style="bold", highlight=False, markup=False)
        for name, cell in zip(names[1:], cells[1:], strict=True):
            if str(cell):
                console.print(f"  {name}: {cell}", highlight=False, markup=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationProgress:
    """How far a generation is."""

    finished: int                   # responses
    total: int
    running: int                    # in slots
    waiting: int                    # not started
    tokens: int                     # sampled so far, including those of running responses


class _Generation:
    """The progress and the speed of one step's generation."""

    def __init__(self, progress: GenerationProgress) -> None:
        self.progress = progress
        self.over = False
        self._first_tokens = progress.tokens
        self._started = self._changed = time.monotonic()

    def rate(self) -> float:
        """Returns tokens per second, from the first report until all responses are there."""
        if self.progress.finished < self.progress.total:
            self._changed = time.monotonic()

        elapsed = self._changed - self._started
        sampled = self.progress.tokens - self._first_tokens
        return sampled / elapsed if sampled and elapsed else math.nan


class Progress:
    """Shows a live bar on a terminal, otherwise one plain line for each step.

    Args:
        total_steps: steps of the whole run.
        start_step: the first step of this process; > 0 after a resume.
        console: to print on; None = standard output.
    """

    def __init__(self, total_steps: int, *, start_step: int = 0,
                 console: Console | None = None) -> None:
        # FORCE_COLOR makes rich take a pipe for a terminal: it asks for colours, not for a bar.
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

        if self._console.is_interactive and not streams.quiet:
            self._live = Live(self, console=self._console, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._started = self._step_started = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended = time.monotonic()
        if self._live is not None:
            self._live.stop()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows that a training step has ended.

        Args: step, counted from 0; metrics of the step: rollout/accuracy, rollout/tokens, the two
            tokens_per_second and time/step are used if present."""
        now = time.monotonic()
        if len(self._durations) == 1 and self._first:
            self._durations.clear()         # the first step compiled, so it predicts nothing
            self._first = False

        self._durations.append(float(metrics.get("time/step", now - self._step_started)))
        self._step_started = now
        self._done = step + 1
        self._metrics = metrics

        if self._rollout is not None:
            self._rollout.over = True
        if self._live is None:
            self.say(self._line())
        else:
            _keep(self._line())

    def rollout(self, progress: GenerationProgress) -> None:
        """Shows how far the generation within this step is."""
        current = self._rollout
        if (current is None or current.over or progress.total != current.progress.total
                or progress.finished < current.progress.finished):
            current = self._rollout = _Generation(progress)

        current.progress = progress

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
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
        # The bars share a column, so both rows take the width of the longer label and text.
        rows = [(_counted("step", self._done, self._total), self._done, self._total,
                 self._step_text())]
        if (generation := self._rollout) is not None and self._ended is None:
            progress = generation.progress
            label = _counted("rollout", progress.finished, progress.total)
            rows.append((label, progress.finished, progress.total, self._rate_text(generation)))
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
            bar = ProgressBar(total=total, completed=completed, width=width,
                              complete_style="cyan", finished_style="cyan") if total else ""
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
            progress = generation.progress
            return Text.assemble(*_pair("rollout", f"{rate(generation.rate()):>5} tok/s"),
                                 *_pair("running", f"{progress.running}"),
                                 *_pair("waiting", f"{progress.waiting}"))

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
