"""The command `effreason`; train.py and evaluate.py run two of its subcommands.

Every subcommand is a module of this folder with a function run(argv, prog). A module is imported
when its command is called, because some of them import jax.
"""

import difflib
import importlib
import itertools
import sys
from collections.abc import Sequence

from effreason import __version__
from effreason.runtime import errors, streams

USAGE = """usage: effreason COMMAND ...

commands:
  train      train a model to reason in fewer tokens
  evaluate   measure accuracy and response length of models on held-out problems
  grade      mark the responses in a file as correct or wrong, with reasons
  generate   generate responses to a prompt or to a file of prompts
  replay     generate one response of a training run again
  preview    show what a reward and an advantage would do to saved responses
  export     write a model from a checkpoint, at any alpha of a dial
  dial       find the alpha of a trained dial that saves what is wanted
  blend      average the weights of a base model and a model trained from it
  report     write the report page of a run or of a family of runs
  plan       estimate the memory, time, energy and money that a run needs
  watch      show how a run is doing, live
  completion print a script that completes commands and options in a shell

`effreason COMMAND --help` lists the options, `effreason --version` the version.
With any command, -q or --quiet prints results, warnings and errors alone.
NO_COLOR=1 turns colours off.
"""
QUIET = frozenset({"-q", "--quiet"})
COMMANDS = ("train", "evaluate", "grade", "generate", "replay", "preview", "export", "dial",
            "blend", "report", "plan", "watch", "completion")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the console script; returns the exit code."""
    if argv is None:
        errors.prepare()
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"effreason {__version__}")
        return 0
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        expected = f"did you mean {close[0]}?" if close else f"it must be {', '.join(COMMANDS)}"
        print(f"error: no command {command}: {expected}", file=sys.stderr)
        return 2
    return run(command, rest, f"effreason {command}")


def run(command: str, argv: Sequence[str], prog: str) -> int:
    """Runs a subcommand; returns the exit code.

    A mistake of the user, a signal, a full disk, memory that runs out and a package that is missing
    end it with one line, a defect with a traceback.
    Args: argv, the arguments after the command; prog, the command's name in its help."""
    options = _options(argv)
    streams.quiet = not QUIET.isdisjoint(options)
    argv = [*(part for part in options if part not in QUIET), *argv[len(options):]]
    try:
        importlib.import_module(f"effreason.cli.{command}").run(as_spelt(argv), prog)
        sys.stdout.flush()          # a full disk is an error too
    except errors.REPORTED as error:
        return errors.report(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "effreason":
            raise
        print(f"error: the package {error.name} is not installed in {sys.prefix}: activate the "
              "environment of effreason, or install it: pip install -e .", file=sys.stderr)
        return 1
    except Exception as error:
        if (code := errors.report_memory(error)) is None:
            raise
        return code
    return 0


def _options(argv: Sequence[str]) -> list[str]:
    """Returns the arguments before --, after which nothing is an option."""
    return list(itertools.takewhile(lambda part: part != "--", argv))


def as_spelt(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with options spelt as --section.field_name and --other-option.

    Dashes and underscores may be used for each other in the names of options."""
    options = _options(argv)
    return [*map(_as_spelt, options), *argv[len(options):]]


def _as_spelt(part: str) -> str:
    name, equals, value = part.partition("=")
    if not name.startswith("--"):
        return part
    is_field = "." in name or name in ("--print-config", "--print_config")
    old, new = ("-", "_") if is_field else ("_", "-")
    return f"--{name[2:].replace(old, new)}{equals}{value}"
