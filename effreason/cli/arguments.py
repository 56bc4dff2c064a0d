"""What the commands share: argparse with errors for users, and checks of models and data."""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from effreason.runtime import config as configuration
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError when argparse would print its usage and exit."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def bounded(name: str, kind: type, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Returns an argparse type for numbers within a bound; `name` is for "invalid NAME value"."""
    def read(text: str) -> Any:
        value = kind(text)
        if not holds(value):
            raise ValueError
        return value

    read.__name__ = name
    return read


@contextlib.contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """Sends what is printed to standard error if standard output is for one JSON object."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


ALPHA = bounded("number in [0, 1)", float, lambda alpha: 0 <= alpha < 1)


def numbers(text: str, field: str, holds: Callable[[float], bool], bound: str) -> list[float]:
    """Reads numbers separated by commas; "none" is the empty list.

    Args: bound, what `holds` checks, in words. Raises: UserError."""
    values: dict[str, float] = {}

    for part in [] if text == "none" else text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not holds(number):
            raise UserError(f"{field} must be numbers in {bound} with commas between them, got "
                            f"{part.strip()!r} in {text!r}")
        if f"{number:g}" in values:
            raise UserError(f"{field} must name each number once, in six digits, got {text!r}")
        values[f"{number:g}"] = number

    return list(values.values())


def check_model(path: str, field: str, *, of_run: bool = False) -> None:
    """Raises UserError unless `path` is "tiny", a Hugging Face directory or an id on the Hub.

    Args: of_run, it may also be RUN/checkpoints/STEP or RUN@ALPHA."""
    if path == "tiny" or of_run and is_of_run(path, field):
        return

    from effreason.lm.hf import hub  # takes a third of a second: not for --help

    expected = f"{field} must be tiny, a Hugging Face directory or an id on its Hub"

    try:
        directory = hub.existing_export(Path(path))
    except OSError as error:        # the name is too long for a file
        raise UserError(f"{expected}, {path[:60]}...: {error.strerror}") from None
    if directory is None and Path(path).exists():
        raise UserError(f"{expected}, {path} is a file")
    if directory is None and not hub.is_hub_id(path):
        raise UserError(f"{expected}, {path} does not exist")
    if directory is not None:
        try:
            if hub.is_adapter(directory):
                from effreason.lm.hf import peft  # imports jax

                peft.base_model(directory)
            else:
                hub.model_directory(directory)
        except UserError as error:
            raise UserError(f"{expected}, {error}") from None


def check_start(config: Config) -> None:
    """Raises UserError unless model.path is a model, and model.adapter, if given, adapters."""
    check_model(config.model.path, "model.path")
    if config.model.adapter is not None:
        from effreason.lm.hf import peft  # imports jax

        peft.resolve(config.model.path, config.model.revision, config.model.adapter)


def check_target(target: Path) -> None:
    """Raises UserError if the directory that --output names exists or cannot be created."""
    from effreason.lm.hf import hub  # takes a third of a second: not for --help

    if target.exists() or hub.existing_export(target) is not None:
        raise UserError(f"--output: {target} exists already, nothing is overwritten")
    parent = next(path for path in target.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--output: cannot write into {parent}")


def run_config(directory: Path) -> Config:
    """Returns the configuration of a run. Raises: UserError if the directory is not one."""
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory}: must be the directory of a run, it holds no config.yaml")
    return configuration.load(directory / "config.yaml")


def is_of_run(path: str, field: str) -> bool:
    """Returns whether a model is a checkpoint of a run, which is checked when it is opened.

    Raises: UserError if the run has no dial, or none with this alpha."""
    from effreason.rl import dial  # imports numpy: not for --help

    if (found := dial.find_run(path)) is not None:
        run, _, alpha = found
        dial.checked_setting(configuration.load(run / "config.yaml").reward, alpha,
                             dial.split_name(path)[0])
        return True

    run_name, at, text = path.rpartition("@")
    if at and not Path(path).exists() and (Path(run_name) / "config.yaml").is_file():
        raise UserError(f"{field}: the alpha of {run_name} must be a number in [0, 1), such as "
                        f"{run_name}@0.2, got {text!r}")
    return False


def check_revision(revision: str | None, path: str, option: str) -> None:
    """Raises UserError if a revision is given for a model that is not on the Hub."""
    if revision is not None:
        from effreason.lm.hf import hub

        if path == "tiny" or Path(path).exists() or not hub.is_hub_id(path):
            raise UserError(f"--revision is for a model on the Hub, {option} is {path}")


def check_held_out(config: Config) -> None:
    """Raises UserError if there are no problems to evaluate on, or they are not a data set."""
    from effreason.data import sources  # imports numpy: not for --help

    path = sources.evaluation_path(config)
    check_data(config, "data.path" if config.evaluation.path is None else "evaluation.path", path,
               held_out=True)


def check_data(config: Config, field: str, path: str | None, *, held_out: bool = False) -> None:
    """Raises UserError if a data set is missing or is not one."""
    if path is not None:
        from effreason.data import sources  # imports numpy: not for --help

        sources.check(path, config.data, field, held_out=held_out,
                      split=config.evaluation.split if held_out else None)
