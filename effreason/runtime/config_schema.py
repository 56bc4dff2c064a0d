"""The configuration as a JSON schema, by which editors complete and check YAML files."""

import re
from typing import Any

from effreason.runtime.config_fields import MOST, Setting, meanings, sections, settings

TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object"}
# Bounds in words, as config.py has them, and the keywords of a schema.
BOUNDS = ((r"^>= (-?[\d.]+)", "minimum"), (r"^> (-?[\d.]+)", "exclusiveMinimum"),
          (r"^in \[(-?[\d.]+),", "minimum"), (r"^in \((-?[\d.]+),", "exclusiveMinimum"),
          (r"^in [\[(].*, ?(-?[\d.]+)\]", "maximum"),
          (r"^in [\[(].*, ?(-?[\d.]+)\)", "exclusiveMaximum"))


def schema(config: type) -> dict[str, Any]:
    """Returns the JSON schema (draft 2020-12) of a configuration's YAML files."""
    texts = meanings(config)
    properties = {
        name: {"type": ["object", "null"], "additionalProperties": False,
               "description": " ".join((section.__doc__ or "").split()),
               "properties": {setting.name: field(setting, texts[setting.field])
                              for setting in settings(section)}}
        for name, section in sections(config).items()}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "Configuration of effreason", "type": "object",
            "additionalProperties": False, "properties": properties}


def field(setting: Setting, meaning: str) -> dict[str, Any]:
    """Returns the schema of one field."""
    made: dict[str, Any] = {"description": f"{meaning} [{setting.expected}]",
                            "default": setting.default}
    if setting.choices:
        return made | {"enum": [*setting.choices, *[None] * setting.optional]}
    kind = TYPES[setting.type]
    made["type"] = [kind, "null"] if setting.optional else kind
    if setting.bound is not None and setting.type in (int, float):
        for pattern, keyword in BOUNDS:
            if found := re.search(pattern, setting.bound.text):
                made[keyword] = setting.type(found[1])
    if setting.type is int and "maximum" not in made and "exclusiveMaximum" not in made:
        made["maximum"] = MOST[int]
    return made
