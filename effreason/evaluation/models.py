"""The models that an evaluation compares: opened and checked before anything is sampled.

Each is a Hugging Face directory, the id of a model on the Hub, a checkpoint of a run,
RUN/checkpoints/STEP, or a run with a dial at an alpha, RUN@ALPHA.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from effreason.data import sources, templates
from effreason.lm import model
from effreason.lm.hf import hub
from effreason.lm.hf.pretrained import (
    FACTS_FILE,
    Pretrained,
    load_weights,
    model_fingerprint,
    open_pretrained,
)
from effreason.rl import dial
from effreason.rl.checkpoints import Checkpoints
from effreason.rl.learner import Learner, check_model
from effreason.rl.update import TrainState
from effreason.runtime import config as configuration
from effreason.runtime import processes, sharding
from effreason.runtime.config import Config, MeshConfig
from effreason.runtime.errors import UserError
from effreason.runtime.files import read_json
from effreason.sampling import capacity


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model to evaluate, without its weights."""

    name: str                       # as the user named it
    pretrained: Pretrained          # of a checkpoint, the model that its run started from
    template: templates.Template
    facts: Mapping[str, Any] | None     # of its training, if effreason trained it
    fingerprint: str                # identifies the weights
    mesh: Mesh
    load: Callable[[], model.Params]


def open_models(config: Config, paths: Sequence[str]) -> dict[str, EvaluatedModel]:
    """Opens models, by path, and checks that they can be compared. Raises: UserError."""
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    with_revision = model_with_revision(config, paths)
    revisions = {path: config.model.revision if path == with_revision else None for path in paths}
    models = {path: open_model(config, path, revisions[path], mesh) for path in paths}

    check_same_template(list(models.values()), config)
    processes.check_same(
        {f"the model {path}": opened.fingerprint for path, opened in models.items()} | {
            f"the template of {path}": opened.template.sha256[:12]
            for path, opened in models.items()})
    return models


def open_model(config: Config, path: str, revision: str | None, mesh: Mesh) -> EvaluatedModel:
    """Opens a model and checks it. Raises: UserError."""
    if (checkpoint := find_checkpoint(path)) is not None:
        return _open_checkpoint(config, checkpoint, mesh, path)

    # Adapters that model.adapter names are for model.path, whatever is named in them.
    is_adapter = path == config.model.adapter
    pretrained = open_pretrained(
        config.model.path if is_adapter else path, dtype=config.model.dtype,
        revision=config.model.revision if is_adapter else revision, remat=config.model.remat,
        stop_ids=config.rollout.stop_ids, adapter=path if is_adapter else None,
        positions=capacity.max_positions(config))
    facts_file = pretrained.own_directory / FACTS_FILE
    shardings = sharding.tree_sharding(mesh, model.logical_axes(pretrained.decoder))
    return _checked(config, EvaluatedModel(
        name=path, pretrained=pretrained,
        template=templates.choose(pretrained.tokenizer, config.data),
        facts=read_json(facts_file) if facts_file.exists() else None,
        fingerprint=model_fingerprint(pretrained), mesh=mesh,
        load=lambda: load_weights(pretrained, shardings)))


def on_devices(run: Config, axes: MeshConfig, mesh: Mesh) -> Config:
    """Returns the configuration of a run with which its state is restored on other devices.

    Args: axes, of the mesh."""
    update = dataclasses.replace(run.update, rows_per_micro_batch=sharding.batch_shards(mesh),
                                 offload_optimizer=False)
    return dataclasses.replace(run, mesh=axes, update=update)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint of a run, without its weights."""

    run: Path
    step: int                       # updates made
    alpha: float | None             # of the run's dial; None = reward.alpha, or there is no dial


def find_checkpoint(name: str) -> Checkpoint | None:
    """Returns the checkpoint that a name means, see `dial.find_run`; None if it is another kind of
    model. Raises: UserError if the run has no such checkpoint."""
    if (found := dial.find_run(name)) is None:
        return None
    run, step, alpha = found
    if step is None:
        return checkpoint_of(run, alpha)
    return checkpoint_of(run, alpha, int(step) if step.isdecimal() else -1)


def checkpoint_of(run: Path, alpha: float | None, step: int | None = None) -> Checkpoint:
    """Returns a checkpoint of a run. Args: step, None = the newest.

    Raises: UserError if there is no such checkpoint."""
    with Checkpoints(run / "checkpoints", keep=None) as checkpoints:
        steps = checkpoints.steps
    if not steps:
        raise UserError(f"{run}: has no checkpoint")
    if step is not None and step not in steps:
        raise UserError(f"{run}: has no complete checkpoint of step {step}, those of the run are "
                        f"{', '.join(map(str, steps))}")
    return Checkpoint(run=run, step=steps[-1] if step is None else step, alpha=alpha)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedWeights:
    """The weights of a checkpoint, at any alpha of its run's dial. They are read when needed."""

    checkpoint: Checkpoint
    config: Config                  # of the run
    pretrained: Pretrained          # the model that the run started from
    facts: Mapping[str, Any]        # that the checkpoint was saved with

    @property
    def alpha(self) -> float:
        """The alpha that was asked for, or else the last one of the training."""
        alpha: float = self.facts["alpha"]
        return alpha if self.checkpoint.alpha is None else self.checkpoint.alpha

    def setting(self, alpha: float | None) -> float | None:
        """Returns the setting of the dial; None if there is none. Raises: UserError."""
        return dial.checked_setting(self.config.reward, alpha, str(self.checkpoint.run))

    def learner(self, mesh: Mesh, axes: MeshConfig) -> Learner:
        """Returns the learner that the state fits, on these devices. Args: axes, of the mesh."""
        return Learner(on_devices(self.config, axes, mesh), self.pretrained.decoder, mesh,
                       tries_kernels=False)

    def reader(self, mesh: Mesh, axes: MeshConfig) -> Callable[[float | None], model.Params]:
        """Returns a function that returns the weights of an alpha; the files are read once.

        Reading them takes the memory of the whole training state, keeping them that of the
        parameters."""
        learner = self.learner(mesh, axes)

        @functools.cache
        def read() -> tuple[TrainState, model.Params | None]:
            state, _ = self.restore(learner)
            state = dataclasses.replace(state, opt_state=())
            if learner.decoder.adapter is None:
                return state, None
            return state, learner.as_reference(
                load_weights(self.pretrained, learner.params_sharding, merged=False))

        return lambda alpha: learner.merged(learner.policy(*read(), self.setting(alpha)))

    def restore(self, learner: Learner) -> tuple[TrainState, dict[str, Any]]:
        """Reads the whole training state, and its facts. Raises: UserError if it is damaged."""
        with Checkpoints(self.checkpoint.run / "checkpoints", keep=None) as checkpoints:
            return checkpoints.restore(learner.abstract_state, self.checkpoint.step)


def open_trained(checkpoint: Checkpoint, *, dtype: str | None = None, remat: str = "full",
                 stop_ids: str | None = None) -> TrainedWeights:
    """Opens the weights of a checkpoint, whose run's configuration names the model it started from.

    Args: dtype and stop_ids, None = those of the run.
    Raises: UserError, also if the run has no such alpha."""
    run = configuration.load(checkpoint.run / "config.yaml")
    pretrained = open_pretrained(run.model.path, revision=run.model.revision,
                                 dtype=dtype or run.model.dtype, remat=remat,
                                 stop_ids=stop_ids or run.rollout.stop_ids,
                                 adapter=run.model.adapter, positions=capacity.max_positions(run))
    with Checkpoints(checkpoint.run / "checkpoints", keep=None) as checkpoints:
        facts = checkpoints.facts(checkpoint.step)

    trained = TrainedWeights(checkpoint=checkpoint, config=run, pretrained=pretrained, facts=facts)
    trained.setting(checkpoint.alpha)
    return trained


def _open_checkpoint(config: Config, checkpoint: Checkpoint, mesh: Mesh,
                     name: str) -> EvaluatedModel:
    """Opens a checkpoint to be evaluated. Args: name, as the user wrote it."""
    trained = open_trained(checkpoint, dtype=config.model.dtype, remat=config.model.remat,
                           stop_ids=config.rollout.stop_ids)
    pretrained, facts = trained.pretrained, trained.facts
    setting = trained.setting(checkpoint.alpha)
    at = "" if setting is None else f" at {setting:g}"
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    data = [source.name for source in sources.parse(trained.config.data.path, "data.path")]
    return _checked(config, EvaluatedModel(
        name=name, pretrained=pretrained, facts=dict(facts) | {"data": data}, mesh=mesh,
        load=lambda: trained.reader(mesh, config.mesh)(checkpoint.alpha),
        template=templates.choose(pretrained.tokenizer, config.data),
        fingerprint=(f"{model_fingerprint(pretrained)} step {checkpoint.step} {digest[:12]}{at}")))


def _checked(config: Config, opened: EvaluatedModel) -> EvaluatedModel:
    check_model(opened.pretrained, config, opened.mesh)
    check_template(opened, config)
    return opened


def model_with_revision(config: Config, models: Sequence[str]) -> str | None:
    """Returns the model `model.revision` applies to.

    It is `model.path` if that is evaluated, otherwise the only Hub model. Raises: UserError."""
    if config.model.revision is None or config.model.path in models:
        return config.model.path
    on_hub = [path for path in models if path != "tiny" and hub.existing_export(Path(path)) is None]
    if len(on_hub) != 1:
        raise UserError(
            f"model.revision is for one model on the Hub, got {config.model.revision} and "
            f"{len(on_hub)} of them in models; name it in model.path too")
    return on_hub[0]


def check_template(opened: EvaluatedModel, config: Config) -> None:
    """Raises UserError if a model was trained on other prompts than it would be evaluated on."""
    if config.evaluation.any_template or opened.facts is None:
        return
    trained, template = opened.facts.get("template"), opened.template
    if not isinstance(trained, dict):
        path = opened.pretrained.own_directory / FACTS_FILE
        raise UserError(f"{path}: has no table template; was it written by effreason?")
    if trained.get("sha256") != template.sha256:
        raise UserError(
            f"{opened.name}: was trained with the template {_described(trained)}, the evaluation "
            f"has {_described(template.facts())}; set data.template and data.user_prompt, "
            "data.system_prompt and data.template_arguments as in its training, or "
            "evaluation.any_template true")


def _described(template: Mapping[str, Any]) -> str:
    """Returns the facts of a template in words."""
    words = f"{template.get('name')}, user prompt {template.get('user_prompt')!r}"
    if template.get("system_prompt") is not None:
        words += f", system prompt {template['system_prompt']!r}"
    return words + (f", arguments {template['arguments']}" if template.get("arguments") else "")


def check_same_template(models: Sequence[EvaluatedModel], config: Config) -> None:
    """Raises UserError if models would be compared on different prompts."""
    first, *others = models
    for other in [] if config.evaluation.any_template else others:
        if other.template.sha256 != first.template.sha256:
            raise UserError(
                f"{first.name} and {other.name} have different chat templates, and would be "
                "compared on different prompts; name one with data.template, or set "
                "evaluation.any_template true")


def training_sets(config: Config, opened: EvaluatedModel) -> list[str]:
    """Returns the sets that a model was trained on: those it names itself, else data.path's."""
    names = None if opened.facts is None else opened.facts.get("data")
    if isinstance(names, list):
        return names
    return [source.name for source in sources.parse(config.data.path, "data.path")]
