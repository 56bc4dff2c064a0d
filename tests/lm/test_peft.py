"""Adapters on disk: what is written is read back, and peft computes the same with it."""

import dataclasses
import json
import os
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from decoders import FAMILIES, QWEN2, mesh, rows_of, weights
from safetensors.numpy import load_file, save_file

from effreason.lm import adapters, model
from effreason.lm.hf import peft
from effreason.lm.hf.config import read_config
from effreason.lm.hf.pretrained import (
    SHIPPED_REASONER,
    export_model,
    load_weights,
    model_fingerprint,
    open_pretrained,
)
from effreason.lm.hf.weights import read_weights
from effreason.rl import update
from effreason.rl.learner import check_adapters
from effreason.runtime import sharding
from effreason.runtime.config import AdapterConfig, Config, ExportConfig
from effreason.runtime.errors import UserError

FIRST = f"{peft.PREFIX}0.self_attn.q_proj.lora_A.weight"


def policy(config, targets="all", rank=3):
    adapter = adapters.make_adapter(rank, 6.0, targets, rank_stabilized=True)
    return dataclasses.replace(config, adapter=adapter)


def edit(directory, **entries):
    path = directory / peft.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture
def directory(tmp_path):
    config = policy(QWEN2)
    peft.write_adapter(weights(config), config, tmp_path, base_model="org/base")
    return tmp_path


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("targets", ["all", "mlp"])
def test_what_is_written_is_read_back(family, targets, tmp_path):
    config = policy(FAMILIES[family], targets)
    params = weights(config)
    peft.write_adapter(params, config, tmp_path, base_model="org/base")
    again, read = peft.read_adapter(tmp_path, FAMILIES[family])
    merged = model.merge_adapters(again, adapters.join(adapters.split(params)[0], read))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6),
                 merged, model.merge_adapters(config, params))


@pytest.mark.parametrize("family", ["phi3", "qwen3_5"])
def test_tensors_that_hold_several_weights_have_no_place_for_adapters(directory, family):
    with pytest.raises(UserError, match="this model holds query, key and value in one tensor"):
        peft.open_adapter(directory, FAMILIES[family])


def test_what_a_run_cannot_train_is_refused_before_it_starts():
    def opened(family):
        return types.SimpleNamespace(adapters=None, decoder=FAMILIES[family])

    config = dataclasses.replace(Config(), adapter=AdapterConfig(rank=4),
                                 export=ExportConfig(adapter=True))
    check_adapters(config, opened("gemma3"))
    with pytest.raises(UserError, match=r"export.adapter must be false: this model holds"):
        check_adapters(config, opened("phi3"))
    with pytest.raises(UserError, match="adapter.targets must be attention for a mixture of exp"):
        check_adapters(config, opened("qwen3_moe"))
    check_adapters(dataclasses.replace(config, adapter=AdapterConfig(
        rank=4, targets="attention")), opened("qwen3_moe"))


def test_layers_without_an_adapter_stay_as_they_are(directory):
    stored = load_file(directory / peft.WEIGHTS_FILE)
    save_file({key: value for key, value in stored.items() if ".layers.1." in key},
              directory / peft.WEIGHTS_FILE)
    config, read = peft.read_adapter(directory, QWEN2)
    base = weights(QWEN2)
    merged = model.merge_adapters(config, adapters.join(base, read))
    for name in base["layers"]:
        np.testing.assert_array_equal(merged["layers"][name][0], base["layers"][name][0])
        changed = np.any(np.asarray(merged["layers"][name][1]) != base["layers"][name][1])
        assert changed == (name in adapters.TARGETS["all"])


def test_scales(directory):
    # lora_alpha over the rank, or over its root; a pattern for single modules.
    def second(**entries):
        edit(directory, **entries)
        return peft.read_adapter(directory, QWEN2)[1]["layers"]["query" + adapters.B]

    plain = second(lora_alpha=6.0)
    np.testing.assert_allclose(second(use_rslora=True), plain * np.sqrt(3), rtol=1e-6)
    patterned = second(use_rslora=False, alpha_pattern={"model.layers.1.self_attn.q_proj": 12})
    np.testing.assert_allclose(patterned[1], 2 * plain[1], rtol=1e-6)
    np.testing.assert_array_equal(patterned[0], plain[0])


@pytest.mark.parametrize(("entries", "message"), [
    ({"peft_type": "IA3"}, 'peft_type must be LORA, got "IA3"'),
    ({"use_dora": True}, "use_dora must be False, got true"),
    ({"bias": "lora_only"}, 'bias must be none, got "lora_only"'),
    ({"init_lora_weights": "pissa"}, 'init_lora_weights must be True, got "pissa"'),
    ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens must be None, got \[1, 2\]"),
    ({"modules_to_save": ["lm_head"]}, r'modules_to_save must be None, got \["lm_head"\]')])
def test_other_kinds_of_adapters_are_refused(entries, message, directory):
    edit(directory, **entries)
    with pytest.raises(UserError, match=message):
        peft.read_adapter(directory, QWEN2)


def test_ranks_may_differ_and_tensors_be_of_fewer_bits(directory):
    stored = load_file(directory / peft.WEIGHTS_FILE)
    names = [FIRST, FIRST.replace("lora_A", "lora_B")]
    stored[names[0]], stored[names[1]] = stored[names[0]][:2], stored[names[1]][:, :2].copy()
    stored = {key: value.astype(ml_dtypes.bfloat16) for key, value in stored.items()}
    save_file(stored, directory / peft.WEIGHTS_FILE)
    edit(directory, rank_pattern={"model.layers.0.self_attn.q_proj": 2})

    layers = peft.read_adapter(directory, QWEN2)[1]["layers"]
    a, b = layers["query" + adapters.A][0], layers["query" + adapters.B][0]
    assert a.dtype == b.dtype == np.float32 and a.shape[-1] == 3
    expected = np.float32(6 * np.sqrt(3) / 2) * stored[names[1]].astype(np.float32) @ stored[
        names[0]].astype(np.float32)
    np.testing.assert_allclose(np.tensordot(a, b, 1).reshape(16, 16).T, expected, rtol=1e-5)


def test_the_base_of_adapters(directory, monkeypatch):
    assert peft.base_model(directory) == ("org/base", None)
    edit(directory, base_model_name_or_path="tiny")
    assert peft.resolve(str(directory), None) == ("tiny", None, str(directory))
    assert peft.resolve("tiny", None, str(directory)) == ("tiny", None, str(directory))
    assert peft.resolve("org/base", "v1") == ("org/base", "v1", None)

    edit(directory, base_model_name_or_path="org/base", revision="abc")
    assert peft.resolve(str(directory), None) == ("org/base", "abc", str(directory))
    assert peft.resolve(str(directory), "v1")[1] == "v1"
    monkeypatch.chdir(directory.parent)
    (directory.parent / "here").mkdir()
    edit(directory, base_model_name_or_path="here")
    assert peft.base_model(directory) == ("here", None)


@pytest.mark.parametrize("base", [None, "nowhere", "/no/such/folder"])
def test_a_base_that_there_cannot_be_is_one_line(base, directory):
    edit(directory, base_model_name_or_path=base)
    with pytest.raises(UserError, match="base_model_name_or_path must be the directory of a model "
                       f"or its id .*, got {json.dumps(base)}; .* as model.adapter"):
        peft.base_model(directory)


def test_what_is_no_directory_of_adapters_is_one_line(directory, tmp_path):
    with pytest.raises(UserError, match="found no adapter_config.json in it"):
        peft.resolve("tiny", None, str(tmp_path / "none"))
    with pytest.raises(UserError, match="is a directory of adapters itself, got other"):
        peft.resolve(str(directory), None, "other")
    (directory / peft.WEIGHTS_FILE).rename(directory / peft.PICKLED_FILE)
    with pytest.raises(UserError, match="only adapter_model.bin, pickled by PyTorch; load it with"):
        peft.open_adapter(directory, QWEN2)


@pytest.fixture
def on_tiny(tmp_path):
    """Adapters for the shipped model, with a chat template of their own."""
    base = open_pretrained("tiny", dtype="float32")
    config = policy(base.decoder, "attention")
    params = adapters.split(weights(config))[1]
    peft.write_adapter(params, config, tmp_path, base_model="tiny")
    base.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    return base, config, params, tmp_path


@pytest.mark.parametrize("shape", [None, (2, 2, 2, 1)])
def test_a_directory_of_adapters_is_a_model(shape, on_tiny):
    base, config, params, directory = on_tiny
    opened = open_pretrained(str(directory), dtype="float32")
    assert (opened.name, opened.base, opened.decoder) == (str(directory), "tiny", base.decoder)
    assert (opened.adapters.rank, opened.adapters.targets) == (3, adapters.ATTENTION)
    assert opened.tokenizer.chat_template.endswith("!") and opened.eos_ids == base.eos_ids
    assert opened.own_directory == directory and opened.directory == base.directory
    assert model_fingerprint(opened).startswith(model_fingerprint(base) + "+")

    target = None if shape is None else sharding.tree_sharding(
        mesh(*shape), model.logical_axes(base.decoder))
    loaded, plain = load_weights(opened, target), load_weights(base)
    expected = model.merge_adapters(config, adapters.join(plain, params))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6),
                 jax.device_get(loaded), expected)
    if target is not None:
        assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == target
    jax.tree.map(np.testing.assert_array_equal, load_weights(opened, merged=False), plain)


@pytest.mark.parametrize(("rank", "scale", "targets"), [(3, 6.0, "attention"), (5, 1.5, "all")])
def test_adapters_fit_into_others_that_can_hold_them(rank, scale, targets, on_tiny):
    base, config, params, directory = on_tiny
    stored = jax.tree.map(np.array, peft.read_adapter(directory, base.decoder)[1])
    for name in ("query_lora_a", "query_lora_b"):       # no adapter of one weight
        stored["layers"][name][1] = 0.0
    adapter = adapters.make_adapter(rank, scale, targets, rank_stabilized=False)
    config = dataclasses.replace(base.decoder, adapter=adapter)
    initial = adapters.split(jax.jit(model.init, static_argnums=0)(config, jax.random.key(1)))[1]
    fitted = jax.device_get(jax.jit(adapters.fit, static_argnums=0)(adapter, stored, initial))

    assert jax.tree.map(jnp.shape, fitted) == jax.tree.map(jnp.shape, initial)
    for name in set(adapter.targets) - set(adapters.DELTA):
        a, b = (fitted["layers"][name + part] for part in (adapters.A, adapters.B))
        assert np.abs(a).max(axis=tuple(range(1, a.ndim - 1))).min() > 0    # each column can learn
        found = np.stack([adapter.scale * np.tensordot(one, other, 1)
                          for one, other in zip(a, b, strict=True)])
        expected = np.zeros_like(found)
        if name in adapters.ATTENTION:
            expected = np.stack([np.tensordot(one, other, 1) for one, other in zip(
                stored["layers"][name + adapters.A], stored["layers"][name + adapters.B],
                strict=True)])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def drop(stored):
    del stored[FIRST]


def rename(stored):
    stored["base_model.model.model.embed_tokens.lora_A.weight"] = stored.pop(FIRST)


def widen(stored):
    stored[FIRST] = np.zeros((3, 17), np.float32)


@pytest.mark.parametrize(("damage", "message"), [
    (drop, "has no tensor .*lora_A"), (rename, "embed_tokens.lora_A.weight, which the base"),
    (widen, r"shapes \(3, 17\) and \(16, 3\), the base model's weight has 16 inputs")])
def test_tensors_that_do_not_fit_are_named(damage, message, directory):
    stored = load_file(directory / peft.WEIGHTS_FILE)
    damage(stored)
    save_file(stored, directory / peft.WEIGHTS_FILE)
    with pytest.raises(UserError, match=message):
        peft.read_adapter(directory, QWEN2)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")   # peft's
@pytest.mark.parametrize("settings", [
    {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    {"r": 3, "target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1, 3],
     "lora_dropout": 0.1,
     "rank_pattern": {"down_proj": 5}, "alpha_pattern": {"k_proj": 3}}])
def test_what_peft_writes_is_a_model(settings, tmp_path):
    torch = pytest.importorskip("torch", reason="the extra `parity` brings torch and peft")
    theirs = pytest.importorskip("peft", reason="the extra `parity` brings torch and peft")
    import transformers

    torch.manual_seed(0)
    policy = theirs.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(SHIPPED_REASONER, dtype=torch.float32),
        theirs.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)).eval()
    policy.save_pretrained(tmp_path)
    opened = open_pretrained(str(tmp_path), dtype="float32")
    assert opened.adapters.rank == max(4, 5 if "rank_pattern" in settings else 0)

    tokens = np.arange(2, 26, dtype=np.int32).reshape(2, 12)
    params = load_weights(opened)
    ours = model.logits(params, model.forward(opened.decoder, params, tokens))
    with torch.no_grad():
        expected = policy(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)


SMOLLM2 = pytest.param(
    Path(os.environ.get("EFFREASON_REAL", "missing")) / "smollm2-135m-instruct",
    marks=[pytest.mark.real, pytest.mark.skipif(
        "EFFREASON_REAL" not in os.environ, reason="EFFREASON_REAL names the folder of models")])


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")   # peft's
@pytest.mark.parametrize("source", [pytest.param(SHIPPED_REASONER, id="tiny"), SMOLLM2])
def test_loss_and_gradients_of_rank_16_are_those_of_peft(source, tmp_path):
    torch = pytest.importorskip("torch", reason="the extra `parity` brings torch and peft")
    theirs = pytest.importorskip("peft", reason="the extra `parity` brings torch and peft")
    import transformers

    base = read_config(source)
    adapter = adapters.make_adapter(16, 32.0, "all", rank_stabilized=False)
    config = dataclasses.replace(base, adapter=adapter)
    frozen, generator = read_weights(source, base), np.random.default_rng(0)
    trained = jax.tree.map(
        lambda leaf: 0.02 * generator.standard_normal(leaf.shape, np.float32),
        adapters.split(model.abstract_params(config))[1])
    peft.write_adapter(trained, config, tmp_path, base_model=str(source))

    # The loss weighs the log-prob of each token, as a policy gradient does with its advantages.
    tokens = generator.integers(5, base.vocabulary - 5, (2, 40)).astype(np.int32)
    shares = generator.standard_normal(tokens[:, 1:].shape, np.float32)
    rows = rows_of(tokens)

    def loss(trained, frozen):      # as an argument: as constants they would take minutes
        logprobs, _ = update.score_rows(config, adapters.join(frozen, trained), rows,
                                        temperature=0.7, tile=4096)
        return jnp.sum(logprobs[:, :shares.shape[1]] * shares)

    value, grads = jax.jit(jax.value_and_grad(loss))(trained, frozen)
    policy = theirs.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32), str(tmp_path), is_trainable=True)
    inputs = torch.from_numpy(tokens).long()
    scores = torch.log_softmax(policy(inputs).logits[:, :-1] / 0.7, dim=-1)
    expected = (scores.gather(-1, inputs[:, 1:, None])[..., 0] * torch.from_numpy(shares)).sum()
    expected.backward()

    assert float(value) == pytest.approx(expected.item(), rel=1e-4, abs=1e-3)
    compared = 0
    for key, tensor in policy.named_parameters():
        if tensor.requires_grad:
            layer, module, part = re.fullmatch(
                r".*\.layers\.(\d+)\.(.+)\.lora_([AB])\.default\.weight", key).groups()
            name = next(name for name, known in peft.MODULES.items() if known == module)
            ours = np.asarray(grads["layers"][name + f"_lora_{part.lower()}"][int(layer)])
            ours = ours.reshape(-1, 16).T if part == "A" else ours.reshape(16, -1).T
            largest = tensor.grad.abs().max().item()
            np.testing.assert_allclose(ours, tensor.grad.numpy(), rtol=1e-3, atol=2e-4 * largest,
                                       err_msg=key)
            compared += 1
    assert compared == 2 * 7 * base.layers


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")   # peft's
@pytest.mark.parametrize("name", ["qwen2_tied", "llama", "qwen3"])
def test_peft_computes_what_the_merged_export_does(name, tmp_path):
    torch = pytest.importorskip("torch", reason="the extra `parity` brings torch and peft")
    theirs = pytest.importorskip("peft", reason="the extra `parity` brings torch and peft")
    import make_fixtures
    import transformers

    source = make_fixtures.FIXTURES / name
    base = read_config(source)
    config = policy(base)
    frozen = read_weights(source, base)
    random = adapters.split(weights(config))[1]
    params = adapters.join(frozen, jax.tree.map(lambda leaf: leaf * np.float32(0.2), random))
    peft.write_adapter(params, config, tmp_path, base_model=str(source))
    export_model(model.merge_adapters(config, params), base, source, tmp_path / "merged")

    tokens = torch.from_numpy(np.load(source / "reference.npz")["tokens"]).long()
    with torch.no_grad():
        adapted, merged, plain = (loaded(tokens).logits.numpy() for loaded in (
            theirs.PeftModel.from_pretrained(
                transformers.AutoModelForCausalLM.from_pretrained(source), str(tmp_path)),
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
            transformers.AutoModelForCausalLM.from_pretrained(source)))
    ours = model.logits(params, model.forward(config, params, tokens.numpy().astype(np.int32)))
    np.testing.assert_allclose(merged, adapted, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(ours, adapted, rtol=1e-3, atol=1e-3)
    assert np.abs(adapted - plain).max() > 0.1
