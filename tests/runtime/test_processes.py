"""Two processes with four virtual devices each do the same run as one process with eight."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import small_runs
from safetensors.numpy import load_file

from effreason.evaluation import responses
from effreason.lm import adapters, model
from effreason.lm.hf import peft
from effreason.lm.hf.config import read_config
from effreason.runtime import distributed, processes, stderr_relay
from effreason.runtime.config import DistributedConfig
from effreason.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parents[1] / "support" / "two_processes.py"
# a machine under load compiles slowly; nothing here is meant to take so long
SECONDS = 600


def started(arguments, *, number=0, of=2, devices=4, port=None, **environment):
    """One process, by the variables that let one configuration serve all hosts."""
    variables = os.environ | {
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join((str(ROOT), str(SCRIPT.parent))),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} | environment
    if port is not None:
        variables |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(of),
                      "JAX_PROCESS_ID": str(number)}
    return subprocess.Popen([sys.executable, SCRIPT, *map(str, arguments)], env=variables,
                            text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(children):
    """[(exit code, standard output, standard error)] of children, none of which is left behind."""
    try:
        outputs = [child.communicate(timeout=SECONDS) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, out, err) for child,
            (out, err) in zip(children, outputs, strict=True)]


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def both(*arguments, **environment):
    return each(arguments, arguments, **environment)


def each(*arguments, **environment):
    """Two processes, each with arguments of its own."""
    port = free_port()
    return ended([started(own, number=number, port=port, **environment) for number,
                  own in enumerate(arguments)])


def lines(text):
    """The lines of standard error, without what XLA logs."""
    return [line for line in text.splitlines() if not stderr_relay.NATIVE.match(line.encode())
            and line[:1] not in "EWI"]


@pytest.mark.slow
def test_decisions_crossings_and_a_signal_to_one_process(tmp_path):
    (code, out, err), (other, second_out, second_err) = both("together", tmp_path)
    assert (code, other) == (128 + signal.SIGINT,) * 2, err + second_err
    stops = [line for line in (out + second_out).splitlines() if "stopped at" in line]
    assert len(stops) == 2 and len(set(stops)) == 1, stops          # the same check in both
    assert lines(err) == ["stopped by SIGINT"] and not lines(second_err)


def check_killed(which, busy, **environment):
    """Kills a process; the other must end within a minute, with one line."""
    results = both("lost", which, signal.SIGKILL.value, busy, **environment)
    assert results[which][0] == -signal.SIGKILL
    last = next(line for line in results[which][1].splitlines() if line.startswith("ends at"))
    assert time.time() - float(last.split()[-1]) < 60
    code, _, err = results[1 - which]
    assert code != 0 and lines(err) == [
        f"error: process {which} on {socket.gethostname()} is lost; this process ends too: start "
        "all of them again"], err


@pytest.mark.slow
@pytest.mark.parametrize(("which", "busy"), [(1, "collective"), (1, "value"), (0, "collective")])
def test_a_process_that_is_killed_ends_the_other_with_one_line(which, busy):
    check_killed(which, busy)


@pytest.mark.slow
def test_by_default_it_ends_within_a_minute():
    check_killed(1, "collective", HEARTBEAT=str(DistributedConfig().heartbeat_timeout_seconds))


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_stopped_process_that_wakes_after_the_others_have_ended_ends_too(which):
    port = free_port()
    children = [started(["lost", which, signal.SIGSTOP.value, "value"], number=number, port=port)
                for number in (0, 1)]
    try:
        assert children[1 - which].wait(timeout=SECONDS) != 0
        children[which].send_signal(signal.SIGCONT)
        woken = time.monotonic()
        _, err = children[which].communicate(timeout=SECONDS)
        assert children[which].returncode != 0 and time.monotonic() - woken < 15
        assert lines(err)[0].endswith("this process ends too: start all of them again")
    finally:
        for child in children:
            child.kill()
            child.communicate()


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_other():
    (waiting, _, err), (failing, _, second_err) = both("failed")
    assert failing == 2 and lines(second_err) == ["error: the disk of process 1 is full"]
    assert waiting != 0 and lines(err) == [
        f"error: process 1 on {socket.gethostname()} is lost; this process ends too: start all of "
        "them again"], err


@pytest.mark.slow
def test_another_number_of_processes_is_one_line_in_both():
    port = free_port()
    results = ended([started(["together", "none"], number=0, of=2, port=port, INITIALIZATION="20"),
                     started(["together", "none"], number=1, of=3, port=port, INITIALIZATION="20")])
    assert [code for code, _, _ in results] == [2, 2], results
    name = socket.gethostname()
    assert lines(results[0][2]) == [f"error: distributed.processes: expected 2, found 3 in "
                                    f"process 1 on {name}"]
    assert lines(results[1][2]) == [f"error: distributed.processes: expected 3, found 2 in "
                                    f"process 0 on {name}"]


@pytest.mark.slow
def test_what_is_private_in_jax_is_there_or_its_absence_is_one_line(monkeypatch):
    state = distributed.service_state()
    assert state.client is None and state.process_id == 0 and hasattr(state, "num_processes")
    monkeypatch.setattr(distributed.importlib, "import_module", lambda name: object())
    with pytest.raises(UserError, match=f"JAX {jax.__version__} has no key-value store"):
        distributed.service_state()


def test_a_host_that_never_comes_ends_the_others():
    port = free_port()
    (code, _,
     err), = ended([started(["together", "none"], number=0, port=port, INITIALIZATION="3")])
    assert code != 0
    assert lines(err) == ["error: distributed: not all 2 processes were there within 3 s, this is "
                          "process 0; they meet "
                          f"at 127.0.0.1:{port}"], err


def table(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_runs.write_world(tmp_path_factory.mktemp("world"), train=32, test=16, first=50)


def arguments(world, directory, mode, **changes):
    settings = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "run.steps": 5,
                "checkpoint.every": 2,
                "evaluation.problems": 16, "distributed.mode": mode}
    return small_runs.arguments(world, directory, **settings | changes)


def check_same_line(results, line):
    """Both processes end with one line, the same, and the exit code of a user's mistake."""
    assert [(code, lines(err)) for code, _, err in results] == [(2, [line])] * 2, results


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "field", "value", "other"), [
    ("train", "evaluation.problems", 16, 0), ("train", "data.max_prompt_tokens", 64, 3),
    ("evaluate", "evaluation.problems", 16, 8)])
def test_a_setting_of_one_host_is_one_line_that_names_it(world, scenario, field, value, other):
    host = socket.gethostname()
    results = each(*[[scenario, *arguments(world, world / "never", "manual", **{field: found})]
                     for found in (value, other)])
    check_same_line(results,
                    f"error: {field}: process 1 on {host} has {other}, process 0 on {host} has "
                    f"{value}; all "
                             "must have the same")
    assert not (world / "never").exists()


@pytest.mark.slow
def test_other_models_on_one_host_are_one_line(world):
    host, own = socket.gethostname(), arguments(world, world / "never", "manual")
    results = each(*[["evaluate", *own, "--models", *models]
                     for models in (["tiny", world / "base"], [world / "base"])])
    check_same_line(results,
                    f"error: models: process 1 on {host} has {world}/base, process 0 on {host} "
                    f"has tiny "
                             f"{world}/base; all must have the same")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["train", "evaluate"])
def test_other_data_on_one_host_are_one_line(world, scenario, tmp_path, monkeypatch):
    """The same names of files, in working directories of their own."""
    children, port = [], free_port()
    for number in (0, 1):
        (place := tmp_path / str(number)).mkdir()
        small_runs.write_problems(place / "test.jsonl", 16, first=50 + number)
        monkeypatch.chdir(place)
        children.append(started([scenario, *arguments(world, world / "never", "manual",
                                                      **{"evaluation.path": "test.jsonl"})],
                                number=number, port=port))
    results = ended(children)
    assert [code for code, _, _ in results] == [2, 2], results
    for _, _, err in results:
        line, = lines(err)
        assert line.startswith("error: the problems of evaluation.path: process 1 on ")


@pytest.mark.slow
def test_fewer_problems_on_one_host_are_one_line(world, tmp_path):
    """What process 0 finds of its problems means nothing to the other."""
    children, port = [], free_port()
    for number in (0, 1):
        (place := tmp_path / str(number)).mkdir()
        rows = [json.dumps({"problem": f"{row}", "answer": "7" if row < 8 else "{",
                            "level": "easy"})
                for row in range(12 - 4 * number)]
        (place / "test.jsonl").write_text("\n".join(rows))
        with contextlib.chdir(place):
            children.append(started(["evaluate", *arguments(world, world / "never", "manual",
                                                            **{"evaluation.path": "test.jsonl"})],
                                    number=number, port=port))
    host = socket.gethostname()
    check_same_line(ended(children),
                    f"error: the number of problems: process 1 on {host} has 8, process 0 on "
                    f"{host} "
                                     "has 12; all must have the same")


@pytest.mark.slow
def test_automatic_where_there_is_no_cluster(world):
    (code, _, err), = ended([started(["train", *arguments(world, world / "never", "auto")])])
    assert (code, lines(err)) == (2,
                                  ["error: distributed.mode auto: JAX finds no TPU slice, SLURM, "
                                   "Open MPI or "
                                      "Kubernetes here; set distributed.mode manual"])


@pytest.fixture(scope="module")
def alone(world):
    """The run of one process with eight devices."""
    directory = world / "alone"
    (code, out, err), = ended([started(["train", *arguments(world, directory, "none")], devices=8)])
    assert code == 0, out + err
    return directory


def check_same_run(found, expected):
    """Same responses, grades and evaluations; weights and metrics but for the rounding of sums."""
    assert (found / "rollouts.jsonl").read_text() == (expected / "rollouts.jsonl").read_text()
    evaluated = sorted(path.relative_to(expected) for path in expected.glob("evaluations/*/*"))
    assert len(evaluated) == 2          # before and after
    for path in evaluated:
        assert responses.read(found / path)[1] == responses.read(expected / path)[1], path
    rows, wanted = table(found / "metrics.jsonl"), table(expected / "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in wanted] == list(range(5))
    for row, other in zip(rows, wanted, strict=True):
        for name in other.keys() - {"grade/cached", "grade/symbolic"}:
            if not name.startswith(("time/", "engine/")) and "per_second" not in name:
                assert row[name] == pytest.approx(other[name], abs=2e-6), (row["step"], name)
    weights, others = (load_file(path / "model" / "model.safetensors")
                       for path in (found, expected))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        # Adam divides a gradient by its size: if it is tiny, rounding is a share of the rate.
        np.testing.assert_allclose(weight, others[name], atol=3e-4, err_msg=name)


@pytest.mark.slow
def test_two_processes_train_as_one_does(world, alone):
    directory = world / "two"
    results = both("train", *arguments(world, directory, "manual"))
    assert [code for code, _, _ in results] == [0, 0], results
    check_same_run(directory, alone)
    assert results[0][1].count("step 5/5") == 1 and "step" not in results[1][1]         # one speaks
    assert "process_id: null" in (directory / "config.yaml").read_text()


@pytest.mark.slow
def test_two_processes_train_adapters_as_one_does(world, tmp_path):
    """A run that goes on from adapters."""
    config = dataclasses.replace(read_config(world / "base"), adapter=adapters.make_adapter(
        3, 6.0, "attention", rank_stabilized=False))
    generator, start = np.random.default_rng(0), tmp_path / "start"
    stored = jax.tree.map(lambda leaf: 0.05 * generator.standard_normal(leaf.shape, np.float32),
                          adapters.split(model.abstract_params(config))[1])
    start.mkdir()
    peft.write_adapter(stored, config, start, base_model=str(world / "base"))

    found, expected = tmp_path / "two", tmp_path / "alone"
    settings = {"model.adapter": str(start), "adapter.rank": 4, "export.adapter": True,
                "update.learning_rate": 1e-2, "kl.form": "loss", "run.steps": 2,
                "evaluation.problems": 8}
    results = both("train", *arguments(world, found, "manual", **settings))
    assert [code for code, _, _ in results] == [0, 0], results
    (code, out, err), = ended([started(["train", *arguments(world, expected, "none", **settings)],
                                       devices=8)])
    assert code == 0, out + err
    assert (found / "rollouts.jsonl").read_text() == (expected / "rollouts.jsonl").read_text()
    trained, others = (load_file(path / "model" / "adapter_model.safetensors")
                       for path in (found, expected))
    assert trained.keys() == others.keys()
    for key, leaf in trained.items():
        np.testing.assert_allclose(leaf, others[key], atol=1e-3, err_msg=key)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(world, alone):
    (code, out, err), (other, second_out, _) = both(
        "evaluate", *arguments(world, world / "unused", "manual"), "--output", world / "evaluated")
    assert (code, other) == (0, 0), err
    results = json.loads((world / "evaluated" / "results.json").read_text())
    (result,) = results["models"][str(world / "base")].values()
    base = json.loads((alone / "summary.json").read_text())["points"][0]
    (expected,) = base["sets"].values()
    assert result["summary"] == expected["summary"]
    assert str(world / "base") in out and str(world / "base") not in second_out


@pytest.mark.slow
def test_two_processes_train_a_family_as_one_does(world, alone):
    directory = world / "family"
    asked = ("--family", "0.2", "--baselines", "none", "--blends", "0.5")
    results = both("train", *arguments(world, directory, "manual"), *asked)
    assert [code for code, _, _ in results] == [0, 0], results
    points = json.loads((directory / "family.json").read_text())["points"]
    assert [point["kind"] for point in points] == ["base", "member", "blend"]
    check_same_run(directory / "alpha0.2", alone)
    assert "blend 0.5" in results[0][1] and "blend 0.5" not in results[1][1]


@pytest.mark.slow
def test_a_signal_to_one_process_saves_both_and_the_run_goes_on(world, alone):
    directory = world / "stopped"
    results = both("stopped", *arguments(world, directory, "manual"))
    assert [code for code, _, _ in results] == [128 + signal.SIGTERM] * 2, results
    said = [line for _, _, err in results for line in lines(err)]
    assert len(said) == 1 and "stopped by SIGTERM after step" in said[0], said
    assert f"{directory}/config.yaml --run.resume true on every host" in said[0]
    done = max(int(each.name) for each in (directory / "checkpoints").iterdir())
    assert f"after step {done} of 5" in said[0] and done < 5
    resumed = both("train", "--config", directory / "config.yaml", "--run.resume", "true")
    assert [code for code, _, _ in resumed] == [0, 0], resumed
    check_same_run(directory, alone)
    assert not (directory / "unfinished.jsonl").exists()


# In one process


def test_one_process_decides_for_itself():
    assert (processes.count(), processes.index(), processes.is_primary()) == (1, 0, True)
    marker = object()               # not what JSON could hold: nothing is sent
    assert processes.broadcast("it", lambda: marker) is marker
    assert processes.all_gather("it", lambda: marker) == [marker]
    assert processes.agree_on_signal(None) is None and processes.agree_on_signal(15) == 15
    processes.check_same({"a": "b"})
    with distributed.joined(DistributedConfig()):
        assert processes.count() == 1


@pytest.mark.parametrize(("variable", "text"),
                         [("JAX_NUM_PROCESSES", "2"), ("SLURM_STEP_NUM_TASKS", "16"),
                                                ("OMPI_COMM_WORLD_SIZE", "4")])
def test_lone_hosts_are_an_error(monkeypatch, variable, text):
    monkeypatch.setenv(variable, text)
    with pytest.raises(UserError,
                       match=f"distributed.mode is none, but {variable} says that there are "
                             f"{text} proc"):
        with distributed.joined(DistributedConfig()):
            pass


@pytest.mark.parametrize(("fields", "environment", "message"), [
    ({}, {},
     "distributed.coordinator_address or JAX_COORDINATOR_ADDRESS must be given if "
     "distributed.mode is m"),
    ({"coordinator_address": "a:1", "processes": 2}, {},
     "distributed.process_id or JAX_PROCESS_ID must be given"),
    ({"coordinator_address": "a:1", "processes": 2, "process_id": 2}, {},
     "must be below distributed.processes, 2"),
    ({"coordinator_address": "a:1", "process_id": 1}, {"JAX_NUM_PROCESSES": "two"},
     "JAX_NUM_PROCESSES must be"),
    ({"coordinator_address": "a:1", "processes": 2, "process_id": 1}, {"JAX_PROCESS_ID": "0"},
     "distributed.process_id is 1, but JAX_PROCESS_ID is 0"),
])
def test_what_is_missing_or_said_twice_is_an_error(monkeypatch, fields, environment, message):
    for name in distributed.ENVIRONMENT.values():
        monkeypatch.delenv(name, raising=False)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UserError, match=message):
        distributed.resolve(DistributedConfig(mode="manual", **fields))


@pytest.mark.parametrize("fields", [{"coordinator_address": "a:1"}, {"process_id": 0}])
def test_what_is_for_manual_is_an_error_in_auto(fields):
    with pytest.raises(UserError,
                       match=f"distributed.{next(iter(fields))} is for distributed.mode manual, "
                             f"found mode"):
        distributed.resolve(DistributedConfig(mode="auto", **fields))


@pytest.mark.parametrize("address", ["host", "host:", "host:0", "host:65536", "host:99999", ":8476",
                                     "a host:8476"])
def test_an_address_has_a_port(address):
    with pytest.raises(ValueError,
                       match="distributed.coordinator_address must be .*host:port, port in "):
        DistributedConfig(coordinator_address=address)


def test_ports_go_to_65535():
    for address in ("host:1", "host:65535", "[::1]:8476"):
        assert DistributedConfig(coordinator_address=address).coordinator_address == address


def test_an_end_while_a_stop_is_agreed_on():
    """One of two has heard of a signal and ends for another reason before the other one has."""
    class Store:
        def key_value_dir_get_bytes(self, name):
            return [("first", b"15")] if name.endswith("signal/") else []

        def key_value_set_bytes(self, name, value):
            said.set()

    said, failures = threading.Event(), []
    stops = processes.SignalAgreement(Store(), 0, 2)
    run = stops.run

    def watched():
        try:
            run()
        except Exception as error:
            failures.append(error)

    stops.run = watched
    stops.start()
    assert said.wait(60)
    stops.close()
    assert not failures and stops.check(None) is None


def test_fields_come_from_the_environment(monkeypatch):
    for name, text in zip(distributed.ENVIRONMENT.values(), ("host:8476", "4", "3"), strict=True):
        monkeypatch.setenv(name, text)
    assert distributed.resolve(DistributedConfig(mode="manual", processes=4)) == {
        "coordinator_address": "host:8476", "processes": 4, "process_id": 3}


# What JAX 0.10 and 0.12 say before they abort a process.
SILENT = b"""E1120 16:32:50.562674   10506 coordination_service_agent.cc:289] Polled an error from \
coordination service.
F1120 16:32:50.562811   10506 client.h:80] Terminating process because the JAX distributed service \
detected fatal errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped \
sending heartbeats):
1
3
The tasks have crashed. Check the task logs for an earlier error.
*** Check failure stack trace: ***
    @     0x7f1d59c40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
CLOSED = b"""F1120 16:33:03.601384   10749 client.h:80] Terminating process: UNAVAILABLE: Failed \
to send RPC to coordination service. :UNKNOWN:Error received from peer  \
{grpc_status:14, grpc_message:"Socket closed"}
"""
NEVER = b"""F1120 16:33:17.624939   10798 client.h:80] Terminating process: DEADLINE_EXCEEDED: \
Deadline Exceeded

RPC: /xla.coordination.CoordinationService/RegisterTask
"""
TOLD = b'\0{"hosts": ["a", "b", "c", "d"], "after": "start again"}\n'


@pytest.mark.parametrize(("written", "passed_on"), [
    (b"one\ntwo", b"one\ntwo"),
    (b"[external/gloo/gloo/transport/tcp/debug_logger.cc:25] ERROR failed to connect\n[1] two\n",
     b"[1] two\n"),
    (b"50 %\r75 %", b"50 %\r75 %"),
    (TOLD + b"before\n" + SILENT,
     b"before\nerror: process 1 on b, process 3 on d are lost; this process ends too: "
                                  b"start again\n"),
    (TOLD + CLOSED, b"error: process 0 on a is lost; this process ends too: start again\n"),
    (b'\0{"missing": "not all were there"}\n' + NEVER, b"error: not all were there\n"),
    (TOLD + b'\0{"quiet": true}\n' + CLOSED, b""),
    (SILENT.splitlines(keepends=True)[0] + b"more\n",
     SILENT.splitlines(keepends=True)[0] + b"more\n"),
    (b"Error of my own\nF-score 1\n", b"Error of my own\nF-score 1\n"),
], ids=["lines", "chatter", "bar", "silent", "closed", "never", "quiet", "not fatal", "ours"])
def test_the_last_words_are_one_line(written, passed_on):
    child = subprocess.run([sys.executable, "-I", stderr_relay.__file__], input=written,
                           capture_output=True, timeout=60)
    assert (child.stderr, child.stdout, child.returncode) == (passed_on, b"", 0)
    for size in (1, 7):             # however the text comes in
        target, source = os.pipe()
        relay = stderr_relay.Relay(source)
        for start in range(0, len(written), size):
            relay.feed(written[start : start + size])
        relay.end()
        os.close(source)
        with os.fdopen(target, "rb") as file:
            assert file.read() == passed_on
