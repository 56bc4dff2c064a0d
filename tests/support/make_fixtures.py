"""Builds the small random checkpoints of tests/fixtures and what `transformers` computes from them.

python tests/support/make_fixtures.py            (needs the extra `parity`: torch and transformers)

Each directory holds config.json, the weights and reference.npz: int32 tokens[B, N] and float32
logits[B, N, V]. Between them they cover both spellings of config.json, tied and untied heads, a
single file and shards, biases, q/k norms, windows, norms before and after, fused tensors, and the
rotary scalings, Llama 3's with positions beyond the original context.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

FIXTURES = Path(__file__).parents[1] / "fixtures"
ROWS, POSITIONS = 2, 40
SHAPE: dict[str, Any] = dict(vocab_size=72, hidden_size=32, intermediate_size=48,
                             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                             max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
                             dtype="float32",)
LLAMA3: dict[str, Any] = dict(rope_type="llama3", rope_theta=500_000.0, factor=8.0,
                              low_freq_factor=0.25, high_freq_factor=2.0,
                              original_max_position_embeddings=16,)


def qwen2_tied() -> transformers.PretrainedConfig:
    return transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True,
                                    rope_parameters=rope(1_000_000.0))


def qwen2_untied() -> transformers.PretrainedConfig:
    shape = SHAPE | dict(rms_norm_eps=1e-5)
    return transformers.Qwen2Config(**shape, tie_word_embeddings=False,
                                    rope_parameters=rope(10_000.0))


def llama() -> transformers.PretrainedConfig:
    shape = SHAPE | dict(num_key_value_heads=4)             # no grouping
    return transformers.LlamaConfig(**shape, tie_word_embeddings=False,
                                    rope_parameters=rope(10_000.0))


def llama3() -> transformers.PretrainedConfig:
    # Heads of 16: the first rotary plane is kept, the second is in between, the others are
    # stretched.
    shape = SHAPE | dict(num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5)
    return transformers.LlamaConfig(**shape, tie_word_embeddings=False,
                                    rope_parameters=dict(LLAMA3))


def qwen3() -> transformers.PretrainedConfig:
    shape = SHAPE | dict(num_hidden_layers=3, head_dim=16)  # 4 heads of 16 on a width of 32
    return transformers.Qwen3Config(**shape, tie_word_embeddings=True,
                                    rope_parameters=rope(1_000_000.0))


def mistral() -> transformers.PretrainedConfig:
    shape = SHAPE | dict(num_hidden_layers=3, head_dim=16)
    return transformers.MistralConfig(**shape, sliding_window=7, rope_parameters=rope(10_000.0))


def ministral() -> transformers.PretrainedConfig:
    shape = SHAPE | dict(num_hidden_layers=3, head_dim=8)
    return transformers.MinistralConfig(
        **shape, sliding_window=7, rope_parameters=dict(rope_type="linear", rope_theta=10_000.0,
                                                        factor=2.0),
        layer_types=["sliding_attention", "full_attention", "sliding_attention"])


def smollm3() -> transformers.PretrainedConfig:
    # The last layer of three knows no positions, and has a window; biases wherever there can be.
    shape = SHAPE | dict(num_hidden_layers=4, attention_bias=True, mlp_bias=True)
    return transformers.SmolLM3Config(
        **shape, tie_word_embeddings=True, no_rope_layer_interval=3, use_sliding_window=True,
        sliding_window=9, pad_token_id=0, rope_parameters=rope(2_000_000.0))


def olmo2() -> transformers.PretrainedConfig:
    return transformers.Olmo2Config(**SHAPE, rope_parameters=rope(500_000.0))


def olmo3() -> transformers.PretrainedConfig:
    # Three layers of four have a window; those without one rotate with stretched angles.
    shape = SHAPE | dict(num_hidden_layers=5, attention_bias=True)
    return transformers.Olmo3Config(**shape, sliding_window=7, rope_parameters={
        "sliding_attention": rope(500_000.0),
        "full_attention": dict(rope_type="yarn", rope_theta=500_000.0, factor=4.0,
                               original_max_position_embeddings=16, attention_factor=1.1)})


def phi3() -> transformers.PretrainedConfig:
    # Heads of 16, of which 12 entries are rotated, in 6 planes.
    shape = SHAPE | dict(num_attention_heads=2, num_key_value_heads=1, pad_token_id=0,
                         original_max_position_embeddings=64)
    return transformers.Phi3Config(**shape, tie_word_embeddings=True, rope_parameters=dict(
        rope_type="longrope", rope_theta=10_000.0, partial_rotary_factor=0.75,
        short_factor=[1.0, 1.1, 1.2, 1.4, 1.8, 2.6], long_factor=[1.0, 2.0, 4.0, 6.0, 8.0, 9.0]))


def qwen3_moe() -> transformers.PretrainedConfig:
    shape = SHAPE | dict(head_dim=16, num_experts=6, num_experts_per_tok=2,
                         moe_intermediate_size=24)
    return transformers.Qwen3MoeConfig(**shape, norm_topk_prob=True, tie_word_embeddings=False,
                                       rope_parameters=rope(1_000_000.0))


def gemma3() -> transformers.PretrainedConfig:
    # Five layers of six have a window, and another theta than those without one.
    shape = SHAPE | dict(num_hidden_layers=7, head_dim=16)
    return transformers.Gemma3TextConfig(
        **shape, sliding_window=7, query_pre_attn_scalar=24, rope_parameters={
            "sliding_attention": rope(10_000.0),
            "full_attention": dict(rope_type="linear", rope_theta=1_000_000.0, factor=8.0)})


def qwen3_5() -> transformers.PretrainedConfig:
    # Two layers with states, one that attends; the last layer keeps a state. 12 of 16 entries of a
    # head are rotated.
    shape = SHAPE | dict(num_hidden_layers=4, head_dim=16)
    return transformers.Qwen3_5TextConfig(
        **shape, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=12, linear_conv_kernel_dim=4, tie_word_embeddings=False,
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        rope_parameters=rope(10_000_000.0) | dict(
            partial_rotary_factor=0.75, mrope_interleaved=True, mrope_section=[2, 2, 2]))


CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "qwen2_tied": qwen2_tied, "qwen2_untied": qwen2_untied, "llama": llama, "llama3": llama3,
    "qwen3": qwen3, "mistral": mistral, "ministral": ministral, "smollm3": smollm3,
    "olmo2": olmo2, "olmo3": olmo3, "phi3": phi3, "gemma3": gemma3, "qwen3_moe": qwen3_moe,
    "qwen3_5": qwen3_5}
OLDER_SPELLING = {"qwen2_tied", "llama3", "phi3", "gemma3"}     # as most published ones
SHARDED = {"qwen2_untied"}


def rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def build(config: transformers.PretrainedConfig, seed: int) -> Any:
    """A model none of whose weights is 0 or 1: a bias, norm or scale that is left out shows in the
    logits."""
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                is_offset = config.model_type in ("gemma3_text", "qwen3_5_text")
                offset = 1.0 if is_offset and "linear_attn" not in name else 0.0    # added to it
                parameter.copy_(1.0 - offset + 0.3 * noise)
            elif name.endswith(("bias", "A_log")):
                parameter.copy_(0.5 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            # twice the usual scale: sharp attention, visible mistakes
            else:
                parameter.copy_(2.0 * noise * parameter.shape[-1] ** -0.5)
    return model


def reference(model: Any, seed: int, rows: int = ROWS,
              positions: int = POSITIONS) -> dict[str, np.ndarray]:
    """Random tokens int32[B, N] and the model's logits for them, float32[B, N, V]."""
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, (rows, positions))
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens)).logits.numpy()
    return {"tokens": tokens.astype(np.int32), "logits": logits.astype(np.float32)}


def respell(directory: Path) -> None:
    """Rewrites config.json as transformers 4 did: rope_theta, rope_scaling, torch_dtype, no
    head_dim if implied."""
    path = directory / "config.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    if table["model_type"] == "qwen3_5_text":       # younger than transformers 5
        return
    parameters = table.pop("rope_parameters")
    if "full_attention" in parameters:
        if table["model_type"] == "gemma3_text":
            table["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    table["rope_theta"] = parameters.pop("rope_theta")
    table["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
    table["torch_dtype"] = table.pop("dtype")
    if table["model_type"] != "ministral":      # of the others it says what is the default
        table.pop("layer_types", None)
    implied = table["hidden_size"] // table["num_attention_heads"]
    if table.get("head_dim") == implied and table["model_type"] != "ministral":
        del table["head_dim"]
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save(model: Any, directory: Path, *, older_spelling: bool = False,
         sharded: bool = False) -> None:
    """Writes a Hugging Face directory: config.json and safetensors, in one file or in shards with
    an index."""
    model.save_pretrained(directory, max_shard_size="50KB" if sharded else "5GB")
    (directory / "generation_config.json").unlink(missing_ok=True)
    if older_spelling:
        respell(directory)


def main() -> None:
    """Builds the fixtures that are named as arguments, or all of them."""
    for seed, (name, config) in enumerate(CONFIGS.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        directory = FIXTURES / name
        shutil.rmtree(directory, ignore_errors=True)
        model = build(config(), seed)
        save(model, directory, older_spelling=name in OLDER_SPELLING, sharded=name in SHARDED)
        arrays = reference(model, seed)
        np.savez(directory / "reference.npz", tokens=arrays["tokens"], logits=arrays["logits"])
        again = transformers.AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager").eval()
        # nothing was lost on disk
        np.testing.assert_array_equal(reference(again, seed)["logits"], arrays["logits"])
        print(f"{name}: {sum(file.stat().st_size for file in directory.iterdir()) / 1000:.0f} kB, "
              f"logits std {arrays['logits'].std():.2f}")


if __name__ == "__main__":
    main()
