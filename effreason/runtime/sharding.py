"""The device mesh, and the one table from logical axes to mesh axes.

Every array of the program is named by logical axes ("batch", "heads", ...); the table says which
mesh axes carry them. A name that is not in the table is a KeyError, so a misspelt axis never means
"replicated".
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from effreason.runtime.errors import UserError

# A tree of shardings, in the shape of the tree that it places. Python's types cannot say of which
# tree, so it is Any to mypy.
Shardings: TypeAlias = Any
AnyMesh: TypeAlias = Mesh | AbstractMesh

MESH_AXES = ("data", "fsdp", "tensor", "context")

AXES: dict[str, Any] = {
    "batch": ("data", "fsdp"),      # rows of a batch, slots of the sampler
    "sequence": "context",
    "embed": "fsdp",                # the D axis of weights
    "width": None,                  # the D axis of activations
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": "tensor",
    "vocab": "tensor",
    "norm": None,
    "taps": None,                   # of a short convolution
    "rank": None,                   # of an adapter
    "layers": None,
    "updates": None,                # of a step
    "micro_batches": None,          # of an update
    "prefill": None,                # prompts that wait for a slot; any device of a row may need one
}

# From how many MiB on a product is split and its operand sent round.
WINDOWS = "xla_jf_spmd_threshold_for_windowed_einsum_mib"


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1) -> Mesh:
    """Builds a mesh over all devices of all processes; data = -1 takes what the others leave.

    Raises: UserError if the axes do not multiply to the number of devices."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(f"distributed.mode is none, but JAX found {jax.process_count()} processes; "
                        "set it to auto")
    count = jax.device_count()
    others = fsdp * tensor * context
    if data == -1:
        data = max(count // others, 1)
    if data * others != count:
        raise UserError(f"mesh: data {data} x fsdp {fsdp} x tensor {tensor} x context {context} = "
                        f"{data * others}, expected {count}, the number of devices")
    return arranged((data, fsdp, tensor, context), jax.devices())


def arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> Mesh:
    """Builds a mesh in which neighbours on the chips' network are neighbours.

    Args: devices, real ones or descriptions of devices."""
    types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:     # no product of whole torus axes has this shape: split them
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=types)


def use_compilation_cache() -> None:
    """Keeps compiled programs for the next run, unless the user has chosen a place for them."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "effreason" / "jax"))
        # The quick ones too: a run of the tiny reasoner has some thirty below half a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """Returns XLA's options for programs that gather weights over fsdp; None if it needs none.

    XLA for TPUs splits a large product with such a weight into one for each shard, while permutes
    send the shards round. On a v5e adding these up takes longer than a gather (docs/scaling.md).
    LIBTPU_INIT_ARGS goes first."""
    is_v5e = mesh.devices.flat[0].device_kind == "TPU v5 lite"
    return ({WINDOWS: "1000000"} if is_v5e and WINDOWS not in os.environ.get("LIBTPU_INIT_ARGS", "")
            else None)


def spec(*axes: str, table: dict[str, Any] = AXES) -> PartitionSpec:
    """Returns the PartitionSpec of an array with these logical axes."""
    return PartitionSpec(*(table[axis] for axis in axes))


def sharding(mesh: Mesh, *axes: str, table: dict[str, Any] = AXES) -> NamedSharding:
    """Returns the sharding of an array with these logical axes; without axes it is replicated."""
    return NamedSharding(mesh, spec(*axes, table=table))


def sampling_axes(mesh: AnyMesh, mlp_width: int, platform: str) -> dict[str, Any]:
    """Returns the table for sampling, which reads all weights for every token.

    They are gathered over fsdp once, and not at each read. Those of the MLP, most of a layer, stay
    split over fsdp, but along their other axis: a device reads its part of them for the rows of
    all, which takes two more collectives in each layer. On GPUs these take as long as they save.

    Args:
        mesh: may be abstract.
        platform: of the devices.
    """
    axes = ("tensor", "fsdp")
    is_split = platform != "gpu" and mlp_width % math.prod(mesh.shape[axis] for axis in axes) == 0
    return AXES | {"embed": None} | ({"mlp": axes} if is_split else {})


def tree_sharding(mesh: Mesh, logical: Any, table: dict[str, Any] = AXES) -> Shardings:
    """Turns a tree of tuples of logical axes into the same tree of shardings."""
    return jax.tree.map(lambda axes: sharding(mesh, *axes, table=table), logical,
                        is_leaf=lambda node: isinstance(node, tuple))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Pins an activation's layout at a block boundary; without a mesh it returns x unchanged."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def offloaded(shardings: Shardings) -> Shardings:
    """Returns the same shards in the memory of the hosts."""
    return jax.tree.map(lambda shards: shards.with_memory_kind("pinned_host"), shardings)


def fetched(shardings: Shardings) -> Shardings:
    """Returns the same shards in the memory of the devices."""
    return jax.tree.map(lambda shards: NamedSharding(shards.mesh, shards.spec), shardings)


def on_device(leaf: Any) -> Any:
    """Returns an array in the memory of its devices, whichever memory it is in."""
    is_offloaded = isinstance(leaf, jax.Array) and leaf.sharding.memory_kind == "pinned_host"
    return jax.device_put(leaf, fetched(leaf.sharding)) if is_offloaded else leaf


def batch_shards(mesh: AnyMesh) -> int:
    """Returns the number of parts the batch axis is split into."""
    return math.prod(mesh.shape[axis] for axis in AXES["batch"])


def to_device(tree: Any, shardings: Shardings) -> Any:
    """Puts host arrays onto the mesh; with `to_host` the only crossings of host and device.

    With several processes each has every complete array, and puts its own shards onto its own
    devices."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(leaf: Any, target: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, target)
        value = np.asarray(leaf)
        # device_put would compare the values of all processes: a collective at each crossing.
        with jax.transfer_guard_host_to_device("allow"):
            return jax.make_array_from_callback(value.shape, target, value.__getitem__)

    return jax.tree.map(place, tree, jax.tree.broadcast(shardings, tree))


def to_host(tree: Any) -> Any:
    """Brings device arrays to NumPy.

    With several processes all must call it, and each gets the complete arrays."""
    return jax.tree.map(np.asarray, jax.device_get(jax.tree.map(gather_to_host, tree)))


def gather_to_host(leaf: Any) -> Any:
    """Returns an array that this process can read completely.

    It is the array itself, unless other processes hold parts of it: these are then gathered."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    assert isinstance(leaf.sharding, NamedSharding)
    return make_gather(leaf.sharding.mesh)(leaf)


@functools.cache
def make_gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Compiles gather(array), which returns the array replicated on every device."""
    return jax.jit(lambda array: array, out_shardings=sharding(mesh))
