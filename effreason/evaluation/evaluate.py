"""Accuracy and length of models on held-out problems, set by set; responses are kept on disk."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from rich.console import Console

from effreason.data import loading, prompts, templates
from effreason.evaluation import journal as journals
from effreason.evaluation import responses, tables
from effreason.evaluation.models import EvaluatedModel, open_models, training_sets
from effreason.evaluation.responses import EvaluatedResponse
from effreason.grading.grader import Grader
from effreason.lm import model
from effreason.lm.hf.pretrained import Pretrained
from effreason.rl.diagnosis import no_answers
from effreason.rl.rollouts import OnChunk, ResponseLog, sample_and_grade, unmatched
from effreason.runtime import config as configuration
from effreason.runtime import processes, provenance, sharding
from effreason.runtime.config import Config
from effreason.runtime.errors import Interrupted, UserError
from effreason.runtime.files import disk
from effreason.runtime.progress import GenerationProgress, rate, say, show
from effreason.runtime.signals import Interrupts
from effreason.sampling import capacity
from effreason.sampling.draws import SamplingParams
from effreason.sampling.engine import Sampler, step_key
from effreason.types import Outcomes, Problem

NO_LENGTHS: Mapping[int, float] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A model on a set."""

    outcomes: Outcomes
    facts: Mapping[str, Any]        # what decided them; of the file they were read from, if any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Samples and grades responses to the same problems with the same keys each time.

    With these common random numbers two models differ by what they are, less by luck. The responses
    to a set do not depend on the other sets."""

    config: Config
    pretrained: Pretrained
    template: templates.Template
    sampler: Sampler
    sets: Mapping[str, Sequence[Problem]]       # by name
    grader: Grader
    seed: int

    def measure_all(self, load_params: Callable[[], model.Params], on_chunk: OnChunk, *,
                    weights: str, expected: Mapping[int, float] = NO_LENGTHS,
                    directory: Path | None = None,
                    names: Sequence[str] | None = None) -> dict[str, Outcomes]:
        """Measures the sets one after another; see `measure`.

        Args: expected, of the problems of the first set; names, of the sets, None = all."""
        first = next(iter(self.sets), None)
        return {name: self.measure(name, load_params, on_chunk, weights=weights,
                                   expected=expected if name == first else NO_LENGTHS,
                                   directory=directory).outcomes
                for name in (self.sets if names is None else names)}

    def measure(self, name: str, load_params: Callable[[], model.Params], on_chunk: OnChunk, *,
                weights: str, expected: Mapping[int, float] = NO_LENGTHS,
                directory: Path | None = None) -> Measured:
        """Measures a model on one set, or reads what a directory holds of it already.

        Args: load_params, called if something is left to sample; weights, words that identify the
            parameters; expected, tokens of a response by uid, as far as known; directory, for
            graded responses and journals, None = nothing is kept.
        Raises: UserError if the directory holds responses made with other settings."""
        facts = self.facts(name, weights)
        sampled_facts = {**facts, "environment": provenance.environment()}
        if directory is None:
            rows = self._sample(name, load_params(), on_chunk, expected)
            return Measured(outcomes=responses.outcomes(rows), facts=sampled_facts)

        path = directory / (responses.file_names(self.sets)[name] + responses.SUFFIX)
        journal_path = path.with_suffix(journals.SUFFIX)
        if finished(path, facts):
            if processes.is_primary():      # left by a process that was killed after its last write
                journal_path.unlink(missing_ok=True)
            stored_facts, outcomes = responses.read_outcomes(path)
            return Measured(outcomes=outcomes, facts=stored_facts)

        vocabulary = self.pretrained.decoder.vocabulary
        with journals.Journal(journal_path, facts, vocabulary) as journal:
            rows = self._sample(name, load_params(), on_chunk, expected, journal)
            processes.broadcast("graded", lambda: responses.write(path, sampled_facts, rows))
            journal.remove()
        return Measured(outcomes=responses.outcomes(rows), facts=sampled_facts)

    def _sample(self, name: str, params: model.Params, on_chunk: OnChunk,
                expected: Mapping[int, float],
                log: ResponseLog | None = None) -> list[EvaluatedResponse]:
        settings, problems = self.config.evaluation, self.sets[name]
        sampling = SamplingParams(temperature=settings.temperature, top_p=settings.top_p,
                                  top_k=settings.top_k, min_p=settings.min_p,
                                  eos_ids=self.pretrained.eos_ids)
        key = step_key(self.seed, "evaluation", 0)
        graded = sample_and_grade(
            lambda requests: self.sampler(params, requests, key, sampling), problems,
            loading.evaluation_samples(self.config)[name], max_new_tokens(self.config),
            tokenizer=self.pretrained.tokenizer, grader=self.grader,
            require_eos=self.config.grade.require_eos, on_chunk=on_chunk, expected=expected,
            log=log)
        limit = "evaluation.max_new_tokens" if settings.max_new_tokens else "rollout.max_new_tokens"
        if (line := no_answers(graded, limit)) is not None:
            say(f"warning: {name}: {line}", processes.console())
        return responses.evaluated_responses(name, problems, graded)

    def facts(self, name: str, weights: str) -> dict[str, Any]:
        """Returns all that decides the responses to a set and their verdicts, but for rounding."""
        config, problems = self.config, self.sets[name]
        sampling, repetition = config.evaluation, dataclasses.asdict(config.repetition)
        return {
            "set": name, "weights": weights, "run.seed": self.seed,
            "evaluation.samples": loading.evaluation_samples(config)[name],
            "evaluation.temperature": sampling.temperature, "evaluation.top_p": sampling.top_p,
            "evaluation.top_k": sampling.top_k, "evaluation.min_p": sampling.min_p,
            "evaluation.max_new_tokens": max_new_tokens(config), "model.dtype": config.model.dtype,
            **({"rollout.stop_ids": config.rollout.stop_ids} if config.rollout.stop_ids else {}),
            **{f"repetition.{field}": value for field, value in repetition.items()
               if field == "stop" or config.repetition.stop},
            "grade.require_eos": config.grade.require_eos, "grade.function": config.grade.function,
            **({"grade.function_source": self.grader.function_source}
               if config.grade.function else {}),
            "grader": provenance.grader(), "template": self.template.name,
            "template_sha256": self.template.sha256, "problems": len(problems),
            "problems_sha256": prompts.fingerprint(problems), "model": self.pretrained.name}


def finished(path: Path, facts: Mapping[str, Any]) -> bool:
    """Returns whether the graded responses of a set are on disk.

    Raises: UserError if they were made with other facts."""
    def look() -> bool:
        if path.exists():
            responses.check_facts(path, responses.read_facts(path), facts)
        return path.exists()

    return processes.broadcast("graded responses", look) and journals.visible_to_all(path)


def max_new_tokens(config: Config) -> int:
    """Returns the length limit of a response in an evaluation."""
    return config.evaluation.max_new_tokens or config.rollout.max_new_tokens


def sized_for_evaluation(config: Config) -> Config:
    """Returns the configuration of a command that only evaluates: no rollout is longer than the
    evaluation's responses, which the cache and the model must have room for."""
    return dataclasses.replace(config, rollout=dataclasses.replace(
        config.rollout, max_new_tokens=max_new_tokens(config)))


def make_grader(config: Config) -> Grader:
    """Builds the grader with the limits of the configuration.

    Raises: UserError if the user's function cannot be used, or differs between processes."""
    limits = config.grade
    grader = Grader(workers=limits.workers, cpu_seconds=limits.cpu_seconds,
                    wall_seconds=limits.wall_seconds, memory_mb=limits.memory_mb,
                    step_budget_seconds=limits.step_budget_seconds, function=limits.function)
    if limits.function:
        try:
            processes.check_same(
                {f"the source of grade.function {limits.function}": grader.function_source})
        except UserError:
            grader.close()
            raise
    return grader


def evaluate_models(config: Config, paths: Sequence[str], output: Path | None,
                    seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """Evaluates models on each set with each seed; prints tables, and keeps everything in `output`.

    Responses that the directory holds already are read, not sampled again.

    Args: paths, see models.py; output, None = nothing is kept; seeds, None = run.seed.
    Returns: the content of results.json.
    Raises: UserError; Interrupted, with the responses so far kept in the directory."""
    seeds, paths = list(dict.fromkeys(seeds or [config.run.seed])), list(dict.fromkeys(paths))
    processes.check_same(configuration.facts(config) | {
        "the version of JAX": jax.__version__, "models": " ".join(paths),
        "seeds": " ".join(map(str, seeds))})
    sharding.use_compilation_cache()
    given, config = config, sized_for_evaluation(config)
    models = open_models(config, paths)
    console, folders = processes.console(), responses.file_names(models)
    if output is not None:
        _prepare(config, output, [_row_name(opened, seed, seeds) for opened in models.values()
                                  for seed in seeds], console)

    rows: list[tables.Row] = []
    with Interrupts(with_output=True) as interrupts, make_grader(config) as grader:
        reporter = Reporter(console, interrupts)
        try:
            for path, opened in models.items():
                rows += evaluate_model(config, opened, grader, seeds, reporter,
                                       None if output is None else output / folders[path])
        except Interrupted as stop:
            hint = ""
            if output is not None and stop.message:
                hint = f"; the same command continues from what {output} holds"
            raise Interrupted(stop.signum, stop.message + hint) from None

    trained_on = {name for opened in models.values() for name in training_sets(config, opened)}
    compared = tables.against_first(rows)
    for table in tables.tables(compared, trained_on):
        show(table, console)
    content = tables.as_json(compared, trained_on, provenance.environment(),
                             dataclasses.asdict(given))
    if output is not None and processes.is_primary():
        tables.write(output, compared, trained_on, content)
        say(f"the results: {output / tables.RESULTS} and {output / tables.TABLE}", console)
    return content


def _row_name(opened: EvaluatedModel, seed: int, seeds: Sequence[int]) -> str:
    return opened.name if len(seeds) == 1 else f"{opened.name} (seed {seed})"


def _prepare(config: Config, output: Path, rows: Sequence[str], console: Console) -> None:
    """Makes the directory of the results, and says which of its results will be replaced."""
    def make() -> dict[str, list[str]]:
        with disk(output):
            output.mkdir(parents=True, exist_ok=True)
        return tables.stored_sets(output)

    sets = loading.evaluation_samples(config)
    stored = processes.broadcast("output", make)
    lost = [f"{row} on {name}" for row, names in stored.items() for name in names
            if row not in rows or name not in sets]
    processes.check_shared(output, "--output")
    if lost:
        say(f"note: {output / tables.RESULTS} and {tables.TABLE} will no longer hold "
            f"{', '.join(lost)}", console)


class Reporter:
    """Shows the progress of an evaluation, and stops it after a signal."""

    def __init__(self, console: Console, interrupts: Interrupts) -> None:
        self.console, self._interrupts = console, interrupts
        self._notes: set[str] = set()
        self.sampled = False            # something of the last set

    def note(self, text: str) -> None:
        """Prints a note once."""
        if text not in self._notes:
            self._notes.add(text)
            say(text, self.console)

    @contextlib.contextmanager
    def watching(self, title: str) -> Iterator[OnChunk]:
        """Shows a line at the bottom of a terminal while a set is sampled."""
        started, self.sampled = time.monotonic(), False
        with self.console.status("") as status:

            def on_chunk(progress: GenerationProgress) -> None:
                self.sampled = True
                self._interrupts.check()
                per_second = rate(progress.tokens / (time.monotonic() - started))
                status.update(f"{title}: {progress.finished}/{progress.total} responses, "
                              f"{progress.running} running, {per_second} tokens/s")

            yield on_chunk


def evaluate_model(config: Config, opened: EvaluatedModel, grader: Grader, seeds: Sequence[int],
                   reporter: Reporter, directory: Path | None) -> list[tables.Row]:
    """Evaluates one model on each set with each seed; its weights are freed when this returns.

    Args: directory, for responses, None = nothing is kept."""
    pretrained, template = opened.pretrained, opened.template
    sets, notes = loading.load_held_out(config, pretrained.tokenizer, template,
                                        functools.partial(unmatched, grader))
    for problems in sets.values():
        templates.check_rows(pretrained.tokenizer, problems, pretrained.decoder.vocabulary)
    processes.check_same({"the problems of evaluation.path": " ".join(
        prompts.fingerprint(problems)[:12] for problems in sets.values())})

    weight_bytes = capacity.EVALUATION_WEIGHT_BYTES
    first = next(iter(sets.values()))[0]
    prompt = templates.display(templates.render(pretrained.tokenizer, template, first.text))
    turn_end = templates.turn_end_notes(pretrained.tokenizer, template, pretrained.eos_ids)
    for note in [*pretrained.notes, *template.notes, *turn_end, *notes,
                 capacity.describe(config, pretrained.decoder, opened.mesh, weight_bytes),
                 f"the first prompt, by the template {template.name}:\n{prompt}"]:
        reporter.note(note)

    sampler = capacity.make_configured_sampler(config, pretrained.decoder, opened.mesh,
                                               weight_bytes)
    load_params = functools.cache(opened.load)
    rows = []
    for seed in seeds:
        evaluator = Evaluator(config=config, pretrained=pretrained, template=template, sets=sets,
                              sampler=sampler, grader=grader, seed=seed)
        row_name = _row_name(opened, seed, seeds)
        for name in sets:
            with reporter.watching(f"{row_name}, {name}") as on_chunk:
                measured = evaluator.measure(
                    name, load_params, on_chunk, weights=opened.fingerprint,
                    directory=None if directory is None else directory / f"seed{seed}")
            rows.append(tables.make_row(row_name, name, measured.outcomes, measured.facts))
            say(tables.in_one_line(rows[-1]) + ("" if reporter.sampled else "; read"),
                reporter.console)
    return rows
