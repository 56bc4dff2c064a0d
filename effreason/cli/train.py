"""The command `effreason train`: one run, or a family of runs with one alpha each.

The configuration and the files it names are checked before jax is imported.
"""

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effreason.cli.arguments import check_data, check_held_out, check_start, numbers, only_json
from effreason.runtime import config as configuration
from effreason.runtime import config_parser
from effreason.runtime.config import Config, UpdateConfig
from effreason.runtime.config_fields import settings
from effreason.runtime.errors import UserError

_, *BASELINES = next(setting for setting in settings(UpdateConfig)
                     if setting.name == "objective").choices
BLENDS = "0.25,0.5,0.75"
ALPHAS = "0,0.05,0.1,0.2,0.4"
TINY_FILE, DIAL_FILE = "configs/tiny.yaml", "configs/tiny_dial.yaml"


def run(argv: Sequence[str], prog: str) -> None:
    """Trains. Raises: UserError, Interrupted, SystemExit(0) after --help."""
    parser = config_parser.parser(Config, prog, "Train a model to reason in fewer tokens.")
    parser.add_argument("--dial", metavar="ALPHAS", type=str,
                        help="train the weights of all these alphas, and of those in between, in "
                        f"one run: reward.alphas; default {ALPHAS}; without --config the default "
                        f"is {DIAL_FILE}")
    parser.add_argument("--family", metavar="ALPHAS", type=str,
                        help="train one model for each of these values of reward.alpha, such as "
                        "0,0.05,0.1,0.2,0.4, and compare them")
    parser.add_argument("--baselines", metavar="NAMES", type=str,
                        help="with --family: baselines to train for comparison, out of "
                        f"{', '.join(BASELINES)}, or none; default all")
    parser.add_argument("--blends", metavar="WEIGHTS", type=str,
                        help="with --family: also evaluate weighted means of the base model and "
                        "the model with the greatest alpha; WEIGHTS are the shares of the latter, "
                        f"or none; default {BLENDS}")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, "
                        "summary.json or family.json; all else goes to standard error")
    argv, with_dial = dial_as_field(argv)
    config, values = configuration.parse(parser, argv, DIAL_FILE if with_dial else TINY_FILE)
    family = _family(values)
    check(config)
    if values.json and not config.evaluation.problems:
        raise UserError("--json needs an evaluation: evaluation.problems is 0")

    from effreason.runtime import distributed, processes

    with distributed.joined(config.distributed):
        with only_json(values.json):
            if family is None:
                from effreason import loop

                directory = loop.train(config)
            else:
                from effreason.cli import family as families

                directory = families.train(config, *family)
        if values.json and processes.is_primary():
            name = "summary.json" if family is None else "family.json"
            print((directory / name).read_text(encoding="utf-8"), end="")


def check(config: Config) -> None:
    """Raises UserError if a file or package that the training needs is missing.

    It takes seconds; without it the error would come after the compilation."""
    check_start(config)
    check_data(config, "data.path", config.data.path)
    check_data(config, "data.exclude", config.data.exclude, held_out=True)
    if config.evaluation.problems > 0:
        check_held_out(config)

    if config.reward.form != "efficient" or config.reward.parameters is not None:
        from effreason.rl import configured_reward  # imports jax

        configured_reward.check(config.reward)

    directory = config.run.directory
    if directory is not None and Path(directory).exists() and not Path(directory).is_dir():
        raise UserError(f"run.directory must be a directory, {directory} is a file")

    wandb = importlib.util.find_spec("wandb") if config.log.wandb else None
    # Without an origin it is only a folder of that name, such as the one that wandb writes.
    if config.log.wandb and (wandb is None or wandb.origin is None):
        raise UserError('log.wandb needs the package wandb: pip install "effreason[wandb]"')


def dial_as_field(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Turns --dial, --dial ALPHAS and --dial=ALPHAS into the field.

    Returns: the arguments, and whether --dial is one of them."""
    fields: list[str] = []
    for part, following in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
        name, _, alphas = part.partition("=")
        if name != "--dial":
            fields.append(part)
        elif alphas or following.startswith("-"):
            fields += ["--reward.alphas", alphas or ALPHAS]
        else:
            fields.append("--reward.alphas")
    return fields, fields != list(argv)


def _family(values: Any) -> tuple[list[float], list[str], list[float]] | None:
    """Returns the alphas, baselines and blends of a family; None for a single run."""
    if values.family is None:
        for name in ("baselines", "blends"):
            if getattr(values, name) is not None:
                raise UserError(f"--{name} is for a family: name its alphas with --family")
        return None

    alphas = numbers(values.family, "--family", lambda x: 0 <= x < 1, "[0, 1)")
    if not alphas:
        raise UserError("--family must name at least one alpha, got none")

    text = ",".join(BASELINES) if values.baselines is None else values.baselines
    baselines = [] if text == "none" else [name.strip() for name in text.split(",")]

    for name in baselines:
        if name not in BASELINES or baselines.count(name) > 1:
            raise UserError(f"--baselines must name each of {', '.join(BASELINES)} at most once, "
                            f"or be none, got {text!r}")

    weights = BLENDS if values.blends is None else values.blends
    return alphas, baselines, numbers(weights, "--blends", lambda x: 0 <= x <= 1, "[0, 1]")
