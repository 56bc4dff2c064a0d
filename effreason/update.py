"""Stage 6: experience rows, log-prob scoring, the loss, micro-batches, the optimiser step.

B rows, N positions of a row, V vocabulary, D width, M micro-batches. A row holds prompt, response and padding, in this
order; `logprobs[b, n]` is always that of the token at n given what stands before n, so 0 at n = 0.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from effreason.lm import model
from effreason.masks import padded_length
from effreason.records import Experience, Rollouts
from effreason.runtime import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """What training changes, and nothing else: saved in every checkpoint."""

    params: model.Params            # float32 master weights
    optimizer: Any                  # optax state, float32
    step: jax.Array                 # int32[], training steps completed


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss of one optimiser update."""

    clip_ratio: float
    aggregation: str                # token_mean | sequence_mean
    kl_loss_coefficient: float      # of the k3 term; 0 = no term
    temperature: float              # the rollouts': the policy is the distribution that was sampled from
    logprob_chunk: int              # positions scored at a time


def pack(rollouts: Rollouts, multiple: int) -> dict[str, np.ndarray]:
    """Rollouts as rows [B, N], prompt and response in one line, on the host.

    Args: multiple, of the context mesh axis: N is divisible by it.
    Returns: tokens int32[B, N]; sampled float32[B, N], the sampler's log-probs of response tokens, 0 elsewhere;
        prompt_lengths, lengths int32[B]."""
    prompts, group_size = rollouts.tokens.shape[:2]
    prompt_lengths = np.repeat(rollouts.prompt_lengths, group_size)
    lengths = rollouts.lengths.reshape(-1)
    width = padded_length(int((prompt_lengths + lengths).max()))
    tokens = np.zeros((prompts * group_size, -(-width // multiple) * multiple), np.int32)
    sampled = np.zeros(tokens.shape, np.float32)
    for row in range(len(tokens)):
        prompt, sample = divmod(row, group_size)
        start, end = prompt_lengths[row], prompt_lengths[row] + lengths[row]
        tokens[row, :start] = rollouts.prompts[prompt, :start]
        tokens[row, start:end] = rollouts.tokens[prompt, sample, : lengths[row]]
        sampled[row, start:end] = rollouts.logprobs[prompt, sample, : lengths[row]]
    return {"tokens": tokens, "sampled": sampled, "prompt_lengths": prompt_lengths, "lengths": lengths}


def token_logprobs(hidden: jax.Array, head: jax.Array, targets: jax.Array, *, temperature: float,
                   chunk: int) -> tuple[jax.Array, jax.Array]:
    """Log-probs of targets and the entropies, in float32, without ever holding [B, N, V].

    `chunk` positions are scored at a time and scored again in the backward pass.
    Args: hidden [B, N, D]; head [V, D]; targets int32[B, N].
    Returns: log-probs and entropies in nats, float32[B, N]."""
    rows, length, width = hidden.shape
    chunk = min(chunk, length)
    padding = -length % chunk

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def score(chunked: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, ids = chunked
        scores = jnp.einsum("bnd,vd->bnv", states, head, preferred_element_type=jnp.float32) / temperature
        normalizer = jax.nn.logsumexp(scores, axis=-1)
        # A comparison and a sum instead of a gather: its gradient is no scatter, and it splits over the vocabulary.
        is_target = ids[..., None] == jnp.arange(scores.shape[-1])
        chosen = jnp.sum(scores, axis=-1, where=is_target)
        entropy = normalizer - jnp.sum(jax.nn.softmax(scores, axis=-1) * scores, axis=-1)
        return chosen - normalizer, jax.lax.stop_gradient(entropy)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, -1, chunk, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :length]

    if chunk == length:
        return score((hidden, targets))
    logprobs, entropies = jax.lax.map(score, (split(hidden), split(targets)))
    return join(logprobs), join(entropies)


def score_rows(config: model.DecoderConfig, params: model.Params, tokens: jax.Array, *, temperature: float,
               chunk: int) -> tuple[jax.Array, jax.Array]:
    """Log-prob of every token given what stands before it, and the entropy there: float32[B, N], 0 at position 0."""
    hidden = model.forward(config, params, tokens)[:, :-1]
    head = model.head(params).astype(config.dtype)
    scored = token_logprobs(hidden, head, tokens[:, 1:], temperature=temperature, chunk=chunk)
    logprobs, entropies = (jnp.pad(x, ((0, 0), (1, 0))) for x in scored)
    return logprobs, entropies


def token_weights(mask: jax.Array, aggregation: str) -> jax.Array:
    """How much each response token counts in the loss; the weights of a batch sum to 1.

    Computed once for the whole batch, so that the loss is a plain sum and no split into micro-batches can change it.
    Args: mask bool[B, N]; aggregation: token_mean, all tokens alike, or sequence_mean, all responses alike.
    Returns: float32[B, N]."""
    tokens = jnp.sum(mask, axis=-1, keepdims=True).astype(jnp.float32)
    if aggregation == "token_mean":
        return mask / jnp.maximum(jnp.sum(tokens), 1.0)
    return mask / jnp.maximum(tokens, 1.0) / jnp.maximum(jnp.sum(tokens > 0), 1)


def policy_loss(logprobs: jax.Array, experience: Experience, weights: jax.Array, *, clip_ratio: float,
                kl_loss_coefficient: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The clipped policy gradient, summed over tokens by weight; REINFORCE where the policy still is the sampler's.

    With ratio = pi / pi_old, loss = -min(ratio A, clip(ratio) A); at ratio = 1 its gradient is -A grad log pi.
    kl_loss_coefficient > 0 adds the k3 estimate of KL(pi || reference), exp(d) - d - 1 with d = log reference - log pi.
    Args: logprobs float32[B, N]; weights float32[B, N], 0 outside responses.
    Returns: the loss and sums by weight: kl (k3), clip_share.
    Source: arXiv 1707.06347; the k's: joschu.net/blog/kl-approx."""
    # Outside the responses log-probs are anything: without the `where` their ratios could overflow to inf * 0.
    log_ratio = jnp.where(experience.mask, logprobs - experience.old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_ratio, 1.0 + clip_ratio)
    gain = jnp.minimum(ratio * experience.advantages, clipped * experience.advantages)
    drift = jnp.where(experience.mask, experience.reference_logprobs - logprobs, 0.0)
    kl = jnp.exp(drift) - drift - 1.0
    loss = jnp.sum(weights * (kl_loss_coefficient * kl - gain))
    is_clipped = clipped * experience.advantages < ratio * experience.advantages
    return loss, {"kl": jnp.sum(weights * kl), "clip_share": jnp.sum(weights * is_clipped)}


def parts(tree: Any, count: int) -> Any:
    """Rows [B, ...] as `count` parts [count, B / count, ...]; row b goes to part b % count.

    So each device keeps its own rows, and every part is spread over all devices."""
    def split(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)
        return sharding.constrain(x, "layers", "batch", *("sequence",) * (x.ndim - 2))

    return jax.tree.map(split, tree)


def update(state: TrainState, experience: Experience, *, config: model.DecoderConfig, loss: LossConfig,
           optimizer: optax.GradientTransformation, micro_batches: int) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step on B rows, gradients summed over M micro-batches of B / M rows.

    Returns: the state (its `step` unchanged: that counts training steps) and float32 metrics."""
    weights = token_weights(experience.mask, loss.aggregation)

    def of_rows(params: model.Params, rows: tuple[Experience, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        experience, weights = rows
        logprobs, entropies = score_rows(config, params, experience.tokens, temperature=loss.temperature,
                                         chunk=loss.logprob_chunk)
        value, sums = policy_loss(logprobs, experience, weights, clip_ratio=loss.clip_ratio,
                                  kl_loss_coefficient=loss.kl_loss_coefficient)
        return value, sums | {"loss": value, "entropy": jnp.sum(weights * entropies)}

    def accumulate(total: Any, rows: tuple[Experience, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.grad(of_rows, has_aux=True)(state.params, rows)), None

    nothing = jax.tree.map(jnp.zeros_like, state.params), dict.fromkeys(
        ("loss", "kl", "clip_share", "entropy"), jnp.zeros((), jnp.float32))
    (gradients, metrics), _ = jax.lax.scan(accumulate, nothing, parts((experience, weights), micro_batches))
    changes, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, changes)
    metrics |= {"grad_norm": optax.tree.norm(gradients)}
    return dataclasses.replace(state, params=params, optimizer=optimizer_state), metrics


def make_optimizer(learning_rate: float, beta1: float, beta2: float, weight_decay: float, max_grad_norm: float,
                   warmup_updates: int) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip; the rate rises linearly over the warm-up and stays."""
    schedule = optax.linear_schedule(learning_rate / max(warmup_updates, 1), learning_rate, max(warmup_updates - 1, 0))
    return optax.chain(optax.clip_by_global_norm(max_grad_norm),
                       optax.adamw(schedule, b1=beta1, b2=beta2, weight_decay=weight_decay))


def state_sharding(config: model.DecoderConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where every leaf of the state lives: moments beside their weights, counters everywhere."""
    params = sharding.tree_sharding(mesh, model.logical_axes(config))
    replicated: Any = sharding.sharding(mesh)
    abstract = jax.eval_shape(optimizer.init, model.abstract_params(config))
    placed = optax.tree_utils.tree_map_params(optimizer, lambda _, target: target, abstract, params,
                                              transform_non_params=lambda _: replicated)
    return TrainState(params=params, optimizer=placed, step=replicated)


def make_initial_state(optimizer: optax.GradientTransformation, targets: TrainState) -> Callable[..., TrainState]:
    """params -> the state before the first step; takes the params over."""
    def fresh(params: model.Params) -> TrainState:
        return TrainState(params=params, optimizer=optimizer.init(params), step=jnp.zeros((), jnp.int32))

    return jax.jit(fresh, out_shardings=targets, donate_argnums=0)


def make_scorer(config: model.DecoderConfig, mesh: Mesh, loss: LossConfig, *,
                micro_batches: int) -> Callable[[model.Params, jax.Array], jax.Array]:
    """score(params, tokens int32[B, N]) -> log-probs float32[B, N] by the trainer's own forward pass."""
    rows = sharding.sharding(mesh, "batch", "sequence")
    params = sharding.tree_sharding(mesh, model.logical_axes(config))

    def score(params: model.Params, tokens: jax.Array) -> jax.Array:
        def of_rows(tokens: jax.Array) -> jax.Array:
            return score_rows(config, params, tokens, temperature=loss.temperature, chunk=loss.logprob_chunk)[0]

        return jnp.moveaxis(jax.lax.map(of_rows, parts(tokens, micro_batches)), 0, 1).reshape(tokens.shape)

    return jax.jit(score, in_shardings=(params, rows), out_shardings=rows)


def make_update(config: model.DecoderConfig, mesh: Mesh, loss: LossConfig, optimizer: optax.GradientTransformation,
                targets: TrainState, *, micro_batches: int,
                updates: int = 1) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """step(state, experience) -> (state, metrics), jitted; the old state's memory becomes the new one's.

    Args: updates, optimiser updates made from the experience, each on its own part of the rows; micro_batches, of each.
    Returns: besides the state, with `step` one higher, the metrics' means over the updates."""
    rows = sharding.sharding(mesh, "batch", "sequence")
    one = functools.partial(update, config=config, loss=loss, optimizer=optimizer, micro_batches=micro_batches)

    def step(state: TrainState, experience: Experience) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = jax.lax.scan(one, state, parts(experience, updates))
        return dataclasses.replace(state, step=state.step + 1), jax.tree.map(jnp.mean, metrics)

    return jax.jit(step, in_shardings=(targets, rows), out_shardings=(targets, sharding.sharding(mesh)),
                   donate_argnums=0)
