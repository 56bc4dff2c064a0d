"""What files and folders of data may be: each form is read as the same rows."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from effreason.data import files
from effreason.runtime.errors import UserError

ROWS = [{"problem": "1+1, in \"Z\"", "answer": "2"},
        {"problem": "zwei\u2028und\ndrei", "answer": "5"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'problem,answer\n"1+1, in ""Z""",2\n"zwei\u2028und\ndrei",5\n'


def rows(path, subset=None, split="train"):
    return [row for _, row in files.path_rows(path, subset, split)]


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(rows=ROWS):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def arrow(new_file):
    sink, table = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist(ROWS)
    with new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl", LINES.encode()), ("a.jsonl", LINES.replace("\n", "\r\n").encode()),
    ("a.jsonl", LINES.encode("utf-16")), ("a.jsonl", LINES.encode("utf-16-le")),
    ("a.jsonl", LINES.encode("utf-8-sig")), ("a", LINES.rstrip().encode()),
    ("a.json", json.dumps(ROWS, indent=2).encode()), ("a.json", json.dumps(ROWS).encode()),
    ("a.jsonl.gz", gzip.compress(LINES.encode())), ("a.jsonl.bz2", bz2.compress(LINES.encode())),
    ("a.jsonl.xz", lzma.compress(LINES.encode())), ("a.jsonl.zst", zstd(LINES.encode())),
    ("a.jsonl", gzip.compress(json.dumps(ROWS, indent=1).encode())),
    ("a.csv", CSV.encode()), ("a.csv", CSV.encode("utf-8-sig")), ("a.CSV", CSV.encode("utf-16")),
    ("a.csv.gz", gzip.compress(CSV.encode())),
    ("a.tsv", CSV.replace(",", "\t").replace("1\t", "1,").encode().replace(b"1+1\t", b"1+1,")),
    ("a.parquet", parquet()), ("a.bin", parquet()), ("a.parquet.gz", gzip.compress(parquet())),
    ("a.arrow", arrow(pyarrow.ipc.new_file)), ("a.arrow", arrow(pyarrow.ipc.new_stream)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_file_is_what_its_content_is(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert rows(tmp_path / name) == ROWS


def test_locations_are_lines_entries_or_rows(tmp_path):
    path = tmp_path / "a"
    path.write_text("\n" + LINES)
    assert [place for place, _ in files.file_rows(path)] == [f"{path}:2", f"{path}:3"]
    path.write_text(json.dumps(ROWS, indent=2))
    assert [place for place, _ in files.file_rows(path)] == [f"{path}:1", f"{path}:2"]
    path = tmp_path / "a.csv"
    path.write_text(CSV.replace("\u2028", ""))
    assert [place for place, _ in files.file_rows(path)] == [f"{path}:2", f"{path}:4"]
    path.write_bytes(parquet())
    assert [place for place, _ in files.file_rows(path)] == [f"{path}:0", f"{path}:1"]


def test_a_conversation_in_a_row_has_numbered_columns(tmp_path):
    turns = [{"from": "human", "value": "1+1"},
             {"from": "assistant", "ground_truth": {"value": "2"}}]
    for content in (json.dumps([turns, turns]), f"{json.dumps(turns)}\n{json.dumps(turns)}\n"):
        (tmp_path / "a.json").write_text(content)
        assert rows(tmp_path / "a.json") == [{"0": turns[0], "1": turns[1]}] * 2


def test_one_object_over_several_lines_is_a_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS[0], indent=2))
    assert rows(tmp_path / "a.json") == ROWS[:1]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00002.parquet").write_bytes(parquet(ROWS[:1]))
    (tmp_path / "data" / "train-00001-of-00002.parquet").write_bytes(parquet(ROWS[1:]))
    (tmp_path / "data" / "test-00000-of-00001.parquet").write_bytes(parquet(ROWS[1:]))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    return tmp_path


def test_a_folder_has_the_layout_of_a_set_on_the_hub(folder):
    assert rows(folder) == ROWS and rows(folder, split="test") == ROWS[1:]
    assert next(files.path_rows(folder, None, "test"))[0] == (
        f"{folder}/data/test-00000-of-00001.parquet:0")
    with pytest.raises(UserError, match=r"has no split 'dev', found train, test; data\.split or"):
        rows(folder, split="dev")


def test_a_folder_of_plain_files_is_one_split(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "b.jsonl").write_text(LINES)
    assert rows(tmp_path) == ROWS * 2
    (tmp_path / "b.jsonl").write_text(LINES + "{")
    with pytest.raises(UserError, match=r"b\.jsonl:3: not valid JSON"):
        rows(tmp_path)


def test_a_folder_of_several_subsets_needs_the_name_of_one(folder):
    configurations = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"data/{split}-*"}]}
        for name, split in (("all", "train"), ("few", "test"))]
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': configurations})}\n---\n")
    assert rows(folder, "few") == ROWS[1:]
    for subset in (None, "odd"):
        with pytest.raises(UserError, match=r"data\.subset must name one .*all.*few"):
            rows(folder, subset)


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read by datasets .*data files"):
        rows(tmp_path)
