"""The command `effreason plan`: what a configuration needs on a machine that need not be here.

Options are checked here, before anything that imports jax: what it compiles for is decided by variables that JAX reads
when it is first imported.
"""

import functools
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from effreason.planning import chips
from effreason.planning.chips import Target
from effreason.runtime import config as configuration
from effreason.runtime import config_parser
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError

MEAN_TOKENS = 4044.0                # of the 7B model of the paper on MATH-500 before training (arXiv 2502.04463)
# Of a training step, in the order of their calls.
FUNCTIONS = ("unstack", "read", "start", "decode", "score", "score_reference", "credit", "gradients", "apply")


def run(argv: Sequence[str] | None, prog: str) -> None:
    """Plans and prints. Raises: UserError; SystemExit(0) after --help, SystemExit(1) for what does not fit."""
    parser = _parser(prog)
    config, options = configuration.parse(parser, argv)
    target = _target(options.chips, config)
    numbers = _numbers(options, config)
    wanted = _wanted(options)
    _check_output(options)
    _prepare(target, compiles=not options.analytic)
    from effreason.planning import plans, search, shapes, tables
    from effreason.planning.estimates import Efficiency

    decoder = shapes.open_decoder(config)
    inputs = plans.Inputs(
        mean_tokens=numbers["mean_tokens"], prompt_tokens=int(numbers["prompt_tokens"]),
        efficiency=Efficiency(compute=numbers["compute_efficiency"], memory=numbers["memory_efficiency"],
                              interconnect=numbers["link_efficiency"]),
        price=numbers["price_per_chip_hour"], watts=numbers["watts"])
    begun = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - begun:5.0f} s] {line}", file=sys.stderr, flush=True)

    if options.fit:
        plan = search.search(config, decoder, target, inputs, say=say)
    else:
        plan = plans.make_plan(config, decoder, target, inputs, wanted=wanted or FUNCTIONS, say=say,
                               compiled=False if options.analytic else None)
    print(json.dumps(_finite(tables.as_json(plan)), indent=2) if options.json else tables.render(plan))
    if options.fit and plan.all_fit:
        _write(plan.config, options, say)
    if not plan.all_fit:
        raise SystemExit(1)


def _parser(prog: str) -> jsonargparse.ArgumentParser:
    made = config_parser.parser(Config, prog, "Say what a configuration needs on a machine, before it is rented: memory, "
                          "time, energy and money. Nothing runs and no weights are read. The exit code is 0 where all "
                          "fits, 1 where it does not.")
    made.add_argument("--chips", type=str, metavar="TARGET", help=f"the machine: {chips.DEFAULT_SHAPES}")
    made.add_argument("--functions", type=str, metavar="NAMES", help="only these, such as gradients,decode")
    made.add_argument("--analytic", action="store_true", help="by formula, in a second, where it would compile; "
                      "for GPUs always so")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    made.add_argument("--fit", action="store_true", help="search mesh, slots, micro-batch, remat and offload for the "
                      "fastest plan that fits")
    made.add_argument("--output", type=str, metavar="FILE", help="with --fit: write the configuration it found")
    # Numbers are read by _number, in words of our own.
    made.add_argument("--mean-tokens", type=str, metavar="X", help="mean length of a response; default "
                      f"{MEAN_TOKENS:,.0f}, at most half of rollout.max_new_tokens")
    made.add_argument("--prompt-tokens", type=str, metavar="X",
                      help="mean length of a prompt; default 128, at most data.max_prompt_tokens")
    made.add_argument("--price-per-chip-hour", type=str, metavar="X", help="in any currency; default none")
    made.add_argument("--watts", type=str, metavar="X", help="power of one chip; default by a table")
    made.add_argument("--compute-efficiency", type=str, default="0.5", metavar="X",
                      help="share of the peak FLOP/s that products reach; default 0.5")
    made.add_argument("--memory-efficiency", type=str, default="0.6", metavar="X",
                      help="share of the HBM bandwidth that is reached; default 0.6")
    made.add_argument("--link-efficiency", type=str, default="0.7", metavar="X",
                      help="share of the links' bandwidth that is reached; default 0.7")
    return made


def _target(text: str | None, config: Config) -> Target:
    if text is None:
        raise UserError(f"--chips must name the machine to plan for, such as {chips.DEFAULT_SHAPES}")
    target = chips.parse(text)
    if text == "cpu":                   # as many virtual devices as the mesh asks for
        mesh = config.mesh
        return chips.cpu(max(mesh.data, 1) * mesh.fsdp * mesh.tensor * mesh.context)
    return target


def _numbers(options: Any, config: Config) -> dict[str, Any]:
    """The inputs that are numbers; a price or a power that is not given is None. Raises: UserError."""
    longest, prompt = config.rollout.max_new_tokens, config.data.max_prompt_tokens
    tokens = {"mean_tokens": (longest, min(MEAN_TOKENS, longest / 2)), "prompt_tokens": (prompt, min(128, prompt))}
    found: dict[str, Any] = {}
    for name, (most, default) in tokens.items():
        given = _number(options, name, f"in [1, {most}]", functools.partial(_within, most=most))
        found[name] = default if given is None else given
    for name in ("compute_efficiency", "memory_efficiency", "link_efficiency"):
        found[name] = _number(options, name, "in (0, 1]", lambda value: 0 < value <= 1)
    for name in ("price_per_chip_hour", "watts"):
        found[name] = _number(options, name, ">= 0 and finite", lambda value: 0 <= value < math.inf)
    return found


def _within(value: float, most: float) -> bool:
    return 1 <= value <= most


def _number(options: Any, name: str, bound: str, fits: Callable[[float], bool]) -> float | None:
    """An option that is a number, None where it is not given. Raises: UserError."""
    text = options[name]
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):                 # nothing holds of nan
        raise UserError(f"--{name.replace('_', '-')} must be a number {bound}, got {text}")
    return value


def _wanted(options: Any) -> list[str]:
    names = [] if options.functions is None else [name.strip() for name in options.functions.split(",")]
    for name in names:
        if name not in FUNCTIONS:
            raise UserError(f"--functions must be of {', '.join(FUNCTIONS)}, got {name!r}")
    if options.analytic and options.fit:
        raise UserError("--analytic and --fit exclude each other: --fit compiles what it recommends")
    if names and options.fit:
        raise UserError("--functions and --fit exclude each other: a plan that fits has all of them")
    return names


def _check_output(options: Any) -> None:
    if options.output is None:
        return
    path = Path(options.output)
    if not options.fit:
        raise UserError("--output is for --fit: it writes the configuration that was found")
    if path.exists():
        raise UserError(f"--output: {path} exists already, nothing is overwritten")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--output: cannot write into the directory {path.parent}")


def _prepare(target: Target, *, compiles: bool) -> None:
    """Sets what JAX and libtpu read when they are first imported. Raises: UserError where libtpu is missing."""
    os.environ["JAX_PLATFORMS"] = "cpu"     # nothing runs, and no accelerator of this machine is taken
    if target.kind == "tpu" and compiles:
        if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
            raise UserError(f"--chips {target.text}: needs libtpu, which compiles for TPUs on any Linux machine: "
                            'pip install "effreason[tpu]"')
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")    # nobody else here is using a TPU through it
    if target.kind == "cpu" and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        flag = f"--xla_force_host_platform_device_count={target.chips}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def _write(config: Config, options: Any, say: Any) -> None:
    if options.output is None:
        return
    with Path(options.output).open("x", encoding="utf-8") as file:
        file.write(configuration.to_yaml(config))
    say(f"written: {options.output}")


def _finite(value: Any) -> Any:
    """JSON has no infinity: null where a number is none."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
