"""Makes the runs of a test file cheap: equal runs share their compiled functions, pictures are
blank."""

import contextlib
import dataclasses

import pytest
from matplotlib.figure import Figure

from effreason.cli import family
from effreason.rl import learner
from effreason.rl.learner import Learner
from effreason.runs import session
from effreason.runtime.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GradeConfig,
    LogConfig,
    RunConfig,
)

BLANK_SVG = '<svg viewBox="0 0 1 1" xmlns="http://www.w3.org/2000/svg"></svg>'
draw = Figure.savefig
built = {}


def share(build, config, *arguments, key):
    """Returns what an earlier run built that compiles the same functions, or builds it."""
    # What these functions do not depend on; alpha is one of their arguments.
    compiled = dataclasses.replace(
        config, run=RunConfig(), log=LogConfig(), checkpoint=CheckpointConfig(),
        grade=GradeConfig(), data=DataConfig(max_prompt_tokens=config.data.max_prompt_tokens),
        model=dataclasses.replace(config.model, path="tiny"),
        reward=dataclasses.replace(config.reward, alpha=0.0, target_tokens=None,
                                   max_accuracy_drop=None),
        evaluation=EvaluationConfig(problems=0,
                                    max_new_tokens=config.evaluation.max_new_tokens))
    key = build, repr(compiled), *key
    if key not in built:
        built[key] = build(config, *arguments)
    return built[key]


def share_engine(config, pretrained, mesh, longest_prompt=None):
    return share(learner.make_engine, config, pretrained, mesh, longest_prompt,
                 key=(pretrained.decoder, pretrained.eos_ids, mesh, longest_prompt))


def share_learner(config, decoder, mesh, longest_prompt=None):
    return share(Learner, config, decoder, mesh, longest_prompt,
                 key=(decoder, mesh, longest_prompt))


def draw_blank(figure, target, **options):
    """Stands in for Figure.savefig, which takes a third of the time of a short run."""
    if options.get("format") == "svg":
        target.write(BLANK_SVG)
    else:
        target.write_bytes(b"")


@contextlib.contextmanager
def cheap_runs():
    """Shares engines and leaves pictures blank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "make_engine", share_engine)
        patch.setattr(family, "Learner", share_learner)
        patch.setattr(Figure, "savefig", draw_blank)
        yield
    built.clear()


@contextlib.contextmanager
def real_pictures():
    """Draws the pictures, within `cheap_runs`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", draw)
        yield
