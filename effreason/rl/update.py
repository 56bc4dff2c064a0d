"""Stage 6: log-prob scoring, the loss, its gradient over micro-batches, and the optimizer step.

What was left out, and why:
- No critic and no GAE: a response has one reward, and its baseline is the rest of its group.
- No entropy bonus: entropy is measured, with no gradient through it.
- Nothing is clipped with one update per batch, the default: the ratio is 1, and the loss is
  REINFORCE with a leave-one-out baseline.
- No importance weights here: the correction for the sampler's log-probs is in the advantages.
- No accumulation across steps: a step's micro-batches are as many as its responses need.
- No bfloat16 weights, moments or gradient sums: master weights and all sums are float32, and only
  the copy that the blocks read is in the compute dtype.

B responses, T response slots, packed into rows (packing.py): U optimizer updates, M micro-batches
of R rows, N positions of a row. A position scores the token that follows it, its target.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Float32, Int32

from effreason.lm import adapters, attention, model
from effreason.lm.architecture import DecoderConfig
from effreason.lm.logprobs import token_logprobs
from effreason.rl import advantages
from effreason.runtime import sharding
from effreason.runtime.config import UpdateConfig
from effreason.runtime.sharding import Shardings, constrain
from effreason.types import Experience, Packed, Rows

ROW_AXES = ("updates", "micro_batches", "batch", "sequence")    # of [U, M, R, N]
# Of a number for each response token, what a device has at a time of all responses.
GATHERED_BYTES = 2**28
SCORING_TILE = 4096     # entries of the vocabulary: without gradients, more only leave the cache
Metrics = dict[str, Float32[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """What training changes, and nothing else: saved in every checkpoint."""

    params: model.Params            # float32 master weights, or the adapters alone
    opt_state: Any                  # optax state, float32
    step: jax.Array                 # int32[], training steps completed


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss of one optimizer update."""

    clip_ratio: float
    clip_ratio_high: float | None = None    # None = clip_ratio
    dual_clip: float | None = None
    surrogate: str = "ppo"          # see policy_loss
    kl_loss_coefficient: float      # of the k3 term; 0 = no term
    kl_penalty: float = 0.0         # coefficient of the KL penalty; 0 = it is in the advantages
    importance_cap: float | None = None     # see advantages.truncated_importance; None = no weights
    temperature: float              # of the rollouts: the policy is the distribution sampled from
    vocabulary_tile: int            # entries of the vocabulary scored at a time


def score_rows(config: DecoderConfig, params: model.Params, rows: Rows, *, temperature: float,
               tile: int, responses: tuple[int, int] | None = None,
               ) -> tuple[Float32[Array, "R N"], Float32[Array, "R N"]]:
    """Returns log-prob and entropy at every target; undefined at padding.

    Args:
        responses: B, T; only tokens of responses are scored. None: all.
    """
    hidden = model.forward(config, params, rows.tokens, rows.positions, rows.segments,
                           rows.settings)
    head = model.head(params).astype(config.dtype)
    wanted = None if responses is None else rows.response_index < math.prod(responses)
    return token_logprobs(hidden, head, rows.targets, wanted, temperature=temperature, tile=tile,
                          unused=config.unused_ids)


def token_weights(mask: Bool[Array, "B T"], aggregation: str,
                  updates: int = 1) -> Float32[Array, "B T"]:
    """Returns how much each response token counts in the loss; an update's weights sum to 1.

    They are computed once for all responses, so that the loss is a plain sum, and neither packing
    nor micro-batches change it.

    Args:
        aggregation: token_mean weighs all tokens alike, sequence_mean all responses.
        updates: U; response b belongs to update b % U."""
    def update_sum(counts: Float32[Array, "B 1"]) -> Float32[Array, "B 1"]:
        sums = jnp.sum(counts.reshape(-1, updates), axis=0)
        return jnp.tile(sums, counts.shape[0] // updates)[:, None]

    tokens = jnp.sum(mask, axis=-1, keepdims=True).astype(jnp.float32)
    ones = jnp.where(mask, 1.0, 0.0)
    if aggregation == "token_mean":
        return ones / jnp.maximum(update_sum(tokens), 1.0)
    responses = update_sum((tokens > 0).astype(jnp.float32))
    return ones / jnp.maximum(tokens, 1.0) / jnp.maximum(responses, 1.0)


def filled_share(mask: Bool[Array, "B T"], updates: int = 1) -> Float32[Array, "B 1"]:
    """Returns which share of an update's response slots hold a token that is learnt from.

    A mean over tokens times this share is their sum over B / U * T, a constant. Source: Dr. GRPO,
    arXiv 2503.20783."""
    counts = jnp.sum(mask, axis=-1).astype(jnp.float32).reshape(-1, updates)
    shares = jnp.mean(counts, axis=0) / mask.shape[1]
    return jnp.tile(shares, counts.shape[0])[:, None]


def scatter_to_rows(values: Float[Array, "B T"], rows: Rows) -> Float[Array, "... R N"]:
    """Puts values of response tokens at the positions that score them; 0 elsewhere."""
    # A row of any shard may hold any response. XLA would rather have the positions of all rows on
    # every device, of which there are more than response tokens.
    indices, (responses, slots) = rows.response_index, values.shape
    mesh = jax.sharding.get_abstract_mesh()
    is_split = not mesh.empty and responses % sharding.batch_shards(mesh) == 0
    parts = min(-(-values.nbytes // GATHERED_BYTES), slots) if is_split else 1
    if parts == 1:
        return jnp.take(constrain(values), indices, mode="fill", fill_value=0)

    width = -(-slots // parts)
    response, slot = jnp.divmod(indices, slots)

    def put(part: Array, found: Array) -> Array:
        start = jnp.minimum(part * width, slots - width)
        # Pinned before and after: otherwise all columns are gathered before the loop.
        own = constrain(jax.lax.dynamic_slice_in_dim(values, start, width, axis=1), "batch")
        taken = jnp.take(constrain(own), response * width + slot - start, mode="fill",
                         fill_value=0)
        return constrain(jnp.where(slot // width == part, taken, found),
                         *ROW_AXES[-indices.ndim:])

    return jax.lax.fori_loop(0, parts, put, jnp.zeros(indices.shape, values.dtype))


def gather_from_rows(values: Float[Array, "... R N"], rows: Rows,
                     into: Float[Array, " BT"]) -> Float[Array, " BT"]:
    """Puts values of the positions that score response tokens at their places in a flat [B, T]."""
    return into.at[rows.response_index].set(values, mode="drop")


def with_old_logprobs(experience: Experience, logprobs: Float32[Array, "R N"],
                      is_first: Bool[Array, ""], loss: LossConfig) -> Experience:
    """Completes the advantages with what depends on the policy before the step.

    Args:
        logprobs: By the policy now, which before the first update is the policy before the step.
        is_first: Whether this is the first update.

    Returns:
        The experience with old log-probs, and with the KL penalty and the importance weights in its
        advantages.
    """
    old, mask = jax.lax.stop_gradient(logprobs), experience.mask
    if experience.old_logprobs is not None:
        old = jnp.where(is_first, old, experience.old_logprobs)

    worth = experience.advantages
    if loss.kl_penalty:
        assert experience.reference_logprobs is not None
        columns = attention.column_order(mask.shape[-1])
        order = np.argsort(columns)
        drift = jnp.where(mask, old - experience.reference_logprobs, 0.0)
        penalty = advantages.kl_return_to_go(loss.kl_penalty * drift[:, order], mask[:, order],
                                             experience.rows.segments[:, order])
        worth -= penalty[:, columns]
    if loss.importance_cap is not None:
        assert experience.sampled_logprobs is not None
        # Last: it weighs the gradient of a token, whatever its advantage.
        worth *= advantages.truncated_importance(old, experience.sampled_logprobs, mask,
                                                 loss.importance_cap)
    return dataclasses.replace(experience, old_logprobs=old, advantages=worth)


def policy_loss(logprobs: Float32[Array, "R N"], experience: Experience, *, clip_ratio: float,
                kl_loss_coefficient: float, clip_ratio_high: float | None = None,
                dual_clip: float | None = None, surrogate: str = "ppo",
                ) -> tuple[Float32[Array, ""], Metrics]:
    """The clipped policy gradient, a weighted sum over tokens.

    With ratio = pi / pi_old the loss is -min(ratio A, clip(ratio) A); at ratio = 1 its gradient is
    REINFORCE's, -A grad log pi. kl_loss_coefficient > 0 adds `advantages.k3`, an estimate of
    KL(pi || reference). Both are bounded, see `advantages.MAX_LOG_RATIO` and `MAX_K3`: a token
    whose probability has changed beyond reason has no gradient instead of an infinite one.

    Source: arXiv 1707.06347; clip_ratio_high, DAPO, 2503.14476; dual_clip, 1912.09729; gspo,
    2507.18071; cispo, 2506.13585.

    Args:
        experience: of these rows.
        clip_ratio: how far the ratio may move down, and up.
        clip_ratio_high: how far up; None = clip_ratio.
        dual_clip: of a token with a negative advantage the ratio counts at most this; None = no
            bound.
        surrogate: ppo, as above; gspo, the ratio of a token is that of its whole response, the
            geometric mean over its tokens; cispo, the gradient is that of
            -min(ratio, 1 + clip_ratio_high) A log pi, with the ratio as a constant.

    Returns:
        The loss, and the weighted sums clip_share and, if there is a reference, kl (k3).
    """
    assert experience.old_logprobs is not None
    # Log-probs outside of responses are undefined: they are masked before anything else.
    log_ratio = jnp.where(experience.mask, logprobs - experience.old_logprobs, 0.0)
    if surrogate == "gspo":
        log_ratio = mean_of_responses(log_ratio, experience)
    ratio, worth = advantages.probability_ratio(log_ratio), experience.advantages
    most = 1.0 + (clip_ratio if clip_ratio_high is None else clip_ratio_high)
    if surrogate == "cispo":
        weight = jax.lax.stop_gradient(jnp.minimum(ratio, most))
        gain = weight * worth * jnp.where(experience.mask, logprobs, 0.0)
        is_clipped = ratio > most
    else:
        clipped = jnp.clip(ratio, 1.0 - clip_ratio, most)
        gain = jnp.minimum(ratio * worth, clipped * worth)
        if dual_clip is not None:
            gain = jnp.where(worth < 0, jnp.maximum(gain, dual_clip * worth), gain)
        is_clipped = gain != ratio * worth

    sums = {"clip_share": jnp.sum(experience.weights * is_clipped.astype(jnp.float32))}
    if experience.reference_logprobs is None:
        return jnp.sum(experience.weights * -gain), sums

    kl = advantages.k3(
        jnp.where(experience.mask, logprobs - experience.reference_logprobs, 0.0))
    loss = jnp.sum(experience.weights * (kl_loss_coefficient * kl - gain))
    return loss, sums | {"kl": jnp.sum(experience.weights * kl)}


def mean_of_responses(values: Float32[Array, "R N"],
                      experience: Experience) -> Float32[Array, "R N"]:
    """Returns at each token the mean over all tokens of its response; 0 outside of responses."""
    columns = attention.column_order(values.shape[-1])
    order = np.argsort(columns)
    mask, segments = experience.mask[:, order], experience.rows.segments[:, order]

    def total(values: Float32[Array, "R N"]) -> Float32[Array, "R N"]:
        after = advantages.kl_return_to_go(values, mask, segments)
        before = advantages.kl_return_to_go(values[:, ::-1], mask[:, ::-1], segments[:, ::-1])
        return after + before[:, ::-1] - jnp.where(mask, values, 0.0)

    means = total(values[:, order]) / jnp.maximum(total(jnp.ones_like(values)), 1.0)
    return means[:, columns]


def trainable(config: DecoderConfig, params: model.Params) -> model.Params:
    """Returns what is trained out of a tree like the weights: all of it, or the adapters."""
    return params if config.adapter is None else adapters.split(params)[1]


def complete(config: DecoderConfig, params: model.Params,
             frozen: model.Params) -> model.Params:
    """Returns the weights of the policy: those that are trained, and the frozen ones."""
    return params if config.adapter is None else adapters.join(frozen, params)


def gradients(params: model.Params, frozen: model.Params, experience: tuple[Experience, ...],
              counts: tuple[Int32[Array, " U"], ...], old: Float32[Array, "B T"] | None,
              which: Int32[Array, ""], *, config: DecoderConfig, loss: LossConfig,
              responses: tuple[int, int], shardings: Shardings, of_tokens: NamedSharding,
              ) -> tuple[model.Params, Metrics, Float32[Array, "B T"]]:
    """Returns the gradient of one update's loss, summed over its micro-batches in float32.

    Args:
        params: What is trained.
        frozen: The weights without adapters, in the compute dtype; {} if all weights are trained.
        experience: [U, M, R, N] for each group of rows.
        counts: Micro-batches in use, for each group of rows.
        old: Log-probs of the responses by the policy before the step, 0 if not known; None = none
            are known.
        which: The update. The first one finds the old log-probs of its own responses.
        responses: B, T.
        shardings: Of what is trained.
        of_tokens: The sharding of a number for each response token.

    Returns:
        The gradient, the metrics of the loss, and `old` with the log-probs of the update's
        responses put in."""
    gradient = jax.grad(functools.partial(
        micro_batch_loss, frozen=frozen, is_first=which == 0, config=config, loss=loss,
        responses=responses), has_aux=True)
    # Once, before the micro-batches, so that fsdp gathers this copy of half the size in each.
    weights = model.in_compute_dtype(config, params)
    groups = jax.tree.map(lambda x: x[which], experience)
    names = ["loss", "clip_share", "entropy"]
    if experience[0].reference_logprobs is not None:
        names.append("kl")
    sums = (jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, params), shardings),
            dict.fromkeys(names, jnp.zeros((), jnp.float32)))
    scored = []
    for group, count in zip(groups, counts, strict=True):

        def add(index: Array, total: Any, group: Experience = group) -> Any:
            sums, scored = total
            grads, (metrics, logprobs) = gradient(weights, jax.tree.map(lambda x: x[index], group))
            # Pinned to the weights' shards: otherwise each device would sum a whole gradient.
            grads = jax.lax.with_sharding_constraint(grads, shardings)
            sums = jax.tree.map(lambda sum_, part: sum_ + part.astype(jnp.float32), sums,
                                (grads, metrics))
            return sums, scored.at[index].set(logprobs)

        # Micro-batches beyond the count cost no time.
        sums, logprobs = jax.lax.fori_loop(0, count[which], add,
                                           (sums, jnp.zeros_like(group.weights)))
        scored.append(logprobs)

    # After all gradients: devices that communicate for both at once may wait for each other.
    found = (jnp.zeros(responses, jnp.float32) if old is None else old).reshape(-1)
    for group, count, logprobs in zip(groups, counts, scored, strict=True):

        def put(index: Array, found: Array, rows: Rows = group.rows,
                logprobs: Array = logprobs) -> Array:
            rows, logprobs = jax.tree.map(lambda x: x[index], (rows, logprobs))
            return jax.lax.with_sharding_constraint(gather_from_rows(logprobs, rows, found),
                                                    of_tokens)

        found = jax.lax.fori_loop(0, count[which], put, found)
    return *sums, found.reshape(responses)


def micro_batch_loss(weights: model.Params, experience: Experience, *, frozen: model.Params,
                     is_first: Bool[Array, ""], config: DecoderConfig, loss: LossConfig,
                     responses: tuple[int, int],
                     ) -> tuple[Float32[Array, ""], tuple[Metrics, Float32[Array, "R N"]]]:
    """Returns the loss of some rows, its metrics, and the rows' log-probs; see `gradients`."""
    logprobs, entropies = score_rows(config, complete(config, weights, frozen), experience.rows,
                                     temperature=loss.temperature, tile=loss.vocabulary_tile,
                                     responses=responses)
    value, sums = policy_loss(
        logprobs, with_old_logprobs(experience, logprobs, is_first, loss),
        clip_ratio=loss.clip_ratio, clip_ratio_high=loss.clip_ratio_high, dual_clip=loss.dual_clip,
        surrogate=loss.surrogate, kl_loss_coefficient=loss.kl_loss_coefficient)
    entropy = jnp.sum(experience.weights * entropies)
    return value, (sums | {"loss": value, "entropy": entropy}, logprobs)


def apply_gradients(state: TrainState, grads: model.Params, steps: Int32[Array, ""], *,
                    optimizer: optax.GradientTransformation, schedule: optax.Schedule,
                    on_device: Shardings) -> tuple[TrainState, Metrics]:
    """Makes one optimizer update.

    Args:
        steps: What it counts as: 1 for the last update of a step, else 0.
        schedule: The optimizer's, of the learning rate.
        on_device: Shardings of the optimizer's state while it is computed on.

    Returns:
        The new state, the global norm of the gradient, and the learning rate."""
    opt_state = jax.device_put(state.opt_state, on_device)
    (_, count), *_ = optax.tree.get_all_with_path(opt_state, "count")       # all are equal
    rate = schedule(count)
    updates, opt_state = optimizer.update(grads, opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = TrainState(params=params, opt_state=opt_state, step=state.step + steps)
    return state, {"grad_norm": optax.tree.norm(grads),
                   "learning_rate": jnp.asarray(rate, jnp.float32)}


def make_schedule(config: UpdateConfig, updates: int) -> optax.Schedule:
    """Returns the learning rate of each update, counted from 0.

    Args:
        updates: of the whole run, after which a rate that is not constant reaches its minimum."""
    peak, warmup = config.learning_rate, config.warmup_updates
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 0))
    if config.schedule == "constant":
        return rise
    first = max(warmup - 1, 0)              # the first update with the whole rate
    length = max(updates - first, 1)
    share = (optax.linear_schedule(1.0, 0.0, length) if config.schedule == "linear" else
             optax.cosine_decay_schedule(1.0, length))
    least = config.min_learning_rate

    def fall(count: Int32[Array, ""]) -> Float32[Array, ""]:
        return least + (peak - least) * share(jnp.asarray(count, jnp.float32))
    return optax.join_schedules([rise, fall], [first])


def make_optimizer(config: UpdateConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns AdamW after a global-norm clip.

    Norms, biases and the rates at which states fade do not decay: pulled towards 0, they would
    switch their layers off."""
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm),
                       optax.adamw(schedule, b1=config.beta1, b2=config.beta2,
                                   weight_decay=config.weight_decay, mask=decayed))


def decayed(params: model.Params) -> Any:
    """Returns the tree of the weights with True for those that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path[-1].key.endswith(("norm", "bias", "log_decay_rate")), params)


def state_sharding(config: DecoderConfig, optimizer: optax.GradientTransformation, mesh: Mesh,
                   *, offload: bool = False) -> Shardings:
    """Returns a TrainState of shardings: moments like their weights, counters replicated.

    Args:
        offload: Keep the moments in the host's memory, split like their weights."""
    params = sharding.tree_sharding(mesh, trainable(config, model.logical_axes(config)))
    replicated: Any = sharding.sharding(mesh)
    moments = sharding.offloaded(params) if offload else params
    abstract = jax.eval_shape(optimizer.init, trainable(config, model.abstract_params(config)))
    opt_state = optax.tree_utils.tree_map_params(
        optimizer, lambda _, target: target, abstract, moments,
        transform_non_params=lambda _: replicated)
    return TrainState(params=params, opt_state=opt_state, step=replicated)


def make_initial_state(optimizer: optax.GradientTransformation,
                       shardings: Shardings) -> Callable[[model.Params], TrainState]:
    """Returns initial_state(params), jitted: the state before the first step. Donates params."""
    def initial_state(params: model.Params) -> TrainState:
        return TrainState(params=params, opt_state=optimizer.init(params),
                          step=jnp.zeros((), jnp.int32))

    return jax.jit(initial_state, out_shardings=shardings, donate_argnums=0)


def make_scorer(config: DecoderConfig, mesh: Mesh, loss: LossConfig, *, params: Shardings,
                responses: tuple[int, int],
                ) -> Callable[[model.Params, Packed, Any], Float32[Array, "B T"]]:
    """Returns score(params, packed, first), jitted: log-probs of the responses, 0 at padding.

    The forward pass is the trainer's own. It leaves out the responses of the updates before
    `first`, int32[].

    Args:
        params: Shardings of the weights, which may be in the host's memory.
        responses: B, T."""
    on_device = sharding.tree_sharding(mesh, model.logical_axes(config))
    of_tokens = token_sharding(mesh, responses[0])

    def score(params: model.Params, packed: Packed,
              first: Int32[Array, ""]) -> Float32[Array, "B T"]:
        weights = model.in_compute_dtype(config, jax.device_put(params, on_device))

        def score_update(logprobs: Array, update: tuple[Rows, jax.Array]) -> tuple[Array, None]:
            micro_batches, count = update

            def body(index: Array, logprobs: Array) -> Array:
                rows = jax.tree.map(lambda x: x[index], micro_batches)
                scored, _ = score_rows(config, weights, rows, temperature=loss.temperature,
                                       tile=min(loss.vocabulary_tile, SCORING_TILE),
                                       responses=responses)
                return jax.lax.with_sharding_constraint(
                    gather_from_rows(scored, rows, logprobs), of_tokens)

            return jax.lax.fori_loop(0, count, body, logprobs), None

        logprobs = jnp.zeros(math.prod(responses), jnp.float32)
        for group, count in zip(packed.groups, packed.counts, strict=True):
            count = jnp.where(jnp.arange(len(count)) < first, 0, count)
            logprobs, _ = jax.lax.scan(score_update, logprobs, (group, count))
        return logprobs.reshape(responses)

    return jax.jit(score, in_shardings=(params, packed_sharding(mesh), sharding.sharding(mesh)),
                   out_shardings=of_tokens, compiler_options=sharding.compiler_options(mesh))


def make_gradients(config: DecoderConfig, mesh: Mesh, loss: LossConfig, shardings: Shardings,
                   frozen: Shardings, *, responses: tuple[int, int]) -> Callable[..., Any]:
    """Returns gradients(params, frozen, experience, counts, old, which), jitted; see `gradients`.

    Args:
        responses: B, T."""
    rows, replicated = sharding.sharding(mesh, *ROW_AXES), sharding.sharding(mesh)
    params, of_tokens = shardings.params, token_sharding(mesh, responses[0])
    return jax.jit(functools.partial(gradients, config=config, loss=loss, responses=responses,
                                     shardings=params, of_tokens=of_tokens),
                   in_shardings=(params, frozen, rows, replicated, of_tokens, replicated),
                   out_shardings=(params, replicated, of_tokens),
                   compiler_options=sharding.compiler_options(mesh))


def make_apply_gradients(optimizer: optax.GradientTransformation, schedule: optax.Schedule,
                         mesh: Mesh, shardings: Shardings,
                         ) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns apply_gradients(state, grads, steps), jitted; the state is donated."""
    replicated = sharding.sharding(mesh)
    step = functools.partial(apply_gradients, optimizer=optimizer, schedule=schedule,
                             on_device=sharding.fetched(shardings.opt_state))
    return jax.jit(step, in_shardings=(shardings, shardings.params, replicated),
                   out_shardings=(shardings, replicated), donate_argnums=0)


def packed_sharding(mesh: Mesh) -> Shardings:
    """Returns the shardings of packed rows, as a prefix of their tree."""
    rows: Any = sharding.sharding(mesh, *ROW_AXES)
    replicated: Any = sharding.sharding(mesh)
    return Packed(groups=rows, counts=replicated)


def token_sharding(mesh: Mesh, responses: int) -> NamedSharding:
    """Returns the sharding of numbers for each response token, [B, T] or flat.

    Args: responses, B; if the devices cannot have equal shares of them, each has them all."""
    is_split = responses % sharding.batch_shards(mesh) == 0
    return sharding.sharding(mesh, *["batch"] * is_split)
