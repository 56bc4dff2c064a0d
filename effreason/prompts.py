"""Stage 1: problems in, tokenised prompts out. Which problems a step gets is a pure function of seed and step."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from effreason.errors import UserError
from effreason.problems import cleaning, sources, templates
from effreason.problems.sources import ONE_LEVEL, Row, Spec
from effreason.problems.templates import Template
from effreason.records import Problem
from effreason.runtime.config import Config

Unmatched = Callable[[Sequence[Problem]], Sequence[int]]

ROWS_PER_SOURCE = 2**26             # uids of a source; 32 sources make 2**31
BLOCK = 1024                        # rows rendered and tokenised at once
LISTED = 3                          # examples in a note


@dataclasses.dataclass(frozen=True)
class Source:
    """The problems of one data set."""

    name: str
    weight: float | None            # share of each step, relative to the other sources; None = all are one pool
    problems: tuple[Problem, ...]


@dataclasses.dataclass(frozen=True)
class Problems:
    """What a run trains on."""

    sources: tuple[Source, ...]
    notes: tuple[str, ...] = ()     # lines for people: how many there are, what was left out and an example of it

    def __len__(self) -> int:
        return sum(len(source.problems) for source in self.sources)


def load_training(config: Config, tokenizer: Any, template: Template, unmatched: Unmatched) -> Problems:
    """The problems of data.path, without repeated ones, those of the evaluation set, and those that cannot be graded.

    Args: template, as `templates.choose` gives it; unmatched, places of the problems whose answer the grader cannot
        match with itself: no response to them is ever right.
    Raises: UserError that names the field, or file and line."""
    data, seen, notes = config.data, set[str](), list[str]()
    specs = sources.parse(data.path, "data.path")
    if len(specs) * ROWS_PER_SOURCE > 2**31:
        raise UserError(f"data.path must name at most {2**31 // ROWS_PER_SOURCE} data sets, got {len(specs)}")
    others = list(_not_to_train_on(config))
    found = []
    for index, spec in enumerate(specs):
        rows, missing = sources.read(spec.name, data, held_out=False, split=data.split)
        note = _Notes(spec.name, total=len(rows) + missing)
        note.left_out(missing, "without an answer")
        first, repeated = cleaning.duplicates(rows, seen)
        rows = note.decided(first, repeated, rows, "that repeat an earlier one", data.duplicates)
        for name, held_out in others:
            clean, contaminated = cleaning.contaminated(rows, held_out)
            rows = note.decided(clean, contaminated, rows, f"that are in {name}", data.contaminated)
        problems, too_long = _problems(rows, tokenizer, template, data.max_prompt_tokens, index)
        note.left_out(too_long, f"with prompts of more than data.max_prompt_tokens = {data.max_prompt_tokens} tokens")
        problems = _without_unmatched(problems, unmatched, note)
        if not problems:
            raise UserError(f"data.path: no problem of {spec.name} is left; {'; '.join(note.lines) or 'it is empty'}")
        found.append(Source(spec.name, spec.weight, tuple(problems)))
        notes += [f"{spec.name}: {len(problems):,} problems to train on", *note.lines]
    return Problems(tuple(found), tuple(notes))


def load_held_out(config: Config, tokenizer: Any, template: Template,
                  unmatched: Unmatched | None = None) -> tuple[list[Problem], tuple[str, ...]]:
    """The first evaluation.problems of each evaluation set, and notes on them.

    Nothing is left out but prompts that are too long: published accuracies count repeated problems and those that
    cannot be graded. With several sets, a problem's level begins with the name of its set."""
    data, settings = config.data, config.evaluation
    found, notes = [], []
    specs = _evaluation_specs(config)
    for index, spec in enumerate(specs):
        rows, missing = sources.read(spec.name, data, held_out=True, split=settings.split, field="evaluation.path")
        note = _Notes(spec.name, total=len(rows) + missing)
        note.left_out(missing, "without an answer")
        if len(specs) > 1:
            rows = [dataclasses.replace(row, level=spec.name if row.level == ONE_LEVEL else f"{spec.name} {row.level}")
                    for row in rows]
        problems, too_long = _problems(rows, tokenizer, template, data.max_prompt_tokens, index, settings.problems)
        note.left_out(too_long, f"with prompts of more than data.max_prompt_tokens = {data.max_prompt_tokens} tokens")
        if not problems:
            raise UserError(f"evaluation.path: no problem of {spec.name} is left; {'; '.join(note.lines)}")
        if unmatched is not None and (places := unmatched(problems)):
            note.kept(len(places), _unmatched_text([problems[place] for place in places]))
        found += problems
        notes += [f"{spec.name}: {len(problems):,} of {note.total:,} problems to evaluate on", *note.lines]
    return found, tuple(notes)


def batch(problems: Problems, size: int, seed: int, step: int, *, host: int = 0, hosts: int = 1) -> list[Problem]:
    """The problems of a training step: each once an epoch of its source, in an order of (seed, source, epoch) alone.

    Sources with weights have the same whole number of problems in every step; those without are one pool. An epoch's
    remainder of fewer problems than a step takes is left out, so that no problem comes twice in one step: two groups of
    the same problem would be the same responses.

    Args: size, problems of a step on all hosts; host of hosts gets every hosts-th of them.
    Returns: size // hosts problems. Raises: UserError for fewer problems than a step takes, for a weight that gives
        none, for a size that hosts do not divide."""
    if size % hosts:
        raise UserError(f"rollout.prompts_per_step must be divisible by the number of hosts, {hosts}, got {size}")
    pools = _pools(problems)
    chosen = []
    for place, (pool, count) in enumerate(zip(pools, _counts(pools, size), strict=True)):
        steps = len(pool.problems) // count
        if steps == 0:
            raise UserError("rollout.prompts_per_step must be at most the number of problems, "
                            f"{len(pool.problems)}, got {size}" if len(pools) == 1 else
                            f"rollout.prompts_per_step = {size} takes {count} problems of {pool.name} for a step, "
                            f"which has {len(pool.problems)}; lower its weight in data.path")
        epoch, turn = divmod(step, steps)
        order = np.random.default_rng([seed, epoch, place]).permutation(len(pool.problems))
        chosen += [pool.problems[index] for index in order[turn * count : (turn + 1) * count]]
    if len(pools) > 1:
        # Mixed, so that each of several updates of a step, and each host, has its share of every source.
        chosen = [chosen[index] for index in np.random.default_rng([seed, step, len(pools)]).permutation(size)]
    return chosen[host::hosts]


def _pools(problems: Problems) -> tuple[Source, ...]:
    if all(source.weight is None for source in problems.sources):
        return (Source("", None, tuple(problem for source in problems.sources for problem in source.problems)),)
    return problems.sources


def _counts(pools: Sequence[Source], size: int) -> list[int]:
    """Problems of each pool in a step: the largest remainders of weight * size are rounded up."""
    if len(pools) == 1:
        return [size]
    weights = np.array([pool.weight for pool in pools], np.float64)
    exact = weights / weights.sum() * size
    counts = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: size - counts.sum()]] += 1
    for pool, count, share in zip(pools, counts, exact, strict=True):
        if count == 0:
            raise UserError(f"data.path: the weight of {pool.name} is {share:.2g} of the rollout.prompts_per_step = "
                            f"{size} problems of a step, which is none; raise one or the other")
    return [int(count) for count in counts]


def _evaluation_specs(config: Config) -> tuple[Spec, ...]:
    if config.evaluation.path is not None:
        return sources.parse(config.evaluation.path, "evaluation.path", weights=False)
    return (Spec("tiny"),) if config.data.path == "tiny" else ()


def _not_to_train_on(config: Config) -> Iterable[tuple[str, set[str]]]:
    """Names and keys of the whole of each evaluation set, and of each set of data.exclude."""
    data, split = config.data, config.evaluation.split
    for spec in _evaluation_specs(config):
        if (spec.name, data.path) != ("tiny", "tiny"):      # apart by construction
            rows, _ = sources.read(spec.name, data, held_out=True, split=split, field="evaluation.path")
            yield f"the evaluation set {spec.name}", cleaning.keys(rows)
    if data.exclude is not None:
        for spec in sources.parse(data.exclude, "data.exclude", weights=False):
            rows, _ = sources.read(spec.name, data, held_out=sources.has_test(spec.name), field="data.exclude")
            yield spec.name, cleaning.keys(rows)


def _problems(rows: Sequence[Row], tokenizer: Any, template: Template, max_tokens: int, source: int,
              limit: int | None = None) -> tuple[list[Problem], int]:
    """Rows as prompts, up to `limit` of them, and how many were left out because they are too long.

    A long prompt is left out, never cut: a cut problem has no right answer."""
    problems: list[Problem] = []
    too_long = 0
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        rendered = templates.render_all(tokenizer, template, [row.text for row in block])
        for row, text, prompt in zip(block, rendered, templates.encode_all(tokenizer, rendered), strict=True):
            if len(problems) == limit:
                return problems, too_long
            if len(prompt) > max_tokens:
                too_long += 1
                continue
            problems.append(Problem(
                uid=source * ROWS_PER_SOURCE + row.number, prompt=prompt, text=row.text, answer=row.answer,
                level=row.level, kind=row.kind, choices=row.choices, opens_thinking=templates.opens_thinking(text)))
    return problems, too_long


def _without_unmatched(problems: list[Problem], unmatched: Unmatched, note: "_Notes") -> list[Problem]:
    places = set(unmatched(problems))
    if places:
        note.left_out(len(places), _unmatched_text([problems[place] for place in sorted(places)]))
    return [problem for place, problem in enumerate(problems) if place not in places]


def _unmatched_text(problems: Sequence[Problem]) -> str:
    answers = ", ".join(repr(problem.answer[:60]) for problem in problems[:LISTED])
    return f"whose answer the grader cannot match with itself, such as {answers}"


class _Notes:
    """Lines for people about what of a set is not used."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.lines: list[str] = []

    def left_out(self, count: int, which: str) -> None:
        if count:
            self.lines.append(f"{self.name}: left out {count:,} {which}")

    def kept(self, count: int, which: str) -> None:
        if count:
            self.lines.append(f"{self.name}: has {count:,} {which}")

    def decided(self, clean: list[Row], found: list[Row], everything: list[Row], which: str, policy: str) -> list[Row]:
        """What the policy, drop or keep, leaves."""
        if found:
            say = self.left_out if policy == "drop" else self.kept
            say(len(found), f"{which}, such as {cleaning.example(found[0])}")
        return clean if policy == "drop" else everything
