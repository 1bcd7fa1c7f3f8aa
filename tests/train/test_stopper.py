"""Signals: deferred while training, obeyed elsewhere, ignored by a process that has lost a rank."""

import os
import signal

import pytest

from floatline.errors import RankLostError
from floatline.train.stopper import Stopper


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_waits_while_training_and_a_second_does_not():
    with Stopper() as stopper, stopper.deferring():
        terminate()
        assert stopper.asked
        with pytest.raises(KeyboardInterrupt):
            terminate()


def test_elsewhere_it_ends_the_run_at_once():
    with Stopper() as stopper:
        with stopper.deferring():
            pass
        with pytest.raises(KeyboardInterrupt):
            terminate()
        assert not stopper.asked


def test_a_signal_does_not_cut_off_an_error_on_its_way_out():
    with Stopper() as stopper:
        with pytest.raises(ValueError, match="first"), stopper.deferring():
            raise ValueError("first")
        terminate()
        assert stopper.asked


def test_handlers_come_back_unless_a_rank_is_lost():
    before = signal.getsignal(signal.SIGTERM)
    with Stopper():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(RankLostError), Stopper():
        raise RankLostError("rank 1 is gone")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    terminate()  # and lives
