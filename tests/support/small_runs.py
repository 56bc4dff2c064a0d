"""A model that a few training steps change visibly, its problems, and a run of seconds."""

import dataclasses
import json
import math

import jax
import numpy as np

from effreason.data.tiny import build, tokenizer
from effreason.lm import model
from effreason.lm.hf.config import parse_config
from effreason.lm.hf.pretrained import write_decoder
from effreason.runtime import config as configuration

WIDTH = 48
# What follows what: thinking is a run of blanks, the answer one of three digits. Everything else is
# rare noise.
CHAIN = {"<think>": {" ": 1.0}, "\n": {" ": 1.0}, " ": {" ": 0.75, "</think>": 0.25},
         "</think>": {"\\": 1.0}, "\\": {"b": 1.0}, "b": {"o": 1.0}, "o": {"x": 1.0},
         "x": {"e": 1.0}, "e": {"d": 1.0}, "d": {"{": 1.0}, "{": {"7": 0.6, "8": 0.2, "9": 0.2},
         "7": {"}": 1.0}, "8": {"}": 1.0}, "9": {"}": 1.0}, "}": {tokenizer.EOS: 1.0},}
NOISE = 1e-4


def write_model(path):
    """Writes a Qwen2 directory that mostly answers 7, after a random number of blanks.

    A group has right and wrong, long and short responses. Each token is a direction of its own, and
    the head holds the chain's log-probs."""
    tokens = tokenizer.build()
    table = build.CONFIG | {"vocab_size": WIDTH, "hidden_size": WIDTH, "intermediate_size": 64,
                            "num_hidden_layers": 2, "head_dim": 8, "num_attention_heads": 4,
                            "num_key_value_heads": 2, "tie_word_embeddings": False,
                            "bos_token_id": tokens.bos_token_id,
                            "eos_token_id": tokens.eos_token_id}
    config = parse_config(table, path / "config.json")
    head = np.full((WIDTH, WIDTH), math.log(NOISE), np.float32)
    for token, following in CHAIN.items():
        for after, share in following.items():
            (column,), (row,) = (tokens.encode(text, add_special_tokens=False)
                                 for text in (token, after))
            head[row, column] = math.log(share)
    params = jax.device_get(jax.jit(model.init, static_argnums=0)(config, jax.random.key(0)))
    params |= {"embedding": 10 * np.eye(WIDTH, dtype=np.float32),
               "head": head / np.float32(math.sqrt(WIDTH))}
    write_decoder(params, config, table, "float32", path)
    tokens.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens.eos_token_id}))


def write_world(directory, train, test, first):
    """Writes a model, training problems, and test problems, which begin at number `first`."""
    (directory / "base").mkdir()
    write_model(directory / "base")
    write_problems(directory / "train.jsonl", train)
    write_problems(directory / "test.jsonl", test, first=first)
    return directory


def write_problems(path, count, first=0):
    """Sums to 7, easy and hard in turn."""
    rows = [{"problem": f"{first + index}+7-{first + index}", "answer": "7",
             "level": ("easy", "hard")[index % 2]} for index in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def overrides(world, directory, **changes):
    """Dotted settings of a short run on `world`, a directory with the model and the problems."""
    return {"model.path": str(world / "base"), "model.dtype": "float32", "model.remat": "none",
            "data.path": str(world / "train.jsonl"), "data.level_field": "level",
            "data.user_prompt": "{problem}", "rollout.prompts_per_step": 4, "rollout.group_size": 4,
            "rollout.max_new_tokens": 40, "rollout.slots": 16, "rollout.chunk": 8,
            "grade.workers": 1, "reward.alpha": 0.2, "update.learning_rate": 3e-3,
            "update.warmup_updates": 2, "update.rows_per_micro_batch": 8,
            "evaluation.path": str(world / "test.jsonl"), "evaluation.problems": 8,
            "checkpoint.every": 3, "log.tensorboard": False, "run.directory": str(directory),
            "run.steps": 6,} | changes


def config(world, directory, **changes):
    """The same as a Config."""
    defaults = configuration.Config()
    sections: dict[str, dict] = {}
    for name, value in overrides(world, directory, **changes).items():
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = value
    return dataclasses.replace(defaults,
                               **{section: dataclasses.replace(getattr(defaults, section), **fields)
                                  for section, fields in sections.items()})


def arguments(world, directory, **changes):
    """The same as command-line arguments."""
    settings = overrides(world, directory, **changes)
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]
