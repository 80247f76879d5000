"""What a workdir says of its run beside the checkpoints: config, classes, and which process trains in it."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import ml_collections
from absl import logging

from cdetr_jax.configs.common import get_config
from cdetr_jax.files import as_path, is_remote, write_json, writing
from cdetr_jax.structs import Category

CONFIG, CLASSES, LOCK = "config.json", "classes.json", ".lock"


def save_config(workdir: str | os.PathLike, config: ml_collections.ConfigDict) -> None:
    """Writes `workdir/config.json`."""
    write_json(as_path(workdir) / CONFIG, config.to_dict())


def load_config(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
    """Reads `workdir/config.json`, locked.

    Raises: FileNotFoundError, if the folder is not a run's.
    """
    return ml_collections.ConfigDict(_read(workdir, CONFIG)).lock()


def with_all_fields(saved: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A run's config, with the published values of the fields that came after it was written."""

    def add(before: dict[str, Any], all_fields: dict[str, Any]) -> dict[str, Any]:
        both = {
            name: add(before[name], value) for name, value in all_fields.items() if isinstance(before.get(name), dict)
        }
        return all_fields | before | both

    return ml_collections.ConfigDict(add(saved.to_dict(), get_config().to_dict())).lock()


def save_classes(workdir: str | os.PathLike, classes: tuple[Category | None, ...]) -> None:
    """Writes `workdir/classes.json`: one entry a logit, null where it stands for nothing."""
    write_json(as_path(workdir) / CLASSES, classes_as_json(classes))


def classes_as_json(classes: tuple[Category | None, ...]) -> list[dict[str, Any] | None]:
    """One entry a logit, null where it stands for nothing."""
    return [category and {"id": category.id, "name": category.name} for category in classes]


def load_classes(workdir: str | os.PathLike) -> tuple[Category | None, ...]:
    """Reads `workdir/classes.json`.

    Raises: FileNotFoundError, if the folder is not a run's.
    """
    return tuple(entry and Category(**entry) for entry in _read(workdir, CLASSES))


@contextlib.contextmanager
def locked(workdir: str | os.PathLike) -> Iterator[None]:
    """Keeps other runs out of a workdir during the block, and makes it. A process that is killed leaves no lock behind.

    An object store has no locks, and neither have some network file systems; there it only says so.
    Raises: ValueError, if another process trains there, with what is known of it.
    """
    workdir = as_path(workdir)
    if is_remote(workdir):
        logging.info("%s cannot be locked: make sure that no other run trains there", workdir)
        yield
        return
    import fcntl  # not on every system

    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(
                f"another run trains in {workdir}: {holder}; wait for it or end it, or use another --workdir"
            ) from None
        except OSError as error:
            logging.warning("%s cannot be locked (%s): make sure that no other run trains there", workdir, error)
        with writing(workdir / LOCK):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
        yield


def _read(workdir: str | os.PathLike, name: str) -> Any:
    path = as_path(workdir) / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {workdir} is not the workdir of a run; train one with `cdetr train`"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; restore it, or use another workdir") from error
