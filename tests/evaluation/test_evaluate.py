"""Evaluation: responses are kept, resumed and never mixed up, set by set; whole commands."""

import csv
import dataclasses
import functools
import json
import signal
from collections import Counter

import numpy as np
import pytest
import small_runs

from effreason.cli import main
from effreason.data import loading, prompts
from effreason.data.templates import Template
from effreason.evaluation import evaluate as evaluation
from effreason.evaluation import models, responses
from effreason.evaluation.evaluate import Evaluator
from effreason.lm import model
from effreason.lm.hf.pretrained import Pretrained
from effreason.runtime import processes, sharding
from effreason.runtime.config import Config, GradeConfig
from effreason.runtime.errors import Interrupted, UserError
from effreason.sampling import capacity

# 8 problems x 2 = 16 responses
FEW_SLOTS = {"evaluation.samples": 2, "rollout.slots": 4, "rollout.chunk": 4}


def test_a_grader_that_differs_between_hosts_is_told_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("def grade(response, answer): return True\n")
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(Config(), grade=GradeConfig(function="own:grade", workers=1))
    with evaluation.make_grader(config) as grader:
        assert len(grader.function_source) == 12

    monkeypatch.setattr(processes, "all_gather", lambda name, make: [
        make(), dict.fromkeys(make(), "another")])
    with pytest.raises(UserError, match=r"^the source of grade\.function own:grade: process 1 has "
                       r"another, process 0 has \w{12}; all must have the same$"):
        evaluation.make_grader(config)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, problems to train on, and two sets to evaluate on."""
    directory = small_runs.write_world(tmp_path_factory.mktemp("world"), 8, 8, first=100)
    small_runs.write_problems(directory / "other.jsonl", 4, first=300)
    return directory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """All that an evaluator is made of, and the requests that its sampler was given."""

    config: Config
    pretrained: Pretrained
    template: Template
    sets: dict
    sampler: object
    params: model.Params
    grader: object
    asked: list

    def evaluate(self, watch=lambda now: None, *, seed=None, config=None, sets=None, template=None,
                 **settings):
        changes = {"config": config, "sets": sets, "template": template}
        changes = {name: value for name, value in changes.items() if value}
        seed = (config or self.config).run.seed if seed is None else seed
        evaluator = self.evaluator(seed=seed, **changes)
        return evaluator.measure_all(lambda: self.params, watch, **{"weights": "base"} | settings)

    def evaluator(self, **changes):
        return Evaluator(**{"config": self.config, "pretrained": self.pretrained,
                            "template": self.template, "sampler": self.counting, "sets": self.sets,
                            "grader": self.grader, "seed": 0} | changes)

    def counting(self, params, requests, key, sampling):
        self.asked.append([(request.uid, request.sample, request.prefix) for request in requests])
        return self.sampler(params, requests, key, sampling)


@pytest.fixture(scope="module")
def opened(world):
    config = small_runs.config(world, world / "unused", **FEW_SLOTS | {
        "evaluation.path": f"{world / 'test.jsonl'},{world / 'other.jsonl'}"})
    mesh = sharding.make_mesh(data=-1)
    found = models.open_model(config, config.model.path, None, mesh)
    sets, _ = loading.load_held_out(config, found.pretrained.tokenizer, found.template)
    params = found.load()
    sampler = capacity.make_configured_sampler(config, found.pretrained.decoder, mesh,
                                               capacity.EVALUATION_WEIGHT_BYTES)
    with evaluation.make_grader(config) as grader:
        yield Bench(config=config, pretrained=found.pretrained, template=found.template, sets=sets,
                    sampler=sampler, params=params, grader=grader, asked=[])


@pytest.fixture
def bench(opened):
    return dataclasses.replace(opened, asked=[])


@pytest.fixture(scope="module")
def whole(opened, tmp_path_factory):
    """The graded responses of both sets, of an evaluation that nothing has stopped."""
    directory = tmp_path_factory.mktemp("whole")
    dataclasses.replace(opened, asked=[]).evaluate(directory=directory)
    return directory


def files(world):
    return f"{world.name}_test.jsonl", f"{world.name}_other.jsonl"


def stopping(after, error):
    """A watch that raises once so many responses of a set are there."""
    def watch(now):
        if now.finished >= after:
            raise error
    return watch


def same(directory, whole):
    """Byte for byte the same files, and no others."""
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        path.name for path in whole.iterdir())
    for path in whole.iterdir():
        assert (directory / path.name).read_bytes() == path.read_bytes()


def drop(config, **changes):
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **changes))


def test_each_set_is_measured_on_its_own(bench, whole, world):
    found = bench.evaluate()
    assert list(found) == [str(world / "test.jsonl"), str(world / "other.jsonl")] == list(
        bench.sets)
    for name, outcomes in found.items():
        assert outcomes.correct.shape == (len(bench.sets[name]), 2)
        rows = responses.read(whole / files(world)[list(found).index(name)])[1]
        np.testing.assert_equal(dataclasses.asdict(responses.outcomes(rows)),
                                dataclasses.asdict(outcomes))
        assert {row.set for row in rows} == {name}
        assert [row.uid for row in rows[::2]] == outcomes.uids.tolist()
        correct, stated = outcomes.correct, outcomes.first_answer_token
        assert correct.any() and not correct.all()
        assert (stated[correct] <= outcomes.lengths[correct]).all() and (stated[correct] > 0).all()
    alone = bench.evaluate(names=[str(world / "other.jsonl")], sets={
        str(world / "other.jsonl"): bench.sets[str(world / "other.jsonl")]})
    np.testing.assert_equal(dataclasses.asdict(alone[str(world / "other.jsonl")]),
                            dataclasses.asdict(found[str(world / "other.jsonl")]))


def test_a_crash_costs_what_was_in_flight(bench, whole, world, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        bench.evaluate(stopping(7, RuntimeError("killed")), directory=tmp_path)
    journal = tmp_path / files(world)[0].replace(".jsonl", ".journal")
    kept = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert len(kept) >= 7 and all(each["finish"] for each in kept)
    with journal.open("a") as file:             # killed while it wrote
        file.write('{"prompt":3,"sam')
    bench.evaluate(directory=tmp_path)
    same(tmp_path, whole)
    first, again, other = bench.asked
    assert len(first) == 16 and len(again) == 16 - len(kept) and len(other) == 8
    assert all(prefix is None for _, _, prefix in again)


def test_a_signal_costs_nothing(bench, whole, world, tmp_path):
    stop = Interrupted(signal.SIGTERM, "stopped")
    for after in (3, 4):  # twice: what was kept the first time is kept the second time too
        with pytest.raises(Interrupted):
            bench.evaluate(stopping(after, stop), directory=tmp_path)
    bench.evaluate(directory=tmp_path)
    same(tmp_path, whole)
    _, second, third, _ = bench.asked
    begun = [prefix for _, _, prefix in third if prefix is not None]
    assert 0 < len(begun) < len(third) and all(len(prefix.tokens) for prefix in begun)
    assert len(third) < len(second) < 16


def test_what_is_finished_is_read(bench, whole, world):
    def watch(now):
        raise AssertionError("sampled")

    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    found = bench.evaluate(watch, directory=whole)
    assert bench.asked == []
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before
    np.testing.assert_equal({name: dataclasses.asdict(each) for name, each in found.items()},
                            {name: dataclasses.asdict(each)
                             for name, each in bench.evaluate().items()})
    # A process that was killed between the last two writes has left its journal.
    left = whole / files(world)[0].replace(".jsonl", ".journal")
    left.write_text('{"facts":{}}\n')
    bench.evaluate(watch, directory=whole, names=[str(world / "test.jsonl")])
    assert not left.exists()


@pytest.mark.parametrize(("changes", "message"),
                         [({"weights": "step 3"}, "weights 'base', now 'step 3'"),
                          ({"seed": 1}, "run.seed 0, now 1"),
                          ({"temperature": 0.6}, "evaluation.temperature 1.0, now 0.6"),
                          ({"top_p": 0.95}, "evaluation.top_p 1.0, now 0.95"),
                          ({"top_k": 5}, "evaluation.top_k null, now 5"),
                          ({"max_new_tokens": 39}, "evaluation.max_new_tokens 40, now 39"),
                          ({"samples": 1}, "evaluation.samples 2, now 1"),
                          ({"template": Template("other", "{{ messages }}", "{problem}")},
                           "template_sha256 [0-9a-f]{12}, now [0-9a-f]{12}"),
                          ({"fewer": True},
                           "problems 8, now 7; problems_sha256 [0-9a-f]{12}, now [0-9a-f]{12}")])
def test_other_settings_are_never_mixed(bench, whole, world, tmp_path, changes, message):
    name = files(world)[0]
    (tmp_path / name).write_bytes((whole / name).read_bytes())
    settings = {each: changes.pop(each) for each in ("weights", "seed", "template")
                if each in changes}
    if changes.pop("fewer", False):
        settings["sets"] = {set_name: problems[:7] for set_name, problems in bench.sets.items()}
    pattern = rf"test\.jsonl: was made with {message}; choose another directory, or remove the file"
    with pytest.raises(UserError, match=pattern):
        bench.evaluate(config=drop(bench.config, **changes), directory=tmp_path, **settings)
    # The same of a journal.
    journal = tmp_path / name.replace(".jsonl", ".journal")
    journal.write_text(json.dumps({"facts": responses.read_facts(whole / name)}) + "\n")
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=pattern.replace("jsonl", "journal")):
        bench.evaluate(config=drop(bench.config, **changes), directory=tmp_path, **settings)
    assert bench.asked == []


@pytest.mark.parametrize(("changes", "message"),
                         [({"repetition": {"stop": True}}, "repetition.stop false, now true"),
                          ({"grade": {"require_eos": False}}, "grade.require_eos true, now false"),
                          ({"run": {"seed": 5}}, "run.seed 0, now 5"),
                          ({"grader": True}, "grader .*, now 'another grader'")])
def test_other_rules_are_never_mixed(bench, whole, monkeypatch, changes, message):
    if changes.pop("grader", False):
        monkeypatch.setattr(evaluation.provenance, "grader", lambda: "another grader")
    config = dataclasses.replace(bench.config,
                                 **{section: dataclasses.replace(
                                     getattr(bench.config, section), **fields)
                                    for section, fields in changes.items()})
    with pytest.raises(UserError, match=rf"test\.jsonl: was made with {message}"):
        bench.evaluate(config=config, directory=whole)
    assert bench.asked == []


def test_a_file_that_lost_rows_is_never_a_smaller_set(bench, whole, world, tmp_path):
    name = files(world)[0]
    lines = (whole / name).read_bytes().splitlines(keepends=True)
    (tmp_path / name).write_bytes(b"".join(lines[:-6]))
    pattern = r"test\.jsonl: holds 10 of 16 responses; remove it to sample them again"
    with pytest.raises(UserError, match=pattern):
        bench.evaluate(directory=tmp_path)
    header = lines[0].replace(b'"problems": 8', b'"problems": null')
    (tmp_path / name).write_bytes(header + b"".join(lines[1:-6]))
    with pytest.raises(UserError, match="was made with problems null, now 8"):
        bench.evaluate(directory=tmp_path)
    assert bench.asked == []


@pytest.mark.parametrize("change",
                         [{"prompt": 8}, {"prompt": -1}, {"sample": 2}, {"tokens": [10**7]},
                          {"tokens": [-5]}, {"tokens": [3] * 41}, {"finish": "ended"}])
def test_a_journal_of_what_cannot_be_is_one_line(bench, whole, world, tmp_path, change):
    name = files(world)[0]
    response = {"prompt": 0, "sample": 0, "finish": "eos", "repeated": False, "tokens": [3]}
    (tmp_path / name.replace(".jsonl", ".journal")).write_text(
        json.dumps({"facts": responses.read_facts(whole / name)}) + "\n"
        + json.dumps(response | change) + "\n")
    with pytest.raises(UserError, match=r"test\.journal: line 2 is damaged; remove the file"):
        bench.evaluate(directory=tmp_path)


def test_facts_are_those_of_the_process_that_sampled(bench, whole, world, tmp_path, monkeypatch):
    name = str(world / "test.jsonl")
    measure = bench.evaluator().measure
    monkeypatch.setattr(evaluation.provenance, "git_commit", lambda: "of the reader")
    measured = measure(name, lambda: pytest.fail("loaded"), lambda now: None, weights="base",
                       directory=whole)
    assert measured.facts == responses.read_facts(whole / files(world)[0])
    assert measured.facts["environment"]["git_commit"] != "of the reader"
    fresh = measure(name, lambda: bench.params, lambda now: None, weights="base")
    assert fresh.facts["environment"]["git_commit"] == "of the reader"
    np.testing.assert_equal(dataclasses.asdict(fresh.outcomes),
                            dataclasses.asdict(measured.outcomes))


def test_seeds_are_other_samples_of_the_same_problems(bench, world):
    name = str(world / "test.jsonl")
    zero, again, one = (bench.evaluate(seed=seed, names=[name])[name] for seed in (None, 0, 1))
    np.testing.assert_array_equal(zero.lengths, again.lengths)
    assert (zero.lengths != one.lengths).any() and zero.uids.tolist() == one.uids.tolist()


def test_lengths_that_are_expected_are_those_of_the_first_set(bench, world):
    uid = bench.sets[str(world / "test.jsonl")][3].uid
    seen = []
    sampler = bench.sampler

    def recording(params, requests, key, sampling):
        seen.append(Counter(request.expected_tokens for request in requests))
        return sampler(params, requests, key, sampling)

    dataclasses.replace(bench, sampler=recording).evaluate(expected={uid: 30.0})
    assert seen == [{None: 14, 30.0: 2}, {None: 8}]


def test_facts_say_what_decides_responses_and_verdicts(bench, whole, world):
    facts = responses.read_facts(whole / files(world)[0])
    assert facts["weights"] == "base" and facts["set"] == str(world / "test.jsonl")
    assert facts["template_sha256"] == bench.template.sha256
    assert facts["problems_sha256"] == prompts.fingerprint(bench.sets[facts["set"]])
    assert facts["environment"]["grader"] == facts["grader"]
    assert "git_commit" in facts["environment"]
    assert not any(name.startswith(("mesh", "rollout.slots", "run.directory")) for name in facts)
    looping = dataclasses.replace(bench.config,
                                  repetition=dataclasses.replace(bench.config.repetition,
                                                                 stop=True))
    made = bench.evaluator(config=looping).facts(facts["set"], "base")
    assert made["repetition.stop"] and made["repetition.window"] == 512
    assert "repetition.window" not in facts


@pytest.fixture
def evaluated(world, capsys):
    """Runs the command; returns its output."""
    def run(output, *more, code=0, **changes):
        arguments = small_runs.arguments(world, world / "unused", **FEW_SLOTS | changes)
        wanted = [] if output is None else ["--output", str(output)]
        argv = ["evaluate", *arguments, "--models", str(world / "base"), *wanted, *more]
        assert main.main(argv) == code
        said = capsys.readouterr()
        return said.out if code == 0 else said.err
    return run


def test_the_command_keeps_compares_and_goes_on(evaluated, world, tmp_path, monkeypatch):
    names = f"{world / 'test.jsonl'},{world / 'other.jsonl'}"
    output, changes = tmp_path / "out", {"evaluation.path": names}
    said = evaluated(output, "--seeds", "0", "1", **changes)
    base, other = f"{world / 'base'} (seed 0)", f"{world / 'base'} (seed 1)"
    table = json.loads((output / "results.json").read_text())
    assert list(table["models"]) == [base, other] and table["base"] == base
    assert list(table["models"][base]) == names.split(",")
    assert table["models"][base][names.split(",")[0]]["comparison"] is None
    assert table["models"][other][names.split(",")[0]]["comparison"]["token_ratio"] > 0
    assert table["settings"]["evaluation"]["samples"] == 2
    assert table["provenance"]["device"] == "cpu"
    rows = list(csv.DictReader((output / "results.csv").read_text().splitlines()))
    assert [(row["model"], row["run.seed"], row["problems"]) for row in rows] == [
        (base, "0", "8"), (base, "0", "4"), (other, "1", "8"), (other, "1", "4")]
    folder = responses.file_names([str(world / "base")])[str(world / "base")]
    assert sorted(str(path.relative_to(output)) for path in output.rglob("*.jsonl")) == sorted(
        f"{folder}/seed{seed}/{name}" for seed in (0, 1) for name in files(world))
    lines = said.splitlines()
    # the title of the first table
    first = max(place for place, line in enumerate(lines) if "test.jsonl: 8" in line)
    assert max(map(len, lines[first:-1])) <= 80
    assert "Generalisation, against" in said and said.count("points would need about") + said.count(
        "found:") >= 1

    # Again, with one more set of responses removed: the rest is read, and nothing but what is
    # missing needs weights.
    monkeypatch.setattr(models, "load_weights",
                        functools.partial(pytest.fail, "weights were loaded"))
    again = evaluated(output, "--seeds", "0", "1", **changes)
    assert again.count("; read\n") == 4 and "; read\n" not in said
    assert again.replace("; read\n", "\n").splitlines()[-20:] == lines[-20:]
    assert json.loads((output / "results.json").read_text())["models"] == table["models"]
    fewer = evaluated(output)
    assert f"will no longer hold {base} on {names.split(',')[0]}, {base} on " in fewer
    assert "no longer" not in again
    error = evaluated(output, code=2, **changes | {"evaluation.temperature": 0.5})
    assert "was made with evaluation.temperature 1.0, now 0.5" in error


@pytest.mark.parametrize("name", ["results.json", "results.csv"])
def test_files_of_something_else_are_refused_before_anything_is_sampled(
    evaluated, tmp_path, monkeypatch, name):
    monkeypatch.setattr(evaluation, "evaluate_model", functools.partial(pytest.fail, "sampled"))
    (tmp_path / name).write_text('{"mine": 1}')
    error = evaluated(tmp_path, code=2)
    assert error.startswith("error: ") and f"{name}: was not written by evaluate.py" in error
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"mine": 1}'


def test_a_signal_ends_the_command_with_a_line_that_says_how_to_go_on(
    evaluated, tmp_path, monkeypatch):
    check = evaluation.Interrupts.check

    def check_after(self, calls=[]):           # noqa: B006
        calls.append(0)
        if len(calls) == 4:
            raise Interrupted(signal.SIGTERM, "stopped by SIGTERM")
        check(self)

    monkeypatch.setattr(evaluation.Interrupts, "check", check_after)
    output = tmp_path / "out"
    error = evaluated(output, code=128 + signal.SIGTERM)
    assert error == f"stopped by SIGTERM; the same command continues from what {output} holds\n"
    assert len(list(output.rglob("*.journal"))) == 1 and not (output / "results.json").exists()
    evaluated(output)
    assert not list(output.rglob("*.journal")) and (output / "results.json").exists()


def test_without_an_output_nothing_is_written(evaluated, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(world.rglob("*"))
    # a long path folds the line
    assert "8 problems x 2 responses" in " ".join(evaluated(None).split())
    assert list(tmp_path.iterdir()) == [] and sorted(world.rglob("*")) == before
