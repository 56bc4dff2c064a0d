"""The training loop: `train` is a run, `train_step` one step of it as its seven stages.

What was left out, and why:

- Asynchronous rollouts. Sampler and trainer take turns on the same chips, so by
  default every response comes from the very policy that it updates, and a run can be repeated and
  resumed token for token.
- A value model and a reward model. The other responses of the group are the baseline, and a grader
  of final answers is the judge.
- A Trainer class, hooks and plug-ins. To change the loop, edit this file; a reward or a grader of
  your own is a function that the configuration names.
- The state of a data loader. The problems of a step are a function of the seed and the step.
- Early stopping and the choice of a best checkpoint. Each checkpoint is exported as a Hugging Face
  model, and `evaluate.py` compares them.
"""

import contextlib
import dataclasses
import functools
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effreason.data import prompts
from effreason.evaluation import responses
from effreason.lm import adapters, model
from effreason.lm.hf.pretrained import model_fingerprint
from effreason.rl import alpha_control, dial, parity
from effreason.rl.checkpoints import Checkpoints, digest
from effreason.rl.diagnosis import Diagnosis, truncation
from effreason.rl.learner import Learner, PackedRollouts
from effreason.rl.rollouts import GradedRollouts, Undecided, refill, sample_and_grade, watched
from effreason.rl.update import TrainState
from effreason.runs import dial_points
from effreason.runs import directory as runs
from effreason.runs import results as run_files
from effreason.runs.export import export, exported_step, origin
from effreason.runs.session import Inputs, Session, open_session
from effreason.runs.unfinished import FILE, StepLog
from effreason.runtime import processes, sharding
from effreason.runtime.config import Config
from effreason.runtime.errors import Interrupted, UserError
from effreason.runtime.progress import GenerationProgress, Progress
from effreason.sampling.engine import Generation, Generations, collect, step_key
from effreason.sampling.scheduler import Request, make_requests
from effreason.types import FinishReason, Outcomes, Problem

STOPPED = "stopped.txt"             # in the run directory: what a signal that stopped the run said


@dataclasses.dataclass(kw_only=True)
class RunState:
    """What a run knows besides weights and optimizer state; saved with them."""

    alpha: float
    last_alpha_step: int            # the last step whose evaluation has moved alpha
    lengths: dict[int, float]       # mean response tokens by uid, when last sampled
    seconds: float                  # spent by earlier processes of this run


@dataclasses.dataclass(kw_only=True)
class Run:
    """A run in progress."""

    config: Config
    session: Session
    directory: Path
    checkpoints: Checkpoints
    # The model before training, in the compute dtype; None if nothing reads it.
    reference: model.Params | None
    train_state: TrainState
    run_state: RunState
    base_digest: str | None         # of the weights before training
    initial_params: model.Params | None     # what rollouts are sampled from, if not from the policy
    started: float                  # time.monotonic(), less the seconds of the processes before
    progress: Progress | None = None
    diagnosis: Diagnosis = dataclasses.field(default_factory=Diagnosis)
    rollouts: PackedRollouts | None = None  # of the last step

    @property
    def learner(self) -> Learner:
        return self.session.engine.learner

    @property
    def alphas(self) -> tuple[float, ...]:
        """The alphas of the dial, ascending; () if there is none."""
        return self.config.reward.dial

    def settings(self, alphas: np.ndarray | None) -> np.ndarray | None:
        """Returns the settings of the dial for the alphas of groups."""
        if alphas is None:
            return None
        return np.array([dial.setting(alpha, self.alphas[-1]) for alpha in alphas], np.float32)

    def policy(self, alpha: float | None = None) -> model.Params:
        """Returns the weights that are trained, with those that are frozen.

        Args:
            alpha: of the dial; None if there is none, or for the scorer."""
        setting = None if alpha is None else dial.setting(alpha, self.alphas[-1])
        return self.learner.policy(self.train_state, self.reference, setting)

    @property
    def step(self) -> int:
        """Steps completed."""
        return int(sharding.to_host(self.train_state.step))

    def on_chunk(self, generation: GenerationProgress) -> None:
        """Shows how far a generation is; raises Interrupted if a signal has come."""
        self.session.interrupts.check()
        if self.progress is not None:
            self.progress.rollout(generation)


def train(config: Config, session: Session | None = None,
          resume_command: str | None = None) -> Path:
    """Trains, evaluates before and after, and leaves everything in the run directory.

    Args:
        session: an open one that fits the configuration; None opens one.
        resume_command: what to run after a stop; None = the command of a single run.

    Returns:
        The run directory.

    Raises:
        UserError: bad input.
        Interrupted: SIGTERM or Ctrl-C has come; the state is saved.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(runs.opened(config))
        stack.enter_context(runs.keeping_log(directory))
        checkpoints = stack.enter_context(
            Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep))
        latest = newest(config, directory, checkpoints)
        session = session or stack.enter_context(open_session(config))
        config = dataclasses.replace(config, model=session.config.model)    # with its revision
        resume_command = resume_command or runs.resume_command(directory)
        processes.advise(
            f"start all of them again, or, once there is a checkpoint, {resume_command}")

        run = begin(config, session, directory, checkpoints, latest, resume_command, started)
        agreement = check_parity(run)
        if processes.is_primary():
            runs.write_config(config, directory)
            runs.write_left_out(session.inputs.problems.left_out, directory)
            (directory / STOPPED).unlink(missing_ok=True)
        if latest is not None and latest != processes.broadcast(
                "exported model", lambda: exported_step(directory / "model")):
            export_policy(run)      # the process before was killed before or while it did so

        console = None if processes.is_primary() else processes.console()
        with (runs.open_metrics(config, directory, run.step) as writer,
              Progress(config.run.steps, start_step=run.step, console=console) as run.progress,
              saving_on_exit(run, resume_command)):
            run.progress.say(agreement)
            base = evaluate_base(run)
            for step in range(run.step, config.run.steps):
                # Before the step, in a row of its own: a run stopped here resumes with it.
                every = config.evaluation.every
                if base and every and step > 0 and step % every == 0:
                    writer.write(step, evaluate_between(run, base))

                metrics, rows = train_step(run, step)
                writer.write(step, metrics)
                writer.samples(step, rows)
                run.progress.step(step, metrics)
                if (step + 1) % config.checkpoint.every == 0 or step + 1 == config.run.steps:
                    save(run)
                session.interrupts.check()
            trained = evaluate(run, base) if base else {}
            if base and run.alphas:
                evaluate_dial(run, base)

        if processes.is_primary():
            results = runs.compare(base, trained) if trained else None
            runs.conclude(config, session.inputs, directory, results,
                          time.monotonic() - run.started, run.run_state.alpha)
    return directory


def train_step(run: Run, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Runs one step: problems, responses, verdicts, rewards, advantages, update; the caller saves.

    The train state is donated to the update, the last stage: a step that fails or is stopped before
    it leaves the state intact.

    Returns:
        The metrics, and the rows of rollouts.jsonl.
    """
    config, learner, alpha = run.config, run.learner, run.run_state.alpha
    began = time.monotonic()
    problems = prompts.batch(run.session.inputs.problems, config.rollout.prompts_per_step,
                             config.run.seed, step)                                         # 1
    alphas = dial.assign(run.alphas, len(problems), step) if run.alphas else None
    log = StepLog(run.directory / FILE, step, origin=functools.partial(step_origin, run), limits={
        "prompts": len(problems), "samples": config.rollout.group_size,
        "max_new_tokens": config.rollout.max_new_tokens,
        "vocabulary": run.session.inputs.pretrained.decoder.vocabulary})
    graded = sample_groups(run, problems, step, log, alphas)                                # 2, 3
    sampled = time.monotonic()
    if step == 0:
        look_at_first(run, graded, log)

    with jax.transfer_guard("disallow"):
        rollouts = learner.pack(graded.rollouts, graded.correct,
                                alpha if alphas is None else alphas, run.settings(alphas),
                                graded.scores)
        run.train_state, learnt = learner.update(
            run.train_state, run.reference, rollouts,
            check=functools.partial(check_batch, config, step))                         # 4, 5, 6
        run.rollouts = rollouts
        metrics = means(learnt.metrics) | {
            f"update/{name}": value for name, value in means(*learnt.updates).items()}
        rewards, advantages = sharding.to_host((learnt.rewards, learnt.advantages))
    updated = time.monotonic()

    log.remove()
    run.run_state.lengths |= {
        problem.uid: float(lengths.mean()) for part in graded.sampled
        for problem, lengths in zip(part.problems, part.rollouts.lengths, strict=True)}
    if alphas is not None:
        metrics |= dial.metrics(alphas, graded.correct, graded.rollouts.lengths)
    metrics |= graded.metrics | {"reward/alpha": alpha} | step_metrics(
        graded, rollouts.packing_efficiency,
        rollout_seconds=sampled - began - graded.grading_seconds,
        update_seconds=updated - sampled, step_seconds=updated - began)
    check_finite(metrics, step)
    for line in run.diagnosis.step(graded, metrics):
        if run.progress is not None:
            run.progress.say(line)
    return metrics, describe(graded, rewards, advantages, config.log.groups_per_step)


def sample_groups(run: Run, problems: Sequence[Problem], step: int, log: StepLog,
                  alphas: np.ndarray | None) -> GradedRollouts:
    """Samples and grades the groups of a step; replaces those without a signal if configured.

    The responses of rounds that refill are not kept when a signal comes: the first round, which
    decides what is missing, is then drawn again, token for token."""
    settings, engine = run.config.rollout, run.session.engine
    params = run.policy() if run.initial_params is None else run.initial_params
    key = step_key(run.config.run.seed, "train", step)

    def generate(requests: Sequence[Request]) -> Generation | Generations:
        if alphas is None:
            return engine.sampler(params, requests, key, engine.sampling)
        return Generations([functools.partial(
            engine.sampler, run.policy(alpha),
            [request for request in requests if alphas[request.prompt] == alpha], key,
            engine.sampling) for alpha in np.unique(alphas).tolist()], len(requests))

    sample = functools.partial(
        sample_and_grade, generate,
        group_size=settings.group_size, max_new_tokens=settings.max_new_tokens,
        tokenizer=run.session.inputs.pretrained.tokenizer, grader=run.session.grader,
        require_eos=run.config.grade.require_eos, on_chunk=run.on_chunk,
        expected=run.run_state.lengths)

    with jax.transfer_guard("disallow"):
        graded = sample(problems, log=log)
        if not settings.refill_rounds:
            return graded
        return refill(graded, sample, run.learner, run.session.inputs.problems,
                      alpha=run.run_state.alpha, settings=settings,
                      seed_and_step=(run.config.run.seed, step))


def look_at_first(run: Run, graded: GradedRollouts, log: StepLog) -> None:
    """Says how many of the first responses were cut off. Raises UserError if it is too many."""
    settings = run.config.rollout
    try:
        line = truncation(graded, settings.max_new_tokens, settings.max_truncated)
    except UserError:
        log.remove()        # they are of a limit that is about to change
        raise
    if line is not None and run.progress is not None:
        run.progress.say(line)


def check_batch(config: Config, step: int, measured: dict[str, jax.Array]) -> None:
    """Raises FloatingPointError or parity.Mismatch if a batch must not change the weights."""
    metrics = means(measured)
    check_finite(metrics, step)
    if config.rollout.policy == "current":
        dtype = config.model.dtype
        parity.check(metrics, parity.limit(config.rollout.max_mismatch, dtype), dtype,
                     f"step {step}")


def means(*metrics: dict[str, jax.Array]) -> dict[str, float]:
    """Brings metrics to the host; averages those of several updates."""
    on_host = sharding.to_host(metrics)
    return {name: float(np.mean([values[name] for values in on_host])) for name in on_host[0]}


def step_metrics(graded: GradedRollouts, packing_efficiency: float, *, rollout_seconds: float,
                 update_seconds: float, step_seconds: float) -> dict[str, float]:
    """Describes all responses that were sampled, and how well the devices were used."""
    def sampled(name: str) -> np.ndarray:
        return np.concatenate([getattr(part.rollouts, name).reshape(-1)
                               for part in graded.sampled])

    def total(name: str) -> float:
        return float(sum(getattr(generation, name) for generation in graded.generations))

    correct = np.concatenate([part.correct.reshape(-1) for part in graded.sampled])
    ended = sampled("ended")
    metrics = {"rollout/accuracy": float(correct.mean()),
               "rollout/tokens": float(sampled("lengths").mean()),
               "rollout/truncated": float(1.0 - ended.mean()),
               "rollout/tokens_per_second": total("tokens") / rollout_seconds,
               "engine/occupancy": total("tokens") / max(total("slot_steps"), 1),
               "engine/host_share": total("host_seconds") / rollout_seconds,
               "engine/compilations": total("compilations")}

    scores = np.concatenate([part.scores.reshape(-1) for part in graded.sampled])
    if (scores != correct).any():
        metrics["rollout/score"] = float(scores.mean())

    if (repeated := sampled("repeated")).any():
        stopped = sampled("finish") == FinishReason.REPETITION
        audited = repeated & ~stopped
        metrics |= {"rollout/repeated": float(repeated.mean()),
                    "rollout/repetition_stopped": float(stopped.mean())}
        if audited.any():
            metrics["rollout/repetition_recovered"] = float(ended[audited].mean())

    trained_tokens = int(graded.rollouts.lengths.sum())
    metrics |= {"update/tokens_per_second": trained_tokens / update_seconds,
                "update/packing_efficiency": packing_efficiency, "time/rollout": rollout_seconds,
                "time/grade": graded.grading_seconds, "time/update": update_seconds,
                "time/step": step_seconds}
    statuses = Counter(verdict.status for part in graded.sampled for verdict in part.verdicts)
    return metrics | {f"grade/{status}": count / len(correct)
                      for status, count in sorted(statuses.items())}


def describe(graded: GradedRollouts, rewards: np.ndarray, advantages: np.ndarray,
             count: int) -> list[dict[str, Any]]:
    """Returns the rows of `count` groups for people to read, spread evenly over the batch.

    Args:
        rewards, advantages: float32[P, G].
    """
    prompt_count, group_size = rewards.shape
    count = min(count, prompt_count)
    return [dataclasses.asdict(responses.graded_response(graded.problems, graded, prompt, sample))
            | {"reward": float(rewards[prompt, sample]),
               "advantage": float(advantages[prompt, sample])}
            for prompt in (number * prompt_count // count for number in range(count))
            for sample in range(group_size)]


def check_finite(metrics: dict[str, float], step: int) -> None:
    """Raises FloatingPointError naming what became NaN or infinite; nothing is saved after that."""
    bad = [name for name, value in metrics.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(f"step {step}: non-finite {', '.join(bad)}")


def newest(config: Config, directory: Path, checkpoints: Checkpoints) -> int | None:
    """Returns the step of the newest checkpoint, None if there is none.

    Raises:
        UserError: the run has done more steps than are wanted, or config.yaml was edited since.
    """
    latest: int | None = processes.broadcast("newest checkpoint", lambda: checkpoints.latest)
    if latest is None:
        return None
    if latest > config.run.steps:
        raise UserError(f"run.steps must be at least the {latest} steps that {directory} has done, "
                        f"got {config.run.steps}")

    try:
        trained = checkpoints.facts(latest)["configuration"]
    except UserError:               # it is damaged: `restore` knows which other one is whole
        return latest
    runs.check_unedited(config, directory, latest, trained)
    return latest


def begin(config: Config, session: Session, directory: Path, checkpoints: Checkpoints,
          latest: int | None, resume_command: str, started: float) -> Run:
    """Starts from a checkpoint, or from the model before training.

    Args:
        latest: step of the newest checkpoint.

    Raises:
        UserError: the checkpoint is damaged, or was trained from other weights, with another
            template or on other problems.
    """
    learner = session.engine.learner
    # A resume without a reference reads no weights but the checkpoint's.
    weights = (session.load_weights(merged=not config.adapter.rank)
               if latest is None or config.keeps_reference else {})
    stored = session.load_adapters()
    reference = learner.as_reference(weights) if config.keeps_reference else None
    if reference is not None and stored is not None:    # the reference is what the run starts from
        reference = adapters.join(reference, learner.initial_adapters(config.run.seed, stored))
    base_digest = digest((weights, stored) if stored else weights) if weights else None
    if latest is None:
        # A copy: in float32 the reference may be these very arrays, and updates donate the state.
        train_state = learner.start(weights, config.run.seed, stored, keeps=reference is not None)
        run_state = RunState(alpha=config.reward.alpha, last_alpha_step=0, lengths={}, seconds=0.0)
    else:
        train_state, facts = restore(learner, checkpoints, latest, resume_command)
        base_digest = base_digest or facts["base_digest"]
        check_origin(facts, session.inputs, base_digest, directory)
        run_state = RunState(
            alpha=facts["alpha"], last_alpha_step=facts["last_alpha_step"],
            lengths={int(uid): tokens for uid, tokens in facts["lengths"].items()},
            seconds=facts["seconds"])
        checkpoints.remove_left_overs()

    return Run(config=config, session=session, directory=directory, checkpoints=checkpoints,
               reference=reference, train_state=train_state, run_state=run_state,
               base_digest=base_digest,
               initial_params=(learner.initial_policy(reference) if reference is not None
                               and config.rollout.policy == "initial" else None),
               started=started - run_state.seconds)


def restore(learner: Learner, checkpoints: Checkpoints, latest: int,
            resume_command: str) -> tuple[TrainState, dict[str, Any]]:
    """Restores the newest checkpoint.

    Raises:
        UserError: it is damaged; says which other one is whole, and how to go on from that.
    """
    state: TrainState
    try:
        state, facts = checkpoints.restore(learner.abstract_state, latest)
    except UserError as error:
        whole = checkpoints.newest_whole(learner.abstract_state, before=latest)
        if whole is None:
            raise UserError(f"{error}; no other checkpoint can be restored: start the run again, "
                            "in another directory") from None
        damaged = " ".join(shlex.quote(str(checkpoints.path(step)))
                           for step in checkpoints.steps if step > whole)
        raise UserError(f"{error}; checkpoint {whole} is whole, continue from it with: "
                        f"rm -r {damaged} && {resume_command}") from None
    return state, facts


def check_origin(facts: dict[str, Any], inputs: Inputs, base_digest: str, directory: Path) -> None:
    """Raises UserError if a checkpoint was trained from other weights, or on other prompts."""
    template, wanted = facts["template"], origin(inputs)
    if template["sha256"] != inputs.template.sha256:
        raise UserError(
            f"data.template: the checkpoint was trained with the template {template['name']}, "
            f"whose text has changed since (sha256 {template['sha256'][:12]}, now "
            f"{inputs.template.sha256[:12]})")

    for field, fact in (("data.path", "problems_sha256"), ("evaluation.path", "held_out_sha256")):
        if facts[fact] != wanted[fact]:
            raise UserError(f"{field}: the problems have changed since the checkpoint "
                            f"(sha256 {facts[fact][:12]}, "
                            f"now {wanted[fact][:12]}); a resumed run needs the same ones")

    if facts["base_digest"] != base_digest:
        raise UserError(f"model.path: the weights of {inputs.pretrained.name} have changed since "
                        f"the run began with them (digest {facts['base_digest']}, now "
                        f"{base_digest}); put them back, or {runs.train_on(directory)}")


def check_parity(run: Run) -> str:
    """Samples a few tokens for the first step's problems and scores them.

    Returns:
        A line for the user that says how far sampler and trainer are apart.

    Raises:
        parity.Mismatch: too far.
    """
    config, settings, engine = run.config, run.config.rollout, run.session.engine
    problems = prompts.batch(run.session.inputs.problems, settings.prompts_per_step,
                             config.run.seed, 0)
    requests = make_requests([problem.prompt for problem in problems], settings.group_size,
                             min(parity.START_TOKENS, settings.max_new_tokens),
                             uids=[problem.uid for problem in problems])
    key = step_key(config.run.seed, "parity", 0)
    with jax.transfer_guard("disallow"):
        params = run.policy()
        generation = engine.sampler(run.policy(0.0 if run.alphas else None), requests, key,
                                    engine.sampling)
        chunks = list(watched(generation, len(requests), run.on_chunk))
        rollouts = collect(problems, [response for chunk in chunks for response in chunk],
                           settings.group_size)
        packed = run.learner.pack(
            rollouts, np.zeros(rollouts.lengths.shape, bool), 0.0,
            np.zeros(len(problems), np.float32) if run.alphas else None)
        metrics = means(run.learner.measure(
            packed, run.learner.score(params, packed),
            run.learner.score_reference(run.reference, packed)))

    limit = parity.limit(settings.max_mismatch, config.model.dtype)
    parity.check(metrics, limit, config.model.dtype, "before the first step")
    return (f"parity: sampler and trainer are {metrics['rollout/mismatch']:.1e} nats apart on "
            f"{rollouts.lengths.sum():,} tokens (at most {limit:g} accepted)")


@contextlib.contextmanager
def saving_on_exit(run: Run, resume_command: str) -> Iterator[None]:
    """Saves the state if a signal, the grader or the parity check stops the run.

    A run that diverges is not saved: the error then names the last good checkpoint."""
    try:
        try:
            yield
        except (Undecided, parity.Mismatch):
            save(run)
            raise
        except Interrupted as stop:
            save(run)
            # One of several processes says it for all.
            message = (f"{stop.message} after step {run.step} of {run.config.run.steps}, "
                       f"saved; continue with: {resume_command}" if processes.is_primary() else "")
            if processes.is_primary():      # where it is found if the terminal is closed
                (run.directory / STOPPED).write_text(message + "\n", encoding="utf-8")
            raise Interrupted(stop.signum, message) from None
    except FloatingPointError as error:
        good = run.checkpoints.latest
        way_back = ("nothing was saved; start a new run with a lower update.learning_rate"
                    if good is None else f"the last good checkpoint is "
                    f"{run.checkpoints.path(good)}: {runs.train_on(run.directory)}, and with a "
                    "lower update.learning_rate")
        raise FloatingPointError(f"{error}; {way_back}") from None


def save(run: Run) -> None:
    """Stage 7: writes a checkpoint, and the policy as a Hugging Face model.

    Raises:
        FloatingPointError: the policy has diverged; nothing is written.
    """
    run.run_state.seconds = time.monotonic() - run.started
    # Finite weights may still give numbers that are not.
    if run.rollouts is not None and not run.learner.is_finite(run.policy(), run.rollouts):
        raise FloatingPointError(
            f"step {run.step - 1}: after its update the model gives no finite log-probs")
    facts = origin(run.session.inputs) | dataclasses.asdict(run.run_state) | {
        "configuration": runs.deciding(run.config), "base_digest": run.base_digest}
    run.checkpoints.save(run.step, run.train_state, facts=facts)
    export_policy(run)


def export_policy(run: Run) -> None:
    """Writes the policy as a Hugging Face model."""
    alpha = run.run_state.alpha
    policy = run.policy(alpha if run.alphas else None)
    decoder = run.learner.decoder
    if not run.config.export.adapter:
        policy, decoder = run.learner.merged(policy), run.session.inputs.pretrained.decoder
    export(policy, decoder, run.step, run.config, run.session.inputs, run.directory / "model",
           alpha)
    processes.broadcast("saved", lambda: None)        # no process ends while process 0 still writes


def step_origin(run: Run) -> dict[str, Any]:
    """Returns what the responses of a step depend on besides its number."""
    return {"seed": run.config.run.seed, "weights": digest(run.train_state.params),
            "problems": run.session.inputs.problems_sha256}


def evaluate_base(run: Run) -> dict[str, Outcomes]:
    """Evaluates the model before training on each set; a resumed run reads what is there."""
    if not run.session.inputs.held_out:
        return {}
    if run.progress is not None:
        run.progress.say("evaluating the model before training")

    @functools.cache
    def original() -> model.Params:
        if run.reference is not None:
            return run.learner.initial_policy(run.reference)
        # After a resume the evaluation is there already, unless somebody has deleted it.
        return run.train_state.params if run.step == 0 else run.session.load_weights()

    return run.session.evaluator.measure_all(
        original, run.on_chunk, weights=model_fingerprint(run.session.inputs.pretrained),
        directory=run_files.evaluations(run.directory, 0))


def evaluate(run: Run, base: dict[str, Outcomes], names: Sequence[str] | None = None,
             alpha: float | None = None) -> dict[str, Outcomes]:
    """Evaluates the policy on some sets.

    Args:
        names: None = all.
        alpha: of the dial; None = reward.alpha.
    """
    directory = run_files.evaluations(run.directory, run.step)
    if alpha is not None:
        directory = dial_points.directory_of(directory, alpha)
    elif run.alphas:
        alpha = run.run_state.alpha
    first = next(iter(base.values()))
    expected = {int(uid): float(tokens)
                for uid, tokens in zip(first.uids, first.lengths.mean(axis=1), strict=True)}
    return run.session.evaluator.measure_all(
        lambda: run.policy(alpha), run.on_chunk, weights=f"step {run.step}", expected=expected,
        names=names, directory=directory)


def evaluate_dial(run: Run, base: dict[str, Outcomes]) -> None:
    """Evaluates the dial at its alphas and between them, on the first set; writes dial.json."""
    evaluations = run_files.evaluations(run.directory, run.step)
    processes.broadcast("evaluation", lambda: dial_points.copy_trained(evaluations, run.config))
    for alpha in sorted({*run.alphas, *dial.untrained(run.alphas)}):
        evaluate(run, base, [next(iter(base))], alpha)
    if processes.is_primary():
        dial_points.write_points(run.directory, dial_points.read_points(evaluations, run.config))


def evaluate_between(run: Run, base: dict[str, Outcomes]) -> dict[str, float]:
    """Evaluates the policy on the first set between two steps; alpha follows it if configured."""
    state, reward, step = run.run_state, run.config.reward, run.step
    name = next(iter(base))
    before, after = base[name], evaluate(run, base, [name])[name]
    accuracy, tokens = float(after.correct.mean()), float(after.lengths.mean())

    # Once: a run that resumes here reads the same evaluation again.
    if alpha_control.is_on(reward) and step > state.last_alpha_step:
        state.last_alpha_step = step
        state.alpha = alpha_control.next_alpha(
            state.alpha, token_ratio=tokens / float(before.lengths.mean()),
            accuracy_drop=100 * (float(before.correct.mean()) - accuracy), reward=reward)
    return {"evaluation/accuracy": accuracy, "evaluation/tokens": tokens}
