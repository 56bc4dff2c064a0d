"""The source distribution and the wheel: all that a run needs, built from one another."""

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

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


def test_the_metadata_and_the_page_of_an_index(built):
    _, wheel = built
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(wheel.read(name))
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {metadata['Version']}\n" in citation
    assert f'- name: "{metadata["Author"]}"' in citation
    assert metadata["License-Expression"] == "Apache-2.0"

    # An index shows the README alone: no link leads from there to a file of the repository.
    page = metadata.get_payload(decode=True).decode()
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)]+)\)", page))
    assert "docs/configuration.md explains each field" in page
    assert "(`docs/tiny_report.png`)" in page
