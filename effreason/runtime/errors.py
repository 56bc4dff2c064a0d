"""The errors that the command line turns into one line and an exit code."""

import re
import sys
import threading
import traceback

from effreason.runtime import streams


class UserError(Exception):
    """Bad input. The message is one line: the field or file, what was expected, what was found.

    The command line prints `error: <message>` and exits with code 2, without a traceback."""


class Interrupted(Exception):
    """A signal told the run to stop, and the run has saved its state.

    The command line prints the message, which says how to resume, and exits with 128 + signum. With
    several processes only one has a message."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.message = message


LINE_CHARACTERS = 2000              # of a message; what is longer holds a user's long value
OUT_OF_MEMORY = 3                   # exit code
# Part of a "file:function" in a traceback, what the program is doing there, and what helps. The
# innermost function of the traceback that is listed decides.
STAGES = (
    ("effreason/sampling/", "sampling",
     "lower --rollout.slots or --rollout.memory_gib (--slots of effreason generate)"),
    ("rl/learner.py:update", "updating the weights",
     "lower --update.rows_per_micro_batch, or set --model.remat full, --update.offload_optimizer "
     "true or --adapter.rank 32"),
    ("rl/learner.py:", "computing log-probs", "lower --update.rows_per_micro_batch"),
    ("lm/hf/", "loading the weights",
     "use a larger --mesh.fsdp on more devices, or --kl.form none"),
    ("rl/checkpoints.py:", "handling a checkpoint", "set --update.offload_optimizer true"),
    ("loop.py:train_step", "updating the weights", "lower --update.rows_per_micro_batch"),
    ("loop.py:begin", "making the optimizer's state",
     "set --update.offload_optimizer true or --adapter.rank 32"),
)
OTHER_STAGE = ("working", "lower --rollout.slots and --update.rows_per_micro_batch")
# Errors that need no traceback; any other one is a defect.
REPORTED = (UserError, Interrupted, KeyboardInterrupt, FloatingPointError, OSError)


def report(error: BaseException) -> int:
    """Prints one of the REPORTED errors as one line on standard error; returns the exit code."""
    code, line = 1, f"error: {error}"
    if isinstance(error, UserError):
        code = 2
    elif isinstance(error, Interrupted):
        code, line = 128 + error.signum, error.message
    elif isinstance(error, KeyboardInterrupt):
        code, line = 130, "interrupted"
    elif isinstance(error, OSError):
        named = error.filename is not None and error.strerror
        text = f"{error.filename}: {error.strerror}" if named else str(error)
        line = f"error: {' '.join(text.split())}"

    return _end(line, code)


def report_memory(error: BaseException) -> int | None:
    """Prints one line if the error says that memory ran out; returns the exit code, else None.

    The line has the stage, what did not fit, and the settings to change."""
    text = " ".join(str(error).split())
    if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text):
        return None

    places = [f"{frame.filename.replace(chr(92), '/')}:{frame.name}"
              for frame in traceback.extract_tb(error.__traceback__)]
    stage, settings = next(((stage, settings) for place in reversed(places)
                            for part, stage, settings in STAGES if part in place), OTHER_STAGE)
    needed = re.search(r"Used [\d.]+\w+ of [\d.]+\w+|(?:allocat\w*) ([\d.,]+ ?\w+)", text)
    whose = "the host's memory" if isinstance(error, MemoryError) else "the device's memory"
    size = "" if needed is None else f" ({_readable(needed[1] or needed[0])})"
    return _end(f"error: out of memory while {stage}: {whose} has no room{size}; {settings}; "
                "docs/out-of-memory.md has more", OUT_OF_MEMORY)


def _readable(size: str) -> str:
    """Returns a size with a number of bytes in GiB or MiB: "8589934592 bytes" is 8 GiB."""
    number = re.fullmatch(r"([\d,]+) bytes", size)
    if number is None:
        return size
    mib = int(number[1].replace(",", "")) / 2**20
    return f"{mib / 1024:,.3g} GiB" if mib >= 1000 else f"{mib:,.3g} MiB"


def _end(line: str, code: int) -> int:
    """Prints a line, shortened if it holds a long value; returns the code."""
    if len(line) > LINE_CHARACTERS:
        line = f"{line[: LINE_CHARACTERS - 150]} ... {line[-140:]}"
    if line:
        print(line, file=sys.stderr)
    return code


def prepare() -> None:
    """Prepares a program's standard streams, and its threads to end as it does: with one line."""
    streams.prepare()
    threading.excepthook = _report_of_thread


def _report_of_thread(arguments: threading.ExceptHookArgs) -> None:
    if isinstance(arguments.exc_value, REPORTED):
        report(arguments.exc_value)
    else:
        threading.__excepthook__(arguments)
