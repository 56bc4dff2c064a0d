"""The search of `effreason plan --fit`: by formula over everything, then the best few compiled."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

from effreason.lm.model import DecoderConfig
from effreason.planning import plans
from effreason.planning.chips import Target
from effreason.planning.plans import Inputs, Plan
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError

MARGIN = 0.9                        # of the memory, that a plan by formula may take
UNROLLED = 16                       # layers, up to which none is rematerialised: they are compiled one by one then
COMPILED, MOST = 2, 6               # plans that fit to choose from, and plans compiled in search of them


def search(config: Config, decoder: DecoderConfig, target: Target, inputs: Inputs, *,
           say: Callable[[str], None] = lambda line: None) -> Plan:
    """The fastest plan that fits, or, where none does, the one that needs the least memory.

    What it may change: mesh, rollout.slots, update.rows_per_micro_batch, model.remat and what is kept on the host.
    Raises: UserError where no mesh splits the model over so many chips, or none has the attention that is asked for."""
    found: list[tuple[Plan, DecoderConfig]] = []
    refusal: UserError | None = None
    for candidate in candidates(config, decoder, target):
        shaped = dataclasses.replace(decoder, remat=candidate.model.remat)
        try:
            for moved in on_the_host(candidate):
                plan = plans.make_plan(moved, shaped, target, inputs, compiled=False, give_up=True)
                if _by_formula(plan):
                    break               # what is fetched from the host only costs time
        except UserError as error:      # an attention or a layout of the cache that this mesh has not
            refusal = error
            continue
        found.append((plan, shaped))
    if not found and refusal is not None:
        raise refusal
    if not found:
        raise UserError(f"--chips {target.text}: no mesh of {target.chips} chips divides this model; its heads, "
                        "key/value heads, feed-forward width, vocabulary and width must be divisible by their axes")
    ranked = sorted(found, key=lambda each: _rank(each[0]))
    say(f"{len(found):,} candidates by formula, {sum(_by_formula(plan) for plan, _ in found):,} of them fit")
    if target.kind == "gpu":
        return ranked[0][0]
    good: list[Plan] = []
    tried: list[Plan] = []
    for plan, shaped in ranked[:MOST]:
        say(_words(plan))
        compiled = plans.make_plan(plan.config, shaped, target, inputs, give_up=True, say=say)
        (good if compiled.all_fit else tried).append(compiled)
        if len(good) == COMPILED:
            break
    return min(good, key=_rank) if good else min(tried, key=lambda each: max(
        one.hbm_bytes for one in each.functions.values()))


def candidates(config: Config, decoder: DecoderConfig, target: Target) -> Iterator[Config]:
    """Every configuration that is considered, but for what could be kept on the host."""
    remats: tuple[Literal["full", "attention", "none"], ...] = (
        "full", "attention", "none") if decoder.layers <= UNROLLED else ("full", "attention")
    for data, fsdp, tensor, context in meshes(decoder, target.chips):
        if target.kind == "gpu" and context > 1:        # cuDNN's attention has no context axis
            continue
        shards, responses = data * fsdp, config.rollout.prompts_per_step * config.rollout.group_size
        rows = [shards * each for each in (1, 2, 4) if each == 1 or shards * each <= responses]
        slots = sorted({-(-min(responses, most) // shards) * shards for most in (
            responses, responses // 2, responses // 4, responses // 8) if most})
        for micro_batch in rows:
            for count in slots:
                for remat in remats:
                    yield dataclasses.replace(
                        config, mesh=dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor,
                                                         context=context),
                        model=dataclasses.replace(config.model, remat=remat),
                        rollout=dataclasses.replace(config.rollout, slots=count),
                        update=dataclasses.replace(config.update, rows_per_micro_batch=micro_batch))


def on_the_host(config: Config) -> Iterator[Config]:
    """With nothing in the host's memory, with the reference, with the reference and the optimiser's moments."""
    for reference, optimizer in ((False, False), (True, False), (True, True)):
        yield dataclasses.replace(config, kl=dataclasses.replace(config.kl, offload_reference=reference),
                                  update=dataclasses.replace(config.update, offload_optimizer=optimizer))


def meshes(decoder: DecoderConfig, chips: int) -> Iterator[tuple[int, int, int, int]]:
    """Sizes of data, fsdp, tensor and context that multiply to the chips and divide the model."""
    def divisors(number: int) -> list[int]:
        return [each for each in range(1, number + 1) if number % each == 0]

    for tensor in divisors(chips):
        if any(size % tensor for size in (decoder.heads, decoder.kv_heads, decoder.mlp_width, decoder.vocabulary)):
            continue
        for context in divisors(chips // tensor):
            for fsdp in divisors(chips // tensor // context):
                if decoder.width % fsdp == 0:
                    yield chips // tensor // context // fsdp, fsdp, tensor, context


def _by_formula(plan: Plan) -> bool:
    room = MARGIN * plan.target.chip.hbm_bytes
    return all(each.hbm_bytes <= room for each in plan.functions.values())


def _rank(plan: Plan) -> tuple[bool, float]:
    """What fits before what does not; then the faster, or the smaller."""
    largest = max(each.hbm_bytes for each in plan.functions.values())
    fits = plan.all_fit if plan.functions["decode"].source == "compiled" else _by_formula(plan)
    return not fits, plan.run.step_seconds if fits and plan.run is not None else largest


def _words(plan: Plan) -> str:
    config = plan.config
    host = [name for name, is_there in (("reference", config.kl.offload_reference),
                                        ("optimiser", config.update.offload_optimizer)) if is_there]
    return (f"mesh {' x '.join(map(str, plan.shape))}, {plan.slots} slots, {config.update.rows_per_micro_batch} rows, "
            f"remat {config.model.remat}" + (f", {' and '.join(host)} on the host" if host else ""))
