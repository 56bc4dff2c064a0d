"""The decoder of all model families in one Linen block; the only file that imports flax.

What differs between families is data: fields of DecoderConfig, and of LayerKind for what differs
between the layers of one model. Two paths go through the same block. Training scans over layers
stacked on a leading axis, as many at a time as there are kinds, and rematerializes each block; each
weight is stacked over those layers that have it. Sampling loops over a list of layers, each with
its own cache, so that every cache is updated in place.

B rows, N positions, T new tokens, D width, V vocabulary, L layers, H query heads, K key/value
heads, h head width.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from effreason.lm import adapters, attention, delta, experts, kv_cache
from effreason.lm.delta import DeltaShape
from effreason.lm.precision import products_of
from effreason.lm.rope import Angles, Rope, rotate
from effreason.runtime.sharding import constrain

# {"embedding", "layers": {name: [layers that have it, ...]}, "final_norm", and "head" if the
# embedding is not tied}
Params = dict[str, Any]
Cache = list[kv_cache.LayerCache | delta.LayerState]
# What a block keeps for the backward pass: only its input, its attention too, or everything.
REMAT: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(attention.CHECKPOINT_NAME),
    "none": None,
}


ACTIVATIONS: dict[str, Any] = {"silu": jax.nn.silu,
                               "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What layers of one model may differ in."""

    rope: Rope | None = None        # None: queries and keys know no positions
    window: int | None = None       # positions that a query sees at most, with its own; None = all
    delta: DeltaShape | None = None   # None: the layer attends; else it keeps a state


AnglesOf = dict[LayerKind, Angles | None]


def alike(*, theta: float) -> tuple[LayerKind, ...]:
    """Returns the kinds of a model whose layers all see everything and rotate with this theta."""
    return (LayerKind(rope=Rope(theta=theta)),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder, and the dtype it computes in."""

    vocabulary: int                 # rows of embedding and head
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int                  # of one expert, if there are some
    norm_eps: float
    kinds: tuple[LayerKind, ...]    # of the first layers; those after them repeat these in order
    tied: bool = False              # the embedding is also the output head
    activation: str = "silu"        # one of ACTIVATIONS
    qkv_bias: bool = False
    output_bias: bool = False       # of the attention's last product
    mlp_bias: bool = False
    experts: int = 0                # MLPs among which a router chooses for each token; 0 = one MLP
    experts_per_token: int = 0
    normalizes_experts: bool = False    # the weights of a token's experts add up to 1
    qk_norm: str | None = None      # of queries and keys: each head by itself, or all heads as one
    norms_input: bool = True        # attention and MLP each have a norm before them,
    norms_output: bool = False      # and one after them, before what they add to
    norm_offset: float = 0.0        # added to the scales of all norms
    query_scale: float = 1.0        # of queries, besides 1 / sqrt(head_dim)
    gates_attention: bool = False   # the query's tensor holds, for each head, a gate of its result
    embedding_scale: float = 1.0
    fused: bool = False             # files hold query, key, value as one tensor; gate, up as one
    # Beginnings of the names of tensors that are not the decoder's. An export has them too, and
    # names the decoder's as its source does.
    others: tuple[str, ...] = ()
    unused_ids: tuple[tuple[int, int], ...] = ()    # ranges [first, end) of rows without a token
    dtype: Any = jnp.float32        # of activations; weights and logits are always float32
    cache_layout: str = "transposed"    # one of kv_cache.CACHE_LAYOUTS
    attention: str = "xla"          # one of attention.IMPLEMENTATIONS, for whole rows in training
    remat: str = "full"             # one of REMAT
    adapter: adapters.Adapter | None = None     # of the layers' weights; None = there are none

    def kind(self, layer: int) -> LayerKind:
        return self.kinds[layer % len(self.kinds)]

    @property
    def active_mlp_width(self) -> int:
        """The width of all MLPs that a token goes through in a layer."""
        return self.mlp_width * (self.experts_per_token or 1)

    @property
    def window(self) -> int | None:
        """The shortest of all layers' windows."""
        return min((kind.window for kind in self.kinds if kind.window is not None), default=None)

    @property
    def delta(self) -> DeltaShape | None:
        """The shape of the layers that keep a state; None if there are none."""
        return next((kind.delta for kind in self.kinds if kind.delta is not None), None)

    @property
    def attention_layers(self) -> int:
        return sum(self.kind(layer).delta is None for layer in range(self.layers))

    @property
    def needs_neighbours(self) -> bool:
        """Whether positions of a sequence must be next to one another in a row."""
        return self.window is not None or self.delta is not None


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "... D"], eps: float,
             offset: float = 0.0) -> Float[Array, "... D"]:
    """x / rms(x) * (offset + scale) over the scale's axes, the division in float32.

    Source: arXiv 1910.07467."""
    wide, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=axes, keepdims=True) + eps)
    if offset:      # a small scale next to the offset would be lost in bfloat16
        scale = jnp.broadcast_to(offset + scale.astype(jnp.float32), x.shape)
        return (wide * scale).astype(x.dtype)
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
    """Attention, or what mixes positions in its place, and a gated MLP, each with norms and a
    residual connection."""

    config: DecoderConfig
    kind: LayerKind

    def setup(self) -> None:
        c, normal = self.config, nn.initializers.normal(0.02)
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        scales = nn.initializers.constant(1.0 - c.norm_offset)
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

        def norm(name: str) -> Any:
            return weight(name, (c.width,), ("norm",), scales)

        heads, key_heads = ("heads", "head_dim"), ("kv_heads", "head_dim")

        def attend() -> None:
            query, kv = (c.heads, c.head_dim), (c.kv_heads, c.head_dim)
            gated = (c.heads, c.head_dim * (2 if c.gates_attention else 1))
            self.query = weight("query", (c.width, *gated), ("embed", *heads))
            self.key = weight("key", (c.width, *kv), ("embed", *key_heads))
            self.value = weight("value", (c.width, *kv), ("embed", *key_heads))
            if c.qkv_bias:
                self.query_bias = weight("query_bias", gated, heads, zeros)
                self.key_bias = weight("key_bias", kv, key_heads, zeros)
                self.value_bias = weight("value_bias", kv, key_heads, zeros)
            if c.qk_norm == "head":
                self.query_norm = weight("query_norm", (c.head_dim,), ("norm",), scales)
                self.key_norm = weight("key_norm", (c.head_dim,), ("norm",), scales)
            elif c.qk_norm == "all_heads":
                self.query_norm = weight("query_norm", query, heads, scales)
                self.key_norm = weight("key_norm", kv, key_heads, scales)
            self.output = weight("output", (*query, c.width), (*heads, "embed"))
            if c.output_bias:
                self.output_bias = weight("output_bias", (c.width,), ("norm",), zeros)

        def keep_a_state(shape: DeltaShape) -> None:
            key, value = (shape.key_heads, shape.key_dim), (shape.value_heads, shape.value_dim)
            self.delta_query = weight("delta_query", (c.width, *key), ("embed", *key_heads))
            self.delta_key = weight("delta_key", (c.width, *key), ("embed", *key_heads))
            self.delta_value = weight("delta_value", (c.width, *value), ("embed", *heads))
            self.query_taps = weight("query_taps", (*key, shape.taps), (*key_heads, "taps"))
            self.key_taps = weight("key_taps", (*key, shape.taps), (*key_heads, "taps"))
            self.value_taps = weight("value_taps", (*value, shape.taps), (*heads, "taps"))
            self.delta_beta = weight("delta_beta", (c.width, shape.value_heads), ("embed", "heads"))
            self.delta_step = weight("delta_step", (c.width, shape.value_heads), ("embed", "heads"))
            self.step_bias = weight("step_bias", (shape.value_heads,), ("heads",), ones)
            self.log_rate = weight("log_rate", (shape.value_heads,), ("heads",), zeros)
            self.delta_gate = weight("delta_gate", (c.width, *value), ("embed", *heads))
            self.delta_norm = weight("delta_norm", (shape.value_dim,), ("norm",), ones)
            self.delta_output = weight("delta_output", (*value, c.width), (*heads, "embed"))

        if c.norms_input:
            self.attention_norm = norm("attention_norm")
        if self.kind.delta is None:
            attend()
        else:
            keep_a_state(self.kind.delta)
        if c.norms_output:
            self.attention_output_norm = norm("attention_output_norm")

        if c.norms_input:
            self.mlp_norm = norm("mlp_norm")
        if c.experts:
            self.router = weight("router", (c.width, c.experts), ("embed", "width"))
            into, axes = (c.experts, c.width, c.mlp_width), ("experts", "embed", "width")
            self.expert_gate = weight("expert_gate", into, axes)
            self.expert_up = weight("expert_up", into, axes)
            self.expert_down = weight("expert_down", (c.experts, c.mlp_width, c.width),
                                      ("experts", "width", "embed"))
        else:
            self.gate = weight("gate", (c.width, c.mlp_width), ("embed", "mlp"))
            self.up = weight("up", (c.width, c.mlp_width), ("embed", "mlp"))
            self.down = weight("down", (c.mlp_width, c.width), ("mlp", "embed"))
        if c.mlp_bias:
            self.gate_bias = weight("gate_bias", (c.mlp_width,), ("mlp",), zeros)
            self.up_bias = weight("up_bias", (c.mlp_width,), ("mlp",), zeros)
            self.down_bias = weight("down_bias", (c.width,), ("norm",), zeros)
        if c.norms_output:
            self.mlp_output_norm = norm("mlp_output_norm")
        self.lora, self.dial = lora, dial

    def __call__(self, x: Float[Array, "B N D"], angles: Angles | None,
                 segments: Int[Array, "B N"] | None,
                 settings: Float32[Array, "B N"] | None) -> Float[Array, "B N D"]:
        """Training: causal within each segment."""
        normed = self.norm("attention_norm", x) if self.config.norms_input else x
        if self.kind.delta is None:
            query, key, value, gate = self.qkv(normed, angles, settings)
            mixed = attention.causal_attention(
                query, key, value, segments, implementation=self.config.attention,
                window=self.kind.window)
            added = self.output_of(mixed, gate, settings)
        else:
            mixed = delta.mix_rows(*self.delta_inputs(normed, settings), segments)
            added = self.output_of_state(mixed, normed, settings)
        x = self.added_and_mlp(x, added, settings)
        return constrain(x, "batch", "sequence", "width")

    def decode(self, x: Float[Array, "B T D"], angles: Angles | None,
               positions: Int[Array, "B T"], cache: Any, counts: Int[Array, " B"] | None,
               ) -> tuple[Float[Array, "B T D"], Any]:
        """Sampling: T tokens after those in the cache; returns the cache with T more."""
        normed = self.norm("attention_norm", x) if self.config.norms_input else x
        if self.kind.delta is None:
            query, key, value, gate = self.qkv(normed, angles)
            layout, window = self.config.cache_layout, self.kind.window
            cache = kv_cache.write_cache(cache, key, value, positions[:, 0], layout, window)
            mixed = kv_cache.cached_attention(query, cache, positions, layout, window)
            added = self.output_of(mixed, gate)
        else:
            mixed, cache = delta.extend(*self.delta_inputs(normed), cache, counts)
            added = self.output_of_state(mixed, normed)
        return self.added_and_mlp(x, added), cache

    def qkv(self, x: Float[Array, "B N D"], angles: Angles | None,
            settings: Float32[Array, "B N"] | None = None) -> tuple[
            Float[Array, "B N H h"], Float[Array, "B N K h"], Float[Array, "B N K h"],
            Float[Array, "B N H h"] | None]:
        """Returns query, key, value, and the gate of what they give, if there is one."""
        c, gate = self.config, None
        query, key, value = (
            self.product(name, "bnd,dhk->bnhk", x, settings, has_bias=c.qkv_bias)
            for name in ("query", "key", "value"))
        if c.gates_attention:
            query, gate = jnp.split(query, 2, axis=-1)
        if c.qk_norm is not None:
            query, key = self.norm("query_norm", query), self.norm("key_norm", key)
        query, key = (rotate(part, angles) for part in (query, key))
        return query if c.query_scale == 1.0 else query * c.query_scale, key, value, gate

    def output_of(self, mixed: Float[Array, "B N H h"], gate: Float[Array, "B N H h"] | None,
                  settings: Float32[Array, "B N"] | None = None) -> Float[Array, "B N D"]:
        if gate is not None:
            mixed = mixed * jax.nn.sigmoid(gate)
        return self.product("output", "bnhk,hkd->bnd", mixed, settings,
                            has_bias=self.config.output_bias)

    def delta_inputs(self, x: Float[Array, "B N D"],
                     settings: Float32[Array, "B N"] | None = None) -> tuple[Any, Any, Any, Any]:
        """Returns what `delta.mix_rows` reads: streams, taps, the logarithm of decay, beta."""
        streams = tuple(self.product(f"delta_{name}", "bnd,dhk->bnhk", x, settings)
                        for name in delta.STREAMS)
        taps = tuple(getattr(self, f"{name}_taps").astype(x.dtype) for name in delta.STREAMS)
        beta = jax.nn.sigmoid(self.product("delta_beta", "bnd,dh->bnh", x)).astype(jnp.float32)
        step = self.product("delta_step", "bnd,dh->bnh", x).astype(jnp.float32)
        step = jax.nn.softplus(step + self.step_bias.astype(jnp.float32)[None, None])
        return streams, taps, -jnp.exp(self.log_rate.astype(jnp.float32))[None, None] * step, beta

    def output_of_state(self, mixed: Float32[Array, "B N H v"], x: Float[Array, "B N D"],
                        settings: Float32[Array, "B N"] | None = None) -> Float[Array, "B N D"]:
        gate = self.product("delta_gate", "bnd,dhk->bnhk", x, settings).astype(jnp.float32)
        mixed = rms_norm(mixed.astype(x.dtype), self.delta_norm, self.config.norm_eps)
        gated = (mixed.astype(jnp.float32) * jax.nn.silu(gate)).astype(x.dtype)
        return self.product("delta_output", "bnhk,hkd->bnd", gated, settings)

    def added_and_mlp(self, x: Float[Array, "B N D"], added: Float[Array, "B N D"],
                      settings: Float32[Array, "B N"] | None = None) -> Float[Array, "B N D"]:
        c = self.config
        x = x + (self.norm("attention_output_norm", added) if c.norms_output else added)
        added = self.mlp(self.norm("mlp_norm", x) if c.norms_input else x, settings)
        return x + (self.norm("mlp_output_norm", added) if c.norms_output else added)

    def mlp(self, x: Float[Array, "B N D"],
            settings: Float32[Array, "B N"] | None) -> Float[Array, "B N D"]:
        c, activation = self.config, ACTIVATIONS[self.config.activation]
        if c.experts:
            weights = (weight.astype(x.dtype) for weight in (
                self.router, self.expert_gate, self.expert_up, self.expert_down))
            return experts.mixture(x, *weights, count=c.experts_per_token,
                                   normalizes=c.normalizes_experts, activation=activation)
        gate, up = (self.product(name, "bnd,df->bnf", x, settings, has_bias=c.mlp_bias)
                    for name in ("gate", "up"))
        return self.product("down", "bnf,fd->bnd", activation(gate) * up, settings,
                            has_bias=c.mlp_bias)

    def norm(self, name: str, x: Float[Array, "B N ..."]) -> Float[Array, "B N ..."]:
        return rms_norm(x, getattr(self, name), self.config.norm_eps, self.config.norm_offset)

    def product(self, name: str, axes: str, x: Float[Array, "B N ..."],
                settings: Float32[Array, "B N"] | None = None, *,
                has_bias: bool = False) -> Float[Array, "B N ..."]:
        """Returns x W for the weight of this name, with its adapters and its bias if it has any."""
        y, adapter = jnp.einsum(axes, x, getattr(self, name).astype(x.dtype)), self.config.adapter
        if adapter is not None and name in self.lora:
            lora = self.lora[name]
            y = y + (adapters.change(x, *lora, adapter.scale) if settings is None else
                     adapters.change_with_dial(x, lora, self.dial[name], adapter.scale, settings))
        return y + getattr(self, f"{name}_bias").astype(x.dtype)[None, None] if has_bias else y


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
        x = _scaled(c, embed(embedding.astype(c.dtype), tokens))
        x = constrain(x, "batch", "sequence", "width")
        angles = _angles(c, positions)
        if self.is_initializing():      # the weights of all layers have the same shapes
            create = nn.scan(lambda block, x, *inputs: (block(x, *inputs), None),
                             variable_axes={"params": 0}, split_rngs={"params": True},
                             in_axes=nn.broadcast, length=c.layers,
                             metadata_params={nn.PARTITION_NAME: "layers"})
            create(Block(c, c.kinds[0], name="layers"), x, angles[c.kinds[0]], segments, settings)
        else:
            layers = self.variables["params"]["layers"]
            x = _layers(c, layers, x, angles, segments, settings)

        scale = nn.with_logical_partitioning(
            nn.initializers.constant(1.0 - c.norm_offset), ("norm",))
        norm: Any = self.param("final_norm", scale, (c.width,), jnp.float32)
        return rms_norm(x, norm, c.norm_eps, c.norm_offset)


def _layers(config: DecoderConfig, stacked: Params, x: Float[Array, "B N D"], angles: AnglesOf,
            segments: Int[Array, "B N"] | None,
            settings: Float32[Array, "B N"] | None) -> Float[Array, "B N D"]:
    """Computes all layers: a scan over as many at a time as there are kinds, then the rest."""
    kinds, policy = len(config.kinds), REMAT[config.remat]
    groups, rest = divmod(config.layers, kinds)

    def compute(kind: LayerKind, x: Array, layer: Params) -> Array:
        def block(x: Array, layer: Params) -> Any:
            return Block(config, kind).apply({"params": layer}, x, angles[kind], segments, settings)

        if policy is not None:
            return jax.checkpoint(block, prevent_cse=False, policy=policy)(x, layer)
        return block(x, layer)

    def several(x: Array, layers: Params, count: int = kinds) -> Array:
        for index, kind in enumerate(config.kinds[:count]):
            x = compute(kind, x, layer_of(config, layers, index))
        return x

    def step(x: Array, layers: Params) -> tuple[Array, None]:
        return several(x, layers) if kinds > 1 else compute(config.kinds[0], x, layers), None

    def in_groups(name: str, leaf: Array) -> Array:
        each = sum(layer < kinds for layer in stacks(config)[name])
        return leaf[: groups * each].reshape(groups, each, *leaf.shape[1:])

    last, grouped = None, stacked
    if kinds > 1:
        grouped = {name: in_groups(name, leaf) for name, leaf in stacked.items()}
    if rest:
        last = {name: leaf[grouped[name].shape[0] * grouped[name].shape[1]:]
                for name, leaf in stacked.items()}
    # A loop would copy all that is kept for the backward pass into stacks, and out again.
    x, _ = jax.lax.scan(step, x, grouped, unroll=policy is None)
    return x if last is None else several(x, last, rest)


def _angles(config: DecoderConfig, positions: Int[Array, "B N"]) -> AnglesOf:
    ropes = {rope: rope.angles(positions, config.head_dim)
             for rope in dict.fromkeys(kind.rope for kind in config.kinds) if rope is not None}
    return {kind: None if kind.rope is None else ropes[kind.rope] for kind in config.kinds}


def _scaled(config: DecoderConfig, embedded: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    if config.embedding_scale == 1.0:
        return embedded
    return embedded * jnp.asarray(config.embedding_scale, embedded.dtype)


def _boxed(config: DecoderConfig, key: jax.Array) -> Params:
    """Returns random weights in flax's boxes, which hold the axis names.

    A model whose layers have different weights has those of models in which all are alike."""
    one = jnp.zeros((1, 1), jnp.int32)
    models = [Decoder(alike).init(key, one, one, None)["params"] for alike in _uniform(config)]
    if len(models) == 1:
        return models[0]
    layers = {name: jax.tree.map(lambda leaf, name=name: leaf[np.array(stacks(config)[name])], box)
              for params in models for name, box in params["layers"].items()}
    return models[0] | {"layers": layers}


def _uniform(config: DecoderConfig) -> list[DecoderConfig]:
    """Returns for each set of weights that layers may have a model with these in all layers."""
    kinds = {kind.delta: kind for kind in reversed(config.kinds)}
    return [dataclasses.replace(config, kinds=(kind,)) for kind in reversed(kinds.values())]


def init(config: DecoderConfig, key: jax.Array) -> Params:
    """Returns random float32 weights: normal(0.02), norms of scale 1, zeros for biases."""
    return nn.meta.unbox(_boxed(config, key))


@functools.cache
def _boxed_params(config: DecoderConfig) -> Params:
    """Returns abstract weights in their boxes; a run asks often."""
    return jax.eval_shape(functools.partial(_boxed, config), jax.random.key(0))


@functools.cache
def stacks(config: DecoderConfig) -> Mapping[str, tuple[int, ...]]:
    """Returns the layers that have each weight, in the order of its stack."""
    having: dict[str, list[int]] = collections.defaultdict(list)
    names = {alike.kinds[0].delta: _boxed_params(alike)["layers"] for alike in _uniform(config)}
    for layer in range(config.layers):
        for name in names[config.kind(layer).delta]:
            having[name].append(layer)
    return {name: tuple(layers) for name, layers in having.items()}


def layer_of(config: DecoderConfig, stacked: Params, layer: int) -> Params:
    """Returns the weights of one layer, or what else is stacked in their place."""
    having = stacks(config)
    return {name: leaf[having[name].index(layer)] for name, leaf in stacked.items()
            if layer in having[name]}


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
    layers = [layer_of(config, params["layers"], layer) for layer in range(config.layers)]
    if config.adapter is not None:
        setting = params.get(adapters.SETTING)
        layers = [adapters.merge_layer(config.adapter, layer, setting) for layer in layers]
        params = {name: leaf for name, leaf in params.items() if name != adapters.SETTING}
    return jax.tree.map(lambda leaf: leaf.astype(config.dtype), params | {"layers": layers})


def merge_adapters(config: DecoderConfig, params: Params) -> Params:
    """Returns weights without adapters that compute the same."""
    return params if config.adapter is None else adapters.merge(config.adapter, params)


def cache_axes(config: DecoderConfig) -> list[dict[str, tuple[str, ...]]]:
    """Returns the logical axes of the arrays of each layer's cache."""
    return [kv_cache.CACHE_LAYOUTS[config.cache_layout] if config.kind(layer).delta is None
            else delta.STATE_AXES for layer in range(config.layers)]


def empty_cache(config: DecoderConfig, rows: int, positions: int, *,
                has_rings: bool = True) -> Cache:
    """Returns a cache for `rows` sequences of at most so many positions.

    Args:
        has_rings: Layers with a window keep no more than that; else they keep every position."""
    cache: Cache = []
    for layer, length in enumerate(cache_lengths(config, positions)):
        shape = config.kind(layer).delta
        cache.append(kv_cache.empty_layer(
            config.cache_layout, config.dtype, batch=rows, kv_heads=config.kv_heads,
            head_dim=config.head_dim, sequence=length if has_rings else positions)
            if shape is None else delta.empty_state(shape, config.dtype, rows))
    return cache


def cache_lengths(config: DecoderConfig, positions: int) -> list[int]:
    """Returns how many positions each layer's cache holds, of sequences with at most so many; 0 if
    it keeps a state instead."""
    kinds = [config.kind(layer) for layer in range(config.layers)]
    return [kv_cache.ring_length(kind.window, positions) if kind.delta is None else 0
            for kind in kinds]


def position_bytes(config: DecoderConfig) -> int:
    """Returns the bytes of one position's keys and values in all layers that have some."""
    return (2 * config.attention_layers * config.kv_heads * config.head_dim
            * jnp.dtype(config.dtype).itemsize)


@functools.cache
def cache_bytes(config: DecoderConfig, positions: int) -> int:
    """Returns the bytes of the cache of one sequence of at most so many positions."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(
        jax.eval_shape(lambda: empty_cache(config, 1, positions))))


def positions_held(config: DecoderConfig, positions: int) -> int:
    """Returns for how many positions keys and values would be as large as that cache."""
    return -(-cache_bytes(config, positions) // position_bytes(config))


def decode(config: DecoderConfig, unstacked: Params, tokens: Int[Array, "B T"],
           start: Int[Array, " B"], cache: Cache, counts: Int[Array, " B"] | None = None,
           ) -> tuple[Float[Array, "B T D"], Cache]:
    """Reads T more tokens of each row: one in a decode step, a whole prompt in a prefill.

    Args:
        unstacked: Weights as `unstack` returns them.
        start: Tokens in each row's cache. Later slots may hold anything: they are overwritten or
            never seen.
        counts: How many of the T tokens are the row's; None = all. A state knows nothing of the
            others.

    Returns:
        The final hidden states, and the cache with T more tokens."""
    positions = start[:, None] + jnp.arange(tokens.shape[1])[None]
    angles = _angles(config, positions)
    x = _scaled(config, unstacked["embedding"].astype(config.dtype)[tokens])
    new_cache = []
    with products_of(config.dtype):
        for index, layer in enumerate(unstacked["layers"]):
            kind = config.kind(index)
            block: Any = Block(config, kind)
            x, layer_cache = block.apply({"params": layer}, x, angles[kind], positions,
                                         cache[index], counts, method="decode")
            new_cache.append(layer_cache)
    return rms_norm(x, unstacked["final_norm"], config.norm_eps, config.norm_offset), new_cache
