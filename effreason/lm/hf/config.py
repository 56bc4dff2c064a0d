"""Reads and writes config.json; refuses, by name, what this decoder does not compute."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from effreason.lm.architecture import DecoderConfig, LayerKind
from effreason.lm.delta import DeltaShape
from effreason.lm.hf import rotary
from effreason.lm.hf.families import (
    FAMILIES,
    STATE_SIZES,
    WRAPPERS,
    Family,
    rotates,
    unsupported_entry,
)
from effreason.lm.hf.rotary import FULL, LINEAR, SLIDING, positive, quote
from effreason.lm.rope import Rope
from effreason.runtime.errors import UserError
from effreason.runtime.files import read_json

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# The entries that give the weights their shapes, and our names for them.
SIZES = {"vocab_size": "vocabulary", "hidden_size": "width", "num_hidden_layers": "layers",
         "num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "head_dim": "head_dim",
         "intermediate_size": "mlp_width"}


def transformers() -> Any:
    """Imports transformers, which takes a second; without its notice that torch is missing."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def read_config(directory: Path, *, dtype: str = "float32", remat: str = "full") -> DecoderConfig:
    """Returns the decoder that a directory's config.json describes."""
    path = directory / "config.json"
    return parse_config(read_json(path), path, dtype=dtype, remat=remat)


def parse_config(table: dict[str, Any], path: Path, *, dtype: str = "float32",
                 remat: str = "full", positions: int | None = None) -> DecoderConfig:
    """Returns the decoder that a config.json describes, in its old or its new spelling.

    A missing entry has the value that transformers gives it.

    Args:
        table: The content of the file.
        path: The file, for error messages.
        positions: The longest sequence that will be computed: rotation of the kind `longrope`
            depends on it. None: no longer than those the model was first trained on.

    Raises:
        UserError: The family is unknown, or uses a feature that this decoder lacks."""
    name = table.get("model_type")
    if isinstance(name, str) and name in WRAPPERS:
        config = parse_config(decoder_table(table, path), path, dtype=dtype, remat=remat,
                              positions=positions)
        return dataclasses.replace(config, copied_prefixes=(
            *WRAPPERS[name].copied_prefixes, *config.copied_prefixes))
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{path}: model_type {quote(name)} is not supported, expected one of "
                        f"{', '.join((*FAMILIES, *WRAPPERS))}")
    family = FAMILIES[name]
    _check_features(path, table, family)

    def entry(entry_name: str, kind: type[int] | type[float] = int, default: Any = None) -> Any:
        value = table.get(entry_name)
        if value is None:
            value = _default(name, entry_name) if default is None else default
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise UserError(f"{path}: {entry_name} must be a positive {kind.__name__}, got "
                            f"{quote(value)}")
        return value

    heads, width = entry("num_attention_heads"), entry("hidden_size")
    kv_heads = entry("num_key_value_heads", default=heads)
    head_dim = entry("head_dim", default=family.head_dim or max(width // heads, 1))
    tied = table.get("tie_word_embeddings")
    if heads % kv_heads:
        raise UserError(f"{path}: num_key_value_heads must divide num_attention_heads, {heads}, "
                        f"got {kv_heads}")
    if family.head_dim is None and table.get("head_dim") is None and width % heads:
        raise UserError(f"{path}: num_attention_heads must divide hidden_size, {width}, got "
                        f"{heads}")
    if head_dim % 2:
        raise UserError(f"{path}: head_dim must be even, got {head_dim}")
    if tied not in (None, True, False):
        raise UserError(f"{path}: tie_word_embeddings must be true or false, got {quote(tied)}")

    activation = table.get("hidden_activation") or table.get("hidden_act") or _activation(name)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UserError(f"{path}: hidden_act = {quote(activation)} is not supported, expected one "
                        f"of {', '.join(ACTIVATIONS)}")
    facts = dict(family.facts)
    if "attention_bias" in family.reads:
        facts |= dict.fromkeys(("qkv_bias", "output_bias"), bool(table.get("attention_bias")))
    if "query_pre_attn_scalar" in family.reads:
        facts["query_scale"] = math.sqrt(head_dim / entry("query_pre_attn_scalar", float))
        facts["embedding_scale"] = math.sqrt(width)

    mlp_entry = "intermediate_size"
    if "num_experts" in family.reads:
        mlp_entry = "moe_intermediate_size"
        known = [name for name in ("num_experts", "num_local_experts") if table.get(name)]
        facts |= {"experts": entry(known[0] if known else "num_experts"),
                  "experts_per_token": entry("num_experts_per_tok"),
                  "normalizes_experts": bool(table.get("norm_topk_prob"))}
        if facts["experts_per_token"] > facts["experts"]:
            raise UserError(f"{path}: num_experts_per_tok must be at most the number of experts, "
                            f"{facts['experts']}, got {facts['experts_per_token']}")

    state = None
    if family.has_states:
        state = DeltaShape(**{ours: entry(name) for name, ours in STATE_SIZES.items()})
        if state.value_heads % state.key_heads:
            raise UserError(f"{path}: linear_num_key_heads must divide linear_num_value_heads, "
                            f"{state.value_heads}, got {state.key_heads}")

    layers = entry("num_hidden_layers")
    return DecoderConfig(
        vocabulary=entry("vocab_size"), width=width, layers=layers, heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, mlp_width=entry(mlp_entry),
        norm_eps=entry("rms_norm_eps", float),
        kinds=_layer_kinds(path, table, family, layers, positions, state),
        tied=family.tied if tied is None else tied, activation=ACTIVATIONS[activation],
        mlp_bias="mlp_bias" in family.reads and bool(table.get("mlp_bias")),
        dtype=jnp.dtype(dtype), remat=remat, **facts)


def decoder_table(table: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the part of a config.json that is the decoder's, in the form of a file of its own.

    Raises:
        UserError: There is none."""
    wrapper = WRAPPERS.get(str(table.get("model_type")))
    if wrapper is None:
        return table
    part = table.get("text_config")
    if not isinstance(part, dict) or part.get("model_type") != wrapper.family:
        raise UserError(f"{path}: text_config must be a table with model_type {wrapper.family}, "
                        f"got {quote(part)}")
    names = table.get("architectures")
    if names is not None and names != [wrapper.architecture]:
        raise UserError(f"{path}: architectures = {quote(names)} is not supported, expected "
                        f"{wrapper.architecture}")
    # What is said of the whole model goes first, as in transformers.
    whole = {name: table[name] for name in ("tie_word_embeddings", "quantization_config",
                                            "compression_config", "auto_map")
             if table.get(name) is not None}
    return part | whole | {"architectures": [FAMILIES[wrapper.family].architecture]}


def _layer_kinds(path: Path, table: dict[str, Any], family: Family, layers: int,
                 positions: int | None, state: DeltaShape | None) -> tuple[LayerKind, ...]:
    """Returns the kinds of layers in their shortest period. Args: state, of layers that keep one.
    """
    types, length = _layer_types(path, table, family, layers)
    most = max_positions(table, path)
    ropes = rotary.read_ropes(path, table, family, max_positions=most, positions=positions)
    listed = table.get("no_rope_layers")
    if "no_rope_layers" in family.reads and listed and (
            not isinstance(listed, list) or len(listed) < layers):
        raise UserError(f"{path}: no_rope_layers must have an entry for each of {layers} layers, "
                        f"got {quote(listed)}")

    def kind(layer: int) -> LayerKind:
        if types[layer] == LINEAR:
            return LayerKind(delta=state)
        window = length if types[layer] == SLIDING else None
        rope: Rope | None = ropes[types[layer]]
        if "no_rope_layers" in family.reads and not rotates(table, layer):
            rope = None
        # No sequence is as long as such a window.
        return LayerKind(rope=rope, window=None if window is None or window >= most else window)

    kinds = tuple(kind(layer) for layer in range(layers))
    period = next(period for period in range(1, layers + 1)
                  if all(kinds[layer] == kinds[layer % period] for layer in range(layers)))
    return kinds[:period]


def _layer_types(path: Path, table: dict[str, Any], family: Family,
                 layers: int) -> tuple[list[str], int | None]:
    """Returns what each layer does, FULL, SLIDING or LINEAR, and the positions of a window."""
    types, window = table.get("layer_types"), None
    is_on = family.window_switch is None or bool(table.get(family.window_switch))
    if family.has_window is not None and is_on:
        window = (table["sliding_window"] if "sliding_window" in table
                  else _default(table["model_type"], "sliding_window"))
        if window is not None and (not isinstance(window, int) or isinstance(window, bool)
                                   or window < 1):
            raise UserError(f"{path}: sliding_window must be a positive int or null, got "
                            f"{quote(window)}")

    known = {FULL} | ({LINEAR} if family.has_states else set())
    known |= set() if window is None else {SLIDING}
    if types is not None and (not isinstance(types, list) or len(types) != layers
                              or any(kind not in known for kind in types)):
        raise UserError(f"{path}: layer_types = {quote(types)} is not supported, expected "
                        f"{layers} of {' and '.join(sorted(known))}")

    by_default = [FULL] * layers
    if family.has_states:
        every = table.get("full_attention_interval") or 4
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise UserError(f"{path}: full_attention_interval must be a positive int, got "
                            f"{quote(every)}")
        by_default = [LINEAR if (layer + 1) % every else FULL for layer in range(layers)]
        if FULL not in (types or by_default):
            raise UserError(f"{path}: layer_types = {quote(types or by_default)} is not supported, "
                            f"expected at least one {FULL}")
    elif window is not None and family.has_window is not None:
        by_default = [SLIDING if family.has_window(table, layer) else FULL
                      for layer in range(layers)]
        if types is not None and not family.types_windows and types != by_default:
            raise UserError(f"{path}: layer_types = {quote(types)} is not supported, the family "
                            f"{table['model_type']} has its sliding_window in all layers")
    return types or by_default, window


def _default(family: str, name: str) -> Any:
    """Returns what transformers takes for an entry that config.json lacks."""
    return getattr(transformers().CONFIG_MAPPING[family], name)


def _activation(family: str) -> str:
    defaults = transformers().CONFIG_MAPPING[family]
    return str(getattr(defaults, "hidden_activation", None) or defaults.hidden_act)


def max_positions(table: dict[str, Any], path: Path) -> int:
    """Returns the longest sequence that a config.json says the model was trained for."""
    table = decoder_table(table, path)
    value = table.get("max_position_embeddings")
    if value is None:
        value = _default(table["model_type"], "max_position_embeddings")
    return int(positive(path, "max_position_embeddings", value))


def assumed_sizes(directory: Path, config: DecoderConfig) -> str:
    """Returns which sizes config.json lacks and what they were taken to be, to end a message."""
    table = decoder_table(read_json(directory / "config.json"), directory / "config.json")
    of_states = {} if config.delta is None else STATE_SIZES
    assumed = ", ".join(f"{name} {getattr(part, ours)}"
                        for part, names in ((config, SIZES), (config.delta, of_states))
                        for name, ours in names.items() if table.get(name) is None)
    return assumed and f"; config.json does not say and is taken to mean {assumed}"


def _check_features(path: Path, table: dict[str, Any], family: Family) -> None:
    """Raises UserError for the first entry that this decoder does not compute."""
    if (name := unsupported_entry(table, family)) is not None:
        raise UserError(f"{path}: {name} = {quote(table[name])} is not supported")
    # A model saved without its head has the name of the base class; old files write LLaMA.
    architecture = family.architecture
    supported = {architecture.lower(), architecture.replace("ForCausalLM", "Model").lower()}
    names = table.get("architectures") or [architecture]
    if not isinstance(names, list) or supported.isdisjoint(str(name).lower() for name in names):
        raise UserError(f"{path}: architectures = {quote(names)} is not supported, expected "
                        f"{architecture}")


def exported_config(table: dict[str, Any], config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """Returns the source's config.json with dtype and, if all layers rotate alike, rotary entries
    in the old and the new spelling."""
    name = table["model_type"]
    said = {"dtype": dtype, "torch_dtype": dtype}
    if name in WRAPPERS:
        part = {"text_config": table["text_config"] | {"dtype": dtype}}
        return table | said | part | {"architectures": [WRAPPERS[name].architecture]}
    family = FAMILIES[name]
    table = table | said | {"architectures": [family.architecture]}
    ropes = [kind.rope for kind in config.kinds if kind.rope is not None]
    if family.rope_by_type or not family.has_older_rope or not ropes:
        return table
    return table | rotary.exported(Path("config.json"), table, ropes[0].theta)
