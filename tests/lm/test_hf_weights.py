"""Weights in and out: nothing changes on the way, a shard is read by itself, and other checkpoints
are refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from checkpoint_copies import assert_same_bits, edit, rewrite, stored
from decoders import mesh
from jax.sharding import NamedSharding, PartitionSpec

from effreason.lm import model
from effreason.lm.hf import config as configs
from effreason.lm.hf import weights
from effreason.runtime import sharding
from effreason.runtime.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ["qwen2_tied", "qwen2_untied", "llama", "llama3", "qwen3"]


@pytest.fixture
def copy(tmp_path):
    """A checkpoint to spoil: qwen2_tied, one file, config.json in the older spelling."""
    return Path(shutil.copytree(FIXTURES / "qwen2_tied", tmp_path / "model"))


def load(directory, shardings=None):
    return weights.read_weights(directory, configs.read_config(directory), shardings)


def refusal(directory):
    """The one line with which a directory is refused."""
    with pytest.raises(UserError) as caught:
        load(directory)
    message = str(caught.value)
    assert "\n" not in message and str(directory) in message
    return message


# There and back


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 12_000], ids=["one", "sharded"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, monkeypatch, name, dtype, shard_bytes):
    source, target = Path(shutil.copytree(FIXTURES / name,
                                          tmp_path / "source")), tmp_path / "target"
    rewrite(source, lambda tensors: tensors.update(
        {key: tensor.astype(dtype) for key, tensor in tensors.items()}))
    monkeypatch.setattr(weights, "SHARD_BYTES", shard_bytes)
    config, params = configs.read_config(source), load(source)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    target.mkdir()
    weights.write_weights(params, config, weights.stored_dtype(source), target)
    assert_same_bits(stored(target), stored(source))
    assert len(weights.weight_files(target)) == 1 or shard_bytes == 12_000
    jax.tree.map(np.testing.assert_array_equal, weights.read_weights(target, config), params)


def test_the_index_of_a_sharded_export(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    config, params = configs.read_config(FIXTURES / "qwen2_untied"), load(FIXTURES / "qwen2_untied")
    weights.write_weights(params, config, "float32", tmp_path)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2 and not (tmp_path / "model.safetensors").exists()
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        assert sum(tensor.nbytes for tensor in safetensors.numpy.load_file(file).values()) <= 20_000
        with safetensors.safe_open(file, framework="numpy") as opened:
            # without it, older transformers refuse the file
            assert opened.metadata() == {"format": "pt"}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes
                                                  for tensor in stored(tmp_path).values())
    assert {file.name for file in files} == set(index["weight_map"].values()) == set(
        weights.weight_files(tmp_path))
    for name, file in index["weight_map"].items():
        assert name in safetensors.numpy.load_file(tmp_path / file)


def test_a_written_header_is_as_the_library_writes_it(tmp_path):
    weights.write_weights(load(FIXTURES / "llama"), configs.read_config(FIXTURES / "llama"),
                          "bfloat16", tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    ends = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    assert length % 8 == 0 and len(raw) == 8 + length + ends[-1][1]
    assert ends[0][0] == 0 and all(one[1] == other[0]
                                   for one, other in zip(ends, ends[1:], strict=False))


# Shards


MESHES = [dict(fsdp=8), dict(tensor=2, fsdp=4), dict(data=2, fsdp=2, tensor=2), dict(data=8)]


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3"])
def test_weights_go_straight_to_their_shards(tmp_path, name, axes):
    config = configs.read_config(FIXTURES / name)
    targets = sharding.tree_sharding(mesh(**axes), model.logical_axes(config))
    params = weights.read_weights(FIXTURES / name, config, targets)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == targets
    jax.tree.map(np.testing.assert_array_equal, params, load(FIXTURES / name))
    weights.write_weights(params, config, "float32", tmp_path)
    assert_same_bits(stored(tmp_path), stored(FIXTURES / name))


def test_any_axis_may_be_sharded():
    # Head widths too, which come after a fold's first axis; the trainer leaves them whole.
    config = configs.read_config(FIXTURES / "qwen2_tied")
    devices = mesh(data=2, fsdp=2, tensor=2)
    names = ("data", "fsdp", "tensor")

    def target(leaf):
        last = [name if size % 2 == 0 else None
                for name, size in zip(names, leaf.shape[::-1], strict=False)][::-1]
        return NamedSharding(devices, PartitionSpec(*(None,) * (leaf.ndim - len(last)), *last))

    params = weights.read_weights(FIXTURES / "qwen2_tied", config,
                                  jax.tree.map(target, model.abstract_params(config)))
    jax.tree.map(np.testing.assert_array_equal, params, load(FIXTURES / "qwen2_tied"))
    assert params["layers"]["query"].sharding.shard_shape((2, 32, 4, 8)) == (2, 16, 2, 4)


def test_a_shard_is_read_once_and_only_the_shard(monkeypatch):
    config = configs.read_config(FIXTURES / "qwen2_tied")
    elements = []
    read_part = weights._read_part

    def counting(file, layout, index):
        part = read_part(file, layout, index)
        elements.append(part.size)
        return part

    monkeypatch.setattr(weights, "_read_part", counting)
    total = sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params(config)))
    for axes in MESHES:
        elements.clear()
        targets = sharding.tree_sharding(mesh(**axes), model.logical_axes(config))
        weights.read_weights(FIXTURES / "qwen2_tied", config, targets)
        assert sum(elements) == total, axes             # not once for each of eight devices
        # at most an eighth of the largest tensor at a time
        if axes.get("fsdp") == 8:
            assert max(elements) == config.vocabulary * config.width // 8


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_loading_holds_no_second_copy(tmp_path, devices):
    # As the benchmark measures it, in a process of its own: 150 MB of weights, 48 MB of them in one
    # matrix.
    entries = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
                   num_attention_heads=8, num_key_value_heads=8)
    table = (json.loads((FIXTURES / "llama" / "config.json").read_text()) | entries
             | dict(head_dim=64))
    (tmp_path / "config.json").write_text(json.dumps(table))
    config = configs.read_config(tmp_path)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype),
                         model.abstract_params(config))
    weights.write_weights(zeros, config, "bfloat16", tmp_path)
    command = [sys.executable, "-m", "benchmarks.models.loading", "--model", str(tmp_path),
               "--devices", str(devices), "--json"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root,
                          env=os.environ | {"PYTHONPATH": str(root), "XLA_FLAGS": ""}, timeout=300,
                          capture_output=True, text=True, check=True)
    row = json.loads(done.stdout)
    assert row["result_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(zeros)) > 150e6
    assert (row["largest_group_bytes"] == 12 * 512 * 2048 * 4
            and row["peak_bytes"] > row["result_bytes"] * 0.9)
    assert row["overhead_bytes"] < row["largest_group_bytes"], row


def test_loaded_weights_may_be_donated():
    # On the CPU they are the host's own buffers, taken without a copy.
    double = jax.jit(lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree), donate_argnums=0)
    doubled = double(load(FIXTURES / "llama"))
    jax.tree.map(lambda twice, once: np.testing.assert_array_equal(twice, 2 * np.asarray(once)),
                 doubled, load(FIXTURES / "llama"))


# What is refused


@pytest.mark.parametrize(("name", "spoil", "expected"), [
    ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:1000]),
     "cannot be read"),
    ("model.safetensors", lambda path: path.write_bytes(b""), "cannot be read"),
    ("model.safetensors", lambda path: path.unlink(), "neither model.safetensors nor"),
    ("model.safetensors", lambda path: path.rename(path.with_name("pytorch_model.bin")),
     "only pytorch_model.bin, pickled by PyTorch"),
    ("model.safetensors", lambda path: path.rename(path.with_name("model.fp16.safetensors")),
     "only model.fp16.safetensors; weights must be as save_pretrained"),
    ("model.safetensors", lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "`git lfs pull`"),
    ("model.safetensors", lambda path: (path.unlink(), path.symlink_to("gone")), "a link to gone"),
    ("model.safetensors.index.json", lambda path: path.write_text("{}"), "weight_map"),
    ("model.safetensors.index.json", lambda path: path.write_text('{"weight_map": {"a": "gone"}}'),
     "gone: file not found"),
    ("model.safetensors.index.json", lambda path: path.write_text('{"weight_map": {"a": "../x"}}'),
     "next to it"),
    ("model.safetensors.index.json", lambda path: path.write_text('{"weight_map": {"a": 3}}'),
     "next to it"),
])
def test_files_that_are_missing_or_broken(copy, name, spoil, expected):
    if "index" in name:
        (copy / "model.safetensors").unlink()
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
    (drop, "model.embed_tokens.weight", "has no tensor"),
    (lambda name: replace(name, lambda tensor: tensor[:, :-1].copy()), "model.embed_tokens.weight",
     "shape (72, 31), config.json expects (72, 32)"),
    (lambda name: replace(name, lambda tensor: np.concatenate([tensor, tensor])),
     "model.embed_tokens.weight",
     "has 144 rows, config.json's vocab_size is 72"),
    (lambda name: replace(name, lambda tensor: tensor.T.copy()),
     "model.layers.0.mlp.down_proj.weight",
     "shape (48, 32), config.json expects (32, 48)"),
    (lambda name: replace(name, lambda tensor: tensor.astype(np.int8)), "model.norm.weight",
     "stored as I8"),
])
def test_tensors_that_are_missing_or_of_another_shape(copy, change, name, expected):
    rewrite(copy, change(name))
    message = refusal(copy)
    assert name in message and expected in message, message


@pytest.mark.parametrize("name", [
    "model.layers.2.input_layernorm.weight", "model.layers.0.self_attn.o_proj.bias", "score.weight",
    "model.layers.0.mlp.experts.0.up_proj.weight", "model.layers.0.self_attn.q_norm.weight",
])
def test_tensors_that_the_decoder_would_not_read(copy, name):
    rewrite(copy, lambda tensors: tensors.update(
        {name: np.ones(3, np.float32), "zzz": np.ones(3, np.float32)}))
    assert f"holds tensor {name} and 1 more" in refusal(copy)


# Names of tensors


@pytest.mark.parametrize("name", ["qwen2_tied", "llama"])
@pytest.mark.parametrize(("prefix", "head"), [
    ("", ""), ("_orig_mod.model.", "_orig_mod."), ("module.model.", "module."),
    ("language_model.model.", "language_model."), ("model.language_model.", ""),
    ("module._orig_mod.model.", "module._orig_mod."), ("model.", "model.")])
def test_other_prefixes_of_the_names_are_read(tmp_path, name, prefix, head):
    directory = Path(shutil.copytree(FIXTURES / name, tmp_path / "model"))
    params, tensors = load(directory), stored(directory)

    def rename(tensors):
        for name in list(tensors):
            start = head if name == "lm_head.weight" else prefix
            tensors[start + name.removeprefix("model.")] = tensors.pop(name)

    rewrite(directory, rename)
    jax.tree.map(np.testing.assert_array_equal, load(directory), params)
    found = weights.check_weights(directory, configs.read_config(directory))
    assert found.keys() == tensors.keys()


@pytest.mark.parametrize(("more", "expected"), [
    ("draft.model.embed_tokens.weight", "holds tensor draft.model.embed_tokens.weight"),
    ("visual.merger.weight", "holds tensor visual.merger.weight"),
    ("my_lm_head.weight", "holds tensor my_lm_head.weight"),
    ("base_model.model.model.norm.weight", "holds tensor base_model.model.model.norm.weight"),
])
def test_names_that_could_mean_something_else_are_not_read(copy, more, expected):
    rewrite(copy, lambda tensors: tensors.update({more: np.ones(3, np.float32)}))
    assert expected in refusal(copy)


def test_a_head_that_is_there_twice(tmp_path):
    directory = Path(shutil.copytree(FIXTURES / "qwen2_untied", tmp_path / "model"))
    rewrite(directory, lambda tensors: tensors.update(
        {"model.lm_head.weight": tensors["lm_head.weight"] + 1}))
    assert "model.safetensors, as model.lm_head.weight" in refusal(directory)


def test_a_single_file_goes_before_an_index(tmp_path):
    # As transformers reads them: a model saved again leaves the old index and its shards.
    directory = Path(shutil.copytree(FIXTURES / "qwen2_untied", tmp_path / "model"))
    params, shards = load(directory), {path.name: path.read_bytes()
                                       for path in directory.glob("model*")}
    rewrite(directory, lambda tensors: tensors.update({"lm_head.weight":
                                                       tensors["lm_head.weight"] + 1}))
    for name, content in shards.items():
        (directory / name).write_bytes(content)
    np.testing.assert_array_equal(load(directory)["head"], params["head"] + 1)


def test_a_size_that_config_json_lacks_is_named_if_the_weights_differ(copy):
    edit(copy, remove=["intermediate_size"])
    message = refusal(copy)
    assert "shape (32, 48), config.json expects (32, 22016); config.json does not say" in message
    assert message.endswith("is taken to mean head_dim 8, intermediate_size 22016")
    edit(copy, intermediate_size=48, remove=["num_hidden_layers"])
    message = refusal(copy)
    assert "has no tensor model.layers.2." in message and "num_hidden_layers 32" in message


def test_a_size_of_a_state_that_config_json_lacks_is_named_too(tmp_path):
    directory = Path(shutil.copytree(FIXTURES / "qwen3_5", tmp_path / "model"))
    edit(directory, remove=["linear_conv_kernel_dim", "linear_key_head_dim"])
    message = refusal(directory)
    assert message.endswith("mean linear_key_head_dim 128, linear_conv_kernel_dim 4")


def test_buffers_of_older_exports_are_passed_over(copy):
    params = load(copy)
    rewrite(copy, lambda tensors: tensors.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    jax.tree.map(np.testing.assert_array_equal, load(copy), params)


def test_a_tied_head_in_the_file_must_be_the_embedding(copy):
    params = load(copy)
    rewrite(copy, lambda tensors: tensors.update(
        {"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    jax.tree.map(np.testing.assert_array_equal, load(copy), params)
    rewrite(copy, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1}))
    assert "tie_word_embeddings is true; set it to false" in refusal(copy)
    edit(copy, tie_word_embeddings=False)               # what the message says helps
    np.testing.assert_array_equal(load(copy)["head"], params["embedding"] + 1)


def test_an_untied_head_must_be_there(copy):
    edit(copy, tie_word_embeddings=False)
    assert "has no tensor lm_head.weight; config.json's tie_word_embeddings is not true" in refusal(
        copy)


def test_the_files_say_what_they_hold(tmp_path):
    directory = Path(shutil.copytree(FIXTURES / "qwen2_untied", tmp_path / "model"))
    path = directory / "model.safetensors.index.json"
    table = json.loads(path.read_text())
    first, *_, last = sorted(set(table["weight_map"].values()))
    swapped = table["weight_map"] | {name: first
                                     for name in list(table["weight_map"])[1:]} | {"unknown": last}
    params = load(directory)
    path.write_text(json.dumps(table | {"weight_map": swapped | {
        f"more{n}": file for n, file in enumerate(table["weight_map"].values())}}))
    jax.tree.map(np.testing.assert_array_equal, load(directory), params)
    (directory / last).write_bytes((directory / first).read_bytes())
    assert f"is in {first} and in " in refusal(directory)
