"""Loops in responses: against a brute-force search, and the same cut however the tokens arrive."""

import hypothesis.strategies as some
import numpy as np
import pytest
from hypothesis import given

from effreason.runtime.errors import UserError
from effreason.sampling import repetition
from effreason.sampling.repetition import RepetitionStopping

SMALL = RepetitionStopping(window=12, longest_period=5, grid=4)


def repeats(tokens, window, longest_period):
    """is_repeating, one comparison at a time."""
    last = list(tokens)[-window:]
    return len(last) == window and any(
        all(last[at] == last[at - period] for at in range(period, window))
        for period in range(1, longest_period + 1))


def first_cut(tokens, stopping):
    for length in range(stopping.grid, len(tokens) + 1, stopping.grid):
        if repeats(tokens[:length], stopping.window, stopping.longest_period):
            return length
    return None


def fed(tokens, sizes, stopping):
    """The cut of a response that comes in pieces of these sizes, over and over."""
    pieces, length = [], 0
    while length < len(tokens):
        pieces.append(tokens[length : length + sizes[len(pieces) % len(sizes)]])
        new = len(pieces[-1])
        length += new
        if (found := stopping.stop_length(pieces, length, new)) is not None:
            return found
    return None


@some.composite
def responses(draw):
    """Random tokens, then a block over and over, perhaps with one token changed, perhaps with
    random ones behind."""
    few = some.integers(0, 2)
    head, block = draw(some.lists(few, max_size=30)), draw(some.lists(few, min_size=1, max_size=8))
    tokens = head + block * draw(some.integers(0, 12)) + draw(some.lists(few, max_size=6))
    if tokens and draw(some.booleans()):
        tokens[draw(some.integers(0, len(tokens) - 1))] = 9
    return np.array(tokens, np.int32)


@given(responses(), some.integers(1, 6), some.integers(0, 8))
def test_repetition_is_found_as_by_brute_force(tokens, longest_period, more):
    window = 2 * longest_period + more
    found = repetition.is_repeating(tokens, window=window, longest_period=longest_period)
    assert found is repeats(tokens, window, longest_period)


@pytest.mark.parametrize("period", [1, 2, 7, 128])
def test_the_defaults_take_four_repeats_of_any_block_they_allow(period):
    block = np.random.default_rng(period).permutation(1000)[:period]
    tokens = np.concatenate([np.arange(2000, 2300), np.tile(block, 512)[:512]]).astype(np.int32)
    assert repetition.is_repeating(tokens, window=512, longest_period=128)
    assert not repetition.is_repeating(tokens, window=513, longest_period=128)
    assert period == 1 or not repetition.is_repeating(tokens, window=512, longest_period=period - 1)
    tokens[-200] = -1
    assert not repetition.is_repeating(tokens, window=512, longest_period=128)


def test_a_block_longer_than_allowed_is_no_repetition():
    tokens = np.tile(np.arange(129), 10).astype(np.int32)
    assert not repetition.is_repeating(tokens, window=512, longest_period=128)
    assert repetition.is_repeating(tokens, window=512, longest_period=129)


@given(responses(), some.lists(some.integers(1, 20), min_size=1, max_size=5))
def test_a_cut_is_the_first_length_on_the_grid_whatever_the_pieces(tokens, sizes):
    assert fed(tokens, sizes, SMALL) == first_cut(tokens, SMALL)


@pytest.mark.parametrize("chunk", [1, 16, 64, 100, 5000])
def test_a_long_response_stops_once_repetition_fills_the_window(chunk):
    tokens = np.concatenate([np.arange(700), np.tile(np.arange(31), 200)]).astype(np.int32)
    # The window is full at 700 + 512 = 1212: the next multiple of 64 is 1216.
    assert fed(tokens, [chunk], RepetitionStopping()) == 1216


def test_repetition_between_two_checks_stops_nothing():
    # looked at after 16 and 32
    tokens = np.array([7, 8] + [1] * 13 + [9, 8, 7] + [1] * 13 + [9], np.int32)
    assert repeats(tokens[:15], 12, 5) and repeats(tokens[:31], 12, 5)
    assert fed(tokens, [4], RepetitionStopping(window=12, longest_period=5, grid=16)) is None


def test_a_cut_lies_in_the_new_tokens_alone():
    tokens = np.ones(24, np.int32)
    assert SMALL.stop_length([tokens], 24, 24) == 12
    assert SMALL.stop_length([tokens[:11], tokens[11:]], 24, 13) == 12
    assert SMALL.stop_length([tokens[:12], tokens[12:]], 24, 12) == 16
    assert SMALL.stop_length([tokens[:22], tokens[22:23]], 23, 1) is None
    assert SMALL.stop_length([tokens], 24, 0) is None
    assert SMALL.stop_length([], 0, 0) is None


def test_an_eos_ends_the_repetition_before_it():
    tokens = np.array([5] * 11 + [2], np.int32)
    assert SMALL.stop_length([tokens], 12, 12) is None


def test_audited_is_a_fixed_choice_of_about_the_share():
    names = [(step, uid, sample) for step in range(5) for uid in range(100, 300)
             for sample in range(4)]
    for share in (0.0, 0.1, 0.5, 1.0):
        stopping = RepetitionStopping(audit_share=share)
        chosen = np.array([stopping.is_audited(*name) for name in names])
        assert abs(chosen.mean() - share) < 4 * np.sqrt(share * (1 - share) / len(names)) + 1e-12
        assert [stopping.is_audited(*name) for name in names] == chosen.tolist()
    half = np.array([RepetitionStopping(audit_share=0.5).is_audited(*name)
                     for name in names]).reshape(5, 200, 4)
    for axis in range(3):  # no step, prompt or sample is always or never chosen
        shares = half.mean(axis=tuple(other for other in range(3) if other != axis))
        count = half.size / len(shares)
        assert np.abs(shares - 0.5).max() < 4.5 * np.sqrt(0.25 / count)


def test_audited_follows_splitmix64():
    # The first number of the generator with seed 0, as published: 0xE220A8397B1DCDAF.
    share = 0xE220A8397B1DCDAF / 2**64
    assert RepetitionStopping(audit_share=share + 1e-12).is_audited(0)
    assert not RepetitionStopping(audit_share=share - 1e-12).is_audited(0)


def test_a_larger_share_audits_more_responses():
    names = [(0, uid, 0) for uid in range(500)]
    few, more = RepetitionStopping(audit_share=0.2), RepetitionStopping(audit_share=0.6)
    assert all(more.is_audited(*name) for name in names if few.is_audited(*name))


@pytest.mark.parametrize(("changes", "message"), [
    (dict(longest_period=0), r"repetition.longest_period: expected .* found 0"),
    (dict(window=255), r"repetition.window: expected at least .* = 256, found 255"),
    (dict(grid=0), r"repetition.grid: expected .* found 0"),
    (dict(audit_share=1.5), r"repetition.audit_share: expected .* found 1.5"),
    (dict(audit_share=float("nan")), r"repetition.audit_share: .* found nan"),
])
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        RepetitionStopping(**changes)
