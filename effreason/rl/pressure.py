"""What a reward and an advantage would do to groups of responses that are there: how large, pulling which way, and why.

P prompts, G responses for each prompt (the group).
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from effreason.rl import advantages
from effreason.rl.configured_reward import Reward

ADVANTAGES = ("loo", "whiten", "group_std")
AGGREGATIONS = ("token_mean", "sequence_mean")
NOISE = 1e-6                        # of an advantage in float32: less is nought


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """Responses that have been graded, on the host."""

    correct: np.ndarray             # bool[P, G]
    lengths: np.ndarray             # int32[P, G], response tokens through EOS

    @property
    def all_correct(self) -> np.ndarray:
        """bool[P]"""
        return np.all(self.correct, axis=1)

    @property
    def mixed(self) -> np.ndarray:
        """bool[P], True where some are right and some are wrong."""
        return np.any(self.correct, axis=1) & ~self.all_correct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """A number of the groups that are all correct, and of the mixed ones; None where there are none."""

    all_correct: float | None
    mixed: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PressureReport:
    """One setting: an advantage at an alpha. Pulls are `advantages.length_pull`: tokens, negative = towards shorter."""

    advantage: str
    alpha: float | None             # None = the reward has none; 0 = correctness alone
    groups_with_signal: float       # share whose advantages differ within the group
    size: Sizes                     # mean |advantage|
    size_ratio: Sizes               # to the size at alpha 0.1, or at the first alpha greater than 0
    punished: int                   # correct responses with a negative advantage
    punished_from: int | None       # fewest correct responses in a group that has such a one
    pull_within: Sizes              # mean over the responses of such groups
    pull: float                     # mean over all; the sum of the next three
    pull_accuracy: float            # of the advantages that correctness alone would give
    pull_length: float              # of what the reward's other part adds
    pull_normalisation: float       # of what whitening subtracts from all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Advantages float32[P, G], and where they come from: they are the sum of the three."""

    whole: np.ndarray
    accuracy: np.ndarray
    length: np.ndarray
    normalisation: np.ndarray


def correctness(correct: jax.Array, lengths: jax.Array, alpha: jax.Array) -> jax.Array:
    """The reward of the control: 1 where correct, whatever the length."""
    return correct.astype(jnp.float32)


def whitening(advantages: jax.Array, lengths: jax.Array, eps: float = 1e-8) -> tuple[jax.Array, jax.Array]:
    """What `advantages.whiten` subtracts, and multiplies by then, where all tokens of a response have one advantage.

    Args: advantages float32[P, G]; lengths int32[P, G]; eps, the least variance divided by. Returns: float32[] each."""
    share = lengths.astype(jnp.float32) / jnp.maximum(jnp.sum(lengths.astype(jnp.float32)), 1.0)
    mean = jnp.sum(share * advantages)
    return mean, jax.lax.rsqrt(jnp.maximum(jnp.sum(share * (advantages - mean) ** 2), eps))


def make_split(reward: Reward, advantage: str) -> Callable[[Groups, float], tuple[np.ndarray, Parts]]:
    """(groups, alpha) -> the rewards float32[P, G], and the advantages by where they come from. Compiled once.

    Args: advantage, one of ADVANTAGES. Whitening takes all groups as one batch."""
    def split(correct: jax.Array, lengths: jax.Array, alpha: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        parts: tuple[jax.Array, ...]
        rewards = reward(correct, lengths, alpha)
        whole = advantages.leave_one_out(rewards)
        accuracy = advantages.leave_one_out(correct.astype(jnp.float32))
        parts, shift = (whole, accuracy, whole - accuracy), jnp.zeros_like(whole)
        if advantage == "group_std":
            parts = tuple(advantages.group_std(part, rewards) for part in parts)
        if advantage == "whiten":
            mean, scale = whitening(whole, lengths)
            parts = (scale * (whole - mean), *(scale * part for part in parts[1:]))
            shift -= scale * mean
        return rewards, (*parts, shift)

    compiled = jax.jit(split)

    def of_groups(groups: Groups, alpha: float) -> tuple[np.ndarray, Parts]:
        rewards, parts = jax.device_get(compiled(groups.correct, groups.lengths, np.float32(alpha)))
        return rewards, Parts(whole=parts[0], accuracy=parts[1], length=parts[2], normalisation=parts[3])

    return of_groups


def pull(part: np.ndarray, groups: Groups, aggregation: str, among: np.ndarray | None = None) -> float | None:
    """`advantages.length_pull` of advantages as the loss weighs them; None where there is no group.

    A mean over tokens counts all alike. A mean over responses of the mean over each one's tokens counts a token of a
    response of mean length the same, and one of a shorter response more.
    Args: part float32[P, G]; aggregation, one of AGGREGATIONS; among bool[P], these groups alone."""
    weights = np.ones_like(part) if aggregation == "token_mean" else (
        groups.lengths.mean() / np.maximum(groups.lengths, 1)).astype(np.float32)
    rows = np.ones(len(part), bool) if among is None else among
    if not rows.any():
        return None
    return float(advantages.length_pull((weights * part)[rows], groups.lengths[rows]))


def reference_alpha(alphas: Sequence[float | None]) -> float | None:
    """The alpha whose sizes the others are compared with: 0.1, or the first."""
    return 0.1 if 0.1 in alphas else alphas[0]


def effects(groups: Groups, reward: Reward, alphas: Sequence[float | None], advantage: str,
            aggregation: str) -> list[PressureReport]:
    """The control, correctness alone, and then each alpha, with one advantage. Args: alphas, greater than 0, or None
    for a reward that has none."""
    control, shaped = make_split(correctness, advantage), make_split(reward, advantage)
    found = [_effect(groups, *control(groups, 0.0), advantage, 0.0, aggregation)]
    found += [_effect(groups, *shaped(groups, alpha or 0.0), advantage, alpha, aggregation) for alpha in alphas]
    reference = found[1 + list(alphas).index(reference_alpha(alphas))] if alphas else found[0]
    return [dataclasses.replace(effect, size_ratio=Sizes(
        all_correct=_ratio(effect.size.all_correct, reference.size.all_correct),
        mixed=_ratio(effect.size.mixed, reference.size.mixed))) for effect in found]


def _effect(groups: Groups, rewards: np.ndarray, parts: Parts, advantage: str, alpha: float | None,
            aggregation: str) -> PressureReport:
    whole, all_correct, mixed = parts.whole, groups.all_correct, groups.mixed
    punished = groups.correct & (whole < -NOISE)
    has_one = punished.any(axis=1)

    def size(among: np.ndarray) -> float | None:
        return float(np.abs(whole[among]).mean()) if among.any() else None

    accuracy, length, shift = (pull(part, groups, aggregation) or 0.0
                               for part in (parts.accuracy, parts.length, parts.normalisation))
    return PressureReport(
        advantage=advantage, alpha=alpha, groups_with_signal=float((np.ptp(rewards, axis=1) > 0).mean()),
        size=Sizes(all_correct=size(all_correct), mixed=size(mixed)), size_ratio=Sizes(all_correct=None, mixed=None),
        punished=int(punished.sum()),
        punished_from=int(groups.correct.sum(axis=1)[has_one].min()) if has_one.any() else None,
        pull_within=Sizes(all_correct=pull(whole, groups, aggregation, all_correct),
                          mixed=pull(whole, groups, aggregation, mixed)),
        pull=accuracy + length + shift, pull_accuracy=accuracy, pull_length=length, pull_normalisation=shift)


def _ratio(size: float | None, reference: float | None) -> float | None:
    return None if size is None or not reference else size / reference
