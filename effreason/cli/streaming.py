"""`effreason generate` after its options are checked: a model and its responses, as they grow.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from effreason.cli.prompt_files import NEW_TOKENS, Prompt
from effreason.data import templates
from effreason.evaluation import models
from effreason.lm import model
from effreason.lm.hf.pretrained import load_weights, open_pretrained
from effreason.runtime import sharding
from effreason.runtime.config import DataConfig, MeshConfig
from effreason.runtime.errors import Interrupted, UserError
from effreason.runtime.files import disk
from effreason.runtime.progress import rate, say
from effreason.runtime.signals import Interrupts
from effreason.sampling import engine
from effreason.sampling.draws import SamplingParams
from effreason.sampling.generate import TextStream, decode
from effreason.sampling.scheduler import make_requests
from effreason.types import Response

STREAM_CACHE = 2048                 # positions of a stream's first cache: no pause to compile more
# Control characters could do anything to a terminal; tabs and line ends are harmless.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, kw_only=True)
class TokenizedPrompt:
    """A prompt as the model reads it."""

    prompt: Prompt
    tokens: np.ndarray              # int32[S']
    max_new_tokens: int


class Session:
    """A model that responds to prompts: its tokenizer at first, its weights after `load`.

    Raises: UserError if the model or the template cannot be used."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        # Whatever FORCE_COLOR says: a pipe must not get a moving line.
        self.console = Console(stderr=True, force_terminal=os.isatty(2))
        dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        self.template: templates.Template | None = None         # None: texts are read unchanged

        try:
            self._open(dtype)
            template = options.template or (None if options.raw else self._own_template)
            chosen = (template, options.template_arguments, options.system_prompt)
            if (any(option is not None for option in chosen)
                    or self.pretrained.tokenizer.chat_template and not options.raw):
                data = DataConfig(template=template, user_prompt="{problem}",
                                  template_arguments=options.template_arguments,
                                  system_prompt=options.system_prompt)
                self.template = templates.choose(self.pretrained.tokenizer, data)
        except UserError as error:
            raise UserError(_with_options(str(error))) from None

        if self.template is None and not options.raw:
            say(f"{options.model} has no chat template: prompts are read unchanged", self.console)
        notes = [] if self.template is None else [
            *self.template.notes, *templates.turn_end_notes(
                self.pretrained.tokenizer, self.template, self.pretrained.eos_ids)]
        for note in [*self.pretrained.notes, *notes]:
            say(_with_options(note), self.console)

    def _open(self, dtype: str) -> None:
        """Opens the model without its weights. Raises: UserError."""
        options = self.options
        self._trained, self._own_template = None, None      # a run's model, and its template
        if (checkpoint := models.find_checkpoint(options.model)) is None:
            self.pretrained = open_pretrained(options.model, revision=options.revision, dtype=dtype,
                                              stop_ids=options.stop_ids)
            return
        self._trained = models.open_trained(checkpoint, dtype=dtype, stop_ids=options.stop_ids)
        self.pretrained = self._trained.pretrained
        self._own_template = self._trained.config.data.template

    def read(self, prompt: Prompt) -> TokenizedPrompt:
        """Tokenizes a prompt. Raises: UserError if the model cannot read it or has no room."""
        tokens, positions = self._tokens(prompt), self.pretrained.max_positions
        room = positions - len(tokens)
        limit = prompt.max_new_tokens or self.options.max_new_tokens
        limit = limit or max(min(NEW_TOKENS, room), 1)
        if max(tokens, default=0) >= (vocabulary := self.pretrained.decoder.vocabulary):
            raise UserError(f"{prompt.place}: tokens must be below the model's vocabulary, "
                            f"{vocabulary}, found {max(tokens)}")
        if not len(tokens) or limit > room:
            raise UserError(f"{prompt.place}: a prompt of {len(tokens):,} tokens and {limit:,} new "
                            f"ones, expected at least 1 and together at most the model's "
                            f"{positions:,} positions")
        return TokenizedPrompt(prompt=prompt, tokens=np.array(tokens, np.int32),
                               max_new_tokens=limit)

    def _tokens(self, prompt: Prompt) -> list[int]:
        tokenizer = self.pretrained.tokenizer
        if prompt.tokens is not None:
            return prompt.tokens

        if self.template is None:
            if prompt.text is None:
                raise UserError(f"{prompt.place}: messages need a chat template; name one with "
                                "--template")
            # The tokenizer adds its BOS, unless the text begins with it.
            has_bos = (tokenizer.bos_token is not None
                       and prompt.text.startswith(tokenizer.bos_token))
            return tokenizer(prompt.text, add_special_tokens=not has_bos,
                             verbose=False)["input_ids"]

        if prompt.messages is None:
            messages = self.template.messages(prompt.text or "")
        else:
            messages = [asdict(message) for message in prompt.messages]
            if messages[0]["role"] != "system":
                messages = [*self.template.system_turn(), *messages]
        try:
            text, = templates.render_messages(tokenizer, self.template, [messages])
        except UserError as error:      # a template may refuse a role, or do anything else
            raise UserError(f"{prompt.place}: {_with_options(str(error))}") from None
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def load(self, prompts: Sequence[TokenizedPrompt] | None, chunk: int) -> None:
        """Reads the weights and builds the sampler.

        Args: prompts, all of them if they are known and not streamed. Raises: UserError."""
        sharding.use_compilation_cache()
        mesh, decoder = sharding.make_mesh(data=-1), self.pretrained.decoder

        with self.console.status("reading the weights"):
            if self._trained is None:
                self._params = load_weights(
                    self.pretrained, sharding.tree_sharding(mesh, model.logical_axes(decoder)))
            else:
                self._params = self._trained.reader(mesh, MeshConfig())(
                    self._trained.checkpoint.alpha)
        longest = self.pretrained.max_positions
        if prompts is not None:
            longest = max(len(prompt.tokens) + prompt.max_new_tokens for prompt in prompts)
        try:
            self._sampler = engine.make_sampler(
                decoder, mesh, slots=self.options.slots, chunk=chunk, max_positions=longest,
                min_positions=STREAM_CACHE if prompts is None else None,
                draft_tokens=self.options.draft_tokens)
        except UserError as error:
            raise UserError(_with_options(str(error))) from None

    def start(self, prompts: Sequence[TokenizedPrompt],
              uids: Sequence[int] | None = None) -> engine.Generation:
        """Starts to generate all samples for all prompts."""
        options = self.options
        sampling = SamplingParams(temperature=options.temperature, top_p=options.top_p,
                                  top_k=options.top_k, min_p=options.min_p,
                                  eos_ids=self.pretrained.eos_ids)
        requests = make_requests([prompt.tokens for prompt in prompts], options.samples,
                                 [prompt.max_new_tokens for prompt in prompts], uids=uids,
                                 vocabulary=self.pretrained.decoder.vocabulary)
        return self._sampler(self._params, requests, jax.random.key(options.seed), sampling)


def _with_options(text: str) -> str:
    """Returns a message with this command's options in place of the fields of other commands."""
    for field in ("template_arguments", "template", "system_prompt"):
        text = text.replace(f"data.{field}", f"--{field.replace('_', '-')}")
    return (text.replace("model.revision", "--revision")
            .replace("rollout.draft_tokens", "--draft-tokens")
            .replace("--rollout.stop_ids", "--stop-ids").replace("rollout.stop_ids", "--stop-ids"))


def converse(session: Session) -> None:
    """Responds to each line typed, until an empty one; Ctrl-C stops a response or the program."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  makes lines editable
    count = 0

    while True:
        try:
            line = input("> ")
        except EOFError:
            _write("\n")
            return
        except UnicodeDecodeError:
            say("not UTF-8", session.console)
            continue
        if not line.strip():
            return

        try:
            prompt = session.read(Prompt(name=count, place="prompt", text=line))
            stream(session, prompt, uid=count)
        except UserError as error:
            say(f"error: {error}", session.console)
        except Interrupted as stop:
            if stop.signum != signal.SIGINT:
                raise
            _say_dim(stop.message, session.console)
        count += 1


def stream(session: Session, prompt: TokenizedPrompt, uid: int = 0) -> None:
    """Shows the responses to a prompt as they grow, one after the other. Raises: Interrupted."""
    samples, speed = session.options.samples, _Speed()
    streams = [TextStream(session.pretrained.tokenizer) for _ in range(samples)]
    done: dict[int, Response] = {}
    current, newline = 0, True          # the sample shown; whether the output ends in a newline

    with Interrupts() as interrupts, session.console.status("reading the prompt") as status:

        def put(text: str) -> None:
            nonlocal newline
            if text:
                status.stop()           # rich redirects standard output while it shows a status
                _write(text)
                newline = text.endswith("\n")

        generation = session.start([prompt], [uid])
        for finished in generation:
            done |= {response.sample: response for response in finished}
            growing = {response.sample: response for response in generation.unfinished()} | done
            speed.look(generation.tokens)
            while current in growing:
                response = growing[current]
                put(streams[current].update(response.tokens, final=current in done,
                                            ended=response.ended))
                if current not in done:
                    break
                put("" if newline else "\n")
                status.stop()
                _say_dim(_summary(done[current], speed, generation.tokens, samples),
                         session.console)
                current += 1
            try:
                interrupts.check()
            except Interrupted as stop:
                put("" if newline else "\n")
                raise Interrupted(stop.signum, f"{stop.message} after {generation.tokens:,} tokens"
                                  ) from None


def _summary(response: Response, speed: "_Speed", tokens: int, samples: int) -> str:
    """Describes a response in one line. Args: tokens, of all samples so far."""
    label, together = (f"sample {response.sample}: ", " together") if samples > 1 else ("", "")
    return (f"{label}{len(response.tokens):,} tokens, {speed.rate(tokens)} tokens/s{together}, the "
            f"first after {speed.first_seconds:.1f} s, finish {response.finish}")


def write_all(session: Session, prompts: Sequence[TokenizedPrompt]) -> None:
    """Writes all responses in the order of the prompts, each as soon as those before it are done.

    Raises: Interrupted, after writing the finished ones."""
    options, speed, samples = session.options, _Speed(), session.options.samples
    total = len(prompts) * samples
    order = iter([(prompt, sample) for prompt in range(len(prompts)) for sample in range(samples)])
    due: tuple[int, int] | None = next(order)
    waiting: dict[tuple[int, int], Response] = {}
    finishes: Counter[str] = Counter()
    form = _json_line if options.json or options.output else _block

    with (Interrupts() as interrupts, _sink(options.output) as write,
          session.console.status("starting") as status):

        def put(response: Response) -> None:
            status.stop()
            write(form(prompts[response.prompt], response, session.pretrained.tokenizer))

        generation = session.start(prompts)
        try:
            for finished in generation:
                for response in finished:
                    waiting[response.prompt, response.sample] = response
                    finishes[str(response.finish)] += 1
                while due in waiting:
                    put(waiting.pop(due))
                    due = next(order, None)
                speed.look(generation.tokens)
                status.update(f"{generation.finished}/{total} responses  "
                              f"{speed.rate(generation.tokens)} tokens/s  "
                              f"{generation.running} running  {generation.waiting} waiting")
                status.start()
                interrupts.check()
        except Interrupted as stop:
            for name in sorted(waiting):
                put(waiting[name])
            raise Interrupted(stop.signum, f"{stop.message}: {generation.finished} of {total} "
                              "responses are written") from None

    ends = ", ".join(f"{finish} {count}" for finish, count in sorted(finishes.items()))
    _say_dim(f"{total} responses, {generation.tokens:,} tokens, {speed.rate(generation.tokens)} "
             f"tokens/s, the first after {speed.first_seconds:.1f} s; finish: {ends}",
             session.console)


def _json_line(prompt: TokenizedPrompt, response: Response, tokenizer: Any) -> str:
    def shortest(values: np.ndarray) -> list[float]:
        # The shortest decimals that are the same float32; adding 0 turns -0.0 into 0.0.
        return [float(str(value)) for value in values + np.float32(0)]

    return json.dumps({"id": prompt.prompt.name, "sample": response.sample,
                       "tokens": response.tokens.tolist(),
                       "text": decode(tokenizer, response.tokens, ended=response.ended),
                       "logprobs": shortest(response.sampling_logprobs),
                       "model_logprobs": shortest(response.model_logprobs),
                       "finish": response.finish, "prompt_tokens": len(prompt.tokens)}) + "\n"


def _block(prompt: TokenizedPrompt, response: Response, tokenizer: Any) -> str:
    text = decode(tokenizer, response.tokens, ended=response.ended)
    return (f"--- id {prompt.prompt.name}, sample {response.sample}: {len(response.tokens):,} "
            f"tokens, finish {response.finish}\n{text}\n\n")


class _Speed:
    """Tokens per second after the first ones, which wait for the compilation."""

    def __init__(self) -> None:
        self._started = self._first = self._now = time.perf_counter()
        self._first_tokens = 0

    @property
    def first_seconds(self) -> float:
        """Seconds until the first tokens."""
        return self._first - self._started

    def look(self, tokens: int) -> None:
        """Notes the time; to be called after every chunk."""
        self._now = time.perf_counter()
        if not self._first_tokens:
            self._first, self._first_tokens = self._now, tokens

    def rate(self, tokens: int) -> str:
        """Formats the rate in at most five characters."""
        more, seconds = tokens - self._first_tokens, self._now - self._first
        if not more:
            more, seconds = tokens, self._now - self._started
        return rate(more / max(seconds, 1e-9))


@contextlib.contextmanager
def _sink(path: str | None) -> Iterator[Callable[[str], None]]:
    """Yields the function that writes responses: to a new file, or to standard output."""
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
    """Writes to standard output; escapes control characters on a terminal."""
    if sys.stdout.isatty():
        text = CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)
    print(text, end="", flush=True)


def _say_dim(text: str, console: Console) -> None:
    console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
