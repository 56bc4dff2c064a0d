"""How many slots a memory holds: by hand, and never more than it does."""

import dataclasses

import jax
import pytest
from decoders import QWEN2, mesh

from effreason.evaluation.evaluate import sized_for_evaluation
from effreason.lm import model
from effreason.lm.architecture import DecoderConfig, alike
from effreason.runtime.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    KLConfig,
    ModelConfig,
    RolloutConfig,
    UpdateConfig,
)
from effreason.sampling import capacity

GIB = 2**30
# DeepSeek-R1-Distill-Qwen-1.5B: 28 KiB a token in bfloat16.
LARGE = dataclasses.replace(QWEN2, layers=28, kv_heads=2, head_dim=128, dtype=jax.numpy.bfloat16)


def config(**rollout):
    defaults = dict(max_new_tokens=3584, prompts_per_step=32, group_size=8)
    return dataclasses.replace(Config(), rollout=RolloutConfig(**defaults | rollout),
                               data=DataConfig(max_prompt_tokens=512),
                               evaluation=EvaluationConfig(problems=0))


def test_a_slot_by_hand():
    assert capacity.max_positions(config()) == 4096
    assert model.cache_bytes(LARGE, 4096) == 28 * 1024 * 4096
    target = mesh()
    bytes_ = sum(leaf.nbytes for leaf in jax.tree.leaves(model.empty_cache(QWEN2, 1, 64)))
    assert model.cache_bytes(QWEN2, 64) == bytes_ and target.size == 1


def limits(settings, target):
    budget = capacity.position_budget(settings, LARGE, target, 20)
    return capacity.cache_limits(settings, LARGE, target, budget)


@pytest.mark.parametrize(("gib", "full", "half", "quarter"), [
    (7.0, 64, 128, 256), (6.9, 63, 126, 252), (13.9, 127, 254, 256), (28.0, 256, 256, 256),
    (1000.0, 256, 256, 256), (0.1, 8, 16, 32)])
def test_as_many_as_fit_and_more_while_they_are_short(gib, full, half, quarter):
    found = limits(config(memory_gib=gib), mesh())
    assert [found.slots_of(4096 // part) for part in (1, 2, 4)] == [full, half, quarter]
    assert found.slots == 256 and found.least_slots == full


def test_what_the_configuration_says_is_what_there_is():
    found = limits(config(slots=48), mesh())
    assert found.slots == found.least_slots == 48 and found.budget is None
    assert "48 slots of at most 4,096 positions" in capacity.describe(
        config(slots=48), LARGE, mesh(), 20)
    assert "sampler: 64 to 256 slots of at most 4,096 positions, 7.0 GiB of 7.0 GiB" in (
        capacity.describe(config(memory_gib=7.0), LARGE, mesh(), 20))


def test_a_mesh_gets_as_many_for_each_of_its_shards():
    target = mesh(data=2, fsdp=2, tensor=2)
    assert limits(config(memory_gib=6.9), target).least_slots == 60
    assert limits(config(memory_gib=28.0, prompts_per_step=3), target).least_slots == 24
    # One for each, whatever the memory: there is nothing less.
    assert limits(config(memory_gib=0.1, max_new_tokens=4 * 3584), target).slots_of(10**6) == 4


def test_half_a_billion_weights_on_24_gib_have_room_for_64(monkeypatch):
    """Qwen2.5-0.5B in float32 on a CPU, which gets half of the host's memory."""
    monkeypatch.setattr(capacity, "device_bytes", lambda mesh: 12 * GIB)
    small = DecoderConfig(vocabulary=151936, width=896, layers=24, heads=14, kv_heads=2,
                                head_dim=64, mlp_width=4864, norm_eps=1e-6,
                                kinds=alike(theta=1e6), tied=True, qkv_bias=True)
    settings = dataclasses.replace(
        config(max_new_tokens=256, prompts_per_step=8), data=DataConfig(max_prompt_tokens=512),
        model=ModelConfig(dtype="float32"))
    bytes_ = capacity.training_weight_bytes(settings)
    budget = capacity.position_budget(settings, small, mesh(), bytes_)
    assert capacity.cache_limits(settings, small, mesh(), budget).least_slots == 64


def test_longer_evaluations_count():
    longer = dataclasses.replace(config(), evaluation=EvaluationConfig(problems=0,
                                                                       max_new_tokens=7680))
    assert capacity.max_positions(longer) == 8192


def test_the_state_comes_before_the_cache(monkeypatch):
    target, weights = mesh(), sum(leaf.size
                                  for leaf in jax.tree.leaves(model.abstract_params(LARGE)))
    monkeypatch.setattr(capacity, "device_bytes", lambda mesh: 20 * GIB)
    found = capacity.cache_budget_bytes(config(), LARGE, target, 20)
    assert found == pytest.approx(18 * GIB - 20 * weights - 2 * weights)
    # Over fsdp the state is split, of the sampler's copy only the MLPs.
    spread = capacity.cache_budget_bytes(config(), LARGE, mesh(fsdp=4), 20)
    mlp = 3 * LARGE.layers * LARGE.width * LARGE.mlp_width
    assert spread == pytest.approx(18 * GIB - 20 * weights - 2 * (4 * (weights - mlp) + mlp))
    assert capacity.cache_budget_bytes(config(), LARGE, target,
                                       capacity.EVALUATION_WEIGHT_BYTES) == found + 16 * weights
    monkeypatch.setattr(capacity, "device_bytes", lambda mesh: 0)
    assert capacity.cache_budget_bytes(config(), LARGE, target, 20) == 0


def test_what_training_holds_for_each_weight():
    in_bfloat16 = dataclasses.replace(config(), model=ModelConfig(dtype="bfloat16"))
    in_float32 = dataclasses.replace(config(), model=ModelConfig(dtype="float32"))
    # The policy, two moments, and the reference: while it samples there is no gradient.
    assert capacity.training_weight_bytes(in_bfloat16) == 4 + 8 + 2
    assert capacity.training_weight_bytes(in_float32) == 4 + 8 + 4
    elsewhere = dataclasses.replace(in_bfloat16, kl=KLConfig(offload_reference=True),
                                    update=UpdateConfig(offload_optimizer=True))
    assert capacity.training_weight_bytes(elsewhere) == 4
    # Nothing reads a reference: not the loss, not the reward, not the sampler.
    free = dataclasses.replace(in_bfloat16, kl=KLConfig(form="none"))
    assert capacity.training_weight_bytes(free) == 4 + 8
    initial = dataclasses.replace(free, rollout=dataclasses.replace(free.rollout, policy="initial"))
    assert capacity.training_weight_bytes(initial) == 4 + 8 + 2


def test_the_memory_of_this_host_is_a_size():
    assert GIB / 4 < capacity.device_bytes(mesh()) < 2**50


def test_a_command_that_only_evaluates_has_room_for_what_it_samples():
    # 24 layers of 2 heads of 64, as in Qwen2.5-0.5B.
    decoder = dataclasses.replace(QWEN2, layers=24, kv_heads=2, head_dim=64)
    wide = dataclasses.replace(Config(), rollout=RolloutConfig(max_new_tokens=32_000, slots=64),
                               evaluation=EvaluationConfig(max_new_tokens=300))
    sized = sized_for_evaluation(wide)
    assert capacity.max_positions(sized) == 512 + 300
    assert "64 slots of at most 812 positions, 1.2 GiB" in capacity.describe(
        sized, decoder, mesh(), capacity.EVALUATION_WEIGHT_BYTES)
    unset = dataclasses.replace(wide, evaluation=EvaluationConfig())
    assert capacity.max_positions(sized_for_evaluation(unset)) == 512 + 32_000
