"""Adapters: what they add, what is trained, and that merged weights compute the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import FAMILIES, QWEN2, VOCABULARY, rows_of, weights

from effreason.lm import adapters, model
from effreason.lm.hf.config import read_config
from effreason.lm.hf.pretrained import SHIPPED_REASONER
from effreason.lm.hf.weights import read_weights
from effreason.rl import update

ADAPTER = adapters.make_adapter(3, 6.0, "all", rank_stabilized=False)
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9)).astype(np.int32)


def with_adapters(config, adapter=ADAPTER):
    return dataclasses.replace(config, adapter=adapter)


merge_adapters = jax.jit(model.merge_adapters, static_argnums=0)


def hidden(config, params):
    return jax.jit(model.forward, static_argnums=0)(config, params, TOKENS)


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3", "smollm3", "qwen3_moe", "qwen3_5"])
def test_merged_weights_compute_what_the_adapters_do(family):
    config = with_adapters(FAMILIES[family])
    params = weights(config)
    merged = merge_adapters(config, params)
    expected = hidden(config, params)

    assert jax.tree.structure(merged) == jax.tree.structure(weights(FAMILIES[family]))
    np.testing.assert_allclose(hidden(FAMILIES[family], merged), expected, rtol=2e-4, atol=2e-4)
    assert np.abs(expected - hidden(FAMILIES[family], adapters.split(params)[0])).max() > 0.1

    # The sampler's copy is merged, too.
    cache = model.empty_cache(FAMILIES[family], 2, 16)
    decoded, _ = jax.jit(lambda params: model.decode(
        FAMILIES[family], model.unstack(config, params), TOKENS, jnp.zeros(2, jnp.int32),
        cache))(params)
    np.testing.assert_allclose(decoded, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_before_the_first_update_the_policy_is_the_base_bit_for_bit(dtype):
    base = dataclasses.replace(QWEN2, dtype=dtype)
    config = with_adapters(base)
    frozen = model.in_compute_dtype(base, weights(base))
    initial = adapters.split(jax.jit(model.init, static_argnums=0)(config, jax.random.key(1)))[1]
    policy = adapters.join(frozen, initial)

    for name, leaf in initial["layers"].items():
        assert (np.abs(leaf).max() == 0) == name.endswith(adapters.B), name
    jax.tree.map(np.testing.assert_array_equal, merge_adapters(config, policy), frozen)
    np.testing.assert_array_equal(hidden(config, policy), hidden(base, frozen))


def test_the_first_matrix_is_drawn_as_peft_does():
    # Uniform in +-1 / sqrt(inputs): the product of output sums over heads and head_dim.
    config = with_adapters(dataclasses.replace(QWEN2, width=64), dataclasses.replace(
        ADAPTER, rank=64))
    layers = jax.jit(model.init, static_argnums=0)(config, jax.random.key(0))["layers"]
    for name, inputs in (("query", 64), ("output", 16), ("down", 24)):
        drawn = np.asarray(layers[name + adapters.A])
        bound = inputs**-0.5
        assert 0.95 * bound < np.abs(drawn).max() <= bound
        np.testing.assert_allclose(drawn.std(), bound / np.sqrt(3), rtol=0.05)


def small():
    """A random decoder with adapters of rank 3."""
    return QWEN2, with_adapters(QWEN2), weights(with_adapters(QWEN2))


@functools.cache
def tiny():
    """The shipped reasoner with adapters of rank 16."""
    base = read_config(SHIPPED_REASONER)
    config = with_adapters(base, adapters.make_adapter(16, 32.0, "all", rank_stabilized=False))
    generator = np.random.default_rng(2)
    added = jax.tree.map(lambda leaf: 0.05 * generator.standard_normal(leaf.shape, np.float32),
                         adapters.split(model.abstract_params(config))[1])
    return base, config, adapters.join(read_weights(SHIPPED_REASONER, base), added)


@pytest.mark.parametrize("made", [small, tiny])
def test_loss_and_gradients_are_those_of_the_product_by_the_chain_rule(made):
    # d(loss)/dA = s dW B^T and d(loss)/dB = s A^T dW, with dW of the merged weight.
    base, config, params = made()
    frozen, trained = adapters.split(params)
    tokens = np.random.default_rng(0).integers(2, base.vocabulary, (2, 9)).astype(np.int32)
    shares = np.random.default_rng(1).standard_normal(tokens.shape, np.float32)
    rows = rows_of(tokens)

    def loss(config, params):
        logprobs, _ = update.score_rows(config, params, rows, temperature=1.0, tile=16)
        return jnp.sum(logprobs * shares)

    value, ours = jax.jit(jax.value_and_grad(
        lambda trained: loss(config, adapters.join(frozen, trained))))(trained)
    expected, whole = jax.jit(jax.value_and_grad(functools.partial(loss, base)))(
        merge_adapters(config, params))
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)

    scale, rank = config.adapter.scale, config.adapter.rank
    for name in adapters.ATTENTION + adapters.MLP:
        for layer in range(base.layers):
            a, b, change = (np.asarray(tree["layers"][key][layer], np.float64) for tree, key in (
                (params, name + adapters.A), (params, name + adapters.B), (whole, name)))
            shape_a, shape_b = a.shape, b.shape
            a, b = a.reshape(-1, rank), b.reshape(rank, -1)
            change = change.reshape(a.shape[0], b.shape[1])
            for key, expected in ((name + adapters.A, (scale * change @ b.T).reshape(shape_a)),
                                  (name + adapters.B, (scale * a.T @ change).reshape(shape_b))):
                np.testing.assert_allclose(ours["layers"][key][layer], expected, rtol=2e-3,
                                           atol=2e-4 * np.abs(expected).max(), err_msg=key)


def test_scale_and_targets():
    plain = adapters.make_adapter(16, 32.0, "attention", rank_stabilized=False)
    stabilized = adapters.make_adapter(16, 32.0, "mlp", rank_stabilized=True)
    assert (plain.scale, stabilized.scale) == (2.0, 8.0)
    assert adapters.make_adapter(0, 32.0, "all", rank_stabilized=False) is None

    layers = model.abstract_params(with_adapters(QWEN2, stabilized))["layers"]
    assert {name.removesuffix(adapters.A) for name in layers if name.endswith(adapters.A)} == {
        "gate", "up", "down"}
    assert layers["down" + adapters.A].shape == (2, 24, 16)
    assert layers["down" + adapters.B].shape == (2, 16, 16)


def test_no_gradient_of_a_frozen_weight_is_formed():
    # A layer's gradient would be as large as the layer; the compiled program has no room for it.
    base = dataclasses.replace(QWEN2, width=256, mlp_width=1024, layers=4, remat="full")
    config = with_adapters(base)

    def loss(frozen, trained):
        params = adapters.join(frozen, trained)
        return jnp.sum(model.forward(config, params, TOKENS))

    frozen, trained = adapters.split(model.abstract_params(config))
    adapters_alone = jax.jit(jax.grad(loss, argnums=1)).lower(frozen, trained).compile()
    with_weights = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(frozen, trained).compile()
    layer_bytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(frozen["layers"])) / base.layers

    def peak(compiled):
        memory = compiled.memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    assert peak(with_weights) > base.layers * layer_bytes
    assert peak(adapters_alone) < 2 * layer_bytes       # it reads a copy of one layer


DIAL = adapters.make_adapter(3, 6.0, "all", rank_stabilized=False, has_dial=True)


def merged_at(config, params, setting):
    return merge_adapters(config, params | {adapters.SETTING: np.float32(setting)})


def test_each_sequence_has_its_own_setting_of_the_dial():
    config = with_adapters(QWEN2, DIAL)
    params = weights(config)
    settings = np.broadcast_to(np.float32([[0.0], [0.6]]), TOKENS.shape)
    mixed = jax.jit(lambda params: model.forward(config, params, TOKENS, settings=settings))(params)

    for row, setting in enumerate((0.0, 0.6)):
        alone = hidden(QWEN2, merged_at(config, params, setting))
        np.testing.assert_allclose(mixed[row], alone[row], rtol=2e-4, atol=2e-4)
    assert np.abs(mixed[1] - hidden(QWEN2, merged_at(config, params, 0.0))[1]).max() > 0.1

    # Both adapters together, by NumPy.
    layers = jax.tree.map(np.asarray, params["layers"])
    added = 2.0 * sum(share * np.einsum("ldr,lrhk->ldhk", layers["query" + a], layers["query" + b])
                      for share, a, b in ((1.0, adapters.A, adapters.B),
                                          (0.6, adapters.DIAL_A, adapters.DIAL_B)))
    np.testing.assert_allclose(merged_at(config, params, 0.6)["layers"]["query"],
                               layers["query"] + added, rtol=1e-5, atol=1e-5)


def test_sequences_at_setting_0_train_the_common_adapter_and_the_others_the_dial():
    config = with_adapters(QWEN2, DIAL)
    frozen, trained = adapters.split(weights(config))

    @jax.jit
    def gradients_at(rows):
        return jax.grad(lambda trained: jnp.sum(jnp.square(model.forward(
            config, adapters.join(frozen, trained), TOKENS[:len(rows)], settings=rows))))(
                trained)["layers"]

    def gradients(*settings):
        return gradients_at(np.broadcast_to(np.float32(settings)[:, None],
                                            (len(settings), TOKENS.shape[1])))

    def parts(grads):
        common = {name: grads[name] for name in grads if name.endswith((adapters.A, adapters.B))}
        return common, {name: grads[name] for name in grads if name not in common}

    # Below the last layer a common adapter also changes what the other row never reads: rows are
    # separate sequences, so a row at 0 alone gives the whole gradient of the common adapter.
    both, at_zero = gradients(0.0, 0.5), gradients(0.0, 0.0)
    common, dial = parts(both)
    assert all(np.abs(leaf).max() > 0 for leaf in (*common.values(), *dial.values()))
    assert all(np.abs(leaf).max() == 0 for leaf in parts(at_zero)[1].values())
    assert all(np.abs(leaf).max() == 0 for leaf in parts(gradients(0.3, 0.5))[0].values())

    for name, leaf in parts(gradients(0.0))[0].items():
        np.testing.assert_allclose(common[name], leaf, rtol=1e-3, atol=1e-3)
