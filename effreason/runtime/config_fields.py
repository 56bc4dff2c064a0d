"""What the configuration's dataclasses say, as data: type, bound, default and meaning of a field.

The dataclasses are the only place that defines a field: checks, `--help` and docs/configuration.md
are made from them.
"""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

import docstring_parser

INT32_MAX = 2**31 - 1
MOST = {int: INT32_MAX, float: 3.4e38}      # devices compute with 32 bits
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text",
         dict: "a mapping"}


@dataclasses.dataclass(frozen=True)
class Bound:
    """Which values a field accepts, besides its type."""

    text: str                       # continues the words for the type: "a number" + " in [0, 1)"
    holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a configuration, checked when built: `RewardConfig` is the section `reward`."""

    def __post_init__(self) -> None:
        section: type = type(self)
        for setting in settings(section):
            setting.check(getattr(self, setting.name))


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of the configuration."""

    section: str
    name: str
    type: Any                       # bool, int, float, str or dict, or a Literal
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
        """What the field accepts, in words that complete "must be ..."."""
        words = f"one of {', '.join(self.choices)}" if self.choices else WORDS[self.type]
        bound = f" {self.bound.text}" if self.bound else ""
        return words + bound + (", or null" if self.optional else "")

    def check(self, value: Any) -> None:
        """Raises ValueError with field, bound and value if the field does not accept the value."""
        if value is None and self.optional:
            return

        if not self.has_type(value):
            raise ValueError(f"{self.field} must be {self.expected}, got {written(value)}")

        if self.bound and not self.bound.holds(value):
            expected = self.expected if self.type in (str, dict) else self.bound.text
            raise ValueError(f"{self.field} must be {expected}, got {written(value)}")

        if self.type in MOST and value > MOST[self.type]:
            raise ValueError(
                f"{self.field} must be at most {MOST[self.type]}, got {written(value)}")

    def has_type(self, value: Any) -> bool:
        """Returns whether a value other than None is of the field's type."""
        if self.choices:
            return value in self.choices

        if isinstance(value, bool):     # a bool is an int to Python, but not to a reader
            return self.type is bool
        return isinstance(value, (int, float) if self.type is float else self.type)


@functools.cache
def settings(section: type) -> tuple[Setting, ...]:
    """Returns the fields of a section, in order."""
    hints = typing.get_type_hints(section, include_extras=True)
    name = section.__name__.removesuffix("Config").lower()
    fields = []

    for field in dataclasses.fields(section):
        hint, optional, bound = hints[field.name], False, None
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            hint, = (arg for arg in typing.get_args(hint) if arg is not types.NoneType)
            optional = True

        if typing.get_origin(hint) is Annotated:
            hint, bound = typing.get_args(hint)
        fields.append(Setting(name, field.name, hint, optional, bound, field.default))

    return tuple(fields)


@functools.cache
def sections(config: type) -> dict[str, type]:
    """Returns the sections of a configuration by name, in order."""
    return typing.get_type_hints(config)


def all_settings(config: type) -> list[Setting]:
    """Returns every field of a configuration, in order."""
    return [setting for section in sections(config).values() for setting in settings(section)]


@functools.cache
def meanings(config: type) -> dict[str, str]:
    """Returns what each field means: the text below it in its class."""
    return {f"{name}.{field.arg_name}": " ".join((field.description or "").split())
            for name, section in sections(config).items()
            for field in docstring_parser.parse_from_object(section).params}


def written(value: Any) -> str:
    """Returns a value as YAML writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return f"'{value}'" if isinstance(value, str) and value.isprintable() else repr(value)
