"""What a run shows and writes: lines, the live display, JSONL through crashes, TensorBoard."""

import dataclasses
import io
import json
import math
import os
import pty
import resource
import subprocess
import sys
import types

import numpy as np
import pytest
from rich.console import Console

from effreason.runtime import progress
from effreason.runtime.config import LogConfig
from effreason.runtime.errors import UserError
from effreason.runtime.files import read_json_lines
from effreason.runtime.metrics import MetricsWriter
from effreason.runtime.progress import GenerationProgress, Progress, duration, rate

STEP = {"rollout/accuracy": 0.913, "rollout/tokens": 87.4, "rollout/tokens_per_second": 5012.3,
        "update/tokens_per_second": 9900.0, "time/step": 2.5}


def writer(directory, *, start_step=0, tensorboard=False, wandb=False):
    return MetricsWriter(directory, tensorboard=tensorboard, wandb=wandb, start_step=start_step,
                         config={"log": dataclasses.asdict(LogConfig(wandb_group="all"))})


def headway(finished, tokens=0):
    return GenerationProgress(finished=finished, total=256, running=min(64, 256 - finished),
                              waiting=max(192 - finished, 0),
                   tokens=tokens)


def plain_lines(total_steps, start_step, rows):
    console = Console(file=io.StringIO(), width=80)
    with Progress(total_steps, start_step=start_step, console=console) as progress:
        for step, row in enumerate(rows, start=start_step):
            progress.rollout(headway(0))
            progress.rollout(headway(256, 22_000))
            progress.step(step, row)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00"), (83.4, "1:23"), (59.6, "1:00"), (3599, "59:59"), (3600, "1h00m"),
    (86399, "23h59m"), (273600, "3d04h"),
    (math.nan, "-"), (math.inf, "-")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("per_second, text", [
    (0, "0"), (850.4, "850"), (5012.3, "5,012"), (9999.4, "9,999"), (9999.6, "10.0k"),
    (12_345, "12.3k"),
    (99_960, "100k"), (456_000, "456k"), (999_600, "1.0M"), (12_340_000, "12.3M"), (math.nan, "-")])
def test_rate(per_second, text):
    assert rate(per_second) == text


def test_plain_output_is_one_line_for_each_step():
    assert plain_lines(40, 6, [STEP]) == [
        "step  7/40  accuracy 0.91  tokens  87  rollout 5,012/s  update 9,900/s  eta 1:22"]


def test_plain_lines_keep_within_80_columns_and_to_one_form():
    rows = [STEP, STEP | {"rollout/tokens": 14_321, "rollout/tokens_per_second": 123_456,
                          "time/step": 800}, STEP]
    lines = plain_lines(1000, 100, rows)
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("step  102/1000 acc 0.91 tokens 14,321 rollout  123k/s")
    assert lines[2].startswith("step  103/1000 acc 0.91 tokens  87 rollout")


def test_eta_is_the_median_of_recent_steps_without_the_compile_step():
    times = [60.0, 2.0, 2.0, 9.0]
    lines = plain_lines(10, 0, [STEP | {"time/step": seconds} for seconds in times])
    assert [line.split("eta ")[1] for line in lines] == ["9:00", "0:16", "0:14", "0:12"]


def test_missing_and_non_finite_values_are_shown_as_a_dash():
    line = plain_lines(40, 0, [{"rollout/accuracy": math.nan}])[0]
    assert "accuracy -  tokens   -  rollout     -/s" in line


def test_say_prints_text_as_it_is():
    console = Console(file=io.StringIO(), width=40)
    with Progress(2, console=console) as progress:
        progress.say("[bold]saved[/bold] " + "x" * 60)
    assert console.file.getvalue() == "[bold]saved[/bold] " + "x" * 60 + "\n"


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_live_display_keeps_within_the_terminal(width):
    progress = Progress(40, console=Console(file=io.StringIO(), width=width))
    for call in (lambda: None, lambda: progress.rollout(headway(0)),
                 lambda: progress.rollout(headway(143, 12_000)),
                 lambda: progress.step(0, STEP), lambda: progress.rollout(headway(3, 100))):
        call()
        lines = Console(width=width).render_lines(progress, pad=False)
        assert 1 <= len(lines) <= 2
        assert all(sum(segment.cell_length for segment in line) <= width for line in lines)


PSEUDO_TERMINAL = """
from effreason.runtime.progress import GenerationProgress, Progress
with Progress(40) as progress:
    progress.say("above the bar")
    progress.rollout(GenerationProgress(finished=143, total=256, running=64, waiting=49,
                                        tokens=12000))
    progress.step(6, {"rollout/accuracy": 0.91, "rollout/tokens": 87.0, "time/step": 2.5})
"""


def test_a_pseudo_terminal_gets_the_bar_and_its_cursor_back():
    main, child = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color"}
    with subprocess.Popen([sys.executable, "-c", PSEUDO_TERMINAL], stdout=child,
                          env=environment) as process:
        os.close(child)
        output = b""
        while True:
            try:
                piece = os.read(main, 4096)
            except OSError:                                 # Linux: the other end is closed
                break
            if not piece:
                break
            output += piece
    os.close(main)
    text = output.decode()
    assert process.returncode == 0
    assert "above the bar" in text and "step  7/40" in text and "━" in text and "0.91" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")      # the cursor is shown again


def test_rows_are_on_disk_after_each_write(tmp_path):
    with writer(tmp_path / "runs" / "a") as out:
        out.write(0, {"update/loss": np.float32(0.5), "update/kl": float("nan"),
                      "reward/mean": np.array(math.inf)})
        assert (tmp_path / "runs/a/metrics.jsonl").read_text() == (
            '{"step": 0, "update/loss": 0.5, "update/kl": null, "reward/mean": null}\n')
        sample = {"text": "ünï\ud800\u2028", "tokens": np.arange(2),
                  "logprobs": [-math.inf, np.float32(0.5)]}
        out.samples(0, [sample, {}])
        lines = (tmp_path / "runs/a/rollouts.jsonl").read_bytes().split(b"\n")
    assert json.loads(lines[0]) == {"step": 0, "text": "ünï\ud800\u2028", "tokens": [0, 1],
                                    "logprobs": [None, 0.5]}
    assert [json.loads(lines[1]), lines[2:]] == [{"step": 0}, [b""]]


def test_resume_drops_the_steps_that_will_run_again(tmp_path):
    with writer(tmp_path) as out:
        for step in range(5):
            out.write(step, {"update/loss": step})
            out.samples(step, [{"sample": 0}, {"sample": 1}])
    with writer(tmp_path, start_step=3) as out:
        assert [row["step"] for row in read_json_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]
        out.write(3, {"update/loss": 30.0})
    metrics, samples = (read_json_lines(tmp_path / name)
                        for name in ("metrics.jsonl", "rollouts.jsonl"))
    assert [row["update/loss"] for row in metrics] == [0, 1, 2, 30.0]
    assert [row["step"] for row in samples] == [0, 0, 1, 1, 2, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "rollouts.jsonl"]


@pytest.mark.parametrize("cut", [b'{"step": 2, "upd', b'{"step": 2, "a": 1}', b'{"ste\xc3',
                                 b"\x00\x00\n", b"[1]\n"])
def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "a": 1}\n{"step": 1, "a": 2}\n' + cut)
    assert [row["step"] for row in read_json_lines(path)] == [0, 1]
    with writer(tmp_path, start_step=2) as out:
        out.write(2, {"a": 3})
    assert [row["a"] for row in read_json_lines(path)] == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_lost(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(before := b'{"step": 0}\n{"step"\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 must be a JSON object"):
        writer(tmp_path, start_step=2)
    assert path.read_bytes() == before and [path] == list(tmp_path.iterdir())


def test_read_rows_of_no_file(tmp_path):
    assert read_json_lines(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_full_disk_is_one_clear_error_and_keeps_whole_rows(tmp_path, tensorboard):
    out = writer(tmp_path, tensorboard=tensorboard)
    out.write(0, {"update/loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written: File too large"):
            for step in range(1, 40):
                out.write(step, {"update/loss": 1.0})
        out.close()                                         # neither hangs nor hides the error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) >= 1


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        writer(tmp_path / "file" / "run")


def events(directory):
    """Records of all event files, in the order in which TensorBoard reads them."""
    from tensorboardX.proto import event_pb2
    found = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            # length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            found.append(event_pb2.Event.FromString(data[12:12 + size]))
            data = data[16 + size:]
    return found


def test_tensorboard_has_every_finite_value_and_a_resume_hides_later_steps(tmp_path):
    with writer(tmp_path, tensorboard=True) as out:
        out.write(0, {"update/loss": 0.5, "update/kl": math.nan})
        out.write(1, {"update/loss": 0.25})
    with writer(tmp_path, tensorboard=True, start_step=1) as out:
        out.write(1, {"update/loss": 0.125})
    found = events(tmp_path / "tensorboard")
    values = [(event.step, value.tag, value.simple_value) for event in found
              for value in event.summary.value]
    assert values == [(0, "update/loss", 0.5), (1, "update/loss", 0.25), (1, "update/loss", 0.125)]
    assert [event.step for event in found if event.HasField("session_log")] == [1]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_wandb_that_is_not_installed_is_a_clear_error_and_costs_no_rows(tmp_path, monkeypatch):
    with writer(tmp_path) as out:
        out.write(0, {"update/loss": 1.0})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb is true.*pip install 'effreason\[wandb\]'"):
        writer(tmp_path, wandb=True)
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 1


def test_wandb_run_is_taken_up_again_on_resume(tmp_path, monkeypatch):
    calls = []

    class Run:
        id = "abc"

        def log(self, data, step=None):
            calls.append((step, data))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append(options["id"])
        named.append((options["project"], options["group"]))
        return Run()

    named = []
    monkeypatch.delenv("WANDB_PROJECT", raising=False)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with writer(tmp_path / "run", wandb=True) as out:
        out.write(0, {"update/loss": 1.0, "update/kl": math.inf})
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with writer(tmp_path / "run", wandb=True, start_step=1):
        pass
    assert named == [("effreason", "all"), ("mine", "all")]
    assert calls == [None, (0, {"update/loss": 1.0}), "finish", "abc", "finish"]


def test_heavy_packages_are_imported_only_where_asked_for():
    code = ("import sys, effreason.runtime.metrics, effreason.runtime.progress;"
            "print({'jax', 'tensorboardX', 'wandb', 'matplotlib'} & set(sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout == "set()\n"


def test_generation_rate_stops_with_the_last_response(monkeypatch):
    now = iter([10.0, 12.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    generation = progress._Generation(headway(0))
    generation.progress = headway(100, 4_000)
    assert generation.rate() == 2_000
    generation.progress = headway(256, 4_000)
    assert generation.rate() == 2_000
