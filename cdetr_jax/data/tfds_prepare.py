"""Downloads a TFDS set and writes it as array_record files, which `TfdsSource` reads at random.

Imports TensorFlow, through TFDS's builders. TFDS itself downloads a file in one go or not at all; here a download goes
on where it was interrupted.

Of TFDS's private parts this uses, as nothing public does it: `_split_generators`, run dry, since only it knows which
archives a config is made of; `checksums.compute_url_info`, to take archives for the published ones; and the errors of a
wrong checksum and of a damaged archive.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from cdetr_jax.data.archives import Archive, bytes_of, check_sizes, download
from cdetr_jax.data.sources import BadPictureError
from cdetr_jax.data.tfds_source import TfdsSource, check_features, import_tfds, missing_package

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class Prepared(NamedTuple):
    """A set that is ready to be read.

    Attributes:
      name: that it is found by, with config and version, "coco/2017:1.1.0".
      folder: that holds its files.
      pictures: number of them in each split.
      was_there: whether nothing had to be done.
      leftovers: folder of what was downloaded and unpacked, which is not needed any more; None if there is none.
    """

    name: str
    folder: Path
    pictures: dict[str, int]
    was_there: bool
    leftovers: Path | None


def prepare(
    name: str,
    data_dir: str | os.PathLike,
    archives: str | os.PathLike | None = None,
    *,
    check_archives: bool = True,
    say: Callable[[str], None] = logging.info,
) -> Prepared:
    """Makes a TFDS set ready, or finds that it is.

    Interrupted, it goes on when called again: whole archives are not fetched again, part of one is completed, and the
    writing of the records starts anew.
    Args:
      name: as TFDS has it, "coco/2017"; without a config TFDS's default one, without a version the newest.
      data_dir: local folder for TFDS sets.
      archives: folder of the set's archives, under their published names; those that are not there are downloaded to
        it. Default: `data_dir/downloads/archives`.
      check_archives: whether archives must have the published content, by their SHA-256.
      say: told what is to be done, line by line.
    Raises: ModuleNotFoundError, if TFDS is not installed; ValueError, if there is no such set, it has no boxes, it lies
      there in a format that cannot be read at random, an archive is not the published one, or the size of a picture
      cannot be read; OSError, if there is too little space, or no network where one is needed.
    """
    if "://" in str(data_dir):
        raise ValueError(f"--data_dir={data_dir} is not a local folder: prepare the set in one, then copy it there")
    root = Path(data_dir).expanduser()
    builder = _make_builder(name, root)
    name = _full_name(builder)
    check_features(name, builder.info.features)
    folder = Path(builder.data_path)
    downloads = root / "downloads"
    with _quiet():
        is_prepared = builder.is_prepared()
    if is_prepared:
        return Prepared(name, folder, _open_all(name, root, builder), True, downloads if downloads.exists() else None)

    root.mkdir(parents=True, exist_ok=True)
    with _lock(root / ".cdetr-prepare.lock"):
        archives = Path(archives).expanduser() if archives else downloads / "archives"
        unpacked = downloads / "unpacked"
        for place, names in (folder.parent, "*"), (downloads, unpacked.name), (unpacked, "*"):
            for junk in place.glob(f"incomplete.{names}"):  # of a process that was killed: we hold the lock
                shutil.rmtree(junk)
        _remove_stale(unpacked, name, archives)
        published = _published_archives(builder)
        if check_archives:
            check_sizes(published, archives)
        _check_space(name, root, archives, unpacked, published, say)
        for archive in published:
            if archive.url.startswith(("http://", "https://")) and not (archives / archive.file_name).exists():
                with _full_disk_told(archives):
                    download(archive, archives, published, check_archives)
        say(f"unpacking, and writing records to {folder}; interrupted, this part starts anew")
        with _full_disk_told(root):
            _remove_stale(unpacked, name, archives)
            _write_records(builder, downloads, unpacked, archives, check_archives)
        try:
            pictures = _open_all(name, root, builder)
        except BadPictureError as error:
            _remove(folder)
            _remove(unpacked)
            raise ValueError(
                f"{error}. It was deleted just now: put sound archives in {archives}, call again"
            ) from error
    return Prepared(name, folder, pictures, False, downloads if downloads.exists() else None)


# --------------------------------------------------------------------------------------------------------- TFDS


def _make_builder(name: str, root: Path) -> Any:
    # Else TensorFlow tells of the processor's instructions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    tfds = import_tfds()
    try:
        import importlib_resources  # noqa: F401  which TFDS 4.9.10 imports without asking for it

        with _quiet():
            return tfds.builder(name, data_dir=str(root), file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"TFDS has no set {name!r}; the names are at tensorflow.org/datasets/catalog") from error
    except ImportError as error:
        raise missing_package(error) from error
    except (ValueError, KeyError, AssertionError) as error:
        if "File format is already set" in str(error):
            with _quiet():
                there = tfds.builder(name, data_dir=str(root))
            raise ValueError(
                f"{there.data_path} holds the set as {there.info.file_format.value} files, which cannot be read at "
                "random: name another --data_dir to prepare it there"
            ) from error
        raise ValueError(f"TFDS cannot make {name!r}: {' '.join(str(error).split())[:300]}") from error


def _full_name(builder: Any) -> str:
    """The name by which `find_prepared` finds exactly this set, however it was asked for."""
    config = f"/{builder.builder_config.name}" if builder.builder_config else ""
    return f"{builder.name}{config}:{builder.version}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without TFDS's own lines, such as that a folder that it is to make is not there."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


class _RecordedError(Exception):
    """Ends the dry run of a builder that only tells what it downloads."""


class _Recorder:
    """Takes the place of TFDS's download manager and notes what a builder asks it for first."""

    def __init__(self):
        self.urls: list[str] = []

    def download(self, urls: Any) -> None:
        """Notes the addresses and ends the run."""
        self._note(urls)
        raise _RecordedError

    download_and_extract = download

    def _note(self, urls: Any) -> None:
        if isinstance(urls, dict | list | tuple):
            for part in urls.values() if isinstance(urls, dict) else urls:
                self._note(part)
        else:
            self.urls.append(getattr(urls, "url", urls))


def _published_archives(builder: Any) -> list[Archive]:
    """The archives that a set is made of, as far as TFDS tells their names and sizes before it starts."""
    recorder = _Recorder()
    # A builder that asks for something else first, such as a folder, ends here: TFDS will say what it needs.
    with contextlib.suppress(_RecordedError, AttributeError, TypeError):
        builder._split_generators(recorder)
    known = builder.url_infos or {}
    urls = [url for url in dict.fromkeys(recorder.urls) if url in known and known[url].filename]
    return [Archive(url, known[url].filename, int(known[url].size)) for url in urls]


def _remove_stale(unpacked: Path, name: str, archives: Path) -> None:
    """Removes what was unpacked from other archives than those that are there now.

    TFDS takes a folder `ZIP.train2017.zip` for the content of any archive of that name.
    """
    files = sorted(archives.glob("[!.]*")) if archives.exists() else []
    states = [(str(file), (state := file.stat()).st_size, state.st_mtime_ns) for file in files if file.is_file()]
    source, kept = json.dumps([name, str(archives.resolve()), *states]), unpacked / "unpacked_from.json"
    if not kept.exists() or kept.read_text() != source:
        if unpacked.exists():
            _remove(unpacked)
        unpacked.mkdir(parents=True)
        kept.write_text(source)


def _remove(folder: Path) -> None:
    """Takes a folder away at one stroke, then deletes it; what a killed process leaves is deleted by the next one."""
    shutil.rmtree(folder.rename(folder.with_name(f"incomplete.{folder.name}")))


def _write_records(builder: Any, downloads: Path, unpacked: Path, archives: Path, check_archives: bool) -> None:
    tfds = import_tfds()
    from tensorflow_datasets.core.download import checksums
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.core.download.extractor import ExtractError

    config = tfds.download.DownloadConfig(extract_dir=str(unpacked), manual_dir=str(archives), try_download_gcs=False)
    before = dict(builder.url_infos or {})
    if not check_archives:  # those that are there count as the published ones
        for url, info in before.items():
            if info.filename and (archives / info.filename).exists():
                builder.url_infos[url] = checksums.compute_url_info(tfds.core.Path(archives / info.filename))
    # To a file, TFDS writes a line for every picture.
    (tfds.enable_progress_bar if sys.stderr.isatty() else tfds.disable_progress_bar)()
    try:
        with _quiet():
            builder.download_and_prepare(
                download_dir=str(downloads), download_config=config, file_format="array_record"
            )
    except (NonMatchingChecksumError, ExtractError, tfds.download.DownloadError) as error:
        what = " ".join(str(error).split())[:400]
        if isinstance(error, NonMatchingChecksumError):  # which ends with two SHA-256
            what = what.split(": *")[0] + ", so it is not the published file: delete it and call again to have it "
            what += "downloaded, or take all archives as they are with --any-archives"
        elif isinstance(error, ExtractError):
            what += "; if the archive is damaged, delete it and call again to have it downloaded"
        raise ValueError(f"TFDS: {what}") from error
    finally:
        if not check_archives and before:
            builder.url_infos.update(before)


def _open_all(name: str, root: Path, builder: Any) -> dict[str, int]:
    """Opens every split, which also makes the tables that a training run would have to wait for."""
    return {split: len(TfdsSource(name, root, split)) for split in builder.info.splits}


# -------------------------------------------------------------------------------------------------------- space


def _check_space(
    name: str, root: Path, archives: Path, unpacked: Path, published: list[Archive], say: Callable[[str], None]
) -> None:
    """Tells what will be downloaded and written. Raises: OSError, if there is no room for it."""
    sizes = [bytes_of(archive, archives) for archive in published]
    missing = sum(part for part, _ in sizes)
    to_unpack = sum(
        size
        for (_, size), archive in zip(sizes, published, strict=True)
        if not any(unpacked.glob(f"*.{archive.file_name}"))
    )
    records = sum(size for _, size in sizes)
    needed, free = missing + to_unpack + records, shutil.disk_usage(root).free
    if not published:
        say(f"{name}: TFDS does not tell how much it will download; {_gb(free)} are free in {root}")
        return
    say(
        f"{name}: {_gb(missing)} to download, about {_gb(to_unpack)} to unpack and {_gb(records)} of records to write: "
        f"{_gb(needed)} in {root}, where {_gb(free)} are free"
    )
    if needed > free:
        raise OSError(
            f"{name} needs about {_gb(needed)} in {root}, but only {_gb(free)} are free; free {_gb(needed - free)} or "
            "name another --data_dir. Afterwards only the records are needed"
        )


@contextlib.contextmanager
def _full_disk_told(folder: Path) -> Iterator[None]:
    """Raises OSError, saying what to do, in place of any error that comes of a full disk, whatever TFDS makes of it."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause:
            if getattr(cause, "errno", None) in _FULL_DISK or any(os.strerror(n) in str(cause) for n in _FULL_DISK):
                free = _gb(shutil.disk_usage(folder).free)
                raise OSError(
                    f"the disk of {folder} became full, {free} are free now; free some more and call the same command "
                    "again, which goes on"
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Raises OSError, if another process is at work in the same folder."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another `cdetr prepare` is at work in {path.parent}; wait for it") from None
        yield
