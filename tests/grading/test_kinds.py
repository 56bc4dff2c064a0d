"""Multiple choice and plain text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effreason.grading.kinds import Reference, same_choice, same_text

CHOICES = ("river", "bank", "a bank", "Vitamin C", "2", "bee hive")


@pytest.mark.parametrize("answer", [
    "B", "(B)", "[B]", "B.", "B)", "B:", "b", "(b)", "$B$", r"\text{B}", r"\textbf{(B)}",
    r"\mathrm{B}", r"\boxed{B}",
    "**B**", "B) bank", "(B) bank", "B. bank", "B: bank", "B - bank", "B – bank", "B bank",
    "**B.** bank",
    r"\text{(B) }\text{bank}", r"\text{B) bank}", r"(B)\ \text{bank}", r"\textbf{(B)}~bank",
    "bank (B)", "option B",
    "Option (B)", "Choice (B)", "Answer: B", "The answer is B", "answer: (B) bank", "bank", "Bank.",
    r"\text{bank}",
    '"bank"', "  bank ",
])
def test_right_choice(answer):
    assert same_choice(answer, Reference("B", "choice", CHOICES))
    assert same_choice(answer, Reference("bank", "choice", CHOICES))


@pytest.mark.parametrize("answer", ["A", "(B) river", "A) bank", "A, B", "A and B", "(A)(B)",
                                    "B or C", "not B", "B, not A", "BB", "AB", "G", "Z", "",
                                    "a bank", "river", "banks", "B) a bank", "bank or river",
                                    "river (B)", "bank (A)", "5", "B?A", "neither",])
def test_wrong_choice(answer):
    assert not same_choice(answer, Reference("B", "choice", CHOICES))


@pytest.mark.parametrize(("answer", "reference", "right"), [
    ("a bank", "C", True), ("A bank", "C", True), ("a bank", "A", False),
    ("D) Vitamin C", "D", True),
    ("Vitamin C", "D", True), ("E", "E", True), ("2", "E", True), ("2.0", "E", True),
    ("beehive", "F", False),
    ("H", "H", False), ("pond", "pond", False),  # references beyond the choices
])
def test_choices_with_traps(answer, reference, right):
    assert same_choice(answer, Reference(reference, "choice", CHOICES)) is right


@pytest.mark.parametrize(("answer", "reference", "right"), [
    ("B", "B", True), ("B) bank", "B", True), ("B bank", "B", True), ("B. x = 42", "B", True),
    ("E", "E", True),
    ("(A) The falcon is the second from the left", "A", True), ("(B) bank", "bank", True),
    ("B", "(B)", True),
    ("B) or C", "B", False), ("B) not A", "B", False), ("B, C", "B", False),
    ("(B) (C)", "B", False),
    ("bank", "B", False), ("A bank", "A", False), ("(B", "B", False),
])
def test_choices_unknown(answer, reference, right):
    assert same_choice(answer, Reference(reference, "choice")) is right


def test_a_choice_may_speak_of_choices():
    reference = Reference("B", "choice", ("died", "answer question", "no other choice"))
    assert all(same_choice(answer, reference)
               for answer in ("(B) answer question", "answer question", "Answer: B"))
    assert same_choice("(C) no other choice", Reference("C", "choice", reference.choices))


def test_choices_of_one_text_are_one_choice_by_text_only():
    reference = Reference("A", "choice", ("bent", "bent", "straight"))
    assert same_choice("bent", reference) and same_choice("A", reference)
    assert not same_choice("B", reference)


@pytest.mark.parametrize(("answer", "reference", "right"), [
    ("Yes", "yes", True), (r"\text{Yes}", "yes", True), ("Yes.", "yes", True),
    (" new   york", "New York", True),
    ("$5$", "5", True), ("“yes”", "yes", True), ("don’t", "don't", True),
    (r"\textbf{New} York", "new york", True),
    ("5.0", "5", False), ("1,000", "1000", False), ("x²", "x2", False), (".5", "5", False),
    ("-5", "5", False),
    ("$5", "5", False), ("5%", "5", False), ("", ".", False), ("newyork", "new york", False),
    ("1/2", "0.5", False),
])
def test_text(answer, reference, right):
    assert same_text(answer, Reference(reference, "text")) is right


@given(st.text(max_size=30), st.text(max_size=10), st.lists(st.text(max_size=5), max_size=4))
def test_kinds_never_raise(answer, reference, choices):
    assert same_choice(answer, Reference(reference, "choice", tuple(choices))) in (True, False)
    assert same_text(answer, Reference(reference, "text")) in (True, False)
