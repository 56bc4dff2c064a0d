"""How this program was called, so that the commands it prints can be run as they are printed."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def program(command: str) -> str:
    """Returns how to call a command, such as train, the way this process was called.

    That is `python train.py` if a script of the checkout was, `python -m effreason train`, the path
    of the console script if the shell would not find it by its name, otherwise `effreason train`.
    """
    called = Path(sys.argv[0])
    if called.name == "__main__.py" and called.parent.name == "effreason":
        return f"{_name('python', sys.executable)} -m effreason {command}"
    if called.name in ("train.py", "evaluate.py"):
        script = called.with_name(f"{command}.py")
        if script.is_file():
            return f"{_name('python', sys.executable)} {shlex.quote(str(script))}"
        called = Path(sys.executable).with_name("effreason")    # such as `report`: it has no script
    if called.name == "effreason" and called.is_file():
        return f"{_name('effreason', str(called))} {command}"
    return f"effreason {command}"


def _name(name: str, path: str) -> str:
    """Returns the name if the shell finds this program by it, otherwise the quoted path."""
    found = shutil.which(name)
    # Not resolved: a virtual environment's python is a link to the one it was made with.
    if found is not None and os.path.abspath(found) == os.path.abspath(path):
        return name
    here = os.path.relpath(path) if os.path.isabs(path) else path
    return shlex.quote(path if here.startswith("..") else here)
