"""A plan: the functions of a run on a machine, whether they fit, how long they take."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
from jax.sharding import AbstractMesh

from effreason.lm import attention as causal
from effreason.lm.kv_cache import KERNELS
from effreason.lm.model import DecoderConfig
from effreason.planning import analytic, compile, estimates, workloads
from effreason.planning.chips import Target
from effreason.planning.estimates import Efficiency, Function, Machine, Run
from effreason.planning.workloads import Workload
from effreason.rl import learner, packing
from effreason.runtime import sharding
from effreason.runtime.config import Config
from effreason.sampling import capacity as memory
from effreason.sampling.engine import SMALLEST, cache_positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What no compiler knows."""

    mean_tokens: float              # of a response
    prompt_tokens: int
    efficiency: Efficiency = Efficiency()
    price: float | None = None      # of a chip-hour, in any currency
    watts: float | None = None      # of a chip; None = the table's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What was found."""

    config: Config
    decoder: DecoderConfig
    target: Target
    shape: tuple[int, int, int, int]    # of the mesh
    inputs: Inputs
    workload: Workload
    slots: int
    capacity: int                   # cache positions of each
    live: float                     # of these, that a decode step reads on the mean
    functions: dict[str, Function]
    run: Run | None

    @property
    def all_fit(self) -> bool:
        return all(fits(each, self.target) for each in self.functions.values())

    def seconds(self, function: Function) -> tuple[float, str] | None:
        """Of one call, and what it waits for."""
        cost = function.whole_cost
        return None if cost is None else estimates.roofline(cost, self.target, self.inputs.efficiency)


def make_plan(config: Config, decoder: DecoderConfig, target: Target, inputs: Inputs, *,
              wanted: Collection[str] | None = None, compiled: bool | None = None,
              give_up: bool = False, say: Callable[[str], None] = lambda line: None) -> Plan:
    """Compiles the functions for the target, or works them out by formula, and estimates the run.

    Args: wanted, functions, None = all; compiled, None = for all targets but GPUs; give_up, do nothing more once a
        function does not fit, and begin with the likely ones; say, is told what is being compiled.
    Raises: UserError where the mesh fits neither the chips nor the model."""
    compiled = target.kind != "gpu" if compiled is None else compiled
    shape = compile.mesh_shape(config, target.chips)
    mesh: Any = compile.make_mesh(config, target) if compiled else AbstractMesh(shape, sharding.MESH_AXES)
    learner.check_divisible(config, decoder, mesh)
    slots = compile.slot_count(config, decoder, target, mesh)
    capacity = cache_positions(memory.max_positions(config))
    width = packing.row_width(config.data.max_prompt_tokens + config.rollout.max_new_tokens, shape[3])
    attention = learner.choose_attention(config, decoder, width, platform=target.kind, context=shape[3])
    workload = workloads.make_workload(config, mean_tokens=inputs.mean_tokens, prompt_tokens=inputs.prompt_tokens,
                                       one_sequence_per_row=causal.one_sequence_per_row(attention))
    # Without a kernel all of a cache is read, whatever is live in it.
    kernel = compile.cache_layout(config, decoder, target.kind, shape[3]) in KERNELS
    live_share = estimates.live_share(workload, capacity) if kernel else 1.0
    if compiled:
        functions = _compile(config, decoder, mesh, target, slots, workload, live_share, wanted, say, give_up)
    else:
        functions = analytic.make_functions(config, decoder, shape, slots=slots, capacity=capacity, workload=workload,
                                            attention=attention, live_share=live_share)
        functions = {name: each for name, each in functions.items() if wanted is None or name in wanted}
    machine = Machine(target=target, efficiency=inputs.efficiency, batch_shards=shape[0] * shape[1])
    sizes = analytic.Sizes(decoder=decoder, data=shape[0], fsdp=shape[1], tensor=shape[2], context=shape[3],
                           attention=attention, remat=decoder.remat)
    read = sizes.weights - (0 if decoder.tied else sizes.table)     # of the embedding a step reads a few rows
    run = None
    if not give_up or all(fits(each, target) for each in functions.values()):
        run = estimates.make_run(config, functions, workload, machine, slots=slots, capacity=capacity,
                                 weights_bytes=sizes.itemsize * read / shape[2],
                                 flops_per_token=2.0 * (sizes.products + sizes.table), smallest=SMALLEST,
                                 price=inputs.price, watts=inputs.watts)
    return Plan(config=config, decoder=decoder, target=target, shape=shape, inputs=inputs, workload=workload,
                slots=slots, capacity=capacity, live=live_share * capacity, functions=functions, run=run)


def _compile(config: Config, decoder: DecoderConfig, mesh: jax.sharding.Mesh, target: Target, slots: int,
             workload: Workload, live_share: float, wanted: Collection[str] | None, say: Callable[[str], None],
             give_up: bool) -> dict[str, Function]:
    made = compile.make_programs(config, decoder, mesh, slots_count=slots, workload=workload)
    chosen = [program for name, program in made.items() if wanted is None or name in wanted]
    likely = ("gradients", "decode") if give_up else ()
    functions = {}
    for number, program in enumerate(sorted(chosen, key=lambda each: each.name not in likely), start=1):
        say(f"compiling {program.name} ({number} of {len(chosen)})")
        found = compile.compile_program(program, mesh)
        functions[program.name] = Function(
            name=program.name, per=program.per, calls=program.calls, own_bytes=found.own_bytes,
            beside_bytes=program.beside_bytes, cost=found.cost, source="compiled", live_share=live_share,
            pair_share=workload.pair_batches / workload.micro_batches)
        if give_up and not fits(functions[program.name], target):
            break
    return {program.name: functions[program.name] for program in chosen if program.name in functions}


def fits(function: Function, target: Target) -> bool:
    """Whether it, and what is beside it, fits into a chip's memory."""
    return function.cost is not None and function.hbm_bytes <= target.chip.hbm_bytes
