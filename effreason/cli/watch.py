"""The command `effreason watch RUN`: how a running or finished run is doing, in the terminal."""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from effreason.cli.arguments import Parser, bounded, run_config
from effreason.runtime.files import read_json, read_json_lines
from effreason.runtime.progress import duration

BLOCKS = "▁▂▃▄▅▆▇█"
# Metric, its name here, how it is written.
CURVES = (("rollout/tokens", "tokens", ",.0f"), ("rollout/accuracy", "accuracy", ".2f"),
          ("evaluation/tokens", "held out: tokens", ",.0f"),
          ("evaluation/accuracy", "held out: accuracy", ".2f"))
SILENT_STEPS = 5                    # longer than so many steps without a word is worth a remark
LAST_STEPS = 20                     # the time of a step is the median over these


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """What is known of a run."""

    name: str
    state: str                      # running | finished | stopped
    done: int                       # steps
    total: int
    step_seconds: float             # nan before the first step
    silent_seconds: float           # since the last step was written
    curves: dict[str, list[float]]  # by metric
    remark: str = ""


def run(argv: Sequence[str], prog: str) -> None:
    """Shows a run until it has ended. Raises: UserError; SystemExit(0) after --help."""
    parser = Parser(prog, "Show how a run is doing: progress, response length and accuracy over "
                    "the steps, times. On a terminal the view is live until the run ends or "
                    "Ctrl-C; otherwise it is printed once.")
    parser.add_argument("run", metavar="RUN", type=Path, help="the directory of a run")
    parser.add_argument("--every", metavar="SECONDS", default=2.0, type=bounded(
        "number >= 0.1", float, lambda seconds: seconds >= 0.1), help="time between two looks; "
        "default 2")
    parser.add_argument("--once", action="store_true", help="print the view once")
    parser.add_argument("--json", action="store_true", help="print it once, as one JSON object")
    options = parser.parse_args(argv)

    console, view = Console(), read(options.run)
    if options.json:
        print(json.dumps(_plain(dataclasses.asdict(view))))
    elif options.once or not console.is_terminal:
        print("\n".join(lines(view, console.width)))
    else:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(Text("\n".join(lines(view, console.width))), refresh=True)
                if view.state != "running":
                    return
                time.sleep(options.every)
                view = read(options.run)


def read(directory: Path) -> View:
    """Reads the files of a run. Raises: UserError if the directory is not that of a run."""
    config = run_config(directory)
    path = directory / "metrics.jsonl"
    rows = read_json_lines(path)
    steps = [row for row in rows if "rollout/tokens" in row]
    seconds = [row["time/step"] for row in steps[-LAST_STEPS:] if row.get("time/step")]
    state, remark = "running", ""
    if (directory / "stopped.txt").is_file():
        state, remark = "stopped", (directory / "stopped.txt").read_text(encoding="utf-8").strip()
    elif len(steps) == config.run.steps and (directory / "report.html").exists():
        state, remark = "finished", _result(directory)
    changed = path.stat().st_mtime if path.exists() else directory.stat().st_mtime
    return View(
        name=directory.resolve().name, state=state, done=len(steps), total=config.run.steps,
        step_seconds=statistics.median(seconds) if seconds else math.nan,
        silent_seconds=max(time.time() - changed, 0.0), remark=remark,
        curves={metric: values for metric, _, _ in CURVES
                if (values := [row[metric] for row in rows if row.get(metric) is not None])})


def _result(directory: Path) -> str:
    """Returns tokens saved and the change of accuracy of a finished run; "" if not evaluated."""
    path = directory / "summary.json"
    points = read_json(path)["points"] if path.exists() else []
    found = [next(iter(point["sets"].values())).get("comparison") for point in points[1:]]
    if not found or not found[0]:
        return ""
    return (f"{1 - found[0]['token_ratio']:.1%} fewer tokens, accuracy "
            f"{100 * found[0]['accuracy_change']:+.1f} points on held-out problems")


def lines(view: View, width: int) -> list[str]:
    """Returns the view in lines of at most `width` columns, except for the remark."""
    left = (view.total - view.done) * view.step_seconds
    counted = f"step {view.done}/{view.total}"
    times = [f"step takes {duration(view.step_seconds)}"]
    if view.state == "running":
        times += [f"left {duration(left)}", f"last word {duration(view.silent_seconds)} ago"]
    bar_width = max(min(width - len(counted) - 3, 40), 4)
    full = round(bar_width * view.done / max(view.total, 1))
    shown = [f"{view.name}: {view.state}"[:width],
             f"[{'#' * full}{'.' * (bar_width - full)}] {counted}", *_wrapped(times, width)]

    for metric, name, form in CURVES:
        if values := view.curves.get(metric):
            ends = f"{values[0]:{form}} → {values[-1]:{form}}"
            room = width - len(ends) - 1
            if room < len(name) + 12:               # a narrow terminal: two lines
                shown.append(f"{name}  {ends}"[:width])
                shown.append(sparkline(values, width))
            else:
                shown.append(f"{name:<19}{sparkline(values, room - 20)} {ends}")
    slow = view.silent_seconds > SILENT_STEPS * view.step_seconds
    if view.state == "running" and slow and view.done < view.total:
        shown.append("no step for long: does it still run?"[:width])
    return [*shown, *([view.remark] if view.remark else [])]


def sparkline(values: Sequence[float], width: int) -> str:
    """Returns the course of finite values in blocks, at most `width` of them: means of a few."""
    count = min(len(values), max(width, 1))
    means = [statistics.fmean(values[i * len(values) // count : (i + 1) * len(values) // count])
             for i in range(count)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def _wrapped(parts: Sequence[str], width: int) -> list[str]:
    shown = [parts[0]]
    for part in parts[1:]:
        if len(shown[-1]) + len(part) + 2 <= width:
            shown[-1] += f", {part}"
        else:
            shown.append(part)
    return shown


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in table.items()}
