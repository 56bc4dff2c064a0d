"""Compiles the functions of a training run ahead of time, for chips that need not be present."""

import contextlib
import dataclasses
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from effreason.lm import cudnn, kv_cache
from effreason.lm.architecture import DecoderConfig
from effreason.planning import chips, costs, shapes
from effreason.planning.chips import Target
from effreason.planning.costs import Cost
from effreason.planning.workloads import Workload
from effreason.rl.learner import AbstractStep, Learner
from effreason.runtime import sharding
from effreason.runtime.config import GIB, Config
from effreason.runtime.errors import UserError
from effreason.sampling import capacity, scheduler, slots
from effreason.sampling.draws import SamplingParams
from effreason.sampling.engine import cache_positions
from effreason.sampling.scheduler import CacheLimits

EOS = (0,)                          # the EOS token does not change what is compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedProgram:
    """A function of a training step with the shapes of its arguments, not yet compiled."""

    name: str
    per: str                        # what one call covers
    lower: Callable[[], Any]        # traces it; returns a jax.stages.Lowered
    trips: float                    # runs of a loop whose length depends on the data
    calls: float  # in a training step; 0 for decode, whose calls follow from the lengths
    divide: float                   # calls covered by one run of the program
    other_bytes: float  # HBM in use while it runs, without its own arguments and results


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """What the compiler reports about a program, for one device."""

    own_bytes: float  # HBM: arguments, results that alias none of them, temporaries, code
    cost: Cost | None  # of one call; None if it did not fit: own_bytes is then what it needs


def target_mesh(config: Config, target: Target) -> Mesh:
    """Returns the mesh over the target's devices, described unless CPUs. Raises: UserError."""
    shape = mesh_shape(config, target.chips)
    if target.kind != "cpu":
        return sharding.arranged(shape, _described_devices(target))

    devices = jax.devices("cpu")[: target.chips]
    if len(devices) < target.chips:
        raise UserError(
            f"--chips {target.text}: JAX has {len(devices)} CPU devices already, expected "
            f"{target.chips}; set XLA_FLAGS=--xla_force_host_platform_device_count={target.chips}")
    return sharding.arranged(shape, devices)


def mesh_shape(config: Config, chips: int) -> tuple[int, int, int, int]:
    """Returns the sizes of the mesh axes. Raises: UserError if their product is not `chips`."""
    mesh = config.mesh
    others = mesh.fsdp * mesh.tensor * mesh.context
    data = max(chips // others, 1) if mesh.data == -1 else mesh.data
    if data * others != chips:
        raise UserError(f"mesh: data {data} x fsdp {mesh.fsdp} x tensor {mesh.tensor} x context "
                        f"{mesh.context} = {data * others}, --chips has {chips}; --fit finds a "
                        "mesh")
    return data, mesh.fsdp, mesh.tensor, mesh.context


def _described_devices(target: Target) -> Any:
    """Describes the devices of a machine. Raises: UserError if its compiler knows no such one."""
    from jax.experimental import topologies

    options: dict[str, Any]
    if target.kind == "gpu":
        nodes, gpus = (1, *target.shape)[-2:]
        options = {"platform": "cuda", "topology": f"1x{nodes}x{gpus}",
                   "target_config": chips.gpu_description(target.chip)}
    else:
        options = {"platform": "tpu", "topology_name": target.topology}
        if target.chips == 1:
            options["chips_per_host_bounds"] = [1, 1, 1]

    try:
        with quiet_stderr():
            return topologies.get_topology_desc(**options).devices
    except Exception as error:          # JAX, compilers and the loader raise different types
        reason = " ".join(str(error).split())
        raise UserError(
            f"--chips {target.text}: its compiler cannot describe it ({reason[:160]}); --analytic "
            "uses formulas") from None


@contextlib.contextmanager
def traceable(target: Target) -> Iterator[None]:
    """Lets programs for the target be traced and compiled on this machine."""
    if target.kind == "cpu":
        yield
        return

    # JAX would keep programs for described devices, and fail to read them back.
    parts, settings = target.chip.multiprocessors, cast(Any, jax.config)
    is_enabled = settings.jax_enable_compilation_cache
    settings.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()         # the setting is read once, by the first compilation
    try:
        with cudnn.described(parts.capability) if parts else contextlib.nullcontext():
            yield
    finally:
        settings.update("jax_enable_compilation_cache", is_enabled)
        compilation_cache.reset_cache()


def cache_limits(config: Config, decoder: DecoderConfig, target: Target,
                 mesh: Any) -> CacheLimits:
    """Returns the slots that a run would have here. `mesh` may be abstract."""
    settings = config.rollout
    training_bytes = capacity.training_weight_bytes(config)

    if settings.slots is None and settings.memory_gib is None:
        weights = shapes.weight_count(decoder)
        state = training_bytes * weights / (mesh.shape["fsdp"] * mesh.shape["tensor"])
        copy = jnp.dtype(decoder.dtype).itemsize * capacity.weights_per_device(
            decoder, weights, mesh, target.kind)
        free = target.chip.hbm_bytes * (1 - capacity.RESERVE) - state - copy
        settings = dataclasses.replace(settings, memory_gib=max(free * mesh.size / GIB, 1e-6))

    budget = capacity.position_budget(dataclasses.replace(config, rollout=settings), decoder, mesh,
                                      training_bytes)
    return capacity.cache_limits(config, decoder, mesh, budget)


def make_programs(config: Config, decoder: DecoderConfig, mesh: Mesh, *, slot_count: int,
                  workload: Workload) -> dict[str, PlannedProgram]:
    """Returns every function of a training step in call order; compiles nothing."""
    learner = Learner(config, decoder, mesh, tries_kernels=False)
    step = learner.lowered(config, width=workload.width, micro_batches=workload.room)
    state, reference = step.state, step.reference if config.keeps_reference else ()

    resident = {name: bytes_per_device(tree) for name, tree in (
        ("params", state.params), ("optimizer", state.opt_state), ("reference", reference),
        ("experience", step.experience), ("tokens", step.logprobs))}
    # Only the widest rows are compiled.
    narrower = workload.widths - 1
    resident["narrower"] = narrower * resident["experience"]
    resident["narrower_scored"] = narrower * bytes_per_device(step.packed.groups)

    # With adapters the reference is part of the policy, which its programs count themselves.
    resident["apart"] = 0.0 if learner.decoder.adapter is not None else resident["reference"]
    programs = [*_sampler_programs(config, learner.decoder, mesh, step.policy, resident, slot_count,
                                   len(workload.lengths)),
                *_learner_programs(config, step, learner.needs_reference, resident, workload)]
    return {program.name: program for program in programs}


def _sampler_programs(config: Config, decoder: DecoderConfig, mesh: Mesh, params: Any,
                      resident: Mapping[str, float], slot_count: int,
                      responses: int) -> list[PlannedProgram]:
    """Returns the functions of stage 2. Args: resident, HBM bytes of arrays that outlive them."""
    platform = mesh.devices.flat[0].platform
    layout = kv_cache.resolve_layout(config.rollout.cache_layout, platform, decoder.head_dim,
                                     decoder.dtype, mesh.shape["context"])
    sampler: Any = slots.make_programs(dataclasses.replace(decoder, cache_layout=layout), mesh)
    positions = cache_positions(capacity.max_positions(config))
    width = scheduler.prefill_width(config.data.max_prompt_tokens, positions)
    height = scheduler.prefill_rows(width, slot_count)

    def integers(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sampler.replicated)

    weights = sampler.unstack.eval_shape(params)
    prompts = integers(height, width), integers(height)
    prefilled = sampler.prefill.eval_shape(weights, *prompts)
    running = sampler.empty.eval_shape(count=slot_count, capacity=positions)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sampler.replicated)
    fresh = integers(len(slots.INSERT_FIELDS), slot_count)

    settings, chunk = config.rollout, config.rollout.chunk
    sampling = SamplingParams(temperature=settings.temperature, top_p=settings.top_p,
                              top_k=settings.top_k, min_p=settings.min_p, eos_ids=EOS)
    training_bytes = resident["params"] + resident["optimizer"] + resident["reference"]
    batches = -(-settings.prompts_per_step // height)

    def lower_decode() -> Any:
        return sampler.decode.lower(weights, running, integers(1 + slot_count), sampling=sampling,
                                    chunk=chunk)

    return [
        PlannedProgram(name="unstack", per="a step", calls=1, trips=1, divide=1,
                       other_bytes=resident["optimizer"] + resident["apart"],
                       lower=lambda: sampler.unstack.lower(params)),
        PlannedProgram(name="prefill", per=f"{height} prompts", calls=batches, trips=1, divide=1,
                       other_bytes=training_bytes + bytes_per_device(running),
                       lower=lambda: sampler.prefill.lower(weights, *prompts)),
        PlannedProgram(name="insert", per="a slot", calls=responses, trips=height, divide=height,
                       other_bytes=training_bytes + bytes_per_device(weights),
                       lower=lambda: sampler.insert.lower(running, prefilled, fresh, key)),
        PlannedProgram(name="decode", per="a token", calls=0, divide=chunk,
                       trips=chunk // slots.steps_between_checks(platform, chunk),
                       other_bytes=training_bytes + bytes_per_device(prefilled),
                       lower=lower_decode)]


def _learner_programs(config: Config, step: AbstractStep, needs_reference: bool,
                      resident: Mapping[str, float], workload: Workload) -> list[PlannedProgram]:
    """Returns the functions of stages 4 to 6. Args: as in `_sampler_programs`."""
    updates, trips = config.update.updates_per_batch, workload.micro_batches
    scored = 1 - config.first_scored_update / updates

    # Calls of a step, runs of a loop, and what else is in memory.
    table = {
        "score": (scored, trips, ("optimizer", "apart", "tokens", "narrower_scored")),
        "score_reference": (int(needs_reference), trips,
                            ("params", "optimizer", "tokens", "tokens", "narrower_scored")),
        "experience": (1, 1, ("params", "optimizer", "reference", "narrower")),
        "gradients": (updates, trips, ("optimizer", "apart", "tokens", "narrower")),
        "apply_gradients": (updates, 1, ("reference", "experience", "tokens", "narrower")),
    }
    # A policy that no step scores is scored before it is saved.
    per = dict.fromkeys(table, "a step") | dict.fromkeys(("gradients", "apply_gradients"),
                                                         "an update")
    per["score"] = "a step" if scored else "a save"
    return [PlannedProgram(name=name, per=per[name],
                           calls=calls, trips=runs, divide=1, lower=step.lower[name],
                           other_bytes=sum(resident[array] for array in arrays))
            for name, (calls, runs, arrays) in table.items()]


def bytes_per_device(tree: Any) -> float:
    """Returns what one device holds, in its own memory, of a tree of shapes with shardings."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        placement = leaf.sharding
        if placement is None or placement.memory_kind == "pinned_host":
            continue

        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
        itemsize = 8 if is_key else leaf.dtype.itemsize
        total += math.prod(placement.shard_shape(leaf.shape)) * itemsize
    return total


def compile_program(program: PlannedProgram, mesh: Mesh) -> CompiledProgram:
    """Compiles a program and reads its memory and its cost."""
    with jax.set_mesh(mesh), quiet_stderr():
        lowered = program.lower()
        try:
            compiled = lowered.compile()
        except Exception as error:
            needed = needed_bytes(str(error))
            if needed is None:
                raise
            return CompiledProgram(own_bytes=needed, cost=None)

    stats = compiled.memory_analysis()
    own_bytes = (stats.argument_size_in_bytes + stats.output_size_in_bytes
                 - stats.alias_size_in_bytes + stats.temp_size_in_bytes
                 + stats.generated_code_size_in_bytes)
    cost = costs.read(compiled.as_text(), trips=program.trips) * (1 / program.divide)
    own_bytes += max((kernel.workspace_bytes for kernel in cost.kernels), default=0.0)
    return CompiledProgram(own_bytes=own_bytes, cost=cost)


def needed_bytes(message: str) -> float | None:
    """Returns the HBM that a program needs, from an out-of-memory error; None for any other."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None

    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    if match := re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message):
        return float(match[1]) * units[match[2]]
    if match := re.search(r"size=(\d+)\) would exceed memory", message):
        return float(match[1])
    return math.inf


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Discards what libraries write to file descriptor 2: libtpu logs that it finds no machine."""
    sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:                     # there is no standard error
        yield
        return

    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
