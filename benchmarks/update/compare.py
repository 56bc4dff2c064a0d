"""Measures a learning step against one in plain torch and `transformers`, and against this
machine's matrix products.

    python -m benchmarks.update.compare [--model M1] [--batches fixed,ragged]
        [--engines ours,torch] [--repeats 3] [--json]
    python -m benchmarks.update.compare --scoring
        memory of scoring 32k tokens by the size of the vocabulary
    python -m benchmarks.update.compare --whole
        one whole RL step, with the shares of its parts: of a 1.5B model on an accelerator, or
        --shape 8,512,1408,8,2,32000 --sizes 8,8,64,128 --remat none --dtype float32 on a CPU

The step: 32 sequences of 64 prompt and 256 response tokens through a Qwen2 shape of
benchmarks/sampling/compare.py in float32: log-probs by the reference, the loss, backward, AdamW; no
part of it is saved for the next one. `ragged`: responses of exponential lengths around
128, at most 512, which torch pads and we pack. A second counts response tokens.

Each engine is in a process of its own, whose memory is its own: the most it ever held, compilation
included, above what it held when everything was imported but no weight was there. The engines take
turns, so that all meet the same load; medians. Both get the micro-batch that suits them best, found
beforehand. Rates of matrix products: float32 squares of 1,024 and 2,048, measured in both libraries
right after each step; the best of all is what the steps are measured by. steps.flops says how the
operations of a step are counted: only what any engine must compute.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.shared import MODELS, QWEN2, print_table, say, some_of
from benchmarks.update import accelerator as device
from benchmarks.update import steps
from effreason.lm.architecture import DecoderConfig
from effreason.runtime import sharding

ENGINES = ("ours", "torch")
BATCHES = ("fixed", "ragged")
REMATS = ("none", "attention", "full")
# Two layers of the 1.5B shape: scanned over, more of them need little more.
SCORED = DecoderConfig(vocabulary=151936, width=1536, layers=2, heads=12, kv_heads=2,
                             head_dim=128,
                             mlp_width=8960, tied=True, **(QWEN2 | {"remat": "full"}))
MATMUL_SHARE, TORCH_RATIO = 0.55, 2.3
Row = dict[str, Any]


class Worker:
    """An engine in a process of its own, which makes a step when it is told to."""

    def __init__(self, engine: str, batch: str, options: argparse.Namespace, rows: int) -> None:
        spec = {"engine": engine, "batch": batch, "rows": rows, "model": options.model,
                "remat": options.remat,
                "sequences": options.sequences, "response": options.response}
        self._process = subprocess.Popen([sys.executable, "-m", "benchmarks.update.compare",
                                          "--worker", json.dumps(spec)], text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def step(self) -> Row:
        """Returns its figures. Raises: RuntimeError if the process has ended."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"an engine's process ended with code {self._process.wait()}; its words are above")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def work(spec: Row) -> None:
    """What a worker does: one step for each line of its input, its figures as a line of its
    output."""
    # Whatever libraries print goes elsewhere.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    config = MODELS[spec["model"]]
    batch = steps.make_batch(spec["batch"], config.vocabulary, sequences=spec["sequences"],
                             response=spec["response"])
    if spec["engine"] == "torch":
        import torch
        import transformers

        # The classes come with their first use: code is not what is measured.
        torch.nn.Linear(8, 8)(torch.ones(1, 8)).sum().backward()
        getattr(transformers, "Qwen2ForCausalLM")     # noqa: B009
        before = steps.resident_bytes("VmRSS")
        learner = steps.make_torch(config, batch, rows=spec["rows"])
    else:
        sharding.use_compilation_cache()
        mesh = sharding.make_mesh(data=-1)
        before = steps.resident_bytes("VmRSS")
        learner = steps.make_ours(config, batch, mesh, rows=spec["rows"], remat=spec["remat"])
    for _ in sys.stdin:
        processor, started = time.process_time(), time.perf_counter()
        learner.step()
        figures = {"seconds": time.perf_counter() - started,
                   "cpu_seconds": time.process_time() - processor,
                   "peak_bytes": steps.resident_bytes("VmHWM") - before,
                   "matmul_flops": steps.matmul_flops(learner)}
        print(json.dumps(figures | learner.figures), file=replies, flush=True)


def best_rows(engine: str, batch: str, options: argparse.Namespace) -> int:
    """The micro-batch at which an engine is fastest, of those it may have: by the second step in
    each."""
    candidates = options.ours_rows if engine == "ours" else options.torch_rows
    seconds = {}
    for rows in candidates if len(candidates) > 1 else ():
        say(f"{engine}, {batch}: micro-batches of {rows}")
        with workers([engine], batch, options, {engine: rows}) as running:
            seconds[rows] = min(running[engine].step()["seconds"] for _ in range(2))
    return min(seconds, key=lambda rows: seconds[rows]) if seconds else candidates[0]


@contextlib.contextmanager
def workers(engines: Sequence[str], batch: str, options: argparse.Namespace,
            rows: dict[str, int]) -> Iterator[dict[str, Worker]]:
    running = {engine: Worker(engine, batch, options, rows[engine]) for engine in engines}
    try:
        yield running
    finally:
        for worker in running.values():
            worker.close()


def measure(kind: str, options: argparse.Namespace) -> list[Row]:
    """Each engine on one batch: a row of figures for each."""
    config = MODELS[options.model]
    batch = steps.make_batch(kind, config.vocabulary, sequences=options.sequences,
                             response=options.response)
    work, found = steps.flops(config, batch), {}
    rows = {engine: best_rows(engine, kind, options) for engine in options.engines}
    with workers(options.engines, kind, options, rows) as running:
        for repeat in range(options.repeats + 1):
            for engine, worker in running.items():
                say(f"{engine}, {kind}: " + (f"step {repeat}" if repeat else "first step"))
                figures = worker.step()
                if not repeat:
                    found[engine] = {"engine": engine, "batch": kind, "tokens": batch.tokens,
                                     "flops": work,
                                     "first_seconds": figures["seconds"], "seconds": [],
                                     "cpu_seconds": [],
                                     "matmul_flops": []}
                    continue
                for name in ("seconds", "cpu_seconds", "matmul_flops"):
                    found[engine][name].append(figures[name])
                found[engine] |= {name: figures[name] for name in
                                  ("rows", "fill", "peak_bytes", "programs") if name in figures}
    for row in found.values():
        row["tokens_per_second"] = batch.tokens / statistics.median(row["seconds"])
    return list(found.values())


def judge(rows: Sequence[Row]) -> list[Row]:
    """Adds to each row its share of the best matrix products and how much faster ours is; returns
    the targets."""
    best = max(rate for row in rows for rate in row["matmul_flops"])
    ours = {row["batch"]: row["tokens_per_second"] for row in rows if row["engine"] == "ours"}
    targets = []
    for row in rows:
        row["best_matmul_flops"] = best
        row["matmul_share"] = row["flops"] / statistics.median(row["seconds"]) / best
        if row["batch"] in ours:
            row["ours_is_faster"] = ours[row["batch"]] / row["tokens_per_second"]
        if row["batch"] == "fixed":
            bound, figure = ((MATMUL_SHARE, row["matmul_share"]) if row["engine"] == "ours" else
                             (TORCH_RATIO, row.get("ours_is_faster")))
            what = "ours, of the best matmul rate" if row["engine"] == "ours" else "ours / torch"
            if figure is not None:
                targets.append({"target": what, "figure": figure, "bound": bound,
                                "met": figure >= bound})
    return targets


def print_rows(rows: Sequence[Row]) -> None:
    print_table(["batch", "engine", "tokens/s", "ours is", "s", "cpu s", "peak GB", "of matmul"],
                [[row["batch"], row["engine"], f"{row['tokens_per_second']:,.0f}",
                  f"{row['ours_is_faster']:.2f} x" if "ours_is_faster" in row else "-",
                  f"{statistics.median(row['seconds']):.2f}",
                  f"{statistics.median(row['cpu_seconds']):.2f}",
                  f"{row['peak_bytes'] / 1e9:.2f}", f"{100 * row['matmul_share']:.0f} %"]
                 for row in rows])
    print_table(["micro-batches", "engine", "rows", "filled with tokens", "first step s"],
                [[row["batch"], row["engine"], f"{row['rows']}", f"{100 * row['fill']:.0f} %",
                  f"{row['first_seconds']:.1f}"] for row in rows])
    for row in rows:
        if "programs" in row:       # of the last step
            print_table(["part of the step", "s"], [[name, f"{seconds:.2f}"] for name, seconds in
                                                    row["programs"].items()])


def compare(options: argparse.Namespace) -> Row:
    """All figures, printed and returned."""
    load = os.getloadavg()[0]
    rows = [row for kind in options.batches for row in measure(kind, options)]
    targets, loads = judge(rows), (load, os.getloadavg()[0])
    if not options.json:
        print(f"{options.model}, {options.sequences} sequences, medians of {options.repeats}; "
              f"{len(os.sched_getaffinity(0))} cores, load {loads[0]:.1f} "
              f"before, {loads[1]:.1f} at the end")
        print(f"best product of squares: {rows[0]['best_matmul_flops'] / 1e9:,.0f} GFLOP/s\n")
        print_rows(rows)
        if targets:
            print_table(["target", "figure", "bound", "met"],
                        [[row["target"], f"{row['figure']:.3g}", f">= {row['bound']:g}", "yes"
                          if row["met"] else "no"]
                         for row in targets])
    return {"rows": rows, "targets": targets, "load": loads}


def show_scoring(options: argparse.Namespace) -> Row:
    """Memory that scoring and learning from long rows need, by the size of the vocabulary."""
    rows = device.scoring_memory(SCORED, sharding.make_mesh(data=-1))
    if not options.json:
        print(f"one row of {rows[0]['tokens']:,} tokens, {SCORED.layers} "
              f"layers of width {SCORED.width}, float32: "
              "temporaries\nof the compiled programs, in GiB\n")
        figures = ("scoring_bytes", "gradient_bytes", "logits_bytes")
        print_table(["vocabulary", "scoring", "gradients", "all logits would be"],
                    [[f"{row['vocabulary']:,}", *(f"{row[name] / 2**30:.2f}" for name in figures)]
                     for row in rows])
    return {"rows": rows}


def show_rl_step(options: argparse.Namespace) -> Row:
    """A whole RL step, rollout and learning, and the shares of its parts."""
    layers, width, mlp_width, heads, kv_heads, vocabulary = options.shape
    config = DecoderConfig(vocabulary=vocabulary, width=width, layers=layers, heads=heads,
                                 kv_heads=kv_heads,
                                 head_dim=width // heads, mlp_width=mlp_width, tied=True,
                                 dtype=jnp.dtype(options.dtype),
                                 **(QWEN2 | {"remat": options.remat}))
    prompts, samples, prompt, response = options.sizes
    row = device.rl_step(config, sharding.make_mesh(data=-1), prompts=prompts, samples=samples,
                         prompt=prompt,
                         response=response, rows=options.ours_rows[0], remat=options.remat,
                         chunk=options.chunk,
                         repeats=options.repeats, peak=options.peak_tflops
                         and 1e12 * options.peak_tflops)
    if not options.json:
        share = f"{100 * row['mfu']:.1f} % of the peak (MFU)" if row[
            "mfu"] else "peak unknown: --peak-tflops"
        held = f", {row['peak_bytes'] / 2**30:.1f} GiB held at most" if row["peak_bytes"] else ""
        print(f"{row['device']} x {row['devices']}, {row['dtype']}, "
              f"{row['matrix_entries'] / 1e9:.3g} B weights{held}\n"
              f"{prompts} prompts x {samples} responses of {prompt} "
              f"+ {response:,} tokens; first step "
              f"{sum(row['first_seconds'].values()):.0f} s, with compilation\n")
        print_table(["part", "s", "tokens/s", "rate", "of what is possible"], [
            ["rollout", f"{row['rollout_seconds']:.2f}", f"{row['rollout_tokens_per_second']:,.0f}",
             f"{row['decode_bytes_per_second'] / 1e9:,.0f} GB/s",
             f"{100 * row['decode_bytes_per_second'] / row['copy_bandwidth']:.0f} "
             "% of a copy's rate"],
            ["learning", f"{row['learning_seconds']:.2f}",
             f"{row['learning_tokens_per_second']:,.0f}",
             f"{row['flops_per_second'] / 1e12:,.3g} TFLOP/s", share],
            ["", "", "", "", f"{100 * row['of_matmul']:.0f} % of a product of squares"]])
        whole = row["rollout_seconds"] + row["learning_seconds"]
        print_table(["part", "s", "share"], [
            [name, f"{seconds:.2f}", f"{100 * seconds / whole:.0f} %"]
            for name, seconds in ({"rollout": row["rollout_seconds"]} | row["programs"]).items()])
    return row


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def numbers(count: int | None = None) -> Any:
        def parse(text: str) -> list[int]:
            found = [int(part) for part in text.split(",")]
            if count is not None and len(found) != count:
                raise argparse.ArgumentTypeError(f"expected {count} numbers, found {text!r}")
            return found
        return parse

    parser.add_argument("--model", choices=list(MODELS), default="M1")
    parser.add_argument("--batches", type=some_of(BATCHES), default=list(BATCHES))
    parser.add_argument("--engines", type=some_of(ENGINES), default=list(ENGINES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--response", type=int, default=256, help="tokens; ragged: twice the mean")
    parser.add_argument("--torch-rows", type=numbers(), default=[4, 8, 16, 32], metavar="N,N",
                        help="rows of a micro-batch to choose from")
    parser.add_argument("--ours-rows", type=numbers(), default=[4, 8], metavar="N,N",
                        help="the same for ours; --whole: the first")
    parser.add_argument("--remat", choices=REMATS, default="none",
                        help="ours: what backward computes again")
    parser.add_argument("--scoring", action="store_true",
                        help="memory by the size of the vocabulary, nothing else")
    parser.add_argument("--whole", action="store_true",
                        help="one RL step of any shape, nothing else")
    parser.add_argument("--shape", type=numbers(6), default=[28, 1536, 8960, 12, 2, 151936],
                        help="--whole: layers,width,mlp,heads,kv heads,vocabulary")
    parser.add_argument("--sizes", type=numbers(4), default=[4, 8, 64, 1024],
                        help="--whole: prompts,responses to each,prompt tokens,response tokens")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16",
                        help="--whole")
    parser.add_argument("--chunk", type=int, default=64,
                        help="--whole: decode steps between two looks")
    parser.add_argument("--peak-tflops", type=float,
                        help="--whole: of one device, if its name does not say")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    compared = options.worker is None and not options.scoring and not options.whole
    if compared and "torch" in options.engines and importlib.util.find_spec("torch") is None:
        parser.error("the engine torch needs torch: pip install 'effreason[bench]', "
                     "or choose --engines ours")
    return options


def main() -> None:
    options = parse()
    if options.worker is not None:
        work(options.worker)
        return
    if options.scoring or options.whole:
        sharding.use_compilation_cache()
    result = (show_scoring if options.scoring else show_rl_step if options.whole
              else compare)(options)
    if options.json:
        print(json.dumps({"jax": jax.__version__, "model": options.model, **result}))


if __name__ == "__main__":
    main()
