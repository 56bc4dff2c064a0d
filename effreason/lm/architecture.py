"""What a decoder computes, as data: the shape of all its layers, and what they differ in."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from effreason.lm.adapters import Adapter
from effreason.lm.delta import DeltaShape
from effreason.lm.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What layers of one model may differ in."""

    rope: Rope | None = None        # None: queries and keys know no positions
    window: int | None = None       # positions that a query sees at most, with its own; None = all
    delta: DeltaShape | None = None   # None: the layer attends; else it keeps a state


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
    copied_prefixes: tuple[str, ...] = ()
    unused_ids: tuple[tuple[int, int], ...] = ()    # ranges [first, end) of rows without a token
    dtype: Any = jnp.float32        # of activations; weights and logits are always float32
    cache_layout: str = "transposed"    # one of kv_cache.CACHE_LAYOUTS
    attention: str = "xla"          # one of attention.IMPLEMENTATIONS, for whole rows in training
    remat: str = "full"             # one of REMAT
    adapter: Adapter | None = None  # of the layers' weights; None = there are none

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
