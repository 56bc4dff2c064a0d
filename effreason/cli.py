"""The command line: `effreason train` and `evaluate`, the same as train.py and evaluate.py, and smaller commands.

The configuration and the files it names are checked before anything that imports jax.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from effreason.errors import Interrupted, UserError
from effreason.runtime import config as configuration
from effreason.runtime import parsers
from effreason.runtime.config import Config

USAGE = """usage: effreason COMMAND ...

commands:
  train      train a model to reason in fewer tokens
  evaluate   measure accuracy and tokens of models on held-out problems
  grade      say which responses of a file are correct, and why
  generate   responses to a prompt, shown as they grow, or to a file of prompts
  replay     generate one response of a training run again
  plan       what a run needs on a machine: memory, time, energy, money

`effreason COMMAND --help` lists the options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns: the exit code."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    commands = {"train": train, "evaluate": evaluate, "grade": grade, "generate": generate, "replay": replay,
                "plan": plan}
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command not in commands:
        print(f"error: the command must be one of {', '.join(commands)}, got {command}", file=sys.stderr)
        return 2
    return commands[command](rest, f"effreason {command}")


def train(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Trains. Returns: the exit code."""
    return _guarded(lambda: _train(argv, prog))


def evaluate(argv: Sequence[str] | None = None, prog: str = "evaluate.py") -> int:
    """Evaluates. Returns: the exit code."""
    return _guarded(lambda: _evaluate(argv, prog))


def grade(argv: Sequence[str] | None = None, prog: str = "effreason grade") -> int:
    """Grades a file of responses. Returns: the exit code."""
    return _guarded(lambda: _grade(argv, prog))


def generate(argv: Sequence[str] | None = None, prog: str = "effreason generate") -> int:
    """Generates responses to prompts. Returns: the exit code."""
    return _guarded(lambda: _generate(argv, prog))


def replay(argv: Sequence[str] | None = None, prog: str = "effreason replay") -> int:
    """Generates one response of a run again. Returns: the exit code."""
    return _guarded(lambda: _replay(argv, prog))


def plan(argv: Sequence[str] | None = None, prog: str = "effreason plan") -> int:
    """Says what a run needs on a machine. Returns: the exit code; SystemExit(1) where it does not fit."""
    return _guarded(lambda: _plan(argv, prog))


def _plan(argv: Sequence[str] | None, prog: str) -> None:
    from effreason.planning import commands

    commands.run(argv, prog)


def _grade(argv: Sequence[str] | None, prog: str) -> None:
    from effreason import verdicts

    verdicts.run(sys.argv[1:] if argv is None else argv, prog)


def _generate(argv: Sequence[str] | None, prog: str) -> None:
    from effreason import completions

    completions.run(sys.argv[1:] if argv is None else argv, prog)


def _replay(argv: Sequence[str] | None, prog: str) -> None:
    from effreason import replays

    replays.run(sys.argv[1:] if argv is None else argv, prog)


def _train(argv: Sequence[str] | None, prog: str) -> int:
    parser = parsers.parser(Config, prog, "Train a model to reason in fewer tokens.")
    config, _ = configuration.parse(parser, argv)
    check_training(config)
    from effreason import loop
    from effreason.runtime import meetings

    return meetings.run(config.distributed, lambda: _guarded(lambda: loop.train(config)))


def _evaluate(argv: Sequence[str] | None, prog: str) -> int:
    parser = parsers.parser(Config, prog, "Measure accuracy and tokens of models on held-out problems.")
    parser.add_argument(
        "--models", metavar="DIR", nargs="+", type=str,
        help="models to evaluate: Hugging Face directories, ids on the Hub, or tiny; without it: model.path",
    )
    parser.add_argument("--output", metavar="DIR", type=str, help="directory for the results")
    config, values = configuration.parse(parser, argv)
    models = values.models or [config.model.path]
    check_evaluation(config, models)
    from effreason import evaluation
    from effreason.runtime import meetings

    output = Path(values.output) if values.output else None
    return meetings.run(config.distributed,
                        lambda: _guarded(lambda: evaluation.evaluate_models(config, models, output)))


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
    directory = config.run.directory
    if directory is not None and Path(directory).exists() and not Path(directory).is_dir():
        raise UserError(f"run.directory must be a directory, {directory} is a file")
    wandb = importlib.util.find_spec("wandb") if config.log.wandb else None
    # No origin: a folder of that name, such as the one wandb leaves where it ran, and not the package.
    if config.log.wandb and (wandb is None or wandb.origin is None):
        raise UserError('log.wandb needs the package wandb: pip install "effreason[wandb]"')


def check_evaluation(config: Config, models: Sequence[str]) -> None:
    """Raises UserError where a model or the problems to evaluate on are missing."""
    for path in models:
        check_model(path, "models")
    if config.evaluation.problems == 0:
        raise UserError("evaluation.problems must be >= 1 to evaluate, got 0")
    _check_data(config, "evaluation.path", config.evaluation.path, held_out=True)


def check_model(path: str, field: str) -> None:
    """Raises UserError unless the path is "tiny", looks like a Hugging Face directory or like an id on the Hub."""
    if path == "tiny":
        return
    from effreason.lm import hub  # a third of a second: only for a path

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
        from effreason.problems import sources  # brings in numpy: not for --help

        sources.check(path, config.data, field, held_out=held_out, split=config.evaluation.split if held_out else None)
