"""The command `effreason blend`: models between a base and what was trained from it, without training.

The weights of the two are averaged. The share of the trained model's moves accuracy and length from one to the other,
so that an operating point can be chosen after training.
Source: WiSE-FT, arXiv 2109.01903; of short and long reasoners, Kimi k1.5, arXiv 2501.12599.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import ModelCardData

from effreason import __version__
from effreason.cli.arguments import Parser, numbers
from effreason.lm import model
from effreason.lm.blend import blend
from effreason.lm.hf import hub
from effreason.lm.hf.config import read_json
from effreason.lm.hf.pretrained import (
    FACTS_FILE,
    Pretrained,
    export_model,
    load_weights,
    open_pretrained,
)
from effreason.runs import model_card
from effreason.runtime.errors import UserError
from effreason.runtime.files import disk

LOWEST, HIGHEST = -1.0, 2.0         # weights beyond say nothing of the two models any more


def run(argv: Sequence[str], prog: str) -> None:
    """Writes a Hugging Face directory for each weight.

    Args: argv, the arguments after the command; prog, the command's name in the help.
    Raises: UserError, SystemExit(0) after --help."""
    options = _parser(prog).parse_args(argv)
    weights = numbers(options.weight, "--weight", lambda x: LOWEST <= x <= HIGHEST, f"[{LOWEST:g}, {HIGHEST:g}]")
    if not weights:
        raise UserError("--weight must be at least one number, got none")
    if options.revision is not None and (Path(options.base).exists() or not hub.is_hub_id(options.base)):
        raise UserError(f"--revision is for a base on the Hub, --base is {options.base}")
    targets = [Path(options.output if len(weights) == 1 else f"{options.output}-{weight:g}") for weight in weights]
    for target in targets:
        check_target(target)
    # On the host, whose memory holds two models sooner, and beside a run that has the accelerators.
    jax.config.update("jax_platforms", "cpu")
    base = open_pretrained(options.base, dtype="float32", revision=options.revision)
    trained = open_pretrained(options.trained, dtype="float32")
    check(base, trained)
    others = load_weights(trained)
    for weight, target in zip(weights, targets, strict=True):
        with disk(target):
            export_model(_blended(base, others, weight), trained.decoder, trained.directory, target,
                         facts=facts(base, trained, weight), card=card(base, trained, weight))
        print(f"{target}: {1 - weight:g} of {base.name} and {weight:g} of {trained.name}")


def _blended(base: Pretrained, others: model.Params, weight: float) -> model.Params:
    """The base, read again, with each array replaced by the blended one: never more than two models in memory."""
    leaves, tree = jax.tree.flatten(load_weights(base))
    mix = jax.jit(blend)
    for place, other in enumerate(jax.tree.leaves(others)):
        leaves[place] = jax.block_until_ready(mix(leaves[place], other, weight))
    return jax.tree.unflatten(tree, leaves)


def _parser(prog: str) -> Parser:
    made = Parser(prog, "Write a model between a base and what was trained from it: the weighted mean of their "
                  "weights, with the trained model's tokenizer and chat template. On the CPU; it takes the memory of "
                  "both in float32.")
    made.add_argument("--base", metavar="DIR", required=True,
                      help="a Hugging Face directory, the id of a model on the Hub, or tiny")
    made.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a base on the Hub")
    made.add_argument("--trained", metavar="DIR", required=True, help="what was trained from it, such as RUN/model")
    made.add_argument("--weight", metavar="X[,X...]", required=True,
                      help=f"the trained model's share: 0 = the base, 1 = the trained model, outside of [0, 1] an "
                      f"extrapolation, from {LOWEST:g} to {HIGHEST:g}; several with commas between them")
    made.add_argument("--output", metavar="DIR", required=True,
                      help="a new directory; with several weights one for each, DIR-0.25, DIR-0.5")
    return made


def check_target(target: Path) -> None:
    """Raises UserError unless a directory can be made there, which is not known to exist."""
    if target.exists() or hub.standing(target) is not None:
        raise UserError(f"--output: {target} exists already, nothing is overwritten")
    parent = next(each for each in target.absolute().parents if each.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--output: cannot write into {parent}")


def check(base: Pretrained, trained: Pretrained) -> None:
    """Raises UserError unless two models are of one architecture and read the same tokens."""
    for field in dataclasses.fields(base.decoder):
        ours, theirs = getattr(base.decoder, field.name), getattr(trained.decoder, field.name)
        if ours != theirs:
            raise UserError(f"--trained must be of the base's architecture: {field.name} of {trained.name} is "
                            f"{theirs}, of {base.name} {ours}")
    if base.tokenizer.get_vocab() != trained.tokenizer.get_vocab():
        raise UserError(f"--trained must have the base's tokens: the tokenizers of {trained.name} and {base.name} "
                        "have different vocabularies")


def facts(base: Pretrained, trained: Pretrained, weight: float) -> dict[str, Any] | None:
    """effreason.json: the trained model's, and what was blended; None where the trained model has none.

    Without it nothing is known of the prompts that the model was trained on, and a file must say that."""
    path = trained.directory / FACTS_FILE
    if not path.exists():
        return None
    return read_json(path) | {"blend": {"base": _public(base), "base_revision": base.revision,
                                        "trained": _public(trained), "weight": weight, "effreason": __version__}}


def card(base: Pretrained, trained: Pretrained, weight: float) -> str:
    """The text of README.md: a few lines, and nothing of a measurement."""
    on_hub = [each.name for each in (base, trained) if each.revision is not None]
    header = ModelCardData(base_model=on_hub or None, base_model_relation="merge" if on_hub else None,
                           library_name="transformers", pipeline_tag="text-generation",
                           tags=[*model_card.TAGS, "merge"]).to_yaml()
    at = f" at commit {base.revision}" if base.revision is not None else ""
    return "\n\n".join([
        f"---\n{header}\n---",
        f"# {_public(base)} and {_public(trained)}, blended ({weight:g})",
        f"Every weight of this model is {1 - weight:g} times that of `{_public(base)}`{at} plus {weight:g} times that "
        f"of `{_public(trained)}`, which was trained from it to reason in fewer tokens "
        f"([Training Language Models to Reason Efficiently]({model_card.PAPER})); computed in float32 by effreason "
        f"{__version__}. Tokenizer and chat template are those of `{_public(trained)}`.",
        "This model was not evaluated.",
    ]) + "\n"


def _public(pretrained: Pretrained) -> str:
    """A model's name for others: a path on this machine says nothing to them."""
    return pretrained.name if pretrained.revision is not None else Path(pretrained.name).name or pretrained.name
