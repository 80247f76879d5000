"""What a process is given when it starts: a cache of compiled programs, and a heap that keeps what is freed."""

import contextlib
import ctypes
import os


def keep_compiled_programs() -> None:
    """Has JAX keep what it compiles from one command to the next; by its own variables, before it is imported.

    A folder that is set already is left as it is: JAX cannot limit one that was filled without a limit.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(home, "cdetr_jax", "compiled")
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 * 2**30))  # bytes; the least recently used go first
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def keep_freed_memory() -> None:
    """Has glibc keep what a step frees for the next one, in one heap for all threads.

    It would give arrays of many sizes back to the system and take them anew in every step, and keep as many heaps with
    holes as there are threads. Only on few cores: where many threads read pictures, one heap would be in their way.
    """
    if (os.cpu_count() or 1) > 8 or os.environ.keys() & {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES"}:
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system, or another C library
        mallopt = ctypes.CDLL(None).mallopt
        arena_max, mmap_threshold, trim_threshold = -8, -3, -1  # of malloc.h
        for parameter, value in ((arena_max, 1), (mmap_threshold, 2**30), (trim_threshold, 2**31 - 1)):
            mallopt(parameter, value)
