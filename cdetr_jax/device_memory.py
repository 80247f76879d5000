"""One error for whatever does not fit a device's memory, when it is compiled or when it runs."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def must_fit(pictures: int, height: int, width: int, remedy: str) -> Iterator[None]:
    """Has the block end in a MemoryError that names the batch and the remedy, if it ends for want of device memory.

    Args:
      pictures: of a batch on one device.
      height, width: padded, in pixels.
      remedy: what the user can do.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error).strip()
        # A CPU program that was under way ends in "INTERNAL: Error dispatching computation: Out of memory allocating".
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        device = jax.local_devices()[0].device_kind
        raise MemoryError(
            f"{pictures} picture(s) of {height} x {width} pixels (height x width) do not fit the memory of a device "
            f"({device}); {remedy} ({text.splitlines()[0]})"
        ) from error
