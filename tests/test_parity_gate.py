"""The parity gate: what passes, what stops a run, and what it then says."""

import dataclasses

import numpy as np
import pytest

from effreason import parity
from effreason.runtime.config import Config, ModelConfig, RolloutConfig


def config(most=0.05, dtype="float32"):
    return dataclasses.replace(Config(), model=ModelConfig(dtype=dtype), rollout=RolloutConfig(max_mismatch=most))


def gap(mean, most=0.5):
    return {"rollout/mismatch": mean, "rollout/mismatch_max": most}


@pytest.mark.parametrize("mean", [0.0, 1e-6, 0.05])
def test_a_gap_up_to_the_limit_passes(mean):
    parity.check(gap(mean), config(), "step 3")


@pytest.mark.parametrize(("dtype", "first"), [("float32", "a temperature"), ("bfloat16", "bfloat16 too coarse")])
def test_a_larger_gap_names_its_size_and_likely_causes(dtype, first):
    with pytest.raises(parity.Mismatch) as caught:
        parity.check(gap(0.0512, 3.25), config(dtype=dtype), "step 3")
    message = str(caught.value)
    assert message.startswith("step 3: ") and "\n" not in message
    assert "0.0512 nats" in message and "3.25 at most" in message and "rollout.max_mismatch is 0.05" in message
    assert f"Likely causes: {first}" in message and "RoPE" in message and "template" in message


def test_a_gap_that_is_no_number_is_a_gap():
    with pytest.raises(parity.Mismatch):
        parity.check(gap(np.nan), config(), "before the first step")
