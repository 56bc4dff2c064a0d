"""What counts as the answer of a response."""

import time

import pytest
from grading_cases import load, messy
from hypothesis import given

from effreason.grades import extract_answer
from effreason.grading import extraction


@pytest.mark.parametrize(("response", "answer"), [
    (r"\boxed{5}", "5"),
    (r"no box: 5", None),
    ("", None),
    (r"\boxed{1} and then \boxed{2}", "2"),
    (r"\boxed{5} then \boxed{}", None),                                        # the last box decides, whatever is in it
    (r"\boxed{5} then \boxed{6", None),
    (r"\boxed{6 and again \boxed{5}", "5"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{1\right.}", r"\left\{1\right."),                          # an escaped brace does not group
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{x = \boxed{5}}", r"x = \boxed{5}"),
    (r"\fbox{5}", "5"),
    (r"\boxed {5}", "5"),
    (r"\\boxed{5}", "5"),
    (r"\boxed{5}. I have boxed the answer.", "5"),
    (r"stray } and { braces, \boxed{5}} {", "5"),
    (r"<think>\boxed{4}</think> \boxed{5}", "5"),
    (r"\boxed{4}</think> \boxed{5}", "5"),                                     # the prompt opened the thinking
    (r"\boxed{4}</think> done", None),
    (r"<think>\boxed{4}", None),                                               # cut off while thinking
    (r"<think>a</think><think>b \boxed{4}", None),
    (r"</think>\boxed{4}<think>hm", None),
    (r"a</think>b \boxed{1}</think>\boxed{2}", "2"),
])
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


def test_extract_cases():
    wrong = [case for case in load("extract.jsonl") if extract_answer(case["pred"]) != case["want"]]
    assert wrong == []


@given(messy)
def test_extract_never_raises(text):
    answer = extract_answer(text)
    assert answer is None or (answer in text and answer == answer.strip() != "")


@pytest.mark.parametrize("unit", [
    "\\boxed{", "{", "}", "\\", "\\boxed{}", "\\boxed ", "<think>", "</think>", "\\boxed{5} {", "\\boxed{\\boxed{5}}",
])
def test_extract_is_linear(unit):
    times = []
    for size in (100_000, 800_000):
        start = time.process_time()
        extract_answer("\\boxed{" + unit * (size // len(unit)))
        times.append(time.process_time() - start)
    assert times[1] < 2.0 and times[1] < 40 * times[0] + 0.1
