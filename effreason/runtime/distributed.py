"""How several processes find one another, and how they part: see processes for what they do in between."""

import contextlib
import os
import resource
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the store has no public name; orbax reaches it in the same way

from effreason.runtime import processes
from effreason.runtime.config import DistributedConfig
from effreason.runtime.errors import UserError
from effreason.runtime.stderr_relay import StderrRelay

ENVIRONMENT = {"coordinator_address": "JAX_COORDINATOR_ADDRESS", "processes": "JAX_NUM_PROCESSES",
               "process_id": "JAX_PROCESS_ID"}
# Where launchers say how many they have started: to train in each of them alone is never what was meant.
LAUNCHED = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
BROKEN_SECONDS = 20                 # beyond the heartbeat timeout, until JAX has said who is lost
# Errors of JAX that no other process has caused.
OWN_FAILURES = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")


def run(settings: DistributedConfig, command: Callable[[], int]) -> int:
    """Meets the other processes, runs a command and parts from them.

    Returns: its exit code; where the others do not end too, the process ends here.
    Raises: UserError where the processes are not those of the configuration."""
    if settings.mode == "none":
        check_alone(settings)
        return command()
    processes.enter(_meet(settings))
    try:
        code = command()
    except Exception as error:
        # Where a collective has failed, another process is lost: JAX is about to end this one too, and to say which.
        if isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(OWN_FAILURES):
            time.sleep(settings.heartbeat_timeout_seconds + BROKEN_SECONDS)
        traceback.print_exc()
        code = 1
    processes.leave(code)
    return code


def check_alone(settings: DistributedConfig) -> None:
    """Raises UserError where something says that there are more processes than this one."""
    said = {"distributed.processes": settings.processes or 1}
    said |= {name: int(os.environ.get(name) or 1) for name in LAUNCHED if (os.environ.get(name) or "1").isdigit()}
    for name, number in said.items():
        if number > 1:
            raise UserError(f"distributed.mode is none, but {name} says that there are {number} processes: each would "
                            "train for itself; set distributed.mode to auto or manual")


def resolve(settings: DistributedConfig) -> dict[str, Any]:
    """Address, number of processes and number of this one, from the fields or the environment.

    Raises: UserError for what is missing, or said twice and not the same."""
    found: dict[str, Any] = {}
    for field, variable in ENVIRONMENT.items():
        stated, text = getattr(settings, field), os.environ.get(variable)
        if text is not None and field != "coordinator_address" and not text.isdigit():
            raise UserError(f"{variable} must be a whole number, got {text!r}")
        here = text if text is None or field == "coordinator_address" else int(text)
        if stated is not None and here is not None and stated != here:
            raise UserError(f"distributed.{field} is {stated}, but {variable} is {here}")
        found[field] = here if stated is None else stated
    if settings.mode == "auto":
        for field in ("coordinator_address", "process_id"):
            if getattr(settings, field) is not None:
                raise UserError(f"distributed.{field} is for distributed.mode manual, found mode auto, in which JAX "
                                "finds the others by itself")
        return found
    for field, variable in ENVIRONMENT.items():
        if found[field] is None:
            raise UserError(f"distributed.{field} must be given where distributed.mode is manual, or {variable}")
    if found["process_id"] >= found["processes"]:
        raise UserError(f"distributed.process_id must be below distributed.processes, {found['processes']}, got "
                        f"{found['process_id']}")
    return found


def _meet(settings: DistributedConfig) -> processes.Group:
    """Starts JAX's distributed runtime, which nothing may have touched yet. Raises: UserError."""
    found = resolve(settings)
    # A host that is lost would have all others write their memory to disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    words = StderrRelay()
    seconds = settings.initialization_timeout_seconds
    place = "" if settings.mode == "auto" else f", this is process {found['process_id']}; they meet at " + str(
        found["coordinator_address"])
    number = f" {found['processes']}" if found["processes"] else ""
    words.tell({"missing": f"distributed: not all{number} processes were there within {seconds} s{place}"})
    try:
        # Orbax would ask JAX's own service for signals too, with other counts of checks than ours.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            **({} if settings.mode == "auto" else {
                "coordinator_address": found["coordinator_address"], "num_processes": found["processes"],
                "process_id": found["process_id"], "cluster_detection_method": "deactivate"}),
            initialization_timeout=seconds, heartbeat_timeout_seconds=settings.heartbeat_timeout_seconds,
            shutdown_timeout_seconds=int(processes.LEAVE_SECONDS))
        group = processes.Group(distributed.global_state.client, distributed.global_state.process_id, words)
        words.tell({"after": "start all of them again"})
        group.greet(found["processes"] or distributed.global_state.num_processes)
        return group
    except (ValueError, TypeError, RuntimeError, UserError) as error:       # JAX's own errors are RuntimeErrors
        words.tell({"quiet": True})
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()
        distributed.global_state.client = None      # or JAX would try again at exit
        words.close()
        if isinstance(error, UserError):
            raise
        if settings.mode == "auto" and isinstance(error, ValueError) and "defined" in str(error):
            raise UserError("distributed.mode auto: JAX finds no TPU slice, SLURM, Open MPI or Kubernetes here; set "
                            "distributed.mode manual") from None
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"distributed.mode {settings.mode}: JAX cannot start: {reason}") from None
