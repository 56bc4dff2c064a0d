"""What a configuration's dataclasses say, as data: type, bound, default and meaning of every field.

The dataclasses are the only place where a field is written down: checks, `--help` and the documentation come from here.
"""

import ast
import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Bound:
    """What values a field takes, beyond its type."""

    text: str                       # follows the type's words: "a number" + " in [0, 1)"
    holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a configuration, checked when it is made: `RewardConfig` is the section `reward`."""

    def __post_init__(self) -> None:
        section: type = type(self)
        for setting in settings(section):
            setting.check(getattr(self, setting.name))


WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of the configuration."""

    section: str
    name: str
    type: Any                       # bool, int, float or str, or a Literal
    optional: bool                  # may be None
    bound: Bound | None
    default: Any

    @property
    def field(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def choices(self) -> tuple[str, ...]:
        return typing.get_args(self.type)

    @property
    def expected(self) -> str:
        """What the field takes, in words that complete "must be ..."."""
        words = f"one of {', '.join(self.choices)}" if self.choices else WORDS[self.type]
        return words + (f" {self.bound.text}" if self.bound else "") + (", or null" if self.optional else "")

    def check(self, value: Any) -> None:
        """Raises ValueError with field, bound and value where the field cannot take the value."""
        if value is None and self.optional:
            return
        if not self.has_type(value):
            raise ValueError(f"{self.field} must be {self.expected}, got {written(value)}")
        if self.bound and not self.bound.holds(value):
            expected = self.expected if self.type is str else self.bound.text
            raise ValueError(f"{self.field} must be {expected}, got {written(value)}")

    def has_type(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if isinstance(value, bool):  # a bool is an int to Python, not to a reader
            return self.type is bool
        return isinstance(value, (int, float) if self.type is float else self.type)


@functools.cache
def settings(section: type) -> tuple[Setting, ...]:
    """The fields of a section, in order."""
    hints = typing.get_type_hints(section, include_extras=True)
    name = section.__name__.removesuffix("Config").lower()
    found = []
    for field in dataclasses.fields(section):
        hint, optional, bound = hints[field.name], False, None
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            (hint,), optional = [arg for arg in typing.get_args(hint) if arg is not types.NoneType], True
        if typing.get_origin(hint) is Annotated:
            hint, bound = typing.get_args(hint)
        found.append(Setting(name, field.name, hint, optional, bound, field.default))
    return tuple(found)


@functools.cache
def sections(config: type) -> dict[str, type]:
    """The sections of a configuration, in order."""
    return typing.get_type_hints(config)


def all_settings(config: type) -> list[Setting]:
    """Every field of a configuration, in order."""
    return [setting for section in sections(config).values() for setting in settings(section)]


@functools.cache
def meanings(config: type) -> dict[str, str]:
    """What each field means: the text under it in its class. Python drops it, so it is read from the source."""
    classes = {section.__name__: name for name, section in sections(config).items()}
    found = {}
    for node in ast.parse(inspect.getsource(sys.modules[config.__module__])).body:
        if not isinstance(node, ast.ClassDef) or node.name not in classes:
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                words = inspect.cleandoc(ast.literal_eval(text.value)).replace("\n", " ")
                found[f"{classes[node.name]}.{ast.unparse(field.target)}"] = words
    return found


def written(value: Any) -> str:
    """A value as YAML has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}'" if isinstance(value, str) and value.isprintable() else repr(value)
