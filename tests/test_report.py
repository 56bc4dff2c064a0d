"""The numbers of summary.json, the end table within 80 columns, and the picture for runs of every shape."""

import dataclasses
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import image
from rich.console import Console

from effreason import report
from effreason.errors import UserError
from effreason.records import Evaluation, LevelResult
from effreason.runtime.config import Config


def run(code, argument):
    command = [sys.executable, "-c", code, argument]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def evaluation(accuracy, tokens, levels):
    results = {level: LevelResult(accuracy=right, tokens=length, problems=200)
               for level, (right, length) in levels.items()}
    return Evaluation(accuracy=accuracy, tokens=tokens, truncated=0.0, problems=600, samples=1, by_level=results)


BASE = evaluation(0.902, 110.0, {"hard": (0.861, 171.2), "easy": (0.948, 61.5), "medium": (0.897, 98.2)})
TRAINED = evaluation(0.951, 30.25, {"easy": (0.981, 9.3), "medium": (0.952, 23.8), "hard": (0.92, 58.1)})


@pytest.fixture
def config():
    base = Config()
    return dataclasses.replace(base, reward=dataclasses.replace(base.reward, alpha=0.2),
                               run=dataclasses.replace(base.run, seed=7))


@pytest.fixture
def summary(config):
    return report.summary(config, BASE, TRAINED, 301.5)


def single_level(config, level="all"):
    return report.summary(config, evaluation(0.5, 1893.0, {level: (0.5, 1893.0)}),
                          evaluation(0.51, 2011.0, {level: (0.51, 2011.0)}), 5.0)


def rows(steps, scale=1.0):
    noise = np.random.default_rng(0).normal(size=(2, steps))
    course = np.arange(steps) / max(steps - 1, 1)
    tokens = scale * (30 + 80 * np.exp(-3.5 * course) + 2.5 * noise[0])
    accuracy = np.minimum(0.9 + 0.05 * course + 0.015 * noise[1], 1.0)
    return [{"step": step, "reward/alpha": 0.2, "rollout/accuracy": float(accuracy[step]),
             "rollout/tokens": float(tokens[step])} for step in range(steps)]


def printed(summary, width=80):
    console = Console(file=io.StringIO(), width=width)
    report.print_table(console, summary)
    return console.file.getvalue()


def test_summary_has_exactly_the_documented_shape(summary):
    assert json.loads(json.dumps(summary)) == {
        "alpha": 0.2,
        "seed": 7,
        "base": {"accuracy": 0.902, "tokens": 110.0, "by_level": {
            "easy": {"accuracy": 0.948, "tokens": 61.5}, "medium": {"accuracy": 0.897, "tokens": 98.2},
            "hard": {"accuracy": 0.861, "tokens": 171.2}}},
        "trained": {"accuracy": 0.951, "tokens": 30.25, "by_level": {
            "easy": {"accuracy": 0.981, "tokens": 9.3}, "medium": {"accuracy": 0.952, "tokens": 23.8},
            "hard": {"accuracy": 0.92, "tokens": 58.1}}},
        "token_ratio": 0.275,
        "accuracy_change": pytest.approx(0.049),
        "wall_s": 301.5,
    }


def test_levels_go_from_easy_to_hard(config, summary):
    assert list(summary["base"]["by_level"]) == list(summary["trained"]["by_level"]) == ["easy", "medium", "hard"]
    names = ["Level 10", "Level 2", "Geometry", "Algebra"]
    levels = evaluation(0.5, 10.0, dict.fromkeys(names, (0.5, 10.0)))
    assert list(report.summary(config, levels, levels, 1.0)["base"]["by_level"]) == [
        "Level 2", "Level 10", "Algebra", "Geometry"]


def test_table_shows_before_after_and_the_saving(summary):
    lines = printed(summary).splitlines()
    cells = [line.split() for line in lines]
    assert ["easy", "94.8%", "98.1%", "+3.3", "61.5", "9.3", "84.9%"] in cells
    assert ["all", "90.2%", "95.1%", "+4.9", "110.0", "30.2", "72.5%"] in cells
    assert lines[0] == "Held-out problems, before and after training (alpha 0.2, seed 7, 5:02)"


def test_table_fits_80_columns_and_takes_names_as_they_are(config):
    levels = {"[bold]Intermediate Algebra and more[/bold]": (1.0, 123_456.7), "[red]": (1.0, 123_456.7)}
    wide = evaluation(1.0, 123_456.7, levels)
    text = printed(report.summary(config, wide, wide, 1e6))
    assert max(map(len, text.splitlines())) <= 80
    assert "[red]" in text and "[bold]" in text and "123,456.7" in text


def test_table_of_one_level_has_one_row(config):
    text = printed(single_level(config))
    assert text.count("50.0%") == 1 and "-6.2%" in text


def test_table_is_the_same_when_piped_and_has_no_control_codes(summary):
    code = ("import json, sys; from rich.console import Console; from effreason import report;"
            "report.print_table(Console(), json.loads(sys.argv[1]))")
    piped = run(code, json.dumps(summary))
    assert piped == printed(summary) and "\x1b" not in piped


@pytest.mark.parametrize("steps", [0, 1, 2, 15, 40, 10_000])
def test_plot_of_any_number_of_steps(tmp_path, summary, steps):
    report.plot(rows(steps), summary, tmp_path / "report.png", model="/models/Qwen_$3$")
    pixels = image.imread(tmp_path / "report.png")
    assert pixels.shape == (896, 1760, 4) and pixels[..., :3].std() > 0.05


@pytest.mark.parametrize("steps", [0, 2, 40])
def test_plot_without_evaluations_draws_the_curves_alone(tmp_path, steps):
    report.plot(rows(steps), None, tmp_path / "report.png", model="tiny")
    assert image.imread(tmp_path / "report.png").shape == (896, 1216, 4)


def test_plot_takes_missing_values_odd_names_and_evaluations_between(tmp_path, config):
    measured = rows(40)
    measured[3]["rollout/accuracy"] = None
    measured[9] |= {"evaluation/accuracy": 0.9, "evaluation/tokens": 80.0}
    measured.append({"step": 40, "evaluation/accuracy": 0.9, "evaluation/tokens": None})
    report.plot(measured, single_level(config, "a $long$ name_with ^ signs " * 4), tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_plot_that_cannot_be_written_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"report\.png: cannot be written: No such file or directory"):
        report.plot([], None, tmp_path / "missing" / "report.png")


def test_plot_leaves_the_global_state_of_matplotlib_alone(tmp_path):
    code = ("import sys, matplotlib; from pathlib import Path; from effreason import report;"
            "before = dict(matplotlib.rcParams); report.plot([], None, Path(sys.argv[1]));"
            "from matplotlib import pyplot; print(pyplot.get_fignums(), before == dict(matplotlib.rcParams))")
    assert run(code, str(tmp_path / "report.png")) == "[] True\n"


def test_evaluations_stand_at_the_updates_that_were_made():
    measured = rows(20)
    measured[9] |= {"evaluation/accuracy": 0.9, "evaluation/tokens": 80.0}     # in a step's row: after its update
    measured.append({"step": 20, "evaluation/accuracy": 0.9, "evaluation/tokens": 30.0})  # alone: 20 updates made
    axes = report.Figure().add_subplot()
    ends = {"base": {"tokens": 110.0}, "trained": {"tokens": 30.0}}
    report._curve(axes, measured, "tokens", ends)
    places = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert [places[name] for name in ("held-out: before", "between", "after")] == [[0], [10], [20]]


def test_smooth_keeps_a_straight_line_to_its_ends_and_calms_noise():
    steps = np.arange(100.0)
    np.testing.assert_allclose(report._smooth(steps, 110 - 0.8 * steps), 110 - 0.8 * steps, atol=1e-9)
    noise = np.random.default_rng(0).normal(size=100)
    assert report._smooth(steps, noise).std() < 0.6 * noise.std()


@pytest.mark.parametrize("count", [1, 499, 500, 501, 9_999])
def test_thinned_keeps_500_points_at_most(count):
    values = np.arange(float(count))
    thinned = report._thinned(values)
    assert len(thinned) <= 500 and thinned[0] < thinned[-1] + 1
    if count <= 500:
        np.testing.assert_array_equal(thinned, values)
