"""The presets: every local copy loads by its name, and rows as the Hub has them become the same
problems."""

import json
from pathlib import Path

import pytest

from effreason.data import hub as downloads
from effreason.data import sources
from effreason.data.presets import PRESETS
from effreason.runtime.config import DataConfig
from effreason.runtime.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
DOCS = Path(__file__).parents[2] / "docs" / "data.md"
# As the table of the local copies has them.
ROWS = {("gsm8k", "train"): 7473, ("gsm8k", "test"): 1319, ("math", "train"): 11998,
        ("math500", "test"): 500, ("aime24", "test"): 30, ("converted_aime", "train"): 919,
        ("converted_aime", "test"): 30, ("commonsense_qa", "train"): 9741,
        ("commonsense_qa", "test"): 1221, ("logical_deduction", "test"): 750}

local = pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not there")


def hub(monkeypatch, tables):
    """Rows of the Hub by id, subset and split, without the Hub."""
    asked = []

    def load(name, subset, split, revision):
        assert revision is None
        asked.append((name, subset, split))
        return tables[subset] if isinstance(tables, dict) else tables

    monkeypatch.setattr(downloads, "_load", load)
    return asked


def read(name, held_out=True):
    return sources.read(name, DataConfig(), held_out=held_out)[0]


@local
@pytest.mark.parametrize(("name", "split"), ROWS)
def test_local_copies_load_by_preset(name, split):
    rows, unusable = sources.read(name, DataConfig(directory=str(SHARED)), held_out=split == "test")
    assert (len(rows), unusable) == (ROWS[name, split], [])
    assert all(row.text.strip() and row.reference for row in rows)
    assert [row.number for row in rows] == list(range(len(rows)))
    if PRESETS[name].kind == "choice":
        assert all(row.kind == "choice" and 3 <= len(row.choices) <= 7 for row in rows)
        assert all(row.reference in "ABCDEFG"[: len(row.choices)]
                   and f"({row.reference}) " in row.text for row in rows)
        assert all(row.text.count("Options:") == 1 for row in rows)


@local
def test_every_local_copy_has_a_preset():
    folders = {preset.folder or name for name, preset in PRESETS.items()}
    assert {path.name for path in SHARED.iterdir() if path.is_dir()} <= folders


@local
def test_levels_come_from_local_copies():
    rows, _ = sources.read("math500", DataConfig(directory=str(SHARED)), held_out=True)
    assert {row.level for row in rows} == {f"Level {level}" for level in range(1, 6)}


def test_gsm8k_answers_stand_behind_hashes(monkeypatch):
    asked = hub(monkeypatch, [{"question": "How many?",
                               "answer": "4*25=<<4*25=100>>100\n#### 1,100"}])
    (row,) = read("gsm8k", held_out=False)
    assert (row.text, row.reference, row.kind) == ("How many?", "1,100", "math")
    assert asked == [("openai/gsm8k", "main", "train")]


def test_rows_without_an_answer_on_the_hub_are_counted(monkeypatch):
    hub(monkeypatch, [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": ""},
                      {"problem": "c", "answer": None}, {"problem": None, "answer": "2"}])
    rows, unusable = sources.read("deepscaler", DataConfig(), held_out=False)
    assert [row.text for row in rows] == ["a"]
    assert [(row.number, row.text, row.reason) for row in unusable] == [
        (1, "b", sources.WITHOUT_ANSWER), (2, "c", sources.WITHOUT_ANSWER),
        (3, "", sources.WITHOUT_TEXT)]


@local
def test_commonsense_qa_on_the_hub_is_the_local_copy(monkeypatch):
    saved = json.loads((SHARED / "commonsense_qa" / "test.jsonl").read_text().splitlines()[0])
    choices = {"label": list(saved["choices"]), "text": list(saved["choices"].values())}
    hub(monkeypatch, [{"question": saved["problem"].split("\nOptions:")[0],
                       "answerKey": saved["answer"], "choices": choices}])
    (row,) = read("commonsense_qa")
    assert row == sources.read("commonsense_qa", DataConfig(directory=str(SHARED)),
                               held_out=True)[0][0]


@local
def test_logical_deduction_on_the_hub_is_the_local_copy(monkeypatch):
    saved = [json.loads(line) for line in (SHARED / "logical_deduction"
                                           / "test.jsonl").read_text().splitlines()]
    asked = hub(monkeypatch, {f"logical_deduction_{count}_objects": [
        {"input": row["problem"], "target": f"({row['answer']})"}
        for row in saved if row["objects"] == count]
        for count in ("three", "five", "seven")})
    assert read("logical_deduction") == sources.read("logical_deduction",
                                                     DataConfig(directory=str(SHARED)),
                                                     held_out=True)[0]
    assert [split for _, _, split in asked] == ["test"] * 3


def test_olympiad_bench_answers_are_lists_and_contexts_stand_apart(monkeypatch):
    hub(monkeypatch, [{"question": "Find a and b.", "context": "Let a < b.",
                       "final_answer": ["1", "2"]}, {"question": "Find c.", "context": None,
                                                     "final_answer": ["3"]},
                      {"question": "Prove it.", "context": None, "final_answer": None}])
    rows, unusable = sources.read("olympiad_bench", DataConfig(), held_out=True)
    assert [(row.text, row.reference) for row in rows] == [("Let a < b.\nFind a and b.", "1, 2"),
                                                           ("Find c.", "3")]
    assert [row.text for row in unusable] == ["Prove it."]
    hub(monkeypatch, [{"question": "Find c."}])
    with pytest.raises(UserError, match="Hothan/OlympiadBench:train:0: has no field "
                       "'final_answer', found question"):
        read("olympiad_bench")


@pytest.mark.parametrize(("name", "held_out", "message"),
                         [("math500", False, "math500: the set has no split to train on"),
                          ("deepscaler", True, "deepscaler: the set has no split to evaluate on"),
                          ("converted_aime", False, "converted_aime: is not on the Hugging Face "
                           "Hub; data.directory must name")])
def test_what_a_preset_does_not_have(name, held_out, message):
    with pytest.raises(UserError, match=message):
        read(name, held_out)


def test_what_is_checked_first_is_what_is_read():
    data = DataConfig(split="dev")
    sources.check("deepscaler,paper,math500,org/name", data, "data.exclude")
    sources.check("deepscaler", data, "data.exclude", held_out=True)
    sources.check("deepscaler", data, "evaluation.path", held_out=True, split="train")
    sources.check("math500", DataConfig(), "data.path", split="test")
    sources.check("math500", DataConfig(split="test"), "data.path")
    for name, field, held_out in (("deepscaler", "evaluation.path", True),
                                  ("math500", "data.path", False)):
        with pytest.raises(UserError, match=f"{name}: the set has no split to"):
            sources.check(name, DataConfig(), field, held_out=held_out)
    with pytest.raises(UserError, match="converted_aime: is not on the Hugging Face Hub"):
        sources.check("converted_aime", data, "data.exclude")
    with pytest.raises(UserError, match="data.exclude takes no weights"):
        sources.check("deepscaler=1", data, "data.exclude")


@pytest.mark.parametrize(("name", "message"), [("gsm8k@abc", "data.path: gsm8k takes no revision, "
                                                "got 'gsm8k@abc'; "
                                                "the set itself is openai/gsm8k@abc"),
                                               ("tiny@abc", "data.path: tiny takes no revision, "
                                                "got 'tiny@abc'$"),
                                               ("converted_aime@abc",
                                                "data.path: converted_aime takes no revision, "
                                                "got 'converted_aime@abc'$")])
def test_a_preset_takes_no_revision(name, message):
    for use in (lambda: read(name), lambda: sources.check(name, DataConfig(), "data.path")):
        with pytest.raises(UserError, match=message):
            use()


def test_a_missing_local_copy_is_named(tmp_path):
    with pytest.raises(UserError,
                       match=r"math12k/train\.jsonl: does not exist; data\.directory must contain"):
        sources.read("math", DataConfig(directory=str(tmp_path)), held_out=False)


def test_the_documentation_names_every_preset():
    text = DOCS.read_text(encoding="utf-8")
    for name, preset in PRESETS.items():
        assert f"| `{name}` | {preset.hub or 'local only'} |" in text and preset.about in text
