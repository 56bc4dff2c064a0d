"""Measures memory and time of a learning step with adapters against one that trains all weights.

    python -m benchmarks.update.adapters [--rank 16] [--sequences 8] [--response 128] [--json]

The model has the shape of SmolLM2-135M, with random weights, in float32; the batch is like that of
benchmarks/update/compare.py. A step packs the responses, scores them by the reference, and updates
the policy. Each kind is in a process of its own, whose memory is its own: the most it ever
held, compilation included, above what it held when everything was imported but no weight was there.
The kinds take turns, so that both meet the same load; medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.shared import MODELS, print_table, say
from benchmarks.update import steps
from effreason.lm.architecture import DecoderConfig, alike
from effreason.runtime import sharding

SMOLLM2 = DecoderConfig(vocabulary=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64,
                        mlp_width=1536, norm_eps=1e-5, kinds=alike(theta=1e5), tied=True,
                        remat="full")
KNOWN = MODELS | {"SmolLM2": SMOLLM2}
FIGURES = {"peak_bytes": "peak memory", "update_seconds": "update",
           "step_seconds": "whole step"}


def work(spec: dict[str, Any]) -> None:
    """What a process does: one step for each line of its input, its figures as a line of output."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                   # whatever libraries print goes elsewhere
    sharding.use_compilation_cache()
    config, mesh = KNOWN[spec["model"]], sharding.make_mesh(data=-1)
    batch = steps.make_batch("fixed", config.vocabulary, sequences=spec["sequences"],
                             response=spec["response"])
    before = steps.resident_bytes("VmRSS")
    learner = steps.make_ours(config, batch, mesh, rows=spec["rows"], remat=config.remat,
                              rank=spec["rank"])
    for _ in sys.stdin:
        learner.step()
        figures = {"peak_bytes": steps.resident_bytes("VmHWM") - before}
        print(json.dumps(learner.figures | figures), file=replies, flush=True)


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns the figures of both kinds."""
    kinds = {"all weights": 0, f"rank {options.rank}": options.rank}
    shared = {name: getattr(options, name) for name in ("model", "sequences", "response", "rows")}
    processes = {kind: subprocess.Popen(
        [sys.executable, "-m", "benchmarks.update.adapters", "--worker",
         json.dumps(shared | {"rank": rank})],
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for kind, rank in kinds.items()}
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    try:
        for repeat in range(options.repeats + 1):
            for kind, process in processes.items():
                say(f"{kind}: " + (f"step {repeat}" if repeat else "first step"))
                assert process.stdin and process.stdout
                process.stdin.write("step\n")
                process.stdin.flush()
                if not (line := process.stdout.readline()):
                    raise RuntimeError(f"a process ended with code {process.wait()}")
                found[kind].append(json.loads(line))
    finally:
        for process in processes.values():
            assert process.stdin
            process.stdin.close()
            process.wait()
    return {kind: {"peak_bytes": rows[-1]["peak_bytes"]} | {
        name: statistics.median(row[name] for row in rows[1:])
        for name in ("update_seconds", "step_seconds")} for kind, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default, text in (("rank", 16, "of the adapters"), ("sequences", 8, "in the batch"),
                                ("response", 128, "tokens"), ("rows", 4, "of a micro-batch"),
                                ("repeats", 2, "steps after the first")):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--model", choices=list(KNOWN), default="SmolLM2")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker)
        return

    found = measure(options)
    full, adapters = found.values()
    ratios = {name: adapters[name] / full[name] for name in FIGURES}
    if options.json:
        print(json.dumps(found | {"ratios": ratios}))
        return
    print_table(["trained", "peak GB", "update s", "whole step s"], [
        [kind, f"{row['peak_bytes'] / 1e9:.2f}", f"{row['update_seconds']:.2f}",
         f"{row['step_seconds']:.2f}"] for kind, row in found.items()])
    print("adapters / all weights: " + ", ".join(
        f"{text} {ratios[name]:.2f}" for name, text in FIGURES.items()))


if __name__ == "__main__":
    main()
