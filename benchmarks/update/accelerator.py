"""What benchmarks/update/compare.py measures besides the comparison: memory of scoring, and a whole
RL step.

B sequences, S prompt and T response tokens of each, V vocabulary.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.sampling.engines import Workload, make_requests
from benchmarks.sampling.parts import matmul_flops, matrix_entries, memory_bandwidth
from benchmarks.update import steps
from effreason.lm import model
from effreason.lm.architecture import DecoderConfig
from effreason.planning import chips
from effreason.rl import learner as engine
from effreason.sampling import draws
from effreason.sampling import engine as rollouts

VOCABULARIES = (37984, 75968, 151936)
# What chips call themselves, and what a plan calls them.
NAMES = {"H200": "gpu:h200", "H100": "gpu:h100", "A100": "gpu:a100", "TPU v6": "tpu:v6e",
         "TPU v5 lite": "tpu:v5e",
         "TPU v5": "tpu:v5p"}


def scoring_memory(config: DecoderConfig, mesh: Mesh, *, tokens: int = 32768, rows: int = 1,
                   vocabularies: tuple[int, ...] = VOCABULARIES) -> list[dict[str, int]]:
    """Returns the memory that scoring and learning from rows of `tokens` positions need besides
    their arguments, compiled and not run."""
    found = []
    for vocabulary in vocabularies:
        decoder = dataclasses.replace(config, vocabulary=vocabulary)
        batch = steps.make_batch("fixed", vocabulary, sequences=2 * rows, prompt=64, response=64)
        run = steps.settings(decoder, batch, rows=rows, remat="full",
                             dtype=jnp.dtype(decoder.dtype).name)
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, attention="blockwise"))
        step = engine.Learner(run, decoder, mesh).lowered(run, width=tokens, micro_batches=1)
        with jax.set_mesh(mesh):
            scoring = step.lower["score"]().compile().memory_analysis()
            backward = step.lower["gradients"]().compile().memory_analysis()
        found.append({"vocabulary": vocabulary, "tokens": tokens,
                      "scoring_bytes": scoring.temp_size_in_bytes,
                      "gradient_bytes": backward.temp_size_in_bytes,
                      "logits_bytes": 4 * tokens * vocabulary})
    return found


def rl_step(config: DecoderConfig, mesh: Mesh, *, prompts: int, samples: int, prompt: int,
            response: int,
            rows: int, remat: str, chunk: int, repeats: int,
            peak: float | None = None) -> dict[str, Any]:
    """Measures rollouts of `prompts` x `samples` responses of one length, and learning from them,
    after a first step.

    Decode bandwidth: the bytes that the decode steps cannot do without, weights and live cache, by
    the time of the whole rollout.
    Args: peak, operations a second of one device; None = by its name."""
    device = mesh.devices.flat[0]
    dtype = jnp.dtype(config.dtype).name
    random = np.random.default_rng(0)
    workload = Workload(prompts=random.integers(0, config.vocabulary,
                                                (prompts, prompt)).astype(np.int32),
                        samples=samples, limits=np.full(prompts * samples, response, np.int32),
                        longest=response,
                        rows=prompts * samples)
    batch = steps.Batch(prompts=workload.prompts,
                        responses=np.zeros((workload.rows, response), np.int32),
                        lengths=workload.limits, correct=random.random((prompts, samples)) < 0.5,
                        longest=response)
    learner = steps.make_ours(config, batch, mesh, rows=rows, remat=remat, dtype=dtype)
    sampler = rollouts.make_sampler(config, mesh, slots=workload.rows, chunk=chunk,
                                    max_positions=workload.positions,
                                    cache_layout="auto")
    times: dict[str, list[float]] = {"rollout": [], "learning": []}
    for index in range(repeats + 1):
        started = time.perf_counter()
        with jax.set_mesh(mesh):
            generation = sampler(learner.policy(), make_requests(workload), jax.random.key(index),
                                 draws.SamplingParams(temperature=1.0, eos_ids=()))
            for finished in generation:
                for each in finished:
                    batch.responses[each.prompt * samples + each.sample] = each.tokens
        sampled = time.perf_counter()
        learner.step()
        times["rollout"].append(sampled - started)
        times["learning"].append(time.perf_counter() - sampled)
    seconds = {name: statistics.median(each[1:]) for name, each in times.items()}
    known = next((chips.CHIPS[chip].flops for name, chip in NAMES.items()
                  if name in device.device_kind), None)
    peak = peak or known
    work = steps.flops(config, batch)
    weights = matrix_entries(config) * jnp.dtype(config.dtype).itemsize
    cache = workload.rows * model.position_bytes(config) * (prompt + response / 2)
    size = min(2**31,
               ((device.memory_stats() or {}).get("bytes_limit", 2**30)) // 16 // 4096 * 4096)
    read = generation.steps * (weights + cache) / seconds["rollout"]
    square = 8192 if device.platform != "cpu" else 1024
    best = matmul_flops(5, square, jnp.dtype(config.dtype))
    held = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {"device": device.device_kind, "devices": mesh.size, "dtype": dtype,
            "matrix_entries": matrix_entries(config), "sequences": workload.rows,
            "tokens": batch.tokens, "rows": rows,
            "remat": remat, "fill": learner.figures["fill"],
            "programs": learner.figures["programs"],
            "first_seconds": {name: each[0] for name, each in times.items()},
            "rollout_seconds": seconds["rollout"],
            "learning_seconds": seconds["learning"],
            "rollout_tokens_per_second": batch.tokens / seconds["rollout"],
            "learning_tokens_per_second": batch.tokens / seconds["learning"],
            "decode_steps": generation.steps,
            "decode_bytes_per_second": read,
            "copy_bandwidth": mesh.size * memory_bandwidth(3, size)["copied"],
            "flops": work, "flops_per_second": work / seconds["learning"], "matmul_flops": best,
            "mfu": work / seconds["learning"] / peak / mesh.size if peak else None,
            "of_matmul": work / seconds["learning"] / best / mesh.size, "peak_bytes": held}
