"""Rebuilds the shipped reasoner from a seed: `python -m effreason.tiny.build --output DIR`.

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

from effreason.lm import hf, model
from effreason.tiny import tasks, tokenizer, traces

TOKENS_A_BATCH = 8192               # tokens a batch, padding included: short rows come in larger batches
BUCKETS = (64, 96, 128, 192, 256, 320)   # row lengths, so that five shapes are compiled and little is padded
POOL = 4096                         # traces drawn at a time, then sorted into batches of like lengths

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 96,
    "intermediate_size": 288, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "attention_dropout": 0.0, "initializer_range": 0.02, "use_sliding_window": False, "dtype": "float32",
    "torch_dtype": "float32",
}


def rows(rng: np.random.Generator, encode) -> list[tuple[list[int], int]]:
    """POOL training rows: prompt and trace ids, and how many of them are the prompt's."""
    drawn = []
    for _ in range(POOL):
        task = tasks.draw(rng, str(rng.choice(list(tasks.LEVELS))), held_out=False)
        prompt, response = encode(task.text, traces.overthinking(rng, task))
        drawn.append((prompt + response, len(prompt)))
    return drawn


def batches(rng: np.random.Generator, encode):
    """Endless (tokens int32[B, N], mask bool[B, N] of the trained tokens), rows of like lengths together."""
    waiting: dict[int, list] = {bucket: [] for bucket in BUCKETS}
    while True:
        for ids, prompt_length in rows(rng, encode):
            bucket = next(bucket for bucket in BUCKETS if bucket >= len(ids))
            waiting[bucket].append((ids, prompt_length))
        ready = []
        for bucket, queue in waiting.items():
            size = TOKENS_A_BATCH // bucket
            while len(queue) >= size:
                ready.append((bucket, [queue.pop() for _ in range(size)]))
        for index in rng.permutation(len(ready)):
            bucket, chosen = ready[index]
            tokens = np.zeros((len(chosen), bucket), np.int32)
            mask = np.zeros((len(chosen), bucket), bool)
            for row, (ids, prompt_length) in enumerate(chosen):
                tokens[row, : len(ids)] = ids
                mask[row, prompt_length : len(ids)] = True
            yield tokens, mask


def make_step(config: model.DecoderConfig, optimizer: optax.GradientTransformation):
    """One jitted step of supervised learning: mean cross-entropy over the batch's response tokens."""

    def loss(params, tokens, mask):
        logits = model.logits(params, model.forward(config, params, tokens[:, :-1]))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(losses, where=mask[:, 1:]) / jnp.sum(mask[:, 1:])

    def step(params, state, tokens, mask):
        value, gradients = jax.value_and_grad(loss)(params, tokens, mask)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def build(output: Path, *, seed: int, steps: int, learning_rate: float) -> None:
    """Writes the reasoner's directory; prints the loss on the way."""
    tokens = tokenizer.build()
    table = CONFIG | {"vocab_size": len(tokens), "bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
    config = hf.parse_config(table, output / "config.json", remat=False)

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
        params, state, value = step(params, state, *next(stream))
        recent.append(value)
        if index % 100 == 0 or index == steps:
            print(f"step {index}/{steps}  loss {np.mean(recent):.4f}  {time.monotonic() - start:.0f} s", flush=True)
            recent = []
    hf.write_model(params, config, table, "float32", output)
    tokens.save_pretrained(output)
    generation = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id,
                  "pad_token_id": tokens.pad_token_id, "do_sample": True, "temperature": 1.0}
    (output / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    build(arguments.output, seed=arguments.seed, steps=arguments.steps, learning_rate=arguments.learning_rate)
