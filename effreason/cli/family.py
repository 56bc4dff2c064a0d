"""A family: one model trained with several alphas, baselines and blends, all evaluated alike.

Everything is opened and compiled once. Each member is a run of its own, in its own directory.
"""

import dataclasses
import functools
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
from effreason.runs import directory as run_directory
from effreason.runs import results
from effreason.runs.export import exported_step
from effreason.runs.report import page
from effreason.runs.report.summary import print_results
from effreason.runs.results import FAMILY_FILE, RUN_FILE, Point, PointKind, Results, measure
from effreason.runs.session import Inputs, Session, longest_prompt, open_session
from effreason.runtime import processes, sharding
from effreason.runtime.config import Config
from effreason.runtime.errors import Interrupted, UserError
from effreason.runtime.files import disk
from effreason.runtime.progress import say
from effreason.types import Outcomes

BASE_FOLDER = "base"                # responses of the model before training
BASELINES = {"sft_shortest": "SFT, shortest", "dpo": "DPO"}
# Shares of the family's learning rate. DPO is commonly trained with a lower one: at the same one it
# forgets how to answer (docs/families.md).
LEARNING_RATES = {"sft_shortest": 1.0, "dpo": 0.1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """A run of a family: a member, or a baseline."""

    name: str
    kind: PointKind
    config: Config

    @property
    def directory(self) -> Path:
        """The directory of the run."""
        return Path(self.config.run.directory or "")


def train(config: Config, alphas: Sequence[float], baselines: Sequence[str],
          weights: Sequence[float]) -> Path:
    """Trains a member for each alpha and each baseline, evaluates blends, and writes the report.

    A family that was stopped continues where it stopped; a resumed one may have more members.

    Args: weights, of the member with the greatest alpha in its blends with the base.
    Returns: the family's directory.
    Raises: UserError; Interrupted, with everything saved."""
    check(config)
    processes.check_same({"--family": f"{alphas}", "--baselines": f"{baselines}",
                          "--blends": f"{weights}"})

    with (run_directory.opened(config, name=f"family-seed{config.run.seed}",
                               may_change=("reward.alpha",), family=True) as directory,
          open_session(config) as session):
        options = {"family": [f"{alpha:g}" for alpha in alphas], "baselines": baselines,
                   "blends": [f"{weight:g}" for weight in weights]}
        command = run_directory.resume_command(directory, "".join(
            f" --{name} {','.join(values) or 'none'}" for name, values in options.items()))
        if processes.is_primary():
            # First, so that config.yaml alone is a run. A resumed family keeps its results.
            if not config.run.resume:
                results.write(directory / FAMILY_FILE,
                              family_results(session.config, session.inputs, []))
            run_directory.write_config(session.config, directory)

        try:
            base = evaluate_base(session, directory)
            trained = members(session.config, alphas, baselines, directory)
            for number, member in enumerate(trained, start=1):
                say(f"\n{member.name} ({number} of {len(trained)})", processes.console())
                train_member(session, member, directory, list(base), command)
            greatest = max(trained[:len(alphas)], key=lambda member: member.config.reward.alpha)
            blends = evaluate_blends(session, greatest, weights, directory) if weights else {}
        except Interrupted as stop:
            message = stop.message
            if "continue with" not in message:
                message = f"{message}; continue with: {command}"
            raise Interrupted(stop.signum, message if processes.is_primary() else "") from None

    if processes.is_primary():
        points = [Point(name="base", kind=PointKind.BASE, directory=BASE_FOLDER,
                        sets=measure(base))]
        points += [member_point(member) for member in trained] + [
            Point(name=f"blend {weight:g}", kind=PointKind.BLEND, weight=weight,
                  alpha=greatest.config.reward.alpha, sets=measure(base, outcomes),
                  directory=blend_folder(greatest, weight)) for weight, outcomes in blends.items()]
        conclude(directory, family_results(session.config, session.inputs, points))
    return directory


def check(config: Config) -> None:
    """Raises UserError for a configuration that a family cannot have."""
    if config.evaluation.problems == 0:
        raise UserError("evaluation.problems must be >= 1 to compare the members of a family, "
                        "got 0")
    if config.update.objective != "policy_gradient":
        raise UserError("update.objective must be policy_gradient for a family, which has its own "
                        f"baselines, got {config.update.objective}")
    if config.reward.alphas is not None:
        raise UserError("reward.alphas must be null for a family, which trains a model for each "
                        f"alpha, got {config.reward.alphas}")
    if alpha_control.is_on(config.reward):
        raise UserError(
            "reward.target_tokens and reward.max_accuracy_drop must be null for a family, whose "
            f"members keep their alphas, got {config.reward.target_tokens} and "
            f"{config.reward.max_accuracy_drop}")
    if not configured_reward.has_alpha(config.reward):
        raise UserError("reward.form must be one with an alpha for a family, got "
                        f"{config.reward.form}")


def members(config: Config, alphas: Sequence[float], baselines: Sequence[str],
            directory: Path) -> list[Member]:
    """Returns the members, then the baselines, each with a run directory of its own."""
    def make_member(name: str, kind: PointKind, config: Config, folder: str) -> Member:
        path = directory / folder
        resume = processes.broadcast(f"member {name}", lambda: (path / "config.yaml").exists())
        run = dataclasses.replace(config.run, directory=str(path), resume=resume)
        group = config.log.wandb_group or (directory.name if config.log.wandb else None)
        log = dataclasses.replace(config.log, wandb_group=group)
        return Member(name=name, kind=kind, config=dataclasses.replace(config, run=run, log=log))

    with_alpha = [make_member(
        f"α = {alpha:g}", PointKind.MEMBER,
        dataclasses.replace(config, reward=dataclasses.replace(config.reward, alpha=alpha)),
        f"alpha{alpha:g}") for alpha in alphas]
    return with_alpha + [make_member(
        BASELINES[objective], PointKind.BASELINE, baseline(config, objective), objective)
        for objective in baselines]


def baseline(config: Config, objective: Any) -> Config:
    """Returns the configuration of a baseline: another objective, on responses of the base.

    It learns from as many responses as a member."""
    learning_rate = config.update.learning_rate * LEARNING_RATES[objective]
    return dataclasses.replace(
        config, kl=dataclasses.replace(config.kl, form="none"),
        rollout=dataclasses.replace(config.rollout, policy="initial", refill_rounds=0),
        advantage=dataclasses.replace(config.advantage, whiten=False, group_std=False),
        update=dataclasses.replace(
            config.update, objective=objective, learning_rate=learning_rate, updates_per_batch=1,
            importance_cap=None))


def evaluate_base(session: Session, directory: Path) -> dict[str, Outcomes]:
    """Evaluates the model before training, once for all members."""
    say("evaluating the model before training", processes.console())
    return session.evaluator.measure_all(
        functools.cache(session.load_weights), lambda progress: session.interrupts.check(),
        weights=model_fingerprint(session.inputs.pretrained), directory=directory / BASE_FOLDER)


def train_member(session: Session, member: Member, family: Path, sets: Sequence[str],
                 command: str) -> None:
    """Trains one member unless it is finished. Args: family, directory of the family."""
    config, directory = member.config, member.directory
    if processes.broadcast(f"{member.name} finished",
                           lambda: finished(directory, config.run.steps, sets)):
        say("trained already", processes.console())
        return

    if processes.is_primary():
        copy_responses(family / BASE_FOLDER, results.evaluations(directory, 0))
    if member.kind == PointKind.BASELINE:
        learner = Learner(config, session.inputs.pretrained.decoder, session.mesh,
                          longest_prompt(session.inputs.problems))
        session = dataclasses.replace(
            session, engine=dataclasses.replace(session.engine, learner=learner))
    loop.train(config, session, command)


def finished(directory: Path, steps: int, sets: Sequence[str]) -> bool:
    """Returns whether a run was concluded after `steps` steps, with all sets, model and page.

    Raises: UserError if it has made more steps."""
    path = directory / RUN_FILE
    steps_made = results.read_results(path).steps if path.exists() else 0
    if steps_made > steps:
        raise UserError(f"run.steps must be at least the {steps_made} steps that {directory} has "
                        f"done, got {steps}")
    evaluated = results.evaluations(directory, steps)
    files = [evaluated / (name + responses.SUFFIX) for name in responses.file_names(sets).values()]
    return (steps_made == steps == exported_step(directory / "model")
            and all(path.exists() for path in [*files, directory / page.PAGE]))


def copy_responses(source: Path, target: Path) -> None:
    """Copies the graded responses of a directory that are not yet in another."""
    with disk(target):
        target.mkdir(parents=True, exist_ok=True)
        for path in source.glob(f"*{responses.SUFFIX}"):
            if not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)


def evaluate_blends(session: Session, member: Member, weights: Sequence[float],
                    directory: Path) -> dict[float, dict[str, Outcomes]]:
    """Evaluates weighted means of the base and a member. Args: weights, of the member."""
    learner, base = session.engine.learner, session.load_weights()
    pretrained = open_pretrained(str(member.directory / "model"), dtype="float32")
    trained = load_weights(pretrained, learner.params_sharding)
    mix = jax.jit(blend, out_shardings=learner.params_sharding)

    outcomes = {}
    for weight in weights:
        say(f"blend {weight:g}: {1 - weight:g} of the base and {weight:g} of {member.name}",
            processes.console())
        share = sharding.to_device(jax.numpy.float32(weight), learner.replicated)
        outcomes[weight] = session.evaluator.measure_all(
            functools.cache(functools.partial(mix, base, trained, share)),
            lambda progress: session.interrupts.check(),
            weights=f"{weight:g} of {model_fingerprint(pretrained)}",
            directory=directory / blend_folder(member, weight))
    return outcomes


def blend_folder(member: Member, weight: float) -> str:
    """Returns the folder of a blend's responses."""
    return f"blend{weight:g}-{member.directory.name}-step{member.config.run.steps}"


def member_point(member: Member) -> Point:
    """Returns the point of a finished member in its family."""
    run = results.read_results(member.directory / RUN_FILE)
    return dataclasses.replace(run.points[1], name=member.name, kind=member.kind,
                               directory=member.directory.name, alpha_start=None)


def family_results(config: Config, inputs: Inputs, points: list[Point]) -> Results:
    """Returns the content of family.json."""
    return Results(model=config.model.path, seed=config.run.seed, steps=config.run.steps,
                   points=points, **run_directory.made_with(config, inputs))


def conclude(directory: Path, family: Results) -> None:
    """Writes family.json, the pictures and the page, and prints the tables."""
    results.write(directory / FAMILY_FILE, family)
    console = Console()
    print_results(console, family)
    console.print(f"the report: {page.write(directory)}", soft_wrap=True)
