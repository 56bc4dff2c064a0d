"""The search of a dial: the smallest alpha that reaches the target, by few evaluations."""

import itertools
import math
from types import SimpleNamespace

import pytest

from effreason.runs import dial_search
from effreason.runs.dial_search import Target

ALPHAS = (0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4)  # what a run evaluates by itself


def compared(ratio, change=0.0, spread=0.0):
    return SimpleNamespace(
        token_ratio=ratio, token_ratio_interval=(ratio - spread, ratio + spread),
        accuracy_change=change, accuracy_change_interval=(change - spread, change + spread))


def curve(alpha):
    """Tokens as of the tiny reasoner: they fall most between small alphas."""
    return compared(1 - 0.6 * math.sqrt(alpha / 0.4), -0.04 * alpha)


def searched(target, curve=curve, known=ALPHAS, largest=0.4):
    """The comparisons after a search, and the alphas that it evaluated."""
    table, asked = {alpha: curve(alpha) for alpha in known}, []
    while (alpha := dial_search.next_alpha(table, target, largest)) is not None:
        assert alpha not in table and 0 < alpha <= largest
        asked.append(alpha)
        table[alpha] = curve(alpha)
    return table, asked


@pytest.mark.parametrize("tokens", [0.9, 0.75, 0.6, 0.5, 0.42])
@pytest.mark.parametrize("known", [ALPHAS, (), (0.4,), (0.07, 0.31)])
def test_the_smallest_alpha_is_found_with_few_evaluations(tokens, known):
    target = Target(tokens=tokens, accuracy_drop=10.0)
    table, asked = searched(target, known=known)
    found, exact = dial_search.reached(table, target), 0.4 * ((1 - tokens) / 0.6) ** 2
    assert table[found].token_ratio <= tokens
    # In two digits, and to 1/32 of the way from 0 to the largest alpha on the square root's scale.
    step = math.sqrt(found / 0.4) - math.sqrt(exact / 0.4)
    assert 0 <= step < dial_search.RESOLUTION + 0.01 and f"{found:.2g}" == f"{found:g}"
    assert len(asked) <= (4 if known == ALPHAS else 7)
    assert searched(target, known=table)[1] == []       # the same search again asks for nothing


def test_accuracy_decides_too():
    # Of the alphas with few enough tokens, those up to 0.12 lose too much.
    def dips(alpha):
        return compared(curve(alpha).token_ratio, -0.03 if alpha <= 0.12 else -0.005)

    target = Target(tokens=0.75, accuracy_drop=1.0)
    table, _ = searched(target, dips)
    assert 0.12 < dial_search.reached(table, target) < 0.15
    assert dial_search.reached(searched(Target(tokens=0.75, accuracy_drop=3.0), dips)[0],
                               Target(tokens=0.75, accuracy_drop=3.0)) < 0.1
    # A drop of exactly what is allowed is allowed, whatever the rounding of shares.
    exactly = {0.1: compared(0.5, 589 / 600 - 595 / 600)}
    assert dial_search.reached(exactly, Target(tokens=0.5, accuracy_drop=1.0)) == 0.1


def test_what_no_alpha_reaches_is_told_with_the_nearest():
    tokens = Target(tokens=0.3, accuracy_drop=1.0)
    table, asked = searched(tokens, known=(0.05,))
    assert asked == [0.4] and dial_search.reached(table, tokens) is None
    assert dial_search.nearest(table, Target(tokens=0.3, accuracy_drop=5.0)) == 0.4

    # The tokens are reached from 0.28 on, with 3 points less; the least alpha loses least.
    def loses(alpha):
        return compared(curve(alpha).token_ratio, -0.1 * alpha)

    both = Target(tokens=0.5, accuracy_drop=1.0)
    table, asked = searched(both, loses)
    assert dial_search.reached(table, both) is None and len(asked) <= 4
    assert 0.27 < min(alpha for alpha in table if table[alpha].token_ratio <= 0.5) < 0.31


def test_the_ends_of_the_intervals_decide_if_confidence_is_wanted():
    def uncertain(alpha):
        return compared(curve(alpha).token_ratio, 0.0, spread=0.05)

    means, ends = (Target(tokens=0.6, accuracy_drop=5.0, confident=confident)
                   for confident in (False, True))
    loose, strict = (dial_search.reached(searched(target, uncertain)[0], target)
                     for target in (means, ends))
    assert uncertain(strict).token_ratio_interval[1] <= 0.6 < uncertain(loose).token_ratio + 0.05
    assert loose < strict


def test_tokens_that_do_not_fall_evenly_end_the_search():
    noise = itertools.cycle((0.03, -0.04, 0.02, -0.01))
    target = Target(tokens=0.55, accuracy_drop=1.0)
    table, asked = searched(target, lambda alpha: compared(curve(alpha).token_ratio + next(noise)))
    assert len(asked) < 12 and table[dial_search.reached(table, target)].token_ratio <= 0.55
