"""What the processes of a run tell each other, through JAX's coordination service: no device takes part.

They compare what they start with, and when one fails, it leaves at once and the others end with its reason. JAX's own
end waits for minutes for a process that does not come, and does not say why.
"""

import atexit
import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax._src import distributed  # no public name; and jax.process_index() would wait until all use their devices

from cdetr_jax.files import as_path, write_text

STOPPED = 75  # the exit status; EX_TEMPFAIL of sysexits.h: the same command, called again, goes on

# A process that is silent for so long counts as dead, and JAX ends the others; also where a host is stopped or lost.
HEARTBEAT_S = 15
_WAIT_MS = 3600 * 1000  # for a process that is alive, such as one that lists a large folder for the first time
_SEEN_MS = 3000  # the service ends with the first process, which therefore waits until the others know why
_SHARED_S = 10  # a network file system may show a new file late
_LOOK_S = 0.5
_FAILED, _SEEN, _ALIVE = "cdetr/failed", "cdetr/seen", "cdetr/alive"
_SHOWN_FIELDS, _SHOWN_CHARACTERS = 5, 100

_rounds = itertools.count()
_last_acts: list[Callable[[], None]] = []


def are_several() -> bool:
    """Whether this process is one of several."""
    return distributed.global_state.client is not None and distributed.global_state.num_processes > 1


def agree(facts: Mapping[str, Any]) -> None:
    """Compares facts, which all processes must have alike; waits for all of them.

    Args:
      facts: by the name that an error is to give them; what JSON can hold.
    Raises: ValueError on all processes, with the names that differ and two of their values.
    """
    if not are_several():
        return
    of_all, differing = _from_all([_name(), facts]), []
    for name in dict.fromkeys(itertools.chain.from_iterable(facts for _, facts in of_all)):
        values = [(_short(facts[name]) if name in facts else "nothing", process) for process, facts in of_all]
        other = next((value for value in values if value[0] != values[0][0]), None)
        if other:
            differing.append(f"{name} is {values[0][0]} on {values[0][1]}, {other[0]} on {other[1]}")
    if differing:
        more = f"; and {len(differing) - _SHOWN_FIELDS} more" if len(differing) > _SHOWN_FIELDS else ""
        raise ValueError(
            f"the processes of this run differ: {'; '.join(differing[:_SHOWN_FIELDS])}{more}. Start the same command "
            "with the same code, data, number of devices and a shared workdir on all of them"
        )


def on_all(fact: bool) -> bool:
    """Whether a fact holds on all processes, which all ask."""
    return all(_from_all(fact)) if are_several() else fact


def code_version() -> dict[str, str]:
    """The package's version with a checksum of its files, and JAX's."""
    checksum, package = 0, Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        checksum = zlib.crc32(path.read_bytes(), zlib.crc32(path.relative_to(package).as_posix().encode(), checksum))
    try:
        version = metadata.version("cdetr_jax")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return {"cdetr_jax": f"{version}, checksum of its code {checksum:08x}", "jax": jax.__version__}


def check_shared(folder: str | os.PathLike) -> None:
    """Raises ValueError on all processes, if one does not see what the first one writes in a folder."""
    if not are_several():
        return
    path, key = as_path(folder) / ".shared", f"cdetr/shared/{next(_rounds)}"
    if distributed.global_state.process_id == 0:
        token = uuid.uuid4().hex
        write_text(path, token)
        _set(key, token)
    token = distributed.global_state.client.blocking_key_value_get(key, _WAIT_MS)
    deadline = time.monotonic() + _SHARED_S
    while not (is_seen := _holds(path, token)) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    agree({"what process 0 writes to the workdir": "seen" if is_seen else f"not seen in {folder}"})


def watch_others() -> None:
    """Has this process end when another one fails or is lost. To be called once, when the processes are joined."""
    if not are_several():
        return
    client, done, heard, c_library = distributed.global_state.client, threading.Event(), {}, ctypes.CDLL(None)
    own = f"{_ALIVE}/{distributed.global_state.process_id}"

    def watch() -> None:
        while not done.wait(_LOOK_S):
            failure = _value(client, _FAILED)
            if failure and not failure.startswith(_name()):
                logging.error("%s; %s ends too", failure, _name())
                leave(1, failure)
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client.key_value_set(own, f"{_name()} {time.monotonic()}", allow_overwrite=True)
                for key, text in client.key_value_dir_get(_ALIVE):
                    if key not in heard or heard[key][0] != text:
                        heard[key] = (text, time.monotonic())

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def explain(number: int) -> None:
        """JAX aborts a process when another one is lost, and does not say which; other aborts go on."""
        silent = [key for key, (_, at) in list(heard.items()) if time.monotonic() - at > HEARTBEAT_S / 2]
        if own in silent or not _listens(distributed.global_state.coordinator_address):
            silent = [f"{_ALIVE}/0"]  # through which the others are heard
        if silent:
            names = ", ".join(heard[key][0].rpartition(" ")[0] for key in silent if key in heard)
            os.write(2, f"\n{names or 'process 0'} has ended, or is not heard of; {_name()} ends too\n".encode())
            os._exit(STOPPED)
        c_library.signal(number, None)
        os.abort()

    def end(explain: Any) -> None:
        wait_for_all()  # they may still fail
        done.set()
        thread.join()

    thread = threading.Thread(target=watch, name="other processes", daemon=True)
    thread.start()
    c_library.signal(signal.SIGABRT, explain)  # Python's own handlers run too late
    atexit.register(end, explain)


def wait_for_all() -> None:
    """Waits until all processes have come so far, and parts from them."""
    if are_several():
        jax.distributed.shutdown()


def before_leaving(act: Callable[[], None]) -> None:
    """Has something done before this process leaves the others; it must not take long."""
    _last_acts.append(act)


def leave(status: int, cause: str, error: BaseException | None = None, *, with_traceback: bool = False) -> None:
    """Ends this process now, if it is one of several, and lets the others know; else it does nothing.

    Args:
      status: the exit status.
      cause: in a line.
      error: where that came from. What XLA reports is often that another process is gone: then there is time for that
        one's own words, or for JAX to find out which one it was, and to end this process.
      with_traceback: the error's is printed, if it is this process's own.
    """
    if not are_several():
        return
    client, process = distributed.global_state.client, distributed.global_state.process_id
    for act in _last_acts:
        with contextlib.suppress(Exception):
            act()
    if _comes_from_others(error):
        _flush()
        time.sleep(HEARTBEAT_S + 5)
    if with_traceback:
        traceback.print_exception(error)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was the first
        _set(_FAILED, f"{_name()} has failed: {cause}")
    _flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _set(f"{_SEEN}/{process}", "yes")
        deadline = time.monotonic() + _SEEN_MS / 1000
        for other in range(1, distributed.global_state.num_processes) if process == 0 else ():
            left_ms = int((deadline - time.monotonic()) * 1000)
            client.blocking_key_value_get(f"{_SEEN}/{other}", max(1, left_ms))
    if process == 0:
        time.sleep(0.5)  # in which they end
    os._exit(status)


def _from_all(content: Any) -> list[Any]:
    """What all processes call this with, in their order, for all of them; JSON."""
    key, state = f"cdetr/facts/{next(_rounds)}", distributed.global_state
    _set(f"{key}/{state.process_id}", json.dumps(content))
    get = state.client.blocking_key_value_get
    return [json.loads(get(f"{key}/{i}", _WAIT_MS)) for i in range(state.num_processes)]


def _comes_from_others(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return "RESOURCE_EXHAUSTED" not in str(error)
        error = error.__cause__
    return False


def _name() -> str:
    return f"process {distributed.global_state.process_id} ({socket.gethostname()})"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return (
        text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}... ({zlib.crc32(text.encode()):08x})"
    )


def _set(key: str, value: str) -> None:
    distributed.global_state.client.key_value_set(key, value)


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _value(client: Any, key: str) -> str | None:
    try:
        return client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError:  # it is not there, or the service is not: then JAX ends this process
        return None


def _holds(path: Any, token: str) -> bool:
    try:
        return path.read_text() == token
    except (OSError, ValueError):
        return False


def _flush() -> None:
    for stream in _streams():
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _streams() -> Iterator[Any]:
    yield from (sys.stdout, sys.stderr)
    yield from logging.logging.getLogger().handlers
