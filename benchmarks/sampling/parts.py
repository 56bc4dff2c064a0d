"""What benchmarks/sampling/compare.py takes apart: this machine's limits, the parts of a rollout,
decoding on an accelerator.

B rows, D width, H query heads, K key/value heads, h head width, V vocabulary, C cache positions.
"""

import collections
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.sampling.engines import Workload, make_requests
from effreason.lm import model
from effreason.lm.architecture import DecoderConfig
from effreason.sampling import draws, engine, slots
from effreason.sampling.scheduler import PREFILL_ROWS, Request

DRAWN = draws.SamplingParams(temperature=1.0, eos_ids=())
BATCHES = (64, 32, 16, 8, 4)


def median_seconds(function: Callable[..., Any], *arguments: Any, repeats: int) -> float:
    """Of calls after a first one, each until its results are there."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def matmul_flops(repeats: int, size: int = 1024, dtype: Any = jnp.float32) -> float:
    """Floating-point operations a second in a product of square matrices."""
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    return 2 * size**3 / median_seconds(jax.jit(jnp.matmul), matrix, matrix, repeats=repeats)


def memory_bandwidth(repeats: int, size: int = 2**28) -> dict[str, float]:
    """Bytes a second, of an array of `size` bytes: "read", summed; "copied", each entry read and
    written in place."""
    added = jax.jit(lambda x: x + 1, donate_argnums=0)
    # As many sums as keep all cores busy.
    summed = jax.jit(lambda x: jnp.sum(x.reshape(1024, -1), axis=1))
    x = jnp.zeros(size // 4, jnp.float32)
    figures = {"read": size / median_seconds(summed, x, repeats=repeats)}
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        x = jax.block_until_ready(added(x))
        times.append(time.perf_counter() - started)
    return figures | {"copied": 2 * size / statistics.median(times[1:])}


def product_weights(config: DecoderConfig, params: model.Params) -> dict[str, Any]:
    """The matrices of a decode step, [into, out of] each product."""
    def flat(layer: dict[str, jax.Array]) -> dict[str, jax.Array]:
        wide = {name: layer[name].reshape(config.width, -1) for name in ("query", "key", "value")}
        return wide | {"output": layer["output"].reshape(-1, config.width)} | {
            name: layer[name] for name in ("gate", "up", "down")}

    layers = [flat(jax.tree.map(lambda leaf, at=at: leaf[at], params["layers"]))
              for at in range(config.layers)]
    return {"layers": layers, "head": model.head(params)}


def products(config: DecoderConfig, weights: dict[str, Any], x: jax.Array,
             steps: int) -> tuple[jax.Array, jax.Array]:
    """The matrix products of so many decode steps, one after another, and next to nothing else; x
    [B, D]."""
    def step(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x = carry[0]
        for layer in weights["layers"]:
            mixed = jnp.tile(x @ layer["key"] + x @ layer["value"],
                             (1, config.heads // config.kv_heads))
            x = x + (x @ layer["query"] + mixed) @ layer["output"]
            x = x + ((x @ layer["gate"]) * (x @ layer["up"])) @ layer["down"]
            # finite for ever
            x = x / (1.0 + jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True)))
        logits = slots.next_token_logits(weights, x)
        # Carried, and the next step depends on one of them: the product can neither be dropped nor
        # cut down.
        x, logits = jax.lax.optimization_barrier((x, logits))
        return x + 1e-6 * logits[:, :1], logits

    return jax.lax.fori_loop(0, steps, step,
                             (x, jnp.zeros((x.shape[0], config.vocabulary), x.dtype)))


def make_products(config: DecoderConfig, params: model.Params,
                  batch: int) -> Callable[..., float]:
    """What measures the seconds that the matrix products of one decode step take, as the median of
    some repeats."""
    weights = product_weights(config, params)
    x = jax.random.normal(jax.random.key(1), (batch, config.width))
    run = jax.jit(functools.partial(products, config, steps=20))
    return lambda repeats=3: median_seconds(run, weights, x, repeats=repeats) / 20


def matrix_entries(config: DecoderConfig) -> int:
    """Numbers in the matrices that a decode step multiplies with."""
    layer = config.width * (2 * config.heads + 2 * config.kv_heads) * config.head_dim
    return config.layers * (layer + 3 * config.width
                            * config.mlp_width) + config.vocabulary * config.width


def roofline(config: DecoderConfig, params: model.Params, workload: Workload,
             repeats: int) -> dict[str, Any]:
    """The limits of this machine, and what they allow a decode step of this model and workload at
    most."""
    flops, bandwidth = matmul_flops(3 * repeats), memory_bandwidth(repeats)
    rates = {}
    for batch in BATCHES:
        seconds = make_products(config, params, batch)(repeats + 2)
        rates[str(batch)] = {"ms": 1e3 * seconds, "tokens_per_second": batch / seconds,
                             "flops": 2 * batch * matrix_entries(config) / seconds}
    # Of rows on their way, the average one has half of its response in the cache.
    positions = workload.prompts.shape[1] + workload.longest / 2
    cache = workload.rows * model.position_bytes(config) * positions
    limits = {"bytes": (4 * matrix_entries(config) + cache) / max(bandwidth.values()),
              "flops": 2 * matrix_entries(config) * workload.rows / flops}
    return {"matmul_flops": flops, "bandwidth": bandwidth, "products": rates, "rows": workload.rows,
            "entries": matrix_entries(config), "weight_bytes": 4 * matrix_entries(config),
            "cache_bytes": cache,
            "limit_ms": {name: 1e3 * seconds for name, seconds in limits.items()}}


def prefill(config: DecoderConfig, params: model.Params, mesh: Mesh,
            repeats: int) -> dict[str, float]:
    """Prompt tokens a second, of 8 prompts read at once."""
    programs = slots.make_programs(config, mesh)
    rates = {}
    with jax.set_mesh(mesh):
        weights = programs.unstack(params)
        for length in (64, 1024):
            prompts = jax.device_put((np.zeros((PREFILL_ROWS, length), np.int32),
                                      np.full(PREFILL_ROWS, length, np.int32)), programs.replicated)
            seconds = median_seconds(programs.prefill, weights, *prompts, repeats=repeats)
            rates[f"{PREFILL_ROWS} x {length}"] = PREFILL_ROWS * length / seconds
    return rates


def group_prefill(config: DecoderConfig, params: model.Params, mesh: Mesh, repeats: int, *,
                  prompts: int = 8,
                  samples: int = 8, length: int = 1024) -> dict[str, float]:
    """Seconds until all samples of some prompts have their first token: prompts read once, or once
    for each sample."""
    tokens = np.random.default_rng(3).integers(0, config.vocabulary,
                                               (prompts, length)).astype(np.int32)
    sampler = engine.make_sampler(config, mesh, slots=prompts * samples, chunk=1,
                                  max_positions=length + 1)

    def seconds(shared: bool) -> float:
        requests = [Request(prompt=prompt if shared else prompt * samples + sample,
                            tokens=tokens[prompt],
                                     uid=prompt, sample=sample, max_new_tokens=1)
                    for prompt in range(prompts) for sample in range(samples)]
        started = time.perf_counter()
        with jax.set_mesh(mesh):
            collections.deque(sampler(params, requests, jax.random.key(0), DRAWN), maxlen=0)
        return time.perf_counter() - started

    seconds(True)                   # compiles
    # In turn, so that both meet the same load.
    pairs = [(seconds(True), seconds(False)) for _ in range(repeats)]
    once, each = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {"group_seconds": once, "each_seconds": each, "ratio": each / once}


def step_seconds(programs: slots.Programs, weights: Any, *, rows: int, positions: int, steps: int,
                 repeats: int) -> float:
    """One decode step of so many slots at the end of a cache of so many positions; the median of
    runs of `steps`."""
    # no early end, no row given up
    control = jax.device_put(np.zeros(1 + rows, np.int32), programs.replicated)
    state, times = programs.empty(count=rows, capacity=positions), []
    for _ in range(repeats + 1):
        there = {"length": np.full(rows, positions - steps, np.int32),
                 "generated": np.zeros(rows, np.int32),
                 "limit": np.full(rows, steps + 1, np.int32), "active": np.ones(rows, bool)}
        state = dataclasses.replace(state, **jax.device_put(there, programs.by_rows))
        jax.block_until_ready(state)
        started = time.perf_counter()
        state, drawn = programs.decode(weights, state, control, sampling=DRAWN, chunk=steps)
        jax.block_until_ready(drawn)
        times.append((time.perf_counter() - started) / steps)
    return statistics.median(times[1:])


def decode_steps(config: DecoderConfig, params: model.Params, mesh: Mesh,
                 repeats: int) -> dict[str, float]:
    """Milliseconds of a decode step by "slots x cache positions"."""
    programs = slots.make_programs(config, mesh)
    with jax.set_mesh(mesh):
        weights = programs.unstack(params)
        return {f"{rows} x {positions}": 1e3 * step_seconds(programs, weights, rows=rows,
                                                            positions=positions,
                                                            steps=16, repeats=repeats)
                for rows in (64, 32, 8) for positions in (128, 320, 576)}


def draw_ms(config: DecoderConfig, repeats: int, rows: int = 64) -> dict[str, float]:
    """Milliseconds of drawing a token for each row from logits of the model's vocabulary."""
    logits = jax.random.normal(jax.random.key(0), (rows, config.vocabulary))
    keys = jax.random.split(jax.random.key(1), rows)
    functions = {"two levels, with log-probs": jax.jit(
                     lambda logits, keys: draws.draw(logits, keys, DRAWN)),
                 "jax.random.categorical": jax.jit(
                     lambda logits, keys: jax.random.categorical(keys[0], logits)),
                 "argmax": jax.jit(lambda logits, keys: jnp.argmax(logits, axis=-1))}
    return {name: 1e3 * median_seconds(function, logits, keys, repeats=5 * repeats)
            for name, function in functions.items()}


def profile(config: DecoderConfig, params: model.Params, mesh: Mesh, workload: Workload,
            chunk: int) -> list[dict[str, float]]:
    """Measures the time of the engine: by slots and cache positions, from chunk to chunk, host
    included."""
    sampler = engine.make_sampler(config, mesh, slots=workload.rows, chunk=chunk,
                                  max_positions=workload.positions)
    for _ in range(2):              # the first compiles
        totals: dict[tuple[int, int],
                     collections.Counter[str]] = collections.defaultdict(collections.Counter)
        with jax.set_mesh(mesh):
            started, steps = time.perf_counter(), 0
            generation = sampler(params, make_requests(workload), jax.random.key(0), DRAWN)
            while generation.running:
                total = totals[generation.slots, generation.capacity]
                next(generation)
                ended = time.perf_counter()
                total.update({"chunks": 1, "steps": generation.steps - steps,
                              "seconds": ended - started})
                started, steps = ended, generation.steps
    return [{"slots": at[0], "positions": at[1], **total} for at, total in totals.items()]


def accelerator(config: DecoderConfig, mesh: Mesh, *, rows: int, context: int, steps: int,
                repeats: int) -> dict[str, Any]:
    """Decoding at the end of a context, against the memory traffic it cannot do without: weights
    and live cache."""
    programs = slots.make_programs(config, mesh)
    device = mesh.devices.flat[0]
    free = (device.memory_stats() or {}).get("bytes_limit", 2**30)
    bandwidth = memory_bandwidth(repeats, size=min(2**31, free // 16 // 4096 * 4096))["copied"]
    with jax.set_mesh(mesh):
        weights = programs.unstack(jax.jit(model.init, static_argnums=0)(config, jax.random.key(0)))
        seconds = step_seconds(programs, weights, rows=rows, positions=context, steps=steps,
                               repeats=repeats)
    entries = matrix_entries(config)
    weight_bytes = entries * jnp.dtype(config.dtype).itemsize
    cache_bytes = rows * model.position_bytes(config) * (context - (steps - 1) / 2)
    # Every device reads all weights; rows are split between them.
    needed = (weight_bytes + math.ceil(cache_bytes / mesh.size)) / bandwidth
    return {"device": device.device_kind, "devices": mesh.size, "layout": config.cache_layout,
            "rows": rows,
            "context": context, "dtype": jnp.dtype(config.dtype).name, "matrix_entries": entries,
            "weight_bytes": weight_bytes, "cache_bytes": cache_bytes, "copy_bandwidth": bandwidth,
            "step_ms": 1e3 * seconds, "tokens_per_second": rows / seconds,
            "bandwidth_fraction": needed / seconds}

