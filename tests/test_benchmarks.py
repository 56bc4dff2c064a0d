"""The rollout benchmark: its baselines compute what the engine computes, its verdicts follow its figures."""

import importlib
from pathlib import Path

import decoders
import jax
import numpy as np
import pytest

from effreason.runtime import sharding


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a file of benchmarks/ as if it were run from there."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


def test_the_second_workload_has_the_lengths_it_says(benchmark):
    workload = benchmark("rollout_baselines").make_workload("W2", 100)
    assert len(workload.limits) == 16 * 8 and workload.rows == 32 and workload.prompts.shape == (16, 64)
    assert workload.limits.min() >= 8 and workload.limits.max() <= workload.longest == 512
    assert 80 < workload.limits.mean() < 112
    # Lengths are nothing the engine could plan with.
    requests = benchmark("rollout_baselines").make_requests(workload)
    assert all(request.expected_tokens is None for request in requests)
    assert [request.max_new_tokens for request in requests] == workload.limits.tolist()


@pytest.mark.parametrize("engine", ["static", "static_fast"])
def test_a_static_batch_gives_the_tokens_of_the_engine(benchmark, engine):
    baselines = benchmark("rollout_baselines")
    config, params = decoders.QWEN2, decoders.weights(decoders.QWEN2)
    workload = baselines.Workload(prompts=np.arange(24, dtype=np.int32).reshape(4, 6), samples=2,
                                  limits=np.array([3, 7, 1, 4, 2, 2, 9, 5], np.int32), longest=9, rows=4)
    mesh = sharding.make_mesh(data=-1)
    ours = baselines.make_ours(config, params, mesh, workload, chunk=4, greedy=True).generate(workload, 0)
    theirs = baselines.ENGINES[engine](config, params, mesh, workload, greedy=True).generate(workload, 0)
    assert [len(row) for row in theirs] == workload.limits.tolist()
    np.testing.assert_array_equal(np.concatenate(ours), np.concatenate(theirs))


def test_a_decode_step_is_timed_and_a_rollout_taken_apart(benchmark):
    pieces, baselines, mesh = benchmark("rollout_pieces"), benchmark("rollout_baselines"), sharding.make_mesh(data=-1)
    row = pieces.accelerator(decoders.QWEN2, mesh, rows=8, context=64, steps=4, repeats=1)
    matrices = pieces.product_weights(decoders.QWEN2, decoders.weights(decoders.QWEN2))
    assert row["weight_bytes"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(matrices))
    assert row["step_ms"] > 0 and 0 < row["bandwidth_fraction"] < 1
    workload = baselines.Workload(prompts=np.zeros((2, 6), np.int32), samples=8, limits=np.full(16, 9, np.int32),
                                  longest=9, rows=8)
    rows = pieces.profile(decoders.QWEN2, decoders.weights(decoders.QWEN2), mesh, workload, chunk=4)
    assert sum(row["steps"] for row in rows) >= 18 and all(row["seconds"] > 0 for row in rows)


def test_targets_are_judged_by_their_figures(benchmark):
    def run(engine, rate, **more):
        return {"model": "M1", "workload": "W2", "engine": engine, "tokens_per_second": rate, **more}

    judge = benchmark("rollouts").judge
    judged = judge([run("ours", 800.0, host_share=0.06, recompilations=0), run("static", 100.0),
                    run("transformers", 100.0)], [])
    assert [(row["figure"], row["met"]) for row in judged] == [(8.0, True), (8.0, False), (0.06, False), (0, True)]
    assert judge([run("static", 100.0)], []) == []
