"""What benchmarks/sampling/compare.py compares: the engine, static batches in JAX, and static
batches in `transformers`.

An engine is made for a model and a workload and then called with workloads of these shapes: it
returns the responses' tokens, one int32 array for each row, in the order of the rows. All of them
draw at temperature 1, or take the most likely token if `greedy`; all know a row's length only as
the point at which it ends.

B rows, T new positions, C cache positions, K key/value heads, h head width.
"""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from effreason.lm import model
from effreason.lm.architecture import DecoderConfig
from effreason.lm.block import Block, rms_norm
from effreason.lm.hf.pretrained import write_decoder
from effreason.sampling import draws, engine, slots
from effreason.sampling.scheduler import Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Responses to be made; row r is sample r % samples of prompt r // samples."""

    prompts: np.ndarray             # int32[P, S'], all of one length
    samples: int                    # of each prompt
    limits: np.ndarray              # int32[rows], tokens after which each row ends
    longest: int                    # tokens of a response at most, which is known beforehand
    rows: int                       # in flight at most; the size of a static batch

    @property
    def positions(self) -> int:
        """Of a sequence at most."""
        return self.prompts.shape[1] + self.longest

    def clipped(self, tokens: int) -> "Workload":
        """The same shapes with short responses: what compiles, and takes no time."""
        return dataclasses.replace(self, limits=np.minimum(self.limits, tokens))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """One way to generate."""

    generate: Callable[[Workload, int], list[np.ndarray]]   # (workload, seed) -> tokens of each row
    compiled: Callable[[], int]     # programs so far
    # shapes depend on the lengths: only a full run compiles everything
    ragged: bool
    figures: dict[str, float]       # of the newest call


def make_workload(name: str, vocabulary: int) -> Workload:
    """W1: 8 x 8 responses of 256 tokens. W2: 16 x 8 of exponential lengths, 32 in flight. Prompts
    of 64 tokens."""
    count, rows, longest = {"W1": (8, 64, 256), "W2": (16, 32, 512)}[name]
    prompts = np.random.default_rng(0).integers(0, vocabulary, (count, 64)).astype(np.int32)
    lengths = np.full(8 * count, longest)
    if name == "W2":
        lengths = np.clip(np.random.default_rng(1).exponential(96, 8 * count).round(), 8, longest)
    return Workload(prompts=prompts, samples=8, limits=lengths.astype(np.int32), longest=longest,
                    rows=rows)


def make_ours(config: DecoderConfig, params: model.Params, mesh: Mesh, workload: Workload, *,
              chunk: int,
              greedy: bool = False) -> Engine:
    """Makes the engine. It holds the limits on the device: they end a row as an EOS would; nothing
    plans with them: `expected_tokens` is None and the cache's capacity follows from the longest
    response allowed."""
    sampler = engine.make_sampler(config, mesh, slots=workload.rows, chunk=chunk,
                                  max_positions=workload.positions)
    sampling = draws.SamplingParams(temperature=0.0 if greedy else 1.0, eos_ids=())
    figures: dict[str, float] = {"compiled": 0}

    def generate(workload: Workload, seed: int) -> list[np.ndarray]:
        with jax.set_mesh(mesh):
            generation = sampler(params, make_requests(workload), jax.random.key(seed), sampling)
            responses = [response for finished in generation for response in finished]
        figures.update(steps=generation.steps, host_seconds=generation.host_seconds,
                       compiled=figures["compiled"] + generation.compilations)
        return [response.tokens
                for response in sorted(responses, key=lambda each: (each.prompt, each.sample))]

    return Engine(generate=generate, compiled=lambda: int(figures["compiled"]), ragged=True,
                  figures=figures)


def make_requests(workload: Workload) -> list[Request]:
    """The rows as the engine takes them."""
    return [Request(prompt=row // workload.samples,
                    tokens=workload.prompts[row // workload.samples],
                             uid=row // workload.samples, sample=row % workload.samples,
                    max_new_tokens=int(limit))
            for row, limit in enumerate(workload.limits)]


def make_static(config: DecoderConfig, params: model.Params, mesh: Mesh, workload: Workload,
                *, fast: bool,
                greedy: bool = False) -> Engine:
    """Batches of rows in order, each in one `while_loop` that runs until its longest row is done.

    Args: fast, with the decode step, the cache and the draw of the engine, so that only the
    scheduling differs; else as one writes them without an engine: a cache [B, C, K, h], attention
    over all of it, a Gumbel draw."""
    if fast:
        sampling = draws.SamplingParams(temperature=0.0 if greedy else 1.0, eos_ids=())
        pieces = Pieces(prepare=jax.jit(functools.partial(model.unstack, config)),
                        extend=functools.partial(model.decode, config),
                        empty_cache=functools.partial(model.empty_cache, config),
                        logits=slots.next_token_logits,
                        draw=lambda logits, key: draws.draw(
                            logits, jax.random.split(key, logits.shape[0]), sampling).tokens)
    else:
        pieces = Pieces(prepare=jax.jit(functools.partial(plain_layers, config)),
                        extend=functools.partial(plain_extend, config),
                        empty_cache=functools.partial(plain_cache, config), logits=model.logits,
                        draw=lambda logits, key: (jnp.argmax(logits, -1) if greedy else
                                                  jax.random.categorical(key,
                                                                         logits)).astype(jnp.int32))
    batch: Any = jax.jit(functools.partial(generate_batch, pieces=pieces, longest=workload.longest))

    def generate(workload: Workload, seed: int) -> list[np.ndarray]:
        weights, tokens = pieces.prepare(params), []
        prompts = np.repeat(workload.prompts, workload.samples, axis=0)
        for first in range(0, len(prompts), workload.rows):
            rows = slice(first, first + workload.rows)
            key = jax.random.fold_in(jax.random.key(seed), first)
            drawn = np.asarray(batch(weights, prompts[rows], workload.limits[rows], key))
            tokens += [row[:limit] for row, limit in zip(drawn, workload.limits[rows], strict=True)]
        return tokens

    return Engine(generate=generate,
                  compiled=lambda: batch._cache_size() + pieces.prepare._cache_size(),
                  ragged=False, figures={})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """What a static batch is generated with."""

    prepare: Any                    # params -> weights, jitted
    # (weights, int32[B, T], start int32[B], cache) -> hidden [B, T, D], cache
    extend: Callable[..., Any]
    empty_cache: Callable[..., Any]  # (rows, positions) -> cache
    logits: Callable[..., jax.Array]    # (weights, [B, D]) -> float32[B, V]
    draw: Callable[..., jax.Array]  # (logits float32[B, V], key) -> int32[B]


def generate_batch(weights: model.Params, prompts: jax.Array, limits: jax.Array, key: jax.Array, *,
                   pieces: Pieces,
                   longest: int) -> jax.Array:
    """int32[B, longest], of which each row's first `limits` are meant, for prompts int32[B, S']."""
    rows, length = prompts.shape

    def drawn(hidden: jax.Array, step: jax.Array) -> jax.Array:
        return pieces.draw(pieces.logits(weights, hidden[:, -1]), jax.random.fold_in(key, step))

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        return jnp.any(carry[0] < limits)

    def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, cache, tokens = carry
        hidden, cache = pieces.extend(weights, token[:, None], jnp.full(rows, length - 1) + step,
                                      cache)
        token = drawn(hidden, step)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, step, axis=1)
        return step + 1, token, cache, tokens

    start, one = jnp.zeros(rows, jnp.int32), jnp.ones((), jnp.int32)
    hidden, cache = pieces.extend(weights, prompts, start,
                                  pieces.empty_cache(rows, length + longest))
    token = drawn(hidden, jnp.zeros((), jnp.int32))
    tokens = jnp.zeros((rows, longest), jnp.int32).at[:, 0].set(token)
    return jax.lax.while_loop(unfinished, advance, (one, token, cache, tokens))[3]


def plain_layers(config: DecoderConfig, params: model.Params) -> model.Params:
    """The weights with a list of layers."""
    return params | {"layers": [jax.tree.map(lambda leaf, layer=layer: leaf[layer],
                                             params["layers"])
                                for layer in range(config.layers)]}


def plain_cache(config: DecoderConfig, rows: int,
                positions: int) -> list[tuple[jax.Array, jax.Array]]:
    """Keys and values of each layer, [B, C, K, h]."""
    empty = jnp.zeros((rows, positions, config.kv_heads, config.head_dim), config.dtype)
    return [(empty, empty)] * config.layers


def plain_extend(config: DecoderConfig, weights: model.Params, tokens: jax.Array,
                 start: jax.Array,
                 cache: list[tuple[jax.Array, jax.Array]]
                 ) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """Reads T more tokens of each row, with attention over the whole cache: final hidden states and
    the cache."""
    positions = start[:, None] + jnp.arange(tokens.shape[1])[None, :]
    angles = config.kinds[0].rope.angles(positions, config.head_dim)
    # [B, 1, T, C]
    visible = (jnp.arange(cache[0][0].shape[1])[None, None, :] <= positions[:, :, None])[:, None]
    write = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=0))
    x, extended = weights["embedding"].astype(config.dtype)[tokens], []
    block: Any = Block(config, config.kinds[0])
    for layer, (keys, values) in zip(weights["layers"], cache, strict=True):
        normed = rms_norm(x, layer["attention_norm"], config.norm_eps)
        query, key, value, _ = block.apply({"params": layer}, normed, angles, method="qkv")
        keys, values = write(keys, key, start), write(values, value, start)
        mixed = jax.nn.dot_product_attention(query, keys, values, mask=visible)
        added = block.apply({"params": layer}, mixed, None, method="output_of")
        x = block.apply({"params": layer}, x, added, method="added_and_mlp")
        extended.append((keys, values))
    return rms_norm(x, weights["final_norm"], config.norm_eps), extended


def make_transformers(config: DecoderConfig, params: model.Params, mesh: Mesh,
                      workload: Workload, *,
                      greedy: bool = False) -> Engine:
    """`generate` on static batches, with as many threads as there are cores. Needs the extra
    `bench`.

    Rows end one by one through a stopping criterion; `generate` goes on until the batch's longest
    is done, and what it draws for the others meanwhile is dropped."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as directory:
        write_decoder(params, config, config_table(config), "float32", Path(directory))
        decoder = transformers.AutoModelForCausalLM.from_pretrained(directory,
                                                                    dtype=torch.float32).eval()
    choice: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True,
                                                                  "temperature": 1.0, "top_k": 0,
                                                                 "top_p": 1.0}

    class Limits(transformers.StoppingCriteria):
        """True for the rows that have their tokens."""

        def __init__(self, limits: Any, length: int) -> None:
            self.limits, self.length = limits, length

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids.shape[1] - self.length >= self.limits

    def generate(workload: Workload, seed: int) -> list[np.ndarray]:
        torch.manual_seed(seed)
        prompts = np.repeat(workload.prompts, workload.samples, axis=0)
        length = workload.prompts.shape[1]
        tokens = []
        for first in range(0, len(prompts), workload.rows):
            rows = slice(first, first + workload.rows)
            inputs = torch.from_numpy(prompts[rows].astype(np.int64))
            stop = transformers.StoppingCriteriaList(
                [Limits(torch.from_numpy(workload.limits[rows]), length)])
            drawn = decoder.generate(inputs, attention_mask=torch.ones_like(inputs), use_cache=True,
                                     pad_token_id=0,
                                     eos_token_id=None, max_new_tokens=workload.longest,
                                     stopping_criteria=stop,
                                     **choice).numpy()[:, length:]
            tokens += [row[:limit].astype(np.int32)
                       for row, limit in zip(drawn, workload.limits[rows], strict=True)]
        return tokens

    return Engine(generate=generate, compiled=lambda: 0, ragged=False, figures={})


def config_table(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a Qwen2 model of this shape."""
    return {"model_type": "qwen2", "vocab_size": config.vocabulary, "hidden_size": config.width,
            "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
            "intermediate_size": config.mlp_width, "rms_norm_eps": config.norm_eps,
            "hidden_act": "silu",
            "tie_word_embeddings": config.tied, "max_position_embeddings": 32768}


ENGINES: dict[str, Callable[..., Engine]] = {
    "static": functools.partial(make_static, fast=False),
    "static_fast": functools.partial(make_static, fast=True),
    "transformers": make_transformers,
}


def greedy_agreement(config: DecoderConfig, params: model.Params, mesh: Mesh,
                     engines: list[str]) -> dict[str, float]:
    """The share of 8 x 32 greedy tokens in which each engine agrees with ours: 1 but for ties
    within rounding."""
    prompts = np.random.default_rng(2).integers(0, config.vocabulary, (8, 64)).astype(np.int32)
    workload = Workload(prompts=prompts, samples=1, limits=np.full(8, 32, np.int32), longest=32,
                        rows=8)
    expected = np.stack(make_ours(config, params, mesh, workload, chunk=16,
                                  greedy=True).generate(workload, 0))
    return {name: float(np.mean(expected == np.stack(ENGINES[name](config, params, mesh, workload,
                                                                   greedy=True)
                                                     .generate(workload, 0))))
            for name in engines if name in ENGINES}
