"""The distribution that tokens are drawn from, and the draw.

S rows, V vocabulary, split into K blocks of W tokens. A vocabulary has 150,000 entries and every
decode step reads all of them, so the cost is the number of passes: one for the largest logit, one
for the sum of the probabilities of each block. The draw then looks at K sums and at the W tokens of
one block; the log-probs need nothing more. A filter costs further passes, only if it is on.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from effreason.runtime.errors import UserError
from effreason.runtime.sharding import constrain

MAX_BLOCKS = 256                    # near the square root of a large vocabulary, so that K = W


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The distribution that tokens are drawn from, and EOS tokens. Static under jit.

    The filters apply in the order temperature, top_k, top_p (over what top_k left), min_p. Each
    keeps ties with the least likely token that it keeps."""

    temperature: float              # 0 = greedy: the most likely token, first of ties; no filters
    eos_ids: tuple[int, ...]
    top_p: float = 1.0              # the most likely tokens that together reach this share; 1 = all
    top_k: int | None = None        # this many of the most likely tokens; None = all
    min_p: float = 0.0              # at least this likely, relative to the most likely one; 0 = all

    def __post_init__(self) -> None:
        # Closer to 0, rounding decides what is drawn, and 1 / temperature may overflow.
        if not (self.temperature == 0.0 or 0.001 <= self.temperature < math.inf):
            raise UserError(f"temperature: expected 0, or a number from 0.001 up, found "
                            f"{self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p: expected a number above 0, at most 1, found {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k: expected a number from 1 up, found {self.top_k}")
        if not 0.0 <= self.min_p <= 1.0:
            raise UserError(f"min_p: expected a number from 0 to 1, found {self.min_p}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledTokens:
    """One token for each row, and how likely it was."""

    tokens: Int[Array, " S"]
    logprobs: Float[Array, " S"]            # by the model at the temperature, without filters: the
                                            # trainer's number
    sampling_logprobs: Float[Array, " S"]   # by the distribution it was drawn from: after filters
    model_logprobs: Float[Array, " S"]      # by the model at temperature 1


def recorded_logprobs(sampling: SamplingParams) -> list[str]:
    """Returns the log-probs of SampledTokens that differ from one another; `logprobs` always."""
    filtered = (sampling.temperature == 0 or sampling.top_p < 1 or sampling.top_k is not None
                or sampling.min_p > 0)
    tempered = sampling.temperature not in (0, 1)
    return ["logprobs", *["sampling_logprobs"] * filtered, *["model_logprobs"] * tempered]


def draw(logits: Float[Array, "S V"], keys: Key[Array, " S"],
         sampling: SamplingParams) -> SampledTokens:
    """Draws a token for each row by inverting the CDF, first over blocks, then inside one.

    A Gumbel draw would need a random number for every entry of the vocabulary: many times the cost.
    Greedy rows have sampling_logprobs 0 and logprobs at temperature 1. A token of probability 0 is
    never drawn.

    Args:
        logits: float32 at temperature 1, -inf allowed.
        keys: each is consumed."""
    blocks = _blocks(logits)
    block_maxima = constrain(jnp.max(blocks, axis=-1), "batch", "width")
    row_max = jnp.max(block_maxima, axis=-1)
    model_sums = _block_sums(blocks, row_max, 1.0)
    model_total = jnp.sum(model_sums, axis=-1)

    if sampling.temperature == 0.0:
        block = jnp.argmax(block_maxima, axis=-1)
        position = jnp.argmax(_select_block(blocks, block), axis=-1)
        model_logprobs = -jnp.log(model_total)
        return SampledTokens(
            tokens=_token(blocks, block, position), logprobs=model_logprobs,
            sampling_logprobs=jnp.zeros_like(model_logprobs), model_logprobs=model_logprobs)

    temperature, threshold = sampling.temperature, filter_threshold(blocks, row_max, sampling)
    sums = model_sums if temperature == 1.0 else _block_sums(blocks, row_max, temperature)
    kept_sums = sums
    if threshold is not None:
        kept_sums = _block_sums(blocks, row_max, temperature, threshold)

    # One number for each level: what is left of a single number after the choice of a block has too
    # few bits for the block's tokens.
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    # Multiples of 2**-23. At 0 itself the first entry would be drawn, however unlikely it is.
    uniform = jnp.maximum(uniform, 2.0**-24)
    block = _invert(kept_sums, uniform[:, 0])
    tokens = _select_block(blocks, block)
    # Relative to the block's own maximum: in a block of unlikely tokens all could round to 0.
    weights = _weights(tokens, jnp.max(tokens, axis=-1), temperature, threshold)
    position = _invert(weights, uniform[:, 1])

    below_max = _select(tokens, position) - row_max
    logprobs = below_max * (1.0 / temperature)
    return SampledTokens(
        tokens=_token(blocks, block, position),
        logprobs=logprobs - jnp.log(jnp.sum(sums, axis=-1)),
        sampling_logprobs=logprobs - jnp.log(jnp.sum(kept_sums, axis=-1)),
        model_logprobs=below_max - jnp.log(model_total))


def filter_threshold(blocks: Float[Array, "S K W"], row_max: Float[Array, " S"],
                     sampling: SamplingParams) -> Float[Array, " S"] | None:
    """Returns the least logit that passes top_k, top_p and min_p; None if all are off.

    Args:
        blocks: logits.
        row_max: the largest logit of each row."""
    threshold = None
    if sampling.top_k is not None and sampling.top_k < blocks.shape[1] * blocks.shape[2]:
        count = jnp.full_like(row_max, sampling.top_k)
        threshold = _threshold_reaching(blocks, jnp.ones((1, 1, 1), jnp.float32), count, row_max)

    if sampling.top_p < 1.0:
        weights = _weights(blocks, row_max, sampling.temperature, threshold)
        mass = jnp.sum(jnp.sum(weights, axis=-1), axis=-1)
        threshold = _threshold_reaching(blocks, weights, sampling.top_p * mass, row_max)

    if sampling.min_p > 0.0:
        least = row_max + sampling.temperature * math.log(sampling.min_p)
        threshold = least if threshold is None else jnp.maximum(threshold, least)
    return threshold


def _threshold_reaching(blocks: Float[Array, "S K W"], measure: Float[Array, "#S #K #W"],
                        target: Float[Array, " S"], row_max: Float[Array, " S"],
                        ) -> Float[Array, " S"]:
    """Returns the largest logit such that the entries from it up reach the target, exactly.

    Bisects over all float32 numbers, which have the same order as integers: 32 passes for any
    vocabulary, and no sort.

    Args:
        measure: of each entry, >= 0.
        target: above 0.

    Returns:
        -inf for rows that never reach the target."""
    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds                                  # low reaches the target, high does not
        middle = (low & high) + ((low ^ high) >> 1)         # their mean; their sum could overflow
        above = jnp.where(blocks >= _from_ordered(middle)[:, None, None], measure, 0.0)
        reached = jnp.sum(jnp.sum(above, axis=-1), axis=-1) >= target
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    bounds = _to_ordered(jnp.full_like(row_max, -jnp.inf)), _to_ordered(row_max) + 1
    least = _from_ordered(jax.lax.fori_loop(0, 32, halve, bounds)[0])
    # If comparisons flush denormal numbers to 0, it may have ended at one of them instead of at 0.
    tiny = jnp.finfo(jnp.float32).tiny
    return jnp.where(jnp.abs(least) < tiny, -tiny, least)


def _to_ordered(x: Float[Array, " S"]) -> Int[Array, " S"]:
    """Maps float32 to int32 of the same order: the bits of a negative number fall as it rises."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _from_ordered(ordered: Int[Array, " S"]) -> Float[Array, " S"]:
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _blocks(logits: Float[Array, "S V"]) -> Float[Array, "S K W"]:
    """Splits the vocabulary into K blocks, a power of two so that none crosses the mesh's shards.

    A vocabulary without a large enough divisor is padded with -inf, which costs a copy."""
    rows, vocabulary = logits.shape
    limit = 1 << max(math.isqrt(vocabulary).bit_length() - 1, 0)    # at most the square root
    count = math.gcd(vocabulary, min(limit, MAX_BLOCKS))
    if 8 * count < limit:
        count = min(limit, MAX_BLOCKS)
        logits = jnp.pad(logits, ((0, 0), (0, -vocabulary % count)), constant_values=-jnp.inf)
    return logits.reshape(rows, count, -1)


def _weights(logits: Float[Array, "S ..."], row_max: Float[Array, " S"], temperature: float,
             threshold: Float[Array, " S"] | None = None) -> Float[Array, "S ..."]:
    """Returns probabilities up to a factor, 0 below the threshold."""
    def expand(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *[1] * (logits.ndim - 1))

    weights = jnp.exp((logits - expand(row_max)) * (1.0 / temperature))
    return weights if threshold is None else jnp.where(logits >= expand(threshold), weights, 0.0)


def _block_sums(blocks: Float[Array, "S K W"], row_max: Float[Array, " S"], temperature: float,
                threshold: Float[Array, " S"] | None = None) -> Float[Array, "S K"]:
    """Returns the sums on every device of a row: XLA for GPUs makes a loop of a cumulative sum over
    blocks that are split over devices."""
    sums = jnp.sum(_weights(blocks, row_max, temperature, threshold), axis=-1)
    return constrain(sums, "batch", "width")


def _invert(weights: Float[Array, "S n"], uniform: Float[Array, " S"]) -> Int[Array, " S"]:
    """Returns the entry at which the cumulative sum exceeds a share of the total; never weight 0.

    Args:
        weights: the largest of each row at least 1.
        uniform: in (0, 1 - 2**-24]."""
    # A long float32 sum is rounded and may change even if 0 is added: mask entries of weight 0.
    cumulative = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    # 1 - 2**-24 times a total of at least 1 rounds to less than the total: some entry exceeds it.
    target = uniform * jnp.max(cumulative, axis=-1)
    return jnp.argmax(cumulative > target[:, None], axis=-1)


def _select_block(blocks: Float[Array, "S K W"], block: Int[Array, " S"]) -> Float[Array, "S W"]:
    return constrain(_select(blocks, block), "batch", "width")


def _select(x: Float[Array, "S n ..."], index: Int[Array, " S"]) -> Float[Array, "S ..."]:
    """Returns x[s, index[s]] for each s."""
    index = index.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.squeeze(jnp.take_along_axis(x, index, axis=1), axis=1)


def _token(blocks: Float[Array, "S K W"], block: Int[Array, " S"],
           position: Int[Array, " S"]) -> Int[Array, " S"]:
    return (block * blocks.shape[2] + position).astype(jnp.int32)
