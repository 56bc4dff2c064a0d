"""Moves alpha during a run: towards a number of tokens, and away from losing accuracy."""

from effreason.runtime.config import RewardConfig

STEP = 1.5          # the most that alpha is multiplied or divided by after one evaluation


def is_on(reward: RewardConfig) -> bool:
    """Returns whether alpha moves at all."""
    return reward.target_tokens is not None or reward.max_accuracy_drop is not None


def next_alpha(alpha: float, *, token_ratio: float, accuracy_drop: float,
               reward: RewardConfig) -> float:
    """Returns alpha until the next evaluation, in [reward.alpha_min, reward.alpha_max].

    Accuracy goes first: if more of it is lost than allowed, alpha falls. Otherwise alpha follows
    the tokens, in proportion to their distance from the target. Without a target there is no
    reason to stop, and it rises.

    Args:
        token_ratio: mean tokens as a share of the base model's.
        accuracy_drop: points below the base model.
    """
    if reward.max_accuracy_drop is not None and accuracy_drop > reward.max_accuracy_drop:
        factor = 1 / STEP
    elif reward.target_tokens is not None:
        factor = min(max(token_ratio / reward.target_tokens, 1 / STEP), STEP)
    else:
        factor = STEP
    return min(max(alpha * factor, reward.alpha_min), reward.alpha_max)
