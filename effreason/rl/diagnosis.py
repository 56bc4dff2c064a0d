"""Says what keeps a run from learning: no response can be right, or no group has a signal."""

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np

from effreason.rl.rollouts import GradedRollouts
from effreason.runtime.errors import UserError
from effreason.types import FinishReason

STEPS_WITHOUT_SIGNAL = 5            # before it is said that nothing is learnt
FEW_TRUNCATED = 0.2                 # share of the first responses of which nothing is said
BOX = (r"the model is not asked for \boxed{}, see data.user_prompt; grade.function can read "
       "answers of another form")
CAUSES = {
    FinishReason.LENGTH.value: "{limit} is too short; or, if responses used to end, the model has "
                               "collapsed, see update.learning_rate",
    FinishReason.REPETITION.value: "the model repeats itself, because of the template "
                                   "(data.template) or too many updates (update.learning_rate)",
    "thinking not closed": "the model writes no </think>, or data.template opens a thinking that "
                           "it does not know"}


def no_answers(graded: GradedRollouts, limit: str) -> str | None:
    """Returns a line if no response can be right, because each was cut off or has no answer.

    Args: limit, the field that limits the length."""
    finishes = graded.rollouts.finish.reshape(-1).tolist()
    if graded.correct.any():
        return None

    reasons: Counter[str] = Counter()
    for finish, verdict in zip(finishes, graded.verdicts, strict=True):
        if finish != FinishReason.EOS:
            reasons[finish] += 1
        elif verdict.status == "no_answer":
            reasons[verdict.reason] += 1
        else:
            return None

    words = {FinishReason.LENGTH.value: f"cut off at {limit}",
             FinishReason.REPETITION.value: "stopped while repeating themselves"}
    counts = ", ".join(f"{count} {words.get(reason, reason)}"
                       for reason, count in reasons.most_common())
    cause = CAUSES.get(reasons.most_common(1)[0][0], BOX).replace("{limit}", limit)
    return f"none of {len(finishes)} responses has an answer ({counts}); likely: {cause}"


def truncation(graded: GradedRollouts, limit: int, most: float) -> str | None:
    """Returns a line if some of the first responses of a run were cut off, more than a few.

    Args:
        limit: rollout.max_new_tokens.
        most: rollout.max_truncated, the share that may be cut off.

    Raises:
        UserError: it is a larger share."""
    finish = np.concatenate([part.rollouts.finish.reshape(-1) for part in graded.sampled])
    share = float(np.mean(finish == FinishReason.LENGTH))
    words = (f"{share:.0%} of the first {len(finish)} responses were cut off at "
             f"rollout.max_new_tokens, {limit:,}, and count as wrong")
    if share > most:
        enough = math.ceil(100 * share) / 100       # rounded down it would not be
        raise UserError(f"{words}; raise it, or set rollout.max_truncated to {enough:g} or more "
                        "to train all the same")
    return f"warning: {words}" if share > FEW_TRUNCATED else None


class Diagnosis:
    """Watches the steps of a run; says each thing once."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._without_signal = 0

    def step(self, graded: GradedRollouts, metrics: Mapping[str, float]) -> list[str]:
        """Returns lines for people after a step. Args: metrics, of the step."""
        lines = []
        self._without_signal += 1
        if metrics["reward/groups_with_signal"] > 0:
            self._without_signal = 0
        for sampled in graded.sampled:
            if (line := no_answers(sampled, "rollout.max_new_tokens")) is not None:
                lines += self._once("answers", f"warning: {line}")
        if self._without_signal == STEPS_WITHOUT_SIGNAL:
            lines += self._once("signal", (
                f"warning: for {STEPS_WITHOUT_SIGNAL} steps all responses of each group have had "
                "the same reward, so nothing is learnt; the problems are too hard or too easy for "
                "the model"))
        return lines

    def _once(self, topic: str, line: str) -> list[str]:
        new = topic not in self._said
        self._said.add(topic)
        return [line] if new else []
