"""The directory of a run: made or found again, and what is written into it beside metrics and checkpoints."""

import dataclasses
import datetime
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from effreason.data.loading import evaluation_samples
from effreason.data.prompts import LeftOut
from effreason.lm.hf.pretrained import CARD_FILE
from effreason.rl import alpha_control, configured_reward
from effreason.runs import results as run_files
from effreason.runs.export import origin
from effreason.runs.model_card import model_card
from effreason.runs.report import figures
from effreason.runs.report import page as pages
from effreason.runs.report.summary import print_results
from effreason.runs.results import Measurement, Point, PointKind, Results, measure
from effreason.runs.session import Inputs
from effreason.runtime import config as configuration
from effreason.runtime import processes, provenance
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError
from effreason.runtime.files import disk, read_json_lines, write_json
from effreason.runtime.metrics import MetricsWriter
from effreason.types import Outcomes

BeforeAfter = tuple[dict[str, Measurement], dict[str, Measurement]]

# What may differ between a run and its continuation: nothing that decides a token or a weight, but for rounding.
RESUMABLE = ("run.steps", "run.resume", "run.directory", "checkpoint.", "log.", "grade.workers", "grade.cpu_seconds",
             "grade.wall_seconds", "grade.memory_mb", "grade.step_budget_seconds", "evaluation.every", "distributed.",
             "rollout.max_mismatch", "rollout.slots", "rollout.memory_gib", "rollout.chunk", "rollout.cache_layout",
             "model.remat", "model.attention", "update.rows_per_micro_batch", "update.vocabulary_tile",
             "update.offload_optimizer", "kl.offload_reference", "mesh.")


def open_run(config: Config, *, name: str | None = None, free: Sequence[str] = (), family: bool = False) -> Path:
    """The run directory, which all processes must see.

    Args: name, what follows the time in the name of a new one; free, fields that may differ on resume beyond RESUMABLE;
        family, it is to hold one.
    Raises: UserError."""
    directory = Path(processes.broadcast("run directory", lambda: str(_make_directory(config, name, free, family))))
    processes.check_shared(directory, "run.directory")
    return directory


def _make_directory(config: Config, name: str | None, free: Sequence[str], family: bool) -> Path:
    """The run directory, as process 0 finds or makes it.

    Raises: UserError for a directory that holds another run, or a resume that would not be the same run."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    name = name or f"alpha{config.reward.alpha:g}-seed{config.run.seed}"
    directory = Path(config.run.directory or f"runs/{now}-{name}")
    path = directory / "config.yaml"
    if config.run.resume:
        if not path.exists():
            raise UserError(f"run.directory: {directory} holds no run to resume, {path} does not exist")
        if (directory / run_files.FAMILY_FILE).exists() != family:
            raise UserError(f"run.directory: {directory} holds a run, which is resumed without --family" if family else
                            f"run.directory: {directory} holds a family, which is resumed with its --family")
        # Where evaluations move alpha, when there is one decides the weights.
        allowed = tuple(field for field in RESUMABLE if field != "evaluation.every" or not alpha_control.is_on(config.reward))
        changed = [line for line in configuration.differences(configuration.load(path), config)
                   if not line.startswith((*allowed, *free))]
        if changed:
            raise UserError(f"{path}: a resumed run must keep its configuration, found {'; '.join(changed)}")
    elif path.exists() or any((directory / "checkpoints").glob("*")):
        raise UserError(f"run.directory: {directory} holds a run already; resume it with --run.resume true, or choose "
                        "another directory")
    pages.check(directory / pages.PAGE)
    with disk(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def resume(directory: Path, more: str = "") -> str:
    """The command that goes on with a run. Args: more, further arguments."""
    where = " on every host" if processes.count() > 1 else ""
    return f"python train.py --config {shlex.quote(str(directory / 'config.yaml'))} --run.resume true{more}{where}"


def write_config(config: Config, directory: Path) -> None:
    """The resolved configuration, from which the run can be resumed wherever the command is given; the environment."""
    run = dataclasses.replace(config.run, directory=str(directory), resume=False)
    everywhere = dataclasses.replace(config.distributed, process_id=None)       # that one is a host's own
    with disk(directory):
        configuration.save(dataclasses.replace(config, run=run, distributed=everywhere), directory / "config.yaml")
    write_json(directory / "environment.json", provenance.environment())


def write_left_out(rows: Sequence[LeftOut], directory: Path) -> None:
    """Every row of the data that is not trained on, and why, for people to look through."""
    text = "".join(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows)
    with disk(directory / "left_out.jsonl"):
        (directory / "left_out.jsonl").write_text(text, encoding="utf-8")


def open_metrics(config: Config, directory: Path, start_step: int) -> MetricsWriter:
    """Opens the metrics files of a run; a process other than 0 writes nothing."""
    return MetricsWriter(directory if processes.is_primary() else None,
                         tensorboard=config.log.tensorboard, wandb=config.log.wandb,
                         start_step=start_step, config=dataclasses.asdict(config))


def evaluations(directory: Path, step: int) -> Path:
    """Where a run's graded responses after `step` steps are: one file for each set."""
    return directory / "evaluations" / f"step{step}"


def compare(before: Mapping[str, Outcomes],
            after: Mapping[str, Outcomes]) -> BeforeAfter:
    """Measures a model before and after training on the same sets."""
    return measure(before), measure(before, after)


def made_with(config: Config, inputs: Inputs) -> dict[str, Any]:
    """What a result depends on beside its seed, for those who want to get it again."""
    settings = config.evaluation
    return {"origin": origin(inputs), "sampling": {
        "temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k, "min_p": settings.min_p,
        "max_new_tokens": settings.max_new_tokens or config.rollout.max_new_tokens,
        "samples": evaluation_samples(config)}, "environment": provenance.environment()}


def conclude(config: Config, inputs: Inputs, directory: Path, measured: BeforeAfter | None,
             wall_seconds: float, alpha: float) -> None:
    """Writes the results of a finished run, its pictures, page and model card, and prints them.

    Args: measured, None if nothing was evaluated; alpha, the last one."""
    base, trained = (next(iter(sets.values())).summary for sets in measured) if measured else (None, None)
    with disk(directory / "model"):
        text = model_card(config, inputs, step=config.run.steps, alpha=alpha, before=base, after=trained)
        (directory / "model" / CARD_FILE).write_text(text, encoding="utf-8")

    console, results = Console(), None
    if measured:
        results = run_results(config, measured, wall_seconds, alpha, made_with(config, inputs))
        run_files.write(directory / run_files.RUN_FILE, results)
        print_results(console, results)
    figures.overview(read_json_lines(directory / "metrics.jsonl"), results, directory / "report.png",
                     model=config.model.path)
    page = pages.write(directory)
    console.print(f"the trained model: {directory / 'model'}", soft_wrap=True)
    console.print(f"the report: {page}", soft_wrap=True)


def run_results(config: Config, measured: BeforeAfter, wall_seconds: float, alpha: float,
                provenance: Mapping[str, Any]) -> Results:
    """Returns the results of a run, a family of one member. Args: alpha, the last one."""
    (base, trained), objective = measured, config.update.objective
    has_alpha = objective == "policy_gradient" and configured_reward.has_alpha(config.reward)
    return Results(
        model=config.model.path, seed=config.run.seed, steps=config.run.steps, **provenance, points=[
            Point(name="base", kind=PointKind.BASE, sets=base,
                  directory=evaluations(Path(), 0).as_posix()),
            Point(name="trained", kind=PointKind.MEMBER, sets=trained, directory=".",
                  alpha=alpha if has_alpha else None,
                  alpha_start=config.reward.alpha if has_alpha else None, seconds=wall_seconds)])
