"""Stages 4 and 5 in one program: from verdicts to what each token of the packed rows is worth.

P prompts, G responses for each prompt (the group), B = P * G, T response tokens at most.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from effreason import types
from effreason.rl import advantages, preferences, update
from effreason.runtime.config import Config
from effreason.types import Experience, Packed

# (correct bool[P, G], lengths int32[P, G], alpha float32[]) -> float32[P, G]
Reward = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Metrics = dict[str, jax.Array]
PARTS = ("accuracy", "length", "kl", "normalisation")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Credit:
    """What a step's responses have earned."""

    experience: tuple[Experience, ...]      # of each group of rows
    rewards: jax.Array                      # float32[P, G]
    advantages: jax.Array                   # float32[P, G], before the penalty for drift and what is done over tokens
    metrics: Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scored:
    """Responses as the objectives read them."""

    correct: jax.Array                      # bool[P, G]
    lengths: jax.Array                      # int32[P, G]
    rewards: jax.Array                      # float32[P, G]
    mask: jax.Array                         # bool[B, T]
    drift: jax.Array                        # float32[B, T], log-prob by the policy less that by the reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Worth:
    """What an objective says of them."""

    advantages: jax.Array                   # float32[P, G]
    of_tokens: jax.Array                    # float32[B, T]
    weights: jax.Array                      # float32[B, T]
    metrics: Metrics


def credit(correct: jax.Array, lengths: jax.Array, alpha: jax.Array, sampled: jax.Array, old: jax.Array,
           reference: jax.Array, packed: Packed, *, config: Config, reward: Reward) -> Credit:
    """Reward, baseline, KL penalty, and the options; or a baseline's choice among the responses.

    Args: correct bool[P, G]; lengths int32[P, G]; alpha float32[], an argument so that one program serves a family of
        them; the sampler's, old and reference log-probs float32[B, T]; packed, the rows that hold these responses."""
    rewards = reward(correct, lengths, alpha)
    mask = types.response_mask(lengths.reshape(-1), old.shape[1])
    drift = jnp.where(mask, old - reference, 0.0)
    objective = {"policy_gradient": _policy_gradient, "sft_shortest": _imitation, "dpo": _preference}
    worth = objective[config.update.objective](
        _Scored(correct=correct, lengths=lengths, rewards=rewards, mask=mask, drift=drift), config)
    of_tokens = worth.of_tokens
    if config.update.importance_cap is not None:
        # Last: it weighs the gradient of a token, whatever the token is worth.
        of_tokens *= advantages.truncated_importance(old, sampled, mask, config.update.importance_cap)
    values = {"weights": worth.weights, "advantages": of_tokens, "old_logprobs": old, "reference_logprobs": reference}
    experience = tuple(Experience(rows=rows, **{name: update.scatter_to_rows(value, rows)
                                                for name, value in values.items()})
                       for rows in packed.groups)
    tokens = jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
    gap = jnp.where(mask, jnp.abs(sampled - old), 0.0)
    spread = jnp.max(rewards, axis=-1) - jnp.min(rewards, axis=-1)
    metrics = {"reward/mean": jnp.mean(rewards),
               "reward/groups_with_signal": jnp.mean(spread > config.rollout.min_reward_spread),
               "reward/kl": jnp.sum(drift) / tokens,
               "rollout/mismatch": jnp.sum(gap) / tokens, "rollout/mismatch_max": jnp.max(gap)}
    return Credit(experience=experience, rewards=rewards, advantages=worth.advantages, metrics=metrics | worth.metrics)


def _policy_gradient(scored: _Scored, config: Config) -> _Worth:
    """The method's: advantages over the group, split all the way into what correctness, length and drift bring."""
    rewards, mask = scored.rewards, scored.mask
    accuracy = advantages.leave_one_out(scored.correct.astype(jnp.float32))
    advantage = advantages.leave_one_out(rewards)
    length = advantage - accuracy
    if config.advantage.group_std:
        advantage, accuracy, length = (advantages.group_std(each, rewards) for each in (advantage, accuracy, length))

    def over_tokens(of_responses: jax.Array) -> jax.Array:
        return jnp.where(mask, of_responses.reshape(-1, 1), 0.0)

    of_tokens, penalty = over_tokens(advantage), jnp.zeros(mask.shape, jnp.float32)
    if config.kl.form == "reward":
        penalty = -advantages.kl_return_to_go(config.kl.coefficient * scored.drift, mask)
        of_tokens += penalty
    shift, scale = jnp.zeros(()), jnp.ones(())
    if config.advantage.whiten:
        shift, scale = advantages.whitening(of_tokens, mask)
        of_tokens = jnp.where(mask, (of_tokens - shift) * scale, 0.0)
    if config.kl.form == "loss":
        # The slope of the k3 term, which the loss adds: worth as much as an advantage of exp(-drift) - 1.
        penalty = jnp.where(mask, config.kl.coefficient * (jnp.exp(-scored.drift) - 1.0), 0.0) / scale
    parts = (over_tokens(accuracy), over_tokens(length), penalty, jnp.where(mask, -shift, 0.0))
    weights = update.token_weights(mask, config.update.aggregation, config.update.updates_per_batch)
    return _Worth(advantages=advantage, of_tokens=of_tokens, weights=weights,
                  metrics=_pressure([scale * part for part in parts], weights, scored))


def _pressure(parts: list[jax.Array], weights: jax.Array, scored: _Scored) -> Metrics:
    """Where the update comes from: of its absolute size the share of each part, and how each pulls on length.

    A response is pushed as a whole by its tokens' mean of weight * part: under token_mean by its advantage, under
    sequence_mean by its advantage over its length, and there even a constant pulls. In units of the mean weight.
    Args: parts float32[B, T], of PARTS, which add up to the advantages; weights float32[B, T]."""
    sizes = [jnp.sum(weights * jnp.abs(part)) for part in parts]
    total = jnp.maximum(sum(sizes), jnp.finfo(jnp.float32).tiny)
    tokens = jnp.maximum(scored.lengths, 1).astype(jnp.float32)
    unit = jnp.sum(scored.mask).astype(jnp.float32) / jnp.maximum(jnp.sum(weights), jnp.finfo(jnp.float32).tiny)
    pulls = [advantages.length_pull(unit * jnp.sum(weights * part, axis=-1).reshape(tokens.shape) / tokens,
                                    scored.lengths) for part in parts]
    return ({f"update_share/{name}": size / total for name, size in zip(PARTS, sizes, strict=True)}
            | {f"length_pull/{name}": pull for name, pull in zip(PARTS, pulls, strict=True)})


def _imitation(scored: _Scored, config: Config) -> _Worth:
    """Rejection sampling: supervised learning on the shortest correct response of each group."""
    chosen = preferences.shortest_correct(scored.correct, scored.lengths)
    learnt = scored.mask & chosen.reshape(-1, 1)
    return _Worth(advantages=chosen.astype(jnp.float32), of_tokens=jnp.where(learnt, 1.0, 0.0),
                  weights=update.token_weights(learnt, config.update.aggregation),
                  metrics={"sft/chosen": jnp.mean(jnp.any(chosen, axis=-1))})


def _preference(scored: _Scored, config: Config) -> _Worth:
    """DPO of the shortest correct response of each group against the longest one, mean over the pairs."""
    beta = config.update.dpo_beta
    chosen, rejected = preferences.pairs(preferences.shortest_correct(scored.correct, scored.lengths),
                                         preferences.longest_correct(scored.correct, scored.lengths))
    margins = jnp.sum(scored.drift, axis=-1).reshape(chosen.shape)
    advantage = preferences.preference_advantages(chosen, rejected, margins, beta=beta)
    learnt = scored.mask & (chosen | rejected).reshape(-1, 1)
    is_pair = jnp.any(chosen, axis=-1)
    count = jnp.maximum(jnp.sum(is_pair), 1).astype(jnp.float32)
    gaps = beta * preferences.difference(chosen, rejected, margins)[:, 0]
    # A pair's loss sums over its tokens; the weights are of a mean, so that what is measured by them is one, too.
    tokens = jnp.sum(learnt).astype(jnp.float32)
    return _Worth(advantages=advantage, weights=update.token_weights(learnt, "token_mean"),
                  of_tokens=jnp.where(learnt, advantage.reshape(-1, 1) * tokens / count, 0.0),
                  metrics={"dpo/pairs": jnp.mean(is_pair),
                           "dpo/loss": jnp.sum(jax.nn.softplus(-gaps), where=is_pair) / count,
                           "dpo/margin": jnp.sum(gaps, where=is_pair) / count})
