"""The command `effreason generate`: responses to a prompt, shown while they grow, or to a file of prompts.

Options and files are checked here, before anything that imports jax.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from effreason.cli import prompt_files
from effreason.cli.arguments import Parser, bounded
from effreason.cli.prompt_files import Question
from effreason.runtime.errors import UserError

STREAM_CHUNK, FILE_CHUNK = 2, 16    # decode steps between two looks: text is to flow, a file to be done soon

_count = bounded("positive integer", int, lambda n: 0 < n < 2**31)


def run(argv: Sequence[str], prog: str) -> None:
    """Generates and prints.

    Args: argv, the arguments after the command; prog, the command's name in the help.
    Raises: UserError, Interrupted, SystemExit(0) after --help."""
    options = _parser(prog).parse_args(argv)
    _check(options)
    whole = bool(options.prompts or options.json or options.output)
    prompts = _prompts(options)
    from effreason.cli import streaming  # brings in jax

    reader = streaming.open_reader(options)
    asked = None if prompts is None else [reader.read(prompt) for prompt in prompts]
    with contextlib.suppress(BrokenPipeError):
        chunk = options.chunk or (FILE_CHUNK if whole else STREAM_CHUNK)
        session = streaming.load(reader, asked if whole else None, chunk=chunk)
        if asked is None:
            streaming.converse(session)
        elif whole:
            streaming.write_all(session, asked)
        else:
            streaming.stream(session, asked[0])


def _parser(prog: str) -> Parser:
    made = Parser(prog, "Generate responses to a prompt, shown while they grow, or to a file of prompts. Without "
                  "--prompt and --prompts, the prompt is standard input; on a terminal each line typed is one, until "
                  "an empty one.")
    made.add_argument("--model", metavar="DIR", required=True,
                      help="a Hugging Face directory, the id of a model on the Hub, or tiny")
    made.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model on the Hub")
    made.add_argument("--dtype", choices=("bfloat16", "float32"),
                      help="numbers it computes in; default float32 on a CPU, else bfloat16")
    given = made.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT")
    given.add_argument("--prompts", metavar="FILE.jsonl", help="one object a line with prompt or problem (a text), "
                       "messages (objects with role and content) or tokens (ids); and, where wanted, id and "
                       "max_new_tokens")
    wrapped = made.add_mutually_exclusive_group()
    wrapped.add_argument("--template", metavar="NAME", help="chat template: r1, r1_think or a file with a Jinja "
                         "template; default the model's own")
    wrapped.add_argument("--raw", action="store_true", help="no chat template: the model continues the text")
    made.add_argument("--temperature", metavar="X", type=bounded("number >= 0", float, lambda x: 0 <= x < 1e6),
                      default=1.0, help="default 1; 0 = always the most likely token")
    made.add_argument("--top-p", metavar="X", type=bounded("number in (0, 1]", float, lambda x: 0 < x <= 1),
                      default=1.0, help="only the most likely tokens that together reach this probability")
    made.add_argument("--top-k", metavar="N", type=_count, help="only so many of the most likely tokens")
    made.add_argument("--min-p", metavar="X", type=bounded("number in [0, 1]", float, lambda x: 0 <= x <= 1),
                      default=0.0, help="only tokens at least this likely, relative to the most likely one")
    made.add_argument("--max-new-tokens", metavar="N", type=_count, help="tokens of a response at most; default "
                      f"{prompt_files.NEW_TOKENS:,}, or what the prompt leaves of the model's positions")
    made.add_argument("--samples", metavar="N", type=_count, default=1, help="responses to each prompt; default 1")
    made.add_argument("--seed", metavar="N", type=bounded("integer in [0, 2147483647]", int, lambda n: 0 <= n < 2**31),
                      default=0, help="default 0")
    made.add_argument("--slots", metavar="N", type=_count, default=64, help="responses in flight; default 64")
    made.add_argument("--chunk", metavar="N", type=_count, help="tokens of each response between two looks at what "
                      f"has come; default {STREAM_CHUNK} for text that is shown as it grows, {FILE_CHUNK} for files")
    made.add_argument("--json", action="store_true", help="print one object for each response: id, sample, tokens, "
                      "text, logprobs, model_logprobs, finish, prompt_tokens; nothing else on stdout")
    made.add_argument("--output", metavar="FILE.jsonl", help="write these objects to a new file instead")
    return made


def _check(options: argparse.Namespace) -> None:
    """Raises UserError for a model, a template or an output that cannot be."""
    from effreason.data import templates
    from effreason.lm.hf import hub  # a third of a second: not for --help

    if options.model != "tiny":
        on_hub = hub.is_hub_id(options.model) and not Path(options.model).exists()
        if not on_hub:
            directory = hub.find(options.model, None, ())[0]
            if not (directory / "config.json").is_file():
                raise UserError(f"{directory}: holds no config.json")
        if options.revision is not None and not on_hub:
            raise UserError(f"--revision is for a model on the Hub, {options.model} is a directory")
    elif options.revision is not None:
        raise UserError("--revision is for a model on the Hub, --model is tiny")
    if options.template not in (None, *templates.NAMED) and not Path(options.template).is_file():
        raise UserError(f"--template must be {', '.join(templates.NAMED)} or a file, got {options.template!r}")
    if options.output is not None:
        output = Path(options.output)
        if output.exists():
            raise UserError(f"--output: {output} exists already, nothing is overwritten")
        if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
            raise UserError(f"--output: cannot write into the directory {output.parent}")


def _prompts(options: argparse.Namespace) -> list[Question] | None:
    """All prompts; None: they will be typed."""
    if options.prompts is not None:
        return list(prompt_files.read(Path(options.prompts)))
    if options.prompt is not None:
        return [Question(name=1, place="--prompt", text=prompt_files.user_turn(options.prompt, "--prompt"))]
    if sys.stdin.isatty():
        if options.json or options.output:
            raise UserError("--json and --output need --prompt or --prompts, or a prompt on standard input")
        return None
    try:
        text = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise UserError("standard input: not UTF-8") from None
    return [Question(name=1, place="standard input", text=prompt_files.user_turn(text, "standard input"))]
