"""The records that pass between the stages.

Axis letters, used in every docstring: P prompts, G responses for each prompt (the group), S prompt
slots, T response slots, B = P * G responses, R rows of N positions, D width, V vocabulary, L
layers, K key/value heads, H query heads.
"""

import dataclasses
from enum import StrEnum

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem of a data set, on the host."""

    uid: int                        # stable within the data set, < 2**31; part of the tokens' keys
    prompt: np.ndarray              # int32[S'], the rendered and tokenised prompt, unpadded
    text: str                       # the problem as the data set has it
    reference: str                  # the reference answer; the field `answer` of a data set
    level: str                      # difficulty, "all" if the data set has none
    opens_thinking: bool = False    # the prompt ends in <think>, the response begins inside it
    kind: str = "math"              # how answers are compared: math | choice | text
    choices: tuple[str, ...] = ()   # of kind "choice", the answers A, B, C, ...; () if unknown
    columns: str = ""               # its row, a JSON object; "" = not kept, nothing reads it


class FinishReason(StrEnum):
    """Why a response ended."""

    EOS = "eos"
    """Its last token is an EOS token of the model."""
    LENGTH = "length"
    """It was cut off at the token limit."""
    REPETITION = "repetition"
    """It was stopped because it only repeated itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
    """One response, on the host."""

    prompt: int                     # index into the requested prompts
    sample: int                     # 0..G-1
    tokens: np.ndarray              # int32[T'], through and including EOS
    # Of each token, float32[T']: by the model at the sampling temperature, ...
    logprobs: np.ndarray
    # ... by the distribution it was drawn from (after top-k, top-p, min-p), ...
    sampling_logprobs: np.ndarray
    # ... and by the model at temperature 1.
    model_logprobs: np.ndarray
    finish: FinishReason | None     # None: not finished yet
    repeated: bool = False          # it repeated itself; unless finish is REPETITION, it was not
                                    # stopped, as an audit

    @property
    def ended(self) -> bool:
        """Whether it ended by itself, with EOS."""
        return self.finish == FinishReason.EOS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts:
    """All responses of one step, on the host."""

    prompts: np.ndarray             # int32[P, S], padded on the right
    prompt_lengths: np.ndarray      # int32[P]
    tokens: np.ndarray              # int32[P, G, T], padded on the right
    lengths: np.ndarray             # int32[P, G], tokens through EOS
    logprobs: np.ndarray            # float32[P, G, T], Response.logprobs, 0 beyond the length
    finish: np.ndarray              # str[P, G], values of FinishReason
    repeated: np.ndarray            # bool[P, G]

    @property
    def ended(self) -> np.ndarray:
        """bool[P, G], False if the response was cut off."""
        return self.finish == FinishReason.EOS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Sequences, prompt and response, packed into rows of N positions: what the trainer reads.

    A position scores its target, the token that follows it in the sequence. So the column of the
    successor does not matter, and columns may be permuted.
    """

    tokens: jax.Array               # int32[..., R, N]
    targets: jax.Array              # int32[..., R, N], the next token of the sequence; 0 after the
                                    # last one
    positions: jax.Array            # int32[..., R, N], of each token in its sequence
    segments: jax.Array             # int32[..., R, N], the sequence within the row, from 1;
                                    # 0 = padding; see attention.branch
    response_index: jax.Array       # int32[..., R, N], flat index into [B, T] of the response token
                                    # that is the target; B * T = none
    settings: jax.Array | None = None   # float32[..., R, N], of the dial for each sequence; None =
                                    # there is no dial


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """A step's responses as rows: U optimizer updates, M micro-batches of R rows.

    Rows of one group have one width. There are several groups if rows are long, or hold one
    sequence each.
    """

    groups: tuple[Rows, ...]        # [U, M, R, N]
    counts: tuple[jax.Array, ...]   # int32[U] for each group: micro-batches that hold something


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Experience:
    """Rows with the worth of each target: what the update learns from."""

    rows: Rows
    weights: jax.Array              # float32[..., R, N], of the target in the loss; 0 = no
                                    # response token
    advantages: jax.Array           # float32[..., R, N]
    # float32[..., R, N], by the policy before the step; None if each update computes its own.
    old_logprobs: jax.Array | None = None
    # float32[..., R, N], by the sampler; None if nothing reads them.
    sampled_logprobs: jax.Array | None = None
    # float32[..., R, N], by the frozen reference; None if nothing reads them.
    reference_logprobs: jax.Array | None = None

    @property
    def mask(self) -> jax.Array:
        """bool[..., R, N], True if the target is a response token."""
        return self.weights > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcomes:
    """How a model did on P problems of one set, k samples each, on the host: the input of all
    statistics."""

    uids: np.ndarray                # int64[P]
    levels: np.ndarray              # str[P]
    correct: np.ndarray             # bool[P, k]
    lengths: np.ndarray             # int32[P, k], response tokens through EOS
    finish: np.ndarray              # str[P, k], values of FinishReason
    answers: np.ndarray             # str[P, k], as the grader found it; "" = none
    first_answer_token: np.ndarray  # float32[P, k], tokens until the reference answer is first
                                    # stated; nan = never


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelResult:
    """Accuracy and length on the problems of one level."""

    accuracy: float                 # share of right answers, 0..1, mean over samples, then problems
    tokens: float                   # mean response tokens through EOS
    problems: int


def response_mask(lengths: Int[Array, " B"], positions: int) -> Bool[Array, "B T"]:
    """Marks the tokens of responses that are padded on the right.

    Computed from the lengths, never from `tokens != pad`: many tokenizers pad with EOS, or with a
    token that a response may hold.

    Args:
        lengths: tokens through EOS.
        positions: T, static under jit.

    Returns:
        True through EOS; a response that does not fit into T is cut at T.
    """
    return jnp.arange(positions, dtype=jnp.int32)[None, :] < lengths[:, None]


def padded_length(length: int, smallest: int = 64) -> int:
    """Returns the least of 64, 96, 128, 192, 256, ... that is at least `length`.

    So there are few shapes to compile, and at most a third is padding.

    Args:
        smallest: a power of two.
    """
    size = smallest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
