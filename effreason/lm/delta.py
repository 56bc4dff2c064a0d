"""The gated delta rule: layers that keep a state of fixed size instead of keys and values.

Each value head has a state, a matrix that maps keys to values. A position lets it fade, moves what
it returns for the position's key towards the position's value, and reads it with its query. Before
that, a short convolution mixes every entry of query, key and value with those of the positions
before.

B rows, N positions, Hk heads of queries and keys, Hv of values, of which several share a key, h
width of queries and keys, v of values, W positions that the convolution reads.

Source: arXiv 2412.06464; chunks of positions as matrix products: arXiv 2406.06484.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from effreason.lm.attention import column_order, gather_row
from effreason.runtime.sharding import AXES, spec

Streams = tuple[Float[Array, "B N Hk h"], Float[Array, "B N Hk h"], Float[Array, "B N Hv v"]]
Taps = tuple[Float[Array, "Hk h W"], Float[Array, "Hk h W"], Float[Array, "Hv v W"]]
LayerState = dict[str, jax.Array]

CHUNK = 64                          # positions that are computed at once
STREAMS = ("query", "key", "value")
# The logical axes of what a layer keeps of a sequence: its state, and the newest inputs of the
# convolution.
STATE_AXES: dict[str, tuple[str, ...]] = {
    "state": ("batch", "heads", "head_dim", "head_dim"),
    "query": ("batch", "taps", "kv_heads", "head_dim"),
    "key": ("batch", "taps", "kv_heads", "head_dim"),
    "value": ("batch", "taps", "heads", "head_dim")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaShape:
    """The shape of such a layer."""

    key_heads: int
    value_heads: int                # a multiple of the key heads
    key_dim: int                    # width of a query or key head
    value_dim: int
    taps: int                       # W

    @property
    def streams(self) -> tuple[tuple[int, int], ...]:
        """Heads and their width, of query, key and value."""
        keys = self.key_heads, self.key_dim
        return keys, keys, (self.value_heads, self.value_dim)


def empty_state(shape: DeltaShape, dtype: DTypeLike, rows: int) -> LayerState:
    """Returns what a layer keeps of sequences that have not begun; the state itself is float32."""
    state = jnp.zeros((rows, shape.value_heads, shape.key_dim, shape.value_dim), jnp.float32)
    return {"state": state} | {name: jnp.zeros((rows, shape.taps - 1, *heads), dtype)
                               for name, heads in zip(STREAMS, shape.streams, strict=True)}


def mix_rows(streams: Streams, taps: Taps, log_decay: Float32[Array, "B N Hv"],
             beta: Float32[Array, "B N Hv"],
             segments: Int[Array, "B N"] | None) -> Float32[Array, "B N Hv v"]:
    """Computes whole packed rows, for training.

    If the mesh splits rows, each device computes its rows whole and keeps its own columns: a state
    goes from position to position.

    Args:
        streams: Query, key and value, before the convolution.
        taps: The weights of the convolution, those of a position itself last.
        log_decay: The logarithm of the share of the state that stays, <= 0.
        beta: How far the state moves towards the value, from 0 to 1.
        segments: Which sequence of its row a position belongs to, from 1; 0 = padding. Each begins
            with an empty state. Columns are ordered as in `attention.causal_attention`. None = one
            sequence per row, in order.

    Returns:
        What the queries read. Padding is 0 and passes no gradient."""
    if segments is None:
        return _whole_rows(streams, taps, log_decay, beta, jnp.ones(beta.shape[:2], jnp.int32))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        mixed = _whole_rows(streams, taps, log_decay, beta, segments)
    else:
        mixed = _mix_on_mesh(streams, taps, log_decay, beta, segments, mesh.shape[AXES["sequence"]])
    return jnp.where(segments[:, :, None, None] > 0, mixed, 0)


def _mix_on_mesh(streams: Streams, taps: Taps, log_decay: Array, beta: Array,
                 segments: Int[Array, "B N"], parts: int) -> Float32[Array, "B N Hv v"]:
    """Computes on each device its own rows and heads.

    Args:
        parts: Of a row."""
    def local(streams: Streams, taps: Taps, log_decay: Array, beta: Array, segments: Array,
              columns: Array) -> Array:
        rows = jax.tree.map(lambda x: gather_row(x, parts), (streams, log_decay, beta, segments))
        mixed = _whole_rows(rows[0], taps, *rows[1:])
        return mixed if parts == 1 else mixed[:, columns]

    heads = [(axis, "head_dim") for axis in ("kv_heads", "kv_heads", "heads")]
    streams_spec = tuple(spec("batch", "sequence", *axes) for axes in heads)
    numbers = spec("batch", "sequence", "heads")
    return jax.shard_map(
        local, out_specs=streams_spec[2], check_vma=False,
        in_specs=(streams_spec, tuple(spec(*axes, "taps") for axes in heads), numbers, numbers,
                  spec("batch", "sequence"), spec("sequence")))(
        streams, taps, log_decay, beta, segments, jnp.asarray(column_order(segments.shape[1])))


def _whole_rows(streams: Streams, taps: Taps, log_decay: Array, beta: Array,
                segments: Int[Array, "B N"]) -> Float32[Array, "B N Hv v"]:
    query, key, value = (
        convolve(x, weights, jnp.zeros((len(x), weights.shape[-1] - 1, *x.shape[2:]), x.dtype),
                 segments) for x, weights in zip(streams, taps, strict=True))
    state = jnp.zeros((len(value), value.shape[2], key.shape[-1], value.shape[-1]), jnp.float32)
    return mix(query, key, value, log_decay, beta, state, segments)[0]


def extend(streams: Streams, taps: Taps, log_decay: Float32[Array, "B T Hv"],
           beta: Float32[Array, "B T Hv"], cache: LayerState,
           counts: Int[Array, " B"] | None) -> tuple[Float32[Array, "B T Hv v"], LayerState]:
    """Reads T more positions of each row, for sampling.

    Args:
        streams, log_decay, beta: As in `mix_rows`.
        counts: Of the T positions, how many are the row's; the cache knows nothing of the others.
            None = all.

    Returns:
        What the queries read, and the cache after these positions."""
    length = beta.shape[1]
    if counts is not None:
        is_own = (jnp.arange(length)[None] < counts[:, None])[:, :, None]
        log_decay, beta = (jnp.where(is_own, x, 0) for x in (log_decay, beta))
    query, key, value = (convolve(x, weights, cache[name])
                         for name, x, weights in zip(STREAMS, streams, taps, strict=True))
    mixed, state = mix(query, key, value, log_decay, beta, cache["state"])
    return mixed, {"state": state} | {name: _newest(cache[name], x, counts)
                                      for name, x in zip(STREAMS, streams, strict=True)}


def _newest(before: Float[Array, "B W1 ..."], x: Float[Array, "B T ..."],
            counts: Int[Array, " B"] | None) -> Float[Array, "B W1 ..."]:
    """Returns the last inputs of the convolution after `counts` more of x."""
    joined, kept = jnp.concatenate([before, x], axis=1), before.shape[1]
    if counts is None:
        return joined[:, x.shape[1]:]
    columns = counts[:, None] + jnp.arange(kept)[None]
    return jnp.take_along_axis(joined, columns.reshape(*columns.shape, *[1] * (x.ndim - 2)), axis=1)


def convolve(x: Float[Array, "B N heads h"], taps: Float[Array, "heads h W"],
             before: Float[Array, "B W1 heads h"],
             segments: Int[Array, "B N"] | None = None) -> Float[Array, "B N heads h"]:
    """Returns silu of each entry's weighted sum over the last W positions, its own with them.

    Args:
        before: The W - 1 inputs before these.
        segments: A sequence does not see another one, nor what is in `before`. None = all are
            one."""
    width, length = taps.shape[-1], x.shape[1]
    joined, total = jnp.concatenate([before, x], axis=1), jnp.zeros(x.shape, jnp.float32)
    for tap in range(width):
        part = joined[:, tap : tap + length].astype(jnp.float32)
        if segments is not None and (back := width - 1 - tap):
            earlier = jnp.pad(segments, ((0, 0), (back, 0)), constant_values=-1)[:, :length]
            part = jnp.where((segments == earlier)[:, :, None, None], part, 0)
        total = total + part * taps[None, None, :, :, tap].astype(jnp.float32)
    return jax.nn.silu(total).astype(x.dtype)


def mix(query: Float[Array, "B N Hk h"], key: Float[Array, "B N Hk h"],
        value: Float[Array, "B N Hv v"], log_decay: Float32[Array, "B N Hv"],
        beta: Float32[Array, "B N Hv"], state: Float32[Array, "B Hv h v"],
        segments: Int[Array, "B N"] | None = None,
        ) -> tuple[Float32[Array, "B N Hv v"], Float32[Array, "B Hv h v"]]:
    """Applies the gated delta rule to N positions, one after another or in chunks.

    Queries and keys are divided by their norms, and queries by sqrt(h). Sums are float32. What a
    state reads and gets in a step, and the inverse in a chunk, are products of float32 on every
    chip; other products are those of the model's dtype (`precision.products_of`).

    Args:
        state: Before the first position.
        segments: Consecutive positions of a row with the same number are one sequence. The state is
            that of the first position's. None = all are one sequence.

    Returns:
        What the queries read, and the state after the last position."""
    (rows, length, key_heads, key_dim), heads = query.shape, value.shape[2]
    query, key = (jnp.repeat(x, heads // key_heads, axis=2)
                  for x in (_unit(query) * key_dim**-0.5, _unit(key)))
    value = value.astype(jnp.float32)
    if length == 1:
        mixed, state = _step(query[:, 0], key[:, 0], value[:, 0], log_decay[:, 0], beta[:, 0],
                             state)
        return mixed[:, None], state
    if segments is None:
        segments = jnp.zeros((rows, length), jnp.int32)
    return _chunks(query, key, value, log_decay, beta, state, segments)


def _unit(x: Float[Array, "... h"]) -> Float32[Array, "... h"]:
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)


def _step(query: Float32[Array, "B Hv h"], key: Float32[Array, "B Hv h"],
          value: Float32[Array, "B Hv v"], log_decay: Float32[Array, "B Hv"],
          beta: Float32[Array, "B Hv"], state: Float32[Array, "B Hv h v"],
          ) -> tuple[Float32[Array, "B Hv v"], Float32[Array, "B Hv h v"]]:
    """Applies the rule to one position."""
    state = state * jnp.exp(log_decay)[..., None, None]
    with jax.default_matmul_precision("highest"):
        recalled = jnp.einsum("bnhv,bnh->bnv", state, key)
        change = beta[..., None] * (value - recalled)
        state = state + key[..., None] * change[:, :, None]
        return jnp.einsum("bnhv,bnh->bnv", state, query), state


def _chunks(query: Float32[Array, "B N Hv h"], key: Float32[Array, "B N Hv h"],
            value: Float32[Array, "B N Hv v"], log_decay: Float32[Array, "B N Hv"],
            beta: Float32[Array, "B N Hv"], state: Float32[Array, "B Hv h v"],
            segments: Int[Array, "B N"],
            ) -> tuple[Float32[Array, "B N Hv v"], Float32[Array, "B Hv h v"]]:
    """Applies the rule to chunks of positions.

    In a chunk, the change that position i makes to the state depends on those of positions j < i:
    change_i = beta_i (value_i - faded state before the chunk (key_i)
                       - sum_j fading_ij (key_i . key_j) change_j).
    The equations are solved for all chunks at once, whatever the state before each of them. What is
    left to do one chunk after another are four products."""
    rows, length = segments.shape
    size = min(CHUNK, length)
    padding = -length % size

    def chunked(x: Array) -> Array:
        """Returns [chunks, rows, heads, positions of a chunk, ...]."""
        padded = jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])
        parts = padded.reshape(rows, -1, size, *x.shape[2:])
        return jnp.transpose(parts, (1, 0, 3, 2, *range(4, parts.ndim)))

    # Padding changes nothing: it has no beta, and what comes before it does not fade.
    numbers = jnp.pad(segments, ((0, 0), (0, padding)), mode="edge")
    numbers = jnp.swapaxes(numbers.reshape(rows, -1, size), 0, 1)       # [chunks, rows, positions]
    before = jnp.concatenate([numbers[:1, :, :1], numbers[:-1, :, -1:]])
    goes_on = (numbers == before)[:, :, None]                           # from the chunk before
    stays = (numbers == numbers[:, :, -1:])[:, :, None]                 # until the chunk's end
    is_seen = numbers[:, :, :, None] == numbers[:, :, None, :]
    is_seen = (is_seen & np.tri(size, dtype=bool)[None, None])[:, :, None]

    query, key, value, beta = (chunked(x) for x in (query, key, value, beta[..., None]))
    total = jnp.cumsum(chunked(log_decay), axis=-1)
    last = total[..., -1:]
    fading = jnp.exp(jnp.where(is_seen, total[..., :, None] - total[..., None, :], -jnp.inf))
    since_before = jnp.where(goes_on, jnp.exp(total), 0)[..., None]
    keys = jnp.swapaxes(key, -1, -2)
    inverse = _inverse(beta * fading * (key @ keys))
    parts = (inverse @ (beta * value), inverse @ (beta * since_before * key), query * since_before,
             fading * (query @ keys),
             keys * jnp.where(stays, jnp.exp(last - total), 0)[..., None, :],
             jnp.where(goes_on[..., -1:], jnp.exp(last), 0)[..., None])

    def chunk(state: Array, parts: tuple[Array, ...]) -> tuple[Array, Array]:
        changes, recalls, queries, scores, keys, share = parts
        changes = changes - recalls @ state
        mixed = queries @ state + scores @ changes
        return share * state + keys @ changes, mixed

    state, mixed = jax.lax.scan(chunk, state, parts)
    mixed = jnp.transpose(mixed, (1, 0, 3, 2, 4))
    return mixed.reshape(rows, length + padding, *mixed.shape[3:])[:, :length], state


@jax.custom_vjp
def _inverse(lower: Float32[Array, "... i i"]) -> Float32[Array, "... i i"]:
    """Inverts triangular matrices whose diagonals are 1.

    The inverse of [[A, 0], [C, B]] is [[A', 0], [-B' C A', B']], with those of A and B: from blocks
    of 1 to the whole in log2(i) steps of products, which a mesh can split. (XLA's triangular solve
    waits forever on several CPU devices, next to collectives.) Errors would grow from step to step:
    these products are in float32.

    Args:
        lower: Read below the diagonal."""
    size = lower.shape[-1]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    position = np.arange(size)
    block = 1
    while block < size:
        number = position // block
        # C of the pair of blocks that a row and a column are in.
        is_between = (number[:, None] % 2 == 1) & (number[:, None] - 1 == number[None, :])
        between = jnp.where(is_between.reshape((1,) * (lower.ndim - 2) + (size, size)), lower, 0)
        with jax.default_matmul_precision("highest"):
            inverse = inverse - inverse @ between @ inverse
        block *= 2
    return inverse


def _inverse_forward(lower: Array) -> tuple[Array, Array]:
    inverse = _inverse(lower)
    return inverse, inverse


def _inverse_backward(inverse: Array, grad: Array) -> tuple[Array]:
    transposed = jnp.swapaxes(inverse, -1, -2)
    with jax.default_matmul_precision("highest"):
        return (jnp.tril(-(transposed @ grad @ transposed), -1),)


_inverse.defvjp(_inverse_forward, _inverse_backward)
