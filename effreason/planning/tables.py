"""Prints a plan as a table of 80 columns or as JSON."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from effreason.planning.estimates import PlannedFunction, RunEstimate
from effreason.planning.plans import Plan, fits
from effreason.runtime.config import GIB
from effreason.runtime.sharding import MESH_AXES

HEAD = ("function", "for", "own", "other", "FLOPs", "moved", "sent", "time", "limit", "fits")
WIDTHS = (15, 9, 6, 6, 5, 5, 5, 7, 7, 4)


def scaled(value: float, digits: int = 3) -> str:
    """Formats a number with a unit prefix: 2.45T, 310G, 0."""
    if not math.isfinite(value):
        return "-"

    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{_digits(value / size, digits)}{prefix}"
    return "0" if not value else _digits(value, digits)


def duration(seconds: float) -> str:
    """Formats seconds: 12 us, 3.4 ms, 2.5 s, 41 min, 12 h."""
    for least, size, unit in ((3 * 3600, 3600, "h"), (300, 60, "min"), (1, 1, "s"),
                              (1e-3, 1e-3, "ms")):
        if seconds >= least:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds * 1e6)} us"


def _digits(value: float, digits: int = 3) -> str:
    """Formats a number with this many significant digits, at most two decimals and no exponent."""
    if value == 0:
        return "0"

    decimals = min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), 2)
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def render(plan: Plan) -> str:
    """Formats the whole plan in lines of at most 80 columns."""
    lines = [*_heading(plan), "", _row(HEAD)]
    lines += [_row(_cells(plan, function)) for function in plan.functions.values()]
    lines += ["", *_legend(plan), *_collectives(plan), "", *_verdict(plan), *_run(plan)]
    return "\n".join(lines)


def _heading(plan: Plan) -> list[str]:
    chip, settings, workload = plan.target.chip, plan.config, plan.workload
    mesh = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, plan.shape, strict=True))

    on_host = ["reference"] * settings.kl.offload_reference
    on_host += ["optimizer"] * settings.update.offload_optimizer
    hosts = f"on {plan.target.hosts:,} host{'s' * (plan.target.hosts > 1)}"

    return [f"{settings.model.path} on {plan.target.text}",
            f"{plan.target.chips:,} x {chip.name} {hosts}, {chip.hbm_bytes / GIB:.2f} GiB each",
            f"mesh: {mesh}; remat {settings.model.remat}",
            *([f"on the host: {', '.join(on_host)}"] if on_host else []),
            f"{_slots(plan)} {plan.capacity:,} positions; {workload.rows:,} rows of "
            f"{workload.width:,} in a micro-batch"]


def _slots(plan: Plan) -> str:
    return (f"{plan.slots:,} slots of" if plan.slots == plan.most_slots else
            f"{plan.slots:,} to {plan.most_slots:,} slots of at most")


def _row(cells: tuple[str, ...]) -> str:
    left = (0, 1, 8, 9)
    padded = (cell.ljust(width) if column in left else cell.rjust(width)
              for column, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True)))
    return " ".join(padded).rstrip()


def _cells(plan: Plan, function: PlannedFunction) -> tuple[str, ...]:
    cost, timing = function.full_cost, plan.seconds(function)
    own, other = f"{function.own_bytes / GIB:.2f}", f"{function.other_bytes / GIB:.2f}"
    if cost is None or timing is None:
        return function.name, function.per, own, other, "-", "-", "-", "-", "-", "no"

    sent = sum(collective.bytes for collective in cost.collectives)
    return (function.name, function.per, own, other, scaled(cost.flops), scaled(cost.bytes),
            scaled(sent), duration(timing[0]), timing[1],
            "yes" if fits(function, plan.target) else "NO")


def _legend(plan: Plan) -> list[str]:
    efficiency = plan.inputs.efficiency
    analytic = any(function.source == "analytic" for function in plan.functions.values())
    source = "formulas (analytic)" if analytic else "the compiled programs"

    return [f"One chip, from {source}. own: GiB of HBM for arguments, results,",
            "temporaries, code; other: GiB of HBM in use besides. moved: bytes in HBM,",
            "sent: bytes over links. time: the longest of FLOPs, moved, sent at "
            f"{efficiency.compute:.0%}, {efficiency.memory:.0%},",
            f"{efficiency.interconnect:.0%} of the chip's rates; limit: which one. Kernels, which "
            "XLA does not count,",
            f"are added by formula; a decode step reads {plan.live:,.0f} positions of a slot.",
            "Rollouts: decoding at " + " to ".join(
                f"{share:.0%}" for share in sorted({*efficiency.decode}))
            + " of the bandwidth."]


def _collectives(plan: Plan) -> list[str]:
    lines: list[tuple[str, str]] = []
    for function in plan.functions.values():
        collectives = function.cost.collectives if function.cost else ()
        large = [one for one in collectives if one.group > 1 and one.bytes >= 1e6]
        for one in sorted(large, key=lambda one: -one.bytes):
            label = "" if lines and lines[-1][0] == function.name else function.name
            lines.append((function.name,
                          f"  {label:<16}{one.kind:<19}{one.count:>9,.0f} x over {one.group:>5,}"
                          f"{scaled(one.bytes):>9}B"))

    return ["", "collectives of a call, above 1 MB", *(line for _, line in lines)] if lines else []


def _verdict(plan: Plan) -> list[str]:
    if not plan.functions:
        return []

    worst = max(plan.functions.values(), key=lambda function: function.hbm_bytes)
    available = plan.target.chip.hbm_bytes / GIB
    verdict = "fits" if plan.all_fit else "DOES NOT FIT"
    return [f"{verdict}: {worst.hbm_bytes / GIB:.2f} of {available:.2f} GiB per chip at most, in "
            f"{worst.name}"]


def _run(plan: Plan) -> list[str]:
    run, inputs, config = plan.run, plan.inputs, plan.config
    if run is None:
        return ["no estimate of the run: it needs all functions, and all of them must fit"]

    def span(name: str, write: Callable[[float], str] = "{:,.0f}".format) -> str:
        """Formats a number of the run, or its range."""
        return " to ".join(dict.fromkeys(write(getattr(run, name)) for run in plan.runs))

    money = "" if run.money is None else f", {span('money')} in money"
    rows = [
        ("lengths", f"{len(plan.workload.lengths):,} responses, {inputs.mean_tokens:,.0f} "
         "tokens on average (input)"),
        ("rollouts",
         f"{span('rollout_tokens_per_second')} tokens/s, "
         f"{span('rollout_seconds', duration)} a step"),
        ("scoring", f"{duration(run.score_seconds)} a step"),
        ("update",
         f"{duration(run.update_seconds)} a step; rows {run.packing_efficiency:.0%} full; "
         f"{run.update_mfu:.0%} of the chips' FLOP/s"),
        ("step", span("step_seconds", duration)),
        ("run", f"{config.run.steps:,} steps in {span('hours', '{:,.1f}'.format)} h, "
         f"{span('evaluation_hours', '{:,.1f}'.format)} of them evaluation"),
        ("cost",
         f"{span('chip_hours')} chip-hours, {span('energy_kwh')} kWh for the chips{money}"),
    ]
    return [f"{name:<10}{text}" for name, text in rows]


def as_json(plan: Plan) -> dict[str, Any]:
    """Returns the plan as a JSON object; the numbers of a function are for one call on one chip."""
    def as_object(function: PlannedFunction) -> dict[str, Any]:
        cost = function.full_cost
        seconds, limit = plan.seconds(function) or (None, None)
        collectives = [dataclasses.asdict(one) for one in cost.collectives] if cost else []
        return {"fits": fits(function, plan.target), "hbm_bytes": function.hbm_bytes,
                "own_bytes": function.own_bytes, "other_bytes": function.other_bytes,
                "flops": cost and cost.flops, "bytes": cost and cost.bytes,
                "host_bytes": cost and cost.host_bytes, "seconds": seconds, "limit": limit,
                "collectives": collectives, "per": function.per,
                "calls_per_step": function.calls, "source": function.source}

    target, workload, run = plan.target, plan.workload, _ranges(plan.runs)
    return {"model": plan.config.model.path, "chips": target.text, "chip_count": target.chips,
            "hbm_bytes_per_chip": target.chip.hbm_bytes,
            "mesh": dict(zip(MESH_AXES, plan.shape, strict=True)),
            "slots": plan.slots, "most_slots": plan.most_slots, "cache_positions": plan.capacity,
            "row_positions": workload.width, "rows_per_micro_batch": workload.rows,
            "micro_batches": workload.micro_batches,
            "remat": plan.config.model.remat, "inputs": dataclasses.asdict(plan.inputs),
            "fits": plan.all_fit,
            "functions": {name: as_object(function) for name, function in plan.functions.items()},
            "step_seconds": run and run["step_seconds"], "run": run}


def _ranges(runs: tuple[RunEstimate, ...]) -> dict[str, Any] | None:
    """Returns the numbers of the run, each as a list if there are several estimates of it."""
    if not runs:
        return None
    tables = [dataclasses.asdict(run) for run in runs]
    values = {name: [table[name] for table in tables] for name in tables[0]}
    return {name: several[0] if len(set(several)) == 1 else several
            for name, several in values.items()}
