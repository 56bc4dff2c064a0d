"""The update: the loss against a NumPy oracle, and the same step however rows, padding and devices
are cut."""

import dataclasses
import functools
import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoders import QWEN2, QWEN3, VOCABULARY, mesh, place, weights

from effreason.lm import attention, model
from effreason.rl import experience as experience_of_step
from effreason.rl import learner, packing, parity, update
from effreason.rl.configured_reward import make_reward
from effreason.runtime import sharding
from effreason.runtime.config import (
    AdvantageConfig,
    Config,
    DataConfig,
    KLConfig,
    MeshConfig,
    ModelConfig,
    RolloutConfig,
    UpdateConfig,
)
from effreason.types import Experience, Rollouts, Rows

RESPONSES = (8, 24)                 # B, T
ROWS, PROMPTS, LENGTHS = 8, [3, 1, 7, 5, 2, 4, 6, 3], [9, 1, 5, 0, 12, 8, 2, 7]
LOSS = update.LossConfig(clip_ratio=0.2, kl_loss_coefficient=0.05, temperature=0.8,
                         vocabulary_tile=64)
# All of them: tests/rl/test_meshes.py.
MESHES = {"data": dict(data=8), "all": dict(data=2, fsdp=2, tensor=2),
          "context": dict(fsdp=2, tensor=2, context=2)}


@functools.cache
def table(positions=24):
    """One sequence a row, in the order of tokens: ratios on both sides of the clip; one response is
    empty; rubbish is outside the responses."""
    generator = np.random.default_rng(1)
    real = 24

    def padded(x, fill):
        return np.pad(x, ((0, 0), (0, positions - real)), constant_values=fill)

    tokens = generator.integers(0, VOCABULARY, (ROWS, real)).astype(np.int32)
    starts, at = np.array(PROMPTS)[:, None], np.arange(real)
    mask = (starts <= at) & (at < starts + np.array(LENGTHS)[:, None])
    logprobs = np.asarray(score_naively(QWEN2, weights(QWEN2), tokens, LOSS.temperature)[0])
    old, reference = (logprobs + generator.normal(0, 0.2, mask.shape).astype(np.float32)
                      for _ in range(2))
    advantages = np.where(mask, generator.standard_normal(mask.shape), 0).astype(np.float32)
    return types.SimpleNamespace(
        tokens=padded(tokens, 5), mask=padded(mask, False), advantages=padded(advantages, 0),
        old_logprobs=padded(np.where(mask, old, -500.0).astype(np.float32), 400.0),
        reference_logprobs=padded(np.where(mask, reference, 500.0).astype(np.float32), -400.0))


def experience(positions=24, aggregation="token_mean"):
    """The table at the positions that score its tokens, one earlier. [B, N]"""
    e, ends = table(positions), np.add(PROMPTS, LENGTHS)[:, None]

    def ahead(x):
        return np.pad(x[:, 1:], ((0, 0), (0, 1)))

    at = np.broadcast_to(np.arange(positions, dtype=np.int32), e.tokens.shape)
    token_weights = np.asarray(update.token_weights(e.mask, aggregation))
    return Experience(
        rows=Rows(tokens=e.tokens, targets=ahead(e.tokens), positions=at,
                  segments=(at < ends).astype(np.int32),
                  response_index=np.zeros_like(at)),
        weights=ahead(token_weights), advantages=ahead(e.advantages),
        old_logprobs=ahead(e.old_logprobs),
        reference_logprobs=ahead(e.reference_logprobs))


def in_micro_batches(tree, count, updates=1):
    """Rows [B, N] as [U, M, R, N]; row b goes to update b % U."""
    return jax.tree.map(lambda x: x.reshape(-1, updates, x.shape[1]).swapaxes(0, 1).reshape(
        updates, count, -1, x.shape[1]), tree)


def zigzagged(tree, context):
    """Columns in the order that `context` shards work on."""
    return jax.tree.map(lambda x: x[..., attention.zigzag(x.shape[-1], context)], tree)


@functools.partial(jax.jit, static_argnums=(0, 3))
def score_naively(config, params, tokens, temperature):
    logits = model.logits(params, model.forward(config, params, tokens))
    table = jax.nn.log_softmax(logits[:, :-1] / temperature, axis=-1)
    chosen = jnp.take_along_axis(table, tokens[:, 1:, None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(table) * table, axis=-1)
    return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in (chosen, entropy))


def one_step(shape=(), positions=24, micro_batches=2, loss=LOSS, config=QWEN2,
             aggregation="token_mean", spare=0):
    """One step of plain gradient descent at rate 1: params less gradients, on the host, and the
    metrics. It is the second update of its step, whose old log-probs are stored.

    Args: spare, empty micro-batches that there is room for."""
    target, schedule = mesh(**dict(shape)), optax.constant_schedule(1.0)
    optimizer = optax.scale_by_learning_rate(schedule)
    targets = update.state_sharding(config, optimizer, target)
    rows = in_micro_batches(experience(positions, aggregation), micro_batches)
    rows = jax.tree.map(lambda x: np.pad(x, ((1, 0), (0, spare), (0, 0), (0, 0)),
                                         constant_values=3), rows)
    with jax.set_mesh(target):
        state = update.make_initial_state(optimizer,
                                          targets)(place(config, weights(config), target))
        gradients = update.make_gradients(config, target, loss, targets, {}, responses=RESPONSES)
        apply_gradients = update.make_apply_gradients(optimizer, schedule, target, targets)
        rows = sharding.to_device(zigzagged(rows, target.shape["context"]),
                                  sharding.sharding(target, *update.ROW_AXES))
        counts, one = sharding.to_device((np.full(2, micro_batches, np.int32), np.int32(1)),
                                         sharding.sharding(target))
        with jax.transfer_guard("disallow"):
            grads, metrics, _ = gradients(state.params, {}, (rows,), (counts,), None, one)
            assert jax.tree.map(lambda leaf: leaf.sharding, grads) == targets.params
            state, of_optimizer = apply_gradients(state, grads, one)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == targets
        assert state.step == 1
        return sharding.to_host((state.params, metrics | of_optimizer))


@pytest.fixture(scope="module")
def baseline():
    return one_step()


def assert_same(result, expected, rtol=1e-5, atol=1e-5):
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=rtol, atol=atol),
                 result, expected)


# The loss


def loss_in_numpy(logprobs, e, weights, clip_ratio, coefficient):
    loss = kl = clipped_share = 0.0
    for row, position in zip(*np.nonzero(e.mask), strict=True):
        at = row, position
        ratio = math.exp(float(logprobs[at]) - float(e.old_logprobs[at]))
        advantage, weight = float(e.advantages[at]), float(weights[at])
        bounded = min(max(ratio, 1 - clip_ratio), 1 + clip_ratio)
        drift = float(e.reference_logprobs[at]) - float(logprobs[at])
        k3 = math.exp(drift) - drift - 1
        loss += weight * (coefficient * k3 - min(ratio * advantage, bounded * advantage))
        kl += weight * k3
        clipped_share += weight * (bounded * advantage < ratio * advantage)
    return loss, kl, clipped_share


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_policy_loss_is_the_oracle(aggregation, coefficient):
    e = experience(aggregation=aggregation)
    logprobs = np.where(e.mask, e.old_logprobs,
                        0) + np.random.default_rng(2).normal(0, 0.3, e.mask.shape)
    logprobs = logprobs.astype(np.float32)
    loss, sums = update.policy_loss(jnp.asarray(logprobs), e, clip_ratio=0.2,
                                    kl_loss_coefficient=coefficient)
    expected, kl, clip_share = loss_in_numpy(logprobs, e, e.weights, 0.2, coefficient)
    assert 0.05 < clip_share < 0.95
    np.testing.assert_allclose([loss, sums["kl"], sums["clip_share"]], [expected, kl, clip_share],
                               rtol=1e-5, atol=1e-6)


def one_token(ratio, advantage):
    one = jnp.ones((1, 1))
    return Experience(rows=None, weights=one, advantages=advantage * one, old_logprobs=0 * one - 1,
                      reference_logprobs=0 * one - 1), jnp.log(ratio) * one - 1


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope", "clipped"), [
    (1.0, 2.0, -2.0, -2.0, 0),
    (1.5, 2.0, -2.4, 0.0, 1),               # already likelier by more than the clip: no pull
    (1.5, -2.0, 3.0, 3.0, 0),               # too likely and bad: pushed down however far it went
    (0.5, 2.0, -1.0, -1.0, 0),
    (0.5, -2.0, 1.6, 0.0, 1),
])
def test_clip_by_hand(ratio, advantage, loss, slope, clipped):
    e, logprobs = one_token(ratio, advantage)
    value, gradient = jax.value_and_grad(lambda logprobs: update.policy_loss(
        logprobs, e, clip_ratio=0.2, kl_loss_coefficient=0.0)[0])(logprobs)
    np.testing.assert_allclose([value, gradient[0, 0]], [loss, slope], rtol=1e-6)
    sums = update.policy_loss(logprobs, e, clip_ratio=0.2, kl_loss_coefficient=0.0)[1]
    assert sums["clip_share"] == clipped


@pytest.mark.parametrize(("ratio", "advantage", "settings", "loss", "slope"), [
    (1.5, 2.0, dict(clip_ratio_high=0.6), -3.0, -3.0),      # clip-higher: room to go up
    (1.7, 2.0, dict(clip_ratio_high=0.6), -3.2, 0.0),
    (0.7, -2.0, dict(clip_ratio_high=0.6), 1.6, 0.0),       # down as before
    (2.5, -2.0, dict(dual_clip=3.0), 5.0, 5.0),
    (4.0, -2.0, dict(dual_clip=3.0), 6.0, 0.0),             # far too likely and bad: bounded
    (4.0, 2.0, dict(dual_clip=3.0), -2.4, 0.0),
])
def test_the_other_clips_by_hand(ratio, advantage, settings, loss, slope):
    e, logprobs = one_token(ratio, advantage)
    value, gradient = jax.value_and_grad(lambda logprobs: update.policy_loss(
        logprobs, e, clip_ratio=0.2, kl_loss_coefficient=0.0, **settings)[0])(logprobs)
    np.testing.assert_allclose([value, gradient[0, 0]], [loss, slope], rtol=1e-6)


@pytest.mark.parametrize(("ratio", "weight", "clipped"), [(0.3, 0.3, 0), (1.1, 1.1, 0),
                                                          (2.0, 1.4, 1)])
def test_cispo_bounds_the_weight_of_a_gradient_and_drops_none(ratio, weight, clipped):
    e, logprobs = one_token(ratio, -2.0)
    (_, sums), gradient = jax.value_and_grad(functools.partial(
        update.policy_loss, experience=e, clip_ratio=0.2, clip_ratio_high=0.4, surrogate="cispo",
        kl_loss_coefficient=0.0), has_aux=True)(logprobs)
    np.testing.assert_allclose(gradient, 2.0 * weight, rtol=1e-6)
    assert sums["clip_share"] == clipped


def test_gspo_clips_the_ratio_of_whole_responses():
    # Against the formula of the source: mean over responses of min(s A, clip(s) A), with s the
    # geometric mean of the ratios of a response's tokens.
    e = experience(aggregation="sequence_mean")
    e = dataclasses.replace(e, reference_logprobs=None, advantages=jnp.where(
        e.mask, jnp.sum(e.advantages, axis=1, keepdims=True), 0.0))
    logprobs = jnp.asarray(np.where(e.mask, e.old_logprobs, 0) + np.random.default_rng(3).normal(
        0, 0.3, e.mask.shape), jnp.float32)

    def formula(logprobs):
        counts = jnp.sum(e.mask, axis=1).astype(jnp.float32)
        ratios = jnp.exp(jnp.sum(jnp.where(e.mask, logprobs - e.old_logprobs, 0), axis=1)
                         / jnp.maximum(counts, 1))
        worth = jnp.max(jnp.abs(e.advantages), axis=1) * jnp.sign(jnp.sum(e.advantages, axis=1))
        gains = jnp.minimum(ratios * worth, jnp.clip(ratios, 0.9, 1.1) * worth)
        return -jnp.sum(gains, where=counts > 0) / jnp.sum(jnp.where(counts > 0, 1.0, 0.0))

    value, gradient = jax.jit(jax.value_and_grad(lambda logprobs: update.policy_loss(
        logprobs, e, clip_ratio=0.1, surrogate="gspo", kl_loss_coefficient=0.0)[0]))(logprobs)
    expected, slope = jax.jit(jax.value_and_grad(formula))(logprobs)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)
    assert (np.abs(gradient).sum(axis=1) == 0).any() and np.abs(gradient).any()


@pytest.mark.parametrize("context", [1, 4])
def test_the_mean_of_a_response_is_at_each_of_its_tokens(context):
    # Two responses that share a prompt, and one of a sequence of its own.
    segments = np.repeat([1, attention.branch(1, 1), attention.branch(1, 2), 2, 0], [3, 4, 2, 5, 2])
    weights = np.array([0, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0], np.float32)
    values = np.arange(16, dtype=np.float32) ** 2
    expected = np.zeros(16)
    for start, end in ((3, 6), (7, 8), (11, 13)):
        expected[start:end] = values[start:end].mean()
    rows = Rows(tokens=None, targets=None, positions=None, segments=segments[None],
                response_index=None)
    laid = zigzagged((values[None], Experience(rows=rows, weights=weights[None], advantages=None)),
                     context)
    with jax.set_mesh(mesh(context=context)):
        found = jax.jit(update.mean_of_responses)(*laid)
    np.testing.assert_allclose(found, zigzagged(expected[None], context), rtol=1e-6)


def test_cispo_is_reinforce_before_the_policy_has_moved(learnt_in_pairs):
    found = learnt(dict(rows_per_micro_batch=2, surrogate="cispo"))
    assert_same(found[0], learnt_in_pairs[0], atol=1e-4)


@pytest.mark.parametrize("nats", [24.0, 90.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_token_far_from_both_policies_has_a_finite_loss_and_no_gradient(nats, sign):
    # exp(90) is infinite in float32, and so was a gradient of inf * 0.
    logprobs = np.float32([[-1.0, -1.0 + sign * nats]])
    same = np.full((1, 2), -1.0, np.float32)
    e = Experience(rows=None, weights=np.full((1, 2), 0.5, np.float32), old_logprobs=same,
                   advantages=np.float32([[2.0, -2.0]]), reference_logprobs=same)
    (value, sums), gradient = jax.value_and_grad(functools.partial(
        update.policy_loss, experience=e, clip_ratio=0.2, kl_loss_coefficient=0.1),
        has_aux=True)(jnp.asarray(logprobs))

    # Of a bad token only that it became likelier is counted, with the ratio clamped.
    ratio = math.exp(20) if sign > 0 else 0.8
    np.testing.assert_allclose(value, 0.5 * (-2.0 + 2.0 * ratio + 0.1 * 10), rtol=1e-6)
    np.testing.assert_allclose(sums["kl"], 0.5 * 10, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-1.0, 0.0]], rtol=1e-6)


def test_k3_by_hand():
    # pi / reference = 2: d = -log 2, k3 = 1/2 + log 2 - 1; its slope is 1 - exp(d) = 1/2.
    e, logprobs = one_token(2.0, 0.0)
    (value, sums), gradient = jax.value_and_grad(functools.partial(update.policy_loss, experience=e,
                                                                   clip_ratio=0.2,
                                                                   kl_loss_coefficient=3.0),
                                                 has_aux=True)(logprobs)
    np.testing.assert_allclose([sums["kl"], value], [math.log(2) - 0.5, 3 * (math.log(2) - 0.5)],
                               rtol=1e-6)
    np.testing.assert_allclose(gradient, 1.5, rtol=1e-6)


def test_the_gradient_at_ratio_one_is_reinforce():
    e = experience()
    gradient = jax.grad(lambda logprobs: update.policy_loss(logprobs, e, clip_ratio=0.2,
                                                            kl_loss_coefficient=0.0)[0])(
                                                                jnp.asarray(e.old_logprobs))
    np.testing.assert_allclose(gradient, -e.weights * e.advantages, rtol=1e-6)


def test_what_stands_outside_the_responses_is_nothing_to_the_loss():
    e = experience()
    # exp overflows: inf * 0 would be nan, in the value or in the gradient
    for outside in (-1e4, 1e4):
        logprobs = jnp.where(e.mask, e.old_logprobs, outside)
        value, gradient = jax.value_and_grad(lambda logprobs: update.policy_loss(
            logprobs, e, clip_ratio=0.2, kl_loss_coefficient=0.1)[0])(logprobs)
        assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[~e.mask].any()


def test_token_weights():
    mask = np.array([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], bool)
    by_token, by_row = (np.asarray(update.token_weights(mask, name))
                        for name in ("token_mean", "sequence_mean"))
    np.testing.assert_allclose(by_token, mask / 5, rtol=1e-6)
    np.testing.assert_allclose(by_row, mask * np.array([[1 / 9], [1 / 3], [0], [1 / 3]]), rtol=1e-6)
    assert by_token.dtype == by_row.dtype == np.float32
    for name in ("token_mean", "sequence_mean"):
        # no response at all: no nan
        assert not np.asarray(update.token_weights(np.zeros((2, 3), bool), name)).any()


def test_token_weights_of_each_update_sum_to_one():
    mask = np.arange(9) < np.array([[9], [2], [4], [1], [0], [6]])
    for name in ("token_mean", "sequence_mean"):
        both = np.asarray(update.token_weights(mask, name, updates=2))
        for which in range(2):
            np.testing.assert_allclose(both[which::2], update.token_weights(mask[which::2], name),
                                       rtol=1e-6)
            np.testing.assert_allclose(both[which::2].sum(), 1, rtol=1e-6)


# Log-probs


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["untied", "tied"])
@pytest.mark.parametrize("tile", [7, 64])
def test_score_rows_is_the_naive_score(config, tile):
    rows = experience().rows
    scores = jax.jit(functools.partial(update.score_rows, config, temperature=0.8,
                                       tile=tile))(weights(config), rows)
    inside = (rows.segments[:, 1:] > 0)
    for one, other in zip(scores, score_naively(config, weights(config), rows.tokens, 0.8),
                          strict=True):
        np.testing.assert_allclose(np.where(inside, one[:, :-1], 0),
                                   np.where(inside, other[:, 1:], 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "settings"), [
    ({}, dict(sequences_per_row=1)), ({}, dict(updates=2)), ({}, dict(shares_prompts=True)),
    (dict(data=2, fsdp=2, tensor=2), {}), (dict(data=2, fsdp=2, tensor=2), dict(updates=2)),
    (dict(fsdp=4, context=2), {}), (dict(fsdp=4, context=2), dict(shares_prompts=True))], ids=str)
def test_scorer_gives_every_response_its_own_scores(shape, settings):
    # Prompts and responses as the sampler leaves them, scored packed; against each sequence alone,
    # unpacked.
    generator, target = np.random.default_rng(5), mesh(**shape)
    lengths, starts = generator.integers(1, 50,
                                         (3, 4)).astype(np.int32), np.array([4, 17, 9], np.int32)
    rollouts = Rollouts(prompts=generator.integers(0, VOCABULARY, (3, 17)).astype(np.int32),
                        prompt_lengths=starts, lengths=lengths,
                        tokens=generator.integers(0, VOCABULARY, (3, 4, 50)).astype(np.int32),
                        logprobs=np.zeros((3, 4, 50)), finish=np.full((3, 4), "eos"),
                        repeated=np.zeros((3, 4), bool))
    packed = packing.pack(rollouts, rows=4, width=96, slots=50, context=target.shape["context"],
                          **settings)
    with jax.set_mesh(target):
        placed = place(QWEN2, weights(QWEN2), target)
        score = update.make_scorer(QWEN2, target, LOSS,
                                   params=jax.tree.map(lambda leaf: leaf.sharding, placed),
                                   responses=(12, 50))
        scores = np.asarray(score(placed, packed, np.int32(0)))
    for row, (prompt, sample) in enumerate(itertools.product(range(3), range(4))):
        start, length = starts[prompt], lengths[prompt, sample]
        sequence = np.concatenate([rollouts.prompts[prompt, :start],
                                   rollouts.tokens[prompt, sample, :length]])
        padded = np.pad(sequence, (0, 67 - len(sequence)))[None]
        expected = score_naively(QWEN2, weights(QWEN2), padded, LOSS.temperature)[0][0, start:]
        np.testing.assert_allclose(scores[row, :length], expected[:length], rtol=1e-5, atol=2e-5)
        assert not scores[row, length:].any()


# The step


def test_the_step_follows_the_gradient_of_the_whole_batch(baseline):
    # The loss written down once more, for all rows at once, without tiles, micro-batches or remat.
    e, config = table(), dataclasses.replace(QWEN2, remat="none")

    def whole(params):
        logprobs, entropy = score_naively(config, params, jnp.asarray(e.tokens), LOSS.temperature)
        ratio = jnp.exp(jnp.where(e.mask, logprobs - e.old_logprobs, 0))
        gain = jnp.minimum(ratio * e.advantages, jnp.clip(ratio, 0.8, 1.2) * e.advantages)
        drift = jnp.where(e.mask, e.reference_logprobs - logprobs, 0)
        k3 = jnp.exp(drift) - drift - 1
        count = jnp.sum(e.mask).astype(jnp.float32)
        return (jnp.sum(LOSS.kl_loss_coefficient * k3 - gain, where=e.mask) / count,
                (jnp.mean(k3, where=e.mask), jnp.mean(entropy, where=e.mask)))

    (loss, (kl, entropy)), gradients = jax.jit(jax.value_and_grad(whole, has_aux=True))(
        weights(QWEN2))
    params, metrics = baseline
    assert_same(params,
                jax.tree.map(lambda weight, change: weight - change, weights(QWEN2), gradients))
    expected = dict(loss=loss, kl=kl, entropy=entropy, grad_norm=optax.tree.norm(gradients))
    assert_same({name: metrics[name] for name in expected}, expected)
    assert 0 < metrics["clip_share"] < 1 and all(value.dtype == np.float32
                                                 for value in metrics.values())


def test_micro_batches_change_nothing(baseline):
    # Two of them are the baseline, which is compared with the whole batch above.
    assert_same(one_step(micro_batches=4), baseline)
    # what is not counted is not read
    assert_same(one_step(micro_batches=1, spare=3), baseline)


def test_micro_batches_change_nothing_under_sequence_mean():
    # Rows of one micro-batch have other lengths than those of the next: a mean within each would
    # differ.
    assert_same(one_step(micro_batches=4, aggregation="sequence_mean"),
                one_step(micro_batches=1, aggregation="sequence_mean"))


def test_padding_and_tiles_change_nothing(baseline):
    assert_same(one_step(positions=40, loss=dataclasses.replace(LOSS, vocabulary_tile=7)), baseline)


@pytest.mark.parametrize("changes",
                         [dict(remat="attention"), dict(remat="none"), dict(attention="blockwise")],
                         ids=str)
def test_what_is_kept_and_how_it_attends_change_nothing(baseline, changes):
    assert_same(one_step(config=dataclasses.replace(QWEN2, **changes)), baseline)


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
def test_eight_devices_step_as_one_does(baseline, shape):
    micro_batches = 1 if shape == MESHES["data"] else 2
    assert_same(one_step(shape=tuple(shape.items()), micro_batches=micro_batches, positions=32),
                baseline, rtol=2e-5)


def rollouts_of_the_table():
    """The table's sequences as the sampler leaves them: 4 prompts of 2 responses each."""
    e, starts = table(), np.array(PROMPTS)
    starts = np.repeat(starts[::2], 2)
    lengths = np.array(LENGTHS).clip(1)
    tokens = np.zeros((ROWS, lengths.max()), np.int32)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tokens[row, :length] = e.tokens[row, start : start + length]
    return Rollouts(prompts=e.tokens[::2, : starts.max()],
                    prompt_lengths=starts[::2].astype(np.int32), tokens=tokens.reshape(4, 2, -1),
                    lengths=lengths.reshape(4, 2).astype(np.int32),
                    logprobs=np.zeros((4, 2, lengths.max()), np.float32),
                    finish=np.full((4, 2), "eos"), repeated=np.zeros((4, 2), bool))


def learning_step(shape=(), decoder=QWEN2, **changes):
    """What a learning step of a small configuration starts from: configuration, learner, state,
    reference and packed rollouts. Args: changes, of sections of the configuration."""
    config = dataclasses.replace(Config(
        model=ModelConfig(dtype="float32"),
        rollout=RolloutConfig(prompts_per_step=4, group_size=2, max_new_tokens=16),
        mesh=MeshConfig(**dict(shape)), data=DataConfig(max_prompt_tokens=8)), **changes)
    target = mesh(**dict(shape))
    learning = learner.Learner(config, decoder, target)
    with jax.set_mesh(target):
        params = place(QWEN2, weights(QWEN2), target)
        reference = learning.as_reference(jax.tree.map(lambda leaf: leaf * 1.1, params))
        packed = learning.pack(rollouts_of_the_table(), np.arange(8).reshape(4, 2) % 3 > 0,
                               config.reward.alpha)
        return config, learning, learning.init(params), reference, packed


def learnt(settings, shape=(), offload=False, **changes):
    """State and metrics after one whole learning step of a small configuration, and the log-probs
    it found."""
    config, learning, state, reference, packed = learning_step(
        shape, dataclasses.replace(QWEN2, **changes), kl=KLConfig(offload_reference=offload),
        update=UpdateConfig(learning_rate=1e-2, warmup_updates=0, offload_optimizer=offload,
                            **settings))
    with jax.set_mesh(mesh(**dict(shape))):
        assert jax.tree.map(lambda leaf: leaf.sharding, reference) == jax.tree.map(
            lambda leaf: leaf.sharding, learning.abstract_reference)
        state, found = learning.update(state, reference, packed)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
            lambda leaf: leaf.sharding, learning.abstract_state)
        return sharding.to_host((state.params, found.updates, found.metrics))


@pytest.fixture(scope="module")
def learnt_in_pairs():
    return learnt(dict(rows_per_micro_batch=2))


@pytest.fixture(scope="module")
def learnt_in_two_updates():
    return learnt(dict(rows_per_micro_batch=4, updates_per_batch=2))


@pytest.mark.parametrize("changes", [
    dict(rows_per_micro_batch=1), dict(rows_per_micro_batch=8, vocabulary_tile=5)], ids=str)
def test_a_learning_step_does_not_depend_on_how_it_is_cut(learnt_in_pairs, changes):
    assert_same(learnt(dict(rows_per_micro_batch=2) | changes), learnt_in_pairs, atol=1e-4)


def test_a_learning_step_does_not_depend_on_packing(learnt_in_pairs, monkeypatch):
    monkeypatch.setattr(attention, "sequences_per_row", lambda implementation: 1)
    assert_same(learnt(dict(rows_per_micro_batch=2)), learnt_in_pairs, atol=1e-4)


@pytest.mark.parametrize("shape", [dict(data=2, fsdp=2, tensor=2), dict(data=2, fsdp=2, context=2)],
                         ids=str)
def test_a_learning_step_on_eight_devices_is_that_on_one(learnt_in_two_updates, shape):
    settings = dict(rows_per_micro_batch=4, updates_per_batch=2)
    assert_same(learnt(settings, tuple(shape.items())), learnt_in_two_updates, atol=1e-4)


@pytest.mark.parametrize(("prompts", "shards", "gathered"), [(4, 8, 2**28), (4, 8, 200),
                                                             (3, 1, 200)])
def test_each_device_has_the_numbers_of_its_own_responses(prompts, shards, gathered, monkeypatch):
    """Of 8 responses on 8 devices each has one, scored and learnt from as on one device; 6 are
    whole on every device. Of 16 columns all, or at most 6, are gathered at a time."""
    config = Config(model=ModelConfig(dtype="float32"), data=DataConfig(max_prompt_tokens=8),
                    rollout=RolloutConfig(prompts_per_step=prompts, group_size=2,
                                          max_new_tokens=16),
                    kl=KLConfig(form="reward"), update=UpdateConfig(rows_per_micro_batch=8))
    rollouts = jax.tree.map(lambda leaf: leaf[:prompts],
                            dataclasses.asdict(rollouts_of_the_table()))
    rollouts = Rollouts(**rollouts | {"logprobs": np.random.default_rng(0).normal(
        -1, 0.3, rollouts["logprobs"].shape).astype(np.float32)})

    def found(target):
        learning = learner.Learner(config, QWEN2, target)
        with jax.set_mesh(target):
            params = place(QWEN2, weights(QWEN2), target)
            packed = learning.pack(rollouts, np.arange(2 * prompts).reshape(-1, 2) % 3 > 0,
                                   config.reward.alpha)
            old = learning.score(params, packed)
            reference = learning.score_reference(jax.tree.map(lambda leaf: leaf * 1.1, params),
                                                 packed)
            batch = learning.programs.experience(packed.graded, None, reference, packed.packed)
            _, metrics, own = learning.programs.gradients(
                params, {}, batch.experience, packed.packed.counts, None, np.int32(0))
            of_tokens = packed.graded.sampled, old, reference, own
            for array in of_tokens:
                assert array.sharding.shard_shape(array.shape) == (
                    2 * prompts // (shards if target.size > 1 else 1), 16)
            measured = learning.measure(packed, old, reference)
        return sharding.to_host((of_tokens, batch, metrics, measured))

    on_one = found(mesh())
    monkeypatch.setattr(update, "GATHERED_BYTES", gathered)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
                 found(mesh(data=2, fsdp=4)), on_one)


@pytest.mark.parametrize(("parts", "most"), [(1, 3.5), (8, 2.0)])
def test_a_device_has_few_numbers_of_all_responses(parts, most, monkeypatch):
    """Scoring has none that is whole; the advantages one at a time, or a part of one."""
    config = Config(model=ModelConfig(dtype="float32"), data=DataConfig(max_prompt_tokens=512),
                    rollout=RolloutConfig(prompts_per_step=64, group_size=8, max_new_tokens=7680),
                    update=UpdateConfig(rows_per_micro_batch=8))
    target = mesh(data=2, fsdp=4)
    step = learner.Learner(config, QWEN2, target).lowered(config, width=8192, micro_batches=64)
    whole = 4 * 64 * 8 * 7680
    monkeypatch.setattr(update, "GATHERED_BYTES", whole // parts)
    with jax.set_mesh(target):
        for name, limit in (("score", 0.9), ("experience", most)):
            stats = step.lower[name]().compile().memory_analysis()
            assert stats.temp_size_in_bytes + stats.output_size_in_bytes < limit * whole, name


def test_offloading_changes_where_things_are_and_nothing_else():
    settings, shape = dict(rows_per_micro_batch=4, updates_per_batch=2), (("fsdp", 2),)
    jax.tree.map(np.testing.assert_array_equal, learnt(settings, shape, offload=True),
                 learnt(settings, shape))


def test_two_updates_follow_one_another_on_halves_of_the_responses(learnt_in_pairs):
    params, metrics, _ = learnt(dict(rows_per_micro_batch=2, updates_per_batch=2))
    assert len(metrics) == 2 and metrics[0]["clip_share"] == 0
    # the first update has moved the policy away from its old log-probs
    assert metrics[1]["clip_share"] > 0
    once = learnt_in_pairs[0]
    assert any(np.abs(one - other).max() > 1e-3
               for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(once), strict=True))


def gradient_of_stored_logprobs(config, learning, state, reference, packed, target):
    """Gradient and metrics of the first update by the formula that needs a pass of its own: old
    log-probs known beforehand, KL penalty and importance weights in the advantages."""
    old, fixed = learning.score(state.params, packed), learning.score_reference(reference, packed)

    @jax.jit
    def learn(old, fixed):
        scored, found = experience_of_step.learn(packed.graded, old, fixed,
                                                 reward=make_reward(config.reward),
                                                 objective=learner.make_objective(config))
        return scored.mask, found.token_advantages, found.weights

    mask, worth, of_tokens = sharding.to_host(learn(old, fixed))
    if config.kl.form == "reward" and not config.advantage.whiten:
        drift = np.where(mask, sharding.to_host(old) - sharding.to_host(fixed), 0)
        worth = worth - config.kl.coefficient * np.cumsum(drift[:, ::-1], axis=1)[:, ::-1]
    if config.update.importance_cap is not None:
        ratio = np.exp(sharding.to_host(old) - np.asarray(packed.graded.sampled))
        worth = worth * np.minimum(ratio, config.update.importance_cap)
    values = {"weights": of_tokens, "old_logprobs": old, "reference_logprobs": fixed,
              "advantages": np.where(mask, worth, np.float32(0))}

    # The second of two equal updates: it reads what is stored.
    twice = functools.partial(jax.tree.map, lambda x: jnp.concatenate([x, x]))

    @jax.jit
    def in_rows(values, groups):
        return twice(tuple(Experience(rows=rows, **jax.tree.map(
            lambda value, rows=rows: update.scatter_to_rows(value, rows), values))
            for rows in groups))

    rows = in_rows(values, packed.packed.groups)
    loss = update.LossConfig(
        clip_ratio=config.update.clip_ratio, temperature=config.rollout.temperature,
        kl_loss_coefficient=config.kl.coefficient if config.kl.form == "loss" else 0.0,
        vocabulary_tile=config.update.vocabulary_tile)
    gradients = update.make_gradients(
        learning.decoder, target, loss, types.SimpleNamespace(params=learning.params_sharding), {},
        responses=old.shape)
    grads, metrics, _ = gradients(state.params, {}, rows, twice(packed.packed.counts), None,
                                  np.int32(1))
    return grads, metrics, old


@pytest.mark.parametrize(("form", "whiten", "cap", "shape"), [
    ("none", True, None, ()), ("loss", False, None, ()), ("reward", False, 1.1, ()),
    ("reward", True, None, ()), ("reward", False, None, (("data", 2), ("context", 2)))])
def test_old_logprobs_of_the_gradient_pass_give_the_gradient_of_stored_ones(form, whiten, cap,
                                                                            shape):
    target = mesh(**dict(shape))
    config, learning, state, reference, packed = learning_step(
        shape, kl=KLConfig(form=form, coefficient=0.3), advantage=AdvantageConfig(whiten=whiten),
        update=UpdateConfig(rows_per_micro_batch=2, importance_cap=cap))
    with jax.set_mesh(target):
        fixed = learning.score_reference(reference, packed)
        old = learning.score(state.params, packed) if learning.scores_policy else None
        assert (old is not None) == (whiten and form == "reward")
        rows = learning.programs.experience(packed.graded, old, fixed, packed.packed).experience
        grads, metrics, found = learning.programs.gradients(state.params, {}, rows,
                                                            packed.packed.counts, old, np.int32(0))
        expected, other, stored = gradient_of_stored_logprobs(config, learning, state, reference,
                                                              packed, target)
        grads, expected, metrics, other = sharding.to_host((grads, expected, metrics, other))
        apart = jax.tree.map(np.subtract, grads, expected)
        assert jax.jit(optax.tree.norm)(apart) <= 1e-6 * jax.jit(optax.tree.norm)(expected)
        assert_same(metrics, other, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(found, stored, rtol=1e-6, atol=1e-6)
    assert metrics["clip_share"] == 0 and found.any()


@pytest.mark.parametrize("updates", [1, 2])
def test_the_first_update_has_a_ratio_of_exactly_1_in_bfloat16(updates):
    # Kept activations are rounded otherwise than those of a pass without gradients.
    settings = dict(rows_per_micro_batch=2, clip_ratio=1e-6, updates_per_batch=updates)
    metrics = learnt(settings, dtype=jnp.bfloat16, remat="none")[1]
    assert metrics[0]["clip_share"] == 0 and len(metrics) == updates
    assert all(step["clip_share"] > 0.1 for step in metrics[1:])


def test_log_probs_are_stored_for_later_updates_alone():
    _, learning, state, _, packed = learning_step(
        update=UpdateConfig(rows_per_micro_batch=2, updates_per_batch=2))
    every, later = (np.asarray(learning.score(state.params, packed, first)) for first in (0, 1))
    np.testing.assert_array_equal(later[1::2], every[1::2])
    assert every[::2].any() and not later[::2].any()


def test_what_stops_a_batch_leaves_the_weights_as_they_are():
    _, learning, state, reference, packed = learning_step()

    def check(metrics):
        assert 0 < metrics["rollout/mismatch"]
        raise parity.Mismatch("too far")

    with pytest.raises(parity.Mismatch):
        learning.update(state, reference, packed, check=check)
    jax.tree.map(np.testing.assert_array_equal, state.params, weights(QWEN2))


def test_a_step_compiles_once_and_takes_the_old_state_over():
    target = mesh(data=2, fsdp=2, tensor=2)
    schedule = update.make_schedule(UpdateConfig(), 3)
    optimizer = update.make_optimizer(UpdateConfig(), schedule)
    targets = update.state_sharding(QWEN2, optimizer, target)
    moments = optax.tree.get(targets.opt_state, "mu")
    # the moments live next to their weights
    assert moments == targets.params
    with jax.set_mesh(target):
        state = update.make_initial_state(optimizer, targets)(place(QWEN2, weights(QWEN2), target))
        gradients = update.make_gradients(QWEN2, target, LOSS, targets, {}, responses=RESPONSES)
        apply_gradients = update.make_apply_gradients(optimizer, schedule, target, targets)
        for count in (2, 1, 2):                                 # with less to learn from, too
            before = state
            rows = sharding.to_device(in_micro_batches(experience(), 2),
                                      sharding.sharding(target, *update.ROW_AXES))
            grads, metrics, _ = gradients(state.params, {}, (rows,),
                                          (np.full(1, count, np.int32),), None, np.int32(0))
            state, _ = apply_gradients(state, grads, np.int32(1))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
            assert all(np.isfinite(value) for value in sharding.to_host(metrics).values())
    assert state.step == 3 and gradients._cache_size() == apply_gradients._cache_size() == 1
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == targets
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))


# The optimizer


def adamw(**settings):
    config = UpdateConfig(**{"learning_rate": 0.1, "warmup_updates": 0} | settings)
    return update.make_optimizer(config, update.make_schedule(config, updates=6))


def rates(**settings):
    """The size of each update under a constant gradient: Adam's is then the learning rate."""
    optimizer = adamw(learning_rate=2.0, max_grad_norm=1e9, **settings)
    params = {"w": jnp.zeros(())}
    state, sizes = optimizer.init(params), []
    for _ in range(6):
        changes, state = optimizer.update({"w": jnp.ones(())}, state, params)
        sizes.append(-float(changes["w"]))
    return sizes


@pytest.mark.parametrize(("warmup_updates", "expected"),
                         [(0, [2, 2, 2, 2, 2, 2]), (1, [2, 2, 2, 2, 2, 2]), (2, [1, 2, 2, 2, 2, 2]),
                          (4, [0.5, 1, 1.5, 2, 2, 2]),])
def test_the_rate_rises_to_its_value_at_the_last_update_of_the_warm_up(warmup_updates, expected):
    np.testing.assert_allclose(rates(warmup_updates=warmup_updates), expected, rtol=1e-4)


@pytest.mark.parametrize(("schedule", "expected"), [
    ("linear", [1, 2, 1.7, 1.4, 1.1, 0.8]),
    ("cosine", [1, *(0.5 + 0.75 * (1 + np.cos(np.pi * np.arange(5) / 5)))])])
def test_the_rate_falls_from_the_end_of_the_warm_up_to_the_end_of_the_run(schedule, expected):
    found = rates(warmup_updates=2, schedule=schedule, min_learning_rate=0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(("gradient", "expected"),
                         [([3.0, 4.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])])
def test_gradients_are_clipped_by_their_global_norm(gradient, expected):
    optimizer = adamw()
    params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    gradients = dict(zip(params, map(jnp.float32, gradient), strict=True))
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    first_moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose([first_moment["a"] / 0.1, first_moment["b"] / 0.1], expected,
                               rtol=1e-5)


def test_weight_decay_is_apart_from_the_gradient():
    optimizer = adamw(weight_decay=0.5)
    params = {"w": jnp.float32(4.0)}
    changes, _ = optimizer.update({"w": jnp.float32(0.0)}, optimizer.init(params), params)
    np.testing.assert_allclose(changes["w"], -0.1 * 0.5 * 4.0, rtol=1e-6)


def test_weight_decay_leaves_norms_and_biases_alone():
    optimizer = adamw(weight_decay=0.5)
    for config in (QWEN2, QWEN3):
        params = weights(config)
        changes, _ = jax.jit(lambda params: optimizer.update(
            jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params))(params)
        for path, change in jax.tree_util.tree_leaves_with_path(changes):
            is_kept = "norm" in path[-1].key or "bias" in path[-1].key
            assert np.any(change) != is_kept, path
