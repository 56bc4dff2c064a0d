"""Which reference answers no response can match, and those that are mended."""

import json

import pytest

from effreason.grading.exact import exact
from effreason.grading.readable import unreadable_reason


@pytest.mark.parametrize(("reference", "reason"), [
    ("", "is empty"), (" \n", "is empty"), ("nan", "no answer"), ("NaN", "no answer"),
    ("None", "no answer"), ("null", "no answer"), ("N/A", "no answer"), ("[]", "no answer"),
    ("-", "no answer"), ("['3', '5']", "a list"), ('["\\\\frac{1}{2}"]', "a list"),
    ("('3',)", "a list"), ("{'answer': 3}", "a list"), ("proof", "a proof"), ("Proof.", "a proof"),
    (r"\text{proof}", "a proof"), ("See solution", "a proof"), ("Answers may vary.", "a proof"),
    ("Prove that n is even", "a proof"), ("not provided", "a proof"), ("notfound", "a proof"),
    ("![](https://x.org/y.png)", "a picture"), ("[asy]draw((0,0));[/asy]", "a picture"),
    ("5\ufffd", "U\\+FFFD"), ("5\x00", "U\\+0000"), (r"\frac{1}{2", "braces"), ("}{", "braces"),
    ("$", "nothing to compare"),
])
def test_unreadable(reference, reason):
    with pytest.raises(AssertionError, match=reason):
        assert unreadable_reason(reference) is None, unreadable_reason(reference)


@pytest.mark.parametrize("reference", [
    "5", "-1", "[1, 2]", "(1,2)", r"\{1,2\}", r"\{", "none", r"\text{None}", "no solution", "[2,3)",
    r"\emptyset", "Provide", "Seeing", "5\n6", "x^2", "nano", "yes", r"\text{east}",
    "1, 2, 3", "f(x)=x", "中文", "九", r"\begin{cases}x=1\\y=2\end{cases}",
])
def test_readable(reference):
    assert unreadable_reason(reference) is None


@pytest.mark.parametrize(("broken", "answer"), [
    (json.loads(r'"\frac{1}{2}"'), "0.5"), ("rac{1}{2}", "0.5"),
    (json.loads(r'"5\text{ cm}"'), "5"),
    (json.loads(r'"2\times3"'), "6"), (json.loads(r'"\beta"'), r"\beta"), ("3 imes 4", "12"),
    (json.loads(r'"x \neq 2"'), r"x\ne2"), (json.loads(r'"\theta"'), r"\theta"), ("5ext{ cm}", "5"),
])
def test_commands_that_lost_their_backslash(broken, answer):
    assert unreadable_reason(broken) is None
    assert exact(answer, broken) is exact(broken, answer) is True


@pytest.mark.parametrize(("text", "answer"), [("fracture", r"\fracture"), ("brace{1}", r"\frac{1}"),
                                              ("\text", "text"), ("a\nb", r"a\nb")])
def test_words_that_lost_nothing(text, answer):
    assert exact(text, answer) is not True
