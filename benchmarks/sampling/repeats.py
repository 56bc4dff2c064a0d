"""Measures what drafts save in the tail of a rollout, when at most 8 responses are left.

    python -m benchmarks.sampling.repeats [--set tiny] [--problems 16] [--draft-tokens 2,4,8]
        [--steps 4] [--repeats 3]

The shipped reasoner samples 16 held-out problems x 8 responses, as a step of the default run does,
for some training steps, with and without drafts in turn. Decode steps, tokens and seconds are those
of the tail, summed over the training steps, the seconds (by the clock, and of the processor) of the
best repeat of each. The tokens must be the same with and without.
"""

import argparse
import collections
import time
from typing import Any

import numpy as np

from benchmarks.shared import print_table, say
from effreason.data import loading, templates
from effreason.lm import model
from effreason.lm.hf.pretrained import Pretrained, load_weights, open_pretrained
from effreason.runtime import config as configuration
from effreason.runtime import sharding
from effreason.sampling import engine
from effreason.sampling.draws import SamplingParams
from effreason.sampling.scheduler import Request, make_requests

SAMPLES, LEFT, CHUNK = 8, 8, 16
LIMITS = {"tiny": 288, "tiny_long": 600}        # response tokens, by set
Figures = dict[str, float]


def requests_of(tiny: Pretrained, name: str, count: int = 16) -> list[Request]:
    """Returns the requests for all responses to the first problems of a held-out set."""
    config = configuration.load(configuration.shipped() / "tiny.yaml")
    template = templates.choose(tiny.tokenizer, config.data)
    problems = loading.load_held_out(config, tiny.tokenizer, template)[0][name][:count]
    return make_requests([problem.prompt for problem in problems], SAMPLES, LIMITS[name],
                         uids=[problem.uid for problem in problems])


def make_sampler(tiny: Pretrained, requests: list[Request], drafts: int) -> engine.Sampler:
    """Returns the engine with a slot for each response."""
    longest = max(request.length + request.max_new_tokens for request in requests)
    return engine.make_sampler(tiny.decoder, sharding.make_mesh(data=-1), slots=len(requests),
                               chunk=CHUNK, max_positions=longest, draft_tokens=drafts)


def run(generation: engine.Generation) -> tuple[list[np.ndarray], Figures]:
    """Returns all tokens in the order of the prompts, and the tail's seconds, steps and tokens."""
    responses: list[Any] = []
    before: Figures = {}
    while generation.running:
        host_seconds = generation.host_seconds
        responses += next(generation)
        if not before and generation.running <= LEFT and not generation.waiting:
            # The launch of the tail's first chunk is part of it.
            before = figures_of(generation)
            before["seconds"] -= generation.host_seconds - host_seconds

    figures = {name: value - before[name] for name, value in figures_of(generation).items()}
    in_order = sorted(responses, key=lambda response: (response.prompt, response.sample))
    return [response.tokens for response in in_order], figures


def figures_of(generation: engine.Generation) -> Figures:
    return {"seconds": time.perf_counter(), "processor": time.process_time(),
            "steps": generation.steps, "tokens": generation.tokens}


def measure(options: argparse.Namespace) -> dict[int, list[Figures]]:
    """Returns the figures of the tail of each training step, by the tokens of a draft.

    Raises: RuntimeError if a response differs with drafts."""
    tiny = open_pretrained("tiny", dtype="float32")
    requests = requests_of(tiny, options.set, options.problems)
    samplers = {drafts: make_sampler(tiny, requests, drafts)
                for drafts in (0, *options.draft_tokens)}
    params = load_weights(tiny, sharding.tree_sharding(sharding.make_mesh(data=-1),
                                                       model.logical_axes(tiny.decoder)))
    sampling = SamplingParams(temperature=1.0, eos_ids=tiny.eos_ids)

    found: dict[int, list[Figures]] = collections.defaultdict(list)
    for step in range(options.steps):
        key, expected = engine.step_key(0, "train", step), None
        runs: dict[int, list[Figures]] = collections.defaultdict(list)
        for repeat in range(options.repeats + 1):       # the first compiles
            say(f"step {step}, run {repeat}")
            for drafts, sampler in samplers.items():
                tokens, figures = run(sampler(params, requests, key, sampling))
                expected = expected or tokens
                if any(not np.array_equal(*pair) for pair in zip(tokens, expected, strict=True)):
                    raise RuntimeError(f"drafts of {drafts} tokens have changed a response")
                runs[drafts] += [figures] * (repeat > 0)
        for drafts, measured in runs.items():
            found[drafts].append({name: min(figures[name] for figures in measured)
                                  for name in measured[0]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=list(LIMITS), default="tiny")
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--draft-tokens", type=lambda text: [*map(int, text.split(","))],
                        default=[2, 4, 8], metavar="K,...")
    parser.add_argument("--steps", type=int, default=4, help="training steps")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    sharding.use_compilation_cache()

    totals = {drafts: {name: sum(figures[name] for figures in steps) for name in steps[0]}
              for drafts, steps in measure(options).items()}
    print_table(["draft tokens", "steps", "tokens/step", "ms", "processor ms", "faster"], [
        [f"{drafts}", f"{total['steps']:.0f}", f"{total['tokens'] / total['steps']:.2f}",
         f"{1e3 * total['seconds']:.1f}", f"{1e3 * total['processor']:.1f}",
         f"{totals[0]['seconds'] / total['seconds']:.2f}"]
        for drafts, total in totals.items()])


if __name__ == "__main__":
    main()
