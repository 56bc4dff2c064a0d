"""Accuracy and length of a model on held-out problems."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from effreason import prompts
from effreason.engine import check_model
from effreason.errors import UserError
from effreason.grades import Grade, Grader
from effreason.lm import hf, model
from effreason.records import Evaluation, LevelResult, Problem, Rollouts
from effreason.rollouts import Sampler, Sampling, collect, make_sampler, step_key
from effreason.runtime import sharding
from effreason.runtime.config import Config
from effreason.runtime.interrupts import Interrupts
from effreason.runtime.metrics import disk, write_json

GRADED_AT_ONCE = 512                # responses under one grade.step_budget_seconds
UNDECIDED_LIMIT = 0.02              # share of answers the grader may fail to decide, ...
UNDECIDED_FEW = 2                   # ... beyond so many, which say nothing of a share

Watch = Callable[[int, int, int], None]     # finished responses, all responses, tokens so far


class Undecided(UserError):
    """The grader is too slow or broken for its verdicts to mean anything."""


def gather(sampler: Sampler, params: model.Params, problems: Sequence[Problem], group_size: int, key: jax.Array,
           watch: Watch) -> Rollouts:
    """Runs the sampler to its end; `watch` is called after every chunk, and may raise to stop it."""
    finished, tokens, total = [], 0, len(problems) * group_size
    watch(0, total, 0)
    for responses in sampler(params, problems, group_size, key):
        finished += responses
        tokens += sum(len(response.tokens) for response in responses)
        watch(len(finished), total, tokens)
    return collect(problems, finished, group_size)


def texts(rollouts: Rollouts, tokenizer: object) -> list[str]:
    """The responses as text, row by row, without special tokens; think tags are ordinary tokens and stay."""
    prompts_count, group_size = rollouts.lengths.shape
    rows = [rollouts.tokens[prompt, sample, : rollouts.lengths[prompt, sample]].tolist()
            for prompt in range(prompts_count) for sample in range(group_size)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)       # type: ignore[attr-defined]


def grade(rollouts: Rollouts, responses: Sequence[str], problems: Sequence[Problem], grader: Grader, *,
          require_eos: bool) -> tuple[np.ndarray, list[Grade]]:
    """bool[P, G], which responses count as correct, and every response's grade, row by row.

    Args: require_eos, a response that was cut off at the token limit is wrong whatever its text holds.
    Raises: UserError when too many answers stay undecided: they would count as wrong for no fault of the model."""
    group_size = rollouts.lengths.shape[1]
    golds = [problem.answer for problem in problems for _ in range(group_size)]
    # Where the prompt has opened the thinking, a response that never closes it has no answer.
    whole = [("<think>" if problems[row // group_size].opens_thinking else "") + text
             for row, text in enumerate(responses)]
    verdicts: list[Grade] = []
    for start in range(0, len(whole), GRADED_AT_ONCE):
        part = slice(start, start + GRADED_AT_ONCE)
        verdicts += grader.grade(whole[part], golds[part])
    check_decided(verdicts)
    correct = np.array([verdict.correct for verdict in verdicts]).reshape(rollouts.lengths.shape)
    return (correct & rollouts.ended if require_eos else correct), verdicts


def check_decided(verdicts: Sequence[Grade]) -> None:
    """Raises Undecided when the grader has left more answers undecided than can be passed over."""
    count = sum(verdict.status in ("error", "budget") for verdict in verdicts)
    if count > max(UNDECIDED_FEW, UNDECIDED_LIMIT * len(verdicts)):
        raise Undecided(f"the grader could not decide {count} of {len(verdicts)} answers in time, at most "
                        f"{100 * UNDECIDED_LIMIT:.0f} % are accepted; raise grade.step_budget_seconds or grade.workers")


def measure(correct: np.ndarray, rollouts: Rollouts, problems: Sequence[Problem]) -> Evaluation:
    """Means over samples, then problems; by level too.

    Args: correct bool[P, k]."""
    accuracy, tokens = correct.mean(axis=1), rollouts.lengths.mean(axis=1)
    levels = np.array([problem.level for problem in problems])
    by_level = {str(level): LevelResult(accuracy=float(accuracy[levels == level].mean()),
                                        tokens=float(tokens[levels == level].mean()),
                                        problems=int((levels == level).sum()))
                for level in dict.fromkeys(levels)}
    return Evaluation(accuracy=float(accuracy.mean()), tokens=float(tokens.mean()),
                      truncated=float(1.0 - rollouts.ended.mean()), problems=len(problems),
                      samples=correct.shape[1], by_level=by_level)


def make_evaluator(config: Config, pretrained: hf.Pretrained, mesh: jax.sharding.Mesh, problems: Sequence[Problem],
                   grader: Grader) -> Callable[[model.Params, Watch], Evaluation]:
    """evaluate(params, watch) -> Evaluation on the same problems, drawn with the same keys each time.

    Common random numbers: two models differ by what they are, less by luck."""
    settings = config.evaluation
    sampling = Sampling(temperature=settings.temperature, top_p=settings.top_p, eos_ids=pretrained.eos_ids,
                        max_new_tokens=settings.max_new_tokens or config.rollout.max_new_tokens)
    sampler = make_sampler(pretrained.decoder, mesh, sampling, slots=config.rollout.slots, chunk=config.rollout.chunk)
    key = step_key(config.run.seed, "evaluation", 0)

    def evaluate(params: model.Params, watch: Watch) -> Evaluation:
        rollouts = gather(sampler, params, problems, settings.samples, key, watch)
        correct, _ = grade(rollouts, texts(rollouts, pretrained.tokenizer), problems, grader,
                           require_eos=config.grade.require_eos)
        return measure(correct, rollouts, problems)

    return evaluate


def make_grader(config: Config) -> Grader:
    """The grader with the configuration's limits."""
    limits = config.grade
    return Grader(workers=limits.workers, cpu_seconds=limits.cpu_seconds, wall_seconds=limits.wall_seconds,
                  memory_mb=limits.memory_mb, step_budget_seconds=limits.step_budget_seconds)


def held_out(config: Config, tokenizer: object) -> list[Problem]:
    """The first evaluation.problems held-out problems."""
    path = config.evaluation.path or config.data.path
    return prompts.load(config.data, path, tokenizer, held_out=True, limit=config.evaluation.problems)


def from_table(table: dict) -> Evaluation:
    """The inverse of dataclasses.asdict."""
    return Evaluation(**table | {"by_level": {level: LevelResult(**row) for level, row in table["by_level"].items()}})


def evaluate_model(config: Config, path: str, mesh: jax.sharding.Mesh, grader: Grader, watch: Watch) -> Evaluation:
    """Evaluates one Hugging Face directory, whose weights are given up again when this returns."""
    pretrained = hf.open_pretrained(path, dtype=config.model.dtype, remat=config.model.remat)
    check_model(pretrained, config, mesh)
    problems = held_out(config, pretrained.tokenizer)
    params = hf.load(pretrained.directory, pretrained.decoder,
                     sharding.tree_sharding(mesh, model.logical_axes(pretrained.decoder)))
    return make_evaluator(config, pretrained, mesh, problems, grader)(params, watch)


def evaluate_models(config: Config, models: Sequence[str], output: Path | None) -> None:
    """Evaluates each model on the same problems; prints a table and writes output/results.json where asked."""
    sharding.use_compilation_cache()
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    console, results = Console(), {}
    with Interrupts() as interrupts, make_grader(config) as grader:
        for path in models:
            with console.status("") as status:

                def watch(finished: int, total: int, tokens: int, path: str = path) -> None:
                    interrupts.check()
                    status.update(f"{path}: {finished}/{total} responses, {tokens:,} tokens")

                results[path] = evaluate_model(config, path, mesh, grader, watch)
    console.print(_table(results))
    if output is not None:
        with disk(output):
            output.mkdir(parents=True, exist_ok=True)
        write_json(output / "results.json", {path: dataclasses.asdict(result) for path, result in results.items()})


def _table(results: dict[str, Evaluation]) -> Table:
    table = Table(title="Held-out problems", title_justify="left")
    for heading in ("model", "level", "problems", "accuracy", "tokens"):
        table.add_column(heading, justify="left" if heading in ("model", "level") else "right", overflow="fold")
    for path, result in results.items():
        levels = result.by_level if len(result.by_level) > 1 else {}
        for level, row in (levels | {"all": result}).items():
            table.add_row(path, level, str(row.problems), f"{100 * row.accuracy:.1f} %", f"{row.tokens:.1f}",
                          end_section=level == "all")
    return table
