"""Which problems count as the same."""

import dataclasses

import pytest

from effreason.data import decontamination


@dataclasses.dataclass(frozen=True)
class Item:
    text: str
    reference: str = ""


@pytest.mark.parametrize(("one", "other"), [
    ("What is  $1 + 2$?", "what is $1+2$?"), ("$x\\,$, y", "$x$, y"),
    ("\\[x = 1.\\]Find", "$x = 1.$  Find"),
    ("\\left( a \\right)", "(a)"), ("x^{2} + a_{1}", "x^2+a_1"), ("\uff11+1", "1+1"),
    ("a~b\\quad c", "abc"),
    ("\\(x\\)", "$x$"), ("2 \\, 3", "2\n3"), ("$2$ $3$", "2 3"), ("10\u00b2", "10^2"),
    ("10\u00b9\u2070", "$10^{10}$"),
    ("x\u2081 + 1", "x_1+1"), ("\\log_8 2", "\\log_82"), ("1,\\!000", "1,000"), ("2 x 3", "2x3")])
def test_copies_have_the_same_key(one, other):
    assert decontamination.key(one) == decontamination.key(other)


@pytest.mark.parametrize(("one", "other"), [
    ("$88 \\div (4 \\div 2)$", "$88 \\div 4 \\div 2$"), ("\\tan 225^\\circ", "\\tan 22.5^\\circ"),
    ("\\sin 60^\\circ", "\\sin(-60^\\circ)"), ("k > 0", "k < 0"), ("x^{12}", "x^12"),
    ("10\u00b2", "102"), ("10\u00b2\u00b3", "1023"), ("x\u2082", "x2"), ("2 3", "23"),
    ("1\\ 2", "12"), ("1$ $2", "12"),
    ("11 1", "1 11"), ("\\frac{1}{23}", "\\frac{12}{3}"), ("\\leftarrow", "arrow")])
def test_other_problems_have_other_keys(one, other):
    assert decontamination.key(one) != decontamination.key(other)


def test_the_first_of_a_kind_is_kept_across_calls():
    seen = {}
    first, repeated = decontamination.duplicates([Item("a b"), Item("c"), Item("A B")], seen)
    assert [item.text for item in first] == ["a b", "c"] and [item.text
                                                              for item in repeated] == ["A B"]
    assert decontamination.duplicates([Item("C"), Item("d")], seen) == ([Item("d")], [Item("C")])


def test_repeated_problems_with_another_answer_are_found():
    rows = [Item("a", "1"), Item("b", "$x + 1$"), Item("A", "2"), Item("B", "x+1"), Item("a", "1")]
    _, repeated = decontamination.duplicates(rows, seen := {})
    assert decontamination.contradictions(repeated, seen) == [(Item("A", "2"), "1")]


def test_held_out_problems_are_found():
    marks = decontamination.keys([Item("x = 1"), Item("y")])
    assert decontamination.contaminated([Item("X=1"), Item("z")], marks) == (
        [Item("z")], [Item("X=1")])


def test_an_example_is_one_short_line():
    assert decontamination.example(Item("a\n b")) == "'a b'"
    assert len(decontamination.example(Item("a" * 500))) < 90
