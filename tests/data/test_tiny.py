"""The embedded world: tasks, traces, tokenizer, training rows, and the reasoner that ships."""

import dataclasses
import hashlib
import itertools
import json
import re
import zlib

import jax
import numpy as np
import pytest

from effreason.data import loading, sources, templates
from effreason.data.tiny import build, tasks, tokenizer, traces
from effreason.evaluation import evaluate as evaluation
from effreason.evaluation import statistics
from effreason.lm.hf.pretrained import SHIPPED_REASONER, load_tokenizer, open_pretrained
from effreason.lm.hf.weights import read_weights
from effreason.runtime import config as configuration
from effreason.runtime import sharding
from effreason.runtime.config import DataConfig
from effreason.sampling import capacity

TEMPLATE = templates.choose(tokenizer.build(), DataConfig(user_prompt="{problem}"))


@pytest.fixture(scope="module")
def characters():
    return tokenizer.build()


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(3)
    return [tasks.draw(rng, level, held_out=held_out)
            for level in tasks.LEVELS for held_out in (False, True) for _ in range(100)]


def test_a_task_is_a_python_expression_and_its_value_the_answer(drawn):
    for task in drawn:
        low, high = tasks.LEVELS[task.level]
        assert low <= len(task.operations) <= high
        # the next one to do is always plain
        assert len(set(task.operations)) == len(task.operations)
        assert str(eval(task.text)) == task.answer  # noqa: S307, our own text


def test_the_split_is_a_property_of_the_text(drawn):
    held_out = [zlib.crc32(task.text.encode()) % tasks.HELD_OUT_SHARE == 0 for task in drawn]
    assert held_out == [held_out for _ in tasks.LEVELS for held_out in (False, True)
                        for _ in range(100)]


def test_every_written_step_is_right_once_slips_are_switched_off(drawn, monkeypatch):
    monkeypatch.setattr(traces, "STEP_ERROR", 0.0)
    rng = np.random.default_rng(0)
    for task in drawn:
        trace = traces.overthinking(rng, task)
        assert trace.endswith(traces.answer_text(task.answer))
        for before, sign, digit, after in re.findall(r"(\d)([-+*])(\d)=(\d)", trace):
            assert tasks.apply(int(before), sign, int(digit)) == int(after)


def test_restating_repairs_every_slip(drawn, monkeypatch):
    monkeypatch.setattr(traces, "STEP_ERROR", 1.0)
    monkeypatch.setattr(traces, "RESTATED", 1.0)
    rng = np.random.default_rng(0)
    assert all(traces.overthinking(rng, task).endswith(traces.answer_text(task.answer))
               for task in drawn)


def test_the_fewest_tokens_are_one_line_a_step(drawn):
    for task in drawn:
        thought, _ = traces.concise(task).split("</think>")
        assert thought.count(";") == len(
            task.operations) and "wait" not in thought and "?" not in thought


def test_the_tokenizer_takes_every_trace_apart_into_characters_and_back(characters, drawn):
    rng = np.random.default_rng(0)
    for task in drawn[::10]:
        text = task.text + "<think>\n" + traces.overthinking(rng, task)
        ids = characters(text, add_special_tokens=False)["input_ids"]
        assert characters.decode(ids) == text and characters.unk_token_id not in ids
        assert len(ids) == len(text) - len("<think>") + 1 - len("</think>") + 1


def test_transformers_own_choice_of_class_reads_the_shipped_tokenizer_alike(characters):
    import transformers

    chosen = transformers.AutoTokenizer.from_pretrained(str(SHIPPED_REASONER))
    text = templates.render(characters, TEMPLATE,
                            "((47+9)*7)%10") + "7+9=6;wait;6*7=2;</think>\\boxed{2}"
    expected = characters(text, add_special_tokens=False)["input_ids"]
    for other in (chosen, load_tokenizer(SHIPPED_REASONER)):
        assert other(text, add_special_tokens=False)["input_ids"] == expected
        assert other.decode(expected) == text and other.chat_template == characters.chat_template


def test_training_rows_learn_the_response_and_a_drill_its_digit_alone(characters):
    def encode(problem, trace):
        prompt = templates.render(characters, TEMPLATE, problem)
        ids = characters([prompt, trace], add_special_tokens=False)["input_ids"]
        return ids[0], [*ids[1], characters.eos_token_id]

    batch = next(build.batches(np.random.default_rng(0), encode))
    assert [tokens.shape[1] for tokens, _ in batch] == list(build.BUCKETS)
    drills = 0
    for tokens, mask in batch:
        for row, learnt in zip(tokens, mask, strict=True):
            text, target = characters.decode(row[: learnt.nonzero()[0][-1]
                                                 + 1]), characters.decode(row[learnt])
            prompt, response = text.split("<think>\n")
            if target.endswith(tokenizer.EOS):
                assert response == target
            else:
                drills += 1
                assert re.fullmatch(r"</think>\\boxed\{\d", response) and response[-1] == target
    assert abs(drills - build.DRILLS) <= 10


@pytest.mark.slow
def test_the_shipped_reasoner_is_small_right_and_wordy():
    size = sum(path.stat().st_size for path in SHIPPED_REASONER.iterdir())
    assert size <= 5_000_000
    config = configuration.load(configuration.shipped() / "tiny.yaml")
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation,
                                                                        problems=120))
    mesh = sharding.make_mesh(data=-1)
    tiny = open_pretrained("tiny", dtype="float32")
    params = read_weights(tiny.directory, tiny.decoder)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) <= 1_500_000
    template = templates.choose(tiny.tokenizer, config.data)
    sets, _ = loading.load_held_out(config, tiny.tokenizer, template)
    with evaluation.make_grader(config) as grader:
        sampler = capacity.make_configured_sampler(config, tiny.decoder, mesh,
                                                   capacity.EVALUATION_WEIGHT_BYTES)
        evaluator = evaluation.Evaluator(config=config, pretrained=tiny, template=template,
                                         sets=sets, sampler=sampler, grader=grader,
                                         seed=config.run.seed)
        outcomes = evaluator.measure_all(lambda: params, lambda progress: None, weights="the base")
        found = statistics.summarize(outcomes["tiny"])
    assert found.accuracy > 0.85                                # 94.7 % on 4,800 responses
    assert found.by_level["easy"].tokens > 3 * 20               # 20 tokens write every step once


def taken(name, count):
    return list(itertools.islice(tasks.novel(name), count))


@pytest.mark.parametrize("name", tasks.NOVEL)
def test_novel_tasks_are_expressions_of_every_level_in_turn_and_always_the_same(name):
    found, levels = taken(name, 400), list(tasks.NOVEL[name])
    assert all(str(eval(task.text)) == task.answer for task in found)  # noqa: S307, our own text
    assert [task.level for task in found] == [levels[place % len(levels)] for place in range(400)]
    assert len({task.text for task in found}) == 400 and taken(name, 400) == found
    assert {task.answer for task in found} == set("0123456789")


def test_no_novel_task_could_be_drawn_for_training():
    lengths = range(min(low for low, _ in tasks.LEVELS.values()),
                    max(high for _, high in tasks.LEVELS.values()) + 1)
    for task in [*taken("tiny_long", 600), *taken("tiny_other", 600)]:
        as_trained = tasks.Task(task.start, task.operations, task.level).text
        assert (len(task.operations) not in lengths or not set(task.operations)
                <= set(tasks.OPERATIONS) or task.start >= 100 or task.text != as_trained)


def test_what_is_new_in_each_kind():
    kinds = {level: [task for task in taken("tiny_other", 400) if task.level == level]
             for level in tasks.NOVEL["tiny_other"]}
    assert all(task.text.count("(") == len(task.operations) for task in kinds["brackets"])
    assert all(100 <= task.start < 1000 for task in kinds["three digits"])
    assert all(re.fullmatch(r"\(\d\d[-+*]\d\d\)%10", task.text) for task in kinds["two numbers"])
    assert all(sum(sign == "*" and digit % 2 == 0 for sign, digit in task.operations) == 1
               for task in kinds["even factor"])
    assert {len(task.operations) for task in taken("tiny_long", 30)} == {8, 9, 10}


@pytest.mark.parametrize(("held_out", "sha256"), [(False, "52534f18c68538df"),
                                                  (True, "d1d70f58c049373d")])
def test_the_problems_of_the_tiny_world_stay_what_they_were(held_out, sha256):
    rows, _ = sources.read("tiny", DataConfig(), held_out=held_out)
    facts = json.dumps([(row.number, row.text, row.reference, row.level) for row in rows])
    assert hashlib.sha256(facts.encode()).hexdigest()[:16] == sha256
