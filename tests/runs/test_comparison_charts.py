"""The charts of a report: what they draw is what was measured, and names lie beside each other."""

import dataclasses
import itertools

import made_runs
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb

from effreason.runs.report import comparison_charts, figures, label_placement, training_curves
from effreason.runs.report import results as findings
from effreason.runs.report.results import BASE, MEMBER


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made") / "family"
    made_runs.make_family(directory, alphas=(0.0, 0.05, 0.1, 0.2, 0.4), sets=("tiny",), steps=2, problems=90)
    return findings.read(directory).on("tiny")


def of_kinds(results, *kinds):
    return [each for each in results if each[0].kind in kinds]


def boxes(axes):
    renderer = axes.figure.canvas.get_renderer()
    return [text.get_window_extent(renderer) for text in axes.texts]


def covered(one, other):
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    return max(width, 0) * max(min(one.y1, other.y1) - max(one.y0, other.y0), 0)


@pytest.mark.parametrize("shape", ["wide", "narrow", "small"])
def test_pareto_has_each_point_with_its_intervals_both_ways(results, shape):
    axes = comparison_charts.pareto(results, shape=shape).axes[0]
    bars = sorted(tuple(map(tuple, segment)) for lines in axes.collections if isinstance(lines, LineCollection)
                  for segment in lines.get_segments())
    wanted = []
    for _, measured in results:
        summary = measured.summary
        wanted += [tuple((tokens, summary.accuracy) for tokens in summary.tokens_interval),
                   tuple((summary.tokens, accuracy) for accuracy in summary.accuracy_interval)]
    np.testing.assert_allclose(bars, sorted(wanted), rtol=1e-9)
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert all(left <= x <= right and low <= y <= high for bar in bars for x, y in bar)


def test_pareto_joins_members_by_alpha_and_draws_the_base_cut_off(results):
    axes = comparison_charts.pareto([results[0], *reversed(results[1:])], shape="wide").axes[0]
    courses_of = [np.column_stack(line.get_data()) for line in axes.lines if len(line.get_xdata()) > 1]
    members = [(each.summary.tokens, each.summary.accuracy) for point, each in of_kinds(results, MEMBER)]
    cut = [(each.tokens, each.accuracy) for each in results[0][1].summary.budgets]
    assert any(course.shape == (5, 2) and np.allclose(course, members) for course in courses_of)
    assert any(len(course) == len(cut) and np.allclose(course, cut) for course in courses_of)


@pytest.mark.parametrize("shape", ["wide", "narrow"])
def test_names_of_points_cover_one_another_hardly(results, shape):
    found = boxes(comparison_charts.pareto(results, shape=shape).axes[0])
    assert len(found) == len(results)
    for one, other in itertools.combinations(found, 2):
        assert covered(one, other) < 0.1 * min(one.width * one.height, other.width * other.height)


def test_crowded_names_stand_apart_each_joined_to_its_mark():
    axes = figures.new_figure(comparison_charts.SHAPES["narrow"][0]).add_axes(comparison_charts.SHAPES["narrow"][1])
    axes.set(xlim=(28, 100), ylim=(0.81, 1.005))
    places = [(36.5, 0.986), (37.5, 0.98), (40.6, 0.978), (49.2, 0.986), (44.2, 0.982), (38.9, 0.985)]
    names = ["α 0.4", "α 0.2", "α 0.1", "α 0.05", "blend 0.5", "blend 0.75"]
    label_placement.name_points(axes, [label_placement.Named(name=name, x=x, y=y, color="black")
                              for name, (x, y) in zip(names, places, strict=True)], [])
    found = boxes(axes)
    assert max(covered(one, other) for one, other in itertools.combinations(found, 2)) == 0
    joined = [tuple(line.get_xydata()[0]) for line in axes.lines]
    for (x, y), box in zip(places, found, strict=True):
        mark = axes.transData.transform((x, y))
        gap = np.hypot(*(np.clip(mark, (box.x0, box.y0), (box.x1, box.y1)) - mark)) * 72 / axes.figure.dpi
        assert gap < 11 or (x, y) in joined
    assert axes.get_xlim() == (28, 100)


def test_names_behind_lines_lie_apart_and_within():
    axes = figures.new_figure(figures.NARROW).add_axes((0.1, 0.1, 0.6, 0.8))
    axes.set_ylim(0, 1)
    label_placement.name_ends(axes, [(f"name {place}", "black", 0.99 + 0.001 * place) for place in range(6)])
    found = sorted(boxes(axes), key=lambda box: box.y0)
    assert all(upper.y0 >= lower.y1 - 2 for lower, upper in itertools.pairwise(found))
    frame = axes.get_window_extent()
    assert found[-1].y1 < frame.y1 + found[-1].height and found[0].y0 > frame.y0


def test_budgets_go_on_level_to_the_longest(results):
    axes = comparison_charts.budgets(of_kinds(results, BASE, MEMBER)).axes[0]
    longest = max(each.budget for _, measured in results for each in measured.summary.budgets)
    for line, (_, measured) in zip(axes.lines, of_kinds(results, BASE, MEMBER), strict=True):
        assert line.get_xdata()[-1] == longest
        assert line.get_ydata()[-1] == pytest.approx(measured.summary.accuracy)


def test_difficulty_has_bars_for_one_model_and_dots_for_several(results):
    members = of_kinds(results, MEMBER)
    bars = comparison_charts.difficulty(members[-1:]).axes[0].patches
    found = members[-1][1].comparison.by_difficulty.values()
    assert [bar.get_width() for bar in bars] == [tokens for each in found for tokens in (each.tokens_base, each.tokens)]
    dots = comparison_charts.difficulty(members).axes[0]
    savings = {each.saving for _, measured in members for each in measured.comparison.by_difficulty.values()}
    assert savings <= {x for line in dots.lines for x in line.get_xdata()}


def with_saving(result, saving, interval):
    comparison = result[1].comparison
    changed = {name: dataclasses.replace(each, saving=saving, saving_interval=interval)
               for name, each in comparison.by_difficulty.items()}
    return result[0], dataclasses.replace(result[1], comparison=dataclasses.replace(comparison, by_difficulty=changed))


@pytest.mark.parametrize(("saving", "interval", "bar", "dot"), [
    (0.42, (0.39, 0.445), "−42% [−44, −39]", "42%"), (-0.04, (-0.065, -0.022), "+4% [+2, +6]", "−4%"),
    (0.001, (-0.05, 0.06), "0% [−6, +5]", "0%")])
def test_bars_show_the_change_and_dots_the_saving_with_real_minus_signs(results, saving, interval, bar, dot):
    members = [with_saving(each, saving, interval) for each in of_kinds(results, MEMBER)]
    assert bar in [text.get_text() for text in comparison_charts.difficulty(members[:1]).axes[0].texts]
    renamed = [(dataclasses.replace(point, kind="baseline", name="short-est"), each) for point, each in members[:2]]
    axes = comparison_charts.difficulty(renamed).axes[0]
    assert f"{dot}  short-est" in [text.get_text() for text in axes.texts]
    assert axes.xaxis.get_major_formatter()(-0.05, 0) == "−5%"


@pytest.mark.parametrize("high", [200, 20_000])
def test_lengths_take_long_tails(high):
    tokens = np.append(np.full(99, 50.0), high)
    figure = comparison_charts.lengths([("base", "grey", tokens), ("after", "blue", tokens / 2)])
    assert [axes.get_xscale() for axes in figure.axes] == [("log" if high > 1000 else "linear")] * 2
    shares = [axes.patches[0].get_data().values.sum() for axes in figure.axes]
    np.testing.assert_allclose(shares, 1.0)


def test_members_go_from_light_to_dark():
    light = [np.dot(to_rgb(shade), (0.2126, 0.7152, 0.0722)) for shade in comparison_charts.shades(5)]
    assert all(upper > lower + 0.03 for upper, lower in itertools.pairwise(light))
    assert comparison_charts.shades(1) == [figures.AFTER]


def test_course_is_thinned_and_percent_axes_have_no_doubles():
    steps = np.arange(10_000.0)
    line = training_curves.Line(label="a", color="black", steps=steps, values=0.95 + 0.0001 * np.sin(steps / 900))
    axes = training_curves.course([line], percent=True).axes[0]
    assert max(len(drawn.get_xdata()) for drawn in axes.lines) <= figures.POINTS
    axes.figure.canvas.draw()
    ticks = [tick.get_text() for tick in axes.get_yticklabels()]
    assert len(ticks) == len(set(ticks))


def test_meter_stacks_the_parts_to_the_whole_and_leaves_out_what_is_off():
    rows = [{"step": step, "update_share/accuracy": 0.6, "update_share/length": 0.3, "update_share/kl": 0.1,
             "update_share/normalisation": 0.0} for step in range(5)]
    axes = training_curves.meter(rows).axes[0]
    assert [text.get_text() for text in axes.texts] == ["accuracy", "length", "KL"]
    top = axes.collections[-1].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(1.0)


def test_pull_has_a_line_for_zero_and_each_part():
    rows = [{"step": step, "length_pull/accuracy": 1.0, "length_pull/length": -2.0, "length_pull/kl": 0.1, "length_pull/normalisation": 0.2}
            for step in range(3)] + [{"step": 3}]
    heights = [line.get_ydata()[0] for line in training_curves.pull(rows).axes[0].lines]
    assert heights == [0, 1.0, -2.0, pytest.approx(0.1), pytest.approx(0.2)]
