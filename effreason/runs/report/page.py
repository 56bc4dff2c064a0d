"""The report of a run or a family of runs: one HTML page, and its plots as PNG and SVG.

The page needs no network and runs no script. What models and users wrote stands in it as text, whatever it holds.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from effreason import __version__
from effreason.runs.report import examples, figures, results, sections
from effreason.runs.report.examples import Prompt
from effreason.runs.report.results import BASE, BASELINE, MEMBER, Findings, Run
from effreason.runs.report.sections import Chart
from effreason.runtime.config import Config
from effreason.runtime.config_fields import meanings, written
from effreason.runtime.errors import UserError
from effreason.runtime.files import disk

MARK = '<meta name="generator" content="effreason report">'     # of a page that may be written over
PAGE = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
COLUMNS = 3                         # models or times that answer a prompt side by side
# A control character is shown as the picture of itself; a lone surrogate is no character.
HARMLESS: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}, 0x7F: 0x2421, ord("\r"): "\n",
    **dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}")}


def write(directory: Path, output: Path | None = None) -> Path:
    """Writes the page, and without output the plots into directory/plots.

    Args: directory, of a run or a family; output, the page's file, None = report.html in the directory.
    Returns: the page's path. Raises: UserError for another directory, or a file in the page's place that is none."""
    path = output or directory / PAGE
    check(path)
    found = results.read(directory)
    content = _content(found) | {"members": _members(found) if output is None else []}
    text = _environment().get_template("page.html").render(content)
    if output is None:
        with disk(directory / "plots"):
            (directory / "plots").mkdir(exist_ok=True)
        for chart in _charts(content):
            figures.save(chart.wide or chart.figure, directory / "plots" / chart.name)
    partial = path.with_name(path.name + ".partial")
    try:
        with disk(path):
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def check(path: Path) -> None:
    """That a page may be written there: only a page of ours is written over. Raises: UserError."""
    if not path.exists():
        return
    if path.is_file():
        with disk(path), path.open("rb") as file:
            if MARK.encode() in file.read(2000):
                return
    raise UserError(f"{path} exists already and is no report, nothing is overwritten; move it, or name another file "
                    "with --output")


def _content(found: Findings) -> dict[str, Any]:
    """Everything that the template shows."""
    best = sections.chosen(found)
    chosen = next((each for each in found.runs if best is None or each.name == best[0].label or not found.family),
                  found.runs[0] if found.runs else None)
    charts = {"tradeoffs": sections.tradeoffs(found), "comparisons": sections.comparisons(found),
              "trainings": sections.trainings(found), "meters": sections.meters(chosen) if chosen else []}
    return {
        "mark": MARK, "style": (TEMPLATES / "page.css").read_text(encoding="utf-8"),
        "title": found.title, "family": found.family, "version": __version__, "charts": charts,
        "headline": sections.headline(found),
        "points": [(name, sections.points(found, name)) for name in found.sets if found.on(name)],
        "difficulties": sections.difficulties(found, best) if best else None,
        "generalisation": sections.generalisation(found), "sets": found.sets,
        "prompts": _prompts(found), "chosen": chosen.name if chosen and found.family else "",
        "groups": examples.groups(chosen.directory / "rollouts.jsonl") if chosen else [],
        "settings": list(_settings(chosen)) if chosen else [], "environment": list(_flat(found.environment)),
        "commands": _commands(found), "steps": chosen.steps if chosen else 0,
        "missing": ("measured by an earlier version, without intervals: evaluate again"
                    if chosen and chosen.summary and not found.points else "not evaluated after training yet"),
        "wanted": chosen.wanted if chosen else 0,
    }


def _members(found: Findings) -> list[tuple[str, str]]:
    """The pages of a family's runs, which lie below its own: name and relative address."""
    pages = [(run.name, run.directory / PAGE) for run in found.runs if found.family]
    return [(name, quote(path.relative_to(found.directory).as_posix())) for name, path in pages if path.exists()]


def _charts(content: Mapping[str, Any]) -> Iterator[Chart]:
    return (chart for group in content["charts"].values() for chart in group)


def _prompts(found: Findings) -> list[Prompt]:
    """The same prompts by a run at its start, middle and end, or by the base and two members of a family."""
    columns: list[tuple[str, Path | None]]
    if found.family:
        members = sorted((point for point in found.points if point.kind == MEMBER and point.alpha),
                         key=lambda point: point.alpha or 0.0)
        ends = members if len(members) < COLUMNS else [members[0], members[-1]]
        columns = [(point.label, point.responses)
                   for point in (*(point for point in found.points if point.kind == BASE), *ends)]
    else:
        evaluations = found.runs[0].evaluations
        steps = list(evaluations)
        middle = min(steps[1:-1], key=lambda step: abs(2 * step - steps[-1]), default=None) if len(steps) > 2 else None
        wanted = dict.fromkeys([steps[0], *([] if middle is None else [middle]), steps[-1]] if len(steps) > 1 else [])
        columns = [("before training" if step == 0 else f"after {step:,} steps", evaluations[step]) for step in wanted]
    rows = [(label, sections.graded_rows(found, directory)) for label, directory in columns]
    rows = [(label, each) for label, each in rows if each]
    return examples.prompts(rows) if len(rows) > 1 else []


def _settings(run: Run) -> Iterator[tuple[str, str, str, bool]]:
    """Field, value, meaning, and whether it is not the default; those first."""
    differing, means = dict(results.differing(run.settings)), meanings(Config)
    for changed in (True, False):
        for field, value in run.settings.items():
            if (field in differing) == changed and field != "run.directory":
                yield field, written(value), means.get(field, ""), changed


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), "–" if value is None else str(value)


def _commands(found: Findings) -> list[str]:
    """What makes the same again, from this directory's own configuration."""
    title = shlex.quote(found.title)
    commit = found.environment.get("git_commit")
    chosen = ""
    lines = [f"git checkout {shlex.quote(str(commit).removesuffix('+dirty'))}"] if commit else []
    if found.family:
        alphas = [f"{point.alpha:g}" for point in found.points if point.kind == MEMBER]
        baselines = [str(run.settings.get("update.objective")) for run in found.runs if run.kind == BASELINE]
        blends = [f"{point.weight:g}" for point in found.points if point.weight is not None]
        chosen = "".join(f" --{name} {','.join(values) or 'none'}" for name, values in (
            ("family", alphas), ("baselines", baselines), ("blends", blends)))
    return [*lines, f"python train.py --config {title}/config.yaml{chosen} --run.directory {title}-again",
            f"effreason report {title}-again"]


def _environment() -> jinja2.Environment:
    """Escapes everything but our own <svg> elements and style."""
    made = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_harmless)
    made.filters |= {"svg": lambda figure, name: _harmless(figures.inline(figure, name)), "minus": _minus,
                     "signed": lambda value: f"{value:+.3f}".replace("-", "−")}
    return made


def _harmless(value: Any) -> Any:
    return value.translate(HARMLESS) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _minus(text: str) -> str:
    """Numbers with a real minus sign, intervals and "held-out" on one line. Args: text, of our own making."""
    text = re.sub(r"(\[[^],]*,) ", "\\1\N{NO-BREAK SPACE}", text).replace("held-out", "held\N{NON-BREAKING HYPHEN}out")
    return re.sub(r"(^|[\s[])-", r"\1−", text)
