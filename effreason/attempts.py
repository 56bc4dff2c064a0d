"""Stages 2 and 3 at once: responses are graded while others are still being generated.

B = P * G rows, in the order of prompts, then samples.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from effreason.errors import UserError
from effreason.grades import Grade, Grader
from effreason.grading.kinds import Gold
from effreason.lm import model
from effreason.records import Problem, Response, Rollouts
from effreason.rollouts import Sampler, collect

GRADED_AT_ONCE = 512                # responses under one grade.step_budget_seconds
UNDECIDED_LIMIT = 0.02              # share of answers the grader may fail to decide, ...
UNDECIDED_FEW = 2                   # ... beyond so many, which say nothing of a share

Watch = Callable[[int, int, int], None]     # finished responses, all responses, tokens so far


class Undecided(UserError):
    """The grader is too slow or broken for its verdicts to mean anything."""


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """Groups of responses with what the grader says of them."""

    rollouts: Rollouts
    texts: list[str]                # B, without special tokens; think tags are ordinary tokens and stay
    correct: np.ndarray             # bool[P, G]: the verdict, and that the response ended where EOS is required
    verdicts: list[Grade]           # B, on the text alone
    grading_seconds: float          # that grading took beyond the generation


def generate(sampler: Sampler, params: model.Params, problems: Sequence[Problem], group_size: int, key: jax.Array,
             max_new_tokens: int, watch: Watch,
             submit: Callable[[list[Response]], None] = lambda finished: None) -> Rollouts:
    """Runs the sampler to its end.

    Args: watch, called after every chunk, may raise to stop it; submit, given the responses of each chunk."""
    responses: list[Response] = []
    tokens, total = 0, len(problems) * group_size
    watch(0, total, 0)
    for finished in sampler(params, problems, group_size, key, max_new_tokens):
        responses += finished
        tokens += sum(len(response.tokens) for response in finished)
        if finished:
            submit(finished)
        watch(len(responses), total, tokens)
    return collect(problems, responses, group_size)


def attempt(sampler: Sampler, params: model.Params, problems: Sequence[Problem], group_size: int, key: jax.Array,
            max_new_tokens: int, *, tokenizer: Any, grader: Grader, require_eos: bool, watch: Watch) -> Attempts:
    """Samples and grades a group of responses to each problem.

    Args: require_eos, a response that was cut off at the token limit is wrong whatever its text holds.
    Raises: Undecided when too many answers stay undecided: they would count as wrong for no fault of the model."""
    texts: dict[tuple[int, int], str] = {}
    waiting: list[tuple[list[tuple[int, int]], Any]] = []
    budgets = [grader.budget() for _ in range(0, len(problems) * group_size, GRADED_AT_ONCE)]

    def submit(finished: list[Response]) -> None:
        budget = budgets[len(texts) // GRADED_AT_ONCE]
        names = [(response.prompt, response.sample) for response in finished]
        decoded = tokenizer.batch_decode([response.tokens for response in finished], skip_special_tokens=True)
        texts.update(zip(names, decoded, strict=True))
        asked = [problems[prompt] for prompt, _ in names]
        # Where the prompt has opened the thinking, a response that never closes it has no answer.
        whole = ["<think>" * problem.opens_thinking + text for problem, text in zip(asked, decoded, strict=True)]
        waiting.append((names, grader.submit(whole, [gold(problem) for problem in asked], budget)))

    rollouts = generate(sampler, params, problems, group_size, key, max_new_tokens, watch, submit)
    generated = time.monotonic()
    graded = {name: grade for names, grades in waiting
              for name, grade in zip(names, grades.result(), strict=True)}
    rows = sorted(graded)           # prompt by prompt: `collect` has checked that all are there
    verdicts = [graded[row] for row in rows]
    check_decided(verdicts)
    correct = np.array([verdict.correct for verdict in verdicts]).reshape(rollouts.lengths.shape)
    return Attempts(rollouts=rollouts, texts=[texts[row] for row in rows], verdicts=verdicts,
                    correct=correct & rollouts.ended if require_eos else correct,
                    grading_seconds=time.monotonic() - generated)


def gold(problem: Problem) -> Gold:
    """What the grader needs of a problem."""
    return Gold(problem.answer, problem.kind, problem.choices)


def unmatched(grader: Grader, problems: Sequence[Problem]) -> list[int]:
    """The places of problems whose reference answer the grader cannot match with itself: no response is ever right."""
    return grader.check_golds([gold(problem) for problem in problems])


def check_decided(verdicts: Sequence[Grade]) -> None:
    """Raises Undecided when the grader has left more answers undecided than can be passed over."""
    undecided = [verdict for verdict in verdicts if verdict.status in ("error", "budget")]
    if len(undecided) > max(UNDECIDED_FEW, UNDECIDED_LIMIT * len(verdicts)):
        reason, count = Counter(verdict.reason for verdict in undecided).most_common(1)[0]
        late = undecided[0].status == "budget"
        raise Undecided(f"the grader could not decide {len(undecided)} of {len(verdicts)} answers, at most "
                        f"{100 * UNDECIDED_LIMIT:.0f} % are accepted; {count} of them: {reason}"
                        + ("; raise grade.step_budget_seconds or grade.workers" if late else ""))
