"""Measures how a reward and an advantage push on length, in a step or on saved responses.

P prompts, G responses for each prompt (the group), B = P * G responses, T response tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from effreason.rl import advantages
from effreason.rl.advantages import PARTS
from effreason.rl.configured_reward import Reward

ADVANTAGES = ("loo", "whiten", "group_std", "whiten_responses", "decouple")
AGGREGATIONS = ("token_mean", "sequence_mean")
Parts = dict[str, jax.Array]         # advantages by the names in PARTS
NOISE = 1e-6                        # an advantage closer to 0 is rounding in float32


def metrics(parts: Parts, weights: Float[Array, "B T"], mask: Bool[Array, "B T"],
            lengths: Int[Array, "P G"]) -> dict[str, jax.Array]:
    """Measures what an update is made of: each part's share of its size, and its pull on length.

    A response is pushed as a whole by its tokens' mean of weight * part: under token_mean by its
    advantage, under sequence_mean by its advantage over its length, so that even a constant pulls.

    Args:
        parts: of the tokens' advantages.
        weights: of the tokens in the loss; the pulls are in units of their mean.
        mask: True on response tokens.
        lengths: response tokens through EOS.
    """
    tiny = jnp.finfo(jnp.float32).tiny
    sizes = {name: jnp.sum(weights * jnp.abs(parts[name])) for name in PARTS}
    total = jnp.maximum(sum(sizes.values()), tiny)

    tokens = jnp.maximum(lengths, 1).astype(jnp.float32)
    unit = jnp.sum(mask).astype(jnp.float32) / jnp.maximum(jnp.sum(weights), tiny)

    def pull(part: Float[Array, "B T"]) -> Float[Array, ""]:
        push = unit * jnp.sum(weights * part, axis=-1).reshape(tokens.shape) / tokens
        return advantages.length_pull(push, lengths)

    return ({f"update_share/{name}": size / total for name, size in sizes.items()}
            | {f"length_pull/{name}": pull(parts[name]) for name in PARTS})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """Graded responses, on the host."""

    correct: np.ndarray             # bool[P, G]
    lengths: np.ndarray             # int32[P, G], response tokens through EOS

    @property
    def all_correct(self) -> np.ndarray:
        """Marks the groups with correct responses only: bool[P]."""
        return np.all(self.correct, axis=1)

    @property
    def mixed(self) -> np.ndarray:
        """Marks the groups with correct and wrong responses: bool[P]."""
        return np.any(self.correct, axis=1) & ~self.all_correct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """A statistic of all-correct and of mixed groups; None if there are no such groups."""

    all_correct: float | None
    mixed: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PressureReport:
    """One advantage at one alpha. Pulls are in tokens, towards shorter responses if negative."""

    advantage: str
    alpha: float | None             # None: the reward has none; 0: correctness alone
    groups_with_signal: float       # share of the groups whose rewards differ
    size: Sizes                     # mean |advantage|
    size_ratio: Sizes               # to the size at alpha 0.1, or at the first alpha greater than 0
    punished: int                   # correct responses with a negative advantage
    punished_from: int | None       # fewest correct responses in a group that has such a response
    pull_within: Sizes              # mean over the responses of such groups
    pull: float                     # mean over all responses; the sum of the next three
    pull_accuracy: float            # by the part accuracy
    pull_length: float              # by the part length
    pull_normalisation: float       # by the part normalisation


Split = Callable[[Groups, float], tuple[np.ndarray, np.ndarray, Parts]]


def correctness(correct: jax.Array, lengths: jax.Array, alpha: jax.Array) -> jax.Array:
    """Rewards the control: 1 if correct, whatever the length."""
    return correct.astype(jnp.float32)


def make_split(reward: Reward, advantage: str) -> Split:
    """Compiles split(groups, alpha) -> rewards, advantages and their parts, [P, G] each.

    Args:
        advantage: one of ADVANTAGES. Whitening takes all groups as one batch.
    """
    @jax.jit
    def split(correct: jax.Array, lengths: jax.Array, alpha: jax.Array
              ) -> tuple[jax.Array, jax.Array, Parts]:
        rewards = reward(correct, lengths, alpha)
        total, parts = advantages.split_rewards(
            correct, rewards, by_group_std=advantage == "group_std",
            length_weight=alpha if advantage == "decouple" else None)

        if advantage in ("whiten", "whiten_responses"):
            tokens = lengths.astype(jnp.float32) if advantage == "whiten" else 1
            total, parts = advantages.split_advantages(total, parts, jnp.ones_like(correct),
                                                       tokens=tokens)

        return rewards, total, parts

    def split_groups(groups: Groups, alpha: float) -> tuple[np.ndarray, np.ndarray, Parts]:
        return jax.device_get(split(groups.correct, groups.lengths, np.float32(alpha)))

    return split_groups


def pull(part: np.ndarray | jax.Array, groups: Groups, aggregation: str,
         among: np.ndarray | None = None) -> float | None:
    """Computes `advantages.length_pull` of advantages as the loss weighs them.

    A mean over tokens weighs all alike. A mean over responses of the mean over each one's tokens
    weighs a token of a response of mean length the same, and one of a shorter response more.

    Args:
        part: float32[P, G].
        aggregation: one of AGGREGATIONS.
        among: bool[P], only these groups.

    Returns:
        Tokens; None if there is no group.
    """
    weights = np.ones_like(part) if aggregation == "token_mean" else (
        groups.lengths.mean() / np.maximum(groups.lengths, 1)).astype(np.float32)
    rows = np.ones(len(part), bool) if among is None else among
    if not rows.any():
        return None
    return float(advantages.length_pull((weights * part)[rows], groups.lengths[rows]))


def reference_alpha(alphas: Sequence[float | None]) -> float | None:
    """Returns the alpha whose sizes the others are compared with: 0.1, or the first."""
    return 0.1 if 0.1 in alphas else alphas[0]


def reports(groups: Groups, reward: Reward, alphas: Sequence[float | None], advantage: str,
            aggregation: str) -> list[PressureReport]:
    """Reports on the control, correctness alone, and then on each alpha, with one advantage.

    Args:
        alphas: greater than 0, or None for a reward that has none.
    """
    control, shaped = make_split(correctness, advantage), make_split(reward, advantage)
    results = [_report(groups, *control(groups, 0.0), advantage, 0.0, aggregation)]
    results += [_report(groups, *shaped(groups, alpha or 0.0), advantage, alpha, aggregation)
              for alpha in alphas]

    base = results[1 + list(alphas).index(reference_alpha(alphas))] if alphas else results[0]
    return [dataclasses.replace(report, size_ratio=Sizes(
        all_correct=_ratio(report.size.all_correct, base.size.all_correct),
        mixed=_ratio(report.size.mixed, base.size.mixed))) for report in results]


def _report(groups: Groups, rewards: np.ndarray, total: np.ndarray, parts: Parts,
            advantage: str, alpha: float | None, aggregation: str) -> PressureReport:
    punished = groups.correct & (total < -NOISE)
    has_punished = punished.any(axis=1)

    def size(among: np.ndarray) -> float | None:
        return float(np.abs(total[among]).mean()) if among.any() else None

    accuracy, length, normalisation = (
        pull(part, groups, aggregation) or 0.0
        for part in (parts["accuracy"], parts["length"], parts["normalisation"]))
    return PressureReport(
        advantage=advantage, alpha=alpha,
        groups_with_signal=float((np.ptp(rewards, axis=1) > 0).mean()),
        size=Sizes(all_correct=size(groups.all_correct), mixed=size(groups.mixed)),
        size_ratio=Sizes(all_correct=None, mixed=None), punished=int(punished.sum()),
        punished_from=(int(groups.correct.sum(axis=1)[has_punished].min())
                       if has_punished.any() else None),
        pull_within=Sizes(all_correct=pull(total, groups, aggregation, groups.all_correct),
                          mixed=pull(total, groups, aggregation, groups.mixed)),
        pull=accuracy + length + normalisation, pull_accuracy=accuracy, pull_length=length,
        pull_normalisation=normalisation)


def _ratio(size: float | None, base: float | None) -> float | None:
    return None if size is None or not base else size / base
