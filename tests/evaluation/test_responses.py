"""Graded responses: rows of attempts, arrays of rows, and files that come back."""

import json
import types

import numpy as np
import pytest

from effreason.evaluation import responses
from effreason.grading.grader import Grade
from effreason.runtime.errors import UserError
from effreason.types import Problem


def problem(uid, reference="7", level="easy"):
    return Problem(uid=uid, prompt=np.array([5, uid], np.int32), text=f"problem {uid}", reference=reference, level=level)


TEXTS = [["3+4 = 7, \\boxed{7}", "\\boxed{9}"], ["so 7 = 7. No: \\boxed{8}", "odd \udc80 text"]]
CORRECT = [[True, False], [False, False]]
PROBLEMS = [problem(30), problem(4, level="hard")]


def attempts():
    """Two problems, two samples of each."""
    answers = [["7", "9"], ["8", None]]
    verdicts = [Grade(correct, answer, status, 0.0) for correct, answer, status in zip(
        sum(CORRECT, []), sum(answers, []), ("cached", "symbolic", "exact", "no_answer"), strict=True)]
    rollouts = types.SimpleNamespace(lengths=np.array([[18, 20], [40, 50]], np.int32),
                                     finish=np.array([["eos", "length"], ["eos", "repetition"]]))
    return types.SimpleNamespace(rollouts=rollouts, texts=sum(TEXTS, []), verdicts=verdicts, correct=np.array(CORRECT))


def test_rows_stand_beside_their_problems():
    rows = responses.rows("gsm8k", PROBLEMS, attempts())
    assert [(row["uid"], row["sample"], row["response"]) for row in rows] == [
        (30, 0, TEXTS[0][0]), (30, 1, TEXTS[0][1]), (4, 0, TEXTS[1][0]), (4, 1, TEXTS[1][1])]
    assert rows[0] == {"set": "gsm8k", "uid": 30, "sample": 0, "level": "easy", "problem": "problem 30",
                       "reference_answer": "7", "response": TEXTS[0][0], "answer": "7", "status": "symbolic",
                       "correct": True, "tokens": 18, "finish": "eos", "stated": 18 * len("3+4 = 7") / 18}
    assert [row["stated"] for row in rows] == [7.0, None, round(40 * len("so 7 = 7") / len(TEXTS[1][0]), 1), None]
    assert responses.row(PROBLEMS, attempts(), 1, 0) == {
        name: value for name, value in rows[2].items() if name not in ("set", "stated")}


def test_a_correct_response_has_stated_its_answer_by_its_end():
    right = {"correct": True, "tokens": 10}
    by_algebra = {"response": "hm \\boxed{x+1} ok", **right}
    assert responses.stated(problem(0, "1+x"), by_algebra) == pytest.approx(10 * 14 / 17, abs=0.05)
    assert responses.stated(problem(0, "1+x"), by_algebra | {"correct": False}) is None
    assert responses.stated(problem(0), {"response": "seven", **right}) == 10.0        # by a grader of one's own
    assert responses.stated(problem(0), {"response": "", "correct": False, "tokens": 1}) is None


def test_rows_become_arrays_whatever_their_order():
    rows = responses.rows("gsm8k", PROBLEMS, attempts())
    found = responses.outcomes([rows[1], rows[2], rows[0], rows[3]])
    np.testing.assert_array_equal(found.uids, np.array([30, 4], np.int64), strict=True)
    np.testing.assert_array_equal(found.correct, np.array(CORRECT), strict=True)
    np.testing.assert_array_equal(found.lengths, np.array([[18, 20], [40, 50]], np.int32), strict=True)
    assert found.levels.tolist() == ["easy", "hard"]
    assert found.finish.tolist() == [["eos", "length"], ["eos", "repetition"]]
    assert found.answers.tolist() == [["7", "9"], ["8", ""]]
    assert found.first_answer_token.dtype == np.float32 and np.isnan(found.first_answer_token).tolist() == [[False, True], [False, True]]
    with pytest.raises(ValueError, match="the same samples of each of 2 problems, found 3 rows"):
        responses.outcomes(rows[:3])
    with pytest.raises(ValueError, match="found 5 rows"):
        responses.outcomes([*rows, rows[0]])


def test_files_come_back(tmp_path):
    path, facts = tmp_path / "new" / "gsm8k.jsonl", {"weights": "abc", "run.seed": 0}
    rows = responses.rows("gsm8k", PROBLEMS, attempts())
    responses.write(path, facts, rows)
    assert responses.read(path) == (facts, rows) and responses.read_facts(path) == facts
    assert [each.name for each in path.parent.iterdir()] == ["gsm8k.jsonl"]
    lines = path.read_bytes().splitlines()
    assert len(lines) == 5 and [json.loads(line)["uid"] for line in lines[1:]] == [30, 30, 4, 4]


def test_what_is_no_such_file_is_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    for text in ("", "[]\n", '{"uid": 1}\n', '{"facts": {}}\n{"uid"', "\udc80", '{"facts": 5}\n', "5\n"):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match=r"a\.jsonl: expected graded responses"):
            responses.read(path)
    for text in ('{"facts": 5}\n', "[" * 100_000 + "\n"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"a\.jsonl: expected graded responses behind a line with facts"):
            responses.read_facts(path)
    with pytest.raises(UserError, match="No such file"):
        responses.read_facts(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        responses.write(tmp_path / "file" / "a.jsonl", {}, [])


@pytest.mark.parametrize(("bad", "message"), [
    (5, "expected a JSON object, found 5"), ({"uid": None}, "uid must be a whole number, got null"),
    ({"uid": 2**70}, r"uid must be within \[0, 9223372036854775808\), got 1180"),
    ({"tokens": 2**31}, r"tokens must be within \[0, 2147483648\), got 2147483648"),
    ({"tokens": -1}, "tokens must be within"), ({"correct": 1}, "correct must be true or false, got 1"),
    ({"stated": "7"}, 'stated must be a number or null, got "7"'), ({"answer": 7}, "answer must be a text or null"),
    ({"sample": True}, "sample must be a whole number, got true"), ("finish", "finish must be a text, got no finish")])
def test_a_damaged_row_is_one_line(tmp_path, bad, message):
    path, rows = tmp_path / "a.jsonl", responses.rows("gsm8k", PROBLEMS, attempts())
    if isinstance(bad, dict):
        rows[1] |= bad
    elif bad == "finish":
        del rows[1][bad]
    else:
        rows[1] = bad
    responses.write(path, {}, rows)
    with pytest.raises(UserError, match=rf"a\.jsonl: line 3: {message}.*; repair or remove it"):
        responses.read(path)


def test_a_file_that_lost_rows_is_no_smaller_set(tmp_path):
    path, rows = tmp_path / "a.jsonl", responses.rows("gsm8k", PROBLEMS, attempts())
    facts = {"problems": 2, "evaluation.samples": 2}
    responses.write(path, facts, rows)
    found, outcomes = responses.read_outcomes(path)
    assert found == facts and outcomes.correct.shape == (2, 2)
    for some in (rows[:2], rows[:3], [], rows * 2):
        responses.write(path, facts, some)
        with pytest.raises(UserError, match=rf"a\.jsonl: holds {len(some)} of 4 responses; remove it to sample them"):
            responses.read(path)
    responses.write(path, facts, [rows[0], rows[0], rows[2], rows[3]])
    with pytest.raises(UserError, match=r"a\.jsonl: expected the same samples of each of 2 problems, found 4 rows"):
        responses.read_outcomes(path)
    responses.write(path, {}, [])
    with pytest.raises(UserError, match=r"a\.jsonl: expected responses, found none; repair or remove it"):
        responses.read_outcomes(path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.jsonl"
    responses.write(path, {"n": 1}, [])
    with pytest.raises(ValueError):
        responses.write(path, {"n": float("nan")}, [])
    assert responses.read_facts(path) == {"n": 1} and len(list(tmp_path.iterdir())) == 1


def test_names_of_files_are_safe_short_and_apart():
    names = ["gsm8k", "org/name@main", "/home/me/data/test.jsonl", "../data/test.jsonl", "..", "MATH", "math",
             "x" * 300, "a b:c"]
    found = responses.safe_names(names)
    assert list(found) == names
    assert list(found.values()) == ["gsm8k", "org_name_main", "data_test", "data_test-2", "unnamed", "MATH", "math-2",
                                    "x" * 100, "a_b_c"]
    assert responses.safe_names(names[:3])["/home/me/data/test.jsonl"] == found["/home/me/data/test.jsonl"]
