import threading

import pytest

from cdetr_jax.training.feed import Feed


class Numbers:
    """0, 1, 2, ... up to an end or an error."""

    def __init__(self, count, error=None):
        self._count, self._error = count, error
        self.given, self.closed = 0, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.given == self._count:
            raise self._error or StopIteration
        self.given += 1
        return self.given - 1

    def close(self):
        self.closed += 1


def _threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


def test_everything_comes_in_order_and_then_the_end():
    numbers = Numbers(5)
    feed = Feed(numbers, lambda number: number * number)
    assert list(feed) == [[0], [1], [4], [9], [16]]
    assert list(feed) == []
    assert numbers.closed
    assert not _threads()
    assert list(Feed(Numbers(0), str)) == []


def test_a_step_takes_several():
    assert list(Feed(Numbers(6), str, 3)) == [["0", "1", "2"], ["3", "4", "5"]]
    numbers, put = Numbers(9), []
    feed = Feed(numbers, lambda number: put.append(number) or number, 3)
    assert next(feed) == [0, 1, 2]
    feed.close()
    assert put in ([0, 1, 2], [0, 1, 2, 3, 4, 5])
    assert numbers.closed == 1


def test_one_batch_is_on_its_way_while_another_is_in_use():
    numbers, put = Numbers(9), []
    feed = Feed(numbers, lambda number: put.append(number) or number)
    for k in range(3):
        assert next(feed) == [k]
        feed._thread.submit(int).result()  # the feed's only thread has done all that it was asked for before
        assert put == list(range(k + 2))
    feed.close()
    assert numbers.closed == 1
    assert not _threads()


def test_an_error_shows_when_its_turn_comes():
    feed = Feed(Numbers(2, KeyError("third")), lambda number: number)
    assert [next(feed), next(feed)] == [[0], [1]]
    with pytest.raises(KeyError, match="third"):
        next(feed)
    feed.close()
    assert not _threads()
    with pytest.raises(StopIteration):
        next(feed)
