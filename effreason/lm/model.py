"""The decoder of all model families, from tokens to hidden states and logits.

Two paths go through the same block. Training scans over layers stacked on a leading axis, as many
at a time as there are kinds, and rematerializes each block; each weight is stacked over those
layers that have it. Sampling loops over a list of layers, each with its own cache, so that every
cache is updated in place.

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

from effreason.lm import adapters, attention, delta, kv_cache
from effreason.lm.architecture import DecoderConfig, LayerKind
from effreason.lm.block import Block, rms_norm
from effreason.lm.precision import products_of
from effreason.lm.rope import Angles
from effreason.runtime.sharding import constrain

# {"embedding", "layers": {name: [layers that have it, ...]}, "final_norm", and "head" if the
# embedding is not tied}
Params = dict[str, Any]
Cache = list[kv_cache.LayerCache | delta.LayerState]
FLOAT32 = ("log_decay_rate", "time_step_bias")     # weights that stay so in every compute dtype
# What a block keeps for the backward pass: only its input, its attention too, or everything.
REMAT: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(attention.CHECKPOINT_NAME),
    "none": None,
}
AnglesOf = dict[LayerKind, Angles | None]


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
        per_group = sum(layer < kinds for layer in stacks(config)[name])
        return leaf[: groups * per_group].reshape(groups, per_group, *leaf.shape[1:])

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

    If layers have different sets, each weight comes from a model in which all layers have it."""
    one = jnp.zeros((1, 1), jnp.int32)
    models = [Decoder(alike).init(key, one, one, None)["params"] for alike in _uniform(config)]
    if len(models) == 1:
        return models[0]
    layers = {name: jax.tree.map(lambda leaf, name=name: leaf[np.array(stacks(config)[name])], box)
              for params in models for name, box in params["layers"].items()}
    return models[0] | {"layers": layers}


def _uniform(config: DecoderConfig) -> list[DecoderConfig]:
    """Returns one configuration for each set of weights, in which all layers have that set."""
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
    return in_compute_dtype(config, params | {"layers": layers})


def in_compute_dtype(config: DecoderConfig, params: Params) -> Params:
    """Casts weights to the dtype of the blocks, but for logarithms and biases of decay rates, which
    would be other rates when rounded."""
    def cast(path: Any, leaf: Array) -> Array:
        return leaf if path[-1].key in FLOAT32 else leaf.astype(config.dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


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


def state_bytes(config: DecoderConfig) -> int:
    """Returns the bytes of what all layers keep of a sequence, whatever its length."""
    return cache_bytes(config, 1) - position_bytes(config)


def positions_held(config: DecoderConfig, positions: int, context: int = 1) -> int:
    """Returns how many positions of keys and values take as much memory as a sequence's cache.

    Args:
        context: Parts that positions are split into; each of them has all states."""
    held = cache_bytes(config, positions) + (context - 1) * state_bytes(config)
    return -(-held // position_bytes(config))


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
