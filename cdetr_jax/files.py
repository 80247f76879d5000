"""Paths, local or remote, and writing a file so that it is there whole or not at all."""

import contextlib
import csv
import errno
import importlib.util
import io
import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etils import epath

GCS = "gs://"
FULL = (errno.ENOSPC, errno.EDQUOT)  # of an OSError: no space on the disk, or none left of the user's share
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]+:/")  # with one slash it is what pathlib.Path leaves of a remote path


def as_path(path: str | os.PathLike) -> "Path | epath.Path":
    """The path as an object: a `pathlib.Path` if it is local, else an `epath.Path`, which has the same methods.

    Args:
      path: a local path, or `gs://bucket/folder`; that needs the package gcsfs. `./a:/b` is local.
    Raises: ValueError, if nothing can be written there: another scheme, or a package that is missing.
    """
    text = os.fspath(path)
    if not _REMOTE.match(text):
        return Path(text)
    if "://" not in text:
        raise ValueError(f"{text} is a remote path that lost a slash; use a local path here, or a str with ://")
    if not text.startswith(GCS):
        scheme = text.split("://")[0]
        raise ValueError(f"{text}: cannot write to {scheme}://; use a local path or {GCS}bucket/folder")
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{text}: {GCS} needs the package gcsfs; pip install 'cdetr_jax[gcs]', or use a local path")
    os.environ.setdefault("EPATH_USE_TF", "false")  # else epath imports TensorFlow where that is installed
    from etils import epath  # takes a tenth of a second

    return epath.Path(text)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path, as `as_path` takes it, is not on a disk of this machine."""
    return not isinstance(as_path(path), Path)


def check_writable_folder(path: "Path | epath.Path") -> None:
    """Raises OSError if a local path cannot be a folder that is written to. Makes nothing."""
    if not isinstance(path, Path):
        return
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file, so {path} cannot be a folder; name another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: {there} cannot be written to; use another folder, or change its permissions")


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Adds to an OSError of the block what was being written, and advice: a full disk names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        if error.errno in FULL:
            error.add_note("free some space and run the same command again")
        raise


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary local name, whose file becomes `path` at the end of the block.

    A full disk or a killed process leaves what was there before. Processes may write the same file at once: the last
    one's stays. Folders that are missing are made.
    Raises: ValueError, see `as_path`.
    """
    path = as_path(path)
    with writing(path), _name_beside(path) if isinstance(path, Path) else _name_to_upload(path) as temporary:
        yield temporary


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes all of it or nothing, see `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes all of it or nothing, see `whole_file`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def as_csv(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as the text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


@contextlib.contextmanager
def _name_beside(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it
        temporary.unlink()
        yield temporary
        temporary.chmod(mode)  # safetensors, for one, writes files that only their owner may read
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _name_to_upload(path: "epath.Path") -> Iterator[Path]:
    """An object store shows an object when all of it has arrived, and knows no folders to be made."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / path.name
        yield temporary
        path.write_bytes(temporary.read_bytes())


@contextlib.contextmanager
def growing_text(path: str | os.PathLike) -> Iterator[Callable[[str], None]]:
    """Gives a function that adds text to a file; all of it is there after every call.

    So a process that is killed leaves what was added before. A remote file arrives when the block ends, in whatever
    way. What `path` held before is lost. Folders that are missing are made.
    Raises: ValueError, see `as_path`.
    """
    with _local_name(path) as name, name.open("w", encoding="utf-8", buffering=1) as file:

        def add(text: str) -> None:
            file.write(text)
            file.flush()

        yield add


@contextlib.contextmanager
def _local_name(path: str | os.PathLike) -> Iterator[Path]:
    """The path itself, in a folder that is there, or a local file that becomes the remote one when the block ends."""
    path = as_path(path)
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / path.name
        try:
            yield temporary
        finally:
            if temporary.exists():
                path.write_bytes(temporary.read_bytes())


@contextlib.contextmanager
def growing_list(path: str | os.PathLike) -> Iterator[Callable[[Sequence[Any]], None]]:
    """Gives a function that adds items to a JSON list in a file; the list there is whole after every call.

    Otherwise as `growing_text`.
    """
    with _local_name(path) as name, _growing_list(name) as add:
        yield add


@contextlib.contextmanager
def _growing_list(path: Path) -> Iterator[Callable[[Sequence[Any]], None]]:
    end = b"\n]\n"
    with path.open("wb", buffering=0) as file:
        length = file.write(b"[")  # without the end
        file.write(end)

        @writing(path)
        def add(items: Sequence[Any]) -> None:
            nonlocal length
            lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in items)
            if not lines:
                return
            text = (("\n" if length == 1 else ",\n") + lines).encode() + end
            file.seek(length)
            try:
                written = file.write(text)
                if written < len(text):  # a disk that is full now says so at the next attempt
                    file.write(text[written:])
            except OSError:
                file.seek(length)
                file.write(end)
                file.truncate()
                raise
            length += len(text) - len(end)

        yield add


def refuse_to_overwrite(source: str | os.PathLike, target: str | os.PathLike, option: str) -> None:
    """Raises ValueError, if the file `target` is `source`, or one that makes up the folder `source`.

    Links and other spellings of a path count as what they lead to. `option`: what the user names the target with.
    """
    source, target = Path(source), as_path(target)
    if not isinstance(target, Path) or not target.exists() or not source.exists():
        return
    names = ("model.safetensors", "pytorch_model.bin", "config.json", "classes.json", "preprocessor_config.json")
    own = [source, *(source / name for name in names)]
    if any(file.exists() and target.samefile(file) for file in own):
        raise ValueError(f"{option} {target} would be written over the weights {source}; name another one")
