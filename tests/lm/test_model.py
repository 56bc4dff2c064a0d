"""The decoder's two paths against one another, for the shapes of all families."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import FAMILIES, QWEN2, VOCABULARY, mesh, place, weights

from effreason.lm import attention, kv_cache, model
from effreason.lm.logprobs import token_logprobs
from effreason.runtime import sharding
from effreason.sampling.slots import next_token_logits

ROWS, POSITIONS = 3, 14
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, POSITIONS)).astype(np.int32)


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request):
    config = request.param

    @jax.jit
    def extend(params, tokens, start, cache):
        hidden, cache = model.decode(config, model.unstack(config, params), tokens, start, cache)
        return model.logits(params, hidden), cache

    def logits(params):
        return model.logits(params, model.forward(config, params, TOKENS))

    return config, weights(config), extend, np.asarray(jax.jit(logits)(weights(config)))


def test_pieces_through_the_cache_are_the_whole(family):
    # Two pieces and then a single token, in a cache that holds rubbish until something has been
    # written.
    config, params, extend, expected = family
    cache = [layer if "state" in layer else jax.tree.map(lambda x: jnp.full_like(x, 9.0), layer)
             for layer in model.empty_cache(config, ROWS, 16)]
    pieces, at = [], 0
    for size in (8, 5, 1):
        logits, cache = extend(params, TOKENS[:, at : at + size], np.full(ROWS, at, np.int32),
                               cache)
        pieces.append(logits)
        at += size
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "olmo3", "gemma3"])
def test_a_ring_keeps_what_a_window_sees(name, monkeypatch):
    # 14 tokens one by one, then in pieces that end before, at and after the end of a ring of 8.
    monkeypatch.setattr(kv_cache, "MOST_READ", 3)
    monkeypatch.setattr(kv_cache, "RING_UNIT", 4)
    config, params = FAMILIES[name], weights(FAMILIES[name])
    expected = jax.jit(lambda: model.logits(params, model.forward(config, params, TOKENS)))()
    assert min(model.cache_lengths(config, 16)) == 8 and model.cache_lengths(config, 6)[0] == 6
    unstacked = jax.tree.map(jnp.asarray, model.unstack(config, params))

    @jax.jit
    def extend(tokens, start, cache):
        hidden, cache = model.decode(config, unstacked, tokens, start, cache)
        return model.logits(params, hidden), cache

    for sizes in ([1] * 14, [3, 3, 3, 3, 2], [2, 1, 3, 1, 3, 3, 1]):
        # Tokens that are dropped again, as after a draft, leave nothing behind that is seen.
        cache, pieces, at = model.empty_cache(config, ROWS, 16), [], 0
        for size in sizes:
            start = np.full(ROWS, at, np.int32)
            if size < 3:
                _, cache = extend(np.full((ROWS, 3), 5), start, cache)
            logits, cache = extend(TOKENS[:, at : at + size], start, cache)
            pieces.append(logits)
            at += size
        np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, rtol=1e-4, atol=1e-4)


def test_every_row_continues_where_it_stands(family):
    # A padded prefill, then three tokens a row after its own length: what the padding wrote is
    # overwritten.
    config, params, extend, expected = family
    lengths = np.array([2, 7, 11], np.int32)
    prompts = np.where(np.arange(11) < lengths[:, None], TOKENS[:, :11], 17)
    _, cache = jax.jit(lambda params, counts: model.decode(
        config, model.unstack(config, params), prompts, np.zeros(ROWS, np.int32),
        model.empty_cache(config, ROWS, 16), counts))(params, lengths)
    rows, columns = np.arange(ROWS)[:, None], lengths[:, None] + np.arange(3)
    logits, _ = extend(params, TOKENS[rows, columns], lengths, cache)
    np.testing.assert_allclose(logits, expected[rows, columns], rtol=1e-4, atol=1e-4)


def test_no_position_sees_what_comes_after_it(family):
    config, params, _, expected = family
    changed = TOKENS.copy()
    changed[:, 9:] = (changed[:, 9:] + 1) % VOCABULARY
    logits = jax.jit(
        lambda params: model.logits(params, model.forward(config, params, changed)))(params)
    np.testing.assert_allclose(logits[:, :9], expected[:, :9], rtol=1e-5, atol=1e-5)
    assert np.abs(logits[:, 9:] - expected[:, 9:]).max() > 0.1


def test_rematerializing_changes_no_gradient():
    def gradients(config):
        def loss(params):
            return jnp.sum(jnp.square(model.forward(config, params, TOKENS)))

        return jax.jit(jax.grad(loss))(weights(QWEN2))

    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4),
                 gradients(QWEN2), gradients(dataclasses.replace(QWEN2, remat="none")))


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_a_rounding_of_float32(name):
    config = dataclasses.replace(FAMILIES[name], dtype=jnp.bfloat16)
    params = weights(FAMILIES[name])

    def logits(config):
        return model.logits(params, model.forward(config, params, TOKENS))

    hidden = jax.eval_shape(lambda: model.forward(config, params, TOKENS))
    assert hidden.dtype == jnp.bfloat16
    rough, exact = jax.jit(lambda: (logits(config), logits(FAMILIES[name])))()
    assert rough.dtype == jnp.float32
    # A token for which two experts are next to equal may go through the other one.
    # The rounding of all positions adds up in a state.
    tolerance = 0.15 if config.experts or config.delta else 0.05
    assert np.sqrt(np.mean(np.square(rough - exact))) < tolerance * np.std(exact)
    cached, cache = jax.eval_shape(lambda: model.decode(
        config, model.unstack(config, params), TOKENS, jnp.zeros(ROWS, jnp.int32),
        model.empty_cache(config, ROWS, 16)))
    assert cached.dtype == jnp.bfloat16
    assert all(leaf.dtype == (jnp.float32 if name == "state" else jnp.bfloat16)
               for layer in cache for name, leaf in layer.items())


def test_weights_are_float32_and_the_tied_head_is_the_embedding():
    for config in FAMILIES.values():
        abstract = model.abstract_params(config)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(abstract))
        assert ("head" in abstract) == (not config.tied)
        assert ("query_bias" in abstract["layers"]) == config.qkv_bias
        assert ("query_norm" in abstract["layers"]) == (config.qk_norm is not None)
    assert model.head({"embedding": 1}) == 1 and model.head({"embedding": 1, "head": 2}) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_every_axis_of_every_weight_has_a_place_on_the_mesh(name):
    config = FAMILIES[name]
    axes = model.logical_axes(config)
    is_names = dict(is_leaf=lambda node: isinstance(node, tuple))
    jax.tree.map(lambda names, leaf: np.testing.assert_equal(len(names), len(leaf.shape)), axes,
                 model.abstract_params(config), **is_names)
    placed = jax.device_put(weights(config),
                            sharding.tree_sharding(mesh(data=2, fsdp=2, tensor=2), axes))
    query = placed["layers"]["query"]
    assert query.addressable_shards[0].data.size == query.size // 4         # over fsdp and tensor


@pytest.mark.parametrize(("name", "shape"), [
    ("gemma3", dict(data=2, fsdp=2, tensor=2)), ("olmo3", dict(fsdp=2, tensor=2, context=2)),
    ("qwen3_moe", dict(fsdp=2, tensor=2, context=2)),
    ("qwen3_5", dict(fsdp=2, tensor=2, context=2))])
def test_one_device_is_eight(name, shape):
    """Packed rows, values and gradients; the mesh splits heads, windows, experts, states, norms."""
    config = dataclasses.replace(FAMILIES[name], layers=len(FAMILIES[name].kinds))
    params = weights(config)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (4, 16)).astype(np.int32)
    lengths = [[9, 5], [16], [1, 8, 7], [12]]
    segments = np.stack([np.pad(np.repeat(np.arange(len(row)) + 1, row), (0, 16 - sum(row)))
                         for row in lengths]).astype(np.int32)
    positions = np.stack([np.pad(np.concatenate([np.arange(length) for length in row]),
                                 (0, 16 - sum(row))) for row in lengths]).astype(np.int32)

    @jax.jit
    def value_and_gradients(params, tokens, positions, segments):
        def loss(params):
            hidden = model.forward(config, params, tokens, positions, segments)
            seen = (segments > 0)[:, :, None]
            return jnp.sum(jnp.square(model.logits(params, hidden)), where=seen) / segments.size

        return jax.value_and_grad(loss)(params)

    expected = value_and_gradients(params, tokens, positions, segments)
    target, columns = mesh(**shape), attention.zigzag(16, shape.get("context", 1))
    rows = sharding.sharding(target, "batch", "sequence")
    with jax.set_mesh(target):
        found = value_and_gradients(place(config, params, target), *(
            jax.device_put(x[:, columns], rows) for x in (tokens, positions, segments)))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(
        one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max()), found, expected)


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3"])
def test_weights_are_made_on_a_mesh_that_splits_rows(name):
    """As a run does it; the shapes are not known yet."""
    config = dataclasses.replace(FAMILIES[name], norm_eps=3e-6)
    with jax.set_mesh(mesh(data=2, fsdp=2, context=2)):
        made = jax.jit(lambda key: model.init(config, key))(jax.random.key(0))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(np.shape, weights(FAMILIES[name]))


def test_a_misspelt_axis_is_an_error():
    with pytest.raises(KeyError, match="head_dims"):
        sharding.spec("batch", "head_dims")


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    """In bfloat16 a sum of 4,096 numbers stops at 256 times their size."""
    generator = np.random.default_rng(0)
    table = generator.standard_normal((8, 32)).astype(jnp.bfloat16)
    tokens = np.where(np.arange(4096 + 512) < 4096, 3, np.arange(4096 + 512) % 8)[None]
    cotangent = (1 + generator.standard_normal((1, tokens.shape[1], 32))).astype(jnp.bfloat16)
    found = jax.vjp(lambda table: model.embed(table, tokens), jnp.asarray(table))[1](cotangent)[0]

    exact = np.zeros((8, 32))
    np.add.at(exact, tokens[0], cotangent[0].astype(np.float64))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=0.01)


@pytest.mark.promotes("the gradient of jax.nn.dot_product_attention mixes dtypes")
@pytest.mark.parametrize(("dtype", "expected"), [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_float32_means_float32_on_chips_too(dtype, expected):
    """Every product says so, forward and backward, in training and in sampling."""
    config = dataclasses.replace(FAMILIES["qwen2"], dtype=jnp.dtype(dtype))
    params = model.abstract_params(config)

    def loss(params, tokens):
        hidden = model.forward(config, params, tokens)
        head = model.head(params).astype(config.dtype)
        return jnp.sum(token_logprobs(hidden, head, tokens, temperature=1.0, tile=8)[0])

    def step(params, tokens):
        weights = model.unstack(config, params)
        cache = model.empty_cache(config, ROWS, 16)
        hidden, _ = model.decode(config, weights, tokens, jnp.zeros(ROWS, jnp.int32), cache)
        return next_token_logits(weights, hidden[:, 0], ())

    tokens = jax.ShapeDtypeStruct((ROWS, 4), jnp.int32)
    for function in (jax.grad(loss), step):
        text = jax.jit(function).lower(params, tokens).as_text()
        products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        assert len(products) > 8
        exact = [line for line in products if "HIGHEST, HIGHEST" in line]
        assert len(exact) == (len(products) if expected == "HIGHEST" else 0)
