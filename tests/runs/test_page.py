"""The page of a run or a family: complete, safe, small, and says what is missing."""

import html.parser
import json
import re
import shutil
import time

import made_runs
import pytest

from effreason.cli import report
from effreason.runs import results
from effreason.runs.report import examples, published, reading, sections
from effreason.runs.report import page as pages
from effreason.runtime.errors import UserError
from effreason.types import FinishReason

HOSTILE = ("<script>alert('x')</script></details></pre>"
           "<img src=http://evil.example/x onerror=alert(1)>"
           "{{ 7 * 7 }}</style>\x00\x1b[31m\u202e\ud800 & \"quoted\"</think>\\boxed{<b>1</b>}")
MISSING = object()
VOID = {"meta", "br", "img", "link", "input", "hr"}
SECTIONS = ("tradeoff", "savings", "generalisation", "training", "prompts", "groups", "settings")


class Nesting(html.parser.HTMLParser):
    """Reads a page as a browser would; notes elements, attributes and what is not closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.wrong, self.elements, self.ids, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        self.wrong += self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"/{tag}")

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page_of(directory, output="page.html"):
    """The page alone, which is sooner there than with its plots."""
    text = pages.write(directory, output and directory / output).read_text(encoding="utf-8")
    page = Nesting(text)
    assert not page.wrong and len(page.ids) == len(set(page.ids))
    return text, page


def section(text, name):
    return re.search(rf'<section id="{name}">.*?</section>', text, re.DOTALL)[0]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made") / "family"
    table = made_runs.make_family(directory, alphas=(0.0, 0.1, 0.4), steps=20, problems=60)
    return directory, table, *page_of(directory, None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made") / "run"
    made = made_runs.make_run(directory, steps=20)
    return directory, made, *page_of(directory)


@pytest.fixture(scope="module")
def dial(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made") / "dial"
    made = made_runs.make_dial(directory)
    return directory, made, *page_of(directory)


def test_page_of_a_dial_has_a_point_for_every_alpha(dial):
    directory, made, text, page = dial
    contents = reading.read(directory)
    points = contents.measured("tiny")
    assert [(point.alpha, str(point.kind)) for point, _ in points[1:]] == [
        (0.0, "member"), (0.1, "member"), (0.15, "between"), (0.2, "member"), (0.3, "between"),
        (0.4, "member")]
    assert points[4] == (made.points[1], made.points[1].sets["tiny"])
    tokens = [measurement.summary.tokens for _, measurement in points[1:]]
    assert tokens == sorted(tokens, reverse=True)
    rows = re.findall(r'<th scope="row">(.*?)</th>', section(text, "tradeoff"))
    assert [row for row in rows if "never trained on" in row] == [
        f"α {alpha} <small>never trained on</small>" for alpha in (0.15, 0.3)]
    assert "Hollow: an α that was never trained on" in text
    assert "a dial from α 0 to 0.4" in text and "Most tokens saved by a trained α" in text
    assert {run.name for run in contents.runs} == {""}
    curves = next(attributes["aria-label"] for _, attributes in page.elements
                  if attributes.get("aria-label", "").startswith("Tokens of a response against"))
    assert all(f"α {alpha}: " in curves for alpha in ("0", "0.1", "0.2", "0.4"))


def test_the_slider_shows_the_answers_of_one_alpha_and_needs_no_script(dial):
    _, _, text, page = dial
    buttons = [attributes for tag, attributes in page.elements if tag == "input"]
    assert [button["type"] for button in buttons] == 6 * ["radio"]
    assert len({button["name"] for button in buttons}) == 1     # arrow keys go from one to the next
    assert [button["aria-label"] for button in buttons][2:4] == [
        "α 0.15, never trained on", "α 0.2"]
    assert [button["id"] for button in buttons if "checked" in button] == ["alpha3"]
    prompts, style = section(text, "prompts"), re.search("<style>(.*)</style>", text, re.DOTALL)[1]
    articles = prompts.split("<article")[1:]
    assert len(articles) > 3
    for article in articles:
        assert article.count('<div class="column">') == 1 and "before training" in article
        for index, alpha in enumerate(("0", "0.1", "0.15", "0.2", "0.3", "0.4")):
            assert f'<div class="column at at{index}">' in article
            assert f"<b>α {alpha}</b>" in article
            assert f"#prompts:has(#alpha{index}:checked) .at{index}" in style
    assert re.search(r"<b>α 0.15</b> \(never trained on\): \d+\.\d tokens \[", prompts)
    assert ".at { display: none; }" in style and "@supports not selector(:has(a))" in style


def test_a_dial_that_was_evaluated_before_training_nowhere_is_a_run(tmp_path):
    made_runs.make_dial(tmp_path / "run", steps=4, problems=9)
    (tmp_path / "run/evaluations/step0/tiny.jsonl").unlink()
    text, page = page_of(tmp_path / "run")
    assert "input" not in {tag for tag, _ in page.elements} and "fewer tokens" in text


def test_family_page_has_every_section(family):
    _, _, text, page = family
    assert "Left out" not in text and "left-out" not in text.partition("</style>")[2]
    for name in SECTIONS:
        assert f'<section id="{name}">' in text and f'href="#{name}"' in text
    figures = [attributes["aria-label"] for _, attributes in page.elements
               if attributes.get("role") == "img"]
    assert len(figures) >= 12 and all(len(label) > 30 for label in figures)
    assert {tag for tag, _ in page.elements} >= {"main", "header", "nav", "figcaption", "caption",
                                                 "th", "details"}


def test_run_page_has_every_section_and_compares_start_middle_and_end(run):
    _, _, text, page = run
    assert "left-out" not in text.partition("</style>")[2]
    prompts = section(text, "prompts")
    assert all(f"<b>{label}</b>" in prompts for label in ("before training", "after 10 steps",
                                                          "after 20 steps"))
    assert re.search(r"−\d+ tokens", prompts) and 'class="saved"' in prompts
    assert "got worse" in prompts


def test_numbers_of_the_page_are_those_of_summary_json(run):
    directory, _, text, page = run
    summary = json.loads((directory / "summary.json").read_text())
    heading = re.search(r"<h1>(.*?)</h1>", text)[1]
    heading = heading.replace("−", "-").replace("\xa0", " ").replace("\u2011", "-")
    base, trained = summary["points"]
    comparison = trained["sets"]["tiny"]["comparison"]
    low, high = (100 * (1 - ratio) for ratio in reversed(comparison["token_ratio_interval"]))
    saving = 100 * (1 - comparison["token_ratio"])
    assert heading.startswith(f"{saving:.1f} % fewer tokens [{low:.1f}, {high:.1f}]")
    assert f"accuracy {100 * comparison['accuracy_change']:+.1f} points [" in heading
    problems = trained["sets"]["tiny"]["summary"]["problems"]
    assert heading.endswith(f"on {problems} held-out problems of tiny, alpha 0.2")
    for point in (base, trained):
        assert list(point["sets"]) == ["tiny", "tiny_long"]
        for name, measured in point["sets"].items():
            assert f"{100 * measured['summary']['accuracy']:.1f} %" in page.text, name
            assert f"{measured['summary']['tokens']:.1f}" in page.text, name
    for level in trained["sets"]["tiny"]["summary"]["by_level"].values():
        assert f"{level['tokens']:.1f}" in section(text, "savings")


def test_family_table_has_every_point_of_every_set(family):
    _, table, text, page = family
    rows = re.findall(r'<th scope="row">(.*?)</th>', section(text, "tradeoff"))
    names = ["base", "α 0", "α 0.1", "α 0.4", "SFT, shortest", "DPO", "blend 0.25",
             "blend 0.5", "blend 0.75"]
    assert [row.partition(" <small>")[0] for row in rows] == 2 * names
    summary = table.points[2].sets["tiny_long"].summary
    assert f"{100 * summary.accuracy:.1f} %" in section(text, "generalisation")


def test_headline_is_about_the_greatest_saving_not_shown_to_cost_accuracy(family):
    directory, table, text, _ = family
    comparisons = {point.alpha: point.sets["tiny"].comparison for point in table.points
                   if point.kind == "member"}
    accurate = [alpha for alpha, comparison in comparisons.items()
                if comparison.accuracy_change_interval[1] >= 0]
    best = min(accurate, key=lambda alpha: comparisons[alpha].token_ratio)
    assert re.search(r"<h1>(.*?)</h1>", text)[1].endswith(f"alpha {best:g}")


def test_headline_says_so_where_all_members_lose_accuracy(tmp_path):
    made_runs.make_family(tmp_path / "family", alphas=(0.1, 0.4), steps=4, problems=30)
    table = json.loads((tmp_path / "family" / "family.json").read_text())
    for point in table["points"]:
        if point["kind"] == "member":
            point["sets"]["tiny"]["comparison"] |= {"accuracy_change": -0.1 - point["alpha"],
                                                    "accuracy_change_interval": [-0.9, -0.05]}
    (tmp_path / "family" / "family.json").write_text(json.dumps(table))
    contents = reading.read(tmp_path / "family")
    assert sections.best_member(contents)[0].alpha == 0.1
    assert "all are measurably less accurate" in sections.headline(contents).kicker


@pytest.mark.parametrize(("make", "options"),
                         [(made_runs.make_run, {}), (made_runs.make_family, {"alphas": (0.2,)})])
def test_hostile_responses_stay_text(tmp_path, make, options):
    sets = ("<b>set</b>&\x07", "$x^2$ {{ y }}")
    make(tmp_path / "made", **options, steps=4, problems=12, response=HOSTILE, sets=sets)
    text, page = page_of(tmp_path / "made")
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert "<b>set</b>" not in text and "<b>1</b>" not in text
    # escaped: there to be read
    assert "<script>alert('x')</script></details></pre>" in page.text
    assert "{{ 7 * 7 }}" in page.text and not re.search(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]", text)


def test_page_loads_nothing_and_runs_nothing(family, run, dial):
    for _, _, text, page in (family, run, dial):
        for tag, attributes in page.elements:
            assert "src" not in attributes
            assert not any(name.startswith("on") for name in attributes), tag
            for name in ("href", "xlink:href"):
                link = attributes.get(name, "#")
                assert (link in pages.FILES
                        or re.match(r"#|[\w.]+/report\.html$", link)), (tag, attributes)
        assert not re.search(r"@import|url\((?!#)|<script|<link|<iframe", text)
        assert "default-src 'none'" in text and "http" not in text.replace("http-equiv", "")


def test_page_of_10_000_rollouts_and_long_responses_is_small_and_soon_there(tmp_path):
    directory = tmp_path / "run"
    made_runs.make_run(directory, steps=1250, problems=60, groups=1,
                       response="8*7=6;" * 800 + "</think>7")
    assert len((directory / "rollouts.jsonl").read_text().splitlines()) == 10_000
    began = time.process_time()
    text, page = page_of(directory)
    assert len(text.encode()) < 3_000_000 and time.process_time() - began < 20
    assert "1,249" in section(text, "groups") and "characters …]" in text


def test_group_shows_every_answer_with_length_reward_and_advantage(run):
    directory, _, text, _ = run
    rows = [json.loads(line) for line in (directory / "rollouts.jsonl").read_text().splitlines()]
    first = [row for row in rows if row["step"] == 0]
    shown = section(text, "groups")
    assert shown.count("<li>") == 2 * len(first) and "Step 0" in shown and "Step 19" in shown
    for row in first:
        assert f"{row['tokens']} tokens" in shown and f"reward {row['reward']:.3f}" in shown
        assert f"{row['advantage']:+.3f}".replace("-", "−") in shown


def test_group_with_the_widest_rewards_is_shown_and_broken_lines_are_passed_over(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    rows = [{"step": step, "uid": uid, "sample": sample, "level": "all",
             "problem": f"problem {uid}", "answer": None,
             "reference_answer": "1", "response": "so", "status": "exact", "correct": True,
             "tokens": 10 - sample, "finish": "eos",
             "reward": reward * sample, "advantage": 0.0}
            for step in (3, 4) for uid, reward in ((1, 0.1), (2, 0.5), (3, 0.5))
            for sample in (0, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "uid')
    found = examples.choose_groups(path)
    assert [(group.step, group.problem) for group in found] == [(3, "problem 2"), (4, "problem 2")]
    assert [response.tokens for response in found[0].responses] == [9, 10]
    assert found[0].rewards == (0.5, 0.0)
    assert examples.choose_groups(tmp_path / "none.jsonl") == []


def graded_row(uid, tokens, correct, level="easy", response="a</think>b"):
    return examples.GradedResponse(
        uid=uid, sample=0, level=level, problem=f"problem {uid}", reference_answer="1",
        response=response, answer="1", status="exact", correct=correct, tokens=tokens,
        finish=FinishReason.EOS)


def test_prompts_are_the_typical_the_best_and_the_worse_each_once():
    before = [graded_row(uid, 100, uid != 9) for uid in range(10)]
    after = [graded_row(uid, 100 - 10 * uid, uid != 8) for uid in range(10)]
    found = examples.choose_examples([("before", before), ("after", after)])
    assert {example.problem: example.reason for example in found} == {
        "problem 3": "the median saving",
        "problem 7": "the largest saving of all that are right before and after",
        "problem 9": "got better: wrong before, right after, as 1 of 10 did",
        "problem 8": "got worse: right before, wrong after, as 1 of 10 did"}
    assert [response.saved for response in found[0].responses] == [0, 30]
    wrong = [graded_row(uid, 100 - 10 * uid, False) for uid in range(3)]
    assert examples.choose_examples([("before", before[:3]),
                                     ("after", wrong)])[0].problem == "problem 1"
    assert examples.choose_examples([]) == []
    assert examples.choose_examples([("a", before[:1]), ("b", after[1:2])]) == []


def test_thinking_ends_at_its_last_mark_and_is_cut_in_its_middle():
    response = examples.shown(graded_row(1, 5, True, response="<think>\na</think>b</think>\n c "),
                              "x")
    assert (response.thinking, response.solution, response.omitted) == ("a</think>b", "c", 0)
    assert examples.shown(graded_row(1, 5, True, response="never ends"), "x").solution == ""
    long = examples.shown(graded_row(1, 5, True, response="ab" * 5000 + "</think>c"), "x")
    assert len(long.thinking) < 5000 and long.omitted == 10_000 - examples.HEAD - examples.TAIL


def test_unfinished_run_has_its_curves_and_says_what_is_missing(tmp_path):
    directory = tmp_path / "run"
    made_runs.make_run(directory, steps=20, sets=("tiny",))
    for name in ("summary.json", "rollouts.jsonl", "environment.json"):
        (directory / name).unlink()
    for path in (directory / "evaluations" / "step20").iterdir():
        path.unlink()
    lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    (directory / "metrics.jsonl").write_text("".join(lines[:12]) + lines[12][:40])
    text, page = page_of(directory)
    assert "Not finished: 12 of 20 steps" in text
    assert "Not evaluated on held\u2011out problems yet" in text
    assert "training-tokens" in text and "Length-pressure meter" in text
    # step 0 and the one in the middle
    assert section(text, "prompts").count("<article") > 2
    for name in ("tradeoff", "savings", "generalisation", "groups"):
        assert "Left out" in section(text, name), name
    assert "there is no environment.json" in text


def test_run_without_the_metrics_of_updates_says_so(tmp_path):
    directory = tmp_path / "run"
    made_runs.make_run(directory, steps=6)
    rows = [{key: value for key, value in row.items()
             if not key.startswith(("update_share", "length_pull"))}
            for row in made_runs.metrics_rows(6, 0.2)]
    made_runs.write_rows(directory / "metrics.jsonl", rows)
    text, _ = page_of(directory)
    assert re.search(r"<h1>\d+\.\d % fewer tokens \[.*points.*on 60 held.out problems of tiny, "
                     "alpha 0.2</h1>", text)
    assert "metrics.jsonl holds no update_share" in text


def test_run_that_has_just_begun_has_a_page(tmp_path):
    made_runs.write_config(tmp_path)
    text, _ = page_of(tmp_path)
    assert "no step is in metrics.jsonl yet" in text and "reward.alpha" in text


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: path.mkdir(),
     r"made: must be the directory of a run or of a family, it holds neither config.yaml"),
    (lambda path: path.write_text("x"),
     r"made: must be the directory of a run or of a family, it is a file"),
    (lambda path: None, r"made: must be the directory of a run or of a family, it does not exist"),
    (lambda path: (made_runs.make_run(path, steps=2, problems=6),
                   (path / "summary.json").write_text("{")),
     r"summary\.json: cannot be read"),
    (lambda path: (made_runs.make_family(path, alphas=(0.1,), steps=2, problems=6),
                   (path / "family.json").write_text('{"points": [{}]}')),
     r"family\.json: [\w.]+ must be .*, got no"),
    (lambda path: (path.mkdir(), results.write(path / "family.json", results.Results(
        model="tiny", seed=0, steps=2, points=[], **made_runs.PROVENANCE))),
     r"made is a family that is not finished yet"),
])
def test_other_directories_are_one_clear_error(tmp_path, make, message):
    make(tmp_path / "made")
    with pytest.raises(UserError, match=message) as error:
        pages.write(tmp_path / "made")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A run and a family as they were before a test damaged a copy."""
    directory = tmp_path_factory.mktemp("originals")
    made_runs.make_run(directory / "run", steps=4, problems=9, sets=("tiny",))
    made_runs.make_family(directory / "family", alphas=(0.1, 0.4), steps=2, problems=9,
                          sets=("tiny",))
    return directory


def damaged(originals, tmp_path, name, change):
    """A copy of a run or a family in which `change` has been at work: on its directory."""
    shutil.copytree(originals / name, tmp_path / name)
    change(tmp_path / name)
    return tmp_path / name


def holds(name, text):
    return lambda directory: (directory / name).write_text(text)


def with_value(name, value, *keys):
    """Puts a value, or nothing, at a place of a JSON file."""
    def change(directory):
        place = table = json.loads((directory / name).read_text())
        for key in keys[:-1]:
            place = place[key]
        if value is MISSING:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value
        (directory / name).write_text(json.dumps(table))
    return change


def with_rows(name, **values):
    """Puts values into every row of a JSONL file."""
    def change(directory):
        rows = [json.loads(line) for line in (directory / name).read_text().splitlines()]
        made_runs.write_rows(directory / name,
                             [row if "facts" in row else row | values for row in rows])
    return change


TRAINED = ("points", 1, "sets", "tiny")


@pytest.mark.parametrize(("change", "message"), [
    (holds("config.yaml", "- a"), "config.yaml: must hold sections of settings, got list"),
    (holds("config.yaml", "5"), "config.yaml: must hold sections of settings, got int"),
    (holds("summary.json", "{}"), "summary.json: has no points; was it written by another version"),
    (holds("summary.json", "[]"), "summary.json: must hold an object"),
    (with_value("summary.json", [], *TRAINED[:-1]), "summary.json: .*sets must be an object, got"),
    (with_value("summary.json", 5, *TRAINED), "summary.json: points.1.sets.* must be an object"),
    (with_value("summary.json", {}, *TRAINED),
     "summary.json: .*summary must be an object, got no summary"),
    (with_value("summary.json", MISSING, "seed"),
     "summary.json: seed must be a whole number, got no seed"),
    (with_value("summary.json", "x", "points", 1, "alpha_start"),
     "summary.json: .*alpha_start must be a number or null, got \"x\""),
    (with_value("summary.json", 3, *TRAINED, "summary"), "json: .*summary must be an object"),
    (with_value("summary.json", "x", *TRAINED, "summary", "tokens"),
     "json: .*tokens must be a number"),
    (with_value("summary.json", float("nan"), *TRAINED, "summary", "accuracy"),
     "summary.json: cannot be read: NaN is not a number"),
    (with_value("summary.json", [1], *TRAINED, "summary", "accuracy_interval"),
     "summary.json: .*got"),
    (with_value("summary.json", [], *TRAINED, "summary", "budgets"),
     "summary.json: .*must not be empty"),
    (with_value("summary.json", {}, *TRAINED, "comparison", "by_difficulty"),
     "json: .*must not be empty"),
    (with_rows("metrics.jsonl", **{"rollout/tokens": "abc"}),
     "metrics.jsonl: rollout/tokens of step 0 must be a number, got 'abc'"),
    (with_rows("metrics.jsonl", **{"length_pull/length": [1]}),
     "metrics.jsonl: length_pull/length of step 0 must be a number"),
    (lambda run: ((run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()),
     "metrics.jsonl: cannot be read"),
    (with_rows("evaluations/step4/tiny.jsonl", tokens="x"), "step4/tiny.jsonl:2: tokens must be"),
    (holds("evaluations/step0/tiny.jsonl", '{"facts": {}}\n[1]\n'),
     "step0/tiny.jsonl:2: expected a JSON object"),
    (holds("environment.json", "[]"), "environment.json: must hold an object"),
])
def test_damaged_run_is_one_clear_error(tmp_path, originals, change, message):
    directory = damaged(originals, tmp_path, "run", change)
    with pytest.raises(UserError, match=message) as error:
        pages.write(directory)
    assert "\n" not in str(error.value) and not (directory / "report.html").exists()


@pytest.mark.parametrize(("change", "name", "words"), [
    (with_rows("rollouts.jsonl", reward="x"), "groups",
     "Left out: rollouts.jsonl holds no two complete answers"),
    (with_rows("rollouts.jsonl", tokens=None), "groups",
     "Left out: rollouts.jsonl holds no two complete answers"),
    (with_rows("rollouts.jsonl", advantage="x"), "groups", "reward 0."),
    (with_rows("rollouts.jsonl", tokens=0), "groups", "0 tokens"),
    (with_rows("evaluations/step4/tiny.jsonl", tokens=0), "prompts", "0 tokens"),
    (holds("evaluations/step4/tiny.jsonl", '{"facts": {}}\n'), "prompts", "before training"),
    (holds("config.yaml", ""), "settings", "Left out: no setting is in config.yaml"),
    (holds("config.yaml", "run: {steps: x, seed: [1]}\nreward: {alpha: x}\n"), "settings",
     "run.steps"),
])
def test_what_is_damaged_is_left_out_where_it_can_be(tmp_path, originals, change, name, words):
    text, _ = page_of(damaged(originals, tmp_path, "run", change))
    assert words in section(text, name)


@pytest.mark.parametrize(("change", "message"), [
    (with_value("family.json", [], "points"), "family is a family that is not finished yet"),
    (with_value("family.json", {}, "points"), "family.json: points must be a list, got"),
    (with_value("family.json", [1], "points"), "family.json: .*got 1"),
    (with_value("family.json", "x", "seed"), "family.json: seed must be a whole number, got \"x\""),
    (with_value("family.json", {}, "points", 0, "sets"),
     "family.json: .*one base, measured on every set"),
    (with_value("family.json", "member", "points", 0, "kind"), "family.json: .*must be one base"),
    (with_value("family.json", "other", "points", 1, "kind"),
     "family.json: .*kind must be one of base, member, between, baseline, blend, got \"other\""),
    (with_value("family.json", "x", "points", 1, "alpha"),
     "family.json: .*alpha must be a number or null"),
    (with_value("family.json", 5, "points", 1, "directory"),
     "family.json: .*directory must be a text, got 5"),
    (with_value("family.json", "x", *TRAINED, "comparison", "p_value"),
     "json: .*p_value must be a number"),
    (with_value("family.json", MISSING, *TRAINED, "summary"), "family.json: .*got no summary"),
])
def test_damaged_family_is_one_clear_error(tmp_path, originals, change, message):
    directory = damaged(originals, tmp_path, "family", change)
    with pytest.raises(UserError, match=message) as error:
        pages.write(directory)
    assert "\n" not in str(error.value)


def test_points_outside_a_family_are_not_read(tmp_path, originals):
    shutil.copytree(originals / "run", tmp_path / "elsewhere")
    for where in ("../elsewhere", str(tmp_path / "elsewhere")):
        change = with_value("family.json", where, "points", 1, "directory")
        found = reading.read(damaged(originals, tmp_path / where[0].replace("/", "x"), "family",
                                     change))
        assert "α = 0.1" not in found.responses and [run.name for run in found.runs][0] == "α 0.4"


def test_output_writes_the_page_alone_and_over_no_other_file(tmp_path, run, capsys):
    directory, *_ = run
    output = tmp_path / "page.html"
    report.run([str(directory), "--output", str(output)], "effreason report")
    assert capsys.readouterr().out == f"{output}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    # a page of ours may be written again
    assert pages.write(directory, output) == output
    output.write_text("<p>mine</p>")
    with pytest.raises(UserError, match="exists already and is not a report"):
        pages.write(directory, output)
    assert output.read_text() == "<p>mine</p>"
    with pytest.raises(UserError, match="is not a report"):
        pages.write(directory, tmp_path)


def test_page_of_a_directory_is_not_written_over_another_file(tmp_path):
    made_runs.make_run(tmp_path / "run", steps=2, problems=6)
    path = tmp_path / "run" / "report.html"
    path.write_text("<p>mine</p>")
    with pytest.raises(UserError,
                       match=r"run/report\.html exists already and is not a report") as error:
        pages.write(tmp_path / "run")
    assert "\n" not in str(error.value)
    assert path.read_text() == "<p>mine</p>" and not (tmp_path / "run" / "plots").exists()
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="is not a report"):
        pages.check(path)
    pages.check(tmp_path / "none.html")


def test_plots_are_written_as_png_and_svg(family):
    directory, _, text, _ = family
    names = {path.name for path in (directory / "plots").iterdir()}
    for stem in ("pareto", "pareto2", "budget", "difficulty", "lengths", "pressure", "pull",
                 "training-tokens"):
        assert {f"{stem}.png", f"{stem}.svg"} <= names, stem
    assert (directory / "plots" / "pareto.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_page_is_the_same_each_time(run):
    directory, _, text, _ = run
    assert page_of(directory)[0] == text


def test_commands_make_the_same_again(family, run):
    text, where = section(family[2], "settings"), family[0]
    assert (f"effreason train --config {where}/config.yaml --family 0,0.1,0.4 "
            "--baselines sft_shortest,dpo --blends 0.25,0.5,0.75 "
            f"--run.directory {where}-again") in text
    assert f"# effreason at commit {'a' * 40}" in text
    settings = section(run[2], "settings")
    assert (f"effreason train --config {run[0]}/config.yaml "
            f"--run.directory {run[0]}-again") in settings


def test_settings_that_differ_come_first(run):
    text = section(run[2], "settings").partition("All settings")[0]
    assert "reward.alpha" in text and "run.steps" in text and "rollout.group_size" not in text
    assert "rollout.group_size" in section(run[2], "settings")


@pytest.mark.parametrize("objective", ["policy_gradient", "dpo"])
def test_only_a_run_with_one_alpha_is_known_by_it(tmp_path, objective):
    made_runs.make_run(tmp_path / "run", steps=2, problems=9, objective=objective)
    text, page = page_of(tmp_path / "run")
    heading = re.search(r"<h1>(.*?)</h1>", text)[1]
    assert heading.endswith("alpha 0.2" if objective == "policy_gradient" else "of tiny")
    assert ("α 0.2" in page.text) == (objective == "policy_gradient")


def test_run_whose_alpha_moved_says_from_where_to_where(tmp_path):
    made_runs.make_run(tmp_path / "run", steps=4, problems=12)
    config, summary = tmp_path / "run" / "config.yaml", tmp_path / "run" / "summary.json"
    config.write_text(config.read_text().replace("target_tokens: null", "target_tokens: 0.5"))
    assert "target_tokens: 0.5" in config.read_text()
    table = json.loads(summary.read_text())
    table["points"][1] |= {"alpha": 0.4, "alpha_start": 0.2}
    summary.write_text(json.dumps(table))
    text, page = page_of(tmp_path / "run")
    assert re.search(r"<h1>(.*?)</h1>", text)[1].endswith("of tiny, alpha moved from 0.2 to 0.4")
    assert "α 0.4" in page.text and "α 0.2" not in page.text


def test_family_links_its_members_pages_where_they_are(tmp_path):
    made_runs.make_family(tmp_path / "family", alphas=(0.0, 0.2), steps=2, problems=9)
    (tmp_path / "family" / "alpha0.2" / "report.html").write_text("<p>")
    links = [attributes["href"] for tag,
             attributes in page_of(tmp_path / "family", None)[1].elements if tag == "a"]
    assert [link for link in links if not link.startswith("#")] == [
        "alpha0.2/report.html", "config.yaml", "family.json", "plots/"]
    assert "alpha0.2/report.html" not in page_of(tmp_path / "family")[0]        # may lie anywhere


def test_minus_signs_are_real_and_intervals_stay_on_one_line():
    assert pages._minus("-2.0 points [-3.5, -0.1], base-right -1") == (
        "−2.0 points [−3.5,\xa0−0.1], base-right −1")
    assert pages._minus("held-out") == "held\u2011out"


def test_published_figures_stand_beside_the_model_they_are_of(tmp_path):
    found = published.published_points("/models/DeepSeek-R1-Distill-Qwen-7B", "gsm8k")
    assert [each.tokens for each in found] == [1626, 813, 249]
    assert published.published_points("DeepSeek-R1-Distill-Qwen-1.5B",
                                      "gsm8k") == published.published_points("tiny",
                                                                             "math500") == []
    assert published.published_points("org/R1-Distill-Qwen-7B", "aime24")[2].accuracy == 0.533
    assert published.published_points("org/R1-Distill-Qwen-7B", "commonsense") == []
    made_runs.make_run(tmp_path / "run", model="x/R1-Distill-Qwen-7B", sets=("gsm8k",), steps=2,
                       problems=12)
    text, page = page_of(tmp_path / "run")
    assert published.SOURCE in page.text and "published α 0.1" in text


def test_alpha_is_drawn_only_where_it_moves(tmp_path, run):
    assert "training-alpha" not in run[2]
    made_runs.make_run(tmp_path / "run", steps=6, problems=12)
    rows = [row | {"reward/alpha": 0.1 + 0.02 * row["step"]} for row in made_runs.metrics_rows(6,
                                                                                               0.2)]
    made_runs.write_rows(tmp_path / "run" / "metrics.jsonl", rows)
    assert "training-alpha" in page_of(tmp_path / "run")[0]
