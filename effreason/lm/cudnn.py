"""cuDNN's fused attention on NVIDIA GPUs, for training rows with one sequence or with several.

For several sequences in a row JAX has no public name, and none with which to trace the kernel for a
GPU that is only described. `private_module` is the one place that reaches for what has none.

B rows, N positions, M sequences of a row at most, H query heads, K key/value heads, h head width.
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Of cuDNN itself: the oldest that JAX expects with CUDA 13.
DESCRIBED_VERSION = 91200
# Of JAX: before, packed rows were silently wrong if heads share keys (github.com/jax-ml/jax#39521).
PACKING_VERSION = (0, 11, 2)
PACKING_CAPABILITY = (9, 0)         # of the GPU: Hopper
# M. The kernel's results and its grid grow with it, whether or not a row holds so many.
MOST_SEQUENCES = 16


def private_module() -> Any | None:
    """Returns the module of JAX that calls cuDNN; None if this JAX has another one."""
    try:
        module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    except ImportError:
        return None
    names = ("check_cudnn_version", "check_compute_capability", "dot_product_attention", "MaskType")
    return module if all(hasattr(module, name) for name in names) else None


def capability(device: Any) -> tuple[int, int] | None:
    """Returns a GPU's compute capability; None for other devices."""
    text = getattr(device, "compute_capability", None)
    if text is None:
        return None
    major, _, minor = str(text).partition(".")
    return int(major), int(minor or 0)


def can_pack() -> bool:
    """Returns whether this JAX computes rows of several sequences, and correctly."""
    return jax.__version_info__ >= PACKING_VERSION and private_module() is not None


@contextlib.contextmanager
def described(capability: tuple[int, int]) -> Iterator[None]:
    """Has JAX trace the kernels for a GPU of this compute capability, although none is present."""
    module = private_module()
    if module is None:
        yield
        return

    def has_capability(needed: str) -> bool:
        return capability >= tuple(map(int, needed.split(".")))

    with (mock.patch.object(module, "check_cudnn_version", lambda: DESCRIBED_VERSION),
          mock.patch.object(module, "check_compute_capability", has_capability)):
        yield


def one_sequence(query: Float[Array, "B N H h"], key: Float[Array, "B N K h"],
                 value: Float[Array, "B N K h"], segments: Int[Array, "B N"],
                 window: int | None) -> Float[Array, "B N H h"]:
    """Attends in rows of one sequence.

    Args:
        segments: 1; 0 at padding.
        window: Positions that a query sees at most; None = all."""
    # At least 1: a row that is all padding must give finite values.
    lengths = jnp.maximum(jnp.sum(segments > 0, axis=1, dtype=jnp.int32), 1)
    return jax.nn.dot_product_attention(*_without_padding(segments, query, key, value),
                                        is_causal=True, query_seq_lengths=lengths,
                                        key_value_seq_lengths=lengths, implementation="cudnn",
                                        local_window_size=local_window(window))


def local_window(window: int | None) -> tuple[int, int] | None:
    """Returns a window as JAX counts it: positions before and after a query, without its own."""
    return None if window is None else (window - 1, 0)


def several_sequences(query: Float[Array, "B N H h"], key: Float[Array, "B N K h"],
                      value: Float[Array, "B N K h"], segments: Int[Array, "B N"],
                      window: int | None) -> Float[Array, "B N H h"]:
    """Attends in rows of up to MOST_SEQUENCES sequences.

    Args:
        segments: 1, 2, ... in the order of the row; 0 at the padding after them.
        window: Positions that a query sees at most; None = all."""
    module = private_module()
    assert module is not None
    lengths, starts = sequence_bounds(segments, MOST_SEQUENCES)
    return module.dot_product_attention(
        *_without_padding(segments, query, key, value), q_seqlen=lengths, kv_seqlen=lengths,
        q_offsets=starts, kv_offsets=starts, scale=1 / np.sqrt(query.shape[-1]),
        mask_type=module.MaskType.PADDING_CAUSAL, sliding_window_length=window)


def sequence_bounds(segments: Int[Array, "B N"],
                    most: int) -> tuple[Int[Array, "B M"], Int[Array, "B M+1"]]:
    """Returns the length of each sequence of a row, and where it starts; -1 for those there are
    not."""
    numbers = jnp.arange(1, most + 1, dtype=segments.dtype)
    lengths = jnp.sum(segments[:, None] == numbers[None, :, None], axis=2, dtype=jnp.int32)
    starts = jnp.cumsum(lengths, axis=1) - lengths
    exists = lengths > 0
    starts = jnp.pad(jnp.where(exists, starts, -1), ((0, 0), (0, 1)), constant_values=-1)
    return jnp.where(exists, lengths, -1), starts


def _without_padding(segments: Int[Array, "B N"], *arrays: Array) -> list[Array]:
    """Replaces padding by 0: what cuDNN writes there is not specified, and must not reach the
    gradients."""
    return [jnp.where(segments[:, :, None, None] > 0, x, 0) for x in arrays]
