"""Stage 7: the training state on disk, so that a resumed run is the run that was never stopped.

The step is the whole data position: problems and sampled tokens are functions of (seed, step). Orbax writes into a
temporary folder and renames it, so a crash or a full disk leaves the checkpoints before it as they were.
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
from orbax.checkpoint import v1 as ocp

from effreason.runtime import processes
from effreason.runtime.errors import UserError


class Checkpoints:
    """The newest `keep` checkpoints of a run directory; with keep None it only reads: the run may be going on."""

    def __init__(self, directory: Path, *, keep: int | None) -> None:
        self._directory = directory.absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self._directory, preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=keep is not None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        # A save that failed is raised again here: it is known already, and must not stand before the error under way.
        with contextlib.nullcontext() if error is None else contextlib.suppress(Exception), _quiet():
            self._checkpointer.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: Any, *, facts: Mapping[str, Any]) -> None:
        """Saves the state after `step` steps, unless it is saved already.

        Args: facts, what belongs to the state and is no array: a table that JSON can hold.
        Raises: UserError when it cannot be written; the checkpoints before it are whole."""
        if processes.broadcast("newest checkpoint", lambda: self.latest) == step:
            return
        try:
            with _quiet():
                self._checkpointer.save_checkpointables(step, {"state": state}, force=True,
                                                        custom_metadata=dict(facts))
        except Exception as error:  # what a full disk raises depends on which of orbax's layers met it
            raise UserError(f"{self._directory / str(step)}: the checkpoint cannot be written ({_reason(error)}); "
                            f"the newest whole one is {self._newest_whole()}") from error

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints, the newest last."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def facts(self, step: int) -> dict[str, Any]:
        """What was saved with the state of a step and is no array. Raises: UserError for a damaged checkpoint."""
        try:
            with _quiet():
                facts = self._checkpointer.checkpointables_metadata(step).custom_metadata
            if not facts:
                raise ValueError("it holds no facts beside the state")
            return dict(facts)
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"{self._directory / str(step)}: the checkpoint cannot be read "
                            f"({_reason(error)})") from error

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """A state, put onto its shardings, and the facts saved with it.

        Args: abstract_state, ShapeDtypeStructs with shardings; step, of which checkpoint, None = the newest.
        Raises: UserError for a checkpoint that does not fit."""
        step = self.latest if step is None else step
        assert step is not None, "there is a checkpoint"
        try:
            with _quiet():
                loaded = self._checkpointer.load_checkpointables(step, {"state": abstract_state})
            return loaded["state"], self.facts(step)
        except (ValueError, KeyError, OSError) as error:
            path = self._directory / str(step)
            raise UserError(f"{path}: the checkpoint cannot be read ({_reason(error)})") from error

    def _newest_whole(self) -> str:
        self._checkpointer.reload()
        return "none" if self.latest is None else f"step {self.latest}"


def abstract(state: Any, targets: Any) -> Any:
    """ShapeDtypeStructs of a state (itself or abstract), with their shardings."""
    return jax.tree.map(lambda leaf, target: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target),
                        state, targets)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back the tracebacks that orbax's threads log of an error which is raised as well."""
    logger = logging.getLogger("absl")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _reason(error: BaseException) -> str:
    """What went wrong, on one line; of a failure of the file system what the system calls it, such as a full disk."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    return text[:200] or type(error).__name__
