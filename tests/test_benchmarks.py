"""The rollout benchmark: its baselines compute what the engine computes, its verdicts follow its figures."""

import importlib
from pathlib import Path

import decoders
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


def test_targets_are_judged_by_their_figures(benchmark):
    def run(engine, rate, **more):
        return {"model": "M1", "workload": "W2", "engine": engine, "tokens_per_second": rate, **more}

    judge = benchmark("rollouts").judge
    judged = judge([run("ours", 800.0, host_share=0.06, recompilations=0), run("static", 100.0),
                    run("transformers", 100.0)], [])
    assert [(row["figure"], row["met"]) for row in judged] == [(8.0, True), (8.0, False), (0.06, False), (0, True)]
    assert judge([run("static", 100.0)], []) == []
