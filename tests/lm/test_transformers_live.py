"""The decoder against `transformers`, live, on random checkpoints of every family: load, compute,
decode, export."""

from pathlib import Path

import jax
import numpy as np
import pytest

from effreason.lm import model
from effreason.lm.hf.config import parse_config, read_config
from effreason.lm.hf.pretrained import export_model
from effreason.lm.hf.weights import EMBEDDING, layouts, read_weights

torch = pytest.importorskip("torch", reason="the extra `parity` brings torch")
import make_fixtures  # noqa: E402
import transformers  # noqa: E402

pytestmark = pytest.mark.parity
TOLERANCE = dict(rtol=1e-4, atol=5e-4)
ROWS, POSITIONS = 2, 60
SEED = 1000  # other weights and tokens than the committed fixtures have


@pytest.fixture(scope="module", params=sorted(make_fixtures.CONFIGS))
def pair(request, tmp_path_factory):
    """A transformers model, the directory it was saved to, and tokens with its logits."""
    name = request.param
    directory = tmp_path_factory.mktemp(name)
    theirs = make_fixtures.build(make_fixtures.CONFIGS[name](), SEED)
    # The spelling of config.json and the split into files are not what the committed fixture of
    # that name has.
    make_fixtures.save(theirs, directory, older_spelling=name not in make_fixtures.OLDER_SPELLING,
                       sharded=name not in make_fixtures.SHARDED)
    return directory, make_fixtures.reference(theirs, SEED, ROWS, POSITIONS)


def test_logits_equal_transformers(pair):
    directory, arrays = pair
    config = read_config(directory)
    params = read_weights(directory, config)
    logits = jax.jit(lambda params: model.logits(
        params, model.forward(config, params, arrays["tokens"])))(params)
    np.testing.assert_allclose(logits, arrays["logits"], **TOLERANCE)


@pytest.mark.parametrize("entries", [
    dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
    dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32, mscale=0.7,
         mscale_all_dim=1.2, beta_fast=16.0, beta_slow=2.0, truncate=False),
    dict(rope_type="linear", factor=3.0), dict(rope_type="dynamic", factor=3.0),
    dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
         original_max_position_embeddings=32),
    dict(rope_type="longrope", original_max_position_embeddings=64,
         short_factor=[1.0 + 0.1 * plane for plane in range(12)],
         long_factor=[1.0 + plane for plane in range(12)])], ids=str)
def test_frequencies_equal_transformers(entries):
    path, is_long = Path("config.json"), entries["rope_type"] == "longrope"
    family = transformers.Phi3Config if is_long else transformers.LlamaConfig
    theirs = family(hidden_size=96, num_attention_heads=4, max_position_embeddings=256,
                    pad_token_id=0, rope_parameters=dict(entries) | {"rope_theta": 10_000.0},
                    **({"original_max_position_embeddings": 64} if is_long else {}))
    compute = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[entries["rope_type"]]
    for positions in (32, 200):
        frequencies, magnitude = compute(theirs, "cpu", seq_len=positions)
        (kind,) = parse_config(theirs.to_dict(), path, positions=positions).kinds
        np.testing.assert_allclose(kind.rope.frequencies(24), frequencies.numpy(), rtol=1e-5)
        assert kind.rope.magnitude == pytest.approx(magnitude)


def test_gradients_equal_torch(pair):
    """Of the sum of all logits, each with a random weight."""
    directory, arrays = pair
    config = read_config(directory)
    weights = np.random.default_rng(SEED).standard_normal(arrays["logits"].shape, np.float32)

    def loss(params):
        return (model.logits(params, model.forward(config, params, arrays["tokens"]))
                * weights).sum()

    ours = jax.jit(jax.grad(loss))(read_weights(directory, config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory,
                                                               attn_implementation="eager")
    (theirs(torch.from_numpy(arrays["tokens"]).long()).logits
     * torch.from_numpy(weights)).sum().backward()
    expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    for name in [name for name in expected if ".experts." in name]:     # fused in memory alone
        experts, _, kind = name.rpartition(".")
        for number, gradient in enumerate(expected.pop(name)):
            halves = np.split(gradient, 2) if kind == "gate_up_proj" else [gradient]
            for part, half in zip(kind.removesuffix("_proj").split("_"), halves, strict=True):
                expected[f"{experts}.{number}.{part}_proj.weight"] = half

    largest = max(np.abs(gradient).max() for gradient in expected.values())

    def check(layout, gradient):
        if isinstance(layout, tuple):       # of layers, or of experts
            for part, of_part in zip(layout, gradient, strict=True):
                check(part, of_part)
            return
        stored = np.asarray(gradient).transpose(layout.order).reshape(layout.own_shape)
        wanted = expected[layout.name][layout.start : layout.start + len(stored)]
        padding = getattr(theirs.model, "padding_idx", None)
        if layout.name == EMBEDDING and padding is not None:
            # torch's embedding gives the padding token no gradient.
            stored, wanted = (np.delete(x, padding, 0) for x in (stored, wanted))
        error, size = np.abs(stored - wanted).max(), np.abs(wanted).max()
        # A bias of keys that know no positions has none: all scores would change by the same.
        assert error < max(1e-3 * size, 1e-6 * largest), layout.name

    table = layouts(config)
    for name, layout in (table | table["layers"]).items():
        if name != "layers":
            check(layout, (ours | ours["layers"])[name])


def test_transformers_loads_the_export(pair, tmp_path):
    directory, arrays = pair
    config = read_config(directory)
    export_model(read_weights(directory, config), config, directory, tmp_path / "export")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    logits = make_fixtures.reference(again.eval(), SEED, ROWS, POSITIONS)["logits"]
    np.testing.assert_array_equal(logits, arrays["logits"])     # the export lost no bit


def test_decoding_equals_transformers_greedy(pair):
    """Token by token through the cache, as the sampler does: the same 16 tokens as `generate`."""
    directory, arrays = pair
    config = read_config(directory)
    unstacked = model.unstack(config, read_weights(directory, config))
    prompt, new = arrays["tokens"][:1, :8], 16
    extend = jax.jit(lambda tokens, start,
                     cache: model.decode(config, unstacked, tokens, start, cache))
    hidden, cache = extend(prompt, np.array([0], np.int32), model.empty_cache(config, 1, 8 + new))
    ours = []
    for position in range(8, 8 + new):
        ours.append(int(model.logits(unstacked, hidden[:, -1]).argmax()))
        hidden, cache = extend(np.array([[ours[-1]]], np.int32), np.array([position], np.int32),
                               cache)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory,
                                                               attn_implementation="eager").eval()
    output = theirs.generate(theirs.dummy_inputs["input_ids"].new_tensor(prompt.tolist()),
                             do_sample=False, min_new_tokens=new, max_new_tokens=new,
                             eos_token_id=None, pad_token_id=0)
    assert ours == output[0, 8:].tolist()
