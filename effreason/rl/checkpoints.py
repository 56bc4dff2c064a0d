"""Stage 7: the training state on disk, so that a resumed run equals one that was never stopped.

The step is the only data position: problems and sampled tokens are functions of (seed, step). Orbax
writes into a temporary folder and renames it, so that a crash or a full disk leaves the earlier
checkpoints as they were. Neither orbax nor tensorstore checks what it reads, so a checkpoint also
holds a digest of the state and one of the facts.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Shaped, UInt32
from orbax.checkpoint import v1 as ocp

from effreason.runtime import processes, sharding
from effreason.runtime.errors import UserError
from effreason.runtime.sharding import Shardings

METADATA_FILE = "_CHECKPOINT_METADATA"      # orbax's, in each complete checkpoint
STATE_DIGEST, FACTS_DIGEST = "state_digest", "facts_digest"     # among the facts


class Checkpoints:
    """The newest `keep` checkpoints of a run directory.

    With keep=None it only reads: another process may be writing."""

    def __init__(self, directory: Path, *, keep: int | None) -> None:
        self._directory, self._keep = directory.absolute(), keep
        _silence_stragglers()
        with _quiet():
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

    def path(self, step: int) -> Path:
        """Returns the directory of the checkpoint of a step."""
        return self._directory / str(step)

    def save(self, step: int, state: Any, *, facts: Mapping[str, Any]) -> None:
        """Saves the state after `step` steps, unless it is saved already.

        Args:
            facts: What belongs to the state but is not an array; JSON values.

        Raises:
            UserError: It cannot be written; earlier checkpoints are complete.
            FloatingPointError: The state has numbers that are not finite; nothing is written."""
        if processes.broadcast("newest checkpoint", lambda: self.latest) == step:
            return
        facts = dict(facts) | {STATE_DIGEST: digest(state, finite=True)}
        facts |= {FACTS_DIGEST: _facts_digest(facts)}
        try:
            with _quiet():
                self._checkpointer.save_checkpointables(step, {"state": state}, force=True,
                                                        custom_metadata=facts)
        # What a full disk raises depends on which of orbax's layers it reaches first.
        except Exception as error:
            self._checkpointer.reload()
            newest = "none" if self.latest is None else f"step {self.latest}"
            raise UserError(f"{self.path(step)}: the checkpoint cannot be written "
                            f"({_reason(error)}); the newest complete one is {newest}") from error

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints, the newest last."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def facts(self, step: int) -> dict[str, Any]:
        """Returns what was saved with the state of a step and is not an array.

        Raises:
            UserError: The checkpoint is damaged."""
        path = self.path(step)
        try:
            with _quiet():
                facts = self._checkpointer.checkpointables_metadata(step).custom_metadata
            if not facts:
                raise ValueError("it holds no facts besides the state")
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"{path}: the checkpoint cannot be read ({_reason(error)})") from error

        facts = dict(facts)
        expected = facts.pop(FACTS_DIGEST, None)
        if expected is None or STATE_DIGEST not in facts:
            raise UserError(f"{path}: the checkpoint is of a version of effreason that stored no "
                            "digests in it; this version cannot read it")
        _check_digest(path / METADATA_FILE, "the facts", expected, _facts_digest(facts))
        return facts

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Returns a state on its shardings, and the facts saved with it. All processes call it.

        Args:
            abstract_state: ShapeDtypeStructs with shardings.
            step: Of the checkpoint; None = the newest, which must exist.

        Raises:
            UserError: The checkpoint is damaged, or of another state."""
        step = self.latest if step is None else step
        assert step is not None, "there is a checkpoint"
        path, error, state, facts = self.path(step), None, None, dict[str, Any]()
        try:
            facts = self.facts(step)
            with _quiet():
                state = self._checkpointer.load_checkpointables(
                    step, {"state": abstract_state})["state"]
        except UserError as damage:
            error = str(damage)
        except (ValueError, KeyError, OSError) as damage:
            error = f"{path}: the checkpoint cannot be read ({_reason(damage)})"

        # One process may read what another cannot.
        if errors := [text for text in processes.all_gather("checkpoint", lambda: error) if text]:
            raise UserError(errors[0])
        _check_digest(path, "the state", facts[STATE_DIGEST], digest(state))
        return state, facts

    def newest_whole(self, abstract_state: Any, before: int) -> int | None:
        """Returns the step of the newest checkpoint before `before` that can be restored.

        All processes call it; None if there is none."""
        for step in reversed(processes.broadcast("checkpoints", lambda: self.steps)):
            with contextlib.suppress(UserError):
                if step < before:
                    self.restore(abstract_state, step)
                    return step
        return None

    def remove_left_overs(self) -> None:
        """Removes older checkpoints than the newest `keep`, and those whose deletion was cut off.

        Called once the newest one is restored."""
        def remove() -> None:
            *older, newest = self.steps
            whole = [step for step in older
                     if (self.path(step) / METADATA_FILE).exists()] + [newest]
            for step in {*older} - {*whole[-(self._keep or len(whole)):]}:
                shutil.rmtree(self.path(step), ignore_errors=True)

        processes.broadcast("older checkpoints", remove)
        self._checkpointer.reload()


def digest(tree: Any, *, finite: bool = False) -> str:
    """Returns what identifies a tree of arrays bit for bit, however they are sharded.

    Of each array the bits of every element are mixed with its position, one to one, and summed
    modulo 2^32. So a change of one element always changes the sum, and a change of several does but
    for one time in 2^32. A sum takes one pass over the array on its devices, little next to a save,
    and is the same on another mesh; a hash of the stored files would read them all again on one
    host, and could not see what goes wrong while they are written or read. All processes call it.

    Raises:
        FloatingPointError: A number is not finite and `finite` is set."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    # One after another: arrays that are kept in the hosts' memory do not all fit the devices.
    sums = [sharding.to_host(_sums(sharding.on_device(leaf))) for _, leaf in leaves]
    bad = [jax.tree_util.keystr(path, simple=True, separator=".")
           for (path, _), (_, infinite) in zip(leaves, sums, strict=True) if infinite]
    if finite and bad:
        raise FloatingPointError(f"non-finite {', '.join(bad[:3])}"
                                 + f" and {len(bad) - 3} more arrays" * (len(bad) > 3))
    return hashlib.sha256(np.stack(sums)[:, 0].astype("<u4").tobytes()).hexdigest()[:16]


@jax.jit
def _sums(leaf: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    """Returns the sum, and whether an element is not finite."""
    words = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(leaf, words).astype(jnp.uint32)
    position, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position, stride = position + along * np.uint32(stride), stride * bits.shape[axis] % 2**32

    # The finalizer of MurmurHash3: shifts and odd factors, each of which can be undone.
    mixed = bits ^ (position * np.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    infinite = (jnp.any(~jnp.isfinite(leaf)) if jnp.issubdtype(leaf.dtype, jnp.inexact)
                else jnp.bool_(False))
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), infinite.astype(jnp.uint32)])


def _facts_digest(facts: Mapping[str, Any]) -> str:
    # Keys that are numbers become text in JSON.
    text = json.dumps(json.loads(json.dumps(facts)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_digest(path: Path, what: str, expected: str, found: str) -> None:
    if found != expected:
        raise UserError(f"{path}: {what} changed after being saved (digest {found}, expected "
                        f"{expected})")


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


@functools.cache
def _silence_stragglers() -> None:
    """Hides what other reads say after one has failed, for good: they may say it later.

    Orbax waits for the first that fails, and closes the event loop of the others."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)      # of a coroutine
        of_orbax = code is not None and "orbax" in code.co_filename
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = hook


def _reason(error: BaseException) -> str:
    """Returns what went wrong, on one line; a failure of the file system by the system's name."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    return text[:200] or type(error).__name__
