"""What is said, once, of a run that cannot learn."""

import types

import numpy as np
import pytest

from effreason.grading.grader import Grade
from effreason.rl.diagnosis import STEPS_WITHOUT_SIGNAL, Diagnosis, no_answers, truncation
from effreason.runtime.errors import UserError

OPEN = "thinking not closed"


def graded(*responses):
    """Args: responses, each (finish, status, reason); correct if status is exact."""
    finishes, statuses, reasons = zip(*responses, strict=True)
    found = types.SimpleNamespace(
        rollouts=types.SimpleNamespace(finish=np.array([finishes])),
        correct=np.array([[status == "exact" for status in statuses]]),
        verdicts=[Grade(status == "exact", None, status, 0.0, reason)
                  for status, reason in zip(statuses, reasons, strict=True)])
    found.sampled = (found,)
    return found


UNCLOSED, CUT = ("eos", "no_answer", OPEN), ("length", "symbolic", "compared by algebra")
NO_BOX, LOOPS = ("eos", "no_answer", "no box"), ("repetition", "no_answer", OPEN)
RIGHT, WRONG = ("eos", "exact", "decided exactly"), ("eos", "symbolic", "compared by algebra")


@pytest.mark.parametrize(("responses", "line"), [
    ([UNCLOSED] * 8, "none of 8 responses has an answer (8 thinking not closed); likely: "
     "the model writes no </think>, or data.template opens a thinking that it does not know"),
    ([CUT] * 4, "none of 4 responses has an answer (4 cut off at rollout.max_new_tokens); "
     "likely: rollout.max_new_tokens is too short; or, if responses used to end, the model has "
     "collapsed, see update.learning_rate"),
    ([NO_BOX] * 3 + [CUT], "none of 4 responses has an answer (3 no box, 1 cut off at "
     r"rollout.max_new_tokens); likely: the model is not asked for \boxed{}, see "
     "data.user_prompt; grade.function can read answers of another form"),
    ([LOOPS] * 2, "none of 2 responses has an answer (2 stopped while repeating "
     "themselves); likely: the model repeats itself, because of the template (data.template) or "
     "too many updates (update.learning_rate)"),
    ([UNCLOSED, RIGHT], None), ([NO_BOX, WRONG], None), ([CUT, WRONG], None)])
def test_a_step_without_any_answer_is_said_with_its_cause(responses, line):
    assert no_answers(graded(*responses), "rollout.max_new_tokens") == line


def test_responses_that_are_right_though_cut_off_are_answers():
    assert no_answers(graded(("length", "exact", "decided exactly"), UNCLOSED), "limit") is None


def test_a_run_whose_first_responses_are_cut_off_stops():
    few, some, most = [CUT] + [WRONG] * 9, [CUT] * 3 + [LOOPS, RIGHT, WRONG], [CUT] * 5 + [WRONG]
    assert truncation(graded(*few), 4096, 0.5) is None
    assert truncation(graded(*some), 4096, 0.5) == (
        "warning: 50% of the first 6 responses were cut off at rollout.max_new_tokens, 4,096, and "
        "count as wrong")
    with pytest.raises(UserError) as caught:
        truncation(graded(*most), 96, 0.5)
    assert str(caught.value) == (
        "83% of the first 6 responses were cut off at rollout.max_new_tokens, 96, and count as "
        "wrong; raise it, or set rollout.max_truncated to 0.84 or more to train all the same")
    assert truncation(graded(*most), 96, 0.84).startswith("warning: 83%")      # as it was told
    assert truncation(graded(*most), 96, 1.0).startswith("warning: 83% of the first 6")
    # A round that replaces groups counts too.
    refilled = graded(*most)
    refilled.sampled = (refilled, graded(*[RIGHT] * 14))
    assert truncation(refilled, 96, 0.5).startswith("warning: 25% of the first 20")


def test_each_thing_is_said_once():
    diagnosis, nothing = Diagnosis(), {"reward/groups_with_signal": 0.0}
    assert diagnosis.step(graded(RIGHT, WRONG), {"reward/groups_with_signal": 1.0}) == []
    steps = [diagnosis.step(graded(UNCLOSED), nothing) for _ in range(2 * STEPS_WITHOUT_SIGNAL)]
    assert [len(lines) for lines in steps] == [1, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert steps[0][0].startswith("warning: none of 1 responses has an answer (1 thinking")
    assert steps[4][0].startswith("warning: for 5 steps all responses of each group have had")


def test_a_step_with_a_signal_begins_the_count_again():
    diagnosis, lines = Diagnosis(), []
    for number in range(3 * STEPS_WITHOUT_SIGNAL):
        signal = float(number % STEPS_WITHOUT_SIGNAL == 0)
        lines += diagnosis.step(graded(RIGHT), {"reward/groups_with_signal": signal})
    assert lines == []
