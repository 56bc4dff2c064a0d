"""Real checkpoints against what `transformers` computed with them once, in float32 on a CPU.

EFFREASON_REAL names the directory that holds them; those that are not there are skipped.
"""

import functools
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from decoders import mesh, rows_of

from effreason.lm.hf.config import read_config
from effreason.lm.hf.pretrained import open_pretrained
from effreason.lm.hf.weights import read_weights
from effreason.rl import update
from effreason.sampling import engine
from effreason.sampling.draws import SamplingParams
from effreason.sampling.scheduler import make_requests
from effreason.types import Problem

NAMES = ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"]
REFERENCES = Path(__file__).parents[3] / "shared" / "real" / "reference"
PROMPTS = range(6)
LONG_PROMPT = "A list of numbers and their squares. " + " ".join(
    f"The square of {number} is {number * number}." for number in range(1, 70))

pytestmark = [pytest.mark.slow, pytest.mark.real]


@pytest.fixture(scope="module", params=NAMES)
def directory(request):
    if not (place := os.environ.get("EFFREASON_REAL")):
        pytest.skip(f"EFFREASON_REAL is not set: the directory that holds {request.param}")
    directory = Path(place) / request.param
    if not (directory / "config.json").exists():
        pytest.skip(f"{directory} holds no checkpoint")
    return directory


@pytest.fixture(scope="module")
def reference(directory):
    path = REFERENCES / f"{directory.name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def checkpoint(directory):
    config = read_config(directory)
    return config, read_weights(directory, config)


def test_prompts_are_rendered_as_transformers_did(directory, reference):
    published = json.loads((REFERENCES / f"{directory.name}.json").read_text(encoding="utf-8"))
    pretrained = open_pretrained(str(directory), dtype="float32")
    for index, prompt in enumerate(published["prompts"]):
        messages = [{"role": "user", "content": prompt["problem"]}]
        rendered = pretrained.tokenizer.apply_chat_template(messages, tokenize=False,
                                                            add_generation_prompt=True)
        assert rendered == prompt["prompt"]
        ids = pretrained.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        np.testing.assert_array_equal(ids, reference[f"{index}_input_ids"])
    assert set(pretrained.eos_ids) >= set(published["eos_ids"])


def test_prompt_logprobs(reference, checkpoint):
    config, params = checkpoint
    prompts = [reference[f"{prompt}_input_ids"] for prompt in PROMPTS]
    score = jax.jit(functools.partial(update.score_rows, config, temperature=1.0, tile=4096))
    logprobs = np.asarray(score(params, rows_of(prompts))[0])
    for index, (scores, prompt) in enumerate(zip(logprobs, prompts, strict=True)):
        np.testing.assert_allclose(scores[: len(prompt) - 1], reference[f"{index}_prompt_logprobs"],
                                   rtol=0, atol=1e-3)


def test_greedy_tokens(reference, checkpoint):
    config, params = checkpoint
    problems = [Problem(uid=prompt, prompt=reference[f"{prompt}_input_ids"].astype(np.int32),
                        text="", reference="", level="all") for prompt in PROMPTS]
    expected = [reference[f"{prompt}_greedy_ids"] for prompt in PROMPTS]
    sample = engine.make_sampler(config, mesh(), slots=8, chunk=16)
    requests = make_requests([problem.prompt for problem in problems], 1, len(expected[0]))
    responses = [response for chunk in sample(params, requests, jax.random.key(0),
                                              SamplingParams(temperature=0, eos_ids=()))
                 for response in chunk]
    assert sorted(response.prompt for response in responses) == list(PROMPTS)
    for response in responses:
        np.testing.assert_array_equal(response.tokens, expected[response.prompt],
                                      err_msg=str(response.prompt))


def test_a_real_gemma_computes_what_transformers_does():
    """`tests/support/real_gemma.py` builds it. Prompt and response are longer than a window."""
    torch = pytest.importorskip("torch", reason="the extra `parity` brings torch")
    directory = Path(os.environ.get("EFFREASON_REAL", "nowhere")) / "gemma-3-270m"
    if not (directory / "config.json").exists():
        pytest.skip(f"{directory} holds no checkpoint")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = open_pretrained(str(directory), dtype="float32").tokenizer
    prompt = np.array(tokenizer(LONG_PROMPT)["input_ids"], np.int32)
    assert len(prompt) > theirs.config.sliding_window
    with torch.no_grad():
        tokens = torch.from_numpy(prompt)[None].long()
        scores = torch.log_softmax(theirs(tokens).logits[0, :-1], -1)
        expected = scores.gather(1, tokens[0, 1:, None])[:, 0].numpy()
        greedy = theirs.generate(tokens, do_sample=False, max_new_tokens=48, eos_token_id=None,
                                 pad_token_id=0)[0, len(prompt):].tolist()

    config = read_config(directory)
    params = read_weights(directory, config)
    score = jax.jit(functools.partial(update.score_rows, config, temperature=1.0, tile=4096))
    found = np.asarray(score(params, rows_of([prompt]))[0])[0, : len(prompt) - 1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    sample = engine.make_sampler(config, mesh(), slots=1, chunk=16)
    ((response,),) = [chunk for chunk in sample(
        params, make_requests([prompt], 1, 48), jax.random.key(0),
        SamplingParams(temperature=0, eos_ids=())) if chunk]
    assert response.tokens.tolist() == greedy
