"""The functions of a run on meshes: those that do not fit are refused, the others have every array
placed."""

import dataclasses
import types

import jax
import pytest
from decoders import QWEN2, mesh

from effreason.rl import learner
from effreason.runtime.config import Config, MeshConfig, RolloutConfig, UpdateConfig
from effreason.runtime.errors import UserError


@pytest.mark.parametrize(("axes", "changes", "message"), [
    (dict(data=2, fsdp=2), {"update": UpdateConfig(rows_per_micro_batch=2)},
     "mesh.data x mesh.fsdp must divide update.rows_per_micro_batch, 2, got 4"),
    (dict(tensor=8), {}, "mesh.tensor must divide the model's attention heads, 4, got 8"),
    (dict(tensor=4), {}, "mesh.tensor must divide the model's key/value heads, 2, got 4"),
    (dict(tensor=2), {"mlp_width": 25},
     "mesh.tensor must divide the model's feed-forward width, 25, got 2"),
    (dict(tensor=2), {"vocabulary": 25},
     "mesh.tensor must divide the model's vocabulary, 25, got 2"),
    (dict(fsdp=4), {"width": 18}, "mesh.fsdp must divide the model's width, 18, got 4"),
])
def test_a_mesh_that_does_not_divide_the_model_or_the_batch_is_refused(axes, changes, message):
    config = dataclasses.replace(Config(), mesh=MeshConfig(**axes),
                                 update=changes.get("update", UpdateConfig()))
    shape = {name: value for name, value in changes.items() if name != "update"}
    with pytest.raises(UserError) as caught:
        learner.check_divisible(config, dataclasses.replace(QWEN2, **shape), mesh(**axes))
    assert str(caught.value) == message


def test_a_step_with_more_positions_than_an_int32_can_number_is_refused():
    settings = RolloutConfig(prompts_per_step=4096, group_size=16, max_new_tokens=32_768)
    with pytest.raises(UserError, match="positions together, got 4"):
        learner.Learner(dataclasses.replace(Config(), rollout=settings), QWEN2, mesh())


@pytest.mark.parametrize("axes", [dict(data=8), dict(data=2, fsdp=4),
                                  dict(data=2, fsdp=2, tensor=2), dict(context=2)])
def test_a_mesh_that_fits_gives_an_engine_with_every_array_placed(axes):
    target = mesh(**axes)
    pretrained = types.SimpleNamespace(decoder=QWEN2, eos_ids=(1,))
    made = learner.make_engine(dataclasses.replace(Config(), mesh=MeshConfig(**axes)), pretrained,
                               target)
    state = made.learner.abstract_state
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.mesh == target
    assert state.step.sharding.is_fully_replicated
    weights, moments = state.params, state.opt_state[1][0].mu
    assert jax.tree.map(lambda leaf: leaf.sharding, weights) == made.learner.params_sharding
    assert jax.tree.map(lambda leaf: leaf.sharding, moments) == made.learner.params_sharding
