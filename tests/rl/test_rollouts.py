"""Sampling and grading together: every response is graded once, under its own problem, while others
are generated."""

import concurrent.futures
import dataclasses
import sys

import numpy as np
import pytest

from effreason import loop
from effreason.data import prompts
from effreason.data.tiny import tokenizer
from effreason.grading.grader import Grade, Grader
from effreason.grading.kinds import Reference
from effreason.rl import rollouts
from effreason.runtime.config import RolloutConfig
from effreason.runtime.errors import Interrupted
from effreason.sampling.scheduler import make_requests
from effreason.types import Problem, Response

TOKENS = tokenizer.build()


def problem(uid, reference="7", **changes):
    return Problem(uid=uid, prompt=np.array([5, uid], np.int32), text=f"problem {uid}",
                   reference=reference, level="all", **changes)


def response(prompt, sample, text, finish="eos"):
    ids = TOKENS(text, add_special_tokens=False)["input_ids"] + [TOKENS.eos_token_id] * (finish
                                                                                         == "eos")
    zeros = np.zeros(len(ids), np.float32)
    return Response(prompt=prompt, sample=sample, tokens=np.array(ids, np.int32), logprobs=zeros,
                    sampling_logprobs=zeros, model_logprobs=zeros, finish=finish)


class Played:
    """A generation that yields these chunks of responses."""

    def __init__(self, requests, chunks, begun=()):
        self.requests, self.waiting, self.running, self.tokens = requests, len(requests), 0, 0
        self.slot_steps, self.host_seconds, self.compilations = 1, 0.0, 0
        self.chunks, self.begun = iter(chunks), list(begun)

    def __iter__(self):
        return self

    def __next__(self):
        finished = next(self.chunks)
        self.waiting -= len(finished)
        self.tokens += sum(len(response.tokens) for response in finished)
        return finished

    def unfinished(self):
        return self.begun


def playing(*chunks, begun=()):
    return lambda requests: Played(requests, chunks, begun)


class Right:
    """A grader that finds right what holds a 7, and remembers what it was asked, call by call."""

    def __init__(self, status="exact", function=None):
        self.calls, self.status, self.function = [], status, function

    def budget(self):
        return object()

    def submit(self, responses, golds, budget):
        self.calls.append(list(zip(responses, golds, strict=True)))
        made = concurrent.futures.Future()
        made.set_result([Grade("7" in response, response, self.status, 0.0)
                         for response in responses])
        return made


class Log:
    """Remembers what it is given to keep."""

    def __init__(self, resumed=()):
        self.resumed, self.added, self.kept = resumed, [], []

    def add(self, responses):
        self.added.append(list(responses))

    def add_unfinished(self, responses):
        self.kept += responses


def attempted(generate, problems, group_size, grader, require_eos=True,
              on_chunk=lambda progress: None, **settings):
    return rollouts.sample_and_grade(generate, problems, group_size, 40, tokenizer=TOKENS,
                                     grader=grader, require_eos=require_eos, on_chunk=on_chunk,
                                     **settings)


CHUNKS = ([response(1, 0, "1+1"), response(0, 1, "7+7")], [], [response(1, 1, "7", "length")],
          [response(0, 0, "9")])


@pytest.mark.parametrize(("require_eos", "correct"), [(True, [[False, True], [False, False]]),
                                                      (False, [[False, True], [False, True]])])
def test_verdicts_stand_beside_their_responses_whatever_the_order(require_eos, correct):
    grader = Right()
    tried = attempted(playing(*CHUNKS), [problem(0, "3"), problem(1, "4")], 2, grader, require_eos)
    assert tried.texts == ["9", "7+7", "1+1", "7"]
    assert [verdict.answer for verdict in tried.verdicts] == tried.texts
    np.testing.assert_array_equal(tried.correct, correct)
    np.testing.assert_array_equal(tried.rollouts.lengths, [[2, 4], [4, 1]])
    assert tried.correct.dtype == bool and tried.grading_seconds >= 0
    # Each chunk that finished something is a call of its own, made before the next chunk is
    # generated.
    assert grader.calls == [[("1+1", Reference("4")), ("7+7", Reference("3"))],
                            [("7", Reference("4"))], [("9", Reference("3"))]]


def test_responses_are_submitted_before_the_generation_is_over():
    grader, seen = Right(), []

    def chunks():
        for chunk in CHUNKS:
            yield chunk
            seen.append(len(grader.calls))

    attempted(lambda requests: Played(requests, chunks()), [problem(0), problem(1)], 2, grader)
    assert seen == [1, 1, 2, 3]


def test_a_prompt_that_opens_the_thinking_and_what_the_grader_needs_to_know():
    asked = problem(0, "B", kind="choice", choices=("bank", "mall"), opens_thinking=True)
    grader = Right()
    tried = attempted(playing([response(0, 0, "7</think>7")]), [asked], 1, grader)
    assert grader.calls == [[("<think>7</think>7", Reference("B", "choice", ("bank", "mall")))]]
    assert tried.texts == ["7</think>7"]


def test_a_real_grader_and_an_unclosed_thought():
    sampler = playing([response(0, 0, "7</think>\\boxed{7}"), response(0, 1, "\\boxed{7}")])
    with Grader(workers=1) as grader:
        opened = attempted(sampler, [problem(0, opens_thinking=True)], 2, grader)
        plain = attempted(sampler, [problem(0)], 2, grader)
    np.testing.assert_array_equal(opened.correct, [[True, False]])
    np.testing.assert_array_equal(plain.correct, [[True, True]])


def test_texts_keep_the_think_tags_and_lose_eos():
    tried = attempted(playing([response(0, 0, "3+4</think>\\boxed{7}"),
                               response(0, 1, "9", "length")]), [problem(0)], 2, Right())
    assert tried.texts == ["3+4</think>\\boxed{7}", "9"]


def marked(*marks):
    """A tokenizer like the others, with these marks as special tokens."""
    made = tokenizer.build()
    made.add_special_tokens({"additional_special_tokens": list(marks)})
    return made


@pytest.mark.parametrize(("text", "answer"), [
    ("3+4</think>\\boxed{7}", "7"), ("<think>3</think>\\boxed{7}", "7"), ("\\boxed{7}", None)])
def test_a_think_mark_may_be_a_special_token(monkeypatch, text, answer):
    monkeypatch.setattr(sys.modules[__name__], "TOKENS", marked("<think>", "</think>"))
    assert TOKENS.decode(TOKENS.encode("</think>"), skip_special_tokens=True) == ""
    with Grader(workers=1) as grader:
        tried = attempted(playing([response(0, 0, text)]), [problem(0, opens_thinking=True)], 1,
                          grader)
    assert tried.texts == [text] and tried.verdicts[0].answer == answer
    assert bool(tried.correct[0, 0]) == (answer is not None)


def test_every_chunk_is_watched():
    seen = []
    requests = make_requests([problem(0).prompt, problem(1).prompt], 2, 40)
    generation = Played(requests, CHUNKS)
    responses = [response for chunk in rollouts.watched(generation, 4, seen.append)
                 for response in chunk]
    assert [(progress.finished, progress.total, progress.waiting, progress.tokens)
            for progress in seen] == [(0, 4, 4, 0), (2, 4, 2, 8), (2, 4, 2, 8), (3, 4, 1, 9),
                                      (4, 4, 0, 11)]
    assert [(response.prompt, response.sample) for response in responses] == [(1, 0), (0, 1),
                                                                              (1, 1), (0, 0)]


def test_a_generation_stops_when_on_chunk_raises():
    def chunks():
        yield []
        raise AssertionError("went on")

    def stop(progress):
        if progress.tokens == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(rollouts.watched(Played(make_requests([problem(0).prompt], 2, 40), chunks()), 2, stop))


def test_every_response_is_logged_once_and_before_anybody_may_stop():
    log, seen = Log(), []

    def on_chunk(progress):
        seen.append((progress.finished, sum(map(len, log.added))))

    attempted(playing(*CHUNKS), [problem(0), problem(1)], 2, Right(), on_chunk=on_chunk, log=log)
    assert [[(response.prompt, response.sample) for response in chunk] for chunk in log.added] == [
        [(1, 0), (0, 1)], [(1, 1)], [(0, 0)]]
    assert all(finished == added for finished, added in seen) and seen[-1] == (4, 4)
    # What was drawn before is not logged again.
    log = Log(resumed=CHUNKS[0])
    attempted(playing(*CHUNKS[1:]), [problem(0), problem(1)], 2, Right(), log=log)
    assert sum(map(len, log.added)) == 2


def test_a_signal_keeps_what_is_finished_and_what_is_begun_and_the_rest_is_drawn_later():
    problems, log = [problem(0, "3"), problem(1, "4")], Log()
    begun = [dataclasses.replace(response(0, 0, "7", "length"), finish=None),
             dataclasses.replace(response(1, 1, "", "length"), finish=None)]

    def stop(progress):
        if progress.finished == 2:
            raise Interrupted(15, "stopped")

    with pytest.raises(Interrupted):
        attempted(playing(*CHUNKS, begun=begun), problems, 2, Right(), on_chunk=stop, log=log)
    assert [(response.prompt, response.sample, response.finish) for response in log.kept] == [
        (1, 0, "eos"), (0, 1, "eos"), (0, 0, None), (1, 1, None)]

    grader, asked = Right(), []

    def start(requests):
        asked.extend(requests)
        return Played(requests, CHUNKS[1:])

    tried = attempted(start, problems, 2, grader, log=Log(resumed=log.kept))
    assert [(request.prompt, request.sample) for request in asked] == [(0, 0), (1, 1)]
    # what has drawn nothing simply starts
    assert asked[0].prefix is begun[0] and asked[1].prefix is None
    assert tried.texts == ["9", "7+7", "1+1", "7"]
    assert sum(len(call) for call in grader.calls) == 4

    # Interrupted again, it keeps all of it.
    again = Log(resumed=log.kept)
    with pytest.raises(Interrupted):
        attempted(playing([response(0, 0, "9")], [], begun=begun[1:]), problems, 2, Right(),
                  log=again, on_chunk=lambda progress: stop(
                      dataclasses.replace(progress, finished=progress.finished + 1)))
    assert sorted((response.prompt, response.sample, response.finish)
                  for response in again.kept) == [(0, 0, "eos"), (0, 1, "eos"), (1, 0, "eos"),
                                                  (1, 1, None)]


def refilled(monkeypatch, rounds, signals):
    """Groups of two after these rounds of responses; signals, of each round's groups."""
    left, flags = iter(rounds), iter(signals)

    def sample(problems):
        texts = next(left)
        chunk = [response(prompt, number, text, finish) for prompt, pair in enumerate(texts)
                 for number, (text, finish) in enumerate(pair)]
        return attempted(playing(chunk), problems, 2, Right())

    monkeypatch.setattr(rollouts, "has_signal", lambda *_: np.array(next(flags)))
    source = prompts.Source("all", None, tuple(problem(uid) for uid in range(9)))
    return rollouts.refill(sample([problem(0), problem(1)]), sample, None,
                           prompts.Problems((source,)), alpha=0.1,
                           settings=RolloutConfig(refill_rounds=3), seed_and_step=(0, 0))


WRONG, RIGHT, LONG = ("1", "eos"), ("7", "eos"), ("7777", "length")


def test_what_is_logged_is_of_all_responses_and_the_kept_ones_have_their_own_names(monkeypatch):
    graded = refilled(monkeypatch, [[(WRONG, RIGHT), (WRONG, WRONG)], [(LONG, LONG)],
                                    [(RIGHT, WRONG)]], [[True, False], [False], [True]])
    assert [part.correct.tolist() for part in graded.sampled] == [
        [[False, True], [False, False]], [[False, False]], [[True, False]]]
    np.testing.assert_array_equal(graded.correct, [[False, True], [True, False]])
    metrics = graded.metrics | loop.step_metrics(graded, 1.0, rollout_seconds=1.0,
                                                 update_seconds=1.0, step_seconds=1.0)
    # Of 8 responses 2 are right and 2 cut off, after 4 tokens; the others have 2.
    assert metrics["rollout/accuracy"] == 2 / 8 and metrics["kept/accuracy"] == 2 / 4
    assert metrics["rollout/truncated"] == 2 / 8 and metrics["kept/truncated"] == 0
    assert metrics["rollout/tokens"] == 20 / 8 and metrics["kept/tokens"] == 2
    assert metrics["grade/exact"] == 1 and metrics["rollout/asked"] == 2
    assert metrics["update/tokens_per_second"] == 8


def test_without_refilling_what_is_logged_is_of_the_groups():
    graded = attempted(playing([response(0, 0, *RIGHT), response(0, 1, *LONG)]), [problem(0)], 2,
                       Right())
    metrics = loop.step_metrics(graded, 1.0, rollout_seconds=1.0, update_seconds=1.0,
                                step_seconds=1.0)
    assert (metrics["rollout/accuracy"], metrics["rollout/tokens"]) == (0.5, 3.0)


def test_answers_that_stay_undecided_stop_the_run():
    chunk = [response(0, sample, "7") for sample in range(3)]
    with pytest.raises(rollouts.Undecided,
                       match="could not decide 3 of 3 answers.*raise grade.step_budget"):
        attempted(playing(chunk), [problem(0)], 3, Right("budget"))
    # two say nothing of a share
    assert attempted(playing(chunk[:2]), [problem(0)], 2, Right("budget")).correct.all()


@pytest.mark.parametrize(("status", "raise_"), [
    ("memory", "; raise grade.memory_mb"), ("soft_timeout", "; raise grade.cpu_seconds"),
    ("hard_kill", "; raise grade.wall_seconds"), ("error", ""),
    ("budget", "; raise grade.step_budget_seconds or grade.workers")])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_function_that_always_fails_stops_the_run(status, raise_, count):
    chunk = [response(0, sample, "7") for sample in range(count)]
    line = (f"^grade.function my:own could not decide {count} of {count} answers, at most 2 % are "
            f"accepted; {count} of them: {raise_}$")
    with pytest.raises(rollouts.Undecided, match=line):
        attempted(playing(chunk), [problem(0)], count, Right(status, "my:own"))


def test_the_limits_of_the_built_in_grader_are_the_answers_fault():
    chunk = [response(0, sample, "7") for sample in range(8)]
    attempted(playing(chunk), [problem(0)], 8, Right("soft_timeout"))
    rollouts.check_decided([Grade(False, None, "memory", 0.0)] * 2
                           + [Grade(False, None, "function", 0.0)] * 98, "my:own")


def test_groups_take_the_place_of_others_with_all_that_is_known_of_them():
    def tried(texts, uids):
        finished = [response(place, sample, text) for place, pair in enumerate(texts)
                    for sample, text in enumerate(pair)]
        return attempted(playing(finished), [problem(uid) for uid in uids], 2, Right())

    first = tried([("7", "8"), ("8", "8"), ("9", "7")], (1, 2, 3))
    more = tried([("1", "1"), ("7 and 7", "8 and more")], (4, 5))
    found = rollouts.replace_groups(first, [1], more, [1])
    expected = tried([("7", "8"), ("7 and 7", "8 and more"), ("9", "7")], (1, 5, 3))
    for name in ("texts", "verdicts"):
        assert getattr(found, name) == getattr(expected, name)
    np.testing.assert_array_equal(found.correct, expected.correct)
    for field in dataclasses.fields(found.rollouts):
        np.testing.assert_array_equal(getattr(found.rollouts, field.name),
                                      getattr(expected.rollouts, field.name))
    # what was passed in is as it was
    assert first.texts[2:4] == ["8", "8"] and len(found.generations) == 2
