"""The trained model for others: a Hugging Face directory that says what it was made of and how it reads prompts."""

from pathlib import Path
from typing import Any

from effreason import __version__
from effreason.data.presets import PRESETS
from effreason.evaluation.statistics import Summary
from effreason.lm import model
from effreason.lm.hf import hub
from effreason.lm.hf.pretrained import export_model
from effreason.runs import model_card
from effreason.runs.inputs import Inputs
from effreason.runtime.config import Config
from effreason.runtime.files import disk


def export(params: model.Params, step: int, config: Config, inputs: Inputs, target: Path, alpha: float) -> None:
    """Writes weights, tokenizer, template, facts and card. Raises: UserError where the disk takes no more.

    Args: alpha, the one it was trained with last."""
    facts = origin(inputs) | {"data": [_public(source.name) for source in inputs.problems.sources],
                              "objective": config.update.objective, "reward": config.reward.form, "alpha": alpha,
                              "seed": config.run.seed, "step": step, "effreason": __version__}
    with disk(target):
        export_model(params, inputs.pretrained.decoder, inputs.pretrained.directory, target,
                  chat_template=inputs.template.text, facts=facts, card=card(step, config, inputs, alpha, None, None))


def origin(inputs: Inputs) -> dict[str, Any]:
    """What a model was trained from: the base model's commit, the template and the problems with their hashes."""
    return {"base_model": _public(inputs.pretrained.name), "base_revision": inputs.pretrained.revision,
            "template": inputs.template.facts(), "problems_sha256": inputs.problems_sha256,
            "held_out_sha256": inputs.held_out_sha256}


def card(step: int, config: Config, inputs: Inputs, alpha: float, base: Summary | None, trained: Summary | None) -> str:
    """The model card; the evaluations as far as they are there."""
    names = [source.name for source in inputs.problems.sources]
    known = [PRESETS[name].hub if name in PRESETS else name for name in names]
    evaluated = next(iter(inputs.held_out), "")
    chosen = {"objective": (config.update.objective, "policy_gradient"), "reward": (config.reward.form, "efficient")}
    settings = {name: value for name, (value, default) in chosen.items() if value != default}
    return model_card.model_card(
        base_model=inputs.pretrained.name, base_revision=inputs.pretrained.revision, alpha=alpha,
        data=", ".join(_public(name) for name in names),
        datasets=[name for name in known if name and hub.is_hub_id(name) and not Path(name).exists()],
        step=step, version=__version__, template=inputs.template.name, template_sha256=inputs.template.sha256,
        user_prompt=inputs.template.user_prompt, temperature=config.rollout.temperature, top_p=config.rollout.top_p,
        max_new_tokens=config.rollout.max_new_tokens,
        evaluation_set=_public(evaluated), before=base, after=trained, settings=settings)


def _public(name: str) -> str:
    """A name for others: a path on the machine of the training says nothing to them, and may say too much."""
    return Path(name).name if Path(name).exists() else name
