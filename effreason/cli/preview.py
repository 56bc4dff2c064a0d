"""The command `effreason preview FILE.jsonl`: what a reward, its alpha and an advantage would do to saved responses.

Needs no accelerator and no model: the file holds which responses are correct, and how long they are.
"""

import argparse
import collections
import dataclasses
import json
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effreason.cli import arguments
from effreason.evaluation.responses import FACTS
from effreason.rl import configured_reward, pressure
from effreason.rl.pressure import ADVANTAGES, AGGREGATIONS, Groups, PressureReport
from effreason.runtime.config import RewardConfig
from effreason.runtime.errors import UserError
from effreason.types import FinishReason

WIDTH = 80
ALPHAS = "0.05,0.1,0.2,0.4"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """The groups of a file, and what was found on the way."""

    groups: Groups
    tokens: float                   # mean length
    truncated: int                  # responses that did not end by themselves
    loops: int                      # those of them that were stopped as loops
    left_out: dict[int, int]        # groups of another size: how many of each


def run(argv: Sequence[str], prog: str) -> None:
    """Reads the file and prints tables and warnings. Raises: UserError, SystemExit(0) after --help."""
    options = _parser(prog).parse_args(argv)
    alphas = arguments.numbers(options.alpha, "--alpha", lambda alpha: 0 <= alpha < 1, "[0, 1)")
    wanted = _names(options.advantage, "--advantage", ADVANTAGES)
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")           # takes no accelerator away from a run on this machine
    reward, has_alpha = _reward(options)
    saved = read(Path(options.file))
    settings: list[float | None] = [alpha for alpha in alphas if alpha > 0] if has_alpha else [None]
    found = [effect for advantage in wanted
             for effect in pressure.effects(saved.groups, reward, settings, advantage, options.aggregation)]
    told = warnings(saved, reward, settings, wanted, found, options.aggregation)
    if options.json:
        print(json.dumps(_facts(options, saved) | {"settings": [dataclasses.asdict(effect) for effect in found],
                                                   "warnings": told}, indent=2))
    else:
        print("\n".join(_lines(options, saved, found, told)))


def _parser(prog: str) -> arguments.Parser:
    made = arguments.Parser(
        prog, "Show what a reward, its alpha and an advantage would do to responses that are saved: the rollouts.jsonl "
        "of a run, or the graded responses of an evaluation with several samples. alpha 0, correctness alone, is "
        "always among them.")
    made.add_argument("file", metavar="FILE.jsonl", help="objects with uid, sample, correct, tokens and, where they "
                      "have them, step, set, finish; a group is what has the same step, set and uid")
    made.add_argument("--alpha", metavar="LIST", default=ALPHAS, help=f"values of reward.alpha; default {ALPHAS}")
    made.add_argument("--advantage", metavar="LIST", default=",".join(ADVANTAGES),
                      help="of loo (leave-one-out, the default of a run), whiten (advantage.whiten), group_std "
                      "(advantage.group_std); default all three")
    made.add_argument("--aggregation", choices=AGGREGATIONS, default=AGGREGATIONS[0],
                      help="as update.aggregation: how the loss weighs responses of different lengths")
    made.add_argument("--form", default="efficient", help="as reward.form; default efficient")
    made.add_argument("--parameters", metavar="NAME=VALUE,...", help="as reward.parameters")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    return made


def _names(text: str, option: str, names: Sequence[str]) -> list[str]:
    found = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in found:
        if name not in names:
            raise UserError(f"{option} must be of {', '.join(names)}, got {name!r}")
    return found


def _reward(options: argparse.Namespace) -> tuple[configured_reward.Reward, bool]:
    """The reward, and whether it has an alpha."""
    settings = RewardConfig(form=options.form, parameters=options.parameters)
    try:
        return configured_reward.make_reward(settings), configured_reward.has_alpha(settings)
    except UserError as error:
        message = str(error).replace("reward.form", "--form").replace("reward.parameters", "--parameters")
        raise UserError(message) from None


def read(path: Path) -> Saved:
    """The groups of a file of graded responses; groups of one response, or of another size than most, are left out.

    Raises: UserError."""
    members: dict[tuple[Any, ...], dict[int, tuple[bool, int, str]]] = {}
    for number, row in _rows(path):
        group = members.setdefault((row.get("step"), row.get("set"), row["uid"]), {})
        if row["sample"] in group:
            raise UserError(f"{path}:{number}: sample {row['sample']} of uid {row['uid']} stands on an earlier line "
                            "too")
        group[row["sample"]] = (row["correct"], row["tokens"], row.get("finish", FinishReason.EOS))
    sizes = collections.Counter(map(len, members.values()))
    size = max((size for size in sizes if size > 1), key=lambda size: (sizes[size], size), default=None)
    if size is None:
        raise UserError(f"{path}: expected several responses to a problem, found {len(members)} problems with at most "
                        "one each; evaluate with --evaluation.samples 8")
    whole = [[group[sample] for sample in sorted(group)] for group in members.values() if len(group) == size]
    correct, tokens, finish = (np.array([[row[column] for row in group] for group in whole]) for column in range(3))
    return Saved(groups=Groups(correct=correct, lengths=tokens.astype(np.int32)), tokens=float(tokens.mean()),
                 truncated=int((finish != FinishReason.EOS).sum()), loops=int((finish == FinishReason.REPETITION).sum()),
                 left_out={other: sizes[other] for other in sorted(sizes) if other != size})


# What a row must hold: the types, what else holds of it, and the words for both; then what it may hold.
WHOLE = ((int,), lambda value: True, "a whole number")
FIELDS: dict[str, tuple[tuple[type, ...], Callable[[Any], bool], str]] = {
    "uid": WHOLE, "sample": WHOLE, "correct": ((bool,), lambda value: True, "true or false"),
    "tokens": ((int,), lambda value: 1 <= value < 2**31, "a whole number >= 1")}
MORE: dict[str, tuple[tuple[type, ...], Callable[[Any], bool], str]] = {
    "step": ((int, type(None)), lambda value: True, "a whole number or null"),
    "set": ((str, type(None)), lambda value: True, "a text or null"), "finish": ((str,), lambda value: True, "a text")}


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The responses of a file with the number of their line; facts on the first line are skipped."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = _row(line, f"{path}:{number}")
                if number == 1 and FACTS in row:
                    continue
                more = {field: MORE[field] for field in MORE if field in row}
                for field, (kinds, holds, words) in (FIELDS | more).items():
                    value = row.get(field)
                    if type(value) not in kinds or not holds(value):
                        got = json.dumps(value)[:60] if field in row else f"no {field}"
                        raise UserError(f"{path}:{number}: {field} must be {words}, got {got}")
                yield number, row
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{place}: expected a JSON object, found {line[:40].decode('utf-8', 'replace')!r}") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected a JSON object, found {json.dumps(row)[:40]}")
    return row


def warnings(saved: Saved, reward: configured_reward.Reward, alphas: Sequence[float | None], wanted: Sequence[str],
             found: Sequence[PressureReport], aggregation: str) -> list[str]:
    """What one should know before one takes such a setting. Args: alphas, greater than 0, or None; found, of each
    advantage wanted, the control first."""
    groups = saved.groups
    told = [f"{other}: {text}" for other, text in _of_advantages(groups, reward, alphas, wanted)]
    all_correct, none = int(groups.all_correct.sum()), int((~groups.correct.any(axis=1)).sum())
    length = np.abs(pressure.make_split(reward, "loo")(groups, alphas[-1] or 0.0)[1].length) if alphas else np.zeros(1)
    if all_correct and length.sum() > 0:
        share = length[groups.all_correct].sum() / length.sum()
        told.append(f"filtering by accuracy (DAPO) would drop {all_correct:,} all-correct groups, which "
                    f"carry {share:.0%} of the length signal; filter by the spread of the reward "
                    "(rollout.refill_rounds does)")
    if none:
        flat = all(effect.groups_with_signal <= 1 - none / len(groups.correct) + 1e-9 for effect in found)
        told.append(f"{none} group{'s have' if none > 1 else ' has'} no correct response: "
                    + ("no signal" if flat else "what signal they have is of length alone"))
    for advantage in wanted:
        longer = [effect for effect in found if effect.advantage == advantage and effect.alpha != 0 and effect.pull > 0]
        if longer:
            pulls = ", ".join(("" if effect.alpha is None else f"at alpha {effect.alpha:g} ")
                              + f"by {effect.pull:.2f} tokens" for effect in longer)
            told.append(f"{advantage} pulls towards longer responses, {pulls}: correctness outweighs length")
    if saved.truncated:
        told.append(f"{saved.truncated} responses were cut off, {saved.loops} of them as loops: they count as wrong, "
                    "so part of the pull of correctness is a pull towards shorter responses")
    return told


def _of_advantages(groups: Groups, reward: configured_reward.Reward, alphas: Sequence[float | None],
                   wanted: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What group_std and whiten do that one might not expect."""
    numbers = [alpha for alpha in alphas if alpha is not None]
    if "group_std" in wanted and len(numbers) > 1 and groups.all_correct.any():
        split = pressure.make_split(reward, "group_std")
        low, high = (split(groups, alpha)[1].whole[groups.all_correct] for alpha in (min(numbers), max(numbers)))
        if np.abs(high).max() > 0 and np.abs(high - low).max() < 0.01 * np.abs(high).max():
            yield "group_std", (f"removes alpha: all-correct groups have the same advantages at alpha "
                                f"{min(numbers):g} and {max(numbers):g}")
    if "whiten" in wanted:
        shift = pressure.make_split(pressure.correctness, "whiten")(groups, 0.0)[1].normalisation
        pull = pressure.pull(shift, groups, "sequence_mean")
        if pull and abs(pull) >= 0.005:
            yield "whiten", (f"with update.aggregation sequence_mean it pulls on length at alpha 0: {pull:+.2f} tokens "
                             "by what it subtracts from all; with token_mean this is 0")


def _facts(options: argparse.Namespace, saved: Saved) -> dict[str, Any]:
    groups = saved.groups
    return {"file": options.file, "form": options.form, "parameters": options.parameters,
            "aggregation": options.aggregation, "groups": len(groups.correct), "group_size": groups.correct.shape[1],
            "all_correct": int(groups.all_correct.sum()), "mixed": int(groups.mixed.sum()),
            "accuracy": float(groups.correct.mean()), "tokens": saved.tokens, "truncated": saved.truncated,
            "loops": saved.loops, "left_out": saved.left_out}


def _lines(options: argparse.Namespace, saved: Saved, found: Sequence[PressureReport], told: Sequence[str]) -> Iterator[str]:
    facts = _facts(options, saved)
    wrong = facts["groups"] - facts["all_correct"] - facts["mixed"]
    yield (f"{facts['groups']:,} groups of {facts['group_size']} responses: {facts['all_correct']:,} all correct, "
           f"{facts['mixed']:,} mixed, {wrong:,} all wrong")
    yield (f"accuracy {facts['accuracy']:.1%}, {facts['tokens']:,.1f} tokens, {facts['truncated']:,} cut off; "
           f"reward {options.form}, {options.aggregation}")
    for size, count in saved.left_out.items():
        yield f"note: {count:,} group{'s' * (count > 1)} of {size} left out"
    yield from ("", *_size_table(found), "", *_pull_table(found))
    if told:
        yield ""
    for text in told:
        yield from textwrap.wrap(text, WIDTH, initial_indent="- ", subsequent_indent="  ")


def _size_table(found: Sequence[PressureReport]) -> Iterator[str]:
    alphas = [effect.alpha for effect in found if effect.alpha != 0]
    reference = pressure.reference_alpha(alphas) if alphas else 0.0
    ratio = "" if reference is None else f"to {reference:g}"
    yield from _aligned([
        ["advantage", "alpha", "groups", "all", "ratio", "mixed", "ratio", "correct", "of at"],
        ["A", "", "with", "correct", ratio, "mean |A|", ratio, "but", "least"],
        ["", "", "signal", "mean |A|", "", "", "", "A < 0", "correct"],
        *([*_setting(effect), f"{effect.groups_with_signal:.1%}", _number(effect.size.all_correct, ".4f"),
           _number(effect.size_ratio.all_correct, ".2f"), _number(effect.size.mixed, ".4f"),
           _number(effect.size_ratio.mixed, ".2f"), f"{effect.punished:,}", _number(effect.punished_from, ".0f")]
          for effect in found)])


def _pull_table(found: Sequence[PressureReport]) -> Iterator[str]:
    yield from _aligned([
        ["pull on", "alpha", "all", "mixed", "together", "= correct-", "+ length", "+ normal-"],
        ["length", "", "correct", "", "", "ness", "", "isation"],
        *([*_setting(effect), *(_number(pull, "+.2f" if abs(pull or 0.0) < 1000 else "+.0f") for pull in (
            effect.pull_within.all_correct, effect.pull_within.mixed, effect.pull, effect.pull_accuracy,
            effect.pull_length, effect.pull_normalisation))] for effect in found)])


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines with the first two columns on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) if place < 2 else cell.rjust(width)
                        for place, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()


def _setting(effect: PressureReport) -> list[str]:
    return [effect.advantage, "-" if effect.alpha is None else f"{effect.alpha:g}"]


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    text = format(value, form)
    return format(0.0, form) if float(text) == 0 else text          # no -0.00
