"""What `effreason dial`, and other commands that take an alpha, refuse before anything starts."""

import dataclasses
import subprocess
import sys

import pytest

from effreason.cli import main
from effreason.runtime import config as configuration
from effreason.runtime.config import AdapterConfig, Config, RewardConfig


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directories of runs that hold their configurations alone."""
    directory = tmp_path_factory.mktemp("runs")
    dial = Config(adapter=AdapterConfig(rank=4), reward=RewardConfig(alphas="0,0.1,0.4"))
    unmeasured = dataclasses.replace(dial, evaluation=dataclasses.replace(
        dial.evaluation, problems=0))
    for name, config in (("dial", dial), ("plain", Config()), ("unmeasured", unmeasured)):
        (directory / name).mkdir()
        configuration.save(config, directory / name / "config.yaml")
    return directory


TARGET = ["--target-tokens", "0.5"]
GENERATE = ["generate", "--prompt", "1+1", "--model"]
EVALUATE = ["evaluate", "--models"]


@pytest.mark.parametrize(("argv", "message"), [
    (["dial", "RUNS/dial"], "the following arguments are required: --target-tokens"),
    (["dial", "RUNS/dial", "--target-tokens", "1.5"],
     "--target-tokens: invalid number in (0, 1) value: '1.5'"),
    (["dial", "RUNS/dial", *TARGET, "--max-accuracy-drop", "-1"],
     "--max-accuracy-drop: invalid number >= 0 value: '-1'"),
    (["dial", "RUNS/plain", *TARGET], "RUNS/plain: must be a run with a dial, trained with "
     "reward.alphas; this one was trained with alpha 0.1 alone"),
    (["dial", "RUNS/unmeasured", *TARGET],
     "RUNS/unmeasured: has no evaluation set to search on, its evaluation.problems is 0"),
    (["dial", "RUNS", *TARGET], "RUNS: must be the directory of a run, it holds no config.yaml"),
    (["dial", "RUNS/dial", *TARGET, "--output", "RUNS/plain"],
     "--output: RUNS/plain exists already, nothing is overwritten"),
    (["dial", "RUNS/dial", *TARGET], "RUNS/dial: has no checkpoint"),
    (["export", "RUNS/dial@0.5", "--output", "RUNS/new"],
     "RUNS/dial: the dial was trained for alphas from 0 to 0.4, got 0.5"),
    (["export", "RUNS/dial@0.2", "--alpha", "0.1", "--output", "RUNS/new"],
     "--alpha: RUNS/dial@0.2 names an alpha already"),
    ([*GENERATE, "RUNS/dial@0.5"],
     "RUNS/dial: the dial was trained for alphas from 0 to 0.4, got 0.5"),
    ([*GENERATE, "RUNS/dial", "--alpha", "0.5"],
     "RUNS/dial: the dial was trained for alphas from 0 to 0.4, got 0.5"),
    ([*GENERATE, "RUNS/dial", "--alpha", "2"],
     "--alpha: invalid number in [0, 1) value: '2'"),
    ([*GENERATE, "RUNS/dial@2"], "--model: the alpha of RUNS/dial must be a number in [0, 1), such "
     "as RUNS/dial@0.2, got '2'"),
    ([*EVALUATE, "RUNS/dial@-0.1"], "models: the alpha of RUNS/dial must be a number in [0, 1), "
     "such as RUNS/dial@0.2, got '-0.1'"),
    ([*EVALUATE, "RUNS/plain@0.2"], "RUNS/plain: an alpha can be chosen for a run with a dial, "
     "reward.alphas; this one was trained with alpha 0.1 alone"),
    ([*GENERATE, "tiny", "--alpha", "0.2"], "--alpha is for a run with a dial, a directory with a "
     "config.yaml; --model is tiny"),
    ([*GENERATE, "RUNS/dial@0.2"], "RUNS/dial: has no checkpoint")])
def test_mistakes_are_one_line(runs, capsys, argv, message):
    assert main.main([part.replace("RUNS", str(runs)) for part in argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {message.replace('RUNS', str(runs))}\n")


@pytest.mark.parametrize("argv", [["dial", "RUNS/plain", *TARGET], [*GENERATE, "RUNS/dial@0.5"],
                                  [*EVALUATE, "RUNS/dial@0.5"]])
def test_mistakes_are_told_before_jax_is_imported(runs, argv):
    program = ("import sys; from effreason.cli.main import main; code = main(sys.argv[1:]);"
               "assert 'jax' not in sys.modules; sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", program,
                           *(part.replace("RUNS", str(runs)) for part in argv)],
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: ")
