"""The distribution that tokens are drawn from, and the draw. S rows, V vocabulary, K blocks of W tokens.

A vocabulary has 150,000 entries and a decode step reads all of them, so what counts is how often: once for the largest
logit, once for the sums of the probabilities in each of the K blocks. The draw then looks at K sums and at the W tokens
of one block; the log-probs need nothing more. Filters cost passes of their own, and only where they are on.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from effreason.runtime.errors import UserError

MOST_BLOCKS = 256                   # near the square root of a large vocabulary: K sums and W tokens cost the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The distribution that tokens are drawn from, and the tokens that end a response. Static under jit.

    The filters apply in the order temperature, top_k, top_p (over what top_k left), min_p, each keeping ties with the
    least likely token that it keeps."""

    temperature: float                  # 0 = greedy: the most likely token, the first of ties; no filter matters
    eos_ids: tuple[int, ...]
    top_p: float = 1.0                  # the most likely tokens that together reach this probability; 1 = all
    top_k: int | None = None            # this many of the most likely tokens; None = all
    min_p: float = 0.0                  # tokens at least this likely, relative to the most likely one; 0 = all

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise UserError(f"temperature: expected a number from 0 up, found {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p: expected a number above 0, at most 1, found {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k: expected a number from 1 up, found {self.top_k}")
        if not 0.0 <= self.min_p <= 1.0:
            raise UserError(f"min_p: expected a number from 0 to 1, found {self.min_p}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledTokens:
    """One token a row, and how likely it was."""

    tokens: jax.Array               # int32[S]
    logprobs: jax.Array             # float32[S], by the model at the temperature, filters aside: the trainer's figure
    sampling_logprobs: jax.Array    # float32[S], by the distribution it was drawn from: after the filters
    model_logprobs: jax.Array       # float32[S], by the model at temperature 1


def draw(logits: jax.Array, keys: jax.Array, sampling: SamplingParams) -> SampledTokens:
    """One token a row, by inverting the cumulative distribution: first over blocks of the vocabulary, then in one.

    A Gumbel draw would need a random number for every entry of the vocabulary: many times the cost. Greedy rows have
    sampling_logprobs 0, and logprobs at temperature 1. A token of probability 0 is never drawn.

    Args: logits float32[S, V], -inf allowed, at temperature 1; keys key[S], each used up. Returns: SampledTokens, [S]."""
    blocks = _blocks(logits)
    block_peaks = jnp.max(blocks, axis=-1)
    peak = jnp.max(block_peaks, axis=-1)
    model_sums = _block_sums(blocks, peak, 1.0)
    model_total = jnp.sum(model_sums, axis=-1)

    if sampling.temperature == 0.0:
        block = jnp.argmax(block_peaks, axis=-1)
        position = jnp.argmax(_row(blocks, block), axis=-1)
        model_logprobs = -jnp.log(model_total)
        return SampledTokens(tokens=_token(blocks, block, position), logprobs=model_logprobs,
                     sampling_logprobs=jnp.zeros_like(model_logprobs), model_logprobs=model_logprobs)

    threshold = filter_threshold(blocks, peak, sampling)
    sums = model_sums if sampling.temperature == 1.0 else _block_sums(blocks, peak, sampling.temperature)
    kept_sums = sums if threshold is None else _block_sums(blocks, peak, sampling.temperature, threshold)

    # A number for each level: what is left of one number after the choice of a block has too few bits for its tokens.
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _invert(kept_sums, uniform[:, 0])
    inside = _row(blocks, block)
    # Relative to the block's own most likely token: in a block of unlikely ones all weights might be rounded to 0.
    weights = _weights(inside, jnp.max(inside, axis=-1), sampling.temperature, threshold)
    position = _invert(weights, uniform[:, 1])

    behind_peak = _row(inside, position) - peak
    logprobs = behind_peak * (1.0 / sampling.temperature)
    return SampledTokens(tokens=_token(blocks, block, position), logprobs=logprobs - jnp.log(jnp.sum(sums, axis=-1)),
                 sampling_logprobs=logprobs - jnp.log(jnp.sum(kept_sums, axis=-1)),
                 model_logprobs=behind_peak - jnp.log(model_total))


def filter_threshold(blocks: jax.Array, peak: jax.Array, sampling: SamplingParams) -> jax.Array | None:
    """The least logit float32[S] that top_k, top_p and min_p leave in, None where they are all off.

    Args: blocks float32[S, K, W], logits; peak float32[S], the largest of each row."""
    threshold = None
    if sampling.top_k is not None and sampling.top_k < blocks.shape[1] * blocks.shape[2]:
        count = jnp.full_like(peak, sampling.top_k)
        threshold = _reaching(blocks, jnp.ones((1, 1, 1), jnp.float32), count, peak)
    if sampling.top_p < 1.0:
        weights = _weights(blocks, peak, sampling.temperature, threshold)
        mass = jnp.sum(jnp.sum(weights, axis=-1), axis=-1)
        threshold = _reaching(blocks, weights, sampling.top_p * mass, peak)
    if sampling.min_p > 0.0:
        least = peak + sampling.temperature * math.log(sampling.min_p)
        threshold = least if threshold is None else jnp.maximum(threshold, least)
    return threshold


def _reaching(blocks: jax.Array, measure: jax.Array, target: jax.Array, peak: jax.Array) -> jax.Array:
    """The largest logit such that the entries from it upwards together reach a target, exactly, without sorting.

    It bisects over all float32 numbers, which as integers lie in the same order: 32 passes whatever the vocabulary.
    Args: blocks float32[S, K, W]; measure, of each entry, not negative, of a shape that broadcasts to theirs; target
        float32[S], more than 0; peak float32[S]. Returns: float32[S], -inf where all together stay below the target."""
    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds                                          # low reaches the target, high does not
        middle = (low & high) + ((low ^ high) >> 1)                 # their mean, where their sum would overflow
        above = jnp.where(blocks >= _from_ordered(middle)[:, None, None], measure, 0.0)
        reached = jnp.sum(jnp.sum(above, axis=-1), axis=-1) >= target
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    bounds = _ordered(jnp.full_like(peak, -jnp.inf)), _ordered(peak) + 1
    least = _from_ordered(jax.lax.fori_loop(0, 32, halve, bounds)[0])
    # Where comparisons take denormal numbers for 0, it may have ended at one of them instead of at 0.
    tiny = jnp.finfo(jnp.float32).tiny
    return jnp.where(jnp.abs(least) < tiny, -tiny, least)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 to int32, in the same order: the bits of a negative number fall where it rises."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _from_ordered(image: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(image ^ ((image >> 31) & 0x7FFFFFFF), jnp.float32)


def _blocks(logits: jax.Array) -> jax.Array:
    """float32[S, V] to [S, K, W]; K is a power of two, so that blocks do not cross the shards of a mesh.

    A vocabulary that no good K divides is filled up with -inf, which costs a copy."""
    rows, vocabulary = logits.shape
    most = 1 << max(math.isqrt(vocabulary).bit_length() - 1, 0)     # a power of two up to the square root
    count = math.gcd(vocabulary, min(most, MOST_BLOCKS))
    if 8 * count < most:
        count = min(most, MOST_BLOCKS)
        logits = jnp.pad(logits, ((0, 0), (0, -vocabulary % count)), constant_values=-jnp.inf)
    return logits.reshape(rows, count, -1)


def _weights(logits: jax.Array, peak: jax.Array, temperature: float, threshold: jax.Array | None = None) -> jax.Array:
    """Probabilities up to a factor, 0 below the threshold. Args: logits float32[S, ...]; peak, threshold float32[S]."""
    def beside(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *[1] * (logits.ndim - 1))

    weights = jnp.exp((logits - beside(peak)) * (1.0 / temperature))
    return weights if threshold is None else jnp.where(logits >= beside(threshold), weights, 0.0)


def _block_sums(blocks: jax.Array, peak: jax.Array, temperature: float,
                threshold: jax.Array | None = None) -> jax.Array:
    return jnp.sum(_weights(blocks, peak, temperature, threshold), axis=-1)


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The entry at which the cumulative sum goes beyond a share of the total; never one of weight 0.

    Args: weights float32[S, n], the largest of each row at least 1; uniform float32[S] in [0, 1 - 2**-24].
    Returns: int32[S]."""
    # A long float32 sum is rounded, and may rise or fall where nothing is added: what has weight 0 is left out by name.
    reached = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    # A number up to 1 - 2**-24 times a total of at least 1 rounds to less than the total: some entry goes beyond it.
    target = uniform * jnp.max(reached, axis=-1)
    return jnp.argmax(reached > target[:, None], axis=-1)


def _row(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[s, index[s]] for each s."""
    index = index.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.squeeze(jnp.take_along_axis(x, index, axis=1), axis=1)


def _token(blocks: jax.Array, block: jax.Array, position: jax.Array) -> jax.Array:
    return (block * blocks.shape[2] + position).astype(jnp.int32)
