"""The view of a run, and the script that completes the command line."""

import json
import subprocess

import pytest
import yaml

from effreason.cli import completion, main, watch


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "my run"
    directory.mkdir()
    (directory / "config.yaml").write_text(yaml.dump({"run": {"steps": 4}}))
    rows = [{"step": step, "rollout/tokens": 100.0 - 10 * step, "rollout/accuracy": 0.5,
             "time/step": 60.0} for step in range(3)]
    rows.insert(2, {"step": 2, "evaluation/tokens": 90.0, "evaluation/accuracy": 0.75})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.mark.parametrize("width", [40, 80])
def test_a_running_run_keeps_within_the_terminal(run, width):
    shown = watch.lines(watch.read(run), width)
    assert all(len(line) <= width for line in shown)
    text = " ".join(shown)
    assert "my run: running" in text and "step 3/4" in text and "100 → 80" in text
    assert "step takes 1:00" in text and "left 1:00" in text and "0.75 → 0.75" in text


def test_the_ends_of_a_run_are_told(run, capsys):
    (run / "stopped.txt").write_text("stopped by SIGTERM; continue with: effreason train\n")
    assert main.main(["watch", str(run)]) == 0
    out = capsys.readouterr().out
    assert "my run: stopped" in out and out.endswith("continue with: effreason train\n")
    (run / "stopped.txt").unlink()
    assert main.main(["watch", str(run), "--json"]) == 0
    view = json.loads(capsys.readouterr().out)
    assert (view["state"], view["done"], view["total"]) == ("running", 3, 4)
    assert view["curves"]["rollout/tokens"] == [100.0, 90.0, 80.0]


def test_a_run_that_has_only_begun_has_no_times(run):
    (run / "metrics.jsonl").unlink()
    view = watch.read(run)
    assert view.done == 0 and "step takes -, left -" in watch.lines(view, 80)[2]


def test_a_directory_that_is_no_run_is_a_clear_error(tmp_path, capsys):
    assert main.main(["watch", str(tmp_path)]) == 2
    assert "must be the directory of a run" in capsys.readouterr().err


@pytest.mark.parametrize(("values", "width", "blocks"), [
    ([1.0, 2.0, 3.0], 10, "▁▅█"), ([5.0, 5.0], 10, "▁▁"), ([0.0, 2.0, 4.0, 6.0], 2, "▁█"),
    ([], 10, "")])
def test_a_sparkline_has_the_means_of_neighbours(values, width, blocks):
    assert (watch.sparkline(values, width) if values else "") == blocks


def test_bash_completes_commands_and_options(capsys):
    assert main.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out + """
COMP_WORDS=(effreason tr); COMP_CWORD=1; _effreason; echo "${COMPREPLY[@]}"
COMP_WORDS=(effreason train --reward.alph); COMP_CWORD=2; _effreason; echo "${COMPREPLY[@]}"
"""
    done = subprocess.run(["bash", "-c", script], text=True, capture_output=True)
    assert (done.stdout, done.stderr) == ("train\n--reward.alpha --reward.alphas "
                                          "--reward.alpha_min --reward.alpha_max\n", "")


def test_each_command_has_its_options():
    assert {"--watts", "--json", "--reward.alpha"} <= {*completion.options_of("plan")}
    assert "--max-new-tokens" in completion.options_of("generate")
