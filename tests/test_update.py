"""The update: the loss against a NumPy oracle, and the same step however rows, padding and devices are cut."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoders import QWEN2, QWEN3, VOCABULARY, mesh, place, weights

from effreason import update
from effreason.lm import model
from effreason.masks import response_mask
from effreason.records import Experience, Rollouts
from effreason.runtime import sharding

ROWS, PROMPTS, LENGTHS = 8, [3, 1, 7, 5, 2, 4, 6, 3], [9, 1, 5, 0, 12, 8, 2, 7]
LOSS = update.LossConfig(clip_ratio=0.2, aggregation="token_mean", kl_loss_coefficient=0.05, temperature=0.8,
                         logprob_chunk=64)
MESHES = {"data": dict(data=8), "all": dict(data=2, fsdp=2, tensor=2), "context": dict(fsdp=4, context=2)}


@functools.cache
def experience(positions=24):
    """Rows whose ratios lie on both sides of the clip; one response is empty; rubbish stands outside the responses."""
    generator = np.random.default_rng(1)
    real = 24

    def padded(x, fill):
        return np.pad(x, ((0, 0), (0, positions - real)), constant_values=fill)

    tokens = generator.integers(0, VOCABULARY, (ROWS, real)).astype(np.int32)
    mask = np.asarray(response_mask(np.array(PROMPTS), np.array(LENGTHS), real))
    logprobs = np.asarray(score_naively(QWEN2, weights(QWEN2), tokens, LOSS.temperature)[0])
    old, reference = (logprobs + generator.normal(0, 0.2, mask.shape).astype(np.float32) for _ in range(2))
    advantages = np.where(mask, generator.standard_normal(mask.shape), 0).astype(np.float32)
    return Experience(tokens=padded(tokens, 5), mask=padded(mask, False), advantages=padded(advantages, 0),
                      old_logprobs=padded(np.where(mask, old, -500.0).astype(np.float32), 400.0),
                      reference_logprobs=padded(np.where(mask, reference, 500.0).astype(np.float32), -400.0))


def score_naively(config, params, tokens, temperature):
    logits = jax.jit(lambda params, tokens: model.logits(params, model.forward(config, params, tokens)))(params, tokens)
    table = jax.nn.log_softmax(logits[:, :-1] / temperature, axis=-1)
    chosen = jnp.take_along_axis(table, tokens[:, 1:, None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(table) * table, axis=-1)
    return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in (chosen, entropy))


def one_step(shape=(), positions=24, micro_batches=2, loss=LOSS, config=QWEN2):
    """One step of plain gradient descent at rate 1: params less gradients, on the host, and the metrics."""
    target, optimizer = mesh(**dict(shape)), optax.sgd(1.0)
    targets = update.state_sharding(config, optimizer, target)
    with jax.set_mesh(target):
        state = update.make_initial_state(optimizer, targets)(place(config, weights(config), target))
        step = update.make_update(config, target, loss, optimizer, targets, micro_batches=micro_batches)
        rows = sharding.to_device(experience(positions), sharding.sharding(target, "batch", "sequence"))
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, rows)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == targets
        return sharding.to_host((state.params, metrics))


@pytest.fixture(scope="module")
def baseline():
    return one_step()


def assert_same(found, expected, rtol=1e-5, atol=1e-5):
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=rtol, atol=atol), found, expected)


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
    e = experience()
    logprobs = np.where(e.mask, e.old_logprobs, 0) + np.random.default_rng(2).normal(0, 0.3, e.mask.shape)
    logprobs = logprobs.astype(np.float32)
    weights = np.asarray(update.token_weights(e.mask, aggregation))
    loss, sums = update.policy_loss(jnp.asarray(logprobs), e, weights, clip_ratio=0.2, kl_loss_coefficient=coefficient)
    expected, kl, clip_share = loss_in_numpy(logprobs, e, weights, 0.2, coefficient)
    assert 0.05 < clip_share < 0.95
    np.testing.assert_allclose([loss, sums["kl"], sums["clip_share"]], [expected, kl, clip_share], rtol=1e-5, atol=1e-6)


def one_token(ratio, advantage):
    one = jnp.ones((1, 1))
    return Experience(tokens=one.astype(int), mask=one > 0, advantages=advantage * one, old_logprobs=0 * one - 1,
                      reference_logprobs=0 * one - 1), jnp.log(ratio) * one - 1, one


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope", "clipped"), [
    (1.0, 2.0, -2.0, -2.0, 0),
    (1.5, 2.0, -2.4, 0.0, 1),               # already made likelier by more than the clip: no more pull
    (1.5, -2.0, 3.0, 3.0, 0),               # too likely and bad: pushed down however far it went
    (0.5, 2.0, -1.0, -1.0, 0),
    (0.5, -2.0, 1.6, 0.0, 1),
])
def test_clip_by_hand(ratio, advantage, loss, slope, clipped):
    e, logprobs, one = one_token(ratio, advantage)
    value, gradient = jax.value_and_grad(lambda logprobs: update.policy_loss(
        logprobs, e, one, clip_ratio=0.2, kl_loss_coefficient=0.0)[0])(logprobs)
    np.testing.assert_allclose([value, gradient[0, 0]], [loss, slope], rtol=1e-6)
    sums = update.policy_loss(logprobs, e, one, clip_ratio=0.2, kl_loss_coefficient=0.0)[1]
    assert sums["clip_share"] == clipped


def test_k3_by_hand():
    # pi / reference = 2: d = -log 2, k3 = 1/2 + log 2 - 1; its slope is 1 - exp(d) = 1/2.
    e, logprobs, one = one_token(2.0, 0.0)
    (value, sums), gradient = jax.value_and_grad(functools.partial(
        update.policy_loss, experience=e, weights=one, clip_ratio=0.2, kl_loss_coefficient=3.0), has_aux=True)(logprobs)
    np.testing.assert_allclose([sums["kl"], value], [math.log(2) - 0.5, 3 * (math.log(2) - 0.5)], rtol=1e-6)
    np.testing.assert_allclose(gradient, 1.5, rtol=1e-6)


def test_the_gradient_at_ratio_one_is_reinforce():
    e, weights = experience(), update.token_weights(experience().mask, "token_mean")
    gradient = jax.grad(lambda logprobs: update.policy_loss(logprobs, e, weights, clip_ratio=0.2,
                                                            kl_loss_coefficient=0.0)[0])(jnp.asarray(e.old_logprobs))
    np.testing.assert_allclose(gradient, -weights * e.advantages, rtol=1e-6)


def test_what_stands_outside_the_responses_is_nothing_to_the_loss():
    e, weights = experience(), update.token_weights(experience().mask, "token_mean")
    for outside in (-1e4, 1e4):             # exp overflows: inf * 0 would be nan, in the value or in the gradient
        logprobs = jnp.where(e.mask, e.old_logprobs, outside)
        value, gradient = jax.value_and_grad(lambda logprobs: update.policy_loss(
            logprobs, e, weights, clip_ratio=0.2, kl_loss_coefficient=0.1)[0])(logprobs)
        assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[~e.mask].any()


def test_token_weights():
    mask = np.array([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], bool)
    by_token, by_row = (np.asarray(update.token_weights(mask, name)) for name in ("token_mean", "sequence_mean"))
    np.testing.assert_allclose(by_token, mask / 5, rtol=1e-6)
    np.testing.assert_allclose(by_row, mask * np.array([[1 / 9], [1 / 3], [0], [1 / 3]]), rtol=1e-6)
    assert by_token.dtype == by_row.dtype == np.float32
    for name in ("token_mean", "sequence_mean"):
        assert not np.asarray(update.token_weights(np.zeros((2, 3), bool), name)).any()     # no response at all: no nan


# Log-probs


@pytest.mark.parametrize("chunk", [1, 5, 23, 64])
def test_chunks_change_neither_logprobs_nor_gradients(chunk):
    generator = np.random.default_rng(3)
    hidden = generator.standard_normal((3, 23, 16), dtype=np.float32)
    head = generator.standard_normal((VOCABULARY, 16), dtype=np.float32)
    targets = generator.integers(0, VOCABULARY, (3, 23)).astype(np.int32)
    pull = generator.standard_normal((3, 23), dtype=np.float32)

    def naive(hidden, head):
        table = jax.nn.log_softmax(jnp.einsum("bnd,vd->bnv", hidden, head) / 0.7, axis=-1)
        chosen = jnp.take_along_axis(table, targets[..., None], axis=-1)[..., 0]
        return chosen, -jnp.sum(jnp.exp(table) * table, axis=-1)

    def chunked(hidden, head):
        return update.token_logprobs(hidden, head, targets, temperature=0.7, chunk=chunk)

    def gradients(score):
        return jax.jit(jax.grad(lambda *args: jnp.sum(pull * score(*args)[0]), argnums=(0, 1)))(hidden, head)

    assert_same(jax.jit(chunked)(hidden, head), naive(hidden, head), atol=1e-5)
    assert_same(gradients(chunked), gradients(naive), rtol=1e-4, atol=1e-5)


def test_entropy_of_known_distributions():
    # Scores all alike: log V. One far above the rest: 0.
    head = np.zeros((4, 2), np.float32)
    head[0, 1] = 1_000.0
    hidden = np.array([[[1, 0], [0, 1]]], np.float32)
    logprobs, entropy = update.token_logprobs(hidden, head, np.zeros((1, 2), np.int32), temperature=1.0, chunk=8)
    np.testing.assert_allclose(entropy, [[math.log(4), 0]], atol=1e-6)
    np.testing.assert_allclose(logprobs, [[-math.log(4), 0]], atol=1e-6)


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["untied", "tied"])
@pytest.mark.parametrize("chunk", [7, 64])
def test_score_rows_is_the_naive_score(config, chunk):
    tokens = experience().tokens
    score = jax.jit(functools.partial(update.score_rows, config, temperature=0.8, chunk=chunk))
    found = score(weights(config), tokens)
    assert_same(found, score_naively(config, weights(config), tokens, 0.8), atol=1e-5)
    assert not found[0][:, 0].any()


@pytest.mark.parametrize("shape", [{}, MESHES["all"], MESHES["context"]], ids=["one device", "all", "context"])
def test_scorer_gives_every_row_its_own_scores(shape):
    target = mesh(**shape)
    with jax.set_mesh(target):
        score = update.make_scorer(QWEN2, target, LOSS, micro_batches=2)
        found = score(place(QWEN2, weights(QWEN2), target), experience().tokens)
    expected = score_naively(QWEN2, weights(QWEN2), experience().tokens, LOSS.temperature)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# Rows


def rollouts_of(prompt_lengths, lengths):
    """Tokens that say where they belong: 100 p + position in prompts, 1000 (p + 1) + 100 g + position in responses."""
    prompt_lengths, lengths = np.array(prompt_lengths, np.int32), np.array(lengths, np.int32)
    prompts, group_size = lengths.shape
    prompt = 100 * np.arange(prompts)[:, None] + np.arange(prompt_lengths.max())
    at = np.arange(lengths.max())
    response = 1000 * (1 + np.arange(prompts)[:, None, None]) + 100 * np.arange(group_size)[None, :, None] + at
    return Rollouts(
        prompts=np.where(np.arange(prompt_lengths.max()) < prompt_lengths[:, None], prompt, -1).astype(np.int32),
        prompt_lengths=prompt_lengths, tokens=np.where(at < lengths[..., None], response, -1).astype(np.int32),
        lengths=lengths, logprobs=np.zeros((*lengths.shape, lengths.max()), np.float32),
        finish=np.full(lengths.shape, "eos"), looped=np.zeros(lengths.shape, bool))


def test_pack_lays_prompt_and_response_in_one_line():
    packed = update.pack(rollouts_of([2, 3], [[3, 1], [2, 4]]), 1)
    np.testing.assert_array_equal(packed["tokens"][:, :8], [
        [0, 1, 1000, 1001, 1002, 0, 0, 0],
        [0, 1, 1100, 0, 0, 0, 0, 0],
        [100, 101, 102, 2000, 2001, 0, 0, 0],
        [100, 101, 102, 2100, 2101, 2102, 2103, 0],
    ])
    assert not packed["tokens"][:, 8:].any() and packed["tokens"].dtype == np.int32
    np.testing.assert_array_equal(packed["prompt_lengths"], [2, 2, 3, 3])
    np.testing.assert_array_equal(packed["lengths"], [3, 1, 2, 4])
    mask = np.asarray(response_mask(packed["prompt_lengths"], packed["lengths"], packed["tokens"].shape[1]))
    np.testing.assert_array_equal(mask, packed["tokens"] >= 1000)


@pytest.mark.parametrize(("prompt", "response", "multiple", "expected"), [
    (4, 60, 1, 64), (4, 61, 1, 96), (4, 60, 7, 70), (90, 6, 8, 96),
])
def test_pack_rounds_rows_up_to_few_lengths(prompt, response, multiple, expected):
    assert update.pack(rollouts_of([prompt], [[response, 1]]), multiple)["tokens"].shape == (2, expected)


# The step


def test_the_step_follows_the_gradient_of_the_whole_batch(baseline):
    # The loss written down once more, for all rows at once, without chunks, micro-batches or remat.
    e, config = experience(), dataclasses.replace(QWEN2, remat=False)

    def whole(params):
        logprobs, entropy = score_naively(config, params, jnp.asarray(e.tokens), LOSS.temperature)
        ratio = jnp.exp(jnp.where(e.mask, logprobs - e.old_logprobs, 0))
        gain = jnp.minimum(ratio * e.advantages, jnp.clip(ratio, 0.8, 1.2) * e.advantages)
        drift = jnp.where(e.mask, e.reference_logprobs - logprobs, 0)
        k3 = jnp.exp(drift) - drift - 1
        return (jnp.sum(LOSS.kl_loss_coefficient * k3 - gain, where=e.mask) / e.mask.sum(),
                (jnp.mean(k3, where=e.mask), jnp.mean(entropy, where=e.mask)))

    (loss, (kl, entropy)), gradients = jax.value_and_grad(whole, has_aux=True)(weights(QWEN2))
    params, metrics = baseline
    assert_same(params, jax.tree.map(lambda weight, change: weight - change, weights(QWEN2), gradients))
    expected = dict(loss=loss, kl=kl, entropy=entropy, grad_norm=optax.tree.norm(gradients))
    assert_same({name: metrics[name] for name in expected}, expected)
    assert 0 < metrics["clip_share"] < 1 and all(value.dtype == np.float32 for value in metrics.values())


def test_micro_batches_change_nothing(baseline):
    # Two of them are the baseline, which is compared with the whole batch above.
    assert_same(one_step(micro_batches=4), baseline)


def test_micro_batches_change_nothing_under_sequence_mean():
    # Rows of one micro-batch have other lengths than those of the next: a mean within each would differ.
    loss = dataclasses.replace(LOSS, aggregation="sequence_mean")
    assert_same(one_step(micro_batches=4, loss=loss), one_step(micro_batches=1, loss=loss))


def test_padding_and_chunks_change_nothing(baseline):
    assert_same(one_step(positions=40, loss=dataclasses.replace(LOSS, logprob_chunk=16)), baseline)


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
def test_eight_devices_step_as_one_does(baseline, shape):
    micro_batches = 1 if shape.get("data", 1) * shape.get("fsdp", 1) == 8 else 2
    assert_same(one_step(shape=tuple(shape.items()), micro_batches=micro_batches), baseline, rtol=2e-5)


def test_a_step_compiles_once_and_takes_the_old_state_over():
    target = mesh(data=2, fsdp=2, tensor=2)
    optimizer = update.make_optimizer(1e-3, 0.9, 0.95, 0.0, 1.0, 2)
    targets = update.state_sharding(QWEN2, optimizer, target)
    moments = optax.tree.get(targets.optimizer, "mu")
    assert moments == targets.params                            # the moments live beside their weights
    with jax.set_mesh(target):
        state = update.make_initial_state(optimizer, targets)(place(QWEN2, weights(QWEN2), target))
        step = update.make_update(QWEN2, target, LOSS, optimizer, targets, micro_batches=2)
        for number in range(3):
            before = state
            rows = sharding.to_device(experience(), sharding.sharding(target, "batch", "sequence"))
            state, metrics = step(state, rows)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
            assert all(np.isfinite(value) for value in sharding.to_host(metrics).values())
            assert state.step == number + 1
    assert step._cache_size() == 1
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == targets
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))


def test_updates_of_one_batch_are_steps_on_its_parts():
    target, optimizer = mesh(), optax.sgd(0.5)
    targets = update.state_sharding(QWEN2, optimizer, target)
    with jax.set_mesh(target):
        def fresh():
            return update.make_initial_state(optimizer, targets)(place(QWEN2, weights(QWEN2), target))

        both = update.make_update(QWEN2, target, LOSS, optimizer, targets, micro_batches=1, updates=2)
        together, metrics = both(fresh(), experience())
        one = update.make_update(QWEN2, target, LOSS, optimizer, targets, micro_batches=1)
        state, seen = fresh(), []
        for part in range(2):
            state, each = one(state, jax.tree.map(lambda rows, part=part: rows[part::2], experience()))
            seen.append(each)
    assert_same(sharding.to_host(together.params), sharding.to_host(state.params))
    assert_same(metrics, jax.tree.map(lambda first, second: (first + second) / 2, *seen))
    assert together.step == 1 and state.step == 2


# The optimiser


def rates(warmup_updates, learning_rate=2.0, count=6):
    """The size of each update under a constant gradient: Adam's is then the learning rate."""
    optimizer = update.make_optimizer(learning_rate, 0.9, 0.95, 0.0, 1e9, warmup_updates)
    params = {"w": jnp.zeros(())}
    state, sizes = optimizer.init(params), []
    for _ in range(count):
        changes, state = optimizer.update({"w": jnp.ones(())}, state, params)
        sizes.append(-float(changes["w"]))
    return sizes


@pytest.mark.parametrize(("warmup_updates", "expected"), [
    (0, [2, 2, 2, 2, 2, 2]), (1, [2, 2, 2, 2, 2, 2]), (2, [1, 2, 2, 2, 2, 2]), (4, [0.5, 1, 1.5, 2, 2, 2]),
])
def test_the_rate_rises_to_its_value_at_the_last_update_of_the_warm_up(warmup_updates, expected):
    np.testing.assert_allclose(rates(warmup_updates), expected, rtol=1e-4)


@pytest.mark.parametrize(("gradient", "expected"), [([3.0, 4.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])])
def test_gradients_are_clipped_by_their_global_norm(gradient, expected):
    optimizer = update.make_optimizer(1.0, 0.9, 0.95, 0.0, 1.0, 0)
    params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    gradients = dict(zip(params, map(jnp.float32, gradient), strict=True))
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    first_moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose([first_moment["a"] / 0.1, first_moment["b"] / 0.1], expected, rtol=1e-5)


def test_weight_decay_is_apart_from_the_gradient():
    optimizer = update.make_optimizer(0.1, 0.9, 0.95, 0.5, 1.0, 0)
    params = {"w": jnp.float32(4.0)}
    changes, _ = optimizer.update({"w": jnp.float32(0.0)}, optimizer.init(params), params)
    np.testing.assert_allclose(changes["w"], -0.1 * 0.5 * 4.0, rtol=1e-6)
