"""What the decode step compiles to, on a mesh of virtual devices and for chips that are only
described."""

import dataclasses
import importlib.util
import math
import os

import jax
import jax.numpy as jnp
import pytest
from decoders import QWEN2, mesh

from effreason.lm import model
from effreason.planning import chips, hlo
from effreason.planning.compile import quiet_stderr, target_mesh, traceable
from effreason.runtime import sharding
from effreason.runtime.config import Config, MeshConfig
from effreason.sampling.draws import SamplingParams, draw
from effreason.sampling.slots import make_programs

# One layer, and a head that is large beside it, with a vocabulary of many blocks.
WIDE = dataclasses.replace(QWEN2, vocabulary=32768, width=256, layers=1, heads=4, kv_heads=2,
                           head_dim=128, mlp_width=512, dtype=jnp.bfloat16)
SAMPLING = SamplingParams(temperature=0.6, eos_ids=(0,))
SLOTS, CHUNK = 128, 16
COLLECTIVES = ("all-gather", "all-reduce", "collective-permute", "all-to-all", "reduce-scatter")


def compiled_decode(decoder, target, *, layout="paged"):
    """The text of the decode program on a mesh of described devices."""
    programs = make_programs(dataclasses.replace(decoder, cache_layout=layout), target)
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        model.abstract_params(decoder),
        sharding.tree_sharding(target, model.logical_axes(decoder)))
    with jax.set_mesh(target), quiet_stderr():
        weights = programs.unstack.eval_shape(params)
        state = programs.empty.eval_shape(count=SLOTS, capacity=1024)
        control = jax.ShapeDtypeStruct((1 + SLOTS,), jnp.int32, sharding=programs.replicated)
        return programs.decode.lower(weights, state, control, sampling=SAMPLING,
                                     chunk=CHUNK).compile().as_text()


def loops(module, computation):
    return [instruction for instruction in module.computations[computation].instructions.values()
            if instruction.opcode == "while"]


def step(text):
    """The body of the loop over decode steps. It is inside another one, which looks if enough rows
    have ended."""
    module = hlo.parse(text)
    [outer] = loops(module, module.entry)
    looks = module.computations[outer.attribute("body")]
    [inner] = loops(module, looks.name)
    assert hlo.trip_count(module, looks, inner) == 4
    return module, module.computations[inner.attribute("body")]


@pytest.mark.slow
@pytest.mark.promotes("JAX's paged attention multiplies float32 with bfloat16")
def test_a_step_on_a_tpu_does_not_copy_the_head():
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("needs libtpu, the extra `tpu`, which compiles for TPUs on any Linux machine")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    config = dataclasses.replace(Config(), mesh=MeshConfig(data=1, fsdp=8, tensor=2))
    machine = chips.parse("tpu:v5e:4x4")
    with traceable(machine):
        module, body = step(compiled_decode(WIDE, target_mesh(config, machine)))
    assert not loops(module, body.name)

    head = WIDE.vocabulary * WIDE.width / 2         # split over tensor
    large = [instruction.opcode for instruction in body.instructions.values()
             if instruction.opcode not in ("parameter", "tuple", "get-tuple-element", "bitcast")
             and any(array.elements == head for array in instruction.arrays)]
    assert not large
    readers = [instruction for instruction in body.instructions.values()
               if instruction.opcode == "fusion" and any(
                   array.elements == head for name in instruction.operands
                   for array in body.instructions[name].arrays)]
    # The embedding's gather and the product.
    assert len(readers) == 2


@pytest.mark.slow
@pytest.mark.skipif(not chips.has_compiler("gpu"), reason="needs JAX's CUDA plugin, which compiles "
                    "for GPUs on any Linux machine")
def test_a_step_on_gpus_has_no_loop_inside():
    """A cumulative sum over blocks split over devices would be two, of a turn for each block."""
    config = dataclasses.replace(Config(), mesh=MeshConfig(data=1, fsdp=4, tensor=2))
    machine = chips.parse("gpu:h100:8")
    with traceable(machine):
        module, body = step(compiled_decode(WIDE, target_mesh(config, machine),
                                            layout="transposed"))
    assert not loops(module, body.name)


def test_a_device_reads_its_part_of_the_mlp():
    """For the rows of all: these are sent, no weights."""
    target = mesh(fsdp=4, tensor=2)
    decoder = dataclasses.replace(WIDE, mlp_width=4096, vocabulary=2048, dtype=jnp.float32)
    layer = make_programs(decoder, target).unstack.eval_shape(jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        model.abstract_params(decoder),
        sharding.tree_sharding(target, model.logical_axes(decoder))))["layers"][0]
    parts = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in layer.items()}
    assert parts["gate"] == parts["up"] == (256, 512) and parts["down"] == (512, 256)
    assert parts["query"] == (256, 2, 128)

    module = hlo.parse(compiled_decode(decoder, target, layout="transposed"))
    sent = [array.elements for computation in module.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode.removesuffix("-start") in COLLECTIVES
            for array in instruction.arrays]
    assert max(sent) == SLOTS * decoder.width < decoder.width * decoder.mlp_width / 8


@pytest.mark.parametrize(("width", "platform", "axes"), [
    (4096, "tpu", ("tensor", "fsdp")), (4100, "tpu", "tensor"), (4096, "gpu", "tensor")])
def test_where_the_mlp_is_split_in_sampling(width, platform, axes):
    table = sharding.sampling_axes(mesh(fsdp=4, tensor=2), width, platform)
    assert table["mlp"] == axes and table["embed"] is None and table["heads"] == "tensor"


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_a_draw_needs_few_collectives(temperature):
    """Of a vocabulary split over devices: block maxima, block sums for each temperature, and the
    tokens of a block. Cumulative sums and searches work on whole rows: over split ones XLA would
    need a loop, or a collective for each."""
    target = mesh(data=2, fsdp=2, tensor=2)
    logits = jax.ShapeDtypeStruct((64, 2048), jnp.float32,
                                  sharding=sharding.sharding(target, "batch", "vocab"))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 64))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=sharding.sharding(target, "batch"))
    sampling = dataclasses.replace(SAMPLING, temperature=temperature)
    with jax.set_mesh(target):
        text = jax.jit(lambda logits, keys: draw(logits, keys, sampling),
                       out_shardings=sharding.sharding(target, "batch")).lower(
                           logits, keys).compile().as_text()

    module = hlo.parse(text)
    sent = [math.prod(array.dimensions[1:]) for computation in module.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode.removesuffix("-start") in COLLECTIVES
            for array in instruction.arrays]
    tempered = temperature not in (0.0, 1.0)
    assert len(sent) == 3 + tempered and sorted(sent) == [32] * (2 + tempered) + [64]
