"""What one accelerator does with the programs of a run: how fast, and whether right.

    python -m benchmarks.device_check [machine|kernels|decode|step] [--tiny]

machine: the rates of copies and products. kernels: one layer's attention, in decoding by cache
layout, in training by implementation, with gradients compared to XLA's. decode: a decode step of
the 1.5B shape. step: whole RL steps with random weights, with the gap between the log-probs of
sampling and scoring, and the peak of memory. Each result is one JSON line; a part that fails is a
result too, and the next goes on. --tiny is for a trial on a CPU.
"""

import argparse
import functools
import json
import sys
import time
import traceback
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sampling import parts
from benchmarks.update import steps
from effreason.lm import attention, cudnn, kv_cache, model
from effreason.lm.architecture import DecoderConfig, alike
from effreason.lm.kernels import unsupported_reason
from effreason.rl.learner import Learner
from effreason.runtime import sharding
from effreason.sampling import engine
from effreason.sampling.draws import SamplingParams

PARTS = ("machine", "kernels", "decode", "step")
HEADS = ((12, 2), (28, 4))              # query and key/value heads of the 1.5B and the 7B model
HEAD_DIM = 128
SAMPLING = SamplingParams(temperature=1.0, eos_ids=())
STARTED = time.perf_counter()


def put(what: str, **figures: Any) -> None:
    """Prints a result."""
    rounded = {name: float(f"{value:.5g}") if isinstance(value, float) else value
               for name, value in figures.items()}
    seconds = round(time.perf_counter() - STARTED, 1)
    print(json.dumps({"what": what, "at_seconds": seconds, **rounded}), flush=True)


def attempt(what: str, function: Callable[[], Any], **facts: Any) -> None:
    """Prints what a part measures, or how it failed."""
    try:
        for figures in function():
            put(what, **facts, **figures)
    except Exception as error:          # whatever compilers and drivers raise
        message = " ".join(str(error).split())[:300]
        put(what, **facts, failed=type(error).__name__, message=message)
        traceback.print_exc(limit=-4, file=sys.stderr)


def decoder(tiny: bool, **changes: Any) -> DecoderConfig:
    """Returns the shape of the 1.5B model, or a tiny one."""
    shape = dict(vocabulary=512, width=256, layers=2, heads=2, kv_heads=1, head_dim=HEAD_DIM,
                 mlp_width=512) if tiny else dict(
        vocabulary=151936, width=1536, layers=28, heads=12, kv_heads=2, head_dim=HEAD_DIM,
        mlp_width=8960)
    return DecoderConfig(**shape, norm_eps=1e-6, kinds=alike(theta=1e4), qkv_bias=True,
                               **{"dtype": jnp.bfloat16, "remat": "full"} | changes)


def copy_bandwidth(tiny: bool) -> float:
    """Returns the bytes a second, read and written, of a copy."""
    x = jnp.zeros((2**22 if tiny else 2**29,), jnp.float32)
    return 2 * x.nbytes / parts.median_seconds(jax.jit(lambda x: x + 1), x, repeats=5)


def machine(tiny: bool):
    device, side = jax.devices()[0], 512 if tiny else 8192
    square = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = parts.median_seconds(jax.jit(jnp.matmul), square, square, repeats=5)
    yield {"device": device.device_kind, "jax": jax.__version__,
           "memory_gib": (device.memory_stats() or {}).get("bytes_limit", 0) / 2**30,
           "copy_gb_per_second": copy_bandwidth(tiny) / 1e9,
           "product_tflops": 2 * side**3 / product / 1e12}


def trials(tiny: bool):
    """Whether the kernels that fit this device pass the trials of a run."""
    device = jax.devices()[0]
    for heads, kv_heads in HEADS:
        facts = dict(rows=2, heads=heads, kv_heads=kv_heads, head_dim=HEAD_DIM, dtype=jnp.bfloat16)
        for name, passes in (("cudnn", kv_cache.passes_trial), ("cudnn", attention.passes_trial),
                             ("cudnn_packed", attention.passes_trial)):
            reason = unsupported_reason(name, device.platform, HEAD_DIM, jnp.bfloat16,
                                        capability=cudnn.capability(device))
            yield {"kernel": name, "for": passes.__module__.rpartition(".")[2], "heads": heads,
                   "passes": passes(name, **facts) if reason is None else reason}


def decode_attention(tiny: bool, layout: str, heads: int, kv_heads: int, bandwidth: float):
    """One layer's attention in a decode step: the live cache against the rate of a copy."""
    loops = 2 if tiny else 30
    for rows, positions in ((4, 256),) if tiny else ((8, 32768), (64, 4096), (256, 8192)):
        sizes = {"batch": rows, "kv_heads": kv_heads, "sequence": positions, "head_dim": HEAD_DIM}
        axes = kv_cache.CACHE_LAYOUTS[layout]
        keys = jax.random.split(jax.random.key(1), 3)
        cache = {name: jax.random.normal(key, [sizes[axis] for axis in axes[name]], jnp.bfloat16)
                 for key, name in zip(keys, axes, strict=False)}
        query = jax.random.normal(keys[2], (rows, 1, heads, HEAD_DIM), jnp.bfloat16)

        @jax.jit
        def many(query, cache, last):
            def one(_, query):
                mixed = kv_cache.cached_attention(query, cache, last[:, None], layout)
                return query + mixed * jnp.bfloat16(1e-3)
            return jax.lax.fori_loop(0, loops, one, query)

        for live in (positions, positions // 4):
            last = jnp.full(rows, live - 1, jnp.int32)
            seconds = parts.median_seconds(many, query, cache, last, repeats=5) / loops
            yield {"rows": rows, "positions": positions, "live": live, "us": 1e6 * seconds,
                   "of_copy": 4 * rows * live * kv_heads * HEAD_DIM / seconds / bandwidth}


def train_attention(tiny: bool, implementation: str):
    """Forward and backward pass of one layer: its gradients against XLA's, and its rate."""
    heads, kv_heads = HEADS[0]

    def case(rows: int, length: int) -> list[Any]:
        count = min(4, attention.sequences_per_row(implementation) or 4)
        keys = jax.random.split(jax.random.key(2), 4)
        arrays = [jax.random.normal(key, (rows, length, number, HEAD_DIM), jnp.bfloat16)
                  for key, number in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)]
        segments = 1 + jnp.arange(length, dtype=jnp.int32) // (length // count)
        return [*arrays, jnp.broadcast_to(segments, (rows, length))]

    def slopes(implementation: str) -> Callable[..., Any]:
        def loss(query, key, value, weights, segments):
            mixed = attention.causal_attention(query, key, value, segments,
                                               implementation=implementation)
            return jnp.sum(mixed.astype(jnp.float32) * weights.astype(jnp.float32))
        return jax.jit(jax.grad(loss, (0, 1, 2)))

    small = case(2, 256 if tiny else 1024)
    pairs = zip(slopes(implementation)(*small), slopes("xla")(*small), strict=True)
    gaps = [float(jnp.max(jnp.abs(one - other)) / jnp.max(jnp.abs(other))) for one, other in pairs]
    yield dict(zip(("gap_query", "gap_key", "gap_value"), gaps, strict=True))

    for rows, length in ((1, 512),) if tiny else ((8, 4096), (1, 32768)):
        given = case(rows, length)
        seconds = parts.median_seconds(slopes(implementation), *given, repeats=3)
        count = int(given[-1].max())
        flops = 3.5 * 4 * heads * HEAD_DIM * rows * count * (length // count)**2 / 2
        yield {"rows": rows, "length": length, "sequences": count, "ms": 1e3 * seconds,
               "tflops": flops / seconds / 1e12}


def decode(tiny: bool, layout: str, slots: int, positions: int):
    """A decode step at the end of its contexts."""
    config = decoder(tiny, cache_layout=layout)
    yield parts.accelerator(config, sharding.make_mesh(data=-1), rows=slots, context=positions,
                            steps=16 if tiny else 64, repeats=3)


def rl_steps(tiny: bool, rows: int, remat: str, response: int):
    """Whole RL steps with random weights; the first compiles."""
    mesh, config = sharding.make_mesh(data=-1), decoder(tiny, remat=remat)
    prompts, samples, prompt = (2, 4, 32) if tiny else (4, 8, 64)
    count, random = prompts * samples, np.random.default_rng(0)
    batch = steps.Batch(
        prompts=random.integers(0, config.vocabulary, (prompts, prompt)).astype(np.int32),
        responses=np.zeros((count, response), np.int32), lengths=np.full(count, response, np.int32),
        correct=random.random((prompts, samples)) < 0.5, longest=response)
    run = steps.settings(config, batch, rows=rows, remat=remat, dtype="bfloat16")
    learner = Learner(run, config, mesh)
    params = jax.jit(functools.partial(model.init, config),
                     out_shardings=learner.params_sharding)(jax.random.key(0))
    reference, state = learner.as_reference(params), learner.init(params)

    sampler = engine.make_sampler(config, mesh, slots=count, chunk=8 if tiny else 64,
                                  max_positions=prompt + response)
    problems: Any = [types.SimpleNamespace(prompt=tokens) for tokens in batch.prompts]
    requests = [engine.Request(prompt=index, tokens=batch.prompts[index], uid=index, sample=sample,
                               max_new_tokens=response)
                for index in range(prompts) for sample in range(samples)]
    for number in range(3):
        began = time.perf_counter()
        with jax.set_mesh(mesh):
            generation = sampler(state.params, requests, jax.random.key(number), SAMPLING)
            responses = [response for finished in generation for response in finished]
            sampled = time.perf_counter()
            packed = learner.pack(engine.collect(problems, responses, samples), batch.correct, 0.0)
            state, learnt = learner.update(state, reference, packed)
            metrics, (updates,) = sharding.to_host((learnt.metrics, learnt.updates))
        updated = time.perf_counter()

        flops, stats = steps.flops(config, batch), jax.devices()[0].memory_stats() or {}
        yield {"compiles": number == 0, "rollout_seconds": sampled - began,
               "update_seconds": updated - sampled,
               "ms_per_decode_step": 1e3 * (sampled - began) / generation.steps,
               "host_share": generation.host_seconds / (sampled - began),
               "update_tflops": flops / (updated - sampled) / 1e12,
               "packing_efficiency": packed.packing_efficiency,
               "mismatch": float(metrics["rollout/mismatch"]),
               "mismatch_max": float(metrics["rollout/mismatch_max"]),
               "grad_norm": float(updates["grad_norm"]),
               "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--slots", type=int, help="of decode; 64")
    parser.add_argument("--positions", type=int, help="of decode; 4,096")
    parser.add_argument("--rows", type=int, help="of a micro-batch of step; 8")
    parser.add_argument("--remat", default="full", help="of step; full")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"parts must be among {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")

    chosen, tiny = options.parts or PARTS, options.tiny
    sharding.use_compilation_cache()
    kernels = jax.devices()[0].platform == "gpu"
    layouts = ["cudnn"] * kernels + ["transposed"]
    if "machine" in chosen:
        attempt("machine", lambda: machine(tiny))
    if "decode" in chosen:
        for layout in layouts:
            attempt("decode", lambda layout=layout: decode(
                tiny, layout, options.slots or (8 if tiny else 64),
                options.positions or (64 if tiny else 4096)))
    if "step" in chosen:
        attempt("step", lambda: rl_steps(tiny, options.rows or 8, options.remat,
                                         32 if tiny else 1024))
    if "kernels" in chosen:
        attempt("trial", lambda: trials(tiny))
        bandwidth = copy_bandwidth(tiny)
        for implementation in ["cudnn", "cudnn_packed"] * kernels + ["blockwise"]:
            attempt("train attention", lambda name=implementation: train_attention(tiny, name),
                    implementation=implementation)
        for layout in layouts:
            for heads, kv_heads in HEADS:
                attempt("decode attention", lambda layout=layout, heads=heads, kv_heads=kv_heads:
                        decode_attention(tiny, layout, heads, kv_heads, bandwidth),
                        layout=layout, heads=heads)


if __name__ == "__main__":
    main()
