"""The command line: `effreason train` and `evaluate`, the same as train.py and evaluate.py, and smaller commands.

The configuration and the files it names are checked before anything that imports jax.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from effreason.cli.arguments import numbers
from effreason.runtime import config as configuration
from effreason.runtime import config_parser
from effreason.runtime.config import Config, UpdateConfig
from effreason.runtime.config_fields import settings
from effreason.runtime.errors import Interrupted, UserError

_, *BASELINES = next(setting for setting in settings(UpdateConfig) if setting.name == "objective").choices
BLENDS = "0.25,0.5,0.75"
USAGE = """usage: effreason COMMAND ...

commands:
  train      train a model to reason in fewer tokens
  evaluate   measure accuracy and tokens of models on held-out problems
  grade      say which responses of a file are correct, and why
  generate   responses to a prompt, shown as they grow, or to a file of prompts
  replay     generate one response of a training run again
  preview    what rewards and advantages make of saved responses
  blend      a model between a base and what was trained from it
  report     the page of a run or of a family of runs
  plan       what a run needs on a machine: memory, time, energy, money

`effreason COMMAND --help` lists the options.
"""


# Each is a module of this package with a function run(argv, prog), imported when it is asked for: some bring in jax.
MODULES = {"grade": "cli.grade", "generate": "cli.generate", "replay": "cli.replay", "preview": "cli.preview",
           "blend": "cli.blend", "report": "runs.report.page", "plan": "cli.plan"}


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns: the exit code."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    prog = f"effreason {command}"
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "train":
        return train(rest, prog)
    if command == "evaluate":
        return evaluate(rest, prog)
    if command not in MODULES:
        print(f"error: the command must be one of train, evaluate, {', '.join(MODULES)}, got {command}",
              file=sys.stderr)
        return 2
    return _guarded(lambda: importlib.import_module(f"effreason.{MODULES[command]}").run(rest, prog))


def train(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Trains. Returns: the exit code."""
    return _guarded(lambda: _train(argv, prog))


def evaluate(argv: Sequence[str] | None = None, prog: str = "evaluate.py") -> int:
    """Evaluates. Returns: the exit code."""
    return _guarded(lambda: _evaluate(argv, prog))


def _train(argv: Sequence[str] | None, prog: str) -> int:
    parser = config_parser.parser(Config, prog, "Train a model to reason in fewer tokens.")
    parser.add_argument("--family", metavar="ALPHAS", type=str, help="train one model for each of these alphas, such "
                        "as 0,0.05,0.1,0.2,0.4, and compare them")
    parser.add_argument("--baselines", metavar="NAMES", type=str,
                        help=f"trained beside the family: {', '.join(BASELINES)}, or none; default all")
    parser.add_argument("--blends", metavar="WEIGHTS", type=str, help="of the model of the greatest alpha in mixtures "
                        f"of its weights and the base's, or none; default {BLENDS}")
    config, values = configuration.parse(parser, argv)
    family = _family(values)
    check_training(config)
    from effreason import loop
    from effreason.runtime import distributed

    if family is None:
        return distributed.run(config.distributed, lambda: _guarded(lambda: loop.train(config)))
    from effreason.cli import family as families

    return distributed.run(config.distributed, lambda: _guarded(lambda: families.train(config, *family)))


def _family(values: Any) -> tuple[list[float], list[str], list[float]] | None:
    """The alphas, baselines and blends asked for; None: no family. Raises: UserError."""
    if values.family is None:
        for name in ("baselines", "blends"):
            if getattr(values, name) is not None:
                raise UserError(f"--{name} is for a family: name its alphas with --family")
        return None
    alphas = numbers(values.family, "--family", lambda x: 0 <= x < 1, "[0, 1)")
    if not alphas:
        raise UserError("--family must name at least one alpha, got none")
    asked = ",".join(BASELINES) if values.baselines is None else values.baselines
    names = [] if asked == "none" else [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in BASELINES or names.count(name) > 1:
            raise UserError(f"--baselines must name each of {', '.join(BASELINES)} once at most, or be none, got "
                            f"{asked!r}")
    weights = BLENDS if values.blends is None else values.blends
    return alphas, names, numbers(weights, "--blends", lambda x: 0 <= x <= 1, "[0, 1]")


def _evaluate(argv: Sequence[str] | None, prog: str) -> int:
    parser = config_parser.parser(Config, prog, "Measure accuracy and tokens of models on held-out problems.")
    parser.add_argument(
        "--models", metavar="DIR", nargs="+", type=str,
        help="models to evaluate: Hugging Face directories, ids on the Hub, or tiny; without it: model.path",
    )
    parser.add_argument("--seeds", metavar="N", nargs="+", type=str, help="of the samples; without it: run.seed")
    parser.add_argument("--output", metavar="DIR", type=str,
                        help="directory for responses and results; the same command again goes on with what it holds")
    config, values = configuration.parse(parser, argv)
    models = values.models or [config.model.path]
    seeds = [_seed(text) for text in values.seeds] if values.seeds else None
    check_evaluation(config, models, values.output)
    from effreason.evaluation import evaluate as evaluation
    from effreason.runtime import distributed

    output = Path(values.output) if values.output else None
    return distributed.run(config.distributed,
                        lambda: _guarded(lambda: evaluation.evaluate_models(config, models, output, seeds)))


def _seed(text: str) -> int:
    if not text.isdecimal() or not int(text) < 2**31:
        raise UserError(f"--seeds must be whole numbers in [0, 2147483647], got {text!r}")
    return int(text)


def _guarded(command: Callable[[], int | None]) -> int:
    """Runs a command; what the user can put right, a signal and a full disk end it with one line."""
    try:
        return command() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        if stop.message:            # one of several processes says it for all
            print(stop.message, file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {_reason(error)}", file=sys.stderr)
        return 1
    return 0


def _reason(error: OSError) -> str:
    """The file and what is wrong with it, on one line."""
    if error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def check_training(config: Config) -> None:
    """Raises UserError where a file the training needs is missing: seconds, not after the compilation."""
    check_model(config.model.path, "model.path")
    _check_data(config, "data.path", config.data.path)
    _check_data(config, "data.exclude", config.data.exclude, held_out=True)
    if config.evaluation.problems > 0:
        _check_data(config, "evaluation.path", config.evaluation.path, held_out=True)
    if config.reward.form != "efficient" or config.reward.parameters is not None:
        from effreason.rl import configured_reward  # brings in jax

        configured_reward.check(config.reward)
    directory = config.run.directory
    if directory is not None and Path(directory).exists() and not Path(directory).is_dir():
        raise UserError(f"run.directory must be a directory, {directory} is a file")
    wandb = importlib.util.find_spec("wandb") if config.log.wandb else None
    # No origin: a folder of that name, such as the one wandb leaves where it ran, and not the package.
    if config.log.wandb and (wandb is None or wandb.origin is None):
        raise UserError('log.wandb needs the package wandb: pip install "effreason[wandb]"')


def check_evaluation(config: Config, models: Sequence[str], output: str | None = None) -> None:
    """Raises UserError where a model or the problems to evaluate on are missing, or the output is no directory."""
    if output is not None and Path(output).exists() and not Path(output).is_dir():
        raise UserError(f"--output must be a directory, {output} is a file")
    for path in models:
        at = Path(path)
        if at.parent.name != "checkpoints" or not (at.parents[1] / "config.yaml").is_file() or not at.is_dir():
            check_model(path, "models")         # else a run's checkpoint, which is looked into later
    if config.evaluation.problems == 0:
        raise UserError("evaluation.problems must be >= 1 to evaluate, got 0")
    _check_data(config, "evaluation.path", config.evaluation.path, held_out=True)


def check_model(path: str, field: str) -> None:
    """Raises UserError unless the path is "tiny", looks like a Hugging Face directory or like an id on the Hub."""
    if path == "tiny":
        return
    from effreason.lm.hf import hub  # a third of a second: only for a path

    wanted = f"{field} must be tiny, a Hugging Face directory or an id on its Hub"
    try:
        directory = hub.standing(Path(path))
    except OSError as error:        # a name too long for a file
        raise UserError(f"{wanted}, {path[:60]}...: {error.strerror}") from None
    if directory is None and Path(path).exists():
        raise UserError(f"{wanted}, {path} is a file")
    if directory is None and not hub.is_hub_id(path):
        raise UserError(f"{wanted}, {path} does not exist")
    if directory is not None and not (directory / "config.json").is_file():
        raise UserError(f"{wanted}, {path} holds no config.json")


def _check_data(config: Config, field: str, path: str | None, *, held_out: bool = False) -> None:
    if path is not None:
        from effreason.data import sources  # brings in numpy: not for --help

        sources.check(path, config.data, field, held_out=held_out, split=config.evaluation.split if held_out else None)
