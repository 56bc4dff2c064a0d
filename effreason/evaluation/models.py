"""The models that an evaluation compares: opened and checked before anything is sampled.

Each is a Hugging Face directory, an id on its Hub, or a checkpoint of a run, RUN/checkpoints/STEP.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from effreason.data import sources, templates
from effreason.lm import model
from effreason.lm.hf import hub
from effreason.lm.hf.config import read_json
from effreason.lm.hf.pretrained import (
    FACTS_FILE,
    Pretrained,
    load_weights,
    model_fingerprint,
    open_pretrained,
)
from effreason.rl.checkpoints import Checkpoints
from effreason.rl.learner import check_model, make_learner
from effreason.runtime import config as configuration
from effreason.runtime import sharding
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model to evaluate, but its weights, and the prompts it will read."""

    name: str                       # as the user named it
    pretrained: Pretrained       # of a checkpoint, the model that its run started from
    template: templates.Template
    facts: Mapping[str, Any] | None     # what it was trained from, where effreason has trained it
    fingerprint: str                # other weights have another one
    load: Callable[[], model.Params]


def open_model(config: Config, path: str, revision: str | None, mesh: Mesh) -> EvaluatedModel:
    """Opens a model and checks it. Raises: UserError."""
    if is_checkpoint(Path(path)):
        return _of_checkpoint(config, Path(path), mesh)
    pretrained = open_pretrained(path, revision=revision, dtype=config.model.dtype, remat=config.model.remat)
    facts_file = pretrained.directory / FACTS_FILE
    return _checked(config, mesh, EvaluatedModel(
        name=pretrained.name, pretrained=pretrained, template=templates.choose(pretrained.tokenizer, config.data),
        facts=read_json(facts_file) if facts_file.exists() else None, fingerprint=model_fingerprint(pretrained),
        load=lambda: load_weights(pretrained, sharding.tree_sharding(mesh, model.logical_axes(pretrained.decoder)))))


def is_checkpoint(path: Path) -> bool:
    """Whether a path has the form of a run's checkpoint, and a run is there."""
    return path.is_dir() and path.parent.name == "checkpoints" and (path.parents[1] / "config.yaml").is_file()


def _of_checkpoint(config: Config, path: Path, mesh: Mesh) -> EvaluatedModel:
    """A checkpoint of a run, whose configuration says which model it began with. Its whole state is read at first."""
    run = configuration.load(path.parents[1] / "config.yaml")
    pretrained = open_pretrained(run.model.path, revision=run.model.revision, dtype=config.model.dtype,
                                    remat=config.model.remat)
    with Checkpoints(path.parent, keep=None) as saved:
        if not path.name.isdecimal() or int(path.name) not in saved.steps:
            raise UserError(f"{path}: is no whole checkpoint; those of the run are {saved.steps}")
        facts = saved.facts(int(path.name))
    # The problems and weights of the run, on the devices of this evaluation.
    here = dataclasses.replace(run, mesh=config.mesh, update=dataclasses.replace(
        run.update, rows_per_micro_batch=sharding.batch_shards(mesh), offload_optimizer=False))

    def load() -> model.Params:
        state = make_learner(here, pretrained.decoder, mesh).abstract_state
        with Checkpoints(path.parent, keep=None) as saved:
            params: model.Params = saved.restore(state, int(path.name))[0].params
        return params

    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return _checked(config, mesh, EvaluatedModel(
        name=str(path), pretrained=pretrained, template=templates.choose(pretrained.tokenizer, config.data),
        facts=facts | {"data": [spec.name for spec in sources.parse(run.data.path, "data.path")]},
        fingerprint=f"{model_fingerprint(pretrained)} step {path.name} {digest[:12]}", load=load))


def _checked(config: Config, mesh: Mesh, candidate: EvaluatedModel) -> EvaluatedModel:
    check_model(candidate.pretrained, config, mesh)
    check_template(candidate, config)
    return candidate


def revised(config: Config, models: Sequence[str]) -> str | None:
    """The model that model.revision is of: model.path where it is among the models, else the one on the Hub.

    Raises: UserError where that leaves a choice."""
    if config.model.revision is None or config.model.path in models:
        return config.model.path
    on_hub = [path for path in models if path != "tiny" and hub.standing(Path(path)) is None]
    if len(on_hub) != 1:
        raise UserError(f"model.revision is for one model on the Hub, got {config.model.revision} and {len(on_hub)} "
                        "of them in models; name it in model.path too")
    return on_hub[0]


def check_template(candidate: EvaluatedModel, config: Config) -> None:
    """Raises UserError where a model was trained on other prompts than it would be evaluated on."""
    if config.evaluation.any_template or candidate.facts is None:
        return
    trained, template = candidate.facts.get("template"), candidate.template
    if not isinstance(trained, dict):
        raise UserError(f"{candidate.pretrained.directory / FACTS_FILE}: has no table template; is it what "
                        "effreason wrote?")
    if trained.get("sha256") != template.sha256:
        raise UserError(
            f"{candidate.name}: was trained with the template {trained.get('name')} and the user prompt "
            f"{trained.get('user_prompt')!r}, the evaluation has {template.name} and {template.user_prompt!r}; set "
            "data.template and data.user_prompt as in its training, or evaluation.any_template true")


def check_alike(candidates: Sequence[EvaluatedModel], config: Config) -> None:
    """Raises UserError where models would be compared on different prompts."""
    first, *others = candidates
    for other in [] if config.evaluation.any_template else others:
        if other.template.sha256 != first.template.sha256:
            raise UserError(f"{first.name} and {other.name} have different chat templates, and would be compared on "
                            "different prompts; name one with data.template, or set evaluation.any_template true")


def trained_on(config: Config, candidate: EvaluatedModel) -> list[str]:
    """The names of the sets that a model was trained on: what it says itself, else those of data.path."""
    names = None if candidate.facts is None else candidate.facts.get("data")
    return names if isinstance(names, list) else [spec.name for spec in sources.parse(config.data.path, "data.path")]
