"""What a result says it was made with."""

import json
import subprocess

import pytest

from effreason import provenance


def git(directory, *arguments):
    subprocess.run(["git", "-C", str(directory), "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True,
                   capture_output=True)


def test_the_environment_is_json_and_names_what_decides_verdicts():
    found = json.loads(json.dumps(provenance.environment()))
    assert found.keys() == {"effreason", "git_commit", "grader", "python", "jax", "jaxlib", "flax", "transformers",
                            "platform", "device", "device_count", "processes"}
    assert found["device"] == "cpu" and found["processes"] == 1 and found["device_count"] >= 1
    assert found["grader"].startswith(f"effreason {found['effreason']}, math-verify ")
    assert "None" not in found["grader"] and ", sympy 1." in found["grader"]


def test_the_commit_of_a_checkout(tmp_path):
    assert provenance.git_commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert provenance.git_commit(tmp_path) is None          # nothing is committed yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "a")
    commit = provenance.git_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "new").write_text("")
    assert provenance.git_commit(tmp_path) == commit        # what is not tracked is not of the code
    (tmp_path / "a").write_text("2")
    assert provenance.git_commit(tmp_path) == f"{commit}+dirty"
    (tmp_path / "package").mkdir()
    assert provenance.git_commit(tmp_path / "package") is None      # installed into somebody else's checkout


@pytest.mark.parametrize("error", [OSError, subprocess.TimeoutExpired("git", 1)])
def test_without_git_there_is_no_commit(tmp_path, monkeypatch, error):
    def fails(*arguments, **options):
        raise error

    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(subprocess, "run", fails)
    assert provenance.git_commit(tmp_path) is None


def test_a_package_that_is_not_there_has_no_version():
    assert provenance.version("no-such-package-anywhere") is None
