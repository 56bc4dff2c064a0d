"""The command `effreason generate`: responses to one prompt, shown as they grow, or to a file.

Options and files are checked here, before jax is imported.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from effreason.cli import prompt_files
from effreason.cli.arguments import ALPHA, Parser, bounded, check_model, check_revision
from effreason.cli.prompt_files import Prompt
from effreason.runtime.config import DataConfig
from effreason.runtime.config_parser import read_yaml
from effreason.runtime.errors import UserError

# Tokens between two looks at what was generated: streamed text should flow, a file be done soon.
STREAM_CHUNK, FILE_CHUNK = 2, 16

_count = bounded("positive integer", int, lambda n: 0 < n < 2**31)


def run(argv: Sequence[str], prog: str) -> None:
    """Generates and prints. Raises: UserError, Interrupted, SystemExit(0) after --help."""
    options = _parser(prog).parse_args(argv)
    _check(options)
    streamed = not (options.prompts or options.json or options.output)
    prompts = _prompts(options)

    from effreason.cli import streaming  # imports jax

    session = streaming.Session(options)
    read = None if prompts is None else [session.read(prompt) for prompt in prompts]

    with contextlib.suppress(BrokenPipeError):
        chunk = options.chunk or (STREAM_CHUNK if streamed else FILE_CHUNK)
        session.load(None if streamed else read, chunk)
        if read is None:
            streaming.converse(session)
        elif streamed:
            streaming.stream(session, read[0])
        else:
            streaming.write_all(session, read)


def _parser(prog: str) -> Parser:
    parser = Parser(prog, "Generate responses to one prompt, streamed, or to a file of prompts. "
                    "Without --prompt and --prompts the prompt is read from standard input; on a "
                    "terminal each line you type is a prompt, and an empty line ends the session.")
    parser.add_argument("--model", metavar="DIR", required=True,
                        help="a Hugging Face directory, the id of a model on the Hub, a checkpoint "
                        "of a run, RUN@ALPHA of a run with a dial, or tiny")
    parser.add_argument("--alpha", metavar="A", type=ALPHA,
                        help="with --model RUN, a run with a dial: the same as RUN@A")
    parser.add_argument("--revision", metavar="NAME",
                        help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"),
                        help="number format to compute in; default float32 on a CPU, else bfloat16")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="a single prompt")
    source.add_argument("--prompts", metavar="FILE.jsonl", help="one object on each line, with "
                        "prompt or problem (a text), messages (objects with role and content) or "
                        "tokens (ids), and optionally id and max_new_tokens")
    template = parser.add_mutually_exclusive_group()
    template.add_argument("--template", metavar="NAME", help="chat template: r1, r1_think, one of "
                          "the model's by name, or a file with a Jinja template; default the "
                          "model's own")
    template.add_argument("--raw", action="store_true",
                          help="no chat template: the model continues the text")
    parser.add_argument("--template-arguments", metavar="{NAME: VALUE}", type=_variables,
                        help="variables for the chat template, such as {enable_thinking: false}")
    parser.add_argument("--system-prompt", metavar="TEXT",
                        help="system message, before the user's; default none; not for rows with "
                        "a system message of their own")
    parser.add_argument("--temperature", metavar="X", default=1.0,
                        type=bounded("number, 0 or >= 0.001", float,
                                     lambda x: x == 0 or 0.001 <= x < 1e6),
                        help="sampling temperature; default 1; 0 = always the most likely token")
    parser.add_argument("--top-p", metavar="X", default=1.0,
                        type=bounded("number in (0, 1]", float, lambda x: 0 < x <= 1),
                        help="sample from the most likely tokens that together reach this "
                        "probability")
    parser.add_argument("--top-k", metavar="N", type=_count,
                        help="sample from this many of the most likely tokens")
    parser.add_argument("--min-p", metavar="X", default=0.0,
                        type=bounded("number in [0, 1]", float, lambda x: 0 <= x <= 1),
                        help="sample from tokens at least this likely, relative to the most "
                        "likely one")
    parser.add_argument("--stop-ids", metavar="TOKENS",
                        help="tokens that end a response besides the model's EOS tokens: ids or "
                        "texts of single tokens, separated by commas")
    parser.add_argument("--max-new-tokens", metavar="N", type=_count,
                        help=f"longest response; default {prompt_files.NEW_TOKENS:,}, or what the "
                        "prompt leaves of the model's context")
    parser.add_argument("--samples", metavar="N", type=_count, default=1,
                        help="responses to each prompt; default 1")
    parser.add_argument("--seed", metavar="N", default=0, help="seed of the samples; default 0",
                        type=bounded("integer in [0, 2147483647]", int, lambda n: 0 <= n < 2**31))
    parser.add_argument("--slots", metavar="N", type=_count, default=64,
                        help="responses generated at the same time; default 64")
    parser.add_argument("--chunk", metavar="N", type=_count,
                        help="tokens to generate between checks for finished responses; "
                        f"default {STREAM_CHUNK} for streamed text, otherwise {FILE_CHUNK}")
    parser.add_argument("--draft-tokens", metavar="N", default=0,
                        type=bounded("integer >= 0", int, lambda n: 0 <= n < 2**31),
                        help="tokens to guess ahead, at most, when few responses are left, from "
                        "what a response, its prompt and its other samples have said; the tokens "
                        "stay the same; default 0")
    parser.add_argument("--json", action="store_true", help="print one object for each response: "
                        "id, sample, tokens, text, logprobs, model_logprobs, finish, "
                        "prompt_tokens; nothing else")
    parser.add_argument("--output", metavar="FILE.jsonl",
                        help="write these objects to a new file instead")
    return parser


def _variables(text: str) -> dict[str, Any]:
    """Reads the variables of a template as YAML."""
    try:
        table: dict[str, Any] = read_yaml(text)
        DataConfig(template_arguments=table)
    except (ValueError, RecursionError, yaml.YAMLError):
        table = {}
    if not table:
        raise argparse.ArgumentTypeError("must be a mapping such as {enable_thinking: false}, got "
                                         f"{text!r}")
    return table


def _check(options: argparse.Namespace) -> None:
    """Raises UserError if the model or the output is not usable."""
    if options.alpha is not None:
        if not (Path(options.model) / "config.yaml").is_file():
            raise UserError("--alpha is for a run with a dial, a directory with a config.yaml; "
                            f"--model is {options.model}")
        import numpy as np  # not for --help

        options.model += f"@{np.format_float_positional(options.alpha, trim='-')}"
    check_model(options.model, "--model", of_run=True)
    check_revision(options.revision, options.model, "--model")
    if options.raw and (options.template_arguments or options.system_prompt is not None):
        raise UserError("--raw uses no chat template: it goes with neither --template-arguments "
                        "nor --system-prompt")
    if options.output is not None:
        output = Path(options.output)
        if output.exists():
            raise UserError(f"--output: {output} exists already, nothing is overwritten")
        if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
            raise UserError(f"--output: cannot write into the directory {output.parent}")


def _prompts(options: argparse.Namespace) -> list[Prompt] | None:
    """Returns all prompts; None if they will be typed."""
    if options.prompts is not None:
        return list(prompt_files.read(Path(options.prompts)))

    place, text = "--prompt", options.prompt
    if text is None:
        if sys.stdin.isatty():
            if options.json or options.output:
                raise UserError("--json and --output need --prompt or --prompts, or a prompt on "
                                "standard input")
            return None
        place = "standard input"
        try:
            text = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError:
            raise UserError("standard input: not UTF-8") from None

    return [Prompt(name=1, place=place, text=prompt_files.user_message(text, place))]
