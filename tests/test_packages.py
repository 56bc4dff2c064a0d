"""The source distribution and the wheel: all that a run needs, built from one another."""

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

import effreason

ROOT = Path(__file__).parents[1]
BUILD = ("import sys; from setuptools import build_meta;"
         "print(getattr(build_meta, sys.argv[1])(sys.argv[2]))")


def build(kind, tree, output):
    done = subprocess.run([sys.executable, "-c", BUILD, kind, str(output)], cwd=tree,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}


def metadata(wheel):
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The unpacked source distribution, and the wheel built from it."""
    directory = tmp_path_factory.mktemp("packages")
    with tarfile.open(build("build_sdist", ROOT, directory)) as archive:
        archive.extractall(directory, filter="data")
    source = directory / f"effreason-{effreason.__version__}"
    return source, zipfile.ZipFile(build("build_wheel", source, directory))


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(built):
    _, wheel = built
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == {*(f"effreason/{name}" for name in files(ROOT / "effreason")),
                     *(f"effreason/configs/{name}" for name in files(ROOT / "configs"))}


def test_the_source_distribution_has_what_the_documents_name(built):
    source, _ = built
    for name in ("train.py", "evaluate.py", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE",
                 "CONTRIBUTING.md"):
        assert (source / name).read_bytes() == (ROOT / name).read_bytes()
    for folder in ("configs", "docs", "launch", "tests"):
        assert files(source / folder) == files(ROOT / folder)


@pytest.mark.parametrize("python", ["3.11.7", "3.12.1", "3.13.0"])
@pytest.mark.parametrize("extra", ["", "test", "docs", "tpu", "cuda12", "cuda13"])
def test_the_pinned_versions_are_allowed_and_come_from_anywhere(built, python, extra):
    _, wheel = built
    machine = {**default_environment(), "python_full_version": python, "extra": extra,
               "python_version": python.rpartition(".")[0]}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]    # no URL, no option
    chosen = {re.sub("[-_.]+", "-", pin.name.lower()): str(pin.specifier).removeprefix("==")
              for pin in pins if pin.marker is None or pin.marker.evaluate(machine)}

    needed = [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist")]
    for one in needed:
        if one.marker is None or one.marker.evaluate(machine):
            name = re.sub("[-_.]+", "-", one.name.lower())
            assert one.specifier.contains(chosen[name], prereleases=True), one


@pytest.mark.parametrize(("jax", "flax", "allowed"), [
    ("0.12.0.1", "0.12.12", True), ("0.11.2", "0.12.12", True), ("0.11.1", "0.12.12", False),
    ("0.11.2", "0.12.9", False), ("0.12.0.1", "0.12.8", False)])
def test_versions_that_fail_together_are_not_installed(built, jax, flax, allowed):
    machine = {**default_environment(), "python_version": "3.12", "extra": ""}
    needed = [Requirement(line) for line in metadata(built[1]).get_all("Requires-Dist")]
    versions = {"jax": jax, "flax": flax}
    assert allowed == all(one.specifier.contains(versions[one.name]) for one in needed
                          if one.name in versions and (one.marker is None
                                                       or one.marker.evaluate(machine)))


def test_the_metadata_and_the_page_of_an_index(built):
    _, wheel = built
    described = metadata(wheel)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {described['Version']}\n" in citation
    assert f'- name: "{described["Author"]}"' in citation
    assert described["License-Expression"] == "Apache-2.0"

    # An index shows the README alone: no link leads from there to a file of the repository.
    page = described.get_payload(decode=True).decode()
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)]+)\)", page))
    assert "docs/configuration.md explains each field" in page
    assert "(`docs/tiny_report.png`)" in page
