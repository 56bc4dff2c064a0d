"""The costs of compiled programs: loops multiplied out, collectives, convolutions, on-chip memory,
kernels."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import mesh
from jax.sharding import NamedSharding, PartitionSpec

from effreason.planning import costs, hlo
from effreason.planning.costs import Cost, KernelCall
from effreason.planning.estimates import kernel_cost, with_kernels
from effreason.planning.hlo import Array


def cost_of(function, *arguments, trips=1, **options):
    return costs.read(jax.jit(function, **options).lower(*arguments).compile().as_text(),
                      trips=trips)


def product(rows, inner, columns):
    return 2 * rows * inner * columns


# Programs that are really compiled


def test_a_loop_of_products_counts_as_often_as_it_runs():
    def layers(x, weights):
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]

    x, weights = jnp.ones((24, 32)), jnp.ones((7, 32, 32))
    assert cost_of(layers, x, weights).flops == 7 * product(24, 32, 32)
    backward = jax.grad(lambda x, weights: jnp.sum(layers(x, weights)), argnums=(0, 1))
    assert cost_of(backward, x, weights).flops == 3 * 7 * product(24, 32, 32)


def test_loops_in_loops_multiply():
    def inner(x, _):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ x), x), None

    cost = cost_of(lambda x: jax.lax.scan(inner, x, None, length=3)[0], jnp.ones((16, 16)))
    assert cost.flops == 15 * product(16, 16, 16) and cost.open_loops == 0


def test_a_loop_of_unknown_length_runs_as_often_as_it_is_said_to():
    def some(x, count):
        return jax.lax.fori_loop(0, count, lambda _, x: jnp.tanh(x @ x), x)

    for trips in (0, 1, 6):
        cost = cost_of(some, jnp.ones((16, 16)), jnp.int32(2), trips=trips)
        assert cost.flops == trips * product(16, 16, 16) and cost.open_loops == 1


def test_products_with_several_axes():
    query, keys = jnp.ones((3, 17, 4, 8)), jnp.ones((3, 23, 4, 8))
    cost = cost_of(lambda query, keys: jnp.einsum("bqhd,bkhd->bhqk", query, keys), query, keys)
    assert cost.flops == 3 * 4 * product(17, 8, 23)


def test_collectives_in_a_loop():
    target = mesh(data=2, fsdp=4)
    rows = NamedSharding(target, PartitionSpec("fsdp"))

    @functools.partial(jax.shard_map, mesh=target, in_specs=PartitionSpec("fsdp"),
                       out_specs=PartitionSpec("fsdp"))
    def summed(x):
        def one(x, _):
            return jnp.tanh(x * jax.lax.psum(x, "fsdp")), None

        return jax.lax.scan(one, x, None, length=9)[0]

    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)
    (collective,) = cost_of(summed, x).collectives
    assert (collective.kind, collective.group, collective.count) == ("all-reduce", 4, 9)
    assert collective.bytes == 9 * 2 * 3 / 4 * (16 * 32 * 4)


def test_a_gathered_array_crosses_the_links_once_for_each_other_device():
    target = mesh(fsdp=8)
    rows, whole = (NamedSharding(target, PartitionSpec(*axes)) for axes in (("fsdp",), ()))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)
    (collective,) = cost_of(lambda x: x + 1, x, out_shardings=whole).collectives
    assert (collective.kind, collective.group) == ("all-gather", 8)
    assert collective.bytes == 7 * 8 * 32 * 4


def test_of_a_stack_of_weights_a_loop_reads_one_at_a_time():
    def layers(x, weights):
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]

    weights = jnp.ones((50, 64, 64))
    cost = cost_of(layers, jnp.ones((2, 64)), weights)
    assert weights.nbytes <= cost.bytes < 5 * weights.nbytes       # and not 50 times all of them


# Texts in the form that the compiler for TPUs writes

HEADER = "HloModule jit_f, is_scheduled=true, num_partitions=16\n\n"

LOOP = HEADER + """%body (state: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %state = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %one = s32[]{:T(128)} constant(STEP)
  %at = s32[]{:T(128)} get-tuple-element(%state), index=0
  %copied = s32[]{:T(128)S(6)} copy(%at)
  %next = s32[]{:T(128)} add(%copied, %one)
  %x = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %w = bf16[16,16]{1,0:T(8,128)(2,1)} constant({...})
  %y = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %out = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, %y)
}

%condition (state.1: (s32[], bf16[8,16])) -> pred[] {
  %bound = s32[]{:T(128)} constant(11)
  %state.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %at.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%at.1, %bound), direction=DIRECTION
}

ENTRY %main (p: bf16[8,16]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(2)
  %begin = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%zero, %p)
  %loop = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) while(%begin), condition=%condition, body=%body
  ROOT %y.1 = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


@pytest.mark.parametrize(("step", "direction", "trips"),
                         [(1, "LT", 9), (1, "LE", 10), (4, "LT", 3), (4, "LE", 3)])
def test_the_length_of_a_loop_follows_from_its_counter(step, direction, trips):
    text = LOOP.replace("STEP", str(step)).replace("DIRECTION", direction)
    cost = costs.read(text)
    assert cost.flops == trips * product(8, 16, 16) and cost.open_loops == 0
    # What is marked S(1) is on the chip; a counter takes a few bytes.
    assert 0 <= cost.bytes - trips * 16 * 16 * 2 < 20 * trips


def test_a_condition_that_is_no_comparison_leaves_the_length_open():
    cost = costs.read(LOOP.replace("STEP", "1").replace("DIRECTION", "NE"), trips=5)
    assert cost.open_loops == 1 and cost.flops == 5 * product(8, 16, 16)


@pytest.mark.parametrize(("left", "right", "result", "attributes", "flops"), [
    # A batch of 12 products as a convolution whose window picks one of them, forwards and reversed.
    ((12, 64, 32), (12, 32, 16), (12, 64, 16), "window={size=12 stride=11 pad=0_0 lhs_dilate=12}, "
     "dim_labels=0bf_0io->0bf", 12 * product(64, 32, 16)),
    ((256, 1536), (1536, 128, 2), (2, 256, 128),
     "window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf_io0->0bf", None),
    ((8, 96), (96, 40), (8, 40), "dim_labels=bf_io->bf", product(8, 96, 40)),
    ((40, 8), (40, 96), (8, 96), "dim_labels=fb_io->bf", product(8, 40, 96)),
])
def test_convolutions_by_hand(left, right, result, attributes, flops):
    if flops is None:  # one axis of 2 heads in the weights, a window of 2 over an image of 1
        left, attributes = (1, 256, 1536), attributes.replace("bf_io0", "0bf_io0")
        flops = 2 * product(256, 1536, 128)
    convolution = hlo.parse(HEADER + f"""ENTRY %main (a: bf16[1]) -> bf16[1] {{
  ROOT %y = bf16[{','.join(map(str, result))}]{{0}} convolution(%a, %b), {attributes}
}}
""").computations["main"].root
    assert costs.convolution_flops(Array("bf16", left), Array("bf16", right), convolution) == flops


ASYNC = HEADER + """%start (a: bf16[64,8]) -> (bf16[64,8], bf16[1024,8]) {
  %a = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %gather = bf16[1024,8]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=6, GROUPS, dimensions={0}
  ROOT %call = (bf16[64,8]{1,0}, bf16[1024,8]{1,0}) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}

%during (b: bf16[64,8]) -> bf16[1024,8] {
  %b = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.1 = bf16[1024,8]{1,0:T(8,128)(2,1)} all-gather(%b), channel_id=6, GROUPS, dimensions={0}
}

ENTRY %main (p: bf16[64,8]) -> bf16[1024,8] {
  %p = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %begun = (bf16[64,8]{1,0}, bf16[1024,8]{1,0}) fusion(%p), kind=kCustom, calls=%start
  %other = bf16[1024,8]{1,0} all-gather(%p), channel_id=7, GROUPS, dimensions={0}
  ROOT %done = bf16[1024,8]{1,0} fusion(%p), kind=kCustom, calls=%during
}
"""  # noqa: E501


@pytest.mark.parametrize(("groups", "size"), [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4), ("replica_groups=[2,8]<=[16]", 8),
    ("replica_groups=[4,4]<=[4,4]T(1,0)", 4), ("replica_groups=mesh['a'=2,'b'=8] {'b'}", 8),
    ("replica_groups=mesh['a'=2,'b'=8] {'a','b'}", 16), ("replica_groups={}", 16),
    ("replica_groups=mesh['a'=2,'b'=8], device_ids=(0,2,4,1) {'a'}", 2),
    ("source_target_pairs={{0,1},{1,2},{2,0},{3,4},{4,5},{5,3}}", 3),
    ("source_target_pairs={{0,0},{1,2},{2,1}}", 2),
    ("source_target_pairs={{0,1},{1,2}}", 3)])
def test_a_collective_begun_and_ended_in_two_fusions_counts_once(groups, size):
    (collective,) = costs.read(ASYNC.replace("GROUPS", groups)).collectives
    assert (collective.kind, collective.group, collective.count) == ("all-gather", size, 2)
    assert collective.bytes == 2 * (size - 1) * 64 * 8 * 2


SCATTERED = HEADER + """%all-reduce-scatter.1 (a: bf16[64,8]) -> bf16[4,8] {
  %a = bf16[64,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %sum = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%a), channel_id=6, replica_groups={}, to_apply=%add
  %zero = s32[] constant(0)
  %first = s32[] constant(4)
  ROOT %own = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%sum, %first, %zero), dynamic_slice_sizes={4,8}
}

ENTRY %main (p: bf16[64,8]) -> bf16[4,8] {
  %p = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %scattered = bf16[4,8]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def test_a_sum_of_which_a_fusion_keeps_a_slice_is_a_reduce_scatter():
    (collective,) = costs.read(SCATTERED).collectives
    assert (collective.kind, collective.group) == ("reduce-scatter", 16)
    assert collective.bytes == 15 / 16 * 64 * 8 * 2


# As XLA for GPUs writes them: a cache updated by a scatter, a layer's weights read asynchronously.
GPU_FUSIONS = """HloModule m

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  ROOT %b = bf16[] parameter(1)
}

%written (cache: bf16[8,512,2,64], new: bf16[8,2,64], at: s32[8,4]) -> bf16[8,512,2,64] {
  %cache = bf16[8,512,2,64]{3,2,1,0} parameter(0)
  %new = bf16[8,2,64]{2,1,0} parameter(1)
  %at = s32[8,4]{1,0} parameter(2)
  %update = bf16[8,1,1,2,64]{4,3,2,1,0} bitcast(%new)
  ROOT %s = bf16[8,512,2,64]{3,2,1,0} scatter(%cache, %at, %update), to_apply=%add
}

%layer (stack: bf16[28,64,64], number: s32[]) -> bf16[1,64,64] {
  %stack = bf16[28,64,64]{2,1,0} parameter(0)
  %number = s32[] parameter(1)
  ROOT %slice = bf16[1,64,64]{2,1,0} dynamic-slice(%stack, %number), dynamic_slice_sizes={1,64,64}
}

ENTRY %main (cache: bf16[8,512,2,64]) -> bf16[8,512,2,64] {
  %cache = bf16[8,512,2,64]{3,2,1,0} parameter(0)
  %new = bf16[8,2,64]{2,1,0} parameter(1)
  %at = s32[8,4]{1,0} parameter(2)
  %stack = bf16[28,64,64]{2,1,0} parameter(3)
  %i = s32[] parameter(4)
  %read = ((bf16[28,64,64], s32[]), bf16[1,64,64], u32[]) fusion-start(%stack, %i), calls=%layer
  %done = bf16[1,64,64] fusion-done(%read)
  ROOT %f = bf16[8,512,2,64]{3,2,1,0} fusion(%cache, %new, %at), kind=kInput, calls=%written
}
"""


def test_a_fusion_writes_in_place_and_reads_only_its_slice():
    update, indices, layer = 2 * 8 * 2 * 64, 4 * 8 * 4, 2 * 64 * 64
    assert costs.read(GPU_FUSIONS).bytes == 2 * update + indices + 2 * layer + 4


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="ENTRY"):
        costs.read("HloModule nothing")


# Kernels


def test_splash_computes_what_is_below_the_diagonal():
    heads, kv_heads, length, width = 12, 2, 1024, 128
    query, keys = Array("bf16", (heads, length, width)), Array("bf16", (kv_heads, length, width))
    forward = 4 * heads * width * length**2 / 2         # two products
    for name, products in (("splash_mha_fwd_segmented", 2), ("splash_mha_dkv", 4),
                           ("splash_mha_dq", 3)):
        kernel = KernelCall(f"jit(f)/{name}", (Array("s8", (1, 2, 2)), query, keys, keys), (query,),
                            1)
        assert kernel_cost(kernel, 1.0).flops == products / 2 * forward


def test_paged_attention_reads_what_is_live():
    rows, kv_heads, grouped, positions, width = 16, 2, 6, 4096, 128
    query = Array("f32", (rows * kv_heads, grouped, 1, width))
    pages = Array("bf16", (1, rows * kv_heads * positions // 512, 512, width))
    kernel = KernelCall("while/body/jit(paged_attention)/pallas_call",
                        (Array("s32", (32,)), query, pages, pages), (), 3)
    cost = with_kernels(Cost(kernels=(kernel,)), 0.25)
    live = rows * positions / 4
    assert cost.bytes == 3 * 2 * live * kv_heads * width * 2
    assert cost.flops == 3 * 4 * live * kv_heads * grouped * width


def test_cudnn_computes_what_is_below_the_diagonal():
    query, keys = Array("bf16", (2, 1024, 6, 64)), Array("bf16", (2, 1024, 2, 64))
    pairs = 2 * 6 * 1024**2 / 2
    forward = KernelCall("__cudnn$fmhaSoftmax", (query, keys, keys), (query,), 1)
    backward = KernelCall("__cudnn$fmhaSoftmaxBackward", (query, keys, keys), (query,), 1)
    assert kernel_cost(forward, 1.0).flops == 2 * 2 * pairs * 64
    assert kernel_cost(backward, 1.0, pair_share=0.5).flops == 5 * 2 * pairs * 64 / 2
    assert forward.workspace_bytes == 0
    # The gradients of queries in float32 with their sums, those of keys and values for each head.
    assert backward.workspace_bytes == 2 * 1024 * 6 * (4 * 65 + 2 * 2 * 64)


def test_cudnn_reads_what_is_live_of_a_cache():
    query, keys = Array("bf16", (16, 1, 12, 128)), Array("bf16", (16, 4096, 2, 128))
    cost = kernel_cost(KernelCall("__cudnn$fmhaSoftmax", (query, keys, keys), (query,), 1),
                       0.25)
    live = 16 * 1024
    assert (cost.bytes, cost.flops) == (2 * 2 * live * 2 * 128, 2 * 2 * live * 12 * 128)


def test_a_token_is_written_by_tiles():
    cache = Array("bf16", (16, 2, 4096, 128))
    kernel = KernelCall("shard_map/pallas_call", (Array("bf16", (16, 2, 1, 128)),) * 2
                        + (cache, cache), (cache, cache), 1)
    assert kernel_cost(kernel, 1.0).bytes == 2 * 2 * 16 * 2 * 16 * 128 * 2      # read and put back


def test_costs_add_up():
    one = Cost(flops=3, bytes=5, collectives=(costs.Collective("all-gather", 4, 1, 10.0),))
    both = one + one * 2
    assert (both.flops, both.bytes) == (9, 15)
    assert both.collectives == (costs.Collective("all-gather", 4, 3, 30.0),)
    assert math.isclose(sum(collective.bytes for collective in both.collectives), 30)
    assert np.isfinite(both.host_bytes)
