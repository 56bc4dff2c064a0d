"""A step's responses at the moment a signal stopped it: a resumed run finishes them, and draws none of them again."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effreason.runtime import processes
from effreason.runtime.errors import UserError
from effreason.runtime.files import disk
from effreason.types import FinishReason, Response

FILE = "unfinished.npz"             # in the run directory
LOGPROBS = ("logprobs", "sampling_logprobs", "model_logprobs")


def save(path: Path, step: int, responses: Sequence[Response]) -> None:
    """Writes finished and begun responses of a step, as a whole or not at all. Raises: UserError for a full disk.

    Process 0 alone writes: all have the same."""
    if not processes.is_primary():
        return
    table: dict[str, Any] = {
        "step": np.int64(step),
        "prompt": np.array([response.prompt for response in responses], np.int32),
        "sample": np.array([response.sample for response in responses], np.int32),
        "finish": np.array([response.finish or "" for response in responses], np.str_),
        "repeated": np.array([response.repeated for response in responses], bool),
        "length": np.array([len(response.tokens) for response in responses], np.int64),
        "tokens": _joined([response.tokens for response in responses], np.int32)}
    table |= {name: _joined([getattr(response, name) for response in responses], np.float32) for name in LOGPROBS}
    partial = path.with_name(path.name + ".partial")
    try:
        with disk(path):
            with partial.open("wb") as file:
                np.savez(file, **table)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path, step: int) -> list[Response]:
    """What was saved of this step; nothing where there is no file, or one of another step.

    With several processes it is process 0 that says whether there is a file, and which.
    Raises: UserError for a damaged file."""
    wanted = processes.broadcast("unfinished responses", lambda: digest(path))
    if wanted is None:
        return []
    if not processes.is_primary() and not processes.appears(lambda: digest(path) == wanted):
        raise UserError(f"{path}: process {processes.index()} does not see the file that process 0 has; the disk must "
                        "be one that all hosts share")
    try:
        with np.load(path, allow_pickle=False) as file:
            table = {name: file[name] for name in file.files}
        if table["step"] != step:
            return []
        ends = np.cumsum(table["length"])[:-1]
        pieces = {name: np.split(table[name], ends) for name in ("tokens", *LOGPROBS)}
        return [Response(prompt=int(table["prompt"][row]), sample=int(table["sample"][row]),
                         finish=FinishReason(table["finish"][row]) if table["finish"][row] else None, repeated=bool(table["repeated"][row]),
                         **{name: arrays[row] for name, arrays in pieces.items()})
                for row in range(len(table["length"]))]
    except Exception as error:      # what a damaged archive raises depends on where it is damaged
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}); remove it to generate step {step} "
                        "from its beginning") from error


def digest(path: Path) -> str | None:
    """The hash of a file; None where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _joined(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays])
