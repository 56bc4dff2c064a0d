"""The attention kernels, and what each needs from the device, the model and the mesh. XLA does
everything else."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effreason.lm import cudnn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requirement:
    """What a kernel needs."""

    platform: str                       # of a device: "tpu" or "gpu"
    head_dim_multiple: int              # divides the head width
    max_head_dim: int | None = None     # None = no limit
    dtypes: tuple[str, ...] = ()        # of queries, keys and values; () = any
    row_multiple: int = 1               # divides the positions of each shard of a training row
    splits_rows: bool = False           # rows may be split over the mesh axis `context`
    capability: tuple[int, int] = (0, 0)        # compute capability of a GPU, at least
    packs: bool = False                 # needs a JAX that packs rows for cuDNN


KERNELS = {
    "splash": Requirement(platform="tpu", head_dim_multiple=64, row_multiple=128, splits_rows=True),
    "paged": Requirement(platform="tpu", head_dim_multiple=128, dtypes=("bfloat16",)),
    "cudnn": Requirement(platform="gpu", head_dim_multiple=8, max_head_dim=128,
                         dtypes=("bfloat16", "float16")),
}
KERNELS["cudnn_packed"] = dataclasses.replace(KERNELS["cudnn"], packs=True,
                                              capability=cudnn.PACKING_CAPABILITY)
TRAINING, DECODING = ("splash", "cudnn_packed", "cudnn"), ("paged", "cudnn")


def unsupported_reason(name: str, platform: str, head_dim: int, dtype: DTypeLike, context: int = 1,
                       length: int | None = None,
                       capability: tuple[int, int] | None = None) -> str | None:
    """Returns why a kernel cannot run, in words for a user.

    None if it can, or if `name` is not a kernel.

    Args:
        platform: Of a device: "cpu", "gpu" or "tpu".
        dtype: Of queries, keys and values.
        context: Shards of a row.
        length: Positions of a training row; None when decoding.
        capability: Compute capability of a GPU; None if it is not known."""
    if name not in KERNELS:
        return None
    needs, dtype_name = KERNELS[name], jnp.dtype(dtype).name

    dtypes = needs.dtypes or (dtype_name,)
    unit, limit = needs.row_multiple * context, needs.max_head_dim
    head_dims = f"a multiple of {needs.head_dim_multiple}"
    if limit is not None:
        head_dims += f", at most {limit}"

    is_multiple = head_dim % needs.head_dim_multiple == 0
    facts = [
        ("platform", platform, platform == needs.platform, needs.platform),
        ("dtype", dtype_name, dtype_name in dtypes, " or ".join(dtypes)),
        ("head_dim", head_dim, is_multiple and head_dim <= (limit or head_dim), head_dims),
        ("mesh.context", context, context == 1 or needs.splits_rows, "1"),
        ("the length of a row", length, (length or 0) % unit == 0, f"a multiple of {unit}"),
        ("compute capability", _dotted(capability), (capability or (0, 0)) >= needs.capability,
         f"at least {_dotted(needs.capability)}"),
        ("jax", jax.__version__, not needs.packs or cudnn.can_pack(),
         f"{'.'.join(map(str, cudnn.PACKING_VERSION))} or newer"),
    ]
    return next((f"{fact} is {value}, the {name} kernel expects {expected}"
                 for fact, value, fits, expected in facts if not fits), None)


def _dotted(capability: tuple[int, int] | None) -> str:
    return "unknown" if capability is None else ".".join(map(str, capability))


def first_supported(names: Sequence[str], platform: str, head_dim: int, dtype: DTypeLike,
                    context: int = 1, length: int | None = None) -> str | None:
    """Returns the first of some kernels that can run; Args as in `unsupported_reason`."""
    for name in names:
        if unsupported_reason(name, platform, head_dim, dtype, context, length) is None:
            return name
    return None
