"""Moving alpha while a run goes on: towards a number of tokens, and away from losing accuracy."""

from effreason.runtime.config import RewardConfig

STEP = 1.5                          # alpha is multiplied or divided by so much at most, after one evaluation


def is_on(reward: RewardConfig) -> bool:
    """Whether alpha moves at all."""
    return reward.target_tokens is not None or reward.max_accuracy_drop is not None


def next_alpha(alpha: float, *, token_ratio: float, accuracy_drop: float, reward: RewardConfig) -> float:
    """Alpha until the next evaluation.

    Accuracy goes first: where more of it is lost than allowed, alpha falls. Else alpha follows the tokens, in
    proportion to how far they are from the target; without a target there is no reason to stop, and it rises.

    Args: token_ratio, mean tokens as a share of the base model's; accuracy_drop, in points, below the base model.
    Returns: alpha in [reward.alpha_min, reward.alpha_max]."""
    if reward.max_accuracy_drop is not None and accuracy_drop > reward.max_accuracy_drop:
        factor = 1 / STEP
    elif reward.target_tokens is not None:
        factor = min(max(token_ratio / reward.target_tokens, 1 / STEP), STEP)
    else:
        factor = STEP
    return min(max(alpha * factor, reward.alpha_min), reward.alpha_max)
