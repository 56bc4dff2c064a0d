"""Hugging Face models in and out: tokenizers, end tokens, and the directory we export, whole or not
at all."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_copies import assert_same_bits, edit, rewrite, stored

from effreason.lm.hf import pretrained, weights
from effreason.lm.hf.config import read_config
from effreason.lm.hf.pretrained import (
    FINGERPRINT_BYTES,
    SHIPPED_REASONER,
    eos_ids,
    export_model,
    load_tokenizer,
    load_weights,
    model_fingerprint,
    open_pretrained,
)
from effreason.lm.hf.weights import read_weights
from effreason.runtime.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"
TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }} {% endfor %}"


@pytest.fixture
def copy(tmp_path):
    """A checkpoint to spoil: qwen2_tied, one file, config.json in the older spelling."""
    return Path(shutil.copytree(FIXTURES / "qwen2_tied", tmp_path / "model"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A directory with a real fast tokenizer of 72 words."""
    import tokenizers
    import transformers

    directory = tmp_path_factory.mktemp("tokenizer")
    words = {f"w{index}": index for index in range(72)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1",
                                                unk_token="w0")
    fast.save_pretrained(directory)
    return directory


@pytest.fixture
def whole(copy, tokenizer):
    """A checkpoint with a tokenizer and a chat template."""
    for path in tokenizer.iterdir():
        shutil.copy(path, copy)
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return copy


def export(source, target, change=lambda leaf: leaf, **options):
    config = read_config(source)
    export_model(jax.tree.map(change, read_weights(source, config)), config, source, target,
                 **options)


# The exported directory


def test_what_stands_beside_the_weights_comes_along(copy, tmp_path):
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE",
                 "README.md", "notes.txt", "effreason.json"):
        (copy / name).write_text("{}" if name.endswith(".json") else name)
    target = tmp_path / "deep" / "target"
    export(copy, target)
    assert {path.name for path in target.iterdir()} == {"config.json", "model.safetensors",
                                                        "tokenizer.json", "chat_template.jinja",
                                                        "generation_config.json", "LICENSE"}
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert_same_bits(stored(target), stored(copy))


def test_the_card_and_the_facts_are_written(copy, tmp_path):
    export(copy, tmp_path / "target", card="# Größe\n",
           facts={"step": 3, "template": {"name": "r1"}})
    assert (tmp_path / "target" / "README.md").read_text(encoding="utf-8") == "# Größe\n"
    text = (tmp_path / "target" / "effreason.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"step": 3,
                                "template": {"name": "r1"}} and text.startswith('{\n  "step": 3')


@pytest.mark.parametrize(
    "entry", ["{{ 'other' }}", [{"name": "default", "template": "{{ 'other' }}"}], None], ids=repr)
def test_the_template_of_the_training_is_the_one_that_is_found(whole, tmp_path, entry):
    import transformers

    edit(whole, "tokenizer_config.json", chat_template=entry)
    (whole / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'other' }}"}))
    template, messages = "w2 {{ messages[0].content }} w3", [{"role": "user", "content": "w5"}]
    export(whole, tmp_path / "target", chat_template=template)
    # as versions read it that do not know the file
    for missing in (None, "chat_template.jinja"):
        if missing:
            (tmp_path / "target" / missing).unlink()
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "target")
        assert tokenizer.chat_template == template
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "w2 w5 w3"
    assert not (tmp_path / "target" / "chat_template.json").exists()
    assert load_tokenizer(whole).chat_template == TEMPLATE           # the source is as it was


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 12_000], ids=["one", "sharded"])
def test_every_tensor_keeps_its_own_dtype(copy, tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(weights, "SHARD_BYTES", shard_bytes)
    rewrite(copy, lambda tensors: tensors.update({
        name: tensor.astype(np.float32 if "norm" in name else ml_dtypes.bfloat16)
        for name, tensor in tensors.items()}))
    export(copy, tmp_path / "target")
    assert_same_bits(stored(tmp_path / "target"), stored(copy))
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_checkpoint_may_be_exported_over_itself(copy):
    before = stored(copy)
    export(copy, copy)
    assert_same_bits(stored(copy), before)


# An export that fails


@pytest.mark.parametrize("failure",
                         [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
                         ids=["full", "interrupt"])
def test_a_failed_export_leaves_the_old_one_as_it_was(copy, tmp_path, monkeypatch, failure):
    target = tmp_path / "target"
    export(copy, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def fail(params, config, dtype, directory, dtypes):
        (directory / "model.safetensors").write_bytes(b"half")
        raise failure

    with monkeypatch.context() as patch, pytest.raises(type(failure)):
        patch.setattr(pretrained, "write_weights", fail)
        export(copy, target, lambda leaf: leaf + 1)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "target"}
    export(copy, target, lambda leaf: leaf + 1)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "target"}
    np.testing.assert_array_equal(stored(target)["model.norm.weight"],
                                  stored(copy)["model.norm.weight"] + 1)


def test_what_a_killed_export_left_is_swept_away(copy, tmp_path):
    target = tmp_path / "target"
    export(copy, target)
    for name in ("target.partial", "target.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    # a reader ignores leftovers next to a complete directory
    assert read_config(target)
    export(copy, target)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "target"}
    assert_same_bits(stored(target), stored(copy))


@pytest.mark.parametrize("renames", range(3))
def test_an_export_killed_at_a_rename_loses_no_model(whole, tmp_path, monkeypatch, renames):
    target, done = tmp_path / "target", []
    export(whole, target)

    def rename(path, to, real=Path.rename):
        if len(done) == renames:
            raise SystemExit
        done.append(path.name)
        return real(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        if renames < 2:
            with pytest.raises(SystemExit):
                export(whole, target, lambda leaf: leaf + 1)
        else:
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            # killed before the old one is swept away
            export(whole, target, lambda leaf: leaf + 1)
    # Before the first rename the old model is in place, after it the new one, wherever it is.
    pretrained = open_pretrained(str(target), dtype="float32", remat="none")
    added = np.asarray(load_weights(pretrained)["final_norm"]) - stored(whole)["model.norm.weight"]
    np.testing.assert_allclose(added, min(renames, 1), atol=1e-6)
    export(whole, target, lambda leaf: leaf + 2)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "target"}
    np.testing.assert_array_equal(stored(target)["model.norm.weight"],
                                  stored(whole)["model.norm.weight"] + 2)


def test_an_export_that_stops_before_its_first_rename_goes_on_from_the_last(
    whole, tmp_path, monkeypatch):
    # Killed between the renames, and the next export fails: the model of the first is still there.
    target = tmp_path / "target"
    export(whole, target)
    target.rename(tmp_path / "target.old")
    shutil.copytree(tmp_path / "target.old", tmp_path / "target.partial")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(pretrained, "write_weights",
                      lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        export(whole, target)
    assert_same_bits(stored(target), stored(whole))


# Tokenizers and EOS


@pytest.mark.parametrize(("generation", "config", "own", "expected"), [
    (None, None, 7, (7,)), ({}, None, 7, (7,)), ({"eos_token_id": 3}, 5, 7, (3, 7)),
    ({"eos_token_id": [7, 3, 9]}, 5, 7, (3, 7, 9)), ({"eos_token_id": 0}, None, None, (0,)),
    ({"eos_token_id": None}, None, 0, (0,)), (None, 5, 7, (5, 7)), ({}, [5, 6], None, (5, 6)),
])
def test_eos_ids_come_from_all_places(tmp_path, generation, config, own, expected):
    if generation is not None:
        edit(tmp_path, "generation_config.json", **generation)
    if config is not None:
        edit(tmp_path, "config.json", eos_token_id=config)
    assert eos_ids(tmp_path, SimpleNamespace(eos_token_id=own)) == expected


@pytest.mark.parametrize("entry", ["</s>", [1, "</s>"], 1.5, True, -1, {"id": 1}], ids=repr)
def test_eos_ids_that_are_none(tmp_path, entry):
    edit(tmp_path, "generation_config.json", eos_token_id=entry)
    with pytest.raises(UserError, match="generation_config.json: eos_token_id must be"):
        eos_ids(tmp_path, SimpleNamespace(eos_token_id=1))


def test_without_any_eos_no_response_could_end(tmp_path):
    with pytest.raises(UserError, match="names an EOS token"):
        eos_ids(tmp_path, SimpleNamespace(eos_token_id=None))


def test_a_directory_without_a_tokenizer_is_refused(copy):
    with pytest.raises(UserError, match="tokenizer") as caught:
        load_tokenizer(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("file", "text"), [("tokenizer.json", '{"a": 1}'),
                                            ("tokenizer.json", ""), ("tokenizer_config.json", "[]"),
                                            ("tokenizer_config.json", "{")])
def test_a_damaged_tokenizer_is_one_line(tokenizer, tmp_path, file, text):
    directory = Path(shutil.copytree(tokenizer, tmp_path / "model"))
    # without a chat template: data.template may name one
    assert load_tokenizer(directory).eos_token_id == 1
    (directory / file).write_text(text)
    with pytest.raises(UserError) as caught:
        load_tokenizer(directory)
    assert (str(caught.value).startswith(f"{directory}: tokenizer.json and")
            and "\n" not in str(caught.value))
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer.json$"):
        load_tokenizer(directory)


def test_open_pretrained_reads_all_that_is_not_a_weight(whole):
    edit(whole, "generation_config.json", eos_token_id=[2])
    pretrained = open_pretrained(str(whole), dtype="bfloat16", remat="none")
    assert (pretrained.eos_ids == (1, 2) and pretrained.directory == whole
            and pretrained.max_positions == 64)
    assert (pretrained.name, pretrained.revision) == (str(whole), None)
    # transformers has a class of its own for model_type qwen2, which would not split at spaces
    # here.
    assert pretrained.tokenizer.encode("w3 w71") == [3, 71]
    assert pretrained.decoder == read_config(whole, dtype="bfloat16", remat="none")
    edit(whole, vocab_size=40)
    with pytest.raises(UserError, match="has 72 rows, config.json's vocab_size is 40"):
        open_pretrained(str(whole), dtype="float32", remat="full")


def opened(directory):
    return open_pretrained(str(directory), dtype="float32", remat="full")


def test_tokens_and_eos_ids_that_the_model_has_no_rows_for_are_noted(whole):
    assert opened(whole).notes == ()
    rewrite(whole, lambda tensors: tensors.update(
        {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:70].copy()}))
    edit(whole, vocab_size=70)
    edit(whole, "generation_config.json", eos_token_id=[3, 71])
    pretrained = opened(whole)
    assert pretrained.eos_ids == (1, 3) and pretrained.notes == (
        f"{whole}: the tokenizer has 72 tokens, the model only 70 (vocab_size); a prompt with one "
        "of the others is an error",
        f"{whole}: EOS 71 can never be sampled, vocab_size is 70; the others end a response")


def test_no_eos_id_that_can_be_sampled_is_an_error(whole):
    edit(whole, "generation_config.json", eos_token_id=[80])
    edit(whole, "tokenizer_config.json", eos_token=None)
    (whole / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="eos_token_id must be below config.json's vocab_size, 72"):
        opened(whole)


def test_files_that_are_not_read_are_noted(whole):
    (whole / "model.safetensors.index.json").write_text('{"weight_map": {"a": "old.safetensors"}}')
    edit(whole, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    single, code = opened(whole).notes
    assert "model.safetensors.index.json; the single file is read" in single
    assert "code of its own (auto_map), which is not run" in code


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "tokenizer_config.json",
                                  "config.json", "chat_template.jinja", "generation_config.json"])
def test_a_pointer_of_git_lfs_is_named_as_one(whole, file):
    (whole / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=f"{file}: is a pointer of Git LFS"):
        opened(whole)


def test_byte_order_marks_are_dropped_and_not_exported(whole, tmp_path):
    expected = opened(whole)
    for path in [*whole.glob("*.json"), *whole.glob("*.jinja")]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = opened(whole)
    assert found.decoder == expected.decoder and found.tokenizer.chat_template == TEMPLATE
    assert found.tokenizer.encode("w3 w71") == [3, 71] and found.eos_ids == expected.eos_ids
    export(whole, tmp_path / "target")
    for path in (tmp_path / "target").iterdir():
        assert not path.read_bytes().startswith(b"\xef\xbb\xbf"), path.name


def test_a_template_of_an_older_processor_is_found(whole):
    (whole / "chat_template.jinja").unlink()
    (whole / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert load_tokenizer(whole).chat_template == TEMPLATE


def test_named_templates_of_a_folder_are_found(whole, tmp_path):
    (whole / "additional_chat_templates").mkdir()
    (whole / "additional_chat_templates" / "rag.jinja").write_text("rag " + TEMPLATE)
    assert load_tokenizer(whole).chat_template == {"default": TEMPLATE, "rag": "rag " + TEMPLATE}
    export(whole, tmp_path / "target", chat_template="w2 " + TEMPLATE)
    assert load_tokenizer(tmp_path / "target").chat_template == "w2 " + TEMPLATE


def test_a_tokenizer_of_another_kind_is_named(whole):
    (whole / "tokenizer.json").rename(whole / "tokenizer.model")
    with pytest.raises(UserError, match="has no tokenizer.json, only tokenizer.model; load it"):
        opened(whole)


def test_stop_ids_are_eos_ids_and_written_into_the_export(whole, tmp_path):
    pretrained = open_pretrained(str(whole), dtype="float32", stop_ids="5, w7,11")
    assert pretrained.eos_ids == (1, 5, 7, 11)
    for generation in (None, {"eos_token_id": 1, "do_sample": True}):
        if generation is not None:
            edit(whole, "generation_config.json", **generation)
        export(whole, tmp_path / "export", eos_ids=pretrained.eos_ids)
        written = json.loads((tmp_path / "export" / "generation_config.json").read_text())
        assert written == (generation or {"bos_token_id": 0}) | {"eos_token_id": [1, 5, 7, 11]}
        exported = open_pretrained(str(tmp_path / "export"), dtype="float32")
        assert exported.eos_ids == pretrained.eos_ids

    before = (whole / "generation_config.json").read_bytes()
    export(whole, tmp_path / "same", eos_ids=(1,))      # what ends a response anyway
    assert (tmp_path / "same" / "generation_config.json").read_bytes() == before


@pytest.mark.parametrize("stop_ids", ["w99", "w3 w4", "72", "", "-1", "w3,"])
def test_stop_ids_that_are_no_single_token_are_one_line(whole, stop_ids):
    with pytest.raises(UserError, match="rollout.stop_ids must be ids below 72 or texts"):
        open_pretrained(str(whole), dtype="float32", stop_ids=stop_ids)


def test_a_padded_vocabulary_is_no_mistake(whole):
    def pad(tensors):
        rows = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = np.concatenate(
            [rows, np.zeros((8, rows.shape[1]), rows.dtype)])

    rewrite(whole, pad)
    edit(whole, vocab_size=80)
    pretrained = open_pretrained(str(whole), dtype="float32", remat="full")
    assert (len(pretrained.tokenizer) == 72
            and load_weights(pretrained)["embedding"].shape == (80, 32))
    # No token is drawn that has no text, except one that the checkpoint says ends a response.
    assert pretrained.decoder.unused_ids == ((72, 80),)
    edit(whole, "generation_config.json", eos_token_id=[1, 75])
    padded = open_pretrained(str(whole), dtype="float32", remat="full")
    assert padded.decoder.unused_ids == ((72, 75), (76, 80))


def test_weights_are_missed_when_the_model_is_opened(whole):
    (whole / "model.safetensors").rename(whole / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled by PyTorch"):
        open_pretrained(str(whole), dtype="float32", remat="full")


def test_the_shipped_reasoner_is_called_tiny():
    pretrained = open_pretrained("tiny", dtype="float32", remat="full")
    assert (pretrained.name, pretrained.revision, pretrained.directory) == (
        "tiny", None, SHIPPED_REASONER)


# What tells one model from another


def files_of(directory, revision=None):
    return SimpleNamespace(directory=directory, revision=revision, adapters=None)


@pytest.mark.parametrize(("file", "place"),
                         [("config.json", 3), ("model.safetensors", 0), ("model.safetensors", -1)])
def test_a_byte_that_differs_makes_another_files_of(tmp_path, file, place):
    (tmp_path / "config.json").write_text("{ }   ")
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * FINGERPRINT_BYTES))
    (tmp_path / "notes.txt").write_text("not part of the model")
    before = model_fingerprint(files_of(tmp_path))
    content = bytearray((tmp_path / file).read_bytes())
    content[place] = 9
    (tmp_path / "notes.txt").unlink()
    assert model_fingerprint(files_of(tmp_path)) == before
    (tmp_path / file).write_bytes(bytes(content))
    assert model_fingerprint(files_of(tmp_path)) != before


def test_a_model_of_the_hub_is_its_commit(tmp_path):
    assert model_fingerprint(files_of(tmp_path, "abc")) == "abc"
