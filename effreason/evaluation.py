"""Accuracy and length of a model on held-out problems."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.table import Table

from effreason import prompts
from effreason.attempts import Watch, attempt, mean_lengths, unmatched
from effreason.engine import check_model, make_sampler
from effreason.errors import UserError
from effreason.grades import Grader
from effreason.inputs import model_fingerprint
from effreason.lm import hf, hub, model
from effreason.problems import templates
from effreason.records import Evaluation, LevelResult, Problem, Rollouts
from effreason.rollouts import Sampler, step_key
from effreason.runtime import config as configuration
from effreason.runtime import processes, sharding
from effreason.runtime.config import Config
from effreason.runtime.interrupts import Interrupts
from effreason.runtime.metrics import disk, write_json
from effreason.runtime.progress import Headway, rate, say
from effreason.sampling import memory
from effreason.sampling.draws import Sampling

# (params, watch, tokens expected by uid) -> the result, and the mean tokens of each problem by uid
Evaluate = Callable[[model.Params, Watch, Mapping[int, float]], tuple[Evaluation, dict[int, float]]]


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


def make_evaluator(config: Config, pretrained: hf.Pretrained, sampler: Sampler, problems: Sequence[Problem],
                   grader: Grader) -> Evaluate:
    """evaluate(params, watch, expected) on the same problems, drawn with the same keys each time.

    Common random numbers: two models differ by what they are, less by luck."""
    settings = config.evaluation
    sampling = Sampling(temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k,
                        min_p=settings.min_p, eos_ids=pretrained.eos_ids)
    key = step_key(config.run.seed, "evaluation", 0)

    def evaluate(params: model.Params, watch: Watch,
                 expected: Mapping[int, float]) -> tuple[Evaluation, dict[int, float]]:
        tried = attempt(lambda requests: sampler(params, requests, key, sampling), problems, settings.samples,
                        settings.max_new_tokens or config.rollout.max_new_tokens, tokenizer=pretrained.tokenizer,
                        grader=grader, require_eos=config.grade.require_eos, watch=watch, expected=expected)
        return measure(tried.correct, tried.rollouts, problems), mean_lengths(problems, tried.rollouts)

    return evaluate


def make_grader(config: Config) -> Grader:
    """The grader with the configuration's limits."""
    limits = config.grade
    return Grader(workers=limits.workers, cpu_seconds=limits.cpu_seconds, wall_seconds=limits.wall_seconds,
                  memory_mb=limits.memory_mb, step_budget_seconds=limits.step_budget_seconds,
                  function=limits.function)


def from_table(table: dict) -> Evaluation:
    """The inverse of dataclasses.asdict."""
    return Evaluation(**table | {"by_level": {level: LevelResult(**row) for level, row in table["by_level"].items()}})


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model to evaluate, but its weights, and the prompts it will read."""

    pretrained: hf.Pretrained
    template: templates.Template


def open_model(config: Config, path: str, revision: str | None, mesh: jax.sharding.Mesh) -> Opened:
    """Opens a model and checks it. Raises: UserError."""
    pretrained = hf.open_pretrained(path, revision=revision, dtype=config.model.dtype, remat=config.model.remat)
    check_model(pretrained, config, mesh)
    template = templates.choose(pretrained.tokenizer, config.data)
    check_template(pretrained, template, config)
    return Opened(pretrained, template)


def revised(config: Config, models: Sequence[str]) -> str | None:
    """The model that model.revision is of: model.path where it is among the models, else the one on the Hub.

    Raises: UserError where that leaves a choice."""
    if config.model.revision is None or config.model.path in models:
        return config.model.path
    on_hub = [path for path in models if path != "tiny" and hub.standing(Path(path)) is None]
    if len(on_hub) != 1:
        raise UserError(f"model.revision is for one model on the Hub, got {config.model.revision} and {len(on_hub)} "
                        "of them in models; name it in model.path too")
    return on_hub[0]


def check_template(pretrained: hf.Pretrained, template: templates.Template, config: Config) -> None:
    """Raises UserError where a model was trained on other prompts than it would be evaluated on."""
    path = pretrained.directory / hf.FACTS_FILE
    if config.evaluation.any_template or not path.exists():
        return
    trained = hf.read_json(path).get("template")
    if not isinstance(trained, dict):
        raise UserError(f"{path}: has no table template; is it what effreason wrote?")
    if trained.get("sha256") != template.sha256:
        raise UserError(
            f"{pretrained.name}: was trained with the template {trained.get('name')} and the user prompt "
            f"{trained.get('user_prompt')!r}, the evaluation has {template.name} and {template.user_prompt!r}; set "
            "data.template and data.user_prompt as in its training, or evaluation.any_template true")


def check_alike(opened: Sequence[Opened], config: Config) -> None:
    """Raises UserError where models would be compared on different prompts."""
    first, *others = opened
    for other in [] if config.evaluation.any_template else others:
        if other.template.sha256 != first.template.sha256:
            raise UserError(f"{first.pretrained.name} and {other.pretrained.name} have different chat templates, and "
                            "would be compared on different prompts; name one with data.template, or set "
                            "evaluation.any_template true")


def evaluate_model(config: Config, opened: Opened, mesh: jax.sharding.Mesh, grader: Grader, watch: Watch,
                   tell: Callable[[str], None]) -> Evaluation:
    """Evaluates one model, whose weights are given up again when this returns.

    Args: tell, told what became of the problems, and the first prompt."""
    pretrained, template = opened.pretrained, opened.template
    problems, notes = prompts.load_held_out(config, pretrained.tokenizer, template,
                                            functools.partial(unmatched, grader))
    processes.check_same({"the problems of evaluation.path": prompts.fingerprint(problems)[:12]})
    rendered = templates.display(templates.render(pretrained.tokenizer, template, problems[0].text))
    dated = [template.note] if template.note else []
    sampler_note = memory.describe(config, pretrained.decoder, mesh, memory.EVALUATION)
    for note in [*dated, *notes, sampler_note, f"the first prompt, by the template {template.name}:\n{rendered}"]:
        tell(note)
    params = hf.load_weights(pretrained, sharding.tree_sharding(mesh, model.logical_axes(pretrained.decoder)))
    sampler = make_sampler(config, pretrained.decoder, mesh, memory.EVALUATION)
    return make_evaluator(config, pretrained, sampler, problems, grader)(params, watch, {})[0]


def evaluate_models(config: Config, models: Sequence[str], output: Path | None) -> None:
    """Evaluates each model on the same problems; prints a table and writes output/results.json where asked."""
    processes.check_same(configuration.facts(config) | {
        "the version of JAX": jax.__version__, "models": " ".join(models)})
    sharding.use_compilation_cache()
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    console, results, said = processes.console(), {}, set[str]()

    def say_once(note: str) -> None:
        if note not in said:
            said.add(note)
            say(note, console)

    of_revision = revised(config, models)
    opened = {path: open_model(config, path, config.model.revision if path == of_revision else None, mesh)
              for path in models}
    check_alike(list(opened.values()), config)
    processes.check_same({f"the model {path}": model_fingerprint(each.pretrained) for path, each in opened.items()} | {
        f"the template of {path}": each.template.sha256[:12] for path, each in opened.items()})
    with Interrupts() as interrupts, make_grader(config) as grader:
        for path in models:
            with console.status("") as status:
                started = time.monotonic()

                def watch(now: Headway, path: str = path, started: float = started) -> None:
                    interrupts.check()
                    status.update(f"{path}: {now.finished}/{now.total} responses, {now.running} running, "
                                  f"{rate(now.tokens / (time.monotonic() - started))} tokens/s")

                results[path] = evaluate_model(config, opened[path], mesh, grader, watch, say_once)
    console.print(_table(results))
    if output is not None and processes.first():
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
