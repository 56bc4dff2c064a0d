"""A family: one model trained with several alphas, the baselines beside it, and blends; all evaluated alike.

Everything is opened and compiled once; each member is a run of its own, in a directory of its own.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from effreason import loop
from effreason.evaluation import responses
from effreason.lm.blend import blend
from effreason.lm.hf.pretrained import load_weights, model_fingerprint, open_pretrained
from effreason.rl import alpha_control, configured_reward
from effreason.rl.learner import Learner
from effreason.runs import directory as runs
from effreason.runs import results
from effreason.runs.report import page
from effreason.runs.report.comparison_charts import BASE, BASELINE, BLEND, MEMBER
from effreason.runs.report.summary import print_results
from effreason.runs.results import FAMILY_FILE, RUN_FILE, PointKind, Results, measure, read_results
from effreason.runs.session import Inputs, Session, longest_prompt, open_session
from effreason.runtime import processes, sharding
from effreason.runtime.config import Config
from effreason.runtime.errors import Interrupted, UserError
from effreason.runtime.files import disk
from effreason.runtime.progress import say
from effreason.types import Outcomes

FOLDER = "base"                     # the directory of the model before training
BASELINES = {"sft_shortest": "SFT, shortest", "dpo": "DPO"}
# Shares of the family's learning rate. DPO wants a lower one wherever it is used: at the same one it forgets how to
# answer (docs/families.md).
LEARNING_RATES = {"sft_shortest": 1.0, "dpo": 0.1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One model of a family and what it makes of each set."""

    name: str
    kind: PointKind
    directory: Path
    outcomes: dict[str, Outcomes]
    alpha: float | None = None
    weight: float | None = None     # of a blend: the trained model's
    seconds: float | None = None    # that its training took


def train(config: Config, alphas: Sequence[float], baselines: Sequence[str], weights: Sequence[float]) -> None:
    """Trains a member for each alpha and each baseline, blends base and the member of the greatest alpha, and reports.

    A family that was stopped goes on where it was; on a resume it may have more members.
    Args: weights, of the trained model in each blend. Raises: UserError; Interrupted, with everything saved."""
    check(config)
    processes.check_same({"--family": f"{alphas}", "--baselines": f"{baselines}", "--blends": f"{weights}"})
    with open_session(config) as session:
        directory = runs.open_run(config, name=f"family-seed{config.run.seed}", free=("reward.alpha",), family=True)
        go_on = runs.resume(directory, "".join(f" --{name} {','.join(map(str, values)) or 'none'}" for name, values in (
            ("family", [f"{alpha:g}" for alpha in alphas]), ("baselines", baselines),
            ("blends", [f"{weight:g}" for weight in weights]))))
        if processes.is_primary():
            runs.write_config(session.config, directory)
            if not (directory / FAMILY_FILE).exists():                  # so that it is not taken for a run
                results.write(directory / FAMILY_FILE, Results(
                    model=config.model.path, seed=config.run.seed, steps=config.run.steps, points=[],
                    **runs.made_with(session.config, session.inputs)))
        try:
            points = [evaluate_base(session, directory)]
            for place, (name, member) in enumerate(members(session.config, alphas, baselines, directory).items()):
                say(f"\n{name} ({place + 1} of {len(alphas) + len(baselines)})", processes.console())
                points.append(train_member(session, member, name, points[0], go_on))
            points += blended(session, directory, points, weights)
        except Interrupted as stop:
            message = stop.message if "go on with" in stop.message else f"{stop.message}; go on with: {go_on}"
            raise Interrupted(stop.signum, message if processes.is_primary() else "") from None
    if processes.is_primary():
        conclude(session.config, session.inputs, directory, points)


def check(config: Config) -> None:
    """Raises UserError for a configuration that no family can have."""
    if config.evaluation.problems == 0:
        raise UserError("evaluation.problems must be >= 1 to compare the members of a family, got 0")
    if config.update.objective != "policy_gradient":
        raise UserError("update.objective must be policy_gradient for a family, whose baselines come beside it, got "
                        f"{config.update.objective}")
    if alpha_control.is_on(config.reward):
        raise UserError("reward.target_tokens and reward.max_accuracy_drop must be null for a family, whose members "
                        f"keep their alphas, got {config.reward.target_tokens} and {config.reward.max_accuracy_drop}")
    if not configured_reward.has_alpha(config.reward):
        raise UserError(f"reward.form must be one with an alpha for a family, got {config.reward.form}")


def members(config: Config, alphas: Sequence[float], baselines: Sequence[str], directory: Path) -> dict[str, Config]:
    """The configuration of each member by the name it goes by, each with a run directory of its own."""
    def placed(config: Config, name: str) -> Config:
        path = directory / name
        begun = processes.broadcast(f"member {name}", lambda: (path / "config.yaml").exists())
        return dataclasses.replace(config, run=dataclasses.replace(config.run, directory=str(path), resume=begun))

    found = {f"α = {alpha:g}": placed(
        dataclasses.replace(config, reward=dataclasses.replace(config.reward, alpha=alpha)), f"alpha{alpha:g}")
        for alpha in alphas}
    return found | {BASELINES[objective]: placed(baseline(config, objective), objective) for objective in baselines}


def baseline(config: Config, objective: Any) -> Config:
    """The same run with another objective: on responses of the model it starts from, as many of them."""
    learning_rate = config.update.learning_rate * LEARNING_RATES[objective]
    return dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, policy="initial", refill_rounds=0),
        advantage=dataclasses.replace(config.advantage, whiten=False, group_std=False),
        kl=dataclasses.replace(config.kl, form="none"),
        update=dataclasses.replace(config.update, objective=objective, learning_rate=learning_rate,
                                   updates_per_batch=1, importance_cap=None))


def evaluate_base(session: Session, directory: Path) -> Point:
    """The model before training, evaluated once for all members."""
    say("evaluating the model before training", processes.console())
    outcomes = session.evaluator.measure_all(
        session.load_weights(), lambda now: session.interrupts.check(),
        weights=model_fingerprint(session.inputs.pretrained), directory=directory / FOLDER)
    return Point(name="base", kind=BASE, directory=directory / FOLDER, outcomes=outcomes)


def train_member(session: Session, config: Config, name: str, base: Point, go_on: str) -> Point:
    """One run, unless it is finished already."""
    directory = Path(config.run.directory or "")
    done = processes.broadcast(f"{name} finished", lambda: finished(directory, config.run.steps, list(base.outcomes)))
    if not done:
        runs.open_run(config)
        if processes.is_primary():
            adopt(base.directory, runs.evaluations(directory, 0))
        if config.update.objective != "policy_gradient":
            learner = Learner(config, session.inputs.pretrained.decoder, session.mesh,
                                     longest_prompt(session.inputs.problems))
            session = dataclasses.replace(session, engine=dataclasses.replace(session.engine, learner=learner))
        loop.train(config, session, go_on)
    else:
        say("trained already", processes.console())
    is_member = config.update.objective == "policy_gradient"
    return Point(name=name, kind=MEMBER if is_member else BASELINE, directory=directory,
                 alpha=config.reward.alpha if is_member else None,
                 outcomes=found(directory, config.run.steps) if processes.is_primary() else {},
                 seconds=processes.broadcast(f"{name} seconds",
                                           lambda: read_results(directory / RUN_FILE).points[1].seconds))


def finished(directory: Path, steps: int, sets: Sequence[str]) -> bool:
    """Whether a run has been concluded after so many steps, with all sets. Raises: UserError where it has done more."""
    path = directory / RUN_FILE
    done = read_results(path).steps if path.exists() else 0
    if done > steps:
        raise UserError(f"run.steps must be at least the {done} steps that {directory} has done, got {steps}")
    evaluated = runs.evaluations(directory, steps)
    return done == steps and all((evaluated / (name + responses.SUFFIX)).exists()
                                 for name in responses.file_names(sets).values())


def adopt(evaluated: Path, target: Path) -> None:
    """Gives a run the base model's evaluation, unless it has it."""
    with disk(target):
        target.mkdir(parents=True, exist_ok=True)
        for path in evaluated.glob(f"*{responses.SUFFIX}"):
            if not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)


def found(directory: Path, steps: int) -> dict[str, Outcomes]:
    """What a finished run made of each set, by the set's name."""
    by_set = {}
    for path in sorted(runs.evaluations(directory, steps).glob(f"*{responses.SUFFIX}")):
        facts, outcomes = responses.read_outcomes(path)
        by_set[facts["set"]] = outcomes
    return by_set


def blended(session: Session, directory: Path, points: Sequence[Point], weights: Sequence[float]) -> list[Point]:
    """Points between the base and the member of the greatest alpha, without training."""
    trained = max((point for point in points if point.kind == MEMBER), key=lambda point: point.alpha or 0.0)
    if not weights:
        return []
    base, target = session.load_weights(), session.engine.learner.params_sharding
    pretrained = open_pretrained(str(trained.directory / "model"), dtype="float32")
    other = load_weights(pretrained, target)
    mix = jax.jit(blend, out_shardings=target)
    made = []
    for weight in weights:
        name = f"blend {weight:g}"
        say(f"{name}: {1 - weight:g} of the base and {weight:g} of {trained.name}", processes.console())
        path = directory / f"blend{weight:g}-{trained.directory.name}-step{session.config.run.steps}"
        outcomes = session.evaluator.measure_all(
            mix(base, other, sharding.to_device(jax.numpy.float32(weight), session.engine.learner.replicated)),
            lambda now: session.interrupts.check(), weights=f"{weight:g} of {model_fingerprint(pretrained)}",
            directory=path)
        made.append(Point(name=name, kind=BLEND, directory=path, outcomes=outcomes, alpha=trained.alpha,
                          weight=weight))
    return made


def conclude(config: Config, inputs: Inputs, directory: Path, points: Sequence[Point]) -> None:
    """Writes family.json, the pictures and the page, and prints the tables."""
    base = points[0].outcomes
    family = Results(
        model=config.model.path, seed=config.run.seed, steps=config.run.steps, points=[results.Point(
            name=point.name, kind=point.kind, alpha=point.alpha, weight=point.weight,
            seconds=point.seconds, directory=point.directory.relative_to(directory).as_posix(),
            sets=measure(base, None if point is points[0] else point.outcomes))
            for point in points], **runs.made_with(config, inputs))
    results.write(directory / FAMILY_FILE, family)
    console = Console()
    print_results(console, family)
    console.print(f"the report: {page.write(directory)}", soft_wrap=True)
