"""The directory of a run: opened or resumed, and its files except metrics and checkpoints."""

import contextlib
import dataclasses
import datetime
import itertools
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from effreason.data.loading import evaluation_samples
from effreason.data.prompts import LeftOut
from effreason.evaluation.evaluate import max_new_tokens
from effreason.lm.hf.pretrained import CARD_FILE, recover_export
from effreason.rl import alpha_control, configured_reward
from effreason.runs import results as run_files
from effreason.runs.claim import claimed
from effreason.runs.export import origin
from effreason.runs.model_card import Cost, model_card
from effreason.runs.report import figures
from effreason.runs.report import page as report_page
from effreason.runs.report.summary import print_results
from effreason.runs.results import Measurement, Point, PointKind, Results, measure
from effreason.runs.session import Inputs
from effreason.runtime import config as configuration
from effreason.runtime import invocation, processes, progress, provenance
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError
from effreason.runtime.files import disk, json_line, read_json_lines, write_json
from effreason.runtime.metrics import MetricsWriter
from effreason.types import Outcomes

BeforeAfter = tuple[dict[str, Measurement], dict[str, Measurement]]

LOG = "console.log"                 # what was said while training, with the time
# What may change when a run is resumed: it decides no token and no weight, except by rounding.
RESUMABLE = (
    "run.steps", "run.resume", "run.directory", "checkpoint.", "log.", "distributed.", "mesh.",
    "grade.workers", "grade.cpu_seconds", "grade.wall_seconds", "grade.memory_mb",
    "grade.step_budget_seconds", "evaluation.every", "rollout.max_mismatch",
    "rollout.max_truncated", "rollout.slots", "rollout.memory_gib", "rollout.chunk",
    "rollout.cache_layout", "rollout.draft_tokens", "model.remat", "model.attention",
    "update.rows_per_micro_batch", "update.vocabulary_tile", "update.offload_optimizer",
    "kl.offload_reference", "export.")


@contextlib.contextmanager
def opened(config: Config, *, name: str | None = None, may_change: Sequence[str] = (),
           family: bool = False) -> Iterator[Path]:
    """Yields the run directory, which all processes must see; makes it unless it is resumed.

    It is claimed for the duration of the block: no other process can train there. A new one is
    removed again if the block leaves nothing in it.

    Args: name, of a new one, after the time; may_change, fields besides RESUMABLE that may differ
        when it is resumed; family, it holds or will hold one.
    Raises: UserError."""
    processes.check_same(configuration.facts(config))       # first: later exchanges depend on it
    with contextlib.ExitStack() as held:                    # by process 0
        directory = Path(processes.broadcast(
            "run directory", lambda: str(_claim(config, name, may_change, family, held))))
        processes.check_shared(directory, "run.directory")
        yield directory


def _claim(config: Config, name: str | None, may_change: Sequence[str], family: bool,
           held: contextlib.ExitStack) -> Path:
    """Makes or checks the run directory and claims it, in process 0.

    Raises: UserError if it holds another run, or if the configuration of a resumed run differs."""
    if config.run.directory is None:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        directory = _make_new(Path(
            f"runs/{now}-{name or f'alpha{config.reward.alpha:g}-seed{config.run.seed}'}"))
    else:
        directory = Path(config.run.directory)

    if config.run.resume:
        _check_resumed(config, directory, may_change, family)
    else:
        check_unused(directory, family)
        with disk(directory):
            directory.mkdir(parents=True, exist_ok=True)
        held.callback(_remove_empty, directory)

    report_page.check(directory / report_page.PAGE)
    held.enter_context(claimed(directory, resume=config.run.resume))
    if not config.run.resume:       # again: the owner of an earlier claim may just have ended
        check_unused(directory, family)
    for left_over in directory.glob(f"{processes.SIGHT}*"):
        left_over.unlink(missing_ok=True)
    with disk(directory / "model"):
        recover_export(directory / "model")
    return directory


def _make_new(directory: Path) -> Path:
    """Makes a directory of this name; if there is one, with -2, -3 and so on after it."""
    for number in itertools.count(2):
        with disk(directory):
            directory.parent.mkdir(parents=True, exist_ok=True)
            try:
                directory.mkdir()
                return directory
            except FileExistsError:
                stem = directory.name if number == 2 else directory.name.rpartition("-")[0]
                directory = directory.with_name(f"{stem}-{number}")
    raise AssertionError("a number is free")


def _remove_empty(directory: Path) -> None:
    """Removes a directory that no run was started in."""
    with contextlib.suppress(OSError):
        (directory / "checkpoints").rmdir()
    with contextlib.suppress(OSError):
        directory.rmdir()


@contextlib.contextmanager
def keeping_log(directory: Path) -> Iterator[None]:
    """Keeps what is said in the block in the run directory, unless no run was started there."""
    path = directory / LOG
    is_new = processes.is_primary() and not path.exists()
    try:
        with progress.kept(path) if processes.is_primary() else contextlib.nullcontext():
            yield
    finally:
        if is_new and not (directory / "config.yaml").exists():
            path.unlink(missing_ok=True)


def check_unused(directory: Path, family: bool) -> None:
    """Raises UserError if a directory holds a run. Args: family, one is to begin there."""
    files = ["config.yaml", *([] if family else [run_files.FAMILY_FILE])]
    if (any((directory / name).exists() for name in files)
            or any((directory / "checkpoints").glob("*"))):
        raise UserError(f"run.directory: {directory} holds a run already; resume it with "
                        "--run.resume true, or choose another directory")


def _check_resumed(config: Config, directory: Path, may_change: Sequence[str],
                   family: bool) -> None:
    """Raises UserError unless a directory holds a run, or family, of this configuration."""
    path = directory / "config.yaml"
    if not path.exists():
        raise UserError(f"run.directory: {directory} holds no run to resume, {path} does not exist")
    if (directory / run_files.FAMILY_FILE).exists() != family:
        raise UserError(f"run.directory: {directory} holds " + (
            "a run, which is resumed without --family" if family else
            "a family, which is resumed with its --family"))

    changed = changes(deciding(configuration.load(path), may_change), deciding(config, may_change))
    if changed:
        raise UserError(f"{path}: a resumed run must keep its configuration, found {changed}")


def deciding(config: Config, may_change: Sequence[str] = ()) -> dict[str, str]:
    """Returns the fields that decide a run's tokens and weights, as text.

    Args: may_change, further fields that do not."""
    fixed = set[str]()
    if alpha_control.is_on(config.reward):      # the times of the evaluations decide the weights
        fixed.add("evaluation.every")
    if config.update.schedule != "constant":    # which ends at the last step
        fixed.add("run.steps")
    allowed = tuple(field for field in (*RESUMABLE, *may_change) if field not in fixed)
    return {field: value for field, value in configuration.facts(config).items()
            if not field.startswith(allowed)}


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Returns the fields whose values differ, each as "field: before -> now"."""
    return "; ".join(f"{field}: {before.get(field)} -> {now.get(field)}"
                     for field in {**now, **before} if before.get(field) != now.get(field))


def check_unedited(config: Config, directory: Path, step: int, trained: Mapping[str, str]) -> None:
    """Raises UserError if the configuration is not that of the newest checkpoint.

    Args: step, of the checkpoint; trained, its deciding fields."""
    if edited := changes(trained, deciding(config)):
        raise UserError(
            f"{directory / 'config.yaml'}: was changed after checkpoint {step} was trained with "
            f"it, {edited}; change it back, or {train_on(directory)}")


def train_on(directory: Path) -> str:
    """Returns how to go on from a run's model with other settings."""
    model = shlex.quote(str(directory / "model"))
    return f"start a new run from its model with --model.path {model} and another run.directory"


def resume_command(directory: Path, arguments: str = "") -> str:
    """Returns the command that resumes a run. Args: arguments, further ones."""
    config = shlex.quote(str(directory / "config.yaml"))
    everywhere = " on every host" if processes.count() > 1 else ""
    return (f"{invocation.program('train')} --config {config} --run.resume true{arguments}"
            f"{everywhere}")


def write_config(config: Config, directory: Path) -> None:
    """Writes environment.json, and config.yaml, from which the run is resumed.

    The directory in it is the run's, so that the command works from anywhere."""
    run = dataclasses.replace(config.run, directory=str(directory), resume=False)
    shared = dataclasses.replace(config.distributed, process_id=None)       # differs between hosts
    with disk(directory):
        configuration.save(dataclasses.replace(config, run=run, distributed=shared),
                           directory / "config.yaml")
    write_json(directory / "environment.json", provenance.environment())


def write_left_out(rows: Sequence[LeftOut], directory: Path) -> None:
    """Writes the rows of the data that are not trained on, with the reasons."""
    path = directory / "left_out.jsonl"
    with disk(path):
        path.write_bytes(b"".join(json_line(dataclasses.asdict(row)) for row in rows))


def open_metrics(config: Config, directory: Path, start_step: int) -> MetricsWriter:
    """Opens the metrics files of a run; a process other than 0 writes nothing."""
    return MetricsWriter(directory if processes.is_primary() else None,
                         tensorboard=config.log.tensorboard, wandb=config.log.wandb,
                         start_step=start_step, config=dataclasses.asdict(config))


def compare(before: Mapping[str, Outcomes], after: Mapping[str, Outcomes]) -> BeforeAfter:
    """Measures a model before and after training on the same sets."""
    return measure(before), measure(before, after)


def made_with(config: Config, inputs: Inputs) -> dict[str, Any]:
    """Returns what results depend on besides the seed: fields of Results."""
    settings = config.evaluation
    return {"origin": origin(inputs), "environment": provenance.environment(), "sampling": {
        "temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k,
        "min_p": settings.min_p, "max_new_tokens": max_new_tokens(config),
        "samples": evaluation_samples(config)}}


def conclude(config: Config, inputs: Inputs, directory: Path, measured: BeforeAfter | None,
             wall_seconds: float, alpha: float) -> None:
    """Writes the results of a finished run, its pictures, page and model card, and prints them.

    Args: measured, None if nothing was evaluated; alpha, the last one."""
    base, trained = None, None
    if measured:
        base, trained = (next(iter(sets.values())).summary for sets in measured)
    # The page is written last: with it a run is complete.
    with disk(directory / "model"):
        (directory / report_page.PAGE).unlink(missing_ok=True)
        card = model_card(config, inputs, step=config.run.steps, alpha=alpha, before=base,
                          after=trained, cost=_cost(directory, wall_seconds))
        (directory / "model" / CARD_FILE).write_text(card, encoding="utf-8")

    console, results = Console(), None
    if measured:
        results = run_results(config, measured, wall_seconds, alpha, made_with(config, inputs))
        run_files.write(directory / run_files.RUN_FILE, results)
        print_results(console, results)

    figures.overview(read_json_lines(directory / "metrics.jsonl"), results,
                     directory / "report.png", model=config.model.path)
    page = report_page.write(directory)
    console.print(f"the trained model: {directory / 'model'}", soft_wrap=True)
    console.print(f"the report: {page}", soft_wrap=True)


def _cost(directory: Path, seconds: float) -> Cost | None:
    """Returns what the run has cost; None if none of its steps was measured."""
    rates = [row["rollout/tokens_per_second"] for row in read_json_lines(
        directory / "metrics.jsonl") if row.get("rollout/tokens_per_second")]
    if not rates:
        return None
    made = provenance.environment()
    return Cost(seconds=seconds, tokens_per_second=statistics.median(rates), device=made["device"],
                devices=made["device_count"])


def run_results(config: Config, measured: BeforeAfter, wall_seconds: float, alpha: float,
                made_with: Mapping[str, Any]) -> Results:
    """Returns the results of a run, a family of one member. Args: alpha, the last one."""
    base, trained = measured
    has_alpha = (config.update.objective == "policy_gradient"
                 and configured_reward.has_alpha(config.reward))
    return Results(
        model=config.model.path, seed=config.run.seed, steps=config.run.steps, **made_with, points=[
            Point(name="base", kind=PointKind.BASE, sets=base,
                  directory=run_files.evaluations(Path(), 0).as_posix()),
            Point(name="trained", kind=PointKind.MEMBER, sets=trained, directory=".",
                  alpha=alpha if has_alpha else None,
                  alpha_start=config.reward.alpha if has_alpha else None, seconds=wall_seconds)])
