"""The command `effreason export`: a checkpoint of a run becomes a Hugging Face directory.

It is the merged model, at any alpha of a dial, or the adapters in the format of the peft library.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from effreason.cli.arguments import Parser, bounded
from effreason.cli.blend import check_target
from effreason.data import prompts, sources, templates
from effreason.evaluation.models import on_devices
from effreason.lm.hf.pretrained import Pretrained, open_pretrained
from effreason.rl import dial
from effreason.rl.checkpoints import Checkpoints
from effreason.rl.learner import Learner
from effreason.runs.export import export
from effreason.runs.session import Inputs
from effreason.runtime import config as configuration
from effreason.runtime import sharding
from effreason.runtime.config import Config, ExportConfig, MeshConfig
from effreason.runtime.errors import UserError

_step = bounded("positive integer", int, lambda value: 0 < value < 1e9)
_alpha = bounded("number in [0, 1)", float, lambda value: 0 <= value < 1)


def run(argv: Sequence[str], prog: str) -> None:
    """Writes the directory. Raises: UserError."""
    options = _parser(prog).parse_args(argv)
    directory, target = Path(options.run), Path(options.output)
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory}: must be the directory of a run, it holds no config.yaml")
    check_target(target)
    config = configuration.load(directory / "config.yaml")
    setting = dial.checked_setting(config.reward, options.alpha, str(directory))
    if options.adapter and not config.adapter.rank:
        raise UserError(f"--adapter: {directory} was trained without adapters, adapter.rank is 0")

    mesh = sharding.make_mesh(data=-1)      # this machine's devices, whatever the run had
    config = on_devices(config, MeshConfig(), mesh)
    config = dataclasses.replace(config, export=ExportConfig(adapter=options.adapter))
    pretrained = open_pretrained(config.model.path, revision=config.model.revision,
                                 dtype=config.model.dtype, stop_ids=config.rollout.stop_ids,
                                 adapter=config.model.adapter)
    learner = Learner(config, pretrained.decoder, mesh, tries_kernels=False)

    with jax.set_mesh(mesh), Checkpoints(directory / "checkpoints", keep=None) as checkpoints:
        step = checkpoints.latest if options.step is None else options.step
        if step is None or step not in checkpoints.steps:
            raise UserError(f"--step must be a checkpoint of {directory}, which has "
                            f"{', '.join(map(str, checkpoints.steps)) or 'none'}, got {step}")
        state, facts = checkpoints.restore(learner.abstract_state, step)
        alpha = facts["alpha"] if options.alpha is None else options.alpha
        if options.adapter:
            params = learner.policy(state, {"layers": {}}, setting)
        else:
            params = learner.restored(state, pretrained, setting)
        export(params, learner.decoder if options.adapter else pretrained.decoder, step, config,
               inputs(config, pretrained, facts), target, alpha)
    print(f"{target}: {directory} after {step:,} steps, alpha {alpha:g}")


def _parser(prog: str) -> Parser:
    parser = Parser(prog, "Write a model from a checkpoint of a run, as a Hugging Face directory.")
    parser.add_argument("run", metavar="RUN", help="the directory of a run")
    parser.add_argument("--step", metavar="N", type=_step,
                        help="of the checkpoint; default the newest")
    parser.add_argument("--alpha", metavar="A", type=_alpha,
                        help="of a run with a dial: any alpha up to the largest of its training; "
                        "default its reward.alpha")
    parser.add_argument("--adapter", action="store_true", help="the adapters alone, in the format "
                        "of the peft library, instead of the merged model")
    parser.add_argument("--output", metavar="DIR", required=True, help="a new directory")
    return parser


def inputs(config: Config, pretrained: Pretrained, facts: dict[str, Any]) -> Inputs:
    """Returns what a checkpoint says about a run's inputs; the problems themselves are not read."""
    trained_on = sources.parse(config.data.path, "data.path")
    held_out = (sources.parse(config.evaluation.path or config.data.path, "evaluation.path")
                if config.evaluation.problems else [])
    return Inputs(
        pretrained=pretrained, template=templates.choose(pretrained.tokenizer, config.data),
        problems=prompts.Problems(tuple(
            prompts.Source(source.name, None, ()) for source in trained_on)),
        held_out={source.name: [] for source in held_out}, notes=[],
        problems_sha256=facts["problems_sha256"], held_out_sha256=facts["held_out_sha256"])
