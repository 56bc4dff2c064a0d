"""Reads and writes config.json; refuses, by name, what this decoder does not compute."""

import dataclasses
import json
import math
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
    "pretraining_tp": (1,),
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
LLAMA3_NAMES = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(directory: Path, *, dtype: str = "float32", remat: str = "full") -> DecoderConfig:
    """Returns the decoder that a directory's config.json describes."""
    path = directory / "config.json"
    return parse_config(read_json(path), path, dtype=dtype, remat=remat)


def parse_config(table: dict[str, Any], path: Path, *, dtype: str = "float32",
                 remat: str = "full") -> DecoderConfig:
    """Returns the decoder that a config.json describes, in its old or its new spelling.

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
        value = default if table.get(name) is None else table[name]
        if value is None:
            raise UserError(f"{path}: has no entry {name!r}")
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise UserError(f"{path}: {name} must be a positive {kind.__name__}, got "
                            f"{_quote(value)}")
        return value

    heads, width = entry("num_attention_heads"), entry("hidden_size")
    kv_heads = entry("num_key_value_heads", default=heads)
    head_dim = entry("head_dim", default=max(width // heads, 1))
    tied = table.get("tie_word_embeddings")
    if heads % kv_heads:
        raise UserError(f"{path}: num_key_value_heads must divide num_attention_heads, {heads}, "
                        f"got {kv_heads}")
    if table.get("head_dim") is None and width % heads:
        raise UserError(f"{path}: num_attention_heads must divide hidden_size, {width}, got "
                        f"{heads}")
    if head_dim % 2:
        raise UserError(f"{path}: head_dim must be even, got {head_dim}")
    if tied not in (None, True, False):
        raise UserError(f"{path}: tie_word_embeddings must be true or false, got {_quote(tied)}")

    theta, scaling = _rope_entries(path, table)
    return DecoderConfig(
        vocabulary=entry("vocab_size"), width=width, layers=entry("num_hidden_layers"), heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, mlp_width=entry("intermediate_size"),
        norm_eps=entry("rms_norm_eps", float), rope_theta=theta, rope_scaling=scaling,
        tied=bool(tied), qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
        dtype=jnp.dtype(dtype), remat=remat)


def _check_features(path: Path, table: dict[str, Any], family: str) -> None:
    """Raises UserError for the first entry that this decoder does not compute."""
    for name, neutral in (NEUTRAL | FAMILY_NEUTRAL[family]).items():
        if table.get(name) is not None and table[name] not in neutral:
            raise UserError(f"{path}: {name} = {_quote(table[name])} is not supported")
    kinds = table.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{path}: layer_types = {_quote(kinds)} is not supported, expected only "
                        "full_attention")
    names = table.get("architectures") or [FAMILIES[family]]
    if not isinstance(names, list) or FAMILIES[family] not in names:
        raise UserError(f"{path}: architectures = {_quote(names)} is not supported, expected "
                        f"{FAMILIES[family]}")


def _rope_entries(path: Path, table: dict[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Returns theta and the scaling.

    transformers 5 writes rope_parameters, with theta; before, rope_theta and rope_scaling."""
    newer, older = (table.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    for name, rope in (("rope_parameters", newer), ("rope_scaling", older)):
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise UserError(f"{path}: {name} = {_quote(rope)} is not supported, expected one table "
                            "for all layers")
    if newer and older and _rope_kind(newer) != _rope_kind(older):
        raise UserError(f"{path}: rope_parameters say {_rope_kind(newer)!r}, rope_scaling says "
                        f"{_rope_kind(older)!r}")
    rope = newer or older
    if (share := rope.get("partial_rotary_factor")) not in (None, 1):
        raise UserError(f"{path}: partial_rotary_factor = {_quote(share)} is not supported")

    thetas = [_positive(path, "rope_theta", theta)
              for theta in (rope.get("rope_theta"), table.get("rope_theta")) if theta is not None]
    if not thetas:
        raise UserError(f"{path}: has neither rope_parameters.rope_theta nor rope_theta")
    if thetas[0] != thetas[-1]:
        raise UserError(f"{path}: rope_parameters.rope_theta, {thetas[0]:g}, and rope_theta, "
                        f"{thetas[1]:g}, differ")

    theta, kind = thetas[0], _rope_kind(rope)
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


def _rope_kind(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


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
