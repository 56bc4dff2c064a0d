"""Stage 1: what a data set becomes, and which problems a step gets."""

import dataclasses
import json

import numpy as np
import pytest

from effreason import prompts
from effreason.errors import UserError
from effreason.runtime.config import DataConfig
from effreason.tiny import tokenizer

DATA = DataConfig(path="tiny", user_prompt="{problem}")


@pytest.fixture(scope="module")
def characters():
    return tokenizer.build()


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_tiny_problems_are_python_expressions_with_their_value_as_answer(characters):
    for problem in prompts.load(DATA, "tiny", characters, limit=300):
        assert str(eval(problem.text)) == problem.answer        # noqa: S307, our own text
        assert characters.decode(problem.prompt) == characters.apply_chat_template(
            [{"role": "user", "content": problem.text}], tokenize=False, add_generation_prompt=True)


def test_held_out_problems_are_never_trained_on(characters):
    trained = {problem.text for problem in prompts.load(DATA, "tiny", characters)}
    held_out = [problem.text for problem in prompts.load(DATA, "tiny", characters, held_out=True)]
    assert len(held_out) == len(set(held_out)) == prompts.TINY_HELD_OUT
    assert not trained & set(held_out)


def test_the_rendered_prompt_has_one_bos(characters):
    ids = prompts.encode(characters, prompts.render(characters, "(3+5)%10"))
    assert ids.dtype == np.int32 and list(ids).count(characters.bos_token_id) == 1 and ids[0] == characters.bos_token_id


def test_jsonl_fields_are_named_in_the_configuration(tmp_path, characters):
    path = write(tmp_path / "data.jsonl", [
        {"q": "(1+2)%10", "a": 3, "d": "low"}, "\n", {"q": "(1+3)%10", "a": "4", "d": 2}])
    data = dataclasses.replace(DATA, path=path, problem_field="q", answer_field="a", level_field="d")
    first, second = prompts.load(data, path, characters)
    assert (first.text, first.answer, first.level) == ("(1+2)%10", "3", "low")
    assert (second.uid, second.answer, second.level) == (1, "4", "2")
    assert prompts.load(dataclasses.replace(data, level_field=None), path, characters)[0].level == "all"


@pytest.mark.parametrize(("row", "found"), [
    ('{"problem": "1"', "2: not valid JSON"), ("[1]\n", "2: expected a JSON object, found list"),
    ('{"problem": "1"}\n', "2: has no field 'answer', found problem"),
    ('{"problem": "1", "answer": null}\n', "2: field 'answer' must be text or a number, found NoneType")])
def test_a_broken_line_is_named(tmp_path, characters, row, found):
    path = write(tmp_path / "data.jsonl", [{"problem": "1", "answer": "1"}, row])
    with pytest.raises(UserError, match=rf"data\.jsonl:{found}"):
        prompts.load(DATA, path, characters)


def test_long_prompts_are_left_out_not_cut(tmp_path, characters):
    path = write(tmp_path / "data.jsonl", [{"problem": "1" * 50, "answer": "1"}, {"problem": "1", "answer": "1"}])
    data = dataclasses.replace(DATA, path=path, max_prompt_tokens=20)
    assert [problem.uid for problem in prompts.load(data, path, characters)] == [1]
    with pytest.raises(UserError, match="max_prompt_tokens = 2"):
        prompts.load(dataclasses.replace(data, max_prompt_tokens=2), path, characters)


def test_every_epoch_is_a_permutation_and_a_step_a_function_of_seed_and_step(characters):
    problems = prompts.load(DATA, "tiny", characters, limit=50)
    epoch = [problem.uid for step in range(5) for problem in prompts.batch(problems, 10, 3, step)]
    assert sorted(epoch) == list(range(50))
    assert [problem.uid for problem in prompts.batch(problems, 10, 3, 2)] == epoch[20:30]
    assert [problem.uid for problem in prompts.batch(problems, 10, 3, 7)] != epoch[20:30]
    assert [problem.uid for problem in prompts.batch(problems, 10, 4, 2)] != epoch[20:30]


def test_no_problem_comes_twice_in_a_step_at_the_end_of_an_epoch(characters):
    problems = prompts.load(DATA, "tiny", characters, limit=50)
    for step in range(12):
        uids = [problem.uid for problem in prompts.batch(problems, 16, 0, step)]
        assert len(set(uids)) == 16
    with pytest.raises(UserError, match="at most the number of problems, 50, got 51"):
        prompts.batch(problems, 51, 0, 0)


def test_parquet_and_saved_folders_are_read_like_jsonl(tmp_path, characters):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list([{"problem": "(1+2)%10", "answer": "3"}, {"problem": "(1+3)%10", "answer": "4"}])
    saved.to_parquet(str(tmp_path / "data.parquet"))
    saved.save_to_disk(str(tmp_path / "folder"))
    for path in (tmp_path / "data.parquet", tmp_path / "folder"):
        assert [problem.answer for problem in prompts.load(DATA, str(path), characters)] == ["3", "4"]
    with pytest.raises(UserError, match="0: has no field 'x', found problem, answer"):
        prompts.load(dataclasses.replace(DATA, answer_field="x"), str(tmp_path / "folder"), characters)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: cannot be read by datasets"):
        prompts.load(DATA, str(tmp_path / "empty"), characters)
