"""The results of a run or a family: the files, and the tables of the terminal within 80 columns."""

import dataclasses
import io
import json
import re

import made_runs
import numpy as np
import pytest
from rich.console import Console

from effreason.evaluation import responses, statistics, wording
from effreason.runs import directory as runs
from effreason.runs import results
from effreason.runs.report.summary import print_results
from effreason.runs.results import Point, PointKind, Results, measure
from effreason.runtime.config import Config
from effreason.types import Outcomes


def outcomes(accuracy, tokens, levels=("hard", "easy", "medium"), problems=60):
    """Every problem of a level has its tokens give or take five, the first ones are right."""
    index = np.arange(problems)
    scale = np.array([0.5, 1.0, 1.5])[index % 3] if len(levels) > 1 else np.ones(problems)
    lengths = np.round(tokens * scale + np.where(index // 3 % 2, 5, -5)).astype(np.int32)[:, None]
    correct = (index < round(accuracy * problems))[:, None]
    return Outcomes(
        uids=index.astype(np.int64), levels=np.array([levels[i % len(levels)] for i in index]),
        correct=correct, lengths=lengths, finish=np.full_like(correct, "eos", dtype="U6"),
        answers=np.where(correct, "1", "2"),
        first_answer_token=np.where(correct, lengths, np.nan).astype(np.float32))


HEADLINE = outcomes(0.85, 200.0), outcomes(0.95, 80.0)
FURTHER = outcomes(0.5, 400.0, levels=("all",)), outcomes(0.45, 420.0, levels=("all",))


def run_results(alpha=0.2, seconds=301.5, **sets):
    """Results of a run with alpha 0.2 at first. Args: sets, outcomes before and after, by name."""
    config = Config()
    config = dataclasses.replace(config, reward=dataclasses.replace(config.reward, alpha=0.2),
                                 run=dataclasses.replace(config.run, seed=7))
    before, after = ({name: pair[i] for name, pair in sets.items()} for i in range(2))
    return runs.run_results(config, runs.compare(before, after), seconds, alpha,
                            made_runs.PROVENANCE)


@pytest.fixture
def summary():
    return run_results(tiny=HEADLINE)


def printed(made, width=80):
    console = Console(file=io.StringIO(), width=width)
    print_results(console, made)
    return console.file.getvalue()


def test_summary_has_exactly_the_documented_shape(summary, tmp_path):
    results.write(tmp_path / "summary.json", summary)
    table = json.loads((tmp_path / "summary.json").read_text())
    base, trained = table.pop("points")
    assert table == {"model": Config().model.path, "seed": 7, "steps": Config().run.steps,
                     **made_runs.PROVENANCE}
    base_sets, trained_sets = base.pop("sets"), trained.pop("sets")
    assert base == {"name": "base", "kind": "base", "directory": "evaluations/step0", "alpha": None,
                    "alpha_start": None, "weight": None, "seconds": None}
    assert trained == {"name": "trained", "kind": "member", "directory": ".", "alpha": 0.2,
                       "alpha_start": 0.2, "weight": None, "seconds": 301.5}
    assert base_sets.keys() == trained_sets.keys() == {"tiny"}
    assert base_sets["tiny"]["comparison"] is None
    assert trained_sets["tiny"]["comparison"]["accuracy_change"] == pytest.approx(0.1)

    read = results.read_results(tmp_path / "summary.json")
    assert read == summary
    measurement = read.points[1].sets["tiny"]
    assert measurement.summary == statistics.summarize(HEADLINE[1])
    assert measurement.comparison == statistics.compare(*HEADLINE)


def test_a_run_with_another_objective_has_no_alpha():
    config = Config()
    config = dataclasses.replace(
        config, kl=dataclasses.replace(config.kl, form="none"),
        update=dataclasses.replace(config.update, objective="dpo"))
    made = runs.run_results(config, runs.compare({"tiny": HEADLINE[0]}, {"tiny": HEADLINE[1]}), 1.0,
                            0.2, made_runs.PROVENANCE)
    assert made.points[1].alpha is made.points[1].alpha_start is None
    assert "(seed 0, 0:01)" in printed(made)


def test_summary_of_several_sets_headlines_the_first():
    made = run_results(tiny=HEADLINE, longer=FURTHER)
    assert made.sets == ["tiny", "longer"]
    assert printed(made).index("60.0%") < printed(made).index("longer")


def test_levels_go_from_easy_to_hard(summary):
    for point in summary.points:
        assert list(point.sets["tiny"].summary.by_level) == ["easy", "medium", "hard"]
    assert statistics.level_names(["Level 10", "Level 2", "Geometry", "Algebra"]) == [
        "Level 2", "Level 10", "Algebra", "Geometry"]


def test_words_have_both_changes_with_their_intervals():
    comparison = dataclasses.replace(
        statistics.compare(*HEADLINE), token_ratio=0.421, token_ratio_interval=(0.396, 0.449),
        accuracy_change=0.035, accuracy_change_interval=(0.012, 0.059))
    assert wording.findings(comparison) == (
        "57.9 % fewer tokens [55.1, 60.4], accuracy +3.5 points [+1.2, +5.9]")
    worse = dataclasses.replace(
        comparison, token_ratio=1.12, token_ratio_interval=(1.1, 1.141), accuracy_change=-0.01,
        accuracy_change_interval=(-0.03, 0.0001))
    assert wording.findings(worse) == (
        "12.0 % more tokens [10.0, 14.1], accuracy -1.0 points [-3.0, 0.0]")


def test_counts_have_a_decimal_if_it_could_be_seen():
    assert [wording.tokens(value) for value in (9.26, 999.94, 999.96, 13173.4)] == [
        "9.3", "999.9", "1,000", "13,173"]


def test_table_shows_before_after_and_the_saving(summary):
    lines = printed(summary).splitlines()
    cells = [line.split() for line in lines]
    assert ["all", "85.0%", "95.0%", "+10.0", "200.0", "80.0", "60.0%"] in cells
    levels = [row[0] for row in cells if row and row[0] in ("easy", "medium", "hard")]
    assert levels == ["easy", "medium", "hard"]
    assert lines[0] == "Held-out problems, before and after training (alpha 0.2, seed 7, 5:02)"


def test_moved_alpha_is_said_with_its_start():
    moved = run_results(alpha=0.40001, tiny=HEADLINE)
    assert (moved.points[1].alpha, moved.points[1].alpha_start) == (0.40001, 0.2)
    lines = printed(moved).splitlines()
    assert lines[1].startswith("(alpha moved from 0.2 to 0.4, seed 7, 5:02)")
    assert max(map(len, lines)) <= 80
    point = dataclasses.replace(moved.points[1], alpha_start=None)
    fixed = dataclasses.replace(moved, points=[moved.points[0], point])
    assert "(alpha 0.40001, seed 7, 5:02)" in printed(fixed)


def test_table_ends_in_the_changes_with_their_intervals(summary):
    text = printed(summary)
    assert wording.findings(statistics.compare(*HEADLINE)) in text
    assert "(95 % intervals over 60 problems)" in text
    assert "in brackets" not in text


def test_further_sets_are_shown_against_the_base():
    text = printed(run_results(tiny=HEADLINE, longer=FURTHER))
    assert "longer: 60 held-out problems; in brackets 95 % intervals" in text
    row = next(line for line in text.splitlines() if line.startswith(" trained"))
    assert re.search(r"45\.0% +-5\.0 \[-\d+\.\d, .*\] +420\.0 +-5\.0 % \[", row)
    assert max(map(len, text.splitlines())) <= 80


def test_table_fits_80_columns_and_takes_names_as_they_are():
    levels = ("[bold]Intermediate Algebra and more[/bold]", "[red]")
    wide = outcomes(1.0, 123_456.0, levels), outcomes(0.0, 123_456.0, levels)
    text = printed(run_results(seconds=1e6, **{"x" * 60: wide, "[blue]" * 9: wide}))
    assert max(map(len, text.splitlines())) <= 80
    assert "[red]" in text and "[bold]" in text and "[blue]" in text


def test_table_of_one_level_has_one_row():
    one = outcomes(0.5, 100.0, ("all",)), outcomes(0.5, 106.0, ("all",))
    text = printed(run_results(tiny=one))
    assert text.count("50.0%") == 2 and "-6.0%" in text


def test_tables_have_no_control_codes(summary):
    assert "\x1b" not in printed(summary)


def test_family_table_fits_80_columns_and_has_every_point_of_every_set(tmp_path):
    family = made_runs.make_family(tmp_path / "family", alphas=(0.0, 0.2), steps=4, problems=30)
    text = printed(results.read_results(tmp_path / "family" / "family.json"))
    assert max(map(len, text.splitlines())) <= 80
    for name in ("α = 0 ", "α = 0.2", "blend 0.25", "SFT,"):
        assert text.count(f"\n {name}") + text.count(f"\n{name}") == 2, name      # on both sets
    comparison = family.points[2].sets["tiny"].comparison
    assert wording.saved(comparison) in text and wording.change(comparison) in text
    assert "tiny: 30 held-out problems" in text and "tiny_long: 30 held-out problems" in text


def test_family_table_takes_the_widest_numbers():
    base, other = {"tiny": outcomes(0.6, 100_000.0)}, {"tiny": outcomes(0.3, 112_000.0)}
    sets = [measure(base), measure(base, other), measure(base, base)]
    points = [Point(name=name, kind=kind, directory=".", sets=measured) for name, kind, measured in
              zip(("base", "A rather long name", "other"), PointKind, sets, strict=False)]
    text = printed(Results(model="", seed=0, steps=1, points=points, **made_runs.PROVENANCE))
    assert max(map(len, text.splitlines())) <= 80 and "112,000" in text
    comparison = sets[1]["tiny"].comparison
    assert wording.change(comparison) in text and wording.saved(comparison) in text
    names = re.sub(r"\s", "", "".join(line[:10] for line in text.splitlines()[4:]))
    assert "Aratherlongname" in names


def test_made_directories_hold_what_their_tables_say(tmp_path):
    made = made_runs.make_run(tmp_path / "run", steps=4, problems=12)
    rows = responses.read(tmp_path / "run" / "evaluations" / "step4" / "tiny.jsonl")[1]
    expected = made.points[1].sets["tiny"].summary
    assert statistics.summarize(responses.outcomes(rows)) == expected


def test_a_narrow_terminal_gets_each_row_as_lines(summary):
    text = printed(summary, width=40)
    assert all(len(line) <= 40 for line in text.splitlines())
    block = text.partition("\nhard")[2].splitlines()[1:7]
    assert [line.partition(":")[0].strip() for line in block] == [
        "accuracy before", "accuracy after", "change (points)", "tokens before", "tokens after",
        "tokens saved"]
    assert "…" not in text and "80.0" in text
