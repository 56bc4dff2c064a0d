"""The training loop: prompts, rollouts, grades, rewards, advantages, update, checkpoints; then the report."""

import dataclasses
import datetime
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from effreason import evaluation, prompts, report, rollouts, update
from effreason.checkpoints import Checkpoints
from effreason.engine import Engine, check_model, make_engine
from effreason.errors import Interrupted, UserError
from effreason.grades import Grade, Grader
from effreason.lm import hf, model
from effreason.records import Evaluation, Problem
from effreason.runtime import config as configuration
from effreason.runtime import sharding
from effreason.runtime.config import Config
from effreason.runtime.interrupts import Interrupts
from effreason.runtime.metrics import MetricsWriter, Progress, disk, read_rows, write_json

# What may differ between a run and its continuation: nothing that decides a token or a weight.
RESUMABLE = ("run.steps", "run.resume", "run.directory", "checkpoint.", "log.", "grade.workers", "grade.cpu_seconds",
             "grade.wall_seconds", "grade.memory_mb", "grade.step_budget_seconds", "evaluation.every")


def train(config: Config) -> None:
    """Trains, evaluates before and after, and leaves everything in the run directory.

    Raises: UserError for bad input; Interrupted, with the state saved, on SIGTERM or Ctrl-C."""
    started = time.monotonic()
    sharding.use_compilation_cache()
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    pretrained = hf.open_pretrained(config.model.path, dtype=config.model.dtype, remat=config.model.remat)
    problems = prompts.load(config.data, config.data.path, pretrained.tokenizer)
    prompts.batch(problems, config.rollout.prompts_per_step, config.run.seed, 0)    # too few problems: say so now
    held_out = evaluation.held_out(config, pretrained.tokenizer) if config.evaluation.problems else []
    check_model(pretrained, config, mesh)
    engine = make_engine(config, pretrained, mesh)
    reference = hf.load(pretrained.directory, pretrained.decoder, engine.params_sharding)
    directory = open_run(config)

    with (jax.set_mesh(mesh), Interrupts() as interrupts, evaluation.make_grader(config) as grader,
          Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep) as saved):
        if saved.latest is None:
            state, spent = engine.initial_state(jax.tree.map(lambda weight: weight.copy(), reference)), 0.0
        else:
            state, spent = saved.restore(engine.abstract_state)
        started -= spent            # wall seconds include those of the processes before a resume
        start = int(sharding.to_host(state.step))
        if start > config.run.steps:
            raise UserError(f"run.steps must be at least the {start} steps that {directory} has done, "
                            f"got {config.run.steps}")
        write_config(config, directory)

        def save(state: update.TrainState) -> None:
            step = int(sharding.to_host(state.step))
            saved.save(step, state, wall_seconds=time.monotonic() - started)
            with disk(directory / "model"):
                hf.export(state.params, pretrained.decoder, pretrained.directory, directory / "model")

        with (MetricsWriter(directory, tensorboard=config.log.tensorboard, wandb=config.log.wandb, start_step=start,
                            config=dataclasses.asdict(config)) as writer,
              Progress(config.run.steps, start_step=start) as progress):

            def watch(finished: int, total: int, tokens: int) -> None:
                interrupts.check()
                progress.rollout(finished, total, tokens)

            step = make_step(config, engine, pretrained, problems, reference, grader, watch)
            evaluate = evaluation.make_evaluator(config, pretrained, mesh, held_out, grader)
            if config.advantage.group_std:
                progress.say("warning: advantage.group_std takes reward.alpha out of groups that are all correct")
            if config.advantage.whiten:
                progress.say("warning: advantage.whiten pulls on length even at reward.alpha 0: run that control too")
            if unmatched := grader.check_golds([problem.answer for problem in problems]):
                progress.say(f"warning: {len(unmatched)} of {len(problems)} reference answers can match no response, "
                             f"such as {problems[unmatched[0]].answer[:60]!r}")
            try:
                base = evaluate_base(evaluate, reference, directory, progress, watch) if held_out else None
                for index in range(start, config.run.steps):
                    # Before the step, in a row of its own: when this is stopped, a resumed run begins with it again.
                    if held_out and config.evaluation.every and index and index % config.evaluation.every == 0:
                        result = evaluate(state.params, watch)
                        writer.write(index, {"evaluation/accuracy": result.accuracy,
                                             "evaluation/tokens": result.tokens})
                    state, metrics, samples = step(state, index)
                    writer.write(index, metrics)
                    writer.samples(index, samples)
                    progress.step(index, metrics)
                    if (index + 1) % config.checkpoint.every == 0 or index + 1 == config.run.steps:
                        save(state)
                    interrupts.check()
                trained = evaluate(state.params, watch) if held_out else None
            except evaluation.Undecided:
                save(state)
                raise
            except Interrupted as stop:
                save(state)
                done = int(sharding.to_host(state.step))
                path = shlex.quote(str(directory / "config.yaml"))
                raise Interrupted(stop.signum, f"{stop.message} after step {done} of {config.run.steps}, saved; go on "
                                  f"with: python train.py --config {path} --run.resume true") from None
    conclude(config, directory, base, trained, time.monotonic() - started)


def make_step(config: Config, engine: Engine, pretrained: hf.Pretrained, problems: Sequence[Problem],
              reference: model.Params, grader: Grader, watch: evaluation.Watch):
    """step(state, index) -> (state, metrics, samples): the seven stages in order.

    The state passed in is donated to the update, the last stage: what fails or stops before it leaves it whole."""
    settings = config.rollout

    def step(state: update.TrainState, index: int) -> tuple[update.TrainState, dict[str, float], list[dict[str, Any]]]:
        times = [time.monotonic()]
        batch = prompts.batch(problems, settings.prompts_per_step, config.run.seed, index)

        key = rollouts.step_key(config.run.seed, "train", index)
        with jax.transfer_guard("disallow"):
            sampled = evaluation.gather(engine.sample, state.params, batch, settings.group_size, key, watch)
        times.append(time.monotonic())

        texts = evaluation.texts(sampled, pretrained.tokenizer)
        correct, verdicts = evaluation.grade(sampled, texts, batch, grader, require_eos=config.grade.require_eos)
        times.append(time.monotonic())

        packed = update.pack(sampled, config.mesh.context)
        with jax.transfer_guard("disallow"):
            tokens = sharding.to_device(packed["tokens"], engine.rows_sharding)
            verdict, lengths, prompt_lengths = sharding.to_device(
                (correct, sampled.lengths, packed["prompt_lengths"]), engine.replicated)
            old = engine.score(state.params, tokens)
            fixed = engine.score(reference, tokens) if config.kl.form != "none" else old
            experience, reward, credited = engine.credit(verdict, lengths, prompt_lengths, tokens, old, fixed)
            state, updated = engine.update(state, experience)
            reward, credited, updated = sharding.to_host((reward, credited, updated))
        times.append(time.monotonic())

        count = int(sampled.lengths.sum())
        rollout_seconds, grade_seconds, update_seconds = np.diff(times)
        metrics = {name: float(value) for name, value in credited.items()} | {
            f"update/{name}": float(value) for name, value in updated.items()} | {
            "reward/alpha": config.reward.alpha,
            "rollout/accuracy": float(correct.mean()),
            "rollout/tokens": float(sampled.lengths.mean()),
            "rollout/truncated": float(1.0 - sampled.ended.mean()),
            "rollout/tokens_per_second": count / rollout_seconds,
            "update/tokens_per_second": count / update_seconds,
            "time/rollout": float(rollout_seconds), "time/grade": float(grade_seconds),
            "time/update": float(update_seconds), "time/step": times[-1] - times[0]}
        statuses = Counter(verdict.status for verdict in verdicts)
        metrics |= {f"grade/{status}": number / len(verdicts) for status, number in sorted(statuses.items())}
        check_finite(metrics, index)
        wanted = min(config.log.samples_per_step, len(texts))
        shown = [row * len(texts) // wanted for row in range(wanted)]       # from as many different prompts as can be
        samples = [describe(row, batch, settings.group_size, texts, sampled, correct, reward, verdicts)
                   for row in shown]
        return state, metrics, samples

    return step


def describe(row: int, batch: Sequence[Problem], group_size: int, texts: Sequence[str], sampled: Any,
             correct: np.ndarray, reward: np.ndarray, verdicts: Sequence[Grade]) -> dict[str, Any]:
    """One rollout for people to read."""
    at = divmod(row, group_size)
    problem = batch[at[0]]
    return {"uid": problem.uid, "sample": at[1], "level": problem.level, "problem": problem.text,
            "reference_answer": problem.answer, "response": texts[row], "answer": verdicts[row].answer,
            "status": verdicts[row].status, "correct": bool(correct[at]), "reward": float(reward[at]),
            "tokens": int(sampled.lengths[at]), "ended": bool(sampled.ended[at])}


def evaluate_base(evaluate: Any, reference: model.Params, directory: Path, progress: Progress,
                  watch: evaluation.Watch) -> Evaluation:
    """The model before training; kept in the run directory, so that a resumed run does not sample it again."""
    path = directory / "base.json"
    if path.exists():
        return evaluation.from_table(hf.read_json(path))
    progress.say("evaluating the model before training")
    base = evaluate(reference, watch)
    write_json(path, dataclasses.asdict(base))
    return base


def check_finite(metrics: dict[str, float], step: int) -> None:
    """Raises FloatingPointError naming what has become NaN or infinite; nothing is saved after that."""
    bad = [name for name, value in metrics.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(f"step {step}: non-finite {', '.join(bad)}")


def open_run(config: Config) -> Path:
    """The run directory.

    Raises: UserError for a directory that holds another run, or a resume that would not be the same run."""
    named = config.run.directory
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    directory = Path(named or f"runs/{now}-alpha{config.reward.alpha:g}-seed{config.run.seed}")
    path = directory / "config.yaml"
    if config.run.resume:
        if not path.exists():
            raise UserError(f"run.directory: {directory} holds no run to resume, {path} does not exist")
        changed = [line for line in configuration.differences(configuration.load(path), config)
                   if not line.startswith(RESUMABLE)]
        if changed:
            raise UserError(f"{path}: a resumed run must keep its configuration, found {'; '.join(changed)}")
    elif path.exists() or (directory / "checkpoints").exists():
        raise UserError(f"run.directory: {directory} holds a run already; resume it with --run.resume true, or choose "
                        "another directory")
    with disk(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def write_config(config: Config, directory: Path) -> None:
    """The resolved configuration, from which the run can be resumed wherever the command is given."""
    run = dataclasses.replace(config.run, directory=str(directory), resume=False)
    with disk(directory):
        configuration.save(dataclasses.replace(config, run=run), directory / "config.yaml")


def conclude(config: Config, directory: Path, base: Evaluation | None, trained: Evaluation | None,
             wall_seconds: float) -> None:
    """The table, summary.json and report.png of a finished run."""
    summary = report.summary(config, base, trained, wall_seconds) if base and trained else None
    console = Console()
    if summary is not None:
        write_json(directory / "summary.json", summary)
        report.print_table(console, summary)
    report.plot(read_rows(directory / "metrics.jsonl"), summary, directory / "report.png", model=config.model.path)
    console.print(f"the trained model: {directory / 'model'}", soft_wrap=True)
    console.print(f"the picture: {directory / 'report.png'}", soft_wrap=True)
