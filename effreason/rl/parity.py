"""The parity gate: the trainer must compute the log-probs that the sampler drew its tokens with.

Both run the same weights over the same tokens, one token at a time and all at once. If they
disagree, the policy that is updated is not the one that was sampled, and a run can spend days on
that without an error anywhere.
"""

from collections.abc import Mapping

from effreason.runtime.errors import UserError

LIMITS = {"bfloat16": 0.1, "float32": 0.02}     # mean gap in nats; measured ones: docs/models.md
START_TOKENS = 32                   # response tokens of the check before the first step


class Mismatch(UserError):
    """Sampler and trainer do not run the same policy."""


def limit(max_mismatch: float | None, dtype: str) -> float:
    """Returns the mean gap in nats above which a run stops: the configured one, or the dtype's."""
    return max_mismatch or LIMITS[dtype]


def check(metrics: Mapping[str, float], most: float, dtype: str, when: str) -> None:
    """Raises Mismatch if the mean gap is above `most` nats; the message lists likely causes.

    Args:
        metrics: with rollout/mismatch and rollout/mismatch_max, in nats.
        dtype: of the blocks.
        when: begins the message.
    """
    gap = metrics["rollout/mismatch"]
    if gap <= most:
        return

    causes = ["a temperature that only one of them applies",
              "positions or RoPE settings read differently",
              "prompts rendered by another template than those scored"]
    if dtype == "bfloat16":
        causes.insert(0, "bfloat16 too coarse for this model (try --model.dtype float32)")
    raise Mismatch(f"{when}: sampler and trainer give the same tokens log-probs {gap:.3g} nats "
                   f"apart on the mean, {metrics['rollout/mismatch_max']:.3g} at most; "
                   f"rollout.max_mismatch allows {most:g}. Likely causes: {'; '.join(causes)}")
