"""What bfloat16 changes: log-probs and greedy tokens of a checkpoint against the same weights in
float32.

    python -m benchmarks.models.bfloat16 --model DIR [--tokens 64] [--json]

Six questions, rendered by the model's chat template. The table has the differences of log-probs, in
nats, between the two dtypes, over the prompts and over the float32 model's greedy answers; after
how many tokens the greedy answers part; and, for each dtype by itself, how far the sampler's
log-probs of sampled tokens are from the trainer's: the mismatch that rollout.max_mismatch bounds.
"""

import argparse
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from effreason.lm import model
from effreason.lm.architecture import DecoderConfig
from effreason.lm.hf.pretrained import load_weights, open_pretrained
from effreason.rl import packing, update
from effreason.runtime import sharding
from effreason.sampling import engine
from effreason.sampling.draws import SamplingParams
from effreason.sampling.scheduler import make_requests
from effreason.types import Problem, Response, Rows

QUESTIONS = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did Natalia sell altogether in April and May?",
    "What is 17 + 26? Answer with a number.",
    "A train travels 60 miles in 1.5 hours. What is its average speed in miles per hour?",
    r"Solve for x: 3x + 7 = 22. Put the final answer in \boxed{}.",
    "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 "
    "minutes of babysitting. How much did she earn?",
    "List the first five prime numbers, then give their sum.",
)
DTYPES = ("float32", "bfloat16")
GREEDY = 1e-4                       # a temperature that leaves no choice


def prompts(tokenizer) -> list[Problem]:
    """The questions as prompts."""
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                           add_generation_prompt=True) for text in QUESTIONS]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [Problem(uid=uid, prompt=np.array(each, np.int32), text=text, reference="", level="all")
            for uid, (each, text) in enumerate(zip(ids, QUESTIONS, strict=True))]


def sample(decoder: DecoderConfig, params: model.Params, problems: list[Problem],
           temperature: float,
           tokens: int) -> list[Response]:
    """One response to each prompt, in their order, none ended by an EOS."""
    sampling = SamplingParams(temperature=temperature, eos_ids=())
    sampler = engine.make_sampler(decoder, sharding.make_mesh(), slots=len(problems), chunk=16)
    requests = make_requests([problem.prompt for problem in problems], 1, tokens,
                             uids=[problem.uid for problem in problems])
    chunks = sampler(params, requests, jax.random.key(0), sampling)
    return sorted((response for chunk in chunks for response in chunk),
                  key=lambda response: response.prompt)


def score(decoder: DecoderConfig, params: model.Params, problems: list[Problem],
          responses: list[Response]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The trainer's log-probs of each prompt, from its second token, and of each response."""
    lines = [np.concatenate([problem.prompt, response.tokens])
             for problem, response in zip(problems, responses, strict=True)]
    score = jax.jit(functools.partial(update.score_rows, decoder, temperature=1.0, tile=2048))
    width = max(map(len, lines))
    table = jax.tree.map(lambda *rows: np.stack(rows),
                         *(packing.pack_row([line], width) for line in lines))
    scored = score(params, Rows(**table, response_index=np.zeros_like(table["tokens"])))[0]
    return [(row[: len(problem.prompt) - 1], row[len(problem.prompt) - 1 : len(line) - 1])
            for row, problem, line in zip(np.asarray(scored), problems, lines, strict=True)]


def apart(one: list[np.ndarray], other: list[np.ndarray]) -> dict[str, float]:
    """Mean and largest difference over all tokens."""
    gaps = np.abs(np.concatenate(one) - np.concatenate(other))
    return {"mean": float(gaps.mean()), "max": float(gaps.max())}


def agreed(one: Response, other: Response) -> int:
    """How many tokens two responses have in common at their start."""
    different = np.flatnonzero(one.tokens != other.tokens)
    return int(different[0]) if different.size else len(one.tokens)


def measure(path: str, tokens: int) -> dict:
    """All figures of one model."""
    pretrained = open_pretrained(path, dtype="float32")
    params, problems = load_weights(pretrained), prompts(pretrained.tokenizer)
    decoders = {dtype: dataclasses.replace(pretrained.decoder, dtype=jnp.dtype(dtype))
                for dtype in DTYPES}
    greedy = {dtype: sample(decoder, params, problems, GREEDY, tokens)
              for dtype, decoder in decoders.items()}
    exact, coarse = (score(decoder, params, problems, greedy["float32"])
                     for decoder in decoders.values())
    row = {"model": pretrained.directory.name, "tokens": tokens,
           "prompt": apart([prompt for prompt, _ in exact], [prompt for prompt, _ in coarse]),
           "answer": apart([answer for _, answer in exact], [answer for _, answer in coarse]),
           "greedy_agrees_until": [
               agreed(*pair)
               for pair in zip(greedy["float32"], greedy["bfloat16"], strict=True)]}
    for dtype, decoder in decoders.items():
        drawn = sample(decoder, params, problems, 1.0, tokens)
        scored = [answer for _, answer in score(decoder, params, problems, drawn)]
        row[f"mismatch_{dtype}"] = apart([response.logprobs for response in drawn], scored)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face directory or Hub id")
    parser.add_argument("--tokens", type=int, default=64, help="length of the answers")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()
    sharding.use_compilation_cache()
    row = measure(options.model, options.tokens)
    if options.json:
        print(json.dumps(row))
        return
    print(f"{row['model']}, {len(QUESTIONS)} prompts, {options.tokens} tokens each\n")
    print("| log-probs, nats apart | mean | largest |\n|---|---|---|")
    for name, label in (("prompt", "bfloat16 and float32, prompts"),
                        ("answer", "bfloat16 and float32, greedy answers"),
                        ("mismatch_float32", "sampler and trainer, float32"),
                        ("mismatch_bfloat16", "sampler and trainer, bfloat16")):
        print(f"| {label} | {row[name]['mean']:.2g} | {row[name]['max']:.2g} |")
    print(f"\nGreedy answers agree for {', '.join(map(str, row['greedy_agrees_until']))} "
          f"of {options.tokens} tokens.")


if __name__ == "__main__":
    main()
