"""How many responses fit on the devices at once."""

import math
import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from effreason.lm import model
from effreason.runtime import processes, sharding
from effreason.runtime.config import Config

GIB = 2**30
RESERVE = 0.1                       # of the devices' memory, for prompts being read, logits and whatever else
FEWEST = 8                          # slots that are worth trying, whatever the estimate says
EVALUATION = 4                      # bytes for each weight beside the sampler's own copy: they are loaded in float32


def training(config: Config) -> int:
    """Bytes on the devices for each weight in training, beside the sampler's own copy.

    The policy and a gradient in float32, the optimiser's two moments, and the reference in the dtype of the blocks."""
    moments = 0 if config.update.offload_optimizer else 8
    reference = 0 if config.kl.offload_reference else jnp.dtype(config.model.dtype).itemsize
    return 8 + moments + reference


def positions(config: Config) -> int:
    """The longest sequence of a run, prompt and response."""
    return config.data.max_prompt_tokens + max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens or 0)


def slot_bytes(decoder: model.DecoderConfig, positions: int) -> int:
    """Keys and values of one response of so many positions."""
    return 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * positions * jnp.dtype(decoder.dtype).itemsize


def budget_bytes(config: Config, decoder: model.DecoderConfig, mesh: Mesh, weight_bytes: int) -> float:
    """Memory for the keys and values of all slots, on all devices together.

    Args: weight_bytes, taken for each weight by what lies beside them and beside the sampler's copy."""
    if config.rollout.memory_gib is not None:
        return config.rollout.memory_gib * GIB
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.abstract_params(decoder)))
    # The state is split over fsdp and tensor, the sampler's copy of the weights over tensor alone.
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    state = weight_bytes * weights * mesh.size / shards
    copy = jnp.dtype(decoder.dtype).itemsize * weights * mesh.size / mesh.shape["tensor"]
    return max(device_bytes(mesh) * (1 - RESERVE) - state - copy, 0.0)


def device_bytes(mesh: Mesh) -> float:
    """Memory of all devices of a mesh, as the host with the least has it; virtual devices share that of their host."""
    device = mesh.local_devices[0]
    statistics = device.memory_stats() if device.platform != "cpu" else None
    if statistics is not None and "bytes_limit" in statistics:
        bytes_limit = statistics["bytes_limit"]
        return min(processes.all_gather("memory of a device", lambda: bytes_limit)) * mesh.size
    # Half of the host's: graders, data and whatever else runs there want theirs.
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    return min(processes.all_gather("memory of a host", lambda: here)) * processes.count()


def slots(config: Config, decoder: model.DecoderConfig, mesh: Mesh, weight_bytes: int) -> int:
    """Responses generated at the same time: rollout.slots, or as many as the memory holds at their longest.

    All those of a step where they fit, else a power of two times the mesh's batch shards."""
    if config.rollout.slots is not None:
        return config.rollout.slots
    shards = sharding.batch_shards(mesh)
    wanted = config.rollout.prompts_per_step * config.rollout.group_size
    held = budget_bytes(config, decoder, mesh, weight_bytes) / slot_bytes(decoder, positions(config))
    if held >= wanted:
        return -(-wanted // shards) * shards
    return shards << math.floor(math.log2(max(max(held, FEWEST) / shards, 1)))


def describe(config: Config, decoder: model.DecoderConfig, mesh: Mesh, weight_bytes: int) -> str:
    """One line for people: slots, their size and the memory they may take."""
    count, longest = slots(config, decoder, mesh, weight_bytes), positions(config)
    room = f" of {size(budget_bytes(config, decoder, mesh, weight_bytes))}" if config.rollout.slots is None else ""
    return (f"sampler: {count} slots of at most {longest:,} positions, "
            f"{size(count * slot_bytes(decoder, longest))}{room} for keys and values")


def size(count: float) -> str:
    """Bytes in the unit that suits them: 812 KiB, 4.1 MiB, 12 GiB."""
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1000:
            return f"{count:.{0 if count >= 10 else 1}f} {unit}"
    return f"{count / 1024:.{0 if count >= 10240 else 1}f} GiB"
