"""Tables that cost a pass over all pictures: made once, cached beside the data, made again when the data change."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from absl import logging
from tqdm import tqdm

from cdetr_jax.files import as_path, whole_file

Table = dict[str, np.ndarray]
Item = TypeVar("Item")
Result = TypeVar("Result")

_FINGERPRINT = "fingerprint"
_READERS = min(64, 4 * (os.cpu_count() or 1))  # they mostly wait for a disk


def fingerprint_of(parts: Iterable[object]) -> str:
    """A digest of everything that a table depends on."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def cached_table(path: str | os.PathLike, fingerprint: str, what: str, make: Callable[[], Table]) -> Table:
    """Returns the table in a file, or makes it and caches it there.

    Where the folder cannot be written to, the table goes to the user's cache, `$XDG_CACHE_HOME/cdetr_jax` or
    `~/.cache/cdetr_jax`; where that cannot be written to either, it is made at every start.
    Args:
      path: an .npz file. Written at one stroke, so that several processes may do so at once.
      fingerprint: a cached table with another one, or a damaged one, is made again.
      what: what the log calls it.
      make: returns arrays of numbers and texts, no objects.
    """
    files = (as_path(path), _user_cache(path))
    for file in files:
        table = _load(file, fingerprint)
        if table is not None:
            return table
    logging.info("reading %s once, to be cached in %s", what, files[0])
    table = make()
    for file in files:
        try:
            _save(file, fingerprint, table)
        except OSError as error:
            logging.info("%s: cannot be written (%s)", file, error.strerror or error)
            continue
        if file != files[0]:
            logging.info("%s: cached here instead", file)
        break
    else:
        logging.warning("%s cannot be cached and will be read again at the next start", what)
    return table


def in_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], what: str, unit: str = " pictures"
) -> list[Result]:
    """Applies a function that waits for files to all items, in order, with a progress bar if that takes long."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="reader") as threads:
        try:
            return list(tqdm(threads.map(function, items), what, len(items), unit=unit, delay=2, mininterval=1))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _user_cache(path: str | os.PathLike) -> Path:
    path = Path(path).absolute()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return home / "cdetr_jax" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}-{path.name}"


def _load(file: Path, fingerprint: str) -> Table | None:
    try:
        with file.open("rb") as stream, np.load(stream) as content:
            names = [name for name in content.files if name != _FINGERPRINT]
            if str(content[_FINGERPRINT]) == _with_names(fingerprint, names):
                return {name: content[name] for name in names}
    except Exception:  # not there, or damaged: NumPy and zipfile raise many kinds
        return None
    return None


def _with_names(fingerprint: str, names: Iterable[str]) -> str:
    """So that a file that lost an array is not taken for a whole one."""
    return " ".join([fingerprint, *sorted(names)])


def _save(file: Path, fingerprint: str, table: Table) -> None:
    with whole_file(file) as temporary, temporary.open("xb") as stream:
        np.savez(stream, **{_FINGERPRINT: np.array(_with_names(fingerprint, table))}, **table)
