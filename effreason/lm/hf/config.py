"""Reads and writes config.json; refuses, by name, what this decoder does not compute."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from effreason.lm.kv_cache import Llama3Scaling
from effreason.lm.model import DecoderConfig
from effreason.runtime.errors import UserError
from effreason.runtime.files import read_json

FAMILIES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Entries that can change what a model computes, with the values that change nothing, besides null.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "is_causal": (True,),
    "partial_rotary_factor": (1,),
    "use_mrope": (False,),
    "rope_interleaved": (False,),
    "no_rope_layers": ([],),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "clip_qkv": (),
    "qk_layernorm": (False,),
    "use_qk_norm": (False,),
    "dual_chunk_attention_config": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "num_experts_per_tok": (0,),
    "moe_intermediate_size": (0,),
    "num_nextn_predict_layers": (0,),
    "quantization_config": (),
    "compression_config": (),
}
# Some entries depend on the family: Qwen2 always has biases, and its window is off unless
# use_sliding_window is on, like Qwen3's.
FAMILY_NEUTRAL: dict[str, dict[str, tuple[Any, ...]]] = {
    "qwen2": {"attention_bias": (False, True)}, "qwen3": {}, "llama": {"sliding_window": ()},
}
# The entries that give the weights their shapes, and our names for them.
SIZES = {"vocab_size": "vocabulary", "hidden_size": "width", "num_hidden_layers": "layers",
         "num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "head_dim": "head_dim",
         "intermediate_size": "mlp_width"}
LLAMA3_NAMES = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


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
                 remat: str = "full") -> DecoderConfig:
    """Returns the decoder that a config.json describes, in its old or its new spelling.

    A missing entry has the value that transformers gives it.

    Args:
        table: The content of the file.
        path: The file, for error messages.

    Raises:
        UserError: The family is unknown, or uses a feature that this decoder lacks."""
    family = table.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{path}: model_type {_quote(family)} is not supported, expected one of "
                        f"{', '.join(FAMILIES)}")
    _check_features(path, table, family)

    def entry(name: str, kind: type[int] | type[float] = int, default: Any = None) -> Any:
        value = table.get(name)
        if value is None:
            value = _default(family, name) if default is None else default
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise UserError(f"{path}: {name} must be a positive {kind.__name__}, got "
                            f"{_quote(value)}")
        return value

    heads, width = entry("num_attention_heads"), entry("hidden_size")
    kv_heads = entry("num_key_value_heads", default=heads)
    head_dim = entry("head_dim", default=_default(family, "head_dim") if family == "qwen3"
                     else max(width // heads, 1))
    tied = table.get("tie_word_embeddings")
    if heads % kv_heads:
        raise UserError(f"{path}: num_key_value_heads must divide num_attention_heads, {heads}, "
                        f"got {kv_heads}")
    if family != "qwen3" and table.get("head_dim") is None and width % heads:
        raise UserError(f"{path}: num_attention_heads must divide hidden_size, {width}, got "
                        f"{heads}")
    if head_dim % 2:
        raise UserError(f"{path}: head_dim must be even, got {head_dim}")
    if tied not in (None, True, False):
        raise UserError(f"{path}: tie_word_embeddings must be true or false, got {_quote(tied)}")

    theta, scaling = _rope_entries(path, table, family)
    return DecoderConfig(
        vocabulary=entry("vocab_size"), width=width, layers=entry("num_hidden_layers"), heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, mlp_width=entry("intermediate_size"),
        norm_eps=entry("rms_norm_eps", float), rope_theta=theta, rope_scaling=scaling,
        tied=bool(tied), qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
        dtype=jnp.dtype(dtype), remat=remat)


def _default(family: str, name: str) -> Any:
    """Returns what transformers takes for an entry that config.json lacks."""
    return getattr(transformers().CONFIG_MAPPING[family], name)


def max_positions(table: dict[str, Any], path: Path) -> int:
    """Returns the longest sequence that a config.json says the model was trained for."""
    value = table.get("max_position_embeddings")
    if value is None:
        value = _default(table["model_type"], "max_position_embeddings")
    return int(_positive(path, "max_position_embeddings", value))


def assumed_sizes(directory: Path, config: DecoderConfig) -> str:
    """Returns which sizes config.json lacks and what they were taken to be, to end a message."""
    table = read_json(directory / "config.json")
    assumed = ", ".join(f"{name} {getattr(config, ours)}" for name, ours in SIZES.items()
                        if table.get(name) is None)
    return assumed and f"; config.json does not say and is taken to mean {assumed}"


def _check_features(path: Path, table: dict[str, Any], family: str) -> None:
    """Raises UserError for the first entry that this decoder does not compute."""
    for name, neutral in (NEUTRAL | FAMILY_NEUTRAL[family]).items():
        if table.get(name) is not None and table[name] not in neutral:
            raise UserError(f"{path}: {name} = {_quote(table[name])} is not supported")
    kinds = table.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{path}: layer_types = {_quote(kinds)} is not supported, expected only "
                        "full_attention")
    # A model saved without its head has the name of the base class; old files write LLaMA.
    supported = {FAMILIES[family].lower(), FAMILIES[family].replace("ForCausalLM", "Model").lower()}
    names = table.get("architectures") or [FAMILIES[family]]
    if not isinstance(names, list) or supported.isdisjoint(str(name).lower() for name in names):
        raise UserError(f"{path}: architectures = {_quote(names)} is not supported, expected "
                        f"{FAMILIES[family]}")


def _rope_entries(path: Path, table: dict[str, Any],
                  family: str) -> tuple[float, Llama3Scaling | None]:
    """Returns theta and the scaling.

    transformers 5 writes rope_parameters, with theta; before, rope_theta and rope_scaling."""
    newer, older = (table.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    for name, rope in (("rope_parameters", newer), ("rope_scaling", older)):
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise UserError(f"{path}: {name} = {_quote(rope)} is not supported, expected one table "
                            "for all layers")
    kinds = [_rope_kind(path, rope) for rope in (newer, older) if rope] or ["default"]
    if kinds[0] != kinds[-1]:
        raise UserError(f"{path}: rope_parameters say {kinds[0]!r}, rope_scaling says "
                        f"{kinds[1]!r}")
    rope, kind = newer or older, kinds[0]
    if (share := rope.get("partial_rotary_factor")) not in (None, 1):
        raise UserError(f"{path}: partial_rotary_factor = {_quote(share)} is not supported")

    thetas = [_positive(path, "rope_theta", theta)
              for theta in (rope.get("rope_theta"), table.get("rope_theta")) if theta is not None]
    theta = thetas[0] if thetas else float(_default(family, "default_theta"))
    if thetas and theta != thetas[-1]:
        raise UserError(f"{path}: rope_parameters.rope_theta, {theta:g}, and rope_theta, "
                        f"{thetas[1]:g}, differ")

    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{path}: rope type {kind!r} is not supported, expected default or llama3")
    missing = [name for name in LLAMA3_NAMES if rope.get(name) is None]
    if missing:
        raise UserError(f"{path}: llama3 rope parameters lack {missing[0]!r}")
    factor, low, high, positions = (_positive(path, f"llama3 {name}", rope[name])
                                    for name in LLAMA3_NAMES)
    return theta, Llama3Scaling(factor=factor, low_frequency_factor=low, high_frequency_factor=high,
                                original_positions=int(positions))


def _rope_kind(path: Path, rope: dict[str, Any]) -> Any:
    """Returns the kind of a table, under its new or its old name; null says nothing."""
    kinds = [rope[name] for name in ("rope_type", "type") if rope.get(name) is not None]
    if kinds and kinds[0] != kinds[-1]:
        raise UserError(f"{path}: rope_type is {kinds[0]!r}, the older type is {kinds[1]!r}")
    changes_nothing = not kinds or (kinds[0] == "linear" and rope.get("factor") == 1)
    return "default" if changes_nothing else kinds[0]


def _positive(path: Path, name: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise UserError(f"{path}: {name} must be a positive number, got {_quote(value)}")
    return float(value)


def _quote(value: Any) -> str:
    """Returns a value as JSON, shortened to 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def exported_config(table: dict[str, Any], config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """Returns the source's config.json, with dtype and rope in the old and the new spelling."""
    table = table | {"dtype": dtype, "torch_dtype": dtype,
                     "architectures": [FAMILIES[table["model_type"]]]}
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        values = dataclasses.astuple(config.rope_scaling)
        rope = {"rope_type": "llama3"} | dict(zip(LLAMA3_NAMES, values, strict=True))
        table["rope_scaling"] = rope
    theta = {"rope_theta": config.rope_theta}
    return table | theta | {"rope_parameters": rope | theta}
