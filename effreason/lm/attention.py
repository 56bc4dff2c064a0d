"""Attention over whole packed rows, for training: four implementations, on one device or a mesh.

A position sees itself and earlier positions of its own sequence. A row packs several sequences,
which may share their beginning (`branch`). If rows are split over the mesh axis `context`, their
columns are in zig-zag order, so that every shard has the same share of the causal work, and keys
and values are gathered.

B rows, N positions, n of them on this device, H query heads, K key/value heads, R = H / K, h head
width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from effreason.lm import cudnn
from effreason.lm.kernels import KERNELS, TRAINING, unsupported_reason
from effreason.runtime.errors import UserError
from effreason.runtime.sharding import AXES, spec

Queries = Float[Array, "B n H h"]
Keys = Float[Array, "B N K h"]      # and values

IMPLEMENTATIONS = ("xla", "blockwise", "splash", "cudnn_packed", "cudnn")
CHECKPOINT_NAME = "attention"       # by which a rematerialization policy saves the result
SEES_BRANCHES = ("xla", "blockwise")
BRANCH = 2**16                      # segments are numbered below it, see `branch`
XLA_LENGTH = 1024                   # positions; of longer rows, whole rows of scores cost too much
QUERY_BLOCK, QUERY_BLOCKS = 64, 8   # xla: fewest queries that share their keys; most blocks
TILE = 256                          # blockwise: positions, the side of a tile of scores
SPLASH_TILE = 512                   # splash: the same, at most
# Of a kernel's trial: lengths of the sequences in a row, of the row, the error bfloat16 explains.
TRIAL_SEQUENCES, TRIAL_LENGTH, TRIAL_TOLERANCE = (90, 1, 130), 256, 0.05
TRIAL_WINDOW = 40


def zigzag(length: int, parts: int) -> Int[np.ndarray, " N"]:
    """Returns each column's position in the row, for rows that are split over `parts` shards.

    Of 2 * parts chunks, shard i holds chunk i, whose queries see few keys, and chunk 2 * parts - 1
    - i, whose queries see many. With parts = 1 columns are in the order of the row.

    Raises:
        UserError: 2 * parts does not divide the length."""
    if parts == 1:
        return np.arange(length, dtype=np.int32)
    if length % (2 * parts):
        raise UserError(f"a row has {length} positions, mesh.context {parts} expects a multiple of "
                        f"{2 * parts}")

    chunks = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    return np.stack([chunks[:parts], chunks[: parts - 1 : -1]], axis=1).reshape(-1)


def column_order(length: int) -> Int[np.ndarray, " N"]:
    """Returns each column's position in the row, on the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return zigzag(length, 1 if mesh.empty else mesh.shape[AXES["sequence"]])


def choose_attention(platform: str, *, head_dim: int, dtype: DTypeLike, length: int,
                     context: int = 1, capability: tuple[int, int] | None = None,
                     passes: Callable[[str], bool] = lambda kernel: True) -> str:
    """Returns the implementation for a machine and a row: a kernel if one fits, else XLA's,
    blockwise for long rows.

    Args:
        platform: Of a device: "cpu", "gpu" or "tpu".
        length: Positions of a row.
        context: Shards of a row.
        capability: Compute capability of a GPU.
        passes: Whether a kernel that fits has passed its trial."""
    for kernel in TRAINING:
        reason = unsupported_reason(kernel, platform, head_dim, dtype, context, length, capability)
        if reason is None and passes(kernel):
            return kernel
    return "xla" if length <= XLA_LENGTH else "blockwise"


def branch(segment: int, number: int) -> int:
    """Returns the segment of a sequence that continues another one's last position.

    It sees the positions of `segment` as well as its own. So responses to one prompt can share it.

    Args:
        segment: Of what is continued, from 1.
        number: Of the continuation, from 1; 0 is the beginning itself."""
    return segment + BRANCH * number


def sequences_per_row(implementation: str) -> int | None:
    """Returns how many sequences a row may hold; None = any number."""
    return {"cudnn": 1, "cudnn_packed": cudnn.MOST_SEQUENCES}.get(implementation)


def passes_trial(implementation: str, *, rows: int, heads: int, kv_heads: int, head_dim: int,
                 dtype: DTypeLike, window: int | None = None) -> bool:
    """Whether a kernel compiles here, and agrees with XLA in short rows, in values and gradients.

    Args:
        rows: A multiple of the mesh's batch shards.
        window: Of a layer, see `causal_attention`; in the trial it is shorter."""
    lengths = TRIAL_SEQUENCES[: sequences_per_row(implementation)]
    numbers = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    numbers = np.pad(numbers, (0, TRIAL_LENGTH - len(numbers))).astype(np.int32)
    segments = np.broadcast_to(numbers, (rows, TRIAL_LENGTH))

    def largest_error() -> Float[Array, ""]:
        *arrays, cotangent = (
            jax.random.normal(key, (rows, TRIAL_LENGTH, count, head_dim), dtype) for key, count in
            zip(jax.random.split(jax.random.key(0), 4), (heads, kv_heads, kv_heads, heads),
                strict=True))

        def results(implementation: str) -> list[Array]:
            mixed, pull_back = jax.vjp(lambda query, key, value: causal_attention(
                query, key, value, jnp.asarray(segments), implementation=implementation,
                window=window and TRIAL_WINDOW), *arrays)
            return [x.astype(jnp.float32) for x in (mixed, *pull_back(cotangent))]

        errors = [jnp.max(jnp.abs(one - other)) / jnp.max(jnp.abs(other))
                  for one, other in zip(results(implementation), results("xla"), strict=True)]
        return jnp.max(jnp.stack(errors))

    try:
        return bool(jax.jit(largest_error)() <= TRIAL_TOLERANCE)
    except Exception:       # whatever compilers and drivers raise: the kernel cannot be used
        return False


def causal_attention(query: Float[Array, "B N H h"], key: Keys, value: Keys,
                     segments: Int[Array, "B N"] | None, *, implementation: str,
                     window: int | None = None) -> Float[Array, "B N H h"]:
    """Attends from each position to itself and earlier ones of its sequence; float32 softmax.

    Args:
        segments: Which sequence of its row a position belongs to, from 1; 0 = padding. Those that
            continue another one (`branch`) are for SEES_BRANCHES alone. Under a mesh whose axis
            `context` is longer than 1, columns are in the order of `zigzag`. None = one sequence
            per row, in order.
        implementation: One of IMPLEMENTATIONS; not used if segments is None.
        window: Positions that a query sees at most, its own and those before; None = all. Sequences
            that continue another one have none: in a row they are not next to it.

    Returns:
        The mixed values. Padding is 0 and passes no gradient."""
    if window is not None and window >= query.shape[1]:
        window = None
    if segments is None:
        return jax.nn.dot_product_attention(query, key, value, is_causal=True,
                                            local_window_size=cudnn.local_window(window))
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention is {implementation!r}, expected one of "
                        f"{', '.join(IMPLEMENTATIONS)}")

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        order, _ = _column_order(implementation, query.shape[1], window, mesh)
        mixed = _attend(implementation, query, key, value, segments, segments, order, window)
    else:
        mixed = _attend_on_mesh(implementation, query, key, value, segments, window, mesh)

    # Splash names what it saves itself; cuDNN's backward pass needs more than the result.
    if implementation in ("xla", "blockwise"):
        mixed = checkpoint_name(mixed, CHECKPOINT_NAME)
    return jnp.where(segments[:, :, None, None] > 0, mixed, 0)


def _attend_on_mesh(implementation: str, query: Float[Array, "B N H h"], key: Keys, value: Keys,
                    segments: Int[Array, "B N"], window: int | None,
                    mesh: AbstractMesh) -> Float[Array, "B N H h"]:
    """Attends on each device for its own rows, heads and columns.

    XLA cannot partition a kernel or a scan."""
    parts = mesh.shape[AXES["sequence"]]
    if parts > 1 and implementation.startswith("cudnn"):
        raise UserError(f"mesh.context is {parts}, the {implementation} kernel expects 1")
    order, order_spec = _column_order(implementation, query.shape[1], window, mesh)

    def local(query: Array, key: Array, value: Array, segments: Array, order: Any) -> Array:
        key, value, key_segments = (gather_row(x, parts) for x in (key, value, segments))
        return _attend(implementation, query, key, value, segments, key_segments, order, window)

    heads, kv_heads = (spec("batch", "sequence", axis, "head_dim")
                       for axis in ("heads", "kv_heads"))
    in_specs = heads, kv_heads, kv_heads, spec("batch", "sequence"), order_spec
    check_vma = implementation in ("xla", "blockwise")
    return jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=check_vma)(
        query, key, value, segments, order)


def gather_row(x: Shaped[Array, "B n ..."], parts: int) -> Shaped[Array, "B N ..."]:
    """Gathers the columns of all context shards, in the order of the row."""
    if parts == 1:
        return x
    gathered = jax.lax.all_gather(x, AXES["sequence"], axis=1)      # [B, parts, n, ...]
    half = x.shape[1] // 2
    chunks = jnp.concatenate([gathered[:, :, :half], gathered[:, ::-1, half:]], axis=1)
    return chunks.reshape(x.shape[0], -1, *x.shape[2:])


def _column_order(implementation: str, length: int, window: int | None,
                  mesh: AbstractMesh) -> tuple[Any, Any]:
    """Returns what tells an implementation the positions of its columns, and its sharding.

    None means that the columns are in the order of the row. Otherwise int32[N], of which each shard
    gets its own n. For Splash it is the kernel, which holds the blocks of the mask that each shard
    computes."""
    parts = 1 if mesh.empty else mesh.shape[AXES["sequence"]]
    if implementation == "splash":
        kernel = _splash_kernel(length, parts, window)
        if mesh.empty:
            return kernel, None
        return kernel, kernel.manual_sharding_spec(NamedSharding(mesh, spec("width", "sequence")))
    if parts == 1:
        return None, None
    return jnp.asarray(zigzag(length, parts)), spec("sequence")


def _attend(implementation: str, query: Queries, key: Keys, value: Keys,
            segments: Int[Array, "B n"], key_segments: Int[Array, "B N"], order: Any,
            window: int | None) -> Queries:
    """Attends from the queries of one device to keys and values in the order of the row."""
    if implementation == "cudnn_packed":
        return cudnn.several_sequences(query, key, value, segments, window)
    if implementation == "cudnn":
        return cudnn.one_sequence(query, key, value, segments, window)
    if implementation == "splash":
        return _splash(query, key, value, segments, key_segments, order)
    attend = _xla if implementation == "xla" else _blockwise
    return attend(query, key, value, segments, key_segments, order, window)


def _group_queries(query: Queries, kv_heads: int) -> Float[Array, "B K Rn h"]:
    """Scales queries by 1 / sqrt(h) and stacks those that read the same keys into one matrix."""
    rows, _, _, head_dim = query.shape
    scaled = query * (1 / math.sqrt(head_dim))
    return scaled.transpose(0, 2, 1, 3).reshape(rows, kv_heads, -1, head_dim)


def _ungroup(mixed: Float[Array, "B K Rn h"], length: int) -> Queries:
    rows, _, _, head_dim = mixed.shape
    return mixed.reshape(rows, -1, length, head_dim).transpose(0, 2, 1, 3)


def _visible(segments: Int[Array, "... n"], key_segments: Int[Array, "... N"],
             positions: Int[Array, " n"], key_positions: Int[Array, " N"],
             window: int | None) -> Bool[Array, "... n N"]:
    """Which keys each query sees. Padding is a segment too, so that every query sees a key: no
    softmax is empty."""
    own, seen = segments[..., :, None], key_segments[..., None, :]
    same_sequence = (own == seen) | (own % BRANCH == seen)
    distance = positions[:, None] - key_positions[None, :]
    in_reach = distance >= 0
    if window is not None:
        in_reach &= distance < window
    return same_sequence & jnp.broadcast_to(in_reach, same_sequence.shape)


def _xla(query: Queries, key: Keys, value: Keys, segments: Int[Array, "B n"],
         key_segments: Int[Array, "B N"], positions: Int[Array, " n"] | None,
         window: int | None) -> Queries:
    """Masked softmax over whole rows of scores.

    If columns are in the order of the row, each block of queries gets the keys up to its end, and
    no later ones; with a window, none before it either."""
    length = query.shape[1]
    if positions is not None:
        key_positions = jnp.arange(key.shape[1])
        return _softmax(query, key, value, _visible(segments, key_segments, positions,
                                                    key_positions, window))

    columns = jnp.arange(length)
    block = max(QUERY_BLOCK, -(-length // QUERY_BLOCKS))
    blocks = []
    for start in range(0, length, block):
        first = 0 if window is None else max(start - window + 1, 0)
        own, seen = slice(start, start + block), slice(first, start + block)
        visible = _visible(segments[:, own], key_segments[:, seen], columns[own], columns[seen],
                           window)
        blocks.append(_softmax(query[:, own], key[:, seen], value[:, seen], visible))
    return jnp.concatenate(blocks, axis=1)


def _softmax(query: Queries, key: Keys, value: Keys, visible: Bool[Array, "B n N"]) -> Queries:
    rows, length, heads, _ = query.shape
    kv_heads = key.shape[2]
    grouped = _group_queries(query, kv_heads)
    scores = jnp.einsum("bkqh,bskh->bkqs", grouped, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, kv_heads, heads // kv_heads, length, -1)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)

    # The largest score only keeps exp in range. Dividing after the product divides h numbers per
    # query, not N.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1).reshape(rows, kv_heads, -1, 1)
    weights = weights.astype(query.dtype).reshape(rows, kv_heads, heads // kv_heads * length, -1)
    mixed = jnp.einsum("bkqs,bskh->bkqh", weights, value,
                       preferred_element_type=jnp.float32) / total
    return _ungroup(mixed, length).astype(query.dtype)


def _blockwise(query: Queries, key: Keys, value: Keys, segments: Int[Array, "B n"],
               key_segments: Int[Array, "B N"], positions: Int[Array, " n"] | None,
               window: int | None) -> Queries:
    """Masked softmax tile by tile, with a running maximum and sum.

    Memory grows with the row, not with its square. Rows are computed one after another, so that
    each skips its own tiles without a visible key.
    Source: arXiv 2205.14135."""
    if positions is None:
        positions = jnp.arange(query.shape[1])
    tile = min(TILE, key.shape[1])

    def split(x: Array, padding: int = 0) -> Array:
        """[n, ...] to [tiles, tile, ...]."""
        widths = [(0, -len(x) % tile)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, widths, constant_values=padding).reshape(-1, tile, *x.shape[1:])

    def row(arrays: tuple[Array, ...]) -> Array:
        query, key, value, segments, key_segments = arrays
        keys = split(key), split(value), split(key_segments, -1)        # -1 is no query's segment
        first = jnp.arange(len(keys[0]), dtype=jnp.int32) * tile
        query_tile = jax.checkpoint(functools.partial(_query_tile, keys=(*keys, first),
                                                      window=window), prevent_cse=False)
        mixed = jax.lax.map(query_tile, (split(query), split(segments), split(positions)))
        return mixed.reshape(-1, *query.shape[1:])[: len(query)]

    return jax.lax.map(row, (query, key, value, segments, key_segments))


def _query_tile(queries: tuple[Array, ...], keys: tuple[Array, ...],
                window: int | None) -> Float[Array, "tile H h"]:
    """Attends from one tile of queries to all tiles of keys.

    Args:
        queries: [tile, H, h], their segments and positions int32[tile].
        keys: Of all tiles: keys and values [tiles, tile, K, h], segments int32[tiles, tile], and
            the position of each tile's first key int32[tiles]."""
    query, segments, positions = queries
    grouped = _group_queries(query[None], keys[0].shape[2])[0]                  # [K, R * tile, h]

    def add_tile(carry: tuple[Array, ...], keys: tuple[Array, ...]) -> tuple[tuple[Array, ...],
                                                                             None]:
        key, value, key_segments, first = keys

        def attend(carry: tuple[Array, ...]) -> tuple[Array, ...]:
            mixed, total, running_max = carry
            visible = _visible(segments, key_segments, positions, first + jnp.arange(len(key)),
                               window)
            visible = jnp.tile(visible, (query.shape[1] // key.shape[1], 1))    # [R * tile, tile]
            scores = jnp.einsum("kqh,skh->kqs", grouped, key, preferred_element_type=jnp.float32)
            # Finite: a query may see no key of this tile
            scores = jnp.where(visible, scores, -1e30)
            new_max = jnp.maximum(running_max, jnp.max(scores, axis=-1, keepdims=True))
            new_max = jax.lax.stop_gradient(new_max)
            weights = jnp.where(visible, jnp.exp(scores - new_max), 0)
            shrink = jnp.exp(running_max - new_max)
            product = jnp.einsum("kqs,skh->kqh", weights.astype(value.dtype), value,
                                 preferred_element_type=jnp.float32)
            total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            return mixed * shrink + product, total, new_max

        is_reached = ((first <= jnp.max(positions)) & _overlap(segments % BRANCH,
                                                               key_segments % BRANCH)
                      & (_overlap(segments, key_segments) | (jnp.min(key_segments) < BRANCH)))
        if window is not None:
            is_reached &= first + len(key) > jnp.min(positions) - window + 1
        return jax.lax.cond(is_reached, attend, lambda carry: carry, carry), None

    # zeros_like, so that under shard_map the carry varies over the same mesh axes as the queries.
    zeros = jnp.zeros_like(grouped, jnp.float32)
    start = zeros, zeros[..., :1], zeros[..., :1] - 1e30
    (mixed, total, _), _ = jax.lax.scan(jax.checkpoint(add_tile, prevent_cse=False), start, keys)
    # The padding of the last tile sees no key.
    mixed = mixed / jnp.where(total > 0, total, 1)
    return _ungroup(mixed[None], len(query))[0].astype(query.dtype)


def _overlap(some: Int[Array, " n"], others: Int[Array, " N"]) -> Bool[Array, ""]:
    """Whether the ranges of two lists of numbers overlap."""
    return (jnp.min(some) <= jnp.max(others)) & (jnp.min(others) <= jnp.max(some))


def _splash_kernel(length: int, parts: int, window: int | None) -> Any:
    """Builds JAX's Splash kernel, a tree of arrays, for a row with columns in zig-zag order.

    The kernel computes the mask from the positions of its queries. Which blocks are empty is
    decided here, once for all heads: seconds for 32k positions, the first time."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if length % (unit := parts * KERNELS["splash"].row_multiple):
        raise UserError(f"a row has {length} positions, the splash kernel expects a multiple of "
                        f"{unit}")
    # Tiles are powers of two that divide a shard's queries and the row's keys.
    queries, keys = (min(x & -x, SPLASH_TILE) for x in (length // parts, length))
    sizes = splash.BlockSizes(block_q=queries, block_kv=keys, block_q_dkv=queries,
                              block_kv_dkv=keys, block_q_dq=queries, block_kv_dq=keys)
    mask = (masks.CausalMask((length, length)) if window is None
            else masks.LocalMask((length, length), (window - 1, 0), offset=0))
    mask.q_sequence = zigzag(length, parts)
    return splash.make_splash_mha(masks.MultiHeadMask([mask]), block_sizes=sizes, head_shards=1,
                                  q_seq_shards=parts, residual_checkpoint_name=CHECKPOINT_NAME)


def _splash(query: Queries, key: Keys, value: Keys, segments: Int[Array, "B n"],
            key_segments: Int[Array, "B N"], kernel: Any) -> Queries:
    """Splash attention on a TPU. The kernel does not scale the scores."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    query = query * (1 / math.sqrt(query.shape[-1]))
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))     # heads first
    ids = splash.SegmentIds(q=segments, kv=key_segments)
    return jax.vmap(kernel)(query, key, value, ids).swapaxes(1, 2)
