"""Stage 7: the training state on disk, so that a resumed run equals one that was never stopped.

The step is the only data position: problems and sampled tokens are functions of (seed, step). Orbax
writes into a temporary folder and renames it, so that a crash or a full disk leaves the earlier
checkpoints as they were.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from jax.sharding import Sharding
from orbax.checkpoint import v1 as ocp

from effreason.runtime import processes
from effreason.runtime.errors import UserError
from effreason.runtime.sharding import Shardings


class Checkpoints:
    """The newest `keep` checkpoints of a run directory.

    With keep=None it only reads: another process may be writing."""

    def __init__(self, directory: Path, *, keep: int | None) -> None:
        self._directory = directory.absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=keep is not None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        # A failed save is raised again here: it must not hide the error that is being raised.
        hidden = contextlib.nullcontext() if error is None else contextlib.suppress(Exception)
        with hidden, _quiet():
            self._checkpointer.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, None if there is none."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: Any, *, facts: Mapping[str, Any]) -> None:
        """Saves the state after `step` steps, unless it is saved already.

        Args:
            facts: What belongs to the state but is not an array; JSON values.

        Raises:
            UserError: It cannot be written; earlier checkpoints are complete."""
        if processes.broadcast("newest checkpoint", lambda: self.latest) == step:
            return
        try:
            with _quiet():
                self._checkpointer.save_checkpointables(step, {"state": state}, force=True,
                                                        custom_metadata=dict(facts))
        # What a full disk raises depends on which of orbax's layers it reaches first.
        except Exception as error:
            self._checkpointer.reload()
            newest = "none" if self.latest is None else f"step {self.latest}"
            raise UserError(f"{self._directory / str(step)}: the checkpoint cannot be written "
                            f"({_reason(error)}); the newest complete one is {newest}") from error

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints, the newest last."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def facts(self, step: int) -> dict[str, Any]:
        """Returns what was saved with the state of a step and is not an array.

        Raises:
            UserError: The checkpoint is damaged."""
        try:
            with _quiet():
                facts = self._checkpointer.checkpointables_metadata(step).custom_metadata
            if not facts:
                raise ValueError("it holds no facts besides the state")
            return dict(facts)
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"{self._directory / str(step)}: the checkpoint cannot be read "
                            f"({_reason(error)})") from error

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Returns a state on its shardings, and the facts saved with it.

        Args:
            abstract_state: ShapeDtypeStructs with shardings.
            step: Of the checkpoint; None = the newest, which must exist.

        Raises:
            UserError: The checkpoint is damaged, or of another state."""
        step = self.latest if step is None else step
        assert step is not None, "there is a checkpoint"
        try:
            with _quiet():
                loaded = self._checkpointer.load_checkpointables(step, {"state": abstract_state})
            return loaded["state"], self.facts(step)
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"{self._directory / str(step)}: the checkpoint cannot be read "
                            f"({_reason(error)})") from error


def abstract(state: Any, shardings: Shardings) -> Any:
    """Returns the ShapeDtypeStructs of a state, which may be abstract itself, with shardings."""
    def leaf_struct(leaf: Any, target: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target)

    return jax.tree.map(leaf_struct, state, shardings)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the tracebacks that orbax's threads log for an error which is raised as well."""
    logger = logging.getLogger("absl")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _reason(error: BaseException) -> str:
    """Returns what went wrong, on one line; a failure of the file system by the system's name."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    return text[:200] or type(error).__name__
