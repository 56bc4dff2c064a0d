"""The dial: one run trains the weights of every alpha at once.

Each group of a step has an alpha, and responses from the weights that the dial gives at that alpha:
base + common adapter + setting * dial adapter, see `lm.adapters`.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from effreason.runtime.config import RewardConfig
from effreason.runtime.errors import UserError


def split_name(name: str) -> tuple[str, float | None]:
    """Splits RUN@0.2 into the run and the alpha of its dial; the alpha is None without @."""
    run, at, alpha = name.rpartition("@")
    if not at or not re.fullmatch(r"0|0?\.[0-9]+", alpha):
        return name, None
    return run, float(alpha)


def find_run(name: str) -> tuple[Path, str | None, float | None] | None:
    """Returns the run that the name of a model means, its checkpoint and the alpha of its dial.

    The checkpoint is None for the newest, the alpha if the name has none. None = the name is not
    RUN/checkpoints/STEP, the same with @ALPHA, or RUN@ALPHA, or RUN is no run."""
    text, alpha = split_name(name)
    path = Path(text)
    is_checkpoint = path.is_dir() and path.parent.name == "checkpoints"
    run = path.parents[1] if is_checkpoint else path
    if not (is_checkpoint or alpha is not None) or not (run / "config.yaml").is_file():
        return None
    return run, path.name if is_checkpoint else None, alpha


def checked_setting(config: RewardConfig, alpha: float | None, name: str) -> float | None:
    """Returns the setting of a run's dial for an alpha; None if the run has no dial.

    Args:
        alpha: None = the run's reward.alpha.
        name: of the run, for messages.

    Raises:
        UserError: the run has no dial, or the alpha is beyond it."""
    alphas = config.dial
    if not alphas:
        if alpha is not None:
            raise UserError(f"{name}: an alpha can be chosen for a run with a dial, reward.alphas; "
                            f"this one was trained with alpha {config.alpha:g} alone")
        return None
    alpha = config.alpha if alpha is None else alpha
    if not 0 <= alpha <= alphas[-1]:
        raise UserError(f"{name}: the dial was trained for alphas from 0 to {alphas[-1]:g}, got "
                        f"{alpha:g}")
    return setting(alpha, alphas[-1])


def setting(alpha: float, largest: float) -> float:
    """Returns the setting of the dial for an alpha, in proportion: 1 at the largest.

    So the weights at each alpha move about as far as a run with that alpha alone moves them
    (docs/dial.md).

    Args:
        alpha: in [0, largest].
        largest: the largest alpha of the training, > 0.
    """
    return alpha / largest


def untrained(alphas: Sequence[float]) -> tuple[float, ...]:
    """Returns alphas between those of the training, greater than 0, to evaluate the dial at."""
    positive = [alpha for alpha in alphas if alpha > 0]
    return tuple((one + other) / 2 for one, other in itertools.pairwise(positive))


def metrics(alphas: Float[np.ndarray, " P"], correct: Bool[np.ndarray, "P G"],
            lengths: Int[np.ndarray, "P G"]) -> dict[str, float]:
    """Returns accuracy and tokens of a step's responses at each alpha."""
    by_alpha: dict[str, float] = {}
    for alpha in np.unique(alphas).tolist():
        groups = alphas == alpha
        by_alpha |= {f"dial/accuracy_at_{alpha:g}": float(correct[groups].mean()),
                     f"dial/tokens_at_{alpha:g}": float(lengths[groups].mean())}
    return by_alpha


def assign(alphas: Sequence[float], prompts: int, step: int) -> Float[np.ndarray, " P"]:
    """Returns the alpha of each group of a step, a function of the step alone.

    Alphas take turns: over the steps each has the same number of groups, or one more.
    """
    turns = (step * prompts + np.arange(prompts)) % len(alphas)
    return np.asarray(alphas)[turns]
