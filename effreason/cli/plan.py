"""The command `effreason plan`: what a configuration needs on a machine that need not be present.

Options are checked here, before anything imports jax: JAX reads the variables that decide what it
compiles for when it is first imported.
"""

import functools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from effreason.planning import chips
from effreason.planning.chips import Target
from effreason.runtime import config as configuration
from effreason.runtime import config_parser, streams
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError
from effreason.runtime.invocation import program

MEAN_TOKENS = 4044.0  # of the paper's 7B model on MATH-500 before training (arXiv 2502.04463)
# The functions of a training step, in call order.
FUNCTIONS = ("unstack", "prefill", "insert", "decode", "score", "score_reference", "experience",
             "gradients", "apply_gradients")


def run(argv: Sequence[str] | None, prog: str) -> None:
    """Makes a plan and prints it. Raises: UserError; SystemExit(0) after --help, SystemExit(1) if
    it does not fit."""
    config, options = configuration.parse(_parser(prog), argv)
    target = _target(options.chips, config)
    numbers = _numbers(options, config)
    names = _function_names(options)
    _check_output(options)
    _set_environment(target, compiles=not options.analytic)
    from effreason.planning import plans, search, shapes, tables

    decoder = shapes.open_decoder(config)
    inputs = plans.PlanInputs(
        mean_tokens=numbers["mean_tokens"], prompt_tokens=int(numbers["prompt_tokens"]),
        efficiency=_efficiency(numbers),
        price=numbers["price_per_chip_hour"], watts=numbers["watts"])
    start = time.monotonic()

    def log(line: str) -> None:
        if not streams.quiet:
            print(f"[{time.monotonic() - start:5.0f} s] {line}", file=sys.stderr, flush=True)

    if options.fit:
        plan = search.search(config, decoder, target, inputs, log=log)
    else:
        plan = plans.make_plan(config, decoder, target, inputs, names=names or FUNCTIONS, log=log,
                               compiled=False if options.analytic else None)
    if target.kind == "gpu" and not (options.analytic or chips.has_compiler("gpu")):
        log('by formula: with pip install "effreason[cuda13]" plans for GPUs are compiled')
    print(json.dumps(_finite(tables.as_json(plan)), indent=2) if options.json
          else tables.render(plan))

    if options.fit and plan.all_fit and options.output is not None:
        with Path(options.output).open("x", encoding="utf-8") as file:
            file.write(f"# Found by: {prog} {shlex.join(argv or ())}\n"
                       + configuration.to_yaml(plan.config))
        command = shlex.join(["--config", options.output])
        log(f"written: {options.output}; train with it: {program('train')} {command}")
    if not plan.all_fit:
        raise SystemExit(1)


def _parser(prog: str) -> jsonargparse.ArgumentParser:
    parser = config_parser.parser(
        Config, prog, "Predict what a configuration needs on a machine, before you rent it: "
        "memory, time, energy and money. Nothing is run and no weights are read. The exit code is "
        "0 if everything fits, 1 if not.")
    parser.add_argument("--chips", type=str, metavar="TARGET",
                        help=f"the machine, such as {chips.DEFAULT_SHAPES}")
    parser.add_argument("--functions", type=str, metavar="NAMES",
                        help="plan only these, such as gradients,decode")
    parser.add_argument("--analytic", action="store_true",
                        help="use formulas, which take a second, instead of compiling; so do "
                        "GPUs without JAX's CUDA plugin")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--fit", action="store_true",
                        help="search the mesh, slots, rows of a micro-batch, remat and "
                        "offload for the fastest plan that fits")
    parser.add_argument("--output", type=str, metavar="FILE",
                        help="with --fit: write the configuration it recommends")
    # Numbers are parsed by _number, which names the option and its bound in the error.
    parser.add_argument("--mean-tokens", type=str, metavar="X",
                        help="mean length of a response; default "
                        f"{MEAN_TOKENS:,.0f}, but at most half of rollout.max_new_tokens")
    parser.add_argument("--prompt-tokens", type=str, metavar="X",
                        help="mean length of a prompt; default 128, but at "
                        "most data.max_prompt_tokens")
    parser.add_argument("--price-per-chip-hour", type=str, metavar="X",
                        help="in any currency; default none")
    parser.add_argument("--watts", type=str, metavar="X",
                        help="power of one chip; default from a table")
    parser.add_argument("--compute-efficiency", type=str, default="0.5", metavar="X",
                        help="share of the peak FLOP/s that matrix products reach; default 0.5")
    parser.add_argument("--memory-efficiency", type=str, metavar="X",
                        help="share of the peak HBM bandwidth that is reached; default 0.6, and "
                        "0.4 to 0.6 in decoding")
    parser.add_argument("--link-efficiency", type=str, default="0.7", metavar="X",
                        help="share of the links' peak bandwidth that is reached; default 0.7")
    return parser


def _target(text: str | None, config: Config) -> Target:
    if text is None:
        raise UserError(
            f"--chips must name the machine to plan for, such as {chips.DEFAULT_SHAPES}")
    target = chips.parse(text)
    if text == "cpu":                   # one virtual device for each place in the mesh
        mesh = config.mesh
        return chips.cpu(max(mesh.data, 1) * mesh.fsdp * mesh.tensor * mesh.context)
    return target


def _numbers(options: Any, config: Config) -> dict[str, Any]:
    """Returns the numeric options; the price and the power are None if not given. Raises:
    UserError."""
    longest, prompt = config.rollout.max_new_tokens, config.data.max_prompt_tokens
    tokens = {"mean_tokens": (longest, min(MEAN_TOKENS, longest / 2)),
              "prompt_tokens": (prompt, min(128, prompt))}
    numbers: dict[str, Any] = {}
    for name, (limit, default) in tokens.items():
        number = _number(options, name, f"in [1, {limit}]",
                         functools.partial(_is_within, limit=limit))
        numbers[name] = default if number is None else number
    for name in ("compute_efficiency", "memory_efficiency", "link_efficiency"):
        numbers[name] = _number(options, name, "in (0, 1]", lambda value: 0 < value <= 1)
    for name in ("price_per_chip_hour", "watts"):
        numbers[name] = _number(options, name, ">= 0 and finite",
                                lambda value: 0 <= value < math.inf)
    return numbers


def _efficiency(numbers: dict[str, Any]) -> Any:
    """Returns the shares of the peak rates; one given for the memory is that of decoding too."""
    from effreason.planning.estimates import Efficiency

    memory = numbers["memory_efficiency"]
    of_memory = {} if memory is None else {"memory": memory, "decode": (memory, memory)}
    return Efficiency(compute=numbers["compute_efficiency"],
                      interconnect=numbers["link_efficiency"], **of_memory)


def _is_within(value: float, limit: float) -> bool:
    return 1 <= value <= limit


def _number(options: Any, name: str, bound: str, fits: Callable[[float], bool]) -> float | None:
    """Returns a numeric option, None if it is not given. Raises: UserError."""
    text = options[name]
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):                 # always false for nan
        raise UserError(f"--{name.replace('_', '-')} must be a number {bound}, got {text}")
    return value


def _function_names(options: Any) -> list[str]:
    text = options.functions
    names = [] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FUNCTIONS:
            raise UserError(f"--functions must be among {', '.join(FUNCTIONS)}, got {name!r}")
    if options.analytic and options.fit:
        raise UserError(
            "--analytic and --fit exclude each other: --fit compiles what it recommends")
    if names and options.fit:
        raise UserError("--functions and --fit exclude each other: the search needs all functions")
    return names


def _check_output(options: Any) -> None:
    if options.output is None:
        return
    path = Path(options.output)
    if not options.fit:
        raise UserError(
            "--output needs --fit: it writes the configuration that the search recommends")
    if path.exists():
        raise UserError(f"--output: {path} already exists and is not overwritten")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--output: cannot write into the directory {path.parent}")


def _set_environment(target: Target, *, compiles: bool) -> None:
    """Sets the variables that JAX and libtpu read when they are imported. Raises: UserError if
    libtpu is missing."""
    os.environ["JAX_PLATFORMS"] = "cpu"     # nothing is run, so no accelerator is needed
    if target.kind == "tpu" and compiles:
        if not chips.has_compiler("tpu") and "TPU_LIBRARY_PATH" not in os.environ:
            raise UserError(f"--chips {target.text}: needs libtpu, which compiles "
                            "for TPUs on any Linux machine: " 'pip install "effreason[tpu]"')
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")    # no TPU is used through it
    if target.kind == "cpu" and "xla_force_host_platform_device_count" not in os.environ.get(
        "XLA_FLAGS", ""):
        flag = f"--xla_force_host_platform_device_count={target.chips}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def _finite(value: Any) -> Any:
    """Replaces infinity and nan by None, because JSON has neither."""
    if isinstance(value, dict):
        return {name: _finite(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
