"""The parity gate: what passes, what stops a run, and what it then says."""

import dataclasses

import jax
import numpy as np
import pytest
from decoders import QWEN2, mesh, weights

from effreason.lm.architecture import alike
from effreason.rl import packing, parity, update
from effreason.sampling import engine
from effreason.sampling.draws import SamplingParams
from effreason.sampling.scheduler import make_requests
from effreason.types import Problem


def gap(mean, most=0.5):
    return {"rollout/mismatch": mean, "rollout/mismatch_max": most}


@pytest.mark.parametrize("mean", [0.0, 1e-6, 0.05])
def test_a_gap_up_to_the_limit_passes(mean):
    parity.check(gap(mean), 0.05, "float32", "step 3")


@pytest.mark.parametrize(("dtype", "first"), [("float32", "a temperature"),
                                              ("bfloat16", "bfloat16 too coarse")])
def test_a_larger_gap_names_its_size_and_likely_causes(dtype, first):
    with pytest.raises(parity.Mismatch) as caught:
        parity.check(gap(0.0512, 3.25), parity.limit(0.05, dtype), dtype, "step 3")
    message = str(caught.value)
    assert message.startswith("step 3: ") and "\n" not in message
    assert "0.0512 nats" in message and "3.25 at most" in message
    assert "rollout.max_mismatch allows 0.05" in message
    assert f"Likely causes: {first}" in message and "RoPE" in message and "template" in message


def test_a_gap_that_is_no_number_is_a_gap():
    with pytest.raises(parity.Mismatch):
        parity.check(gap(np.nan), 0.05, "float32", "before the first step")


@pytest.fixture(scope="module")
def sampled():
    """Responses of a random decoder at temperature 1, as the trainer gets them."""
    problems = [Problem(uid=uid, prompt=np.arange(2 + uid, 8 + 2 * uid, dtype=np.int32), text="",
                        reference="", level="all") for uid in range(4)]
    target = mesh()
    sampler = engine.make_sampler(QWEN2, target, slots=16, chunk=8)
    sampling = SamplingParams(temperature=1.0, eos_ids=())
    with jax.set_mesh(target):
        requests = make_requests([problem.prompt for problem in problems], 4, 24)
        chunks = list(sampler(weights(QWEN2), requests, jax.random.key(0), sampling))
    responses = [response for chunk in chunks for response in chunk]
    return engine.collect(problems, responses, 4)


@pytest.mark.parametrize(("changes", "temperature", "passes"), [
    ({}, 1.0, True), ({}, 0.6, False), ({}, 1.5, False), ({"norm_eps": 0.3}, 1.0, False),
    ({"kinds": alike(theta=50.0)}, 1.0, False),
])
def test_what_goes_wrong_in_practice_is_far_above_the_limit(sampled, changes, temperature, passes):
    config_ = dataclasses.replace(QWEN2, **changes)
    packed = packing.pack(sampled, rows=4, width=64, slots=24)
    rows = jax.tree.map(lambda x: x[0].reshape(-1, x.shape[-1]), packed.groups[0])
    scored, _ = update.score_rows(config_, weights(QWEN2), rows, temperature=temperature, tile=32)
    drawn = update.scatter_to_rows(packing.flatten(sampled.logprobs, 24), rows)
    gap_ = float(np.mean(np.abs(scored - drawn), where=np.asarray(drawn) != 0))
    assert gap_ < 1e-5 if passes else gap_ > parity.LIMITS["bfloat16"]
