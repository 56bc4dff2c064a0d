"""What a result says it was made with."""

import json
import subprocess
from pathlib import Path

import pytest

from effreason.runtime import provenance


def git(directory, *arguments):
    subprocess.run(["git", "-C", str(directory), "-c", "user.name=a", "-c", "user.email=a@b",
                    *arguments], check=True,
                   capture_output=True)


def test_the_environment_is_json_and_names_what_decides_verdicts():
    found = json.loads(json.dumps(provenance.environment()))
    assert found.keys() == {"effreason", "git_commit", "grader", "python", "jax", "jaxlib", "flax",
                            "transformers",
                            "platform", "device", "device_count", "processes"}
    assert found["device"] == "cpu" and found["processes"] == 1 and found["device_count"] >= 1
    assert found["grader"].startswith(
        f"effreason {found['effreason']}, grading {provenance.grading_sha256()}, math-verify ")
    assert "None" not in found["grader"] and ", sympy 1." in found["grader"]


def test_another_grader_of_the_same_version_is_told_apart(tmp_path):
    def digest(name, **files):
        (tmp_path / name).mkdir()
        for stem, content in files.items():
            (tmp_path / name / f"{stem}.py").write_text(content)
        return provenance.grading_sha256(tmp_path / name)

    found = [digest("one", a="x = 1", b=""), digest("edited", a="x = 2", b=""),
             digest("renamed", a="x = 1", c=""),
             digest("moved", a="", b="x = 1")]
    assert len(set(found)) == 4 and all(len(each) == 12 for each in found)
    assert digest("copy", a="x = 1", b="") == found[0]
    assert len(list((Path(provenance.__file__).parents[1] / "grading").glob("*.py"))) > 10


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
    # installed into somebody else's checkout
    assert provenance.git_commit(tmp_path / "package") is None


@pytest.mark.parametrize("error", [OSError, subprocess.TimeoutExpired("git", 1)])
def test_without_git_there_is_no_commit(tmp_path, monkeypatch, error):
    def fails(*arguments, **options):
        raise error

    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(subprocess, "run", fails)
    assert provenance.git_commit(tmp_path) is None


def test_a_package_that_is_not_there_has_no_version():
    assert provenance.version("no-such-package-anywhere") is None
