"""Models that also see: their decoder is read and trained, and everything else stays as it is."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_copies import assert_same_bits, edit, rewrite, stored

from effreason.lm import model
from effreason.lm.hf import config as configs
from effreason.lm.hf.config import read_config
from effreason.lm.hf.families import WRAPPERS
from effreason.lm.hf.pretrained import export_model
from effreason.lm.hf.weights import read_weights
from effreason.runtime.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"
SEES = {"model.visual.patch_embed.weight": np.ones((3, 2, 2), np.float16),
        "model.visual.scale": np.array(0.25, np.float32),
        "mtp.norm.weight": np.zeros(4, np.float32)}


@pytest.fixture
def whole(tmp_path):
    """The fixture qwen3_5 as the decoder of a model with a vision tower."""
    directory = Path(shutil.copytree(FIXTURES / "qwen3_5", tmp_path / "whole"))

    def wrap(tensors):
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors["model.language_model." + name.removeprefix("model.")] = tensors.pop(name)
        tensors |= SEES

    rewrite(directory, wrap)
    table = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(dict(
        model_type="qwen3_5", architectures=["Qwen3_5ForConditionalGeneration"], dtype="float32",
        text_config=table, vision_config=dict(depth=1), image_token_id=70,
        tie_word_embeddings=False)))
    return directory


def test_the_decoder_of_a_model_that_sees_is_read(whole):
    config, alone = read_config(whole), read_config(FIXTURES / "qwen3_5")
    assert dataclasses.replace(config, copied_prefixes=alone.copied_prefixes) == alone
    assert configs.max_positions(json.loads((whole / "config.json").read_text()), whole) == 64
    jax.tree.map(np.testing.assert_array_equal, read_weights(whole, config),
                 read_weights(FIXTURES / "qwen3_5", alone))


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000], ids=["one", "sharded"])
def test_an_export_has_all_that_the_source_has(whole, tmp_path, monkeypatch, shard_bytes):
    from effreason.lm.hf import weights

    monkeypatch.setattr(weights, "SHARD_BYTES", shard_bytes)
    config = read_config(whole)
    (whole / "preprocessor_config.json").write_text("{}")
    export_model(read_weights(whole, config), config, whole, tmp_path / "export")
    assert_same_bits(stored(tmp_path / "export"), stored(whole))
    assert (tmp_path / "export" / "preprocessor_config.json").exists()
    before, after = (json.loads((directory / "config.json").read_text())
                     for directory in (whole, tmp_path / "export"))
    assert after.pop("torch_dtype") == "float32" and after == before
    # And an export of the export.
    assert read_config(tmp_path / "export") == config
    jax.tree.map(np.testing.assert_array_equal, read_weights(tmp_path / "export", config),
                 read_weights(whole, config))


@pytest.mark.parametrize(("entries", "expected"), [
    (dict(text_config=None), "text_config must be a table with model_type qwen3_5_text"),
    (dict(text_config={"model_type": "qwen3"}), "text_config must be a table with model_type"),
    (dict(architectures=["Qwen3_5Model"]), "architectures"),
    (dict(quantization_config={"bits": 4}), "quantization_config")], ids=str)
def test_what_is_not_such_a_model_is_refused(whole, entries, expected):
    edit(whole, **entries)
    with pytest.raises(UserError, match=expected):
        read_config(whole)


def test_other_tensors_are_still_refused(whole):
    rewrite(whole, lambda tensors: tensors.update({"model.audio.weight": np.ones(3, np.float32)}))
    with pytest.raises(UserError, match="holds tensor model.audio.weight, which the decoder"):
        read_weights(whole, read_config(whole))


def test_every_wrapper_is_in_the_documents():
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert [name for name in WRAPPERS if f"`{name}`" not in text] == []


def _models():
    import make_fixtures
    import transformers

    qwen = transformers.Qwen3_5Config(
        text_config=make_fixtures.qwen3_5().to_dict(), vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32,
            num_position_embeddings=16, patch_size=4), tie_word_embeddings=False)
    gemma = transformers.Gemma3Config(
        text_config=make_fixtures.gemma3().to_dict(), mm_tokens_per_image=4, vision_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            image_size=8, patch_size=4))
    return {"qwen3_5": (transformers.Qwen3_5ForConditionalGeneration, qwen),
            "gemma3": (transformers.Gemma3ForConditionalGeneration, gemma)}


@pytest.mark.parity
@pytest.mark.parametrize("name", WRAPPERS)
def test_transformers_computes_the_same_before_and_after(name, tmp_path):
    torch = pytest.importorskip("torch", reason="the extra `parity` brings torch")
    import make_fixtures

    torch.manual_seed(0)
    architecture, table = _models()[name]
    theirs = architecture(table).float().eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:     # norms and biases are 0 or 1 at first
            parameter.data += 0.1 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.config.vocab_size = theirs.config.text_config.vocab_size
    arrays = make_fixtures.reference(theirs, 0)

    config = read_config(tmp_path / "whole")
    params = read_weights(tmp_path / "whole", config)
    logits = jax.jit(lambda params: model.logits(params, model.forward(
        config, params, arrays["tokens"])))(params)
    np.testing.assert_allclose(logits, arrays["logits"], rtol=1e-4, atol=1e-4)

    export_model(params, config, tmp_path / "whole", tmp_path / "export")
    assert_same_bits(stored(tmp_path / "export"), stored(tmp_path / "whole"))
    again, report = architecture.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    again.config.vocab_size = theirs.config.vocab_size
    np.testing.assert_array_equal(make_fixtures.reference(again.eval(), 0)["logits"],
                                  arrays["logits"])
