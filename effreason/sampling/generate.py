"""Responses to prompts, for programs of your own: one function round the sampling engine, and text as it grows."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from effreason.lm import model
from effreason.runtime import sharding
from effreason.sampling import engine
from effreason.sampling.draws import SamplingParams
from effreason.sampling.engine import Request
from effreason.types import Response

UNSETTLED = "\ufffd"                # what decoders put for bytes that are no character, or not yet
BYTE = re.compile("<0x[0-9A-F]{2}>")   # a token that is one byte
WINDOW, CONTEXT = 128, 16           # tokens decoded again at each look, and how many stay when older ones are let go


def generate(params: model.Params, prompts: Sequence[Sequence[int] | np.ndarray], *, config: model.DecoderConfig,
             sampling: SamplingParams, max_new_tokens: int | Sequence[int], samples: int = 1, seed: int = 0,
             uids: Sequence[int] | None = None, mesh: Mesh | None = None, sampler: engine.Sampler | None = None,
             slots: int = 64, chunk: int = 16) -> list[list[Response]]:
    r"""Responses to prompts, in the order of the prompts: `generate(...)[prompt][sample]`.

    The samples of a prompt share one reading of it. The key of each token is made of the seed, the prompt's uid, the
    sample and the position: a response stays the same among other prompts, and with more samples, but for the rounding
    of float sums.

    >>> from effreason.sampling.generate import generate
    >>> from effreason.lm.hf.pretrained import load_weights, open_pretrained
    >>> from effreason.sampling.draws import SamplingParams
    >>> tiny = open_pretrained("tiny", dtype="float32")
    >>> prompt = tiny.tokenizer("<｜begin▁of▁sentence｜><｜User｜>(47+9)%10<｜Assistant｜><think>\n")["input_ids"]
    >>> greedy = SamplingParams(temperature=0.0, eos_ids=tiny.eos_ids)
    >>> [[response]] = generate(load_weights(tiny), [prompt], config=tiny.decoder,
    ...                         sampling=greedy, max_new_tokens=200)
    >>> tiny.tokenizer.decode(response.tokens[-11:])
    '</think>\\boxed{6}<｜end▁of▁sentence｜>'
    >>> response.finish, len(response.tokens), response.model_logprobs.shape
    ('eos', 105, (105,))

    Args: params, as load_weights or a training's state has them; prompts, P lists of token ids; max_new_tokens, for
        all prompts or one for each; samples, responses to each prompt; uids int[P] in [0, 2**31), the prompts' places
        where None; mesh, over all devices where None, with the responses split over them; slots, responses in flight;
        chunk, decode steps between two looks at what has finished; sampler, of rollouts.make_sampler, with which
        repeated calls compile nothing: params are then to lie on its mesh, and mesh, slots and chunk say nothing.
    Returns: records.Response, P lists of `samples`.
    Raises: ValueError for prompts, limits or uids that cannot be."""
    requests = make_requests(prompts, max_new_tokens, samples=samples, uids=uids, vocabulary=config.vocabulary)
    if sampler is None:
        mesh = sharding.make_mesh(data=-1) if mesh is None else mesh
        params = sharding.to_device(params, sharding.tree_sharding(mesh, model.logical_axes(config)))
        sampler = engine.make_sampler(config, mesh, slots=slots, chunk=chunk)
    generation = sampler(params, requests, jax.random.key(seed), sampling)
    responses = {(response.prompt, response.sample): response for finished in generation for response in finished}
    return [[responses[prompt, sample] for sample in range(samples)] for prompt in range(len(prompts))]


def make_requests(prompts: Sequence[Sequence[int] | np.ndarray], max_new_tokens: int | Sequence[int], *, samples: int,
                  vocabulary: int, uids: Sequence[int] | None = None) -> list[Request]:
    """What the sampler is asked for, prompt by prompt; see `generate`. Raises: ValueError."""
    count = len(prompts)
    limits = [max_new_tokens] * count if isinstance(max_new_tokens, int | np.integer) else list(max_new_tokens)
    names = list(range(count)) if uids is None else list(uids)
    if len(limits) != count or len(names) != count:
        raise ValueError(f"expected {count} max_new_tokens and uids, as there are prompts, got {len(limits)} and "
                         f"{len(names)}")
    if samples < 1 or min(limits, default=1) < 1:
        raise ValueError(f"samples and max_new_tokens must be at least 1, got {samples} and {min(limits, default=1)}")
    if not all(0 <= uid < 2**31 for uid in names):
        raise ValueError(f"uids must be in [0, 2**31), got {min(names)} to {max(names)}")
    requests = []
    for place, prompt in enumerate(prompts):
        tokens = np.asarray(prompt)
        if tokens.ndim != 1 or not len(tokens) or tokens.dtype.kind not in "iu":
            raise ValueError(f"prompt {place} must be a list of token ids, got shape {tokens.shape}, {tokens.dtype}")
        if not 0 <= tokens.min() <= tokens.max() < vocabulary:
            raise ValueError(f"prompt {place}: token ids must be in [0, {vocabulary}), got {tokens.min()} to "
                             f"{tokens.max()}")
        requests += [Request(prompt=place, tokens=tokens.astype(np.int32), uid=names[place], sample=sample,
                             max_new_tokens=int(limits[place])) for sample in range(samples)]
    return requests


class TextStream:
    """The text of a response while it grows, each character once: only what later tokens cannot change any more.

    A character may be spread over several tokens. Byte-level tokenizers show U+FFFD until it is whole; those that fall
    back to tokens for single bytes decide on a whole run of these, so a run is held back until another token ends it.
    Only the newest tokens are decoded again, with a few before them, since some decoders drop a first space."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._start = 0                 # tokens before this one are not looked at any more
        self._shown = 0                 # characters behind `_start` that have been returned

    def more(self, tokens: np.ndarray, *, over: bool) -> str:
        """What has been added to the text. Args: tokens int32[T'], all so far; over, there will be no more."""
        end = len(tokens)
        while not over and end > self._start and self._is_open(int(tokens[end - 1])):
            end -= 1
        text = decode(self._tokenizer, tokens[self._start : end])
        settled = text if over else text.rstrip(UNSETTLED)
        added = settled[self._shown :]
        self._shown = max(self._shown, len(settled))
        if end - self._start > WINDOW and settled == text:
            kept = decode(self._tokenizer, tokens[end - CONTEXT : end])
            if kept and not kept.endswith(UNSETTLED):       # not only special tokens, which leave no text
                self._start, self._shown = end - CONTEXT, len(kept)
        return added

    def _is_open(self, token: int) -> bool:
        """Whether a run of bytes may go on behind it: it is one, or it leaves no text."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        return BYTE.fullmatch(name or "") is not None or token in self._special


def decode(tokenizer: Any, tokens: np.ndarray) -> str:
    """The text of response tokens, without special tokens such as EOS; think tags are ordinary ones and stay."""
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
