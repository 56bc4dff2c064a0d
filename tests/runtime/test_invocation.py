"""Commands that are printed can be run as they are printed."""

import sys

import pytest

from effreason.runtime import invocation


@pytest.mark.parametrize(("called", "on_path", "command"), [
    ("train.py", True, "python train.py"),
    ("train.py", False, "env/bin/python train.py"),
    ("a b/train.py", True, "python 'a b/train.py'"),
    ("env/bin/effreason", True, "effreason train"),
    ("env/bin/effreason", False, "env/bin/effreason train"),
    ("effreason/__main__.py", True, "python -m effreason train"),
    ("pytest", True, "effreason train"), ("-c", True, "effreason train"),
    ("gone/train.py", False, "env/bin/effreason train")])
def test_a_command_is_called_as_this_process_was(monkeypatch, tmp_path, called, on_path, command):
    for name in ("env/bin/python", "env/bin/effreason", "train.py", "a b/train.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "env/bin") if on_path else "/nowhere")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env/bin/python"))
    monkeypatch.setattr(sys, "argv", [called])
    assert invocation.program("train") == command
