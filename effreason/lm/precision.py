"""What a product of float32 arrays is on a chip."""

import contextlib

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def products_of(dtype: DTypeLike) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which products of float32 arrays are those of float32.

    Otherwise a TPU rounds their factors to bfloat16, a GPU to TF32. In other dtypes, and on a CPU,
    it changes nothing."""
    if jnp.dtype(dtype) == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()
