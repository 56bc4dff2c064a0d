"""Searches for the fastest plan that fits: formulas rank all plans, then the best are compiled."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Literal

from effreason.lm.architecture import DecoderConfig
from effreason.planning import chips, plans
from effreason.planning.chips import Target
from effreason.planning.plans import Plan, PlanInputs
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError

MARGIN = 0.9                        # share of the memory that a plan by formula may use
# Up to this depth remat "none" is tried: without remat the layers are compiled one by one.
MAX_UNROLLED_LAYERS = 16
ENOUGH_FITTING = 2                  # compiled plans that fit, to choose from
MAX_COMPILED = 6                    # plans compiled to find them


def search(config: Config, decoder: DecoderConfig, target: Target, inputs: PlanInputs, *,
           log: Callable[[str], None] = lambda line: None) -> Plan:
    """Returns the fastest plan that fits or, if none does, the one that needs the least memory.

    It may change the mesh, rollout.slots, update.rows_per_micro_batch, model.remat and what is kept
    on the host.
    Raises: UserError if no mesh of this many chips divides the model, or none supports the chosen
        attention.
    """
    ranked = _plans_by_formula(config, decoder, target, inputs)
    fitting = sum(_fits_by_formula(plan) for plan, _ in ranked)
    log(f"{len(ranked):,} candidates by formula, {fitting:,} of them fit")
    if not chips.has_compiler(target.kind):
        return ranked[0][0]

    fit: list[Plan] = []
    too_large: list[Plan] = []
    for candidate, candidate_decoder in ranked[:MAX_COMPILED]:
        log(_describe(candidate))
        plan = plans.make_plan(candidate.config, candidate_decoder, target, inputs, stop_early=True,
                               log=log)
        (fit if plan.all_fit else too_large).append(plan)
        if len(fit) == ENOUGH_FITTING:
            break

    return min(fit, key=_rank) if fit else min(too_large, key=_largest_bytes)


def _plans_by_formula(config: Config, decoder: DecoderConfig, target: Target,
                      inputs: PlanInputs) -> list[tuple[Plan, DecoderConfig]]:
    """Returns the plans of all candidates, best first. Raises: UserError if there are none."""
    candidate_plans: list[tuple[Plan, DecoderConfig]] = []
    refusal: UserError | None = None
    for candidate in candidates(config, decoder, target):
        candidate_decoder = dataclasses.replace(decoder, remat=candidate.model.remat)
        try:
            for variant in host_offload_variants(candidate):
                plan = plans.make_plan(variant, candidate_decoder, target, inputs, compiled=False,
                                       stop_early=True)
                if _fits_by_formula(plan):
                    break               # fetching more from the host would only cost time
        except UserError as error:      # this mesh does not support an attention or a cache layout
            refusal = error
            continue
        candidate_plans.append((plan, candidate_decoder))

    if not candidate_plans:
        raise refusal or UserError(
            f"--chips {target.text}: no mesh of {target.chips} chips divides this model; its "
            "heads, key/value heads, feed-forward width, vocabulary and width must be divisible by "
            "their axes")

    return sorted(candidate_plans, key=lambda candidate: _rank(candidate[0]))


def candidates(config: Config, decoder: DecoderConfig, target: Target) -> Iterator[Config]:
    """Yields every configuration to consider, apart from what is kept on the host."""
    remats: list[Literal["full", "attention", "none"]] = ["full", "attention"]
    if decoder.layers <= MAX_UNROLLED_LAYERS:
        remats.append("none")

    for data, fsdp, tensor, context in meshes(decoder, target.chips):
        if target.kind == "gpu" and context > 1:        # cuDNN's attention has no context axis
            continue
        shards, responses = data * fsdp, config.rollout.prompts_per_step * config.rollout.group_size
        mesh = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor,
                                   context=context)
        row_counts = [shards * factor for factor in (1, 2, 4)
                      if factor == 1 or shards * factor <= responses]
        # None: as many as the memory holds.
        slot_counts = [None, *sorted({-(-(responses // part) // shards) * shards
                                      for part in (1, 2, 4, 8) if responses // part})]

        for rows, slots, remat in itertools.product(row_counts, slot_counts, remats):
            yield dataclasses.replace(
                config, mesh=mesh, model=dataclasses.replace(config.model, remat=remat),
                rollout=dataclasses.replace(config.rollout, slots=slots),
                update=dataclasses.replace(config.update, rows_per_micro_batch=rows))


def host_offload_variants(config: Config) -> Iterator[Config]:
    """Yields the configuration with nothing on the host, the reference, the optimizer too."""
    for reference, optimizer in ((False, False), (True, False), (True, True)):
        yield dataclasses.replace(
            config, kl=dataclasses.replace(config.kl, offload_reference=reference),
            update=dataclasses.replace(config.update, offload_optimizer=optimizer))


def meshes(decoder: DecoderConfig, chips: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (data, fsdp, tensor, context) whose product is `chips` and that divide the model."""
    def divisors(number: int) -> list[int]:
        return [divisor for divisor in range(1, number + 1) if number % divisor == 0]

    for tensor in divisors(chips):
        states = [] if decoder.delta is None else [decoder.delta.key_heads]
        if any(size % tensor for size in (decoder.heads, decoder.kv_heads, decoder.vocabulary,
                                          decoder.experts or decoder.mlp_width, *states)):
            continue
        for context in divisors(chips // tensor):
            for fsdp in divisors(chips // tensor // context):
                if decoder.width % fsdp == 0:
                    yield chips // tensor // context // fsdp, fsdp, tensor, context


def _fits_by_formula(plan: Plan) -> bool:
    return _largest_bytes(plan) <= MARGIN * plan.target.chip.hbm_bytes


def _largest_bytes(plan: Plan) -> float:
    return max(function.hbm_bytes for function in plan.functions.values())


def _rank(plan: Plan) -> tuple[bool, float]:
    """Sorts plans that fit first, by their time; the others by their memory."""
    fits = plan.all_fit if plan.functions["decode"].source == "compiled" else _fits_by_formula(plan)
    seconds = plan.run.step_seconds if fits and plan.run is not None else None
    return not fits, _largest_bytes(plan) if seconds is None else seconds


def _describe(plan: Plan) -> str:
    config = plan.config
    offloads = (("reference", config.kl.offload_reference),
                ("optimizer", config.update.offload_optimizer))
    on_host = [name for name, offloaded in offloads if offloaded]
    host = f", {' and '.join(on_host)} on the host" if on_host else ""
    return (f"mesh {' x '.join(map(str, plan.shape))}, {plan.slots} slots, "
            f"{config.update.rows_per_micro_batch} rows, remat {config.model.remat}{host}")
