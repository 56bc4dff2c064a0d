"""Graded responses: rows of attempts, arrays of rows, and files that come back."""

import json
import types
from dataclasses import asdict

import numpy as np
import pytest

from effreason.evaluation import responses
from effreason.grading.grader import Grade
from effreason.runtime.errors import UserError
from effreason.types import Problem


def problem(uid, reference="7", level="easy"):
    return Problem(uid=uid, prompt=np.array([5, uid], np.int32), text=f"problem {uid}",
                   reference=reference, level=level)


TEXTS = [["3+4 = 7, \\boxed{7}", "\\boxed{9}"], ["so 7 = 7. No: \\boxed{8}", "odd \udc80 text"]]
CORRECT = [[True, False], [False, False]]
PROBLEMS = [problem(30), problem(4, level="hard")]


def graded():
    """Two problems, two samples of each."""
    answers = [["7", "9"], ["8", None]]
    verdicts = [Grade(correct, answer, status, 0.0)
                for correct, answer, status in zip(sum(CORRECT, []), sum(answers, []),
                                                   ("cached", "symbolic", "exact", "no_answer"),
                                                   strict=True)]
    rollouts = types.SimpleNamespace(lengths=np.array([[18, 20], [40, 50]], np.int32),
                                     finish=np.array([["eos", "length"], ["eos", "repetition"]]))
    return types.SimpleNamespace(rollouts=rollouts, texts=sum(TEXTS, []), verdicts=verdicts,
                                 correct=np.array(CORRECT))


def test_rows_are_next_to_their_problems():
    rows = responses.evaluated_responses("gsm8k", PROBLEMS, graded())
    assert [(row.uid, row.sample, row.response) for row in rows] == [
        (30, 0, TEXTS[0][0]), (30, 1, TEXTS[0][1]), (4, 0, TEXTS[1][0]), (4, 1, TEXTS[1][1])]
    assert asdict(rows[0]) == {
        "set": "gsm8k", "uid": 30, "sample": 0, "level": "easy", "problem": "problem 30",
        "reference_answer": "7", "response": TEXTS[0][0], "answer": "7", "status": "symbolic",
        "correct": True, "tokens": 18, "finish": "eos",
        "first_answer_token": 18 * len("3+4 = 7") / 18}
    assert [row.first_answer_token for row in rows] == [
        7.0, None, round(40 * len("so 7 = 7") / len(TEXTS[1][0]), 1), None]
    assert asdict(responses.graded_response(PROBLEMS, graded(), 1, 0)) == {
        name: value for name, value in asdict(rows[2]).items()
        if name not in ("set", "first_answer_token")}


def test_a_correct_response_has_stated_its_answer_by_its_end():
    def first(problem, response, correct, tokens=10):
        row = types.SimpleNamespace(response=response, correct=correct, tokens=tokens)
        return responses.first_answer_token(problem, row)

    by_algebra = "hm \\boxed{x+1} ok"
    assert first(problem(0, "1+x"), by_algebra, True) == pytest.approx(10 * 14 / 17, abs=0.05)
    assert first(problem(0, "1+x"), by_algebra, False) is None
    assert first(problem(0), "seven", True) == 10.0                     # by a user's own grader
    assert first(problem(0), "", False, tokens=1) is None


def test_rows_become_arrays_whatever_their_order():
    rows = responses.evaluated_responses("gsm8k", PROBLEMS, graded())
    found = responses.outcomes([rows[1], rows[2], rows[0], rows[3]])
    np.testing.assert_array_equal(found.uids, np.array([30, 4], np.int64), strict=True)
    np.testing.assert_array_equal(found.correct, np.array(CORRECT), strict=True)
    np.testing.assert_array_equal(found.lengths, np.array([[18, 20], [40, 50]], np.int32),
                                  strict=True)
    assert found.levels.tolist() == ["easy", "hard"]
    assert found.finish.tolist() == [["eos", "length"], ["eos", "repetition"]]
    assert found.answers.tolist() == [["7", "9"], ["8", ""]]
    assert found.first_answer_token.dtype == np.float32
    assert np.isnan(found.first_answer_token).tolist() == [[False, True], [False, True]]
    with pytest.raises(ValueError, match="the same samples of each of 2 problems, found 3 rows"):
        responses.outcomes(rows[:3])
    with pytest.raises(ValueError, match="found 5 rows"):
        responses.outcomes([*rows, rows[0]])


def test_files_come_back(tmp_path):
    path, facts = tmp_path / "new" / "gsm8k.jsonl", {"weights": "abc", "run.seed": 0}
    rows = responses.evaluated_responses("gsm8k", PROBLEMS, graded())
    responses.write(path, facts, rows)
    assert responses.read(path) == (facts, rows) and responses.read_facts(path) == facts
    assert [each.name for each in path.parent.iterdir()] == ["gsm8k.jsonl"]
    lines = path.read_bytes().splitlines()
    assert len(lines) == 5 and [json.loads(line)["uid"] for line in lines[1:]] == [30, 30, 4, 4]


def test_what_is_no_such_file_is_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    for text in ("", "[]\n", '{"uid": 1}\n', "\udc80", '{"facts": 5}\n', "5\n"):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match=r"a\.jsonl: expected a first line with facts"):
            responses.read(path)
    path.write_text('{"facts": {}}\n{"uid"')
    with pytest.raises(UserError,
                       match=r"a\.jsonl:2: expected a JSON object, found .*; repair or remove"):
        responses.read(path)
    for text in ('{"facts": 5}\n', "[" * 100_000 + "\n"):
        path.write_text(text)
        with pytest.raises(UserError,
                           match=r"a\.jsonl: expected a first line with facts, then graded"):
            responses.read_facts(path)
    with pytest.raises(UserError, match="No such file"):
        responses.read_facts(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        responses.write(tmp_path / "file" / "a.jsonl", {}, [])


@pytest.mark.parametrize(("bad", "message"),
                         [(5, "expected a JSON object, found 5"),
                          ({"uid": None}, "uid must be a whole number .*, got null"),
                          ({"uid": 2**70},
                           r"uid must be a whole number in \[0, 9223372036854775807\], got 1180"),
                          ({"tokens": 2**31},
                           r"tokens must be a whole number in \[0, 2147483647\], got 2147483648"),
                          ({"tokens": -1},
                           r"tokens must be a whole number in \[0, 2147483647\], got -1"),
                          ({"correct": 1}, "correct must be true or false, got 1"),
                          ({"first_answer_token": "7"},
                           'first_answer_token must be a number or null, got "7"'),
                          ({"answer": 7}, "answer must be a text or null"),
                          ({"sample": True}, "sample must be a whole number .*, got true"),
                          ({"finish": "loop"},
                           'finish must be one of eos, length, repetition, got "loop"'),
                          ("finish",
                           "finish must be one of eos, length, repetition, got no finish")])
def test_a_damaged_row_is_one_line(tmp_path, bad, message):
    path = tmp_path / "a.jsonl"
    responses.write(path, {}, responses.evaluated_responses("gsm8k", PROBLEMS, graded()))
    lines = path.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[2])
    if isinstance(bad, dict):
        row |= bad
    elif bad == "finish":
        del row[bad]
    else:
        row = bad
    lines[2] = json.dumps(row)

    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"a\.jsonl:3: {message}.*; repair or remove the file"):
        responses.read(path)


def test_a_file_that_lost_rows_is_no_smaller_set(tmp_path):
    path, rows = tmp_path / "a.jsonl", responses.evaluated_responses("gsm8k", PROBLEMS, graded())
    facts = {"problems": 2, "evaluation.samples": 2}
    responses.write(path, facts, rows)
    found, outcomes = responses.read_outcomes(path)
    assert found == facts and outcomes.correct.shape == (2, 2)
    for some in (rows[:2], rows[:3], [], rows * 2):
        responses.write(path, facts, some)
        pattern = rf"a\.jsonl: holds {len(some)} of 4 responses; remove it to sample them"
        with pytest.raises(UserError, match=pattern):
            responses.read(path)
    responses.write(path, facts, [rows[0], rows[0], rows[2], rows[3]])
    pattern = r"a\.jsonl: expected the same samples of each of 2 problems, found 4 rows"
    with pytest.raises(UserError, match=pattern):
        responses.read_outcomes(path)
    responses.write(path, {}, [])
    pattern = r"a\.jsonl: expected responses, found none; repair or remove the file"
    with pytest.raises(UserError, match=pattern):
        responses.read_outcomes(path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.jsonl"
    responses.write(path, {"n": 1}, [])
    with pytest.raises(ValueError):
        responses.write(path, {"n": float("nan")}, [])
    assert responses.read_facts(path) == {"n": 1} and len(list(tmp_path.iterdir())) == 1


def test_names_of_files_are_safe_short_and_apart():
    names = ["gsm8k", "org/name@main", "/home/me/data/test.jsonl", "../data/test.jsonl", "..",
             "MATH", "math", "x" * 300, "a b:c"]
    found = responses.file_names(names)
    assert list(found) == names
    assert list(found.values()) == ["gsm8k", "org_name_main", "data_test", "data_test-2", "unnamed",
                                    "MATH", "math-2", "x" * 100, "a_b_c"]
    name = "/home/me/data/test.jsonl"
    assert responses.file_names(names[:3])[name] == found[name]
