"""Whole runs with adapters: what they export, that they resume, and that others start from it."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import small_runs

from effreason import loop
from effreason.cli import family, main
from effreason.evaluation import responses
from effreason.lm.hf import peft
from effreason.lm.hf.pretrained import load_weights, open_pretrained
from effreason.runtime.files import read_json_lines

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cheap")]
ADAPTERS = {"adapter.rank": 4, "update.learning_rate": 1e-2, "run.steps": 4,
            "checkpoint.every": 2, "export.adapter": True}


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    loop.train(small_runs.config(world, directory, **ADAPTERS))
    return directory


@pytest.fixture(scope="module")
def merged(finished):
    """The same model with the adapters merged into its weights."""
    target = finished.parent / "merged"
    assert main.main(["export", str(finished), "--output", str(target)]) == 0
    return target


def weights(directory):
    return load_weights(open_pretrained(str(directory), dtype="float32"))


def evaluated(run, step):
    (path,) = (run / "evaluations" / f"step{step}").glob("*.jsonl*")
    return responses.read(path)[1]


def evaluate(world, *models, output, **changes):
    arguments = small_runs.arguments(world, output, **{"evaluation.problems": 8} | changes)
    arguments = [part for name, value in zip(arguments[::2], arguments[1::2], strict=True)
                 if not name.startswith("--run.") for part in (name, value)]
    return main.main(["evaluate", *arguments, "--models", *map(str, models), "--output",
                      str(output)])


def test_the_run_exports_its_adapters_alone(finished, merged, world):
    names = {path.name for path in (finished / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
            "effreason.json", "README.md"} <= names
    assert not names & {"config.json", "model.safetensors"}
    table = json.loads((finished / "model/adapter_config.json").read_text())
    assert table["base_model_name_or_path"] == str(world / "base")
    assert (table["r"], table["lora_alpha"]) == (4, 32.0)
    assert "library_name: peft" in (finished / "model/README.md").read_text()
    assert json.loads((finished / "model/effreason.json").read_text())["step"] == 4

    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6),
                 weights(finished / "model"), weights(merged))
    moved = weights(merged)["layers"]["gate"] - weights(world / "base")["layers"]["gate"]
    assert np.abs(moved).max() > 1e-3


def test_what_a_run_exports_may_change_when_it_is_resumed(finished, merged, world, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    config = small_runs.config(world, tmp_path / "run", **ADAPTERS | {
        "export.adapter": False, "run.steps": 5, "run.resume": True})
    loop.train(config)
    assert not (tmp_path / "run/model/adapter_config.json").exists()
    assert np.abs(weights(tmp_path / "run/model")["layers"]["gate"]
                  - weights(merged)["layers"]["gate"]).max() > 0


def test_a_resumed_run_is_the_one_that_was_never_stopped(finished, world, tmp_path):
    config = small_runs.config(world, tmp_path / "run", **ADAPTERS)
    loop.train(dataclasses.replace(config, run=dataclasses.replace(config.run, steps=2)))
    loop.train(dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True)))
    for name in ("model/adapter_model.safetensors", "rollouts.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


def test_adapters_a_checkpoint_and_the_merged_model_are_evaluated_alike(finished, merged, world,
                                                                        tmp_path, capsys):
    models = [finished / "model", merged, finished / "checkpoints/4"]
    assert evaluate(world, *models, output=tmp_path / "evaluated") == 0
    results = json.loads((tmp_path / "evaluated/results.json").read_text())["models"]
    expected = evaluated(finished, 4)
    tokens = sum(row.tokens for row in expected) / len(expected)
    for model in models:
        (result,) = results[str(model)].values()
        assert result["summary"]["tokens"] == pytest.approx(tokens), model

    capsys.readouterr()
    assert main.main(["generate", "--model", str(finished / "model"), "--prompt", "1+6",
                      "--max-new-tokens", "4", "--temperature", "0"]) == 0


@pytest.fixture(scope="module")
def continued(finished, world, tmp_path_factory):
    """A run that trains the adapters of the first one further."""
    directory = tmp_path_factory.mktemp("continued") / "run"
    loop.train(small_runs.config(world, directory, **ADAPTERS | {
        "model.adapter": str(finished / "model"), "kl.form": "loss", "adapter.rank": 6,
        "adapter.scale": 8.0, "run.seed": 1}))
    return directory


def test_a_run_goes_on_from_adapters(finished, continued, merged, world):
    first, *_, last = read_json_lines(continued / "metrics.jsonl")
    # The reference is what the run started from: no divergence before the first update.
    assert abs(first["update/kl"]) < 1e-6 < last["update/kl"]
    assert first["rollout/mismatch"] < 1e-4
    table = json.loads((continued / "model/adapter_config.json").read_text())
    assert table["base_model_name_or_path"] == str(world / "base") and table["r"] == 6
    facts = json.loads((continued / "model/effreason.json").read_text())
    assert (facts["base_model"], facts["base_adapter"]) == ("base", "model")

    # What was there before is in the new adapters, next to what was learnt.
    base, start, end = (weights(path)["layers"]["up"] for path in (
        world / "base", merged, continued / "model"))
    assert np.corrcoef((end - base).ravel(), (start - base).ravel())[0, 1] > 0.5
    assert np.abs(end - start).max() > 1e-3
    assert main.main(["replay", str(continued), "--step", "0", "--uid", str(
        next(iter(read_json_lines(continued / "rollouts.jsonl")))["uid"]), "--json"]) == 0


def test_a_run_from_adapters_begins_where_the_other_ended(finished, world, tmp_path):
    for name, changes in (("trained", {"adapter.rank": 4}),
                          ("merged", {"adapter.rank": 0, "export.adapter": False})):
        settings = ADAPTERS | changes | {"run.steps": 1}
        path = "model.path" if name == "merged" else "model.adapter"
        loop.train(small_runs.config(world, tmp_path / name, **settings | {
            path: str(finished / "model"), "update.learning_rate": 0.0}))
        rows, expected = evaluated(tmp_path / name, 0), evaluated(finished, 4)
        assert [row.response for row in rows] == [row.response for row in expected], name
    # Nothing was learnt: the adapters are those of the start.
    again, start = (peft.read_adapter(path / "model", open_pretrained(
        str(world / "base"), dtype="float32").decoder)[1]["layers"] for path in (
            tmp_path / "trained", finished))
    for name, leaf in start.items():
        np.testing.assert_allclose(again[name], leaf, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_resumed_run_from_adapters_is_the_one_that_was_never_stopped(continued, finished, world,
                                                                       tmp_path, capsys):
    config = small_runs.config(world, tmp_path / "run", **ADAPTERS | {
        "model.adapter": str(finished / "model"), "kl.form": "loss", "adapter.rank": 6,
        "adapter.scale": 8.0, "run.seed": 1})
    loop.train(dataclasses.replace(config, run=dataclasses.replace(config.run, steps=2)))
    resume = ["train", "--config", str(tmp_path / "run/config.yaml"), "--run.resume", "true",
              "--run.steps", "4"]
    assert main.main(resume) == 0
    for name in ("model/adapter_model.safetensors", "rollouts.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (continued / name).read_bytes(), name


def test_other_adapters_than_a_run_began_with_are_one_line(finished, world, tmp_path, capsys):
    shutil.copytree(finished / "model", tmp_path / "start")
    settings = ADAPTERS | {"model.adapter": str(tmp_path / "start"), "run.steps": 2}
    loop.train(small_runs.config(world, tmp_path / "run", **settings))
    table = json.loads((tmp_path / "start/adapter_config.json").read_text())
    (tmp_path / "start/adapter_config.json").write_text(json.dumps(table | {"lora_alpha": 1.0}))
    assert main.main(["train", "--config", str(tmp_path / "run/config.yaml"), "--run.resume",
                      "true", "--run.steps", "4"]) == 2
    assert "have changed since the run began with them" in capsys.readouterr().err


def test_a_dial_starts_from_adapters(finished, world, tmp_path):
    loop.train(small_runs.config(world, tmp_path / "run", **ADAPTERS | {
        "model.adapter": str(finished / "model"), "reward.alphas": "0,0.4", "run.steps": 1,
        "evaluation.problems": 0}))
    (row,) = read_json_lines(tmp_path / "run/metrics.jsonl")
    assert abs(row["reward/kl"]) < 1e-5 and row["rollout/mismatch"] < 1e-4
    table = json.loads((tmp_path / "run/model/adapter_config.json").read_text())
    assert table["r"] == 8


def test_a_family_trains_adapters(world, tmp_path):
    config = small_runs.config(world, tmp_path / "family", **ADAPTERS | {"run.steps": 2})
    family.train(config, [0.0, 0.2], [], [0.5])
    points = json.loads((tmp_path / "family/family.json").read_text())["points"]
    assert [point["kind"] for point in points] == ["base", "member", "member", "blend"]
    assert (tmp_path / "family/alpha0.2/model/adapter_model.safetensors").is_file()
