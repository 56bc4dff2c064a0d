"""The training loop: prompts, rollouts, grades, rewards, advantages, update, checkpoints; then the report."""

import dataclasses
import datetime
import functools
import json
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from effreason import attempts, evaluation, packing, parity, prompts, report, rollouts, unfinished, update
from effreason.checkpoints import Checkpoints
from effreason.engine import Engine, make_engine
from effreason.errors import Interrupted, UserError
from effreason.exports import card, export, origin
from effreason.grades import Grader
from effreason.inputs import Inputs, in_common, open_inputs
from effreason.lm import hf, model
from effreason.records import LOOP, Evaluation, Experience, Packed, Problem, Rollouts
from effreason.runtime import config as configuration
from effreason.runtime import processes, sharding
from effreason.runtime.config import Config
from effreason.runtime.interrupts import Interrupts
from effreason.runtime.metrics import MetricsWriter, Unwritten, disk, read_rows, write_json
from effreason.runtime.progress import Headway, Progress, say
from effreason.sampling import memory

# What may differ between a run and its continuation: nothing that decides a token or a weight, but for rounding.
RESUMABLE = ("run.steps", "run.resume", "run.directory", "checkpoint.", "log.", "grade.workers", "grade.cpu_seconds",
             "grade.wall_seconds", "grade.memory_mb", "grade.step_budget_seconds", "evaluation.every", "distributed.",
             "rollout.max_mismatch", "rollout.slots", "rollout.memory_gib", "rollout.chunk", "rollout.cache_layout",
             "model.remat", "model.attention", "update.rows_per_micro_batch", "update.vocabulary_tile",
             "update.offload_optimizer", "kl.offload_reference", "mesh.")


def train(config: Config) -> None:
    """Trains, evaluates before and after, and leaves everything in the run directory.

    Raises: UserError for bad input; Interrupted, with the state saved, on SIGTERM or Ctrl-C."""
    started = time.monotonic()
    processes.check_same(configuration.facts(config))       # what differs would be asked for in other ways
    sharding.use_compilation_cache()
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    with jax.set_mesh(mesh), Interrupts() as interrupts, evaluation.make_grader(config) as grader:
        inputs = open_inputs(config, mesh, grader)
        processes.check_same(in_common(inputs))
        sampler = memory.describe(config, inputs.pretrained.decoder, mesh, memory.training(config))
        for line in [*inputs.notes, sampler, *warnings(config)]:    # before the weights: there may be something to mend
            say(line, processes.console())
        # A resumed run takes the very weights it began with, wherever the branch has moved since.
        config = dataclasses.replace(config, model=dataclasses.replace(
            config.model, revision=inputs.pretrained.revision))
        engine = make_engine(config, inputs.pretrained, mesh, longest_prompt(inputs.problems))
        directory = open_run(config)
        processes.advise(f"start all of them again, or, once there is a checkpoint, {resume(directory)}")
        weights = hf.load_weights(inputs.pretrained, engine.learning.params_sharding)
        reference = engine.learning.as_reference(weights)
        with Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep) as saved:
            state, facts = begin(engine, saved, weights, inputs)
            del weights
            started -= facts["wall_seconds"]        # those of the processes before a resume count too
            start = int(sharding.to_host(state.step))
            if start > config.run.steps:
                raise UserError(f"run.steps must be at least the {start} steps that {directory} has done, "
                                f"got {config.run.steps}")
            agreement = check_parity(config, engine, inputs.problems, state, reference,
                                     lambda now: interrupts.check())
            if processes.first():
                write_config(config, directory)
                write_left_out(inputs.problems.left_out, directory)
            with (open_metrics(config, directory, start) as writer,
                  Progress(config.run.steps, start_step=start,
                           console=None if processes.first() else processes.console()) as progress):

                def watch(now: Headway) -> None:
                    interrupts.check()
                    progress.rollout(now)

                def save(state: update.TrainState) -> None:
                    step = int(sharding.to_host(state.step))
                    facts = origin(inputs) | {"wall_seconds": time.monotonic() - started, "lengths": lengths}
                    saved.save(step, state, facts=facts)
                    export(state.params, step, config, inputs, directory / "model", base)
                    processes.decided("saved", lambda: None)        # none ends while process 0 still writes

                base = None
                lengths = {int(uid): tokens for uid, tokens in facts.get("lengths", {}).items()}
                step = make_step(config, engine, inputs, reference, grader, watch, lengths, directory)
                evaluate = evaluation.make_evaluator(config, inputs.pretrained, engine.sampler, inputs.held_out, grader)
                progress.say(agreement)
                try:
                    known: dict[int, float] = {}
                    if inputs.held_out:
                        original = jax.device_put(reference, engine.learning.params_sharding)
                        base, known = evaluate_base(evaluate, original, directory, progress, watch)
                        del original
                    for index in range(start, config.run.steps):
                        # Before the step, in a row of its own: when this is stopped, a resumed run begins with it.
                        if inputs.held_out and config.evaluation.every and index % config.evaluation.every == 0 < index:
                            result, _ = evaluate(state.params, watch, known)
                            writer.write(index, {"evaluation/accuracy": result.accuracy,
                                                 "evaluation/tokens": result.tokens})
                        state, metrics, samples = step(state, index)
                        writer.write(index, metrics)
                        writer.samples(index, samples)
                        progress.step(index, metrics)
                        if (index + 1) % config.checkpoint.every == 0 or index + 1 == config.run.steps:
                            save(state)
                        interrupts.check()
                    trained = evaluate(state.params, watch, known)[0] if inputs.held_out else None
                except (attempts.Undecided, parity.Mismatch):
                    save(state)
                    raise
                except Interrupted as stop:
                    save(state)
                    done = int(sharding.to_host(state.step))
                    raise Interrupted(stop.signum, f"{stop.message} after step {done} of {config.run.steps}, saved; go "
                                      f"on with: {resume(directory)}" if processes.first() else "") from None
    if processes.first():
        conclude(config, inputs, directory, base, trained, time.monotonic() - started)


def resume(directory: Path) -> str:
    """The command that goes on with a run."""
    where = " on every host" if processes.count() > 1 else ""
    return f"python train.py --config {shlex.quote(str(directory / 'config.yaml'))} --run.resume true{where}"


def open_metrics(config: Config, directory: Path, start_step: int) -> MetricsWriter | Unwritten:
    """What writes the metrics: nothing, but in process 0."""
    return MetricsWriter(directory, tensorboard=config.log.tensorboard, wandb=config.log.wandb, start_step=start_step,
                         config=dataclasses.asdict(config)) if processes.first() else Unwritten()


def begin(engine: Engine, saved: Checkpoints, weights: model.Params,
          inputs: Inputs) -> tuple[update.TrainState, dict[str, Any]]:
    """The newest saved state, or a first one, and the facts saved with it.

    Raises: UserError where the checkpoint was trained with another template or on other problems."""
    latest = processes.decided("newest checkpoint", lambda: saved.latest)
    if latest is None:
        # A copy: in float32 the reference may be these very arrays, and the state is donated at each update.
        return engine.learning.initial_state(jax.tree.map(lambda weight: weight.copy(), weights)), {
            "wall_seconds": 0.0, "lengths": {}}
    state, facts = saved.restore(engine.learning.abstract_state, latest)
    if facts["template"]["sha256"] != inputs.template.sha256:
        raise UserError(f"data.template: the checkpoint was trained with the template {facts['template']['name']}, "
                        f"whose text has changed since (sha256 {facts['template']['sha256'][:12]}, now "
                        f"{inputs.template.sha256[:12]})")
    now = origin(inputs)
    for field, fact in (("data.path", "problems_sha256"), ("evaluation.path", "held_out_sha256")):
        if facts[fact] != now[fact]:
            raise UserError(f"{field}: the problems have changed since the checkpoint (sha256 {facts[fact][:12]}, now "
                            f"{now[fact][:12]}); a resumed run needs the same ones")
    return state, facts


def longest_prompt(problems: prompts.Problems) -> int:
    """In tokens, of all that is trained on: what the rows must have room for."""
    return max(len(problem.prompt) for source in problems.sources for problem in source.problems)


def warnings(config: Config) -> list[str]:
    """What a user may not expect of these settings."""
    lines = []
    if config.advantage.group_std:
        lines.append("warning: advantage.group_std takes reward.alpha out of groups that are all correct")
    if config.advantage.whiten:
        lines.append("warning: advantage.whiten pulls on length even at reward.alpha 0: run that control too")
    if config.rollout.top_p < 1 or config.rollout.top_k is not None or config.rollout.min_p > 0:
        lines.append("warning: rollout.top_p, top_k and min_p sample from less than the policy that is updated")
    return lines


def check_parity(config: Config, engine: Engine, problems: prompts.Problems, state: update.TrainState,
                 reference: model.Params, watch: attempts.Watch) -> str:
    """Samples a few tokens for the first step's problems and scores them; returns the line that says what was found.

    Raises: parity.Mismatch."""
    settings = config.rollout
    batch = prompts.batch(problems, settings.prompts_per_step, config.run.seed, 0)
    key = rollouts.step_key(config.run.seed, "parity", 0)
    with jax.transfer_guard("disallow"):
        requests = rollouts.make_requests(batch, settings.group_size,
                                          min(parity.START_TOKENS, settings.max_new_tokens))
        responses, _ = attempts.generate(
            lambda requests: engine.sampler(state.params, requests, key, engine.sampling), requests, watch)
        sampled = rollouts.collect(batch, responses, settings.group_size)
        wrong = np.zeros(sampled.lengths.shape, bool)
        found = measured(make_experience(config, engine, state, reference, sampled, wrong).metrics)
    parity.check(found, config, "before the first step")
    return (f"parity: sampler and trainer are {found['rollout/mismatch']:.1e} nats apart on {sampled.lengths.sum():,} "
            f"tokens (at most {parity.limit(config):g} accepted)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A step's responses, packed and credited, on the devices."""

    packed: Packed
    experience: tuple[Experience, ...]
    rewards: jax.Array              # float32[P, G]
    metrics: dict[str, jax.Array]
    fill: float                     # share of the rows' positions that hold a token


def make_experience(config: Config, engine: Engine, state: update.TrainState, reference: model.Params,
                    sampled: Rollouts, correct: np.ndarray) -> Batch:
    """Stages 4 and 5, on the device: rewards and advantages, and the rows the update learns from."""
    learning = engine.learning
    laid = learning.pack(sampled)
    packed = sharding.to_device(laid, learning.packed_sharding)
    logprobs = packing.in_line(sampled.logprobs, laid.places.shape[1])
    verdict, lengths, logprobs = sharding.to_device((correct, sampled.lengths, logprobs), learning.replicated)
    old = learning.score(state.params, packed)
    fixed = learning.score_reference(reference, packed) if config.kl.form != "none" else old
    experience, reward, metrics = learning.credit(verdict, lengths, logprobs, old, fixed, packed)
    return Batch(packed=packed, experience=experience, rewards=reward, metrics=metrics, fill=packing.fill(laid))


def measured(*metrics: dict[str, jax.Array]) -> dict[str, float]:
    """Metrics on the host; of several updates their means."""
    found = sharding.to_host(metrics)
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def make_step(config: Config, engine: Engine, inputs: Inputs, reference: model.Params, grader: Grader,
              watch: attempts.Watch, lengths: dict[int, float], directory: Path):
    """step(state, index) -> (state, metrics, samples): the seven stages in order.

    The state passed in is donated to the update, the last stage: what fails or stops before it leaves it whole.
    Args: lengths, mean tokens by uid when a problem was sampled last, kept up to date; directory, of the run, where the
        responses of a step that is stopped are kept."""
    settings, path = config.rollout, directory / unfinished.FILE

    def step(state: update.TrainState, index: int) -> tuple[update.TrainState, dict[str, float], list[dict[str, Any]]]:
        began = time.monotonic()
        batch = prompts.batch(inputs.problems, settings.prompts_per_step, config.run.seed, index)

        key = rollouts.step_key(config.run.seed, "train", index)
        with jax.transfer_guard("disallow"):
            tried = attempts.attempt(
                lambda requests: engine.sampler(state.params, requests, key, engine.sampling), batch,
                settings.group_size, settings.max_new_tokens, tokenizer=inputs.pretrained.tokenizer, grader=grader,
                require_eos=config.grade.require_eos, watch=watch, expected=lengths,
                drawn=unfinished.load(path, index), keep=functools.partial(unfinished.save, path, index))
        graded = time.monotonic()

        with jax.transfer_guard("disallow"):
            rows = make_experience(config, engine, state, reference, tried.rollouts, tried.correct)
            reward, credited = sharding.to_host(rows.rewards), measured(rows.metrics)
            check_finite(credited, index)
            parity.check(credited, config, f"step {index}")
            state, changed = engine.learning.update(state, rows.experience, rows.packed)
            updated = {f"update/{name}": value for name, value in measured(*changed).items()}
        ended = time.monotonic()

        if processes.first():
            path.unlink(missing_ok=True)

        sampled, count = tried.rollouts, int(tried.rollouts.lengths.sum())
        lengths.update(attempts.mean_lengths(batch, sampled))
        rollout_seconds, update_seconds = graded - began - tried.grading_seconds, ended - graded
        metrics = credited | updated | {
            "reward/alpha": config.reward.alpha,
            "rollout/accuracy": float(tried.correct.mean()),
            "rollout/tokens": float(sampled.lengths.mean()),
            "rollout/truncated": float(1.0 - sampled.ended.mean()),
            "rollout/tokens_per_second": tried.generation.tokens / rollout_seconds,
            **engine_metrics(tried, rollout_seconds),
            "update/tokens_per_second": count / update_seconds,
            "update/fill": rows.fill,
            "time/rollout": rollout_seconds, "time/grade": tried.grading_seconds,
            "time/update": update_seconds, "time/step": ended - began}
        statuses = Counter(verdict.status for verdict in tried.verdicts)
        metrics |= {f"grade/{status}": number / len(tried.verdicts) for status, number in sorted(statuses.items())}
        check_finite(metrics, index)
        wanted = min(config.log.samples_per_step, len(tried.texts))
        shown = [row * len(tried.texts) // wanted for row in range(wanted)]     # from as many prompts as can be
        return state, metrics, [describe(row, batch, tried, reward) for row in shown]

    return step


def engine_metrics(tried: attempts.Attempts, seconds: float) -> dict[str, float]:
    """How well the sampler was used, and which responses repeated themselves."""
    generation, sampled = tried.generation, tried.rollouts
    metrics = {"engine/occupancy": generation.tokens / max(generation.slot_steps, 1),
               "engine/host_share": generation.host_seconds / seconds,
               "engine/compilations": float(generation.compilations)}
    if sampled.looped.any():
        audited = sampled.looped & (sampled.finish != LOOP)
        metrics |= {"rollout/loops": float(sampled.looped.mean()),
                    "rollout/loops_stopped": float((sampled.finish == LOOP).mean())}
        if audited.any():
            metrics["rollout/loops_recovered"] = float(sampled.ended[audited].mean())
    return metrics


def describe(row: int, batch: Sequence[Problem], tried: attempts.Attempts, reward: np.ndarray) -> dict[str, Any]:
    """One rollout for people to read."""
    sampled, verdict = tried.rollouts, tried.verdicts[row]
    at = divmod(row, sampled.lengths.shape[1])
    problem = batch[at[0]]
    return {"uid": problem.uid, "sample": at[1], "level": problem.level, "problem": problem.text,
            "reference_answer": problem.answer, "response": tried.texts[row], "answer": verdict.answer,
            "status": verdict.status, "correct": bool(tried.correct[at]), "reward": float(reward[at]),
            "tokens": int(sampled.lengths[at]), "finish": str(sampled.finish[at])}


def evaluate_base(evaluate: evaluation.Evaluate, reference: model.Params, directory: Path, progress: Progress,
                  watch: attempts.Watch) -> tuple[Evaluation, dict[int, float]]:
    """The model before training and its tokens by uid; kept in the run directory, so that a resumed run does not sample
    it again."""
    path = directory / "base.json"
    table = processes.decided("base.json", lambda: hf.read_json(path) if path.exists() else None)
    if table is not None:
        if "result" not in table:           # of an earlier version
            table = {"result": table, "lengths": {}}
        return evaluation.from_table(table["result"]), {int(uid): tokens for uid, tokens in table["lengths"].items()}
    progress.say("evaluating the model before training")
    base, lengths = evaluate(reference, watch, {})
    if processes.first():
        write_json(path, {"result": dataclasses.asdict(base), "lengths": lengths})
    return base, lengths


def check_finite(metrics: dict[str, float], step: int) -> None:
    """Raises FloatingPointError naming what has become NaN or infinite; nothing is saved after that."""
    bad = [name for name, value in metrics.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(f"step {step}: non-finite {', '.join(bad)}; the checkpoints before it are whole")


def open_run(config: Config) -> Path:
    """The run directory, which all processes must see. Raises: UserError."""
    directory = Path(processes.decided("run directory", lambda: str(make_directory(config))))
    processes.check_shared(directory, "run.directory")
    return directory


def make_directory(config: Config) -> Path:
    """The run directory, as process 0 finds or makes it.

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
    elif path.exists() or any((directory / "checkpoints").glob("*")):
        raise UserError(f"run.directory: {directory} holds a run already; resume it with --run.resume true, or choose "
                        "another directory")
    with disk(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def write_config(config: Config, directory: Path) -> None:
    """The resolved configuration, from which the run can be resumed wherever the command is given."""
    run = dataclasses.replace(config.run, directory=str(directory), resume=False)
    everywhere = dataclasses.replace(config.distributed, process_id=None)       # that one is a host's own
    with disk(directory):
        configuration.save(dataclasses.replace(config, run=run, distributed=everywhere), directory / "config.yaml")


def write_left_out(rows: Sequence[prompts.LeftOut], directory: Path) -> None:
    """Every row of the data that is not trained on, and why, for people to look through."""
    text = "".join(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows)
    with disk(directory / "left_out.jsonl"):
        (directory / "left_out.jsonl").write_text(text, encoding="utf-8")


def conclude(config: Config, inputs: Inputs, directory: Path, base: Evaluation | None, trained: Evaluation | None,
             wall_seconds: float) -> None:
    """The table, summary.json and report.png of a finished run, and the card of its model."""
    with disk(directory / "model"):
        text = card(config.run.steps, config, inputs, base, trained)
        (directory / "model" / hf.CARD_FILE).write_text(text, encoding="utf-8")
    summary = report.summary(config, base, trained, wall_seconds) if base and trained else None
    console = Console()
    if summary is not None:
        write_json(directory / "summary.json", summary)
        report.print_table(console, summary)
    report.plot(read_rows(directory / "metrics.jsonl"), summary, directory / "report.png", model=config.model.path)
    console.print(f"the trained model: {directory / 'model'}", soft_wrap=True)
    console.print(f"the picture: {directory / 'report.png'}", soft_wrap=True)
