"""The page of a run or a family."""

from collections.abc import Sequence
from pathlib import Path


def write(directory: Path, output: Path | None = None) -> Path:
    raise NotImplementedError


def run(argv: Sequence[str], prog: str) -> None:
    raise NotImplementedError
