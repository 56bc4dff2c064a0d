"""The model card: a header the Hub accepts, the figures of the run, and nothing left to fill in."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml

from effreason import __version__
from effreason.data.templates import Template
from effreason.runs import model_card as model_card_module
from effreason.runs.model_card import model_card
from effreason.runtime.config import (
    AdapterConfig,
    Config,
    ExportConfig,
    KLConfig,
    RewardConfig,
    RolloutConfig,
    UpdateConfig,
)
from effreason.types import LevelResult

COMMIT = "6a6f4aa4197940add57724a7707d069478df56b1"
BASE = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
USER_PROMPT = r"Reason, and put the answer in \boxed{}. Question: {problem}"
MEASURED = dict(truncated=0.0, problems=600, samples=4)
BEFORE = SimpleNamespace(accuracy=0.75, tokens=4000.0, by_level={
    "easy": LevelResult(accuracy=0.9, tokens=2000.0, problems=300),
    "hard": LevelResult(accuracy=0.6, tokens=6000.0, problems=300)}, **MEASURED)
AFTER = SimpleNamespace(accuracy=0.76, tokens=2500.0, by_level={
    "easy": LevelResult(accuracy=0.92, tokens=500.0, problems=300),
    "hard": LevelResult(accuracy=0.6, tokens=4500.0, problems=300)}, **MEASURED)


def card(*, base=BASE, revision=COMMIT, user_prompt=USER_PROMPT, before=BEFORE, after=AFTER,
         template=None, alpha=0.1,
         sources=("gsm8k", "openai/other", "data/my.jsonl/x", "tiny"), update=None, reward=None,
         adapters=None, directory=Path("no-such-directory"), **sections):
    config = Config(rollout=RolloutConfig(max_new_tokens=32_000), kl=KLConfig(form="none"),
                    update=update or UpdateConfig(), reward=reward or RewardConfig(), **sections)
    inputs = SimpleNamespace(
        pretrained=SimpleNamespace(base=base, revision=revision, adapters=adapters,
                                   directory=directory),
        held_out={"math500": []},
        problems=SimpleNamespace(sources=[SimpleNamespace(name=name) for name in sources]),
        template=template or Template("r1_think", "{{ messages }}", user_prompt))
    return model_card(config, inputs, step=1200, alpha=alpha, before=before, after=after)


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
    assert table["base_model"] == BASE and table["base_model_relation"] == "finetune"
    assert (table["library_name"], table["pipeline_tag"]) == ("transformers", "text-generation")
    assert table["datasets"] == ["openai/gsm8k", "openai/other"]
    assert "efficient-reasoning" in table["tags"]
    parsed = huggingface_hub.ModelCard(card())
    assert parsed.data.to_dict() == table and parsed.text.strip().startswith("# deepseek-ai/")


def test_the_header_has_the_measurements_and_the_license_of_the_base(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: qwen-research\nlicense_link: LICENSE\n---\n# Base")
    data = huggingface_hub.ModelCard(card(directory=tmp_path)).data
    assert (data.license, data.license_name, data.license_link) == (
        "other", "qwen-research", "LICENSE")
    assert [(result.dataset_type, result.dataset_name, result.dataset_split, result.metric_type,
             result.metric_value) for result in data.eval_results] == [
        ("HuggingFaceH4/MATH-500", "math500", "test", "accuracy", 0.76),
        ("HuggingFaceH4/MATH-500", "math500", "test", "tokens", 2500.0)]
    assert data.model_name == f"{BASE}, alpha 0.1"

    unmeasured = huggingface_hub.ModelCard(card(after=None)).data
    assert unmeasured.eval_results is None and unmeasured.license is None


@pytest.mark.parametrize("text", ["# no header", "---\nlicense: [\n---\n", "---\n- a\n---\n", ""])
def test_a_card_of_the_base_that_cannot_be_read_names_no_license(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert "license" not in header(card(directory=tmp_path))


def test_the_evaluation_by_level():
    evaluation, training = tables(card())
    assert evaluation == [["problems", "accuracy before", "accuracy after", "tokens before",
                           "tokens after", "tokens saved"], ["---"] * 6,
                          ["easy", "90.0 %", "92.0 %", "2,000", "500", "75.0 %"],
                          ["hard", "60.0 %", "60.0 %", "6,000", "4,500", "25.0 %"],
                          ["all", "75.0 %", "76.0 %", "4,000", "2,500", "37.5 %"]]
    facts = {row[0]: row[1] for row in training}
    assert facts["base model"].endswith(COMMIT) and facts["alpha"] == "0.1"
    assert facts["steps"] == "1,200"
    assert facts["trained on"] == "gsm8k, openai/other, data/my.jsonl/x, tiny"
    assert facts["effreason"] == __version__ and facts["sampling temperature"] == "1"
    assert Template("", "{{ messages }}", USER_PROMPT).sha256 in facts["chat template"]
    assert "600 held-out problems of math500, 4 sampled responses" in card()


@pytest.mark.parametrize(("before", "after", "columns", "said"), [
    (None, None, None, "was not evaluated"), (BEFORE, None, 3, "Only the base model was evaluated"),
    (None, AFTER, 3, "Only this model was evaluated"),
])
def test_what_was_not_measured_is_not_in_the_table(before, after, columns, said):
    text = card(before=before, after=after)
    assert said in text and len(tables(text)) == 1 + (columns is not None)
    assert columns is None or {len(row) for row in tables(text)[0]} == {columns}


def test_a_dial_is_named_with_the_alpha_that_was_chosen():
    reward = RewardConfig(alphas="0,0.1,0.4")
    text = card(reward=reward, alpha=0.23, adapter=AdapterConfig(rank=4))
    assert "taught to reason efficiently (α = 0.23)" in text
    assert ("has trained the weights of every α from 0 to 0.4; these are the ones at α = 0.23, "
            "which lies between those it was trained at: 0, 0.1, 0.4.") in text
    facts = {row[0]: row[1] for row in tables(text)[-1]}
    assert (facts["alpha"], facts["alphas of the dial"]) == ("0.23", "0, 0.1, 0.4")
    assert "α = 0.1, one of those it was trained at: 0, 0.1" in card(reward=reward, alpha=0.1,
                                                                     adapter=AdapterConfig(rank=4))
    assert "dial" not in card()


def test_the_example_shows_marks_that_are_special_tokens():
    assert "skip_special_tokens" not in card()


def test_one_level_makes_one_row():
    def alone(result):
        return SimpleNamespace(accuracy=result.accuracy, tokens=result.tokens, **MEASURED,
                               by_level={"all": LevelResult(
                                   accuracy=result.accuracy, tokens=result.tokens, problems=600)})

    assert [row[0] for row in tables(card(before=alone(BEFORE), after=alone(AFTER)))[0]] == [
        "problems", "---", "all"]


def test_adapters_alone_are_named_as_such():
    text = card(adapter=AdapterConfig(rank=16), export=ExportConfig(adapter=True),
                adapters=SimpleNamespace(directory=Path("/home/someone/sft")))
    table = header(text)
    assert (table["library_name"], table["base_model_relation"]) == ("peft", "adapter")
    assert "lora" in table["tags"]
    assert f"holds low-rank adapters (LoRA) for `{BASE}`" in text and "someone" not in text
    facts = {row[0]: row[1] for row in tables(text)[1]}
    assert facts["adapters"] == "rank 16, all" and facts["adapters it started from"] == "sft"


def test_a_local_base_model_is_named_without_its_path():
    text = card(base="/home/someone/secret/runs/7/model", revision=None)
    assert "secret" not in text and "base_model" not in header(text) and "# model, taught" in text
    assert header(card(base="tiny", revision=None, sources=["tiny"])).keys() == {
        "library_name", "pipeline_tag", "tags", "model-index"}


def test_the_example_is_python():
    source = re.search(r"```python\n(.*?)```", card(user_prompt='Say "it\'s" {problem}\nnow'),
                       re.DOTALL)[1]
    strings = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    assert any(str(text).startswith('Say "it\'s" What is the sum') for text in strings)
    assert 32_000 in strings and 1.0 in strings


def test_arguments_and_system_prompt_can_be_repeated():
    text = card(template=Template("the checkpoint's own", "{{ enable_thinking }}", "{problem}",
                                  "Be brief.", {"enable_thinking": False}))
    source = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    called = {}

    class Tokenizer:
        def apply_chat_template(self, messages, **options):
            called.update(options, messages=messages)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exec(source[source.index("messages ="):], {"tokenizer": Tokenizer()})
    assert called["enable_thinking"] is False and called["messages"][0] == {
        "role": "system", "content": "Be brief."}
    assert ["arguments of the chat template", '{"enable_thinking": false}'] in tables(text)[1]
    assert '"chat_template_kwargs": {"enable_thinking": false}' in text
    assert "after the same system prompt" in text and "without a system prompt" in card()


def test_nothing_is_left_to_fill_in_and_no_cell_breaks():
    text = card(sources=["a|b\nc", "x"], update=UpdateConfig(objective="dpo"),
                reward=RewardConfig(form="kimi"))
    assert not re.search(r"None|TODO|\[More Information Needed\]|\{problem\}|@[A-Z]+@|nan", text)
    training = tables(text)[1]
    assert {len(row) for row in training} == {2}
    assert ["trained on", r"a\|b c, x"] in training
    assert ["objective", "dpo"] in training and ["reward", "kimi"] in training
    assert max(map(len, text.splitlines())) < 600 and text.endswith("|\n")


def test_break_even_is_of_measured_figures_alone():
    before, after = (SimpleNamespace(tokens=tokens) for tokens in (100.0, 60.0))
    cost = model_card_module.Cost(seconds=120.0, tokens_per_second=1000.0, device="H100", devices=2)
    head, text = model_card_module.break_even(before, after, cost)
    assert head == "## When it pays"
    assert "40 tokens fewer" in text and "2:00 on 2 x H100" in text and "1,000 tokens/s" in text
    assert "after 3,000 responses" in text      # 120 s x 1,000 tokens/s / 40 tokens
    assert model_card_module.break_even(after, before, cost) == []
    assert model_card_module.break_even(before, after, None) == []
