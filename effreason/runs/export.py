"""The trained model for others: a Hugging Face directory with a card and facts of training."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from effreason import __version__
from effreason.data import prompts, sources, templates
from effreason.evaluation.models import TrainedWeights
from effreason.evaluation.statistics import Summary
from effreason.lm import model
from effreason.lm.architecture import DecoderConfig
from effreason.lm.hf.hub import public_name
from effreason.lm.hf.pretrained import FACTS_FILE, export_model
from effreason.runs import dial_points
from effreason.runs.model_card import model_card
from effreason.runs.session import Inputs
from effreason.runtime.config import Config, ExportConfig, MeshConfig
from effreason.runtime.errors import UserError
from effreason.runtime.files import disk, read_json


def export(params: model.Params, decoder: DecoderConfig, step: int, config: Config,
           inputs: Inputs, target: Path, alpha: float, before: Summary | None = None,
           after: Summary | None = None) -> None:
    """Writes weights, tokenizer, template, facts and card. Raises: UserError for a full disk.

    Args: decoder, of the weights, with adapters to write these alone; step, updates made; alpha,
        the last one, or that of the dial; before and after, as in `model_card`."""
    facts = origin(inputs) | {
        "data": [public_name(source.name) for source in inputs.problems.sources],
        "objective": config.update.objective, "reward": config.reward.form, "alpha": alpha,
        **({"dial": list(config.reward.dial)} if config.reward.dial else {}),
        "seed": config.run.seed, "step": step, "effreason": __version__}
    pretrained = inputs.pretrained
    on_hub = None if pretrained.revision is None else (pretrained.base, pretrained.revision)
    card = model_card(config, inputs, step=step, alpha=alpha, before=before, after=after)

    with disk(target):
        export_model(params, decoder, pretrained.directory, target, own=pretrained.own_directory,
                     chat_template=inputs.template.text, card=card, facts=facts,
                     eos_ids=pretrained.eos_ids, base=on_hub)


def export_trained(trained: TrainedWeights, read: Callable[[float | None], model.Params],
                   target: Path) -> None:
    """Writes a model from a checkpoint. Args: read, see `TrainedWeights.reader`."""
    _export_stored(trained, read(trained.checkpoint.alpha), trained.pretrained.decoder, target)


def export_adapter(trained: TrainedWeights, mesh: Mesh, target: Path) -> None:
    """Writes the adapters of a checkpoint alone."""
    learner = trained.learner(mesh, MeshConfig())
    state, _ = trained.restore(learner)
    policy = learner.policy(state, {"layers": {}}, trained.setting(trained.checkpoint.alpha))
    _export_stored(trained, policy, learner.decoder, target)


def _export_stored(trained: TrainedWeights, params: model.Params, decoder: DecoderConfig,
                   target: Path) -> None:
    """Writes a directory whose card has what the run has measured. Raises: UserError."""
    run, step = trained.checkpoint.run, trained.checkpoint.step
    config = dataclasses.replace(
        trained.config, export=ExportConfig(adapter=decoder.adapter is not None))
    measured = dial_points.summaries(run, config, step, trained.alpha)
    export(params, decoder, step, config, stored_inputs(trained), target, trained.alpha, *measured)


def stored_inputs(trained: TrainedWeights) -> Inputs:
    """Returns what a checkpoint says about a run's inputs; the problems themselves are not read."""
    config, pretrained, facts = trained.config, trained.pretrained, trained.facts
    trained_on = sources.parse(config.data.path, "data.path")
    path = sources.evaluation_path(config) if config.evaluation.problems else None
    held_out = [] if path is None else sources.parse(path, "evaluation.path")
    return Inputs(
        pretrained=pretrained, template=templates.choose(pretrained.tokenizer, config.data),
        problems=prompts.Problems(tuple(
            prompts.Source(source.name, None, ()) for source in trained_on)),
        held_out={source.name: [] for source in held_out}, notes=[],
        problems_sha256=facts["problems_sha256"], held_out_sha256=facts["held_out_sha256"])


def exported_step(target: Path) -> int | None:
    """Returns the updates that the model in a directory has had; None if there is none."""
    try:
        step = read_json(target / FACTS_FILE).get("step")
    except UserError:
        return None
    return step if isinstance(step, int) else None


def origin(inputs: Inputs) -> dict[str, Any]:
    """Returns what a model was trained from: base model, template and problems, with hashes."""
    stored = inputs.pretrained.adapters
    return {"base_model": public_name(inputs.pretrained.base),
            "base_revision": inputs.pretrained.revision,
            **({} if stored is None else {"base_adapter": public_name(str(stored.directory))}),
            "template": inputs.template.facts(), "problems_sha256": inputs.problems_sha256,
            "held_out_sha256": inputs.held_out_sha256}
