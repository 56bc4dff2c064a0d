"""The command `effreason blend`: averages the weights of a base model and one trained from it.

Neither model is trained further. The share of the trained model moves accuracy and response length
from one to the other, so a compromise can be chosen after training; lm/blend.py has the sources.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import ModelCardData

from effreason import __version__
from effreason.cli.arguments import Parser, check_revision, check_target, numbers
from effreason.lm import model
from effreason.lm.blend import blend
from effreason.lm.hf.hub import public_name
from effreason.lm.hf.pretrained import (
    FACTS_FILE,
    Pretrained,
    export_model,
    load_weights,
    open_pretrained,
)
from effreason.runs import model_card
from effreason.runtime.errors import UserError
from effreason.runtime.files import disk, read_json

LOWEST, HIGHEST = -1.0, 2.0         # beyond these the result has little to do with either model


def run(argv: Sequence[str], prog: str) -> None:
    """Writes a Hugging Face directory for each weight. Raises: UserError."""
    options = _parser(prog).parse_args(argv)
    weights = numbers(options.weight, "--weight", lambda x: LOWEST <= x <= HIGHEST,
                      f"[{LOWEST:g}, {HIGHEST:g}]")
    if not weights:
        raise UserError("--weight must be at least one number, got none")
    check_revision(options.revision, options.base, "--base")
    targets = [Path(options.output if len(weights) == 1 else f"{options.output}-{weight:g}")
               for weight in weights]
    for target in targets:
        check_target(target)

    # The host's memory is more likely to hold two models, and a training run may hold the devices.
    jax.config.update("jax_platforms", "cpu")
    base = open_pretrained(options.base, dtype="float32", revision=options.revision)
    trained = open_pretrained(options.trained, dtype="float32")
    check(base, trained)
    trained_params = load_weights(trained)

    for weight, target in zip(weights, targets, strict=True):
        with disk(target):
            export_model(_blended(base, trained_params, weight), trained.decoder,
                         trained.directory, target, own=trained.own_directory,
                         facts=facts(base, trained, weight), card=card(base, trained, weight))
        print(f"{target}: {1 - weight:g} of {base.name} and {weight:g} of {trained.name}")


def _blended(base: Pretrained, trained_params: model.Params, weight: float) -> model.Params:
    """Reads the base and blends it array by array: memory never holds more than two models."""
    leaves, tree = jax.tree.flatten(load_weights(base))
    mix = jax.jit(blend)
    for index, other in enumerate(jax.tree.leaves(trained_params)):
        leaves[index] = jax.block_until_ready(mix(leaves[index], other, weight))
    return jax.tree.unflatten(tree, leaves)


def _parser(prog: str) -> Parser:
    parser = Parser(prog, "Write a model between a base model and one trained from it: the "
                    "weighted mean of their weights, with the tokenizer and chat template of the "
                    "trained model. Runs on the CPU and needs memory for both models in float32.")
    parser.add_argument("--base", metavar="DIR", required=True,
                        help="a Hugging Face directory, the id of a model on the Hub, or tiny")
    parser.add_argument("--revision", metavar="NAME",
                        help="branch, tag or commit of a base on the Hub")
    parser.add_argument("--trained", metavar="DIR", required=True,
                        help="the model trained from it, such as RUN/model")
    parser.add_argument("--weight", metavar="X[,X...]", required=True,
                        help="share of the trained model: 0 = the base, 1 = the trained model; "
                        f"outside [0, 1] it extrapolates, from {LOWEST:g} to {HIGHEST:g}; several "
                        "shares are separated by commas")
    parser.add_argument("--output", metavar="DIR", required=True,
                        help="a new directory; with several weights one for each, such as DIR-0.25 "
                        "and DIR-0.5")
    return parser


def check(base: Pretrained, trained: Pretrained) -> None:
    """Raises UserError unless both models have the same architecture and tokens."""
    for field in dataclasses.fields(base.decoder):
        ours, theirs = getattr(base.decoder, field.name), getattr(trained.decoder, field.name)
        if ours != theirs:
            raise UserError("--trained must have the architecture of the base: "
                            f"{field.name} of {trained.name} is {theirs}, of {base.name} {ours}")
    if base.tokenizer.get_vocab() != trained.tokenizer.get_vocab():
        raise UserError("--trained must have the tokens of the base: the tokenizers of "
                        f"{trained.name} and {base.name} have different vocabularies")


def facts(base: Pretrained, trained: Pretrained, weight: float) -> dict[str, Any] | None:
    """Returns the contents of effreason.json: those of the trained model, and what was blended.

    Returns None if the trained model has no such file: then it is unknown which prompts it was
    trained on, which a file would have to say."""
    path = trained.own_directory / FACTS_FILE
    if not path.exists():
        return None
    return read_json(path) | {"blend": {
        "base": public_name(base.name), "base_revision": base.revision,
        "trained": public_name(trained.name), "weight": weight, "effreason": __version__}}


def card(base: Pretrained, trained: Pretrained, weight: float) -> str:
    """Returns the text of README.md: a few lines, without any measurement."""
    on_hub = [one.name for one in (base, trained) if one.revision is not None]
    relation = "merge" if on_hub else None
    header = ModelCardData(base_model=on_hub or None, base_model_relation=relation,
                           library_name="transformers", pipeline_tag="text-generation",
                           tags=[*model_card.TAGS, "merge"]).to_yaml()
    base_name, trained_name = public_name(base.name), public_name(trained.name)
    at = f" at commit {base.revision}" if base.revision is not None else ""
    return f"""---
{header}
---

# {base_name} and {trained_name}, blended ({weight:g})

Every weight of this model is {1 - weight:g} times that of `{base_name}`{at} plus {weight:g} \
times that of `{trained_name}`, which was trained from it to reason in fewer tokens \
([Training Language Models to Reason Efficiently]({model_card.PAPER})); computed in float32 by \
effreason {__version__}. The tokenizer and the chat template are those of `{trained_name}`.

This model was not evaluated.
"""
