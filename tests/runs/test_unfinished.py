"""Responses of a step that is stopped: all come back, and none of another step."""

import dataclasses

import numpy as np
import pytest

from effreason.evaluation import journal
from effreason.runs import unfinished
from effreason.runtime.errors import UserError
from effreason.types import Response


def response(prompt, sample, length, finish, repeated=False):
    generator = np.random.default_rng(10 * prompt + sample)
    tokens = generator.integers(0, 99, length).astype(np.int32)
    one, two, three = generator.standard_normal((3, length)).astype(np.float32)
    return Response(prompt=prompt, sample=sample, tokens=tokens, logprobs=one,
                    sampling_logprobs=two, model_logprobs=three, finish=finish, repeated=repeated)


KEPT = [response(3, 1, 5, "eos"), response(0, 0, 0, None),
        response(2, 7, 9, "repetition", repeated=True), response(1, 1, 3, None)]


LIMITS = {"prompts": 4, "samples": 8, "max_new_tokens": 9, "vocabulary": 99}
ORIGIN = {"seed": 3, "weights": "abc"}


def load(path, step, **limits):
    return unfinished.load(path, step, LIMITS | limits, lambda: ORIGIN)


@pytest.mark.parametrize("kept", [KEPT, KEPT[:1], KEPT[1:2], []], ids=len)
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, kept):
    path = tmp_path / "unfinished.jsonl"
    unfinished.save(path, 7, kept, ORIGIN)
    found = load(path, 7)
    assert len(found) == len(kept)
    for one, other in zip(found, kept, strict=True):
        assert (one.prompt, one.sample, one.finish, one.repeated) == (
            other.prompt, other.sample, other.finish, other.repeated)
        for name in ("tokens", *journal.LOGPROBS):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)
    assert [each.name for each in tmp_path.iterdir()] == ["unfinished.jsonl"]


def test_another_step_and_no_file_have_nothing(tmp_path):
    path = tmp_path / "unfinished.jsonl"
    assert load(path, 7) == []
    unfinished.save(path, 7, KEPT, ORIGIN)
    assert load(path, 8) == []


def test_a_damaged_file_is_one_line_that_says_what_to_do(tmp_path):
    path = tmp_path / "unfinished.jsonl"
    unfinished.save(path, 7, KEPT, ORIGIN)
    complete = path.read_bytes()
    lines = complete.splitlines(keepends=True)
    flipped = bytes(byte ^ 255 if 40 <= place < 60 else byte for place, byte in enumerate(complete))
    shorter = lines[1].replace(b'"tokens":[', b'"tokens":[1,')     # more tokens than log-probs

    for damaged in (complete[:300], b"".join(lines[:-1]), b"", flipped, b"not JSON\n",
                    b"".join([lines[0], shorter, *lines[2:]])):
        path.write_bytes(damaged)
        with pytest.raises(UserError,
                           match=r"unfinished\.jsonl: .*damaged; remove (it|the file) to generate"):
            load(path, 7)


def test_a_directory_that_is_gone_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        unfinished.save(tmp_path / "gone" / "unfinished.jsonl", 7, KEPT, ORIGIN)


@pytest.mark.parametrize("limit", LIMITS.items())
def test_responses_that_cannot_be_of_this_run_are_one_line(tmp_path, limit):
    name, value = limit
    path = tmp_path / "unfinished.jsonl"
    tokens = np.array([98], np.int32)
    unfinished.save(path, 7, [*KEPT, dataclasses.replace(response(0, 1, 1, None), tokens=tokens)],
                    ORIGIN)
    load(path, 7)
    with pytest.raises(UserError, match=r"unfinished\.jsonl: line \d is damaged; remove"):
        load(path, 7, **{name: value - 1})


def test_responses_of_other_weights_or_another_seed_are_one_line(tmp_path):
    path = tmp_path / "unfinished.jsonl"
    unfinished.save(path, 7, KEPT, ORIGIN | {"weights": "abd"})
    with pytest.raises(UserError) as caught:
        load(path, 7)
    assert str(caught.value) == (f"{path}: is of another run, its weights is abd, expected abc; "
                                 "remove it to generate step 7 from its beginning")
    assert load(path, 8) == []
