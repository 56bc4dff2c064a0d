import json
import os

import pytest

from effreason.runtime import files
from effreason.runtime.errors import UserError


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch):
    path, synced = tmp_path / "a.txt", []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    path.write_text("before")

    with files.replacing(path) as partial:
        partial.write_text("afterwards")
        assert path.read_text() == "before" and partial.parent == tmp_path
    assert path.read_text() == "afterwards" and synced == [10]

    for error, raised, message in (
            (OSError(28, "No space left on device"), UserError,
             "a.txt: cannot be written: No space left"),
            (UserError("mine"), UserError, "^mine$"),
            (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop")):
        with pytest.raises(raised, match=message), files.replacing(path) as partial:
            partial.write_text("half")
            raise error
        assert path.read_text() == "afterwards" and list(tmp_path.iterdir()) == [path]

    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        files.write_json(path / "b.json", {})


def test_json_and_digests_come_back(tmp_path):
    path = tmp_path / "a.json"
    assert files.digest(path) is None
    files.write_json(path, {"ü": [1, None]})
    assert json.loads(path.read_text()) == {"ü": [1, None]} and path.read_bytes().endswith(b"}\n")
    assert len(files.digest(path)) == 64
    assert json.loads(files.json_line({"text": "ü\ud800\u2028"})) == {"text": "ü\ud800\u2028"}
    with pytest.raises(ValueError, match="Out of range"):
        files.json_line({"loss": float("nan")})
