"""Measures the sampling engine against static batches and `transformers`, and against the limits of
this machine.

    python -m benchmarks.sampling.compare [--models M1,M2] [--workloads W1,W2] [--repeats 3]
        [--engines ours,static,static_fast,transformers] [--json FILE]
    python -m benchmarks.sampling.compare --profile
        time of the engine, by slots and cache
    python -m benchmarks.sampling.compare --gpu
        decoding of a 1.5B model at 4k context on an accelerator

Models: Qwen2 shapes with random weights in float32, the same for all engines. W1: 8 prompts x 8
samples, prompt 64, 256 new tokens. W2: 16 prompts x 8 samples, prompt 64, exponential lengths (mean
96, clipped to 8 .. 512), 32 in flight; a second counts the tokens that were wanted. No EOS: a row
ends at its length, which the engine gets as the request's max_new_tokens. That is a limit on the
device, as unknown to the scheduler as an EOS is: `expected_tokens` stays None, and the capacity of
the cache follows from the 64 + 512 positions that any row might take.

Engines run in turn, so that all meet the same load; medians, after a first run that compiles
("first s": of the whole workload for ours, of two tokens for the others). `static` is what one
writes in JAX without an engine; `static_fast` is the same loop with the engine's decode step and
draw, so that the rest is scheduling; `transformers` needs the extra `bench`. Figures are only as
good as the machine is idle: the load is printed.
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.sampling import engines as baselines
from benchmarks.sampling import parts as pieces
from benchmarks.shared import MODELS, QWEN2, print_table, say, some_of
from effreason.lm import kv_cache, model
from effreason.lm.architecture import DecoderConfig
from effreason.lm.kernels import unsupported_reason
from effreason.runtime import sharding

ENGINES = ("ours", *baselines.ENGINES)
# (model, workload, against what, at least this many times as fast)
RATIOS = (("M1", "W2", "static", 8.0), ("M1", "W2", "transformers", 8.5),
          ("M1", "W1", "transformers", 3.3),
          ("M2", "W2", "transformers", 4.0))
PRODUCTS_SHARE, GROUP_PREFILL, HOST_SHARE = 0.55, 4.0, 0.05
Row = dict[str, Any]


def measure(name: str, workload_name: str, params: model.Params, mesh: Mesh,
            options: argparse.Namespace) -> list[Row]:
    """Each engine on one workload: a row of figures for each."""
    config = MODELS[name]
    workload = baselines.make_workload(workload_name, config.vocabulary)
    makers: dict[str, Any] = {"ours": functools.partial(baselines.make_ours, chunk=options.chunk),
                              **baselines.ENGINES}
    engines, rows = {}, {}
    for kind in options.engines:
        engines[kind] = engine = makers[kind](config, params, mesh, workload)
        first = seconds(engine, workload if engine.ragged else workload.clipped(2))
        rows[kind] = {"model": name, "workload": workload_name, "engine": kind,
                      "first_seconds": first, "seconds": [],
                      "cpu_seconds": [], "loads": [], "compilations": engine.compiled(),
                      "recompilations": 0,
                      "tokens": int(workload.limits.sum())}
    alone = pieces.make_products(config, params, workload.rows)
    for _ in range(options.repeats):
        for kind, engine in engines.items():
            row, compiled = rows[kind], engine.compiled()
            times = row["seconds"]
            if times and sum(times) + times[-1] > options.budget:
                continue            # a slow engine has shown what it can
            say(f"{name} {workload_name} {kind}, run {len(times) + 1}")
            processor = time.process_time()
            times.append(seconds(engine, workload))
            row["cpu_seconds"].append(time.process_time() - processor)
            row["loads"].append(os.getloadavg()[0])
            row["recompilations"] += engine.compiled() - compiled
            if kind == "ours":
                row["steps"] = engine.figures["steps"]
                row.setdefault("host_shares", []).append(engine.figures["host_seconds"] / times[-1])
                if workload_name == "W1":       # right after the run: under the same load
                    row.setdefault("products_shares", []).append(row["steps"] * alone() / times[-1])
    for row in rows.values():
        row["tokens_per_second"] = row["tokens"] / statistics.median(row["seconds"])
        for figure in ("host_share", "products_share"):
            if figure + "s" in row:
                row[figure] = statistics.median(row[figure + "s"])
    return list(rows.values())


def seconds(engine: baselines.Engine, workload: baselines.Workload) -> float:
    """Returns the figures of one run. Raises: RuntimeError if a row lacks tokens it wants."""
    started = time.perf_counter()
    tokens = engine.generate(workload, 0)
    elapsed = time.perf_counter() - started
    if [len(row) for row in tokens] != workload.limits.tolist():
        raise RuntimeError("an engine did not give every row its tokens")
    return elapsed


def take_apart(name: str, params: model.Params, mesh: Mesh, options: argparse.Namespace) -> Row:
    """The limits of the machine for this model, the parts of a rollout, and whether the engines
    agree."""
    config, repeats = MODELS[name], options.repeats
    result: Row = {"model": name}
    measurements: list[tuple[str, Callable[[], Any]]] = [
        ("greedy_agreement",
         lambda: baselines.greedy_agreement(config, params, mesh, options.engines)),
        ("roofline",
         lambda: pieces.roofline(config, params, baselines.make_workload("W1", config.vocabulary),
                                             repeats)),
        ("prefill", lambda: pieces.prefill(config, params, mesh, repeats)),
        ("group_prefill", lambda: pieces.group_prefill(config, params, mesh, min(repeats, 2))),
        ("decode_ms", lambda: pieces.decode_steps(config, params, mesh, repeats)),
        ("draw_ms", lambda: pieces.draw_ms(config, repeats))]
    for part, measured in measurements:
        say(f"{name} {part}")
        result[part] = measured()
    return result


def judge(runs: Sequence[Row], parts: Sequence[Row]) -> list[Row]:
    """The targets for which there are figures: what, the figure, the bound, whether it is met."""
    rates = {(row["model"], row["workload"], row["engine"]): row["tokens_per_second"]
             for row in runs}
    judged = []

    def add(what: str, figure: float, sign: str, bound: float) -> None:
        met = figure >= bound if sign == ">=" else figure < bound
        judged.append({"target": what, "figure": figure, "bound": f"{sign} {bound:g}", "met": met})

    for name, workload, other, least in RATIOS:
        ours, theirs = rates.get((name, workload, "ours")), rates.get((name, workload, other))
        if ours and theirs:
            add(f"{workload} on {name}: ours / {other}", ours / theirs, ">=", least)
    for part in parts:
        if part["model"] == "M1":
            add("M1: prompts read once, not for every sample", part["group_prefill"]["ratio"], ">=",
                GROUP_PREFILL)
    for row in runs:
        if row["engine"] == "ours":
            label = f"{row['workload']} on {row['model']}"
            if label == "W1 on M1":
                add(f"{label}: of the rate of its products alone", row["products_share"], ">=",
                    PRODUCTS_SHARE)
            add(f"{label}: host time between chunks, of all", row["host_share"], "<", HOST_SHARE)
            add(f"{label}: programs compiled after the first run", row["recompilations"], "<", 1)
    return judged


def print_runs(runs: Sequence[Row]) -> None:
    rates = {(row["model"], row["workload"], row["engine"]): row["tokens_per_second"]
             for row in runs}
    shown, engine = [], []
    for row in runs:
        ours, wall = rates.get((row["model"], row["workload"],
                                "ours")), statistics.median(row["seconds"])
        label = f"{row['model']} {row['workload']}"
        shown.append([label, row["engine"], f"{row['tokens_per_second']:,.0f}",
                      f"{ours / row['tokens_per_second']:.2f}" if ours else "-", f"{wall:.2f}",
                      f"{statistics.median(row['cpu_seconds']):.2f}", f"{len(row['seconds'])}",
                      f"{row['first_seconds']:.1f}"])
        if row["engine"] == "ours":
            share = f"{100 * row['products_share']:.0f} %" if "products_share" in row else "-"
            engine.append([label, f"{row['steps']}", f"{1e3 * wall / row['steps']:.2f}",
                           f"{row['tokens'] / row['steps']:.1f}", share,
                           f"{100 * row['host_share']:.1f} %",
                           f"{row['compilations']} + {row['recompilations']}"])
    print_table(["run", "engine", "tokens/s", "ours/it", "s", "cpu s", "runs", "first s"], shown)
    if engine:
        print_table(["ours", "steps", "ms/step", "tokens/step", "of products", "host", "programs"],
                    engine)


def print_parts(part: Row) -> None:
    roofline, name = part["roofline"], part["model"]
    print(f"{name}: greedy tokens as ours: "
          + (", ".join(f"{kind} {100 * share:.4g} %"
                       for kind, share in part["greedy_agreement"].items()) or "-"))
    bandwidth = roofline["bandwidth"]
    print(f"1024 x 1024 matrices: {roofline['matmul_flops'] / 1e9:,.0f} GFLOP/s; memory: "
          f"{bandwidth['read'] / 1e9:.1f} GB/s read, {bandwidth['copied'] / 1e9:.1f} GB/s copied")
    print("A step: t >= max((bytes of weights + live cache) / bandwidth, 2 N B / FLOP/s)\n"
          f"= max(({roofline['weight_bytes'] / 1e6:.1f} + "
          f"{roofline['cache_bytes'] / 1e6:.1f}) MB / "
          f"{max(bandwidth.values()) / 1e9:.1f} GB/s, 2 x {roofline['entries'] / 1e6:.2f} "
          f"M x {roofline['rows']} / {roofline['matmul_flops'] / 1e9:,.0f} GFLOP/s)\n"
          f"= max({roofline['limit_ms']['bytes']:.2f}, "
          f"{roofline['limit_ms']['flops']:.2f}) ms: at most "
          f"{1e3 * roofline['rows'] / max(roofline['limit_ms'].values()):,.0f} tokens/s for W1\n")
    print_table([f"{name}, products alone: batch", "ms/step", "tokens/s", "GFLOP/s"],
                [[batch, f"{rate['ms']:.2f}", f"{rate['tokens_per_second']:,.0f}",
                  f"{rate['flops'] / 1e9:,.0f}"]
                 for batch, rate in roofline["products"].items()])
    group = part["group_prefill"]
    lines = [[f"prefill, {shape} tokens", f"{rate:,.0f} tokens/s"]
             for shape, rate in part["prefill"].items()]
    lines += [["8 prompts x 8 samples x 1,024 tokens, read once",
               f"{group['group_seconds']:.2f} s"],
              ["the same, every sample read",
               f"{group['each_seconds']:.2f} s = {group['ratio']:.1f} x"]]
    lines += [[f"draw, 64 rows: {how}", f"{ms:.2f} ms"] for how, ms in part["draw_ms"].items()]
    lines += [[f"decode step, {shape} (slots x cache)", f"{ms:.2f} ms"]
              for shape, ms in part["decode_ms"].items()]
    print_table([f"{name}, part", "cost"], lines)


def compare(options: argparse.Namespace, mesh: Mesh) -> Row:
    """All figures, printed as they come and returned."""
    load, runs, parts = os.getloadavg()[0], [], []
    for name in options.models:
        params = model.init(MODELS[name], jax.random.key(0))
        if options.parts:
            parts.append(take_apart(name, params, mesh, options))
        for workload in options.workloads:
            runs += measure(name, workload, params, mesh, options)
    judged, loads = judge(runs, parts), (load, os.getloadavg()[0])
    print(f"{len(os.sched_getaffinity(0))} cores, load {loads[0]:.1f} before "
          f"and {loads[1]:.1f} at the end; chunks of {options.chunk} steps\n")
    if runs:
        print_runs(runs)
    for part in parts:
        print_parts(part)
    if judged:
        print_table(["target", "figure", "bound", "met"],
                    [[row["target"], f"{row['figure']:.3g}", row["bound"], "yes" if row["met"]
                      else "no"]
                     for row in judged])
    return {"runs": runs, "parts": parts, "targets": judged, "load": loads}


def show_profile(options: argparse.Namespace, mesh: Mesh) -> Row:
    """The engine's time by slots and cache, for each model and workload."""
    profiles = []
    for name in options.models:
        params = model.init(MODELS[name], jax.random.key(0))
        for workload_name in options.workloads:
            workload = baselines.make_workload(workload_name, MODELS[name].vocabulary)
            rows = pieces.profile(MODELS[name], params, mesh, workload, options.chunk)
            profiles.append({"model": name, "workload": workload_name, "rows": rows})
            spent = sum(row["seconds"] for row in rows)
            print(f"{name}, {workload_name}: {workload.limits.sum() / spent:,.0f} tokens/s")
            print_table(["slots", "cache", "chunks", "steps", "ms/step", "total s", "share"],
                        [[f"{row['slots']}", f"{row['positions']}", f"{row['chunks']:.0f}",
                          f"{row['steps']:.0f}",
                          f"{1e3 * row['seconds'] / max(row['steps'], 1):.2f}",
                          f"{row['seconds']:.2f}",
                          f"{100 * row['seconds'] / spent:.0f} %"] for row in rows])
    return {"profiles": profiles}


def decode_on_accelerator(options: argparse.Namespace, mesh: Mesh) -> Row:
    """Decoding at the end of a long context in the dtype of accelerators."""
    layers, width, mlp_width, heads, kv_heads, vocabulary = options.shape
    fits = mesh.devices.flat[0].platform, width // heads, options.dtype
    if options.layout and (reason := unsupported_reason(options.layout, *fits)):
        sys.exit(f"error: --layout {options.layout} does not fit: {reason}")
    config = DecoderConfig(vocabulary=vocabulary, width=width, layers=layers, heads=heads,
                                 kv_heads=kv_heads,
                                 head_dim=width // heads, mlp_width=mlp_width, tied=True,
                                 dtype=jnp.dtype(options.dtype),
                                 cache_layout=options.layout or kv_cache.choose_layout(*fits),
                                 **QWEN2)
    row = pieces.accelerator(config, mesh, rows=options.slots, context=options.context,
                             steps=options.steps,
                             repeats=options.repeats)
    print(f"{row['device']} x {row['devices']}, {row['dtype']}, "
          f"{row['matrix_entries'] / 1e9:.3g} B weights, "
          f"{row['rows']} slots at {row['context']:,} positions, cache {row['layout']}")
    print(f"{row['tokens_per_second']:,.0f} tokens/s, {row['step_ms']:.2f} ms/step; a step reads "
          f"{row['weight_bytes'] / 1e9:.3g} GB of weights and "
          f"{row['cache_bytes'] / 1e9:.3g} GB of cache,\n"
          f"{100 * row['bandwidth_fraction']:.1f} % of the "
          f"{row['copy_bandwidth'] / 1e9:,.0f} GB/s of a copy")
    return row


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def shape(text: str) -> list[int]:
        numbers = [int(part) for part in text.split(",")]
        if len(numbers) != 6 or numbers[1] % numbers[3]:
            raise argparse.ArgumentTypeError(
                "expected layers,width,mlp,heads,kv heads,vocabulary, heads | width")
        return numbers

    parser.add_argument("--models", type=some_of(list(MODELS)), default=list(MODELS))
    parser.add_argument("--workloads", type=some_of(["W1", "W2"]), default=["W1", "W2"])
    parser.add_argument("--engines", type=some_of(ENGINES), default=list(ENGINES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=60,
                        help="seconds for an engine's repeats on one workload")
    parser.add_argument("--chunk", type=int, default=16,
                        help="decode steps between two looks at what has finished")
    parser.add_argument("--no-parts", dest="parts", action="store_false",
                        help="neither limits nor parts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for all figures")
    parser.add_argument("--profile", action="store_true",
                        help="the engine's time by slots and cache, nothing else")
    parser.add_argument("--gpu", action="store_true",
                        help="decoding of one shape on an accelerator, nothing else")
    parser.add_argument("--shape", type=shape, default=[28, 1536, 8960, 12, 2, 151936],
                        help="--gpu: layers,width,mlp,heads,kv heads,vocabulary")
    parser.add_argument("--slots", type=int, default=64, help="--gpu")
    parser.add_argument("--context", type=int, default=4096, help="--gpu: cache positions")
    parser.add_argument("--steps", type=int, default=64, help="--gpu: decode steps in one run")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16",
                        help="--gpu")
    parser.add_argument("--layout", choices=list(kv_cache.CACHE_LAYOUTS),
                        help="--gpu: of the cache")
    options = parser.parse_args()
    compared = not options.gpu and not options.profile
    if compared and "transformers" in options.engines and importlib.util.find_spec("torch") is None:
        parser.error("the engine transformers needs torch: pip install "
                     "'effreason[bench]', or choose other --engines")
    return options


def main() -> None:
    options = parse()
    sharding.use_compilation_cache()
    mesh = sharding.make_mesh(data=-1)
    mode = decode_on_accelerator if options.gpu else show_profile if options.profile else compare
    result = mode(options, mesh)
    if options.json:
        options.json.write_text(json.dumps({"jax": jax.__version__,
                                            "device": jax.devices()[0].device_kind,
                                            "cores": len(os.sched_getaffinity(0)), **result},
                                           indent=1) + "\n")


if __name__ == "__main__":
    main()
