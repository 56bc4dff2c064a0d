"""Reads, cleans and tokenises the data sets of a run, and keeps account of what is left out."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from effreason.data import decontamination, sources, templates
from effreason.data.presets import PRESETS
from effreason.data.prompts import ROWS_PER_SOURCE, LeftOut, Problems, Source
from effreason.data.sources import Row, Spec, Unusable
from effreason.data.templates import Template
from effreason.grading import kinds
from effreason.grading.readable import unreadable_reason
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError
from effreason.types import Problem

# Returns the indices of problems whose reference answer the grader cannot match with itself.
FindUnmatched = Callable[[Sequence[Problem]], Sequence[int]]

Item = TypeVar("Item", Row, Problem)

TOKENIZED_ROWS = 1024               # rendered and tokenised at once
EXAMPLES = 3                        # in a note


def load_training(config: Config, tokenizer: Any, template: Template,
                  find_unmatched: FindUnmatched) -> Problems:
    """Returns the problems of data.path.

    Leaves out repeated problems, those of the evaluation sets, and those that cannot be graded: no
    response to them is ever right. Raises UserError that names the field, or file and line."""
    data, seen = config.data, dict[str, str]()
    specs = sources.parse(data.path, "data.path")
    if len(specs) * ROWS_PER_SOURCE > 2**31:
        raise UserError(f"data.path must name at most {2**31 // ROWS_PER_SOURCE} data sets, "
                        f"got {len(specs)}")
    _check_subset(config)
    excluded = list(_excluded_keys(config))

    notes = template.notes
    left_out: list[LeftOut] = []
    loaded = []
    for index, spec in enumerate(specs):
        rows, unusable = sources.read(spec.name, data, held_out=False, split=data.split,
                                      keeps_rows=config.grade.function is not None)
        account = _Account(spec.name, total=len(rows) + len(unusable))
        account.drop_unusable(unusable)

        account.describe_rows(rows, data.user_prompt)

        clean, repeated = decontamination.duplicates(rows, seen)
        rows = account.apply_policy(data.duplicates, clean, repeated, rows,
                                    "repeats an earlier one", "that repeat an earlier one")
        account.describe_contradictions(decontamination.contradictions(repeated, seen))
        for name, keys in excluded:
            clean, contaminated = decontamination.contaminated(rows, keys)
            rows = account.apply_policy(data.contaminated, clean, contaminated, rows,
                                        f"is in {name}", f"that are in {name}")

        rows, unreadable = _unreadable(rows, config)
        account.drop_unreadable(unreadable)
        problems, too_long = _tokenize(rows, tokenizer, template, data.max_prompt_tokens, index)
        account.drop_too_long(too_long, data.max_prompt_tokens)

        unmatched = set(find_unmatched(problems))
        account.drop_unmatched([problems[row] for row in sorted(unmatched)])
        problems = [problem for row, problem in enumerate(problems) if row not in unmatched]
        if not problems:
            raise UserError(f"data.path: no problem of {spec.name} is left; "
                            f"{'; '.join(account.notes) or 'it is empty'}")

        loaded.append(Source(spec.name, spec.weight, tuple(problems)))
        notes += [f"{spec.name}: {len(problems):,} problems to train on", *account.notes]
        left_out += account.left_out
    return Problems(tuple(loaded), tuple(notes), tuple(left_out))


def load_held_out(config: Config, tokenizer: Any, template: Template,
                  find_unmatched: FindUnmatched | None = None,
                  ) -> tuple[dict[str, list[Problem]], tuple[str, ...]]:
    """Returns the first evaluation.problems of each evaluation set, by name, and notes on them.

    Only prompts that are too long are left out: published accuracies count repeated problems and
    those that cannot be graded. The uids of a set do not depend on the other sets."""
    data, settings = config.data, config.evaluation
    held_out: dict[str, list[Problem]] = {}
    notes: list[str] = []

    for spec in _evaluation_specs(config):
        rows, unusable = sources.read(spec.name, data, held_out=True, split=settings.split,
                                      field="evaluation.path",
                                      keeps_rows=config.grade.function is not None)
        account = _Account(spec.name, total=len(rows) + len(unusable))
        account.drop_unusable(unusable)
        account.describe_rows(rows, data.user_prompt)
        problems, too_long = _tokenize(rows, tokenizer, template, data.max_prompt_tokens, 0,
                                       settings.problems)
        account.drop_too_long(too_long, data.max_prompt_tokens)
        if not problems:
            raise UserError(f"evaluation.path: no problem of {spec.name} is left; "
                            f"{'; '.join(account.notes)}")

        for reason, group in _unreadable(problems, config)[1].items():
            account.keep(len(group), _describe_unreadable(group, reason))
        if find_unmatched is not None and (unmatched := find_unmatched(problems)):
            account.keep(len(unmatched), _describe_unmatched([problems[row] for row in unmatched]))
        held_out[spec.name] = problems
        notes += [f"{spec.name}: {len(problems):,} of {account.total:,} problems to evaluate on",
                  *account.notes]
    return held_out, tuple(notes)


def evaluation_samples(config: Config) -> dict[str, int]:
    """Returns responses to each problem by evaluation set: evaluation.samples or the paper's."""
    return {spec.name: config.evaluation.samples or (
        PRESETS[spec.name].samples if spec.name in PRESETS else 1)
        for spec in _evaluation_specs(config)}


def _evaluation_specs(config: Config) -> tuple[Spec, ...]:
    path = sources.evaluation_path(config)
    return () if path is None else sources.parse(path, "evaluation.path", weights=False)


def _check_subset(config: Config) -> None:
    """Raises UserError if no data set uses data.subset, which is for ids on the Hub and folders."""
    data = config.data
    paths = {"data.path": data.path, "evaluation.path": config.evaluation.path,
             "data.exclude": data.exclude}
    specs = itertools.chain.from_iterable(
        sources.parse(path, field) for field, path in paths.items() if path)
    if data.subset is not None and not any(sources.takes_subset(spec.name) for spec in specs):
        raise UserError(f"data.subset is for sets on the Hub by their id and for folders of data "
                        f"files, and {data.path} is none, got {data.subset!r}")


def _excluded_keys(config: Config) -> Iterable[tuple[str, set[str]]]:
    """Yields name and keys of each evaluation set, and of each set of data.exclude."""
    data, split = config.data, config.evaluation.split
    for spec in _evaluation_specs(config):
        if (spec.name, data.path) != ("tiny", "tiny"):      # disjoint by construction
            rows, _ = sources.read(spec.name, data, held_out=True, split=split,
                                   field="evaluation.path")
            yield f"the evaluation set {spec.name}", decontamination.keys(rows)

    if data.exclude is not None:
        for spec in sources.parse(data.exclude, "data.exclude", weights=False):
            rows, _ = sources.read(spec.name, data, held_out=sources.has_test(spec.name),
                                   field="data.exclude")
            yield spec.name, decontamination.keys(rows)


def _tokenize(rows: Sequence[Row], tokenizer: Any, template: Template, max_tokens: int, source: int,
              limit: int | None = None) -> tuple[list[Problem], list[Row]]:
    """Returns up to `limit` rows as tokenised problems, and the rows whose prompts are too long.

    A long prompt is left out, never cut: a cut problem has no right answer."""
    problems: list[Problem] = []
    too_long: list[Row] = []
    for start in range(0, len(rows), TOKENIZED_ROWS):
        block = rows[start : start + TOKENIZED_ROWS]
        rendered = templates.render_all(tokenizer, template, [row.text for row in block])
        prompts = templates.encode_all(tokenizer, rendered)

        for row, text, prompt in zip(block, rendered, prompts, strict=True):
            if len(problems) == limit:
                return problems, too_long
            if len(prompt) > max_tokens:
                too_long.append(row)
                continue
            problems.append(Problem(
                uid=source * ROWS_PER_SOURCE + row.number, prompt=prompt, text=row.text,
                reference=row.reference, level=row.level, kind=row.kind, choices=row.choices,
                opens_thinking=templates.opens_thinking(text), columns=row.columns))
    return problems, too_long


def _unreadable(rows: Sequence[Item], config: Config) -> tuple[list[Item], dict[str, list[Item]]]:
    """Returns the rows whose answer the grader can read, and the others by the reason.

    Words and a user's grade.function may have any answer."""
    readable: list[Item] = []
    unreadable: dict[str, list[Item]] = {}
    for row in rows:
        reasons: list[str | None] = [None]
        if row.kind == "math" and config.grade.function is None:
            reasons = [unreadable_reason(answer) for answer in kinds.alternatives(row.reference)]
        if None in reasons:
            readable.append(row)
        else:
            unreadable.setdefault(str(reasons[0]), []).append(row)
    return readable, unreadable


def _describe_unreadable(rows: Sequence[Row | Problem], reason: str) -> str:
    return f"whose answer {reason}, such as {_references(rows)}"


def _describe_unmatched(problems: Sequence[Problem]) -> str:
    return ("whose answer the grader cannot match with itself, such as "
            f"{_references(problems)}")


def _references(rows: Sequence[Row | Problem]) -> str:
    distinct = dict.fromkeys(repr(row.reference[:60]) for row in rows)
    return ", ".join(list(distinct)[:EXAMPLES])


class _Account:
    """What is left out of one data set, and what is kept although it is questionable."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.notes: list[str] = []
        self.left_out: list[LeftOut] = []

    def keep(self, count: int, description: str) -> None:
        self.notes.append(f"{self.name}: has {count:,} {description}")

    def drop(self, rows: Sequence[tuple[int, str]], reason: str, description: str) -> None:
        """Notes rows (number, text) as left out; `reason` is for one, `description` for all."""
        if rows:
            self.notes.append(f"{self.name}: left out {len(rows):,} {description}")
            self.left_out += [LeftOut(self.name, number, reason, text) for number, text in rows]

    def drop_unusable(self, unusable: Sequence[Unusable]) -> None:
        for reason, description in ((sources.WITHOUT_TEXT, "without a problem's text, such as {}"),
                                    (sources.WITHOUT_ANSWER, "without an answer")):
            rows = [row for row in unusable if row.reason == reason]
            if rows:
                self.drop([(row.number, row.text) for row in rows], reason,
                          description.format(rows[0].location))

    def describe_rows(self, rows: Sequence[Row], user_prompt: str) -> None:
        """Notes what may surprise in how rows were read."""
        if mended := [row for row in rows if row.is_mended]:
            self.notes.append(
                f"{self.name}: mended {len(mended):,} whose backslashes JSON had taken for "
                f"escapes, such as {decontamination.example(mended[0])} with the answer "
                f"{mended[0].reference[:60]!r}")
        if any(row.is_messages for row in rows) and user_prompt.strip() != "{problem}":
            self.notes.append(
                f"{self.name}: its problems are messages, which may have instructions of their "
                'own; data.user_prompt adds to them: "{problem}" leaves them as they are')

    def describe_contradictions(self, pairs: Sequence[tuple[Row, str]]) -> None:
        if pairs:
            row, answer = pairs[0]
            self.notes.append(
                f"{self.name}: {len(pairs):,} of these have another answer than the earlier one, "
                f"such as {decontamination.example(row)}: {row.reference[:60]!r}, earlier "
                f"{answer[:60]!r}")

    def drop_unreadable(self, unreadable: Mapping[str, Sequence[Row]]) -> None:
        for reason, rows in unreadable.items():
            self.drop([(row.number, row.text) for row in rows], f"has an answer that {reason}",
                      _describe_unreadable(rows, reason))

    def drop_too_long(self, rows: Sequence[Row], max_tokens: int) -> None:
        self.drop([(row.number, row.text) for row in rows], "has a prompt that is too long",
                  f"with prompts of more than data.max_prompt_tokens = {max_tokens} tokens")

    def drop_unmatched(self, problems: Sequence[Problem]) -> None:
        self.drop([(problem.uid % ROWS_PER_SOURCE, problem.text) for problem in problems],
                  "has an answer that the grader cannot match with itself",
                  _describe_unmatched(problems))

    def apply_policy(self, policy: str, clean: list[Row], flagged: list[Row], rows: list[Row],
                     reason: str, description: str) -> list[Row]:
        """Returns the clean rows if the policy is drop, otherwise all rows."""
        if flagged:
            description = f"{description}, such as {decontamination.example(flagged[0])}"
            if policy == "keep":
                self.keep(len(flagged), description)
            else:
                self.drop([(row.number, row.text) for row in flagged], reason, description)
        return clean if policy == "drop" else rows
