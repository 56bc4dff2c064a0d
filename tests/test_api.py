"""The public names, and the examples of docs/api.md."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import effreason

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_every_public_name_is_imported_when_used_and_is_documented():
    stub = (ROOT / "effreason" / "__init__.pyi").read_text(encoding="utf-8")
    lines = [line for line in stub.splitlines() if line.startswith("from ")]
    assert len(lines) == len(effreason.__all__)
    for name in effreason.__all__:
        module = re.search(rf"^from (\S+) import {name} as {name}$", stub, re.MULTILINE)[1]
        assert getattr(effreason, name) is getattr(importlib.import_module(module), name)
        assert f"`{name}`" in PAGE and name in dir(effreason)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        effreason.nothing  # noqa: B018


def test_the_package_itself_imports_nothing_heavy():
    program = ("import sys, effreason; effreason.Config; dir(effreason);"
               "print({'jax', 'numpy', 'transformers'} & sys.modules.keys())")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.promotes("the examples run as in a user's program")
def test_the_examples_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 0, "rollout/tokens": 101.5}\n'
                                       '{"step": 1, "rollout/tokens": 93.25}\n')

    names, runner = {}, doctest.DocTestRunner()
    blocks = re.findall(r"```python\n(>>> .*?)```", PAGE, re.DOTALL)
    for number, block in enumerate(blocks):
        test = doctest.DocTestParser().get_doctest(block, names, f"block {number}", "api.md", 0)
        runner.run(test, clear_globs=False)
        names = test.globs
    assert runner.failures == 0 and len(blocks) == 9
