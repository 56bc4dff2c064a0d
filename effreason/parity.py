"""The parity gate: the trainer must find the log-probs that the sampler drew its tokens with.

Both run the same weights over the same tokens, one token at a time and all at once. Where they disagree, the policy
that is updated is not the one that was sampled, and a run can spend days on that without an error anywhere.
"""

from collections.abc import Mapping

from effreason.errors import UserError
from effreason.runtime.config import Config

START_TOKENS = 32                   # response tokens of the check before the first step


class Mismatch(UserError):
    """Sampler and trainer do not run the same policy."""


def check(metrics: Mapping[str, float], config: Config, when: str) -> None:
    """Raises Mismatch where the gap is above rollout.max_mismatch; names what it may come from.

    Args: metrics, with rollout/mismatch and rollout/mismatch_max in nats; when, for the message."""
    gap, most = metrics["rollout/mismatch"], config.rollout.max_mismatch
    if gap <= most:
        return
    causes = ["a temperature that only one of them applies", "positions or RoPE settings read differently",
              "prompts rendered by another template than those scored"]
    if config.model.dtype == "bfloat16":
        causes.insert(0, "bfloat16 too coarse for this model (try --model.dtype float32)")
    raise Mismatch(f"{when}: sampler and trainer give the same tokens log-probs {gap:.3g} nats apart on the mean, "
                   f"{metrics['rollout/mismatch_max']:.3g} at most; rollout.max_mismatch is {most:g}. Likely causes: "
                   f"{'; '.join(causes)}")
