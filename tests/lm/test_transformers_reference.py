"""The decoder against logits that `transformers` computed once: see make_fixtures.py. No torch is
needed here."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effreason.lm import model
from effreason.lm.hf.config import read_config
from effreason.lm.hf.weights import read_weights

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ["qwen2_tied", "qwen2_untied", "llama", "llama3", "qwen3", "mistral", "ministral",
         "smollm3", "olmo2", "olmo3", "phi3", "gemma3", "qwen3_moe", "qwen3_5"]
TOLERANCE = dict(rtol=1e-4, atol=5e-4)  # float32 sums in another order; a logit's spread is 2 to 6


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request):
    directory = FIXTURES / request.param
    config = read_config(directory)
    with np.load(directory / "reference.npz") as arrays:
        return config, read_weights(directory, config), arrays["tokens"], arrays["logits"]


def test_training_path_gives_the_reference_logits(checkpoint):
    config, params, tokens, expected = checkpoint
    logits = jax.jit(
        lambda params: model.logits(params, model.forward(config, params, tokens)))(params)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, **TOLERANCE)


def test_cached_path_gives_the_reference_logits(checkpoint):
    # In two pieces, the second after the first, through a cache with room to spare.
    config, params, tokens, expected = checkpoint
    rows, half = tokens.shape[0], tokens.shape[1] // 2

    @jax.jit
    def extend(tokens, start, cache):
        hidden, cache = model.decode(config, model.unstack(config, params), tokens, start, cache)
        return model.logits(params, hidden), cache

    first, cache = extend(tokens[:, :half], np.zeros(rows, np.int32),
                          model.empty_cache(config, rows, 64))
    second, _ = extend(tokens[:, half:], np.full(rows, half, np.int32), cache)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), expected, **TOLERANCE)
