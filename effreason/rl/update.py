"""Stage 6: log-prob scoring, the loss, micro-batches, the optimiser step.

B responses, T response tokens at most, packed into rows (packing.py): U optimiser updates, M micro-batches of R rows, N
positions of a row. What is scored at a position is the token that follows it, the position's target.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from effreason.lm import model
from effreason.lm.logprobs import token_logprobs
from effreason.runtime import sharding
from effreason.runtime.sharding import constrain
from effreason.types import Experience, Packed, Rows

ROW_AXES = ("updates", "micro_batches", "batch", "sequence")    # of [U, M, R, N]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """What training changes, and nothing else: saved in every checkpoint."""

    params: model.Params            # float32 master weights
    opt_state: Any                  # optax state, float32
    step: jax.Array                 # int32[], training steps completed


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss of one optimiser update."""

    clip_ratio: float
    kl_loss_coefficient: float      # of the k3 term; 0 = no term
    temperature: float              # the rollouts': the policy is the distribution that was sampled from
    vocabulary_tile: int            # entries of the vocabulary scored at a time


def score_rows(config: model.DecoderConfig, params: model.Params, rows: Rows, *, temperature: float,
               tile: int) -> tuple[jax.Array, jax.Array]:
    """The log-prob of every target, and the entropy where it stands: float32[R, N]; anything where there is none."""
    hidden = model.forward(config, params, rows.tokens, rows.positions, rows.segments)
    head = model.head(params).astype(config.dtype)
    return token_logprobs(hidden, head, rows.targets, temperature=temperature, tile=tile)


def token_weights(mask: jax.Array, aggregation: str, updates: int = 1) -> jax.Array:
    """How much each response token counts in the loss; the weights of an update sum to 1.

    Computed once for all responses, so that the loss is a plain sum and neither packing nor micro-batches change it.
    Args: mask bool[B, T]; aggregation: token_mean, all tokens alike, or sequence_mean, all responses alike; updates, U:
        response b belongs to update b % U.
    Returns: float32[B, T]."""
    def of_update(counts: jax.Array) -> jax.Array:
        """Sums of [B, 1] over the responses of each update, as [B, 1]."""
        return jnp.tile(jnp.sum(counts.reshape(-1, updates), axis=0), counts.shape[0] // updates)[:, None]

    tokens = jnp.sum(mask, axis=-1, keepdims=True).astype(jnp.float32)
    one = jnp.where(mask, 1.0, 0.0)
    if aggregation == "token_mean":
        return one / jnp.maximum(of_update(tokens), 1.0)
    return one / jnp.maximum(tokens, 1.0) / jnp.maximum(of_update((tokens > 0).astype(jnp.float32)), 1.0)


def scatter_to_rows(values: jax.Array, rows: Rows) -> jax.Array:
    """Values float32[B, T] of response tokens where the rows have them as targets: float32[..., R, N], 0 elsewhere."""
    return jnp.concatenate([values.reshape(-1), jnp.zeros(1, values.dtype)])[rows.response_index]


def policy_loss(logprobs: jax.Array, experience: Experience, *, clip_ratio: float,
                kl_loss_coefficient: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The clipped policy gradient, summed over tokens by weight; REINFORCE where the policy still is the sampler's.

    With ratio = pi / pi_old, loss = -min(ratio A, clip(ratio) A); at ratio = 1 its gradient is -A grad log pi.
    kl_loss_coefficient > 0 adds the k3 estimate of KL(pi || reference), exp(d) - d - 1 with d = log reference - log pi.
    Args: logprobs float32[R, N]; experience, of these rows.
    Returns: the loss and sums by weight: kl (k3), clip_share.
    Source: arXiv 1707.06347; the k's: joschu.net/blog/kl-approx."""
    # Outside the responses log-probs are anything: without the `where` their ratios could overflow to inf * 0.
    log_ratio = jnp.where(experience.mask, logprobs - experience.old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_ratio, 1.0 + clip_ratio)
    gain = jnp.minimum(ratio * experience.advantages, clipped * experience.advantages)
    drift = jnp.where(experience.mask, experience.reference_logprobs - logprobs, 0.0)
    kl = jnp.exp(drift) - drift - 1.0
    loss = jnp.sum(experience.weights * (kl_loss_coefficient * kl - gain))
    is_clipped = clipped * experience.advantages < ratio * experience.advantages
    return loss, {"kl": jnp.sum(experience.weights * kl), "clip_share": jnp.sum(experience.weights * is_clipped)}


def in_compute_dtype(config: model.DecoderConfig, params: model.Params) -> model.Params:
    """The weights as the blocks use them: cast once, before the micro-batches, so that it is this copy of half the size
    that fsdp gathers in each of them."""
    return jax.tree.map(lambda weight: weight.astype(config.dtype), params)


def gradients(params: model.Params, experience: tuple[Experience, ...], counts: tuple[jax.Array, ...],
              which: jax.Array, *, config: model.DecoderConfig, loss: LossConfig,
              shardings: model.Params) -> tuple[model.Params, dict[str, jax.Array]]:
    """The gradient of one update's loss, summed over its micro-batches in float32.

    Args: experience [U, M, R, N] and counts int32[U] of each group of rows; which int32[], the update; shardings, of
        the weights.
    Returns: the gradients, and float32 metrics."""
    weights = in_compute_dtype(config, params)

    def of_rows(weights: model.Params, experience: Experience) -> tuple[jax.Array, dict[str, jax.Array]]:
        found, entropies = score_rows(config, weights, experience.rows, temperature=loss.temperature,
                                      tile=loss.vocabulary_tile)
        value, sums = policy_loss(found, experience, clip_ratio=loss.clip_ratio,
                                  kl_loss_coefficient=loss.kl_loss_coefficient)
        return value, sums | {"loss": value, "entropy": jnp.sum(experience.weights * entropies)}

    def add(total: Any, experience: Experience) -> Any:
        grads, metrics = jax.grad(of_rows, has_aux=True)(weights, experience)
        # Pinned to their weights' shards: left alone, each device would sum up a whole gradient of its own.
        grads = jax.lax.with_sharding_constraint(grads, shardings)
        return jax.tree.map(lambda sum_, part: sum_ + part.astype(jnp.float32), total, (grads, metrics))

    total = (jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, params), shardings),
             dict.fromkeys(("loss", "kl", "clip_share", "entropy"), jnp.zeros((), jnp.float32)))
    for group, count in zip(experience, counts, strict=True):
        total = over_micro_batches(add, total, jax.tree.map(lambda x: x[which], group), count[which])
    return total


def over_micro_batches(add: Callable[[Any, Any], Any], carry: Any, batches: Any, count: jax.Array) -> Any:
    """Folds `add` over the first `count` of [M, ...]: what a step has less of costs nothing, and compiles nothing."""
    def one(index: jax.Array, carry: Any) -> Any:
        return add(carry, jax.tree.map(lambda x: x[index], batches))

    return jax.lax.fori_loop(0, count, one, carry)


def apply_gradients(state: TrainState, grads: model.Params, steps: jax.Array, *,
                    optimizer: optax.GradientTransformation, on_device: Any) -> tuple[TrainState, jax.Array]:
    """One optimiser update. Args: steps int32[], what to count it as: 1 for the last update of a step, else 0;
        on_device, where the optimiser's state is computed on.
    Returns: the state, and the gradient's global norm float32[]."""
    opt_state = jax.device_put(state.opt_state, on_device)
    updates, opt_state = optimizer.update(grads, opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params=params, opt_state=opt_state, step=state.step + steps), optax.tree.norm(grads)


def make_optimizer(learning_rate: float, beta1: float, beta2: float, weight_decay: float, max_grad_norm: float,
                   warmup_updates: int) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip; the rate rises linearly over the warm-up and stays."""
    schedule = optax.linear_schedule(learning_rate / max(warmup_updates, 1), learning_rate, max(warmup_updates - 1, 0))
    return optax.chain(optax.clip_by_global_norm(max_grad_norm),
                       optax.adamw(schedule, b1=beta1, b2=beta2, weight_decay=weight_decay))


def state_sharding(config: model.DecoderConfig, optimizer: optax.GradientTransformation, mesh: Mesh, *,
                   offload: bool = False) -> TrainState:
    """Where every leaf of the state lives: moments beside their weights, counters everywhere.

    Args: offload, the moments are in the host's memory, split as their weights are."""
    params = sharding.tree_sharding(mesh, model.logical_axes(config))
    replicated: Any = sharding.sharding(mesh)
    moments = sharding.offloaded(params) if offload else params
    abstract = jax.eval_shape(optimizer.init, model.abstract_params(config))
    placed = optax.tree_utils.tree_map_params(optimizer, lambda _, target: target, abstract, moments,
                                              transform_non_params=lambda _: replicated)
    return TrainState(params=params, opt_state=placed, step=replicated)


def make_initial_state(optimizer: optax.GradientTransformation, targets: TrainState) -> Callable[..., TrainState]:
    """params -> the state before the first step; takes the params over."""
    def fresh(params: model.Params) -> TrainState:
        return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.zeros((), jnp.int32))

    return jax.jit(fresh, out_shardings=targets, donate_argnums=0)


def make_scorer(config: model.DecoderConfig, mesh: Mesh, loss: LossConfig, *,
                params: model.Params) -> Callable[[model.Params, Packed], jax.Array]:
    """score(params, packed) -> log-probs float32[B, T] of the responses, 0 behind their ends.

    By the trainer's own forward pass. Args: params, the shardings of the weights, which may be in the host's memory."""
    fetched = sharding.tree_sharding(mesh, model.logical_axes(config))

    def score(params: model.Params, packed: Packed) -> jax.Array:
        weights = in_compute_dtype(config, jax.device_put(params, fetched))

        def one(rows: Rows) -> jax.Array:
            return score_rows(config, weights, rows, temperature=loss.temperature, tile=loss.vocabulary_tile)[0]

        def of_update(update: tuple[Rows, jax.Array]) -> jax.Array:
            rows, count = update
            return jax.lax.fori_loop(
                0, count, lambda index, found: found.at[index].set(one(jax.tree.map(lambda x: x[index], rows))),
                jnp.zeros(rows.tokens.shape, jnp.float32))

        found = [jax.lax.map(of_update, group) for group in zip(packed.groups, packed.counts, strict=True)]
        line = [constrain(x).reshape(-1) for x in found]
        return jnp.concatenate([*line, jnp.zeros(1, jnp.float32)])[packed.token_index]

    return jax.jit(score, in_shardings=(params, packed_sharding(mesh)), out_shardings=sharding.sharding(mesh))


def make_gradients(config: model.DecoderConfig, mesh: Mesh, loss: LossConfig,
                   targets: TrainState) -> Callable[..., tuple[model.Params, dict[str, jax.Array]]]:
    """gradients(params, experience, counts, which), jitted; see `gradients`."""
    rows, replicated = sharding.sharding(mesh, *ROW_AXES), sharding.sharding(mesh)
    return jax.jit(functools.partial(gradients, config=config, loss=loss, shardings=targets.params),
                   in_shardings=(targets.params, rows, replicated, replicated),
                   out_shardings=(targets.params, replicated))


def make_apply_gradients(optimizer: optax.GradientTransformation, mesh: Mesh,
               targets: TrainState) -> Callable[..., tuple[TrainState, jax.Array]]:
    """apply_gradients(state, grads, steps), jitted; the old state's memory becomes the new state's."""
    replicated = sharding.sharding(mesh)
    step = functools.partial(apply_gradients, optimizer=optimizer, on_device=sharding.fetched(targets.opt_state))
    return jax.jit(step, in_shardings=(targets, targets.params, replicated), out_shardings=(targets, replicated),
                   donate_argnums=0)


def packed_sharding(mesh: Mesh) -> Packed:
    """Where packed rows lie, as a prefix of their tree."""
    replicated: Any = sharding.sharding(mesh)
    rows: Any = sharding.sharding(mesh, *ROW_AXES)
    return Packed(groups=rows, counts=replicated, token_index=replicated)
