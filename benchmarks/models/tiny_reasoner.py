"""Measures a tiny reasoner, by default the shipped one, for the tables of docs/tiny.md, as
Markdown.

    python -m benchmarks.models.tiny_reasoner [--model runs/NAME/model]

Accuracy, tokens against the fewest that write every step once, answers without thinking, and which
way the policy gradient pulls on length: the mean over responses of advantage x (length - the
group's mean length), in tokens.
"""

import argparse

import jax
import numpy as np

from effreason.data import loading, templates
from effreason.data.tiny import tasks, traces
from effreason.evaluation import evaluate
from effreason.lm import model
from effreason.lm.hf.pretrained import open_pretrained
from effreason.lm.hf.weights import read_weights
from effreason.rl.advantages import leave_one_out, length_pull
from effreason.rl.rewards import length_rewards
from effreason.rl.rollouts import sample_and_grade
from effreason.runtime import config as configuration
from effreason.runtime import sharding
from effreason.sampling import engine
from effreason.sampling.draws import SamplingParams

PROBLEMS, GROUP_SIZE = 600, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny",
                        help="Hugging Face directory; default: the shipped reasoner")
    path = parser.parse_args().model
    sharding.use_compilation_cache()
    config = configuration.load(configuration.shipped() / "tiny.yaml")
    mesh = sharding.make_mesh(data=-1)
    tiny = open_pretrained(path, dtype=config.model.dtype)
    template = templates.choose(tiny.tokenizer, config.data)
    problems = loading.load_held_out(config, tiny.tokenizer, template)[0]["tiny"]
    params = read_weights(tiny.directory, tiny.decoder,
                          sharding.tree_sharding(mesh, model.logical_axes(tiny.decoder)))
    sampling = SamplingParams(temperature=1.0, eos_ids=tiny.eos_ids)
    sampler = engine.make_sampler(tiny.decoder, mesh, slots=256, chunk=16)
    key = engine.step_key(0, "evaluation", 1)
    with evaluate.make_grader(config) as grader:
        tried = sample_and_grade(
            lambda requests: sampler(params, requests, key, sampling), problems, GROUP_SIZE,
            config.rollout.max_new_tokens, tokenizer=tiny.tokenizer, grader=grader,
            require_eos=True,
            on_chunk=lambda progress: None)
    texts, correct, sampled = tried.texts, tried.correct, tried.rollouts
    direct = np.array([text.startswith("</think>") for text in texts]).reshape(correct.shape)
    fewest = np.array([fewest_tokens(tiny.tokenizer, task) for task, _ in zip(
        tasks.distinct(0, held_out=True), problems, strict=False)])
    levels = np.array([problem.level for problem in problems])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{parameters:,} parameters, {PROBLEMS} held-out problems x {GROUP_SIZE} responses\n")
    print("| level | accuracy | tokens | fewest needed | times the fewest "
          "| answers at once | right of these |")
    print("|---" * 7 + "|")
    for level in tasks.LEVELS:
        at = levels == level
        tokens, answered = sampled.lengths[at].mean(), direct[at]
        right = f"{100 * correct[at][answered].mean():.0f} %" if answered.any() else "-"
        print(f"| {level} | {100 * correct[at].mean():.1f} % | "
              f"{tokens:.1f} | {fewest[at].mean():.1f} | "
              f"{tokens / fewest[at].mean():.1f} | {100 * answered.mean():.1f} % | {right} |")
    alphas = (0.0, 0.05, 0.1, 0.2, 0.4)
    columns = "".join(f" α = {alpha:g} |" for alpha in alphas)
    print("\n| pull on length, tokens |" + columns + "\n" + "|---" * 6 + "|")
    for level in tasks.LEVELS:
        at = levels == level
        pulls = [length_pull(leave_one_out(length_rewards(correct[at], sampled.lengths[at],
                                                          alpha=alpha)),
                             sampled.lengths[at]) for alpha in alphas]
        print(f"| {level} |" + "".join(f" {pull:+.2f} |" for pull in pulls))


def fewest_tokens(tokenizer, task: tasks.Task) -> int:
    """Tokens of the trace that writes every step once, EOS included."""
    return len(tokenizer(traces.concise(task), add_special_tokens=False)["input_ids"]) + 1


if __name__ == "__main__":
    main()
