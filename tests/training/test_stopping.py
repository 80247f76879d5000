"""Signals during a run."""

import os
import signal
import threading

import pytest

from cdetr_jax.training import stopping
from cdetr_jax.training.stopping import Stop, watch_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_left_to_the_system(number, capfd):
    before = signal.getsignal(number)
    with watch_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.ask()
        assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(number) == before
    assert f"{number.name}: saving what is trained, and stopping" in capfd.readouterr().err


def test_of_several_processes_all_stop_at_the_point_that_jax_names(monkeypatch):
    """Ctrl-C goes to JAX's handler of SIGTERM; every asking counts, and the answer stays."""
    asked, got = [], []

    def reached(count):
        asked.append(count)
        return count == 3

    monkeypatch.setattr(stopping, "are_several", lambda: True)
    monkeypatch.setattr(stopping.multihost_utils, "reached_preemption_sync_point", reached)
    monkeypatch.setattr(os, "kill", lambda process, number: got.append(number))
    before = signal.getsignal(signal.SIGTERM)
    with watch_signals() as stop:
        assert signal.getsignal(signal.SIGTERM) == before
        signal.raise_signal(signal.SIGINT)
        assert got == [signal.SIGTERM]
        assert not stop
        assert [stop.ask() for _ in range(5)] == [False, False, True, True, True]
        assert stop
    assert asked == [1, 2, 3]


def test_processes_wait_until_all_are_done_or_to_stop(monkeypatch):
    """In rounds that all of them take part in, so that they hear the same."""
    answers, asked = iter([False, False, True]), []
    monkeypatch.setattr(stopping, "on_all", lambda done: done and next(answers))
    monkeypatch.setattr(Stop, "ask", lambda self: bool(asked.append("ask")))
    assert Stop().wait(lambda: True)
    assert asked == ["ask"] * 2
    monkeypatch.setattr(Stop, "ask", lambda self: True)
    assert not Stop().wait(lambda: False)


def test_another_thread_notes_none():
    noted = []

    def watch():
        with watch_signals() as stop:
            noted.append(bool(stop))

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert noted == [False]
