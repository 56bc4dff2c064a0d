"""Makes a plan: the functions of a run on a machine, whether they fit, and how long they take."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
from jax.sharding import AbstractMesh

from effreason.lm import kv_cache
from effreason.lm.architecture import DecoderConfig
from effreason.lm.attention import SEES_BRANCHES, sequences_per_row
from effreason.lm.kernels import KERNELS
from effreason.planning import analytic, chips, compile, estimates, workloads
from effreason.planning.chips import Target
from effreason.planning.estimates import Efficiency, PlannedFunction, PlannedMachine, RunEstimate
from effreason.planning.workloads import Workload
from effreason.rl import learner, packing
from effreason.runtime import sharding
from effreason.runtime.config import Config
from effreason.sampling.capacity import max_positions
from effreason.sampling.engine import cache_positions
from effreason.sampling.scheduler import MIN_SLOTS_PER_DEVICE, CacheLimits


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """Numbers of the user that no compiler knows."""

    mean_tokens: float              # of a response
    prompt_tokens: int
    efficiency: Efficiency = Efficiency()
    price: float | None = None      # of a chip-hour, in any currency
    watts: float | None = None      # of a chip; None for the table's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The memory, time and energy that a configuration needs on a machine."""

    config: Config
    decoder: DecoderConfig
    target: Target
    shape: tuple[int, int, int, int]    # of the mesh
    inputs: PlanInputs
    workload: Workload
    slots: int                      # of full length
    most_slots: int                 # while the responses are short
    capacity: int                   # cache positions of a slot of full length
    live: float                     # positions of a slot that a decode step reads, on average
    functions: dict[str, PlannedFunction]
    runs: tuple[RunEstimate, ...]   # at the most and at the least of Efficiency.decode; () = none

    @property
    def run(self) -> RunEstimate | None:
        """The fastest estimate."""
        return self.runs[0] if self.runs else None

    @property
    def all_fit(self) -> bool:
        return all(fits(function, self.target) for function in self.functions.values())

    def seconds(self, function: PlannedFunction) -> tuple[float, str] | None:
        """Returns the seconds of one call and what limits it."""
        cost = function.full_cost
        if cost is None:
            return None
        return estimates.roofline(cost, self.target, self.inputs.efficiency)


def make_plan(config: Config, decoder: DecoderConfig, target: Target, inputs: PlanInputs, *,
              names: Collection[str] | None = None, compiled: bool | None = None,
              stop_early: bool = False, log: Callable[[str], None] = lambda line: None) -> Plan:
    """Compiles the functions for the target, or computes them by formula, and estimates the run.

    Args: names, of the functions, None for all; compiled, None = if a compiler for the target is
        installed; stop_early, stop at the first function that does not fit, and compile the most
        likely ones first; log, prints progress.
    Raises: UserError if the mesh fits neither the chips nor the model.
    """
    compiled = chips.has_compiler(target.kind) if compiled is None else compiled
    shape = compile.mesh_shape(config, target.chips)
    mesh: Any = AbstractMesh(shape, sharding.MESH_AXES)
    if compiled:
        mesh = compile.target_mesh(config, target)
    learner.check_divisible(config, decoder, mesh)

    limits = compile.cache_limits(config, decoder, target, mesh)
    slots, capacity = limits.least_slots, cache_positions(max_positions(config))
    width = packing.row_width(config.data.max_prompt_tokens + config.rollout.max_new_tokens,
                              shape[3])
    parts = target.chip.multiprocessors
    attention = learner.choose_attention(config, decoder, width, platform=target.kind,
                                         context=shape[3],
                                         capability=None if parts is None else parts.capability)
    layout = learner.row_layout(
        config, dataclasses.replace(decoder, attention=attention), config.data.max_prompt_tokens,
        context=shape[3], shards=shape[0] * shape[1])
    workload = workloads.make_workload(config, mean_tokens=inputs.mean_tokens,
                                       prompt_tokens=inputs.prompt_tokens, layout=layout,
                                       sequences_per_row=sequences_per_row(attention),
                                       skips_others=attention == "cudnn_packed",
                                       shares_prompts=attention in SEES_BRANCHES
                                       and not decoder.needs_neighbours)
    # Without a kernel a decode step reads the whole cache, live or not.
    has_kernel = kv_cache.resolve_layout(
        config.rollout.cache_layout, target.kind, decoder.head_dim, decoder.dtype,
        shape[3]) in KERNELS
    live_share = estimates.live_share(workload, capacity) if has_kernel else 1.0

    if compiled:
        with compile.traceable(target):
            functions = _compile(config, decoder, mesh, target, slots, workload, live_share, names,
                                 log, stop_early)
    else:
        functions = analytic.make_functions(config, decoder, shape, slots=slots, capacity=capacity,
                                            workload=workload, attention=attention,
                                            live_share=live_share, platform=target.kind)
        functions = {name: function for name, function in functions.items()
                     if names is None or name in names}

    runs: tuple[RunEstimate, ...] = ()
    if not stop_early or all(fits(function, target) for function in functions.values()):
        runs = _estimate(config, decoder, target, shape, inputs, functions, workload, limits,
                         attention)
    return Plan(config=config, decoder=decoder, target=target, shape=shape, inputs=inputs,
                workload=workload, slots=slots, most_slots=limits.slots, capacity=capacity,
                live=live_share * capacity, functions=functions, runs=runs)


def _compile(config: Config, decoder: DecoderConfig, mesh: jax.sharding.Mesh, target: Target,
             slots: int, workload: Workload, live_share: float, names: Collection[str] | None,
             log: Callable[[str], None], stop_early: bool) -> dict[str, PlannedFunction]:
    programs = compile.make_programs(config, decoder, mesh, slot_count=slots, workload=workload)
    chosen = [program for name, program in programs.items() if names is None or name in names]
    first = ("gradients", "decode") if stop_early else ()
    ordered = sorted(chosen, key=lambda program: program.name not in first)

    functions = {}
    for number, program in enumerate(ordered, start=1):
        log(f"compiling {program.name} ({number} of {len(chosen)})")
        compiled = compile.compile_program(program, mesh)
        functions[program.name] = PlannedFunction(
            name=program.name, per=program.per, calls=program.calls, own_bytes=compiled.own_bytes,
            other_bytes=program.other_bytes, cost=compiled.cost, source="compiled",
            live_share=live_share, pair_share=workload.pair_batches / workload.micro_batches)
        if stop_early and not fits(functions[program.name], target):
            break

    return {program.name: functions[program.name] for program in chosen
            if program.name in functions}


def _estimate(config: Config, decoder: DecoderConfig, target: Target,
              shape: tuple[int, int, int, int], inputs: PlanInputs,
              functions: dict[str, PlannedFunction], workload: Workload, limits: CacheLimits,
              attention: str) -> tuple[RunEstimate, ...]:
    if not estimates.is_whole(functions):
        return ()
    machine = PlannedMachine(target=target, efficiency=inputs.efficiency)
    sizes = analytic.StepSizes(decoder=decoder, data=shape[0], fsdp=shape[1], tensor=shape[2],
                               context=shape[3], attention=attention, remat=decoder.remat,
                               adapter=learner.make_adapter(config))
    return tuple(estimates.estimate_run(
        config, functions, workload, machine, decode_memory=share, limits=limits,
        weights_bytes=sizes.itemsize * sizes.sampled_weights(target.kind, read=True),
        flops_per_token=2.0 * (sizes.products + sizes.table) + sizes.state_flops(is_step=False),
        smallest=MIN_SLOTS_PER_DEVICE,
        price=inputs.price, watts=inputs.watts)
        for share in sorted({*inputs.efficiency.decode}, reverse=True))


def fits(function: PlannedFunction, target: Target) -> bool:
    """Returns whether a function, with all else in HBM at the time, fits into a chip's memory."""
    return function.cost is not None and function.hbm_bytes <= target.chip.hbm_bytes
