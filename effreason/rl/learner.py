"""The compiled functions of a run, built once from the configuration, and where their arrays live."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from effreason.lm import attention, model
from effreason.lm.hf.pretrained import Pretrained
from effreason.lm.kernels import unsupported_reason
from effreason.rl import checkpoints, configured_reward, packing, update
from effreason.rl.experience import Credit, Reward, credit
from effreason.rl.update import TrainState
from effreason.runtime import sharding
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError
from effreason.sampling import capacity, engine
from effreason.sampling.draws import SamplingParams
from effreason.types import Experience, Packed, Rollouts, Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """What a step does with its responses, in order, and where it all lies."""

    score: Callable[[model.Params, Packed], jax.Array]      # log-probs float32[B, T] by the policy
    score_reference: Callable[[model.Params, Packed], jax.Array]                # by the reference
    reward: Reward                          # what `credit` begins with, on its own
    credit: Callable[..., Credit]
    gradients: Callable[..., tuple[model.Params, dict[str, jax.Array]]]         # of one optimiser update
    apply_gradients: Callable[..., tuple[TrainState, jax.Array]]
    initial_state: Callable[[model.Params], TrainState]
    as_reference: Callable[[model.Params], model.Params]    # float32 weights -> what score_reference reads
    abstract_state: TrainState              # shapes, dtypes and shardings
    abstract_reference: model.Params
    params_sharding: model.Params
    packed_sharding: Packed                 # a prefix of its tree
    replicated: NamedSharding
    pack: Callable[[Rollouts], Packed]      # on the host
    updates: int                            # optimiser updates of a step

    def update(self, state: TrainState, experience: tuple[Experience, ...],
               packed: Packed) -> tuple[TrainState, list[dict[str, jax.Array]]]:
        """One optimiser update after another; the state passed in is donated.

        Returns: the state, its `step` one higher, and the float32[] metrics of each update."""
        measured = []
        for which in range(self.updates):
            last = which + 1 == self.updates
            index, steps = sharding.to_device((np.int32(which), np.int32(last)), self.replicated)
            grads, metrics = self.gradients(state.params, experience, packed.counts, index)
            state, norm = self.apply_gradients(state, grads, steps)
            measured.append(metrics | {"grad_norm": norm})
        return state, measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """The sampler of a run and what learns from it."""

    sampler: engine.Sampler
    sampling: SamplingParams                      # the distribution of the rollouts
    learning: Learner


def make_engine(config: Config, pretrained: Pretrained, mesh: Mesh, longest_prompt: int | None = None) -> Engine:
    """Builds everything a training step needs; but for the trial of a kernel nothing is compiled before its first call.

    Args: longest_prompt, tokens; None = data.max_prompt_tokens.
    Raises: UserError where the mesh cannot split the model or the batch evenly."""
    settings = config.rollout
    return Engine(
        sampler=capacity.make_configured_sampler(config, pretrained.decoder, mesh,
                                                 capacity.training_weight_bytes(config)),
        sampling=SamplingParams(temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k,
                          min_p=settings.min_p, eos_ids=pretrained.eos_ids),
        learning=make_learner(config, pretrained.decoder, mesh, longest_prompt))


def needs_reference(config: Config) -> bool:
    """Whether a step asks for the log-probs by the reference."""
    return config.kl.form != "none" or config.update.objective == "dpo"


def make_learner(config: Config, decoder: model.DecoderConfig, mesh: Mesh,
                  longest_prompt: int | None = None) -> Learner:
    """All of a step but its sampling; of a mesh of devices that are only described, too.

    Args: longest_prompt, tokens; None = data.max_prompt_tokens.
    Raises: UserError where the mesh cannot split the model or the batch evenly, or an attention does not fit it."""
    learning = config.update
    check_divisible(config, decoder, mesh)
    context, slots = mesh.shape["context"], config.rollout.max_new_tokens
    width = packing.row_width((longest_prompt or config.data.max_prompt_tokens) + slots, context)
    decoder = dataclasses.replace(decoder, attention=choose_attention(
        config, decoder, width, platform=mesh.devices.flat[0].platform, context=context))
    loss = update.LossConfig(
        clip_ratio=learning.clip_ratio, temperature=config.rollout.temperature,
        kl_loss_coefficient=config.kl.coefficient if config.kl.form == "loss" else 0.0,
        vocabulary_tile=learning.vocabulary_tile)
    optimizer = update.make_optimizer(
        learning_rate=learning.learning_rate, beta1=learning.beta1, beta2=learning.beta2,
        weight_decay=learning.weight_decay, max_grad_norm=learning.max_grad_norm,
        warmup_updates=learning.warmup_updates)
    targets = update.state_sharding(decoder, optimizer, mesh, offload=learning.offload_optimizer)
    reference = sharding.offloaded(targets.params) if config.kl.offload_reference else targets.params
    initial = update.make_initial_state(optimizer, targets)
    packed: Any = update.packed_sharding(mesh)
    replicated: Any = sharding.sharding(mesh)
    as_reference = jax.jit(functools.partial(update.in_compute_dtype, decoder), out_shardings=reference)
    params, reward = model.abstract_params(decoder), configured_reward.make_reward(config.reward)
    credited: Any = Credit(experience=packed.groups, rewards=replicated, advantages=replicated, metrics=replicated)
    return Learner(
        score=update.make_scorer(decoder, mesh, loss, params=targets.params),
        score_reference=update.make_scorer(decoder, mesh, loss, params=reference),
        reward=jax.jit(reward, out_shardings=replicated),
        credit=jax.jit(functools.partial(credit, config=config, reward=reward), out_shardings=credited),
        gradients=update.make_gradients(decoder, mesh, loss, targets),
        apply_gradients=update.make_apply_gradients(optimizer, mesh, targets),
        initial_state=initial, as_reference=as_reference,
        abstract_state=checkpoints.abstract(jax.eval_shape(initial, params), targets),
        abstract_reference=checkpoints.abstract(jax.eval_shape(as_reference, params), reference),
        params_sharding=targets.params, packed_sharding=packed, replicated=replicated,
        pack=functools.partial(
            packing.pack, rows=learning.rows_per_micro_batch, updates=learning.updates_per_batch, context=context,
            width=width, slots=slots,
            one_sequence_per_row=attention.one_sequence_per_row(decoder.attention)),
        updates=learning.updates_per_batch)


def abstract_packed(config: Config, learning: Learner, *, width: int, micro_batches: int) -> Packed:
    """Shapes and shardings of a step's packed rows, the widest group of them: the one that decides what must fit.

    Args: width, N; micro_batches, M, that there is room for."""
    def array(*shape: int) -> jax.ShapeDtypeStruct:
        target = learning.packed_sharding.groups if len(shape) == 4 else learning.replicated
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=target)

    responses = config.rollout.prompts_per_step * config.rollout.group_size
    rows: Any = array(learning.updates, micro_batches, config.update.rows_per_micro_batch, width)
    group = Rows(tokens=rows, targets=rows, positions=rows, segments=rows, response_index=rows)
    token_index: Any = array(responses, config.rollout.max_new_tokens)
    counts: Any = array(learning.updates)
    return Packed(groups=(group,), counts=(counts,), token_index=token_index)


def abstract_experience(packed: Packed) -> tuple[Experience, ...]:
    """Shapes and shardings of the experience of such rows."""
    def of_group(rows: Rows) -> Experience:
        values: Any = jax.ShapeDtypeStruct(rows.tokens.shape, jnp.float32, sharding=rows.tokens.sharding)
        return Experience(rows=rows, weights=values, advantages=values, old_logprobs=values, reference_logprobs=values)

    return tuple(of_group(rows) for rows in packed.groups)


def choose_attention(config: Config, decoder: model.DecoderConfig, width: int, *, platform: str, context: int) -> str:
    """The attention of the training passes: model.attention, or the best one that fits.

    Args: width, positions of a row; platform, of a device; context, shards of a row.
    Raises: UserError where it does not fit."""
    chosen = config.model.attention
    facts: Any = dict(head_dim=decoder.head_dim, dtype=decoder.dtype, length=width, context=context)
    if chosen == "auto":
        return attention.choose_attention(platform, **facts)
    if reason := unsupported_reason(chosen, platform, **facts):
        raise UserError(f"model.attention {chosen} does not fit: {reason}")
    return chosen


def check_divisible(config: Config, decoder: model.DecoderConfig, mesh: Mesh) -> None:
    """Raises UserError for a batch or an array axis that a mesh axis does not divide."""
    rows, shards = config.update.rows_per_micro_batch, sharding.batch_shards(mesh)
    if rows % shards:
        raise UserError(f"mesh.data x mesh.fsdp must divide update.rows_per_micro_batch, {rows}, got {shards}")
    check_mesh(decoder, mesh)


def check_mesh(decoder: model.DecoderConfig, mesh: Mesh) -> None:
    """Raises UserError for an axis of the weights that a mesh axis does not divide."""
    split = [("attention heads", decoder.heads, "tensor"), ("key/value heads", decoder.kv_heads, "tensor"),
             ("feed-forward width", decoder.mlp_width, "tensor"), ("vocabulary", decoder.vocabulary, "tensor"),
             ("width", decoder.width, "fsdp")]
    for name, size, axis in split:
        if size % mesh.shape[axis]:
            raise UserError(f"mesh.{axis} must divide the model's {name}, {size}, got {mesh.shape[axis]}")


def check_model(pretrained: Pretrained, config: Config, mesh: Mesh) -> None:
    """Raises UserError where the model does not fit onto the mesh, or the responses into the model."""
    check_mesh(pretrained.decoder, mesh)
    longest = max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens or 0)
    if config.data.max_prompt_tokens + longest > pretrained.max_positions:
        raise UserError("data.max_prompt_tokens + rollout.max_new_tokens (or evaluation.max_new_tokens) must be at "
                        f"most the model's {pretrained.max_positions} positions, got {config.data.max_prompt_tokens} "
                        f"+ {longest}")
