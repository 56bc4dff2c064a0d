"""The command line: what reaches the trainer, and how each ending looks from outside."""

import errno
import importlib
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import setuptools
from rich.console import Console

import effreason
from effreason.cli import main, train
from effreason.data import sources
from effreason.lm.hf import hub
from effreason.runtime.config import Config
from effreason.runtime.config_fields import all_settings
from effreason.runtime.errors import Interrupted, UserError
from effreason.runtime.progress import say

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a module of the given functions where the command line imports the real one."""
    def put(name, **functions):
        module = types.SimpleNamespace(**functions)
        monkeypatch.setitem(sys.modules, f"effreason.{name}", module)
        parent, _, last = f"effreason.{name}".rpartition(".")
        monkeypatch.setattr(importlib.import_module(parent), last, module, raising=False)
    return put


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return str(path)


def failed(capsys, argv, command="train"):
    """The one line a refused command prints."""
    assert main.main([command, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err.removeprefix("error: ").rstrip("\n")


def ending(error, stand_in):
    def train(config):
        raise error
    stand_in("loop", train=train)
    return main.main(["train"])


def test_mistakes_end_at_once_before_jax_is_imported():
    program = ("import sys; from effreason.cli.main import main; code = main(['train', "
               "'--reward.alpha', '1.5']);"
               "assert not {'jax', 'numpy', 'transformers'} & sys.modules.keys(); sys.exit(code)")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    # Processor time: on a busy machine the clock says nothing.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2
    assert (done.returncode, done.stdout,
            done.stderr) == (2, "", "error: reward.alpha must be in [0, 1), got 1.5\n")


def test_the_script_does_what_the_subcommand_does(tmp_path, capsys):
    argv = ["--run.seed", "7", "--print_config"]
    script = subprocess.run([sys.executable, ROOT / "train.py", *argv], cwd=tmp_path,
                            capture_output=True, text=True)
    with pytest.raises(SystemExit) as stop:
        main.main(["train", *argv])
    assert stop.value.code == script.returncode == 0
    assert capsys.readouterr().out == script.stdout and "seed: 7" in script.stdout


def test_train_hands_over_the_configuration(stand_in):
    given = []
    stand_in("loop", train=given.append)
    assert main.main(["train", "--reward.alpha", "0.4"]) == 0
    assert given[0].reward.alpha == 0.4 and isinstance(given[0], Config)


@pytest.mark.parametrize(("argv", "models", "output", "seeds"), [
    ([], ["tiny"], None, None),
    (["--models", "tiny", "MODEL", "--output", "results"], ["tiny", "MODEL"], Path("results"),
     None),
    (["--model.path", "MODEL", "--evaluation.samples", "3", "--seeds", "0", "7"], ["MODEL"], None,
     [0, 7]),
])
def test_evaluate_hands_over_models_output_and_seeds(stand_in, model, argv, models, output, seeds):
    given = []
    stand_in("evaluation.evaluate", evaluate_models=lambda *args: given.append(args))
    assert main.main(["evaluate", *(arg.replace("MODEL", model) for arg in argv)]) == 0
    assert given[0][1:] == ([name.replace("MODEL", model) for name in models], output, seeds)


def test_missing_files_are_found_before_the_run(capsys, tmp_path, model):
    nowhere, file = str(tmp_path / "nowhere"), str(tmp_path / "model" / "config.json")
    wanted = "must be tiny, a Hugging Face directory or an id on its Hub,"
    assert failed(capsys,
                  ["--model.path", nowhere]) == f"model.path {wanted} {nowhere} does not exist"
    assert failed(capsys, ["--model.path", file]) == f"model.path {wanted} {file} is a file"
    assert failed(capsys, ["--model.path", str(tmp_path)]) == (
        f"model.path {wanted} {tmp_path} holds no config.json; did you mean {tmp_path / 'model'}?")
    assert failed(capsys, ["--models", "tiny", nowhere],
                  "evaluate") == f"models {wanted} {nowhere} does not exist"
    argv = ["--evaluation.problems", "0", "--data.path"]
    assert failed(capsys, [*argv, nowhere]) == f"data.path: {nowhere} does not exist"
    assert failed(capsys, [*argv, "gms8k"]) == (
        "data.path names 'gms8k', which is no preset, no file and no id on the Hugging Face Hub; "
        "did you mean gsm8k?")
    assert failed(capsys, [*argv, "math500"]) == "math500: the set has no split to train on"
    for command in ("train", "evaluate"):
        message = failed(capsys, ["--evaluation.path", nowhere], command)
        assert message == f"evaluation.path: {nowhere} does not exist"
    assert failed(capsys, ["--run.directory",
                           file]) == f"run.directory must be a directory, {file} is a file"


def test_a_preset_is_evaluated_on_its_test_split_and_other_sets_must_be_named(capsys, tmp_path,
                                                                              stand_in):
    mine = tmp_path / "mine.jsonl"
    mine.write_text("{}\n")
    for path in (str(mine), f"gsm8k,{mine}", "deepscaler,gsm8k"):   # the former has none
        assert failed(capsys, ["--data.path", path]) == (
            "evaluation.path must name held-out problems, or evaluation.problems must be 0, when "
            "data.path is not tiny or a preset with a test split, got null and 600")
    given = []
    stand_in("loop", train=given.append)
    for path, evaluated in (("tiny", "tiny,tiny_long,tiny_other"), ("gsm8k", "gsm8k"),
                            ("gsm8k=1,commonsense_qa=2", "gsm8k,commonsense_qa")):
        assert main.main(["train", "--data.path", path]) == 0
        assert sources.evaluation_path(given[-1]) == evaluated


def test_a_run_is_taken_for_its_model(stand_in, model, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    given = []
    stand_in("evaluation.evaluate", evaluate_models=lambda *args: given.append(args))
    assert main.main(["evaluate", "--models", str(tmp_path)]) == 0
    assert hub.find(str(tmp_path), None, ())[0] == Path(model)
    assert hub.existing_export(Path(model)) == Path(model)


def test_evaluate_needs_problems(capsys):
    message = failed(capsys, ["--evaluation.problems", "0"], "evaluate")
    assert message == "evaluation.problems must be >= 1 to evaluate, got 0"
    for text in ("-1", "x", "2147483648"):
        assert failed(capsys, ["--seeds", "0", text], "evaluate") == (
            f"--seeds must be whole numbers in [0, 2147483647], got '{text}'")


def test_the_smollm2_configuration_needs_nothing_but_the_hub(stand_in):
    given = []
    stand_in("loop", train=given.append)
    assert main.main(["train", "--config", "configs/smollm2_gsm8k.yaml"]) == 0
    assert (given[0].model.path, given[0].data.path) == ("HuggingFaceTB/SmolLM2-135M-Instruct",
                                                         "gsm8k")


def test_a_folder_called_wandb_is_not_the_package(capsys, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "pip install" in failed(capsys, ["--log.wandb", "true"])


def test_a_users_mistake_found_later_is_one_line_too(stand_in, capsys):
    assert ending(UserError("data.jsonl line 3: not JSON"), stand_in) == 2
    assert capsys.readouterr().err == "error: data.jsonl line 3: not JSON\n"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_gives_its_exit_code_and_says_how_to_resume(stand_in, capsys, signum, code):
    assert ending(Interrupted(signum, "stopped at step 5; resume with --run.resume true"),
                  stand_in) == code
    assert capsys.readouterr().err == "stopped at step 5; resume with --run.resume true\n"


def test_an_interrupt_the_loop_did_not_see_is_no_traceback(stand_in, capsys):
    assert ending(KeyboardInterrupt(), stand_in) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_full_disk_names_the_file(stand_in, capsys):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/metrics.jsonl")
    assert ending(full, stand_in) == 1
    assert capsys.readouterr().err == "error: runs/a/metrics.jsonl: No space left on device\n"
    assert ending(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), stand_in) == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_a_defect_keeps_its_traceback(stand_in):
    with pytest.raises(ZeroDivisionError):
        ending(ZeroDivisionError(), stand_in)


def test_commands(capsys):
    assert main.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "train" in out and all(len(line) <= 80 for line in out.splitlines())
    assert main.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: no command trian: did you mean train?\n"
    assert main.main(["zzz"]) == 2
    assert f"it must be {', '.join(main.COMMANDS)}\n" in capsys.readouterr().err
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"effreason {effreason.__version__}\n"


def test_dashes_and_underscores_are_the_same_in_names_of_options():
    assert main.as_spelt(["--run.max-new-tokens=a-b", "--print-config", "--max_new_tokens", "a_b",
                          "-x_y", "--", "--a_b"]) == [
        "--run.max_new_tokens=a-b", "--print_config", "--max-new-tokens", "a_b", "-x_y", "--",
        "--a_b"]


@pytest.mark.parametrize(("where", "text", "line"), [
    ("effreason/sampling/engine.py", "RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 "
     "bytes.", "while sampling: the device's memory has no room (8 GiB); lower --rollout.slots"),
    ("effreason/rl/learner.py", "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used "
     "20.5G of 15.7G hbm.", "while updating the weights: the device's memory has no room (Used "
     "20.5G of 15.7G); lower --update.rows_per_micro_batch"),
    ("elsewhere.py", "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.20GiB.",
     "while working: the device's memory has no room (1.20GiB); lower --rollout.slots")])
def test_out_of_memory_is_one_line_that_says_what_to_change(stand_in, capsys, where, text, line):
    scope = {}
    code = f"def update(config):\n    raise RuntimeError({text!r})\n"
    exec(compile(code, f"/site/{where}", "exec"), scope)
    stand_in("loop", train=scope["update"])
    assert main.main(["train"]) == 3
    err = capsys.readouterr().err
    assert err.startswith(f"error: out of memory {line}") and err.count("\n") == 1


def test_quiet_leaves_out_notes_but_no_results_and_no_warnings(stand_in, capsys):
    def train(config):
        for line in ("a note", "warning: hot"):
            say(line, Console())
        print("results")
    stand_in("loop", train=train)
    assert main.main(["train", "-q"]) == 0
    assert capsys.readouterr().out == "warning: hot\nresults\n"
    assert main.main(["train"]) == 0
    assert capsys.readouterr().out == "a note\nwarning: hot\nresults\n"


def test_json_is_all_that_standard_output_gets(stand_in, capsys, tmp_path):
    def train(config):
        print("step 1")
        (tmp_path / "summary.json").write_text('{"steps": 1}\n')
        return tmp_path
    stand_in("loop", train=train)
    assert main.main(["train", "--json"]) == 0
    assert capsys.readouterr() == ('{"steps": 1}\n', "step 1\n")
    stand_in("evaluation.evaluate", evaluate_models=lambda *_: print("notes") or {"base": "tiny"})
    assert main.main(["evaluate", "--models", "tiny", "--json"]) == 0
    assert capsys.readouterr() == ('{"base": "tiny"}\n', "notes\n")


def test_a_missing_package_says_to_activate_the_environment(stand_in, capsys):
    assert ending(ModuleNotFoundError("", name="rich"), stand_in) == 1
    assert capsys.readouterr().err.startswith(
        f"error: the package rich is not installed in {sys.prefix}: activate the environment")
    with pytest.raises(ModuleNotFoundError):
        ending(ModuleNotFoundError("", name="effreason.nowhere"), stand_in)


@pytest.mark.parametrize(("argv", "fields"), [
    ([], []), (["--run.steps", "3"], ["--run.steps", "3"]),
    (["--dial"], ["--reward.alphas", train.ALPHAS]),
    (["--dial", "--run.steps", "3"], ["--reward.alphas", train.ALPHAS, "--run.steps", "3"]),
    (["--dial", "0,0.1"], ["--reward.alphas", "0,0.1"]),
    (["--dial=0,0.1"], ["--reward.alphas", "0,0.1"])])
def test_the_dial_is_a_field(argv, fields):
    assert train.dial_as_field(argv) == (fields, bool(argv) and argv[0].startswith("--dial"))


def help_of(command, capsys, monkeypatch):
    """What --help prints, which ends with exit code 0 and fits 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main.main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(len(line) <= 80 for line in text.splitlines())
    return text


@pytest.mark.parametrize("command", main.COMMANDS[2:])
def test_every_smaller_command_has_a_help_of_80_columns(capsys, monkeypatch, command):
    assert help_of(command, capsys, monkeypatch).startswith(f"usage: effreason {command} ")
    assert f"\n  {command} " in main.USAGE


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_names_every_field_and_fits_80_columns(capsys, monkeypatch, command):
    text = help_of(command, capsys, monkeypatch)
    assert text.startswith(f"usage: effreason {command} [--config FILE]")
    assert all(f"--{setting.field} " in text for setting in all_settings(Config))
    assert ("--models" in text) == (command == "evaluate")


def test_every_dependency_is_accounted_for(monkeypatch):
    described = {}
    monkeypatch.setattr(setuptools, "setup", described.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    needed = [*described["install_requires"], *sum(described["extras_require"].values(), [])]
    for package in {re.match(r"[\w-]+", line)[0] for line in needed}:
        assert re.search(rf"\b{package}\b", page), package
    assert described["version"] == effreason.__version__


@pytest.mark.parametrize(("given", "expected"), [
    ({}, {"XLA_CLIENT_MEM_FRACTION": "0.92"}),
    ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_CLIENT_MEM_FRACTION": "0.5"}),
    ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"})])
def test_a_gpu_gives_92_percent_of_its_memory_unless_the_user_says_otherwise(
        given, expected, monkeypatch):
    """JAX refuses to start if both names are set."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    importlib.reload(importlib.import_module("effreason.cli"))
    assert {name: value for name, value in os.environ.items() if "MEM_FRACTION" in name} == expected
