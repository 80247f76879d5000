"""Ctrl-C and SIGTERM during a training run: it ends between two steps, with a checkpoint."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from jax.experimental import multihost_utils

from cdetr_jax.training.processes import STOPPED, are_several, on_all


class StoppedError(KeyboardInterrupt):
    """The user, or the machine's scheduler, ended a run early; all of it is saved."""

    exit_status = STOPPED


class Stop:
    """Whether a run is to end after its step.

    Attributes:
      told: whether a signal has come; of several processes, whether all have got to the point where they stop.
    """

    told = False

    def __init__(self) -> None:
        self._asked = 0

    def __bool__(self) -> bool:
        return self.told

    def ask(self) -> bool:
        """Asks anew. Several processes ask at the same points of a run, and all hear the same.

        A signal to one of them is known to the others a second or two later.
        """
        if are_several() and not self.told:
            self._asked += 1
            self.told = multihost_utils.reached_preemption_sync_point(self._asked)
        return self.told

    def wait(self, is_done: Callable[[], bool]) -> bool:
        """Waits until something is done on all processes, which all come here.

        Args:
          is_done: itself waits for a moment before it says no.
        Returns: False on all of them, if they are to stop before that.
        """
        while not on_all(is_done()):
            if self.ask():
                return False
        return True


@contextlib.contextmanager
def watch_signals() -> Iterator[Stop]:
    """Notes Ctrl-C and SIGTERM during the block; a second Ctrl-C ends the process at once, and so does a second
    SIGTERM where the process is alone.

    Of several processes JAX handles SIGTERM, which tells the others, and Ctrl-C counts as SIGTERM. Outside of the main
    thread, where Python handles no signals, a process that is alone notes none.
    """
    stop, several = Stop(), are_several()

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            stop.told = True
        again = "Ctrl-C once more" if number == signal.SIGINT else "SIGTERM once more"
        text = f"\n{signal.Signals(number).name}: saving what is trained, and stopping ({again} to leave at once)\n"
        os.write(2, text.encode())  # a signal may come in the middle of a print, which must not print again

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python
