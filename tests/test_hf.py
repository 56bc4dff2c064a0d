"""Hugging Face directories in and out: nothing changes on the way, and what cannot be read is refused in one line."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from decoders import mesh

from effreason.errors import UserError
from effreason.lm import hf, model
from effreason.runtime import sharding

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ["qwen2_tied", "qwen2_untied", "llama", "llama3", "qwen3"]


def stored(directory):
    """All tensors of a checkpoint, {name: array}."""
    return {name: tensor for file in directory.glob("*.safetensors")
            for name, tensor in safetensors.numpy.load_file(file).items()}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name


@pytest.fixture
def copy(tmp_path):
    """A checkpoint to spoil: qwen2_tied, one file, config.json in the older spelling."""
    return Path(shutil.copytree(FIXTURES / "qwen2_tied", tmp_path / "model"))


def edit(directory, name="config.json", remove=(), **entries):
    path = directory / name
    table = (json.loads(path.read_text()) if path.exists() else {}) | entries
    path.write_text(json.dumps({key: value for key, value in table.items() if key not in remove}))


def rewrite(directory, change):
    """Weights with one change."""
    tensors = stored(directory)
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def refusal(directory):
    """The one line with which a directory is refused."""
    with pytest.raises(UserError) as caught:
        hf.load(directory, hf.read_config(directory))
    message = str(caught.value)
    assert "\n" not in message and str(directory) in message
    return message


# There and back


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, name, dtype):
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    shutil.copytree(FIXTURES / name, source)
    tensors = {key: tensor.astype(dtype) for key, tensor in stored(source).items()}
    for file in source.glob("model*"):
        file.unlink()
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    config = hf.read_config(source)
    params = hf.load(source, config)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    hf.export(params, config, source, target)
    assert_same_bits(stored(target), tensors)
    assert hf.read_config(target) == config
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    jax.tree.map(np.testing.assert_array_equal, hf.load(target, config), params)


@pytest.mark.parametrize("name", ["qwen2_tied", "llama3", "qwen3"])
def test_an_exported_config_has_both_spellings(tmp_path, name):
    source = FIXTURES / name
    config = hf.read_config(source)
    hf.export(hf.load(source, config), config, source, tmp_path / "target")
    table = json.loads((tmp_path / "target" / "config.json").read_text())
    assert table["dtype"] == table["torch_dtype"] == "float32"
    assert table["rope_theta"] == table["rope_parameters"]["rope_theta"] == config.rope_theta
    assert table["architectures"] == [hf.FAMILIES[table["model_type"]]]
    kind = "default" if config.rope_scaling is None else "llama3"
    assert table["rope_parameters"]["rope_type"] == kind
    older = {key: value for key, value in table.items() if key not in ("rope_parameters", "dtype")}
    newer = {key: value for key, value in table.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    for spelling in (older, newer):
        assert hf.parse_config(spelling, Path("config.json")) == config


def test_what_stands_beside_the_weights_comes_along(copy, tmp_path):
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "notes.txt"):
        (copy / name).write_text(name)
    config = hf.read_config(copy)
    hf.export(hf.load(copy, config), config, copy, tmp_path / "target")
    assert {path.name for path in (tmp_path / "target").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"}
    with safetensors.safe_open(tmp_path / "target" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}              # without it, older transformers refuse the file


def test_a_large_export_is_sharded_and_loads_again(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    source, target = FIXTURES / "qwen2_untied", tmp_path / "target"
    config = hf.read_config(source)
    params = hf.load(source, config)
    hf.export(params, config, source, target)
    files = sorted(target.glob("model-*.safetensors"))
    assert len(files) > 2 and not (target / "model.safetensors").exists()
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(sum(tensor.nbytes for tensor in safetensors.numpy.load_file(file).values()) <= 20_000 for file in files)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(source).values())
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert_same_bits(stored(target), stored(source))
    jax.tree.map(np.testing.assert_array_equal, hf.load(target, config), params)


def test_weights_go_straight_to_their_shards(tmp_path):
    config = hf.read_config(FIXTURES / "qwen2_tied")
    targets = sharding.tree_sharding(mesh(data=2, fsdp=2, tensor=2), model.logical_axes(config))
    params = hf.load(FIXTURES / "qwen2_tied", config, targets)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == targets
    hf.export(params, config, FIXTURES / "qwen2_tied", tmp_path / "target")
    assert_same_bits(stored(tmp_path / "target"), stored(FIXTURES / "qwen2_tied"))


# An export that fails


@pytest.mark.parametrize("failure", [
    OSError("disk full"), safetensors.SafetensorError("disk full"), KeyboardInterrupt(),
], ids=["os", "safetensors", "interrupt"])
def test_a_failed_export_leaves_the_old_one_as_it_was(copy, tmp_path, monkeypatch, failure):
    config, target = hf.read_config(copy), tmp_path / "target"
    params = hf.load(copy, config)
    hf.export(params, config, copy, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", fail)
        # The command line tells an OSError in one line; it knows nothing of safetensors.
        with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else OSError):
            hf.export(jax.tree.map(lambda leaf: leaf + 1, params), config, copy, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "target"}
    hf.export(jax.tree.map(lambda leaf: leaf + 1, params), config, copy, target)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "target"}
    np.testing.assert_array_equal(stored(target)["model.norm.weight"], stored(copy)["model.norm.weight"] + 1)


def test_what_a_killed_export_left_is_swept_away(copy, tmp_path):
    config, target = hf.read_config(copy), tmp_path / "target"
    for name in ("target.partial", "target.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    hf.export(hf.load(copy, config), config, copy, target)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "target"}
    assert_same_bits(stored(target), stored(copy))


def test_a_checkpoint_may_be_exported_over_itself(copy):
    config, before = hf.read_config(copy), stored(copy)
    hf.export(hf.load(copy, config), config, copy, copy)
    assert_same_bits(stored(copy), before)


# What is refused


@pytest.mark.parametrize("entries", [
    dict(model_type="mamba"), dict(hidden_act="gelu"), dict(use_sliding_window=True),
    dict(layer_types=["full_attention", "sliding_attention"]), dict(mlp_bias=True), dict(pretraining_tp=2),
    dict(quantization_config={"bits": 4}), dict(partial_rotary_factor=0.5),
    dict(hidden_size="wide"), dict(num_hidden_layers=0), dict(vocab_size=72.5), dict(rms_norm_eps=True),
], ids=str)
def test_a_feature_that_is_not_there_is_refused_by_name(copy, entries):
    edit(copy, **entries)
    assert next(iter(entries)) in refusal(copy)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_attention_biases_are_refused_where_the_family_has_none(copy, family):
    edit(copy, model_type=family, attention_bias=True)
    assert "attention_bias" in refusal(copy)


@pytest.mark.parametrize("name", ["model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                  "intermediate_size", "rms_norm_eps", "rope_theta"])
def test_a_missing_entry_is_named(copy, name):
    edit(copy, remove=[name])
    assert name in refusal(copy)


@pytest.mark.parametrize("scaling", [dict(rope_type="yarn", factor=4.0), dict(type="linear", factor=2.0),
                                     dict(rope_type="llama3", factor=8.0)], ids=str)
def test_other_rotary_scalings_are_refused(copy, scaling):
    edit(copy, rope_scaling=scaling)
    expected = "low_freq_factor" if scaling.get("rope_type") == "llama3" else next(iter(scaling.values()))
    assert expected in refusal(copy)


def test_files_that_are_missing_or_broken(copy):
    for name, spoil, expected in [
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:1000]), "cannot be read"),
        ("model.safetensors", lambda path: path.unlink(), "neither model.safetensors nor"),
        ("model.safetensors.index.json", lambda path: path.write_text("{}"), "weight_map"),
        ("model.safetensors.index.json", lambda path: path.write_text('{"weight_map": {"a": "gone"}}'), "gone"),
        ("config.json", lambda path: path.write_text('{"model_type": '), "not valid JSON"),
        ("config.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
        ("config.json", lambda path: path.write_text("[1, 2]"), "expected a JSON object, found list"),
        ("config.json", lambda path: path.unlink(), "file not found"),
        ("config.json", lambda path: path.mkdir(), "cannot be read"),
    ]:
        spoil(copy / name)
        message = refusal(copy)
        assert expected in message, message


def drop(name):
    return lambda tensors: tensors.pop(name)


def replace(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(("change", "name", "expected"), [
    (drop, "model.layers.1.mlp.up_proj.weight", "has no tensor"),
    (drop, "model.layers.0.self_attn.k_proj.bias", "has no tensor"),
    (lambda name: replace(name, lambda tensor: tensor[:, :-1].copy()), "model.embed_tokens.weight",
     "shape (72, 31), config.json expects (72, 32)"),
    (lambda name: replace(name, lambda tensor: tensor.T.copy()), "model.layers.0.mlp.down_proj.weight",
     "shape (48, 32), config.json expects (32, 48)"),
    (lambda name: replace(name, lambda tensor: tensor.astype(np.int8)), "model.norm.weight", "stored as I8"),
])
def test_tensors_that_are_missing_or_of_another_shape(copy, change, name, expected):
    rewrite(copy, change(name))
    message = refusal(copy)
    assert name in message and expected in message, message


def test_an_untied_head_must_be_there(copy):
    edit(copy, tie_word_embeddings=False)
    assert "has no tensor lm_head.weight" in refusal(copy)


def test_an_index_that_names_the_wrong_file(tmp_path):
    directory = Path(shutil.copytree(FIXTURES / "qwen2_untied", tmp_path / "model"))
    path = directory / "model.safetensors.index.json"
    table = json.loads(path.read_text())
    other = {file: each for file, each in zip(*[sorted(set(table["weight_map"].values()))[::step] for step in (1, -1)],
                                              strict=True)}
    table["weight_map"]["model.norm.weight"] = other[table["weight_map"]["model.norm.weight"]]
    path.write_text(json.dumps(table))
    assert "tensor model.norm.weight cannot be read" in refusal(directory)


# Tokenizers and EOS


@pytest.mark.parametrize(("generation", "own", "expected"), [
    (None, 7, (7,)), ({}, 7, (7,)), ({"eos_token_id": 3}, 7, (3, 7)), ({"eos_token_id": [7, 3, 9]}, 7, (3, 7, 9)),
    ({"eos_token_id": 0}, None, (0,)), ({"eos_token_id": None}, 0, (0,)),
])
def test_eos_ids_come_from_both_places(tmp_path, generation, own, expected):
    if generation is not None:
        edit(tmp_path, "generation_config.json", **generation)
    assert hf.eos_ids(tmp_path, SimpleNamespace(eos_token_id=own)) == expected


def test_without_any_eos_no_response_could_end(tmp_path):
    with pytest.raises(UserError, match="names an EOS token"):
        hf.eos_ids(tmp_path, SimpleNamespace(eos_token_id=None))


def test_a_directory_without_a_tokenizer_is_refused(copy):
    with pytest.raises(UserError, match="tokenizer") as caught:
        hf.load_tokenizer(copy)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A directory with a real fast tokenizer of 72 words."""
    import tokenizers
    import transformers

    directory = tmp_path_factory.mktemp("tokenizer")
    words = {f"w{index}": index for index in range(72)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", unk_token="w0")
    fast.save_pretrained(directory)
    return directory


def test_a_tokenizer_needs_a_chat_template(tokenizer, tmp_path):
    directory = Path(shutil.copytree(tokenizer, tmp_path / "model"))
    with pytest.raises(UserError, match="no chat template"):
        hf.load_tokenizer(directory)
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert hf.load_tokenizer(directory).eos_token_id == 1


def test_open_pretrained_reads_all_that_is_not_a_weight(tokenizer, copy):
    for path in tokenizer.iterdir():
        shutil.copy(path, copy)
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    edit(copy, "generation_config.json", eos_token_id=[2])
    found = hf.open_pretrained(str(copy), dtype="bfloat16", remat=False)
    assert found.eos_ids == (1, 2) and found.directory == copy
    # transformers has a class of its own for model_type qwen2, which would not split at spaces here.
    assert found.tokenizer.encode("w3 w71") == [3, 71]
    assert found.decoder == hf.read_config(copy, dtype="bfloat16", remat=False)
    edit(copy, vocab_size=40)
    with pytest.raises(UserError, match="72 tokens, config.json's vocab_size is 40"):
        hf.open_pretrained(str(copy), dtype="float32", remat=True)
