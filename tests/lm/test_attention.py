"""Attention of packed rows: every implementation against NumPy, on one device and on meshes; what
it compiles to."""

import functools
import importlib.util
import itertools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import mesh
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import AxisType, Mesh

from effreason.lm import attention, cudnn, kernels
from effreason.runtime import sharding
from effreason.runtime.errors import UserError

PLAIN = ["xla", "blockwise"]
SPLASH = splash_attention_kernel.make_splash_mha
SHAPES = [(1, 1, 1, 4), (7, 2, 2, 4), (24, 4, 2, 8), (37, 6, 2, 4)]     # N, H, K, h
MESHES = [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2, "context": 2},
          {"data": 2, "context": 4}, {"context": 8}]


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    """Rows of a test are several tiles long, and Splash runs in Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "TILE", 8)
        patch.setattr(attention, "QUERY_BLOCK", 5)
        patch.setattr(attention, "SPLASH_TILE", 128)
        patch.setattr(splash_attention_kernel, "make_splash_mha",
                      functools.partial(SPLASH, interpret=True))
        yield


def arrays(rows, length, heads, kv_heads, head_dim, seed=0):
    """Queries, keys, values and the cotangent of the result."""
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((rows, length, count, head_dim)).astype(np.float32)
            for count in (heads, kv_heads, kv_heads, heads)]


def packed(lengths, length):
    """One row of segments: sequences of these lengths, cut off at the row's end, then padding."""
    row = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:length]
    return np.pad(row, (0, length - len(row))).astype(np.int32)


def oracle(query, key, value, cotangent, segments, window=None):
    """The result and the three gradients, in float64."""
    query, key, value, cotangent = (x.astype(np.float64).swapaxes(1, 2)
                                    for x in (query, key, value, cotangent))
    group, scale, length = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5, query.shape[2]
    key, value = (np.repeat(x, group, axis=1) for x in (key, value))
    own, other = segments[:, :, None], segments[:, None, :]
    visible = (((own == other) | (own % attention.BRANCH == other)) & (own > 0)
               & np.tri(length, dtype=bool))
    if window is not None:
        visible &= ~np.tri(length, k=-window, dtype=bool)
    weights = np.exp(query @ key.swapaxes(2, 3) * scale) * visible[:, None]
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    slope = cotangent @ value.swapaxes(2, 3)
    slope = weights * (slope - np.sum(weights * slope, -1, keepdims=True)) * scale
    results = [weights @ value, slope @ key, slope.swapaxes(2, 3) @ query,
               weights.swapaxes(2, 3) @ cotangent]
    for place in (2, 3):
        rows, heads, length, head_dim = results[place].shape
        results[place] = results[place].reshape(rows, heads // group, group, length,
                                                head_dim).sum(2)
    return [x.swapaxes(1, 2) for x in results]


def attend(implementation, query, key, value, cotangent, segments, window=None):
    """The result and the three gradients."""
    mixed, pull = jax.vjp(lambda *arrays: attention.causal_attention(
        *arrays, segments, implementation=implementation, window=window), query, key, value)
    return mixed, *pull(cotangent)


@functools.cache
def compiled(implementation, window=None):
    return jax.jit(functools.partial(attend, implementation, window=window))


def check(results, expected, tolerance=2e-5):
    for name, result, wanted in zip(("mixed", "query", "key", "value"), results, expected,
                                    strict=True):
        np.testing.assert_allclose(result, wanted, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("implementation", PLAIN)
@settings(max_examples=25)
@given(shape=st.sampled_from(SHAPES),
       lengths=st.lists(st.lists(st.integers(1, 20), max_size=4), min_size=2, max_size=2))
def test_packed_rows_are_numpys(implementation, shape, lengths):
    segments = np.stack([packed(row, shape[0]) for row in lengths])
    given = arrays(2, *shape)
    check(compiled(implementation)(*given, segments), oracle(*given, segments))


def branched(groups, length):
    """One row of sequences that share their beginnings. Args: groups, the length of each beginning
    and of what continues it."""
    numbers = [attention.branch(segment, number) for segment, lengths in enumerate(groups, start=1)
               for number, count in enumerate(lengths) for _ in range(count)][:length]
    return np.pad(np.array(numbers, np.int32), (0, length - len(numbers)))


@pytest.mark.parametrize("implementation", PLAIN)
@settings(max_examples=25)
@given(shape=st.sampled_from(SHAPES), groups=st.lists(
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), max_size=4), min_size=2,
    max_size=2))
def test_sequences_that_share_their_beginning_see_it(implementation, shape, groups):
    segments = np.stack([branched(row, shape[0]) for row in groups])
    given = arrays(2, *shape)
    check(compiled(implementation)(*given, segments), oracle(*given, segments))


@pytest.mark.parametrize("implementation", PLAIN)
def test_shared_beginnings_on_eight_devices(implementation):
    rows = [[[5, 9, 3, 20], [2, 11, 11]], [[30, 1, 1, 25]], [[40]], [[1, 1], [9, 40]]]
    segments = np.stack([branched(row, 64) for row in rows])
    given = arrays(4, 64, 4, 2, 8)
    check(on_mesh(implementation, {"data": 2, "context": 4}, given, segments),
          oracle(*given, segments))


SPLASH_SEGMENTS = np.stack([packed([100, 41, 70], 256), packed([3, 253], 256)])


@pytest.mark.parametrize("shape", [None, {"tensor": 2, "fsdp": 2}, {"context": 2, "data": 2}],
                         ids=str)
def test_splash_is_numpys(shape):
    given = arrays(2, 256, 4, 2, 64)
    expected = oracle(*given, SPLASH_SEGMENTS)
    if shape is None:
        check(jax.jit(functools.partial(attend, "splash"))(*given, SPLASH_SEGMENTS), expected)
    else:
        check(on_mesh("splash", shape, given, SPLASH_SEGMENTS), expected)


def on_mesh(implementation, shape, given, segments, window=None):
    """The results on a mesh, put back into the order of the row."""
    target, columns = mesh(**shape), attention.zigzag(segments.shape[1], shape.get("context", 1))
    logical = [("batch", "sequence", axis, "head_dim")
               for axis in ("heads", "kv_heads", "kv_heads", "heads")]
    places = [sharding.sharding(target, *axes) for axes in (*logical, ("batch", "sequence"))]
    placed = [jax.device_put(x[:, columns], place)
              for x, place in zip((*given, segments), places, strict=True)]
    with jax.set_mesh(target):
        results = compiled(implementation, window)(*placed)
    assert results[0].sharding.is_equivalent_to(places[0], 4)
    return [np.asarray(x)[:, np.argsort(columns)] for x in results]


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("implementation", PLAIN)
def test_eight_devices_are_numpy_too(implementation, shape):
    segments = np.stack([packed(lengths, 48) for lengths in ([20, 9, 11], [48], [1, 30], [])])
    given = arrays(4, 48, 4, 2, 8)
    check(on_mesh(implementation, shape, given, segments), oracle(*given, segments))


WINDOWED = np.stack([packed(lengths, 48) for lengths in ([20, 9, 11], [48], [1, 30], [])])


@pytest.mark.parametrize("window", [1, 6, 47, 48, 100])
@pytest.mark.parametrize("implementation", PLAIN)
def test_a_window_ends_before_what_is_too_far_away(implementation, window):
    given = arrays(4, 48, 4, 2, 8)
    expected = oracle(*given, WINDOWED, window)
    check(compiled(implementation, window)(*given, WINDOWED), expected)
    if window == 6:
        check(on_mesh(implementation, {"data": 2, "context": 4}, given, WINDOWED, window), expected)
        assert np.abs(expected[0] - oracle(*given, WINDOWED)[0]).max() > 0.1


@pytest.mark.parametrize("shape", [None, {"context": 2, "data": 2}], ids=str)
def test_splash_has_windows(shape):
    given = arrays(2, 256, 4, 2, 64)
    expected = oracle(*given, SPLASH_SEGMENTS, 20)
    results = (compiled("splash", 20)(*given, SPLASH_SEGMENTS) if shape is None
               else on_mesh("splash", shape, given, SPLASH_SEGMENTS, 20))
    check(results, expected)


@pytest.mark.parametrize("implementation", PLAIN)
def test_what_is_before_all_windows_is_not_computed(implementation):
    query, key, value, cotangent = arrays(1, 64, 2, 2, 8)
    value[:, :8] = np.nan       # a NaN that is only masked would show: 0 * NaN is NaN
    segments = packed([64], 64)[None]
    mixed = compiled(implementation, 8)(query, key, value, cotangent, segments)[0]
    assert np.all(np.isnan(mixed[:, :8])) and np.all(np.isfinite(mixed[:, 24:]))


@pytest.mark.parametrize("implementation", [*PLAIN, "splash"])
def test_padding_is_nothing(implementation):
    length, head_dim = (256, 64) if implementation == "splash" else (24, 8)
    segments = np.stack([packed([5, 9], length), packed([], length)])
    given = arrays(2, length, 4, 2, head_dim)
    results = compiled(implementation)(*given, segments)
    for result in results:
        assert np.all(np.isfinite(result)) and np.all(np.asarray(result)[segments == 0] == 0)
    changed = [np.where((segments == 0)[:, :, None, None], 50 * x + 3, x) for x in given]
    check(compiled(implementation)(*changed, segments), results, 1e-6)


@pytest.mark.parametrize("implementation", PLAIN)
def test_bfloat16_is_a_rounding(implementation):
    given, segments = arrays(2, 24, 4, 2, 8), np.stack([packed([24], 24), packed([7, 12], 24)])
    results = compiled(implementation)(*(x.astype(jnp.bfloat16) for x in given), segments)
    assert {x.dtype for x in results} == {jnp.dtype(jnp.bfloat16)}
    check([np.asarray(x, np.float32) for x in results], oracle(*given, segments), 0.1)


def test_without_segments_a_row_is_one_sequence():
    query, key, value, _ = arrays(2, 24, 4, 2, 8)
    for window in (None, 7):
        attend = jax.jit(functools.partial(attention.causal_attention, window=window,
                                           implementation="xla"))
        mixed = [attend(query, key, value, segments) for segments in (None, np.ones((2, 24),
                                                                                    np.int32))]
        np.testing.assert_allclose(*mixed, rtol=1e-5, atol=1e-5)


def test_zigzag_deals_out_equal_work():
    assert attention.zigzag(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert attention.zigzag(7, 1).tolist() == list(range(7))
    for parts in (2, 4, 8):
        places = attention.zigzag(64, parts)
        assert sorted(places) == list(range(64)) and places.dtype == np.int32
        assert len({shard.sum() for shard in places.reshape(parts, -1)}) == 1
    with pytest.raises(UserError, match="42 positions, mesh.context 4 expects a multiple of 8"):
        attention.zigzag(42, 4)


def compile_shapes(implementation, rows, length, heads, kv_heads, head_dim):
    shapes = [jax.ShapeDtypeStruct((rows, length, count, head_dim), jnp.float32)
              for count in (heads, kv_heads, kv_heads, heads)]
    segments = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return jax.jit(functools.partial(attend, implementation)).lower(*shapes, segments).compile()


def test_blockwise_memory_grows_with_the_row(monkeypatch):
    monkeypatch.setattr(attention, "TILE", 256)
    lengths = (8192, 16384, 32768)
    memory = [
        compile_shapes("blockwise", 1, length, 12, 12, 128).memory_analysis().temp_size_in_bytes
        for length in lengths]
    assert memory[2] < 2**30
    for less, more in itertools.pairwise(memory):
        assert more < 2.2 * less


def test_blockwise_leaves_out_what_is_not_seen(monkeypatch):
    """A NaN in a tile that no query sees would show: 0 * NaN is NaN."""
    query, key, value, cotangent = arrays(1, 32, 2, 2, 8)
    segments = packed([16, 16], 32)[None]
    value[:, :8] = np.nan
    mixed = compiled("blockwise")(query, key, value, cotangent, segments)[0]
    assert np.all(np.isnan(mixed[:, :8])) and np.all(np.isfinite(mixed[:, 16:]))
    value[:] = 1
    value[:, 24:] = np.nan
    mixed = compiled("blockwise")(query, key, value, cotangent, segments)[0]
    assert np.all(np.isfinite(mixed[:, :24]))


@pytest.fixture
def kernels_for_a_tpu(monkeypatch):
    """Splash as it is, in its own blocks."""
    monkeypatch.setattr(attention, "SPLASH_TILE", 512)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", SPLASH)


@pytest.mark.parametrize("shape", [{}, {"context": 2, "tensor": 2}], ids=str)
def test_a_policy_saves_the_kernels_forward_pass(kernels_for_a_tpu, shape):
    """Forward, and two kernels backward; without the policy the forward kernel once more."""
    def kernel_calls(policy):
        def loss(query, key, value, segments):
            mixed = attention.causal_attention(query, key, value, segments, implementation="splash")
            return jnp.sum(jnp.square(mixed))

        step = jax.jit(jax.value_and_grad(jax.checkpoint(loss, policy=policy), (0, 1, 2)))
        query, key, value, _ = arrays(1, 256, 4, 2, 64)
        with jax.set_mesh(mesh(**shape)):
            traced = step.trace(query, key, value, packed([256], 256)[None])
            return traced.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call")

    policies = jax.checkpoint_policies
    assert kernel_calls(policies.save_only_these_names(attention.CHECKPOINT_NAME)) == 3
    assert kernel_calls(policies.nothing_saveable) == 4


def test_cudnn_is_told_the_lengths(monkeypatch):
    """The same call to XLA is NumPy's, for one sequence a row."""
    by_xla = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention",
                        lambda *arrays, implementation, **options: by_xla(*arrays, **options))
    given = arrays(4, 24, 4, 2, 8)
    segments = np.stack([packed(row, 24) for row in ([24], [7], [1], [])])
    check(jax.jit(functools.partial(attend, "cudnn"))(*given, segments), oracle(*given, segments))
    check(on_mesh("cudnn", {"fsdp": 2, "tensor": 2}, given, segments), oracle(*given, segments))


class PackedStandIn:
    """Reads lengths and starts as cuDNN does, and has XLA compute each row's sequences."""

    class MaskType:
        PADDING_CAUSAL = "padding, causal"

    def __init__(self, change=lambda mixed: mixed):
        self.change = change

    def dot_product_attention(self, query, key, value, *, q_seqlen, kv_seqlen, q_offsets,
                              kv_offsets, scale, mask_type, sliding_window_length):
        assert q_seqlen is kv_seqlen and q_offsets is kv_offsets
        assert q_seqlen.shape[1] + 1 == q_offsets.shape[1] and mask_type == "padding, causal"
        assert q_seqlen.dtype == q_offsets.dtype == jnp.int32
        column = jnp.arange(query.shape[1], dtype=jnp.int32)[None, None]
        starts, lengths = q_offsets[:, :-1, None], q_seqlen[:, :, None]
        inside = (column >= starts) & (column < starts + lengths) & (starts >= 0)   # [B, M, N]
        mask = jnp.any(inside[:, :, :, None] & inside[:, :, None], axis=1)
        mask |= jnp.eye(query.shape[1], dtype=bool)[None]       # a softmax of nothing has no value
        return self.change(jax.nn.dot_product_attention(
            query, key, value, mask=mask[:, None], is_causal=True, scale=scale,
            local_window_size=cudnn.local_window(sliding_window_length)))


def raising(*arrays, **options):
    raise RuntimeError("no such engine")


def test_packed_cudnn_is_told_where_sequences_begin_and_end(monkeypatch):
    monkeypatch.setattr(cudnn, "private_module", PackedStandIn)
    given = arrays(4, 24, 4, 2, 8)
    segments = np.stack([packed(row, 24) for row in ([24], [7, 1, 9], [1] * 16, [])])
    check(jax.jit(functools.partial(attend, "cudnn_packed"))(*given, segments),
          oracle(*given, segments))
    check(on_mesh("cudnn_packed", {"fsdp": 2, "tensor": 2}, given, segments),
          oracle(*given, segments))


@pytest.mark.parametrize("implementation", ["cudnn", "cudnn_packed"])
def test_a_kernel_is_trusted_only_after_its_trial(monkeypatch, implementation):
    """Right, half of its gradient missing, and refused by its library."""
    by_xla = jax.nn.dot_product_attention

    def passes(change, window=None):
        def alone(*arrays, implementation=None, **options):
            mixed = by_xla(*arrays, **options)
            return mixed if implementation is None else change(mixed)

        with monkeypatch.context() as patch:
            patch.setattr(jax.nn, "dot_product_attention", alone)
            patch.setattr(cudnn, "private_module", lambda: PackedStandIn(change))
            with jax.set_mesh(mesh(fsdp=2, tensor=2)):
                return attention.passes_trial(implementation, rows=2, heads=4, kv_heads=2,
                                              head_dim=64, dtype=jnp.float32, window=window)

    assert passes(lambda mixed: mixed) and passes(lambda mixed: mixed, window=4096)
    assert not passes(lambda mixed: (mixed + jax.lax.stop_gradient(mixed)) / 2)
    assert not passes(raising)


@pytest.mark.skipif(not cudnn.can_pack(), reason="this JAX packs no rows for cuDNN")
def test_packed_cudnn_is_called_on_a_gpu():
    shapes = [jax.ShapeDtypeStruct((4, 256, count, 64), jnp.bfloat16) for count in (4, 2, 2, 4)]
    step = jax.jit(functools.partial(attend, "cudnn_packed"))
    with jax.set_mesh(mesh(fsdp=2, tensor=2)), cudnn.described((9, 0)):
        text = step.trace(*shapes, jax.ShapeDtypeStruct((4, 256), jnp.int32)).lower(
            lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"@(__cudnn\$\w+)", text)) == {"__cudnn$fmhaSoftmax",
                                                         "__cudnn$fmhaSoftmaxBackward"}
    assert set(re.findall(r'max_seg_per_batch\W+22: (\d+)', text)) == {"16"}


@pytest.mark.parametrize("shape", [None, {"fsdp": 2, "tensor": 2}], ids=str)
def test_cudnn_is_called_on_a_gpu(shape):
    """Lowered for CUDA, which needs no GPU: forward and backward, causal and padded, on a device's
    rows and heads."""
    shapes = [jax.ShapeDtypeStruct((4, 256, count, 64), jnp.bfloat16) for count in (4, 2, 2, 4)]
    step = jax.jit(functools.partial(attend, "cudnn"))
    with jax.set_mesh(mesh(**(shape or {}))), cudnn.described((9, 0)):
        text = step.trace(*shapes, jax.ShapeDtypeStruct((4, 256), jnp.int32)).lower(
            lowering_platforms=("cuda",))
    text = text.as_text()
    assert set(re.findall(r"@(__cudnn\$\w+)", text)) == {"__cudnn$fmhaSoftmax",
                                                         "__cudnn$fmhaSoftmaxBackward"}
    assert set(re.findall(r'mask_type\W+"?22: \W+22(\w+)\\', text)) == {"PADDING_CAUSAL"}
    here = "2x256x2x64xbf16" if shape else "4x256x4x64xbf16"
    assert re.search(rf"custom_call @__cudnn\$fmhaSoftmax\(.*\(tensor<{here}>", text)


def test_what_runs_where():
    def chosen(platform, dtype=jnp.bfloat16, head_dim=128, length=32768, context=1, **options):
        return attention.choose_attention(platform, head_dim=head_dim, dtype=dtype, length=length,
                                          context=context, **options)

    assert chosen("tpu") == chosen("tpu", jnp.float32, 64, 384, 3) == "splash"
    assert (chosen("tpu", head_dim=80) == chosen("tpu", length=32768 + 64)
            == chosen("tpu", length=2176, context=2))
    assert chosen("tpu", head_dim=80) == "blockwise" and chosen("tpu", length=320) == "xla"
    assert chosen("gpu") == "cudnn" and chosen("gpu", context=2) == "blockwise"
    assert chosen("gpu", jnp.float32) == chosen("gpu", head_dim=256) == "blockwise"
    assert chosen("cpu", length=1024) == "xla" and chosen("cpu", length=1025) == "blockwise"
    assert chosen("gpu", capability=(8, 0)) == "cudnn"
    hopper = chosen("gpu", capability=(9, 0))
    assert hopper == ("cudnn_packed" if cudnn.can_pack() else "cudnn")
    assert chosen("gpu", capability=(9, 0), passes=lambda kernel: kernel == "cudnn") == "cudnn"
    assert chosen("gpu", capability=(9, 0), passes=lambda kernel: False) == "blockwise"
    assert [attention.sequences_per_row(implementation)
            for implementation in attention.IMPLEMENTATIONS] == [None, None, None, 16, 1]
    assert kernels.unsupported_reason("xla", "tpu", head_dim=3, dtype=jnp.float32, length=7) is None
    assert (kernels.unsupported_reason("splash", "tpu", head_dim=64, dtype=jnp.float32,
                                       length=320, context=2)
            == "the length of a row is 320, the splash kernel expects a multiple of 256")


def test_what_does_not_fit_is_one_clear_line():
    query, key, value, _ = arrays(1, 48, 2, 2, 8)
    segments = packed([48], 48)[None]
    with pytest.raises(UserError,
                       match="attention is 'flash', expected one of xla, blockwise, splash, cud"):
        attention.causal_attention(query, key, value, segments, implementation="flash")
    with pytest.raises(UserError,
                       match="a row has 48 positions, the splash kernel expects a multiple of 128"):
        attention.causal_attention(query, key, value, segments, implementation="splash")
    expected = "mesh.context is 2, the cudnn kernel expects 1"
    with jax.set_mesh(mesh(context=2)), pytest.raises(UserError, match=expected):
        attention.causal_attention(query, key, value, segments, implementation="cudnn")


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "heads", "kv_heads", "head_dim", "window"), [
    ((4, 4, 1, 1), 12, 2, 128, None), ((1, 4, 2, 2), 16, 8, 64, None),
    ((1, 4, 1, 4), 28, 4, 128, None), ((1, 4, 1, 4), 28, 4, 128, 4096)])
def test_splash_compiles_for_a_tpu(kernels_for_a_tpu, shape, heads, kv_heads, head_dim, window):
    """32k positions a row, forward and backward, for 16 chips that are only described."""
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("needs libtpu, the extra `tpu`, which compiles for TPUs on any Linux machine")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    target = Mesh(np.array(chips).reshape(shape), sharding.MESH_AXES,
                  axis_types=(AxisType.Auto,) * 4)
    rows, length = shape[0] * shape[1], 32768
    places = [(count, sharding.sharding(target, "batch", "sequence", axis, "head_dim"))
              for count, axis in ((heads, "heads"), (kv_heads, "kv_heads"),
                                  (kv_heads, "kv_heads"), (heads, "heads"))]
    given = [jax.ShapeDtypeStruct((rows, length, count, head_dim), jnp.bfloat16, sharding=place)
             for count, place in places]
    segments = jax.ShapeDtypeStruct((rows, length), jnp.int32,
                                    sharding=sharding.sharding(target, "batch", "sequence"))
    with jax.set_mesh(target):
        program = compiled("splash", window).lower(*given, segments).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3
    assert program.memory_analysis().temp_size_in_bytes < 2**30
