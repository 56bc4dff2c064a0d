"""The command `effreason`; train.py and evaluate.py run two of its subcommands.

Every subcommand is a module of this folder with a function run(argv, prog). A module is imported
when its command is called, because some of them import jax.
"""

import importlib
import sys
from collections.abc import Sequence

from effreason.runtime import errors

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

`effreason COMMAND --help` lists the options.
"""
COMMANDS = ("train", "evaluate", "grade", "generate", "replay", "preview", "export", "dial",
            "blend", "report", "plan")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the console script; returns the exit code."""
    if argv is None:
        errors.prepare()
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command not in COMMANDS:
        print(f"error: the command must be one of {', '.join(COMMANDS)}, got {command}",
              file=sys.stderr)
        return 2
    return run(command, rest, f"effreason {command}")


def run(command: str, argv: Sequence[str], prog: str) -> int:
    """Runs a subcommand; returns the exit code.

    A mistake of the user, a signal or a full disk ends it with one line, a defect with a traceback.
    Args: argv, the arguments after the command; prog, the command's name in its help."""
    try:
        importlib.import_module(f"effreason.cli.{command}").run(argv, prog)
        sys.stdout.flush()          # a full disk is an error too
    except errors.REPORTED as error:
        return errors.report(error)
    return 0
