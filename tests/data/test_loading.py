"""What data sets become: problems with prompts, and an account of what is left out."""

import dataclasses
import json
import time
from pathlib import Path

import pytest

from effreason.data import loading, prompts, sources, templates
from effreason.data.tiny import tokenizer
from effreason.runtime.config import Config, DataConfig, EvaluationConfig, GradeConfig
from effreason.runtime.errors import UserError

DATA = DataConfig(path="tiny", user_prompt="{problem}")
SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def characters():
    return tokenizer.build()


def everything_matches(problems):
    return []


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n"
                            for row in rows))
    return str(path)


def texts(*problems):
    return [{"problem": problem, "answer": str(number)} for number, problem in enumerate(problems)]


def config(data=None, /, *, evaluation=None, **fields):
    data = dataclasses.replace(data or DATA, **fields)
    problems = 600 if data.path == "tiny" else 0
    return Config(data=data, evaluation=evaluation or EvaluationConfig(problems=problems))


def training(characters, config, unmatched=everything_matches):
    return loading.load_training(config, characters, templates.choose(characters, config.data),
                                 unmatched)


def held_out(characters, config, unmatched=None):
    return loading.load_held_out(config, characters, templates.choose(characters, config.data),
                                 unmatched)


def only(problems):
    (source,) = problems.sources
    return list(source.problems)


def test_tiny_problems_are_python_expressions_with_their_value_as_answer(characters):
    for problem in only(training(characters, config()))[:300]:
        assert str(eval(problem.text)) == problem.reference        # noqa: S307, our own text
        assert characters.decode(problem.prompt) == characters.apply_chat_template(
            [{"role": "user", "content": problem.text}], tokenize=False, add_generation_prompt=True)
        assert problem.opens_thinking and problem.kind == "math"


def test_held_out_problems_are_never_trained_on(characters):
    trained = {problem.text for problem in only(training(characters, config()))}
    found, _ = held_out(characters, config(evaluation=EvaluationConfig(problems=10_000)))
    found = [problem.text for problem in found["tiny"]]
    assert len(found) == len(set(found)) == sources.TINY_HELD_OUT and len(
        trained) == sources.TINY_PROBLEMS
    assert not trained & set(found)


def test_jsonl_fields_are_named_in_the_configuration(tmp_path, characters):
    path = write(tmp_path / "data.jsonl", [
        {"q": "(1+2)%10", "a": 3, "d": "low"}, "\n", {"q": "(1+3)%10", "a": "4", "d": 2}])
    settings = config(path=path, problem_field="q", answer_field="a", level_field="d")
    first, second = only(training(characters, settings))
    assert (first.text, first.reference, first.level) == ("(1+2)%10", "3", "low")
    assert (second.uid, second.reference, second.level) == (1, "4", "2")
    assert only(training(characters, config(settings.data, level_field=None)))[0].level == "all"


def test_long_prompts_are_left_out_not_cut(tmp_path, characters):
    path = write(tmp_path / "data.jsonl", texts("1" * 50, "1"))
    problems = training(characters, config(path=path, max_prompt_tokens=20))
    assert [problem.uid for problem in only(problems)] == [1]
    assert any("left out 1 with prompts of more than data.max_prompt_tokens = 20" in note
               for note in problems.notes)
    with pytest.raises(UserError, match="no problem .* is left; .*max_prompt_tokens = 2"):
        training(characters, config(path=path, max_prompt_tokens=2))


def test_problems_that_repeat_an_earlier_one_are_left_out_with_an_example(tmp_path, characters):
    first = write(tmp_path / "a.jsonl", texts("$x = 1$. And (2)?", "(4)", "$X=1$.  And (2)?"))
    second = write(tmp_path / "b.jsonl", texts("(5)", "( 4 )"))
    problems = training(characters, config(path=f"{first},{second}"))
    assert [[problem.reference for problem in source.problems]
            for source in problems.sources] == [["0", "1"], ["0"]]
    assert (f"{first}: left out 1 that repeat an earlier one, such as '$X=1$. And (2)?'"
            in problems.notes)
    assert f"{second}: left out 1 that repeat an earlier one, such as '( 4 )'" in problems.notes
    kept = training(characters, config(path=f"{first},{second}", duplicates="keep"))
    assert len(kept) == 5 and any("has 1 that repeat" in note for note in kept.notes)


def test_problems_of_evaluation_and_excluded_sets_are_not_trained_on(tmp_path, characters):
    train = write(tmp_path / "train.jsonl", texts("(1)", "(2)", "(3)", "(4)"))
    test = write(tmp_path / "test.jsonl", texts("(9)", "( 2 )"))
    other = write(tmp_path / "other.jsonl", texts("(4)"))
    settings = config(path=train, exclude=other, evaluation=EvaluationConfig(path=test, problems=1))
    problems = training(characters, settings)
    assert [problem.text for problem in only(problems)] == ["(1)", "(3)"]
    assert (f"{train}: left out 1 that are in the evaluation set {test}, such as '(2)'"
            in problems.notes)
    assert f"{train}: left out 1 that are in {other}, such as '(4)'" in problems.notes
    kept = training(characters, dataclasses.replace(
        settings, data=dataclasses.replace(settings.data, contaminated="keep")))
    assert len(kept) == 4 and sum("has 1 that are in" in note for note in kept.notes) == 2
    with pytest.raises(UserError, match="no problem of .* is left; .*in the evaluation set"):
        training(characters, config(path=test, evaluation=EvaluationConfig(path=test)))


def test_references_that_the_grader_cannot_match_are_dropped_in_training_and_reported_in_evaluation(
    tmp_path, characters):
    path = write(tmp_path / "data.jsonl", texts("(1)", "(2)", "(3)"))
    problems = training(characters, config(path=path), lambda problems: [1])
    assert [problem.uid for problem in only(problems)] == [0, 2]
    assert (f"{path}: left out 1 whose answer the grader cannot match with itself, such as '1'"
            in problems.notes)
    settings = config(evaluation=EvaluationConfig(path=path))
    found, notes = held_out(characters, settings, lambda problems: [1])
    assert len(found[path]) == 3 and any("has 1 whose answer" in note for note in notes)


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path, characters):
    path = write(tmp_path / "data.jsonl", [{"problem": "1", "answer": "so\n#### 12"},
                                           {"problem": "2", "answer": "?"}])
    problems = training(characters, config(path=path, answer_from="hashes"))
    assert [problem.reference for problem in only(problems)] == ["12"]
    assert f"{path}: left out 1 without an answer" in problems.notes
    assert problems.left_out == (prompts.LeftOut(path, 1, "has no answer", "2"),)
    with pytest.raises(UserError,
                       match="no answer in column 'answer' as data.answer_from = boxed reads it"):
        training(characters, config(path=path, answer_from="boxed"))


def test_problems_without_a_text_are_left_out_and_the_first_is_named(tmp_path, characters):
    path = write(tmp_path / "data.jsonl", [*texts("(1)", "", " "),
                                           {"problem": "(2)", "answer": ""}])
    problems = training(characters, config(path=path))
    assert [problem.text for problem in only(problems)] == ["(1)"]
    assert problems.notes[1:] == (f"{path}: left out 2 without a problem's text, such as {path}:2",
                                  f"{path}: left out 1 without an answer")
    found, notes = held_out(characters, config(evaluation=EvaluationConfig(path=path)))
    assert len(found[path]) == 1 and notes == (f"{path}: 1 of 4 problems to evaluate on",
                                               *problems.notes[1:])


def test_all_that_is_left_out_is_listed_with_its_row_and_reason(tmp_path, characters):
    first = write(tmp_path / "a.jsonl", texts("(1)", "(2)", "( 1 )", "", "3" * 50, "(4)"))
    second = write(tmp_path / "b.jsonl", [{"problem": "(7)", "answer": ""},
                                          *texts("(2)", "(5)", "(6)")])
    test = write(tmp_path / "test.jsonl", texts("(4)"))
    settings = config(path=f"{first},{second}", max_prompt_tokens=20,
                      evaluation=EvaluationConfig(path=test, problems=1))
    problems = training(characters, settings, lambda problems: [
        row for row, problem in enumerate(problems) if problem.text == "(6)"])
    uids = [problem.uid for source in problems.sources for problem in source.problems]
    assert uids == [0, 1, 2**26 + 2]
    assert {(row.source, row.number, row.reason, row.text) for row in problems.left_out} == {
        (first, 2, "repeats an earlier one", "( 1 )"), (first, 3, "has no problem text", ""),
        (first, 4, "has a prompt that is too long", "3" * 50),
        (first, 5, f"is in the evaluation set {test}", "(4)"),
        (second, 0, "has no answer", "(7)"), (second, 1, "repeats an earlier one", "(2)"),
        (second, 3, "has an answer that the grader cannot match with itself", "(6)")}
    kept = training(characters, dataclasses.replace(settings, data=dataclasses.replace(
        settings.data, duplicates="keep", contaminated="keep")))
    assert {row.number for row in kept.left_out} == {0, 3, 4}


def test_answers_that_cannot_be_read_are_left_out_by_their_reason(tmp_path, characters):
    rows = [*texts("(1)", "(2)", "(3)", "(4)", "(5)", "(6)"), {"problem": "(7)", "answer": None},
            {"problem": "(8)", "answer": float("nan")}, {"answer": "1", "problem": None}]
    for row, answer in enumerate(("3", "proof", "nan", "proof", ["5", "null"], ["null", "proof"])):
        rows[row]["answer"] = answer
    path = write(tmp_path / "a.jsonl", rows)
    problems = training(characters, config(path=path))
    assert [problem.reference for problem in only(problems)] == ["3", '["5", "null"]']
    proof = "tells of a proof, a solution or a figure, which is no answer"
    assert problems.notes == (
        f"{path}: 2 problems to train on",
        f"{path}: left out 1 without a problem's text, such as {path}:9",
        f"{path}: left out 2 without an answer",
        f"{path}: left out 2 whose answer {proof}, such as 'proof'",
        f"{path}: left out 1 whose answer is nan, no answer, such as 'nan'",
        f"{path}: left out 1 whose answer is null, no answer, such as '[\"null\", \"proof\"]'")
    found, notes = held_out(characters, config(evaluation=EvaluationConfig(path=path)))
    assert len(found[path]) == 6 and f"{path}: has 2 whose answer {proof}, such as 'proof'" in notes

    user = Config(data=dataclasses.replace(DATA, path=path),
                  grade=GradeConfig(function="my:grader"), evaluation=EvaluationConfig(problems=0))
    assert len(training(characters, user)) == 6
    (problem, *_) = training(characters, user).sources[0].problems
    assert json.loads(problem.columns)["problem"] == problem.text      # all columns, for its grader
    assert all(problem.columns == "" for problem in found[path])
    assert len(training(characters, config(path=path, answer_kind="text"))) == 6


def test_repeated_problems_with_another_answer_are_counted_apart(tmp_path, characters):
    path = write(tmp_path / "a.jsonl", [
        {"problem": "(1)", "answer": answer} for answer in ("3", "4", "3", "5")])
    problems = training(characters, config(path=path))
    assert problems.notes[1:] == (
        f"{path}: left out 3 that repeat an earlier one, such as '(1)'",
        f"{path}: 2 of these have another answer than the earlier one, such as '(1)': '4', "
        "earlier '3'")


def test_what_json_has_eaten_of_latex_is_mended_and_counted(tmp_path, characters):
    path = write(tmp_path / "a.jsonl", [
        *texts("(1)"), r'{"problem": "(2)\times3", "answer": "\frac{1}{2}"}', "\n"])
    problems = training(characters, config(path=path))
    assert [problem.text for problem in only(problems)] == ["(1)", r"(2)\times3"]
    assert only(problems)[1].reference == r"\frac{1}{2}"
    assert (f"{path}: mended 1 whose backslashes JSON had taken for escapes, such as "
            r"'(2)\\times3' with the answer '\\frac{1}{2}'") in problems.notes


def test_messages_are_problems_and_their_own_instructions_are_noted(tmp_path, characters):
    path = write(tmp_path / "a.jsonl", [
        {"prompt": [{"role": "user", "content": "(1)"}], "reward_model": {"ground_truth": "3"}}])
    columns = {"problem_field": "prompt", "answer_field": "reward_model.ground_truth"}
    problems = training(characters, config(path=path, **columns))
    assert [(problem.text, problem.reference) for problem in only(problems)] == [("(1)", "3")]
    assert len(problems.notes) == 1
    settings = config(path=path, user_prompt="Solve {problem}", **columns)
    problems = training(characters, settings)
    assert "data.user_prompt adds to them" in problems.notes[1]
    write(tmp_path / "a.jsonl", [{
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "(1)"}],
        "reward_model": {"ground_truth": "3"}}])
    with pytest.raises(UserError, match=r"a\.jsonl:1: field 'prompt' has a system turn"):
        training(characters, settings)
    assert len(training(characters, config(settings.data, system_prompt=""))) == 1


@pytest.mark.parametrize(("levels", "expected"), [
    ([1.0, None, 0.5], ["1", "none", "0.5"]), ([float("nan"), 3, 3.0], ["none", "3", "3"]),
    ([None, "", "easy"], ["none", "none", "easy"])])
def test_a_problem_without_a_level_has_one_of_its_own(tmp_path, characters, levels, expected):
    rows = [row | {"d": level} for row, level in
            zip(texts("(1)", "(2)", "(3)"), levels, strict=True)]
    rows += texts("(4)")
    settings = config(path=write(tmp_path / "a.jsonl", rows), level_field="d")
    assert [problem.level for problem in only(training(characters, settings))] == [
        *expected, "none"]
    with pytest.raises(UserError, match=r"a\.jsonl: no row has a level in column 'x'"):
        training(characters, config(settings.data, level_field="x"))


def test_too_few_problems_say_what_was_left_out(tmp_path, characters):
    path = write(tmp_path / "a.jsonl", texts("(1)", "(1)", "(1)", ""))
    other = write(tmp_path / "b.jsonl", texts("(2)", "(3)", "(4)"))
    with pytest.raises(UserError, match=r"number of problems, 1, got 4; 3 of 4 were left "
                       r"out: repeats an earlier one " r"\(2\), has no problem text \(1\)$"):
        prompts.batch(training(characters, config(path=path)), 4, 0, 0)
    with pytest.raises(UserError,
                       match=r"which has 1; 3 of 4 were left out: .*\(1\); lower its weight"):
        prompts.batch(training(characters, config(path=f"{path}=1,{other}=1")), 4, 0, 0)
    with pytest.raises(UserError,
                       match=r"takes 4 problems of [^;]*b\.jsonl for a step, which has 3; lower"):
        prompts.batch(training(characters, config(path=f"{path}=1,{other}=4")), 5, 0, 0)


def test_a_template_with_a_date_is_said_once(tmp_path, characters):
    template = tmp_path / "t.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}({{ "
                        "strftime_now('%d') }}){% endfor %}")
    path = write(tmp_path / "a.jsonl", texts("(1)"))
    problems = training(characters, config(path=path, template=str(template)))
    assert characters.decode(only(problems)[0].prompt) == "(1)(26)"
    assert problems.notes[0].startswith(
        "data.template: ") and "always gets 26 Jul 2024" in problems.notes[0]


def test_a_subset_that_no_set_would_take_is_an_error(tmp_path, characters):
    path = write(tmp_path / "a.jsonl", texts("(1)"))
    with pytest.raises(UserError, match=r"data\.subset is for sets on the Hub by "
                       r"their id and for folders of data files, and .*, got 'easy'"):
        training(characters, config(path=path, subset="easy"))


def test_each_evaluation_set_has_its_first_problems_whatever_the_others_are(tmp_path, characters):
    first = write(tmp_path / "a.jsonl", [row | {"level": 3} for row in texts("(1)", "(2)", "(1)")])
    second = write(tmp_path / "b.jsonl",
                   [row | {"level": "all"} for row in texts("(1)", "(5)", "(6)")])
    both = EvaluationConfig(path=f"{first}, {second}", problems=2)
    settings = config(level_field="level", evaluation=both)
    found, notes = held_out(characters, settings)
    assert list(found) == [first, second]
    assert [(problem.text, problem.level) for problem in found[first]] == [
        ("(1)", "3"), ("(2)", "3")]
    assert [(problem.text, problem.level) for problem in found[second]] == [
        ("(1)", "all"), ("(5)", "all")]
    alone, _ = held_out(characters, config(level_field="level",
                                           evaluation=EvaluationConfig(path=second, problems=2)))
    assert [problem.uid for problem in alone[second]] == [problem.uid for problem in found[second]]
    assert notes == (f"{first}: 2 of 3 problems to evaluate on",
                     f"{second}: 2 of 3 problems to evaluate on")
    found, _ = held_out(characters, config(level_field="level",
                                           evaluation=EvaluationConfig(path=first, problems=9)))
    # a repeated problem counts as published
    assert [problem.level for problem in found[first]] == ["3", "3", "3"]


def test_weights_come_from_the_path(tmp_path, characters):
    first = write(tmp_path / "a.jsonl", texts("1", "2", "3"))
    second = write(tmp_path / "b.jsonl", texts("4", "5"))
    problems = training(characters, config(path=f"{first}=3,{second}=1"))
    weights = [(source.name, source.weight) for source in problems.sources]
    assert weights == [(first, 3.0), (second, 1.0)]
    uids = [problem.uid for source in problems.sources for problem in source.problems]
    assert uids == [0, 1, 2, 2**26, 2**26 + 1]
    assert len(prompts.batch(problems, 4, 0, 0)) == 4


@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not there")
def test_the_math_sets_are_cleaned_in_seconds(characters):
    start = time.process_time()     # of this process: others may be busy
    problems = training(characters, config(
        path="math,converted_aime", directory=str(SHARED), max_prompt_tokens=10_000,
        evaluation=EvaluationConfig(path="math500", problems=10)))
    assert time.process_time() - start < 20
    # The tables of the sets count 11 in math12k. Two of those are other problems: 88/(4/2) against
    # 88/4/2, tan 225 against tan 22.5. One that they miss is the same but for \left| and \[.
    assert any(note.startswith("math: left out 10 that repeat an earlier one")
               for note in problems.notes)
    assert any(note.startswith("converted_aime: left out 5 that are in the evaluation set math500")
               for note in problems.notes)


def test_the_paper_says_how_often_a_set_is_sampled():
    several = EvaluationConfig(path="gsm8k,math500,aime24,some/set")
    assert loading.evaluation_samples(config(evaluation=several)) == {
        "gsm8k": 1, "math500": 3, "aime24": 10, "some/set": 1}
    chosen = EvaluationConfig(path="aime24", samples=2)
    assert loading.evaluation_samples(config(evaluation=chosen)) == {"aime24": 2}
    assert loading.evaluation_samples(config()) == {"tiny": 1}
