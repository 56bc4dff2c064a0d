"""One of several processes, for test_processes.py: two_processes.py SCENARIO [ARGUMENTS]"""

import itertools
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from effreason import loop
from effreason.cli import main as cli
from effreason.runtime import config as configuration
from effreason.runtime import distributed, errors, processes, sharding
from effreason.runtime.errors import Interrupted, UserError
from effreason.runtime.signals import Interrupts

SIGNALLED_AT = 5                    # the check before which a signal comes to process 1


def collective():
    """Something that no process can do alone."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    rows = sharding.to_device(np.arange(jax.device_count(), dtype=np.float32), split)
    return jax.jit(lambda rows: rows.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(
        rows)


def decisions(directory):
    """What process 0 says holds for all, and an error in one is an error in all."""
    here = processes.index()
    assert processes.count() == jax.process_count() == 2 and processes.is_primary() == (here == 0)
    assert processes.broadcast("name", lambda: {"from": here}) == {"from": 0}
    assert processes.all_gather("numbers", lambda: [here, "\udc80", None, 1.5]) == [
        [process, "\udc80", None, 1.5] for process in (0, 1)]

    def fails(number, error):
        if here == number:
            raise error
        return here

    for number, failing in itertools.product((0, 1), (processes.broadcast, processes.all_gather)):
        if number == 0 or failing is processes.all_gather:
            with pytest.raises(UserError, match="grade.workers: too few"):
                failing("bad input",
                        lambda number=number: fails(number, UserError("grade.workers: too few")))
    expected = (OSError, "worn out") if here else (UserError, r"process 1 on .*: OSError: worn out")
    with pytest.raises(expected[0], match=expected[1]):
        processes.all_gather("broken", lambda: fails(1, OSError("worn out")))
    pattern = "process .* is at '.*', but .* is at '.*'; all must have the same code"
    with pytest.raises(UserError, match=pattern):
        processes.all_gather("one" if here else "another", lambda: here)
    processes.check_same({"data.path": "one"})
    pattern = "data.path: process 1.* has 1, process 0.* has 0; all must have the same"
    with pytest.raises(UserError, match=pattern):
        processes.check_same({"data.path": str(here)})
    processes.check_shared(directory, "run.directory")
    left = processes.all_gather("left", lambda: [path.name for path in directory.iterdir()])
    assert left[0] == []
    apart = directory / str(here)
    apart.mkdir()
    assert processes.appears(lambda: (directory / str(1 - here)).exists())


def crossings():
    """Whole arrays on every host, their shards on the devices, and back."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    table, number = np.arange(64, dtype=np.float32).reshape(8, 8), np.int32(3)
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor"))
    with jax.transfer_guard("disallow"):
        rows, alone = sharding.to_device((table, number), (split, sharding.sharding(mesh)))
        # one sharding for a tree
        both = sharding.to_device({"a": table, "b": table.T.copy()}, split)
    assert not rows.is_fully_addressable and rows.sharding == split and alone.is_fully_replicated
    back, again, trees = sharding.to_host((rows, alone, both))
    np.testing.assert_array_equal(back, table)
    np.testing.assert_array_equal(trees["b"], table.T)
    assert again == 3 and isinstance(back, np.ndarray)


def together(directory):
    """Decisions, crossings, and a signal to one of them at which both stop."""
    decisions(Path(directory))
    crossings()
    checks = 0
    try:
        with Interrupts() as interrupts:
            while True:
                checks += 1
                if checks == SIGNALLED_AT and not processes.is_primary():
                    os.kill(os.getpid(), signal.SIGINT)
                processes.all_gather("step", lambda: 0)       # none gets far ahead of the others
                interrupts.check()
    except Interrupted:
        print("stopped at check", checks, flush=True)
        raise


def lost(which, signal_number, busy):
    """One process is gone while the other waits, in a collective or for a value."""
    sharding.to_host(collective())
    if processes.index() == int(which):
        print("ends at", time.time(), flush=True)
        os.kill(os.getpid(), int(signal_number))
    while True:
        if busy == "collective":
            sharding.to_host(collective())
        else:
            processes.all_gather("what never comes", lambda: 1)


def failed():
    """One process ends with an error of its own while the other waits for it."""
    if processes.index() == 1:
        raise UserError("the disk of process 1 is full")
    processes.all_gather("what never comes", lambda: 1)


def slowed_after_a_signal():
    """Sends a signal to process 1 at one of its checks, and slows the checks after it."""
    checks, agree_on_signal = itertools.count(1), processes.agree_on_signal

    def slow(received):
        number = next(checks)
        if number == 3 * SIGNALLED_AT and not processes.is_primary():
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3 if number >= 3 * SIGNALLED_AT else 0.0)
        return agree_on_signal(received)

    processes.agree_on_signal = slow


def slow_to_export():
    """Makes process 0 write the model for longer than an ended process waits for the others."""
    export = loop.export

    def slow(*arguments):
        export(*arguments)
        processes.LEAVE_SECONDS = 4.0
        time.sleep(12.0 if processes.is_primary() else 0.0)

    loop.export = slow


def main():
    scenario, *rest = sys.argv[1:]
    if scenario in ("train", "evaluate"):
        return cli.main([scenario, *rest])
    if scenario == "stopped":
        slowed_after_a_signal()
        slow_to_export()
        return cli.main(["train", *rest])
    settings = configuration.DistributedConfig(
        mode="manual", initialization_timeout_seconds=int(os.environ.get("INITIALIZATION", 60)),
        heartbeat_timeout_seconds=int(os.environ.get("HEARTBEAT", 5)))
    command = {"together": together, "lost": lost, "failed": failed}[scenario]
    try:
        with distributed.joined(settings):
            command(*rest)
    except UserError as error:
        return errors.report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
