import dataclasses
import enum
import json
from typing import Annotated

import msgspec
import pytest

from effreason.runtime import rows
from effreason.runtime.errors import UserError


class Finish(enum.StrEnum):
    EOS = "eos"
    LENGTH = "length"


@dataclasses.dataclass(frozen=True)
class Span:
    start: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    uid: int
    tokens: Annotated[int, msgspec.Meta(ge=1)]
    sample: Annotated[int, msgspec.Meta(ge=0, le=9)] = 0
    answer: str | None = None
    correct: bool = False
    finish: Finish | None = None
    ids: list[int] = dataclasses.field(default_factory=list)
    spans: tuple[Span, ...] = ()
    pair: tuple[int, float] = (0, 0.0)
    passed: dict[int, float] = dataclasses.field(default_factory=dict)


GOOD = {"uid": 1, "tokens": 3}


def test_rows_come_back(tmp_path):
    path, text = tmp_path / "a.jsonl", "ünï\ud800\u2028"
    full = GOOD | {"answer": text, "finish": "length", "ids": [1, 2], "spans": [{"start": 1}],
                   "pair": [1, 2], "passed": {"4": 0.5}, "other": [], "correct": True}
    path.write_text(json.dumps(full) + "\n\n" + json.dumps(GOOD) + "\n")
    assert rows.read(path, Row) == [
        Row(uid=1, tokens=3, answer=text, correct=True, finish=Finish.LENGTH, ids=[1, 2],
            spans=(Span(1.0),), pair=(1, 2.0), passed={4: 0.5}), Row(uid=1, tokens=3)]
    assert type(rows.read(path, Row)[0].spans[0].start) is float
    assert [place for place, _ in rows.numbered_lines(path)] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(("bad", "message"), [
    ({"uid": True}, "uid must be a whole number, got true"),
    ({"uid": 1.0}, "uid must be a whole number, got 1.0"),
    ({"uid": "1"}, 'uid must be a whole number, got "1"'),
    ({"tokens": 0}, "tokens must be a whole number >= 1, got 0"),
    ({"sample": 2**70}, f"sample must be a whole number in [0, 9], got {2**70}"),
    ({"answer": 7}, "answer must be a text or null, got 7"),
    ({"correct": 1}, "correct must be true or false, got 1"),
    ({"finish": "loop"}, 'finish must be one of eos, length or null, got "loop"'),
    ({"ids": [1, None]}, "ids.1 must be a whole number, got null"),
    ({"ids": {}}, "ids must be a list, got {}"),
    ({"spans": [{"start": 1}, {}]}, "spans.1.start must be a number, got no start"),
    ({"spans": [5]}, "spans.0 must be an object, got 5"),
    ({"pair": [1]}, "pair must be a list, got [1]"),
    ({"pair": [1, "x"]}, 'pair.1 must be a number, got "x"'),
    ({"passed": {"4": True}}, 'passed.... must be a number, got {"4": true}'),
    ({"passed": {"x": 1}}, 'passed must be an object, got {"x": 1}'),
    ({"answer": "x" * 99, "uid": "x" * 99}, 'uid must be a whole number, got "' + "x" * 59)])
def test_a_wrong_row_is_one_line(tmp_path, bad, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | bad) + "\n")
    with pytest.raises(UserError) as caught:
        rows.read(path, Row)
    assert str(caught.value) == f"{path}:2: {message}"


@pytest.mark.parametrize(("line", "message"), [
    (b'{"tokens": 3}', "uid must be a whole number, got no uid"),
    (b"5", "expected a JSON object, found 5"), (b"[1]", "expected a JSON object, found [1]"),
    (b'{"uid": 1', "expected a JSON object, found '{\"uid\": 1'"),
    (b"\xff", "expected a JSON object, found '\N{REPLACEMENT CHARACTER}'"),
    (b"[" * 100_000, "expected a JSON object, found '[[[["),
    (b"9" * 5000, "expected a JSON object, found '9999")])
def test_a_line_that_is_not_such_an_object(line, message):
    with pytest.raises(UserError) as caught:
        rows.decode(line, Row, "file:1")
    assert str(caught.value).startswith(f"file:1: {message}")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere: No such file"):
        rows.read(tmp_path / "nowhere", Row)
