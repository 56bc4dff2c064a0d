"""The parity gate: the trainer must find the log-probs that the sampler drew its tokens with.

Both run the same weights over the same tokens, one token at a time and all at once. Where they disagree, the policy
that is updated is not the one that was sampled, and a run can spend days on that without an error anywhere.
"""

from collections.abc import Mapping

from effreason.runtime.config import Config
from effreason.runtime.errors import UserError

LIMITS = {"bfloat16": 0.1, "float32": 0.02}     # mean gap in nats; measured ones: docs/models.md
START_TOKENS = 32                   # response tokens of the check before the first step


class Mismatch(UserError):
    """Sampler and trainer do not run the same policy."""


def limit(config: Config) -> float:
    """The mean gap in nats above which a run stops."""
    return config.rollout.max_mismatch or LIMITS[config.model.dtype]


def check(metrics: Mapping[str, float], config: Config, when: str) -> None:
    """Raises Mismatch where the gap is above the limit; names what it may come from.

    Args: metrics, with rollout/mismatch and rollout/mismatch_max in nats; when, for the message."""
    gap, most = metrics["rollout/mismatch"], limit(config)
    if gap <= most:
        return
    causes = ["a temperature that only one of them applies", "positions or RoPE settings read differently",
              "prompts rendered by another template than those scored"]
    if config.model.dtype == "bfloat16":
        causes.insert(0, "bfloat16 too coarse for this model (try --model.dtype float32)")
    raise Mismatch(f"{when}: sampler and trainer give the same tokens log-probs {gap:.3g} nats apart on the mean, "
                   f"{metrics['rollout/mismatch_max']:.3g} at most; rollout.max_mismatch allows {most:g}. "
                   f"Likely causes: {'; '.join(causes)}")
