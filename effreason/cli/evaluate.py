"""The command `effreason evaluate`: accuracy and response length of models on held-out problems.

The configuration and the files it names are checked before jax is imported.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from effreason.cli.arguments import check_held_out, check_model, check_start, only_json
from effreason.runtime import config as configuration
from effreason.runtime import config_parser
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError


def run(argv: Sequence[str], prog: str) -> None:
    """Evaluates. Raises: UserError, Interrupted, SystemExit(0) after --help."""
    parser = config_parser.parser(
        Config, prog, "Measure accuracy and response length of models on held-out problems.")
    parser.add_argument("--models", metavar="DIR", nargs="+", type=str,
                        help="models to evaluate: Hugging Face directories, ids on the Hugging "
                        "Face Hub, checkpoints of a run, RUN@ALPHA of a run with a dial, or tiny; "
                        "default model.path")
    parser.add_argument("--seeds", metavar="N", nargs="+", type=str,
                        help="seeds of the samples; default run.seed")
    parser.add_argument("--output", metavar="DIR", type=str,
                        help="directory for responses and results; the same command continues "
                        "an evaluation that was stopped")
    parser.add_argument("--json", action="store_true", help="print one JSON object, that of "
                        "results.json; all else goes to standard error")
    config, values = configuration.parse(parser, argv)
    models = values.models or [config.model.adapter or config.model.path]
    seeds = [_seed(text) for text in values.seeds] if values.seeds else None
    output = Path(values.output) if values.output else None
    check(config, models, output)

    from effreason.evaluation import evaluate
    from effreason.runtime import distributed, processes

    with distributed.joined(config.distributed):
        with only_json(values.json):
            results = evaluate.evaluate_models(config, models, output, seeds)
        if values.json and processes.is_primary():
            print(json.dumps(results, default=str))


def check(config: Config, models: Sequence[str], output: Path | None) -> None:
    """Raises UserError if a model or the problems are missing, or the output is a file."""
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"--output must be a directory, {output} is a file")

    for path in models:
        if path == config.model.adapter:
            check_start(config)
        else:
            check_model(path, "models", of_run=True)

    if config.evaluation.problems == 0:
        raise UserError("evaluation.problems must be >= 1 to evaluate, got 0")
    check_held_out(config)


def _seed(text: str) -> int:
    if not text.isdecimal() or not int(text) < 2**31:
        raise UserError(f"--seeds must be whole numbers in [0, 2147483647], got {text!r}")
    return int(text)
