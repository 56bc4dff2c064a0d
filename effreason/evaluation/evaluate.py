"""Accuracy and length of a model on held-out problems, each set on its own; what is sampled can be kept."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import jax
import numpy as np
from rich.console import Console

from effreason.data import loading, prompts, templates
from effreason.evaluation import journal as journals
from effreason.evaluation import responses, tables
from effreason.evaluation.models import EvaluatedModel, check_alike, open_model, revised, trained_on
from effreason.grading.grader import Grader
from effreason.lm import model
from effreason.lm.hf.pretrained import Pretrained
from effreason.rl.rollouts import OnChunk, attempt, unmatched
from effreason.runtime import config as configuration
from effreason.runtime import processes, provenance, sharding
from effreason.runtime.config import Config
from effreason.runtime.config_fields import written
from effreason.runtime.errors import Interrupted, UserError
from effreason.runtime.files import disk
from effreason.runtime.progress import GenerationProgress, rate, say
from effreason.runtime.signals import Interrupts
from effreason.sampling import capacity
from effreason.sampling.draws import SamplingParams
from effreason.sampling.engine import Sampler, step_key
from effreason.types import Outcomes, Problem, Response

Sets = Mapping[str, Sequence[Problem]]      # by name
NAMES = ("set", "model", "template", "environment")     # facts that decide nothing


class Evaluate(Protocol):
    """What `make_evaluator` makes."""

    def __call__(self, params: model.Params, watch: OnChunk, *, weights: str,
                 expected: Mapping[int, float] = MappingProxyType({}), directory: Path | None = None,
                 names: Sequence[str] | None = None) -> dict[str, Outcomes]:
        """Outcomes by the name of the set, drawn with the same keys each time.

        Args: weights, which parameters these are, in words that other ones do not share; expected, tokens by uid, where
            something is known of the first set's problems; directory, where graded responses and journals lie, None =
            nothing is kept; names, of the sets, None = all.
        Raises: UserError where the directory holds what was made with other settings."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A model on a set."""

    outcomes: Outcomes
    facts: Mapping[str, Any]        # what they were made with; those of the file that was read, where one was


class Measure(Protocol):
    """What `make_measure` makes."""

    def __call__(self, name: str, params: Callable[[], model.Params], watch: OnChunk, *, weights: str,
                 expected: Mapping[int, float] = MappingProxyType({}), directory: Path | None = None) -> Measured:
        """See Evaluate. Args: name, of a set; params, called where something is left to sample."""
        ...


def make_evaluator(config: Config, pretrained: Pretrained, template: templates.Template, sampler: Sampler,
                   sets: Sets, grader: Grader, *, seed: int | None = None) -> Evaluate:
    """evaluate(params, watch, weights=...) on the same problems, drawn with the same keys each time.

    Common random numbers: two models differ by what they are, less by luck. Args: seed, None = run.seed."""
    measure = make_measure(config, pretrained, template, sampler, sets, grader, seed=seed)

    def evaluate(params: model.Params, watch: OnChunk, *, weights: str,
                 expected: Mapping[int, float] = MappingProxyType({}), directory: Path | None = None,
                 names: Sequence[str] | None = None) -> dict[str, Outcomes]:
        first = next(iter(sets), None)
        return {name: measure(name, lambda: params, watch, weights=weights, directory=directory,
                              expected=expected if name == first else {}).outcomes
                for name in (sets if names is None else names)}

    return evaluate


def make_measure(config: Config, pretrained: Pretrained, template: templates.Template, sampler: Sampler, sets: Sets,
                 grader: Grader, *, seed: int | None = None) -> Measure:
    """measure(name, params, watch, weights=...): one set at a time. Args: seed, None = run.seed."""
    settings, root = config.evaluation, config.run.seed if seed is None else seed
    sampling = SamplingParams(temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k,
                        min_p=settings.min_p, eos_ids=pretrained.eos_ids)
    # The same for each set: what is drawn for one does not depend on what other sets there are.
    key, files = step_key(root, "evaluation", 0), responses.safe_names(list(sets))
    samples = loading.evaluation_samples(config)

    def sample(name: str, params: model.Params, watch: OnChunk, expected: Mapping[int, float],
               **journal: Any) -> list[dict[str, Any]]:
        tried = attempt(lambda requests: sampler(params, requests, key, sampling), sets[name], samples[name],
                        max_new_tokens(config), tokenizer=pretrained.tokenizer, grader=grader,
                        require_eos=config.grade.require_eos, watch=watch, expected=expected, **journal)
        return responses.rows(name, sets[name], tried)

    def measure(name: str, params: Callable[[], model.Params], watch: OnChunk, *, weights: str,
                expected: Mapping[int, float] = MappingProxyType({}), directory: Path | None = None) -> Measured:
        facts = make_facts(config, template, name, sets[name], root, weights) | {"model": pretrained.name}
        if directory is None:
            rows = sample(name, params(), watch, expected)
            return Measured(outcomes=responses.outcomes(rows), facts=_now(facts))
        path = directory / (files[name] + responses.SUFFIX)
        if not finished(path, facts):
            with journals.Journal(path.with_suffix(journals.SUFFIX), facts, functools.partial(check, facts),
                                  functools.partial(_fits, facts, pretrained.decoder.vocabulary)) as journal:
                rows = sample(name, params(), watch, expected, drawn=journal.drawn, record=journal.add,
                              keep=journal.keep)
                processes.broadcast("graded", lambda: responses.write(path, _now(facts), rows))
                journal.remove()
            return Measured(outcomes=responses.outcomes(rows), facts=_now(facts))
        if processes.is_primary():
            path.with_suffix(journals.SUFFIX).unlink(missing_ok=True)       # of a process killed between the two
        found, outcomes = responses.read_outcomes(path)
        return Measured(outcomes=outcomes, facts=found)

    return measure


def finished(path: Path, facts: Mapping[str, Any]) -> bool:
    """Whether all responses of a set are there and graded. Raises: UserError where they were made with other facts."""
    def look() -> bool:
        if path.exists():
            check(facts, path, responses.read_facts(path))
        return path.exists()

    return processes.broadcast("graded responses", look) and journals.seen(path)


def _fits(facts: Mapping[str, Any], vocabulary: int, response: Response) -> bool:
    """Whether a response of a journal can be one of these."""
    return (0 <= response.prompt < facts["problems"] and 0 <= response.sample < facts["evaluation.samples"]
            and len(response.tokens) <= facts["evaluation.max_new_tokens"]
            and bool(np.all((response.tokens >= 0) & (response.tokens < vocabulary))))


def _now(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {**facts, "environment": provenance.environment()}


def make_facts(config: Config, template: templates.Template, name: str, problems: Sequence[Problem], seed: int,
               weights: str) -> dict[str, Any]:
    """All that decides the responses of a set and their verdicts, but for the rounding of sums."""
    loops = dataclasses.asdict(config.repetition) if config.repetition.stop else {"stop": False}
    settings, samples = dataclasses.asdict(config.evaluation), loading.evaluation_samples(config)
    return {"set": name, "weights": weights, "run.seed": seed, "evaluation.samples": samples[name],
            **{f"evaluation.{field}": settings[field] for field in ("temperature", "top_p", "top_k", "min_p")},
            "evaluation.max_new_tokens": max_new_tokens(config), "model.dtype": config.model.dtype,
            **{f"repetition.{field}": value for field, value in loops.items()},
            "grade.require_eos": config.grade.require_eos, "grade.function": config.grade.function,
            "grader": provenance.grader(), "template": template.name, "template_sha256": template.sha256,
            "problems": len(problems), "problems_sha256": prompts.fingerprint(problems)}


def check(wanted: Mapping[str, Any], path: Path, found: Mapping[str, Any]) -> None:
    """Raises UserError, naming what differs, where a file was made with other facts than are wanted."""
    different = [f"{name} {_short(found.get(name))}, now {_short(wanted.get(name))}"
                 for name in dict.fromkeys([*wanted, *found])
                 if name not in NAMES and found.get(name) != wanted.get(name)]
    if different:
        raise UserError(f"{path}: was made with {'; '.join(different)}; choose another directory, or remove the file "
                        "to sample its responses again")


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else written(value)


def max_new_tokens(config: Config) -> int:
    """The longest response of an evaluation."""
    return config.evaluation.max_new_tokens or config.rollout.max_new_tokens


def make_grader(config: Config) -> Grader:
    """The grader with the configuration's limits."""
    limits = config.grade
    return Grader(workers=limits.workers, cpu_seconds=limits.cpu_seconds, wall_seconds=limits.wall_seconds,
                  memory_mb=limits.memory_mb, step_budget_seconds=limits.step_budget_seconds,
                  function=limits.function)


def evaluate_models(config: Config, models: Sequence[str], output: Path | None,
                    seeds: Sequence[int] | None = None) -> None:
    """Evaluates models on each set with each seed; prints tables, and keeps all of it in a directory where asked.

    What the directory holds already is read, not sampled again. Args: seeds, None = run.seed.
    Raises: UserError; Interrupted, with what was sampled kept in the directory."""
    seeds = list(dict.fromkeys(seeds if seeds else [config.run.seed]))
    models = list(dict.fromkeys(models))
    processes.check_same(configuration.facts(config) | {
        "the version of JAX": jax.__version__, "models": " ".join(models), "seeds": " ".join(map(str, seeds))})
    sharding.use_compilation_cache()
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    of_revision = revised(config, models)
    opened = {path: open_model(config, path, config.model.revision if path == of_revision else None, mesh)
              for path in models}
    check_alike(list(opened.values()), config)
    processes.check_same({f"the model {path}": each.fingerprint for path, each in opened.items()} | {
        f"the template of {path}": each.template.sha256[:12] for path, each in opened.items()})
    console, folders, found = processes.console(), responses.safe_names(models), list[tables.Row]()
    if output is not None:
        lost = _lost(processes.broadcast("output", lambda: _make(output)), {
            _row(each, seed, seeds) for each in opened.values() for seed in seeds}, loading.evaluation_samples(config))
        processes.check_shared(output, "--output")
        if lost:
            say(f"note: {output / tables.RESULTS} and {tables.TABLE} will no longer hold {', '.join(lost)}", console)
    with Interrupts() as interrupts, make_grader(config) as grader:
        reporter = _Reporter(console, interrupts)
        try:
            for path in models:
                found += evaluate_model(config, opened[path], mesh, grader, seeds, reporter,
                                        None if output is None else output / folders[path])
        except Interrupted as stop:
            kept = f"; the same command goes on from what {output} holds" if output is not None else ""
            raise Interrupted(stop.signum, stop.message and stop.message + kept) from None
    seen = {name for each in opened.values() for name in trained_on(config, each)}
    compared = tables.against_first(found)
    for table in tables.tables(compared, seen):
        console.print(table)
    if output is not None and processes.is_primary():
        tables.write(output, compared, seen, provenance.environment(), dataclasses.asdict(config))
        say(f"the results: {output / tables.RESULTS} and {output / tables.TABLE}", console)


def _row(opened: EvaluatedModel, seed: int, seeds: Sequence[int]) -> str:
    return opened.name if len(seeds) == 1 else f"{opened.name} (seed {seed})"


def _lost(held: Mapping[str, Sequence[str]], rows: Collection[str], sets: Collection[str]) -> list[str]:
    """What results that are there hold beside what is evaluated now. Args: held, sets by row."""
    return [f"{row} on {name}" for row, names in held.items() for name in names
            if row not in rows or name not in sets]


def _make(directory: Path) -> dict[str, list[str]]:
    """Makes the directory of the results; the sets by row of those that it holds already."""
    with disk(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return tables.stored_sets(directory)


class _Reporter:
    """Shows how far an evaluation is, and stops it where a signal has come."""

    def __init__(self, console: Console, interrupts: Interrupts) -> None:
        self.console, self._interrupts = console, interrupts
        self._said: set[str] = set()
        self.sampled = False            # something of the set that was watched last

    def tell(self, note: str) -> None:
        """Says a note once."""
        if note not in self._said:
            self._said.add(note)
            say(note, self.console)

    @contextlib.contextmanager
    def watching(self, what: str) -> Iterator[OnChunk]:
        """A line at the bottom of a terminal while a set is sampled."""
        started, self.sampled = time.monotonic(), False
        with self.console.status("") as status:

            def watch(now: GenerationProgress) -> None:
                self.sampled = True
                self._interrupts.check()
                status.update(f"{what}: {now.finished}/{now.total} responses, {now.running} running, "
                              f"{rate(now.tokens / (time.monotonic() - started))} tokens/s")

            yield watch


def evaluate_model(config: Config, opened: EvaluatedModel, mesh: jax.sharding.Mesh, grader: Grader, seeds: Sequence[int],
                   reporter: _Reporter, directory: Path | None) -> list[tables.Row]:
    """Evaluates one model on each set with each seed; its weights are given up again when this returns.

    Args: directory, where what is sampled is kept, None = nowhere."""
    pretrained, template = opened.pretrained, opened.template
    sets, notes = loading.load_held_out(config, pretrained.tokenizer, template, functools.partial(unmatched, grader))
    processes.check_same({"the problems of evaluation.path": " ".join(
        prompts.fingerprint(problems)[:12] for problems in sets.values())})
    rendered = templates.display(templates.render(pretrained.tokenizer, template, next(iter(sets.values()))[0].text))
    dated = [template.note] if template.note else []
    sampler_note = capacity.describe(config, pretrained.decoder, mesh, capacity.EVALUATION_WEIGHT_BYTES)
    for note in [*dated, *notes, sampler_note, f"the first prompt, by the template {template.name}:\n{rendered}"]:
        reporter.tell(note)
    sampler = capacity.make_configured_sampler(config, pretrained.decoder, mesh, capacity.EVALUATION_WEIGHT_BYTES)
    params = functools.cache(opened.load)       # only where something is left to sample
    found = []
    for seed in seeds:
        measure = make_measure(config, pretrained, template, sampler, sets, grader, seed=seed)
        row = _row(opened, seed, seeds)
        for name in sets:
            with reporter.watching(f"{row}, {name}") as watch:
                measured = measure(name, params, watch, weights=opened.fingerprint,
                                   directory=directory and directory / f"seed{seed}")
            found.append(tables.make_row(row, name, measured.outcomes, measured.facts))
            say(tables.in_one_line(found[-1]) + ("" if reporter.sampled else "; read"), reporter.console)
    return found
