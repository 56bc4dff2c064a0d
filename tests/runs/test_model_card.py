"""The model card: a header the Hub accepts, the figures of the run, and nothing left to fill in."""

import ast
import re
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml

from effreason.runs.model_card import model_card
from effreason.types import LevelResult

COMMIT = "6a6f4aa4197940add57724a7707d069478df56b1"
FACTS = dict(base_model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", base_revision=COMMIT, alpha=0.1,
             data="gsm8k=0.3,math=0.7", step=1200, version="0.1.0", template="r1_think", template_sha256="ab12" * 16,
             user_prompt=r"Reason, and put the answer in \boxed{}. Question: {problem}", temperature=1.0, top_p=1.0,
             max_new_tokens=32_000, datasets=["openai/gsm8k", "data/my.jsonl/x", "tiny"])
MEASURED = dict(truncated=0.0, problems=600, samples=4)
BEFORE = SimpleNamespace(accuracy=0.75, tokens=4000.0, by_level={
    "easy": LevelResult(accuracy=0.9, tokens=2000.0, problems=300),
    "hard": LevelResult(accuracy=0.6, tokens=6000.0, problems=300)}, **MEASURED)
AFTER = SimpleNamespace(accuracy=0.76, tokens=2500.0, by_level={
    "easy": LevelResult(accuracy=0.92, tokens=500.0, problems=300),
    "hard": LevelResult(accuracy=0.6, tokens=4500.0, problems=300)}, **MEASURED)


def card(**changes):
    return model_card(**FACTS | dict(evaluation_set="math500", before=BEFORE, after=AFTER) | changes)


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def tables(text):
    """All Markdown tables: lists of rows of cells."""
    found = [[]]
    for line in text.splitlines():
        if line.startswith("| "):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def test_the_header_is_what_the_hub_reads():
    table = header(card())
    assert table["base_model"] == FACTS["base_model"] and table["base_model_relation"] == "finetune"
    assert (table["library_name"], table["pipeline_tag"]) == ("transformers", "text-generation")
    assert table["datasets"] == ["openai/gsm8k"] and "efficient-reasoning" in table["tags"]
    parsed = huggingface_hub.ModelCard(card())
    assert parsed.data.to_dict() == table and parsed.text.strip().startswith("# deepseek-ai/")


def test_the_evaluation_by_level():
    evaluation, training = tables(card())
    assert evaluation == [
        ["problems", "accuracy before", "accuracy after", "tokens before", "tokens after", "tokens saved"],
        ["---"] * 6,
        ["easy", "90.0 %", "92.0 %", "2,000", "500", "75.0 %"],
        ["hard", "60.0 %", "60.0 %", "6,000", "4,500", "25.0 %"],
        ["all", "75.0 %", "76.0 %", "4,000", "2,500", "37.5 %"]]
    facts = {row[0]: row[1] for row in training}
    assert facts["base model"].endswith(COMMIT) and facts["alpha"] == "0.1" and facts["steps"] == "1,200"
    assert facts["trained on"] == "gsm8k=0.3,math=0.7" and facts["effreason"] == "0.1.0"
    assert "ab12" * 16 in facts["chat template"]
    assert "600 held-out problems of math500, 4 sampled responses" in card()


@pytest.mark.parametrize(("before", "after", "columns", "said"), [
    (None, None, None, "was not evaluated"), (BEFORE, None, 3, "Only the base model was evaluated"),
    (None, AFTER, 3, "Only this model was evaluated"),
])
def test_what_was_not_measured_is_not_in_the_table(before, after, columns, said):
    text = card(before=before, after=after)
    assert said in text and len(tables(text)) == 1 + (columns is not None)
    assert columns is None or {len(row) for row in tables(text)[0]} == {columns}


def test_one_level_makes_one_row():
    def alone(result):
        return SimpleNamespace(accuracy=result.accuracy, tokens=result.tokens, **MEASURED, by_level={
            "all": LevelResult(accuracy=result.accuracy, tokens=result.tokens, problems=600)})

    assert [row[0] for row in tables(card(before=alone(BEFORE), after=alone(AFTER)))[0]] == ["problems", "---", "all"]


def test_a_local_base_model_is_named_without_its_path():
    text = card(base_model="/home/someone/secret/runs/7/model", base_revision=None)
    assert "secret" not in text and "base_model" not in header(text) and "# model, taught" in text
    assert header(card(base_model="tiny", base_revision=None, datasets=())).keys() == {
        "library_name", "pipeline_tag", "tags"}


def test_the_example_is_python():
    source = re.search(r"```python\n(.*?)```", card(user_prompt='Say "it\'s" {problem}\nnow'), re.DOTALL)[1]
    strings = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    assert any(str(text).startswith('Say "it\'s" What is the sum') for text in strings)
    assert 32_000 in strings and 1.0 in strings


def test_nothing_is_left_to_fill_in_and_no_cell_breaks():
    text = card(settings={"learning rate": 2e-6, "grader": "a|b\nc"}, data="x|y")
    assert not re.search(r"None|TODO|\[More Information Needed\]|\{problem\}|@[A-Z]+@|nan", text)
    training = tables(text)[1]
    assert {len(row) for row in training} == {2}
    assert ["grader", r"a\|b c"] in training and ["learning rate", "2e-06"] in training
    assert max(map(len, text.splitlines())) < 600 and text.endswith("|\n")
