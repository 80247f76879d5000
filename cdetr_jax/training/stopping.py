"""Ctrl-C and SIGTERM during a training run: it ends after the step, with a checkpoint."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

STATUS_OF_A_SIGNAL = 128  # plus its number: what a shell shows of a process that it ended


class StoppedError(KeyboardInterrupt):
    """The user, or the machine's scheduler, ended a run early; all of it is saved.

    Attributes:
      exit_status: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, exit_status: int):
        super().__init__(message)
        self.exit_status = exit_status


class Stop:
    """Whether a run is to end after its step. Reads as true from the first signal on.

    Attributes:
      number: of the signal; None before one came.
    """

    number: int | None = None

    def __bool__(self) -> bool:
        return self.number is not None

    @property
    def exit_status(self) -> int:
        """What the process is to end with."""
        return STATUS_OF_A_SIGNAL + (self.number or 0)


@contextlib.contextmanager
def watch_signals() -> Iterator[Stop]:
    """Notes Ctrl-C and SIGTERM during the block; a second signal of the same kind ends the process at once.

    To be used by a run of one process: those of several would each end after another step. Outside of the main thread,
    where Python handles no signals, it notes none.
    """
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        stop.number = number
        signal.signal(number, signal.SIG_DFL)
        again = "Ctrl-C once more" if number == signal.SIGINT else "SIGTERM once more"
        text = f"\n{signal.Signals(number).name}: saving a checkpoint after this step ({again} to leave at once)\n"
        os.write(2, text.encode())  # a signal may come in the middle of a print, which must not print again

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
