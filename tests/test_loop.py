"""Whole runs of a model that learns in six steps: what they leave, how they stop, and that they go
on unchanged."""

import contextlib
import copy
import dataclasses
import datetime
import errno
import fcntl
import io
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import traceback
import types
from pathlib import Path

import cheap_runs
import jax
import numpy as np
import pytest
import small_runs

from effreason import loop
from effreason.cli import main
from effreason.data import templates
from effreason.evaluation import models as candidates
from effreason.evaluation import responses
from effreason.grading.grader import Grade
from effreason.lm.hf.config import read_config
from effreason.lm.hf.pretrained import load_tokenizer
from effreason.lm.hf.weights import read_weights
from effreason.rl import advantages, packing, parity, rollouts, update
from effreason.rl.checkpoints import Checkpoints
from effreason.runs import directory as runs
from effreason.runs import export as run_export
from effreason.runs import session
from effreason.runtime import config as configuration
from effreason.runtime import sharding
from effreason.runtime.errors import Interrupted, UserError
from effreason.runtime.files import read_json_lines
from effreason.runtime.metrics import MetricsWriter
from effreason.runtime.progress import Progress
from effreason.runtime.signals import NOTICE

pytestmark = pytest.mark.usefixtures("cheap")
ROOT = Path(__file__).parents[1]
# an evaluation between, so that being stopped within it is tested too
EVALUATED = {"evaluation.every": 3}


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """An uninterrupted run: its directory, its engine, and the widths of the rows it was given."""
    directory, engines, widths = tmp_path_factory.mktemp("finished") / "run", [], set()
    make_engine, pack = session.make_engine, packing.pack

    def noted_pack(*arguments, **settings):
        packed = pack(*arguments, **settings)
        widths.add(packed.groups[0].tokens.shape)
        return packed

    with cheap_runs.real_pictures(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "make_engine",
                      lambda *arguments: engines.append(make_engine(*arguments)) or engines[0])
        patch.setattr(packing, "pack", noted_pack)
        loop.train(small_runs.config(world, directory, **EVALUATED))
    return types.SimpleNamespace(directory=directory, engine=engines[0], widths=widths)


def lasting(directory):
    """The rows of metrics.jsonl without what a clock says, and what the sampler had to do in this
    process."""
    timed = ("time/", "rollout/tokens_per_second", "update/tokens_per_second", "engine/")
    return [{name: value for name, value in row.items() if not name.startswith(timed)}
            for row in read_json_lines(directory / "metrics.jsonl")]


def state_in(finished, directory):
    with Checkpoints(directory / "checkpoints", keep=2) as saved:
        return jax.device_get(saved.restore(finished.engine.learner.abstract_state)[0])


def assert_same_run(finished, directory):
    """Bit for bit: weights, moments and step; what was exported, measured and sampled; the
    evaluations."""
    expected, found = state_in(finished, finished.directory), state_in(finished, directory)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    evaluated = sorted(path.relative_to(finished.directory)
                       for path in finished.directory.glob("evaluations/*/*"))
    assert [path.parent.name for path in evaluated] == ["step0", "step3", "step6"]
    for name in ("model/model.safetensors", "rollouts.jsonl"):
        assert (directory / name).read_bytes() == (finished.directory / name).read_bytes(), name
    for path in evaluated:
        facts, rows = responses.read(directory / path)
        expected, others = responses.read(finished.directory / path)
        assert rows == others and facts | {"environment": 0} == expected | {"environment": 0}, path
    assert lasting(directory) == lasting(finished.directory)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (directory,
                                                                              finished.directory)]
    for summary in summaries:
        assert summary["points"][1].pop("seconds") > 0
    assert summaries[0] == summaries[1]


def refused(capsys, argv, command="train"):
    """The one line of an error, with exit code 2."""
    assert main.main([command, *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error.removeprefix("error: ").rstrip("\n")


class LossTraced(Exception):
    """Ends a run at its first loss; carries the functions called on the way there."""


def test_the_way_from_train_py_to_the_loss_is_short(world, tmp_path, monkeypatch):
    def record(*arguments, **settings):
        frames = [frame for frame in traceback.extract_stack()
                  if Path(frame.filename).is_relative_to(ROOT / "effreason")
                  or Path(frame.filename) == ROOT / "train.py"]
        raise LossTraced([f"{Path(frame.filename).relative_to(ROOT)}: {frame.name}"
                          for frame in frames])

    monkeypatch.setattr(update, "policy_loss", record)
    # A clip ratio of its own: the functions of the other runs are compiled already.
    arguments = small_runs.arguments(world, tmp_path / "run", **{
        "update.clip_ratio": 0.3, "evaluation.problems": 0, "run.steps": 1})
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(LossTraced) as caught:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    frames = [*caught.value.args[0], "effreason/rl/update.py: policy_loss"]
    print("\n".join(frames))
    assert frames[0] == "train.py: <module>" and len(frames) <= 10


# What a run leaves


def test_the_run_directory_holds_what_was_promised(finished):
    assert {path.name for path in finished.directory.iterdir()} == {"config.yaml",
                                                                    "environment.json",
                                                                    "metrics.jsonl", "console.log",
                                                                    "rollouts.jsonl",
                                                                    "left_out.jsonl", "checkpoints",
                                                                    "model", "evaluations",
                                                                    "summary.json", "report.png",
                                                                    "report.html", "plots"}
    assert {path.name for path in (finished.directory / "checkpoints").iterdir()} == {"3", "6"}
    assert (finished.directory / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_console_log_has_what_was_said_with_the_time(finished):
    lines = (finished.directory / "console.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d  \S", line) for line in lines)
    said = [line.split("  ", 1)[1] for line in lines]
    assert any(line.startswith("parity: sampler and trainer are ") for line in said)
    assert [line.split()[1] for line in said if line.startswith("step")] == [
        f"{step}/6" for step in range(1, 7)]


def test_config_yaml_is_the_resolved_configuration(finished, world):
    loaded = configuration.load(finished.directory / "config.yaml")
    assert loaded == small_runs.config(world, finished.directory, **EVALUATED)


def test_summary_json_has_exactly_the_promised_shape(finished):
    summary = json.loads((finished.directory / "summary.json").read_text())
    assert list(summary) == ["model", "seed", "steps", "points", "origin", "sampling",
                             "environment"]
    assert summary["origin"]["template"]["sha256"] and summary["sampling"]["max_new_tokens"] == 40
    base, trained = summary["points"]
    assert [(point["name"], point["kind"], point["directory"]) for point in (base, trained)] == [
        ("base", "base", "evaluations/step0"), ("trained", "member", ".")]
    for point in (base, trained):
        (measurement,) = point["sets"].values()
        measured = measurement["summary"]
        assert list(measured["by_level"]) == ["easy", "hard"]
        for level in measured["by_level"].values():
            assert list(level) == ["accuracy", "tokens", "problems"]
        levels = measured["by_level"].values()
        for measure in ("accuracy", "tokens"):
            assert measured[measure] == pytest.approx(np.mean([level[measure] for level in levels]))
    assert (trained["alpha"], trained["alpha_start"], summary["seed"]) == (0.2, 0.2, 0)
    assert trained["seconds"] > 0
    (before,), (found,) = base["sets"].values(), trained["sets"].values()
    before, after = before["summary"], found["summary"]
    assert found["comparison"]["token_ratio"] == after["tokens"] / before["tokens"]
    assert found["comparison"]["accuracy_change"] == after["accuracy"] - before["accuracy"]
    low, high = found["comparison"]["token_ratio_interval"]
    assert low <= found["comparison"]["token_ratio"] <= high
    assert after["problems"] == 8


@pytest.mark.slow
def test_without_kl_the_run_keeps_and_scores_no_reference(world, tmp_path, monkeypatch):
    started, begin = [], loop.begin
    monkeypatch.setattr(loop, "begin", lambda *given: started.append(begin(*given)) or started[-1])
    kept = {"run.steps": 2, "evaluation.problems": 4}
    for name, changes in (("none", {"kl.form": "none"}), ("measured", {"kl.coefficient": 0.0})):
        loop.train(small_runs.config(world, tmp_path / name, **kept, **changes))
    assert started[0].reference is None and started[1].reference is not None

    free, measured = (lasting(tmp_path / name) for name in ("none", "measured"))
    for row, other in zip(free, measured, strict=True):
        assert other.keys() - row.keys() == {"reward/kl", "update/kl"}
        assert row == {name: other[name] for name in row}       # nothing was penalized
    assert measured[1]["reward/kl"] != 0

    monkeypatch.setattr(session.Session, "load_weights", None)  # a resume needs no second copy
    loop.train(small_runs.config(world, tmp_path / "none", **kept | {"run.steps": 3},
                                 **{"kl.form": "none", "run.resume": True}))
    assert len(lasting(tmp_path / "none")) == 3


def unexplained(row):
    """The metrics of a row that docs/metrics.md does not list."""
    page = (Path(loop.__file__).parents[1] / "docs" / "metrics.md").read_text()
    names = {name.rsplit("/", 1)[0] if name.rsplit("/", 1)[1] in ("PART", "STATUS") else name
             for name in re.findall(r"`([a-z_]+/\w+)`", page)}
    return {name for name in row if name != "step" and name not in names
            and name.split("/")[0] not in names}


def test_metrics_have_one_row_a_step_and_one_for_the_evaluation_between(finished):
    rows = read_json_lines(finished.directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3, 4, 5]
    steps = [row for row in rows if "rollout/tokens" in row]
    assert len(steps) == 6
    for row in steps:
        assert {"reward/mean", "reward/alpha", "rollout/accuracy", "rollout/truncated",
                "rollout/tokens_per_second", "update/loss", "update/kl", "update/grad_norm",
                "update/entropy", "update/clip_share", "update/tokens_per_second", "time/rollout",
                "time/grade", "time/update", "time/step"} <= row.keys()
        assert sum(value for name, value in row.items()
                   if name.startswith("grade/")) == pytest.approx(1)
        shares = sum(row[f"update_share/{part}"] for part in advantages.PARTS)
        assert shares == pytest.approx(1, abs=1e-4)
        assert {f"length_pull/{part}" for part in advantages.PARTS} <= row.keys()
        assert unexplained(row) == set()
    assert any(row["reward/groups_with_signal"] > 0 for row in steps)
    assert rows[3].keys() == {"step", "evaluation/accuracy", "evaluation/tokens"}


def test_samples_are_for_people_to_read_and_agree_with_the_reward(finished):
    samples = read_json_lines(finished.directory / "rollouts.jsonl")
    # a group each
    assert [row["step"] for row in samples] == [step for step in range(6) for _ in range(4)]
    assert [row["sample"] for row in samples] == [0, 1, 2,
                                                  3] * 6 and len({row["uid"]
                                                                  for row in samples[:4]}) == 1
    assert any(row["correct"] for row in samples) and not all(row["correct"] for row in samples)
    for row in samples:
        assert row["correct"] == (row["answer"] == row["reference_answer"]
                                  and (row["finish"] == "eos"))
        assert (row["reward"] > 0) == row["correct"]
        group = [other["advantage"] for other in samples if other["step"] == row["step"]]
        assert sum(group) == pytest.approx(0, abs=1e-6)         # leave-one-out
        assert 1 <= row["tokens"] <= 40


def test_the_exported_model_loads_and_has_learned(finished, world):
    decoder = read_config(finished.directory / "model")
    assert decoder == read_config(world / "base")
    trained, base = read_weights(finished.directory / "model",
                                 decoder), read_weights(world / "base", decoder)
    jax.tree.map(np.testing.assert_array_equal, trained,
                 state_in(finished, finished.directory).params)
    changed = [bool((one != other).any()) for one, other in zip(jax.tree.leaves(trained),
                                                                jax.tree.leaves(base), strict=True)]
    assert all(changed)
    assert len(load_tokenizer(finished.directory / "model")) == len(load_tokenizer(world / "base"))


def test_a_run_compiles_each_function_of_its_learning_once(finished):
    programs = vars(finished.engine.learner.programs)
    assert len(finished.widths) == 1 and len(programs) == 6
    assert {name: program._cache_size() for name,
            program in programs.items()} == dict.fromkeys(programs, 1)


def test_evaluate_finds_the_numbers_of_the_run_again(finished, world, tmp_path):
    arguments = small_runs.arguments(world, "unused")
    model, checkpoint = str(finished.directory / "model"), str(finished.directory / "checkpoints"
                                                               / "6")
    models = [str(world / "base"), model, checkpoint]
    assert main.main(["evaluate", *arguments, "--models", *models, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    points = json.loads((finished.directory / "summary.json").read_text())["points"]
    summary = {point["name"]: measured for point in points for measured in point["sets"].values()}
    for path, name in ((str(world / "base"), "base"), (model, "trained"), (checkpoint, "trained")):
        (found,) = results["models"][path].values()
        assert {key: found["summary"][key] for key in ("accuracy", "tokens")} == {
            key: summary[name]["summary"][key] for key in ("accuracy", "tokens")}
    assert results["models"][model][str(world / "test.jsonl")]["comparison"]["token_ratio"] == (
        summary["trained"]["comparison"]["token_ratio"])


# Replay


def test_a_response_is_replayed_by_its_name_from_a_checkpoint_or_the_base(finished, capsys):
    rows = read_json_lines(finished.directory / "rollouts.jsonl")
    for row in [next(row for row in rows if row["step"] == step) for step in (0, 3)]:
        name = ["--step", str(row["step"]), "--uid", str(row["uid"]), "--sample",
                str(row["sample"])]
        assert main.main(["replay", str(finished.directory), *name, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["as_logged"] is True
        assert (found["text"], len(found["tokens"]), found["finish"]) == (
            row["response"], row["tokens"], row["finish"])
    assert main.main(["replay", str(finished.directory), *name]) == 0
    shown = capsys.readouterr().out
    assert row["response"] in shown and "the same text as in rollouts.jsonl" in shown


def test_a_checkpoint_that_is_not_whole_is_one_line(finished, world, tmp_path, capsys):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    shutil.copy(finished.directory / "config.yaml", tmp_path)
    arguments = [*small_runs.arguments(world, "unused"), "--models",
                 str(tmp_path / "checkpoints" / "5")]
    assert refused(capsys, arguments,
                   "evaluate") == (f"{tmp_path}/checkpoints/5: the checkpoint cannot be read "
                                   "(it holds no facts besides the state)")


@pytest.mark.parametrize(("argv", "error"), [
    (["--step", "0", "--uid", "99999"], "--uid must be a problem of step 0: "),
    (["--step", "1", "--uid", "UID"],
     "--step must be one of 0, 3, 6, whose weights are stored in "),
    (["--step", "0", "--uid", "1", "--sample", "4"], "--sample must be in [0, 3], got 4"),
    (["--step", "-1", "--uid", "1"], "--step must be >= 0, got -1"),
])
def test_what_cannot_be_replayed_is_one_line(finished, capsys, argv, error):
    uid = next(row["uid"] for row in read_json_lines(finished.directory / "rollouts.jsonl")
               if row["step"] == 1)
    argv = [str(uid) if part == "UID" else part for part in argv]
    assert refused(capsys, [str(finished.directory), *argv], "replay").startswith(error)


def test_a_replay_of_no_run_is_one_line(tmp_path, capsys):
    error = refused(capsys, [str(tmp_path), "--step", "0", "--uid", "1"], "replay")
    assert error == f"{tmp_path}: expected the directory of a run, found no config.yaml in it"


# Stopping and going on


def stop_at(monkeypatch, where, signum=signal.SIGTERM):
    """Sends a signal once: after a number of steps, in the evaluation before or between, or within
    the fifth step."""
    step, rollout = Progress.step, Progress.rollout
    sent = []

    def send():
        if not sent:
            sent.append(signal.raise_signal(signum))

    def stopping_step(self, index, metrics):
        step(self, index, metrics)
        if index + 1 == where:
            send()

    def stopping_rollout(self, now):
        rollout(self, now)
        if now.total == 8 and where == ("between" if self._done else "before"):
            send()
        if now.total == 16 and where == "within" and self._done == 4 and 0 < now.finished < 16:
            send()

    monkeypatch.setattr(Progress, "step", stopping_step)
    monkeypatch.setattr(Progress, "rollout", stopping_rollout)


@pytest.mark.slow
def test_a_run_that_is_stopped_four_times_is_the_run_that_never_was(finished, world, tmp_path):
    directory = tmp_path / "run"
    for where, done in (("before", 0), ("between", 3), ("within", 4), (5, 5)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as caught:
            stop_at(patch, where, signal.SIGINT if where == "between" else signal.SIGTERM)
            loop.train(small_runs.config(world, directory, **EVALUATED, **{"run.resume": done > 0}))
        name = "SIGINT" if where == "between" else "SIGTERM"
        assert caught.value.message == (
            f"stopped by {name} after step {done} of 6, saved; continue with: effreason train "
            f"--config {directory / 'config.yaml'} --run.resume true")
        with Checkpoints(directory / "checkpoints", keep=2) as saved:
            assert saved.latest == done
        assert len([row for row in lasting(directory) if "rollout/tokens" in row]) == done
        assert (directory / "model" / "model.safetensors").exists()
        assert not (directory / "summary.json").exists()
        assert (directory / "unfinished.jsonl").exists() == (where == "within")
    with contextlib.redirect_stdout(io.StringIO()):
        assert main.main(["train", "--config", str(directory / "config.yaml"), "--run.resume",
                          "true"]) == 0
    assert_same_run(finished, directory)
    assert (directory / "config.yaml").read_text() == (finished.directory
                                                       / "config.yaml").read_text().replace(
                                                           str(finished.directory), str(directory))


# A process that is sent a signal at a known place, and says which processes it has started.
STOPPED = """
import os, signal, sys
from effreason.cli import main as cli
from effreason.runtime.progress import Progress
from effreason.runtime.signals import NOTICE
step = Progress.step
def stopping(self, index, metrics):
    step(self, index, metrics)
    if index + 1 == 5:
        tasks = os.listdir("/proc/self/task")     # a child is of the thread that started it
        print("children:", *(open(f"/proc/self/task/{task}/children").read() for task in tasks),
              flush=True)
        if signum == signal.SIGPIPE:            # nobody reads any more
            reader, writer = os.pipe()
            os.dup2(writer, 1)
            os.close(reader)
            self.say("unread")
        else:
            os.kill(os.getpid(), signum)
Progress.step = stopping
signum, sys.argv[1] = int(sys.argv[1]), "train"
sys.exit(cli.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGPIPE, 141)])
def test_a_process_that_is_told_to_stop_leaves_cleanly_and_goes_on_in_another(finished, world,
                                                                              tmp_path, signum,
                                                                              code):
    directory = tmp_path / "a run"
    arguments = small_runs.arguments(world, directory, **EVALUATED)
    done = subprocess.run([sys.executable, "-c", STOPPED, str(int(signum)), *arguments], cwd=ROOT,
                          text=True, capture_output=True, timeout=300)
    assert done.returncode == code
    cause = f"by {signal.Signals(signum).name}"
    if signum == signal.SIGPIPE:
        cause = "because nobody reads standard output any more"
    message = (directory / "stopped.txt").read_text()
    notice = NOTICE if signum in (signal.SIGTERM, signal.SIGINT) else ""
    assert done.stderr == notice + message and message == (
        f"stopped {cause} after step 5 of 6, saved; continue with: "
        f"effreason train --config '{directory}/config.yaml' --run.resume true\n")
    assert "Traceback" not in done.stdout
    assert "step 5/6" in done.stdout and "step 6/6" not in done.stdout
    children = next(line for line in done.stdout.splitlines()
                    if line.startswith("children:")).split()[1:]
    assert children and not [child for child in children if Path("/proc", child).exists()]
    if signum == signal.SIGTERM:
        loop.train(small_runs.config(world, directory, **EVALUATED, **{"run.resume": True}))
        assert_same_run(finished, directory)
        assert not (directory / "stopped.txt").exists()


def test_a_finished_run_goes_on_for_more_steps(finished, world, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(finished.directory, directory)
    loop.train(small_runs.config(world, directory, **EVALUATED,
                                 **{"run.resume": True, "run.steps": 7}))
    rows = lasting(directory)
    assert rows[:7] == lasting(finished.directory)
    assert [row["step"] for row in rows[7:]] == [6, 6]      # the evaluation between, then the step
    with Checkpoints(directory / "checkpoints", keep=2) as saved:
        assert saved.latest == 7
    (base,) = (finished.directory / "evaluations" / "step0").iterdir()
    assert (directory / "evaluations" / "step0" / base.name).read_bytes() == base.read_bytes()


def test_a_second_run_into_the_same_directory_is_refused(finished, world, capsys):
    before = (finished.directory / "config.yaml").read_bytes()
    error = refused(capsys, small_runs.arguments(world, finished.directory))
    assert error == (f"run.directory: {finished.directory} holds a run already; "
                     "resume it with --run.resume true, or choose another directory")
    assert (finished.directory / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(("changes", "found"), [
    ({"reward.alpha": 0.3}, "reward.alpha: 0.2 -> 0.3"),
    ({"grade.require_eos": False}, "grade.require_eos: true -> false"),
    ({"run.seed": 1, "update.learning_rate": 1e-4},
     "update.learning_rate: 0.003 -> 0.0001; run.seed: 0 -> 1"),
])
def test_a_resume_that_would_be_another_run_is_refused(finished, world, changes, found):
    config = small_runs.config(world, finished.directory, **EVALUATED, **{"run.resume": True},
                               **changes)
    with pytest.raises(UserError) as caught, runs.opened(config):
        pass
    path = finished.directory / "config.yaml"
    assert str(caught.value) == f"{path}: a resumed run must keep its configuration, found {found}"


def test_what_decides_no_token_and_no_weight_may_change_on_resume(world, tmp_path):
    first = small_runs.config(world, tmp_path / "run")
    with runs.opened(first) as directory:
        runs.write_config(first, directory)
    changed = small_runs.config(world, tmp_path / "run", **{
        "run.resume": True, "run.steps": 9, "checkpoint.every": 1, "checkpoint.keep": 5,
        "grade.workers": 2,
        "grade.step_budget_seconds": 60.0, "log.groups_per_step": 0, "evaluation.every": 2,
        "model.remat": "full",
        "update.rows_per_micro_batch": 16, "update.vocabulary_tile": 8,
        "update.offload_optimizer": True,
        "kl.offload_reference": True, "mesh.fsdp": 2})
    with runs.opened(changed) as directory:
        runs.write_config(changed, directory)
    written = configuration.load(tmp_path / "run" / "config.yaml")
    assert written == dataclasses.replace(changed, run=dataclasses.replace(changed.run,
                                                                           resume=False))


def test_a_run_whose_learning_rate_falls_to_its_last_step_keeps_its_steps(world, tmp_path):
    falling = {"update.schedule": "linear"}
    first = small_runs.config(world, tmp_path / "run", **falling)
    with runs.opened(first) as directory:
        runs.write_config(first, directory)
    longer = small_runs.config(world, tmp_path / "run", **falling,
                               **{"run.resume": True, "run.steps": 9})
    with pytest.raises(UserError, match=r"run.steps: \d+ -> 9$"), runs.opened(longer):
        pass


class Killed(BaseException):
    """Ends a run as kill -9 does: nothing is saved."""


@pytest.mark.parametrize("every", [3, 6], ids=["exported before", "never exported"])
def test_a_run_killed_in_its_last_export_ends_with_the_model_of_its_last_step(
        finished, world, tmp_path, every):
    directory = tmp_path / "run"

    def killed(params, decoder, step, *rest):
        if step == 6:
            raise Killed
        run_export.export(params, decoder, step, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "export", killed)
        loop.train(small_runs.config(world, directory, **EVALUATED, **{"checkpoint.every": every}))
    assert (directory / "model").exists() == (every == 3)
    (directory / "model.partial").mkdir()
    loop.train(small_runs.config(world, directory, **EVALUATED, **{"run.resume": True}))
    assert_same_run(finished, directory)
    assert json.loads((directory / "model" / "effreason.json").read_text())["step"] == 6
    assert not list(directory.glob("model.*"))


# what orbax leaves half done
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning",
                            "ignore:coroutine .* was never awaited")
def test_a_damaged_checkpoint_names_the_newest_whole_one_and_the_command(finished, world, tmp_path,
                                                                         capfd):
    directory = tmp_path / "run"
    shutil.copytree(finished.directory, directory)
    arguments = small_runs.arguments(world, directory, **EVALUATED, **{"run.resume": True})
    weights = max((directory / "checkpoints" / "6" / "state").rglob("*"),
                  key=lambda path: path.is_file() * path.stat().st_size)
    content = weights.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 128
    hint = (f"checkpoint 3 is whole, continue from it with: rm -r {directory}/checkpoints/6 && "
            f"effreason train --config {directory}/config.yaml --run.resume true")
    for damaged, reason in ((content[:1000], r"the checkpoint cannot be read \(.*\)"),
                            (flipped, r"the state changed after being saved \(digest .*\)")):
        weights.write_bytes(damaged)
        error = refused(capfd, arguments)
        assert re.fullmatch(rf"{directory}/checkpoints/6: {reason}; {re.escape(hint)}", error), (
            error)

    shutil.rmtree(directory / "checkpoints" / "6")
    loop.train(small_runs.config(world, directory, **EVALUATED, **{"run.resume": True}))
    assert_same_run(finished, directory)


def test_an_edited_configuration_is_one_line_that_names_the_fields(finished, tmp_path, capsys):
    directory = tmp_path / "run"
    shutil.copytree(finished.directory, directory)
    path = directory / "config.yaml"
    text = path.read_text().replace(str(finished.directory), str(directory))
    path.write_text(text.replace("learning_rate: 0.003", "learning_rate: 0.03"))
    error = refused(capsys, ["--config", str(path), "--run.resume", "true"])
    assert error == (
        f"{path}: was changed after checkpoint 6 was trained with it, update.learning_rate: "
        f"0.003 -> 0.03; change it back, or start a new run from its model with --model.path "
        f"{directory}/model and another run.directory")
    path.write_text(text.replace("groups_per_step: 1", "groups_per_step: 0"))    # decides nothing
    assert main.main(["train", "--config", str(path), "--run.resume", "true"]) == 0


def test_other_weights_before_training_are_one_line(finished, world, tmp_path, capsys):
    shutil.copytree(finished.directory, tmp_path / "run")
    path = world / "base" / "model.safetensors"
    content = path.read_bytes()
    try:
        # In the middle: the ends are what identifies a model elsewhere.
        path.write_bytes(content[:-900] + bytes([content[-900] ^ 1]) + content[-899:])
        error = refused(capsys, small_runs.arguments(world, tmp_path / "run", **EVALUATED,
                                                     **{"run.resume": True}))
    finally:
        path.write_bytes(content)
    assert re.match(rf"model\.path: the weights of {world}/base have changed since the run began "
                    r"with them \(digest \w+, now \w+\); put them back, or start a new run", error)


def test_a_run_whose_limit_cuts_everything_off_stops_before_its_first_update(world, tmp_path,
                                                                             capsys):
    directory = tmp_path / "run"
    short = {"rollout.max_new_tokens": 6, "evaluation.problems": 0, "run.steps": 1}
    assert main.main(["train", *small_runs.arguments(world, directory, **short)]) == 2
    assert re.fullmatch(
        r"error: \d+% of the first 16 responses were cut off at rollout.max_new_tokens, 6, and "
        r"count as wrong; raise it, or set rollout.max_truncated to [\d.]+ or more to train all "
        r"the same\n", capsys.readouterr().err)
    assert not (directory / "checkpoints/0").exists() and not (directory / "model").exists()
    # Started again with a higher limit, or told to go on, it runs.
    longer = short | {"rollout.max_truncated": 1.0, "run.resume": True}
    assert main.main(["train", *small_runs.arguments(world, directory, **longer)]) == 0
    assert "responses were cut off at rollout.max_new_tokens, 6" in capsys.readouterr().out


def test_a_run_that_diverges_at_once_is_not_saved(world, tmp_path, capsys):
    directory = tmp_path / "run"
    changes = {"update.learning_rate": 1e20, "update.warmup_updates": 0, "checkpoint.every": 1,
               "evaluation.problems": 0}
    assert main.main(["train", *small_runs.arguments(world, directory, **changes)]) == 1
    assert capsys.readouterr().err == (
        "error: step 0: after its update the model gives no finite log-probs; nothing was saved; "
        "start a new run with a lower update.learning_rate\n")
    assert not (directory / "model").exists() and not (directory / "checkpoints").exists()


@pytest.mark.parametrize("bad", ["weights", "metrics"])
def test_a_run_that_diverges_names_the_last_good_checkpoint(world, tmp_path, capsys, monkeypatch,
                                                            bad):
    """Bad weights after the second update are found when they would be saved."""
    directory, train_step = tmp_path / "run", loop.train_step

    def diverging(run, step):
        if step == 1 and bad == "metrics":
            raise FloatingPointError("step 1: non-finite update/loss")
        found = train_step(run, step)
        if step == 1:
            run.train_state = dataclasses.replace(run.train_state, params=jax.tree.map(
                lambda weight: weight * np.float32(1e30), run.train_state.params))
        return found

    monkeypatch.setattr(loop, "train_step", diverging)
    changes = {"checkpoint.every": 1, "run.steps": 3, "evaluation.problems": 0}
    assert main.main(["train", *small_runs.arguments(world, directory, **changes)]) == 1
    reason = ("non-finite update/loss" if bad == "metrics"
              else "after its update the model gives no finite log-probs")
    assert capsys.readouterr().err == (
        f"error: step 1: {reason}; the last good checkpoint is {directory}/checkpoints/1: start a "
        f"new run from its model with --model.path {directory}/model and another run.directory, "
        "and with a lower update.learning_rate\n")
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["1"]
    assert run_export.exported_step(directory / "model") == 1


def test_a_directory_is_one_runs_at_a_time(finished, world, tmp_path, capsys):
    new = tmp_path / "run"
    arguments = small_runs.arguments(world, new)
    with runs.opened(small_runs.config(world, new)):
        error = refused(capsys, arguments)
        owner = json.loads((new / "claim.json").read_text())
        assert error == (f"run.directory: process {os.getpid()} on {owner['host']}, since "
                         f"{owner['since']}, uses {new}; wait for it, or choose another directory")
    assert not new.exists()         # the block has left nothing
    resumed = small_runs.arguments(world, finished.directory, **EVALUATED, **{"run.resume": True})
    with runs.opened(small_runs.config(world, finished.directory, **EVALUATED,
                                       **{"run.resume": True})):
        assert "wait for it" in refused(capsys, resumed)
    assert not (finished.directory / "claim.json").exists()


def test_a_claim_of_a_process_that_is_gone_is_in_nobodys_way(world, tmp_path):
    for text in ('{"process": 1, "host": "another", "since": "2026-01-01"}', ""):
        (tmp_path / "claim.json").write_text(text)
        with runs.opened(small_runs.config(world, tmp_path)) as directory:
            runs.write_config(small_runs.config(world, tmp_path), directory)
            assert json.loads((tmp_path / "claim.json").read_text())["process"] == os.getpid()
        assert not (tmp_path / "claim.json").exists()
        (tmp_path / "config.yaml").unlink()


def test_a_disk_without_locks_excludes_new_runs_and_lets_others_resume(world, tmp_path,
                                                                       monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / "claim.json").write_text("")
    with (pytest.raises(UserError, match=rf"has claimed {tmp_path}; if it has ended, remove "),
          runs.opened(small_runs.config(world, tmp_path))):
        pass
    runs.write_config(small_runs.config(world, tmp_path), tmp_path)
    with runs.opened(small_runs.config(world, tmp_path, **{"run.resume": True})):
        pass


def test_runs_of_the_same_second_have_directories_of_their_own(world, tmp_path, monkeypatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, zone):
            return cls(2026, 1, 2, 3, 4, 5, tzinfo=zone)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.datetime, "datetime", Clock)
    config = small_runs.config(world, "unused", **{"run.directory": None})
    with contextlib.ExitStack() as stack:
        names = [stack.enter_context(runs.opened(config)).name for _ in range(3)]
    assert names == [f"20260102-030405-alpha0.2-seed0{number}" for number in ("", "-2", "-3")]


def test_resuming_nothing_and_fewer_steps_than_were_done_are_refused(finished, world, tmp_path,
                                                                     capsys):
    error = refused(capsys, small_runs.arguments(world, tmp_path, **{"run.resume": True}))
    assert error == (f"run.directory: {tmp_path} holds no run to resume, "
                     f"{tmp_path / 'config.yaml'} does not exist")
    shutil.copytree(finished.directory, tmp_path / "run")
    changes = EVALUATED | {"run.resume": True, "run.steps": 4}
    error = refused(capsys, small_runs.arguments(world, tmp_path / "run", **changes))
    assert error == (f"run.steps must be at least the 6 steps that {tmp_path / 'run'} has done, "
                     "got 4")


def test_checkpoints_without_their_configuration_are_not_taken_over(world, tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with (pytest.raises(UserError, match="holds a run already"),
          runs.opened(small_runs.config(world, tmp_path))):
        pass


# Meshes


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"mesh.data": 2, "mesh.fsdp": 4},
                                  {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}],
                         ids=["fsdp", "tensor"])
def test_other_meshes_run_and_agree_with_the_first(finished, world, tmp_path, axes):
    changes = axes | {"run.steps": 2, "evaluation.problems": 0, "kl.form": "reward"}
    loop.train(small_runs.config(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "summary.json").exists()
    assert (tmp_path / "run" / "report.png").exists()
    found, expected = lasting(tmp_path / "run"), lasting(finished.directory)
    for name in ("rollout/tokens", "rollout/accuracy", "reward/mean", "update/loss",
                 "update/grad_norm"):
        assert found[0][name] == pytest.approx(expected[0][name], rel=1e-3, abs=1e-4), name
    assert len(found) == 2


def test_options_run(world, tmp_path, capsys):
    changes = {"kl.form": "loss", "advantage.group_std": True, "advantage.whiten": True,
               "update.updates_per_batch": 2, "update.aggregation": "sequence_mean",
               "evaluation.problems": 0, "run.steps": 1, "log.tensorboard": True,
               "rollout.top_p": 0.95, "model.dtype": "bfloat16"}
    loop.train(small_runs.config(world, tmp_path / "run", **changes))
    assert "warning: advantage.group_std" in capsys.readouterr().out
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def drawn(directory):
    """The groups that were learnt from, by step: correct and tokens by uid."""
    found = {}
    for row in read_json_lines(directory / "rollouts.jsonl"):
        found.setdefault(row["step"], {}).setdefault(row["uid"],
                                                     []).append((row["correct"], row["tokens"]))
    return found


REFILLED = {"evaluation.problems": 0, "run.steps": 2, "rollout.group_size": 2,
            "log.groups_per_step": 4}


def test_groups_without_a_signal_are_replaced_by_others(world, tmp_path):
    changes = REFILLED | {"reward.alpha": 0.0}
    loop.train(small_runs.config(world, tmp_path / "plain", **changes | {"run.steps": 1}))
    loop.train(small_runs.config(world, tmp_path / "run", **changes,
                                 **{"rollout.refill_rounds": 3}))
    for row in lasting(tmp_path / "run"):
        assert row["reward/groups_with_signal"] == 1 - row["rollout/lacking"]
        assert row["rollout/asked"] > 1 and unexplained(row) == set()
    plain, refilled = drawn(tmp_path / "plain")[0], drawn(tmp_path / "run")[0]
    teaching = {uid for uid, group in plain.items() if len({correct for correct, _ in group}) == 2}
    assert teaching < set(refilled) and set(refilled) - set(plain) and len(refilled) == 4
    assert all(refilled[uid] == plain[uid] for uid in teaching)
    for uid in set(refilled) - set(plain):  # only what teaches something comes in
        assert len({correct for correct, _ in refilled[uid]}) == 2


def test_groups_that_are_all_correct_stay_where_length_counts(world, tmp_path):
    loop.train(small_runs.config(world, tmp_path / "run", **REFILLED,
                                 **{"rollout.refill_rounds": 3}))
    groups = [group for step in drawn(tmp_path / "run").values() for group in step.values()]
    assert any(all(correct for correct, _ in group) and len({tokens for _, tokens in group}) == 2
               for group in groups)


def test_a_spread_that_is_too_small_is_no_signal(world, tmp_path):
    changes = REFILLED | {"rollout.refill_rounds": 1, "rollout.min_reward_spread": 0.5,
                          "run.steps": 1}
    loop.train(small_runs.config(world, tmp_path / "run", **changes))
    (row,) = lasting(tmp_path / "run")
    # All correct, rewards differ by alpha = 0.2 at most: only groups with right and wrong are taken
    # for a signal.
    mixed = [len({correct for correct, _ in group}) == 2
             for group in drawn(tmp_path / "run")[0].values()]
    assert row["reward/groups_with_signal"] == np.mean(mixed) == 1 - row["rollout/lacking"]


def test_a_step_that_is_stopped_while_it_refills_is_drawn_again(world, tmp_path):
    changes = REFILLED | {"reward.alpha": 0.0, "rollout.refill_rounds": 3}
    loop.train(small_runs.config(world, tmp_path / "run", **changes))
    rollout, sent = Progress.rollout, []

    def stopping(self, now):
        rollout(self, now)
        # fewer than a step's: a round that refills
        if self._done == 1 and now.total < 8 and not sent:
            sent.append(signal.raise_signal(signal.SIGTERM))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Progress, "rollout", stopping)
        loop.train(small_runs.config(world, tmp_path / "again", **changes))
    assert sent
    loop.train(small_runs.config(world, tmp_path / "again", **changes, **{"run.resume": True}))
    assert lasting(tmp_path / "again") == lasting(tmp_path / "run")
    for name in ("model/model.safetensors", "rollouts.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.slow
def test_alpha_follows_the_evaluations_and_a_resumed_run_goes_the_same_way(world, tmp_path):
    changes = {"reward.target_tokens": 0.2, "evaluation.every": 2, "checkpoint.every": 2}
    loop.train(small_runs.config(world, tmp_path / "run", **changes))
    trained = json.loads((tmp_path / "run" / "summary.json").read_text())["points"][1]
    assert (trained["alpha_start"], trained["alpha"]) == pytest.approx((0.2, 0.4))
    assert "α = 0.4" in (tmp_path / "run" / "model" / "README.md").read_text()
    rows = [row for row in lasting(tmp_path / "run") if "reward/alpha" in row]
    # too long still
    assert [row["reward/alpha"] for row in rows] == pytest.approx([0.2, 0.2, 0.3, 0.3, 0.4, 0.4])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, "within")
        loop.train(small_runs.config(world, tmp_path / "again", **changes))
    loop.train(small_runs.config(world, tmp_path / "again", **changes, **{"run.resume": True}))
    assert lasting(tmp_path / "again") == lasting(tmp_path / "run")


# Bad input, and a disk that is full


@contextlib.contextmanager
def full_disk():
    """Files cannot grow beyond a few bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# what orbax leaves half done
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("place", "name", "file"), [
    ((MetricsWriter, "write"), "metrics", "metrics.jsonl: cannot be written: "),
    ((Checkpoints, "save"), "checkpoint", "checkpoints/2: the checkpoint cannot be written ("),
    ((run_export, "export_model"), "export", "model: cannot be written: "),
], ids=["metrics", "checkpoint", "export"])
def test_a_full_disk_is_one_clear_error_and_costs_nothing_saved_before(world, tmp_path, monkeypatch,
                                                                       capfd, place, name, file):
    directory, original, calls = tmp_path / "run", getattr(*place), []

    def filling(*arguments, **settings):
        calls.append(1)
        with full_disk() if len(calls) == 2 else contextlib.nullcontext():
            return original(*arguments, **settings)

    monkeypatch.setattr(*place, filling)
    changes = {"evaluation.problems": 0, "checkpoint.every": 1, "run.steps": 3}
    error = refused(capfd, small_runs.arguments(world, directory, **changes))
    assert error.startswith(f"{directory}/{file}") and os.strerror(errno.EFBIG) in error
    monkeypatch.undo()
    steps = {"metrics": 1, "checkpoint": 2, "export": 2}[name]
    rows = read_json_lines(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(steps))
    assert {path.name for path in directory.iterdir()} == {
        "config.yaml", "environment.json", "metrics.jsonl", "rollouts.jsonl", "left_out.jsonl",
        "checkpoints", "model", "console.log"}
    with Checkpoints(directory / "checkpoints", keep=2) as saved:
        assert saved.latest == (2 if name == "export" else 1)
    read_weights(directory / "model", read_config(directory / "model"))


@pytest.mark.parametrize(("file", "change", "error"), [
    ("config.json", {"model_type": "gpt2"},
     'model_type "gpt2" is not supported, expected one of qwen2, qwen3, qwen3_moe, llama'),
    ("train.jsonl", '{"problem": "1+6", "answer": "7", "level"', ":17: not valid JSON ("),
    ("test.jsonl", '{"problem": "1+6"}', ":9: has no field 'answer', found problem"),
])
def test_bad_input_is_one_line_and_leaves_no_run(world, tmp_path, capsys, file, change, error):
    shutil.copytree(world, tmp_path / "world")
    path = next((tmp_path / "world").rglob(file))
    if isinstance(change, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        path.write_text(path.read_text() + change + "\n")
    changes = {"evaluation.problems": 20}
    message = refused(capsys, small_runs.arguments(tmp_path / "world", tmp_path / "run", **changes))
    assert message.startswith(f"{path}{error}" if error.startswith(":") else f"{path}: {error}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("changes", "error"), [
    ({"model.path": "/no/model"},
     "model.path must be tiny, a Hugging Face directory or an id on its Hub, /no/model"),
    ({"rollout.prompts_per_step": 32},
     "rollout.prompts_per_step must be at most the number of problems, 16, got 32"),
    ({"mesh.data": 3},
     "mesh: data 3 x fsdp 1 x tensor 1 x context 1 = 3, expected 8, the number of devices"),
    ({"mesh.fsdp": 4, "mesh.tensor": 2, "update.rows_per_micro_batch": 2},
     "mesh.data x mesh.fsdp must divide update."),
])
def test_a_configuration_that_does_not_fit_is_one_line_and_leaves_no_run(world, tmp_path, capsys,
                                                                         changes, error):
    message = refused(capsys, small_runs.arguments(world, tmp_path / "run", **changes))
    assert message.startswith(error)
    assert not (tmp_path / "run").exists()


# Checks within a step


def wrong_scores(monkeypatch, after):
    """The trainer scores at another temperature than it was sampled at, from the given call on."""
    make_engine, calls = session.make_engine, []

    def made(*arguments):
        engine = make_engine(*arguments)
        # A copy: other runs share the engine.
        learner, measure = copy.copy(engine.learner), engine.learner.measure

        def wrong_measure(packed, found, reference):
            calls.append(found.shape)
            with jax.transfer_guard("allow"):
                found = found * (1.5 if len(calls) > after else 1.0)
            return measure(packed, found, reference)

        learner.measure = wrong_measure
        return dataclasses.replace(engine, learner=learner)

    monkeypatch.setattr(session, "make_engine", made)


def test_a_trainer_that_scores_another_policy_than_was_sampled_never_starts(world, tmp_path, capsys,
                                                                            monkeypatch):
    wrong_scores(monkeypatch, after=0)
    error = refused(capsys, small_runs.arguments(world, tmp_path / "run"))
    assert re.match(
        r"before the first step: sampler and trainer give the same tokens log-probs [\d.]+ nats",
        error)
    monkeypatch.undo()
    # nothing is in the way
    loop.train(small_runs.config(world, tmp_path / "run", **{"run.steps": 1}))


def test_a_trainer_that_begins_to_disagree_stops_and_keeps_what_it_has(world, tmp_path,
                                                                       monkeypatch):
    # One measure for the check at the start, one for each step. The fourth step is the first wrong
    # one.
    wrong_scores(monkeypatch, after=1 + 3)
    with pytest.raises(parity.Mismatch, match="^step 3: sampler and trainer"):
        loop.train(small_runs.config(world, tmp_path / "run",
                                     **{"kl.form": "reward", "checkpoint.every": 6}))
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=2) as saved:
        assert saved.latest == 3
    assert [row["step"] for row in read_json_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


def test_mismatch_is_in_the_log_and_small(finished):
    rows = [row for row in read_json_lines(finished.directory / "metrics.jsonl")
            if "rollout/mismatch" in row]
    assert len(rows) == 6
    assert all(0 <= row["rollout/mismatch"] <= row["rollout/mismatch_max"] < 1e-4 for row in rows)


# The template belongs to the model


def test_a_run_cannot_go_on_with_a_template_that_has_changed(finished, world, tmp_path,
                                                             monkeypatch):
    shutil.copytree(finished.directory, tmp_path / "run")
    choose = templates.choose
    monkeypatch.setattr(templates, "choose", lambda *arguments: dataclasses.replace(
        choose(*arguments), text=choose(*arguments).text + " "))
    changes = EVALUATED | {"run.resume": True, "run.steps": 7}
    with pytest.raises(UserError,
                       match=r"^data\.template: the checkpoint was trained with the template"):
        loop.train(small_runs.config(world, tmp_path / "run", **changes))


@pytest.mark.parametrize(("file", "field"), [("train.jsonl", "data.path"),
                                             ("test.jsonl", "evaluation.path")])
def test_a_run_cannot_go_on_with_other_problems(finished, world, tmp_path, file, field):
    changed = Path(shutil.copytree(world, tmp_path / "world"))
    shutil.copytree(finished.directory, tmp_path / "run")
    rows = (changed / file).read_text().splitlines(keepends=True)
    (changed / file).write_text("".join([*rows[:-1], rows[-1].replace("+7", "+7+0")]))
    changes = EVALUATED | {"run.resume": True, "run.steps": 7, field: str(changed / file)}
    message = rf"^{field}: the problems have changed"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=message):
        # the same path, as far as it can tell
        patch.setattr(runs, "changes", lambda *fields: "")
        loop.train(small_runs.config(world, tmp_path / "run", **changes))


def test_what_is_not_trained_on_is_listed(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    rows = (world / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "world" / "train.jsonl").write_text(
        "".join([*rows, rows[3], (world / "test.jsonl").read_text()]))
    loop.train(small_runs.config(tmp_path / "world", tmp_path / "run",
                                 **{"run.steps": 1, "evaluation.problems": 2}))
    left = [json.loads(line)
            for line in (tmp_path / "run" / "left_out.jsonl").read_text().splitlines()]
    assert [row["number"] for row in left] == [16, *range(17, 25)]
    assert left[0]["text"] == json.loads(rows[3])["problem"]
    assert left[0]["reason"] != left[1]["reason"]


def test_an_export_says_what_it_was_trained_on_and_is_evaluated_on_nothing_else(finished, world):
    model = finished.directory / "model"
    facts = json.loads((model / "effreason.json").read_text())
    assert (facts["base_model"], facts["data"]) == ("base", ["train.jsonl"])
    assert (facts["step"], facts["alpha"]) == (6, 0.2)
    card = (model / "README.md").read_text()
    points = json.loads((finished.directory / "summary.json").read_text())["points"]
    for result in (measured["summary"] for point in points for measured in point["sets"].values()):
        assert f"{100 * result['accuracy']:.1f} %" in card and f"{result['tokens']:,.0f}" in card
    assert "α = 0.2" in card and "test.jsonl" in card and str(world) not in card
    assert facts["template"]["user_prompt"] == "{problem}"
    assert len(facts["template"]["sha256"]) == 64
    mesh = sharding.make_mesh(data=-1)
    for path in (model, finished.directory / "checkpoints" / "6"):
        opened = candidates.open_model(small_runs.config(world, "unused"), str(path), None, mesh)
        assert opened.facts["template"] == facts["template"]
        other = small_runs.config(world, "unused", **{"data.user_prompt": "Think. {problem}"})
        with pytest.raises(UserError, match=r"was trained with the template .* set "
                           r"data.template and data.user_prompt"):
            candidates.open_model(other, str(path), None, mesh)


def verdicts(**counts):
    return [Grade(False, None, status, 0.0, f"for {status}") for status in counts
            for _ in range(counts[status])]


def test_too_many_undecided_answers_end_the_run():
    rollouts.check_decided(verdicts(exact=98, budget=1, error=1))
    rollouts.check_decided(verdicts(exact=14, budget=2))           # too few to speak of a share
    with pytest.raises(UserError, match=r"^the grader could not decide 3 of 100 answers, "
                       r"at most 2 % are accepted; "
                       r"2 of them: for budget; raise grade\.step_budget_seconds"):
        rollouts.check_decided(verdicts(exact=97, budget=2, error=1))
    with pytest.raises(UserError, match=r"4 of them: for error$"):
        rollouts.check_decided(verdicts(exact=97, error=4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_ends_the_run(value):
    loop.check_finite({"update/loss": 1.0}, 3)
    with pytest.raises(FloatingPointError,
                       match=r"^step 3: non-finite update/loss, update/kl$"):
        loop.check_finite({"update/loss": value, "reward/mean": 1.0, "update/kl": value}, 3)
