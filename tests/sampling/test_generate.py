"""Responses for programs of one's own, and the command that prints them: `generate`, text as it
grows, files."""

import contextlib
import doctest
import functools
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import hypothesis.strategies as some
import jax
import numpy as np
import pytest
import tokenizers
import transformers
from decoders import QWEN2, VOCABULARY, mesh, place, weights
from hypothesis import given

from effreason.cli import generate as generate_command
from effreason.cli import streaming
from effreason.cli.prompt_files import Message, Prompt
from effreason.lm import model
from effreason.lm.hf.pretrained import load_tokenizer, load_weights, open_pretrained
from effreason.runtime.errors import Interrupted, UserError
from effreason.sampling import engine, generate
from effreason.sampling.draws import SamplingParams

ROOT = Path(__file__).parents[2]
PROMPTS = [[5, 1, 20], [7], [int(token) for token in np.arange(18) % VOCABULARY]]
LIMITS = [9, 20, 1]
GREEDY = SamplingParams(temperature=0.0, eos_ids=(3,))


@jax.jit
def full_logits(params, tokens):
    return model.logits(params, model.forward(QWEN2, params, tokens))


def predictions(prompt, response):
    """Logits of the full forward pass at each position of a response, float32[T', V]."""
    row = np.concatenate([prompt, response.tokens]).astype(np.int32)
    logits = full_logits(weights(QWEN2), np.pad(row, (0, 64 - len(row)))[None])[0]
    return np.asarray(logits, np.float64)[len(prompt) - 1 : len(row) - 1]


def log_softmax(logits):
    maximum = logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits - maximum).sum(-1, keepdims=True)) - maximum


def generated(prompts=PROMPTS, sampling=GREEDY, max_new_tokens=12, **settings):
    return generate.generate(weights(QWEN2), prompts, config=QWEN2, sampling=sampling,
                             max_new_tokens=max_new_tokens,
                             **{"mesh": mesh(), "slots": 4, "chunk": 4} | settings)


def tokens_of(groups):
    return [[response.tokens.tolist() for response in group] for group in groups]


# generate


def test_the_example_of_the_docstring():
    finder = doctest.DocTestFinder(recurse=False)
    [example] = finder.find(generate.generate, "generate", globs={})
    assert doctest.DocTestRunner().run(example).failed == 0 and len(example.examples) > 5


def test_greedy_is_the_argmax_of_the_forward_pass_up_to_each_prompts_limit():
    groups = generated(max_new_tokens=LIMITS)
    for place_, (prompt, limit, [response]) in enumerate(zip(PROMPTS, LIMITS, groups, strict=True)):
        assert (response.prompt, response.sample) == (place_, 0)
        np.testing.assert_array_equal(response.tokens, predictions(prompt, response).argmax(-1))
        assert response.finish == ("eos" if response.tokens[-1] == 3 else "length")
        assert len(response.tokens) == limit or response.ended


def test_log_probs_are_those_of_the_forward_pass():
    sampling = SamplingParams(temperature=0.7, top_k=5, eos_ids=(3,))
    for prompt, group in zip(PROMPTS, generated(sampling=sampling, samples=3), strict=True):
        for response in group:
            logits, drawn = predictions(prompt, response), response.tokens[:, None]
            least = np.sort(logits, axis=-1)[:, -5, None]
            kept = np.where(logits >= least, logits / 0.7, -1e30)
            for found, expected in ((response.model_logprobs, logits),
                                    (response.logprobs, logits / 0.7),
                                    (response.sampling_logprobs, kept)):
                expected = np.take_along_axis(log_softmax(expected), drawn, axis=-1)[:, 0]
                np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_response_depends_on_seed_uid_and_sample_alone():
    sampling = SamplingParams(temperature=1.0, eos_ids=(3,))
    whole = tokens_of(generated(sampling=sampling, samples=3))
    assert tokens_of(generated(PROMPTS[::-1], sampling, uids=[2, 1, 0], samples=2)) == [
        group[:2] for group in whole[::-1]]
    assert len({str(tokens) for tokens in whole[0]}) == 3
    assert tokens_of(generated(sampling=sampling, samples=3, seed=1)) != whole


def test_all_devices_are_used_where_no_mesh_is_given():
    assert tokens_of(generated(mesh=None)) == tokens_of(generated())


def test_a_sampler_of_ones_own_compiles_once():
    target = mesh()
    started = []
    sampler = engine.make_sampler(QWEN2, target, slots=4, chunk=4)

    def kept(*arguments):
        started.append(sampler(*arguments))
        return started[-1]

    params = place(QWEN2, weights(QWEN2), target)
    twice = [generate.generate(params, PROMPTS, config=QWEN2, sampling=GREEDY, max_new_tokens=12,
                               sampler=kept) for _ in range(2)]
    assert tokens_of(twice[0]) == tokens_of(twice[1]) == tokens_of(generated())
    assert started[0].compilations > 0 and started[1].compilations == 0


def test_no_prompts_no_responses():
    assert generated([]) == []


@pytest.mark.parametrize(("prompts", "changes", "message"), [
    ([[1, VOCABULARY]], {}, r"prompt 0: token ids must be in \[0, 24\), got 1 to 24"),
    ([[1], [-1]], {}, "prompt 1: token ids"), ([[1], []], {},
                                               "prompt 1 must be a list of token ids"),
    (["text"], {}, "prompt 0 must be a list of token ids"), ([[0.5]], {}, "prompt 0 must be"),
    ([[1]], {"max_new_tokens": [1, 2]}, "expected 1 max_new_tokens"),
    ([[1]], {"uids": []}, "expected 1 .* uids"),
    ([[1]], {"max_new_tokens": 0}, "at least 1"), ([[1]], {"samples": 0}, "at least 1"),
    ([[1]], {"uids": [2**31]}, "uids must be in"),
])
def test_what_cannot_be_generated(prompts, changes, message):
    with pytest.raises(ValueError, match=message):
        generated(prompts, **changes)


# text as it grows


def wrapped(core, specials):
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=specials[0],
                                                additional_special_tokens=specials,
                                                clean_up_tokenization_spaces=False)


@functools.cache
def byte_level():
    """Each byte is a token, the last id is EOS."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab=dict(zip(alphabet, range(256), strict=True)), merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                             use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    return wrapped(core, ["<eos>"])


@functools.cache
def byte_fallback():
    """Words of their own, bytes for all else, as SentencePiece has it; the first space of a text is
    dropped."""
    names = ["<unk>", "▁", "▁a", "b", "中", "�", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={each: row for row,
                                                             each in enumerate(names)}, merges=[],
                                                      unk_token="<unk>", byte_fallback=True))
    core.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Replace("▁", " "),
                                                 tokenizers.decoders.ByteFallback(),
                                                 tokenizers.decoders.Fuse(),
                                                 tokenizers.decoders.Strip(" ", 1, 0)])
    return wrapped(core, ["<eos>"])


def shown(tokenizer, tokens, sizes):
    """What is shown after each look, the last look included. Args: sizes, tokens between looks,
    over and over."""
    stream, end, parts, turn = generate.TextStream(tokenizer), 0, [], 0
    while end < len(tokens):
        end += sizes[turn % len(sizes)]
        turn += 1
        parts.append(stream.update(np.array(tokens[:end], np.int32), final=False))
    parts.append(stream.update(np.array(tokens, np.int32), final=True))
    return parts


@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback], ids=lambda make: make.__name__)
def test_characters_of_several_tokens_are_shown_whole(tokenizer):
    made = tokenizer()
    names = made.get_vocab()
    text = "aé中🙂👩‍👩‍👧 x" * 30
    if tokenizer is byte_level:
        tokens = made(text)["input_ids"]
    else:
        tokens = [names[f"<0x{byte:02X}>"] for byte in text.encode()]
        tokens[-1:] = [names["b"]]
        text = text[:-1] + "b"
    parts = shown(made, tokens, [1])
    assert "".join(parts) == text == generate.decode(made, np.array(tokens))
    assert not any("\ufffd" in part for part in parts)
    if tokenizer is byte_level:         # nothing waits for longer than its own bytes
        assert sum(map(bool, parts)) == len(text)


@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback], ids=lambda make: make.__name__)
@given(data=some.data())
def test_what_is_shown_is_the_text_whatever_the_tokens(tokenizer, data):
    made = tokenizer()
    names = len(made)
    # Bytes at random are mostly no characters; a few pieces of real text and EOS among them.
    piece = some.one_of(some.lists(some.integers(0, names - 1), max_size=6),
                        some.just(list(range(5))), some.just(made("中🙂")["input_ids"]),
                        some.just([names - 1] * 5))
    tokens = sum(data.draw(some.lists(piece, max_size=40)), [])
    sizes = data.draw(some.lists(some.integers(1, 5), min_size=1, max_size=5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "WINDOW", 12)
        patch.setattr(generate, "CONTEXT", data.draw(some.integers(1, 6)))
        text = generate.decode(made, np.array(tokens, np.int32))
        assert "".join(shown(made, tokens, sizes)) == text


def named(*special, roles=None):
    """The bytes, then these special tokens; roles, of some of them."""
    made = byte_level()
    core = tokenizers.Tokenizer.from_str(made.backend_tokenizer.to_str())
    core.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in special])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **(roles or {}))


ALL_ROLES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}


@pytest.mark.parametrize(("tokens", "ended", "text"), [
    ("<bos>", False, ""), ("a<think>b</think>c<eos>", True, "a<think>b</think>c"),
    ("<|begin_of_thought|>a<|end_of_thought|>b<eos><pad><pad>", True,
     "<|begin_of_thought|>a<|end_of_thought|>b"),
    ("<answer>5</answer><eos>", True, "<answer>5</answer>"), ("5</think>", False, "5</think>"),
    ("a<unk>b", False, "ab"), ("5<|eom|>", True, "5"), ("5<|eom|>6", False, "5<|eom|>6"),
    ("5 ", True, "5 "), ("", False, "")])
def test_a_text_keeps_the_marks_that_are_special_tokens(tokens, ended, text):
    marks = ("<think>", "</think>", "<answer>", "</answer>", "<|begin_of_thought|>",
             "<|end_of_thought|>", "<|eom|>")
    made = named(*ALL_ROLES.values(), *marks, roles=ALL_ROLES)
    ids = np.array(made(tokens, add_special_tokens=False)["input_ids"], np.int32)
    assert generate.decode(made, ids, ended=ended) == text
    stream = generate.TextStream(made)
    parts = [stream.update(ids[:end], final=False) for end in range(len(ids))]
    assert "".join(parts) + stream.update(ids, final=True, ended=ended) == text


# the command

ROWS = [{"prompt": "(47+9)%10", "id": "first"}, {"problem": "((80+4)*7)%10", "max_new_tokens": 5,
                                                 "answer": "8"},
        {"messages": [{"role": "user", "content": "(63+5)%10"}], "id": 7},
        {"tokens": [0, 2, 14, 15]},]
SETTINGS = ("--seed", "1", "--max-new-tokens", "40")


def write(path, rows=ROWS):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def run(*argv, model="tiny"):
    generate_command.run(["--model", model, *argv], "effreason generate")


def printed(capsys, *argv):
    run(*argv)
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def tiny():
    return open_pretrained("tiny", dtype="float32")


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The lines of --json with two samples of each prompt."""
    directory = tmp_path_factory.mktemp("whole")
    run("--prompts", write(directory / "rows.jsonl"), "--output", str(directory / "out.jsonl"),
        "--samples", "2", *SETTINGS)
    return [json.loads(line) for line in (directory / "out.jsonl").read_text().splitlines()]


def test_json_lines_stand_in_the_order_of_the_file(whole, tiny):
    assert [(line["id"], line["sample"]) for line in whole] == [
        (name, sample) for name in ("first", 2, 7, 4) for sample in (0, 1)]
    prompts = ["(47+9)%10", "((80+4)*7)%10", "(63+5)%10"]
    rendered = [tiny.tokenizer.apply_chat_template([{"role": "user", "content": text}],
                                                   tokenize=False, add_generation_prompt=True)
                for text in prompts]
    read = [*(tiny.tokenizer(text)["input_ids"] for text in rendered), ROWS[3]["tokens"]]
    params = load_weights(tiny)
    expected = generate.generate(params, read, config=tiny.decoder, max_new_tokens=[40, 5, 40, 40],
                                 samples=2, seed=1, sampling=SamplingParams(temperature=1.0,
                                                                            eos_ids=tiny.eos_ids))
    for line, response, prompt in zip(whole, sum(expected, []),
                                      [each for each in read for _ in range(2)], strict=True):
        assert line.keys() == {"id", "sample", "tokens", "text", "logprobs", "model_logprobs",
                               "finish", "prompt_tokens"}
        assert line["tokens"] == response.tokens.tolist() and line["finish"] == response.finish
        assert line["text"] == tiny.tokenizer.decode(response.tokens, skip_special_tokens=True)
        assert line["prompt_tokens"] == len(prompt)
        for name, values in (("logprobs", response.sampling_logprobs),
                             ("model_logprobs", response.model_logprobs)):
            np.testing.assert_allclose(line[name], values, atol=2e-5)


def test_drafts_change_no_token(rows, whole, capsys):
    found = [json.loads(line) for line in printed(
        capsys, "--prompts", rows, "--json", "--samples", "2", "--draft-tokens", "6",
        *SETTINGS).splitlines()]
    assert [line["tokens"] for line in found] == [line["tokens"] for line in whole]


def test_blocks_and_json_on_standard_output(rows, whole, capsys):
    lines = [json.loads(line) for line in printed(capsys, "--prompts", rows, "--json",
                                                  *SETTINGS).splitlines()]
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in whole[::2]]
    blocks = printed(capsys, "--prompts", rows, *SETTINGS)
    for line in lines:
        count = len(line["tokens"])
        assert (f"--- id {line['id']}, sample 0: {count} tokens, finish "
                f"{line['finish']}\n{line['text']}\n\n") in blocks


def test_log_probs_are_written_as_the_shortest_decimals_of_a_float32(capsys):
    [line] = [json.loads(printed(capsys, "--prompt", "(4+3)%10", "--json", "--temperature", "0"))]
    assert line["logprobs"] == [0.0] * len(line["tokens"])  # greedy: nothing else could be drawn
    assert all(float(np.float32(value)) != value or value == 0 for value in line["model_logprobs"])
    assert max(len(str(value)) for value in line["model_logprobs"]) < 18


def test_a_prompt_is_streamed_to_the_text_that_a_file_gets(capsys, whole):
    run("--prompt", "(47+9)%10", "--samples", "2", *SETTINGS)
    out, errors = capsys.readouterr()
    assert out == whole[0]["text"] + "\n" + whole[1]["text"] + "\n"
    summaries = errors.splitlines()
    assert summaries[0].startswith(f"sample 0: {len(whole[0]['tokens'])} tokens, ")
    assert summaries[1].endswith(f"finish {whole[1]['finish']}")


def test_stop_ids_end_a_response(capsys, tiny):
    row = json.loads(printed(capsys, "--prompt", "(47+9)%10", "--json", "--temperature", "0",
                             "--stop-ids", "</think>"))
    stop = tiny.tokenizer.convert_tokens_to_ids("</think>")
    assert row["finish"] == "eos" and row["tokens"].index(stop) == len(row["tokens"]) - 1


def test_raw_text_gets_the_tokenizers_own_bos_and_no_template(capsys, tiny):
    text = "(47+9)%10"
    told = json.loads(printed(capsys, "--prompt", text, "--raw", "--json", "--max-new-tokens", "2"))
    assert told["prompt_tokens"] == len(tiny.tokenizer(text)["input_ids"])


@pytest.mark.parametrize(("line", "message"), [
    ("{", "not valid JSON"), ("5", "expected JSONL, one object a line, found int"),
    ('{"text": "x"}', "expected one of the fields prompt, problem, messages, tokens, found 'text'"),
    ('{"prompt": "x", "problem": "x"}', "found prompt and problem"),
    ("{}", "found an empty object"),
    ('{"prompt": 5}', "prompt must be a text or null, got 5"),
    ('{"prompt": " "}', "prompt: expected a prompt, found nothing"),
    ('{"prompt": "\\ud800"}', "which is no character"),
    ('{"messages": []}', "messages: expected a prompt, found nothing"),
    ('{"messages": [{"role": "user"}]}', "messages.0.content must be a text, got no content"),
    ('{"tokens": [1, true]}', "tokens.1 must be a whole number >= 0, got true"),
    ('{"tokens": []}', "tokens: expected a prompt, found nothing"),
    ('{"tokens": [-1]}', "tokens.0 must be a whole number >= 0, got -1"),
    ('{"prompt": "x", "id": null}', "id must be a text or a whole number, got null"),
    ('{"prompt": "x", "max_new_tokens": 0}',
     "max_new_tokens must be a whole number in [1, 2147483647] or null, got 0"),
    # These need the tokenizer.
    ('{"tokens": [40]}', "tokens must be below the model's vocabulary, 40, found 40"),
    ('{"prompt": "1", "max_new_tokens": 1024}', "together at most the model's 1,024 positions"),
])
def test_a_bad_row_is_told_before_the_weights_are_read(tmp_path, capsys, monkeypatch, line,
                                                       message):
    monkeypatch.setattr(streaming, "load_weights", None)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + line + "\n")
    with pytest.raises(UserError) as caught:
        run("--prompts", str(path), "--output", str(tmp_path / "out.jsonl"))
    assert str(caught.value).startswith(f"{path}:3: "[:-2]) and message in str(caught.value)
    assert capsys.readouterr().out == "" and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(("argv", "message"), [
    (["--prompt", ""], "--prompt: expected a prompt, found nothing"),
    (["--prompts", "none"], "none: cannot be read"),
    (["--prompt", "x", "--prompts", "y"], "not allowed with argument"),
    (["--top-p", "0"], r"number in \(0, 1\]"),
    (["--temperature", "-1"], "--temperature: invalid number, 0 or >= 0.001"),
    (["--samples", "0"], "positive integer"),
    (["--template-arguments", "thinking"], "--template-arguments: must be a mapping such as"),
    (["--template-arguments", "{"], "--template-arguments: must be a mapping such as"),
    (["--template-arguments", "{1: 2}"], "--template-arguments: must be a mapping such as"),
    (["--raw", "--system-prompt", "x"], "--raw uses no chat template"),
    (["--output", "/nowhere/out"], "cannot write into the directory /nowhere"),
    (["--revision", "main"], "--revision is for a model on the Hub"),
    (["--top", "1"], "unrecognized arguments"),
    (["--raw", "--template", "r1"], "not allowed with argument"),
])
def test_mistakes_on_the_command_line(argv, message, monkeypatch):
    monkeypatch.setattr(streaming, "Session", None)
    with pytest.raises(UserError, match=message):
        run(*argv)


@pytest.mark.parametrize(("argv", "message"), [
    (["--template", "r2"], "--template must be null, r1, r1_think, default or a file, got 'r2'"),
    (["--template-arguments", "{tokenize: true}"], "--template-arguments must be variables"),
    (["--system-prompt", "Be brief."], "--system-prompt: the template the checkpoint's own leaves"),
])
def test_a_template_that_cannot_be_used(argv, message):
    with pytest.raises(UserError, match=message):
        run("--prompt", "x", *argv)


SYSTEM = ("{{ bos_token }}{% for message in messages %}{{ message['role'][0] ~ message['content'] "
          "~ style }}{% endfor %}")


def test_system_prompt_and_arguments_reach_the_prompt(tmp_path):
    (tmp_path / "t.jinja").write_text(SYSTEM)
    argv = ["--model", "tiny", "--prompt", "x", "--template", str(tmp_path / "t.jinja"),
            "--system-prompt", "1+1", "--template-arguments", "{style: '='}"]
    session = streaming.Session(generate_command._parser("generate").parse_args(argv))
    own = Message("system", "2"), Message("user", "3")
    for prompt, text in ((Prompt(name=0, place="", text="5"), "s1+1=u5="),
                         (Prompt(name=0, place="", messages=[own[1]]), "s1+1=u3="),
                         (Prompt(name=0, place="", messages=list(own)), "s2=u3=")):
        tokens = session.read(prompt).tokens
        assert list(tokens) == session.pretrained.tokenizer(
            session.pretrained.tokenizer.bos_token + text, add_special_tokens=False)["input_ids"]


def test_messages_without_a_template(rows):
    with pytest.raises(UserError, match=f"{rows}:3: messages need a chat template"):
        run("--prompts", rows, "--raw")


@pytest.mark.parametrize(("name", "message"), [("absent", "does not exist"),
                                               ("rows.jsonl", "is a file"),
                                               (".", "holds no config.json")])
def test_a_model_that_is_none(tmp_path, rows, name, message):
    with pytest.raises(UserError, match=message):
        run("--prompt", "x", model=str(tmp_path / name))


def test_nothing_is_overwritten(tmp_path, rows):
    with pytest.raises(UserError, match="rows.jsonl exists already, nothing is overwritten"):
        run("--prompts", rows, "--output", rows)
    assert json.loads(Path(rows).read_text().splitlines()[0]) == ROWS[0]


def test_a_signal_ends_it_with_what_has_finished(tmp_path, rows, whole, monkeypatch):
    look = streaming._Speed.look

    def looked(self, tokens):
        look(self, tokens)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(streaming._Speed, "look", looked)
    output = tmp_path / "out.jsonl"
    with pytest.raises(Interrupted) as stop:        # after the first chunk, of 16 tokens
        run("--prompts", rows, "--output", str(output), "--samples", "2", *SETTINGS)
    finished = [(line["id"], line["sample"]) for line in whole if len(line["tokens"]) <= 16]
    assert 0 < len(finished) < len(whole)
    assert [(row["id"], row["sample"]) for row in map(json.loads,
                                                      output.read_text().splitlines())] == finished
    assert stop.value.signum == signal.SIGTERM
    assert stop.value.message == f"stopped by SIGTERM: {len(finished)} of 8 responses are written"


def test_mistakes_are_told_before_jax_is_imported(tmp_path):
    program = ("import sys; from effreason.cli import generate; from "
               "effreason.runtime.errors import UserError\n"
               "try: generate.run(sys.argv[1:], 'x')\n"
               "except UserError as error: print(error, sorted({'jax', "
               "'transformers'} & sys.modules.keys()))")
    path = write(tmp_path / "rows.jsonl", [{"prompt": 5}])
    done = subprocess.run([sys.executable, "-c", program, "--model", "tiny", "--prompts", path],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{path}:1: prompt must be a text or null, got 5 []\n", done.stderr


def test_each_line_typed_is_a_prompt_until_an_empty_one(whole, capsys, monkeypatch):
    lines, looks = iter(["(47+9)%10", "1" * 2000, "(47+9)%10", ""]), []
    look = streaming._Speed.look

    def looked(self, tokens):
        look(self, tokens)
        looks.append(tokens)
        # the second response has begun: Ctrl-C ends it alone
        if len(looks) > 1 and tokens <= looks[-2]:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(streaming._Speed, "look", looked)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    run(*SETTINGS)
    out, errors = capsys.readouterr()
    # the first line typed has the same key as a file's first row
    assert out.startswith(whole[0]["text"] + "\n")
    summary, refused, stopped = errors.splitlines()
    assert summary.startswith(f"{len(whole[0]['tokens'])} tokens, ")
    assert refused.startswith("error: prompt: a prompt of 2,005 tokens and 40 new ones")
    assert stopped.startswith("stopped by SIGINT after ")
    assert next(lines, None) is None


@pytest.mark.slow
def test_what_a_terminal_shows(whole):
    program = "import sys; from effreason.cli import generate; generate.run(sys.argv[1:], 'x')"
    terminal, inner = pty.openpty()
    argv = [sys.executable, "-c", program, "--model", "tiny", *SETTINGS]
    environment = os.environ | {"TERM": "xterm", "XLA_FLAGS": ""}
    with subprocess.Popen(argv, cwd=ROOT, env=environment, stdin=inner, stdout=inner,
                          stderr=inner) as child:
        os.close(inner)
        out, turns, end = b"", ["(47+9)%10\n", "\n"], time.monotonic() + 60
        while child.poll() is None and time.monotonic() < end:
            if select.select([terminal], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):      # closed
                    out += os.read(terminal, 65536)
            if turns and out.endswith(b"> "):
                os.write(terminal, turns.pop(0).encode())
                out += b"|"
        child.kill()
    assert child.returncode == 0, out
    # The dim line "reading the prompt" is cleared before the text, and the cursor is shown again.
    text, _, rest = out.decode().partition("|")[2].rpartition("\x1b[?25h")[2].partition("\r\n")
    assert text.endswith(f"\x1b[2K{whole[0]['text']}")
    assert rest.startswith(f"\x1b[2m{len(whole[0]['tokens'])} tokens, ") and rest.count("\n") <= 3


# real checkpoints


def real(name):
    if not (place_ := os.environ.get("EFFREASON_REAL")):
        pytest.skip(f"EFFREASON_REAL is not set: the directory that holds {name}")
    directory = Path(place_) / name
    reference = ROOT.parent / "shared" / "real" / "reference" / f"{name}.npz"
    if not (directory / "config.json").exists() or not reference.exists():
        pytest.skip(f"{directory} holds no checkpoint, or {reference} is not there")
    with np.load(reference) as arrays:
        return str(directory), dict(arrays), json.loads(
            reference.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.real
def test_greedy_tokens_of_a_real_checkpoint_are_those_of_transformers(tmp_path, capsys):
    directory, reference, told = real("smollm2-135m-instruct")
    path = write(tmp_path / "rows.jsonl", [{"prompt": prompt["problem"]}
                                           for prompt in told["prompts"]])
    run("--prompts", path, "--json", "--temperature", "0", "--dtype", "float32", "--max-new-tokens",
        str(told["new_tokens"]), model=directory)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(told["prompts"])
    for place_, line in enumerate(lines):
        expected = reference[f"{place_}_greedy_ids"]
        assert line["prompt_tokens"] == len(reference[f"{place_}_input_ids"])
        assert line["tokens"] == expected[: len(line["tokens"])].tolist()
        assert line["finish"] == "eos" or len(line["tokens"]) == len(expected)
        logprobs = reference[f"{place_}_greedy_logprobs"][: len(line["tokens"])]
        np.testing.assert_allclose(line["model_logprobs"], logprobs, atol=2e-3)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct",
                                  "r1-distill-qwen-tokenizer"])
def test_real_tokenizers_show_whole_characters(name):
    place_ = os.environ.get("EFFREASON_REAL")
    if not place_ or not (Path(place_) / name / "tokenizer.json").exists():
        pytest.skip(f"no tokenizer of {name} under EFFREASON_REAL")
    tokenizer = load_tokenizer(Path(place_) / name)
    text = "Zürich: 新年快乐, नमस्ते, 🙂👩‍👩‍👧, ∑x² ≤ ½.\n\n  def f():\n\treturn 1" * 12
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) > 2 * generate.WINDOW
    parts = shown(tokenizer, [*tokens, tokenizer.eos_token_id], [1])
    assert "".join(parts) == text and not any("\ufffd" in part for part in parts)
