"""The training loop: prompts, rollouts, grades, rewards, advantages, update, checkpoints; then the report."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effreason.data import prompts
from effreason.groups import RunState, describe, draw, engine_metrics
from effreason.lm import model
from effreason.lm.hf.pretrained import model_fingerprint
from effreason.rl import alpha_control, packing, parity, update
from effreason.rl import rollouts as attempts
from effreason.rl.checkpoints import Checkpoints
from effreason.rl.experience import Credit
from effreason.rl.learner import Engine, needs_reference
from effreason.runs import directory as runs
from effreason.runs import unfinished
from effreason.runs.export import export, origin
from effreason.runs.session import Inputs, Session, open_session
from effreason.runtime import processes, sharding
from effreason.runtime.config import Config
from effreason.runtime.errors import Interrupted, UserError
from effreason.runtime.metrics import MetricsWriter
from effreason.runtime.progress import GenerationProgress, Progress
from effreason.sampling import engine as rollouts
from effreason.sampling.scheduler import make_requests
from effreason.types import Outcomes, Packed, Rollouts


def train(config: Config) -> None:
    """Trains, evaluates before and after, and leaves everything in the run directory.

    Raises: UserError for bad input; Interrupted, with the state saved, on SIGTERM or Ctrl-C."""
    started = time.monotonic()
    with open_session(config) as session:
        directory = runs.open_run(config)
        run(session, session.config, directory, started=started, go_on=runs.resume(directory))


def run(session: Session, config: Config, directory: Path, *, started: float, go_on: str) -> None:
    """One run, from its weights to its report.

    Args: config, the session's but for what its engine does not depend on; started, time.monotonic() when it began;
        go_on, the command that goes on with it."""
    inputs, engine, interrupts = session.inputs, session.engine, session.interrupts
    processes.advise(f"start all of them again, or, once there is a checkpoint, {go_on}")
    weights = session.load_weights()
    reference = engine.learning.as_reference(weights)
    with Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep) as saved:
        state, course = begin(config, engine, saved, weights, inputs)
        del weights
        started -= course.seconds
        start = int(sharding.to_host(state.step))
        if start > config.run.steps:
            raise UserError(f"run.steps must be at least the {start} steps that {directory} has done, got "
                            f"{config.run.steps}")
        agreement = check_parity(config, engine, inputs.problems, state, reference, lambda now: interrupts.check())
        if processes.is_primary():
            runs.write_config(config, directory)
            runs.write_left_out(inputs.problems.left_out, directory)
        with (runs.open_metrics(config, directory, start) as writer,
              Progress(config.run.steps, start_step=start,
                       console=None if processes.is_primary() else processes.console()) as progress):
            progress.say(agreement)

            def watch(now: GenerationProgress) -> None:
                interrupts.check()
                progress.rollout(now)

            def save(state: update.TrainState) -> None:
                step = int(sharding.to_host(state.step))
                course.seconds = time.monotonic() - started
                saved.save(step, state, facts=origin(inputs) | dataclasses.asdict(course))
                export(state.params, step, config, inputs, directory / "model", course.alpha)
                processes.broadcast("saved", lambda: None)        # none ends while process 0 still writes

            try:
                base, trained = take_steps(session, config, directory, state, reference, course, writer=writer,
                                           progress=progress, watch=watch, save=save)
            except Halted as halt:
                save(halt.state)
                if not isinstance(halt.reason, Interrupted):
                    raise halt.reason from None
                done = int(sharding.to_host(halt.state.step))
                # One of several processes says it for all.
                raise Interrupted(halt.reason.signum, f"{halt.reason.message} after step {done} of {config.run.steps}, "
                                  f"saved; go on with: {go_on}" if processes.is_primary() else "") from None
    if processes.is_primary():
        results = runs.compare(base, trained) if trained else None
        runs.conclude(config, inputs, directory, results, time.monotonic() - started, course.alpha)


class Halted(Exception):
    """Steps that cannot go on, or are not to, with the state that is to be saved."""

    def __init__(self, state: update.TrainState, reason: Exception) -> None:
        super().__init__(str(reason))
        self.state, self.reason = state, reason


def take_steps(session: Session, config: Config, directory: Path, state: update.TrainState, reference: model.Params,
               course: RunState, *, writer: MetricsWriter, progress: Progress, watch: attempts.OnChunk,
               save: Callable[[update.TrainState], None]) -> tuple[dict[str, Outcomes], dict[str, Outcomes]]:
    """The evaluation before, all steps that are left with the evaluations between, and the one after the last of them.

    Returns: what the model before training and the trained one make of each set. Raises: Halted."""
    step = make_step(config, session, reference, watch, course, directory)

    def evaluate(done: int, names: Sequence[str] | None = None) -> dict[str, Outcomes]:
        return session.evaluator.measure_all(state.params, watch, weights=f"step {done}", expected=known, names=names,
                                             directory=runs.evaluations(directory, done))

    try:
        base = evaluate_base(session, reference, directory, progress, watch)
        known = {int(uid): float(mean) for first in list(base.values())[:1]
                 for uid, mean in zip(first.uids, first.lengths.mean(axis=1), strict=True)}
        for index in range(int(sharding.to_host(state.step)), config.run.steps):
            # Before the step, in a row of its own: when this is stopped, a resumed run begins with it.
            if base and config.evaluation.every and index % config.evaluation.every == 0 < index:
                writer.write(index, between(config, index, course, base, evaluate(index, list(base)[:1])))
            state, metrics, samples = step(state, index)
            writer.write(index, metrics)
            writer.samples(index, samples)
            progress.step(index, metrics)
            if (index + 1) % config.checkpoint.every == 0 or index + 1 == config.run.steps:
                save(state)
            session.interrupts.check()
        return base, evaluate(config.run.steps) if base else {}
    except (attempts.Undecided, parity.Mismatch, Interrupted) as reason:
        raise Halted(state, reason) from None


def between(config: Config, index: int, course: RunState, base: Mapping[str, Outcomes],
            found: Mapping[str, Outcomes]) -> dict[str, float]:
    """What an evaluation between steps measured; where alpha is to follow it, it does so, once."""
    (name, now), = found.items()
    accuracy, tokens = float(now.correct.mean()), float(now.lengths.mean())
    if alpha_control.is_on(config.reward) and index > course.last_alpha_step:
        course.last_alpha_step = index       # the same evaluation is read again where a run resumes at it
        course.alpha = alpha_control.next_alpha(
            course.alpha, token_ratio=tokens / float(base[name].lengths.mean()),
            accuracy_drop=100 * (float(base[name].correct.mean()) - accuracy), reward=config.reward)
    return {"evaluation/accuracy": accuracy, "evaluation/tokens": tokens}


def begin(config: Config, engine: Engine, saved: Checkpoints, weights: model.Params,
          inputs: Inputs) -> tuple[update.TrainState, RunState]:
    """The newest saved state, or a first one, and what was saved with it.

    Raises: UserError where the checkpoint was trained with another template or on other problems."""
    latest = processes.broadcast("newest checkpoint", lambda: saved.latest)
    if latest is None:
        # A copy: in float32 the reference may be these very arrays, and the state is donated at each update.
        return engine.learning.initial_state(jax.tree.map(lambda weight: weight.copy(), weights)), RunState(
            alpha=config.reward.alpha, last_alpha_step=0, lengths={}, seconds=0.0)
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
    lengths = {int(uid): tokens for uid, tokens in facts["lengths"].items()}
    return state, RunState(alpha=facts["alpha"], last_alpha_step=facts["last_alpha_step"], lengths=lengths, seconds=facts["seconds"])


def check_parity(config: Config, engine: Engine, problems: prompts.Problems, state: update.TrainState,
                 reference: model.Params, watch: attempts.OnChunk) -> str:
    """Samples a few tokens for the first step's problems and scores them; returns the line that says what was found.

    Raises: parity.Mismatch."""
    settings = config.rollout
    batch = prompts.batch(problems, settings.prompts_per_step, config.run.seed, 0)
    key = rollouts.step_key(config.run.seed, "parity", 0)
    with jax.transfer_guard("disallow"):
        requests = make_requests([problem.prompt for problem in batch], settings.group_size,
                                 min(parity.START_TOKENS, settings.max_new_tokens),
                                 uids=[problem.uid for problem in batch])
        responses, _ = attempts.generate(
            lambda requests: engine.sampler(state.params, requests, key, engine.sampling), requests, watch)
        sampled = rollouts.collect(batch, responses, settings.group_size)
        wrong = np.zeros(sampled.lengths.shape, bool)
        found = measured(make_experience(config, engine, state, reference, sampled, wrong, 0.0).credit.metrics)
    parity.check(found, config, "before the first step")
    return (f"parity: sampler and trainer are {found['rollout/mismatch']:.1e} nats apart on {sampled.lengths.sum():,} "
            f"tokens (at most {parity.limit(config):g} accepted)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A step's responses, packed and credited, on the devices."""

    packed: Packed
    credit: Credit
    packing_efficiency: float       # share of the rows' positions that hold a token


def make_experience(config: Config, engine: Engine, state: update.TrainState, reference: model.Params,
                    sampled: Rollouts, correct: np.ndarray, alpha: float) -> Batch:
    """Stages 4 and 5, on the device: rewards and advantages, and the rows the update learns from."""
    learning = engine.learning
    laid = learning.pack(sampled)
    packed = sharding.to_device(laid, learning.packed_sharding)
    logprobs = packing.flatten(sampled.logprobs, laid.token_index.shape[1])
    verdict, lengths, dial, logprobs = sharding.to_device(
        (correct, sampled.lengths, np.float32(alpha), logprobs), learning.replicated)
    old = learning.score(state.params, packed)
    fixed = learning.score_reference(reference, packed) if needs_reference(config) else old
    return Batch(packed=packed, credit=learning.credit(verdict, lengths, dial, logprobs, old, fixed, packed),
                 packing_efficiency=packing.packing_efficiency(laid))


def measured(*metrics: dict[str, jax.Array]) -> dict[str, float]:
    """Metrics on the host; of several updates their means."""
    found = sharding.to_host(metrics)
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def make_step(config: Config, session: Session, reference: model.Params, watch: attempts.OnChunk, course: RunState,
              directory: Path):
    """step(state, index) -> (state, metrics, samples): the seven stages in order.

    The state passed in is donated to the update, the last stage: what fails or stops before it leaves it whole.
    Args: course, whose lengths are kept up to date; directory, of the run, where the responses of a step that is
        stopped are kept."""
    engine, path = session.engine, directory / unfinished.FILE
    initial = jax.device_put(reference, engine.learning.params_sharding) if config.rollout.policy == "initial" else None

    def step(state: update.TrainState, index: int) -> tuple[update.TrainState, dict[str, float], list[dict[str, Any]]]:
        began = time.monotonic()
        policy = state.params if initial is None else initial
        groups = draw(session, config, policy, index, course, watch, path)
        tried = groups.tried
        graded = time.monotonic()

        with jax.transfer_guard("disallow"):
            rows = make_experience(config, engine, state, reference, tried.rollouts, tried.correct, course.alpha)
            reward, advantage = sharding.to_host((rows.credit.rewards, rows.credit.advantages))
            credited = measured(rows.credit.metrics)
            check_finite(credited, index)
            if initial is None:
                parity.check(credited, config, f"step {index}")
            state, changed = engine.learning.update(state, rows.credit.experience, rows.packed)
            updated = {f"update/{name}": value for name, value in measured(*changed).items()}
        ended = time.monotonic()

        if processes.is_primary():
            path.unlink(missing_ok=True)

        sampled, count = tried.rollouts, int(tried.rollouts.lengths.sum())
        course.lengths.update(attempts.mean_lengths(groups.batch, sampled))
        rollout_seconds, update_seconds = graded - began - tried.grading_seconds, ended - graded
        metrics = credited | updated | groups.metrics | {
            "reward/alpha": course.alpha,
            "rollout/accuracy": float(tried.correct.mean()),
            "rollout/tokens": float(sampled.lengths.mean()),
            "rollout/truncated": float(1.0 - sampled.ended.mean()),
            **engine_metrics(tried, rollout_seconds),
            "update/tokens_per_second": count / update_seconds,
            "update/packing_efficiency": rows.packing_efficiency,
            "time/rollout": rollout_seconds, "time/grade": tried.grading_seconds,
            "time/update": update_seconds, "time/step": ended - began}
        statuses = Counter(verdict.status for verdict in tried.verdicts)
        metrics |= {f"grade/{status}": number / len(tried.verdicts) for status, number in sorted(statuses.items())}
        check_finite(metrics, index)
        return state, metrics, describe(groups, reward, advantage, config.log.groups_per_step)

    return step


def evaluate_base(session: Session, reference: model.Params, directory: Path, progress: Progress,
                  watch: attempts.OnChunk) -> dict[str, Outcomes]:
    """What the model before training makes of each set; sampled once, and read by a resumed run."""
    if not session.inputs.held_out:
        return {}
    progress.say("evaluating the model before training")
    original = jax.device_put(reference, session.engine.learning.params_sharding)
    return session.evaluator.measure_all(original, watch, weights=model_fingerprint(session.inputs.pretrained),
                                         directory=runs.evaluations(directory, 0))


def check_finite(metrics: dict[str, float], step: int) -> None:
    """Raises FloatingPointError naming what has become NaN or infinite; nothing is saved after that."""
    bad = [name for name, value in metrics.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(f"step {step}: non-finite {', '.join(bad)}; the checkpoints before it are whole")
