"""The sampling engine: against the full forward pass, against itself in other arrangements, and by
distribution."""

import dataclasses
import logging
import re

import jax
import numpy as np
import pytest
from decoders import VOCABULARY, mesh, place, weights
from generations import (
    ANY,
    DECODER,
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
    problem,
    ragged,
    requests_for,
    sampled,
    sampler,
)

from effreason.lm import model
from effreason.lm.score import score
from effreason.rl.rollouts import remaining
from effreason.runtime import sharding
from effreason.runtime.errors import UserError
from effreason.sampling import engine, slots
from effreason.sampling.draws import SamplingParams
from effreason.sampling.scheduler import Request
from effreason.sampling.slots import INSERT_FIELDS, make_programs
from effreason.types import Response


@jax.jit
def full_logits(params, tokens):
    return model.logits(params, model.forward(DECODER, params, tokens))


def predictions(problem, response):
    """Logits of the full forward pass at each position of a response, float32[T', V]."""
    row = np.concatenate([problem.prompt, response.tokens])
    logits = full_logits(weights(DECODER), np.pad(row, (0, 96 - len(row)))[None])[0]
    return np.asarray(logits)[len(problem.prompt) - 1 : len(row) - 1]


def log_softmax(logits):
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def assert_logprobs_are_the_forward_pass(responses, problems, temperature=1.0):
    for problem_ in problems:
        for sample in range(GROUP):
            response = responses[problem_.uid, sample]
            expected = log_softmax(predictions(problem_, response) / temperature)
            expected = np.take_along_axis(expected, response.tokens[:, None], axis=-1)[:, 0]
            np.testing.assert_allclose(response.logprobs, expected, atol=2e-5)


@pytest.fixture(scope="module")
def baseline():
    """20 responses through 8 slots: every slot is refilled, at its own time."""
    return sampled()


def test_every_response_comes_once_and_well_formed(baseline):
    assert baseline.keys() == {(problem.uid, sample) for problem in PROBLEMS
                               for sample in range(GROUP)}
    for response in baseline.values():
        assert response.tokens.dtype == np.int32 and response.logprobs.dtype == np.float32
        assert response.tokens.shape == response.logprobs.shape and 1 <= len(
            response.tokens) <= LIMIT
        is_eos = np.isin(response.tokens, EOS)
        assert not is_eos[:-1].any()  # stops at the first EOS, whichever it is
        assert response.ended == is_eos[-1]
        assert response.ended or len(response.tokens) == LIMIT
    # The cases this batch is to hold: both EOS ids, and a response cut at the limit.
    assert {response.tokens[-1] for response in baseline.values() if response.ended} == set(EOS)
    assert not all(response.ended for response in baseline.values())


def test_recorded_logprobs_are_those_of_the_full_forward_pass(baseline):
    assert_logprobs_are_the_forward_pass(baseline, PROBLEMS)


def test_a_cache_that_grows_past_its_bucket_loses_nothing():
    # The prompt of 20 starts in a cache of 64; with 60 tokens more it needs the next bucket, 96. No
    # EOS: all are cut.
    responses = sampled(problems=PROBLEMS[3:], sampling=ENDLESS, max_new_tokens=60, chunk=16)
    assert all(len(response.tokens) == 60 and not response.ended for response in responses.values())
    assert_logprobs_are_the_forward_pass(responses, PROBLEMS[3:])


def test_greedy_takes_the_most_likely_token():
    responses = sampled(sampling=SamplingParams(temperature=0.0, eos_ids=EOS))
    for problem_ in PROBLEMS:
        for sample in range(GROUP):
            response = responses[problem_.uid, sample]
            np.testing.assert_array_equal(response.tokens,
                                          predictions(problem_, response).argmax(axis=-1))
            np.testing.assert_array_equal(response.sampling_logprobs, 0.0)


@pytest.mark.parametrize(("shape", "filters"), [
    ((), {}), ((), dict(top_k=10, top_p=0.95)), ((), dict(top_k=20)), ((), dict(min_p=0.01)),
    ((("data", 2), ("fsdp", 2), ("tensor", 2)), dict(top_k=10, top_p=0.95))], ids=str)
def test_ids_without_a_token_are_never_drawn_and_the_scorer_agrees(baseline, shape, filters):
    config = dataclasses.replace(DECODER, unused_ids=((4, 9), (20, 24)))
    unused = [*range(4, 9), *range(20, 24)]
    drawn = np.concatenate([response.tokens for response in baseline.values()])
    assert np.isin(drawn, unused).mean() > 0.1                  # they are likely in themselves
    target = mesh(**dict(shape))
    sample = engine.make_sampler(config, target, slots=8, chunk=4)
    responses = named([response for chunk in sample(
        place(DECODER, weights(DECODER), target), requests_for(PROBLEMS, GROUP, LIMIT),
        jax.random.key(0), dataclasses.replace(ANY, **filters)) for response in chunk], PROBLEMS)
    sequences = {name: np.concatenate([problem.prompt, response.tokens])
                 for problem in PROBLEMS for name, response in responses.items()
                 if name[0] == problem.uid}
    scored = score(weights(DECODER), list(sequences.values()), config=config, tile=7)
    for name, logprobs in zip(sequences, scored, strict=True):
        response = responses[name]
        assert not np.isin(response.tokens, unused).any()
        np.testing.assert_allclose(response.logprobs, logprobs[-len(response.tokens):], atol=2e-5)


def test_logprobs_of_three_kinds():
    responses = sampled(sampling=SamplingParams(temperature=0.7, top_p=0.8, eos_ids=EOS))
    assert_logprobs_are_the_forward_pass(responses, PROBLEMS, temperature=0.7)
    for problem_ in PROBLEMS:
        response = responses[problem_.uid, 0]
        logits = predictions(problem_, response)
        place_ = response.tokens[:, None]
        np.testing.assert_allclose(response.model_logprobs,
                                   np.take_along_axis(log_softmax(logits), place_, -1)[:, 0],
                                   atol=2e-5)
        tempered = log_softmax(logits / 0.7)
        for row, token in enumerate(response.tokens):
            order = np.argsort(-tempered[row])
            mass = np.cumsum(np.exp(tempered[row][order]))
            kept = order[: np.searchsorted(mass, 0.8) + 1]
            assert token in kept
            expected = tempered[row, token] - np.log(np.exp(tempered[row][kept]).sum())
            assert response.sampling_logprobs[row] == pytest.approx(expected, abs=2e-5)


def test_without_filters_at_temperature_one_the_three_kinds_are_one(baseline):
    for response in baseline.values():
        np.testing.assert_array_equal(response.logprobs, response.sampling_logprobs)
        np.testing.assert_array_equal(response.logprobs, response.model_logprobs)


def test_a_shorter_limit_cuts_the_same_responses_and_compiles_nothing(baseline, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        cut = sampled(max_new_tokens=5)
    assert "jit(decode)" not in caplog.text
    for name, response in cut.items():
        np.testing.assert_array_equal(response.tokens, baseline[name].tokens[:5])
        assert response.ended == (baseline[name].ended and len(baseline[name].tokens) <= 5)


@pytest.mark.parametrize("arrangement", [dict(slots=2), dict(slots=64), dict(chunk=7)], ids=str)
def test_a_response_does_not_depend_on_slots_or_chunk(baseline, arrangement):
    assert_same(sampled(**arrangement), baseline)


def test_a_response_does_not_depend_on_the_other_prompts_or_the_group_size(baseline):
    assert_same(sampled(problems=PROBLEMS[::-1]), baseline)
    assert_same(sampled(problems=PROBLEMS[1:4], group_size=3), baseline)


def test_a_response_does_not_depend_on_the_order():
    baseline = sampled(max_new_tokens=48)
    expected = {problem.uid: float(place) for place, problem in enumerate(PROBLEMS)}
    assert_same(sampled(max_new_tokens=48, expected=expected), baseline)


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
def test_eight_devices_sample_what_one_does(baseline, shape):
    assert_same(sampled(shape=tuple(shape.items())), baseline)


def test_no_cache_moves_between_devices():
    target = mesh(**MESHES["all"])
    config = DECODER
    programs, rows, capacity = make_programs(config, target), 16, 4096
    with jax.set_mesh(target):
        params = programs.unstack(place(config, weights(config), target))
        state = programs.empty(count=rows, capacity=capacity)
        bank = programs.prefill(params, np.zeros((8, 64), np.int32), np.zeros(8, np.int32))
        fresh, kept = np.zeros((len(INSERT_FIELDS), rows), np.int32), np.zeros(rows // 2, np.int32)
        control = np.zeros(1 + rows, np.int32)
        lowered = [programs.decode.lower(params, state, control, sampling=ANY, chunk=4),
                   programs.insert.lower(state, bank, fresh, jax.random.key(0)),
                   programs.grow.lower(state.cache[0], positions=2 * capacity),
                   programs.compact_cache[0].lower(state.cache[0], kept)]
    of_a_device = rows * config.kv_heads * config.head_dim * capacity // 8
    all_moved = [
        re.findall(
            r"= \(?\w+\[([\d,]*)\].* (?:all-gather|all-reduce|all-to-all|collective-permute)\(",
            program.compile().as_text()) for program in lowered]
    assert all_moved[0]  # the products over heads and vocabulary are summed
    assert all(np.prod([int(size) for size in shape.split(",") if size]) < of_a_device / 8
               for moved in all_moved for shape in moved)


def test_samples_of_a_prompt_and_steps_differ(baseline):
    first, second = baseline[0, 0].tokens, baseline[0, 1].tokens
    assert len(first) != len(second) or (first != second).any()
    other_step = sampled(seed=1)
    assert any(len(other_step[name].tokens) != len(baseline[name].tokens) for name in baseline)


@pytest.mark.parametrize("limit", [1, LIMIT])
def test_eos_as_the_first_token_is_a_response_of_length_one(limit):
    # At a limit of 1 the last token allowed is EOS: ended, not cut.
    responses = sampled(sampling=SamplingParams(temperature=1.0, eos_ids=tuple(range(VOCABULARY))),
                        max_new_tokens=limit)
    assert all(len(response.tokens) == 1 and response.ended for response in responses.values())


def test_an_iterator_yields_after_every_chunk_and_may_be_dropped():
    chunks = generation(requests_for(PROBLEMS, GROUP, LIMIT))
    before = chunks.running, chunks.waiting
    assert before == (8, 12)
    first = next(chunks)
    assert all(isinstance(response, Response) for response in first)
    assert chunks.finished == len(first) and chunks.running == 8 and chunks.waiting == 12 - len(
        first)
    assert 0 < chunks.tokens <= 8 * 4 and 0 < chunks.steps <= 4
    del chunks


@pytest.mark.parametrize("shape", [{}, MESHES["all"]], ids=["one device", "eight devices"])
def test_host_and_device_meet_only_where_they_say_so(shape):
    target, sample = sampler(tuple(shape.items()))
    params = place(DECODER, weights(DECODER), target)
    key = jax.device_put(jax.random.key(0), sharding.sharding(target))
    with jax.transfer_guard("disallow"):
        requests = requests_for(PROBLEMS, GROUP, LIMIT)
        assert sum(len(chunk) for chunk in sample(params, requests, key,
                                                  ANY)) == GROUP * len(PROBLEMS)


def test_twenty_ragged_batches_compile_nothing_after_the_warm_up(caplog):
    settings = dict(slots=8, chunk=8, max_positions=32 + 90, sampling=ENDLESS)
    for seed in range(100, 140):  # every width of prompts meets every size of the cache
        for _ in generation(ragged(seed), **settings):
            pass
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for seed in range(20):
            chunks = generation(ragged(seed), seed=seed, **settings)
            assert sum(len(finished) for finished in chunks) == 5 * GROUP
            assert chunks.compilations == 0
    assert not re.findall(r"Compiling jit\((decode|prefill|insert|grow|compact|empty)\)",
                          caplog.text)


def test_a_prompt_is_read_once_and_several_at_a_time(monkeypatch):
    rows = []

    class Spy:
        """A compiled function that writes down what it is called with."""

        def __init__(self, function):
            self.function, self._cache_size = function, function._cache_size

        def __call__(self, weights, prompts, lengths):
            rows.append(prompts.shape)
            return self.function(weights, prompts, lengths)

    def spied(*arguments):
        programs = make_programs(*arguments)
        return dataclasses.replace(programs, prefill=Spy(programs.prefill))

    monkeypatch.setattr(engine, "make_programs", spied)
    sample = engine.make_sampler(DECODER, mesh(), slots=3, chunk=4)
    problems = [problem(uid, 5) for uid in range(9)]
    requests = requests_for(problems, GROUP, 9)
    chunks = sample(weights(DECODER), requests, jax.random.key(0), ANY)
    assert sum(map(len, chunks)) == 36
    assert rows == [(3, 16)] * 3                                # as many at once as there are slots


def test_slots_are_halved_in_the_tail_and_lose_nothing():
    problems = [problem(uid, 6) for uid in range(4)]
    limits = [60 if request.sample == 0 and request.prompt == 2 else 7 + request.sample
              for request in requests_for(problems, 8, 1)]
    requests = [dataclasses.replace(request, max_new_tokens=limit) for request, limit in zip(
        requests_for(problems, 8, 1), limits, strict=True)]
    chunks = generation(requests, slots=32, sampling=ENDLESS)
    sizes, responses = [], []
    for finished in chunks:
        responses += finished
        sizes.append(chunks.slot_steps)
    assert chunks.slot_steps < 32 * chunks.steps / 2            # most steps were made with 8 slots
    in_order = sorted(responses, key=lambda response: (response.prompt, response.sample))
    assert [len(response.tokens) for response in in_order] == limits
    few = named([response for finished in generation(requests, slots=4, sampling=ENDLESS)
                 for response in finished], problems)
    assert_same(named(responses, problems), few)


def test_requests_of_one_prompt_may_have_limits_of_their_own(baseline):
    requests = [dataclasses.replace(request, max_new_tokens=1 + 3 * request.sample)
                for request in requests_for(PROBLEMS, GROUP, LIMIT)]
    responses = named([response for chunk in generation(requests) for response in chunk], PROBLEMS)
    for (uid, sample), response in responses.items():
        np.testing.assert_array_equal(response.tokens,
                                      baseline[uid, sample].tokens[: 1 + 3 * sample])
        assert response.finish == ("eos" if response.tokens[-1] in EOS else "length")


def test_the_longest_expected_comes_first_and_what_is_unknown_before_it():
    expected = {PROBLEMS[0].uid: 5.0, PROBLEMS[1].uid: 50.0, PROBLEMS[3].uid: 9.0,
                PROBLEMS[4].uid: 50.0}
    chunks = generation(requests_for(PROBLEMS, 2, LIMIT, expected), slots=10)
    order = [row.prompt for row in chunks.unfinished()]
    assert order == [2, 2, 1, 1, 4, 4, 3, 3, 0, 0]


def test_nothing_to_do_is_over_at_once():
    assert list(generation([])) == []


def test_with_the_slots_fixed_a_response_is_the_same_bit_for_bit():
    """4 slots are never halved. In bfloat16, where the least difference in rounding parts two
    responses."""
    config = dataclasses.replace(DECODER, dtype=jax.numpy.bfloat16)
    requests = requests_for(PROBLEMS, GROUP, LIMIT)

    def drawn(requests, chunk):
        sample = engine.make_sampler(config, mesh(), slots=4, chunk=chunk)
        return named([response for finished in sample(weights(config), requests, jax.random.key(0),
                                                      ANY) for response in finished], PROBLEMS)

    whole = drawn(requests, 4)
    for found in (drawn(requests[::-1], 4), drawn(requests, 7), drawn(requests[6:14], 4),
                  drawn(requests[:4], 16)):
        for name, response in found.items():
            np.testing.assert_array_equal(response.tokens, whole[name].tokens)
            np.testing.assert_array_equal(response.logprobs, whole[name].logprobs)


def test_reading_long_prompts_takes_memory_in_proportion_to_them():
    config = DECODER
    programs = make_programs(config, mesh())
    params = programs.unstack(weights(config))

    def temporary(width):
        prompts, lengths = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((1, width), (1,)))
        compiled = programs.prefill.lower(params, prompts, lengths).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(16384) < 3 * temporary(8192)


def test_a_number_that_is_none_ends_the_generation_and_names_the_response():
    params = weights(DECODER)
    broken = params | {"embedding": params["embedding"].copy()}
    broken["embedding"][5] = np.nan
    target, sample = sampler()
    problems = [dataclasses.replace(PROBLEMS[0], prompt=np.array([2, 5, 7], np.int32))]
    with pytest.raises(FloatingPointError,
                       match="uid 31, sample 0: after 0 tokens of the response the model gives no"):
        for _ in sample(place(DECODER, broken, target), requests_for(problems, 2, 9),
                        jax.random.key(0), ANY):
            pass


@pytest.mark.parametrize(("changes", "message"), [
    (dict(max_new_tokens=0), "max_new_tokens must be above the 0 drawn already, got 0"),
    (dict(tokens=np.zeros(0, np.int32)), "the prompt must have at least 1 token, got 0"),
    (dict(max_new_tokens=64), r"at most 64 positions, got 9 \+ 64"),
])
def test_what_cannot_be_served_is_refused_before_anything_is_drawn(changes, message):
    request = dataclasses.replace(requests_for(PROBLEMS[2:3], 1, LIMIT)[0], **changes)
    with pytest.raises(ValueError, match=message):
        generation([request], max_positions=64)


def test_an_odd_number_of_slots_is_halved_too():
    requests = [dataclasses.replace(request, max_new_tokens=60 if request.sample == 0 else 4)
                for request in requests_for(PROBLEMS[:1], 25, 1)]
    chunks = generation(requests, slots=25, sampling=ENDLESS)
    assert sum(len(finished) for finished in chunks) == 25
    assert chunks.slot_steps < 25 * 10 + 13 * 60 and chunks.slots == 13


def test_the_longest_are_dealt_out_over_the_devices():
    target, sample = sampler((("data", 8),), slots=16)
    requests = requests_for([problem(uid, 4) for uid in range(16)], 1, LIMIT,
                                      {uid: 100.0 - uid for uid in range(16)})
    chunks = sample(place(DECODER, weights(DECODER), target), requests, jax.random.key(0), ANY)
    by_device = np.array([response.prompt for response in chunks.unfinished()]).reshape(8, 2)
    np.testing.assert_array_equal(by_device, [[device, device + 8] for device in range(8)])


def test_the_last_to_start_may_start_when_the_slots_are_halved():
    """On several devices their slots move in the same launch."""
    requests = [dataclasses.replace(request, max_new_tokens=4 if request.prompt < 128 else 12)
                for request in requests_for([problem(uid, 4) for uid in range(136)], 1, LIMIT)]
    responses = [response for chunk in generation(requests, shape=(("data", 8),), slots=128,
                                                  sampling=ENDLESS) for response in chunk]
    assert sorted(len(response.tokens) for response in responses) == [4] * 128 + [12] * 8


def test_replay_one_response_by_its_name(baseline):
    """A step is named by its key, a response by uid and sample: alone in the engine it is the
    same."""
    for problem_ in PROBLEMS[1:3]:
        request = Request(prompt=0, tokens=problem_.prompt, uid=problem_.uid, sample=2,
                          max_new_tokens=LIMIT)
        (response,) = [response for chunk in generation([request]) for response in chunk]
        assert_same({(problem_.uid, 2): response}, baseline)


# interrupted generations


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [{}, MESHES["all"]], ids=["one device", "eight devices"])
def test_an_interrupted_generation_goes_on_with_the_tokens_it_would_have_drawn(chunks, shape):
    shape = tuple(shape.items())
    requests = requests_for(PROBLEMS, GROUP, LIMIT)
    expected = sampled(shape=shape)
    first = generation(requests, shape=shape)
    before = [response for _ in range(chunks) for response in next(first)]
    begun = first.unfinished()
    assert len(begun) == 8 and all(response.finish is None for response in begun)
    left = remaining(requests, [*before, *begun])
    assert len(left) == len(requests) - len(before)
    second = generation(left, shape=shape)
    after = [response for finished in second for response in finished]
    assert_same(named([*before, *after], PROBLEMS), expected)
    # Stopped again at once, in fewer slots: what has not started again is kept as well.
    kept = generation(left, shape=shape, slots=2).unfinished()
    assert (sum(len(response.tokens) for response in kept)
            == sum(len(response.tokens) for response in begun))
    drawn_before = sum(len(response.tokens) for response in [*before, *begun])
    assert second.tokens == sum(len(response.tokens)
                                for response in expected.values()) - drawn_before


# repetition


@pytest.mark.slow
def test_repetition_stops_at_a_length_that_depends_on_the_tokens_alone():
    whole = sampled(**periodic())
    cut = sampled(**periodic(), repetition=STOPPING)
    repeated = [name for name, response in cut.items() if response.finish == "repetition"]
    assert repeated                                               # else this test would say nothing
    for name, response in cut.items():
        length = len(response.tokens)
        np.testing.assert_array_equal(response.tokens, whole[name].tokens[:length])
        assert response.repeated == (response.finish
                                     == "repetition") and len(response.logprobs) == length
        assert length % 4 == 0 if response.repeated else length == 80
    for arrangement in (dict(chunk=7), dict(slots=2), dict(slots=64, chunk=32)):
        assert_same(sampled(**periodic(), repetition=STOPPING, **arrangement), cut)


def test_audited_responses_continue_and_are_marked():
    cut = sampled(**periodic(), repetition=STOPPING)
    audited = sampled(**periodic(), repetition=dataclasses.replace(STOPPING, audit_share=1.0))
    assert all(response.finish == "length" and len(response.tokens) == 80
               for response in audited.values())
    assert {name for name, response in audited.items() if response.repeated} == {
        name for name, response in cut.items() if response.repeated}


# collect


def response(prompt, sample, length, finish="eos", repeated=False):
    tokens = np.arange(1, length + 1, dtype=np.int32) + 10 * prompt + 5 * sample
    logprobs = -tokens.astype(np.float32)
    return Response(prompt=prompt, sample=sample, tokens=tokens, logprobs=logprobs,
                    sampling_logprobs=logprobs, model_logprobs=logprobs, finish=finish,
                    repeated=repeated)


def test_collect_puts_each_response_in_its_place():
    responses = [response(1, 0, 3), response(0, 1, 1), response(1, 1, 2, "length"),
                 response(0, 0, 2, "repetition", repeated=True)]
    found = engine.collect([problem(1, 2), problem(2, 4)], responses, 2)
    np.testing.assert_array_equal(found.prompt_lengths, [2, 4])
    np.testing.assert_array_equal(found.prompts[0], [*problem(1, 2).prompt, 0, 0])
    np.testing.assert_array_equal(found.lengths, [[2, 1], [3, 2]])
    np.testing.assert_array_equal(found.ended, [[False, True], [True, False]])
    np.testing.assert_array_equal(found.finish, [["repetition", "eos"], ["eos", "length"]])
    np.testing.assert_array_equal(found.repeated, [[True, False], [False, False]])
    np.testing.assert_array_equal(found.tokens, [[[1, 2, 0], [6, 0, 0]],
                                                 [[11, 12, 13], [16, 17, 0]]])
    np.testing.assert_array_equal(found.logprobs, -found.tokens)


@pytest.mark.parametrize("broken", [lambda all: all[:-1], lambda all: [*all, all[0]],
                                    lambda all: [all[0], *all[:-1]]],
                         ids=["missing", "one too many", "twice instead of another"])
def test_collect_complains_about_an_incomplete_step(broken):
    responses = [response(prompt, sample, 2) for prompt in range(2) for sample in range(2)]
    with pytest.raises(ValueError, match="2 x 2 responses"):
        engine.collect([problem(1, 2), problem(2, 4)], broken(responses), 2)


def test_a_cache_layout_that_does_not_fit_is_one_line_before_anything_is_compiled():
    with pytest.raises(UserError, match="rollout.cache_layout cudnn does not fit: "
                       "platform is cpu, the cudnn kernel"):
        engine.make_sampler(DECODER, mesh(), slots=8, chunk=4, cache_layout="cudnn")


@pytest.mark.parametrize("layout", ["sequence_first", "sequence_last"])
def test_the_layout_of_the_cache_changes_no_token(baseline, layout):
    assert_same(sampled(cache_layout=layout), baseline)


def generated(requests, **settings):
    """All responses by name, and what the generation looked like at each of its chunks."""
    chunks, responses, seen = generation(requests, sampling=ENDLESS, **settings), [], []
    while True:
        seen.append((chunks.capacity, chunks.slots, chunks.running))
        try:
            responses += next(chunks)
        except StopIteration:
            return named(responses, PROBLEMS), seen, chunks


@pytest.mark.parametrize(("shape", "capacities"), [({}, 1), ({}, 2), (MESHES["all"], 1)], ids=str)
def test_a_response_does_not_depend_on_how_much_memory_there_is(shape, capacities):
    """However many slots there are, responses that outgrow theirs are continued, not changed."""
    settings = dict(slots=16, max_positions=20 + 150, shape=tuple(shape.items()))
    expected, _, whole = generated(long_and_short(), **settings | dict(shape=()))
    budget = 8 * capacities * whole.capacity // 4
    responses, seen, chunks = generated(long_and_short(), budget=budget, **settings)

    assert_same(responses, expected)
    assert [len(response.tokens) for response in responses.values()] == [
        len(expected[name].tokens) for name in responses]
    shards = chunks._programs.shards
    assert all(capacity * slots <= max(budget, capacity * shards) for capacity, slots, _ in seen)
    assert [capacity for capacity, *_ in seen] == sorted(capacity for capacity, *_ in seen)
    if not shape:
        # As many slots as the small cache has room for, then as the large one has.
        assert seen[0][:2] == (64, min(budget // 64, 16))
        assert seen[-1][0] == whole.capacity


def test_a_response_does_not_depend_on_how_often_the_chunk_looks_if_rows_have_ended(
        baseline, monkeypatch):
    """As on an accelerator: up to three steps more than on a CPU, which draw nothing."""
    monkeypatch.setattr(slots, "steps_between_checks", lambda platform, chunk: 4)
    sample = engine.make_sampler(DECODER, mesh(), slots=8, chunk=8)
    chunks = sample(weights(DECODER), requests_for(PROBLEMS, GROUP, LIMIT), jax.random.key(0), ANY)
    assert_same(named([response for chunk in chunks for response in chunk], PROBLEMS), baseline)
    assert chunks.steps % 4 == 0


def test_long_responses_wait_for_short_ones():
    """Two slots of full length, ten of the smallest: in steps it is far from two at a time."""
    settings = dict(slots=16, max_positions=20 + 150)
    _, seen, few = generated(long_and_short(), budget=2 * 192, **settings)
    _, _, two = generated(long_and_short(), slots=2, max_positions=20 + 150)
    assert seen[0][1:] == (6, 6) and {slots for _, slots, _ in seen} == {6, 4, 3, 2}
    assert few.steps < 0.75 * two.steps


def test_a_response_given_up_twice_keeps_what_it_had():
    """Its log-probs are those of the first draw, its tokens the same, `unfinished` has it."""
    settings = dict(slots=16, max_positions=20 + 150, budget=2 * 192)
    chunks = generation(long_and_short(), sampling=ENDLESS, **settings)
    lengths = {}
    for finished in chunks:
        for response in chunks.unfinished():
            name = response.prompt, response.sample
            assert len(response.tokens) == len(response.logprobs) >= lengths.get(name, 0)
            lengths[name] = len(response.tokens)
        assert all(np.isfinite(response.logprobs).all() for response in finished)
    assert max(lengths.values()) > 96
