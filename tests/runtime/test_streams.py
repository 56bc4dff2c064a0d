"""Standard streams that are closed, lose their reader, or cannot show every character."""

import os
import pty
import signal
import subprocess
import sys

import pytest

from effreason.runtime import streams
from effreason.runtime.errors import Interrupted
from effreason.runtime.signals import Interrupts

PRINTS = """
import sys, threading
from effreason.runtime import errors, signals, streams
errors.prepare()
try:
    {code}
    sys.stdout.flush()
except errors.REPORTED as error:
    sys.exit(errors.report(error))
print("end", file=sys.stderr)
"""
LOSES = "\n    ".join(("for _ in range(3):", "    print('x' * 100_000, flush=True)"))


def start(code, **keywords):
    return subprocess.Popen([sys.executable, "-c", PRINTS.format(code=code)], text=True, **keywords)


def run(code, redirection="", **variables):
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable,
         PRINTS.format(code=code)], text=True, capture_output=True, env={**os.environ, **variables})
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("redirection", [">&-", "<&- >&-"])
def test_a_closed_output_is_printed_to_in_silence(redirection):
    # A file that is opened later must not become standard output.
    code = "print('x'); assert open('/dev/null').fileno() > 2; sys.stdin.read()"
    assert run(code, redirection) == (0, "", "end\n")


def test_all_streams_may_be_closed():
    assert run("print('x'); print('y', file=sys.stderr)", "<&- >&- 2>&-") == (0, "", "")


@pytest.mark.parametrize("variables", [
    {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "ascii:strict"},
    {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_what_the_encoding_lacks_is_escaped(variables):
    assert run("print('5\\u03c0'); print('\\u03b1', file=sys.stderr)", **variables) == (
        0, "5\\u03c0\n", "\\u03b1\nend\n")


def test_a_reader_that_goes_away_ends_the_program_in_silence():
    child = start(LOSES, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == ("", 0)
    child.stderr.close()


def test_a_full_disk_is_one_line():
    assert run("print('x')", ">/dev/full") == (1, "", "error: [Errno 28] No space left on device\n")


def test_an_error_of_the_system_in_a_thread_is_one_line():
    code = "t = threading.Thread(target=open, args=('/nowhere',)); t.start(); t.join()"
    assert run(code) == (0, "", "error: /nowhere: No such file or directory\nend\n")


@pytest.mark.parametrize("of_terminal", [False, True])
def test_a_run_learns_that_nobody_reads_and_goes_on_to_its_next_check(of_terminal):
    code = "\n    ".join((
        "with signals.Interrupts(with_output=True) as interrupts:", "    input()",
        "    print('x', flush=True)", "    print('y', flush=True)", "    interrupts.check()"))
    reader, writer = pty.openpty() if of_terminal else os.pipe()
    child = start(code, stdin=subprocess.PIPE, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    os.close(reader)
    _, err = child.communicate("go\n")
    assert (child.returncode, err) == (
        141, "stopped because nobody reads standard output any more\n")


def test_the_hook_is_only_a_run_s():
    before = streams.on_lost_output
    with Interrupts():
        assert streams.on_lost_output is before
    with pytest.raises(Interrupted) as caught, Interrupts(with_output=True) as interrupts:
        streams.on_lost_output()
        interrupts.check()
    assert caught.value.signum == signal.SIGPIPE and streams.on_lost_output is before
