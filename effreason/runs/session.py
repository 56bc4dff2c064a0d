"""What is open while training goes on: mesh, model, problems, compiled functions, grader; checked before it costs."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from effreason.data import prompts
from effreason.evaluation import evaluate as evaluation
from effreason.grading.grader import Grader
from effreason.lm import model
from effreason.lm.hf.pretrained import load_weights
from effreason.rl.learner import Engine, make_engine
from effreason.runs.inputs import Inputs, in_common, open_inputs
from effreason.runtime import config as configuration
from effreason.runtime import processes, sharding
from effreason.runtime.config import Config
from effreason.runtime.progress import say
from effreason.runtime.signals import Interrupts
from effreason.sampling import capacity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """What is open while a run trains, or the runs of a family one after another."""

    config: Config                  # with the commit of a model on the Hub
    inputs: Inputs
    mesh: Mesh
    engine: Engine
    grader: Grader
    interrupts: Interrupts
    evaluate: evaluation.Evaluate

    def load_weights(self) -> model.Params:
        """The weights of the model before training."""
        return load_weights(self.inputs.pretrained, self.engine.learning.params_sharding)


@contextlib.contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """Opens and checks all that a run needs but its weights. Raises: UserError."""
    processes.check_same(configuration.facts(config))       # what differs would be asked for in other ways
    sharding.use_compilation_cache()
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    with jax.set_mesh(mesh), Interrupts() as interrupts, evaluation.make_grader(config) as grader:
        inputs = open_inputs(config, mesh, grader)
        processes.check_same(in_common(inputs))
        sampler = capacity.describe(config, inputs.pretrained.decoder, mesh, capacity.training_weight_bytes(config))
        for line in [*inputs.notes, sampler, *warnings(config)]:    # before the weights: there may be something to mend
            say(line, processes.console())
        # A resumed run takes the very weights it began with, wherever the branch has moved since.
        config = dataclasses.replace(config, model=dataclasses.replace(
            config.model, revision=inputs.pretrained.revision))
        engine = make_engine(config, inputs.pretrained, mesh, longest_prompt(inputs.problems))
        evaluate = evaluation.make_evaluator(config, inputs.pretrained, inputs.template, engine.sampler,
                                             inputs.held_out, grader)
        yield Session(config=config, inputs=inputs, mesh=mesh, engine=engine, grader=grader, interrupts=interrupts,
                      evaluate=evaluate)


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
    if config.rollout.policy == "initial" and config.update.objective == "policy_gradient":
        lines.append("warning: rollout.policy initial makes the policy gradient that of another policy, the further "
                     "training goes")
    return lines
