"""The trained model for others: a Hugging Face directory with a card and facts of training."""

from pathlib import Path
from typing import Any

from effreason import __version__
from effreason.lm import model
from effreason.lm.hf.hub import public_name
from effreason.lm.hf.pretrained import FACTS_FILE, export_model
from effreason.runs.model_card import model_card
from effreason.runs.session import Inputs
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError
from effreason.runtime.files import disk, read_json


def export(params: model.Params, decoder: model.DecoderConfig, step: int, config: Config,
           inputs: Inputs, target: Path, alpha: float) -> None:
    """Writes weights, tokenizer, template, facts and card. Raises: UserError for a full disk.

    Args: decoder, of the weights, with adapters to write these alone; step, updates made; alpha,
        the last one."""
    facts = origin(inputs) | {
        "data": [public_name(source.name) for source in inputs.problems.sources],
        "objective": config.update.objective, "reward": config.reward.form, "alpha": alpha,
        "seed": config.run.seed, "step": step, "effreason": __version__}
    pretrained = inputs.pretrained
    on_hub = None if pretrained.revision is None else (pretrained.base, pretrained.revision)
    card = model_card(config, inputs, step=step, alpha=alpha)

    with disk(target):
        export_model(params, decoder, pretrained.directory, target, own=pretrained.own_directory,
                     chat_template=inputs.template.text, card=card, facts=facts,
                     eos_ids=pretrained.eos_ids, base=on_hub)


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
