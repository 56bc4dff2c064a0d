"""What an evaluation of several models comes to: comparisons with the first of them, tables, results.json and CSV."""

import csv
import dataclasses
import io
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from effreason.evaluation import statistics
from effreason.evaluation.statistics import Comparison, Interval, Summary
from effreason.runtime.errors import UserError
from effreason.runtime.metrics import disk, write_json
from effreason.types import Outcomes

RESULTS, TABLE = "results.json", "results.csv"
KEYS = {"provenance", "settings", "base", "models"}            # of results.json
COLUMNS = ("model", "set", "kind")                              # the first ones of results.csv
SIGNIFICANT = 0.05
WIDTH = 80


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A model on a set."""

    row: str                        # the model, with its seed where there are several
    set: str
    outcomes: Outcomes
    summary: Summary
    comparison: Comparison | None   # with the first row; None for itself
    facts: Mapping[str, Any]        # what it was made with


def score(row: str, set_name: str, outcomes: Outcomes, facts: Mapping[str, Any]) -> Row:
    """A model on a set, not compared yet."""
    return Row(row=row, set=set_name, outcomes=outcomes, summary=statistics.summarize(outcomes), comparison=None,
                 facts=facts)


def against_first(scores: Sequence[Row]) -> list[Row]:
    """Each score with its comparison with the first row, on the problems that both have."""
    base = {each.set: each for each in scores if each.row == scores[0].row}
    return [each if each.row == scores[0].row else
            dataclasses.replace(each, comparison=compare(base[each.set].outcomes, each.outcomes)) for each in scores]


def compare(base: Outcomes, other: Outcomes) -> Comparison | None:
    """On the problems that both have: a prompt may be too long for one tokenizer alone. None where there are none."""
    common = np.intersect1d(base.uids, other.uids)
    return statistics.compare(_only(base, common), _only(other, common)) if len(common) else None


def _only(outcomes: Outcomes, uids: np.ndarray) -> Outcomes:
    chosen = np.isin(outcomes.uids, uids)
    return dataclasses.replace(outcomes, **{name: column[chosen] for name, column in vars(outcomes).items()})


def line(score: Row) -> str:
    """A score on one line, while others are still to come."""
    found = score.summary
    return (f"{score.row}, {score.set}: accuracy {100 * found.accuracy:.1f} %, {found.tokens:,.1f} tokens, "
            f"{100 * found.truncated:.1f} % cut off")


def verdict(comparison: Comparison, problems: int) -> str:
    """What a comparison says, in words, with its intervals; "no difference found" is no proof that there is none."""
    low, high = comparison.token_ratio_interval
    accurate, fewer = comparison.p_value < SIGNIFICANT, not low <= 1.0 <= high
    words = ["more accurate" if comparison.accuracy_change > 0 else "less accurate"] if accurate else []
    words += ["fewer tokens" if comparison.token_ratio < 1 else "more tokens"] if fewer else []
    if fewer and not accurate:
        words.append("no difference in accuracy found")
    p_value = "< 0.001" if comparison.p_value < 0.001 else f"= {comparison.p_value:.2g}"
    text = (f"{', '.join(words) or 'no difference found'}: accuracy {_points(comparison.accuracy_change)} points "
            f"{_change(comparison.accuracy_change_interval)}, tokens x {comparison.token_ratio:.2f} "
            f"{_ratio(comparison.token_ratio_interval)}, p {p_value}")
    needed = comparison.problems_to_detect
    if not accurate and needed is not None and needed > problems:
        # Two digits: it is an estimate.
        text += f"; 2 points would need about {int(float(f'{needed:.2g}')):,} problems"
    return text


def tables(scores: Sequence[Row], seen: set[str]) -> list[RenderableType]:
    """What to print: a table for each set with a line for each comparison, those by difficulty, generalisation.

    Args: seen, names of the sets that were trained on."""
    printed: list[RenderableType] = []
    names = list(dict.fromkeys(each.set for each in scores))
    for name in names:
        group = [each for each in scores if each.set == name]
        printed += [_set_table(name, group), Text(""), _cost_table(group), Text(""), *(
            _paragraph(f"{each.row}: {verdict(each.comparison, each.summary.problems)}")
            for each in group if each.comparison is not None), Text("")]
        printed += [table for each in group for table in _difficulty_tables(each, alone=len(group) == 1)]
    if any(each.comparison for each in scores) and set(names) - seen:
        printed.append(_generalisation([each for each in scores if each.comparison], scores[0].row, seen))
    return printed


def _table(columns: Iterable[str], left: int = 1) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for place, heading in enumerate(columns):
        table.add_column(heading, justify="left" if place < left else "right",
                         overflow="fold" if place < left else "ellipsis", no_wrap=place >= left)
    return table


def _titled(title: str, table: Table) -> Group:
    # Not the table's own title, which is no wider than the table.
    return Group(Text(title, style="bold"), table)


def _set_table(name: str, group: Sequence[Row]) -> Group:
    first = group[0].summary
    against = any(each.comparison for each in group)
    table = _table(["model", "accuracy", "tokens", "cut off", *(["change, points", "tokens x"] if against else [])])
    for each in group:
        found, comparison = each.summary, each.comparison
        cells = [f"{100 * found.accuracy:.1f} %\n{_percent(found.accuracy_interval)}", _tokens(found.tokens),
                 f"{100 * found.truncated:.1f} %"]
        if comparison is not None:
            cells += [f"{_points(comparison.accuracy_change)}\n{_change(comparison.accuracy_change_interval)}",
                      f"{comparison.token_ratio:.2f}\n{_ratio(comparison.token_ratio_interval)}"]
        table.add_row(Text(each.row), *cells)
    title = f"{name}: {first.problems:,} problems x {first.samples} response{'s' * (first.samples > 1)}"
    return _titled(title, table)


def _cost_table(group: Sequence[Row]) -> Group:
    """What responses cost; the chances of several samples where there are some."""
    samples, against = group[0].summary.samples, any(each.comparison for each in group)
    several = [f"pass@{samples}", f"maj@{samples}"] if samples > 1 else []
    table = _table(["tokens", "median", "right", "wrong", "per solved", *several, *(["AES"] if against else [])])
    for each in group:
        found = each.summary
        cells = [_tokens(found.tokens_median), *(_tokens(count) if count is not None else "-" for count in (
            found.tokens_right, found.tokens_wrong, found.tokens_per_solved))]
        if several:
            cells += [f"{100 * chances[samples]:.1f} %" for chances in (found.pass_at, found.majority_at)]
        if against:
            score = None if each.comparison is None else each.comparison.aes
            cells.append("" if each.comparison is None else "-" if score is None else
                         f"{score:+.2f}".replace("-0.00", "+0.00"))
        table.add_row(Text(each.row), *cells)
    return Group(table)


def _difficulty_tables(each: Row, *, alone: bool) -> list[RenderableType]:
    """Tokens saved by difficulty; for a model alone what it is by level."""
    title = f"{each.set} by difficulty, {each.row}"
    if each.comparison is not None and len(each.comparison.by_difficulty) > 1:
        table = _table(["", "problems", "acc. base", "acc.", "tokens base", "tokens", "saved"])
        for name, row in each.comparison.by_difficulty.items():
            table.add_row(Text(name), f"{row.problems:,}", f"{100 * row.accuracy_base:.1f} %",
                          f"{100 * row.accuracy:.1f} %", _tokens(row.tokens_base), _tokens(row.tokens),
                          f"{100 * row.saving:.0f} % {_percent(row.saving_interval, 0)}")
        return [_titled(title, table), Text("")]
    if alone and len(each.summary.by_level) > 1:
        table = _table(["level", "problems", "accuracy", "tokens"])
        for name, level in each.summary.by_level.items():
            table.add_row(Text(name), f"{level.problems:,}", f"{100 * level.accuracy:.1f} %", _tokens(level.tokens))
        return [_titled(title, table), Text("")]
    return []


def _generalisation(compared: Sequence[Row], base: str, seen: set[str]) -> Group:
    table = _table(["set", "model", "accuracy, points", "tokens, x"], left=2)
    for each in sorted(compared, key=lambda each: each.set not in seen):
        found, change = each.summary, each.comparison
        assert change is not None
        table.add_row(Text(f"{each.set}\n{kind(each.set, seen)}"), Text(each.row),
                      f"{100 * found.accuracy:.1f} %\n{_points(change.accuracy_change)} "
                      f"{_change(change.accuracy_change_interval)}",
                      f"{_tokens(found.tokens)}\n{change.token_ratio:.2f} {_ratio(change.token_ratio_interval)}")
    return _titled(f"Generalisation, against {base}", table)


def kind(name: str, seen: set[str]) -> str:
    """Whether a model may have been trained on problems like those of a set."""
    return "seen kind" if name in seen else "never trained on"


def _paragraph(text: str) -> Text:
    return Text(textwrap.fill(text, WIDTH, subsequent_indent="  "))


def _tokens(count: float) -> str:
    return f"{count:,.1f}" if count < 1000 else f"{count:,.0f}"


def _points(change: float) -> str:
    return f"{100 * change:+.1f}".replace("-0.0", "+0.0")


def _change(interval: Interval) -> str:
    return f"({_points(interval[0])} to {_points(interval[1])})"


def _percent(interval: Interval, digits: int = 1) -> str:
    return f"({100 * interval[0]:.{digits}f} to {100 * interval[1]:.{digits}f})"


def _ratio(interval: Interval) -> str:
    return f"({interval[0]:.2f} to {interval[1]:.2f})"


def held(directory: Path) -> dict[str, list[str]]:
    """The sets, by row, of the results that a directory holds, which `write` would replace.

    Raises: UserError where one of its files is not a result of `write`."""
    results, table = directory / RESULTS, directory / TABLE
    other = "is of something else than evaluate.py; choose another --output, or remove the file"
    if table.exists():
        with disk(table), table.open("rb") as file:
            if not file.readline(1000).startswith(",".join(COLUMNS).encode()):
                raise UserError(f"{table}: {other}")
    if not results.exists():
        return {}
    try:
        found = json.loads(results.read_bytes())
    except OSError as error:
        raise UserError(f"{results}: {error.strerror}") from None
    except (ValueError, RecursionError):
        found = None
    models = found.get("models") if isinstance(found, dict) and found.keys() >= KEYS else None
    if not isinstance(models, dict) or not all(isinstance(sets, dict) for sets in models.values()):
        raise UserError(f"{results}: {other}")
    return {row: list(sets) for row, sets in models.items()}


def write(directory: Path, scores: Sequence[Row], seen: set[str], environment: Mapping[str, Any],
          settings: Mapping[str, Any]) -> None:
    """Writes results.json and results.csv. Raises: UserError where the disk takes no more."""
    models: dict[str, dict[str, Any]] = {}
    for each in scores:
        models.setdefault(each.row, {})[each.set] = {
            "summary": dataclasses.asdict(each.summary),
            "comparison": None if each.comparison is None else dataclasses.asdict(each.comparison),
            "kind": kind(each.set, seen), "facts": dict(each.facts)}
    write_json(directory / RESULTS, {"provenance": dict(environment), "settings": dict(settings), "base": scores[0].row,
                                     "models": models})
    rows = [flat(each, seen) for each in scores]
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), restval="")
    table.writeheader()
    table.writerows(rows)
    partial = directory / (TABLE + ".partial")
    with disk(directory / TABLE):
        partial.write_text(text.getvalue(), encoding="utf-8", newline="")
        partial.replace(directory / TABLE)


def flat(score: Row, seen: set[str]) -> dict[str, Any]:
    """A score as one line of a table, by column; budgets, levels and difficulties are not in it.

    The git commit is that of the code that sampled, which may not be the one that writes the table.
    An interval is two columns, _low and _high; what is not known is left empty."""
    cells: dict[str, Any] = {"model": score.row, "set": score.set, "kind": kind(score.set, seen)}
    for record in (score.summary, score.comparison):
        for name, value in (vars(record) if record is not None else {}).items():
            if name.endswith("_interval"):
                stem = name.removesuffix("_interval")
                cells |= {f"{stem}_low": value[0], f"{stem}_high": value[1]}
            elif name in ("pass_at", "majority_at"):
                cells |= {f"{name}_{k}": share for k, share in value.items()}
            elif name not in ("budgets", "by_level", "by_difficulty"):
                cells[name] = value
    facts = {name: value for name, value in score.facts.items() if name not in cells and name != "environment"}
    return cells | facts | {"git_commit": score.facts.get("environment", {}).get("git_commit")}
