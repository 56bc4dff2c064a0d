"""Low-rank adapters (LoRA): W + s A B for a frozen weight W, of which only A and B are trained.

An adapter's two matrices are in the tree of the weights, next to the weight they belong to: query,
query_lora_a, query_lora_b. Training adds s (x A) B to the product x W, so that no gradient of W is
formed. Sampling and export read the merged weight.

A dial is a second adapter, query_dial_a and query_dial_b, whose product is multiplied by a setting
between 0 and 1: one training makes a family of models. Each sequence has its own setting. What all
settings share is learnt from the sequences at 0, what the dial adds from all others: if all
sequences trained both, the dial would have nothing left to add.

Source: arXiv 2106.09685; s = scale / sqrt(rank) by arXiv 2312.03732.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

Params = dict[str, Any]
Pair = tuple[Float32[Array, "..."], Float32[Array, "..."]]      # A and B

ATTENTION, MLP = ("query", "key", "value", "output"), ("gate", "up", "down")
# Products of layers that keep a state instead of attending.
DELTA = ("delta_query", "delta_key", "delta_value", "delta_gate", "delta_output")
TARGETS = {"attention": ATTENTION + DELTA, "mlp": MLP, "all": ATTENTION + DELTA + MLP}
# Axes of the weight that are summed over; 1 for all others.
INPUT_AXES = {"output": 2, "delta_output": 2}
A, B = "_lora_a", "_lora_b"
DIAL_A, DIAL_B = "_dial_a", "_dial_b"
SUFFIXES = (A, B, DIAL_A, DIAL_B)
SETTING = "dial_setting"            # of the dial, float32[], in a tree of weights to merge


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """The shape of a model's adapters."""

    rank: int
    scale: float                    # s, of the product A B
    targets: tuple[str, ...]        # the weights that have one, in the layers that have them
    has_dial: bool = False          # whether they have a second one, the dial

    def shapes(self, name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shapes of A and B for one layer's weight of this shape."""
        inputs = INPUT_AXES.get(name, 1)
        return (*shape[:inputs], self.rank), (self.rank, *shape[inputs:])


def make_adapter(rank: int, scale: float, targets: str, *, rank_stabilized: bool,
                 has_dial: bool = False) -> Adapter | None:
    """Returns the adapters that a configuration describes; None for rank 0.

    Args:
        targets: attention, mlp or all.
        rank_stabilized: divide the scale by sqrt(rank) instead of the rank.
    """
    if rank == 0:
        return None
    return Adapter(rank=rank, scale=scale / (math.sqrt(rank) if rank_stabilized else rank),
                   targets=TARGETS[targets], has_dial=has_dial)


def change(x: Float[Array, "B N ..."], a: Float32[Array, "..."], b: Float32[Array, "..."],
           scale: float | Float[Array, "B N"]) -> Float[Array, "B N ..."]:
    """Returns s (x A) B: what an adapter adds to the product x W."""
    scale = jnp.asarray(scale, x.dtype)
    inner = jnp.tensordot(x, a.astype(x.dtype), a.ndim - 1)
    return jnp.tensordot(inner * scale.reshape(*scale.shape, *[1] * (3 - scale.ndim)),
                         b.astype(x.dtype), 1)


def change_with_dial(x: Float[Array, "B N ..."], common: Pair, dial: Pair, scale: float,
                     settings: Float32[Array, "B N"]) -> Float[Array, "B N ..."]:
    """Returns what two adapters add to x W: the common one, and the dial at each row's setting.

    The common one has a gradient from positions at setting 0 alone, the dial from all others.
    """
    trains = (settings == 0).astype(x.dtype).reshape(*settings.shape, *[1] * (x.ndim - 2))
    held = change(x, *jax.lax.stop_gradient(common), scale)
    learnt = change(jax.lax.stop_gradient(x) * trains, *common, scale)      # for its gradient alone
    return held + learnt - jax.lax.stop_gradient(learnt) + change(x, *dial, scale * settings)


def merge_layer(adapter: Adapter, layer: Params, setting: Float[Array, ""] | None = None) -> Params:
    """Returns one layer's weights with the adapters added to them, in the weights' dtypes.

    Args:
        setting: of the dial, if there is one.
    """
    def product(name: str, parts: tuple[str, str]) -> Float32[Array, "..."]:
        a, b = (layer[name + part].astype(jnp.float32) for part in parts)
        return jnp.tensordot(a, b, 1)

    merged = {name: weight for name, weight in layer.items() if not name.endswith(SUFFIXES)}
    for name in adapter.targets:
        if name + A in layer:
            weight, added = layer[name], product(name, (A, B))
            if setting is not None:
                added = added + setting * product(name, (DIAL_A, DIAL_B))
            merged[name] = (weight.astype(jnp.float32) + adapter.scale * added).astype(weight.dtype)
    return merged


def merge(adapter: Adapter, params: Params) -> Params:
    """Returns weights without adapters that compute the same, stacked over layers.

    One layer after another: the float32 sums of all layers would be as large as the model."""
    setting, (frozen, pairs) = params.get(SETTING), split(params)
    layers = dict(frozen["layers"])
    for name in adapter.targets:
        if name + A in pairs["layers"]:
            parts = {name: layers[name]} | {key: pairs["layers"][key] for key in (
                name + suffix for suffix in SUFFIXES) if key in pairs["layers"]}
            layers |= jax.lax.map(lambda layer: merge_layer(adapter, layer, setting), parts)
    return {name: leaf for name, leaf in params.items() if name != SETTING} | {"layers": layers}


def fit(adapter: Adapter, stored: Params, initial: Params) -> Params:
    """Returns adapters of the shape of `initial` that compute what the stored ones do.

    A stored column of A that is zero adds nothing; it is replaced by the one in `initial`, with
    zeros in B: otherwise neither would ever have a gradient.

    Args:
        adapter: of `initial`.
        stored: of the same or a lower rank and the same or fewer targets, with the scale in B.
        initial: as `model.init` makes them, with B zero."""
    fitted = dict(initial["layers"])
    for name in (name.removesuffix(A) for name in stored["layers"] if name.endswith(A)):
        a, b = fitted[name + A], fitted[name + B]
        stored_a, stored_b = stored["layers"][name + A], stored["layers"][name + B] / adapter.scale
        rank, inputs = stored_a.shape[-1], tuple(range(1, stored_a.ndim - 1))
        is_used = jnp.any(stored_a != 0, axis=inputs)       # [L, rank]
        of_a = is_used.reshape(len(is_used), *[1] * len(inputs), rank)
        of_b = is_used.reshape(*is_used.shape, *[1] * (b.ndim - 2))
        fitted[name + A] = a.at[..., :rank].set(jnp.where(of_a, stored_a, a[..., :rank]))
        fitted[name + B] = b.at[:, :rank].set(jnp.where(of_b, stored_b, 0.0))
    return initial | {"layers": fitted}


def split(params: Params) -> tuple[Params, Params]:
    """Returns the weights without adapters, and the adapters: {"layers": {name: [L, ...]}}."""
    layers = params["layers"]
    adapters = {name: leaf for name, leaf in layers.items() if name.endswith(SUFFIXES)}
    frozen = {name: leaf for name, leaf in layers.items() if name not in adapters}
    return params | {"layers": frozen}, {"layers": adapters}


def join(frozen: Params, adapters: Params) -> Params:
    """Returns one tree of frozen weights and adapters."""
    return frozen | {"layers": frozen["layers"] | adapters["layers"]}
