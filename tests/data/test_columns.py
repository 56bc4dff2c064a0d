"""What a row of a data set has in a column."""

import datetime
import decimal
import json
import math

import numpy as np
import pytest

from effreason.data import answers, columns


@pytest.mark.parametrize(("field", "value"), [
    ("answer", 1), ("reward_model.ground_truth", "3"), ("prompt[1].content", "q"),
    ("prompt.0.content", "s"), ("prompt[-1].content", "q"), ("a.b", "literal"), ("a.c.d", 2),
    ("nothing.at.all", None), ("text.truth", 5), ("text.list[0]", "x")])
def test_a_dotted_name_is_an_entry_unless_a_column_has_it(field, value):
    row = {"answer": 1, "reward_model": {"ground_truth": "3"}, "a.b": "literal",
           "a": {"b": "entry", "c.d": 2}, "nothing": None,
           "prompt": [{"content": "s"}, {"content": "q"}],
           "text": '{"truth": 5, "list": ["x"]}'}
    assert columns.lookup(row, field) == value


@pytest.mark.parametrize(("field", "found"), [
    ("x", "'x', found a, b, c"), ("x.y", "'x.y', found a, b, c"),
    ("a.y", "'a.y', found the entries x"),
    ("b[2]", "found 2 entries"), ("b.x", "found 2 entries"), ("c.x", "found no entries but int")])
def test_what_there_is_instead_of_an_entry(field, found):
    with pytest.raises(LookupError) as caught:
        columns.lookup({"a": {"x": 1}, "b": [1, 2], "c": 3}, field)
    assert found in caught.value.args[0]


@pytest.mark.parametrize(("value", "text"), [
    ("x", "x"), (3, "3"), (3.0, "3"), (0.5, "0.5"), (1e-7, "0.0000001"), (1e22, "1" + "0" * 22),
    (decimal.Decimal("3.00"), "3"), (decimal.Decimal("1E+2"), "100"), (b"caf\xc3\xa9", "caf\u00e9"),
    (decimal.Decimal("0.10"), "0.1"), (np.int64(7), "7"), (np.float32(0.5), "0.5"),
    (np.str_("x"), "x"), (datetime.date(2001, 2, 3), "2001-02-03"), (10**40, "1" + "0" * 40),
    (None, ""), (math.nan, ""), (np.float64("nan"), ""), (decimal.Decimal("nan"), "")])
def test_values_as_text(value, text):
    assert columns.as_text(value) == text


@pytest.mark.parametrize(("value", "found"), [
    (True, "found bool"), ([1], "found list"), ({"a": 1}, "found dict, name one of its entries"),
    (b"\xff", "found bytes that are not UTF-8"), (np.bool_(True), "found bool")])
def test_what_is_no_text(value, found):
    with pytest.raises(ValueError, match=found):
        columns.as_text(value)


@pytest.mark.parametrize("latex", [
    r"\frac{1}{2}", r"\text{east}", r"\boxed{8}", r"\beta", r"2\times3", r"\theta", r"a \neq b",
    r"\right)", r"\forall x", r"\binom{4}{2}", r"\rho", r"\tfrac12", r"\alpha", r"\vec{v}"])
def test_latex_that_escapes_have_eaten_is_mended(latex):
    eaten = latex.encode().decode("unicode_escape")
    assert eaten != latex and columns.is_damaged([{"content": eaten}])
    assert columns.as_text(eaten) == latex and not columns.is_damaged(latex)


@pytest.mark.parametrize("text", ["a\tb", "x\nend", "1\r\n2", "so\nequal\nnot\tan apple",
                                  "\f\n", "a\n\tu"])
def test_other_white_space_is_none(text):
    assert columns.as_text(text) == text and not columns.is_damaged(text)


SYSTEM, USER = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
RESPONSE = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(("value", "text"), [
    ([USER], "q"), (USER, "q"), ([USER, RESPONSE], "q"), ([USER, USER], "q\n\nq"),
    (json.dumps([USER]), "q"), (np.array([USER]), "q"),
    ([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "q"),
    ([{"role": "user", "content": [{"type": "text", "text": "q"}]}], "q"),
    ([{"role": "user", "content": None}], ""), ([RESPONSE], "")])
def test_the_problem_is_what_the_user_says(value, text):
    assert columns.user_text(columns.messages(value)) == text


@pytest.mark.parametrize(("value", "message"), [
    ([SYSTEM, USER], r"has a system turn, .*data\.system_prompt .*such as COLUMN\[1\]\.content"),
    ([USER, RESPONSE, USER], "turn of the user after a response"),
    ([{"role": "user", "content": [{"type": "image"}]}], "parts that are no text")])
def test_conversations_that_are_no_problem(value, message):
    with pytest.raises(ValueError, match=message):
        columns.user_text(columns.messages(value))


def test_a_system_turn_may_be_dropped():
    assert columns.user_text([SYSTEM, USER], drop_system=True) == "q"


@pytest.mark.parametrize("value", ["[1, 2]", "text", 3, None, [], ["q"], [{"text": "q"}], {"a": 1}])
def test_what_is_no_conversation(value):
    assert columns.messages(value) is None


@pytest.mark.parametrize(("value", "reference"), [
    (["3"], "3"), ([3.0], "3"), ('["3"]', "3"), ("['3']", "3"), (' ["3"] ', "3"), ("[3]", "3"),
    (["3", "three"], '["3", "three"]'), ('["3", "\u03c0"]', '["3", "\u03c0"]'), (["3", "3"], "3"),
    (["3", None, ""], "3"), ([], ""), ("[]", ""), ([None], ""), ([math.nan], ""), (None, ""),
    (np.array(["3"]), "3"), ([["3"]], "3"), ('["\\\\frac{1}{2}"]', r"\frac{1}{2}"),
    ('["\\frac{1}{2}"]', r"\frac{1}{2}"), ('["\\sqrt{2}"]', r"\sqrt{2}"),
    ("[1, 2]", "[1, 2]"), ("[0, 1)", "[0, 1)"), ("[[1, 2]]", "[[1, 2]]"), ("[x]", "[x]"),
    ("[asy] draw(); [/asy]", "[asy] draw(); [/asy]")])
def test_a_list_of_one_answer_is_it_and_of_several_any_is_right(value, reference):
    assert answers.reference(value, "whole") == reference


def test_each_answer_of_a_list_is_cut_out():
    assert answers.reference([r"so \boxed{1}", r"\boxed{2}", "none"], "boxed") == '["1", "2"]'
