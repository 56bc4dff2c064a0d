"""A plan for people, at 80 columns, and for programs, as JSON."""

import dataclasses
import math
from typing import Any

from effreason.planning.chips import GIB
from effreason.planning.estimates import Function
from effreason.planning.plans import Plan, fits
from effreason.runtime.sharding import MESH_AXES

HEAD = ("function", "for", "own", "beside", "FLOPs", "moved", "sent", "time", "limit", "fits")
WIDTHS = (15, 9, 6, 6, 5, 5, 5, 7, 7, 4)


def scaled(value: float, digits: int = 3) -> str:
    """A number with a unit prefix: 2.45T, 310G, 0."""
    if not math.isfinite(value):
        return "-"
    prefixes = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
    for prefix, size in prefixes:
        if abs(value) >= 0.9995 * size:
            return f"{_digits(value / size, digits)}{prefix}"
    return "0" if not value else _digits(value, digits)


def duration(seconds: float) -> str:
    """Seconds as people say them: 12 us, 3.4 ms, 2.5 s, 41 min, 12 h."""
    for least, size, unit in ((3 * 3600, 3600, "h"), (180, 60, "min"), (1, 1, "s"), (1e-3, 1e-3, "ms")):
        if seconds >= least:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds * 1e6)} us"


def _digits(value: float, digits: int = 3) -> str:
    """Three digits that mean something, without an exponent."""
    if value == 0:
        return "0"
    behind = min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), 2)
    text = f"{value:.{behind}f}"
    return text.rstrip("0").rstrip(".") if behind else text


def render(plan: Plan) -> str:
    """The whole plan as lines of at most 80 columns."""
    lines = [*_heading(plan), "", _row(HEAD)]
    lines += [_row(_cells(plan, each)) for each in plan.functions.values()]
    lines += ["", *_legend(plan), *_collectives(plan), "", *_verdict(plan), *_run(plan)]
    return "\n".join(lines)


def _heading(plan: Plan) -> list[str]:
    chip, settings, workload = plan.target.chip, plan.config, plan.workload
    mesh = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, plan.shape, strict=True))
    options = [f"remat {settings.model.remat}"]
    options += ["reference on the host"] * settings.kl.offload_reference
    options += ["optimiser on the host"] * settings.update.offload_optimizer
    hosts = f"on {plan.target.hosts:,} host{'s' * (plan.target.hosts > 1)}"
    return [f"{settings.model.path} on {plan.target.text}",
            f"{plan.target.chips:,} x {chip.name} {hosts}, {chip.hbm_bytes / GIB:.2f} GiB each",
            f"mesh: {mesh}; {'; '.join(options)}",
            f"{plan.slots:,} slots of {plan.capacity:,} positions; {workload.rows:,} rows of {workload.width:,} in a "
            "micro-batch"]


def _row(cells: tuple[str, ...]) -> str:
    left = (0, 1, 8, 9)
    return " ".join(cell.ljust(width) if place in left else cell.rjust(width)
                    for place, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True))).rstrip()


def _cells(plan: Plan, each: Function) -> tuple[str, ...]:
    cost, timed = each.whole_cost, plan.seconds(each)
    own, beside = f"{each.own_bytes / GIB:.2f}", f"{each.beside_bytes / GIB:.2f}"
    if cost is None or timed is None:
        return each.name, each.per, own, beside, "-", "-", "-", "-", "-", "no"
    sent = sum(collective.bytes for collective in cost.collectives)
    return (each.name, each.per, own, beside, scaled(cost.flops), scaled(cost.bytes), scaled(sent), duration(timed[0]),
            timed[1], "yes" if fits(each, plan.target) else "NO")


def _legend(plan: Plan) -> list[str]:
    efficiency = plan.inputs.efficiency
    source = "formulas (analytic)" if any(each.source == "analytic" for each in plan.functions.values()) else \
        "the compiled programs"
    return [f"One chip, from {source}. own: GiB of HBM of its arguments, results,",
            "temporaries, code; beside: GiB of what else is there then. moved: bytes in HBM,",
            "sent: bytes over links. time: the longest of FLOPs, moved, sent at "
            f"{efficiency.compute:.0%}, {efficiency.memory:.0%},",
            f"{efficiency.interconnect:.0%} of the chip's rates; limit: which. Kernels, which XLA does not count, are",
            f"in by formula; a decode step reads {plan.live:,.0f} positions of a slot."]


def _collectives(plan: Plan) -> list[str]:
    lines: list[tuple[str, str]] = []
    for each in plan.functions.values():
        found = [one for one in (each.cost.collectives if each.cost else ()) if one.group > 1 and one.bytes >= 1e6]
        for one in sorted(found, key=lambda one: -one.bytes):
            label = "" if lines and lines[-1][0] == each.name else each.name
            lines.append((each.name, f"  {label:<16}{one.kind:<19}{one.count:>9,.0f} x over {one.group:>5,}"
                                     f"{scaled(one.bytes):>9}B"))
    return ["", "collectives of a call, above 1 MB", *(line for _, line in lines)] if lines else []


def _verdict(plan: Plan) -> list[str]:
    if not plan.functions:
        return []
    worst = max(plan.functions.values(), key=lambda each: each.hbm_bytes)
    room = plan.target.chip.hbm_bytes / GIB
    word = "fits" if plan.all_fit else "DOES NOT FIT"
    return [f"{word}: {worst.hbm_bytes / GIB:.2f} of {room:.2f} GiB a chip at most, in {worst.name}"]


def _run(plan: Plan) -> list[str]:
    run, inputs, config = plan.run, plan.inputs, plan.config
    if run is None:
        return ["no estimate of the run: it needs all functions, and that they fit"]
    money = "" if run.money is None else f", {run.money:,.0f} in money"
    rows = [
        ("lengths", f"{len(plan.workload.lengths):,} responses, {inputs.mean_tokens:,.0f} tokens on the mean (input)"),
        ("rollouts", f"{run.rollout_tokens_per_second:,.0f} tokens/s, {duration(run.rollout_seconds)} a step"),
        ("scoring", f"{duration(run.score_seconds)} a step"),
        ("update", f"{duration(run.update_seconds)} a step; rows {run.row_fill:.0%} full; "
                   f"{run.update_mfu:.0%} of the chips' FLOP/s"),
        ("step", duration(run.step_seconds)),
        ("run", f"{config.run.steps:,} steps in {run.hours:,.1f} h, {run.evaluation_hours:,.1f} of them evaluation"),
        ("cost", f"{run.chip_hours:,.0f} chip-hours, {run.energy_kwh:,.0f} kWh by the chips{money}"),
    ]
    return [f"{name:<10}{text}" for name, text in rows]


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as a table of numbers; of one chip, one call."""
    def function(each: Function) -> dict[str, Any]:
        cost, timed = each.whole_cost, plan.seconds(each)
        known: dict[str, Any] = dict.fromkeys(("flops", "bytes", "host_bytes", "seconds", "limit"))
        if cost is not None and timed is not None:
            known = {"flops": cost.flops, "bytes": cost.bytes, "host_bytes": cost.host_bytes, "seconds": timed[0],
                     "limit": timed[1]}
        return {"fits": fits(each, plan.target), "hbm_bytes": each.hbm_bytes, "own_bytes": each.own_bytes,
                "beside_bytes": each.beside_bytes, **known,
                "collectives": [dataclasses.asdict(one) for one in (cost.collectives if cost else ())],
                "per": each.per, "calls_per_step": each.calls, "source": each.source}

    return {"model": plan.config.model.path, "chips": plan.target.text, "chip_count": plan.target.chips,
            "hbm_bytes_per_chip": plan.target.chip.hbm_bytes, "mesh": dict(zip(MESH_AXES, plan.shape, strict=True)),
            "slots": plan.slots, "cache_positions": plan.capacity, "row_positions": plan.workload.width,
            "rows_per_micro_batch": plan.workload.rows, "micro_batches": plan.workload.micro_batches,
            "remat": plan.config.model.remat, "inputs": dataclasses.asdict(plan.inputs), "fits": plan.all_fit,
            "functions": {name: function(each) for name, each in plan.functions.items()},
            "run": None if plan.run is None else dataclasses.asdict(plan.run)}
