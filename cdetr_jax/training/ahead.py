"""Programs that are compiled in threads, ahead of their use."""

import threading
from collections.abc import Callable, Iterable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic
from typing import Any, NamedTuple

from absl import logging

LOOK_S = 0.2  # how long a program is waited for, before a stop is looked for
TOLD_FROM_S = 1.0  # what takes less, such as a program that is found in the cache, is not worth a line


class Programs(NamedTuple):
    """Programs that are used together.

    Attributes:
      names: in the order of their use; programs of the same name are the same.
      programs: in the same order; `compiled` compiles one. May be traced as they are asked for.
    """

    names: tuple[str, ...]
    programs: Iterable[Any]


class Ahead:
    """Compiles in threads what will be called, while the caller goes on. Close it when done.

    JAX keeps what was compiled: the function's own call finds it.
    """

    def __init__(self, programs: Iterable[Programs], at_once: int, say: Callable[..., None] = logging.info):
        """Begins with the first ones.

        Args:
          programs: in the order of their first use.
          at_once: of how many of them one is compiled at the same time.
          say: logs a line; called from the threads.
        """
        programs = list(programs)
        self._coming = {name: Future() for each in programs for name in each.names}
        self._say, self._start, self._done = say, monotonic(), 0
        self._begun: set[str] = set()
        self._waited_for: set[str] = set()
        self._lock, self._closed = threading.Lock(), False
        if self._coming:
            say("compiling %d programs for all padded shapes, %d at once", len(self._coming), at_once)
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="compile")
        for each in programs:
            self._threads.submit(self._compile, each)

    def wait(self, names: Iterable[str], wait: Callable[[Callable[[], bool]], bool]) -> bool:
        """Waits until these programs are compiled; one of another name is left to its first call.

        Args:
          wait: calls what it is given until that says that a program is compiled, or returns False. It is called
            once for each program, in the order of the names, so that processes can wait for each other in it.
        Returns: False, if `wait` does.
        Raises: what tracing or compiling one of them raised.
        """
        for name in names:
            if (program := self._coming.get(name)) is None or name in self._waited_for:
                continue
            if not wait(lambda program=program: bool(futures.wait([program], timeout=LOOK_S).done)):
                return False
            program.result()
            self._waited_for.add(name)
        return True

    def close(self) -> None:
        """Gives up what was not begun. What was begun ends in its thread: a compilation cannot be interrupted."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, together: Programs) -> None:
        mine = set()
        try:
            for name, program in zip(together.names, together.programs, strict=True):
                if self._closed:
                    return
                if self._is_first(name):
                    mine.add(name)
                    start = monotonic()
                    program.compiled  # noqa: B018
                    self._coming[name].set_result(None)
                    self._tell(name, monotonic() - start)
        except Exception as error:  # told at once, although the run may not need it for hours
            left = [name for name in together.names if name in mine or self._is_first(name)]
            left = [name for name in left if not self._coming[name].done()]
            logging.warning("cannot compile %s: %s", ", ".join(left), str(error).partition("\n")[0])
            for name in left:
                self._coming[name].set_exception(error)

    def _is_first(self, name: str) -> bool:
        """Whether no other thread has begun with it."""
        with self._lock:
            is_new = name not in self._begun
            self._begun.add(name)
            return is_new

    def _tell(self, name: str, seconds: float) -> None:
        with self._lock:
            self._done += 1
            done, count, since_start = self._done, len(self._coming), monotonic() - self._start
        if done == count and since_start >= TOLD_FROM_S:
            self._say("all %d programs are compiled, in %.0f s", count, since_start)
        elif seconds >= TOLD_FROM_S and not self._closed:
            self._say("compiled %d of %d programs: %s, in %.0f s", done, count, name, seconds)
