"""A source whose reading goes wrong in ways that only a process of its own survives. Imported by worker processes."""

import os
import signal
import sys

from cdetr_jax.data.synthetic import SyntheticShapes


class FatalShapes(SyntheticShapes):
    """Shapes; at one picture something happens to the process that reads it."""

    def __init__(self, happening: str, at: int = 0):
        super().__init__(seed=0, size=24, height=48, width=64, max_objects=3)
        self._happening, self._at = happening, at

    def load_image(self, i):
        if i == self._at:
            match self._happening:
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "exits":
                    os._exit(3)
                case "error":
                    raise KeyError("surprise")
                case "unportable":
                    raise _UnportableError("one", "two")
                case "modules":
                    raise KeyError(" ".join(name for name in ("jax", "flax", "tensorflow") if name in sys.modules))
                case "wrong size":
                    return super().load_image(i)[:, :-1]
        return super().load_image(i)


class _UnportableError(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")
