"""Drafted tokens: found in the text, accepted if they are what is drawn, and so never seen in the
result."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generations import (
    ANY,
    ENDLESS,
    EOS,
    GROUP,
    LIMIT,
    MESHES,
    PROBLEMS,
    STOPPING,
    assert_same,
    generation,
    long_and_short,
    named,
    periodic,
    ragged,
    requests_for,
)

from benchmarks.sampling import repeats
from effreason.lm import model
from effreason.lm.hf.pretrained import load_weights, open_pretrained
from effreason.rl.rollouts import remaining
from effreason.runtime import sharding
from effreason.sampling import engine, scheduler, speculation
from effreason.sampling.draws import SamplingParams

GREEDY = SamplingParams(temperature=0.0, eos_ids=EOS)


# drafts and their verdict


find_drafts = jax.jit(speculation.find_drafts, static_argnums=2)


def draft(text, length, after=0):
    """What is drafted after a text in a row with `after` more tokens that are not its own."""
    begun = [-1] * (20 - len(text)) + text
    row = np.array([*begun, *[text[-1]] * after], np.int32)
    return find_drafts(row[None], np.int32([len(begun)]), length)[0].tolist()


@pytest.mark.parametrize(("text", "expected"), [
    ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5]),                         # what followed the last time
    ([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], [4, 9, 1]),                # of two places the newer
    ([7, 1, 2, 3, 9, 8, 1, 2, 4, 9, 7, 1, 2], [3, 9, 8]),       # the longer repeat goes first
    ([5, 6, 5, 6, 5, 6], [5, 6, 5]),                            # a circle goes on
    ([4, 8, 8, 8], [8, 8, 8]),
    ([1, 2, 3, 1, 2], [3, 1, 2]),                               # past its own end: round again
])
@pytest.mark.parametrize("after", [0, 5])
def test_a_draft_is_what_followed_the_newest_of_the_longest_repeats(text, expected, after):
    assert draft(text, 3, after) == expected


def test_a_longer_context_than_the_longest_looked_at_does_not_count():
    same = [1, 2, 3, 4, 5]
    assert draft([*same, 6, 9, *same[1:], 7, 9, *same], 3) == [7, 9, 1]


def test_rows_are_drafted_for_on_their_own():
    texts = np.int32([[1, 2, 3, 1, 0, 0], [4, 5, 6, 7, 4, 5]])
    found = find_drafts(texts, np.int32([4, 6]), 2)
    np.testing.assert_array_equal(found, [[2, 3], [6, 7]])


@pytest.mark.parametrize(("drawn", "drafts", "count"), [
    ([5, 6, 7], [5, 6], 3),         # all are right, and one more is drawn
    ([5, 6, 7], [5, 9], 2),         # the second is wrong: what is drawn there counts
    ([5, 6, 7], [9, 6], 1),         # after a wrong one nothing counts
    ([5, 1, 1], [5, 1], 2),         # EOS ends it, drafted or not
    ([1, 1, 1], [1, 1], 1),
    ([5], [], 1),
])
def test_tokens_count_through_the_first_that_differs_or_ends(drawn, drafts, count):
    found = speculation.count_accepted(
        jnp.array([drawn], jnp.int32), jnp.array([drafts], jnp.int32).reshape(1, -1),
        jnp.array([1], jnp.int32))
    assert found.tolist() == [count]


def test_the_text_ends_in_the_response_and_keeps_the_nearest_others():
    def text(width):
        others = [np.array([1, 2, 3], np.int32), np.array([4, 5], np.int32)]
        return speculation.make_text(others, np.array([8, 9], np.int32), width).tolist()

    assert text(10) == [-1, 1, 2, 3, -1, 4, 5, -1, 8, 9]
    assert text(12)[:2] == [-1, -1] and text(6) == [-1, 4, 5, -1, 8, 9]
    assert text(3) == [-1, 8, 9] and text(1) == [9]


# the engine


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Random decoders say little again: they would not go on drafting."""
    monkeypatch.setattr(scheduler, "LEAST_PER_STEP", 0.0)


def sampled(requests=None, problems=PROBLEMS, **settings):
    """Responses by name, and the generation that is over."""
    requests = requests_for(problems, GROUP, LIMIT) if requests is None else requests
    chunks = generation(requests, **settings)
    return named([response for finished in chunks for response in finished], problems), chunks


@functools.cache
def whole(sampling=ANY):
    return sampled(sampling=sampling)[0]


@pytest.mark.parametrize(("sampling", "arrangement"), [
    (ANY, dict(draft_tokens=8)), (ANY, dict(draft_tokens=5, slots=2, chunk=7)),
    (GREEDY, dict(draft_tokens=8)),
    (SamplingParams(temperature=0.7, top_p=0.8, eos_ids=EOS), dict(draft_tokens=3, slots=4))],
    ids=str)
def test_responses_and_their_logprobs_are_the_same_with_drafts(sampling, arrangement):
    """20 responses through few slots: refilled, then drafted for, with EOS among the drafts."""
    expected = whole(sampling)
    found, _ = sampled(sampling=sampling, **arrangement)
    assert_same(found, expected)
    for name, response in found.items():
        for kind in ("sampling_logprobs", "model_logprobs"):
            np.testing.assert_allclose(getattr(response, kind), getattr(expected[name], kind),
                                       atol=2e-5)


@pytest.mark.parametrize("name", ["all", "context"])
def test_eight_devices_draft_what_one_does(name):
    arrangement = dict(shape=tuple(MESHES[name].items()), sampling=GREEDY, draft_tokens=8)
    assert_same(sampled(**arrangement)[0], whole(GREEDY))


def test_a_drafted_response_takes_few_steps():
    settings = dict(sampling=dataclasses.replace(GREEDY, eos_ids=()), slots=2,
                    requests=requests_for(PROBLEMS[:1], 2, 80), problems=PROBLEMS[:1])
    expected, one_by_one = sampled(**settings)
    found, drafted = sampled(draft_tokens=8, **settings)
    assert_same(found, expected)
    assert one_by_one.steps == 80 and drafted.steps < 40
    assert drafted.tokens == one_by_one.tokens == 160 <= drafted.slot_steps
    # Its own programs, and none when it is repeated.
    assert sampled(draft_tokens=8, **settings)[1].compilations == 0


@pytest.mark.parametrize("sampling", [ENDLESS, dataclasses.replace(GREEDY, eos_ids=())], ids=str)
def test_drafts_end_with_the_cache_and_with_each_limit(sampling):
    """Limits of 2 to 150 tokens: caches grow, slots are given up and halved, and the longest
    response ends in the last position."""
    settings = dict(sampling=sampling, slots=16, max_positions=20 + 150, budget=2 * 192)
    expected, _ = sampled(long_and_short(), **settings)
    assert_same(sampled(long_and_short(), draft_tokens=8, **settings)[0], expected)


def test_no_room_for_a_draft_at_the_last_position():
    request = requests_for(PROBLEMS[4:], 1, 64 - 20)
    settings = dict(problems=PROBLEMS[4:], sampling=dataclasses.replace(GREEDY, eos_ids=()),
                    max_positions=64, slots=1)
    found, chunks = sampled(request, draft_tokens=8, **settings)
    assert_same(found, sampled(request, **settings)[0])
    assert chunks.capacity == 64 and len(found[0, 0].tokens) == 44


def test_ragged_batches_are_the_same_with_drafts():
    for seed in range(3):
        requests = ragged(seed)
        pairs = []
        for drafts in (0, 6):
            chunks = generation(requests, slots=8, chunk=8, draft_tokens=drafts, seed=seed)
            pairs.append({(response.prompt, response.sample): response
                          for finished in chunks for response in finished})
        assert_same(*pairs)


def test_repetition_stops_a_drafted_response_at_the_same_length():
    requests = requests_for(PROBLEMS, 2, 80)
    settings = dict(requests=requests, sampling=periodic()["sampling"], repetition=STOPPING)
    expected, found = sampled(**settings)[0], sampled(draft_tokens=8, **settings)[0]
    assert_same(found, expected)
    assert {name: response.finish for name, response in found.items()} == {
        name: response.finish for name, response in expected.items()}
    assert any(response.finish == "repetition" for response in found.values())


@pytest.mark.parametrize("chunks", [3, 6])
def test_a_generation_interrupted_while_it_drafts_goes_on_with_the_same_tokens(chunks):
    requests = requests_for(PROBLEMS[:2], GROUP, 60)
    sampling = dataclasses.replace(GREEDY, eos_ids=())
    settings = dict(sampling=sampling, draft_tokens=8, chunk=2)
    expected, _ = sampled(requests, PROBLEMS[:2], sampling=sampling)
    first = generation(requests, **settings)
    before = [response for _ in range(chunks) for response in next(first)]
    begun = first.unfinished()
    after = [response for finished in generation(remaining(requests, [*before, *begun]), **settings)
             for response in finished]
    assert_same(named([*before, *after], PROBLEMS[:2]), expected)


def test_drafting_pauses_if_too_few_drafts_are_right(monkeypatch):
    settings = dict(sampling=ENDLESS, slots=2, requests=requests_for(PROBLEMS[:1], 2, 200),
                    problems=PROBLEMS[:1])
    always, chunks = sampled(draft_tokens=8, **settings)
    monkeypatch.setattr(scheduler, "LEAST_PER_STEP", 1.5)
    found, paused = sampled(draft_tokens=8, **settings)
    assert_same(found, always)
    assert paused.slot_steps < chunks.slot_steps / 2


@pytest.mark.slow
def test_the_shipped_reasoner_says_the_same_with_drafts(monkeypatch):
    """Drafts from the first token on, not only in the tail: 50,000 tokens, none differs."""
    monkeypatch.setitem(speculation.MOST_POSITIONS, "cpu", 10_000)
    tiny = open_pretrained("tiny", dtype="float32")
    requests = repeats.requests_of(tiny, "tiny")
    params = load_weights(tiny, sharding.tree_sharding(sharding.make_mesh(data=-1),
                                                       model.logical_axes(tiny.decoder)))
    sampling = SamplingParams(temperature=1.0, eos_ids=tiny.eos_ids)
    plain, drafting = (repeats.make_sampler(tiny, requests, drafts) for drafts in (0, 8))
    tokens = step = 0
    while tokens < 50_000:
        key = engine.step_key(1, "train", step)
        expected, found = (sample(params, requests, key, sampling) for sample in (plain, drafting))
        pairs = [{(response.prompt, response.sample): response
                  for finished in chunks for response in finished} for chunks in (found, expected)]
        assert_same(*pairs)
        assert found.steps < 0.6 * expected.steps
        tokens, step = tokens + found.tokens, step + 1
