"""How many responses fit on the devices at once."""

import math
import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from effreason.lm import model
from effreason.runtime import sharding
from effreason.runtime.config import Config

GIB = 2**30
RESERVE = 0.1                       # of the devices' memory, for prompts being read, logits and whatever else
FEWEST = 8                          # slots that are worth trying, whatever the estimate says
# Of all weights in float32: in training the policy, the reference, two moments of the optimiser and a gradient.
TRAINING, EVALUATION = 5, 1


def positions(config: Config) -> int:
    """The longest sequence of a run, prompt and response."""
    return config.data.max_prompt_tokens + max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens or 0)


def slot_bytes(decoder: model.DecoderConfig, positions: int) -> int:
    """Keys and values of one response of so many positions."""
    return 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * positions * jnp.dtype(decoder.dtype).itemsize


def budget_bytes(config: Config, decoder: model.DecoderConfig, mesh: Mesh, copies: int) -> float:
    """Memory for the keys and values of all slots, on all devices together.

    Args: copies, float32 ones of the weights that lie beside them and beside the sampler's own."""
    if config.rollout.memory_gib is not None:
        return config.rollout.memory_gib * GIB
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.abstract_params(decoder)))
    # The state is split over fsdp and tensor, the sampler's copy of the weights over tensor alone.
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    state = copies * 4 * weights * mesh.size / shards
    copy = jnp.dtype(decoder.dtype).itemsize * weights * mesh.size / mesh.shape["tensor"]
    return max(device_bytes(mesh) * (1 - RESERVE) - state - copy, 0.0)


def device_bytes(mesh: Mesh) -> float:
    """Memory of all devices of a mesh; virtual devices of one host share its memory."""
    device = mesh.devices.flat[0]
    statistics = device.memory_stats() if device.platform != "cpu" else None
    if statistics is not None and "bytes_limit" in statistics:
        return statistics["bytes_limit"] * mesh.size
    # Half of the host's: graders, data and whatever else runs there want theirs.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def slots(config: Config, decoder: model.DecoderConfig, mesh: Mesh, copies: int = TRAINING) -> int:
    """Responses generated at the same time: rollout.slots, or as many as the memory holds at their longest.

    All those of a step where they fit, else a power of two times the mesh's batch shards."""
    if config.rollout.slots is not None:
        return config.rollout.slots
    shards = sharding.batch_shards(mesh)
    wanted = config.rollout.prompts_per_step * config.rollout.group_size
    held = budget_bytes(config, decoder, mesh, copies) / slot_bytes(decoder, positions(config))
    if held >= wanted:
        return -(-wanted // shards) * shards
    return shards << math.floor(math.log2(max(max(held, FEWEST) / shards, 1)))


def describe(config: Config, decoder: model.DecoderConfig, mesh: Mesh, copies: int = TRAINING) -> str:
    """One line for people: slots, their size and the memory they may take."""
    count, longest = slots(config, decoder, mesh, copies), positions(config)
    room = f" of {size(budget_bytes(config, decoder, mesh, copies))}" if config.rollout.slots is None else ""
    return (f"sampler: {count} slots of at most {longest:,} positions, "
            f"{size(count * slot_bytes(decoder, longest))}{room} for keys and values")


def size(count: float) -> str:
    """Bytes in the unit that suits them: 812 KiB, 4.1 MiB, 12 GiB."""
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1000:
            return f"{count:.{0 if count >= 10 else 1}f} {unit}"
    return f"{count / 1024:.{0 if count >= 10240 else 1}f} GiB"
