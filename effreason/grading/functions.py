"""A user's own grader, given as module:function. Only a worker imports and calls it."""

import hashlib
import importlib
import inspect
import json
import re
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


class BadFunction(Exception):
    """The function cannot be used; the message says why."""


class BadResult(Exception):
    """The function returned neither True, False nor a number in [0, 1], or lacks a column."""


def check_name(name: str) -> None:
    """Raises BadFunction unless the name has the form module:function."""
    if not NAME.fullmatch(name):
        raise BadFunction("it must have the form module:function")


def load(name: str, path: Sequence[str]) -> Callable[..., Any]:
    """Imports the function, which takes response and answer, and columns of the data by name.

    Args: name, module:function; path, directories to search for modules before all others.
    Raises: BadFunction.
    """
    check_name(name)
    module_name, _, attributes = name.partition(":")
    sys.path[:0] = [directory for directory in path if directory not in sys.path]

    try:
        function: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name
                                       or module_name.startswith(f"{error.name}.")):
            raise BadFunction(
                f"there is no module {error.name} in {path[0]} or on Python's path") from None
        raise BadFunction(f"importing {module_name} failed: {describe(error)}") from None
    except (Exception, SystemExit) as error:
        raise BadFunction(f"importing {module_name} failed: {describe(error)}") from None

    for attribute in attributes.split("."):
        if not hasattr(function, attribute):
            raise BadFunction(f"{module_name} has no {attributes}")
        function = getattr(function, attribute)
    if not callable(function):
        raise BadFunction(f"{attributes} cannot be called, it is of type {type(function).__name__}")

    try:
        inspect.signature(function).bind("", "", **dict.fromkeys(columns_of(function)))
    except TypeError:
        raise BadFunction(f"{attributes} must take two arguments, the response and the answer, and "
                          "may take columns of the data by name") from None
    except ValueError:              # written in C: its arguments are not known
        pass

    return function


def columns_of(function: Callable[..., Any]) -> list[str]:
    """Returns the names of the columns that a function takes; `**columns` is not among them.

    They are its parameters after the first two that have no default, and all keyword-only ones."""
    own = list(_parameters(function).values())
    return [one.name for index, one in enumerate(own) if one.kind == one.KEYWORD_ONLY or (
        index >= 2 and one.kind == one.POSITIONAL_OR_KEYWORD and one.default is one.empty)]


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:              # written in C: its arguments are not known
        return {}


def source_sha256(name: str) -> str:
    """Returns 12 digits of a hash of a function's source, once it is imported.

    It covers the modules of its package, and those that were imported from the same directory: the
    user's own, but nothing installed. Args: name, module:function."""
    top = re.split("[.:]", name)[0]
    file = getattr(sys.modules[top], "__file__", None)      # None: built in, or without __init__.py
    places = list(getattr(sys.modules[top], "__path__", [file] if file else []))
    digest = hashlib.sha256()

    for module_name, module in sorted(sys.modules.items()):
        file, package = getattr(module, "__file__", None), module_name.partition(".")[0]
        if isinstance(file, str) and (package == top or (
                package not in ("__main__", "effreason") and not _is_installed(Path(file))
                and any(Path(file).is_relative_to(Path(place).parent) for place in places))):
            content = Path(file).read_bytes() if Path(file).is_file() else b""
            digest.update(f"{module_name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _is_installed(file: Path) -> bool:
    return (not {"site-packages", "dist-packages"}.isdisjoint(file.parts)
            or file.is_relative_to(sysconfig.get_path("stdlib")))


def score(function: Callable[..., Any], response: str, answer: str, columns: str = "") -> float:
    """Calls the function.

    Args: columns, of the problem's row, a JSON object; "" = none.
    Raises: BadResult unless it returns True, False or a number in [0, 1], or if it takes a column
        that there is not; and whatever the function raises.
    """
    row = json.loads(columns) if columns else {}
    names, parameters = columns_of(function), _parameters(function)
    taken = {name: row[name] for name in names if name in row}
    for name in names:
        if name not in row and parameters[name].default is inspect.Parameter.empty:
            raise BadResult(f"it takes {name}, which is no column of the data, found "
                            f"{', '.join(row) or 'none'}")
    if any(one.kind == inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        taken = {name: value for name, value in row.items() if name not in list(parameters)[:2]}
    result = function(response, answer, **taken)

    scalar = type(result).__module__ == "numpy" and getattr(result, "shape", None) == ()
    value = result.item() if scalar else result
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
        raise BadResult(f"it returned {repr(result)[:80]}, expected True, False or a number in "
                        "[0, 1]")
    return float(value)


def describe(error: BaseException) -> str:
    """Returns an exception on one line."""
    if isinstance(error, BadFunction | BadResult):
        return str(error)
    try:
        text = " ".join(str(error).split())[:200]
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
