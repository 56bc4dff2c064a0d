"""Stage 2: the sampling engine. Prompts in, groups of responses out, each handed over as soon as it is finished.

S slots hold one response each. A jitted chunk of decode steps advances all of them; between chunks the host takes the
finished ones out and puts waiting ones in. A group's prompt is read once and its keys and values are copied into the
slots of the group. The cache grows by buckets with the longest sequence in it.

The key of every sampled token is fold_in(step key, prompt uid, sample, position): what a response will be does not
depend on its slot, on its neighbours or on the number of devices.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from effreason.lm import model
from effreason.masks import padded_length
from effreason.records import Problem, Response, Rollouts
from effreason.runtime import sharding


class Sampler(Protocol):
    """What `make_sampler` makes."""

    def __call__(self, params: model.Params, problems: Sequence[Problem], group_size: int, key: jax.Array,
                 max_new_tokens: int) -> Iterator[list[Response]]:
        """Yields the responses that finished in each chunk, often none."""
        ...


STREAMS = {"train": 0, "evaluation": 1, "parity": 2}


def step_key(seed: int, stream: str, step: int) -> jax.Array:
    """The key under which all responses of a step are drawn. Streams never share a key."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS[stream]), step)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """The engine's state on the device. S slots, C cache positions."""

    cache: model.Cache
    token: jax.Array                # int32[S], the newest token of each row: not yet in the cache
    length: jax.Array               # int32[S], tokens in the cache, so the position of `token`
    generated: jax.Array            # int32[S], response tokens drawn so far
    limit: jax.Array                # int32[S], response tokens to draw at most
    active: jax.Array               # bool[S]
    key: jax.Array                  # key[S], of the response; folded with `generated` for each token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution that tokens are drawn from, and when a response ends."""

    temperature: float
    top_p: float
    eos_ids: tuple[int, ...]


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Keeps the smallest set of most likely tokens whose probability reaches top_p; the others get -inf.

    Args: logits float32[S, V], temperature applied. Returns: float32[S, V]. Source: arXiv 1904.09751."""
    if top_p >= 1.0:
        return logits
    descending = jnp.sort(logits, axis=-1, descending=True)
    above = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1) - jax.nn.softmax(descending, axis=-1)
    kept = jnp.sum(above < top_p, axis=-1, keepdims=True)          # at least 1: nothing stands above the first
    threshold = jnp.take_along_axis(descending, kept - 1, axis=-1)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def draw(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """One token a row by inverting the cumulative distribution at one uniform number a row.

    A Gumbel draw would need a random number for every entry of the vocabulary: many times the cost.
    Args: logits float32[S, V], -inf allowed; keys key[S]. Returns: tokens int32[S]."""
    probabilities = jnp.exp(jax.nn.log_softmax(logits, axis=-1))
    # A long float32 sum is rounded, and need not even rise: what has probability 0 is left out by name, not by its sum.
    reached = jnp.where(probabilities > 0, jnp.cumsum(probabilities, axis=-1), 0.0)
    total = jnp.max(reached, axis=-1, keepdims=True)
    uniform = jax.vmap(jax.random.uniform)(keys)[:, None]
    # Strictly below the total: there always is an entry that goes beyond.
    target = jnp.minimum(uniform * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.argmax(reached > target, axis=-1).astype(jnp.int32)


def decode_chunk(params: model.Params, slots: Slots, *, config: model.DecoderConfig, sampling: Sampling,
                 chunk: int) -> tuple[Slots, dict[str, jax.Array]]:
    """`chunk` decode steps of all slots; rows that end inside the chunk idle until its end.

    Returns: the slots, and what the host needs: tokens int32[chunk, S], logprobs float32[chunk, S], drawn
    bool[chunk, S] (the row was active, so the token counts), active bool[S] and ended bool[S] after the chunk."""
    eos = jnp.array(sampling.eos_ids, jnp.int32)

    def step(slots: Slots, _: None) -> tuple[Slots, tuple[jax.Array, ...]]:
        hidden, cache = model.extend(config, params, slots.token[:, None], slots.length, slots.cache)
        logits = model.logits(params, hidden[:, 0]) / sampling.temperature
        tokens = draw(nucleus(logits, sampling.top_p), jax.vmap(jax.random.fold_in)(slots.key, slots.generated))
        # Of the whole distribution, not of the nucleus: this is what the trainer's scorer is to find again.
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[:, None], axis=-1)[:, 0]
        tokens = jnp.where(slots.active, tokens, slots.token)
        advance = slots.active.astype(jnp.int32)
        generated = slots.generated + advance
        is_eos = jnp.any(tokens[:, None] == eos[None, :], axis=-1)
        active = slots.active & ~is_eos & (generated < slots.limit)
        after = dataclasses.replace(slots, cache=cache, token=tokens, length=slots.length + advance,
                                    generated=generated, active=active)
        return after, (tokens, logprobs, slots.active, is_eos)

    slots, (tokens, logprobs, drawn, is_eos) = jax.lax.scan(step, slots, length=chunk)
    ended = jnp.any(drawn & is_eos, axis=0)
    return slots, {"tokens": tokens, "logprobs": logprobs, "drawn": drawn, "active": slots.active, "ended": ended}


def prefill(params: model.Params, prompts: jax.Array, *, config: model.DecoderConfig) -> model.Cache:
    """Keys and values of int32[R, C'] prompts, padded on the right; what stands in the padding is never seen."""
    rows, length = prompts.shape
    start = jnp.zeros(rows, jnp.int32)
    return model.extend(config, params, prompts, start, model.empty_cache(config, rows, length))[1]


def insert(slots: Slots, prompt_cache: model.Cache, rows: dict[str, jax.Array], step_key: jax.Array) -> Slots:
    """Starts new responses in some slots.

    Args: prompt_cache, from `prefill`, R prompts; rows, for each slot: source int32[S], its row of prompt_cache, -1
        leaves the slot as it is; token int32[S], the prompt's last token; length int32[S], the prompt's tokens before
        it; uid, sample, limit int32[S]; step_key, of the training step."""
    fresh = rows["source"] >= 0

    def copied(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        head = jax.lax.slice_in_dim(old, 0, new.shape[axis], axis=axis)
        chosen = new[jnp.maximum(rows["source"], 0)]
        head = jnp.where(fresh[:, None, None, None], chosen, head)
        return jax.lax.dynamic_update_slice_in_dim(old, head, 0, axis=axis)

    cache = [{"keys": copied(old["keys"], new["keys"], 3), "values": copied(old["values"], new["values"], 2)}
             for old, new in zip(slots.cache, prompt_cache, strict=True)]
    response_key = jax.vmap(lambda uid, sample: jax.random.fold_in(jax.random.fold_in(step_key, uid), sample))
    key = jnp.where(fresh, response_key(rows["uid"], rows["sample"]), slots.key)
    return Slots(cache=cache, token=jnp.where(fresh, rows["token"], slots.token),
                 length=jnp.where(fresh, rows["length"], slots.length),
                 generated=jnp.where(fresh, 0, slots.generated), limit=jnp.where(fresh, rows["limit"], slots.limit),
                 active=slots.active | fresh, key=key)


def grow(slots: Slots, *, capacity: int) -> Slots:
    """The same slots with room for `capacity` cache positions."""
    def padded(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, capacity - x.shape[axis] if at == axis else 0) for at in range(x.ndim)])

    cache = [{"keys": padded(layer["keys"], 3), "values": padded(layer["values"], 2)} for layer in slots.cache]
    return dataclasses.replace(slots, cache=cache)


def empty(config: model.DecoderConfig, count: int, capacity: int) -> Slots:
    """`count` idle slots."""
    zeros = jnp.zeros(count, jnp.int32)
    return Slots(cache=model.empty_cache(config, count, capacity), token=zeros, length=zeros, generated=zeros,
                 limit=zeros, active=jnp.zeros(count, bool), key=jax.random.split(jax.random.key(0), count))


@dataclasses.dataclass(kw_only=True)
class _Occupant:
    """What the host knows of the response in a slot."""

    prompt: int
    sample: int
    length: int                     # tokens in the slot's cache at most
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)


def make_sampler(config: model.DecoderConfig, mesh: Mesh, sampling: Sampling, *, slots: int, chunk: int) -> Sampler:
    """The engine with its compiled functions: sample(params, problems, group_size, key, max_new_tokens) -> iterator.

    Args: slots, responses in flight, rounded up to a multiple of the mesh's batch shards; chunk, decode steps between
        two looks at what has finished.
    The iterator yields after every chunk, an empty list where nothing finished, so that its consumer can show progress,
    overlap other work, or stop."""
    shards = sharding.batch_shards(mesh)
    replicated = sharding.sharding(mesh)
    logical = model.logical_axes(config)
    params_target = sharding.tree_sharding(mesh, _unstacked_axes(logical, config.layers), sharding.SAMPLING_AXES)
    layer_target: Any = {"keys": sharding.sharding(mesh, "batch", "kv_heads", "head_dim", "sequence"),
                         "values": sharding.sharding(mesh, "batch", "kv_heads", "sequence", "head_dim")}
    row_target: Any = sharding.sharding(mesh, "batch")
    target = Slots(cache=[layer_target] * config.layers, token=row_target, length=row_target, generated=row_target,
                   limit=row_target, active=row_target, key=row_target)

    unstack = jax.jit(functools.partial(model.unstack, config), out_shardings=params_target)
    advance = jax.jit(functools.partial(decode_chunk, config=config, sampling=sampling, chunk=chunk),
                      out_shardings=(target, replicated), donate_argnums=1)
    read = jax.jit(functools.partial(prefill, config=config), out_shardings=replicated)
    start = jax.jit(insert, out_shardings=target, donate_argnums=0)
    enlarge = jax.jit(grow, static_argnames="capacity", out_shardings=target)
    make_empty = jax.jit(empty, static_argnums=(0, 1, 2), out_shardings=target)

    def sample(params: model.Params, problems: Sequence[Problem], group_size: int, key: jax.Array,
               max_new_tokens: int) -> Iterator[list[Response]]:
        queue = collections.deque((prompt, index) for prompt in range(len(problems)) for index in range(group_size))
        count = _slot_count(slots, len(queue), shards)
        prompt_width = padded_length(max(len(problem.prompt) for problem in problems), 16)
        capacity = padded_length(prompt_width + chunk)
        occupants: list[_Occupant | None] = [None] * count
        weights, state = unstack(params), make_empty(config, count, capacity)
        while queue or any(occupants):
            if queue and None in occupants:
                prompts, rows = _refill(occupants, queue, problems, prompt_width, max_new_tokens)
                prompt_cache = read(weights, sharding.to_device(prompts, replicated))
                state = start(state, prompt_cache, sharding.to_device(rows, replicated), key)
            needed = chunk + max(occupant.length for occupant in occupants if occupant)
            if needed > capacity:
                capacity = padded_length(needed)
                state = enlarge(state, capacity=capacity)
            state, drawn = advance(weights, state)
            yield _harvest(occupants, sharding.to_host(drawn))

    return sample


def _unstacked_axes(logical: Any, layers: int) -> Any:
    layer = jax.tree.map(lambda axes: axes[1:], logical["layers"], is_leaf=lambda node: isinstance(node, tuple))
    return logical | {"layers": [layer] * layers}


def _slot_count(most: int, responses: int, shards: int) -> int:
    """`most`, or for fewer responses a power of two, so that they share functions; a multiple of the shards."""
    count = min(most, 1 << max(responses - 1, 0).bit_length())
    return -(-count // shards) * shards


def _refill(occupants: list[_Occupant | None], queue: collections.deque[tuple[int, int]], problems: Sequence[Problem],
            prompt_width: int, limit: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Moves waiting responses into free slots; returns the prompts to read, each once, and `insert`'s rows."""
    count = len(occupants)
    rows = {name: np.zeros(count, np.int32) for name in ("token", "length", "uid", "sample")}
    rows |= {"source": np.full(count, -1, np.int32), "limit": np.full(count, limit, np.int32)}
    sources: dict[int, int] = {}
    for slot in range(count):
        if occupants[slot] is not None or not queue:
            continue
        prompt, sample = queue.popleft()
        problem = problems[prompt]
        rows["source"][slot] = sources.setdefault(prompt, len(sources))
        rows["token"][slot] = problem.prompt[-1]
        rows["length"][slot] = len(problem.prompt) - 1
        rows["uid"][slot], rows["sample"][slot] = problem.uid, sample
        occupants[slot] = _Occupant(prompt=prompt, sample=sample, length=len(problem.prompt) - 1)
    # 4, 16, 64, ... rows: reading some empty ones costs less than compiling for every count.
    height = 4
    while height < len(sources):
        height *= 4
    tokens = np.zeros((height, prompt_width), np.int32)
    for prompt, row in sources.items():
        # The last token stays out: the first decode step reads it, and draws from what it predicts.
        tokens[row, : len(problems[prompt].prompt) - 1] = problems[prompt].prompt[:-1]
    return tokens, rows


def _harvest(occupants: list[_Occupant | None], drawn: dict[str, np.ndarray]) -> list[Response]:
    """Appends a chunk's tokens to the responses in their slots, and takes out those that are finished."""
    finished = []
    for slot, occupant in enumerate(occupants):
        if occupant is None:
            continue
        count = int(drawn["drawn"][:, slot].sum())      # a row is active up to some step and idle from there on
        occupant.tokens.append(drawn["tokens"][:count, slot])
        occupant.logprobs.append(drawn["logprobs"][:count, slot])
        occupant.length += count
        if not drawn["active"][slot]:
            finished.append(Response(prompt=occupant.prompt, sample=occupant.sample,
                                     tokens=np.concatenate(occupant.tokens),
                                     logprobs=np.concatenate(occupant.logprobs), ended=bool(drawn["ended"][slot])))
            occupants[slot] = None
    return finished


def collect(problems: Sequence[Problem], responses: Sequence[Response], group_size: int) -> Rollouts:
    """Puts finished responses, in any order, into arrays [P, G, ...] padded to the longest.

    Raises: ValueError unless every prompt has each of its samples exactly once."""
    index = sorted((response.prompt, response.sample) for response in responses)
    if index != [(prompt, sample) for prompt in range(len(problems)) for sample in range(group_size)]:
        raise ValueError(f"expected {len(problems)} x {group_size} responses, found {len(index)}")
    shape = (len(problems), group_size)
    longest = max(len(response.tokens) for response in responses)
    tokens, logprobs = np.zeros((*shape, longest), np.int32), np.zeros((*shape, longest), np.float32)
    lengths, ended = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for response in responses:
        at, length = (response.prompt, response.sample), len(response.tokens)
        tokens[at][:length], logprobs[at][:length] = response.tokens, response.logprobs
        lengths[at], ended[at] = length, response.ended
    prompt_lengths = np.array([len(problem.prompt) for problem in problems], np.int32)
    prompts = np.zeros((len(problems), prompt_lengths.max()), np.int32)
    for row, problem in enumerate(problems):
        prompts[row, : prompt_lengths[row]] = problem.prompt
    return Rollouts(prompts=prompts, prompt_lengths=prompt_lengths, tokens=tokens, lengths=lengths, logprobs=logprobs,
                    ended=ended)
