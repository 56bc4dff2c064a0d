"""Stages 4 and 5 in one compiled function: from verdicts to the advantage of each token.

P prompts, G responses for each prompt (the group), B = P * G responses, T response tokens.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effreason import types
from effreason.rl import advantages, preferences, pressure, update
from effreason.rl.configured_reward import Reward
from effreason.runtime.config import AdvantageConfig
from effreason.types import Experience, Packed

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Graded:
    """Graded responses, and what a correct one earns."""

    correct: Bool[Array, "P G"]
    scores: Float[Array, "P G"]             # 1 if correct, less if partly right
    ended: Bool[Array, "P G"]               # with EOS; the others were cut off
    lengths: Int[Array, "P G"]
    # An array, so that one compiled function serves every alpha; or one for each group.
    alpha: Float[Array, ""] | Float[Array, " P"]
    sampled: Float[Array, "B T"]            # log-probs of the response tokens by the sampler


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """What the updates of a step learn from."""

    experience: tuple[Experience, ...]      # for each group of packed rows
    rewards: Float[Array, "P G"]
    advantages: Float[Array, "P G"]         # of whole responses: before KL penalty and whitening


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredBatch:
    """Responses with rewards and log-probs: what an objective reads."""

    correct: Bool[Array, "P G"]
    scores: Float[Array, "P G"]
    ended: Bool[Array, "P G"]
    lengths: Int[Array, "P G"]
    alpha: Float[Array, ""] | Float[Array, " P"]
    rewards: Float[Array, "P G"]
    mask: Bool[Array, "B T"]
    # Log-prob by the policy before the step less that by the reference; 0 if not known.
    drift: Float[Array, "B T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenAdvantages:
    """What an objective gives each token to learn."""

    advantages: Float[Array, "P G"]
    token_advantages: Float[Array, "B T"]
    weights: Float[Array, "B T"]            # of the tokens in the loss
    metrics: Metrics


Objective = Callable[[ScoredBatch], TokenAdvantages]


def make_experience(graded: Graded, old: Float[Array, "B T"] | None,
                    reference: Float[Array, "B T"] | None, packed: Packed, *, reward: Reward,
                    objective: Objective, keeps_old: bool = False,
                    keeps_sampled: bool = False) -> Batch:
    """Computes rewards and advantages, and puts each token's at its place in the packed rows.

    Args:
        old: log-probs by the trainer before the step; None = the objective does not read them.
        reference: by the frozen reference; None = nothing reads them.
        packed: the rows that hold these responses.
        keeps_old, keeps_sampled: the update reads `old`, the sampler's log-probs.
    """
    scored, learnt = learn(graded, old, reference, reward=reward, objective=objective)
    values = {"weights": learnt.weights, "advantages": learnt.token_advantages,
              "old_logprobs": old if keeps_old else None, "reference_logprobs": reference,
              "sampled_logprobs": graded.sampled if keeps_sampled else None}
    in_rows: dict[str, tuple[jax.Array, ...]] = {}
    for name, value in values.items():
        if value is None:
            continue
        # One after another: each is on every device as a whole for as long as it is scattered.
        value, in_rows = jax.lax.optimization_barrier((value, in_rows))
        in_rows[name] = tuple(update.scatter_to_rows(value, rows) for rows in packed.groups)
    experience = tuple(Experience(rows=rows, **{name: arrays[group]
                                                for name, arrays in in_rows.items()})
                       for group, rows in enumerate(packed.groups))
    return Batch(experience=experience, rewards=scored.rewards, advantages=learnt.advantages)


def measure(graded: Graded, old: Float[Array, "B T"], reference: Float[Array, "B T"] | None, *,
            reward: Reward, objective: Objective, min_reward_spread: float = 0.0) -> Metrics:
    """Measures what a step learns from; see docs/metrics.md.

    Args:
        old: log-probs by the trainer before the step.
        reference: None = KL is not measured.
        min_reward_spread: a group whose rewards differ by more has a signal.
    """
    scored, learnt = learn(graded, old, reference, reward=reward, objective=objective)
    rewards, mask = scored.rewards, scored.mask
    tokens = jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
    gap = jnp.where(mask, jnp.abs(graded.sampled - old), 0.0)
    spread = jnp.max(rewards, axis=-1) - jnp.min(rewards, axis=-1)
    metrics = {"reward/mean": jnp.mean(rewards),
               "reward/groups_with_signal": jnp.mean(spread > min_reward_spread),
               "rollout/mismatch": jnp.sum(gap) / tokens, "rollout/mismatch_max": jnp.max(gap)}
    if reference is not None:
        metrics["reward/kl"] = jnp.sum(scored.drift) / tokens
    return metrics | learnt.metrics


def learn(graded: Graded, old: Float[Array, "B T"] | None, reference: Float[Array, "B T"] | None, *,
          reward: Reward, objective: Objective) -> tuple[ScoredBatch, TokenAdvantages]:
    """Computes the rewards, and what the objective makes of them."""
    correct, lengths = graded.correct, graded.lengths
    mask = types.response_mask(lengths.reshape(-1), graded.sampled.shape[1])
    drift = jnp.zeros_like(graded.sampled)
    if old is not None and reference is not None:
        drift = jnp.where(mask, old - reference, drift)
    rewards = earned(reward, correct, graded.scores, lengths, graded.alpha)
    scored = ScoredBatch(correct=correct, scores=graded.scores, ended=graded.ended, lengths=lengths,
                         alpha=graded.alpha, rewards=rewards, mask=mask, drift=drift)
    return scored, objective(scored)


def earned(reward: Reward, correct: Bool[Array, "P G"], scores: Float[Array, "P G"],
           lengths: Int[Array, "P G"],
           alpha: Float[Array, ""] | Float[Array, " P"]) -> Float[Array, "P G"]:
    """Computes the rewards; a response that is partly right earns its score in addition to what a
    wrong one does."""
    return (rewards_of_groups(reward, correct, lengths, alpha)
            + jnp.where(correct, 0.0, scores))


def rewards_of_groups(reward: Reward, correct: Bool[Array, "P G"], lengths: Int[Array, "P G"],
                      alpha: Float[Array, ""] | Float[Array, " P"]) -> Float[Array, "P G"]:
    """Computes the rewards with one alpha for all groups, or one for each."""
    if alpha.ndim == 0:
        return reward(correct, lengths, alpha)
    return jax.vmap(lambda *group: reward(group[0][None], group[1][None], group[2])[0])(
        correct, lengths, alpha)


def policy_gradient(scored: ScoredBatch, *, aggregation: str, advantage: AdvantageConfig,
                    updates: int = 1, masks_truncated: bool = False, kl_form: str = "none",
                    kl_coefficient: float = 0.0) -> TokenAdvantages:
    """The method's objective: advantages over the group; their parts become metrics.

    The KL penalty is in them only if tokens are whitened: otherwise the update subtracts it.

    Args:
        aggregation: see `update.token_weights` and `update.filled_share`.
        advantage: group_std, decouple (`advantages.split_rewards`), and what is whitened
            (`advantages.whiten`).
        updates: U, optimizer updates of the step.
        masks_truncated: responses that were cut off have no weight in the loss.
        kl_form: none, reward (a penalty on the advantages) or loss (the k3 term of the loss).
        kl_coefficient: of the penalty or the term.
    """
    mask = scored.mask
    whole, parts = advantages.split_rewards(
        scored.scores, scored.rewards, by_group_std=advantage.group_std,
        length_weight=scored.alpha if advantage.decouple else None)
    if advantage.whiten_responses:
        whole, parts = advantages.split_advantages(whole, parts, jnp.ones_like(scored.correct))
    total, parts = jax.tree.map(lambda part: jnp.where(mask, part.reshape(-1, 1), 0.0),
                                (whole, parts))

    if kl_form == "reward":
        parts["kl"] = -advantages.kl_return_to_go(kl_coefficient * scored.drift, mask)

    if advantage.whiten:
        total, parts = advantages.split_advantages(total + parts["kl"], parts, mask)

    if kl_form == "loss":
        # The loss adds the k3 term, whose slope is worth an advantage of the opposite sign.
        slope = jax.grad(lambda drift: jnp.sum(advantages.k3(drift)))(scored.drift)
        parts["kl"] = jnp.where(mask, -kl_coefficient * slope, 0.0)

    learnt = mask & scored.ended.reshape(-1, 1) if masks_truncated else mask
    weights = update.token_weights(learnt, "token_mean" if aggregation == "constant"
                                   else aggregation, updates)
    metrics = pressure.metrics(parts, weights, mask, scored.lengths)
    if aggregation == "constant":       # the weights are those of a mean, as the metrics are
        total = total * update.filled_share(learnt, updates)
    return TokenAdvantages(advantages=whole, token_advantages=total, weights=weights,
                           metrics=metrics)


def imitation(scored: ScoredBatch, *, aggregation: str) -> TokenAdvantages:
    """Rejection sampling: supervised learning on the shortest correct response of each group."""
    chosen = preferences.shortest_correct(scored.correct, scored.lengths)
    learnt = scored.mask & chosen.reshape(-1, 1)
    return TokenAdvantages(advantages=chosen.astype(jnp.float32),
                           token_advantages=jnp.where(learnt, 1.0, 0.0),
                           weights=update.token_weights(learnt, aggregation),
                           metrics={"sft/chosen": jnp.mean(jnp.any(chosen, axis=-1))})


def preference(scored: ScoredBatch, *, beta: float) -> TokenAdvantages:
    """DPO on the shortest against the longest correct response of a group, mean over the pairs."""
    chosen, rejected = preferences.pairs(
        preferences.shortest_correct(scored.correct, scored.lengths),
        preferences.longest_correct(scored.correct, scored.lengths))
    margins = jnp.sum(scored.drift, axis=-1).reshape(chosen.shape)
    advantage = preferences.preference_advantages(chosen, rejected, margins, beta=beta)

    learnt = scored.mask & (chosen | rejected).reshape(-1, 1)
    is_pair = jnp.any(chosen, axis=-1)
    count = jnp.maximum(jnp.sum(is_pair), 1).astype(jnp.float32)
    gaps = beta * preferences.difference(chosen, rejected, margins)[:, 0]

    # A pair's loss sums over its tokens. The weights are those of a mean, so the metrics that the
    # update weighs by them are means, too.
    tokens = jnp.sum(learnt).astype(jnp.float32)
    return TokenAdvantages(
        advantages=advantage, weights=update.token_weights(learnt, "token_mean"),
        token_advantages=jnp.where(learnt, advantage.reshape(-1, 1) * tokens / count, 0.0),
        metrics={"dpo/pairs": jnp.mean(is_pair),
                 "dpo/loss": jnp.sum(jax.nn.softplus(-gaps), where=is_pair) / count,
                 "dpo/margin": jnp.sum(gaps, where=is_pair) / count})
