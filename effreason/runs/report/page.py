"""Writes the report of a run or a family of runs: one HTML page, and its plots as PNG and SVG.

The page needs no network and runs no script: its slider is a row of radio buttons. Text from models
and users is always escaped.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from effreason import __version__
from effreason.runs.report import examples, figures, reading, sections
from effreason.runs.report.comparison_charts import BASE, BASELINE, MEMBER
from effreason.runs.report.examples import Example
from effreason.runs.report.reading import Contents, Run, label
from effreason.runtime.config import Config
from effreason.runtime.config_fields import meanings, written
from effreason.runtime.errors import UserError
from effreason.runtime.files import disk, replacing
from effreason.runtime.invocation import program

MARK = '<meta name="generator" content="effreason report">'     # only such a page is overwritten
PAGE = "report.html"
# Of a run or a family, with links on its page.
FILES = ("model/README.md", "config.yaml", "metrics.jsonl", "rollouts.jsonl", "left_out.jsonl",
         "summary.json", "family.json", "plots/", "evaluations/")
TEMPLATES = Path(__file__).parent / "templates"
# Control characters are shown as their pictures; a lone surrogate is not a character.
CONTROL_PICTURES: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}, 0x7F: 0x2421,
    ord("\r"): "\n", **dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}")}


def write(directory: Path, output: Path | None = None) -> Path:
    """Writes the page, and without `output` the plots into directory/plots.

    Args: directory, of a run or a family; output, the page's file, None = directory/report.html.
    Returns: the page's path.
    Raises: UserError for another directory, or if another file has the page's name."""
    path = output or directory / PAGE
    check(path)
    content = _content(reading.read(directory), own_page=output is None)
    text = _environment().get_template("page.html").render(content)

    if output is None:
        with disk(directory / "plots"):
            (directory / "plots").mkdir(exist_ok=True)
        for charts in content["charts"].values():
            for chart in charts:
                figures.save(chart.wide or chart.figure, directory / "plots" / chart.name)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def check(path: Path) -> None:
    """Raises UserError if a page may not be written there: only a report is overwritten."""
    if not path.exists():
        return
    if path.is_file():
        with disk(path), path.open("rb") as file:
            if MARK.encode() in file.read(2000):
                return
    raise UserError(f"{path} exists already and is not a report, nothing is overwritten; move it, "
                    "or name another file with --output")


def _content(contents: Contents, *, own_page: bool) -> dict[str, Any]:
    """Returns everything that the template shows. Args: own_page, it is in the directory itself."""
    best = sections.best_member(contents)
    name = label(best[0]) if best else ""
    run = next((run for run in contents.runs if run.name == name), next(iter(contents.runs), None))

    return {
        "mark": MARK,
        "version": __version__,
        "style": (TEMPLATES / "page.css").read_text(encoding="utf-8"),
        "title": contents.title,
        "family": contents.family,
        "headline": sections.headline(contents),
        "member_pages": _member_pages(contents) if own_page else [],
        # The plots are written after the page's content is made.
        "files": [name for name in FILES if own_page and (
            name == "plots/" or (contents.directory / name).exists())],
        "charts": {
            "tradeoffs": sections.tradeoffs(contents),
            "comparisons": sections.comparisons(contents),
            "trainings": sections.trainings(contents),
            "meters": sections.meters(run) if run else [],
        },
        "models": [(name, sections.models_table(contents, name)) for name in contents.sets
                   if contents.measured(name)],
        "difficulties": sections.difficulty_table(contents, best[0], best[2]) if best else None,
        "generalisation": sections.generalisation(contents),
        "examples": _examples(contents),
        "stops": sections.stops(contents),
        "run": run.name if run else "",
        "steps": run.steps if run else 0,
        "planned_steps": run.planned_steps if run else 0,
        "groups": examples.choose_groups(run.directory / "rollouts.jsonl") if run else [],
        "settings": list(_settings(run)) if run else [],
        "environment": list(_flat(contents.environment)),
        "commands": _commands(contents),
    }


def _member_pages(contents: Contents) -> list[tuple[str, str]]:
    """Returns name and relative address of the pages of a family's runs."""
    pages = [(run.name, run.directory / PAGE) for run in contents.runs if run.name]
    return [(name, quote(path.relative_to(contents.directory).as_posix()))
            for name, path in pages if path.exists()]


def _examples(contents: Contents) -> list[Example]:
    """Returns the same problems answered by several models.

    For one training these are its start, middle and end, with a dial the base and every alpha of
    it, else the base and two members."""
    columns: list[tuple[str, Path | None]]
    if contents.dial:
        dial = [point for point, _ in sections.dial_points(contents)]
        columns = [("before training", contents.responses.get(contents.points[0].name)),
                   *((label(point), contents.responses.get(point.name)) for point in dial)]
    elif len(contents.runs) == 1:
        directories = contents.runs[0].evaluations
        steps = list(directories)
        middle = sorted(steps[1:-1], key=lambda step: abs(2 * step - steps[-1]))[:1]
        columns = [(f"after {step:,} steps" if step else "before training", directories[step])
                   for step in (*steps[:1], *middle, *steps[1:][-1:])]
    else:
        base = [point for point in contents.points if point.kind == BASE]
        members = [point for point in contents.points if point.kind == MEMBER and point.alpha]
        members.sort(key=lambda point: point.alpha or 0.0)
        columns = [(label(point), contents.responses.get(point.name))
                   for point in (*base, *members[:1], *members[1:][-1:])]

    answered = [(name, rows) for name, directory in columns
                if (rows := sections.graded_responses(contents, directory))]
    return examples.choose_examples(answered) if len(answered) > 1 else []


def _settings(run: Run) -> Iterator[tuple[str, str, str, bool]]:
    """Yields field, value, meaning and whether the value is changed; changed ones first."""
    different, texts = set(reading.not_default(run.settings)), meanings(Config)
    for changed in (True, False):
        for field, value in run.settings.items():
            if (field in different) == changed and field != "run.directory":
                yield field, written(value), texts.get(field, ""), changed


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), "–" if value is None else str(value)


def _commands(contents: Contents) -> list[str]:
    """Returns the commands that repeat the training from this directory's configuration.

    They can be run in the directory in which the page was written."""
    commit = contents.environment.get("git_commit")
    config = shlex.quote(str(contents.directory / "config.yaml"))
    again = shlex.quote(f"{contents.directory}-again")
    options = ""
    if contents.family:
        points = contents.points
        values = {
            "family": [f"{point.alpha:g}" for point in points if point.kind == MEMBER],
            "baselines": [str(run.settings.get("update.objective")) for run in contents.runs
                          if run.kind == BASELINE],
            "blends": [f"{point.weight:g}" for point in points if point.weight is not None]}
        options = "".join(f" --{name} {','.join(texts) or 'none'}"
                          for name, texts in values.items())

    train = f"{program('train')} --config {config}{options} --run.directory {again}"
    return [*([f"# effreason at commit {commit}"] if commit else []), train,
            f"{program('report')} {again}"]


def _environment() -> jinja2.Environment:
    """Returns the templates' environment, which escapes all but our own <svg> and style."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_printable)
    environment.filters |= {
        "svg": lambda figure, name: _printable(figures.inline(figure, name)), "minus": _minus,
        "signed": lambda value: f"{value:+.3f}".replace("-", "−")}
    return environment


def _printable(value: Any) -> Any:
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return value.translate(CONTROL_PICTURES)
    return value


def _minus(text: str) -> str:
    """Gives numbers a true minus sign, and keeps intervals and "held-out" on one line.

    Args: text, written by this package."""
    text = re.sub(r"(\[[^],]*,) ", "\\1\N{NO-BREAK SPACE}", text)
    text = text.replace("held-out", "held\N{NON-BREAKING HYPHEN}out")
    return re.sub(r"(^|[\s[])-", r"\1−", text)
