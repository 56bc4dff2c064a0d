"""Where a reference answer is first stated: the end of that statement, and nothing that only looks
like one."""

import time

import pytest

from effreason.grading.kinds import Reference
from effreason.grading.statements import end_of_answer, first_stated


def stated(text, answer, kind="math", choices=()):
    """The text up to the end of the first statement."""
    end = first_stated(text, Reference(answer, kind, choices))
    return None if end is None else text[:end]


@pytest.mark.parametrize(("text", "answer", "statement"), [
    (r"3 + 4 = 7. So \boxed{7}", "7", "3 + 4 = 7"),
    (r"= 8, no: \boxed{7}. \boxed{8}", "7", r"= 8, no: \boxed{7}"),
    ("The answer is 42.", "42", "The answer is 42"),
    ("**Answer:** 42 apples", "42", "**Answer:** 42"),
    ("the final Answer: $42$", "42", "the final Answer: $42"),
    ("= 1,000 pens", "1000", "= 1,000"), ("= $18$ in all", "18", "= $18"),
    (r"= \(18\)", "18", r"= \(18"),
    (r"costs = \$5 each", "5", r"costs = \$5"), ("=-3", "-3", "=-3"), ("= −3", "-3", "= −3"),
    ("= 3/4", "0.75", "= 3/4"), (r"= \dfrac{3}{4}$", "3/4", r"= \dfrac{3}{4}"),
    (r"= 50\%", "50", "= 50"),
    (r"= 12 - 5 = 7 (left)", "7", "= 12 - 5 = 7"),
    (r"so \boxed{\frac{\sqrt{2}}{2}}", r"\frac{\sqrt2}{2}", r"so \boxed{\frac{\sqrt{2}}{2}}"),
    (r"\boxed{(1, 2)}", "(1,2)", r"\boxed{(1, 2)}"), (r"The answer is $(1, 2)$", "(1,2)", None),
    (r"\boxed{x = 5}", "5", r"\boxed{x = 5}"),
    # An equals sign before something that only begins with the number.
    ("= 7 + 5", "7", None), ("= 70", "7", None), ("= 7.5", "7", None), ("= 7x", "7", None),
    (r"= 7 \times 2", "7", None), ("= 7^2", "7", None), ("= 7!", "7", None),
    ("= 12 x 3", "12", None),
    ("= 2/7", "2", None),
    # Of steps on a line the last one counts, up to its end, "wait", the end of the thinking, a box
    # or "answer".
    ("4+8=2;2*7=4;</think>", "2", None), ("4+8=2;2*7=4;wait;2*7=4;", "2", None),
    ("2*7=4;4+8=2;wait;=4;", "2", "2*7=4;4+8=2"),
    ("2*7=4;4+8=2;Wait, = 4", "2", "2*7=4;4+8=2"), ("= 7\n= 8", "7", "= 7"),
    ("= 7, = 8\n", "7", None),
    ("= 7; x</think>= 8", "7", "= 7"), ("= 7; x = y", "7", None),
    (r"= 7 \boxed{8} = 9", "7", "= 7"),
    ("= 7, the answer is 8 = 9", "7", "= 7"), ("= 7 awaits = 8", "7", None),
    ("the answer is 7 = 8", "7", "the answer is 7"),
    # No statement at all.
    ("7 pens", "7", None), (r"\boxed{7", "7", None), ("x >= 7", "7", None), ("x != 7", "7", None),
    ("", "7", None),
    ("= 5", "five", None), ("= 1/0", "7", None), (r"= \frac{1}{0}", "7", None),
    ("answer", "7", None)])
def test_the_first_statement(text, answer, statement):
    assert stated(text, answer) == statement


def test_choices_and_words():
    choices = ("bank", "mall")
    assert stated("A bank? The answer is (B) mall, since", "B", "choice",
                  choices) == "A bank? The answer is (B) mall"
    assert stated("The answer is bank. \\boxed{B}", "B", "choice",
                  choices) == "The answer is bank. \\boxed{B}"
    assert stated("x = B", "B", "choice", choices) is None
    assert stated("the answer is: Paris!", "paris", "text") == "the answer is: Paris"


def test_the_end_of_the_answer():
    assert end_of_answer(r"\boxed{1} and \boxed{\frac{1}{2}} then") == len(
        r"\boxed{1} and \boxed{\frac{1}{2}}")
    assert end_of_answer("no box") == 6 and end_of_answer(r"open \boxed{1") == len(r"open \boxed{1")


@pytest.mark.parametrize("text", ["= " + " " * 200_000, "answer is " + "$ " * 100_000,
                                  "answer is " * 20_000, r"\boxed{" * 30_000, "= 1" * 60_000,
                                  "answer" + " " * 200_000, "= 1," * 50_000,
                                  "answer is " + "x " * 100_000, r"\boxed{x^2+3} = y " * 10_000])
def test_the_time_is_linear_in_the_length(text):
    started = time.process_time()
    assert first_stated(text, Reference("7")) is None
    first_stated(text, Reference("x^5"))
    end_of_answer(text)
    assert time.process_time() - started < 5.0
