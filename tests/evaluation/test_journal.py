"""Journals: what was finished is never sampled again, whatever cut the file off."""

import json

import numpy as np
import pytest

from effreason.evaluation import journal as journals
from effreason.runtime import files
from effreason.runtime.errors import UserError
from effreason.types import Response

FACTS = {"weights": "base", "run.seed": 0, "problems": 4, "evaluation.samples": 2,
         "evaluation.max_new_tokens": 9}
VOCABULARY = 20


def response(prompt, sample, tokens, finish="eos", repeated=False):
    zeros = np.zeros(tokens, np.float32)
    return Response(prompt=prompt, sample=sample, tokens=np.arange(tokens, dtype=np.int32) + 5,
                    logprobs=zeros, sampling_logprobs=zeros, model_logprobs=zeros, finish=finish,
                    repeated=repeated)


def alike(found, expected):
    """Everything but log-probs, which nobody asks for."""
    assert [(each.prompt, each.sample, each.tokens.tolist(), each.finish, each.repeated)
            for each in found] == [(each.prompt, each.sample, each.tokens.tolist(), each.finish,
                                    each.repeated) for each in expected]


def kept(path):
    with journals.Journal(path, FACTS, VOCABULARY) as journal:
        return journal.resumed


ONE, TWO, BEGUN = response(0, 1, 3), response(2, 0, 4, "repetition", repeated=True), response(
    1, 0, 2, None)


def test_responses_come_back_in_full(tmp_path):
    path = tmp_path / "new" / "a.journal"
    with journals.Journal(path, FACTS, VOCABULARY) as journal:
        assert journal.resumed == []
        journal.add([ONE])
        # On the disk already: kill -9 takes nothing of it.
        alike(journals.read(path)[1], [ONE])
        journal.add([])
        journal.add([TWO])
        # of these only BEGUN is news
        journal.add_unfinished([ONE, TWO, BEGUN, response(3, 0, 0, None)])
    found = kept(path)
    alike(found, [ONE, TWO, BEGUN])
    assert found[0].tokens.dtype == np.int32 and found[0].logprobs.shape == (3,)


def test_the_last_line_on_a_response_counts(tmp_path):
    path = tmp_path / "a.journal"
    longer, done = response(1, 0, 5, None), response(1, 0, 9)
    for each in (BEGUN, longer, done):
        with journals.Journal(path, FACTS, VOCABULARY) as journal:
            journal.add([each])
    alike(kept(path), [done])


def test_a_line_that_was_cut_off_is_dropped_for_good(tmp_path):
    path = tmp_path / "a.journal"
    with journals.Journal(path, FACTS, VOCABULARY) as journal:
        journal.add([ONE, TWO])
    complete = path.read_bytes()
    for cut in range(1, len(complete)):
        path.write_bytes(complete[:-cut])
        lines = complete[:-cut].count(b"\n")                   # the first one holds the facts
        with journals.Journal(path, FACTS, VOCABULARY) as journal:
            alike(journal.resumed, [ONE, TWO][: max(lines - 1, 0)])
            journal.add([BEGUN])
        alike(kept(path), [*[ONE, TWO][: max(lines - 1, 0)], BEGUN])


def _line(**changes):
    good = {"prompt": 0, "sample": 0, "finish": "eos", "repeated": False, "tokens": [5]}
    return (json.dumps(good | changes) + "\n").encode()


def test_a_response_that_cannot_be_one_of_the_evaluation_is_damage(tmp_path):
    path = tmp_path / "a.journal"
    with journals.Journal(path, FACTS, VOCABULARY) as journal:
        journal.add([ONE, TWO])

    with pytest.raises(UserError, match=r"a\.journal: line 3 is damaged"):
        journals.Journal(path, FACTS, 8)                            # a smaller vocabulary
    with pytest.raises(UserError, match="problems 4, now 2"):       # of other facts none can be one
        journals.Journal(path, FACTS | {"problems": 2}, VOCABULARY)
    with journals.Journal(path, FACTS, 9) as journal:
        alike(journal.resumed, [ONE, TWO])


def test_other_facts_and_damage_are_errors_and_change_nothing(tmp_path):
    path = tmp_path / "a.journal"
    with journals.Journal(path, FACTS, VOCABULARY) as journal:
        journal.add([ONE, TWO])
    complete = path.read_bytes()

    with pytest.raises(UserError, match="was made with run.seed 0, now 1"):
        journals.Journal(path, FACTS | {"run.seed": 1}, VOCABULARY)
    assert path.read_bytes() == complete
    lines = complete.splitlines(keepends=True)
    for number, bad in ((1, b"{}\n"), (2, b"\0\0\n"), (3, b'{"prompt": 1}\n'),
                        (1, b'{"facts": 5}\n'), (1, b"5\n"), (2, _line(tokens=[10**10])),
                        (2, _line(tokens=[1.5])), (3, _line(tokens=[[1]])), (3, _line(tokens="ab")),
                        (2, _line(prompt="0"))):
        path.write_bytes(b"".join([*lines[: number - 1], bad, *lines[number:]]))
        before = path.read_bytes()
        pattern = rf"a\.journal: line {number} is damaged; remove the file to generate"
        with pytest.raises(UserError, match=pattern):
            journals.Journal(path, FACTS, VOCABULARY)
        assert path.read_bytes() == before


def test_a_journal_that_is_done_leaves_nothing(tmp_path):
    path = tmp_path / "a.journal"
    with journals.Journal(path, FACTS, VOCABULARY) as journal:
        journal.add([ONE])
        journal.remove()
        journal.close()
    assert list(tmp_path.iterdir()) == []


def test_another_process_reads_and_writes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.journal"
    with journals.Journal(path, FACTS, VOCABULARY) as journal:
        journal.add([ONE])
    complete = path.read_bytes()
    of_process_0 = {"journal": True, "the file a.journal": files.digest(path)}
    monkeypatch.setattr(journals.processes, "is_primary", lambda: False)
    monkeypatch.setattr(journals.processes, "broadcast", lambda name, make: of_process_0[name])
    monkeypatch.setattr(journals.processes, "appears", lambda seen: seen())
    with journals.Journal(path, FACTS, VOCABULARY) as journal:
        alike(journal.resumed, [ONE])
        journal.add([TWO])
        journal.add_unfinished([BEGUN])
        journal.remove()
    assert path.read_bytes() == complete
    of_process_0["the file a.journal"] = "another digest"
    with pytest.raises(UserError, match="all hosts must share the disk"):
        journals.Journal(path, FACTS, VOCABULARY)


def test_a_disk_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        journals.Journal(tmp_path / "file" / "a.journal", FACTS, VOCABULARY)
