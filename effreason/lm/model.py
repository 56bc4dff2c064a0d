"""The decoder: Qwen2, Llama and Qwen3 in one Linen module; the only file that imports flax.

Two paths through the same block. Training scans over layers stacked on a leading axis, rematerialising each block.
Sampling goes through an unrolled list of layers, each with its own cache, so that every cache is updated in place.
N positions, B rows, D width, V vocabulary, L layers, H query heads, K key/value heads, h head width, S cache slots.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effreason.lm import attention as causal
from effreason.lm import kv_cache
from effreason.runtime.sharding import constrain

Params = dict[str, Any]             # {"embedding", "layers": {name: [L, ...]}, "final_norm", and "head" if untied}
Cache = list[kv_cache.LayerCache]


# What a block keeps for the backward pass: nothing but its input, its attention too, or everything.
REMAT: dict[str, Any] = {"full": jax.checkpoint_policies.nothing_saveable,
                         "attention": jax.checkpoint_policies.save_only_these_names(causal.SAVED), "none": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder, and the dtype it computes in."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float
    rope_theta: float
    rope_scaling: kv_cache.Llama3Scaling | None = None
    tied: bool = False              # the embedding is also the output head
    qkv_bias: bool = False          # Qwen2
    qk_norm: bool = False           # Qwen3
    dtype: Any = jnp.float32        # of activations; weights are kept in float32, logits are always float32
    cache_layout: str = "transposed"    # one of attention.CACHE_LAYOUTS
    attention: str = "xla"          # one of causal.IMPLEMENTATIONS, of whole sequences in training
    remat: str = "full"             # one of REMAT: what a block keeps for the backward pass


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, the division in float32. Source: arXiv 1910.07467."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


class Block(nn.Module):
    """Attention and a SwiGLU MLP, each behind a norm and beside a residual."""

    config: DecoderConfig

    def setup(self) -> None:
        c, normal, ones, zeros = self.config, nn.initializers.normal(0.02), nn.initializers.ones, nn.initializers.zeros

        def weight(name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Any = normal) -> Any:
            return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)

        self.attention_norm = weight("attention_norm", (c.width,), ("norm",), ones)
        self.query = weight("query", (c.width, c.heads, c.head_dim), ("embed", "heads", "head_dim"))
        self.key = weight("key", (c.width, c.kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"))
        self.value = weight("value", (c.width, c.kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"))
        if c.qkv_bias:
            self.query_bias = weight("query_bias", (c.heads, c.head_dim), ("heads", "head_dim"), zeros)
            self.key_bias = weight("key_bias", (c.kv_heads, c.head_dim), ("kv_heads", "head_dim"), zeros)
            self.value_bias = weight("value_bias", (c.kv_heads, c.head_dim), ("kv_heads", "head_dim"), zeros)
        if c.qk_norm:
            self.query_norm = weight("query_norm", (c.head_dim,), ("norm",), ones)
            self.key_norm = weight("key_norm", (c.head_dim,), ("norm",), ones)
        self.output = weight("output", (c.heads, c.head_dim, c.width), ("heads", "head_dim", "embed"))
        self.mlp_norm = weight("mlp_norm", (c.width,), ("norm",), ones)
        self.gate = weight("gate", (c.width, c.mlp_width), ("embed", "mlp"))
        self.up = weight("up", (c.width, c.mlp_width), ("embed", "mlp"))
        self.down = weight("down", (c.mlp_width, c.width), ("mlp", "embed"))

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array],
                 segments: jax.Array | None) -> tuple[jax.Array, None]:
        """x [B, N, D] -> [B, N, D], causal within each segment; the None is what nn.scan stacks: nothing."""
        query, key, value = self.project(x, rope)
        mixed = causal.causal_attention(query, key, value, segments, implementation=self.config.attention)
        x = self.finish(x, mixed)
        return constrain(x, "batch", "sequence", "width"), None

    def extend(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], positions: jax.Array,
               cache: kv_cache.LayerCache) -> tuple[jax.Array, kv_cache.LayerCache]:
        """x [B, T, D] at positions int32[B, T], behind what the cache holds; returns x and the cache with T more."""
        query, key, value = self.project(x, rope)
        layout = self.config.cache_layout
        cache = kv_cache.write_cache(cache, key, value, positions[:, 0], layout)
        return self.finish(x, kv_cache.cached_attention(query, cache, positions, layout)), cache

    def project(self, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        c, dtype = self.config, x.dtype
        normed = rms_norm(x, self.attention_norm, c.norm_eps)
        query = jnp.einsum("bnd,dhk->bnhk", normed, self.query.astype(dtype))
        key = jnp.einsum("bnd,dhk->bnhk", normed, self.key.astype(dtype))
        value = jnp.einsum("bnd,dhk->bnhk", normed, self.value.astype(dtype))
        if c.qkv_bias:
            query, key, value = (product + bias.astype(dtype)[None, None] for product, bias in
                                 ((query, self.query_bias), (key, self.key_bias), (value, self.value_bias)))
        if c.qk_norm:
            query = rms_norm(query, self.query_norm, c.norm_eps)
            key = rms_norm(key, self.key_norm, c.norm_eps)
        return kv_cache.rotate(query, *rope), kv_cache.rotate(key, *rope), value

    def finish(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        dtype = x.dtype
        x = x + jnp.einsum("bnhk,hkd->bnd", mixed, self.output.astype(dtype))
        normed = rms_norm(x, self.mlp_norm, self.config.norm_eps)
        hidden = jax.nn.silu(normed @ self.gate.astype(dtype)) * (normed @ self.up.astype(dtype))
        return x + hidden @ self.down.astype(dtype)


class Decoder(nn.Module):
    """Tokens, positions and segments int32[B, N] to the final hidden states [B, N, D]; layers are stacked."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, segments: jax.Array | None) -> jax.Array:
        c, normal = self.config, nn.initializers.normal(0.02)
        table = nn.with_logical_partitioning(normal, ("vocab", "embed"))
        embedding: Any = self.param("embedding", table, (c.vocabulary, c.width), jnp.float32)
        if not c.tied:
            self.param("head", table, (c.vocabulary, c.width), jnp.float32)   # read by `logits` and the scorer
        x = constrain(embedding.astype(c.dtype)[tokens], "batch", "sequence", "width")
        policy = REMAT[c.remat]
        block = Block if policy is None else nn.remat(Block, prevent_cse=False, policy=policy)
        # A loop would copy all that is kept for the backward pass into stacks, and out of them again.
        unroll = c.layers if policy is None else 1
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast,
                         length=c.layers, unroll=unroll, metadata_params={nn.PARTITION_NAME: "layers"})
        x, _ = layers(c, name="layers")(x, _rope(c, positions), segments)
        norm: Any = self.param("final_norm", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
                          (c.width,), jnp.float32)
        return rms_norm(x, norm, c.norm_eps)


def _rope(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    frequencies = kv_cache.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return kv_cache.rope(positions, frequencies)


def init(config: DecoderConfig, key: jax.Array) -> Params:
    """Random float32 weights: normal(0.02), ones for norms, zeros for biases."""
    one = jnp.zeros((1, 1), jnp.int32)
    return nn.meta.unbox(Decoder(config).init(key, one, one, None))["params"]


@functools.cache
def _boxed_params(config: DecoderConfig) -> Params:
    """Abstract weights in flax's boxes, which hold the axis names. Cached: a run asks several times for the same."""
    one = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), one, one, None))["params"]


def abstract_params(config: DecoderConfig) -> Params:
    """Shapes and dtypes of the weights, without making them."""
    return jax.tree.map(lambda box: box.value, _boxed_params(config),
                        is_leaf=lambda node: isinstance(node, nn.meta.AxisMetadata))


def logical_axes(config: DecoderConfig) -> Params:
    """The logical axis names of every weight, as tuples in the tree of the weights."""
    return jax.tree.map(tuple, nn.get_partition_spec(_boxed_params(config)),
                        is_leaf=lambda node: isinstance(node, jax.sharding.PartitionSpec))


def forward(config: DecoderConfig, params: Params, tokens: jax.Array, positions: jax.Array | None = None,
            segments: jax.Array | None = None) -> jax.Array:
    """Final hidden states [B, N, D] of int32[B, N] tokens, causal.

    Args: positions int32[B, N] of each token in its sequence; segments int32[B, N], which sequence of the row, 0 =
        padding. Without them a row is one sequence, and padding behind it."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    decoder: Any = Decoder(config)
    return decoder.apply({"params": params}, tokens, positions, segments)


def head(params: Params) -> jax.Array:
    """The output head [V, D]: the embedding where it is tied."""
    return params["head"] if "head" in params else params["embedding"]


def logits(params: Params, hidden: jax.Array) -> jax.Array:
    """float32[..., V] for hidden states [..., D]."""
    return jnp.einsum("...d,vd->...v", hidden, head(params).astype(hidden.dtype), preferred_element_type=jnp.float32)


def unstack(config: DecoderConfig, params: Params) -> Params:
    """The weights as the sampler reads them: layers as a list, matrices in the compute dtype."""
    cast = jax.tree.map(lambda leaf: leaf.astype(config.dtype), params)
    return cast | {"layers": [jax.tree.map(lambda leaf, layer=layer: leaf[layer], cast["layers"])
                              for layer in range(config.layers)]}


def cache_axes(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """The logical axes of the arrays of one layer's cache."""
    return kv_cache.CACHE_LAYOUTS[config.cache_layout]


def empty_cache(config: DecoderConfig, rows: int, slots: int) -> Cache:
    """A cache for `rows` sequences of at most `slots` tokens."""
    sizes = {"batch": rows, "kv_heads": config.kv_heads, "head_dim": config.head_dim, "sequence": slots}
    return [{name: jnp.zeros([sizes[axis] for axis in axes], config.dtype) for name, axes in cache_axes(config).items()}
            for _ in range(config.layers)]


def extend(config: DecoderConfig, unstacked: Params, tokens: jax.Array, start: jax.Array,
           cache: Cache) -> tuple[jax.Array, Cache]:
    """Reads T more tokens of each row: one in a decode step, a whole prompt in a prefill.

    Args: unstacked weights; tokens int32[B, T]; start int32[B], how many tokens each row's cache holds already;
        cache slots at and beyond `start` may hold anything, they are overwritten or never seen.
    Returns: final hidden states [B, T, D] and the cache."""
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    rope = _rope(config, positions)
    x = unstacked["embedding"].astype(config.dtype)[tokens]
    block: Any = Block(config)
    extended = []
    for layer, layer_cache in zip(unstacked["layers"], cache, strict=True):
        x, layer_cache = block.apply({"params": layer}, x, rope, positions, layer_cache, method="extend")
        extended.append(layer_cache)
    return rms_norm(x, unstacked["final_norm"], config.norm_eps), extended
