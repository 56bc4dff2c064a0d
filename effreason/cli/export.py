"""The command `effreason export`: a checkpoint of a run becomes a Hugging Face directory.

It is the merged model, at any alpha of a dial, or the adapters in the format of the peft library.
"""

from collections.abc import Sequence
from pathlib import Path

import jax

from effreason.cli.arguments import ALPHA, Parser, bounded, check_target, run_config
from effreason.evaluation.models import checkpoint_of, open_trained
from effreason.lm.hf import peft
from effreason.rl import dial
from effreason.runs.export import export_adapter, export_trained
from effreason.runtime import sharding
from effreason.runtime.config import MeshConfig
from effreason.runtime.errors import UserError

_step = bounded("positive integer", int, lambda value: 0 < value < 1e9)


def run(argv: Sequence[str], prog: str) -> None:
    """Writes the directory. Raises: UserError."""
    options = _parser(prog).parse_args(argv)
    name, alpha = dial.split_name(options.run)
    if alpha is not None:
        if options.alpha is not None:
            raise UserError(f"--alpha: {options.run} names an alpha already")
        options.run, options.alpha = name, alpha
    directory, target = Path(options.run), Path(options.output)
    config = run_config(directory)
    check_target(target)
    dial.checked_setting(config.reward, options.alpha, str(directory))
    if options.adapter and not config.adapter.rank:
        raise UserError(f"--adapter: {directory} was trained without adapters, adapter.rank is 0")

    trained = open_trained(checkpoint_of(directory, options.alpha, options.step))
    mesh = sharding.make_mesh(data=-1)      # this machine's devices, whatever the run had
    with jax.set_mesh(mesh):
        if options.adapter:
            peft.check_modules(trained.pretrained.decoder, "--adapter")
            export_adapter(trained, mesh, target)
        else:
            export_trained(trained, trained.reader(mesh, MeshConfig()), target)
    print(f"{target}: {directory} after {trained.checkpoint.step:,} steps, alpha "
          f"{trained.alpha:g}")


def _parser(prog: str) -> Parser:
    parser = Parser(prog, "Write a model from a checkpoint of a run, as a Hugging Face directory.")
    parser.add_argument("run", metavar="RUN", help="the directory of a run, or RUN@ALPHA")
    parser.add_argument("--step", metavar="N", type=_step,
                        help="of the checkpoint; default the newest")
    parser.add_argument("--alpha", metavar="A", type=ALPHA,
                        help="of a run with a dial: any alpha up to the largest of its training; "
                        "default its reward.alpha")
    parser.add_argument("--adapter", action="store_true", help="the adapters alone, in the format "
                        "of the peft library, instead of the merged model")
    parser.add_argument("--output", metavar="DIR", required=True, help="a new directory")
    return parser
