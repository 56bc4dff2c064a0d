"""Rebuilds the shipped reasoner from a seed: `python -m effreason.data.tiny.build --output DIR`.

Supervised learning of `traces.overthinking` with the training program's own decoder; the result is a Hugging Face
directory of the Qwen2 architecture like any other that the trainer takes.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effreason.data.tiny import tasks, tokenizer, traces
from effreason.lm import model
from effreason.lm.hf.config import parse_config
from effreason.lm.hf.pretrained import write_decoder

TRACES, DRILLS = 32, 16             # rows of each kind in a batch, on average
BUCKETS = (32, 64, 112, 176, 352)   # a batch is one array for each of these row lengths: little padding

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 96,
    "intermediate_size": 288, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "attention_dropout": 0.0, "initializer_range": 0.02, "use_sliding_window": False, "dtype": "float32",
    "torch_dtype": "float32",
}


def row(rng: np.random.Generator, encode) -> tuple[list[int], int]:
    """A training row: the ids of prompt and response, and how many at their start are given, not learnt.

    A trace, or a drill, in which all but the digit of a direct answer is given. So the reasoner learns what an easy
    problem's answer is without its steps, and does not learn to leave them out: how often to is for the traces to say.
    """
    if rng.random() < DRILLS / (TRACES + DRILLS):
        task = tasks.draw(rng, "easy", held_out=False)
        prompt, response = encode(task.text, traces.answer_text(task.answer))
        ids = (prompt + response)[:-2]                      # without the closing bracket and EOS
        return ids, len(ids) - 1
    task = tasks.draw(rng, str(rng.choice(list(tasks.LEVELS))), held_out=False)
    prompt, response = encode(task.text, traces.overthinking(rng, task))
    return prompt + response, len(prompt)


def batches(rng: np.random.Generator, encode):
    """Endless batches, each a tuple of (tokens int32[B, N], mask bool[B, N] of the learnt tokens), one for each bucket.

    Every batch has as many rows of each bucket as the average batch: rare rows, such as direct answers, then come in
    all batches and not in a few that hold nothing else, whose gradients the optimiser would flatten."""
    waiting: dict[int, list] = {bucket: [] for bucket in BUCKETS}

    def more(count: int) -> None:
        for _ in range(count):
            ids, given = row(rng, encode)
            waiting[next(bucket for bucket in BUCKETS if bucket >= len(ids))].append((ids, given))

    more(4096)
    share = (TRACES + DRILLS) / 4096
    counts = {bucket: max(round(share * len(drawn)), 1) for bucket, drawn in waiting.items()}
    while True:
        while any(len(waiting[bucket]) < count for bucket, count in counts.items()):
            more(256)
        yield tuple(padded([waiting[bucket].pop(0) for _ in range(count)], bucket) for bucket, count in counts.items())


def padded(chosen: list[tuple[list[int], int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as arrays: tokens int32[B, N] and mask bool[B, N]."""
    tokens, mask = np.zeros((len(chosen), width), np.int32), np.zeros((len(chosen), width), bool)
    for index, (ids, given) in enumerate(chosen):
        tokens[index, : len(ids)] = ids
        mask[index, given : len(ids)] = True
    return tokens, mask


def make_step(config: model.DecoderConfig, optimizer: optax.GradientTransformation):
    """One jitted step of supervised learning: mean cross-entropy over the batch's learnt tokens."""

    def loss(params, batch):
        total, count = jnp.zeros(()), jnp.zeros((), jnp.int32)
        for tokens, mask in batch:
            logits = model.logits(params, model.forward(config, params, tokens[:, :-1]))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            total, count = total + jnp.sum(losses, where=mask[:, 1:]), count + jnp.sum(mask)
        return total / count

    def step(params, state, batch):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def build(output: Path, *, seed: int, steps: int, learning_rate: float) -> None:
    """Writes the reasoner's directory; prints the loss on the way."""
    tokens = tokenizer.build()
    table = CONFIG | {"vocab_size": len(tokens), "bos_token_id": tokens.bos_token_id,
                      "eos_token_id": tokens.eos_token_id}
    config = parse_config(table, output / "config.json")

    def encode(problem: str, trace: str) -> tuple[list[int], list[int]]:
        rendered = tokens.apply_chat_template([{"role": "user", "content": problem}], tokenize=False,
                                              add_generation_prompt=True)
        prompt, response = tokens([rendered, trace], add_special_tokens=False)["input_ids"]
        return prompt, [*response, tokens.eos_token_id]

    params = model.init(config, jax.random.key(seed))
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, 100, steps, 0.02 * learning_rate)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))
    state, step = optimizer.init(params), make_step(config, optimizer)
    stream, start, recent = batches(np.random.default_rng(seed), encode), time.monotonic(), []
    for index in range(1, steps + 1):
        params, state, value = step(params, state, next(stream))
        recent.append(value)
        if index % 100 == 0 or index == steps:
            print(f"step {index}/{steps}  loss {np.mean(recent):.4f}  {time.monotonic() - start:.0f} s", flush=True)
            recent = []
        if index % 500 == 0:
            write_decoder(params, config, table, "float32", output)
    write_decoder(params, config, table, "float32", output)
    tokens.save_pretrained(output)
    generation = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id,
                  "pad_token_id": tokens.pad_token_id, "do_sample": True, "temperature": 1.0}
    (output / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    build(arguments.output, seed=arguments.seed, steps=arguments.steps, learning_rate=arguments.learning_rate)
