"""The command `effreason preview FILE.jsonl`: what a reward would do to saved responses.

It needs no accelerator and no model: the file says which responses are correct, and how long they
are.
"""

import argparse
import collections
import dataclasses
import json
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from msgspec import Meta

from effreason.cli import arguments
from effreason.rl import configured_reward, pressure
from effreason.rl.configured_reward import Reward
from effreason.rl.pressure import ADVANTAGES, AGGREGATIONS, Groups, PressureReport
from effreason.runtime import rows
from effreason.runtime.config import RewardConfig
from effreason.runtime.errors import UserError
from effreason.types import FinishReason

WIDTH = 80
LABELS = {"whiten_responses": "whiten/resp"}      # in tables of this width
ALPHAS = "0.05,0.1,0.2,0.4"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What is read of a response."""

    uid: int
    sample: int
    correct: bool
    tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    step: int | None = None
    set: str | None = None
    finish: str = FinishReason.EOS.value


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedResponses:
    """The groups of a file."""

    groups: Groups
    tokens: float                   # mean length
    truncated: int                  # responses that did not end by themselves
    repeated: int                   # those of them that were stopped for repeating themselves
    left_out: dict[int, int]        # number of groups left out, by their size


def run(argv: Sequence[str], prog: str) -> None:
    """Reads a file, prints tables and warnings. Raises: UserError; SystemExit(0) after --help."""
    options = _parser(prog).parse_args(argv)
    alphas = arguments.numbers(options.alpha, "--alpha", lambda alpha: 0 <= alpha < 1, "[0, 1)")
    advantages = _names(options.advantage, "--advantage", ADVANTAGES)
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")       # leaves the accelerator to other programs
    reward, has_alpha = _reward(options)

    saved = read(Path(options.file))
    settings: list[float | None] = [alpha for alpha in alphas if alpha > 0] if has_alpha else [None]
    reports = [report for advantage in advantages for report in pressure.reports(
        saved.groups, reward, settings, advantage, options.aggregation)]
    texts = list(warnings(saved, reward, settings, advantages, reports))

    if options.json:
        print(json.dumps(_facts(options, saved) | {
            "settings": [dataclasses.asdict(report) for report in reports], "warnings": texts},
            indent=2))
    else:
        print("\n".join(_lines(options, saved, reports, texts)))


def _parser(prog: str) -> arguments.Parser:
    parser = arguments.Parser(
        prog, "Show what a reward, its alpha and an advantage would do to saved responses: the "
        "rollouts.jsonl of a run, or the graded responses of an evaluation with several samples. "
        "alpha 0, correctness alone, is always included.")
    parser.add_argument(
        "file", metavar="FILE.jsonl", help="one JSON object per line with uid, sample, correct, "
        "tokens and optionally step, set, finish; responses with the same step, set and uid are a "
        "group")
    parser.add_argument("--alpha", metavar="LIST", default=ALPHAS,
                        help=f"values of reward.alpha; default {ALPHAS}")
    parser.add_argument(
        "--advantage", metavar="LIST", default=",".join(ADVANTAGES[:3]),
        help="any of loo (leave-one-out, the default of a run), whiten, group_std, "
        "whiten_responses, decouple (options of the section advantage); default the first three")
    parser.add_argument(
        "--aggregation", choices=AGGREGATIONS, default=AGGREGATIONS[0],
        help="as update.aggregation: how the loss weighs responses of different lengths")
    parser.add_argument("--form", default="efficient", help="as reward.form; default efficient")
    parser.add_argument("--parameters", metavar="NAME=VALUE,...", help="as reward.parameters")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _names(text: str, option: str, choices: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in choices:
            raise UserError(f"{option} must be of {', '.join(choices)}, got {name!r}")
    return names


def _reward(options: argparse.Namespace) -> tuple[Reward, bool]:
    """Returns the reward, and whether it has an alpha."""
    settings = RewardConfig(form=options.form, parameters=options.parameters)
    try:
        return configured_reward.make_reward(settings), configured_reward.has_alpha(settings)
    except UserError as error:
        message = str(error).replace("reward.form", "--form")
        raise UserError(message.replace("reward.parameters", "--parameters")) from None


def read(path: Path) -> SavedResponses:
    """Reads the groups of a file of graded responses. Raises: UserError.

    Groups of the most frequent size are kept; those of another size are left out."""
    groups: dict[tuple[Any, ...], dict[int, Row]] = {}
    for place, row in _rows(path):
        group = groups.setdefault((row.step, row.set, row.uid), {})
        if row.sample in group:
            raise UserError(f"{place}: sample {row.sample} of uid {row.uid} is on an earlier line "
                            "too")
        group[row.sample] = row

    counts = collections.Counter(map(len, groups.values()))
    size = max((size for size in counts if size > 1), key=lambda size: (counts[size], size),
               default=None)
    if size is None:
        raise UserError(f"{path}: expected several responses to a problem, found {len(groups)} "
                        "problems with at most one each; evaluate with --evaluation.samples 8")

    table = [[group[sample] for sample in sorted(group)] for group in groups.values()
             if len(group) == size]
    finish = np.array([[row.finish for row in group] for group in table])
    lengths = np.array([[row.tokens for row in group] for group in table], np.int32)
    return SavedResponses(
        groups=Groups(correct=np.array([[row.correct for row in group] for group in table]),
                      lengths=lengths),
        tokens=float(lengths.mean()), truncated=int((finish != FinishReason.EOS).sum()),
        repeated=int((finish == FinishReason.REPETITION).sum()),
        left_out={other: counts[other] for other in sorted(counts) if other != size})


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yields FILE:LINE and response; the first line of an evaluation, its facts, is skipped."""
    for number, (place, line) in enumerate(rows.numbered_lines(path)):
        row = rows.decode(line, dict[str, Any], place)
        if number or "facts" not in row:
            yield place, rows.convert(row, Row, place)


def warnings(saved: SavedResponses, reward: Reward, alphas: Sequence[float | None],
             advantages: Sequence[str], reports: Sequence[PressureReport]) -> Iterator[str]:
    """Yields what one should know before using these settings.

    Args: alphas, greater than 0, or None; reports, for each advantage that of the control first."""
    groups = saved.groups
    if "group_std" in advantages:
        yield from _group_std_warning(groups, reward, alphas)

    if "whiten" in advantages:
        shift = pressure.make_split(pressure.correctness, "whiten")(groups, 0.0)[2]["normalisation"]
        pull = pressure.pull(shift, groups, "sequence_mean")
        if pull and abs(pull) >= 0.005:
            yield ("whiten: with update.aggregation sequence_mean it pulls on length at alpha 0: "
                   f"{pull:+.2f} tokens by what it subtracts from all; with token_mean this is 0")

    all_correct, all_wrong = int(groups.all_correct.sum()), int((~groups.correct.any(axis=1)).sum())
    split = pressure.make_split(reward, "loo")
    length = np.abs(split(groups, alphas[-1] or 0.0)[2]["length"]) if alphas else np.zeros(1)
    if all_correct and length.sum() > 0:
        share = length[groups.all_correct].sum() / length.sum()
        yield (f"filtering by accuracy (DAPO) would drop {all_correct:,} all-correct groups, which "
               f"carry {share:.0%} of the length signal; filter by the spread of the reward "
               "(rollout.refill_rounds does)")

    if all_wrong:
        mixed_share = 1 - all_wrong / len(groups.correct)
        flat = all(report.groups_with_signal <= mixed_share + 1e-9 for report in reports)
        yield (f"{all_wrong} group{'s have' if all_wrong > 1 else ' has'} no correct response: "
               + ("no signal" if flat else "what signal they have is of length alone"))

    for advantage in advantages:
        pulls = [("" if report.alpha is None else f"at alpha {report.alpha:g} ")
                 + f"by {report.pull:.2f} tokens" for report in reports
                 if report.advantage == advantage and report.alpha != 0 and report.pull > 0]
        if pulls:
            yield (f"{advantage} pulls towards longer responses, {', '.join(pulls)}: correctness "
                   "outweighs length")

    if saved.truncated:
        yield (f"{saved.truncated} responses were cut off, {saved.repeated} of them for repeating "
               "themselves: they count as wrong, so part of the pull of correctness is a pull "
               "towards shorter responses")


def _group_std_warning(groups: Groups, reward: Reward,
                       alphas: Sequence[float | None]) -> Iterator[str]:
    """Yields a warning if all-correct groups have the same advantages at any alpha."""
    numbers = [alpha for alpha in alphas if alpha is not None]
    if len(numbers) < 2 or not groups.all_correct.any():
        return

    split, (low, high) = pressure.make_split(reward, "group_std"), (min(numbers), max(numbers))
    at_low, at_high = (split(groups, alpha)[1][groups.all_correct] for alpha in (low, high))

    largest = np.abs(at_high).max()
    if largest > 0 and np.abs(at_high - at_low).max() < 0.01 * largest:
        yield ("group_std: removes alpha: all-correct groups have the same advantages at alpha "
               f"{low:g} and {high:g}")


def _facts(options: argparse.Namespace, saved: SavedResponses) -> dict[str, Any]:
    groups = saved.groups
    return {
        "file": options.file, "form": options.form, "parameters": options.parameters,
        "aggregation": options.aggregation, "groups": len(groups.correct),
        "group_size": groups.correct.shape[1], "all_correct": int(groups.all_correct.sum()),
        "mixed": int(groups.mixed.sum()), "accuracy": float(groups.correct.mean()),
        "tokens": saved.tokens, "truncated": saved.truncated, "repeated": saved.repeated,
        "left_out": saved.left_out}


def _lines(options: argparse.Namespace, saved: SavedResponses, reports: Sequence[PressureReport],
           texts: Sequence[str]) -> Iterator[str]:
    facts = _facts(options, saved)
    wrong = facts["groups"] - facts["all_correct"] - facts["mixed"]
    yield (f"{facts['groups']:,} groups of {facts['group_size']} responses: "
           f"{facts['all_correct']:,} all correct, {facts['mixed']:,} mixed, {wrong:,} all wrong")
    yield (f"accuracy {facts['accuracy']:.1%}, {facts['tokens']:,.1f} tokens, "
           f"{facts['truncated']:,} cut off; reward {options.form}, {options.aggregation}")
    for size, count in saved.left_out.items():
        yield f"note: {count:,} group{'s' * (count > 1)} of {size} left out"

    yield from ("", *_size_table(reports), "", *_pull_table(reports))
    if texts:
        yield ""
    for text in texts:
        yield from textwrap.wrap(text, WIDTH, initial_indent="- ", subsequent_indent="  ")


def _size_table(reports: Sequence[PressureReport]) -> Iterator[str]:
    alphas = [report.alpha for report in reports if report.alpha != 0]
    reference = pressure.reference_alpha(alphas) if alphas else 0.0
    ratio = "" if reference is None else f"to {reference:g}"

    return _aligned([
        ["advantage", "alpha", "groups", "all", "ratio", "mixed", "ratio", "correct", "of at"],
        ["A", "", "with", "correct", ratio, "mean |A|", ratio, "but", "least"],
        ["", "", "signal", "mean |A|", "", "", "", "A < 0", "correct"],
        *([*_setting(report), f"{report.groups_with_signal:.1%}",
           _number(report.size.all_correct, ".4f"), _number(report.size_ratio.all_correct, ".2f"),
           _number(report.size.mixed, ".4f"), _number(report.size_ratio.mixed, ".2f"),
           f"{report.punished:,}", _number(report.punished_from, ".0f")] for report in reports)])


def _pull_table(reports: Sequence[PressureReport]) -> Iterator[str]:
    cells = [(report, (
        report.pull_within.all_correct, report.pull_within.mixed, report.pull, report.pull_accuracy,
        report.pull_length, report.pull_normalisation)) for report in reports]
    return _aligned([
        ["pull on", "alpha", "all", "mixed", "together", "= correct-", "+ length", "+ normal-"],
        ["length", "", "correct", "", "", "ness", "", "isation"],
        *([*_setting(report), *(_number(pull, "+.2f" if abs(pull or 0.0) < 1000 else "+.0f")
                                for pull in pulls)] for report, pulls in cells)])


def _aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yields lines with the first two columns aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        padded = [cell.ljust(width) if index < 2 else cell.rjust(width)
                  for index, (cell, width) in enumerate(zip(cells, widths, strict=True))]
        yield "  ".join(padded).rstrip()


def _setting(report: PressureReport) -> list[str]:
    return [LABELS.get(report.advantage, report.advantage),
            "-" if report.alpha is None else f"{report.alpha:g}"]


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    text = format(value, form)
    return format(0.0, form) if float(text) == 0 else text          # no -0.00
