"""How several processes find one another and part; processes.py has what they do in between."""

import contextlib
import importlib
import os
import resource
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from effreason.runtime import errors, processes
from effreason.runtime.config import DistributedConfig
from effreason.runtime.errors import UserError
from effreason.runtime.stderr_relay import StderrRelay

ENVIRONMENT = {"coordinator_address": "JAX_COORDINATOR_ADDRESS", "processes": "JAX_NUM_PROCESSES",
               "process_id": "JAX_PROCESS_ID"}
# How many processes launchers have started: to train in each of them alone is never intended.
LAUNCHED = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
BROKEN_SECONDS = 20                 # after the heartbeat timeout, until JAX has said who is lost
# JAX errors with a local cause, not a lost process.
LOCAL_FAILURES = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")


@contextlib.contextmanager
def joined(settings: DistributedConfig) -> Iterator[None]:
    """Joins the other processes for the duration of a block, and leaves them at its end.

    With several processes an error in the block is printed here and becomes SystemExit. If the
    others do not end too, this process exits at once instead of waiting for them.
    Raises: UserError if the processes are not those of the configuration."""
    if settings.mode == "none":
        check_alone(settings)
        yield
        return

    processes.enter(_meet(settings))
    code = 0

    try:
        yield
    except errors.REPORTED as error:
        code = errors.report(error)
    except Exception as error:
        code = 1
        # If a collective has failed, another process is lost: JAX will soon end this one too, and
        # say which one it was.
        if (isinstance(error, jax.errors.JaxRuntimeError)
                and not str(error).startswith(LOCAL_FAILURES)):
            time.sleep(settings.heartbeat_timeout_seconds + BROKEN_SECONDS)
        traceback.print_exc()

    processes.leave(code)
    if code:
        raise SystemExit(code)


def check_alone(settings: DistributedConfig) -> None:
    """Raises UserError if anything says that there are more processes than this one."""
    counts = {"distributed.processes": settings.processes or 1}
    for name in LAUNCHED:
        text = os.environ.get(name) or "1"
        counts[name] = int(text) if text.isdigit() else 1

    for name, count in counts.items():
        if count > 1:
            raise UserError(f"distributed.mode is none, but {name} says that there are {count} "
                            "processes: each would train for itself; set distributed.mode to auto "
                            "or manual")


def resolve(settings: DistributedConfig) -> dict[str, Any]:
    """Returns address, number of processes and own number, from the fields or the environment.

    Raises: UserError if one is missing, or given twice with different values."""
    values: dict[str, Any] = {}

    for field, variable in ENVIRONMENT.items():
        configured, text = getattr(settings, field), os.environ.get(variable)
        is_number = field != "coordinator_address"
        if text is not None and is_number and not text.isdigit():
            raise UserError(f"{variable} must be a whole number, got {text!r}")
        exported = int(text) if text is not None and is_number else text
        if configured is not None and exported is not None and configured != exported:
            raise UserError(f"distributed.{field} is {configured}, but {variable} is {exported}")
        values[field] = exported if configured is None else configured

    if settings.mode == "auto":
        for field in ("coordinator_address", "process_id"):
            if getattr(settings, field) is not None:
                raise UserError(f"distributed.{field} is for distributed.mode manual, found mode "
                                "auto, in which JAX finds the others by itself")
        return values

    for field, variable in ENVIRONMENT.items():
        if values[field] is None:
            raise UserError(f"distributed.{field} or {variable} must be given if distributed.mode "
                            "is manual")
    if values["process_id"] >= values["processes"]:
        raise UserError(f"distributed.process_id must be below distributed.processes, "
                        f"{values['processes']}, got {values['process_id']}")
    return values


def service_state() -> Any:
    """Returns what JAX keeps of its distributed service; the client has the key-value store.

    It has no public name; Orbax reaches for it in the same way. Raises: UserError if this JAX has
    no such thing."""
    try:
        return importlib.import_module("jax._src.distributed").global_state
    except (ImportError, AttributeError):
        raise UserError(f"distributed: JAX {jax.__version__} has no key-value store at the known "
                        "place; install the version that docs/dependencies.md names") from None


def _meet(settings: DistributedConfig) -> processes.Group:
    """Starts JAX's distributed runtime, which nothing may have used before. Raises: UserError."""
    values = resolve(settings)
    # Without this a lost host makes all others write their memory to disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

    relay, manual = StderrRelay(), settings.mode == "manual"
    seconds = settings.initialization_timeout_seconds
    relay.tell({"missing": "distributed: not all"
                + (f" {values['processes']}" if values["processes"] else "")
                + f" processes were there within {seconds} s"
                + (f", this is process {values['process_id']}; they meet at "
                   f"{values['coordinator_address']}" if manual else "")})
    address = {"coordinator_address": values["coordinator_address"],
               "num_processes": values["processes"], "process_id": values["process_id"],
               "cluster_detection_method": "deactivate"} if manual else {}

    try:
        # Orbax would also ask JAX's own service for signals, with other counts of checks than ours.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            **address, initialization_timeout=seconds,
            heartbeat_timeout_seconds=settings.heartbeat_timeout_seconds,
            shutdown_timeout_seconds=int(processes.LEAVE_SECONDS))
        state = service_state()
        group = processes.Group(state.client, state.process_id, relay)
        relay.tell({"after": "start all of them again"})
        group.greet(values["processes"] or state.num_processes)
        return group
    except (ValueError, TypeError, RuntimeError, UserError) as error:  # JAX raises RuntimeErrors
        relay.tell({"quiet": True})
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()
        service_state().client = None       # or JAX would try again at exit
        relay.close()
        if isinstance(error, UserError):
            raise
        if not manual and isinstance(error, ValueError) and "defined" in str(error):
            raise UserError("distributed.mode auto: JAX finds no TPU slice, SLURM, Open MPI or "
                            "Kubernetes here; set distributed.mode manual") from None
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"distributed.mode {settings.mode}: JAX cannot start: {reason}") from None
