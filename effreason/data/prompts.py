"""Stage 1: problems in, tokenised prompts out. Which problems a step gets is a pure function of seed and step."""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from effreason.data import decontamination, sources, templates
from effreason.data.presets import PRESETS
from effreason.data.sources import Row, Spec, Unusable
from effreason.data.templates import Template
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError
from effreason.types import Problem

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
class LeftOut:
    """A row of a data set that is not trained on."""

    source: str                     # name of its set
    number: int                     # of its row there, from 0
    reason: str
    text: str                       # of the problem, "" where it has none


@dataclasses.dataclass(frozen=True)
class Problems:
    """What a run trains on."""

    sources: tuple[Source, ...]
    notes: tuple[str, ...] = ()     # lines for people: how many there are, what was left out and an example of it
    left_out: tuple[LeftOut, ...] = ()      # all of it

    def __len__(self) -> int:
        return sum(len(source.problems) for source in self.sources)


def load_training(config: Config, tokenizer: Any, template: Template, unmatched: Unmatched) -> Problems:
    """The problems of data.path, without repeated ones, those of the evaluation set, and those that cannot be graded.

    Args: template, as `templates.choose` gives it; unmatched, places of the problems whose answer the grader cannot
        match with itself: no response to them is ever right.
    Raises: UserError that names the field, or file and line."""
    data, seen = config.data, set[str]()
    notes = [] if template.note is None else [template.note]
    left_out: list[LeftOut] = []
    specs = sources.parse(data.path, "data.path")
    if len(specs) * ROWS_PER_SOURCE > 2**31:
        raise UserError(f"data.path must name at most {2**31 // ROWS_PER_SOURCE} data sets, got {len(specs)}")
    _check_subset(config)
    others = list(_not_to_train_on(config))
    found = []
    for index, spec in enumerate(specs):
        rows, unusable = sources.read(spec.name, data, held_out=False, split=data.split)
        note = _Notes(spec.name, total=len(rows) + len(unusable))
        note.unusable(unusable)
        first, repeated = decontamination.duplicates(rows, seen)
        rows = note.decided(first, repeated, rows, "repeats an earlier one", "that repeat an earlier one",
                            data.duplicates)
        for name, held_out in others:
            clean, contaminated = decontamination.contaminated(rows, held_out)
            rows = note.decided(clean, contaminated, rows, f"is in {name}", f"that are in {name}", data.contaminated)
        problems, too_long = _problems(rows, tokenizer, template, data.max_prompt_tokens, index)
        note.too_long(too_long, data.max_prompt_tokens)
        problems = _without_unmatched(problems, unmatched, note)
        if not problems:
            raise UserError(f"data.path: no problem of {spec.name} is left; {'; '.join(note.lines) or 'it is empty'}")
        found.append(Source(spec.name, spec.weight, tuple(problems)))
        notes += [f"{spec.name}: {len(problems):,} problems to train on", *note.lines]
        left_out += note.rows
    return Problems(tuple(found), tuple(notes), tuple(left_out))


def load_held_out(config: Config, tokenizer: Any, template: Template,
                  unmatched: Unmatched | None = None) -> tuple[dict[str, list[Problem]], tuple[str, ...]]:
    """The first evaluation.problems of each evaluation set, by the set's name, and notes on them.

    Nothing is left out but prompts that are too long: published accuracies count repeated problems and those that
    cannot be graded. The uids of a set do not depend on what other sets there are."""
    data, settings = config.data, config.evaluation
    found: dict[str, list[Problem]] = {}
    notes: list[str] = []
    for spec in _evaluation_specs(config):
        rows, unusable = sources.read(spec.name, data, held_out=True, split=settings.split, field="evaluation.path")
        note = _Notes(spec.name, total=len(rows) + len(unusable))
        note.unusable(unusable)
        problems, too_long = _problems(rows, tokenizer, template, data.max_prompt_tokens, 0, settings.problems)
        note.too_long(too_long, data.max_prompt_tokens)
        if not problems:
            raise UserError(f"evaluation.path: no problem of {spec.name} is left; {'; '.join(note.lines)}")
        if unmatched is not None and (places := unmatched(problems)):
            note.kept(len(places), _unmatched_text([problems[place] for place in places]))
        found[spec.name] = problems
        notes += [f"{spec.name}: {len(problems):,} of {note.total:,} problems to evaluate on", *note.lines]
    return found, tuple(notes)


def fingerprint(problems: Problems | Sequence[Problem]) -> str:
    """SHA-256, in hexadecimal, of all of the problems that a run depends on: another one means other data.

    Order counts; weights, levels and the text beyond the prompt's tokens do not."""
    if isinstance(problems, Problems):
        problems = [problem for source in problems.sources for problem in source.problems]
    digest = hashlib.sha256()
    for problem in problems:
        # With the prompt's length first, no two lists of problems are the same bytes.
        facts = [problem.uid, len(problem.prompt), problem.reference, problem.kind, problem.choices]
        digest.update(json.dumps(facts).encode() + b"\n" + problem.prompt.astype("<i4").tobytes())
    return digest.hexdigest()


def batch(problems: Problems, size: int, seed: int, step: int) -> list[Problem]:
    """The problems of a training step: each once an epoch of its source, in an order of (seed, source, epoch) alone.

    Sources with weights have the same whole number of problems in every step; those without are one pool. An epoch's
    remainder of fewer problems than a step takes is left out, so that no problem comes twice in one step: two groups of
    the same problem would be the same responses.

    Raises: UserError for fewer problems than a step takes, for a weight that gives none."""
    pools = _pools(problems)
    chosen = []
    for place, (pool, count) in enumerate(zip(pools, _counts(pools, size), strict=True)):
        steps = len(pool.problems) // count
        if steps == 0:
            missing = _missing(problems, pool, everything=len(pools) == 1)
            raise UserError("rollout.prompts_per_step must be at most the number of problems, "
                            f"{len(pool.problems)}, got {size}{missing}" if len(pools) == 1 else
                            f"rollout.prompts_per_step = {size} takes {count} problems of {pool.name} for a step, "
                            f"which has {len(pool.problems)}{missing}; lower its weight in data.path")
        epoch, turn = divmod(step, steps)
        order = np.random.default_rng([seed, epoch, place]).permutation(len(pool.problems))
        chosen += [pool.problems[index] for index in order[turn * count : (turn + 1) * count]]
    if len(pools) > 1:
        # Mixed, so that each of several updates of a step has its share of every source.
        chosen = [chosen[index] for index in np.random.default_rng([seed, step, len(pools)]).permutation(size)]
    return chosen


def others(problems: Problems, missing: Sequence[Problem], taken: Sequence[Problem],
           key: Sequence[int]) -> list[Problem | None]:
    """Other problems in the place of some of a step's, each of the same pool, in an order that the key alone decides.

    Args: taken, all problems the step has had; key, whole numbers >= 0, such as seed, step and round.
    Returns: one for each that is missing; None where its pool has no more."""
    had = {problem.uid for problem in taken}

    def unseen(pool: Source, place: int) -> Iterator[Problem]:
        order = np.random.default_rng([*key, place]).permutation(len(pool.problems))
        return (pool.problems[index] for index in order if pool.problems[index].uid not in had)

    fresh = [unseen(pool, place) for place, pool in enumerate(_pools(problems))]
    return [next(fresh[problem.uid // ROWS_PER_SOURCE if len(fresh) > 1 else 0], None) for problem in missing]


def _pools(problems: Problems) -> tuple[Source, ...]:
    if all(source.weight is None for source in problems.sources):
        return (Source("", None, tuple(problem for source in problems.sources for problem in source.problems)),)
    return problems.sources


def _missing(problems: Problems, pool: Source, *, everything: bool) -> str:
    """Why a pool is smaller than its data sets, "" where it is not."""
    reasons = collections.Counter(row.reason for row in problems.left_out if everything or row.source == pool.name)
    if not reasons:
        return ""
    count = reasons.total()
    return (f"; {count} of {count + len(pool.problems)} were left out: "
            + ", ".join(f"{reason} ({times})" for reason, times in reasons.most_common()))


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


def evaluation_samples(config: Config) -> dict[str, int]:
    """Responses to each problem, by evaluation set: evaluation.samples, or what the paper has for the set."""
    return {spec.name: config.evaluation.samples or (PRESETS[spec.name].samples if spec.name in PRESETS else 1)
            for spec in _evaluation_specs(config)}


def _evaluation_specs(config: Config) -> tuple[Spec, ...]:
    if config.evaluation.path is not None:
        return sources.parse(config.evaluation.path, "evaluation.path", weights=False)
    return (Spec("tiny"),) if config.data.path == "tiny" else ()


def _check_subset(config: Config) -> None:
    """Raises UserError for a data.subset that no set would take: it is for those on the Hub."""
    data, paths = config.data, {"data.path": config.data.path, "evaluation.path": config.evaluation.path,
                                "data.exclude": config.data.exclude}
    named = itertools.chain.from_iterable(sources.parse(path, field) for field, path in paths.items() if path)
    if data.subset is not None and not any(sources.takes_subset(spec.name) for spec in named):
        raise UserError(f"data.subset is for sets on the Hub by their id, and {data.path} is none, got {data.subset!r}")


def _not_to_train_on(config: Config) -> Iterable[tuple[str, set[str]]]:
    """Names and keys of the whole of each evaluation set, and of each set of data.exclude."""
    data, split = config.data, config.evaluation.split
    for spec in _evaluation_specs(config):
        if (spec.name, data.path) != ("tiny", "tiny"):      # apart by construction
            rows, _ = sources.read(spec.name, data, held_out=True, split=split, field="evaluation.path")
            yield f"the evaluation set {spec.name}", decontamination.keys(rows)
    if data.exclude is not None:
        for spec in sources.parse(data.exclude, "data.exclude", weights=False):
            rows, _ = sources.read(spec.name, data, held_out=sources.has_test(spec.name), field="data.exclude")
            yield spec.name, decontamination.keys(rows)


def _problems(rows: Sequence[Row], tokenizer: Any, template: Template, max_tokens: int, source: int,
              limit: int | None = None) -> tuple[list[Problem], list[Row]]:
    """Rows as prompts, up to `limit` of them, and the rows that are too long.

    A long prompt is left out, never cut: a cut problem has no right answer."""
    problems: list[Problem] = []
    too_long: list[Row] = []
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        rendered = templates.render_all(tokenizer, template, [row.text for row in block])
        for row, text, prompt in zip(block, rendered, templates.encode_all(tokenizer, rendered), strict=True):
            if len(problems) == limit:
                return problems, too_long
            if len(prompt) > max_tokens:
                too_long.append(row)
                continue
            problems.append(Problem(
                uid=source * ROWS_PER_SOURCE + row.number, prompt=prompt, text=row.text, reference=row.reference,
                level=row.level, kind=row.kind, choices=row.choices, opens_thinking=templates.opens_thinking(text)))
    return problems, too_long


def _without_unmatched(problems: list[Problem], unmatched: Unmatched, note: "_Notes") -> list[Problem]:
    places = set(unmatched(problems))
    if places:
        found = [problems[place] for place in sorted(places)]
        note.left_out([(problem.uid % ROWS_PER_SOURCE, problem.text) for problem in found],
                      "has an answer that the grader cannot match with itself", _unmatched_text(found))
    return [problem for place, problem in enumerate(problems) if place not in places]


def _unmatched_text(problems: Sequence[Problem]) -> str:
    answers = ", ".join(repr(problem.reference[:60]) for problem in problems[:LISTED])
    return f"whose answer the grader cannot match with itself, such as {answers}"


class _Notes:
    """Lines for people about what of a set is not used."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.lines: list[str] = []
        self.rows: list[LeftOut] = []

    def left_out(self, found: Sequence[tuple[int, str]], reason: str, which: str) -> None:
        """Rows, each a number and a text. Args: reason, of one; which, of all, for the line."""
        if found:
            self.lines.append(f"{self.name}: left out {len(found):,} {which}")
            self.rows += [LeftOut(self.name, number, reason, text) for number, text in found]

    def kept(self, count: int, which: str) -> None:
        if count:
            self.lines.append(f"{self.name}: has {count:,} {which}")

    def unusable(self, found: Sequence[Unusable]) -> None:
        without = [row for row in found if row.reason == sources.WITHOUT_TEXT]
        if without:
            self.left_out([(row.number, row.text) for row in without], sources.WITHOUT_TEXT,
                          f"without a problem's text, such as {without[0].place}")
        self.left_out([(row.number, row.text) for row in found if row.reason == sources.WITHOUT_ANSWER],
                      sources.WITHOUT_ANSWER, "without an answer")

    def too_long(self, found: Sequence[Row], most: int) -> None:
        self.left_out([(row.number, row.text) for row in found], "has a prompt that is too long",
                      f"with prompts of more than data.max_prompt_tokens = {most} tokens")

    def decided(self, clean: list[Row], found: list[Row], everything: list[Row], reason: str, which: str,
                policy: str) -> list[Row]:
        """What the policy, drop or keep, leaves."""
        if found:
            which = f"{which}, such as {decontamination.example(found[0])}"
            if policy == "keep":
                self.kept(len(found), which)
            else:
                self.left_out([(row.number, row.text) for row in found], reason, which)
        return clean if policy == "drop" else everything
