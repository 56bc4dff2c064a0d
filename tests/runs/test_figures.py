"""report.png for runs of every shape, and the look that all pictures have in common."""

import dataclasses
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import image

from effreason.evaluation.statistics import Summary
from effreason.runs.report import figures
from effreason.runs.results import Measurement, Point, PointKind, Results
from effreason.runtime.errors import UserError
from effreason.types import LevelResult


def summary(accuracy, tokens, levels):
    """A summary in which only what is drawn is meant."""
    rest = dict.fromkeys(field.name for field in dataclasses.fields(Summary))
    return Summary(**rest | {"accuracy": accuracy, "tokens": tokens, "by_level": {
        name: LevelResult(accuracy=accuracy, tokens=tokens, problems=1)
        for name, (accuracy, tokens) in levels.items()}})


def results(base, trained, alpha_start=0.2):
    sets = [{"tiny": Measurement(summary=each, comparison=None)} for each in (base, trained)]
    points = [Point(name="base", kind=PointKind.BASE, directory="", sets=sets[0]),
              Point(name="trained", kind=PointKind.MEMBER, directory=".", sets=sets[1], alpha=0.2,
                    alpha_start=alpha_start)]
    return Results(model="tiny", seed=7, steps=1, points=points, origin={}, sampling={},
                   environment={})


BASE = summary(0.902, 110.0, {"easy": (0.948, 61.5), "hard": (0.861, 171.2)})
TRAINED = summary(0.951, 30.25, {"easy": (0.981, 9.3), "hard": (0.92, 58.1)})
RESULTS = results(BASE, TRAINED)


def run(code, argument):
    command = [sys.executable, "-c", code, argument]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def rows(steps, scale=1.0):
    noise = np.random.default_rng(0).normal(size=(2, steps))
    course = np.arange(steps) / max(steps - 1, 1)
    tokens = scale * (30 + 80 * np.exp(-3.5 * course) + 2.5 * noise[0])
    accuracy = np.minimum(0.9 + 0.05 * course + 0.015 * noise[1], 1.0)
    return [{"step": step, "reward/alpha": 0.2, "rollout/accuracy": float(accuracy[step]),
             "rollout/tokens": float(tokens[step])} for step in range(steps)]


def single_level(level):
    measured = summary(0.5, 1893.0, {level: (0.5, 1893.0)})
    return results(measured, measured)


@pytest.mark.parametrize("steps", [0, 1, 2, 15, 40, 10_000])
def test_plot_of_any_number_of_steps(tmp_path, steps):
    figures.overview(rows(steps), RESULTS, tmp_path / "report.png", model="/models/Qwen_$3$")
    pixels = image.imread(tmp_path / "report.png")
    assert pixels.shape == (896, 1760, 4) and pixels[..., :3].std() > 0.05


def test_title_says_where_alpha_moved_from(tmp_path):
    pictures = []
    for start in (0.2, 0.1):
        figures.overview(rows(2), results(BASE, TRAINED, start), tmp_path / "report.png")
        pictures.append((tmp_path / "report.png").read_bytes())
    figures.overview(rows(2), RESULTS, tmp_path / "report.png")
    assert pictures[0] == (tmp_path / "report.png").read_bytes() != pictures[1]


@pytest.mark.parametrize("steps", [0, 2, 40])
def test_plot_without_evaluations_draws_the_curves_alone(tmp_path, steps):
    figures.overview(rows(steps), None, tmp_path / "report.png", model="tiny")
    assert image.imread(tmp_path / "report.png").shape == (896, 1216, 4)


def test_plot_takes_missing_values_odd_names_and_evaluations_between(tmp_path):
    measured = rows(40)
    measured[3]["rollout/accuracy"] = None
    measured[9] |= {"evaluation/accuracy": 0.9, "evaluation/tokens": 80.0}
    measured.append({"step": 40, "evaluation/accuracy": 0.9, "evaluation/tokens": None})
    figures.overview(measured, single_level("a $long$ name_with ^ signs " * 4),
                     tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_plot_that_cannot_be_written_is_a_clear_error(tmp_path):
    with pytest.raises(UserError,
                       match=r"report\.png: cannot be written: No such file or directory"):
        figures.overview([], None, tmp_path / "missing" / "report.png")


def test_plot_leaves_the_global_state_of_matplotlib_alone(tmp_path):
    code = ("import sys, matplotlib; from pathlib import Path;"
            "from effreason.runs.report import figures;"
            "before = dict(matplotlib.rcParams); figures.overview([], None, Path(sys.argv[1]));"
            "from matplotlib import pyplot;"
            "print(pyplot.get_fignums(), before == dict(matplotlib.rcParams))")
    assert run(code, str(tmp_path / "report.png")) == "[] True\n"


def test_evaluations_are_drawn_at_the_updates_that_were_made():
    measured = rows(20)
    # in a step's row: after its update
    measured[9] |= {"evaluation/accuracy": 0.9, "evaluation/tokens": 80.0}
    # alone: 20 updates made
    measured.append({"step": 20, "evaluation/accuracy": 0.9, "evaluation/tokens": 30.0})
    axes = figures.Figure().add_subplot()
    figures._curve(axes, measured, "tokens", (BASE, TRAINED))
    places = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert [places[name] for name in ("held-out: before", "between", "after")] == [[0], [10], [20]]


def test_smooth_keeps_a_straight_line_to_its_ends_and_calms_noise():
    steps = np.arange(100.0)
    np.testing.assert_allclose(figures.smooth(steps, 110 - 0.8 * steps), 110 - 0.8 * steps,
                               atol=1e-9)
    noise = np.random.default_rng(0).normal(size=100)
    assert figures.smooth(steps, noise).std() < 0.6 * noise.std()


@pytest.mark.parametrize("count", [1, 499, 500, 501, 9_999])
def test_thinned_keeps_500_points_at_most(count):
    values = np.arange(float(count))
    thinned = figures.thinned(values)
    assert len(thinned) <= 500 and thinned[0] < thinned[-1] + 1
    if count <= 500:
        np.testing.assert_array_equal(thinned, values)


def figure_with(text):
    figure = figures.new_figure(figures.NARROW)
    axes = figure.add_axes((0.1, 0.1, 0.8, 0.8))
    axes.plot([0, 1], [0, 1], marker="o")
    axes.text(0.5, 0.5, text, parse_math=False)
    return figure


def test_save_draws_once_and_writes_png_and_svg(tmp_path):
    figures.save(figure_with("a"), tmp_path / "some")
    assert image.imread(tmp_path / "some.png").shape == (600, 940, 4)
    assert ElementTree.parse(tmp_path / "some.svg").getroot().tag.endswith("svg")
    with pytest.raises(UserError, match=r"other\.png: cannot be written"):
        figures.save(figure_with("a"), tmp_path / "missing" / "other")


def test_inline_keeps_text_as_escaped_text_and_names_nothing_outside():
    text = figures.inline(figure_with('<script>alert(1)</script> "quoted" $x$'), "some")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "<script" not in text
    assert "$x$" in text
    assert "http" not in text and "<metadata" not in text and "<style" not in text
    ElementTree.fromstring(text.replace("xlink:href", "href"))


def test_ids_of_two_inline_figures_do_not_meet():
    found = [re.findall(r' id="([^"]*)"', figures.inline(figure_with("a"), name))
             for name in ("one", "two")]
    assert found[0] and found[1] and not set(found[0]) & set(found[1])
    text = figures.inline(figure_with("a"), "one")
    assert {name for name in re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', text)} == set(found[0])


def test_inline_is_the_same_each_time():
    assert figures.inline(figure_with("a"), "one") == figures.inline(figure_with("a"), "one")
