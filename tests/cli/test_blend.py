"""Blending two models: exact at both ends, the mean in the middle, refusals, a usable directory."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_copies import assert_same_bits, edit, rewrite, stored

from effreason.cli import blend as blends
from effreason.cli import main
from effreason.lm import blend as lm_blend
from effreason.lm.hf import pretrained
from effreason.lm.hf.config import read_config
from effreason.lm.hf.pretrained import SHIPPED_REASONER, open_pretrained
from effreason.runtime import config as configuration
from effreason.runtime.errors import UserError
from effreason.runtime.files import read_json

TEMPLATE = "{{ messages[0]['content'] }}<think>"


@pytest.fixture
def trained(tmp_path):
    """The shipped reasoner with other weights, another template, and facts."""
    directory = Path(shutil.copytree(SHIPPED_REASONER, tmp_path / "run" / "model"))

    def change(tensors):
        rng = np.random.default_rng(0)
        tensors |= {name: (tensor + rng.normal(0, 0.01, tensor.shape)).astype(tensor.dtype)
                    for name, tensor in tensors.items()}

    rewrite(directory, change)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "effreason.json").write_text(json.dumps({"alpha": 0.2,
                                                          "template": {"sha256": "abc"}}))
    return directory


def blend(trained, output, weight, base="tiny"):
    blends.run(["--base", str(base), "--trained", str(trained), "--weight", weight, "--output",
                str(output)], "blend")
    return output


def test_the_ends_are_the_models_and_the_middle_is_their_mean(trained, tmp_path, capsys):
    blend(trained, tmp_path / "mixed", "0,0.5,1,1.5")
    one, other = stored(SHIPPED_REASONER), stored(trained)
    assert_same_bits(stored(tmp_path / "mixed-0"), one)
    assert_same_bits(stored(tmp_path / "mixed-1"), other)
    middle, beyond = stored(tmp_path / "mixed-0.5"), stored(tmp_path / "mixed-1.5")
    for name, tensor in one.items():
        assert middle[name].dtype == beyond[name].dtype == tensor.dtype
        wide, changed = tensor.astype(np.float64), other[name].astype(np.float64)
        half_a_digit = 2.0**-8 if tensor.dtype != np.float32 else 2.0**-23
        np.testing.assert_allclose(middle[name].astype(np.float64), (wide + changed) / 2,
                                   rtol=half_a_digit, atol=1e-7)
        np.testing.assert_allclose(beyond[name].astype(np.float64), 1.5 * changed - 0.5 * wide,
                                   rtol=half_a_digit,
                                   atol=1e-6)
    line = f"{tmp_path / 'mixed-0.5'}: 0.5 of tiny and 0.5 of {trained}\n"
    assert line in capsys.readouterr().out


def test_a_tree_is_blended_in_float32():
    base = {"a": jax.numpy.array([1.0, 2.0], "bfloat16"),
            "layers": {"b": jax.numpy.array([[4.0]], "float32")}}
    trained = {"a": jax.numpy.array([3.0, 2.0], "bfloat16"),
               "layers": {"b": jax.numpy.array([[0.0]], "float32")}}
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        found = lm_blend.blend(base, trained, 0.25)
    assert found["a"].dtype == found["layers"]["b"].dtype == "float32"
    np.testing.assert_array_equal(found["a"], [1.5, 2.0])
    np.testing.assert_array_equal(found["layers"]["b"], [[3.0]])
    traced = jax.jit(lm_blend.blend)(base, trained, jax.numpy.float32(0.25))
    assert jax.tree.all(jax.tree.map(lambda one, other: bool((one == other).all()), found, traced))


def test_a_blend_is_a_directory_like_the_trained_models(trained, tmp_path):
    made = blend(trained, tmp_path / "mixed", "0.25")
    opened = open_pretrained(str(made), dtype="float32")
    assert opened.decoder == read_config(trained) and opened.tokenizer.chat_template == TEMPLATE
    assert read_json(made / "effreason.json") == {"alpha": 0.2, "template": {"sha256": "abc"},
                                                  "blend": {
        "base": "tiny", "base_revision": None, "trained": "model", "weight": 0.25,
        "effreason": blends.__version__}}
    text = (made / "README.md").read_text()
    assert "0.75 times that of `tiny` plus 0.25 times that of `model`" in text
    assert str(tmp_path) not in text
    assert text.startswith("---\n") and "library_name: transformers" in text
    again = blend(made, tmp_path / "again", "1", base=trained)
    assert_same_bits(stored(again), stored(made))


def test_without_facts_of_the_training_none_are_made_up(trained, tmp_path):
    (trained / "effreason.json").unlink()
    assert not (blend(trained, tmp_path / "mixed", "0.5") / "effreason.json").exists()


@pytest.mark.parametrize(("weight", "message"), [
    ("2.5", r"--weight must be numbers in \[-1, 2\] with commas between them, got '2\.5'"),
    ("half", r"--weight must be numbers in \[-1, 2\]"),
    ("nan", r"--weight must be numbers in \[-1, 2\]"),
    ("none", "--weight must be at least one number, got none"),
    ("0.5,0.5", "--weight must name each number once")])
def test_a_weight_that_is_none(trained, tmp_path, weight, message):
    with pytest.raises(UserError, match=message):
        blend(trained, tmp_path / "mixed", weight)


def test_nothing_is_overwritten(trained, tmp_path):
    (tmp_path / "mixed-0.5").mkdir()
    with pytest.raises(UserError,
                       match=r"^--output: .*mixed-0\.5 exists already, nothing is overwritten$"):
        blend(trained, tmp_path / "mixed", "0.25,0.5")
    assert not (tmp_path / "mixed-0.25").exists()


def test_a_place_that_cannot_be_written_is_found_before_the_models_are_read(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="^--output: cannot write into .*/file$"):
        blend(tmp_path / "nowhere", tmp_path / "file" / "deeper" / "mixed", "0.5")


def test_a_revision_is_for_the_hub(tmp_path):
    for base in ("tiny", str(tmp_path)):
        with pytest.raises(UserError,
                           match=f"^--revision is for a model on the Hub, --base is {base}$"):
            blends.run(["--base", base, "--revision", "abc", "--trained", "tiny", "--weight", "0.5",
                        "--output",
                        str(tmp_path / "mixed")], "blend")


def test_models_of_different_architectures_are_refused(trained, tmp_path):
    edit(trained, rms_norm_eps=1e-5)
    with pytest.raises(UserError,
                       match=r"^--trained must have the architecture of the base: norm_eps of .* "
                             r"is 1e-05, of "
                                        r"tiny 1e-06$"):
        blend(trained, tmp_path / "mixed", "0.5")
    edit(trained, rms_norm_eps=1e-6, hidden_size=128)
    with pytest.raises(UserError, match=r"has shape \(40, 96\), config.json expects \(40, 128\)"):
        blend(trained, tmp_path / "mixed", "0.5")
    assert not list(tmp_path.glob("mixed*"))


def test_models_with_different_tokens_are_refused(trained, tmp_path):
    path = trained / "tokenizer.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    words = table["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(UserError,
                       match="^--trained must have the tokens of the base: the tokenizers of .* "
                             "and tiny have"):
        blend(trained, tmp_path / "mixed", "0.5")


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        blend(tmp_path / "nowhere", tmp_path / "mixed", "0.5")


def test_a_full_disk_leaves_nothing_behind(trained, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, "write_decoder", full)
    with pytest.raises(UserError, match=r"mixed: cannot be written: No space left on device"):
        blend(trained, tmp_path / "mixed", "0.5")
    assert not list(tmp_path.glob("mixed*"))


@pytest.mark.slow
def test_a_blend_can_be_evaluated(tmp_path):
    made = blend("tiny", tmp_path / "mixed", "0.5")
    config = str(configuration.shipped() / "tiny.yaml")
    assert main.main(["evaluate", "--config", config, "--models", str(made),
                      "--evaluation.problems", "12",
                     "--output", str(tmp_path / "results")]) == 0
