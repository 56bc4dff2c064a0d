"""Small random decoders and meshes for the tests: shapes of all families, weights that give uneven
logits."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import AxisType

from effreason.lm import model
from effreason.lm.architecture import DecoderConfig, LayerKind, alike
from effreason.lm.delta import DeltaShape
from effreason.lm.rope import Linear, Llama3, Rope
from effreason.rl import packing
from effreason.runtime import sharding
from effreason.types import Rows

VOCABULARY = 24

(PLAIN,) = alike(theta=10_000.0)
QWEN2 = DecoderConfig(vocabulary=VOCABULARY, width=16, layers=2, heads=4, kv_heads=2,
                            head_dim=4, mlp_width=24, norm_eps=1e-6, kinds=(PLAIN,), qkv_bias=True)
SCALING = Llama3(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0,
                 original_positions=16)
LLAMA = dataclasses.replace(QWEN2, qkv_bias=False, kv_heads=4,
                            kinds=(LayerKind(rope=Rope(theta=500_000.0, scaling=SCALING)),))
QWEN3 = dataclasses.replace(QWEN2, qkv_bias=False, qk_norm="head", head_dim=8, tied=True)
MISTRAL = dataclasses.replace(LLAMA, kinds=(dataclasses.replace(PLAIN, window=5),))
SMOLLM3 = dataclasses.replace(LLAMA, layers=3, kinds=(PLAIN, LayerKind(rope=None)), mlp_bias=True,
                              qkv_bias=True, output_bias=True)
OLMO3 = dataclasses.replace(LLAMA, layers=3, qk_norm="all_heads", norms_input=False,
                            norms_output=True, kinds=(dataclasses.replace(PLAIN, window=5), PLAIN))
PHI3 = dataclasses.replace(LLAMA, head_dim=8, fused=True,
                           kinds=(LayerKind(rope=Rope(theta=10_000.0, rotated=0.75)),))
GEMMA3 = dataclasses.replace(
    QWEN3, layers=5, activation="gelu_tanh", norms_output=True, norm_offset=1.0, query_scale=0.8,
    embedding_scale=4.0, kinds=(LayerKind(rope=Rope(theta=1_000.0), window=5),) * 2 + (
        LayerKind(rope=Rope(theta=10_000.0, scaling=Linear(factor=8.0))),))
QWEN3_MOE = dataclasses.replace(QWEN3, tied=False, mlp_width=12, experts=6, experts_per_token=2,
                                normalizes_experts=True)
DELTA = DeltaShape(key_heads=2, value_heads=4, key_dim=6, value_dim=5, taps=4)
QWEN3_5 = dataclasses.replace(
    QWEN3, layers=3, tied=False, norm_offset=1.0, gates_attention=True, kinds=(
        LayerKind(delta=DELTA), LayerKind(rope=Rope(theta=10_000.0, rotated=0.5))))
FAMILIES = {"qwen2": QWEN2, "llama": LLAMA, "qwen3": QWEN3, "mistral": MISTRAL,
            "smollm3": SMOLLM3, "olmo3": OLMO3, "phi3": PHI3, "gemma3": GEMMA3,
            "qwen3_moe": QWEN3_MOE, "qwen3_5": QWEN3_5}


@functools.cache
def weights(config, seed=0):
    """None of them 0 or 1, so that one that is left out shows; on the host, so that every mesh can
    take a copy."""
    generator = np.random.default_rng(seed)

    def leaf(path, shape):
        name, noise = path[-1].key, generator.standard_normal(shape.shape, dtype=np.float32)
        if "norm" in name:
            return np.float32(1 - config.norm_offset) + np.float32(0.3) * noise
        return noise * np.float32(0.3 if name in ("embedding", "head") and not config.tied else 0.5)

    return jax.tree_util.tree_map_with_path(leaf, model.abstract_params(config))


def mesh(data=1, fsdp=1, tensor=1, context=1):
    """A mesh over the first devices; `sharding.make_mesh` takes all of them."""
    shape = (data, fsdp, tensor, context)
    return jax.make_mesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape),
                         devices=jax.devices()[: data * fsdp * tensor * context])


def place(config, params, target):
    """Weights onto a mesh."""
    return jax.device_put(params, sharding.tree_sharding(target, model.logical_axes(config)))


def rows_of(sequences):
    """Rows [R, N] of one sequence each, to score outside of training."""
    width = max(map(len, sequences))
    table = jax.tree.map(lambda *rows: np.stack(rows),
                         *(packing.pack_row([tokens], width) for tokens in sequences))
    return Rows(**table, response_index=np.zeros_like(table["tokens"]))
