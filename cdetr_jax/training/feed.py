"""Batches on their way to the devices while the step before them runs."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

Fed = TypeVar("Fed")


class _Batches(Protocol):
    def __iter__(self) -> Iterator[Any]: ...

    def close(self) -> None: ...


class Feed(Iterator[list[Fed]]):
    """What `put` makes of the batches that a step takes, one step ahead of their use: a double buffer.

    A thread waits for the batches and starts their transfer. What goes wrong there, and the end, shows when their
    turn comes, not before. Close it when done before the end.
    """

    def __init__(self, batches: _Batches, put: Callable[[Any], Fed], together: int = 1):
        """`batches` are the feed's from now on: it closes them. `together`: of them, for a step."""
        self._batches = batches
        self._iterator = iter(batches)
        self._put = put
        self._together = together
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._coming: Future | None = self._thread.submit(self._next)

    def __next__(self) -> list[Fed]:
        if self._coming is None:
            raise StopIteration
        coming, self._coming = self._coming, None
        fed = coming.result()
        if not fed:
            self.close()
            raise StopIteration
        self._coming = self._thread.submit(self._next)
        return fed

    def close(self) -> None:
        """Gives up the batch that was coming, and closes the batches."""
        self._coming = None
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._batches.close()

    def _next(self) -> list[Fed]:
        return [self._put(batch) for batch in itertools.islice(self._iterator, self._together)]
