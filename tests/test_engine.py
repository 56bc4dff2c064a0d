"""What a step is made of: credit against a NumPy oracle for every option, and meshes that do not fit."""

import dataclasses
import functools
import itertools
import math
import types

import jax
import numpy as np
import pytest
from decoders import QWEN2, mesh

from effreason import engine
from effreason.errors import UserError
from effreason.records import Packed, Rows
from effreason.runtime.config import AdvantageConfig, Config, KLConfig, MeshConfig, RewardConfig, UpdateConfig

PROMPTS, GROUP, POSITIONS = 5, 4, 16
# A mixed group, all right, all wrong, one right, all right and equally long.
CORRECT = np.array([[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]], bool)
LENGTHS = np.array([[3, 9, 1, 6], [2, 5, 7, 9], [4, 1, 8, 2], [6, 3, 5, 9], [4, 4, 4, 4]], np.int32)


def settings(form="none", coefficient=0.05, alpha=0.3, whiten=False, group_std=False, importance_cap=None):
    return dataclasses.replace(
        Config(), reward=RewardConfig(alpha=alpha), kl=KLConfig(form=form, coefficient=coefficient),
        update=UpdateConfig(importance_cap=importance_cap),
        advantage=AdvantageConfig(whiten=whiten, group_std=group_std))


@functools.cache
def logprobs():
    """Rubbish, some of it not finite, stands outside the responses."""
    generator = np.random.default_rng(0)
    old, reference = generator.normal(-1, 0.5, (2, PROMPTS * GROUP, POSITIONS)).astype(np.float32)
    inside = mask_in_numpy()
    return np.where(inside, old, np.inf), np.where(inside, reference, np.inf)


@functools.cache
def sampled():
    """The sampler's log-probs: close to the trainer's, rubbish outside the responses."""
    noise = np.random.default_rng(1).normal(0, 0.3, (PROMPTS * GROUP, POSITIONS)).astype(np.float32)
    return np.where(mask_in_numpy(), logprobs()[0] + noise, np.nan)


def mask_in_numpy(lengths=LENGTHS):
    mask = np.zeros((PROMPTS * GROUP, POSITIONS), bool)
    for row, count in enumerate(lengths.ravel()):
        mask[row, :count] = True
    return mask


def one_a_row():
    """Rows that hold the responses as they are: [U, M, R, N] = [1, 1, B, T], all else left out."""
    sources = np.arange(PROMPTS * GROUP * POSITIONS, dtype=np.int32).reshape(1, 1, -1, POSITIONS)
    return Packed(groups=(Rows(tokens=None, targets=None, positions=None, segments=None, sources=sources),),
                  counts=(np.ones(1, np.int32),), places=None)


def credited(config, correct=CORRECT, lengths=LENGTHS):
    step = jax.jit(functools.partial(engine.credit, config=config))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        found, reward, metrics = jax.device_get(step(correct, lengths, sampled(), *logprobs(), one_a_row()))
    rows = ("weights", "advantages", "old_logprobs", "reference_logprobs")
    experience = types.SimpleNamespace(**{name: getattr(found[0], name)[0, 0] for name in rows})
    experience.mask = experience.weights > 0
    return experience, reward, metrics


def oracle(config):
    """The same in plain Python numbers, response by response and token by token."""
    rewards = np.zeros((PROMPTS, GROUP))
    for prompt in range(PROMPTS):
        right = LENGTHS[prompt][CORRECT[prompt]].astype(float)
        for sample in np.flatnonzero(CORRECT[prompt]):
            excess = (LENGTHS[prompt, sample] - right.mean()) / (right.std() + 1e-7)
            rewards[prompt, sample] = 1 - config.reward.alpha / (1 + math.exp(-excess))
    old, reference = logprobs()
    mask, advantages, drifts = mask_in_numpy(), np.zeros((PROMPTS * GROUP, POSITIONS)), []
    for row, (prompt, sample) in enumerate(itertools.product(range(PROMPTS), range(GROUP))):
        others = np.delete(rewards[prompt], sample)
        advantage = rewards[prompt, sample] - others.mean()
        if config.advantage.group_std:
            advantage /= rewards[prompt].std() + 1e-6
        places = np.flatnonzero(mask[row])
        for place in places:
            later = places[places >= place]
            penalty = sum(float(old[row, at]) - float(reference[row, at]) for at in later)
            drifts.append(float(old[row, place]) - float(reference[row, place]))
            charged = config.kl.coefficient * penalty if config.kl.form == "reward" else 0.0
            advantages[row, place] = advantage - charged
    if config.advantage.whiten:
        values = advantages[mask]
        advantages[mask] = (values - values.mean()) / values.std()
    gaps = np.abs(sampled() - old)[mask]
    if (cap := config.update.importance_cap) is not None:
        advantages[mask] *= np.minimum(np.exp((old - sampled())[mask]), cap)
    signal = np.mean([len(set(row.tolist())) > 1 for row in np.round(rewards, 9)])
    return rewards, mask, advantages, {"reward/mean": rewards.mean(), "reward/groups_with_signal": signal,
                                       "reward/kl": np.mean(drifts), "rollout/mismatch": gaps.mean(),
                                       "rollout/mismatch_max": gaps.max()}


@pytest.mark.parametrize("importance_cap", [None, 1.1])
@pytest.mark.parametrize("group_std", [False, True])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("form", ["none", "reward", "loss"])
def test_credit_is_the_oracle(form, whiten, group_std, importance_cap):
    config = settings(form, whiten=whiten, group_std=group_std, importance_cap=importance_cap)
    experience, reward, metrics = credited(config)
    rewards, mask, advantages, expected = oracle(config)
    np.testing.assert_allclose(reward, rewards, atol=1e-6)
    np.testing.assert_array_equal(experience.mask, mask)
    np.testing.assert_allclose(experience.advantages, advantages, rtol=1e-4, atol=1e-5)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, abs=1e-5), name
    np.testing.assert_array_equal(experience.old_logprobs, logprobs()[0])
    np.testing.assert_array_equal(experience.reference_logprobs, logprobs()[1])
    assert {leaf.dtype.name for leaf in (reward, experience.advantages, *metrics.values())} == {"float32"}


def test_groups_without_a_difference_give_exactly_nothing():
    advantages = credited(settings())[0].advantages.reshape(PROMPTS, GROUP, POSITIONS)
    assert not advantages[[2, 4]].any()                 # all wrong; all right and equally long
    assert advantages[1].any()                          # all right: length alone tells them apart


def test_all_wrong_is_finite_and_nothing():
    for whiten, group_std in itertools.product((False, True), repeat=2):
        experience, reward, metrics = credited(settings(whiten=whiten, group_std=group_std), np.zeros_like(CORRECT))
        assert not reward.any() and not experience.advantages.any()
        assert float(metrics["reward/groups_with_signal"]) == 0


def test_alpha_0_rewards_correctness_alone():
    _, reward, metrics = credited(settings(alpha=0.0))
    np.testing.assert_array_equal(reward, CORRECT)
    assert float(metrics["reward/groups_with_signal"]) == pytest.approx(2 / 5)


def test_empty_responses_cost_nothing():
    empty = np.zeros_like(LENGTHS)
    experience, reward, metrics = credited(settings("reward", whiten=True), np.zeros_like(CORRECT), empty)
    assert not experience.mask.any() and not experience.advantages.any() and not reward.any()
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(("axes", "changes", "message"), [
    (dict(data=2, fsdp=2), {"update": UpdateConfig(rows_per_micro_batch=2)},
     "mesh.data x mesh.fsdp must divide update.rows_per_micro_batch, 2, got 4"),
    (dict(tensor=8), {}, "mesh.tensor must divide the model's attention heads, 4, got 8"),
    (dict(tensor=4), {}, "mesh.tensor must divide the model's key/value heads, 2, got 4"),
    (dict(tensor=2), {"mlp_width": 25}, "mesh.tensor must divide the model's feed-forward width, 25, got 2"),
    (dict(tensor=2), {"vocabulary": 25}, "mesh.tensor must divide the model's vocabulary, 25, got 2"),
    (dict(fsdp=4), {"width": 18}, "mesh.fsdp must divide the model's width, 18, got 4"),
])
def test_a_mesh_that_does_not_divide_the_model_or_the_batch_is_refused(axes, changes, message):
    config = dataclasses.replace(Config(), mesh=MeshConfig(**axes), update=changes.get("update", UpdateConfig()))
    shape = {name: value for name, value in changes.items() if name != "update"}
    with pytest.raises(UserError) as caught:
        engine.check_divisible(config, dataclasses.replace(QWEN2, **shape), mesh(**axes))
    assert str(caught.value) == message


@pytest.mark.parametrize("axes", [dict(data=8), dict(data=2, fsdp=4), dict(data=2, fsdp=2, tensor=2), dict(context=2)])
def test_a_mesh_that_fits_gives_an_engine_with_every_array_placed(axes):
    target = mesh(**axes)
    pretrained = types.SimpleNamespace(decoder=QWEN2, eos_ids=(1,))
    made = engine.make_engine(dataclasses.replace(Config(), mesh=MeshConfig(**axes)), pretrained, target)
    state = made.learning.abstract_state
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.mesh == target
    assert state.step.sharding.is_fully_replicated
    weights, moments = state.params, state.optimizer[1][0].mu
    assert jax.tree.map(lambda leaf: leaf.sharding, weights) == made.learning.params_sharding
    assert jax.tree.map(lambda leaf: leaf.sharding, moments) == made.learning.params_sharding
