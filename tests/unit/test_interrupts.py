"""What Ctrl-C means, from the start of a job to its end."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from elastic.interrupts import Interrupts

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def test_where_nothing_runs_one_quits() -> None:
    signals = Interrupts()
    with pytest.raises(KeyboardInterrupt):
        signals.take(signal.SIGINT, None)


def test_the_first_asks_the_second_quits_the_third_changes_nothing() -> None:
    signals = Interrupts()
    signals.job_runs()
    assert not signals.asked
    signals.take(signal.SIGINT, None)
    assert signals.asked
    with pytest.raises(KeyboardInterrupt):
        signals.take(signal.SIGTERM, None)
    signals.take(signal.SIGINT, None)
    assert signals.asked


def test_a_job_that_begins_again_can_be_quit_until_it_runs() -> None:
    signals = Interrupts()
    signals.job_runs()
    signals.tidy_up()
    with signals.taken(), pytest.raises(KeyboardInterrupt):
        signals.take(signal.SIGINT, None)


def test_a_job_that_is_over_is_tidied_up_in_peace() -> None:
    signals = Interrupts()
    signals.job_runs()
    signals.tidy_up()
    signals.take(signal.SIGINT, None)
    assert not signals.asked


@pytest.mark.parametrize("number", SIGNALS)
def test_real_signals_are_taken_and_given_back(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    signals = Interrupts()
    with signals.taken():
        signals.job_runs()
        os.kill(os.getpid(), number)
        assert signals.asked
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_another_thread_takes_none() -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    seen = []

    def work() -> None:
        with Interrupts().taken():
            seen.append([signal.getsignal(one) for one in SIGNALS])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
