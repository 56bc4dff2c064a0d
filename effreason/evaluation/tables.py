"""Results of an evaluation of several models: comparisons with the first, tables, JSON, CSV."""

import csv
import dataclasses
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

from effreason.evaluation import statistics, wording
from effreason.evaluation.statistics import Comparison, Summary
from effreason.runtime.errors import UserError
from effreason.runtime.files import disk, replacing, write_json
from effreason.types import Outcomes

RESULTS, TABLE = "results.json", "results.csv"
KEYS = {"provenance", "settings", "base", "models"}             # of results.json
COLUMNS = ("model", "set", "kind")                              # the first ones of results.csv
SIGNIFICANT = 0.05
WIDTH = 80


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A model on a set."""

    model: str                      # its name, with the seed if there are several
    set: str
    outcomes: Outcomes
    summary: Summary
    comparison: Comparison | None   # with the first model; None for itself
    facts: Mapping[str, Any]        # what the responses were sampled and graded with


def make_row(model: str, set_name: str, outcomes: Outcomes, facts: Mapping[str, Any]) -> Row:
    """Summarises a model on a set, without a comparison."""
    return Row(model=model, set=set_name, outcomes=outcomes, facts=facts,
               summary=statistics.summarize(outcomes), comparison=None)


def against_first(rows: Sequence[Row]) -> list[Row]:
    """Compares each row with the first model's, on the problems that both have."""
    base = {row.set: row.outcomes for row in rows if row.model == rows[0].model}
    return [row if row.model == rows[0].model else
            dataclasses.replace(row, comparison=compare(base[row.set], row.outcomes))
            for row in rows]


def compare(base: Outcomes, other: Outcomes) -> Comparison | None:
    """Compares two models on the problems that both have; None if there are none.

    A prompt may be too long for one of the two tokenizers."""
    common = np.intersect1d(base.uids, other.uids)
    return statistics.compare(_only(base, common), _only(other, common)) if len(common) else None


def _only(outcomes: Outcomes, uids: np.ndarray) -> Outcomes:
    chosen = np.isin(outcomes.uids, uids)
    return Outcomes(**{name: column[chosen] for name, column in vars(outcomes).items()})


def in_one_line(row: Row) -> str:
    """Describes a row while others are still to come."""
    summary = row.summary
    return (f"{row.model}, {row.set}: accuracy {wording.percent(summary.accuracy)}, "
            f"{summary.tokens:,.1f} tokens, {wording.percent(summary.truncated)} cut off")


def in_words(comparison: Comparison, problems: int) -> str:
    """Says what a comparison found; "no difference found" does not prove that there is none."""
    low, high = comparison.token_ratio_interval
    accuracy_differs = comparison.p_value < SIGNIFICANT
    tokens_differ = not low <= 1.0 <= high

    words = []
    if accuracy_differs:
        words.append("more accurate" if comparison.accuracy_change > 0 else "less accurate")
    if tokens_differ:
        words.append("fewer tokens" if comparison.token_ratio < 1 else "more tokens")
    if tokens_differ and not accuracy_differs:
        words.append("no difference in accuracy found")

    p_value = wording.p_value(comparison.p_value)
    text = (f"{', '.join(words) or 'no difference found'}: accuracy "
            f"{wording.points(comparison.accuracy_change)} points "
            f"{wording.interval(comparison.accuracy_change_interval, wording.points)}, "
            f"tokens x {_tokens_ratio(comparison)}, p {'' if p_value[0] == '<' else '= '}{p_value}")

    needed = comparison.problems_to_detect
    if not accuracy_differs and needed is not None and needed > problems:
        text += f"; 2 points would need about {wording.problems_needed(needed)} problems"
    return text


def tables(rows: Sequence[Row], trained_on: set[str]) -> list[RenderableType]:
    """Builds what is printed: for each set two tables, the comparisons in words and by difficulty;
    then generalisation.

    Args: trained_on, names of the sets that a model was trained on."""
    printed: list[RenderableType] = []
    names = list(dict.fromkeys(row.set for row in rows))
    compared = [row for row in rows if row.comparison is not None]

    for name in names:
        of_set = [row for row in rows if row.set == name]
        printed += [_set_table(name, of_set), Text(""), _cost_table(of_set), Text("")]
        printed += [_paragraph(f"{row.model}: {in_words(row.comparison, row.summary.problems)}")
                    for row in of_set if row.comparison is not None]
        printed.append(Text(""))
        printed += [table for row in of_set
                    for table in _difficulty_tables(row, single=len(of_set) == 1)]

    if compared and set(names) - trained_on:
        printed.append(_generalisation(compared, rows[0].model, trained_on))
    return printed


def _table(columns: Iterable[str], left: int = 1) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for index, heading in enumerate(columns):
        is_left = index < left
        table.add_column(heading, justify="left" if is_left else "right", no_wrap=not is_left,
                         overflow="fold" if is_left else "ellipsis")
    return table


def _titled(title: str, table: Table) -> Group:
    # Not the table's own title, which is no wider than the table.
    return Group(Text(title, style="bold"), table)


def _set_table(name: str, rows: Sequence[Row]) -> Group:
    any_comparison = any(row.comparison for row in rows)
    table = _table(["model", "accuracy", "tokens", "cut off",
                    *(["change, points", "tokens x"] if any_comparison else [])])

    for row in rows:
        summary, comparison = row.summary, row.comparison
        cells = [f"{wording.percent(summary.accuracy)}\n"
                 f"{wording.interval(summary.accuracy_interval, wording.share)}",
                 wording.tokens(summary.tokens), wording.percent(summary.truncated)]
        if comparison is not None:
            cells += [wording.change(comparison).replace(" ", "\n", 1),
                      _tokens_ratio(comparison).replace(" ", "\n", 1)]
        table.add_row(Text(row.model), *cells)

    first = rows[0].summary
    plural = "s" if first.samples > 1 else ""
    return _titled(f"{name}: {first.problems:,} problems x {first.samples} response{plural}", table)


def _cost_table(rows: Sequence[Row]) -> Group:
    """Builds the table of what responses cost, and of the chances of several samples."""
    samples = rows[0].summary.samples
    any_comparison = any(row.comparison for row in rows)
    table = _table(["tokens", "median", "right", "wrong", "per solved",
                    *([f"pass@{samples}", f"maj@{samples}"] if samples > 1 else []),
                    *(["AES"] if any_comparison else [])])

    for row in rows:
        summary = row.summary
        cells = [wording.tokens(summary.tokens_median)]
        cells += ["-" if count is None else wording.tokens(count) for count in (
            summary.tokens_right, summary.tokens_wrong, summary.tokens_per_solved)]
        if samples > 1:
            cells += [wording.percent(summary.pass_at[samples]),
                      wording.percent(summary.majority_at[samples])]
        if any_comparison:
            cells.append("" if row.comparison is None else wording.aes(row.comparison.aes))
        table.add_row(Text(row.model), *cells)
    return Group(table)


def _difficulty_tables(row: Row, *, single: bool) -> list[RenderableType]:
    """Builds the table of tokens saved by difficulty, or by level for a single model."""
    if row.comparison is not None and len(row.comparison.by_difficulty) > 1:
        table = _table(["", "problems", "acc. base", "acc.", "tokens base", "tokens", "saved"])
        for name, difficulty in row.comparison.by_difficulty.items():
            low, high = difficulty.saving_interval
            table.add_row(
                Text(name), f"{difficulty.problems:,}", wording.percent(difficulty.accuracy_base),
                wording.percent(difficulty.accuracy), wording.tokens(difficulty.tokens_base),
                wording.tokens(difficulty.tokens),
                f"{100 * difficulty.saving:.0f} % [{100 * low:.0f}, {100 * high:.0f}]")
    elif single and len(row.summary.by_level) > 1:
        table = _table(["level", "problems", "accuracy", "tokens"])
        for name, level in row.summary.by_level.items():
            table.add_row(Text(name), f"{level.problems:,}", wording.percent(level.accuracy),
                          wording.tokens(level.tokens))
    else:
        return []
    return [_titled(f"{row.set} by difficulty, {row.model}", table), Text("")]


def _generalisation(compared: Sequence[Row], base: str, trained_on: set[str]) -> Group:
    table = _table(["set", "model", "accuracy, points", "tokens, x"], left=2)
    for row in sorted(compared, key=lambda row: row.set not in trained_on):
        assert row.comparison is not None
        table.add_row(
            Text(f"{row.set}\n{kind(row.set, trained_on)}"), Text(row.model),
            f"{wording.percent(row.summary.accuracy)}\n{wording.change(row.comparison)}",
            f"{wording.tokens(row.summary.tokens)}\n{_tokens_ratio(row.comparison)}")
    return _titled(f"Generalisation, against {base}", table)


def kind(name: str, trained_on: set[str]) -> str:
    """Says whether a model may have been trained on problems like those of a set."""
    return "seen kind" if name in trained_on else "never trained on"


def _paragraph(text: str) -> Text:
    return Text(textwrap.fill(text, WIDTH, subsequent_indent="  "))


def _tokens_ratio(comparison: Comparison) -> str:
    return (f"{wording.ratio(comparison.token_ratio)} "
            f"{wording.interval(comparison.token_ratio_interval, wording.ratio)}")


def stored_sets(directory: Path) -> dict[str, list[str]]:
    """Returns the sets, by model, of the results in a directory, which `write` would replace.

    Raises: UserError if one of its files was not written by `write`."""
    results, table = directory / RESULTS, directory / TABLE
    foreign = "was not written by evaluate.py; choose another --output, or remove the file"

    if table.exists():
        with disk(table), table.open("rb") as file:
            if not file.readline(1000).startswith(",".join(COLUMNS).encode()):
                raise UserError(f"{table}: {foreign}")
    if not results.exists():
        return {}

    try:
        content = json.loads(results.read_bytes())
    except OSError as error:
        raise UserError(f"{results}: {error.strerror}") from None
    except (ValueError, RecursionError):
        content = None
    models = content.get("models") if isinstance(content, dict) and content.keys() >= KEYS else None
    if not isinstance(models, dict) or not all(isinstance(sets, dict) for sets in models.values()):
        raise UserError(f"{results}: {foreign}")
    return {model: list(sets) for model, sets in models.items()}


def as_json(rows: Sequence[Row], trained_on: set[str], environment: Mapping[str, Any],
            settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of results.json."""
    models: dict[str, dict[str, Any]] = {}
    for row in rows:
        models.setdefault(row.model, {})[row.set] = {
            "summary": dataclasses.asdict(row.summary),
            "comparison": None if row.comparison is None else dataclasses.asdict(row.comparison),
            "kind": kind(row.set, trained_on), "facts": dict(row.facts)}
    return {"provenance": dict(environment), "settings": dict(settings), "base": rows[0].model,
            "models": models}


def write(directory: Path, rows: Sequence[Row], trained_on: set[str],
          content: Mapping[str, Any]) -> None:
    """Writes results.json and results.csv. Args: content, of the former. Raises: UserError if the
    disk is full."""
    write_json(directory / RESULTS, content)
    lines = [csv_cells(row, trained_on) for row in rows]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    with replacing(directory / TABLE) as partial, partial.open("w", encoding="utf-8",
                                                               newline="") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        table.writerows(lines)


def csv_cells(row: Row, trained_on: set[str]) -> dict[str, Any]:
    """Returns a row as cells by column, without budgets, levels and difficulties.

    The git commit is that of the code that sampled, which may differ from the one that writes the
    table. An interval is two columns, _low and _high; None is an empty cell."""
    cells: dict[str, Any] = {"model": row.model, "set": row.set, "kind": kind(row.set, trained_on)}

    for record in (row.summary, row.comparison):
        for name, value in (vars(record) if record is not None else {}).items():
            if name.endswith("_interval"):
                stem = name.removesuffix("_interval")
                cells |= {f"{stem}_low": value[0], f"{stem}_high": value[1]}
            elif name in ("pass_at", "majority_at"):
                cells |= {f"{name}_{k}": share for k, share in value.items()}
            elif name not in ("budgets", "by_level", "by_difficulty"):
                cells[name] = value

    facts = {name: value for name, value in row.facts.items()
             if name not in cells and name != "environment"}
    return cells | facts | {"git_commit": row.facts.get("environment", {}).get("git_commit")}
