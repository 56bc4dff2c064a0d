"""The prompt a model is given: the checkpoint's own template, the paper's, one from a file; one BOS
in each."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from effreason.data import templates
from effreason.data.tiny import tokenizer
from effreason.runtime.config import DataConfig
from effreason.runtime.errors import UserError
from effreason.types import Problem

PLAIN = DataConfig(user_prompt="{problem}")
# of the R1-distill Qwen tokenizer
BOS, EOS, USER, ASSISTANT, THINK = 151646, 151643, 151644, 151645, 151648
NEWLINE = 198


@pytest.fixture(scope="module")
def characters():
    return tokenizer.build()


@pytest.fixture(scope="module")
def r1():
    if not (place := os.environ.get("EFFREASON_REAL")):
        pytest.skip("EFFREASON_REAL is not set: the directory that holds r1-distill-qwen-tokenizer")
    directory = Path(place) / "r1-distill-qwen-tokenizer"
    if not (directory / "tokenizer.json").exists():
        pytest.skip(f"{directory} holds no tokenizer")
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(directory)


def chosen(tokenizer, name=None, data=PLAIN):
    return templates.choose(tokenizer, DataConfig(user_prompt=data.user_prompt, template=name))


def ids(tokenizer, template, text):
    return list(templates.encode(tokenizer, templates.render(tokenizer, template, text)))


@pytest.mark.real
@pytest.mark.parametrize(("name", "end"), [("r1", []), ("r1_think", [THINK, NEWLINE])])
def test_the_papers_prompt_has_the_expected_ids(r1, name, end):
    text = "What is $1+2$?"
    template = templates.choose(r1, DataConfig(template=name))
    turn = (r"Please reason step by step, and put your final answer within \boxed{}. "
            "Question: What is $1+2$?")
    words = r1(turn, add_special_tokens=False)["input_ids"]
    assert not {BOS, EOS, USER, ASSISTANT, THINK} & set(words) and r1.decode(words) == turn
    found = ids(r1, template, text)
    assert found == [BOS, USER, *words, ASSISTANT, *end]
    names = ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>"]
    assert r1.convert_tokens_to_ids(names) == [BOS, USER, ASSISTANT, THINK]
    assert words[:8] == r1.convert_tokens_to_ids(["Please", "Ġreason", "Ġstep", "Ġby", "Ġstep", ",",
                                                  "Ġand", "Ġput"])
    assert templates.opens_thinking(templates.render(r1, template, text)) == (name == "r1_think")


@pytest.mark.real
@pytest.mark.parametrize(("file", "name"), [("chat_template.jinja", "r1"),
                                            ("chat_template_think.jinja", "r1_think")])
def test_the_named_templates_render_as_those_of_the_checkpoints(r1, file, name):
    own = chosen(r1, str(Path(os.environ["EFFREASON_REAL"]) / "r1-distill-qwen-tokenizer" / file))
    assert ids(r1, own, "1 + 1?") == ids(r1, chosen(r1, name), "1 + 1?")
    assert own.sha256 != chosen(r1, name).sha256


@pytest.mark.real
@pytest.mark.parametrize("folder", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"])
def test_other_checkpoints_have_their_own_template_and_not_the_papers(r1, folder):
    directory = Path(os.environ["EFFREASON_REAL"]) / folder
    if not directory.exists():
        pytest.skip(f"{directory} is not there")
    other = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(directory)
    rendered = templates.render(other, chosen(other), "1 + 1?")
    assert rendered == other.apply_chat_template([{"role": "user", "content": "1 + 1?"}],
                                                 tokenize=False, add_generation_prompt=True)
    with pytest.raises(UserError, match="data.template r1 is for DeepSeek-R1 models: "
                       "the tokenizer has no <｜User｜>"):
        chosen(other, "r1")


@pytest.mark.parametrize("name", [None, "r1", "r1_think"])
def test_there_is_one_bos_and_it_is_first(characters, name):
    found = ids(characters, chosen(characters, name), "(3+5)%10")
    assert found.count(characters.bos_token_id) == 1 and found[0] == characters.bos_token_id
    assert templates.encode(characters, "<think>").dtype == np.int32


def test_the_own_template_of_the_tiny_world_is_the_papers_with_thinking(characters):
    assert ids(characters, chosen(characters), "1+1") == ids(characters,
                                                             chosen(characters, "r1_think"), "1+1")


def test_the_user_prompt_goes_round_the_problem_as_it_is(characters):
    template = chosen(characters, "r1", DataConfig(user_prompt="a {problem} b {problem}"))
    assert templates.render(characters, template, "{{ 1 }} {problem}").endswith(
        "<｜User｜>a {{ 1 }} {problem} b {{ 1 }} {problem}<｜Assistant｜>")


def test_many_are_rendered_and_encoded_as_one(characters):
    template, texts = chosen(characters), ["1+1", "(3+5)%10", "2"]
    rendered = templates.render_all(characters, template, texts)
    assert rendered == [templates.render(characters, template, text) for text in texts]
    for prompt, text in zip(templates.encode_all(characters, rendered), texts, strict=True):
        assert list(prompt) == ids(characters, template, text)
    assert templates.encode_all(characters, []) == []


def test_the_hash_is_of_template_and_user_prompt(characters, tmp_path):
    template = chosen(characters, "r1")
    assert template.sha256 == hashlib.sha256(
        f"{template.text}\0{template.user_prompt}".encode()).hexdigest()
    (tmp_path / "t.jinja").write_text(template.text)
    same = chosen(characters, str(tmp_path / "t.jinja"))
    assert same.sha256 == template.sha256 and same.name != template.name
    assert chosen(characters, "r1", DataConfig(user_prompt="{problem}!")).sha256 != template.sha256
    assert chosen(characters, "r1_think").sha256 != template.sha256
    assert template.facts() == {"name": "r1", "user_prompt": "{problem}", "system_prompt": None,
                                "arguments": {}, "text": template.text, "sha256": template.sha256}


THINKING = ("{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}"
            "{% endfor %}<a>{% if enable_thinking is defined and not enable_thinking %}none"
            "{% endif %}")


def with_arguments(tokenizer, template, arguments=None, system_prompt=None):
    return templates.choose(tokenizer, DataConfig(
        user_prompt="{problem}", template=template, template_arguments=arguments,
        system_prompt=system_prompt))


def test_arguments_and_system_prompt_reach_the_template(characters, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(THINKING)
    start = characters.bos_token
    plain = with_arguments(characters, str(path))
    assert templates.render(characters, plain, "1+1") == f"{start}<user>1+1<a>"
    off = with_arguments(characters, str(path), {"enable_thinking": False}, "Be brief.")
    assert templates.render(characters, off, "1+1") == (
        f"{start}<system>Be brief.<user>1+1<a>none")
    assert off.notes == [] and off.facts()["arguments"] == {"enable_thinking": False}
    empty = with_arguments(characters, str(path), {}, "")
    assert templates.render(characters, empty, "1+1") == f"{start}<system><user>1+1<a>"
    others = [plain, off, empty, with_arguments(characters, str(path), {"enable_thinking": False}),
              with_arguments(characters, str(path), {"enable_thinking": True})]
    assert len({template.sha256 for template in others}) == 5
    assert with_arguments(characters, str(path), {}).sha256 == plain.sha256


def test_an_argument_that_the_template_does_not_read_is_noted(characters, tmp_path):
    (tmp_path / "t.jinja").write_text(THINKING)
    template = with_arguments(characters, str(tmp_path / "t.jinja"), {"thinking": False})
    assert template.notes == [f"data.template_arguments: {tmp_path / 't.jinja'} does not read "
                              "thinking, which changes nothing"]


@pytest.mark.parametrize("name", ["messages", "tokenize", "add_generation_prompt", "chat_template"])
def test_arguments_that_are_not_the_templates(characters, name):
    with pytest.raises(UserError, match=f"data.template_arguments must be variables .* got {name}"):
        with_arguments(characters, "r1", {name: True})


def test_a_system_prompt_that_is_left_out_is_an_error(characters):
    with pytest.raises(UserError, match="data.system_prompt: the template r1 leaves it out"):
        with_arguments(characters, "r1", system_prompt="Be brief.")


def test_a_byte_order_mark_is_not_part_of_a_template(characters, tmp_path):
    (tmp_path / "t.jinja").write_bytes(b"\xef\xbb\xbf" + THINKING.encode())
    assert chosen(characters, str(tmp_path / "t.jinja")).text == THINKING


def test_one_of_several_templates_is_chosen_by_its_name():
    several = tokenizer.build()
    several.chat_template = {"rag": THINKING, "tool_use": "{{ tools }}"}
    with pytest.raises(UserError, match="must be r1, r1_think, rag, tool_use or a file: the "
                       "checkpoint has none called default, only rag, tool_use"):
        chosen(several)
    assert chosen(several, "rag") == templates.Template("rag", THINKING, "{problem}")
    with pytest.raises(UserError, match="tool_use leaves out the user's turn"):
        chosen(several, "tool_use")
    several.chat_template |= {"default": "own " + THINKING}
    assert (chosen(several).name, chosen(several).text) == ("the checkpoint's own",
                                                            "own " + THINKING)


def test_a_prompt_with_a_token_that_the_model_has_no_row_for(characters):
    def problem(token):
        return Problem(uid=0, prompt=np.array([1, token], np.int32), text="1+1", reference="2",
                       level="", kind="math", choices=None, opens_thinking=False)

    rows = len(characters) - 1
    templates.check_rows(characters, [problem(rows - 1)], rows)
    with pytest.raises(UserError, match=f"the prompt of '1\\+1' holds token {rows}, .* vocab_size"):
        templates.check_rows(characters, [problem(rows - 1), problem(rows)], rows)


@pytest.mark.parametrize(("text", "message"), [
    ("{% for %}", r"t\.jinja:1: not a Jinja template"),
    ("a\n{{ messages[0]['content'] }", "t.jinja:2: not a Jinja"),
    ("{{ raise_exception('only two turns') }}", r"cannot be rendered \(only two turns\)"),
    ("{{ 1/0 }}", r"t\.jinja cannot be rendered \(division by zero\)"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "t.jinja cannot be rendered .*recursion"),
    ("{{ strftime_now('%d') }}\n{% for %}", r"t\.jinja:2: not a Jinja template"),
    ("{{ messages.nothing.more }}", "cannot be rendered"),
    ("{{ bos_token }}<｜User｜><｜Assistant｜>", "t.jinja leaves out the user's turn"),
    ("{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}",
     "t.jinja begins with .*sentence｜> twice")])
def test_a_template_that_is_wrong_is_named_at_once(characters, tmp_path, text, message):
    (tmp_path / "t.jinja").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        chosen(characters, str(tmp_path / "t.jinja"))
    assert "\n" not in str(caught.value)


LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<s>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- for message in messages %}
    {{- message['content'] + "\\n" }}
{%- endfor %}"""


@pytest.mark.parametrize("before", ["", "\n", " \n", "  {% if true %}\n", "a\n  {% if true %}\n"])
def test_a_template_that_writes_the_date_always_writes_the_same(characters, tmp_path, monkeypatch,
                                                                before):
    text = before + LLAMA + ("{% endif %}" if "if" in before else "")
    (tmp_path / "t.jinja").write_text(text)
    template = chosen(characters, str(tmp_path / "t.jinja"))
    found = templates.render(characters, template, "1+1")
    assert "Today Date: 26 Jul 2024" in found
    # The rest is as it was, to the space: as by the template without today's date.
    plain = text.replace("strftime_now is defined", "false")
    assert found == templates.render(characters, templates.Template("plain", plain, "{problem}"),
                                     "1+1")
    assert template.text.endswith(text) and "26" in template.facts()["text"]
    assert template.notes == [
        f"data.template: {tmp_path / 't.jinja'} writes the date; it always gets 26 Jul 2024, so "
        "that prompts stay the same"]
    (tmp_path / "exported.jinja").write_text(template.text)
    exported = chosen(characters, str(tmp_path / "exported.jinja"))
    assert (exported.text, exported.sha256) == (template.text, template.sha256)


@pytest.mark.parametrize(("form", "date"), [
    ("%d %b %Y", "26 Jul 2024"), ("%Y-%m-%d", "2024-07-26"), ("%d %B %Y", "26 July 2024"),
    ("%A, %B %-d, %y %H:%M:%S", "Friday, July 26, 24 00:00:00")])
def test_the_date_has_the_form_that_the_template_asks_for(characters, tmp_path, form, date):
    (tmp_path
     / "t.jinja").write_text(f"{{% macro day() %}}{{{{ strftime_now('{form}') }}}}{{% endmacro %}}"
                             "{% for message in messages %}{{ day() }}|{{ "
                             "message['content'] }}{% endfor %}")
    assert templates.render(characters, chosen(characters, str(tmp_path / "t.jinja")),
                            "1+1") == f"{date}|1+1"


def test_a_template_without_a_date_is_left_as_it_is(characters):
    template = chosen(characters)
    assert template.text == characters.get_chat_template() and template.notes == []


CHAT = ("{% for message in messages %}<｜User｜>{{ message.content }}{{ END }}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}")


@pytest.mark.parametrize(("text", "end"), [
    (CHAT.replace("{{ END }}", "<think>\n"), "<think>"),
    (CHAT.replace("{{ END }}", "\n{{ eos_token }}\n"), None),        # an EOS token
    (CHAT.replace("{{ END }}", "\n"), None),
    (CHAT.replace("{{ END }}", " and more"), None),
    ("{{ messages[-1]['content'] }}<｜Assistant｜>", None),      # shows a single turn, like r1
    ("{% if messages|length > 1 %}{{ 1/0 }}{% endif %}{{ messages[-1]['content'] }}", None),
])
def test_a_turn_that_ends_in_a_token_that_is_not_eos_is_noted(characters, tmp_path, text, end):
    (tmp_path / "t.jinja").write_text(text)
    template = chosen(characters, str(tmp_path / "t.jinja"))
    notes = templates.turn_end_notes(characters, template, (characters.eos_token_id,))
    if end is None:
        assert notes == []
    else:
        (note,) = notes
        assert f"ends the assistant's turn with {end} (id " in note
        assert f"EOS tokens are {characters.eos_token} (ids {characters.eos_token_id})" in note
        assert note.endswith(f"--rollout.stop_ids '{end}' ends it there")


@pytest.mark.parametrize("name", [None, "r1", "r1_think"])
def test_the_shipped_templates_end_turns_with_eos(characters, name):
    template = chosen(characters, name)
    assert templates.turn_end_notes(characters, template, (characters.eos_token_id,)) == []
    assert bool(templates.turn_end_notes(characters, template, (5,))) == (name is None)


def test_a_name_that_is_no_template(characters, tmp_path):
    with pytest.raises(UserError, match=r"must be null, r1, r1_think, default or a file, got "
                       r"'r1-think' \(did you mean r1_t"):
        chosen(characters, "r1-think")
    with pytest.raises(UserError, match="No such file"):
        chosen(characters, str(tmp_path / "none.jinja"))
    bare = tokenizer.build()
    bare.chat_template = None
    with pytest.raises(UserError, match="data.template must be r1, r1_think or a file: "
                       "the checkpoint has no chat"):
        chosen(bare)


def test_a_prompt_is_shown_in_few_lines():
    assert templates.display("<a>1\n2<b>\n") == "<a>1\n2<b>\\n"
    shown = templates.display("\n".join(str(number) for number in range(100)) + "x" * 5000)
    assert len(shown.splitlines()) <= 20 and len(shown) < 2000
    assert shown.startswith("0\n1\n") and "... 82 lines ..." in shown and shown.endswith("x")
