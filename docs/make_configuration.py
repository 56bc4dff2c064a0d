"""Writes what is made from the configuration's dataclasses: python docs/make_configuration.py

These are docs/configuration.md, and configs/schema.json for editors."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from effreason.runtime.config import Config  # noqa: E402
from effreason.runtime.config_fields import (  # noqa: E402
    Setting,
    meanings,
    sections,
    settings,
    written,
)
from effreason.runtime.config_schema import schema  # noqa: E402

SCHEMA = ROOT / "configs" / "schema.json"
PAGE = ROOT / "docs" / "configuration.md"
INTRODUCTION = """# Configuration

<!-- Written by docs/make_configuration.py from effreason/runtime/config.py: change it there. -->

A configuration has sections, and a section has fields. They are read from a YAML
file, and flags override the file:

```
effreason train --config configs/smollm2_gsm8k.yaml --model.path DIR --reward.alpha 0.4
```

- Without `--config` the file is `configs/tiny.yaml`, unless `--model.path`, `--data.path` or
  `--evaluation.path` names something other than `tiny`: the learning rate and the prompt in that
  file are right for the tiny model only. Without a file the defaults below apply.
- `--config` may be given several times, anywhere on the command line; a later file overrides an
  earlier one. A field set by neither a file nor a flag has the default below.
- `--print_config` prints the resolved configuration as YAML and exits. A run writes it into its
  directory.
- Editors complete and check the files in `configs/` as you type, by [the
  schema](../configs/schema.json): with the YAML extension of VS Code, and other editors with
  yaml-language-server, the first line of a file of your own is `# yaml-language-server: $schema=`
  and the path of that `schema.json`.
- `null` means that there is no value; booleans are written `true` and `false`.
- A mistake ends the program at once with exit code 2 and one line such as
  `error: reward.alpha must be in [0, 1), got 1.5`.
- `evaluate.py` takes the same fields, and in addition `--models DIR [DIR ...]` (default:
  `model.path`), `--seeds N [N ...]` (default: `run.seed`), `--output DIR` and `--json`;
  `train.py` takes `--json`, `--family ALPHAS`, `--baselines NAMES` and `--blends WEIGHTS`
  ([families.md](families.md)), and
  `--dial ALPHAS` ([dial.md](dial.md)), with which the default file is `configs/tiny_dial.yaml`.

Some fields must be consistent: `rollout.prompts_per_step * rollout.group_size` must be divisible by
`update.updates_per_batch`; if `data.path` is not `tiny` or a preset with a test split,
`evaluation.path` must name a data set or `evaluation.problems` must be 0; `run.resume` needs
`run.directory`.
"""
HEADER = "| field | type | default | meaning |\n|---|---|---|---|\n"


def row(setting: Setting, meaning: str) -> str:
    """Returns one field as a line of a table."""
    cells = [f"`{setting.field}`", setting.expected, f"`{written(setting.default)}`", meaning]
    escaped = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
    return f"| {' | '.join(escaped)} |\n"


def page() -> str:
    """Returns the text of docs/configuration.md."""
    parts = [INTRODUCTION]
    for name, section in sections(Config).items():
        rows = "".join(row(setting, meanings(Config)[setting.field])
                       for setting in settings(section))
        meaning = " ".join((section.__doc__ or "").split())
        parts.append(f"\n## {name}\n\n{meaning}\n\n{HEADER}{rows}")
    return "".join(parts)


def schema_text() -> str:
    """Returns the text of configs/schema.json."""
    return json.dumps(schema(Config), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
