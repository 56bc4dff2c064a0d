"""Reads YAML files and dotted flags into a configuration; every mistake is one line."""

import argparse
import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jsonargparse
import yaml

from effreason.runtime.config_fields import all_settings, meanings, sections, settings, written
from effreason.runtime.errors import UserError

METAVARS = {int: "N", float: "X", str: "TEXT", dict: "{NAME: VALUE}"}
Config = TypeVar("Config")


class _Loader(yaml.SafeLoader):
    """YAML without surprises: 1:30 is not 90, 010 is not 8, 2001-01-01 is no date, and a key that
    comes twice is an error, as is a word that YAML 1.1 reads as true or false and 1.2 as text."""

    # By the first character; without the dates, numbers and truth values of YAML 1.1.
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers
                if tag.rpartition(":")[2] not in ("timestamp", "int", "float", "bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is there twice", problem_mark=key.start_mark)
            names.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError:          # a number of 5,000 digits
            value, kind = str(node.value), node.tag.rpartition(":")[2]
            shown = value if len(value) <= 60 else f"{value[:40]}... ({len(value)} characters)"
            raise yaml.constructor.ConstructorError(
                problem=f"{shown} cannot be read as {kind}", problem_mark=node.start_mark) from None

    def refuse_word(self, node: yaml.ScalarNode) -> NoReturn:
        meant = "true" if node.value.lower() in ("yes", "on") else "false"
        raise yaml.constructor.ConstructorError(
            problem=f"{node.value} may be {meant} or a text: write {meant}, or quote it",
            problem_mark=node.start_mark)


class Dumper(yaml.SafeDumper):
    """Quotes texts that `read_yaml` would not read as text, such as 1e5."""

    yaml_implicit_resolvers = yaml.SafeDumper.yaml_implicit_resolvers.copy()


_INTEGER = r"[-+]?(0|[1-9][0-9_]*)$"
_DECIMAL = (r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?$"
            r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
for _tag, _pattern, _first in (
        ("tag:yaml.org,2002:bool", "(true|True|TRUE|false|False|FALSE)$", "tTfF"),
        ("!word", "(?i:yes|no|on|off)$", "yYnNoO"),
        ("tag:yaml.org,2002:int", _INTEGER, "-+0123456789"),
        ("tag:yaml.org,2002:float", _DECIMAL, "-+.0123456789")):
    for _kind in (_Loader, Dumper):
        _kind.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))
_Loader.add_constructor("!word", _Loader.refuse_word)


def read_yaml(text: str | bytes) -> Any:
    """Reads YAML: of configuration files, of flags, and of other options that take it.

    Numbers may have underscores: 1_000; otherwise they and the words true, false and null are those
    of YAML 1.2 and JSON. Raises: yaml.YAMLError, UnicodeError, RecursionError."""
    return yaml.load(text, _Loader)


jsonargparse.set_loader("strict_yaml", read_yaml, (yaml.YAMLError, UnicodeError, RecursionError))


def parser(config: type, prog: str, description: str | None = None) -> jsonargparse.ArgumentParser:
    """Builds the parser for `parse`: --config, --print_config and a dotted flag for every field."""
    parser = jsonargparse.ArgumentParser(
        prog=prog, description=description,
        usage="%(prog)s [--config FILE] [--section.field VALUE ...]",
        formatter_class=argparse.HelpFormatter, exit_on_error=False, allow_abbrev=False,
        parser_mode="strict_yaml")
    parser.add_argument(
        "--config", metavar="FILE",
        help="YAML file; a later one overrides an earlier one, flags override all files. Default: "
        "configs/tiny.yaml, or no file if a flag names a model or data set other than tiny. Fields "
        "set by neither a file nor a flag have the defaults below.")
    parser.add_argument("--print_config", action="store_true",
                        help="print the resolved configuration as YAML and exit")

    for name, section in sections(config).items():
        group = parser.add_argument_group(name, section.__doc__)
        for setting in settings(section):
            choices = setting.choices or (("true", "false") if setting.type is bool else ())
            expected = "" if choices else f"{setting.expected}; "   # the metavar shows the choices
            meaning = meanings(config)[setting.field]
            group.add_argument(
                f"--{setting.field}",
                type=setting.type | None if setting.optional else setting.type,
                default=setting.default,
                metavar=f"{{{','.join(choices)}}}" if choices else METAVARS[setting.type],
                help=f"{meaning} [{expected}default {written(setting.default)}]".replace("%", "%%"))

    return parser


def parse(config: type[Config], parser: jsonargparse.ArgumentParser, argv: Sequence[str] | None,
          default: Path, made_for: Mapping[str, frozenset[str]],
          ) -> tuple[Config, jsonargparse.Namespace]:
    """Reads the files, then the flags; returns the configuration and all that was parsed.

    Args:
        argv: the arguments; None = sys.argv.
        default: the file to read if --config names none.
        made_for: the default is not read if a flag gives one of these fields a value, or one of
            several separated by commas, that is not among these.
    Raises: UserError; SystemExit(0) after --help."""
    # --config first, wherever it is on the command line: files in their order, then flags.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", action="append", default=[], type=Path)
    first.add_argument("--print_config", action="store_true")

    try:
        files, flags = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(_one_line(error).removeprefix("argument ")) from None

    values = jsonargparse.Namespace()
    if not {"-h", "--help"}.intersection(flags):
        for path in files.config or ([default] if _fits(flags, made_for) else []):
            values = read(config, parser, _resolved(path, default.parent), values)

    for setting in all_settings(config):
        for flag in flags:
            # The parser would take every such value as text: "false" is true to a template.
            if setting.type is dict and flag.startswith(f"--{setting.field}."):
                raise UserError(f"{flag.partition('=')[0]}: give --{setting.field} all at once, as "
                                "'{NAME: VALUE, ...}'")

    try:
        _check_flags(flags, config)
        values = parser.parse_args(flags, values)
    except argparse.ArgumentError as error:
        raise UserError(_explained(error, config)) from None
    values.print_config = files.print_config
    return build(config, values), values


def _check_flags(flags: Sequence[str], config: type) -> None:
    """Raises UserError for the flag of a number, truth value or mapping that is none in `_Loader`'s
    YAML: the parser also takes 010 for 10, and yes for true."""
    fields = {setting.field: setting for setting in all_settings(config)}
    for flag, following in itertools.zip_longest(flags, flags[1:], fillvalue=""):
        name, equals, value = flag.removeprefix("--").partition("=")
        setting = fields.get(name) if flag.startswith("--") else None
        if setting is None or setting.type not in (int, float, bool, dict):
            continue
        text, problem = value if equals else following, ""
        try:
            given = read_yaml(text)
            if setting.type is dict:
                setting.check(given)
            fits = not isinstance(given, str)
        except yaml.MarkedYAMLError as error:
            fits, problem = False, f": {error.problem}" if setting.type is dict else ""
        except (ValueError, yaml.YAMLError, RecursionError):
            fits = False
        if not fits:
            raise UserError(f"{name} must be {setting.expected}, got {text}{problem}")


def _fits(flags: Sequence[str], made_for: Mapping[str, frozenset[str]]) -> bool:
    """Returns whether no flag gives one of these fields other values than its own."""
    for index, flag in enumerate(flags):
        name, equals, value = flag.removeprefix("--").partition("=")
        value = value if equals else next(iter(flags[index + 1:]), "")
        if name in made_for and not set(value.split(",")) <= made_for[name]:
            return False
    return True


def read(config: type, parser: jsonargparse.ArgumentParser, path: Path,
         base: jsonargparse.Namespace) -> jsonargparse.Namespace:
    """Returns the values of a YAML file over those of `base`. Raises: UserError naming the file."""
    try:
        table = read_yaml(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {_one_line(error)}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deep") from None

    table = {} if table is None else table

    try:
        _check_keys(table, config)
        # A section with every line commented out is null.
        given = {name: fields for name, fields in table.items() if fields is not None}
        for setting in all_settings(config):
            value = given.get(setting.section, {}).get(setting.name)
            if isinstance(value, str) and setting.type in (int, float):
                raise ValueError(f"{setting.field} must be {setting.expected}, got {value}")
        values = parser.parse_object(given, base)
        for setting in all_settings(config):
            setting.check(values[setting.field])
    except argparse.ArgumentError as error:
        raise UserError(f"{path}: {_explained(error, config)}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None

    return values


def build(config: type[Config], values: jsonargparse.Namespace) -> Config:
    """Builds the configuration from parsed values. Raises: UserError."""
    whole: type = config            # mypy: as a type variable it is not hashable
    try:
        return config(**{
            name: section(**{setting.name: values[setting.field] for setting in settings(section)})
            for name, section in sections(whole).items()})
    except ValueError as error:
        raise UserError(str(error)) from None


def _resolved(path: Path, shipped: Path) -> Path:
    """Returns the file, or the shipped one of that name if configs/NAME does not exist."""
    if not path.exists() and path.parent == Path(shipped.name) and (shipped / path.name).exists():
        return shipped / path.name
    return path


def _check_keys(table: Any, config: type) -> None:
    """Raises ValueError unless the table is sections of fields that exist."""
    if not isinstance(table, dict):
        raise ValueError(f"must hold sections with fields under them, got {written(table)}")

    for name, fields in table.items():
        if name not in sections(config):
            raise ValueError(f"no section {name}{_nearest(name, sections(config))}")
        if not isinstance(fields, dict | None):
            raise ValueError(f"{name} must have fields under it, got {written(fields)}")
        known = {setting.name for setting in settings(sections(config)[name])}
        for field in fields or {}:
            if field not in known:
                raise ValueError(f"no field {name}.{field}{_nearest(field, known)}")


def _explained(error: argparse.ArgumentError, config: type) -> str:
    """Rewords the parser's message as one line that says what the field accepts."""
    message = str(error)
    known = {setting.field: setting for setting in all_settings(config)}
    if unknown := re.match(r"unrecognized arguments: (\S+)", message):
        flag = unknown[1].partition("=")[0]
        if not flag.startswith("-"):
            return f"unexpected argument {flag}"
        return f"no option {flag}{_nearest(flag, [f'--{field}' for field in known])}"

    named = re.search(r'Parser key "([\w.]+)"|argument --([\w.]+):', message)
    setting = known.get(named[1] or named[2]) if named else None
    if setting is None:
        return _one_line(error)

    if nested := re.search(r"NestedArg\(key='(.*?)'", message):
        return f"no option --{setting.field}.{nested[1]}: did you mean --{setting.field}?"
    got = re.search(r"(?:Got|Given) value: (.*)", message)
    value = got[1] if got else "nothing"
    value = {"None": "null", "True": "true", "False": "false"}.get(value, value)
    return f"{setting.field} must be {setting.expected}, got {value}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _nearest(word: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f": did you mean {close[0]}?" if close else ""
