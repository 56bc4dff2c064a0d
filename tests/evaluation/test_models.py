"""What may be compared: models of one kind of prompt, each with what it was trained on."""

import dataclasses

import pytest

from effreason.data.templates import Template
from effreason.evaluation import models as candidates
from effreason.evaluation.models import EvaluatedModel
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError

ANYWAY = dataclasses.replace(Config(), evaluation=dataclasses.replace(Config().evaluation, any_template=True))


def candidate(name="model", text="a", facts=None):
    return EvaluatedModel(name=name, pretrained=None, template=Template("the checkpoint's own", text, "{problem}"),
                     facts=facts, fingerprint=name, load=lambda: None)


def test_what_a_model_was_trained_on():
    assert candidates.trained_on(Config(), candidate()) == ["tiny"]             # it does not say: those of data.path
    assert candidates.trained_on(Config(), candidate(facts={"data": ["gsm8k", "math"]})) == ["gsm8k", "math"]


@pytest.mark.parametrize(("path", "models", "found"), [
    ("org/base", ["org/base", "run/model/of/mine"], "org/base"), ("tiny", ["org/other", "tiny"], "tiny"),
    ("org/base", ["org/other"], "org/other"), ("org/base", ["org/other", "a/b/c"], None)])
def test_a_revision_belongs_to_one_model(path, models, found):
    config = dataclasses.replace(Config(), model=dataclasses.replace(Config().model, path=path, revision="abc"))
    if found is None:
        with pytest.raises(UserError, match=r"^model\.revision is for one model on the Hub, got abc and 2 of them"):
            candidates.revised(config, models)
    else:
        assert candidates.revised(config, models) == found


def test_models_are_not_compared_on_different_prompts():
    alike = [candidate("base"), candidate("trained")]
    candidates.check_alike(alike, Config())
    with pytest.raises(UserError, match="^base and other have different chat templates"):
        candidates.check_alike([*alike, candidate("other", "b")], Config())
    candidates.check_alike([*alike, candidate("other", "b")], ANYWAY)


def test_a_model_is_evaluated_on_the_prompts_of_its_training():
    candidates.check_template(candidate(), Config())                            # trained by nobody here: any will do
    facts = {"template": candidate().template.facts()}
    candidates.check_template(candidate(facts=facts), Config())
    with pytest.raises(UserError, match=r"was trained with the template .* set data.template and data.user_prompt"):
        candidates.check_template(candidate(text="b", facts=facts), Config())
    candidates.check_template(candidate(text="b", facts=facts), ANYWAY)


def test_a_directory_is_a_checkpoint_only_beside_its_run(tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    assert not candidates.is_checkpoint(tmp_path / "checkpoints" / "3")
    (tmp_path / "config.yaml").write_text("")
    assert candidates.is_checkpoint(tmp_path / "checkpoints" / "3")
    assert not candidates.is_checkpoint(tmp_path / "checkpoints" / "4") and not candidates.is_checkpoint(tmp_path)
