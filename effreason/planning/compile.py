"""The functions of a run, compiled ahead of time for chips that need not be here, and what the compiler says."""

import contextlib
import dataclasses
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from effreason.lm import kv_cache, model
from effreason.planning import costs, shapes
from effreason.planning.chips import GIB, Target
from effreason.planning.costs import Cost
from effreason.planning.workloads import Workload
from effreason.rl import learner
from effreason.runtime import sharding
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError
from effreason.sampling import capacity as memory
from effreason.sampling import engine as rollouts
from effreason.sampling import scheduler, slots
from effreason.sampling.draws import SamplingParams

EOS = (0,)                          # which token ends a response changes nothing of what is compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One function of a run with the shapes it is called with."""

    name: str
    per: str                        # what one call is for
    lower: Callable[[], Any]        # traces it: a jax.stages.Lowered
    trips: float                    # how often a loop runs whose length depends on the data
    calls: float                    # of one training step; of decode: 0, its calls follow from the lengths
    divide: float                   # what one call is for is this part of a run of the program
    beside_bytes: float             # in HBM while it runs, beyond its own arguments and results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of a program, for one device."""

    own_bytes: float                # of HBM: arguments, results that are no arguments, temporaries, code
    cost: Cost | None               # of one call; None: it did not fit, own_bytes is what it would have needed


def make_mesh(config: Config, target: Target) -> Mesh:
    """The configuration's mesh over the target's devices, which for a TPU are only described. Raises: UserError."""
    shape = mesh_shape(config, target.chips)
    if target.kind == "cpu":
        devices = jax.devices("cpu")[: target.chips]
        if len(devices) < target.chips:
            raise UserError(f"--chips {target.text}: JAX has {len(devices)} CPU devices already, expected "
                            f"{target.chips}; set XLA_FLAGS=--xla_force_host_platform_device_count={target.chips}")
    else:
        devices = _described(target)
    return sharding.arranged(shape, devices)


def mesh_shape(config: Config, chips: int) -> tuple[int, int, int, int]:
    """Sizes of the mesh axes on so many chips. Raises: UserError where they do not multiply to them."""
    mesh = config.mesh
    others = mesh.fsdp * mesh.tensor * mesh.context
    data = max(chips // others, 1) if mesh.data == -1 else mesh.data
    if data * others != chips:
        raise UserError(f"mesh: data {data} x fsdp {mesh.fsdp} x tensor {mesh.tensor} x context {mesh.context} = "
                        f"{data * others}, --chips has {chips}; --fit finds a mesh")
    return data, mesh.fsdp, mesh.tensor, mesh.context


def _described(target: Target) -> Any:
    """The devices of a TPU slice that need not exist. Raises: UserError where libtpu knows no such slice."""
    from jax.experimental import topologies

    options: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if target.chips == 1 else {}
    try:
        with quiet():
            return topologies.get_topology_desc(platform="tpu", topology_name=target.topology, **options).devices
    except Exception as error:          # JAX, libtpu and the loader of libraries each raise their own
        reason = " ".join(str(error).split())
        raise UserError(f"--chips {target.text}: libtpu cannot describe it ({reason[:160]})") from None


def slot_count(config: Config, decoder: model.DecoderConfig, target: Target, mesh: Any) -> int:
    """Responses in flight: as the run would choose on chips with this much memory. Args: mesh, or an abstract one."""
    settings = config.rollout
    if settings.slots is None and settings.memory_gib is None:
        weights = shapes.weight_count(decoder)
        itemsize, tensor = jnp.dtype(decoder.dtype).itemsize, mesh.shape["tensor"]
        beside = memory.training_weight_bytes(config) / mesh.shape["fsdp"] + itemsize
        left = target.chip.hbm_bytes * (1 - memory.RESERVE) - beside * weights / tensor
        settings = dataclasses.replace(settings, memory_gib=max(left * mesh.size / GIB, 1e-6))
    shards = sharding.batch_shards(mesh)
    count = memory.slot_count(dataclasses.replace(config, rollout=settings), decoder, mesh, memory.training_weight_bytes(config))
    return -(-count // shards) * shards


def make_programs(config: Config, decoder: model.DecoderConfig, mesh: Mesh, *, slots_count: int,
                  workload: Workload) -> dict[str, Program]:
    """Every function of a training step, in the order in which a step calls them; nothing is compiled yet."""
    learning: Any = learner.make_learner(config, decoder, mesh)
    packed = learner.abstract_packed(config, learning, width=workload.width, micro_batches=workload.room)
    experience = learner.abstract_experience(packed)
    state, reference = learning.abstract_state, learning.abstract_reference
    updates, responses = config.update.updates_per_batch, len(workload.lengths)

    def everywhere(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=learning.replicated)

    one, of_tokens = everywhere(jnp.int32), everywhere(jnp.float32, *packed.token_index.shape)
    groups = config.rollout.prompts_per_step, config.rollout.group_size

    sampler: Any = slots.make_programs(dataclasses.replace(decoder, cache_layout=cache_layout(
        config, decoder, mesh.devices.flat[0].platform, mesh.shape["context"])), mesh)
    capacity = rollouts.cache_positions(memory.max_positions(config))
    width = min(max(16, 1 << (config.data.max_prompt_tokens - 1).bit_length()), capacity)
    height = max(min(slots_count, scheduler.READ_ROWS, scheduler.READ_TOKENS // width), 1)

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sampler.replicated)

    weights = sampler.unstack.eval_shape(state.params)
    bank = sampler.read.eval_shape(weights, integers(height, width))
    running = sampler.empty.eval_shape(count=slots_count, capacity=capacity)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sampler.replicated)
    settings, chunk = config.rollout, config.rollout.chunk
    sampling = SamplingParams(temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k,
                        min_p=settings.min_p, eos_ids=EOS)
    sizes = {name: device_bytes(tree) for name, tree in (
        ("params", state.params), ("optimizer", state.opt_state), ("reference", reference), ("weights", weights),
        ("slots", running), ("bank", bank), ("experience", experience), ("tokens", of_tokens))}
    # Of the rows only the widest are compiled. In scoring, the log-probs of all stand in line on every chip.
    narrower = workload.widths - 1
    sizes["narrower"] = narrower * sizes["experience"]
    sizes["narrower_scored"] = narrower * (device_bytes(packed.groups) + 4 * math.prod(packed.groups[0].tokens.shape))

    def beside(*names: str) -> float:
        return sum(sizes[name] for name in names)

    banks = -(-settings.prompts_per_step // height)
    found = [
        Program(name="unstack", per="a step", calls=1, beside_bytes=beside("optimizer", "reference"),
                lower=lambda: sampler.unstack.lower(state.params), trips=1, divide=1),
        Program(name="read", per=f"{height} prompts", calls=banks, trips=1, divide=1,
                beside_bytes=beside("params", "optimizer", "reference", "slots"),
                lower=lambda: sampler.read.lower(weights, integers(height, width))),
        Program(name="start", per="a slot", calls=responses, trips=height, divide=height,
                beside_bytes=beside("params", "optimizer", "reference", "weights"),
                lower=lambda: sampler.start.lower(running, bank, integers(len(slots.FRESH), slots_count), key)),
        Program(name="decode", per="a token", calls=0, trips=chunk, divide=chunk,
                beside_bytes=beside("params", "optimizer", "reference", "bank"),
                lower=lambda: sampler.advance.lower(weights, running, integers(1 + slots_count), sampling=sampling,
                                                    chunk=chunk)),
        Program(name="score", per="a step", calls=1, trips=workload.micro_batches, divide=1,
                beside_bytes=beside("optimizer", "reference", "tokens", "narrower_scored"),
                lower=lambda: learning.score.lower(state.params, packed)),
        Program(name="score_reference", per="a step", calls=int(learner.needs_reference(config)),
                trips=workload.micro_batches, divide=1,
                beside_bytes=beside("params", "optimizer", "tokens", "tokens", "narrower_scored"),
                lower=lambda: learning.score_reference.lower(reference, packed)),
        Program(name="credit", per="a step", calls=1, trips=1, divide=1,
                beside_bytes=beside("params", "optimizer", "reference", "narrower"),
                lower=lambda: learning.credit.lower(everywhere(jnp.bool_, *groups), everywhere(jnp.int32, *groups),
                                                    everywhere(jnp.float32), of_tokens, of_tokens, of_tokens, packed)),
        Program(name="gradients", per="an update", calls=updates, trips=workload.micro_batches, divide=1,
                beside_bytes=beside("optimizer", "reference", "tokens", "narrower"),
                lower=lambda: learning.gradients.lower(state.params, experience, packed.counts, one)),
        Program(name="apply", per="an update", calls=updates, trips=1, divide=1,
                beside_bytes=beside("reference", "experience", "tokens", "narrower"),
                lower=lambda: learning.apply_gradients.lower(state, state.params, one)),
    ]
    return {program.name: program for program in found}


def cache_layout(config: Config, decoder: model.DecoderConfig, platform: str, context: int) -> str:
    """The cache layout of the run; whether its kernel works can only be tried on the machine itself."""
    wanted: str = config.rollout.cache_layout
    if wanted == "auto":
        return kv_cache.choose_layout(platform, decoder.head_dim, decoder.dtype, context)
    if reason := kv_cache.unsupported_reason(wanted, platform, decoder.head_dim, decoder.dtype, context):
        raise UserError(f"rollout.cache_layout {wanted} does not fit: {reason}")
    return wanted


def device_bytes(tree: Any) -> float:
    """What one device holds of a tree of shapes with shardings, in its own memory."""
    found = 0.0
    for leaf in jax.tree.leaves(tree):
        placed = leaf.sharding
        if placed is None or placed.memory_kind == "pinned_host":
            continue
        itemsize = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) else leaf.dtype.itemsize
        found += math.prod(placed.shard_shape(leaf.shape)) * itemsize
    return found


def compile_program(program: Program, mesh: Mesh) -> Compiled:
    """Compiles one program and reads what the compiler says of it."""
    with jax.set_mesh(mesh), quiet():
        lowered = program.lower()
        try:
            compiled = lowered.compile()
        except Exception as error:
            needed = too_large(str(error))
            if needed is None:
                raise
            return Compiled(own_bytes=needed, cost=None)
    stats = compiled.memory_analysis()
    own = (stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
           + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes)
    return Compiled(own_bytes=own, cost=costs.read(compiled.as_text(), trips=program.trips) * (1 / program.divide))


def too_large(message: str) -> float | None:
    """Bytes of HBM that a program needs, from the compiler's refusal; None where it failed for another reason."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    if found := re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message):
        return float(found[1]) * units[found[2]]
    if found := re.search(r"size=(\d+)\) would exceed memory", message):
        return float(found[1])
    return math.inf


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what libraries write to the file of standard error from the terminal: libtpu looks for machines that are
    not there and says so in capital letters."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:                     # there is no standard error
        yield
        return
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
