"""Every cache layout against the full forward pass; the TPU kernels interpreted, cuDNN's by the
same call to XLA."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import FAMILIES, QWEN2, VOCABULARY, mesh, weights
from jax.experimental.pallas import tpu as pltpu

from effreason.lm import decode_kernels, kv_cache, model
from effreason.lm.kernels import unsupported_reason
from effreason.runtime import sharding

PROMOTES = pytest.mark.promotes("jax's paged kernel multiplies float32 by bfloat16")
LAYOUTS = [pytest.param(name, marks=PROMOTES) if name == "paged" else name
           for name in kv_cache.CACHE_LAYOUTS]
BY_XLA = ["transposed", "sequence_last", "sequence_first"]
ROWS, POSITIONS, SLOTS = 4, 24, 32
SHALLOW = dataclasses.replace(QWEN2, layers=1)
# of the prompts: some rows cross the edge of a tile, 16
LENGTHS = np.array([1, 7, 15, 20], np.int32)
STEPS = 3
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, POSITIONS)).astype(np.int32)
NEXT = LENGTHS[:, None] + np.arange(STEPS)          # the positions decoded, int[B, STEPS]


@pytest.fixture(autouse=True)
def kernels_on_a_cpu(monkeypatch):
    by_xla = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention",
                        lambda *arrays, implementation=None, **options: by_xla(*arrays, **options))
    with pltpu.force_tpu_interpret_mode():
        yield


def decode(config, params, cache=None):
    """Logits [B, STEPS, V] at NEXT: a padded prefill of all rows, then one token a row at a
    time."""
    unstacked = model.unstack(config, params)
    cache = model.empty_cache(config, ROWS, SLOTS) if cache is None else cache
    is_prompt = np.arange(LENGTHS.max())[None, :] < LENGTHS[:, None]
    prompts = jnp.where(is_prompt, TOKENS[:, : LENGTHS.max()], 17)
    _, cache = model.decode(config, unstacked, prompts, jnp.zeros(ROWS, jnp.int32), cache)

    def step(carry, tokens):
        length, cache = carry
        hidden, cache = model.decode(config, unstacked, tokens[:, None], length, cache)
        return (length + 1, cache), model.logits(unstacked, hidden[:, 0])

    tokens = jnp.asarray(TOKENS)[jnp.arange(ROWS)[:, None], NEXT]
    _, logits = jax.lax.scan(step, (jnp.asarray(LENGTHS), cache), tokens.T)
    return logits.swapaxes(0, 1)


@functools.cache
def expected(config):
    """Of the full forward pass at NEXT, in float32."""
    config = dataclasses.replace(config, dtype=jnp.float32)
    logits = jax.jit(
        lambda params: model.logits(params, model.forward(config, params, TOKENS)))(weights(config))
    return np.asarray(logits)[np.arange(ROWS)[:, None], NEXT]


def error(logits, config):
    """Root mean square, relative to the logits' spread."""
    return np.sqrt(np.mean(np.square(logits - expected(config)))) / np.std(expected(config))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma3"])
def test_decoding_is_the_forward_pass(name, layout):
    """Queries that share keys, that do not, and windows."""
    plain = dataclasses.replace(FAMILIES[name], layers=len(FAMILIES[name].kinds))
    logits = jax.jit(functools.partial(decode, dataclasses.replace(plain, cache_layout=layout)))(
        weights(plain))
    if layout == "paged":           # the kernel rounds what it reads to bfloat16
        assert error(logits, plain) < 0.02
    else:
        np.testing.assert_allclose(logits, expected(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_is_a_rounding_of_float32(layout):
    config = dataclasses.replace(SHALLOW, cache_layout=layout, dtype=jnp.bfloat16)
    logits = jax.jit(functools.partial(decode, config))(weights(SHALLOW))
    assert logits.dtype == jnp.float32 and 1e-4 < error(logits, SHALLOW) < 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_lies_after_a_row_is_never_seen(layout):
    config = dataclasses.replace(SHALLOW, cache_layout=layout)
    decoded = jax.jit(functools.partial(decode, config))
    rubbish = {"keys": np.nan if layout in BY_XLA else 1e30, "values": 1e30}
    filled = [{name: np.full(leaf.shape, rubbish[name], leaf.dtype) for name, leaf in layer.items()}
              for layer in model.empty_cache(config, ROWS, SLOTS)]
    params = weights(SHALLOW)
    np.testing.assert_array_equal(decoded(params, filled), decoded(params, None))


def test_a_tile_written_by_the_kernel_keeps_its_other_slots():
    generator = np.random.default_rng(0)
    shape, start = (ROWS, 2, SLOTS, 4), np.array([0, 15, 16, SLOTS - 1], np.int32)
    cache = {name: generator.standard_normal(shape, np.float32) for name in ("keys", "values")}
    new = {name: generator.standard_normal((ROWS, 2, 1, 4), np.float32) for name in cache}
    written = jax.jit(decode_kernels.paged_write)(cache, new, start)
    for name, old in cache.items():
        old[np.arange(ROWS), :, start] = new[name][:, :, 0]
        np.testing.assert_array_equal(written[name], old)


@pytest.mark.parametrize("layout", BY_XLA)
def test_a_donated_cache_is_written_in_place(layout):
    config = dataclasses.replace(QWEN2, cache_layout=layout, layers=4)

    @functools.partial(jax.jit, donate_argnums=1)
    def steps(unstacked, cache):
        def step(carry, _):
            length, cache = carry
            hidden, cache = model.decode(config, unstacked, jnp.zeros((ROWS, 1), jnp.int32), length,
                                         cache)
            return (length + 1, cache), jnp.max(hidden)

        return jax.lax.scan(step, (jnp.asarray(LENGTHS), cache), length=STEPS)

    params = weights(dataclasses.replace(QWEN2, layers=4))
    unstacked = model.unstack(config, jax.tree.map(jnp.asarray, params))
    cache = model.empty_cache(config, ROWS, 1024)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)]
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    (_, cache), _ = steps(unstacked, cache)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)] == places
    # One layer may be rearranged to be read (a CPU does it if the sequence comes first), never
    # all of them.
    assert steps.lower(unstacked, cache).compile().memory_analysis().temp_size_in_bytes < whole / 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_devices_decode_as_one_does(layout):
    config = dataclasses.replace(SHALLOW, cache_layout=layout)
    target, params = mesh(data=2, fsdp=2, tensor=2), weights(SHALLOW)
    placed = jax.device_put(params, sharding.tree_sharding(
        target, model.logical_axes(config),
        sharding.sampling_axes(target, config.mlp_width, "tpu")))
    with jax.set_mesh(target):
        sharded = jax.jit(functools.partial(decode, config))(placed)
    alone = jax.jit(functools.partial(decode, config))(params)
    np.testing.assert_allclose(sharded, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [*BY_XLA, "cudnn"])
def test_a_decode_step_moves_no_cache_between_devices(layout):
    config = dataclasses.replace(QWEN2, cache_layout=layout)
    target = mesh(data=2, fsdp=2, tensor=2)
    places = [{name: sharding.sharding(target, *axes)
               for name, axes in model.cache_axes(config)[0].items()}]
    rows = sharding.sharding(target, "batch")

    def write(cache, key, value, start):
        return kv_cache.write_cache(cache, key, value, start, layout)

    def attend(query, cache, positions):
        return kv_cache.cached_attention(query, cache, positions, layout)

    def struct(shape, place, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    cache = jax.tree.map(lambda leaf, place: struct(leaf.shape, place),
                         jax.eval_shape(lambda: model.empty_cache(config, ROWS, SLOTS))[0],
                         places[0])
    heads = sharding.sharding(target, "batch", "width", "heads", "head_dim")
    key, query = struct((ROWS, 1, 2, 4), heads), struct((ROWS, 1, 4, 4), heads)
    with jax.set_mesh(target):
        written = jax.jit(write, out_shardings=places[0], donate_argnums=0).lower(
            cache, key, key, struct((ROWS,), rows, jnp.int32))
        read = jax.jit(attend, out_shardings=heads).lower(query, cache,
                                                          struct((ROWS, 1), rows, jnp.int32))
        text = written.compile().as_text() + read.compile().as_text()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter",
                          text)


def test_the_layout_follows_from_the_machine_and_the_model():
    choose = kv_cache.choose_layout
    assert choose("cpu", 128, jnp.bfloat16) == choose("cpu", 64, jnp.float32) == "transposed"
    assert choose("tpu", 128, jnp.bfloat16) == "paged"
    assert choose("tpu", 64, jnp.bfloat16) == choose("tpu", 128, jnp.float32) == "sequence_last"
    assert choose("tpu", 128, jnp.bfloat16, context=2) == "sequence_last"
    assert choose("gpu", 64, jnp.bfloat16) == choose("gpu", 128, "bfloat16") == "cudnn"
    assert choose("gpu", 256, jnp.bfloat16) == choose("gpu", 64, jnp.float32) == "transposed"


def test_a_kernel_that_does_not_fit_says_why():
    assert unsupported_reason("paged", "tpu", 64, jnp.bfloat16) == (
        "head_dim is 64, the paged kernel expects a multiple of 128")
    assert unsupported_reason("cudnn", "cpu", 64,
                              jnp.bfloat16) == "platform is cpu, the cudnn kernel expects gpu"
    assert "float32" in unsupported_reason("cudnn", "gpu", 64, jnp.float32)
    assert "context is 2" in unsupported_reason("paged", "tpu", 128, jnp.bfloat16, context=2)
    assert all(unsupported_reason(layout, "cpu", 5, jnp.float32) is None for layout in BY_XLA)


def test_blocks_of_the_paged_kernel_divide_every_bucket():
    assert [decode_kernels.block_size(slots)
            for slots in (64, 96, 384, 4096, 6144)] == [64, 32, 128, 512, 512]
    with pytest.raises(ValueError, match="40 slots, expected a multiple of 16"):
        decode_kernels.block_size(40)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_kernel_is_tried_before_it_is_trusted(layout):
    assert kv_cache.passes_trial(layout, rows=4, heads=4, kv_heads=2, head_dim=128,
                                 dtype=jnp.bfloat16)


def raising(*arguments):
    raise RuntimeError("no such engine")


def wrong(query, *cache):
    return query * 2


@pytest.mark.parametrize("broken", [raising, wrong])
def test_a_kernel_that_does_not_work_is_not_chosen(monkeypatch, broken):
    monkeypatch.setattr(decode_kernels, "cudnn_attention", broken)
    assert not kv_cache.passes_trial("cudnn", rows=4, heads=4, kv_heads=2, head_dim=64,
                                     dtype=jnp.bfloat16)
