"""Everything a run has open: mesh, model, problems, compiled functions, grader, evaluator.

It is opened and checked before anything that takes long.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from effreason.data import loading, prompts, templates
from effreason.evaluation.evaluate import Evaluator, make_grader
from effreason.grading.grader import Grader
from effreason.lm import model
from effreason.lm.hf.peft import read_adapter
from effreason.lm.hf.pretrained import Pretrained, load_weights, model_fingerprint, open_pretrained
from effreason.rl import configured_reward
from effreason.rl.learner import Engine, check_adapters, check_model, make_engine
from effreason.rl.rollouts import unmatched
from effreason.runs.outlook import outlook
from effreason.runtime import config as configuration
from effreason.runtime import processes, sharding
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError
from effreason.runtime.progress import say
from effreason.runtime.signals import Interrupts
from effreason.sampling import capacity
from effreason.types import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The model without its weights, and the problems, tokenised for it."""

    pretrained: Pretrained
    template: templates.Template
    problems: prompts.Problems
    held_out: dict[str, list[Problem]]      # by set; empty: no evaluation
    notes: list[str]                # what became of the data, for people
    problems_sha256: str            # of the problems and of held_out: a resumed run needs the same
    held_out_sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """What is open while a run trains, or the runs of a family one after another."""

    config: Config                  # with the commit of a model on the Hub
    inputs: Inputs
    mesh: Mesh
    engine: Engine
    grader: Grader
    interrupts: Interrupts
    evaluator: Evaluator

    def load_weights(self, *, merged: bool = True) -> model.Params:
        """Loads the weights of the model before training. Args: merged, with its adapters."""
        return load_weights(self.inputs.pretrained, self.engine.learner.params_sharding,
                            merged=merged)

    def load_adapters(self) -> model.Params | None:
        """Loads the adapters that training starts from; None if there are none."""
        pretrained = self.inputs.pretrained
        if not self.config.adapter.rank or pretrained.adapters is None:
            return None
        return read_adapter(pretrained.adapters.directory, pretrained.decoder)[1]


def make_mesh(config: Config) -> Mesh:
    """Builds the configured mesh. Raises: UserError, which names the recipes for these devices."""
    try:
        return sharding.make_mesh(**dataclasses.asdict(config.mesh))
    except UserError as error:
        recipes = configuration.recipes(config.model.path, jax.device_count())
        if not recipes:
            raise
        raise UserError(f"{error}; for {jax.device_count()} there is "
                        f"{' or '.join(recipes)}") from None


@contextlib.contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """Opens and checks everything a run needs except the weights. Raises: UserError."""
    sharding.use_compilation_cache()
    mesh = make_mesh(config)

    with (jax.set_mesh(mesh), Interrupts(with_output=True) as interrupts,
          make_grader(config) as grader):
        processes.check_same(configured_reward.sources(config.reward))
        inputs = open_inputs(config, mesh, grader)
        processes.check_same({
            "the version of JAX": jax.__version__,
            "model.path": model_fingerprint(inputs.pretrained),
            "the chat template": inputs.template.sha256[:12],
            "the problems of data.path": inputs.problems_sha256[:12],
            "the problems of evaluation.path": inputs.held_out_sha256[:12]})

        # Before the weights are loaded: there may be something to correct.
        sampler_note = capacity.describe(config, inputs.pretrained.decoder, mesh,
                                         capacity.training_weight_bytes(config))
        forecast = outlook(config, inputs.pretrained.decoder, inputs.problems.sources[0].problems)
        for note in [*inputs.notes, sampler_note, *([forecast] if forecast else []),
                     *warnings(config)]:
            say(note, processes.console())

        # A resumed run uses the weights it began with, even if the branch has moved since.
        config = dataclasses.replace(config, model=dataclasses.replace(
            config.model, revision=inputs.pretrained.revision))
        engine = make_engine(config, inputs.pretrained, mesh, longest_prompt(inputs.problems))
        evaluator = Evaluator(
            config=config, pretrained=inputs.pretrained, template=inputs.template,
            sampler=engine.sampler, sets=inputs.held_out, grader=grader, seed=config.run.seed)
        yield Session(config=config, inputs=inputs, mesh=mesh, engine=engine, grader=grader,
                      interrupts=interrupts, evaluator=evaluator)


def open_inputs(config: Config, mesh: Mesh, grader: Grader) -> Inputs:
    """Opens the model and reads the problems. Raises: UserError."""
    pretrained = open_pretrained(config.model.path, revision=config.model.revision,
                                 dtype=config.model.dtype, remat=config.model.remat,
                                 stop_ids=config.rollout.stop_ids, adapter=config.model.adapter,
                                 positions=capacity.max_positions(config))
    check_model(pretrained, config, mesh)
    check_adapters(config, pretrained)
    tokenizer, template = pretrained.tokenizer, templates.choose(pretrained.tokenizer, config.data)

    check_references = functools.partial(unmatched, grader)
    problems = loading.load_training(config, tokenizer, template, check_references)
    held_out: dict[str, list[Problem]] = {}
    held_out_notes: tuple[str, ...] = ()
    if config.evaluation.problems:
        held_out, held_out_notes = loading.load_held_out(config, tokenizer, template,
                                                         check_references)

    all_held_out = [problem for problems in held_out.values() for problem in problems]
    trained_on = [problem for source in problems.sources for problem in source.problems]
    templates.check_rows(tokenizer, [*trained_on, *all_held_out], pretrained.decoder.vocabulary)

    # The first batch, at once: there may be too few problems.
    first = prompts.batch(problems, config.rollout.prompts_per_step, config.run.seed, 0)[0]
    prompt = templates.display(templates.render(tokenizer, template, first.text))
    turn_end = templates.turn_end_notes(tokenizer, template, pretrained.eos_ids)
    notes = [*pretrained.notes, *_start_notes(config, pretrained), *problems.notes,
             *held_out_notes, *turn_end,
             f"the first prompt, by the template {template.name}:", prompt]
    return Inputs(pretrained=pretrained, template=template, problems=problems, held_out=held_out,
                  notes=notes, problems_sha256=prompts.fingerprint(problems),
                  held_out_sha256=prompts.fingerprint(all_held_out))


def _start_notes(config: Config, pretrained: Pretrained) -> list[str]:
    """Returns what becomes of the adapters of the model that a run starts from."""
    stored = pretrained.adapters
    if stored is None:
        return []
    done = "trained further" if config.adapter.rank else "merged into the weights"
    return [f"the adapters in {stored.directory}, of rank {stored.rank} for "
            f"{', '.join(stored.targets)}, are {done}"]


def longest_prompt(problems: prompts.Problems) -> int:
    """Returns the tokens of the longest training prompt, which rows must have room for."""
    return max(len(problem.prompt) for source in problems.sources for problem in source.problems)


def warnings(config: Config) -> list[str]:
    """Returns warnings about settings whose effect may surprise."""
    lines = []
    if config.advantage.group_std:
        lines.append("warning: advantage.group_std cancels reward.alpha in groups that are all "
                     "correct")
    if config.advantage.whiten:
        lines.append("warning: advantage.whiten pulls on length even at reward.alpha 0: run that "
                     "control too")
    if config.rollout.top_p < 1 or config.rollout.top_k is not None or config.rollout.min_p > 0:
        lines.append("warning: rollout.top_p, top_k and min_p sample from a truncation of the "
                     "policy that is updated")
    if config.rollout.policy == "initial" and config.update.objective == "policy_gradient":
        lines.append("warning: with rollout.policy initial the policy gradient is that of the "
                     "initial policy, and less valid the further training goes")
    return lines
