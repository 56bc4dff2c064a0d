"""What a data.path may name, and what is said about one that is wrong."""

import json
import time

import pytest

from effreason.data import answers, hub, sources
from effreason.data.sources import Spec
from effreason.runtime.config import DataConfig
from effreason.runtime.errors import UserError


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n"
                            for row in rows), encoding="utf-8")
    return str(path)


def read(name, held_out=False, split=None, **fields):
    return sources.read(str(name), DataConfig(**fields), held_out=held_out, split=split)[0]


def test_paths_name_sets_with_and_without_weights(tmp_path):
    assert sources.parse("gsm8k", "data.path") == (Spec("gsm8k"),)
    assert sources.parse("gsm8k, math", "data.path") == (Spec("gsm8k"), Spec("math"))
    assert sources.parse("gsm8k=0.3, org/name = 2", "data.path") == (Spec("gsm8k", 0.3),
                                                                     Spec("org/name", 2.0))
    odd = write(tmp_path / "alpha=0.1,seed=2.jsonl", [])
    assert sources.parse(odd, "data.path") == (Spec(odd),)
    equals = write(tmp_path / "alpha=0.1.jsonl", [])
    assert sources.parse(f"{equals},gsm8k", "data.path") == (Spec(equals), Spec("gsm8k"))
    assert sources.parse(f"{equals}=2,gsm8k=1", "data.path") == (Spec(equals, 2.0),
                                                                 Spec("gsm8k", 1.0))


@pytest.mark.parametrize(("path", "message"), [
    ("gsm8k=0,math=1", "weight of gsm8k must be a positive number, got '0'"),
    ("gsm8k=x", "weight of gsm8k must be a positive number, got 'x'"),
    ("gsm8k=inf", "must be a positive number"), ("gsm8k=0.3,math",
                                                 "a weight to each set or to none"),
    ("gsm8k,,math", "with commas between them"), ("", "with commas between them"),
    ("=1", "with commas between them"),
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
    ("../nothing", "does not exist"), ("a/b/c", "does not exist")])
def test_a_name_that_is_nothing(name, message):
    with pytest.raises(UserError, match=message):
        read(name)


@pytest.mark.parametrize(("row", "found"), [
    ('{"problem": "1"', "2: not valid JSON"), ("[1]\n",
                                               "2: expected JSONL, one object a line, found list"),
    ('{"problem": "1"}\n', "2: has no field 'answer', found problem"),
    ('{"problem": "1", "answer": true}\n',
     "2: field 'answer' must be text or a number, found bool"),
    ('{"problem": "1", "answer": {"value": 1}}\n',
     "2: field 'answer' must be text or a number, found dict, name one of its entries"),
    ('{"problem": "a\\ud800b", "answer": "1"}',
     r"2: field 'problem' contains half of a surrogate pair, '\\ud800'"),
    ('{"problem": "1", "answer": "\\udc00"}',
     "2: field 'answer' contains half of a surrogate pair"),
    ('{"\\ud800": "1"}', r"2: has no field 'problem', found \\ud800"),
    ('{"problem": ' + "[" * 100_000, "2: JSON that cannot be read .*recursion"),
    ('{"problem": ' + "9" * 5000 + "}", "2: JSON that cannot be read .*digits")])
def test_a_broken_line_is_named(tmp_path, row, found):
    path = write(tmp_path / "data.jsonl", [{"problem": "1", "answer": "1"}, row])
    with pytest.raises(UserError, match=rf"data\.jsonl:{found}") as caught:
        read(path)
    assert "\n" not in str(caught.value) and str(caught.value).encode()


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.json", b'[1, {"problem": "1", "answer": "1"}]',
     r"a\.json:1: expected JSONL, one object a line, found int"),
    ("a.json", b'\n[\n{"problem": "1", "answer": "1"}\n', r"a\.json:4: not valid JSON \(Expecting"),
    ("a.txt", b"problem,answer\n1,1\n",
     r"a\.txt:1: not valid JSON \(.*\); expected JSONL, one object a line"),
    ("a.csv", b"problem,answer\n1,1\n\n1,2,3\n", r"a\.csv:4: has 3 cells, expected 2"),
    ("a.csv", b"a,a\n1,1\n", r"a\.csv:1: names a column twice: a, a"),
    ("a.csv", b'problem,answer\n"1,1\n', r"a\.csv:2: not valid CSV \(unexpected end of data\)"),
    ("a.csv", b"problem,answer\n1,caf\xe9\n", r"a\.csv:2: is not UTF-8, byte 0xe9"),
    ("a.gz", b"\x1f\x8bjunk", r"a\.gz: cannot be unpacked \(Compressed file ended"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n",
     r"a\.jsonl: is a Git LFS pointer"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n",
     r"a\.parquet: is a Git LFS pointer"),
    ("a.jsonl", b"PK\x03\x04junk", r"a\.jsonl: is a ZIP archive or a spreadsheet"),
    ("a.jsonl", b"<!doctype html>", r"a\.jsonl: is a web page"),
    ("a.arrow", b"ARROW1junk", r"a\.arrow: cannot be read as Arrow"),
    ("a.jsonl", b"\xff\xfe{", r"a\.jsonl: is no text in UTF-16"),
    ("a.jsonl", '{"problem": "1", "answer": 1}\n{"problem": "caf\u00e9"}'.encode("latin-1"),
     r"a\.jsonl:2: is not UTF-8, byte 0xe9 at column 17; expected JSONL")])
def test_a_file_that_is_no_jsonl(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_a_mark_of_utf8_at_the_beginning_is_none_of_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"problem": "1", "answer": 1}\n')
    assert [row.text for row in read(tmp_path / "a.jsonl")] == ["1"]


@pytest.mark.parametrize("content", [b"", b"PAR1 junk junk junk PAR1"])
def test_a_damaged_parquet_file_is_one_line(tmp_path, content, capfd):
    pytest.importorskip("datasets")
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as Parquet "
                       r"\(Parquet file size is") as caught:
        read(tmp_path / "a.parquet")
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


@pytest.mark.parametrize(("file", "content"), [("state.json", "{}"), ("dataset_dict.json", "[]"),
                                               ("state.json", "")])
def test_a_damaged_saved_folder_is_one_line(tmp_path, file, content, capfd):
    pytest.importorskip("datasets")
    (tmp_path / file).write_text(content)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read by datasets") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


def test_rows_without_a_problem_are_told_from_those_without_an_answer(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"problem": "1", "answer": 1},
                                           {"problem": " \n", "answer": 2},
                                           {"problem": "3", "answer": ""}])
    rows, unusable = sources.read(path, DataConfig(), held_out=False)
    assert [row.number for row in rows] == [0]
    assert [(row.number, row.location, row.reason, row.text) for row in unusable] == [
        (1, f"{path}:2", sources.WITHOUT_TEXT, " \n"),
        (2, f"{path}:3", sources.WITHOUT_ANSWER, "3")]
    path = write(tmp_path / "none.jsonl", [{"problem": "", "answer": 1}])
    with pytest.raises(UserError, match=r"none\.jsonl:1: no problem in column "
                       r"'problem', and so in all 1 rows"):
        read(path)


def test_a_split_is_for_sets_that_have_several(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"problem": "1", "answer": 1}])
    data = DataConfig(split="dev")
    with pytest.raises(UserError, match=r"data\.split is for sets of several splits; "
                       r"data\.path names a file without"):
        sources.check(path, data, "data.path")
    with pytest.raises(UserError, match=r"evaluation\.split is for .*; evaluation\.path "
                       r"names a file .*, got 'dev'"):
        sources.check(path, data, "evaluation.path", held_out=True, split="dev")
    sources.check(f"{path},org/name", data, "data.path")
    sources.check(path, data, "evaluation.path", held_out=True)
    sources.check(path, data, "data.exclude")
    sources.check(str(tmp_path), data, "data.path")
    assert all(map(sources.takes_subset, ("org/name", "org/name@abc", str(tmp_path))))
    assert not any(map(sources.takes_subset, ("tiny", "gsm8k", path)))


@pytest.mark.parametrize("name", ["tiny_long", "tiny_other"])
def test_sets_of_what_training_never_sees_are_for_evaluation_alone(name):
    rows = read(name, held_out=True)
    assert len(rows) == 200 and [row.number for row in rows] == list(range(200))
    assert len({row.level for row in rows}) >= 3 and rows == read(name, held_out=True)
    sources.check(name, DataConfig(), "evaluation.path", held_out=True)
    sources.check(f"tiny,{name}", DataConfig(), "data.exclude")
    assert not sources.takes_subset(name)
    message = f"^data\\.path: {name} is only for evaluation; the set to train on is tiny$"
    with pytest.raises(UserError, match=message):
        sources.check(f"tiny=1,{name}=1", DataConfig(), "data.path")
    with pytest.raises(UserError, match=message):
        read(name)
    with pytest.raises(UserError, match=f"{name} takes no revision"):
        sources.check(f"{name}@abc", DataConfig(), "evaluation.path", held_out=True)


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
        assert [row.reference for row in read(path)] == ["3", "4"]
    with pytest.raises(UserError, match="0: has no field 'x', found problem, answer"):
        read(tmp_path / "folder", answer_field="x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: cannot be read by datasets"):
        read(tmp_path / "empty")
    splits = datasets.DatasetDict({"train": saved, "dev": saved.select([1])})
    splits.save_to_disk(str(tmp_path / "splits"))
    assert [row.reference for row in read(tmp_path / "splits")] == ["3", "4"]
    with pytest.raises(UserError, match=r"has no split 'test', found train, dev; "
                       r"data\.split or evaluation\.split"):
        read(tmp_path / "splits", held_out=True)
    assert [row.reference for row in read(tmp_path / "splits", split="dev")] == ["4"]


def test_an_id_on_the_hub_is_read_with_its_subset_and_split(monkeypatch):
    asked = []

    def load(name, subset, split, revision):
        asked.append((name, subset, split) if revision is None else (name, revision))
        return [{"problem": "1", "answer": 2 if revision is None else ""}]

    monkeypatch.setattr(hub, "_load", load)
    assert read("org/name", subset="easy")[0].reference == "2"
    read("org/name", held_out=True)
    read("org/name", split="dev")
    assert asked == [("org/name", "easy", "train"), ("org/name", None, "test"),
                     ("org/name", None, "dev")]
    with pytest.raises(UserError, match="org/name@refs/pr/1:train:0: no answer"):
        read("org/name@refs/pr/1")
    assert asked[3:] == [("org/name", "refs/pr/1")]


def test_revisions_stand_behind_the_name_also_in_mixtures():
    assert sources.parse("org/name@abc=0.3,gsm8k=1", "data.path") == (Spec("org/name@abc", 0.3),
                                                                      Spec("gsm8k", 1.0))
    sources.check("org/name@v1.0, org/name@refs/pr/1", DataConfig(), "data.path")
    for name in ("org/name@", "org/name@a b", "name@abc"):
        with pytest.raises(UserError, match=f"data.path names '{name}', which is no "
                           "preset, no file and no id"):
            sources.check(name, DataConfig(), "data.path")


def test_a_revision_is_asked_for_and_its_commit_loaded(monkeypatch):
    datasets, huggingface_hub = pytest.importorskip("datasets"), pytest.importorskip(
        "huggingface_hub")
    asked = []

    class Api:
        def dataset_info(self, name, revision, timeout):
            asked.append((name, revision))
            return type("Info", (), {"sha": "f" * 40, "siblings": []})

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split,
                        revision: asked.append((name, revision))
                        or [{"problem": "1", "answer": "2"}])
    assert [row.reference for row in read("org/name@v1")] == ["2"]
    assert asked == [("org/name", "v1"), ("org/name", "f" * 40)]


def test_offline_another_commit_in_the_cache_is_not_taken(monkeypatch, offline, tmp_path):
    datasets = pytest.importorskip("datasets")
    commit = "0123456789" * 4
    saved = datasets.Dataset.from_list([{"problem": "1", "answer": "2"}])
    saved.save_to_disk(str(tmp_path / commit))
    loaded = datasets.load_from_disk(str(tmp_path / commit))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    for name in (f"org/name@{commit}", "org/name"):
        assert [row.reference for row in read(name)] == ["2"]
    with pytest.raises(UserError, match="org/name@abcdef0: the newest in the cache "
                       f"is another commit, {commit}"):
        read("org/name@abcdef0")
    with pytest.raises(UserError,
                       match="org/name@v1: the cache knows only commits.*name the commit"):
        read("org/name@v1")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The libraries' own switch, as it is read at their import."""
    datasets = pytest.importorskip("datasets")
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_offline_is_one_line_at_once(offline):
    start = time.monotonic()
    with pytest.raises(UserError, match="org/none: is no file here and not in the "
                       "cache, and HF_HUB_OFFLINE") as caught:
        read("org/none")
    assert time.monotonic() - start < 20 and "\n" not in str(caught.value)


@pytest.mark.parametrize(("error", "message"), [
    (ConnectionError("no route"),
     "the Hugging Face Hub cannot be reached: check the network, set HF_HUB_OFFLINE=1"),
    (type("RepositoryNotFoundError", (Exception,), {})("404"),
     "not on the Hugging Face Hub, or private"),
    (type("GatedRepoError", (Exception,), {})("403"), "is gated: accept its conditions"),
    (type("RevisionNotFoundError", (RuntimeError,), {})("404"),
     "has no commit, tag or branch 'abc'"),
    (ValueError("Config name is missing.\nPlease pick one: ['a', 'b']"),
     r"needs data\.subset \(.*'a', 'b'"),
    (ValueError("BuilderConfig 'x' not found. Available: ['a']"),
     r"needs data\.subset, which has no 'x'"),
    (ValueError('Unknown split "train". Should be one of [\'test\'].'),
     "has no split 'train' .*evaluation.split must"),
    (RuntimeError("Dataset scripts are no longer supported"),
     "cannot be read from the Hugging Face Hub .Dataset scr")])
def test_what_the_hub_says_is_one_line_with_what_to_do(monkeypatch, error, message):
    def state(name, revision, offline):
        raise error

    monkeypatch.setattr(hub, "_state", state)
    with pytest.raises(UserError, match=message) as caught:
        read("org/name@abc", subset="x" if "which" in message else None)
    assert str(caught.value).startswith("org/name@abc: ") and "\n" not in str(caught.value)


def test_what_datasets_itself_says_of_subsets_and_splits(tmp_path, monkeypatch):
    # A repository of the Hub is a folder like this one, and `datasets` reads both in the same way.
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub, "_state", lambda name, revision, offline: (None, False))
    configurations = []
    for name in ("easy", "hard"):
        write(tmp_path / f"{name}.jsonl", [{"problem": name, "answer": "1"}])
        files = [{"split": "train", "path": f"{name}.jsonl"}]
        configurations.append({"config_name": name, "data_files": files})
    (tmp_path / "README.md").write_text(f"---\n{json.dumps({'configs': configurations})}\n---\n")
    load = hub._load
    assert [row["problem"] for row in load(str(tmp_path), "hard", "train", None)] == ["hard"]
    for subset, split, message in ((None, "train", r"needs data\.subset \(.*easy.*hard"),
                                   ("odd", "train",
                                    r"needs data\.subset, which has no 'odd' \(.*easy.*hard"),
                                   ("easy", "test", r"has no split 'test' .*train.*must name one")):
        with pytest.raises(UserError, match=message):
            load(str(tmp_path), subset, split, None)


def test_a_saved_folder_on_the_hub_is_downloaded_whole(monkeypatch, tmp_path):
    datasets, huggingface_hub = pytest.importorskip("datasets"), pytest.importorskip(
        "huggingface_hub")
    rows = [{"problem": "1", "answer": "2"}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"))
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    splits.save_to_disk(str(tmp_path / "splits"))
    monkeypatch.setattr(hub, "_state", lambda name, revision, offline: ("abc", True))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name,
                        **_: str(tmp_path / name.split("/")[1]))
    assert read("org/one")[0].reference == read("org/splits")[0].reference == "2"
    with pytest.raises(UserError, match="org/splits: has no split 'test'"):
        read("org/splits", held_out=True)


@pytest.mark.parametrize(("text", "source", "answer"), [(" 12 ", "whole", "12"),
                                                        ("so 3 #### 2 #### 1,234 ", "hashes",
                                                         "1,234"), ("no marker", "hashes", ""),
                                                        (r"$\boxed{1}$, so \boxed{\frac{1}{2}}.",
                                                         "boxed", r"\frac{1}{2}"),
                                                        (r"\boxed{\{1, 2\}}", "boxed", r"\{1, 2\}"),
                                                        ("no box", "boxed", ""),
                                                        (r"\boxed{1", "boxed", "")])
def test_final_answers(text, source, answer):
    assert answers.extract(text, source) == answer


LISTED = "Who?\nOptions:\n(A) me\n(B) you"


@pytest.mark.parametrize(("row", "letter"), [
    ({"problem": "Who?", "answer": "B", "options": ["me", "you"]}, "B"),
    ({"problem": "Who?", "answer": "(b)", "options": ["me", "you"]}, "B"),
    ({"problem": "Who?", "answer": 0, "options": ["me", "you"]}, "A"),
    ({"problem": "Who?", "answer": 1.0, "options": ["me", "you"]}, "B"),
    ({"problem": "Who?", "answer": ["you"], "options": ["me", "you"]}, "B"),
    ({"problem": "Who?", "answer": "2", "options": {"label": ["1", "2"], "text": ["me", "you"]}},
     "B"),
    ({"problem": "Who?", "answer": "B", "options": {"A": "me", "B": "you", "C": None}}, "B"),
    ({"problem": LISTED, "answer": "A", "options": {"A": "me", "B": "you"}}, "A")])
def test_choices_stand_in_the_problem_once_and_answers_are_letters(tmp_path, row, letter):
    path = write(tmp_path / "data.jsonl", [row])
    (found,) = read(path, answer_kind="choice", choices_field="options")
    assert (found.text, found.reference, found.choices, found.kind) == (LISTED, letter,
                                                                        ("me", "you"), "choice")


def test_choices_that_stand_in_the_text_are_read_from_it(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"problem": LISTED, "answer": "(B)"},
                                           {"problem": "A or B?", "answer": "b"}])
    first, second = read(path, answer_kind="choice")
    assert (first.text, first.reference, first.choices) == (LISTED, "B", ("me", "you"))
    assert (second.reference, second.choices) == ("B", ())


@pytest.mark.parametrize(("row", "message"), [
    ({"answer": "C", "options": ["me", "you"]}, "answer 'C' is none of the choices A, B"),
    ({"answer": "A"}, "has no field 'options', found answer, problem"),
    ({"answer": "A", "options": "me"}, "choices must be a list or a table, found str"),
    ({"answer": "A", "options": [{"x": 1}, None]},
     "choices: a choice must be text or a number, found dict"),
    ({"answer": "A", "options": ["me", True]},
     "choices: a choice must be text or a number, found bool"),
    ({"answer": "A", "options": ["me", "\ud800"]},
     "choices: a choice contains half of a surrogate pair"),
    ({"answer": "A", "options": {"label": ["A", "B"], "text": None}},
     "choices: text must be a list, found NoneType"),
    ({"answer": "A", "options": {"label": "AB", "text": ["me", "you"]}},
     "choices: label must be a list, found str"),
    ({"answer": "A", "options": {"label": ["A", ["B"]], "text": ["me", "you"]}},
     "choices: a label must be text or a number, found list"),
    ({"answer": "A", "options": ["me"]},
     "choices must be 2 to 26 answers, each with a label, found 1 and 1")])
def test_choices_that_are_wrong(tmp_path, row, message):
    path = write(tmp_path / "data.jsonl", [row | {"problem": "Who?"}])
    with pytest.raises(UserError, match=rf"data\.jsonl:1: {message}"):
        read(path, answer_kind="choice", choices_field="options")


def test_an_empty_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.jsonl: has no rows"):
        read(write(tmp_path / "data.jsonl", []))
