"""Rebuilds the shipped reasoner from a seed: `python -m effreason.data.tiny.build --output DIR`.

Trains on `traces.overthinking` with the trainer's own decoder. The result is a Hugging Face
directory with the Qwen2 architecture, like any other that the trainer takes.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effreason.data.tiny import tasks, tokenizer, traces
from effreason.lm import model
from effreason.lm.architecture import DecoderConfig
from effreason.lm.hf.config import parse_config
from effreason.lm.hf.pretrained import write_decoder

TRACES, DRILLS = 32, 16             # rows of each kind in a batch, on average
BUCKETS = (32, 64, 112, 176, 352)   # row lengths; a batch has one array for each: little padding

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
    "hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "attention_dropout": 0.0,
    "initializer_range": 0.02, "use_sliding_window": False, "dtype": "float32",
    "torch_dtype": "float32",
}
Encode = Callable[[str, str], tuple[list[int], list[int]]]     # problem, trace -> prompt, response
Row = tuple[list[int], int]                                    # ids; number of given ones
Batch = tuple[tuple[Any, Any], ...]


def draw_row(rng: np.random.Generator, encode: Encode) -> Row:
    """Returns a training row, a trace or a drill.

    In a drill all but the digit of a direct answer is given. So the reasoner learns the answers of
    easy problems without steps, but not to leave the steps out: the traces decide how often to."""
    if rng.random() < DRILLS / (TRACES + DRILLS):
        task = tasks.draw(rng, "easy", held_out=False)
        prompt, response = encode(task.text, traces.answer_text(task.answer))
        ids = (prompt + response)[:-2]                      # without the closing bracket and EOS
        return ids, len(ids) - 1

    task = tasks.draw(rng, str(rng.choice(list(tasks.LEVELS))), held_out=False)
    prompt, response = encode(task.text, traces.overthinking(rng, task))
    return prompt + response, len(prompt)


def batches(rng: np.random.Generator, encode: Encode) -> Iterator[Batch]:
    """Yields batches without end: (tokens int32[B, N], mask bool[B, N] of learnt tokens) by bucket.

    Every batch has as many rows of each bucket as the average batch. Otherwise rare rows, such as
    direct answers, would fill a few batches alone, whose gradients the optimizer would flatten."""
    waiting: dict[int, list[Row]] = {bucket: [] for bucket in BUCKETS}

    def draw_rows(count: int) -> None:
        for _ in range(count):
            ids, given = draw_row(rng, encode)
            bucket = next(bucket for bucket in BUCKETS if bucket >= len(ids))
            waiting[bucket].append((ids, given))

    draw_rows(4096)
    share = (TRACES + DRILLS) / 4096
    counts = {bucket: max(round(share * len(rows)), 1) for bucket, rows in waiting.items()}
    while True:
        while any(len(waiting[bucket]) < count for bucket, count in counts.items()):
            draw_rows(256)
        yield tuple(pad([waiting[bucket].pop(0) for _ in range(count)], bucket)
                    for bucket, count in counts.items())


def pad(rows: list[Row], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens int32[B, N] and mask bool[B, N]."""
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for index, (ids, given) in enumerate(rows):
        tokens[index, : len(ids)] = ids
        mask[index, given : len(ids)] = True
    return tokens, mask


def make_step(config: DecoderConfig, optimizer: optax.GradientTransformation) -> Any:
    """Returns a jitted step of supervised learning: mean cross-entropy over the learnt tokens."""
    def loss_fn(params: model.Params, batch: Batch) -> jax.Array:
        total, count = jnp.zeros(()), jnp.zeros((), jnp.int32)
        for tokens, mask in batch:
            logits = model.logits(params, model.forward(config, params, tokens[:, :-1]))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            total, count = total + jnp.sum(losses, where=mask[:, 1:]), count + jnp.sum(mask)
        return total / count

    def step(params: model.Params, opt_state: Any, batch: Batch) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def build(output: Path, *, seed: int, steps: int, learning_rate: float) -> None:
    """Writes the reasoner's directory; prints the loss during training."""
    reasoner_tokenizer = tokenizer.build()
    ids = {"bos_token_id": reasoner_tokenizer.bos_token_id,
           "eos_token_id": reasoner_tokenizer.eos_token_id}
    table = CONFIG | {"vocab_size": len(reasoner_tokenizer)} | ids
    config = parse_config(table, output / "config.json")

    def encode(problem: str, trace: str) -> tuple[list[int], list[int]]:
        rendered = reasoner_tokenizer.apply_chat_template(
            [{"role": "user", "content": problem}], tokenize=False, add_generation_prompt=True)
        encoded = reasoner_tokenizer([rendered, trace], add_special_tokens=False)
        prompt, response = encoded["input_ids"]
        return prompt, [*response, reasoner_tokenizer.eos_token_id]

    params = model.init(config, jax.random.key(seed))
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, 100, steps,
                                                  0.02 * learning_rate)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0),
                            optax.adamw(schedule, b2=0.98, weight_decay=0.01))
    opt_state, step = optimizer.init(params), make_step(config, optimizer)

    start, losses = time.monotonic(), []
    stream = itertools.islice(batches(np.random.default_rng(seed), encode), steps)
    for index, batch in enumerate(stream, 1):
        params, opt_state, loss = step(params, opt_state, batch)
        losses.append(loss)
        if index % 100 == 0 or index == steps:
            print(f"step {index}/{steps}  loss {np.mean(losses):.4f}  "
                  f"{time.monotonic() - start:.0f} s", flush=True)
            losses = []
        if index % 500 == 0:
            write_decoder(params, config, table, "float32", output)

    write_decoder(params, config, table, "float32", output)
    reasoner_tokenizer.save_pretrained(output)
    generation = ids | {"pad_token_id": reasoner_tokenizer.pad_token_id, "do_sample": True,
                        "temperature": 1.0}
    (output / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    options = vars(parser.parse_args())
    build(options.pop("output"), **options)
