"""Signals during a run."""

import os
import signal
import threading

import pytest

from cdetr_jax.training.stopping import watch_signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_noted_and_the_second_left_to_the_system(number, status, capfd):
    before = signal.getsignal(number)
    with watch_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.exit_status == status
        assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(number) == before
    assert f"{number.name}: saving a checkpoint after this step" in capfd.readouterr().err


def test_another_thread_notes_none():
    noted = []

    def watch():
        with watch_signals() as stop:
            noted.append(bool(stop))

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert noted == [False]
