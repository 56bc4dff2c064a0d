"""Responses to prompts for your own programs, and their text while it grows."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from effreason.lm import model
from effreason.lm.architecture import DecoderConfig
from effreason.runtime import sharding
from effreason.sampling.draws import SamplingParams
from effreason.sampling.engine import Sampler, make_sampler
from effreason.sampling.scheduler import Prompt, make_requests
from effreason.types import Response

REPLACEMENT = "\ufffd"              # decoders write it for bytes that are no character, or not yet
BYTE = re.compile("<0x[0-9A-F]{2}>")    # a token that is one byte
WINDOW = 128                        # tokens decoded again for each update
CONTEXT = 16                        # of them, those that stay when older ones are dropped
ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")      # of special tokens in a tokenizer


def generate(params: model.Params, prompts: Sequence[Prompt], *, config: DecoderConfig,
             sampling: SamplingParams, max_new_tokens: int | Sequence[int], samples: int = 1,
             seed: int = 0, uids: Sequence[int] | None = None, mesh: Mesh | None = None,
             sampler: Sampler | None = None, slots: int = 64, chunk: int = 16,
             draft_tokens: int = 0) -> list[list[Response]]:
    r"""Returns responses in the order of the prompts: `generate(...)[prompt][sample]`.

    The samples of a prompt share its prefill. The key of each token depends on the seed, the
    prompt's uid, the sample and the position: a response stays the same among other prompts and
    with more samples, except for rounding of float sums.

    >>> from effreason.sampling.generate import generate
    >>> from effreason.lm.hf.pretrained import load_weights, open_pretrained
    >>> from effreason.sampling.draws import SamplingParams
    >>> tiny = open_pretrained("tiny", dtype="float32")
    >>> prompt = "<｜begin▁of▁sentence｜><｜User｜>(47+9)%10<｜Assistant｜><think>\n"
    >>> greedy = SamplingParams(temperature=0.0, eos_ids=tiny.eos_ids)
    >>> [[response]] = generate(load_weights(tiny), [tiny.tokenizer(prompt)["input_ids"]],
    ...                         config=tiny.decoder, sampling=greedy, max_new_tokens=200)
    >>> tiny.tokenizer.decode(response.tokens[-11:])
    '</think>\\boxed{6}<｜end▁of▁sentence｜>'
    >>> str(response.finish), len(response.tokens), response.model_logprobs.shape
    ('eos', 105, (105,))

    Args:
        params: as `load_weights` or a training state has them.
        prompts: P lists of token ids.
        max_new_tokens: for all prompts, or one for each.
        samples: responses to each prompt.
        uids: int[P] in [0, 2**31); None = the indices of the prompts.
        mesh: the responses are split over its devices; None = all devices.
        sampler: of `make_sampler`, so that repeated calls compile nothing. Then params must be on
            its mesh, and mesh, slots, chunk and draft_tokens are ignored.
        slots: responses in progress.
        chunk: decode steps between two looks at what has finished.
        draft_tokens: guessed ahead when few responses are left, at most; see `speculation`.

    Raises:
        ValueError: for prompts, limits or uids that are not valid.
        UserError: for drafts that the model's layers cannot take back."""
    requests = make_requests(prompts, samples, max_new_tokens, uids=uids,
                             vocabulary=config.vocabulary)
    if sampler is None:
        mesh = sharding.make_mesh(data=-1) if mesh is None else mesh
        axes = model.logical_axes(config)
        params = sharding.to_device(params, sharding.tree_sharding(mesh, axes))
        sampler = make_sampler(config, mesh, slots=slots, chunk=chunk, draft_tokens=draft_tokens)

    generation = sampler(params, requests, jax.random.key(seed), sampling)
    responses = {(response.prompt, response.sample): response
                 for finished in generation for response in finished}
    return [[responses[prompt, sample] for sample in range(samples)]
            for prompt in range(len(prompts))]


class TextStream:
    """The text of a growing response: returns each character once, when it can no longer change.

    A character may be spread over several tokens. Byte-level tokenizers show U+FFFD until it is
    complete; those that fall back to byte tokens decide on a whole run of these, so a run is held
    back until another token ends it. Only the newest tokens are decoded again, with a few before
    them, because some decoders drop a leading space."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._control_ids = control_ids(tokenizer)
        self._start = 0                 # tokens before this one are no longer decoded
        self._returned = 0              # characters after `_start` that have been returned

    def update(self, tokens: Int[np.ndarray, " T"], *, final: bool, ended: bool = False) -> str:
        """Returns the new text.

        Args:
            tokens: all tokens so far.
            final: no more tokens will come.
            ended: see `decode`."""
        end = len(tokens)
        while not final and end > self._start and self._may_continue(int(tokens[end - 1])):
            end -= 1

        text = decode(self._tokenizer, tokens[self._start : end], ended=ended)
        settled = text if final else text.rstrip(REPLACEMENT)
        new = settled[self._returned :]
        self._returned = max(self._returned, len(settled))

        if end - self._start > WINDOW and settled == text:
            context = decode(self._tokenizer, tokens[end - CONTEXT : end])
            # Empty if there are only control tokens, which leave no text.
            if context and not context.endswith(REPLACEMENT):
                self._start, self._returned = end - CONTEXT, len(context)
        return new

    def _may_continue(self, token: int) -> bool:
        """Returns whether a run of bytes may continue after it: it is a byte, or leaves no text."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        return BYTE.fullmatch(name or "") is not None or token in self._control_ids


def decode(tokenizer: Any, tokens: Int[np.ndarray, " T"], *, ended: bool = False) -> str:
    """Returns the text of response tokens, for graders and for people.

    Left out are the tokenizer's control tokens (BOS, EOS, padding, unknown, ...). Other special
    tokens stay: some tokenizers mark </think> or <answer> as special.

    Args: ended, the last token ends the response: it is left out if it is special at all."""
    ids, control = tokens.tolist(), control_ids(tokenizer)
    if ended and ids and not tokenizer.decode(ids[-1:], skip_special_tokens=True):
        ids.pop()
    return tokenizer.decode([token for token in ids if token not in control],
                            skip_special_tokens=False)


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Returns the ids of the special tokens that have a role in the tokenizer."""
    return frozenset(token for role in ROLES
                     if (token := getattr(tokenizer, f"{role}_token_id", None)) is not None)
