"""Families: members that are the runs they would be alone, one evaluation of the base, baselines,
blends, going on."""

import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import small_runs

from effreason import loop
from effreason.cli import family as families
from effreason.cli import main
from effreason.lm.hf.config import read_config
from effreason.lm.hf.weights import read_weights
from effreason.runs import directory as run_directory
from effreason.runtime.errors import Interrupted, UserError
from effreason.runtime.progress import Progress
from effreason.sampling import engine

pytestmark = pytest.mark.usefixtures("cheap")
ALPHAS, BASELINES, WEIGHTS = [0.0, 0.3], ["sft_shortest", "dpo"], [0.5]
CHANGES = {"run.steps": 3, "kl.form": "reward", "kl.coefficient": 0.01}
NAMES = ["base", "α = 0", "α = 0.3", "SFT, shortest", "DPO", "blend 0.5"]


@pytest.fixture(scope="module")
def family(world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("family") / "family"
    families.train(small_runs.config(world, directory, **CHANGES), ALPHAS, BASELINES, WEIGHTS)
    return directory


def table(family):
    return json.loads((family / "family.json").read_text())


def test_the_directory_holds_a_run_for_each_member_and_the_family_itself(family):
    names = {path.name for path in family.iterdir()}
    assert {"config.yaml", "environment.json", "family.json", "report.html", "base", "alpha0",
            "alpha0.3", "sft_shortest", "dpo", "blend0.5-alpha0.3-step3"} <= names
    for name in ("alpha0", "alpha0.3", "sft_shortest", "dpo"):
        assert ((family / name / "model" / "model.safetensors").exists()
                and (family / name / "summary.json").exists())


def test_family_json_compares_every_point_with_the_base(family, world):
    family_table = table(family)
    assert [point["name"] for point in family_table["points"]] == NAMES
    assert [point["kind"] for point in family_table["points"]] == [
        "base", *["member"] * 2, *["baseline"] * 2, "blend"]
    ((name, base),) = family_table["points"][0]["sets"].items()
    assert base["comparison"] is None and base["summary"]["problems"] == 8
    for point in family_table["points"][1:]:
        measured = point["sets"][name]
        assert measured["comparison"]["token_ratio"] == pytest.approx(
            measured["summary"]["tokens"] / base["summary"]["tokens"])
        assert (family / point["directory"]).is_dir()


def test_a_member_is_the_run_it_would_be_alone(family, world, tmp_path):
    loop.train(small_runs.config(world, tmp_path / "run", **CHANGES, **{"reward.alpha": 0.3}))
    for name in ("model/model.safetensors", "rollouts.jsonl"):
        member, alone = family / "alpha0.3" / name, tmp_path / "run" / name
        assert member.read_bytes() == alone.read_bytes(), name
    summaries = [json.loads((path / "summary.json").read_text())
                 for path in (family / "alpha0.3", tmp_path / "run")]
    for summary in summaries:
        assert summary["points"][1].pop("seconds") > 0
    assert summaries[0] == summaries[1]


def test_baselines_learn_from_the_same_number_of_responses_of_the_model_before_training(family):
    rows = {name: [json.loads(line)
                   for line in (family / name / "rollouts.jsonl").read_text().splitlines()]
            for name in ("alpha0.3", "sft_shortest", "dpo")}
    assert [(row["uid"], row["response"]) for row in rows["dpo"]] == [
        (row["uid"], row["response"]) for row in rows["sft_shortest"]]
    first = {name: [row["response"] for row in member_rows if row["step"] == 0]
             for name, member_rows in rows.items()}
    assert first["dpo"] == first["alpha0.3"]            # no step has been taken: the same model
    assert len(rows["dpo"]) == len(rows["alpha0.3"])
    weights = [read_weights(family / name / "model", read_config(family / name / "model"))
               for name in ("alpha0.3", "sft_shortest", "dpo")]
    for one, other in ((0, 1), (1, 2)):
        assert any((a != b).any() for a, b in zip(
            *(jax.tree.leaves(weights[place]) for place in (one, other)), strict=True))


def test_sft_makes_the_shortest_correct_responses_more_likely(family):
    rows = [json.loads(line)
            for line in (family / "sft_shortest" / "rollouts.jsonl").read_text().splitlines()]
    chosen = [row for row in rows if row["advantage"] == 1]
    assert chosen and all(row["correct"] for row in chosen)
    for row in chosen:
        group = [other for other in rows
                 if (other["step"], other["uid"]) == (row["step"], row["uid"])]
        assert row["tokens"] == min(other["tokens"] for other in group if other["correct"])


def test_a_finished_family_is_not_sampled_again_and_may_grow(
    family, world, tmp_path, monkeypatch, capsys):
    # a copy: other tests read the original
    family = Path(shutil.copytree(family, tmp_path / "family"))
    before = table(family)
    calls = []
    generation = engine.Generation
    monkeypatch.setattr(engine, "Generation", lambda *given, **named: calls.append(1)
                        or generation(*given, **named))
    config = small_runs.config(world, family, **CHANGES, **{"run.resume": True})
    families.train(config, ALPHAS, BASELINES, WEIGHTS)
    assert not calls and table(family)["points"] == before["points"]
    assert "α = 0.3" in capsys.readouterr().out
    families.train(config, [*ALPHAS, 0.1], BASELINES, [])
    assert calls and [point["alpha"] for point in table(family)["points"]
                      if point["kind"] == "member"] == [0.0, 0.3, 0.1]


def test_what_a_finished_member_lacks_is_made_at_the_resume(family, world, tmp_path):
    directory = Path(shutil.copytree(family, tmp_path / "family"))
    (directory / "alpha0" / "report.html").unlink()
    shutil.rmtree(directory / "alpha0.3" / "model")
    config = small_runs.config(world, directory, **CHANGES, **{"run.resume": True})
    families.train(config, ALPHAS, [], [])
    assert (directory / "alpha0" / "report.html").exists()
    for name in ("alpha0", "alpha0.3"):
        weights = [path / name / "model" / "model.safetensors" for path in (family, directory)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_family_killed_before_its_configuration_is_written_begins_again(world, tmp_path):
    (tmp_path / "family.json").write_text("{")
    config = small_runs.config(world, tmp_path, **CHANGES)
    with run_directory.opened(config, family=True) as directory:
        assert directory == tmp_path
    with pytest.raises(UserError, match="holds a run already"), run_directory.opened(config):
        pass


@pytest.mark.slow
def test_a_family_that_is_stopped_goes_on_and_ends_the_same(family, world, tmp_path):
    directory, step, sent = tmp_path / "family", Progress.step, []

    def stopping(self, index, metrics):
        step(self, index, metrics)
        if index == 1 and len(sent) == 1:               # the second step of the second member
            signal.raise_signal(signal.SIGTERM)
        sent.extend([index] if index == 2 else [])

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as caught:
        patch.setattr(Progress, "step", stopping)
        families.train(small_runs.config(world, directory, **CHANGES), ALPHAS, BASELINES, WEIGHTS)
    assert caught.value.message == (
        "stopped by SIGTERM after step 2 of 3, saved; continue with: effreason train --config "
        f"{directory / 'config.yaml'} --run.resume true --family 0,0.3 "
        "--baselines sft_shortest,dpo --blends 0.5")
    assert table(directory)["points"] == []
    command = caught.value.message.partition("effreason ")[2].split()
    assert main.main(command) == 0
    for name in ("alpha0", "alpha0.3", "dpo"):
        models = [path / name / "model" for path in (family, directory)]
        jax.tree.map(np.testing.assert_array_equal,
                     *(read_weights(model, read_config(model)) for model in models))


@pytest.mark.slow
def test_a_family_that_is_stopped_in_a_baseline_goes_on_and_ends_the_same(family, world, tmp_path):
    directory, step, members = tmp_path / "family", Progress.step, []

    def stopping(self, index, metrics):
        step(self, index, metrics)
        members.extend([index] if index == 0 else [])
        if index == 1 and len(members) == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Progress, "step", stopping)
        families.train(small_runs.config(world, directory, **CHANGES), [0.3], ["dpo"], [])
    assert members == [0]                               # in the first one
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        members.append(-1)
        patch.setattr(Progress, "step", lambda self, index, metrics: (
            step(self, index, metrics), "dpo/pairs" in metrics and index == 1
            and signal.raise_signal(signal.SIGTERM)))
        families.train(small_runs.config(world, directory, **CHANGES, **{"run.resume": True}),
                       [0.3], ["dpo"], [])
    families.train(
        small_runs.config(world, directory, **CHANGES, **{"run.resume": True}), [0.3], ["dpo"], [])
    models = [path / "dpo" / "model" for path in (family, directory)]
    jax.tree.map(np.testing.assert_array_equal,
                 *(read_weights(model, read_config(model)) for model in models))
    for name in ("dpo", "alpha0.3"):
        assert ((directory / name / "rollouts.jsonl").read_bytes()
                == (family / name / "rollouts.jsonl").read_bytes())


@pytest.mark.slow
def test_a_family_trained_on_is_the_family_that_was_trained_as_long_at_once(
    family, world, tmp_path):
    directory = tmp_path / "family"
    shorter = CHANGES | {"run.steps": 1}
    families.train(small_runs.config(world, directory, **shorter), [0.3], [], WEIGHTS)
    resumed = small_runs.config(world, directory, **CHANGES, **{"run.resume": True})
    # As if it had been killed within the last evaluation of the longer run.
    (directory / "alpha0.3" / "evaluations" / "step3").mkdir()
    families.train(resumed, [0.3], [], WEIGHTS)
    resumed = {point["name"]: point["sets"] for point in table(directory)["points"]}
    expected = {point["name"]: point["sets"] for point in table(family)["points"]}
    for name in ("base", "α = 0.3", "blend 0.5"):
        assert resumed[name] == expected[name], name
    expected = r"^run\.steps must be at least the 3 steps that .*alpha0\.3 has done, got 1"
    with pytest.raises(UserError, match=expected):
        families.train(small_runs.config(world, directory, **shorter, **{"run.resume": True}),
                       [0.3], [], WEIGHTS)


def test_a_family_is_no_run_and_a_run_no_family(family, world):
    resumed = small_runs.config(world, family, **CHANGES, **{"run.resume": True})
    before = (family / "family.json").read_bytes()
    with pytest.raises(UserError, match="holds a family, which is resumed with its --family$"):
        loop.train(resumed)
    with pytest.raises(UserError, match="holds a run, which is resumed without --family$"):
        families.train(small_runs.config(world, family / "alpha0.3", **CHANGES, **{
            "run.resume": True, "reward.alpha": 0.3}), ALPHAS, BASELINES, WEIGHTS)
    assert (family / "family.json").read_bytes() == before and not (family / "checkpoints").exists()


@pytest.mark.parametrize(("argv", "error"), [
    (["--family", "0,1"],
     "--family must be numbers in [0, 1) with commas between them, got '1' in '0,1'"),
    (["--family", "0,x"],
     "--family must be numbers in [0, 1) with commas between them, got 'x' in '0,x'"),
    (["--family", "0.1,0.1"], "--family must name each number once, in six digits, got '0.1,0.1'"),
    (["--family", "none"], "--family must name at least one alpha, got none"),
    (["--family", "0", "--baselines", "ppo"],
     "--baselines must name each of sft_shortest, dpo at most once"),
    (["--family", "0", "--blends", "2"],
     "--blends must be numbers in [0, 1] with commas between them, got '2' in '2'"),
    (["--family", "0.1,0.1000000001"], "--family must name each number once, in six digits"),
    (["--baselines", "dpo"], "--baselines is for a family: name its alphas with --family"),
    (["--blends", "0.5"], "--blends is for a family: name its alphas with --family"),
    (["--family", "0", "--evaluation.problems", "0"],
     "evaluation.problems must be >= 1 to compare the members"),
])
def test_what_is_no_family_is_one_line(world, tmp_path, capsys, argv, error):
    assert main.main(["train", *small_runs.arguments(world, tmp_path / "run"), *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {error}") and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("changes", "error"), [
    ({"update.objective": "dpo", "kl.form": "none"},
     "update.objective must be policy_gradient for a family"),
    ({"reward.target_tokens": 0.5, "evaluation.every": 2},
     "reward.target_tokens and reward.max_accuracy_drop must be"),
    ({"reward.form": "kimi"}, "reward.form must be one with an alpha for a family, got kimi"),
])
def test_a_family_that_alpha_does_not_tell_apart_is_refused(world, tmp_path, changes, error):
    with pytest.raises(UserError) as caught:
        families.check(small_runs.config(world, tmp_path, **changes))
    assert str(caught.value).startswith(error)
