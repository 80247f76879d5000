"""The archives that a set is published as: what of them is there, and fetching the rest."""

import http.client
import ssl
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

_BLOCK = 1 << 20
_ATTEMPTS = 5  # without a single new byte
_TIMEOUT_S = 60
_NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    ConnectionError,
    TimeoutError,
    EOFError,
)


class Archive(NamedTuple):
    """A file to be downloaded, what it is to be called, and its published size in bytes."""

    url: str
    file_name: str
    size: int


def check_sizes(published: list[Archive], archives: Path) -> None:
    """Raises ValueError at an archive that cannot be the published one; its SHA-256 is TFDS's concern."""
    for archive in published:
        file = archives / archive.file_name
        if file.exists() and file.stat().st_size != archive.size:
            raise ValueError(
                f"{file} has {file.stat().st_size} bytes, the published file {archive.size}: is it complete? Delete it "
                "to have it downloaded, or take all archives as they are with --any-archives"
            )


def bytes_of(archive: Archive, archives: Path) -> tuple[int, int]:
    """Bytes that are still to be downloaded, and bytes of the content."""
    file = archives / archive.file_name
    if not file.exists():
        part = _part(file)
        return max(archive.size - (part.stat().st_size if part.exists() else 0), 0), archive.size
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as content:
            return 0, sum(member.file_size for member in content.infolist())
    return 0, file.stat().st_size


def _part(file: Path) -> Path:
    return file.with_name(file.name + ".part")


def download(archive: Archive, archives: Path, published: list[Archive], check_size: bool) -> None:
    """Fetches an archive, going on with the part that is there.

    Raises: OSError, saying what to do without a network.
    """
    archives.mkdir(parents=True, exist_ok=True)
    file = archives / archive.file_name
    failures = 0
    with tqdm(desc=archive.file_name, unit="B", unit_scale=True, delay=1, mininterval=1) as progress:
        while True:
            before = _size(_part(file))
            try:
                _fetch(archive.url, _part(file), progress)
                break
            except _NETWORK_ERRORS as error:
                failures = 0 if _size(_part(file)) > before else failures + 1
                is_refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                no_network = isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError)
                if is_refused or no_network or failures == _ATTEMPTS:
                    raise OSError(_without_network(archive, error, archives, published)) from error
                time.sleep(min(2**failures, 30))
    if check_size and _size(_part(file)) != archive.size:
        size = _size(_part(file))
        _part(file).unlink()
        raise OSError(f"{archive.url} has {size} bytes, the published file {archive.size}; it was deleted, try again")
    _part(file).replace(file)


def _fetch(url: str, part: Path, progress: tqdm) -> None:
    """Appends to a part what it lacks. Raises: EOFError, if the connection ends early."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # there is nothing after these bytes
            return
        raise
    with response:
        if response.status != 206:
            have = 0  # the server sends everything
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        progress.total, progress.n = total, have
        progress.refresh()
        with part.open("ab" if have else "wb") as out:
            while block := response.read(_BLOCK):
                out.write(block)
                progress.update(len(block))
    if total is not None and _size(part) < total:
        raise EOFError(f"the connection ended after {_size(part)} of {total} bytes")


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _without_network(archive: Archive, error: Exception, archives: Path, published: list[Archive]) -> str:
    reason = getattr(error, "reason", None) or error
    missing = [other.url for other in published if not (archives / other.file_name).exists()]
    return (
        f"cannot download {archive.url} ({reason}); call again to go on, or without a network bring these files to "
        f"{archives} (or name their folder with --archives): {' '.join(missing)}"
    )
