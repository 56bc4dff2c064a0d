"""Searches a run's dial for the smallest alpha that saves enough tokens and keeps the accuracy.

Tokens fall with alpha, so a few evaluations between those that exist are enough. All alphas are
sampled with the same keys, and compared problem by problem. Nothing is sampled twice.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from effreason.data import loading, templates
from effreason.evaluation import statistics, wording
from effreason.evaluation.evaluate import Evaluator, Reporter, make_grader, sized_for_evaluation
from effreason.evaluation.models import (
    TrainedWeights,
    checkpoint_of,
    on_devices,
    open_trained,
)
from effreason.evaluation.statistics import Comparison
from effreason.grading.grader import Grader
from effreason.lm import model
from effreason.lm.hf.pretrained import FACTS_FILE
from effreason.rl.learner import check_model
from effreason.rl.rollouts import unmatched
from effreason.runs import dial_points, results
from effreason.runs.claim import claimed
from effreason.runs.dial_points import DialPoint
from effreason.runs.export import export_trained
from effreason.runs.report import page
from effreason.runtime import sharding
from effreason.runtime.config import MeshConfig
from effreason.runtime.errors import Interrupted, UserError
from effreason.runtime.files import read_json
from effreason.runtime.signals import Interrupts
from effreason.sampling import capacity

RESOLUTION = 1 / 32                 # of the square root of alpha, as a share of the largest one's
Compared = Mapping[float, Comparison]   # with alpha 0, by alpha


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What an alpha must reach, against alpha 0 on the same problems."""

    tokens: float                   # at most this share of the tokens
    accuracy_drop: float            # at most this many points less
    confident: bool = False         # the ends of the 95 % intervals decide, not the means

    def shortfalls(self, comparison: Comparison) -> tuple[float, float]:
        """Returns how much is missing, as shares: of tokens and of accuracy; 0 = reached."""
        ratio, change = comparison.token_ratio, comparison.accuracy_change
        if self.confident:
            ratio = comparison.token_ratio_interval[1]
            change = comparison.accuracy_change_interval[0]
        # Shares of right responses differ by fractions: a point exactly must not be more than one.
        missing = max(-change - self.accuracy_drop / 100, 0.0)
        return max(ratio - self.tokens, 0.0), 0.0 if missing < 1e-9 else missing

    def words(self) -> str:
        """Says what is wanted."""
        return (f"at most {wording.percent(self.tokens)} of the tokens of alpha 0 and at most "
                f"{self.accuracy_drop:g} points less accuracy")


def reached(compared: Compared, target: Target) -> float | None:
    """Returns the smallest alpha that reaches the target; None if none does."""
    return min((alpha for alpha, comparison in compared.items()
                if not any(target.shortfalls(comparison))), default=None)


def nearest(compared: Compared, target: Target) -> float:
    """Returns the alpha that misses the target by least."""
    return min(compared, key=lambda alpha: (sum(target.shortfalls(compared[alpha])), alpha))


def next_alpha(compared: Compared, target: Target, largest: float) -> float | None:
    """Returns the alpha to evaluate next, None if the search has ended.

    It is between the smallest alpha that reaches the target, or else only its tokens, and the one
    before it: in the middle of their square roots, in two digits."""
    high = reached(compared, target)
    if high is None:
        high = min((alpha for alpha, comparison in compared.items()
                    if not target.shortfalls(comparison)[0]), default=None)
    if high is None:
        return None if largest in compared else largest

    low = max((alpha for alpha in compared if alpha < high), default=0.0)
    middle = float(f"{((math.sqrt(low) + math.sqrt(high)) / 2) ** 2:.2g}")
    wide = math.sqrt(high) - math.sqrt(low) > RESOLUTION * math.sqrt(largest)
    return middle if wide and low < middle < high else None


def search(run: Path, target: Target, output: Path | None, console: Console) -> dict[str, Any]:
    """Searches, prints a table, writes dial.json, and writes the model that was found.

    Args: run, a directory; output, of the model, None = RUN/model-alphaA.
    Returns: what was found, for JSON; alpha and model are None if no alpha reaches the target.
    Raises: UserError; Interrupted, after which the same command continues."""
    sharding.use_compilation_cache()
    trained = open_trained(checkpoint_of(run, None))
    mesh = sharding.make_mesh(data=-1)      # this machine's devices, whatever the run had
    read = trained.reader(mesh, MeshConfig())

    with (claimed(run, resume=True), jax.set_mesh(mesh), Interrupts(with_output=True) as interrupts,
          make_grader(trained.config) as grader):
        evaluator = _evaluator(trained, grader, mesh)
        measure = functools.partial(_measure, trained, evaluator, read,
                                    Reporter(console, interrupts))
        try:
            points, compared = _search(trained, target, measure)
        except Interrupted as stop:
            raise Interrupted(stop.signum, f"{stop.message}; the same command continues") from None

        dial_points.write_points(run, list(points.values()))
        if (run / page.PAGE).exists():
            page.write(run)
        alpha = reached(compared, target)
        name = next(iter(evaluator.sets))
        console.print(_table(name, points, compared, target), highlight=False, markup=False)
        found: dict[str, Any] = {
            "set": name, "step": trained.checkpoint.step, "target": dataclasses.asdict(target),
            "alpha": alpha, "nearest": nearest(compared, target), "model": None,
            "points": [_row(point, compared.get(point.alpha)) for point in points.values()]}
        if alpha is not None:
            chosen = dataclasses.replace(trained, checkpoint=dataclasses.replace(
                trained.checkpoint, alpha=alpha))
            found["model"] = str(_export(chosen, read, output))
    return found


def _evaluator(trained: TrainedWeights, grader: Grader, mesh: jax.sharding.Mesh) -> Evaluator:
    """Returns what evaluates as the run itself does, on these devices. Raises: UserError."""
    pretrained = trained.pretrained
    config = on_devices(sized_for_evaluation(trained.config), MeshConfig(), mesh)
    check_model(pretrained, config, mesh)
    template = templates.choose(pretrained.tokenizer, config.data)
    sets, _ = loading.load_held_out(config, pretrained.tokenizer, template,
                                    functools.partial(unmatched, grader))
    # Besides the copy that is sampled from, the frozen weights stay.
    sampler = capacity.make_configured_sampler(config, pretrained.decoder, mesh,
                                               2 * capacity.EVALUATION_WEIGHT_BYTES)
    return Evaluator(config=config, pretrained=pretrained, template=template, sets=sets,
                     sampler=sampler, grader=grader, seed=config.run.seed)


def _measure(trained: TrainedWeights, evaluator: Evaluator,
             read: Callable[[float | None], model.Params], reporter: Reporter,
             alpha: float) -> DialPoint:
    """Evaluates an alpha on the first set, or reads what is there."""
    checkpoint, config = trained.checkpoint, trained.config
    directory = dial_points.directory_of(
        results.evaluations(checkpoint.run, checkpoint.step), alpha)
    with reporter.watching(f"alpha {alpha:g}") as on_chunk:
        measured = evaluator.measure(next(iter(evaluator.sets)), lambda: read(alpha), on_chunk,
                                     weights=f"step {checkpoint.step}", directory=directory)
    return DialPoint(alpha=alpha, trained=alpha in config.reward.dial, directory=directory,
                     outcomes=measured.outcomes)


def _search(trained: TrainedWeights, target: Target, measure: Callable[[float], DialPoint],
            ) -> tuple[dict[float, DialPoint], dict[float, Comparison]]:
    """Returns all points of the dial, and those after alpha 0 compared with it, by alpha."""
    checkpoint, config = trained.checkpoint, trained.config
    stored = dial_points.read_points(results.evaluations(checkpoint.run, checkpoint.step), config)
    base = measure(0.0)
    points = {0.0: base}
    compared: dict[float, Comparison] = {}

    def add(alpha: float) -> None:
        points[alpha] = measure(alpha)
        compared[alpha] = statistics.compare(base.outcomes, points[alpha].outcomes)

    # Also what is there is asked for: it must have been made as it would be today.
    for alpha in sorted({one.alpha for one in stored} - {0.0}):
        add(alpha)
    while (wanted := next_alpha(compared, target, config.reward.dial[-1])) is not None:
        add(wanted)
    return dict(sorted(points.items())), compared


def _row(point: DialPoint, comparison: Comparison | None) -> dict[str, Any]:
    """Describes a point for JSON."""
    summary = statistics.summarize(point.outcomes)
    row: dict[str, Any] = {"alpha": point.alpha, "trained": point.trained}
    row |= {name: getattr(summary, name) for name in (
        "accuracy", "accuracy_interval", "tokens", "tokens_interval")}
    return row if comparison is None else row | {name: getattr(comparison, name) for name in (
        "token_ratio", "token_ratio_interval", "accuracy_change", "accuracy_change_interval")}


def _table(name: str, points: Mapping[float, DialPoint], compared: Compared,
           target: Target) -> Table:
    """Builds the table of all points, within 80 columns."""
    base = points[0.0].outcomes.correct
    samples = "" if base.shape[1] == 1 else f" x {base.shape[1]} responses"
    untrained = any(not point.trained for point in points.values())
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False,
                  title=Text(f"{name}: {base.shape[0]:,} problems{samples}; against alpha 0, with "
                             "95 % intervals", style="bold"), title_justify="left",
                  caption="* never trained on" if untrained else None, caption_justify="left")
    for heading in ("alpha", "accuracy", "tokens", "tokens x", "change, points", "reached"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "alpha" else "right")

    for alpha, point in points.items():
        cells = [f"{alpha:g}{'' if point.trained else ' *'}",
                 wording.percent(float(point.outcomes.correct.mean())),
                 wording.tokens(float(point.outcomes.lengths.mean()))]
        if (comparison := compared.get(alpha)) is not None:
            ratio = wording.interval(comparison.token_ratio_interval, wording.ratio)
            cells += [f"{wording.ratio(comparison.token_ratio)} {ratio}",
                      wording.change(comparison),
                      "" if any(target.shortfalls(comparison)) else "yes"]
        table.add_row(*cells)
    return table


def words(found: Mapping[str, Any], alpha: float) -> str:
    """Says what an alpha does against alpha 0: tokens and accuracy, with their intervals."""
    row = next(row for row in found["points"] if row["alpha"] == alpha)
    tokens = wording.interval(row["token_ratio_interval"], wording.share)
    accuracy = wording.interval(row["accuracy_change_interval"], wording.points)
    return (f"{wording.percent(row['token_ratio'])} of the tokens {tokens}, accuracy "
            f"{wording.points(row['accuracy_change'])} points {accuracy}")


def caution(found: Mapping[str, Any]) -> str:
    """Says what the intervals of the alpha that was found do not exclude, in a line; "" = nothing.
    """
    row = next(row for row in found["points"] if row["alpha"] == found["alpha"])
    target, open_questions = found["target"], []
    if row["token_ratio_interval"][1] > target["tokens"]:
        open_questions.append("more tokens")
    if -100 * row["accuracy_change_interval"][0] > target["accuracy_drop"]:
        open_questions.append("a larger drop")
    return (f"the 95 % intervals do not exclude {' or '.join(open_questions)} than wanted; "
            "--confident asks for that\n" if open_questions else "")


def _export(trained: TrainedWeights, read: Callable[[float | None], model.Params],
            output: Path | None) -> Path:
    """Writes the model, unless an earlier search has. Raises: UserError."""
    step, alpha = trained.checkpoint.step, trained.alpha
    target = output or trained.checkpoint.run / f"model-alpha{alpha:g}"
    if output is None and target.exists():
        facts = read_json(target / FACTS_FILE)
        if (facts.get("step"), facts.get("alpha")) != (step, alpha):
            raise UserError(f"{target} exists already and is another model, nothing is "
                            "overwritten; name another directory with --output")
        return target
    export_trained(trained, read, target)
    return target
