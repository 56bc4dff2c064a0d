"""Comparisons in words, tables within 80 columns, and files that hold every number."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from effreason.evaluation import statistics, tables
from effreason.runtime import rows as json_rows
from effreason.runtime.errors import UserError
from effreason.types import Outcomes

FACTS = {"set": "gsm8k", "weights": "abc", "run.seed": 0, "evaluation.temperature": 0.6,
         "template": "r1", "template_sha256": "f" * 64, "problems": 6, "problems_sha256": "e" * 64,
         "grader": "effreason 0", "environment": {"git_commit": "d" * 40, "effreason": "0"}}
ENVIRONMENT = {"git_commit": "c" * 40, "effreason": "0"}  # of the process that writes the table
OWN_SET = "/data/of/mine/held-out-problems.jsonl"
LONG = "/a/rather/long/directory/of/runs/with-a-name/model (seed 2147483647)"


def outcomes(correct, lengths, uids=None, levels=None):
    correct, lengths = np.array(correct, bool), np.array(lengths, np.int32)
    count = len(correct)
    return Outcomes(uids=np.arange(count) if uids is None else np.array(uids, np.int64),
                    levels=np.array(levels or ["all"] * count), correct=correct, lengths=lengths,
                    finish=np.full(correct.shape, "eos"), answers=np.where(correct, "7", "8"),
                    first_answer_token=np.where(correct, lengths / 2, np.nan).astype(np.float32))


def drawn(seed, problems=40, samples=2, accuracy=0.6, tokens=1000.0, levels=None):
    rng = np.random.default_rng(seed)
    return outcomes(rng.random((problems, samples)) < accuracy,
                    rng.integers(tokens / 2, 3 * tokens / 2, (problems, samples)), levels=levels)


def table_of(found, seen=(), width=80):
    """What is printed, in a terminal of some width."""
    console = Console(file=io.StringIO(), width=width)
    for each in tables.tables(tables.against_first(found), set(seen)):
        console.print(each)
    return console.file.getvalue()


def test_the_first_row_is_what_all_are_compared_with():
    found = tables.against_first([tables.make_row(row, name, drawn(seed), FACTS)
                                  for seed, (row, name) in enumerate(
                                      [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"),
                                       ("c", "x")])])
    assert [each.comparison is None for each in found] == [True, True, False, False, False]
    assert found[3].comparison == statistics.compare(found[1].outcomes, found[3].outcomes)
    assert found[4].comparison == statistics.compare(found[0].outcomes, found[4].outcomes)


def test_only_problems_that_both_have_are_compared():
    base = outcomes([[1], [0], [1]], [[4], [6], [8]], uids=[1, 2, 3])
    other = outcomes([[1], [1]], [[4], [3]], uids=[3, 2])
    assert tables.compare(base, other).token_ratio == pytest.approx(7 / 14)
    assert tables.compare(base, other).accuracy_change == pytest.approx(1 / 2)
    assert tables.compare(base, outcomes([[1]], [[4]], uids=[9])) is None


COMPARISON = statistics.Comparison(
    accuracy_change=-0.004, accuracy_change_interval=(-0.031, 0.022), token_ratio=1.01,
    token_ratio_interval=(0.97, 1.05), p_value=0.8234,
    test="mcnemar", better=3, worse=4, aes=0.0, problems_to_detect=4812, by_difficulty={})


@pytest.mark.parametrize(("changes", "problems", "text"), [
    ({}, 100, "no difference found: accuracy -0.4 points [-3.1, +2.2], "
              "tokens x 1.01 [0.97, 1.05], p = 0.823; "
              "2 points would need about 4,800 problems"),
    ({}, 5000, "no difference found: accuracy -0.4 points [-3.1, +2.2], "
               "tokens x 1.01 [0.97, 1.05], p = 0.823"),
    ({"token_ratio": 0.5, "token_ratio_interval": (0.4, 0.6), "problems_to_detect": None,
      "accuracy_change": -0.0001, "p_value": 1.0}, 100,
                            "fewer tokens, no difference in accuracy found: "
                            "accuracy 0.0 points [-3.1, +2.2], "
                            "tokens x 0.50 [0.40, 0.60], p = 1.000"),
    ({"accuracy_change": 0.05, "accuracy_change_interval": (0.02, 0.08), "p_value": 0.0004}, 100,
     "more accurate: accuracy +5.0 points [+2.0, +8.0], tokens x 1.01 [0.97, 1.05], p < 0.001"),
    ({"accuracy_change": -0.05, "p_value": 0.03, "token_ratio": 1.5,
      "token_ratio_interval": (1.4, 1.6)}, 100,
     "less accurate, more tokens: accuracy -5.0 points [-3.1, +2.2], "
     "tokens x 1.50 [1.40, 1.60], p = 0.030")])
def test_a_comparison_in_words(changes, problems, text):
    assert tables.in_words(dataclasses.replace(COMPARISON, **changes), problems) == text


def test_tables_fit_a_terminal_and_say_how_many_problems():
    levels = ["a very long name of a level", "2"] * 20
    found = [tables.make_row(row, name, drawn(seed, tokens=tokens, levels=levels), FACTS)
             for seed, (row, name, tokens) in enumerate([
                 ("base", "gsm8k", 20000), ("base", OWN_SET, 20000), (LONG, "gsm8k", 9000),
                 (LONG, OWN_SET, 9000)])]
    text = table_of(found, seen={"gsm8k"})
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text                                  # nothing is cut
    assert "gsm8k: 40 problems x 2 responses" in text
    assert "(seed 2147483647): fewer" in " ".join(text.split()) and text.count("2147483647)") >= 4
    assert "a very long name" in text


def cells(text, heading, row):
    """The cells of a row by column, of the table that has a heading."""
    lines = text.splitlines()
    begin = next(place for place, line in enumerate(lines) if heading in line)
    line = next(line for line in lines[begin + 2 :] if line.startswith(row))
    return dict(zip(lines[begin].split()[1:], line.split()[1:], strict=False))


def test_what_responses_cost_is_printed():
    base = outcomes([[1, 0], [0, 0]], [[10, 20], [30, 1000]])
    half = outcomes([[1, 1], [0, 1]], [[5, 10], [15, 500]])
    text = table_of([tables.make_row("base", "x", base, FACTS),
                     tables.make_row("new", "x", half, FACTS)])
    text = text.replace("per solved", "per_solved").replace(" %", "")
    assert cells(text, "median", "base") == {"median": "25.0", "right": "10.0", "wrong": "350.0",
                                             "per_solved": "1,060", "pass@2": "50.0",
                                             "maj@2": "25.0"}
    # Three times the right ones: 1 - 0.5 + 3 x 0.5 / 0.25.
    assert cells(text, "median", "new") == {"median": "12.5", "right": "171.7", "wrong": "15.0",
                                            "per_solved": "176.7", "pass@2": "100.0",
                                            "maj@2": "75.0", "AES": "+6.50"}
    worse = outcomes([[1, 0], [0, 0]], [[10, 20], [30, 1001]])
    text = table_of([tables.make_row("base", "x", base, FACTS),
                     tables.make_row("new", "x", worse, FACTS)])
    text = text.replace("per solved", "per_solved").replace(" %", "")
    assert cells(text, "median", "new")["AES"] == "0.00" and "-0.00" not in text
    never = table_of([tables.make_row(row, "x", outcomes([[0]], [[7]]), FACTS)
                      for row in ("base", "new")])
    never = never.replace("per solved", "per_solved")
    assert cells(never, "median", "new") == {"median": "7.0", "right": "-", "wrong": "7.0",
                                             "per_solved": "-", "AES": "-"}
    alone = table_of([tables.make_row("base", "x", outcomes([[0]], [[7]]), FACTS)])
    assert "pass@" not in alone and "AES" not in alone and "median" in alone


def test_a_model_alone_has_its_levels_and_nothing_to_compare():
    text = table_of([tables.make_row("base", "tiny",
                                     drawn(0, samples=1, levels=["easy", "hard"] * 20), FACTS)])
    assert "tiny: 40 problems x 1 response\n" in "\n".join(
        line.rstrip() for line in text.splitlines())
    assert "easy" in text and "points" not in text and "Generalisation" not in text
    # one level says nothing
    assert "easy" not in table_of([tables.make_row("base", "tiny", drawn(0), FACTS)])


def test_generalisation_is_about_sets_that_were_not_trained_on():
    found = [tables.make_row(row, name, drawn(seed), FACTS) for seed, (row, name) in enumerate(
        [("base", "math500"), ("base", "gsm8k"), ("new", "math500"), ("new", "gsm8k")])]
    text = table_of(found, seen={"gsm8k"}).partition("Generalisation, against base")[2]
    assert text.index("seen kind") < text.index("math500") < text.index("never trained on")
    assert "Generalisation" not in table_of(found, seen={"gsm8k", "math500"})
    assert "Generalisation" not in table_of(found[:2])


def test_only_results_of_its_own_are_replaced(tmp_path):
    assert tables.stored_sets(tmp_path) == {}
    compared = tables.against_first([tables.make_row(row, name, drawn(0), FACTS) for row, name in (
        ("base", "gsm8k"), ("base", "aime24"), ("new", "gsm8k"))])
    tables.write(tmp_path, compared, {"gsm8k"},
                 tables.as_json(compared, {"gsm8k"}, ENVIRONMENT, {}))
    assert tables.stored_sets(tmp_path) == {"base": ["gsm8k", "aime24"], "new": ["gsm8k"]}
    ours = {path: path.read_text() for path in tmp_path.iterdir()}
    table = json.loads(ours[tmp_path / "results.json"])
    for name, text in (("results.json", '{"mine": 1}'), ("results.json", "mine"),
                       ("results.json", "[]"), ("results.json", json.dumps(table | {"models": 5})),
                       ("results.json", "[" * 100_000),
                       ("results.json", json.dumps(table | {"models": {"base": 5}})),
                       ("results.csv", "x,y\n1,2\n"), ("results.csv", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError,
                           match=rf"{name}: was not written by evaluate\.py; choose another --out"):
            tables.stored_sets(tmp_path)
        (tmp_path / name).write_text(ours[tmp_path / name])


def test_files_hold_every_number(tmp_path):
    compared = tables.against_first([tables.make_row("base", "gsm8k", drawn(0), FACTS),
                                     tables.make_row("base", "aime24", drawn(1, samples=4), FACTS),
                                     tables.make_row("new", "gsm8k", drawn(2), FACTS)])
    tables.write(tmp_path, compared, {"gsm8k"},
                 tables.as_json(compared, {"gsm8k"}, ENVIRONMENT, {"run": {"seed": 0}}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.json"]
    table = json.loads((tmp_path / "results.json").read_text())
    assert table.keys() == {"provenance", "settings", "base", "models"} and table["base"] == "base"
    assert table["provenance"] == ENVIRONMENT
    assert table["models"]["base"].keys() == {"gsm8k", "aime24"}
    assert table["models"]["new"].keys() == {"gsm8k"}
    one = table["models"]["new"]["gsm8k"]
    summary = json_rows.convert(one["summary"], statistics.Summary, "summary")
    comparison = json_rows.convert(one["comparison"], statistics.Comparison, "comparison")
    assert summary == compared[2].summary and comparison == compared[2].comparison
    assert one["facts"] == FACTS and table["models"]["base"]["gsm8k"]["comparison"] is None
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [(row["model"], row["set"], row["kind"]) for row in rows] == [
        ("base", "gsm8k", "seen kind"), ("base", "aime24", "never trained on"),
        ("new", "gsm8k", "seen kind")]
    assert {"accuracy", "accuracy_low", "accuracy_high", "tokens", "tokens_low", "tokens_high",
            "tokens_median", "tokens_right", "tokens_wrong", "truncated", "pass_at_1", "pass_at_4",
            "majority_at_4", "tokens_per_solved", "tokens_after_answer", "accuracy_change",
            "accuracy_change_low", "token_ratio", "token_ratio_high", "p_value", "test", "aes",
            "problems_to_detect", "run.seed", "evaluation.temperature", "template_sha256",
            "problems_sha256", "weights", "grader", "git_commit"} <= rows[0].keys()
    assert {row["git_commit"] for row in rows} == {"d" * 40}
    low, _ = compared[2].comparison.accuracy_change_interval
    assert float(rows[2]["accuracy_change_low"]) == low
    assert rows[0]["accuracy_change"] == rows[0]["pass_at_4"] == "" != rows[1]["pass_at_4"]
    # all of it is flat
    assert not any(set("{[") & set(value) for row in rows for value in row.values())
