"""Generations of a small random decoder, as the engine's tests arrange and compare them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from decoders import QWEN2, VOCABULARY, mesh, place, weights

from effreason.sampling import engine
from effreason.sampling.draws import SamplingParams
from effreason.sampling.repetition import RepetitionStopping
from effreason.sampling.scheduler import make_requests
from effreason.sampling.slots import make_programs
from effreason.types import Problem

# One layer: its programs compile in half the time of two. The paths through several layers are
# compared in tests/lm/test_model.py.
DECODER = dataclasses.replace(QWEN2, layers=1)
EOS = (3, 18)
LIMIT = 24
ANY = SamplingParams(temperature=1.0, eos_ids=EOS)
ENDLESS = SamplingParams(temperature=1.0, eos_ids=())
GROUP = 4
STOPPING = RepetitionStopping(window=16, longest_period=8, grid=4)
MESHES = {"data": dict(data=8), "all": dict(data=2, fsdp=2, tensor=2),
          "context": dict(data=2, tensor=2, context=2)}


def problem(uid, length):
    prompt = np.random.default_rng(uid).integers(0, VOCABULARY, length).astype(np.int32)
    return Problem(uid=uid, prompt=prompt, text="", reference="", level="all")


# Lengths 1 and 2; both sides of the smallest bucket, 16; uids in no order.
PROBLEMS = [problem(uid, length) for uid, length in [(31, 1), (7, 2), (2_000_000_011, 9), (90, 16),
                                                     (0, 20)]]


shared_programs = functools.cache(make_programs)


@functools.cache
def sampler(shape=(), *, slots=8, chunk=4, **settings):
    """Samplers of different slots and chunks share what they compile."""
    target = mesh(**dict(shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "make_programs", shared_programs)
        return target, engine.make_sampler(DECODER, target, slots=slots, chunk=chunk, **settings)


def requests_for(problems, group_size, max_new_tokens, expected=None):
    return make_requests([problem.prompt for problem in problems], group_size, max_new_tokens,
                         uids=[problem.uid for problem in problems], expected=expected or {})


def generation(requests, *, seed=0, sampling=ANY, **settings):
    target, sample = sampler(**settings)
    params = place(DECODER, weights(DECODER), target)
    return sample(params, requests, jax.random.key(seed), sampling)


def completed(config, requests, *, shape=(), sampling=ANY, slots=8, chunk=4, **settings):
    """The responses of a decoder to requests for PROBLEMS, by name, and the generation that is
    over."""
    target = mesh(**dict(shape))
    sample = engine.make_sampler(config, target, slots=slots, chunk=chunk, **settings)
    chunks = sample(place(config, weights(config), target), requests, jax.random.key(0), sampling)
    return named([response for finished in chunks for response in finished], PROBLEMS), chunks


def named(responses, problems):
    """{(uid, sample): response}"""
    by_name = {(problems[response.prompt].uid, response.sample): response for response in responses}
    assert len(by_name) == len(responses)
    return by_name


def sampled(problems=PROBLEMS, group_size=GROUP, max_new_tokens=LIMIT, expected=None, **settings):
    requests = requests_for(problems, group_size, max_new_tokens, expected)
    return named([response for chunk in generation(requests, **settings) for response in chunk],
                 problems)


def assert_same(found, expected, atol=2e-5):
    for name, response in found.items():
        np.testing.assert_array_equal(response.tokens, expected[name].tokens, err_msg=str(name))
        np.testing.assert_allclose(response.logprobs, expected[name].logprobs, atol=atol)
        assert response.ended == expected[name].ended


def ragged(seed):
    """Five prompts of random lengths, four responses each with limits of their own."""
    generator = np.random.default_rng(seed)
    problems = [problem(seed * 10 + row, length)
                for row, length in enumerate(generator.integers(1, 33, 5))]
    return [dataclasses.replace(request, max_new_tokens=int(generator.integers(1, 90)))
            for request in requests_for(problems, GROUP, 1)]


def periodic(shape=()):
    """Greedy responses of a random decoder end up repeating themselves."""
    return dict(shape=shape, sampling=SamplingParams(temperature=0.0, eos_ids=()),
                max_new_tokens=80, group_size=2)


def long_and_short(seed=5):
    """20 requests for 2 to 150 tokens, unknown to the engine: five need a large cache."""
    generator = np.random.default_rng(seed)
    return [dataclasses.replace(request, max_new_tokens=int(
        generator.integers(100, 150) if request.sample == 0 else generator.integers(2, 40)))
            for request in requests_for(PROBLEMS, GROUP, 1)]
