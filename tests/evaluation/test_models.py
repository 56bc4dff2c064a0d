"""What may be compared: models of one kind of prompt, each with what it was trained on."""

import dataclasses

import pytest

from effreason.data.templates import Template
from effreason.evaluation import models
from effreason.evaluation.models import EvaluatedModel
from effreason.rl import dial
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError

ANYWAY = dataclasses.replace(Config(),
                             evaluation=dataclasses.replace(Config().evaluation, any_template=True))


def opened(name="model", text="a", facts=None):
    return EvaluatedModel(name=name, pretrained=None,
                          template=Template("the checkpoint's own", text, "{problem}"), facts=facts,
                          fingerprint=name, load=lambda: None, mesh=None)


def test_what_a_model_was_trained_on():
    # it does not say: those of data.path
    assert models.training_sets(Config(), opened()) == ["tiny"]
    assert models.training_sets(Config(), opened(facts={"data": ["gsm8k", "math"]})) == [
        "gsm8k", "math"]


@pytest.mark.parametrize(("path", "paths", "expected"),
                         [("org/base", ["org/base", "run/model/of/mine"], "org/base"),
                          ("tiny", ["org/other", "tiny"], "tiny"),
                          ("org/base", ["org/other"], "org/other"),
                          ("org/base", ["org/other", "a/b/c"], None)])
def test_a_revision_belongs_to_one_model(path, paths, expected):
    config = dataclasses.replace(Config(),
                                 model=dataclasses.replace(Config().model, path=path,
                                                           revision="abc"))
    if expected is None:
        pattern = r"^model\.revision is for one model on the Hub, got abc and 2 of them"
        with pytest.raises(UserError, match=pattern):
            models.model_with_revision(config, paths)
    else:
        assert models.model_with_revision(config, paths) == expected


def test_models_are_not_compared_on_different_prompts():
    alike = [opened("base"), opened("trained")]
    models.check_same_template(alike, Config())
    with pytest.raises(UserError, match="^base and other have different chat templates"):
        models.check_same_template([*alike, opened("other", "b")], Config())
    models.check_same_template([*alike, opened("other", "b")], ANYWAY)


def test_a_model_is_evaluated_on_the_prompts_of_its_training():
    models.check_template(opened(), Config())  # trained by nobody here: any will do
    facts = {"template": opened().template.facts()}
    models.check_template(opened(facts=facts), Config())
    pattern = r"was trained with the template .* set data.template and data.user_prompt"
    with pytest.raises(UserError, match=pattern):
        models.check_template(opened(text="b", facts=facts), Config())
    models.check_template(opened(text="b", facts=facts), ANYWAY)


def test_a_directory_is_a_checkpoint_only_next_to_its_run(tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    assert dial.find_run(str(tmp_path / "checkpoints" / "3")) is None
    (tmp_path / "config.yaml").write_text("")
    assert dial.find_run(str(tmp_path / "checkpoints" / "3")) == (tmp_path, "3", None)
    assert dial.find_run(str(tmp_path / "checkpoints" / "4")) is None
    assert dial.find_run(str(tmp_path)) is None
    assert dial.find_run(f"{tmp_path}@0.2") == (tmp_path, None, 0.2)
