"""What a step's responses earn: experience against a NumPy oracle for every option, and the
baselines against gradients."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effreason.rl import advantages, configured_reward, update
from effreason.rl.advantages import PARTS
from effreason.rl.experience import Graded, make_experience, measure
from effreason.rl.learner import make_objective
from effreason.runtime.config import AdvantageConfig, Config, KLConfig, RewardConfig, UpdateConfig
from effreason.types import Packed, Rows

PROMPTS, GROUP, POSITIONS = 5, 4, 16
# A mixed group, all right, all wrong, one right, all right and equally long.
CORRECT = np.array([[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]], bool)
LENGTHS = np.array([[3, 9, 1, 6], [2, 5, 7, 9], [4, 1, 8, 2], [6, 3, 5, 9], [4, 4, 4, 4]], np.int32)


def settings(form="none", coefficient=0.05, alpha=0.3, whiten=False, group_std=False,
             decouple=False, whiten_responses=False, **learning):
    return dataclasses.replace(
        Config(), reward=RewardConfig(alpha=alpha), kl=KLConfig(form=form, coefficient=coefficient),
        update=UpdateConfig(**learning),
        advantage=AdvantageConfig(whiten=whiten, group_std=group_std, decouple=decouple,
                                  whiten_responses=whiten_responses))


@functools.cache
def logprobs():
    """Rubbish, some of it not finite, is outside the responses."""
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
    response_index = np.arange(PROMPTS * GROUP * POSITIONS, dtype=np.int32).reshape(1, 1, -1,
                                                                                    POSITIONS)
    return Packed(groups=(Rows(tokens=None, targets=None, positions=None, segments=None,
                               response_index=response_index),), counts=(np.ones(1, np.int32),))


def programs(config):
    """The experience and the metrics of a step, from the log-probs of policy and reference."""
    parts = dict(reward=configured_reward.make_reward(config.reward),
                 objective=make_objective(config))
    reads_old = config.first_scored_update == 0
    experience = functools.partial(make_experience, keeps_sampled=True, **parts)
    return (lambda graded, old, reference, packed: experience(graded, old if reads_old else None,
                                                              reference, packed),
            functools.partial(measure, min_reward_spread=config.rollout.min_reward_spread, **parts))


def graded(config, correct=CORRECT, lengths=LENGTHS, scores=None):
    return Graded(correct=correct, scores=correct.astype(np.float32) if scores is None else scores,
                  ended=lengths < 9, lengths=lengths,
                  alpha=np.float32(config.reward.alpha), sampled=sampled())


def completed(config, found, old):
    """The experience of all responses, [B, T], as the first update of the step completes it."""
    (rows,) = jax.tree.map(lambda values: values[0, 0], found.experience)
    mask = rows.weights > 0
    rows = dataclasses.replace(rows, rows=dataclasses.replace(
        rows.rows, segments=mask.astype(np.int32)))
    loss = update.LossConfig(
        clip_ratio=0.2, kl_loss_coefficient=0.0, temperature=1.0, vocabulary_tile=8,
        kl_penalty=0.0 if config.advantage.whiten or config.kl.form != "reward"
        else config.kl.coefficient, importance_cap=config.update.importance_cap)
    return update.with_old_logprobs(rows, old, jnp.array(True), loss)


def credited(config, correct=CORRECT, lengths=LENGTHS, scores=None):
    experience, metrics = programs(config)

    @jax.jit
    def step(graded, old, reference, packed):
        found = experience(graded, old, reference, packed)
        return completed(config, found, old), found.rewards, metrics(graded, old, reference)

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        return jax.device_get(step(graded(config, correct, lengths, scores), *logprobs(),
                                   one_a_row()))


def worth_of_responses(config, rewards):
    """The advantages of whole responses, in plain Python numbers."""
    def others_less(values, sample):
        return values[sample] - np.delete(values, sample).mean()

    found = np.zeros((PROMPTS, GROUP))
    for prompt, sample in np.ndindex(PROMPTS, GROUP):
        earned, right = rewards[prompt], CORRECT[prompt].astype(float)
        found[prompt, sample] = others_less(earned, sample)
        if config.advantage.group_std:
            found[prompt, sample] /= earned.std() + 1e-6
        if config.advantage.decouple:
            rest = earned - right
            found[prompt, sample] = others_less(right, sample) / (right.std() + 1e-6) + (
                config.reward.alpha * others_less(rest, sample) / (rest.std() + 1e-6))
    if config.advantage.whiten_responses:
        found = (found - found.mean()) / found.std()
    return found


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
    whole = worth_of_responses(config, rewards)
    for row, (prompt, sample) in enumerate(itertools.product(range(PROMPTS), range(GROUP))):
        advantage = whole[prompt, sample]
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
    return rewards, mask, advantages, {"reward/mean": rewards.mean(),
                                       "reward/groups_with_signal": signal,
                                       "reward/kl": np.mean(drifts),
                                       "rollout/mismatch": gaps.mean(),
                                       "rollout/mismatch_max": gaps.max()}


@pytest.mark.parametrize("decouple", [False, True])
@pytest.mark.parametrize("whiten_responses", [False, True])
@pytest.mark.parametrize("form", ["none", "reward"])
def test_advantages_of_responses_are_the_oracle(form, whiten_responses, decouple):
    config = settings(form, whiten_responses=whiten_responses, decouple=decouple)
    experience, _, metrics = credited(config)
    np.testing.assert_allclose(experience.advantages, oracle(config)[2], rtol=1e-4, atol=1e-5)
    assert (metrics["update_share/normalisation"] > 0) == whiten_responses
    shares = sum(metrics[f"update_share/{part}"] for part in PARTS)
    assert float(shares) == pytest.approx(1)


def test_decoupled_advantages_grow_with_alpha_where_group_std_removes_it():
    # In all-correct groups, the second and the last.
    def sizes(alpha, **advantage):
        found, _, _ = credited(settings(alpha=alpha, **advantage))
        return np.abs(found.advantages).reshape(PROMPTS, -1).sum(axis=1)[1]
    assert sizes(0.4, decouple=True) == pytest.approx(4 * sizes(0.1, decouple=True), rel=1e-4)
    assert sizes(0.4, group_std=True) == pytest.approx(sizes(0.1, group_std=True), rel=1e-3)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_responses_that_were_cut_off_have_no_weight(aggregation):
    # Those of 9 tokens; the baseline of their groups is the same.
    masked, everything = (credited(settings(aggregation=aggregation, truncated=truncated))[0]
                          for truncated in ("mask", "wrong"))
    cut = np.repeat(LENGTHS.ravel()[:, None] == 9, POSITIONS, axis=1)
    assert everything.weights[cut].any() and not masked.weights[cut].any()
    assert masked.weights.sum() == pytest.approx(1)
    if aggregation != "constant":
        inside = mask_in_numpy() & ~cut
        np.testing.assert_array_equal(masked.advantages[inside], everything.advantages[inside])


def test_what_is_partly_right_earns_its_score_and_nothing_for_its_length():
    scores = CORRECT.astype(np.float32)
    scores[0, 1], scores[2] = 0.5, [0.25, 0.25, 0, 1 / 3]       # of the wrong ones
    _, rewards, metrics = credited(settings(), scores=scores)
    _, plain, _ = credited(settings())
    np.testing.assert_allclose(rewards, plain + np.where(CORRECT, 0, scores), rtol=1e-6)
    assert metrics["reward/groups_with_signal"] == 4 / 5
    # Without a length term, all of the update is for being right.
    metrics = credited(settings(alpha=0.0), scores=scores)[2]
    assert metrics["update_share/accuracy"] == pytest.approx(1)


@pytest.mark.parametrize("updates", [1, 2])
def test_a_constant_denominator_sums_tokens(updates):
    mean, constant = (credited(settings(aggregation=aggregation, updates_per_batch=updates))[0]
                      for aggregation in ("token_mean", "constant"))
    responses = PROMPTS * GROUP // updates
    for update_number in range(updates):
        own = slice(update_number, None, updates)
        np.testing.assert_allclose(
            (constant.weights * constant.advantages)[own],
            np.where(mean.mask, mean.advantages, 0)[own] / (responses * POSITIONS), rtol=1e-5,
            atol=1e-9)


@pytest.mark.parametrize("importance_cap", [None, 1.1])
@pytest.mark.parametrize("group_std", [False, True])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("form", ["none", "reward", "loss"])
def test_experience_is_the_oracle(form, whiten, group_std, importance_cap):
    config = settings(form, whiten=whiten, group_std=group_std, importance_cap=importance_cap)
    experience, reward, metrics = credited(config)
    rewards, mask, worth, expected = oracle(config)
    np.testing.assert_allclose(reward, rewards, atol=1e-6)
    np.testing.assert_array_equal(experience.mask, mask)
    np.testing.assert_allclose(experience.advantages, worth, rtol=1e-4, atol=1e-5)
    assert metrics.keys() == expected.keys() | {f"{kind}/{part}" for kind in ("update_share",
                                                                              "length_pull")
                                                for part in PARTS}
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, abs=1e-5), name
    np.testing.assert_array_equal(experience.old_logprobs, logprobs()[0])
    np.testing.assert_array_equal(experience.reference_logprobs, logprobs()[1])
    assert {leaf.dtype.name for leaf in (reward, experience.advantages,
                                         *metrics.values())} == {"float32"}


def test_groups_without_a_difference_give_exactly_nothing():
    worth = credited(settings())[0].advantages.reshape(PROMPTS, GROUP, POSITIONS)
    assert not worth[[2, 4]].any()                      # all wrong; all right and equally long
    assert worth[1].any()                               # all right: length alone tells them apart


def test_all_wrong_is_finite_and_nothing():
    for whiten, group_std in itertools.product((False, True), repeat=2):
        experience, reward, metrics = credited(settings(whiten=whiten, group_std=group_std),
                                               np.zeros_like(CORRECT))
        assert not reward.any() and not experience.advantages.any()
        assert float(metrics["reward/groups_with_signal"]) == 0


def test_alpha_0_rewards_correctness_alone():
    _, reward, metrics = credited(settings(alpha=0.0))
    np.testing.assert_array_equal(reward, CORRECT)
    assert float(metrics["reward/groups_with_signal"]) == pytest.approx(2 / 5)


def test_empty_responses_cost_nothing():
    empty = np.zeros_like(LENGTHS)
    experience, reward, metrics = credited(settings("reward", whiten=True), np.zeros_like(CORRECT),
                                           empty)
    assert not experience.mask.any() and not experience.advantages.any() and not reward.any()
    assert all(np.isfinite(value) for value in metrics.values())


# The length-pressure meter


def shares(metrics, kind="update_share"):
    return {part: float(metrics[f"{kind}/{part}"]) for part in PARTS}


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("form", ["none", "reward", "loss"])
def test_the_shares_of_the_pressure_add_up_and_the_pulls_are_those_of_the_advantages(form, whiten,
                                                                                     aggregation):
    experience, _, metrics = credited(settings(form, whiten=whiten, aggregation=aggregation))
    found = shares(metrics)
    assert sum(found.values()) == pytest.approx(1, abs=1e-5) and min(found.values()) >= 0
    assert (found["kl"] > 0) == (form != "none") and (found["normalisation"] > 0) == whiten
    if form != "loss":              # that term is not in the advantages
        of_responses = experience.advantages.sum(axis=-1).reshape(LENGTHS.shape) / LENGTHS
        if aggregation == "sequence_mean":
            of_responses *= LENGTHS.mean() / LENGTHS
        whole = advantages.length_pull(of_responses, LENGTHS)
        assert sum(shares(metrics, "length_pull").values()) == pytest.approx(float(whole), rel=1e-4,
                                                                             abs=1e-5)


def test_alpha_alone_makes_length_pressure():
    assert shares(credited(settings(alpha=0.0))[2])["length"] == 0
    weak, strong = (shares(credited(settings(alpha=alpha))[2], "length_pull")
                    for alpha in (0.1, 0.4))
    assert strong["length"] == pytest.approx(4 * weak["length"], rel=1e-4)      # linear in alpha
    assert strong["length"] < 0 and strong["accuracy"] == weak["accuracy"]


def test_whitening_pulls_on_length_at_alpha_0():
    lengths, right = np.array([[1, 2, 14, 15]] * PROMPTS, np.int32), np.array([[1, 1, 0, 0]]
                                                                              * PROMPTS, bool)

    def pull(**learning):
        return shares(credited(settings(alpha=0.0, whiten=True, **learning), right, lengths)[2],
                      "length_pull")

    # What is wrong is long, and longer responses count more in the mean: it is below 0 and taking
    # it away lifts all, which under a mean over each one's tokens lifts those of short responses
    # most.
    assert pull(aggregation="sequence_mean")["normalisation"] < -0.1
    assert pull()["normalisation"] == pytest.approx(0, abs=1e-6)
    assert pull()["length"] == 0


def test_the_share_of_the_kl_term_is_finite_and_flat_beyond_its_bounds(monkeypatch):
    old, reference = logprobs()
    for nats in (-90.0, -24.0, 24.0, 90.0):
        far = old + np.where(np.arange(POSITIONS) == 0, np.float32(nats), 0.0)
        monkeypatch.setitem(globals(), "logprobs", lambda far=far: (old, far))
        metrics = credited(settings("loss"))[2]
        assert all(np.isfinite(value) for value in metrics.values())
        assert float(metrics["update_share/kl"]) == 0       # elsewhere policy and reference agree


def test_without_a_reference_kl_is_not_measured_and_all_else_is_the_same():
    config, old = settings(), logprobs()[0]
    experience, metrics = programs(config)
    none, measured = (jax.device_get(jax.jit(metrics)(graded(config), old, reference))
                      for reference in (None, logprobs()[1]))
    assert measured.keys() - none.keys() == {"reward/kl"}
    assert none == {name: measured[name] for name in none}

    learnt, other = (completed(config, jax.jit(experience)(graded(config), None, reference,
                                                           one_a_row()), old)
                     for reference in (None, logprobs()[1]))
    assert learnt.reference_logprobs is None
    np.testing.assert_array_equal(learnt.advantages, other.advantages)
    now = jnp.where(mask_in_numpy(), old + 0.1, 0.0)
    (loss, sums), (same, more) = (
        update.policy_loss(now, rows, clip_ratio=0.2, kl_loss_coefficient=0.0)
        for rows in (learnt, other))
    assert loss == same and more.keys() - sums.keys() == {"kl"}


def test_a_coefficient_of_0_measures_kl_without_a_penalty():
    measured, _, metrics = credited(settings("reward", coefficient=0.0))
    np.testing.assert_array_equal(measured.advantages, credited(settings())[0].advantages)
    assert float(metrics["reward/kl"]) != 0 and float(metrics["update_share/kl"]) == 0


# The baselines: what a token is worth gives, in the policy gradient, the gradient of their own
# losses


def gradient_of_experience(config):
    """d loss / d log-prob of each token, of the update's loss at the policy that was scored:
    float32[B, T]."""
    # Arrays of JAX: NumPy warns of inf - inf in the padding.
    old, reference = map(jnp.asarray, logprobs())

    @jax.jit
    def gradient(old, reference):
        found = programs(config)[0](graded(config), old, reference, one_a_row())
        experience = completed(config, found, old)
        now = jnp.where(mask_in_numpy(), old, 0.0)
        return jax.grad(lambda now: update.policy_loss(now, experience, clip_ratio=0.2,
                                                       kl_loss_coefficient=0.0)[0])(now)

    return gradient(old, reference)


def test_imitation_has_the_gradient_of_supervised_learning_on_the_shortest_correct():
    chosen = np.zeros((PROMPTS, GROUP), bool)
    # of lengths 1, 2, 5, and the first of four equal ones
    chosen[[0, 1, 3, 4], [2, 0, 2, 0]] = True
    learnt = mask_in_numpy() & chosen.reshape(-1, 1)
    np.testing.assert_allclose(gradient_of_experience(settings(objective="sft_shortest")),
                               -learnt.astype(np.float32) / learnt.sum(), rtol=1e-6)


def test_preference_has_the_gradient_of_dpo():
    old, reference = (np.where(mask_in_numpy(), values, 0.0) for values in logprobs())
    # the other groups: none right, one right, all equally long
    pairs = [((0, 2), (0, 3)), ((1, 0), (1, 3))]

    @jax.jit
    def loss(now):
        margins = jnp.sum(now - reference, axis=-1, where=mask_in_numpy()).reshape(PROMPTS, GROUP)
        return jnp.mean(jnp.stack([jax.nn.softplus(-0.1 * (margins[chosen] - margins[rejected]))
                                   for chosen, rejected in pairs]))

    config = settings(objective="dpo", dpo_beta=0.1)
    np.testing.assert_allclose(gradient_of_experience(config), jax.grad(loss)(jnp.asarray(old)),
                               rtol=1e-4, atol=1e-7)
    _, _, metrics = credited(config)
    assert float(metrics["dpo/loss"]) == pytest.approx(float(loss(jnp.asarray(old))), rel=1e-5)
    assert float(metrics["dpo/pairs"]) == pytest.approx(2 / 5)


@pytest.mark.parametrize("objective", ["sft_shortest", "dpo"])
def test_a_baseline_learns_nothing_where_nothing_is_right(objective):
    experience, _, metrics = credited(settings(objective=objective), np.zeros_like(CORRECT))
    assert not experience.advantages.any() and not experience.mask.any()
    assert all(np.isfinite(value) for value in metrics.values())
