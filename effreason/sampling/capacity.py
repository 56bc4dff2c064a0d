"""How many responses fit on the devices at once, and the sampler that a configuration describes."""

import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from effreason.lm import model
from effreason.lm.architecture import DecoderConfig
from effreason.runtime import processes, sharding
from effreason.runtime.config import GIB, Config
from effreason.sampling.engine import (
    Sampler,
    cache_positions,
    make_sampler,
    smallest_capacity,
)
from effreason.sampling.repetition import RepetitionStopping
from effreason.sampling.scheduler import CacheLimits

RESERVE = 0.1                       # of device memory: prompts in prefill, logits, everything else
MIN_SLOTS = 8                       # of full length: worth trying, whatever the estimate says
EVALUATION_WEIGHT_BYTES = 4         # per parameter, without the sampler's copy: loaded in float32


def make_configured_sampler(config: Config, decoder: DecoderConfig, mesh: Mesh,
                            weight_bytes: int) -> Sampler:
    """Builds the sampler of a run, for rollouts and evaluations alike.

    Args:
        weight_bytes: as in `cache_budget_bytes`."""
    settings, repetition = config.rollout, None
    if config.repetition.stop:
        repetition = RepetitionStopping(
            window=config.repetition.window, longest_period=config.repetition.longest_period,
            audit_share=config.repetition.audit_share)

    return make_sampler(decoder, mesh, slots=slot_count(config, mesh), chunk=settings.chunk,
                        budget=position_budget(config, decoder, mesh, weight_bytes),
                        max_positions=max_positions(config), repetition=repetition,
                        draft_tokens=settings.draft_tokens, cache_layout=settings.cache_layout)


def slot_count(config: Config, mesh: Mesh) -> int:
    """Returns how many responses run at once, at most: rollout.slots, or all of a step."""
    responses = config.rollout.prompts_per_step * config.rollout.group_size
    slots, shards = config.rollout.slots or responses, sharding.batch_shards(mesh)
    return -(-slots // shards) * shards


def position_budget(config: Config, decoder: DecoderConfig, mesh: Mesh,
                    weight_bytes: int) -> int | None:
    """Returns how many positions all slots together may have; None if rollout.slots is given."""
    if config.rollout.slots is not None:
        return None
    budget = cache_budget_bytes(config, decoder, mesh, weight_bytes)
    least = MIN_SLOTS * model.positions_held(decoder, cache_positions(max_positions(config)),
                                             mesh.shape["context"])
    return max(int(budget // model.position_bytes(decoder)), least)


def cache_limits(config: Config, decoder: DecoderConfig, mesh: Mesh,
                 budget: int | None) -> CacheLimits:
    """Returns the limits of the sampler that a configuration describes. `mesh` may be abstract."""
    positions = max_positions(config)
    return CacheLimits(
        slots=slot_count(config, mesh), shards=sharding.batch_shards(mesh), budget=budget,
        chunk=config.rollout.chunk, smallest=smallest_capacity(positions),
        largest=cache_positions(positions),
        positions_held=functools.partial(model.positions_held, decoder,
                                         context=mesh.shape["context"]))


def max_positions(config: Config) -> int:
    """Returns the length of the longest sequence in a run, prompt and response."""
    response = max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens or 0)
    return config.data.max_prompt_tokens + response


def cache_budget_bytes(config: Config, decoder: DecoderConfig, mesh: Mesh,
                       weight_bytes: int) -> float:
    """Returns the memory for the keys and values of all slots, summed over all devices.

    Args:
        weight_bytes: bytes per parameter of policy, optimizer and reference, without the sampler's
            copy: `training_weight_bytes`, or EVALUATION_WEIGHT_BYTES."""
    if config.rollout.memory_gib is not None:
        return config.rollout.memory_gib * GIB

    params = model.abstract_params(decoder)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    state = weight_bytes * parameters * mesh.size / shards
    copy = jnp.dtype(decoder.dtype).itemsize * mesh.size * weights_per_device(
        decoder, parameters, mesh, mesh.devices.flat[0].platform)
    return max(device_bytes(mesh) * (1 - RESERVE) - state - copy, 0.0)


def weights_per_device(decoder: DecoderConfig, parameters: int, mesh: sharding.AnyMesh,
                       platform: str) -> float:
    """Returns how many parameters of the sampler's copy a device has; see `sampling_axes`.

    Args:
        parameters: of the model.
        mesh: may be abstract.
        platform: of the devices.
    """
    mlp = 3 * decoder.layers * decoder.width * decoder.mlp_width
    shards = mlp_shards(decoder, mesh, platform)
    return (parameters - mlp) / mesh.shape["tensor"] + mlp / shards


def mlp_shards(decoder: DecoderConfig, mesh: sharding.AnyMesh, platform: str) -> int:
    """Returns how many parts the sampler's weights of the MLP are split into."""
    if decoder.experts:             # split over tensor, as everything else
        return mesh.shape["tensor"]
    axes = sharding.sampling_axes(mesh, decoder.mlp_width, platform)["mlp"]
    return math.prod(mesh.shape[axis] for axis in np.ravel(axes))


def training_weight_bytes(config: Config) -> int:
    """Returns the device bytes per parameter while a training run samples, without the sampler's
    copy.

    The policy is float32, the optimizer keeps two float32 moments, and the reference has the dtype
    of the blocks. There are no gradients then. With adapters only the frozen weights count; those
    and their moments are a few per cent of them, rounded up to a byte."""
    if config.adapter.rank:
        return jnp.dtype(config.model.dtype).itemsize + 1
    moments = 0 if config.update.offload_optimizer else 8
    on_device = config.keeps_reference and not config.kl.offload_reference
    reference = 0 if not on_device else jnp.dtype(config.model.dtype).itemsize
    return 4 + moments + reference


def device_bytes(mesh: Mesh) -> float:
    """Returns the memory of all devices of a mesh, as if every host had as little as the smallest.

    Virtual CPU devices share half of their host's memory: graders and data need the rest."""
    device = mesh.local_devices[0]
    statistics = device.memory_stats() if device.platform != "cpu" else None
    if statistics is not None and "bytes_limit" in statistics:
        bytes_limit = statistics["bytes_limit"]
        return min(processes.all_gather("memory of a device", lambda: bytes_limit)) * mesh.size

    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    return min(processes.all_gather("memory of a host", lambda: host_bytes)) * processes.count()


def describe(config: Config, decoder: DecoderConfig, mesh: Mesh, weight_bytes: int) -> str:
    """Returns a line for the log: the number of slots, their size and the memory available."""
    budget = position_budget(config, decoder, mesh, weight_bytes)
    limits, positions = cache_limits(config, decoder, mesh, budget), max_positions(config)
    least = limits.least_slots
    count = f"{least}" if least == limits.slots else f"{least} to {limits.slots}"
    available = ""
    if config.rollout.slots is None:
        available = f" of {_format_bytes(cache_budget_bytes(config, decoder, mesh, weight_bytes))}"

    total = _format_bytes(least * model.cache_bytes(decoder, positions))
    return (f"sampler: {count} slots of at most {positions:,} positions, "
            f"{total}{available} for keys and values{' and states' * (decoder.delta is not None)}")


def _format_bytes(count: float) -> str:
    """Returns bytes in a readable unit: 812 KiB, 4.1 MiB, 12 GiB."""
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1000:
            return f"{count:.{0 if count >= 10 else 1}f} {unit}"
    return f"{count / 1024:.{0 if count >= 10240 else 1}f} GiB"
