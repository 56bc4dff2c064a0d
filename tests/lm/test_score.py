"""Log-probs of given texts of different lengths, against the whole table of each."""

import jax
import numpy as np
import pytest
from decoders import QWEN2, weights

from effreason.lm import model
from effreason.lm.score import score

TEXTS = [[1, 5, 3, 2, 9], [7, 7], [4, 0, 23]]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_each_token_is_scored_given_those_before_it(temperature):
    params = weights(QWEN2)
    scores = score(params, TEXTS, config=QWEN2, temperature=temperature, tile=8)
    for text, logprobs in zip(TEXTS, scores, strict=True):
        hidden = model.forward(QWEN2, params, np.array([text], np.int32))
        table = jax.nn.log_softmax(model.logits(params, hidden)[0] / temperature)
        expected = [table[place, token] for place, token in enumerate(text[1:])]
        assert logprobs.shape == (len(text) - 1,) and logprobs.dtype == np.float32
        np.testing.assert_allclose(logprobs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", [[3], [], [1, 24], [-1, 2]])
def test_a_text_that_cannot_be_scored(text):
    with pytest.raises(ValueError, match="sequence 1 must have at least two token ids in "):
        score({}, [[1, 2], text], config=QWEN2)
