"""What a run is given, opened and checked before anything that takes long: model, prompts, held-out problems."""

import dataclasses
import functools

import jax
from jax.sharding import Mesh

from effreason.data import loading, prompts, templates
from effreason.grading.grader import Grader
from effreason.lm.hf.pretrained import Pretrained, model_fingerprint, open_pretrained
from effreason.rl import rollouts
from effreason.rl.learner import check_model
from effreason.runtime.config import Config
from effreason.types import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The model but its weights, and the problems as it will read them."""

    pretrained: Pretrained
    template: templates.Template
    problems: prompts.Problems
    held_out: dict[str, list[Problem]]      # by set; empty: no evaluation
    notes: list[str]                # what became of the data, for people
    problems_sha256: str            # of the problems and of held_out: a resumed run needs the same ones
    held_out_sha256: str


def in_common(inputs: Inputs) -> dict[str, str]:
    """What several processes must have in common beside the configuration, by names for people."""
    return {"the version of JAX": jax.__version__,
            "model.path": model_fingerprint(inputs.pretrained),
            "the chat template": inputs.template.sha256[:12],
            "the problems of data.path": inputs.problems_sha256[:12],
            "the problems of evaluation.path": inputs.held_out_sha256[:12]}


def open_inputs(config: Config, mesh: Mesh, grader: Grader) -> Inputs:
    """Opens the model and reads the problems. Raises: UserError."""
    pretrained = open_pretrained(config.model.path, revision=config.model.revision, dtype=config.model.dtype,
                                    remat=config.model.remat)
    check_model(pretrained, config, mesh)
    tokenizer, template = pretrained.tokenizer, templates.choose(pretrained.tokenizer, config.data)
    unmatched = functools.partial(rollouts.unmatched, grader)
    problems = loading.load_training(config, tokenizer, template, unmatched)
    first = prompts.batch(problems, config.rollout.prompts_per_step, config.run.seed, 0)    # too few: say so now
    held_out, more = loading.load_held_out(config, tokenizer, template, unmatched) if config.evaluation.problems else (
        {}, ())
    all_held_out = [problem for problems in held_out.values() for problem in problems]
    shown = templates.display(templates.render(tokenizer, template, first[0].text))
    return Inputs(pretrained=pretrained, template=template, problems=problems, held_out=held_out,
                  notes=[*problems.notes, *more, f"the first prompt, by the template {template.name}:", shown],
                  problems_sha256=prompts.fingerprint(problems), held_out_sha256=prompts.fingerprint(all_held_out))
