"""Adapters on disk: what is written is read back, and peft computes the same with it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from decoders import FAMILIES, QWEN2, weights
from safetensors.numpy import load_file, save_file

from effreason.lm import adapters, model
from effreason.lm.hf import peft
from effreason.lm.hf.config import read_config
from effreason.lm.hf.pretrained import export_model
from effreason.lm.hf.weights import read_weights
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all", "mlp"])
def test_what_is_written_is_read_back(family, targets, tmp_path):
    config = policy(FAMILIES[family], targets)
    params = weights(config)
    peft.write_adapter(params, config, tmp_path, base_model="org/base")
    again, read = peft.read_adapter(tmp_path, FAMILIES[family])
    merged = model.merge_adapters(again, adapters.join(adapters.split(params)[0], read))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6),
                 merged, model.merge_adapters(config, params))


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
    ({"modules_to_save": ["lm_head"]}, r'modules_to_save must be None, got \["lm_head"\]')])
def test_other_kinds_of_adapters_are_refused(entries, message, directory):
    edit(directory, **entries)
    with pytest.raises(UserError, match=message):
        peft.read_adapter(directory, QWEN2)


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
