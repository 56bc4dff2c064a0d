"""The charts of a report: they draw what was measured, and names do not overlap."""

import dataclasses
import itertools

import made_runs
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb

from effreason.runs.report import (
    comparison_charts,
    figures,
    label_placement,
    reading,
    training_curves,
)
from effreason.runs.report.comparison_charts import BASE, BASELINE, MEMBER
from effreason.runs.report.label_placement import NamedMark


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made") / "family"
    made_runs.make_family(directory, alphas=(0.0, 0.05, 0.1, 0.2, 0.4), sets=("tiny",), steps=2,
                          problems=90)
    return reading.read(directory).measured("tiny")


def of_kinds(models, *kinds):
    return [model for model in models if model[0].kind in kinds]


def boxes(axes):
    renderer = axes.figure.canvas.get_renderer()
    return [text.get_window_extent(renderer) for text in axes.texts]


def covered(one, other):
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    return max(width, 0) * max(min(one.y1, other.y1) - max(one.y0, other.y0), 0)


@pytest.mark.parametrize("shape", ["wide", "narrow", "small"])
def test_pareto_has_each_point_with_its_intervals_both_ways(models, shape):
    axes = comparison_charts.pareto(models, shape=shape).axes[0]
    bars = sorted(tuple(map(tuple, segment)) for lines in axes.collections
                  if isinstance(lines, LineCollection) for segment in lines.get_segments())
    expected = []
    for _, measurement in models:
        summary = measurement.summary
        expected += [tuple((tokens, summary.accuracy) for tokens in summary.tokens_interval),
                     tuple((summary.tokens, accuracy) for accuracy in summary.accuracy_interval)]
    np.testing.assert_allclose(bars, sorted(expected), rtol=1e-9)

    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert all(left <= x <= right and low <= y <= high for bar in bars for x, y in bar)


def test_pareto_joins_members_by_alpha_and_draws_the_base_cut_off(models):
    axes = comparison_charts.pareto([models[0], *reversed(models[1:])], shape="wide").axes[0]
    curves = [np.column_stack(line.get_data()) for line in axes.lines if len(line.get_xdata()) > 1]
    members = [(measurement.summary.tokens, measurement.summary.accuracy)
               for _, measurement in of_kinds(models, MEMBER)]
    cut_off = [(row.tokens, row.accuracy) for row in models[0][1].summary.budgets]
    assert any(curve.shape == (5, 2) and np.allclose(curve, members) for curve in curves)
    assert any(len(curve) == len(cut_off) and np.allclose(curve, cut_off) for curve in curves)


@pytest.mark.parametrize("shape", ["wide", "narrow"])
def test_names_of_points_cover_one_another_hardly(models, shape):
    names = boxes(comparison_charts.pareto(models, shape=shape).axes[0])
    assert len(names) == len(models)
    for one, other in itertools.combinations(names, 2):
        smaller = min(one.width * one.height, other.width * other.height)
        assert covered(one, other) < 0.1 * smaller


def test_crowded_names_do_not_overlap_and_are_joined_to_their_marks():
    size, place, _ = comparison_charts.SHAPES["narrow"]
    axes = figures.new_figure(size).add_axes(place)
    axes.set(xlim=(28, 100), ylim=(0.81, 1.005))
    places = [(36.5, 0.986), (37.5, 0.98), (40.6, 0.978), (49.2, 0.986), (44.2, 0.982),
              (38.9, 0.985)]
    names = ["α 0.4", "α 0.2", "α 0.1", "α 0.05", "blend 0.5", "blend 0.75"]
    label_placement.name_points(axes, [NamedMark(name=name, x=x, y=y, color="black")
                                       for name, (x, y) in zip(names, places, strict=True)], [])

    placed = boxes(axes)
    assert max(covered(one, other) for one, other in itertools.combinations(placed, 2)) == 0
    joined = [tuple(line.get_xydata()[0]) for line in axes.lines]
    for (x, y), box in zip(places, placed, strict=True):
        mark = axes.transData.transform((x, y))
        nearest = np.clip(mark, (box.x0, box.y0), (box.x1, box.y1))
        gap = np.hypot(*(nearest - mark)) * 72 / axes.figure.dpi
        assert gap < 11 or (x, y) in joined
    assert axes.get_xlim() == (28, 100)


def test_names_at_the_ends_of_lines_are_apart_and_within():
    axes = figures.new_figure(figures.NARROW).add_axes((0.1, 0.1, 0.6, 0.8))
    axes.set_ylim(0, 1)
    label_placement.name_ends(
        axes, [(f"name {index}", "black", 0.99 + 0.001 * index) for index in range(6)])
    placed = sorted(boxes(axes), key=lambda box: box.y0)
    assert all(upper.y0 >= lower.y1 - 2 for lower, upper in itertools.pairwise(placed))
    frame = axes.get_window_extent()
    assert placed[-1].y1 < frame.y1 + placed[-1].height
    assert placed[0].y0 > frame.y0


def test_budgets_go_on_level_to_the_longest(models):
    drawn = of_kinds(models, BASE, MEMBER)
    axes = comparison_charts.budgets(drawn).axes[0]
    longest = max(row.budget for _, measurement in models for row in measurement.summary.budgets)
    for line, (_, measurement) in zip(axes.lines, drawn, strict=True):
        assert line.get_xdata()[-1] == longest
        assert line.get_ydata()[-1] == pytest.approx(measurement.summary.accuracy)


def test_difficulty_has_bars_for_one_model_and_dots_for_several(models):
    members = of_kinds(models, MEMBER)
    bars = comparison_charts.difficulty(members[-1:]).axes[0].patches
    rows = members[-1][1].comparison.by_difficulty.values()
    assert [bar.get_width() for bar in bars] == [
        tokens for row in rows for tokens in (row.tokens_base, row.tokens)]

    dots = comparison_charts.difficulty(members).axes[0]
    savings = {row.saving for _, measurement in members
               for row in measurement.comparison.by_difficulty.values()}
    assert savings <= {x for line in dots.lines for x in line.get_xdata()}


def with_saving(model, saving, interval):
    point, measurement = model
    changed = {name: dataclasses.replace(row, saving=saving, saving_interval=interval)
               for name, row in measurement.comparison.by_difficulty.items()}
    comparison = dataclasses.replace(measurement.comparison, by_difficulty=changed)
    return point, dataclasses.replace(measurement, comparison=comparison)


@pytest.mark.parametrize(("saving", "interval", "bar", "dot"), [
    (0.42, (0.39, 0.445), "−42% [−44, −39]", "42%"),
    (-0.04, (-0.065, -0.022), "+4% [+2, +6]", "−4%"),
    (0.001, (-0.05, 0.06), "0% [−6, +5]", "0%")])
def test_bars_show_the_change_and_dots_the_saving_with_real_minus_signs(
        models, saving, interval, bar, dot):
    members = [with_saving(model, saving, interval) for model in of_kinds(models, MEMBER)]
    texts = comparison_charts.difficulty(members[:1]).axes[0].texts
    assert bar in [text.get_text() for text in texts]
    renamed = [(dataclasses.replace(point, kind=BASELINE, name="short-est"), measurement)
               for point, measurement in members[:2]]
    axes = comparison_charts.difficulty(renamed).axes[0]
    assert f"{dot}  short-est" in [text.get_text() for text in axes.texts]
    assert axes.xaxis.get_major_formatter()(-0.05, 0) == "−5%"


@pytest.mark.parametrize("high", [200, 20_000])
def test_lengths_take_long_tails(high):
    tokens = np.append(np.full(99, 50.0), high)
    figure = comparison_charts.lengths([("base", "grey", tokens), ("after", "blue", tokens / 2)])
    scale = "log" if high > 1000 else "linear"
    assert [axes.get_xscale() for axes in figure.axes] == [scale] * 2
    shares = [axes.patches[0].get_data().values.sum() for axes in figure.axes]
    np.testing.assert_allclose(shares, 1.0)


def test_members_go_from_light_to_dark():
    light = [np.dot(to_rgb(shade), (0.2126, 0.7152, 0.0722))
             for shade in comparison_charts.shades(5)]
    assert all(upper > lower + 0.03 for upper, lower in itertools.pairwise(light))
    assert comparison_charts.shades(1) == [figures.AFTER]


def test_training_curve_is_thinned_and_percent_axes_have_no_doubles():
    steps = np.arange(10_000.0)
    line = training_curves.Line(label="a", color="black", steps=steps,
                                values=0.95 + 0.0001 * np.sin(steps / 900))
    axes = training_curves.training_curve([line], percent=True).axes[0]
    assert max(len(curve.get_xdata()) for curve in axes.lines) <= figures.POINTS
    axes.figure.canvas.draw()
    ticks = [tick.get_text() for tick in axes.get_yticklabels()]
    assert len(ticks) == len(set(ticks))


def test_meter_stacks_the_parts_to_the_whole_and_leaves_out_what_is_off():
    rows = [{"step": step, "update_share/accuracy": 0.6, "update_share/length": 0.3,
             "update_share/kl": 0.1, "update_share/normalisation": 0.0} for step in range(5)]
    axes = training_curves.update_shares(rows).axes[0]
    assert [text.get_text() for text in axes.texts] == ["accuracy", "length", "KL"]
    top = axes.collections[-1].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(1.0)


def test_pull_has_a_line_for_zero_and_each_part():
    rows = [{"step": step, "length_pull/accuracy": 1.0, "length_pull/length": -2.0,
             "length_pull/kl": 0.1, "length_pull/normalisation": 0.2} for step in range(3)]
    axes = training_curves.length_pulls([*rows, {"step": 3}]).axes[0]
    heights = [line.get_ydata()[0] for line in axes.lines]
    assert heights == [0, 1.0, -2.0, pytest.approx(0.1), pytest.approx(0.2)]
