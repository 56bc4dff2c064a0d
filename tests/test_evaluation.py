"""Evaluation: numbers worked out by hand, and what counts as correct."""

import dataclasses
import json
import types

import numpy as np
import pytest

from effreason import evaluation
from effreason.errors import UserError
from effreason.problems.templates import Template
from effreason.records import Evaluation, LevelResult, Problem, Rollouts
from effreason.runtime.config import Config


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
                    tokens=padded, lengths=lengths, logprobs=np.zeros(padded.shape, np.float32),
                    finish=np.where(ended, "eos", "length"), looped=np.zeros(shape, bool))


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


def test_a_table_of_an_evaluation_reads_back():
    result = evaluation.measure(np.array([[True], [False]]), rollouts([[[1]], [[1, 2]]], [[True], [False]]),
                                [problem(0, "easy"), problem(1, "hard")])
    assert evaluation.from_table(json.loads(json.dumps(dataclasses.asdict(result)))) == result


@pytest.mark.parametrize(("path", "models", "found"), [
    ("org/base", ["org/base", "run/model/of/mine"], "org/base"), ("tiny", ["org/other", "tiny"], "tiny"),
    ("org/base", ["org/other"], "org/other"), ("org/base", ["org/other", "a/b/c"], None)])
def test_a_revision_belongs_to_one_model(path, models, found):
    config = dataclasses.replace(Config(), model=dataclasses.replace(Config().model, path=path, revision="abc"))
    if found is None:
        with pytest.raises(UserError, match=r"^model\.revision is for one model on the Hub, got abc and 2 of them"):
            evaluation.revised(config, models)
    else:
        assert evaluation.revised(config, models) == found


def test_models_are_not_compared_on_different_prompts():
    def opened(name, text):
        return evaluation.Opened(types.SimpleNamespace(name=name), Template("the checkpoint's own", text, "{problem}"))

    alike = [opened("base", "a"), opened("trained", "a")]
    evaluation.check_alike(alike, Config())
    with pytest.raises(UserError, match="^base and other have different chat templates"):
        evaluation.check_alike([*alike, opened("other", "b")], Config())
    anyway = dataclasses.replace(Config(), evaluation=dataclasses.replace(Config().evaluation, any_template=True))
    evaluation.check_alike([*alike, opened("other", "b")], anyway)
