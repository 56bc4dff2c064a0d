"""The model families that the decoder computes, and what of config.json each of them reads.

A family is data: fields of DecoderConfig that all its models have, and the entries of config.json
that only some families read. Whatever else could change what a model computes is refused by name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Table = Mapping[str, Any]       # the content of a config.json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What the models of one `model_type` have in common."""

    architecture: str               # the class in transformers
    facts: Table = dataclasses.field(default_factory=dict)      # fields of DecoderConfig
    reads: tuple[str, ...] = ()     # entries of OTHER_ENTRIES that mean something here
    # Entries that mean nothing here, but would elsewhere, with the values they may have.
    ignores: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    # Whether a layer has a window if layer_types does not say it; None: no layer ever has one.
    has_window: Callable[[Table, int], bool] | None = None
    window_switch: str | None = None    # the entry that must be true for a window
    types_windows: bool = True      # layer_types says which layers have a window
    has_states: bool = False        # three layers of four keep a state, or what layer_types says
    rope_by_type: bool = False      # layers with and without a window rotate differently
    has_older_rope: bool = True     # its configs once had rope_theta and rope_scaling
    # What transformers takes for entries that config.json lacks.
    head_dim: int | None = None     # None: hidden_size / heads
    rotated: float = 1.0            # share of a head's entries
    theta: float = 10_000.0
    theta_of_windows: float | None = None   # of layers with a window; None: theta
    tied: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A model that also sees, in which one of a family reads and writes.

    It is trained on text alone, and what it sees with stays as it is."""

    family: str                     # of the table text_config in its config.json
    architecture: str
    copied_prefixes: tuple[str, ...]    # of the names of the tensors with which it sees


def _last_layers(table: Table, layer: int) -> bool:
    first = table.get("max_window_layers")
    return layer >= (28 if first is None else first)


def _all_layers(table: Table, layer: int) -> bool:
    return True


def _three_of_four(table: Table, layer: int) -> bool:
    return (layer + 1) % 4 != 0


def _all_but_a_few(table: Table, layer: int) -> bool:
    return (layer + 1) % (table.get("sliding_window_pattern") or 6) != 0


def rotates(table: Table, layer: int) -> bool:
    """Whether a layer knows positions, in a family that reads `no_rope_layers`."""
    if listed := table.get("no_rope_layers"):
        return bool(listed[layer])
    return (layer + 1) % (table.get("no_rope_layer_interval") or 4) != 0


def _layers_without_positions(table: Table, layer: int) -> bool:
    return not rotates(table, layer)


# Entries of layers that keep a state, and what they are called in `DeltaShape`.
STATE_SIZES = {"linear_num_key_heads": "key_heads", "linear_num_value_heads": "value_heads",
               "linear_key_head_dim": "key_dim", "linear_value_head_dim": "value_dim",
               "linear_conv_kernel_dim": "taps"}
EXPERTS = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size")
_OLMO = {"qk_norm": "all_heads", "norms_input": False, "norms_output": True}

FAMILIES = {
    "qwen2": Family(
        architecture="Qwen2ForCausalLM", facts={"qkv_bias": True},
        ignores={"attention_bias": (False, True)}, has_window=_last_layers,
        window_switch="use_sliding_window"),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM", facts={"qk_norm": "head"}, reads=("attention_bias",),
        has_window=_last_layers, window_switch="use_sliding_window", head_dim=128),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM", facts={"qk_norm": "head"},
        reads=("attention_bias", *EXPERTS), has_window=_last_layers,
        window_switch="use_sliding_window"),
    "llama": Family(
        architecture="LlamaForCausalLM", reads=("attention_bias", "mlp_bias"),
        ignores={"sliding_window": ()}),
    "mistral": Family(
        architecture="MistralForCausalLM", has_window=_all_layers, types_windows=False),
    "ministral": Family(architecture="MinistralForCausalLM", has_window=_all_layers),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM", reads=("attention_bias", "mlp_bias", "no_rope_layers"),
        has_window=_layers_without_positions, window_switch="use_sliding_window",
        theta=2_000_000.0, tied=True),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM", facts=_OLMO, reads=("attention_bias",),
        ignores={"sliding_window": ()}),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM", facts=_OLMO, reads=("attention_bias",),
        has_window=_three_of_four, rope_by_type=True, theta=500_000.0),
    "phi3": Family(
        architecture="Phi3ForCausalLM", facts={"fused": True}, reads=("partial_rotary_factor",),
        has_window=_all_layers, types_windows=False),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM", reads=("attention_bias", "query_pre_attn_scalar"),
        facts={"qk_norm": "head", "norms_output": True, "norm_offset": 1.0},
        has_window=_all_but_a_few, rope_by_type=True, head_dim=256, theta=1_000_000.0,
        theta_of_windows=10_000.0, tied=True),
    "qwen3_5_text": Family(
        architecture="Qwen3_5ForCausalLM",
        facts={"qk_norm": "head", "norm_offset": 1.0, "gates_attention": True,
               "copied_prefixes": ("mtp.",)},
        reads=("attention_bias", "partial_rotary_factor", *STATE_SIZES),
        ignores={"attn_output_gate": (True,)}, has_states=True, has_older_rope=False,
        head_dim=256, rotated=0.25),
}

WRAPPERS = {
    "gemma3": Wrapper(
        family="gemma3_text", architecture="Gemma3ForConditionalGeneration",
        copied_prefixes=("model.vision_tower.", "model.multi_modal_projector.", "vision_tower.",
                         "multi_modal_projector.")),
    "qwen3_5": Wrapper(
        family="qwen3_5_text", architecture="Qwen3_5ForConditionalGeneration",
        copied_prefixes=("model.visual.",)),
}

# Entries that can change what a model computes, with the values that change nothing, besides null.
OTHER_ENTRIES: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "use_sliding_window": (False,),
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
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "num_experts_per_tok": (0,),
    "moe_intermediate_size": (0,),
    "num_nextn_predict_layers": (0,),
    "attn_output_gate": (False,),
    "linear_num_key_heads": (0,),
    "linear_num_value_heads": (0,),
    "linear_key_head_dim": (0,),
    "linear_value_head_dim": (0,),
    "linear_conv_kernel_dim": (0,),
    "quantization_config": (),
    "compression_config": (),
}


def unsupported_entry(table: Table, family: Family) -> str | None:
    """Returns the first entry that the decoder does not compute; None if there is none."""
    read = (*family.reads, family.window_switch)
    neutral = {name: values for name, values in OTHER_ENTRIES.items() if name not in read}
    return next((name for name, values in (neutral | dict(family.ignores)).items()
                 if table.get(name) is not None and table[name] not in values), None)
