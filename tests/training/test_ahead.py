"""Each program once, in order, before it is needed; what goes wrong shows where it is, and a stop is not waited for.

That a call finds what was compiled is tested with the trainer's programs, in test_step.py.
"""

import threading

import pytest

from cdetr_jax.training import ahead
from cdetr_jax.training.ahead import Ahead, Programs


class Program:
    """Notes that it is compiled; waits there if it is told to, or fails."""

    def __init__(self, name, order, error=None, until=None):
        self.name, self.order, self.error, self.until = name, order, error, until

    @property
    def compiled(self):
        self.order.append(self.name)
        if self.until:
            assert self.until.wait(60)
        if self.error:
            raise self.error


def to_its_end(is_done):
    while not is_done():
        pass
    return True


@pytest.fixture
def order():
    """Names, as they were compiled."""
    return []


@pytest.fixture
def make(order):
    """Makes an `Ahead` of groups of programs' names; they are closed at the end."""
    made = []

    def make(*groups, say=lambda *_: None, **settings):
        programs = [
            Programs(tuple(group), [Program(name, order, **settings.get(name, {})) for name in group])
            for group in groups
        ]
        made.append(Ahead(programs, 1, say))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_each_program_is_compiled_once_in_the_order_of_its_use(make, order):
    made = make(["forward 4x6", "update"], ["forward 6x4", "update"])
    assert made.wait(["forward 6x4", "update", "another, which is left to its call"], to_its_end)
    assert order == ["forward 4x6", "update", "forward 6x4"]


def test_an_error_is_told_at_once_and_raised_where_the_program_is_needed(make, monkeypatch):
    warnings = []
    monkeypatch.setattr(ahead.logging, "warning", lambda text, *values: warnings.append(text % values))
    made = make(["a"], ["b"], ["c"], b={"error": RuntimeError("no room")})
    assert made.wait(["a", "c"], to_its_end)
    assert warnings == ["cannot compile b: no room"]
    with pytest.raises(RuntimeError, match="no room"):
        made.wait(["a", "b"], to_its_end)


def test_an_error_of_the_tracing_is_raised_too(make):
    def programs():
        yield Program("a", [])
        raise TypeError("of another shape")

    made = Ahead([Programs(("a", "b"), programs())], 1)
    assert made.wait(["a"], to_its_end)
    with pytest.raises(TypeError, match="of another shape"):
        made.wait(["b"], to_its_end)
    made.close()


def test_a_stop_is_not_waited_for_and_nothing_more_is_begun(make, order):
    go_on = threading.Event()
    made = make(["a", "b", "c"], b={"until": go_on})
    asked = []
    assert made.wait(["a"], to_its_end)
    assert not made.wait(["a", "b"], lambda is_done: bool(asked.append(is_done())))
    assert asked == [False]  # for b alone: processes that wait for each other here do so once for each program
    made.close()
    go_on.set()
    made._threads.shutdown(wait=True)
    assert "c" not in order


def test_the_progress_is_told_with_what_is_left(make, monkeypatch):
    said = []
    monkeypatch.setattr(ahead, "TOLD_FROM_S", 0.0)
    made = make(["forward 4x6", "update"], say=lambda text, *values: said.append(text % values))
    assert made.wait(["forward 4x6", "update"], to_its_end)
    made.close()
    made._threads.shutdown(wait=True)
    assert said == [
        "compiling 2 programs for all padded shapes, 1 at once",
        "compiled 1 of 2 programs: forward 4x6, in 0 s",
        "all 2 programs are compiled, in 0 s",
    ]
