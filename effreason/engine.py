"""The compiled functions of a run, built once from the configuration, and where their arrays live."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from effreason import advantages, checkpoints, masks, rewards, rollouts, update
from effreason.errors import UserError
from effreason.lm import hf, model
from effreason.records import Experience
from effreason.runtime import sharding
from effreason.runtime.config import Config
from effreason.sampling import memory
from effreason.sampling.draws import Sampling
from effreason.sampling.loops import LoopStopping
from effreason.update import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """What one step calls, in the order in which it calls them."""

    sampler: rollouts.Sampler
    sampling: Sampling                      # the distribution of the rollouts
    score: Callable[[model.Params, jax.Array], jax.Array]                           # log-probs float32[B, N]
    credit: Callable[..., tuple[Experience, jax.Array, dict[str, jax.Array]]]       # and rewards[P, G], metrics
    update: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    initial_state: Callable[[model.Params], TrainState]
    abstract_state: TrainState              # shapes, dtypes and shardings
    params_sharding: model.Params
    rows_sharding: NamedSharding            # of [B, N]
    replicated: NamedSharding


def credit(correct: jax.Array, lengths: jax.Array, prompt_lengths: jax.Array, tokens: jax.Array, sampled: jax.Array,
           old: jax.Array, reference: jax.Array, *,
           config: Config) -> tuple[Experience, jax.Array, dict[str, jax.Array]]:
    """From verdicts to what each token is worth: reward, baseline, KL penalty, and the options.

    Args: correct bool[P, G]; lengths int32[P, G]; prompt_lengths int32[B]; tokens int32[B, N]; the sampler's, old and
        reference log-probs float32[B, N].
    Returns: the experience; the rewards float32[P, G]; metrics."""
    reward = rewards.length_rewards(correct, lengths, alpha=config.reward.alpha)
    advantage = advantages.leave_one_out(reward)
    if config.advantage.group_std:
        advantage = advantages.group_std(advantage, reward)
    mask = masks.response_mask(prompt_lengths, lengths.reshape(-1), tokens.shape[1])
    token_advantages = jnp.where(mask, advantage.reshape(-1, 1), 0.0)
    drift = jnp.where(mask, old - reference, 0.0)
    if config.kl.form == "reward":
        token_advantages -= advantages.kl_return_to_go(config.kl.coefficient * drift, mask)
    if config.advantage.whiten:
        token_advantages = advantages.whiten(token_advantages, mask)
    if config.update.importance_cap is not None:
        # Last: it weighs the gradient of a token, whatever the token is worth.
        token_advantages *= advantages.truncated_importance(old, sampled, mask, config.update.importance_cap)
    experience = Experience(tokens=tokens, mask=mask, advantages=token_advantages, old_logprobs=old,
                            reference_logprobs=reference)
    spread = jnp.max(reward, axis=-1) > jnp.min(reward, axis=-1)
    tokens_credited = jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
    gap = jnp.where(mask, jnp.abs(sampled - old), 0.0)
    return experience, reward, {"reward/mean": jnp.mean(reward), "reward/groups_with_signal": jnp.mean(spread),
                                "reward/kl": jnp.sum(drift) / tokens_credited,
                                "rollout/mismatch": jnp.sum(gap) / tokens_credited,
                                "rollout/mismatch_max": jnp.max(gap)}


def make_engine(config: Config, pretrained: hf.Pretrained, mesh: Mesh) -> Engine:
    """Builds everything a training step needs; but for the trial of a kernel nothing is compiled before its first call.

    Raises: UserError where the mesh cannot split the model or the batch evenly."""
    decoder, settings, learning = pretrained.decoder, config.rollout, config.update
    check_divisible(config, decoder, mesh)
    loss = update.LossConfig(
        clip_ratio=learning.clip_ratio, aggregation=learning.aggregation, temperature=settings.temperature,
        kl_loss_coefficient=config.kl.coefficient if config.kl.form == "loss" else 0.0,
        logprob_chunk=learning.logprob_chunk)
    optimizer = update.make_optimizer(
        learning_rate=learning.learning_rate, beta1=learning.beta1, beta2=learning.beta2,
        weight_decay=learning.weight_decay, max_grad_norm=learning.max_grad_norm,
        warmup_updates=learning.warmup_updates)
    targets = update.state_sharding(decoder, optimizer, mesh)
    initial = update.make_initial_state(optimizer, targets)
    rows = settings.prompts_per_step * settings.group_size
    row, replicated = sharding.sharding(mesh, "batch", "sequence"), sharding.sharding(mesh)
    return Engine(
        sampler=make_sampler(config, decoder, mesh),
        sampling=Sampling(temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k,
                          min_p=settings.min_p, eos_ids=pretrained.eos_ids),
        score=update.make_scorer(decoder, mesh, loss, micro_batches=rows // learning.rows_per_micro_batch),
        credit=jax.jit(functools.partial(credit, config=config), out_shardings=(row, replicated, replicated)),
        update=update.make_update(
            decoder, mesh, loss, optimizer, targets, updates=learning.updates_per_batch,
            micro_batches=rows // learning.updates_per_batch // learning.rows_per_micro_batch),
        initial_state=initial,
        abstract_state=checkpoints.abstract(jax.eval_shape(initial, model.abstract_params(decoder)), targets),
        params_sharding=targets.params, rows_sharding=row, replicated=replicated)


def make_sampler(config: Config, decoder: model.DecoderConfig, mesh: Mesh,
                 copies: int = memory.TRAINING) -> rollouts.Sampler:
    """The sampling engine of a run, for rollouts and evaluations alike. Args: copies, of the weights beside its own."""
    loops = LoopStopping(window=config.loops.window, longest_period=config.loops.longest_period,
                         audit_share=config.loops.audit_share) if config.loops.stop else None
    settings = config.rollout
    return rollouts.make_sampler(decoder, mesh, slots=memory.slots(config, decoder, mesh, copies), chunk=settings.chunk,
                                 positions=memory.positions(config), loops=loops, cache_layout=settings.cache_layout)


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


def check_model(pretrained: hf.Pretrained, config: Config, mesh: Mesh) -> None:
    """Raises UserError where the model does not fit onto the mesh, or the responses into the model."""
    check_mesh(pretrained.decoder, mesh)
    longest = max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens or 0)
    if config.data.max_prompt_tokens + longest > pretrained.max_positions:
        raise UserError("data.max_prompt_tokens + rollout.max_new_tokens (or evaluation.max_new_tokens) must be at "
                        f"most the model's {pretrained.max_positions} positions, got {config.data.max_prompt_tokens} "
                        f"+ {longest}")
