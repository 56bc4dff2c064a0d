"""Evaluation: numbers worked out by hand, and what counts as correct."""

import dataclasses
import json

import numpy as np
import pytest

from effreason import evaluation
from effreason.grades import Grade
from effreason.records import Evaluation, LevelResult, Problem, Response, Rollouts
from effreason.runtime.config import Config, DataConfig
from effreason.tiny import tokenizer


def problem(uid, level="easy", answer="7"):
    return Problem(uid=uid, prompt=np.array([5, uid], np.int32), text=f"problem {uid}", answer=answer, level=level)


def rollouts(tokens, ended):
    """Groups of responses given as lists of ids."""
    shape = (len(tokens), len(tokens[0]))
    longest = max(len(row) for group in tokens for row in group)
    padded = np.zeros((*shape, longest), np.int32)
    for prompt, group in enumerate(tokens):
        for sample, row in enumerate(group):
            padded[prompt, sample, : len(row)] = row
    lengths = np.array([[len(row) for row in group] for group in tokens], np.int32)
    return Rollouts(prompts=np.zeros((shape[0], 1), np.int32), prompt_lengths=np.ones(shape[0], np.int32),
                    tokens=padded, lengths=lengths, logprobs=np.zeros(padded.shape, np.float32), ended=np.array(ended))


class Right:
    """A grader that finds right what says so, and remembers what it was asked."""

    def grade(self, responses, golds):
        self.asked = list(zip(responses, golds, strict=True))
        return [Grade("right" in response, response, "exact", 0.0) for response in responses]


def test_measure_by_hand():
    correct = np.array([[True, True], [True, False], [False, False]])
    sampled = rollouts([[[1] * 2, [1] * 4], [[1] * 10, [1] * 30], [[1] * 6, [1] * 8]],
                       [[True, True], [True, False], [True, True]])
    problems = [problem(0, "hard"), problem(1, "easy"), problem(2, "hard")]
    result = evaluation.measure(correct, sampled, problems)
    assert result == Evaluation(
        accuracy=0.5, tokens=10.0, truncated=pytest.approx(1 / 6), problems=3, samples=2,
        by_level={"hard": LevelResult(accuracy=0.5, tokens=5.0, problems=2),
                  "easy": LevelResult(accuracy=0.5, tokens=20.0, problems=1)})
    assert list(result.by_level) == ["hard", "easy"]


@pytest.mark.parametrize(("require_eos", "correct"), [(True, [[True, False], [False, False]]),
                                                      (False, [[True, True], [False, False]])])
def test_a_response_that_was_cut_off_counts_as_wrong_where_eos_is_required(require_eos, correct):
    sampled = rollouts([[[1], [1]], [[1], [1]]], [[True, False], [True, False]])
    grader, problems = Right(), [problem(0, answer="3"), problem(1, answer="4")]
    found, verdicts = evaluation.grade(sampled, ["right", "right, cut", "no", "no, cut"], problems, grader,
                                       require_eos=require_eos)
    np.testing.assert_array_equal(found, correct)
    assert found.dtype == bool
    assert grader.asked == [("right", "3"), ("right, cut", "3"), ("no", "4"), ("no, cut", "4")]
    assert [verdict.correct for verdict in verdicts] == [True, True, False, False]      # the text's own verdict


def test_texts_end_where_the_response_ends_and_keep_the_think_tags():
    tokens = tokenizer.build()
    long = tokens("3+4</think>\\boxed{7}", add_special_tokens=False)["input_ids"] + [tokens.eos_token_id]
    short = tokens("9", add_special_tokens=False)["input_ids"]
    sampled = rollouts([[long, short]], [[True, False]])
    sampled.tokens[0, 1, len(short):] = short[0]        # padding may hold any id
    assert evaluation.texts(sampled, tokens) == ["3+4</think>\\boxed{7}", "9"]


def test_a_table_of_an_evaluation_reads_back():
    result = evaluation.measure(np.array([[True], [False]]), rollouts([[[1]], [[1, 2]]], [[True], [False]]),
                                [problem(0, "easy"), problem(1, "hard")])
    assert evaluation.from_table(json.loads(json.dumps(dataclasses.asdict(result)))) == result


def test_gather_watches_every_chunk_and_keeps_what_was_asked_for():
    def response(prompt, sample, count):
        return Response(prompt=prompt, sample=sample, tokens=np.full(count, 9, np.int32),
                        logprobs=np.zeros(count, np.float32), ended=True)

    def sampler(params, problems, group_size, key):
        yield [response(1, 0, 3)]
        yield []
        yield [response(0, 1, 1), response(1, 1, 2), response(0, 0, 5)]

    seen = []
    sampled = evaluation.gather(sampler, None, [problem(0), problem(1)], 2, None, lambda *now: seen.append(now))
    assert seen == [(0, 4, 0), (1, 4, 3), (1, 4, 3), (4, 4, 11)]
    np.testing.assert_array_equal(sampled.lengths, [[5, 1], [3, 2]])


def test_gather_stops_when_the_watch_raises():
    def sampler(params, problems, group_size, key):
        yield []
        raise AssertionError("went on")

    def watch(finished, total, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation.gather(sampler, None, [problem(0)], 2, None, watch)


def test_held_out_problems_are_the_first_of_their_own_file(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{n}+1", "answer": n + 1}) + "\n" for n in range(9)))
    config = dataclasses.replace(
        Config(), data=DataConfig(path="elsewhere", user_prompt="{problem}"),
        evaluation=dataclasses.replace(Config().evaluation, path=str(path), problems=3))
    found = evaluation.held_out(config, tokenizer.build())
    assert [(one.text, one.answer, one.level) for one in found] == [("0+1", "1", "all"), ("1+1", "2", "all"),
                                                                   ("2+1", "3", "all")]
