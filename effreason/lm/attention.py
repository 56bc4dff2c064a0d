"""Attention of whole packed rows, in training: four implementations of one rule, on one device or on a mesh.

A position sees itself and what stands before it in its own sequence. Several sequences are packed into a row; where
the row is split over the mesh axis `context`, its columns are dealt out in zig-zag order (`zigzag`), so that every
shard has the same share of the causal work, and keys and values are gathered.
B rows, N positions, n of them on this device, H query heads, K key/value heads, R = H / K, h head width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from effreason.lm import kv_cache
from effreason.runtime.errors import UserError
from effreason.runtime.sharding import AXES, spec

IMPLEMENTATIONS = ("xla", "blockwise", "splash", "cudnn")
SAVED = "attention"     # the name under which a rematerialisation policy finds what a backward pass needs of the result
XLA_LENGTH = 1024       # positions, up to which whole rows of scores are held: longer ones cost more than tiles
XLA_PIECE, XLA_PIECES = 64, 8           # queries that see the same keys: at least so many, and at most so many parts
BLOCK = 256             # positions: the side of a tile of scores
SPLASH_BLOCK, LANES = 512, 128          # the same on a TPU, at most and at least


def zigzag(length: int, parts: int) -> np.ndarray:
    """The place in the row of each column, for rows that are split over `parts` shards.

    Of 2 * parts chunks the shard i holds chunk i and chunk 2 * parts - 1 - i: an early one, with few keys to see, and
    a late one. parts = 1 is the row as it is.
    Returns: int32[N]. Raises: UserError unless 2 * parts divides the length."""
    if parts == 1:
        return np.arange(length, dtype=np.int32)
    if length % (2 * parts):
        raise UserError(f"a row has {length} positions, mesh.context {parts} expects a multiple of {2 * parts}")
    chunks = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    return np.stack([chunks[:parts], chunks[: parts - 1 : -1]], axis=1).reshape(-1)


def choose_attention(platform: str, *, head_dim: int, dtype: Any, length: int, context: int = 1) -> str:
    """The implementation for a machine and a row: its kernel where that fits, else XLA's, blockwise for long rows.

    Args: platform, of a device: "cpu", "gpu" or "tpu"; length, positions of a row; context, shards of a row."""
    kernel = {"tpu": "splash", "gpu": "cudnn"}.get(platform)
    if kernel and not unsupported_reason(kernel, platform, head_dim=head_dim, dtype=dtype, length=length, context=context):
        return kernel
    return "xla" if length <= XLA_LENGTH else "blockwise"


def unsupported_reason(implementation: str, platform: str, *, head_dim: int, dtype: Any, length: int,
           context: int = 1) -> str | None:
    """Why an implementation cannot serve this model on this machine, in words for a user; None where it can."""
    name = jnp.dtype(dtype).name
    if implementation == "splash":
        facts = [("platform", platform, platform == "tpu", "tpu"),
                 ("head_dim", head_dim, head_dim % 64 == 0, "a multiple of 64"),
                 ("the length of a row", length, length % (context * LANES) == 0, f"a multiple of {context * LANES}")]
    elif implementation == "cudnn":
        facts = [("platform", platform, platform == "gpu", "gpu"),
                 ("dtype", name, name in ("bfloat16", "float16"), "bfloat16 or float16"),
                 ("head_dim", head_dim, head_dim <= 128 and head_dim % 8 == 0, "a multiple of 8, at most 128"),
                 ("mesh.context", context, context == 1, "1")]
    else:
        return None
    return next((f"{fact} is {found}, {implementation} attention expects {expected}"
                 for fact, found, fits, expected in facts if not fits), None)


def one_sequence_per_row(implementation: str) -> bool:
    """Whether rows must not be packed: cuDNN knows a row's length, not its sequences."""
    return implementation == "cudnn"


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None, *,
                     implementation: str) -> jax.Array:
    """Every position attends to itself and what stands before it in its sequence; softmax in float32.

    Args: query [B, N, H, h]; key, value [B, N, K, h]; segments int32[B, N], which sequence of its row a position
        belongs to, from 1, 0 = padding; implementation, one of IMPLEMENTATIONS. Under a mesh whose axis `context` is
        longer than 1, columns stand in the order of `zigzag`. None: one sequence in each row, in order, by XLA.
    Returns: [B, N, H, h], 0 at padding, which passes on no gradient either."""
    if segments is None:
        return kv_cache.causal_attention(query, key, value)
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention is {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        order, _ = _order(implementation, query.shape[1], mesh)
        mixed = _attend(implementation, query, key, value, segments, segments, order)
    else:
        mixed = _on_mesh(implementation, query, key, value, segments, mesh)
    if implementation in ("xla", "blockwise"):      # Splash names its own; cuDNN's backward needs more than the result
        mixed = checkpoint_name(mixed, SAVED)
    return jnp.where(segments[:, :, None, None] > 0, mixed, 0)


def _on_mesh(implementation: str, query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array,
             mesh: Any) -> jax.Array:
    """Each device attends for its own rows, heads and columns: the partitioner cannot see into a kernel or a scan."""
    parts = mesh.shape[AXES["sequence"]]
    if parts > 1 and implementation == "cudnn":
        raise UserError(f"mesh.context is {parts}, cudnn attention expects 1")
    order, order_spec = _order(implementation, query.shape[1], mesh)

    def local(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, order: Any) -> jax.Array:
        key, value, key_segments = (_row_order(x, parts) for x in (key, value, segments))
        return _attend(implementation, query, key, value, segments, key_segments, order)

    heads, kv_heads = (spec("batch", "sequence", axis, "head_dim") for axis in ("heads", "kv_heads"))
    return jax.shard_map(local, in_specs=(heads, kv_heads, kv_heads, spec("batch", "sequence"), order_spec),
                         out_specs=heads, check_vma=implementation in ("xla", "blockwise"))(
        query, key, value, segments, order)


def _row_order(x: jax.Array, parts: int) -> jax.Array:
    """The columns [B, n, ...] of all context shards, as they stand in the row: [B, N, ...]."""
    if parts == 1:
        return x
    gathered = jax.lax.all_gather(x, AXES["sequence"], axis=1)      # [B, parts, n, ...]
    half = x.shape[1] // 2
    chunks = jnp.concatenate([gathered[:, :, :half], gathered[:, ::-1, half:]], axis=1)
    return chunks.reshape(x.shape[0], -1, *x.shape[2:])


def _order(implementation: str, length: int, mesh: Any) -> tuple[Any, Any]:
    """What tells an implementation where its columns stand in the row, and how that is split over the mesh.

    None: the columns are the row. Else int32[N], of which a shard gets the n places of its own; for Splash its kernel,
    which holds the blocks of the mask that each shard computes."""
    parts = 1 if mesh.empty else mesh.shape[AXES["sequence"]]
    if implementation == "splash":
        kernel = _splash_kernel(length, parts)
        if mesh.empty:
            return kernel, None
        return kernel, kernel.manual_sharding_spec(NamedSharding(mesh, spec("width", "sequence")))
    if parts == 1:
        return None, None
    return jnp.asarray(zigzag(length, parts)), spec("sequence")


def _attend(implementation: str, query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array,
            key_segments: jax.Array, order: Any) -> jax.Array:
    """Queries [B, n, H, h] of one device, to keys and values [B, N, K, h] in the order of the row."""
    if implementation == "cudnn":
        return _cudnn(query, key, value, segments)
    if implementation == "splash":
        return _splash(query, key, value, segments, key_segments, order)
    return (_xla if implementation == "xla" else _blockwise)(query, key, value, segments, key_segments, order)


def _grouped(query: jax.Array, kv_heads: int) -> jax.Array:
    """[B, n, H, h] to [B, K, R * n, h], divided by sqrt(h): the queries that read the same keys, as one matrix."""
    rows, _, _, head_dim = query.shape
    scaled = query * (1 / math.sqrt(head_dim))
    return scaled.transpose(0, 2, 1, 3).reshape(rows, kv_heads, -1, head_dim)


def _ungrouped(mixed: jax.Array, length: int) -> jax.Array:
    """[B, K, R * n, h] to [B, n, H, h]."""
    rows, _, _, head_dim = mixed.shape
    return mixed.reshape(rows, -1, length, head_dim).transpose(0, 2, 1, 3)


def _visible(segments: jax.Array, key_segments: jax.Array, places: jax.Array, key_places: jax.Array) -> jax.Array:
    """bool[..., n, N]. Padding is a segment too, so that every position sees one at least: no softmax is empty."""
    return (segments[..., :, None] == key_segments[..., None, :]) & (places[:, None] >= key_places[None, :])


def _xla(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, key_segments: jax.Array,
         places: jax.Array | None) -> jax.Array:
    """The masked softmax over whole rows of scores.

    Where the columns are the row, queries go in pieces, each with the keys up to its end: the others are not seen."""
    length = query.shape[1]
    if places is not None:
        return _softmax(query, key, value, _visible(segments, key_segments, places, jnp.arange(key.shape[1])))
    columns = jnp.arange(length)
    piece = max(XLA_PIECE, -(-length // XLA_PIECES))
    pieces = []
    for start in range(0, length, piece):
        own, seen = slice(start, start + piece), slice(0, start + piece)
        visible = _visible(segments[:, own], key_segments[:, seen], columns[own], columns[seen])
        pieces.append(_softmax(query[:, own], key[:, seen], value[:, seen], visible))
    return jnp.concatenate(pieces, axis=1)


def _softmax(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array) -> jax.Array:
    rows, length, heads, _ = query.shape
    kv_heads = key.shape[2]
    scores = jnp.einsum("bkqh,bskh->bkqs", _grouped(query, kv_heads), key, preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, kv_heads, heads // kv_heads, length, -1)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    # The largest score only keeps exp in range. Dividing after the product divides h numbers a query, not N.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1).reshape(rows, kv_heads, -1, 1)
    weights = weights.astype(query.dtype).reshape(rows, kv_heads, heads // kv_heads * length, -1)
    mixed = jnp.einsum("bkqs,bskh->bkqh", weights, value, preferred_element_type=jnp.float32) / total
    return _ungrouped(mixed, length).astype(query.dtype)


def _blockwise(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, key_segments: jax.Array,
               places: jax.Array | None) -> jax.Array:
    """Tile by tile, with a running maximum and sum: memory grows with the row, not with its square.

    Rows go one by one, so that each leaves out the tiles in which it has nothing to see. Source: arXiv 2205.14135."""
    if places is None:
        places = jnp.arange(query.shape[1])
    block = min(BLOCK, key.shape[1])

    def tiles(x: jax.Array, fill: int = 0) -> jax.Array:
        filled = jnp.pad(x, [(0, -len(x) % block)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        return filled.reshape(-1, block, *x.shape[1:])

    def row(arrays: tuple[jax.Array, ...]) -> jax.Array:
        query, key, value, segments, key_segments = arrays
        keys = tiles(key), tiles(value), tiles(key_segments, -1)        # -1: no query's
        first = jnp.arange(len(keys[0]), dtype=jnp.int32) * block
        of_queries = jax.checkpoint(functools.partial(_tiles_of_queries, keys=(*keys, first)), prevent_cse=False)
        mixed = jax.lax.map(of_queries, (tiles(query), tiles(segments), tiles(places)))
        return mixed.reshape(-1, *query.shape[1:])[: len(query)]

    return jax.lax.map(row, (query, key, value, segments, key_segments))


def _tiles_of_queries(queries: tuple[jax.Array, ...], keys: tuple[jax.Array, ...]) -> jax.Array:
    """One block of queries to all keys, [block, H, h].

    Args: queries, [block, H, h], their segments and places int32[block]; keys, of all blocks: keys and values
        [blocks, block, K, h], segments int32[blocks, block], the first place of each int32[blocks]."""
    query, segments, places = queries
    grouped = _grouped(query[None], keys[0].shape[2])[0]                        # [K, R * block, h]

    def tile(carry: tuple[jax.Array, ...], keys: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], None]:
        key, value, key_segments, first = keys
        reached = ((first <= jnp.max(places)) & (jnp.min(segments) <= jnp.max(key_segments))
                   & (jnp.min(key_segments) <= jnp.max(segments)))

        def attended(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            mixed, total, top = carry
            visible = _visible(segments, key_segments, places, first + jnp.arange(len(key)))
            visible = jnp.tile(visible, (query.shape[1] // key.shape[1], 1))    # [R * block, block]
            scores = jnp.einsum("kqh,skh->kqs", grouped, key, preferred_element_type=jnp.float32)
            scores = jnp.where(visible, scores, -1e30)      # finite: a tile may hold nothing that a query sees
            new_top = jax.lax.stop_gradient(jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True)))
            weights = jnp.where(visible, jnp.exp(scores - new_top), 0)
            kept = jnp.exp(top - new_top)
            product = jnp.einsum("kqs,skh->kqh", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
            return mixed * kept + product, total * kept + jnp.sum(weights, axis=-1, keepdims=True), new_top

        return jax.lax.cond(reached, attended, lambda carry: carry, carry), None

    zeros = jnp.zeros_like(grouped, jnp.float32)            # "like": they vary over the mesh as the queries do
    start = zeros, zeros[..., :1], zeros[..., :1] - 1e30
    (mixed, total, _), _ = jax.lax.scan(jax.checkpoint(tile, prevent_cse=False), start, keys)
    mixed = mixed / jnp.where(total > 0, total, 1)          # nothing is seen where the last block was filled up
    return _ungrouped(mixed[None], len(query))[0].astype(query.dtype)


def _splash_kernel(length: int, parts: int) -> Any:
    """JAX's Splash kernel for the causal mask of a row whose columns stand in zig-zag order: a tree of arrays.

    It computes the mask from the places of its queries; which blocks are empty is found out here, for all heads at
    once: seconds for 32k positions, the first time."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if length % (parts * LANES):
        raise UserError(f"a row has {length} positions, splash attention expects a multiple of {parts * LANES}")
    queries, keys = (min(x & -x, SPLASH_BLOCK) for x in (length // parts, length))     # a power of two that divides it
    sizes = kernels.BlockSizes(block_q=queries, block_kv=keys, block_q_dkv=queries, block_kv_dkv=keys,
                               block_q_dq=queries, block_kv_dq=keys)
    mask = masks.CausalMask((length, length))
    mask.q_sequence = zigzag(length, parts)
    return kernels.make_splash_mha(masks.MultiHeadMask([mask]), block_sizes=sizes, head_shards=1, q_seq_shards=parts,
                                   residual_checkpoint_name=SAVED)


def _splash(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, key_segments: jax.Array,
            kernel: Any) -> jax.Array:
    """Splash attention on a TPU; it does not scale the scores."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    query = query * (1 / math.sqrt(query.shape[-1]))
    heads_first = (x.swapaxes(1, 2) for x in (query, key, value))
    return jax.vmap(kernel)(*heads_first, kernels.SegmentIds(q=segments, kv=key_segments)).swapaxes(1, 2)


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """cuDNN's fused attention on a GPU, of one sequence a row: `segments` is 1 there and 0 behind it."""
    lengths = jnp.maximum(jnp.sum(segments > 0, axis=1, dtype=jnp.int32), 1)    # a row of padding alone must be finite
    # What cuDNN writes behind a row's length is not stated: nothing of it may reach the gradients.
    query, key, value = (jnp.where(segments[:, :, None, None] > 0, x, 0) for x in (query, key, value))
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, query_seq_lengths=lengths,
                                        key_value_seq_lengths=lengths, implementation="cudnn")
