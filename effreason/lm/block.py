"""One layer of all model families, as a Linen module: what differs between them is data.

B rows, N positions, T new tokens, D width, H query heads, K key/value heads, h head width; of
layers that keep a state, Hv value heads of width v.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from effreason.lm import adapters, attention, delta, experts, kv_cache
from effreason.lm.architecture import DecoderConfig, LayerKind
from effreason.lm.delta import DeltaShape
from effreason.lm.rope import Angles, rotate
from effreason.runtime.sharding import constrain

ACTIVATIONS: dict[str, Any] = {"silu": jax.nn.silu,
                               "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


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
            if not self.is_initializing():
                # `param` would trace the initializer once more, to compare shapes that are those of
                # the configuration: a tenth of the time that a decoder takes to trace.
                return self.get_variable("params", name)
            return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)

        def norm(name: str) -> Any:
            return weight(name, (c.width,), ("norm",), scales)

        heads, key_heads = ("heads", "head_dim"), ("kv_heads", "head_dim")

        def attention_weights() -> None:
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

        def state_weights(shape: DeltaShape) -> None:
            key, value = (shape.key_heads, shape.key_dim), (shape.value_heads, shape.value_dim)
            self.delta_query = weight("delta_query", (c.width, *key), ("embed", *key_heads))
            self.delta_key = weight("delta_key", (c.width, *key), ("embed", *key_heads))
            self.delta_value = weight("delta_value", (c.width, *value), ("embed", *heads))
            self.query_taps = weight("query_taps", (*key, shape.taps), (*key_heads, "taps"))
            self.key_taps = weight("key_taps", (*key, shape.taps), (*key_heads, "taps"))
            self.value_taps = weight("value_taps", (*value, shape.taps), (*heads, "taps"))
            self.delta_beta = weight("delta_beta", (c.width, shape.value_heads), ("embed", "heads"))
            self.time_step = weight("time_step", (c.width, shape.value_heads), ("embed", "heads"))
            self.time_step_bias = weight("time_step_bias", (shape.value_heads,), ("heads",), ones)
            self.log_decay_rate = weight("log_decay_rate", (shape.value_heads,), ("heads",), zeros)
            self.delta_gate = weight("delta_gate", (c.width, *value), ("embed", *heads))
            self.delta_norm = weight("delta_norm", (shape.value_dim,), ("norm",), ones)
            self.delta_output = weight("delta_output", (*value, c.width), (*heads, "embed"))

        if c.norms_input:
            self.attention_norm = norm("attention_norm")
        if self.kind.delta is None:
            attention_weights()
        else:
            state_weights(self.kind.delta)
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
        step = self.product("time_step", "bnd,dh->bnh", x).astype(jnp.float32)
        step = jax.nn.softplus(step + self.time_step_bias[None, None])
        return streams, taps, -jnp.exp(self.log_decay_rate)[None, None] * step, beta

    def output_of_state(self, mixed: Float32[Array, "B N Hv v"], x: Float[Array, "B N D"],
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
