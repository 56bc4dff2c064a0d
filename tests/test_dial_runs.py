"""Whole runs with adapters and a dial: what they leave, that they resume, and what can be made of
them afterwards."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import small_runs

from effreason import loop
from effreason.cli import main
from effreason.evaluation import responses
from effreason.lm.hf import peft
from effreason.lm.hf.config import read_config
from effreason.lm.hf.weights import read_weights
from effreason.rl import dial
from effreason.runs import dial_search
from effreason.runtime.files import read_json_lines

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cheap")]
DIAL = {"adapter.rank": 4, "reward.alphas": "0,0.2,0.4", "update.learning_rate": 1e-2,
        "log.groups_per_step": 4, "run.steps": 4, "checkpoint.every": 2}


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    loop.train(small_runs.config(world, directory, **DIAL))
    return directory


def weights(directory):
    return read_weights(directory, read_config(directory))


def test_each_step_has_groups_of_every_alpha(finished):
    rows = [row for row in read_json_lines(finished / "metrics.jsonl") if "reward/mean" in row]
    assert len(rows) == 4
    for row in rows:
        assert all(row[f"dial/tokens_at_{alpha}"] > 0 for alpha in ("0", "0.2", "0.4"))
        assert row["rollout/mismatch"] < 1e-4       # the sampler's weights are the trainer's
    points = json.loads((finished / "dial.json").read_text())["points"]
    assert [(point["alpha"], point["trained"]) for point in points] == [
        (0.0, True), (0.2, True), (pytest.approx(0.3), False), (0.4, True)]
    assert all(0 <= point["accuracy"] <= 1 and point["tokens"] > 0 for point in points)


def test_a_dial_that_is_always_at_0_is_one_model(world, tmp_path, monkeypatch):
    monkeypatch.setattr(dial, "setting", lambda alpha, largest: 0.0)
    loop.train(small_runs.config(world, tmp_path / "run", **DIAL | {"run.steps": 2}))
    points = json.loads((tmp_path / "run/dial.json").read_text())["points"]
    assert len(points) == 4
    assert len({(point["accuracy"], point["tokens"]) for point in points}) == 1
    rows = [responses.read(next((tmp_path / f"run/evaluations/step2/alpha{alpha}").glob(
        "*.jsonl")))[1] for alpha in ("0", "0.2", "0.3", "0.4")]
    assert rows[0] and all(other == rows[0] for other in rows)


def test_a_resumed_run_is_the_one_that_was_never_stopped(finished, world, tmp_path):
    config = small_runs.config(world, tmp_path / "run", **DIAL)
    loop.train(dataclasses.replace(config, run=dataclasses.replace(config.run, steps=2)))
    loop.train(dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True)))
    for name in ("model/model.safetensors", "rollouts.jsonl", "dial.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_response_is_replayed_with_the_weights_of_its_alpha(finished, capsys):
    rows = [row for row in read_json_lines(finished / "rollouts.jsonl") if row["step"] == 2]
    for row in rows[:1] + rows[-1:]:
        assert main.main(["replay", str(finished), "--step", "2", "--uid", str(row["uid"]),
                          "--sample", str(row["sample"]), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["as_logged"]


def test_settings_that_a_dial_cannot_have_are_refused(world, tmp_path, capsys):
    arguments = small_runs.arguments(world, tmp_path / "run", **DIAL)
    for changes, message in (
            (["--reward.alpha", "0.5"], "reward.alpha must be at most 0.4, the largest of"),
            (["--adapter.rank", "0"], "adapter.rank must be >= 1 with reward.alphas, got 0"),
            (["--family", "0,0.2"], "reward.alphas must be null for a family")):
        assert main.main(["train", *arguments, *changes]) == 2
        assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_any_alpha_can_be_exported_afterwards(finished, world, tmp_path, capsys):
    for alpha in ("0", "0.2", "0.31"):
        assert main.main(["export", str(finished), "--alpha", alpha, "--output",
                          str(tmp_path / alpha)]) == 0
    base, zero, middle, other = map(weights, (
        world / "base", tmp_path / "0", tmp_path / "0.2", tmp_path / "0.31"))
    # reward.alpha is 0.2: what the run itself exported.
    trained = weights(finished / "model")
    for name, leaf in middle["layers"].items():
        np.testing.assert_array_equal(leaf, trained["layers"][name])
    distances = [np.abs(np.asarray(one["layers"]["gate"]) - base["layers"]["gate"]).max()
                 for one in (zero, middle, other)]
    assert 0 < distances[0] and distances[1] != distances[2]
    np.testing.assert_array_equal(middle["embedding"], base["embedding"])
    facts = json.loads((tmp_path / "0.31/effreason.json").read_text())
    assert (facts["alpha"], facts["step"]) == (0.31, 4)

    assert main.main(["export", str(finished), "--alpha", "0.31", "--adapter", "--output",
                      str(tmp_path / "adapter")]) == 0
    config, read = peft.read_adapter(tmp_path / "adapter", read_config(world / "base"))
    added = read["layers"]["gate_lora_a"] @ read["layers"]["gate_lora_b"]
    np.testing.assert_allclose(base["layers"]["gate"] + added, other["layers"]["gate"],
                               rtol=1e-4, atol=1e-5)
    assert config.adapter.rank == 8

    capsys.readouterr()
    assert main.main(["export", str(finished), "--alpha", "0.5", "--output",
                      str(tmp_path / "beyond")]) == 2
    assert "for alphas from 0 to 0.4, got 0.5" in capsys.readouterr().err
    assert not (tmp_path / "beyond").exists()


def test_models_of_several_alphas_are_compared(finished, world, tmp_path, capsys):
    arguments = small_runs.arguments(world, tmp_path / "unused", **{"evaluation.problems": 4})
    arguments = [part for name, value in zip(arguments[::2], arguments[1::2], strict=True)
                 if not name.startswith("--run.") for part in (name, value)]
    assert main.main(["evaluate", *arguments, "--models", f"{finished}@0", f"{finished}@0.3",
                      "--output", str(tmp_path / "evaluated")]) == 0
    out = capsys.readouterr().out
    assert "@0.3" in out
    assert main.main(["evaluate", *arguments, "--models", f"{finished}@0.7",
                      "--output", str(tmp_path / "again")]) == 2


def test_a_run_generates_at_any_alpha_what_its_export_does(finished, tmp_path, capsys):
    assert main.main(["export", str(finished), "--alpha", "0.31", "--output",
                      str(tmp_path / "model")]) == 0
    card = (tmp_path / "model/README.md").read_text()
    assert "these are the ones at α = 0.31, which lies between" in card
    assert "Only the base model was evaluated" in card
    capsys.readouterr()
    lines = []
    for model in ([str(tmp_path / "model")], [f"{finished}@0.31"],
                  [str(finished), "--alpha", "0.31"], [f"{finished}/checkpoints/4@0.31"],
                  [f"{finished}@0"]):
        assert main.main(["generate", "--prompt", "3+4", "--max-new-tokens", "12", "--json",
                          "--model", *model]) == 0
        lines.append(json.loads(capsys.readouterr().out))
    for line in lines[1:4]:
        assert line["tokens"] == lines[0]["tokens"] and line["prompt_tokens"] > 0
        np.testing.assert_allclose(line["logprobs"], lines[0]["logprobs"], atol=1e-5)
    assert lines[4]["logprobs"] != lines[0]["logprobs"]


def test_the_dial_is_searched_without_sampling_twice(finished, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    evaluations = run / "evaluations/step4"
    stored, = (evaluations / "alpha0.4").iterdir()
    # reward.alpha: the run's own evaluation
    assert (evaluations / "alpha0.2" / stored.name).read_bytes() == (
        evaluations / stored.name).read_bytes()
    responses = stored.read_bytes().splitlines()[1:]
    times = {path: path.stat().st_mtime_ns for path in evaluations.glob("**/*.jsonl")
             if path != stored}
    stored.unlink()
    (run / "dial.json").unlink()

    search = ["dial", str(run), "--target-tokens", "0.01", "--max-accuracy-drop", "100"]
    assert main.main(search) == 2                       # no model has a hundredth of the tokens
    out, err = capsys.readouterr()
    assert re.search("^error: no alpha of .* has at most 1.0 % of the tokens of alpha 0 and at "
                     r"most 100 points less accuracy; the nearest is alpha 0\.\d+: \d.*% of the",
                     err, re.MULTILINE)
    assert all(len(line) <= 80 for line in out.splitlines()) and "* never trained on" in out
    # As the training itself had sampled them; the first line has the commit.
    assert stored.read_bytes().splitlines()[1:] == responses
    assert {path: path.stat().st_mtime_ns for path in times} == times
    points = json.loads((run / "dial.json").read_text())["points"]
    assert points == json.loads((finished / "dial.json").read_text())["points"]
    assert not list(run.glob("model-alpha*"))

    # With a target that all alphas reach, the search goes down to the smallest ones.
    search[3] = "0.999999"
    monkeypatch.setattr(dial_search.Target, "shortfalls", lambda self, comparison: (0.0, 0.0))
    assert main.main([*search, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["alpha"] < 0.2 and found["model"] == f"{run}/model-alpha{found['alpha']:g}"
    assert [point["alpha"] for point in found["points"]] == sorted(
        {0.0, 0.2, 0.3, 0.4, *(point["alpha"] for point in found["points"])})
    card = (run / f"model-alpha{found['alpha']:g}/README.md").read_text()
    assert "tokens saved" in card and f"α = {found['alpha']:g}" in card
    exported = (run / f"model-alpha{found['alpha']:g}/model.safetensors").stat().st_mtime_ns
    assert len(json.loads((run / "dial.json").read_text())["points"]) == len(found["points"])

    monkeypatch.setattr(dial_search.TrainedWeights, "reader", lambda *_: lambda alpha: 1 / 0)
    assert main.main([*search, "--json"]) == 0          # everything is there
    assert json.loads(capsys.readouterr().out) == found
    assert exported == (run / f"model-alpha{found['alpha']:g}/model.safetensors").stat().st_mtime_ns


def test_adapters_alone_train_as_well(world, tmp_path):
    loop.train(small_runs.config(world, tmp_path / "run", **DIAL | {
        "reward.alphas": None, "adapter.targets": "mlp", "evaluation.problems": 0}))
    base, trained = weights(world / "base"), weights(tmp_path / "run/model")
    moved = {name: float(np.abs(np.asarray(leaf) - base["layers"][name]).max())
             for name, leaf in trained["layers"].items()}
    assert {name for name, change in moved.items() if change > 0} == {"gate", "up", "down"}
