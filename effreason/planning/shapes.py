"""Finds the shape of the model to plan for: in a table, a directory or the Hub, without weights."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax

from effreason.lm import model
from effreason.lm.architecture import DecoderConfig
from effreason.lm.hf import hub, peft
from effreason.lm.hf.config import decoder_table, parse_config
from effreason.lm.hf.pretrained import SHIPPED_REASONER
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError
from effreason.runtime.files import read_json
from effreason.sampling import capacity

_QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 28, "rms_norm_eps": 1e-6,
          "rope_theta": 10000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False}
_QWEN3 = {"model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
          "rope_theta": 1000000.0, "max_position_embeddings": 40960, "vocab_size": 151936}

_QWEN3_5 = {
    "model_type": "qwen3_5_text", "num_hidden_layers": 32, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 262144,
    "vocab_size": 248320, "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0}}

# The recipes' models, as in their config.json: a plan for them needs neither network nor files.
SHIPPED: dict[str, dict[str, Any]] = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _QWEN2 | {
        "vocab_size": 151936, "hidden_size": 1536, "num_attention_heads": 12,
        "num_key_value_heads": 2, "intermediate_size": 8960},
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _QWEN2 | {
        "vocab_size": 152064, "hidden_size": 3584, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944},
    "Qwen/Qwen3-1.7B": _QWEN3 | {
        "num_hidden_layers": 28, "hidden_size": 2048, "num_attention_heads": 16,
        "intermediate_size": 6144, "tie_word_embeddings": True},
    "Qwen/Qwen3-30B-A3B": _QWEN3 | {
        "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048,
        "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "tie_word_embeddings": False},
    "Qwen/Qwen3-8B": _QWEN3 | {
        "num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32,
        "intermediate_size": 12288, "tie_word_embeddings": False},
    "Qwen/Qwen3.5-4B": _QWEN3_5 | {
        "hidden_size": 2560, "intermediate_size": 9216, "tie_word_embeddings": True},
    "Qwen/Qwen3.5-9B": _QWEN3_5 | {
        "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
}


def open_decoder(config: Config) -> DecoderConfig:
    """Returns model.path's decoder. Raises: UserError, also if it is too small for the run."""
    name, revision, _ = peft.resolve(config.model.path, config.model.revision, config.model.adapter)
    if name in SHIPPED and not Path(name).exists():
        table, path = SHIPPED[name], Path(name) / "config.json"
    else:
        directory = SHIPPED_REASONER if name == "tiny" else _directory(name, revision)
        path = directory / "config.json"
        table = read_json(path)

    most = decoder_table(table, path).get("max_position_embeddings")
    longest = capacity.max_positions(config)
    decoder = parse_config(table, path, dtype=config.model.dtype, remat=config.model.remat,
                           positions=longest)
    if isinstance(most, int) and 0 < most < longest:
        raise UserError("data.max_prompt_tokens + rollout.max_new_tokens (or "
                        f"evaluation.max_new_tokens) must be at most the model's {most} positions, "
                        f"got {longest}")
    return decoder


def _directory(name: str, revision: str | None) -> Path:
    try:
        return hub.find(name, revision, ("config.json",))[0]
    except UserError as error:
        if not hub.is_hub_id(name) or Path(name).exists():
            raise
        raise UserError(f"{error}; a plan needs only its config.json, and has those of "
                        f"{', '.join(SHIPPED)}") from None


def weight_count(decoder: DecoderConfig) -> int:
    """Returns the number of parameters."""
    return _weight_count(dataclasses.replace(decoder, remat="full", attention="xla",
                                             cache_layout="transposed"))


@functools.cache
def _weight_count(decoder: DecoderConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.abstract_params(decoder)))
