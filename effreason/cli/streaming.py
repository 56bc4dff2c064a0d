"""What `effreason generate` does once its options are checked: a model opened, responses to a terminal or a file.

The text of responses goes to standard output, everything else to standard error.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from effreason.cli.prompt_files import NEW_TOKENS, Question
from effreason.data import templates
from effreason.data.files import one_line
from effreason.lm import model
from effreason.lm.hf.pretrained import Pretrained, load_weights, open_pretrained
from effreason.runtime import sharding
from effreason.runtime.config import DataConfig
from effreason.runtime.errors import Interrupted, UserError
from effreason.runtime.files import disk
from effreason.runtime.progress import rate, say
from effreason.runtime.signals import Interrupts
from effreason.sampling import engine
from effreason.sampling.draws import SamplingParams
from effreason.sampling.generate import TextStream, decode, make_requests
from effreason.types import Response

STREAM_CACHE = 2048                 # positions of the first cache of a stream: no pause to compile a larger one
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")         # all but tabs and line ends: they could do anything


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt as the model reads it."""

    question: Question
    tokens: np.ndarray              # int32[S']
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A model but its weights, and how it is to read prompts."""

    options: argparse.Namespace
    pretrained: Pretrained
    template: templates.Template | None         # None: texts are read as they stand
    console: Console                            # standard error

    def read(self, question: Question) -> Asked:
        """Raises: UserError for a prompt that this model cannot read or has no room for."""
        tokens, positions = self._tokens(question), self.pretrained.max_positions
        room = positions - len(tokens)
        limit = question.max_new_tokens or self.options.max_new_tokens or max(min(NEW_TOKENS, room), 1)
        if not len(tokens) or limit > room:
            raise UserError(f"{question.place}: a prompt of {len(tokens):,} tokens and {limit:,} new ones, expected at "
                            f"least 1 and together at most the model's {positions:,} positions")
        return Asked(question=question, tokens=np.array(tokens, np.int32), max_new_tokens=limit)

    def _tokens(self, question: Question) -> list[int]:
        tokenizer, vocabulary = self.pretrained.tokenizer, self.pretrained.decoder.vocabulary
        if question.tokens is not None:
            if max(question.tokens) >= vocabulary:
                raise UserError(f"{question.place}: tokens must be below the model's vocabulary, {vocabulary}, found "
                                f"{max(question.tokens)}")
            return question.tokens
        if self.template is None:
            if question.text is None:
                raise UserError(f"{question.place}: messages need a chat template; --template names one")
            # With the BOS that the tokenizer puts first, unless it stands there.
            has_bos = tokenizer.bos_token is not None and question.text.startswith(tokenizer.bos_token)
            return tokenizer(question.text, add_special_tokens=not has_bos, verbose=False)["input_ids"]
        messages = question.messages or [{"role": "user", "content": question.text or ""}]
        try:
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                                     chat_template=self.template.text)
        except Exception as error:      # a template may refuse a role, or do anything else
            raise UserError(f"{question.place}: the template {self.template.name} cannot be rendered "
                            f"({one_line(error)})") from None
        return tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]


@dataclass(frozen=True, kw_only=True)
class Session:
    """A model ready to generate."""

    reader: Reader
    sampler: engine.Sampler
    params: model.Params
    sampling: SamplingParams

    def start(self, asked: Sequence[Asked], uids: Sequence[int] | None = None) -> engine.Generation:
        """All samples of all prompts, as the options say."""
        options = self.reader.options
        requests = make_requests([each.tokens for each in asked], [each.max_new_tokens for each in asked], uids=uids,
                                 samples=options.samples, vocabulary=self.reader.pretrained.decoder.vocabulary)
        return self.sampler(self.params, requests, jax.random.key(options.seed), self.sampling)


def open_reader(options: argparse.Namespace) -> Reader:
    """Opens a model. Raises: UserError."""
    console = Console(stderr=True, force_interactive=None if os.isatty(2) else False)
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    try:
        pretrained = open_pretrained(options.model, revision=options.revision, dtype=dtype)
        template = None
        if options.template is not None or (pretrained.tokenizer.chat_template and not options.raw):
            data = DataConfig(template=options.template, user_prompt="{problem}")
            template = templates.choose(pretrained.tokenizer, data)
    except UserError as error:
        # Other commands have the same under these names.
        message = str(error).replace("data.template", "--template").replace("model.revision", "--revision")
        raise UserError(message) from None
    if template is None and not options.raw:
        say(f"{options.model} has no chat template: prompts are read as they stand", console)
    elif template is not None and template.note:
        say(template.note.replace("data.template", "--template"), console)
    return Reader(options=options, pretrained=pretrained, template=template, console=console)


def load(reader: Reader, asked: Sequence[Asked] | None, *, chunk: int) -> Session:
    """Reads the weights. Args: asked, all prompts where they are known and are not streamed. Raises: UserError."""
    sharding.use_compilation_cache()
    mesh, options, pretrained = sharding.make_mesh(data=-1), reader.options, reader.pretrained
    with _line(reader.console, "reading the weights"):
        params = load_weights(pretrained, sharding.tree_sharding(mesh, model.logical_axes(pretrained.decoder)))
    longest = pretrained.max_positions if asked is None else max(
        len(each.tokens) + each.max_new_tokens for each in asked)
    sampler = engine.make_sampler(pretrained.decoder, mesh, slots=options.slots, chunk=chunk, positions=longest,
                                    smallest=STREAM_CACHE if asked is None else None)
    sampling = SamplingParams(temperature=options.temperature, top_p=options.top_p, top_k=options.top_k,
                        min_p=options.min_p, eos_ids=pretrained.eos_ids)
    return Session(reader=reader, sampler=sampler, params=params, sampling=sampling)


def converse(session: Session) -> None:
    """Answers each line typed, until an empty one or the end of input; Ctrl-C stops a response, then the program."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lines can be edited from here on
    count = 0
    while True:
        try:
            line = input("> ")
        except EOFError:
            _write("\n")
            return
        except UnicodeDecodeError:
            say("not UTF-8", session.reader.console)
            continue
        if not line.strip():
            return
        try:
            stream(session, session.reader.read(Question(name=count, place="prompt", text=line)), uid=count)
        except UserError as error:
            say(f"error: {error}", session.reader.console)
        except Interrupted as stop:
            if stop.signum != signal.SIGINT:
                raise
            _say_dim(stop.message, session.reader.console)
        count += 1


def stream(session: Session, asked: Asked, uid: int = 0) -> None:
    """Shows the responses to a prompt while they grow, one below the other. Raises: Interrupted."""
    samples, console, speed = session.reader.options.samples, session.reader.console, _Speed()
    streams = [TextStream(session.reader.pretrained.tokenizer) for _ in range(samples)]
    over: dict[int, Response] = {}
    current, last = 0, "\n"             # the sample that is shown, and the last character that has been

    with Interrupts() as interrupts, _line(console, "reading the prompt") as show:

        def put(text: str) -> None:
            nonlocal last
            if text:
                show("")
                _write(text)
                last = text[-1]

        generation = session.start([asked], [uid])
        for finished in generation:
            over |= {response.sample: response for response in finished}
            growing = {response.sample: response for response in generation.unfinished()} | over
            speed.look(generation.tokens)
            while current in growing:
                put(streams[current].more(growing[current].tokens, over=current in over))
                if current not in over:
                    break
                put("" if last == "\n" else "\n")
                show("")
                _say_dim(_summary(over[current], speed, generation.tokens, samples), console)
                current += 1
            try:
                interrupts.check()
            except Interrupted as stop:
                put("" if last == "\n" else "\n")
                raise Interrupted(stop.signum, f"{stop.message} after {generation.tokens:,} tokens") from None


def _summary(response: Response, speed: "_Speed", tokens: int, samples: int) -> str:
    """One line on a response. Args: tokens, of all samples so far."""
    which, together = (f"sample {response.sample}: ", " together") if samples > 1 else ("", "")
    return (f"{which}{len(response.tokens):,} tokens, {speed.rate(tokens)} tokens/s{together}, the first after "
            f"{speed.first_seconds:.1f} s, finish {response.finish}")


def write_all(session: Session, asked: Sequence[Asked]) -> None:
    """Writes all responses in the order of the prompts, each as soon as those before it are there.

    Raises: Interrupted, when what has finished is written."""
    reader, speed = session.reader, _Speed()
    options, total = reader.options, len(asked) * reader.options.samples
    names = iter([(prompt, sample) for prompt in range(len(asked)) for sample in range(options.samples)])
    waiting: dict[tuple[int, int], Response] = {}
    finishes: Counter[str] = Counter()
    due: tuple[int, int] | None = next(names)
    form = _json_line if options.json or options.output else _block
    with Interrupts() as interrupts, _sink(options.output) as write, _line(reader.console, "starting") as show:

        def put(response: Response) -> None:
            if options.output is None and sys.stdout.isatty():
                show("")
            write(form(asked[response.prompt], response, reader.pretrained.tokenizer))

        generation = session.start(asked)
        try:
            for finished in generation:
                waiting |= {(response.prompt, response.sample): response for response in finished}
                finishes.update(str(response.finish) for response in finished)
                while due in waiting:
                    put(waiting.pop(due))
                    due = next(names, None)
                speed.look(generation.tokens)
                show(f"{generation.finished}/{total} responses  {speed.rate(generation.tokens)} tokens/s  "
                     f"{generation.running} running  {generation.waiting} waiting")
                interrupts.check()
        except Interrupted as stop:
            for name in sorted(waiting):
                put(waiting[name])
            raise Interrupted(stop.signum, f"{stop.message}: {generation.finished} of {total} responses are written"
                              ) from None
    ends = ", ".join(f"{finish} {count}" for finish, count in sorted(finishes.items()))
    _say_dim(f"{total} responses, {generation.tokens:,} tokens, {speed.rate(generation.tokens)} tokens/s, the first "
             f"after {speed.first_seconds:.1f} s; finish: {ends}", reader.console)


def _json_line(asked: Asked, response: Response, tokenizer: Any) -> str:
    def shortest(values: np.ndarray) -> list[float]:
        # The shortest decimals that are the same float32; adding 0 turns -0.0 into 0.0.
        return [float(str(value)) for value in values + np.float32(0)]

    return json.dumps({"id": asked.question.name, "sample": response.sample, "tokens": response.tokens.tolist(),
                       "text": decode(tokenizer, response.tokens), "logprobs": shortest(response.sampling_logprobs),
                       "model_logprobs": shortest(response.model_logprobs), "finish": response.finish,
                       "prompt_tokens": len(asked.tokens)}) + "\n"


def _block(asked: Asked, response: Response, tokenizer: Any) -> str:
    return (f"--- id {asked.question.name}, sample {response.sample}: {len(response.tokens):,} tokens, finish "
            f"{response.finish}\n{decode(tokenizer, response.tokens)}\n\n")


class _Speed:
    """Tokens per second from the first ones on: what stands before them is mostly the compilation."""

    def __init__(self) -> None:
        self._started = self._first = self._now = time.perf_counter()
        self._first_tokens = self._tokens = 0

    @property
    def first_seconds(self) -> float:
        """Seconds until the first tokens."""
        return self._first - self._started

    def look(self, tokens: int) -> None:
        """To be called after every chunk."""
        self._now = time.perf_counter()
        if not self._first_tokens:
            self._first, self._first_tokens = self._now, tokens

    def rate(self, tokens: int) -> str:
        """For people, at most five characters."""
        more, seconds = tokens - self._first_tokens, self._now - self._first
        if not more:
            more, seconds = tokens, self._now - self._started
        return rate(more / max(seconds, 1e-9))


@contextlib.contextmanager
def _line(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """A line at the bottom of a terminal, and what replaces it; "" clears it until the next text. Nothing elsewhere."""
    if not console.is_interactive:
        yield lambda text: None
        return
    # Standard output is not redirected to where the line is: it may be a file.
    live = Live(console=console, transient=True, redirect_stdout=False, redirect_stderr=False)

    def show(text: str) -> None:
        if text:
            live.update(Text(text, style="dim", no_wrap=True, overflow="ellipsis"))
            live.start()
        else:
            live.stop()

    show(text)
    try:
        yield show
    finally:
        live.stop()


@contextlib.contextmanager
def _sink(path: str | None) -> Iterator[Callable[[str], None]]:
    """Where responses are written: a new file, or standard output."""
    if path is None:
        yield _write
        return
    try:
        file = open(path, "x", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: {path}: {error.strerror}") from None
    with file, disk(Path(path)):
        yield lambda text: print(text, end="", file=file, flush=True)


def _write(text: str) -> None:
    """Onto standard output as far as it can show it; ends quietly where nobody reads any more."""
    if sys.stdout.isatty():
        text = CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)
    except BrokenPipeError:
        # The interpreter would fail once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _say_dim(text: str, console: Console) -> None:
    console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
