"""What benchmarks/update/compare.py compares: one learning step of ours, and the same in plain
torch.

A step is reference log-probs of all responses, the clipped loss with a k3 term against the
reference, backward, a clip of the gradient's norm and AdamW. Both take the same sequences and the
same advantages, and both take the old log-probs from the loss's own pass.

P prompts, G responses for each, B = P * G sequences, T response tokens at most, D width, V
vocabulary.
"""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from effreason.lm import model
from effreason.lm.architecture import DecoderConfig
from effreason.rl import learner as engine
from effreason.runtime.config import Config
from effreason.types import FinishReason, Rollouts

SAMPLES = 8                         # responses to each prompt
RATE, BETAS, CLIP, KL, NORM = 1e-6, (0.9, 0.95), 0.2, 1e-3, 1.0
SQUARES = (1024, 2048)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Responses to learn from; sequence b is response b % G to prompt b // G."""

    prompts: np.ndarray             # int32[P, S], all of one length
    responses: np.ndarray           # int32[B, T], 0 after the ends
    lengths: np.ndarray             # int32[B]
    correct: np.ndarray             # bool[P, G]
    longest: int                    # tokens that a response could have had

    @property
    def tokens(self) -> int:
        """That are trained on: of responses."""
        return int(self.lengths.sum())

    def advantages(self) -> np.ndarray:
        """float32[B]: right or wrong, less the mean of the others of the group."""
        right = self.correct.astype(np.float32)
        others = (right.sum(axis=1, keepdims=True) - right) / (right.shape[1] - 1)
        return (right - others).reshape(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """One way to learn from a batch."""

    step: Callable[[], None]        # one learning step, until its results are there
    policy: Callable[[], Any]       # its current weights, or its model
    matmul: Callable[[int], float]  # seconds of a product of float32 squares of that size
    figures: dict[str, Any]         # what there is to say of it


def make_batch(kind: str, vocabulary: int, *, sequences: int = 32, prompt: int = 64,
               response: int = 256,
               longest: int = 512) -> Batch:
    """`fixed`: all responses of `response` tokens. `ragged`: exponential lengths around half of it,
    8 .. `longest`."""
    random = np.random.default_rng(0)
    lengths = np.full(sequences, response, np.int32)
    if kind == "fixed":
        longest = response
    else:
        lengths = np.clip(random.exponential(response / 2, sequences).round(), 8,
                          longest).astype(np.int32)
    responses = random.integers(0, vocabulary, (sequences, int(lengths.max()))).astype(np.int32)
    responses[np.arange(responses.shape[1]) >= lengths[:, None]] = 0
    samples = math.gcd(SAMPLES, sequences)
    return Batch(prompts=random.integers(0, vocabulary,
                                         (sequences // samples, prompt)).astype(np.int32),
                 responses=responses, lengths=lengths,
                 correct=random.random((sequences // samples, samples)) < 0.5,
                 longest=longest)


def to_rollouts(batch: Batch) -> Rollouts:
    """The batch as the sampler would hand it on."""
    group = batch.correct.shape
    return Rollouts(prompts=batch.prompts,
                    prompt_lengths=np.full(group[0], batch.prompts.shape[1], np.int32),
                    tokens=batch.responses.reshape(*group, -1),
                    lengths=batch.lengths.reshape(group),
                    logprobs=np.zeros((*group, batch.responses.shape[1]), np.float32),
                    finish=np.full(group, FinishReason.LENGTH), repeated=np.zeros(group, bool))


def flops(config: DecoderConfig, batch: Batch) -> float:
    """Counts the floating-point operations that one step cannot do without: 4 forward passes'
    worth.

    A forward pass: 2 x parameters in products x positions, the layers at all positions, the head
    at those that predict a response token; and 4 x H x h x L for each pair of a position with one
    it may attend to, n (n + 1) / 2 of them in a sequence of n. Reference and the loss's own pass:
    2; backward: 2 more (4 x instead of 2 x). Nothing is credited for padding, for what is computed
    again in the backward pass, for norms, softmax or the optimizer."""
    heads = config.heads * config.head_dim
    layer = 2 * config.width * (heads + config.kv_heads
                                * config.head_dim) + 3 * config.width * config.mlp_width
    sizes = batch.prompts.shape[1] + batch.lengths.astype(np.int64)
    products = 2 * (config.layers * layer * sizes.sum() + config.vocabulary * config.width
                    * batch.tokens)
    attention = 4 * heads * config.layers * (sizes * (sizes + 1) // 2).sum()
    return 4.0 * float(products + attention)


def settings(config: DecoderConfig, batch: Batch, *, rows: int, remat: str,
             dtype: str = "float32", rank: int = 0) -> Config:
    """The configuration of the step, as a run would have it: if nothing is computed again, no
    scores either."""
    prompts, samples = batch.correct.shape
    made = Config()
    tile = config.vocabulary if remat == "none" else made.update.vocabulary_tile
    return dataclasses.replace(
        made, model=dataclasses.replace(made.model, dtype=dtype, remat=remat),
        data=dataclasses.replace(made.data, max_prompt_tokens=batch.prompts.shape[1]),
        rollout=dataclasses.replace(made.rollout, prompts_per_step=prompts, group_size=samples,
                                    max_new_tokens=batch.longest),
        reward=dataclasses.replace(made.reward, alpha=0.0),
        adapter=dataclasses.replace(made.adapter, rank=rank),
        kl=dataclasses.replace(made.kl, form="loss", coefficient=KL),
        update=dataclasses.replace(made.update, learning_rate=RATE, beta1=BETAS[0], beta2=BETAS[1],
                                   warmup_updates=0,
                                   clip_ratio=CLIP, max_grad_norm=NORM, rows_per_micro_batch=rows,
                                   vocabulary_tile=tile))


def make_ours(config: DecoderConfig, batch: Batch, mesh: Mesh, *, rows: int, remat: str,
              dtype: str = "float32", rank: int = 0,
              params: model.Params | None = None) -> Learner:
    """The step of a run: packing, scoring by the reference, credit, update; the seconds of its
    programs are in its figures.

    Args: rank, of adapters, 0 = all weights are trained; params, which are taken over, None =
        random ones."""
    run = settings(config, batch, rows=rows, remat=remat, dtype=dtype, rank=rank)
    decoder = dataclasses.replace(config, dtype=jnp.dtype(dtype), remat=remat)
    learning = engine.Learner(run, decoder, mesh)
    if params is None:
        params = jax.jit(lambda: model.init(decoder, jax.random.key(0)),
                         out_shardings=learning.params_sharding)()
    reference = learning.as_reference(params)
    states = [learning.start(params, seed=0)]
    seconds: dict[str, float] = {}
    figures: dict[str, Any] = {"rows": rows, "fill": 1.0, "programs": seconds}

    def timed(name: str) -> Callable[..., Any]:
        program = getattr(learning.programs, name)

        def run(*arguments: Any) -> Any:
            started = time.perf_counter()
            results = jax.block_until_ready(program(*arguments))
            seconds[name] = time.perf_counter() - started
            return results
        return run

    learning.programs = engine.Programs(**{
        field.name: timed(field.name) for field in dataclasses.fields(engine.Programs)})

    def step() -> None:
        started = time.perf_counter()
        with jax.set_mesh(mesh):
            packed = learning.pack(to_rollouts(batch), batch.correct, run.reward.alpha)
            states[0], learnt = learning.update(states[0], reference, packed)
            jax.block_until_ready((states[0], learnt.updates))
        figures.update(fill=packed.packing_efficiency, step_seconds=time.perf_counter() - started,
                       update_seconds=seconds["gradients"] + seconds["apply_gradients"])

    product = jax.jit(jnp.matmul)

    def matmul(size: int) -> float:
        square = jax.block_until_ready(jax.random.normal(jax.random.key(0), (size, size)))
        jax.block_until_ready(product(square, square))
        return _seconds(lambda: jax.block_until_ready(product(square, square)))

    return Learner(step=step, matmul=matmul, figures=figures,
                   policy=lambda: states[0].params)


def make_torch(config: DecoderConfig, batch: Batch, *, rows: int,
               directory: Path | None = None) -> Learner:
    """Makes a training step as one writes it with torch and `transformers`, in float32 on all
    cores.

    Micro-batches of `rows` sequences in their order, padded on the right to their longest: causal
    attention needs no mask then, and takes its fast path. Logits of response tokens alone, none for
    padding.
    Args: directory, the weights; None = random ones."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    policy, reference = (_torch_model(config, directory) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    reference.requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0,
                                  fused=True)
    parts = [_torch_rows(batch, slice(first, first + rows))
             for first in range(0, len(batch.lengths), rows)]

    def logprobs(decoder: Any, part: dict[str, Any]) -> Any:
        hidden = decoder.model(input_ids=part["tokens"], use_cache=False).last_hidden_state
        logits = decoder.lm_head(hidden[part["predicts"]])
        return torch.log_softmax(logits, dim=-1).gather(-1, part["targets"])[:, 0]

    def step() -> None:
        with torch.no_grad():
            fixed = [logprobs(reference, part) for part in parts]
        optimizer.zero_grad(set_to_none=True)
        for part, anchor in zip(parts, fixed, strict=True):
            found = logprobs(policy, part)
            ratio, gains = torch.exp(found - found.detach()), part["advantages"]
            gain = torch.minimum(ratio * gains, ratio.clamp(1 - CLIP, 1 + CLIP) * gains)
            drift = anchor - found
            ((KL * (torch.exp(drift) - drift - 1) - gain).sum() / batch.tokens).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), NORM)
        optimizer.step()

    def matmul(size: int) -> float:
        square = torch.randn(size, size)
        return _seconds(lambda: square @ square)

    return Learner(step=step, matmul=matmul, figures={"rows": rows, "fill": _fill(parts, batch)},
                   policy=lambda: policy)


def _torch_model(config: DecoderConfig, directory: Path | None) -> Any:
    import torch
    import transformers

    if directory is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32,
                                                                 attn_implementation="sdpa")
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=config.vocabulary, hidden_size=config.width, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        intermediate_size=config.mlp_width,
        rms_norm_eps=config.norm_eps, rope_theta=config.kinds[0].rope.theta,
        tie_word_embeddings=config.tied,
        attn_implementation="sdpa", dtype=torch.float32))


def _torch_rows(batch: Batch, which: slice) -> dict[str, Any]:
    """One micro-batch: tokens [R, N - 1], which of them predict a response token, these tokens and
    their advantages."""
    import torch

    prompts = np.repeat(batch.prompts, batch.correct.shape[1], axis=0)[which]
    lengths = batch.lengths[which]
    tokens = np.concatenate([prompts, batch.responses[which, : lengths.max()]], axis=1)
    predicts = np.zeros((len(tokens), tokens.shape[1] - 1), bool)
    predicts[:, prompts.shape[1] - 1 :] = np.arange(lengths.max()) < lengths[:, None]
    return {"tokens": torch.from_numpy(tokens[:, :-1].astype(np.int64)),
            "predicts": torch.from_numpy(predicts),
            "targets": torch.from_numpy(tokens[:, 1:][predicts].astype(np.int64))[:, None],
            "advantages": torch.from_numpy(np.repeat(batch.advantages()[which], lengths))}


def _fill(parts: list[dict[str, Any]], batch: Batch) -> float:
    """The share of the positions computed on that hold a token."""
    return ((batch.prompts.shape[1] - 1) * len(batch.lengths) + batch.tokens) / sum(
        part["tokens"].numel() for part in parts)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def matmul_flops(learner: Learner, repeats: int = 3) -> float:
    """The best rate of some products of squares, with the learner's own library."""
    return max(2 * size**3 / min(learner.matmul(size) for _ in range(repeats)) for size in SQUARES)


def resident_bytes(field: str) -> int:
    """Reads VmRSS, what this process holds, or VmHWM, the most it has held.

    Not getrusage: its maximum is that of the parent if that held more when it started this
    process."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    raise RuntimeError("memory is read from /proc/self/status, which this system does not have")
