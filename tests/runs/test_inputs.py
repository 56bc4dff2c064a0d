"""What tells one model from another."""

import types

import pytest

from effreason.runs import inputs


def model(directory, revision=None):
    return types.SimpleNamespace(directory=directory, revision=revision)


@pytest.mark.parametrize(("file", "place"), [("config.json", 3), ("model.safetensors", 0), ("model.safetensors", -1)])
def test_a_byte_that_differs_makes_another_model(tmp_path, file, place):
    (tmp_path / "config.json").write_text("{ }   ")
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * inputs.ENDS))
    (tmp_path / "notes.txt").write_text("of no account")
    before = inputs.model_fingerprint(model(tmp_path))
    content = bytearray((tmp_path / file).read_bytes())
    content[place] = 9
    (tmp_path / "notes.txt").unlink()
    assert inputs.model_fingerprint(model(tmp_path)) == before
    (tmp_path / file).write_bytes(bytes(content))
    assert inputs.model_fingerprint(model(tmp_path)) != before


def test_a_model_of_the_hub_is_its_commit(tmp_path):
    assert inputs.model_fingerprint(model(tmp_path, "abc")) == "abc"
