"""config.json: published ones are understood, both spellings, and whatever the decoder does not
compute is refused."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import pytest
from checkpoint_copies import edit

from effreason.lm import model
from effreason.lm.architecture import LayerKind
from effreason.lm.delta import DeltaShape
from effreason.lm.hf import config as configs
from effreason.lm.hf.config import read_config
from effreason.lm.hf.families import FAMILIES
from effreason.lm.hf.pretrained import export_model
from effreason.lm.hf.weights import read_weights
from effreason.lm.rope import Divided, Linear, Llama3, Rope, Yarn
from effreason.runtime.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"
QWEN2_5 = dict(architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643,
               eos_token_id=151643, hidden_act="silu", hidden_size=1536, initializer_range=0.02,
               intermediate_size=8960, max_position_embeddings=4096, max_window_layers=21,
               model_type="qwen2", num_attention_heads=12, num_hidden_layers=28,
               num_key_value_heads=2, rms_norm_eps=1e-06, rope_theta=10000, sliding_window=4096,
               tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.44.0",
               use_cache=True, use_mrope=False, use_sliding_window=False, vocab_size=151936)
LLAMA3 = dict(architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0,
              bos_token_id=128000, eos_token_id=128001, hidden_act="silu", initializer_range=0.02,
              max_position_embeddings=131072, mlp_bias=False, model_type="llama",
              num_attention_heads=32, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05,
              rope_theta=500000.0, torch_dtype="bfloat16", transformers_version="4.43.0",
              use_cache=True, vocab_size=128256)
LLAMA3_ROPE = dict(high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
                   rope_type="llama3")
QWEN3 = dict(architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
             bos_token_id=151643, eos_token_id=151645, head_dim=128, hidden_act="silu",
             initializer_range=0.02, max_position_embeddings=40960, max_window_layers=28,
             model_type="qwen3", num_attention_heads=16, num_hidden_layers=28,
             num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000,
             sliding_window=None, tie_word_embeddings=True, torch_dtype="bfloat16",
             transformers_version="4.51.0", use_cache=True, use_sliding_window=False,
             vocab_size=151936)
# As published on the Hub, with the number of parameters given there.
PUBLISHED = {
    "DeepSeek-R1-Distill-Qwen-1.5B": (QWEN2_5 | dict(
        max_position_embeddings=131072, tie_word_embeddings=False), 1_777_088_000),
    "DeepSeek-R1-Distill-Qwen-7B": (QWEN2_5 | dict(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4,
        max_window_layers=28, max_position_embeddings=131072, tie_word_embeddings=False,
        vocab_size=152064), 7_615_616_512),
    "DeepSeek-R1-Distill-Llama-8B": (LLAMA3 | dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128,
        tie_word_embeddings=False, rope_scaling=LLAMA3_ROPE | dict(factor=8.0)), 8_030_261_248),
    "Llama-3.2-1B": (LLAMA3 | dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
        tie_word_embeddings=True, rope_scaling=LLAMA3_ROPE | dict(factor=32.0)), 1_235_814_400),
    "Qwen2.5-Math-1.5B": (QWEN2_5, 1_543_714_304),
    "Qwen2.5-Math-7B": (QWEN2_5 | dict(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4,
        max_window_layers=28, tie_word_embeddings=False, vocab_size=152064), 7_615_616_512),
    "Qwen3-0.6B": (QWEN3 | dict(hidden_size=1024, intermediate_size=3072), 596_049_920),
    "Qwen3-1.7B": (QWEN3 | dict(hidden_size=2048, intermediate_size=6144), 1_720_574_976),
}
YARN = dict(factor=4.0, original_max_position_embeddings=32768)
BASE = dict(hidden_act="silu", rms_norm_eps=1e-5, rope_scaling=None, tie_word_embeddings=False,
            torch_dtype="bfloat16")
MISTRAL = BASE | dict(
    model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768)
OLMO = BASE | dict(
    attention_bias=False, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-6, rope_theta=500000)
PHI = BASE | dict(
    model_type="phi3", attention_bias=False, embd_pdrop=0.0, original_max_position_embeddings=4096)
GEMMA = dict(
    model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], attention_bias=False,
    attn_logit_softcapping=None, final_logit_softcapping=None, head_dim=256,
    hidden_activation="gelu_pytorch_tanh", max_position_embeddings=32768, num_attention_heads=4,
    num_key_value_heads=1, query_pre_attn_scalar=256, rms_norm_eps=1e-6,
    rope_local_base_freq=10000.0, rope_scaling=None, rope_theta=1000000.0, sliding_window=512,
    sliding_window_pattern=6, torch_dtype="bfloat16", vocab_size=262144)
QWEN3_5 = dict(
    model_type="qwen3_5_text", attention_bias=False, attn_output_gate=True, dtype="bfloat16",
    full_attention_interval=4, head_dim=256, hidden_act="silu", linear_conv_kernel_dim=4,
    linear_key_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=32,
    linear_value_head_dim=128, max_position_embeddings=262144, mlp_only_layers=[],
    mtp_num_hidden_layers=1, num_attention_heads=16, num_hidden_layers=32, num_key_value_heads=4,
    rms_norm_eps=1e-6, mamba_ssm_dtype="float32", vocab_size=248320, rope_parameters=dict(
        mrope_interleaved=True, mrope_section=[11, 11, 10], rope_type="default",
        rope_theta=10000000, partial_rotary_factor=0.25))
# The same for families with layers of several kinds, norms in other places, or fused tensors; and
# how many layers of the first eight have a window.
OTHERS = {
    "Mistral-7B-Instruct-v0.3": (MISTRAL | dict(
        rope_theta=1e6, sliding_window=None, vocab_size=32768), 7_248_023_552, 0),
    "Mistral-7B-v0.1": (MISTRAL | dict(
        rope_theta=1e4, sliding_window=4096, vocab_size=32000), 7_241_732_096, 8),
    "SmolLM3-3B": (BASE | dict(
        model_type="smollm3", attention_bias=False, mlp_bias=False, hidden_size=2048,
        intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=5e6, no_rope_layer_interval=4,
        no_rope_layers=[1, 1, 1, 0] * 9, layer_types=["full_attention"] * 36, sliding_window=None,
        use_sliding_window=False, max_position_embeddings=65536, tie_word_embeddings=True,
        vocab_size=128256), 3_075_098_624, 0),
    "OLMo-2-1124-7B-Instruct": (OLMO | dict(
        model_type="olmo2", max_position_embeddings=4096, vocab_size=100352), 7_298_617_344, 0),
    "Olmo-3-7B-Think": (OLMO | dict(
        model_type="olmo3", max_position_embeddings=65536, vocab_size=100278, sliding_window=4096,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8, rope_scaling=dict(
            attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0, factor=8.0,
            original_max_position_embeddings=8192, rope_type="yarn")), 7_298_011_136, 6),
    "Qwen3-30B-A3B": (QWEN3 | dict(
        model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], hidden_size=2048,
        intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], router_aux_loss_coef=0.001,
        tie_word_embeddings=False), 30_532_122_624, 0),
    "Phi-4-mini-reasoning": (PHI | dict(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=24,
        num_key_value_heads=8, vocab_size=200064, max_position_embeddings=131072,
        partial_rotary_factor=0.75, rope_theta=10000.0, sliding_window=262144,
        tie_word_embeddings=True, rope_scaling=dict(
            type="longrope", long_factor=[1.5] * 48, short_factor=[1.0] * 48)), 3_836_021_760, 0),
    "Phi-4-reasoning": (PHI | dict(
        hidden_size=5120, intermediate_size=17920, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=10, vocab_size=100352, max_position_embeddings=32768,
        original_max_position_embeddings=32768, rope_theta=500000, sliding_window=None),
        14_659_507_200, 0),
    "gemma-3-270m-it": (GEMMA | dict(
        hidden_size=640, intermediate_size=2048, num_hidden_layers=18), 268_098_176, 7),
    "gemma-3-1b-it": (GEMMA | dict(
        hidden_size=1152, intermediate_size=6912, num_hidden_layers=26), 999_885_952, 7),
}


@pytest.fixture
def copy(tmp_path):
    """A directory whose config.json may be spoilt: qwen2_tied's, in the older spelling."""
    return Path(shutil.copytree(FIXTURES / "qwen2_tied", tmp_path / "model"))


def refusal(directory):
    """The one line with which a config.json is refused."""
    with pytest.raises(UserError) as caught:
        configs.read_config(directory)
    message = str(caught.value)
    assert "\n" not in message and str(directory) in message and len(message) < 300
    return message


# What is understood


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_understood(name):
    table, parameters = PUBLISHED[name]
    config = configs.parse_config(table, Path("config.json"), dtype="bfloat16")
    assert sum(math.prod(leaf.shape)
               for leaf in jax.tree.leaves(model.abstract_params(config))) == parameters
    (kind,) = config.kinds
    assert (config.vocabulary, kind.rope.theta) == (table["vocab_size"], table["rope_theta"])
    assert config.tied == table["tie_word_embeddings"]
    assert (kind.rope.scaling is not None) == (table["model_type"] == "llama")


@pytest.mark.parametrize(("entries", "parameters"), [
    # Of the language model alone, as transformers counts them.
    (dict(hidden_size=2560, intermediate_size=9216, tie_word_embeddings=True), 4_205_751_296),
    (dict(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False), 8_953_803_264),
    (dict(hidden_size=5120, intermediate_size=17408, num_hidden_layers=64, num_attention_heads=24,
          linear_num_value_heads=48, tie_word_embeddings=False), 26_895_998_464)], ids=str)
def test_qwen3_5_is_understood(entries, parameters):
    text = QWEN3_5 | entries
    table = dict(model_type="qwen3_5", architectures=["Qwen3_5ForConditionalGeneration"],
                 text_config=text, vision_config={}, image_token_id=248056,
                 tie_word_embeddings=text["tie_word_embeddings"])
    config = configs.parse_config(table, Path("config.json"))
    assert sum(math.prod(leaf.shape)
               for leaf in jax.tree.leaves(model.abstract_params(config))) == parameters
    assert configs.parse_config(text, Path("config.json")) == dataclasses.replace(
        config, copied_prefixes=("mtp.",))
    *with_states, attending = config.kinds
    assert attending == LayerKind(rope=Rope(theta=1e7, rotated=0.25)) and config.gates_attention
    assert len(with_states) == 3 and config.attention_layers == config.layers // 4
    assert with_states[0].delta == DeltaShape(
        key_heads=16, value_heads=text["linear_num_value_heads"], key_dim=128, value_dim=128,
        taps=4)
    assert configs.max_positions(table, Path("config.json")) == 262144


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_understood(name):
    table, parameters, windows = OTHERS[name]
    config = configs.parse_config(table, Path("config.json"))
    assert sum(math.prod(leaf.shape)
               for leaf in jax.tree.leaves(model.abstract_params(config))) == parameters
    kinds = [config.kind(layer) for layer in range(8)]
    assert sum(kind.window is not None for kind in kinds) == windows
    assert {kind.window for kind in kinds} <= {None, table.get("sliding_window")}
    without = [kind.rope for kind in kinds if kind.window is None]
    assert all(rope.theta == table["rope_theta"] for rope in without if rope is not None)
    assert without.count(None) == (2 if name == "SmolLM3-3B" else 0)


def test_layers_rotate_by_their_type():
    olmo = configs.parse_config(OTHERS["Olmo-3-7B-Think"][0], Path("config.json"))
    plain = LayerKind(rope=Rope(theta=500_000.0), window=4096)
    stretched = Yarn(factor=8.0, original_positions=8192)
    assert olmo.kinds[:3] == (plain,) * 3 and len(olmo.kinds) == 4
    assert olmo.kinds[3] == LayerKind(rope=Rope(theta=500_000.0, scaling=stretched,
                                                magnitude=1.2079441541679836))
    gemma = configs.parse_config(OTHERS["gemma-3-1b-it"][0], Path("config.json"))
    assert gemma.kinds == (LayerKind(rope=Rope(theta=10_000.0), window=512),) * 5 + (
        LayerKind(rope=Rope(theta=1_000_000.0)),)
    assert (gemma.query_scale, gemma.embedding_scale, gemma.activation, gemma.tied) == (
        1.0, math.sqrt(1152), "gelu_tanh", True)


def test_long_factors_are_for_long_sequences():
    table, *_ = OTHERS["Phi-4-mini-reasoning"]
    magnitude = math.sqrt(1 + math.log(32) / math.log(4096))
    for positions, factor in ((None, 1.0), (4096, 1.0), (4097, 1.5)):
        (kind,) = configs.parse_config(table, Path("config.json"), positions=positions).kinds
        assert kind.rope == Rope(theta=10_000.0, rotated=0.75, magnitude=magnitude,
                                 scaling=Divided(factors=(factor,) * 48))


def test_windows_that_are_on_in_the_last_layers():
    table = QWEN3 | dict(hidden_size=1024, intermediate_size=3072, use_sliding_window=True,
                         sliding_window=4096, max_window_layers=20)
    config = configs.parse_config(table, Path("config.json"))
    assert [config.kind(layer).window for layer in range(28)] == [None] * 20 + [4096] * 8
    config = configs.parse_config(table | dict(
        layer_types=["sliding_attention", "full_attention"] * 14), Path("config.json"))
    assert [kind.window for kind in config.kinds] == [4096, None]


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_spellings_say_the_same(name):
    older, _ = PUBLISHED[name]
    newer = {key: value for key, value in older.items()
             if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    rope = older.get("rope_scaling") or dict(rope_type="default")
    newer |= dict(rope_parameters=rope | dict(rope_theta=older["rope_theta"]),
                  dtype=older["torch_dtype"],
                  layer_types=["full_attention"] * older["num_hidden_layers"])
    path = Path("config.json")
    assert configs.parse_config(newer, path) == configs.parse_config(older, path)
    assert configs.parse_config(newer | older, path) == configs.parse_config(older, path)


def test_head_width_follows_from_the_width_where_it_is_not_told():
    table = {key: value for key, value in QWEN2_5.items() if key != "num_key_value_heads"}
    config = configs.parse_config(table, Path("config.json"))
    assert (config.head_dim, config.kv_heads) == (128, 12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_missing_entry_has_the_value_of_transformers(name):
    transformers, (table, _) = configs.transformers(), PUBLISHED[name]
    left = {key: table[key] for key in ("model_type", "hidden_size", "num_attention_heads")}
    found = configs.parse_config(left, Path("config.json"))
    # kv heads: Qwen2's class says 32 for any number of heads, which no model has
    expected = transformers.CONFIG_MAPPING[table["model_type"]](**left)
    assert (found.vocabulary, found.layers, found.mlp_width) == (
        expected.vocab_size, expected.num_hidden_layers, expected.intermediate_size)
    (kind,) = found.kinds
    assert (found.norm_eps, kind.rope.theta, found.tied) == (
        expected.rms_norm_eps, expected.rope_parameters["rope_theta"], expected.tie_word_embeddings)
    assert kind.rope == Rope(theta=10_000) and found.norm_eps == 1e-6 and not found.tied
    assert found.kv_heads == table["num_attention_heads"]
    assert found.head_dim == getattr(expected, "head_dim",
                                     table["hidden_size"] // table["num_attention_heads"])
    assert configs.max_positions(left, Path("config.json")) == expected.max_position_embeddings


def test_every_family_is_in_the_documents():
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert [name for name in FAMILIES if f"`{name}`" not in text] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_missing_entries_of_every_family(name):
    left = dict(model_type=name, hidden_size=64, num_attention_heads=4)
    found = configs.parse_config(left, Path("config.json"))
    expected = configs.transformers().CONFIG_MAPPING[name](**left)
    width = getattr(expected, "moe_intermediate_size", expected.intermediate_size)
    assert (found.vocabulary, found.layers, found.mlp_width, found.norm_eps, found.tied) == (
        expected.vocab_size, expected.num_hidden_layers, width, expected.rms_norm_eps,
        expected.tie_word_embeddings)
    assert (found.experts, found.experts_per_token) == (
        getattr(expected, "num_experts", 0), getattr(expected, "num_experts_per_tok", 0))
    assert found.head_dim == (getattr(expected, "head_dim", None) or 16)
    types = getattr(expected, "layer_types", None) or ["full_attention"] * found.layers
    if name == "mistral":       # it does not list them
        types = ["sliding_attention"] * found.layers
    for layer, layer_type in enumerate(types):
        kind, ropes = found.kind(layer), expected.rope_parameters
        if layer_type == "linear_attention":
            assert kind.delta is not None
            continue
        is_short = (layer_type == "sliding_attention"
                    and expected.sliding_window < expected.max_position_embeddings)
        assert kind.window == (expected.sliding_window if is_short else None)
        if kind.rope is not None:
            assert kind.rope.theta == ropes.get(layer_type, ropes)["rope_theta"]
        assert (kind.rope is None) == (name == "smollm3" and not expected.no_rope_layers[layer])


@pytest.mark.parametrize("entries", [
    dict(rope_scaling=dict(rope_type=None, type="default")), dict(rope_scaling=dict(type=None)),
    dict(rope_scaling={}), dict(rope_scaling=dict(type="linear", factor=1.0)),
    dict(rope_parameters=dict(rope_type=None, rope_theta=1e6)), dict(rope_scaling=None),
    dict(architectures=None), dict(architectures=["Qwen2Model"]), dict(torch_dtype="torch.float16"),
    # transformers and vLLM do not read it either
    dict(pretraining_tp=2), dict(hidden_act="swish"), dict(eos_token_id=[1, 2]),
], ids=str)
def test_spellings_that_change_nothing(copy, entries):
    expected = configs.read_config(copy)
    edit(copy, **entries)
    assert configs.read_config(copy) == expected


def test_the_class_names_of_the_first_llamas(tmp_path):
    shutil.copytree(FIXTURES / "llama", tmp_path, dirs_exist_ok=True)
    edit(tmp_path, architectures=["LLaMAForCausalLM"])
    assert configs.read_config(tmp_path) == configs.read_config(FIXTURES / "llama")


def test_a_byte_order_mark_is_dropped(copy):
    expected = configs.read_config(copy)
    path = copy / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert configs.read_config(copy) == expected


@pytest.mark.parametrize("name", ["qwen2_tied", "llama3", "qwen3", "ministral", "smollm3", "phi3"])
def test_an_exported_config_has_both_spellings(tmp_path, name):
    source = FIXTURES / name
    config = read_config(source)
    export_model(read_weights(source, config), config, source, tmp_path / "target")
    table = json.loads((tmp_path / "target" / "config.json").read_text())
    assert table["dtype"] == table["torch_dtype"] == "float32"
    rope = config.kinds[0].rope
    assert table["rope_theta"] == table["rope_parameters"]["rope_theta"] == rope.theta
    assert table["architectures"] == [FAMILIES[table["model_type"]].architecture]
    kind = {type(None): "default", Llama3: "llama3", Linear: "linear", Divided: "longrope"}
    assert table["rope_parameters"]["rope_type"] == kind[type(rope.scaling)]
    older = {key: value for key, value in table.items() if key not in ("rope_parameters", "dtype")}
    newer = {key: value for key, value in table.items()
             if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    for spelling in (older, newer, table):
        assert configs.parse_config(spelling, Path("config.json")) == config


@pytest.mark.parametrize("name", ["olmo3", "gemma3"])
def test_rotary_entries_by_type_are_exported_as_they_were(tmp_path, name):
    source = FIXTURES / name
    config = read_config(source)
    export_model(read_weights(source, config), config, source, tmp_path / "target")
    table, exported = (json.loads((directory / "config.json").read_text())
                       for directory in (source, tmp_path / "target"))
    assert exported == table | {"dtype": "float32", "torch_dtype": "float32"}
    assert read_config(tmp_path / "target") == config


# What is refused


@pytest.mark.parametrize("entries", [
    dict(model_type="mamba"),
    dict(model_type=None), dict(model_type=["qwen2"]), dict(hidden_act="gelu"),
    dict(sliding_window=0, use_sliding_window=True),
    dict(layer_types=["full_attention", "sliding_attention"]),
    dict(layer_types=["linear_attention"]), dict(mlp_bias=True), dict(rms_norm_eps=0),
    dict(quantization_config={"bits": 4}), dict(compression_config={"format": "int"}),
    dict(partial_rotary_factor=0.5), dict(use_mrope=True), dict(num_experts=8),
    dict(num_local_experts=8, num_experts_per_tok=2), dict(moe_intermediate_size=1408),
    dict(attn_logit_softcapping=50.0), dict(final_logit_softcapping=30.0), dict(logit_scale=0.0625),
    dict(dual_chunk_attention_config={"chunk_size": 262144}), dict(is_causal=False),
    dict(clip_qkv=8.0), dict(architectures=["Qwen2ForSequenceClassification"]),
    dict(architectures="Qwen2ForCausalLM"), dict(hidden_size="wide"), dict(num_hidden_layers=0),
    dict(vocab_size=72.5), dict(rms_norm_eps=True), dict(num_key_value_heads=3),
    dict(num_attention_heads=5, num_key_value_heads=5), dict(head_dim=7),
    dict(tie_word_embeddings="yes"), dict(rope_theta="long"), dict(rope_theta=[1, 2]),
    dict(rope_theta=0),
], ids=str)
def test_what_the_decoder_does_not_compute_is_refused_by_name(copy, entries):
    edit(copy, **entries)
    assert next(iter(entries)) in refusal(copy)


@pytest.mark.parametrize(("family", "entry"), [
    ("qwen3", dict(mlp_bias=True)), ("mistral", dict(attention_bias=True)),
    ("llama", dict(sliding_window=4096)), ("llama", dict(no_rope_layers=[1, 0])),
    ("smollm3", dict(no_rope_layers=[1])), ("olmo2", dict(query_pre_attn_scalar=64)),
    ("gemma3_text", dict(final_logit_softcapping=30.0)),
    ("gemma3_text", dict(use_bidirectional_attention=True)),
    ("mistral", dict(layer_types=["full_attention"] * 2, sliding_window=8)),
    ("qwen3", dict(attn_output_gate=True)), ("qwen3", dict(linear_num_key_heads=4)),
    ("qwen3_5_text", dict(attn_output_gate=False)), ("qwen3_5_text", dict(mlp_bias=True)),
    ("qwen3_5_text", dict(linear_num_key_heads=5)),
    ("qwen3_5_text", dict(layer_types=["linear_attention", "sliding_attention"])),
])
def test_what_another_family_would_not_read_is_refused(copy, family, entry):
    edit(copy, model_type=family, architectures=[FAMILIES[family].architecture],
         **entry)
    assert next(iter(entry)) in refusal(copy)


def test_a_missing_family_is_named(copy):
    edit(copy, remove=["model_type"])
    assert "model_type" in refusal(copy)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("rope", "expected"), [
    (dict(rope_type="yarn", factor="4"), "yarn factor"), (dict(type="linear"), "lack 'factor'"),
    (dict(rope_type="longrope", short_factor=[1.0], long_factor=[4.0]), "a list of 4 factors"),
    (dict(type="mrope", mrope_section=[16, 24, 24]), "'mrope'"),
    (dict(rope_type="default", type="mrope"), "'mrope'"),
    (dict(rope_type="llama3", factor=8.0), "low_freq_factor"),
    (LLAMA3_ROPE | dict(factor="8"), "llama3 factor"),
    (dict(rope_type="default", partial_rotary_factor=0.5), "partial_rotary_factor"),
    (dict(full_attention=dict(rope_type="default", rope_theta=1e6)), "one table"),
    ([4.0], "one table"),
], ids=str)
def test_other_rotary_settings_are_refused(copy, key, rope, expected):
    edit(copy, **{key: rope})
    assert expected in refusal(copy)


def test_rotary_settings_that_contradict_each_other(copy):
    edit(copy, rope_scaling=dict(rope_type="yarn", **YARN),
         rope_parameters=dict(rope_type="default"))
    assert "rope_parameters say 'default', rope_scaling says 'yarn'" in refusal(copy)
    edit(copy, rope_scaling=None, rope_parameters=dict(rope_type="default", rope_theta=5.0),
         rope_theta=10.0)
    assert "differ" in refusal(copy)


@pytest.mark.parametrize(("spoil", "expected"), [
    (lambda path: path.write_text('{"model_type": '), "not valid JSON"),
    (lambda path: path.write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    (lambda path: path.write_text('{"a": 1, // theta\n}'), "not valid JSON"),
    (lambda path: path.write_text(f'{{"a": {"9" * 5000}}}'), "not valid JSON"),
    (lambda path: path.write_text("[1, 2]"), "expected a JSON object, found list"),
    (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
     "is a pointer of Git LFS"),
    (lambda path: (path.unlink(), path.symlink_to("../blobs/0")), "a link to ../blobs/0, which"),
    (lambda path: path.unlink(), "file not found"),
    (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
], ids=["cut", "binary", "comment", "digits", "list", "pointer", "link", "gone", "directory"])
def test_a_file_that_is_no_table(copy, spoil, expected):
    spoil(copy / "config.json")
    assert expected in refusal(copy)


def test_the_dtype_is_the_one_asked_for():
    config = configs.read_config(FIXTURES / "llama", dtype="bfloat16", remat="none")
    assert config.dtype == "bfloat16" and config.remat == "none"
    assert dataclasses.replace(config, dtype=jax.numpy.dtype("float32"),
                               remat="full") == configs.read_config(FIXTURES / "llama")
