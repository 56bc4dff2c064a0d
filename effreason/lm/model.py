"""The decoder: Qwen2, Llama and Qwen3 in one Linen module; the only file that imports flax.

Two paths go through the same block. Training scans over layers stacked on a leading axis and
rematerializes each block. Sampling loops over a list of layers, each with its own cache, so that
every cache is updated in place.

B rows, N positions, T new tokens, D width, V vocabulary, L layers, H query heads, K key/value
heads, h head width.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from effreason.lm import adapters, attention, kv_cache
from effreason.lm.precision import products_of
from effreason.runtime.sharding import constrain

# {"embedding", "layers": {name: [L, ...]}, "final_norm", and "head" if the embedding is not tied}
Params = dict[str, Any]
Cache = list[kv_cache.LayerCache]
Rope = tuple[Float32[Array, "B N 1 h/2"], Float32[Array, "B N 1 h/2"]]      # cosines and sines

# What a block keeps for the backward pass: only its input, its attention too, or everything.
REMAT: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(attention.CHECKPOINT_NAME),
    "none": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder, and the dtype it computes in."""

    vocabulary: int                 # rows of embedding and head
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
    unused_ids: tuple[tuple[int, int], ...] = ()    # ranges [first, end) of rows without a token
    dtype: Any = jnp.float32        # of activations; weights and logits are always float32
    cache_layout: str = "transposed"    # one of kv_cache.CACHE_LAYOUTS
    attention: str = "xla"          # one of attention.IMPLEMENTATIONS, for whole rows in training
    remat: str = "full"             # one of REMAT
    adapter: adapters.Adapter | None = None     # of the layers' weights; None = there are none


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"],
             eps: float) -> Float[Array, "... D"]:
    """x / rms(x) * scale over the last axis, the division in float32. Source: arXiv 1910.07467."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * jnp.broadcast_to(scale.astype(x.dtype), x.shape)


@jax.custom_vjp
def embed(table: Float[Array, "V D"], tokens: Int[Array, "B N"]) -> Float[Array, "B N D"]:
    """Returns the tokens' rows. Their gradients are summed in float32: in bfloat16 the sum for a
    frequent token would stop to grow."""
    return table[tokens]


def _embed_forward(table: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return table[tokens], (table, tokens)


def _embed_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, None]:
    table, tokens = saved
    total = jnp.zeros(table.shape, jnp.float32).at[tokens].add(grad.astype(jnp.float32))
    return total.astype(table.dtype), None


embed.defvjp(_embed_forward, _embed_backward)


class Block(nn.Module):
    """Attention and a SwiGLU MLP, each after a norm and with a residual connection."""

    config: DecoderConfig

    def setup(self) -> None:
        c, normal = self.config, nn.initializers.normal(0.02)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        lora: dict[str, adapters.Pair] = {}
        dial: dict[str, adapters.Pair] = {}

        def weight(name: str, shape: tuple[int, ...], axes: tuple[str, ...],
                   init: Any = normal) -> Any:
            if c.adapter is not None and name in c.adapter.targets:
                shape_a, shape_b = c.adapter.shapes(name, shape)
                inputs = len(shape_a) - 1
                uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform",
                                                           range(inputs), -1)

                def pair(a: str, b: str) -> tuple[Any, Any]:
                    return (weight(name + a, shape_a, (*axes[:inputs], "rank"), uniform),
                            weight(name + b, shape_b, ("rank", *axes[inputs:]), zeros))

                lora[name] = pair(adapters.A, adapters.B)
                if c.adapter.has_dial:
                    dial[name] = pair(adapters.DIAL_A, adapters.DIAL_B)
            return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)

        query, kv, axes = (c.heads, c.head_dim), (c.kv_heads, c.head_dim), ("kv_heads", "head_dim")
        self.attention_norm = weight("attention_norm", (c.width,), ("norm",), ones)
        self.query = weight("query", (c.width, *query), ("embed", "heads", "head_dim"))
        self.key = weight("key", (c.width, *kv), ("embed", *axes))
        self.value = weight("value", (c.width, *kv), ("embed", *axes))
        if c.qkv_bias:
            self.query_bias = weight("query_bias", query, ("heads", "head_dim"), zeros)
            self.key_bias = weight("key_bias", kv, axes, zeros)
            self.value_bias = weight("value_bias", kv, axes, zeros)
        if c.qk_norm:
            self.query_norm = weight("query_norm", (c.head_dim,), ("norm",), ones)
            self.key_norm = weight("key_norm", (c.head_dim,), ("norm",), ones)
        self.output = weight("output", (*query, c.width), ("heads", "head_dim", "embed"))

        self.mlp_norm = weight("mlp_norm", (c.width,), ("norm",), ones)
        self.gate = weight("gate", (c.width, c.mlp_width), ("embed", "mlp"))
        self.up = weight("up", (c.width, c.mlp_width), ("embed", "mlp"))
        self.down = weight("down", (c.mlp_width, c.width), ("mlp", "embed"))
        self.lora, self.dial = lora, dial

    def __call__(self, x: Float[Array, "B N D"], rope: Rope,
                 segments: Int[Array, "B N"] | None,
                 settings: Float32[Array, "B N"] | None) -> tuple[Float[Array, "B N D"], None]:
        """Training: causal within each segment. nn.scan expects a pair; it has nothing to stack."""
        query, key, value = self.qkv(x, rope, settings)
        mixed = attention.causal_attention(query, key, value, segments,
                                           implementation=self.config.attention)
        x = self.output_and_mlp(x, mixed, settings)
        return constrain(x, "batch", "sequence", "width"), None

    def decode(self, x: Float[Array, "B T D"], rope: Rope, positions: Int[Array, "B T"],
               cache: kv_cache.LayerCache) -> tuple[Float[Array, "B T D"], kv_cache.LayerCache]:
        """Sampling: T tokens after those in the cache; returns the cache with T more."""
        query, key, value = self.qkv(x, rope)
        layout = self.config.cache_layout
        cache = kv_cache.write_cache(cache, key, value, positions[:, 0], layout)
        mixed = kv_cache.cached_attention(query, cache, positions, layout)
        return self.output_and_mlp(x, mixed), cache

    def qkv(self, x: Float[Array, "B N D"], rope: Rope,
            settings: Float32[Array, "B N"] | None = None) -> tuple[
            Float[Array, "B N H h"], Float[Array, "B N K h"], Float[Array, "B N K h"]]:
        c, dtype = self.config, x.dtype
        normed = rms_norm(x, self.attention_norm, c.norm_eps)
        query = self.product("query", "bnd,dhk->bnhk", normed, settings)
        key = self.product("key", "bnd,dhk->bnhk", normed, settings)
        value = self.product("value", "bnd,dhk->bnhk", normed, settings)
        if c.qkv_bias:
            query = query + self.query_bias.astype(dtype)[None, None]
            key = key + self.key_bias.astype(dtype)[None, None]
            value = value + self.value_bias.astype(dtype)[None, None]
        if c.qk_norm:
            query = rms_norm(query, self.query_norm, c.norm_eps)
            key = rms_norm(key, self.key_norm, c.norm_eps)
        return kv_cache.rotate(query, *rope), kv_cache.rotate(key, *rope), value

    def output_and_mlp(self, x: Float[Array, "B N D"], mixed: Float[Array, "B N H h"],
                       settings: Float32[Array, "B N"] | None = None) -> Float[Array, "B N D"]:
        x = x + self.product("output", "bnhk,hkd->bnd", mixed, settings)
        normed = rms_norm(x, self.mlp_norm, self.config.norm_eps)
        gate, up = (self.product(name, "bnd,df->bnf", normed, settings)
                    for name in ("gate", "up"))
        return x + self.product("down", "bnf,fd->bnd", jax.nn.silu(gate) * up, settings)

    def product(self, name: str, axes: str, x: Float[Array, "B N ..."],
                settings: Float32[Array, "B N"] | None) -> Float[Array, "B N ..."]:
        """Returns x W for the weight of this name, with its adapters if it has any."""
        y, adapter = jnp.einsum(axes, x, getattr(self, name).astype(x.dtype)), self.config.adapter
        if adapter is None or name not in self.lora:
            return y
        if settings is None:
            return y + adapters.change(x, *self.lora[name], adapter.scale)
        return y + adapters.change_with_dial(x, self.lora[name], self.dial[name], adapter.scale,
                                             settings)


class Decoder(nn.Module):
    """Tokens, positions and segments to the final hidden states; layers are stacked."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "B N"], positions: Int[Array, "B N"],
                 segments: Int[Array, "B N"] | None,
                 settings: Float32[Array, "B N"] | None = None) -> Float[Array, "B N D"]:
        c = self.config
        table = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        embedding: Any = self.param("embedding", table, (c.vocabulary, c.width), jnp.float32)
        if not c.tied:
            # Read by `logits` and the scorer.
            self.param("head", table, (c.vocabulary, c.width), jnp.float32)
        x = constrain(embed(embedding.astype(c.dtype), tokens), "batch", "sequence", "width")

        policy = REMAT[c.remat]
        block = Block if policy is None else nn.remat(Block, prevent_cse=False, policy=policy)
        # A loop would copy all that is kept for the backward pass into stacks, and out again.
        unroll = c.layers if policy is None else 1
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True},
                         in_axes=nn.broadcast, length=c.layers, unroll=unroll,
                         metadata_params={nn.PARTITION_NAME: "layers"})
        x, _ = layers(c, name="layers")(x, _rope(c, positions), segments, settings)

        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        norm: Any = self.param("final_norm", ones, (c.width,), jnp.float32)
        return rms_norm(x, norm, c.norm_eps)


def _rope(config: DecoderConfig, positions: Int[Array, "B N"]) -> Rope:
    frequencies = kv_cache.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return kv_cache.rope(positions, frequencies)


def init(config: DecoderConfig, key: jax.Array) -> Params:
    """Returns random float32 weights: normal(0.02), ones for norms, zeros for biases."""
    one = jnp.zeros((1, 1), jnp.int32)
    return nn.meta.unbox(Decoder(config).init(key, one, one, None))["params"]


@functools.cache
def _boxed_params(config: DecoderConfig) -> Params:
    """Returns abstract weights in flax's boxes, which hold the axis names; a run asks often."""
    one = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), one, one, None))["params"]


def abstract_params(config: DecoderConfig) -> Params:
    """Returns shapes and dtypes of the weights, without creating them."""
    return jax.tree.map(lambda box: box.value, _boxed_params(config),
                        is_leaf=lambda node: isinstance(node, nn.meta.AxisMetadata))


def logical_axes(config: DecoderConfig) -> Params:
    """Returns the logical axis names of every weight, as tuples in the tree of the weights."""
    return jax.tree.map(tuple, nn.get_partition_spec(_boxed_params(config)),
                        is_leaf=lambda node: isinstance(node, jax.sharding.PartitionSpec))


def forward(config: DecoderConfig, params: Params, tokens: Int[Array, "B N"],
            positions: Int[Array, "B N"] | None = None,
            segments: Int[Array, "B N"] | None = None,
            settings: Float32[Array, "B N"] | None = None) -> Float[Array, "B N D"]:
    """Returns the final hidden states, causal.

    Args:
        positions: Of each token in its sequence.
        segments: Which sequence of the row, 0 = padding. None: a row is one sequence, padded on
            the right.
        settings: Of the dial; None: there is none."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    decoder: Any = Decoder(config)
    with products_of(config.dtype):
        return decoder.apply({"params": params}, tokens, positions, segments, settings)


def head(params: Params) -> Float[Array, "V D"]:
    """Returns the output head: the embedding if it is tied."""
    return params["head"] if "head" in params else params["embedding"]


def logits(params: Params, hidden: Float[Array, "... D"]) -> Float32[Array, "... V"]:
    """Returns the scores of all tokens of the vocabulary."""
    with products_of(hidden.dtype):
        return jnp.einsum("...d,vd->...v", hidden, head(params).astype(hidden.dtype),
                          preferred_element_type=jnp.float32)


def mask_unused(scores: Float[Array, "N V"], ids: Int[Array, " V"] | np.ndarray,
                unused: tuple[tuple[int, int], ...]) -> Float[Array, "N V"]:
    """Gives the ids without a token a score of -inf: probability 0 in sampling and in training.

    Models are published with more rows than tokens, for example Qwen2.5 with 151,936 rows for
    151,665 tokens. If one of the others were drawn, there would be no text for it.

    Args:
        ids: Of the scores' columns; a NumPy array is compared once, when the program is traced.
        unused: Ranges [first, end), ascending."""
    if not unused:
        return scores
    bounds = np.array(unused, np.int32).reshape(1, -1)
    is_unused = (ids[:, None] >= bounds).sum(axis=-1) % 2 == 1
    return jnp.where(is_unused[None, :], -jnp.inf, scores)


def unstack(config: DecoderConfig, params: Params) -> Params:
    """Returns the weights as `decode` reads them: layers as a list, in the compute dtype.

    Adapters are merged into the weights."""
    layers = [jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
              for layer in range(config.layers)]
    if config.adapter is not None:
        setting = params.get(adapters.SETTING)
        layers = [adapters.merge_layer(config.adapter, layer, setting) for layer in layers]
        params = {name: leaf for name, leaf in params.items() if name != adapters.SETTING}
    return jax.tree.map(lambda leaf: leaf.astype(config.dtype), params | {"layers": layers})


def merge_adapters(config: DecoderConfig, params: Params) -> Params:
    """Returns weights without adapters that compute the same."""
    return params if config.adapter is None else adapters.merge(config.adapter, params)


def cache_axes(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """Returns the logical axes of the arrays of one layer's cache."""
    return kv_cache.CACHE_LAYOUTS[config.cache_layout]


def empty_cache(config: DecoderConfig, rows: int, slots: int) -> Cache:
    """Returns a cache for `rows` sequences of at most `slots` tokens."""
    return [kv_cache.empty_layer(config.cache_layout, config.dtype, batch=rows, sequence=slots,
                                 kv_heads=config.kv_heads, head_dim=config.head_dim)
            for _ in range(config.layers)]


def decode(config: DecoderConfig, unstacked: Params, tokens: Int[Array, "B T"],
           start: Int[Array, " B"], cache: Cache) -> tuple[Float[Array, "B T D"], Cache]:
    """Reads T more tokens of each row: one in a decode step, a whole prompt in a prefill.

    Args:
        unstacked: Weights as `unstack` returns them.
        start: Tokens in each row's cache. Later slots may hold anything: they are overwritten or
            never seen.

    Returns:
        The final hidden states, and the cache with T more tokens."""
    positions = start[:, None] + jnp.arange(tokens.shape[1])[None]
    rope = _rope(config, positions)
    x = unstacked["embedding"].astype(config.dtype)[tokens]
    block: Any = Block(config)
    new_cache = []
    with products_of(config.dtype):
        for layer, layer_cache in zip(unstacked["layers"], cache, strict=True):
            x, layer_cache = block.apply({"params": layer}, x, rope, positions, layer_cache,
                                         method="decode")
            new_cache.append(layer_cache)
    return rms_norm(x, unstacked["final_norm"], config.norm_eps), new_cache
