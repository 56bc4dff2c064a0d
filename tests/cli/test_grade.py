"""The command that grades a file."""

import io
import json
import os
import subprocess
import sys
import types

import pytest
from grading_cases import REPOSITORY, boxed

from effreason.cli import grade as command
from effreason.runtime.errors import UserError

ROWS = [
    {"response": boxed("18"), "reference": "18"},
    {"response": boxed(r"\sqrt{8}"), "reference": r"2\sqrt{2}"},
    {"response": r"<think>\boxed{5}</think> so 5", "reference": 5},
    {"response": boxed("9^{9^{9}}"), "reference": "5"},
    {"response": boxed("bank"), "reference": "B", "kind": "choice",
     "choices": {"A": "river", "B": "bank"}},
    {"response": boxed("bank"), "reference": "A", "kind": "choice", "choices": ["river", "bank"]},
    {"response": boxed("Yes."), "reference": "yes", "kind": "text",
     "note": "other fields do not matter"},
    {"response": "\x1b[31m" + boxed("\x1b[2J中文" * 20), "reference": "\ud800"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def grade(capsys, *argv):
    command.run(argv, "effreason grade")
    return capsys.readouterr().out


def test_json(tmp_path, capsys):
    lines = [json.loads(line)
             for line in grade(capsys, write(tmp_path / "rows.jsonl", ROWS), "--json").splitlines()]
    assert [line["correct"] for line in lines] == [True, True, False, False, True, False, True,
                                                   False]
    assert [line["status"] for line in lines[:6]] == ["exact", "symbolic", "no_answer", "guard",
                                                      "exact", "exact"]
    assert lines[2] | {"seconds": 0} == {"line": 3, "correct": False, "answer": None,
                                         "reference": "5",
                                         "status": "no_answer", "reason": "no box after </think>",
                                         "seconds": 0}
    assert all(line["seconds"] >= 0 for line in lines)


def test_table(tmp_path, capsys):
    lines = grade(capsys, write(tmp_path / "rows.jsonl", ROWS)).splitlines()
    assert lines[1] == "    1 correct 18               18           exact        decided exactly"
    assert lines[3] == (
        "    3 wrong   -                5            no_answer    no box after </think>")
    assert all(len(line) <= 80 for line in lines) and not any("\x1b" in line for line in lines)
    assert "8 graded: 4 correct, 4 wrong" in lines
    assert "      2  guard         too large to compare" in lines


def test_bare_answers_and_other_names_of_fields(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl",
                 [{"pred": r"\frac12", "answer": "0.5"}, {"pred": "{", "answer": 1}])
    lines = [json.loads(line) for line in grade(capsys, path, "--bare", "--json").splitlines()]
    assert [line["correct"] for line in lines] == [True, False]
    assert "--bare the response is the answer itself" in grade(capsys, path)
    path = write(tmp_path / "rows.jsonl", [{"mine": boxed("1"), "yours": "1.0", "response": "x"}])
    fields = ("--response-field", "mine", "--reference-field", "yours")
    assert "1 correct, 0 wrong" in grade(capsys, path, *fields)
    assert "0 correct, 1 wrong" in grade(capsys, path, *fields, "--kind", "text")


def test_a_kind_that_is_something_else_is_no_kind(tmp_path, capsys):
    rows = [{"response": boxed("1.0"), "reference": "1", "kind": "text"},
            {"response": boxed("2"), "reference": "2", "kind": "sum"}]
    command.run([write(tmp_path / "rows.jsonl", rows)], "effreason grade")
    out, errors = capsys.readouterr()
    assert "2 correct" in out
    assert "on 1 lines the field kind is none of math, choice, text" in errors


def test_a_function_of_ones_own(tmp_path, capsys, monkeypatch):
    (tmp_path / "own_verdicts.py").write_text("def longer(response, answer): return len(response) "
                                              "> len(answer)\n")
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "rows.jsonl",
                 [{"response": "abc", "reference": "ab"}, {"response": "a", "reference": "ab"}])
    assert "1 correct, 1 wrong" in grade(capsys, path, "--function", "own_verdicts:longer")

    (tmp_path / "own_columns.py").write_text("def at_most(response, answer, limit): "
                                             "return len(response) <= limit\n")
    path = write(tmp_path / "limits.jsonl", [
        {"response": "abc", "reference": "", "limit": limit} for limit in (2, 3, 4.5)])
    assert "2 correct, 1 wrong" in grade(capsys, path, "--function", "own_columns:at_most")
    with pytest.raises(UserError,
                       match="grade.function own_verdicts:none: own_verdicts has no none"):
        grade(capsys, path, "--function", "own_verdicts:none")


@pytest.mark.parametrize(("line", "message"), [
    ("{", "not valid JSON: "), ("5", "expected an object, got \"5\""),
    ("[]", "expected an object, got []"),
    ('{"reference": "5"}', "no field response (nor pred, prediction, completion), got reference"),
    ('{"response": "5"}', "no field reference (nor gold, answer, target), got response"),
    ('{"response": "5", "reference": null}', "reference must be a string or a number, got null"),
    ('{"pred": "5", "completion": "5", "reference": "5"}',
     "no field response, and pred and completion could both replace it"),
    ('{"response": "5", "reference": "5", "choices": "AB"}',
     'choices must be a list of strings, got "AB"'),
    ('{"response": "5", "reference": "5", "choices": {"B": "x"}}',
     "choices must be a list, or an object with A, B, C"),
    (b'{"response": "\xff"}', "not UTF-8"), ("[" * 100_000, "nested too deep"),
])
def test_a_broken_line_is_told_before_anything_is_graded(tmp_path, capsys, line, message):
    path = tmp_path / "rows.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(UserError) as caught:
        grade(capsys, str(path))
    assert str(caught.value).startswith(f"{path}:3: ") and message in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("argv", "message"), [
    ([], "the following arguments are required: FILE.jsonl"),
    (["nowhere.jsonl"], "nowhere.jsonl: No such file"),
    (["x", "--kind", "word"], "--kind: invalid choice: 'word'"),
    (["x", "--jsno"], "unrecognized arguments: --jsno"),
    (["x", "--workers", "0"], "--workers: invalid positive integer value: '0'"),
    (["x", "--function", "f"], "x: No such file"),
])
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(UserError, match=message):
        command.run(argv, "effreason grade")


def test_stdin_and_no_lines(capsys, monkeypatch):
    for text, total in ((json.dumps(ROWS[0]), "1 graded: 1 correct"),
                        ("\n", "0 graded: 0 correct")):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(text.encode())))
        assert total in grade(capsys, "-")


def test_any_of_several_references_is_right(tmp_path, capsys):
    rows = [{"response": r"\boxed{0.5}", "reference": reference}
            for reference in (["3", r"\frac{1}{2}"], [7, 0.5], '["3", "4"]')]
    out = grade(capsys, write(tmp_path / "rows.jsonl", rows), "--json")
    assert [json.loads(line)["correct"] for line in out.splitlines()] == [True, True, False]


def test_it_starts_without_jax_and_stands_a_closed_pipe(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS * 400)
    code = ("import atexit, sys; from effreason.cli.main import main; "
            "atexit.register(lambda: print({'jax', 'numpy', 'sympy', 'transformers'} "
            "& set(sys.modules) or 'none', file=sys.stderr)); sys.exit(main())")
    child = subprocess.Popen([sys.executable, "-c", code, "grade", path, "--json"], cwd=REPOSITORY,
                             stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, env={**os.environ, "LC_ALL": "C"})
    assert child.stdout is not None and child.stderr is not None
    assert json.loads(child.stdout.readline())["correct"]
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == (b"none\n", 0)
    child.stderr.close()
