"""What a data.path may name, and what is said about one that is wrong."""

import json
import time

import pytest

from effreason.errors import UserError
from effreason.problems import answers, sources
from effreason.problems.sources import Spec
from effreason.runtime.config import DataConfig


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(name, held_out=False, split=None, **fields):
    return sources.read(str(name), DataConfig(**fields), held_out=held_out, split=split)[0]


def test_paths_name_sets_with_and_without_weights(tmp_path):
    assert sources.parse("gsm8k", "data.path") == (Spec("gsm8k"),)
    assert sources.parse("gsm8k, math", "data.path") == (Spec("gsm8k"), Spec("math"))
    assert sources.parse("gsm8k=0.3, org/name = 2", "data.path") == (Spec("gsm8k", 0.3), Spec("org/name", 2.0))
    odd = write(tmp_path / "alpha=0.1,seed=2.jsonl", [])
    assert sources.parse(odd, "data.path") == (Spec(odd),)
    equals = write(tmp_path / "alpha=0.1.jsonl", [])
    assert sources.parse(f"{equals},gsm8k", "data.path") == (Spec(equals), Spec("gsm8k"))
    assert sources.parse(f"{equals}=2,gsm8k=1", "data.path") == (Spec(equals, 2.0), Spec("gsm8k", 1.0))


@pytest.mark.parametrize(("path", "message"), [
    ("gsm8k=0,math=1", "weight of gsm8k must be a positive number, got '0'"),
    ("gsm8k=x", "weight of gsm8k must be a positive number, got 'x'"),
    ("gsm8k=inf", "must be a positive number"), ("gsm8k=0.3,math", "a weight to each set or to none"),
    ("gsm8k,,math", "with commas between them"), ("", "with commas between them"), ("=1", "with commas between them"),
    ("math,math", "each set once")])
def test_a_path_that_is_wrong(path, message):
    with pytest.raises(UserError, match=message):
        sources.parse(path, "data.path")


def test_an_evaluation_takes_no_weights():
    with pytest.raises(UserError, match=r"evaluation\.path takes no weights, got 'gsm8k=0\.5'"):
        sources.parse("gsm8k=0.5", "evaluation.path", weights=False)


@pytest.mark.parametrize(("name", "message"), [
    ("gsmk8", "no preset, no file and no id on the Hugging Face Hub; did you mean gsm8k"),
    ("MATH-500", "did you mean math500"), ("xyzzy", "presets are gsm8k, math"),
    ("data/train.jsonl", r"data/train\.jsonl does not exist"), ("data.parquet", "does not exist"),
    ("../data", "does not exist"), ("a/b/c", "does not exist")])
def test_a_name_that_is_nothing(name, message):
    with pytest.raises(UserError, match=message):
        read(name)


@pytest.mark.parametrize(("row", "found"), [
    ('{"problem": "1"', "2: not valid JSON"), ("[1]\n", "2: expected a JSON object, found list"),
    ('{"problem": "1"}\n', "2: has no field 'answer', found problem"),
    ('{"problem": "1", "answer": null}\n', "2: field 'answer' must be text or a number, found NoneType")])
def test_a_broken_line_is_named(tmp_path, row, found):
    path = write(tmp_path / "data.jsonl", [{"problem": "1", "answer": "1"}, row])
    with pytest.raises(UserError, match=rf"data\.jsonl:{found}"):
        read(path)


def test_an_existing_file_comes_before_an_id_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    write(tmp_path / "org" / "name", [{"problem": "1", "answer": "1"}])
    monkeypatch.chdir(tmp_path)
    assert [row.text for row in read("org/name")] == ["1"]


def test_parquet_and_saved_folders_are_read_like_jsonl(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"problem": "(1+2)%10", "answer": "3"}, {"problem": "(1+3)%10", "answer": "4"}]
    saved = datasets.Dataset.from_list(rows)
    saved.to_parquet(str(tmp_path / "data.parquet"))
    saved.save_to_disk(str(tmp_path / "folder"))
    for path in (tmp_path / "data.parquet", tmp_path / "folder"):
        assert [row.answer for row in read(path)] == ["3", "4"]
    with pytest.raises(UserError, match="0: has no field 'x', found problem, answer"):
        read(tmp_path / "folder", answer_field="x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: cannot be read by datasets"):
        read(tmp_path / "empty")
    datasets.DatasetDict({"train": saved, "dev": saved.select([1])}).save_to_disk(str(tmp_path / "splits"))
    assert [row.answer for row in read(tmp_path / "splits")] == ["3", "4"]
    with pytest.raises(UserError, match=r"has no split 'test', found train, dev; data\.split or evaluation\.split"):
        read(tmp_path / "splits", held_out=True)
    assert [row.answer for row in read(tmp_path / "splits", split="dev")] == ["4"]


def test_an_id_on_the_hub_is_read_with_its_subset_and_split(monkeypatch):
    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        return [{"problem": "1", "answer": 2}]

    monkeypatch.setattr(sources, "_load_hub", load)
    assert read("org/name", subset="easy")[0].answer == "2"
    read("org/name", held_out=True)
    read("org/name", split="dev")
    assert asked == [("org/name", "easy", "train"), ("org/name", None, "test"), ("org/name", None, "dev")]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The libraries' own switch, as it is read at their import."""
    datasets = pytest.importorskip("datasets")
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_offline_is_one_line_at_once(offline):
    start = time.monotonic()
    with pytest.raises(UserError, match="org/none: is no file here and not in the cache, and HF_HUB_OFFLINE") as caught:
        read("org/none")
    assert time.monotonic() - start < 5 and "\n" not in str(caught.value)


@pytest.mark.parametrize(("error", "message"), [
    (ConnectionError("no route"), "the Hugging Face Hub cannot be reached: check the network, set HF_HUB_OFFLINE=1"),
    (type("RepositoryNotFoundError", (Exception,), {})("404"), "not on the Hugging Face Hub, or private"),
    (type("GatedRepoError", (Exception,), {})("403"), "is gated: accept its conditions"),
    (ValueError("Config name is missing.\nPlease pick one: ['a', 'b']"), r"needs data\.subset \(.*'a', 'b'"),
    (ValueError("BuilderConfig 'x' not found. Available: ['a']"), r"needs data\.subset, which has no 'x'"),
    (ValueError('Unknown split "train". Should be one of [\'test\'].'), "has no split 'train' .*evaluation.split must"),
    (RuntimeError("Dataset scripts are no longer supported"), "cannot be read from the Hugging Face Hub .Dataset scr")])
def test_what_the_hub_says_is_one_line_with_what_to_do(monkeypatch, error, message):
    def state(name, offline):
        raise error

    monkeypatch.setattr(sources, "_hub_state", state)
    with pytest.raises(UserError, match=message) as caught:
        read("org/name", subset="x" if "which" in message else None)
    assert str(caught.value).startswith("org/name: ") and "\n" not in str(caught.value)


def test_what_datasets_itself_says_of_subsets_and_splits(tmp_path, monkeypatch):
    # A repository of the Hub is a folder like this one, and `datasets` reads both in the same way.
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources, "_hub_state", lambda name, offline: (None, False))
    configurations = []
    for name in ("easy", "hard"):
        write(tmp_path / f"{name}.jsonl", [{"problem": name, "answer": "1"}])
        files = [{"split": "train", "path": f"{name}.jsonl"}]
        configurations.append({"config_name": name, "data_files": files})
    (tmp_path / "README.md").write_text(f"---\n{json.dumps({'configs': configurations})}\n---\n")
    load = sources._load_hub
    assert [row["problem"] for row in load(str(tmp_path), "hard", "train")] == ["hard"]
    for subset, split, message in ((None, "train", r"needs data\.subset \(.*easy.*hard"),
                                   ("odd", "train", r"needs data\.subset, which has no 'odd' \(.*easy.*hard"),
                                   ("easy", "test", r"has no split 'test' .*train.*must name one")):
        with pytest.raises(UserError, match=message):
            load(str(tmp_path), subset, split)


def test_a_saved_folder_on_the_hub_is_downloaded_whole(monkeypatch, tmp_path):
    datasets, huggingface_hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    rows = [{"problem": "1", "answer": "2"}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "splits"))
    monkeypatch.setattr(sources, "_hub_state", lambda name, offline: ("abc", True))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / name.split("/")[1]))
    assert read("org/one")[0].answer == read("org/splits")[0].answer == "2"
    with pytest.raises(UserError, match="org/splits: has no split 'test'"):
        read("org/splits", held_out=True)


@pytest.mark.parametrize(("text", "source", "answer"), [
    (" 12 ", "whole", "12"), ("so 3 #### 2 #### 1,234 ", "hashes", "1,234"), ("no marker", "hashes", ""),
    (r"$\boxed{1}$, so \boxed{\frac{1}{2}}.", "boxed", r"\frac{1}{2}"), (r"\boxed{\{1, 2\}}", "boxed", r"\{1, 2\}"),
    ("no box", "boxed", ""), (r"\boxed{1", "boxed", "")])
def test_final_answers(text, source, answer):
    assert answers.extract(text, source) == answer


LISTED = "Who?\nOptions:\n(A) me\n(B) you"


@pytest.mark.parametrize(("row", "letter"), [
    ({"problem": "Who?", "answer": "B", "options": ["me", "you"]}, "B"),
    ({"problem": "Who?", "answer": "(b)", "options": ["me", "you"]}, "B"),
    ({"problem": "Who?", "answer": 0, "options": ["me", "you"]}, "A"),
    ({"problem": "Who?", "answer": "you", "options": ["me", "you"]}, "B"),
    ({"problem": "Who?", "answer": "2", "options": {"label": ["1", "2"], "text": ["me", "you"]}}, "B"),
    ({"problem": "Who?", "answer": "B", "options": {"A": "me", "B": "you", "C": None}}, "B"),
    ({"problem": LISTED, "answer": "A", "options": {"A": "me", "B": "you"}}, "A")])
def test_choices_stand_in_the_problem_once_and_answers_are_letters(tmp_path, row, letter):
    path = write(tmp_path / "data.jsonl", [row])
    (found,) = read(path, answer_kind="choice", choices_field="options")
    assert (found.text, found.answer, found.choices, found.kind) == (LISTED, letter, ("me", "you"), "choice")


def test_choices_that_stand_in_the_text_are_read_from_it(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"problem": LISTED, "answer": "(B)"}, {"problem": "A or B?", "answer": "b"}])
    first, second = read(path, answer_kind="choice")
    assert (first.text, first.answer, first.choices) == (LISTED, "B", ("me", "you"))
    assert (second.answer, second.choices) == ("B", ())


@pytest.mark.parametrize(("row", "message"), [
    ({"answer": "C", "options": ["me", "you"]}, "answer 'C' is none of the choices A, B"),
    ({"answer": "A"}, "has no field 'options', found answer, problem"),
    ({"answer": "A", "options": "me"}, "choices must be a list or a table, found str"),
    ({"answer": "A", "options": ["me"]}, "choices must be 2 to 26 answers, each with a label, found 1 and 1")])
def test_choices_that_are_wrong(tmp_path, row, message):
    path = write(tmp_path / "data.jsonl", [row | {"problem": "Who?"}])
    with pytest.raises(UserError, match=rf"data\.jsonl:1: {message}"):
        read(path, answer_kind="choice", choices_field="options")


def test_an_empty_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.jsonl: has no rows"):
        read(write(tmp_path / "data.jsonl", []))
