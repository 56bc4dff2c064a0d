"""The JSON schema of the configuration: up to date, and as strict as the configuration is."""

import importlib.util
from pathlib import Path

import pytest

from effreason.runtime import config as configuration
from effreason.runtime.config import Config
from effreason.runtime.config_schema import schema

ROOT = Path(__file__).parents[2]
SECTIONS = schema(Config)["properties"]


def test_the_shipped_schema_is_up_to_date():
    spec = importlib.util.spec_from_file_location("made", ROOT / "docs" / "make_configuration.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert (configuration.shipped() / "schema.json").read_text(
        encoding="utf-8") == made.schema_text(), "run python docs/make_configuration.py"


@pytest.mark.parametrize("path", sorted(configuration.shipped().rglob("*.yaml")), ids=str)
def test_the_recipes_name_the_schema(path):
    place = "../" * (path.parent.name == "recipes") + "schema.json"
    assert path.read_text().splitlines()[0] == f"# yaml-language-server: $schema={place}"


@pytest.mark.parametrize(("section", "field", "bounds"), [
    ("reward", "alpha", {"type": "number", "minimum": 0.0, "exclusiveMaximum": 1.0}),
    ("rollout", "top_p", {"type": "number", "exclusiveMinimum": 0.0, "maximum": 1.0}),
    ("rollout", "group_size", {"type": "integer", "minimum": 2, "maximum": 2**31 - 1}),
    ("evaluation", "samples", {"type": ["integer", "null"], "minimum": 1}),
    ("model", "dtype", {"enum": ["bfloat16", "float32"]}),
    ("data", "template", {"type": ["string", "null"]})])
def test_a_field_has_type_and_bounds(section, field, bounds):
    made = SECTIONS[section]["properties"][field]
    assert bounds.items() <= made.items() and made["description"]


def test_unknown_names_are_errors():
    assert schema(Config)["additionalProperties"] is False
    assert all(section["additionalProperties"] is False for section in SECTIONS.values())
