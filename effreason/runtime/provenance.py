"""What a result was made with: versions, devices, and the commit of the code in a checkout."""

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
GRADERS = ("math-verify", "latex2sympy2-extended", "sympy")     # grades depend on these too
GIT_SECONDS = 5.0


def environment() -> dict[str, Any]:
    """Returns versions, devices and the commit, as JSON can hold them; devices of this process."""
    devices = jax.devices()
    return {"effreason": __version__, "git_commit": git_commit(), "grader": grader(),
            "python": platform.python_version(), **{name: version(name) for name in LIBRARIES},
            "platform": platform.platform(), "device": devices[0].device_kind,
            "device_count": len(devices), "processes": processes.count()}


def grader() -> str:
    """Identifies the grader: its code and the packages it uses, any of which may change a grade."""
    return ", ".join([f"effreason {__version__}", f"grading {grading_sha256()}",
                      *(f"{name} {version(name)}" for name in GRADERS)])


@functools.cache
def grading_sha256(directory: Path = Path(__file__).parents[1] / "grading") -> str:
    """Returns 12 digits of a hash of a package's modules: code may differ within a version."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)

    return digest.hexdigest()[:12]


def version(package: str) -> str | None:
    """Returns the version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit(directory: Path = Path(__file__).parents[2]) -> str | None:
    """Returns the commit of a checkout, with "+dirty" after changes; None without a checkout."""
    if not (directory / ".git").exists():       # installed, within the checkout of something else
        return None

    commit = _git(directory, "rev-parse", "HEAD")
    changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else commit + ("+dirty" if changed else "")


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True,
                              text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None

    return done.stdout.strip() if done.returncode == 0 else None
