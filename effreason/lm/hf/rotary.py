"""Reads the rotary entries of config.json, in their old and their new spelling.

transformers 5 writes `rope_parameters`, with theta, and for some families one table for each type
of layer; before, there were `rope_theta`, `rope_scaling` and, in Gemma 3, `rope_local_base_freq`.
"""

import json
import math
from pathlib import Path
from typing import Any

from effreason.lm.hf.families import Family
from effreason.lm.rope import Divided, Linear, Llama3, Rope, Yarn
from effreason.runtime.errors import UserError

# What layer_types may say.
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
ORIGINAL = "original_max_position_embeddings"


def read_ropes(path: Path, table: dict[str, Any], family: Family, *, max_positions: int,
               positions: int | None) -> dict[str, Rope]:
    """Returns how layers without and with a window rotate.

    Args:
        path: Of config.json, for messages.
        table: Its content.
        max_positions: Of the model.
        positions: The longest sequence that will be computed, see `parse_config`.

    Raises:
        UserError: Entries contradict each other, or are not supported."""
    def read(entries: dict[str, Any], theta: float) -> Rope:
        rotated = entries.get("partial_rotary_factor")
        if rotated not in (None, 1) and "partial_rotary_factor" not in family.reads:
            raise UserError(f"{path}: partial_rotary_factor = {quote(rotated)} is not supported")
        return _rope(path, family, table, entries, theta, max_positions=max_positions,
                     positions=positions)

    newer, older = (table.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    defaults = {FULL: family.theta, SLIDING: family.theta_of_windows or family.theta}
    if family.rope_by_type and isinstance(newer, dict) and newer:
        parts = {kind: newer.get(kind) or {} for kind in (FULL, SLIDING)}
        if older or newer.keys() - parts.keys() or not all(
                isinstance(part, dict) for part in parts.values()):
            raise UserError(f"{path}: rope_parameters = {quote(newer)} is not supported, expected "
                            f"one table for {FULL} and one for {SLIDING}, and no rope_scaling")
        return {kind: read(part, _theta(path, part, defaults[kind]))
                for kind, part in parts.items()}

    for name, rope in (("rope_parameters", newer), ("rope_scaling", older)):
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise UserError(f"{path}: {name} = {quote(rope)} is not supported, expected one table "
                            "for all layers")
    kinds = [_kind(path, rope) for rope in (newer, older) if rope] or ["default"]
    if kinds[0] != kinds[-1]:
        raise UserError(f"{path}: rope_parameters say {kinds[0]!r}, rope_scaling says "
                        f"{kinds[1]!r}")

    entries = newer or older
    theta = _theta(path, table, _theta(path, entries, defaults[FULL]))
    if entries.get("rope_theta") is not None and theta != entries["rope_theta"]:
        raise UserError(f"{path}: rope_parameters.rope_theta, {entries['rope_theta']:g}, and "
                        f"rope_theta, {theta:g}, differ")
    full = read(entries, theta)
    if not family.rope_by_type:
        return {FULL: full, SLIDING: full}
    local = table.get("rope_local_base_freq")
    if local is None:
        local = family.theta_of_windows or theta
    return {FULL: full, SLIDING: read({}, positive(path, "rope_local_base_freq", local))}


def _theta(path: Path, entries: dict[str, Any], default: float) -> float:
    theta = entries.get("rope_theta")
    return default if theta is None else positive(path, "rope_theta", theta)


def _rope(path: Path, family: Family, table: dict[str, Any], entries: dict[str, Any],
          theta: float, *, max_positions: int, positions: int | None) -> Rope:
    """Returns what one table of rotary entries describes."""
    rotated = entries.get("partial_rotary_factor", table.get("partial_rotary_factor"))
    rotated = (family.rotated if rotated is None
               else positive(path, "partial_rotary_factor", rotated))
    if rotated > 1:
        raise UserError(f"{path}: partial_rotary_factor must be at most 1, got {rotated:g}")
    kind = _kind(path, entries)
    if table["model_type"] == "phi3" and kind in ("su", "yarn"):    # names of its first versions
        kind = "longrope"

    def number(name: str, default: float | None = None) -> float:
        value = default if entries.get(name) is None else entries[name]
        if value is None:
            raise UserError(f"{path}: {kind} rope parameters lack {name!r}")
        return positive(path, f"{kind} {name}", value)

    match kind:
        # Dynamic scaling begins after the positions that the model was trained for. We stop there.
        case "default" | "dynamic":
            return Rope(theta=theta, rotated=rotated)
        case "linear":
            return Rope(theta=theta, rotated=rotated, scaling=Linear(factor=number("factor")))
        case "llama3":
            return Rope(theta=theta, rotated=rotated, scaling=Llama3(
                factor=number("factor"), low_frequency_factor=number("low_freq_factor"),
                high_frequency_factor=number("high_freq_factor"),
                original_positions=int(number(ORIGINAL))))
        case "yarn":
            original = int(number(ORIGINAL, max_positions))
            factor = number("factor", max_positions / original)
            return Rope(theta=theta, rotated=rotated, scaling=Yarn(
                factor=factor, original_positions=original,
                fast_turns=number("beta_fast", 32.0), slow_turns=number("beta_slow", 1.0),
                whole_planes=entries.get("truncate") is not False,
            ), magnitude=number("attention_factor", _yarn_magnitude(
                factor, entries.get("mscale"), entries.get("mscale_all_dim"))))
        case "longrope":
            original = int(positive(path, ORIGINAL, table.get(ORIGINAL)
                                    or entries.get(ORIGINAL) or max_positions))
            factor = number("factor", max_positions / original)
            magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            is_long = positions is not None and positions > original
            factors = entries.get("long_factor" if is_long else "short_factor")
            planes = _planes(table, rotated)
            if not isinstance(factors, list) or len(factors) != planes:
                raise UserError(f"{path}: longrope must have a list of {planes} factors for short "
                                f"and one for long sequences, got {quote(factors)}")
            return Rope(theta=theta, rotated=rotated,
                        magnitude=number("attention_factor", magnitude),
                        scaling=Divided(factors=tuple(positive(path, "longrope factor", factor)
                                                      for factor in factors)))
    raise UserError(f"{path}: rope type {kind!r} is not supported, expected default, linear, "
                    "dynamic, llama3, yarn or longrope")


def _planes(table: dict[str, Any], rotated: float) -> int:
    head_dim = table.get("head_dim") or table["hidden_size"] // table["num_attention_heads"]
    return int(head_dim * rotated) // 2


def _yarn_magnitude(factor: float, scale: Any, scale_all: Any) -> float:
    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return magnitude(scale) / magnitude(scale_all) if scale and scale_all else magnitude(1.0)


def _kind(path: Path, entries: dict[str, Any]) -> Any:
    """Returns the kind of a table, under its new or its old name; null says nothing."""
    kinds = [entries[name] for name in ("rope_type", "type") if entries.get(name) is not None]
    if kinds and kinds[0] != kinds[-1]:
        raise UserError(f"{path}: rope_type is {kinds[0]!r}, the older type is {kinds[1]!r}")
    changes_nothing = not kinds or (kinds[0] == "linear" and entries.get("factor") == 1)
    return "default" if changes_nothing else kinds[0]


def exported(path: Path, table: dict[str, Any], theta: float) -> dict[str, Any]:
    """Returns the rotary entries for an export in both spellings. Args: theta, of all layers."""
    entries = table.get("rope_parameters") or table.get("rope_scaling") or {}
    kind = _kind(path, entries)
    kept = {name for name in entries if kind != "default" or name == "partial_rotary_factor"}
    rope = {"rope_type": kind} | {name: entries[name]
                                  for name in kept - {"type", "rope_type", "rope_theta"}}
    older = {} if kind == "default" else {"rope_scaling": rope}
    newer = {"rope_parameters": rope | {"rope_theta": theta}}
    return {"rope_theta": theta} | older | newer


def positive(path: Path, name: str, value: Any) -> float:
    """Returns a number. Raises: UserError unless it is one, and positive."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise UserError(f"{path}: {name} must be a positive number, got {quote(value)}")
    return float(value)


def quote(value: Any) -> str:
    """Returns a value as JSON, shortened to 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
