"""The numbers of summary.json, the headline in words, and the tables of the terminal within 80 columns."""

import dataclasses
import io
import json
import re

import made_runs
import numpy as np
import pytest
from rich.console import Console

from effreason.evaluation import responses, statistics
from effreason.runs.report import summary as report
from effreason.runtime.config import Config
from effreason.types import Outcomes


def outcomes(accuracy, tokens, levels=("hard", "easy", "medium"), problems=60):
    """Every problem of a level has its tokens give or take five, the first ones are right."""
    place = np.arange(problems)
    scale = np.array([0.5, 1.0, 1.5])[place % 3] if len(levels) > 1 else np.ones(problems)
    lengths = np.round(tokens * scale + np.where(place // 3 % 2, 5, -5)).astype(np.int32)[:, None]
    correct = (place < round(accuracy * problems))[:, None]
    return Outcomes(uids=place.astype(np.int64), levels=np.array([levels[i % len(levels)] for i in place]),
                    correct=correct, lengths=lengths, finish=np.full_like(correct, "eos", dtype="U6"),
                    answers=np.where(correct, "1", "2"), first_answer_token=np.where(correct, lengths, np.nan).astype(np.float32))


def measured(base, trained):
    return statistics.summarize(base), statistics.summarize(trained), statistics.compare(base, trained)


HEADLINE = measured(outcomes(0.85, 200.0), outcomes(0.95, 80.0))
FURTHER = measured(outcomes(0.5, 400.0, levels=("all",)), outcomes(0.45, 420.0, levels=("all",)))


@pytest.fixture
def config():
    base = Config()
    return dataclasses.replace(base, reward=dataclasses.replace(base.reward, alpha=0.2),
                               run=dataclasses.replace(base.run, seed=7))


@pytest.fixture
def summary(config):
    return report.summary(config, {"tiny": HEADLINE}, 301.5)


def printed(summary, width=80):
    console = Console(file=io.StringIO(), width=width)
    report.print_table(console, summary)
    return console.file.getvalue()


def printed_family(family):
    console = Console(file=io.StringIO(), width=80)
    report.print_family(console, family)
    return console.file.getvalue()


def test_summary_has_exactly_the_documented_shape(summary):
    found = json.loads(json.dumps(summary))
    base, trained, comparison = HEADLINE
    sets = found.pop("sets")
    assert found == {
        "alpha": 0.2, "alpha_start": 0.2, "seed": 7,
        "base": {"accuracy": 0.85, "tokens": base.tokens, "by_level": {
            level: {"accuracy": base.by_level[level].accuracy, "tokens": base.by_level[level].tokens}
            for level in ("easy", "medium", "hard")}},
        "trained": {"accuracy": 0.95, "tokens": trained.tokens, "by_level": {
            level: {"accuracy": trained.by_level[level].accuracy, "tokens": trained.by_level[level].tokens}
            for level in ("easy", "medium", "hard")}},
        "token_ratio": pytest.approx(trained.tokens / base.tokens), "accuracy_change": pytest.approx(0.1),
        "wall_s": 301.5}
    assert sets.keys() == {"tiny"}
    assert statistics.summary_from_table(sets["tiny"]["base"]) == base
    assert statistics.comparison_from_table(sets["tiny"]["comparison"]) == comparison


def test_summary_of_several_sets_headlines_the_first(config):
    summary = report.summary(config, {"tiny": HEADLINE, "longer": FURTHER}, 1.0)
    assert list(summary["sets"]) == ["tiny", "longer"]
    assert summary["trained"]["tokens"] == summary["sets"]["tiny"]["trained"]["tokens"]


def test_levels_go_from_easy_to_hard(summary):
    assert list(summary["base"]["by_level"]) == list(summary["trained"]["by_level"]) == ["easy", "medium", "hard"]
    assert statistics.level_names(["Level 10", "Level 2", "Geometry", "Algebra"]) == ["Level 2", "Level 10", "Algebra",
                                                                             "Geometry"]


def test_words_have_both_changes_with_their_intervals():
    _, _, comparison = HEADLINE
    comparison = dataclasses.replace(comparison, token_ratio=0.421, token_ratio_interval=(0.396, 0.449),
                                     accuracy_change=0.035, accuracy_change_interval=(0.012, 0.059))
    assert report.findings_in_words(comparison) == (
        "57.9 % fewer tokens [55.1, 60.4], accuracy +3.5 points [+1.2, +5.9]")
    worse = dataclasses.replace(comparison, token_ratio=1.12, token_ratio_interval=(1.1, 1.141), accuracy_change=-0.01,
                                accuracy_change_interval=(-0.03, 0.0001))
    assert report.findings_in_words(worse) == (
        "12.0 % more tokens [10.0, 14.1], accuracy -1.0 points [-3.0, 0.0]")


def test_table_shows_before_after_and_the_saving(summary):
    lines = printed(summary).splitlines()
    cells = [line.split() for line in lines]
    assert ["all", "85.0%", "95.0%", "+10.0", "200.0", "80.0", "60.0%"] in cells
    assert [row[0] for row in cells if row and row[0] in ("easy", "medium", "hard")] == ["easy", "medium", "hard"]
    assert lines[0] == "Held-out problems, before and after training (alpha 0.2, seed 7, 5:02)"


def test_moved_alpha_is_said_with_where_it_began(config):
    moved = report.summary(config, {"tiny": HEADLINE}, 301.5, alpha=0.40001)
    assert list(moved.items())[:2] == [("alpha", 0.40001), ("alpha_start", 0.2)]
    lines = printed(moved).splitlines()
    assert lines[1].startswith("(alpha moved from 0.2 to 0.4, seed 7, 5:02)") and max(map(len, lines)) <= 80
    del moved["alpha_start"]                                # of an earlier version
    assert "(alpha 0.40001, seed 7, 5:02)" in printed(moved)


def test_table_ends_in_the_changes_with_their_intervals(summary):
    _, _, comparison = HEADLINE
    text = printed(summary)
    assert report.findings_in_words(comparison) in text and "(95 % intervals over 60 problems)" in text
    assert "Other sets" not in text


def test_table_lists_further_sets_against_the_base(config):
    text = printed(report.summary(config, {"tiny": HEADLINE, "longer": FURTHER}, 1.0))
    assert "Other sets of problems, against the base" in text
    row = next(line for line in text.splitlines() if line.startswith(" longer"))
    assert re.search(r"45\.0% +-5\.0 \[-\d+\.\d, .*\] +420\.0 +-5\.0% \[", row)
    assert max(map(len, text.splitlines())) <= 80


def test_table_fits_80_columns_and_takes_names_as_they_are(config):
    levels = ("[bold]Intermediate Algebra and more[/bold]", "[red]")
    wide = measured(outcomes(1.0, 123_456.0, levels), outcomes(0.0, 123_456.0, levels))
    text = printed(report.summary(config, {"x" * 60: wide, "[blue]" * 9: wide}, 1e6))
    assert max(map(len, text.splitlines())) <= 80
    assert "[red]" in text and "[bold]" in text and "[blue]" in text


def test_table_of_one_level_has_one_row(config):
    one = measured(outcomes(0.5, 100.0, ("all",)), outcomes(0.5, 106.0, ("all",)))
    text = printed(report.summary(config, {"tiny": one}, 5.0))
    assert text.count("50.0%") == 2 and "-6.0%" in text


def test_tables_have_no_control_codes(summary):
    assert "\x1b" not in printed(summary)


def test_family_table_fits_80_columns_and_has_every_point_of_every_set(tmp_path):
    family = made_runs.make_family(tmp_path / "family", alphas=(0.0, 0.2), steps=4, problems=30)
    text = printed_family(json.loads(json.dumps(family)))
    assert max(map(len, text.splitlines())) <= 80
    for name in ("α = 0 ", "α = 0.2", "blend 0.25", "SFT,"):
        assert text.count(f"\n {name}") + text.count(f"\n{name}") == 2, name      # on both sets
    comparison = statistics.comparison_from_table(family["points"][2]["sets"]["tiny"]["comparison"])
    assert report.saved(comparison) in text and report.change(comparison) in text
    assert "tiny: 30 held-out problems" in text and "tiny_long: 30 held-out problems" in text


def test_family_table_takes_the_widest_numbers(tmp_path):
    longer = measured(outcomes(0.6, 100_000.0), outcomes(0.3, 112_000.0))
    table = {"sets": ["tiny"], "points": [
        {"name": "base", "sets": {"tiny": {"summary": dataclasses.asdict(longer[0]), "comparison": None}}},
        {"name": "A rather long name", "sets": {"tiny": {"summary": dataclasses.asdict(longer[1]),
                                                         "comparison": dataclasses.asdict(longer[2])}}}]}
    text = printed_family(table)
    assert max(map(len, text.splitlines())) <= 80 and "112,000" in text
    assert report.change(longer[2]) in text and report.saved(longer[2]) in text
    assert re.sub(r"\s", "", "".join(line[:10] for line in text.splitlines()[5:])) == "Aratherlongname"


def test_counts_have_a_decimal_where_it_could_be_seen():
    assert [report.count(value) for value in (9.26, 999.94, 999.96, 13173.4)] == ["9.3", "999.9", "1,000", "13,173"]


def test_made_directories_hold_what_their_tables_say(tmp_path):
    results = made_runs.make_run(tmp_path / "run", steps=4, problems=12)
    rows = responses.read(tmp_path / "run" / "evaluations" / "step4" / "tiny.jsonl")[1]
    assert statistics.summarize(responses.outcomes(rows)) == results["tiny"][1]
