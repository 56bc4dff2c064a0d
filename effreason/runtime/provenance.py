"""What a result was made with: versions, devices, and the commit of the code where it is a checkout."""

import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from effreason import __version__
from effreason.runtime import processes

LIBRARIES = ("jax", "jaxlib", "flax", "transformers")
GRADERS = ("math-verify", "latex2sympy2-extended", "sympy")    # what verdicts depend on beside our own code
GIT_SECONDS = 5.0


def environment() -> dict[str, Any]:
    """Versions, devices and the commit; what JSON can hold. With several processes that of this one."""
    devices = jax.devices()
    return {"effreason": __version__, "git_commit": git_commit(), "grader": grader(),
            "python": platform.python_version(), **{name: version(name) for name in LIBRARIES},
            "platform": platform.platform(), "device": devices[0].device_kind, "device_count": len(devices),
            "processes": processes.count()}


def grader() -> str:
    """The grader, its code and the packages that decide with it: another version of one may give other verdicts."""
    return ", ".join([f"effreason {__version__}", f"grading {grading_sha256()}",
                      *(f"{name} {version(name)}" for name in GRADERS)])


@functools.cache
def grading_sha256(directory: Path = Path(__file__).parents[1] / "grading") -> str:
    """The first 12 digits of a hash of the modules of a package: between two versions its code may differ too."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def version(package: str) -> str | None:
    """The version of an installed package, None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit(directory: Path = Path(__file__).parents[2]) -> str | None:
    """The commit of a checkout, with "+dirty" where tracked files differ from it; None where it is no checkout."""
    if not (directory / ".git").exists():       # an installed package inside somebody else's checkout
        return None
    commit = _git(directory, "rev-parse", "HEAD")
    changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else commit + ("+dirty" if changed else "")


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        ended = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True,
                               timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout.strip() if ended.returncode == 0 else None
