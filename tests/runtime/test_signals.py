"""Signals: noticed at the next check, once; a second one acts at once; then all is restored."""

import signal

import pytest

from effreason.runtime.errors import Interrupted
from effreason.runtime.signals import NOTICE, SIGNALS, Interrupts


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def test_without_a_signal_nothing_happens_and_the_handlers_come_back():
    before = handlers()
    with Interrupts() as interrupts:
        assert handlers() != before
        interrupts.check()
    assert handlers() == before


@pytest.mark.parametrize(("number", "name"),
                         [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_a_signal_waits_for_the_check(number, name):
    before = handlers()
    with pytest.raises(Interrupted) as caught, Interrupts() as interrupts:
        signal.raise_signal(number)
        assert handlers() == before             # the next one finds nobody listening
        interrupts.check()
    assert (caught.value.signum, caught.value.message) == (number, f"stopped by {name}")
    assert handlers() == before


def test_the_first_signal_says_at_once_what_a_second_one_does(capfd):
    with Interrupts():
        signal.raise_signal(signal.SIGTERM)
        err = capfd.readouterr().err
    assert err == NOTICE and err.count("\n") == 2 and "without saving" in err


def test_a_closed_terminal_hangs_up_twice_and_stops_once():
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)     # nohup ignores it
    try:
        with pytest.raises(Interrupted) as caught, Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
            interrupts.check()
        assert caught.value.message == "stopped by SIGHUP"
        signal.raise_signal(signal.SIGHUP)          # while the run reports that it is saved
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_hang_up_that_is_ignored_stays_so():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            interrupts.check()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_second_ctrl_c_acts_at_once():
    # a job in the background ignores it
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Interrupts():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, previous)


def test_the_signal_that_came_first_counts_and_every_check_says_so():
    heard = []
    previous = signal.signal(signal.SIGINT, lambda *_: heard.append(signal.SIGINT))
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            for _ in range(2):
                with pytest.raises(Interrupted) as caught:
                    interrupts.check()
                assert caught.value.signum == signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, previous)
    assert heard == [signal.SIGINT]
