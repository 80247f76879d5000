"""What a random-access source of annotated pictures is, how picture files are read, and a folder of them as one."""

import contextlib
import io
import logging
import os
import re
import struct
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps

from cdetr_jax.data.cache import Table, cached_table, fingerprint_of, in_parallel
from cdetr_jax.records import Category, Record

PICTURE_ERRORS = (
    OSError,  # missing, not a picture, truncated
    ValueError,
    SyntaxError,  # Pillow's word for a broken PNG
    EOFError,
    IndexError,
    KeyError,
    TypeError,  # from the EXIF data of a damaged MPO
    OverflowError,
    RuntimeError,  # from a damaged AVIF
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


SPLITS = {"train": "train", "validation": "val|valid|validation", "test": "test"}  # ours: as folders call them
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif", ".mpo")


class BadPictureError(ValueError):
    """A picture file that is missing, cannot be decoded or is not of the annotated size; the message starts with it."""


class Source(Protocol):
    """What the pipeline needs: pictures by position, and what is known of them without opening any.

    Attributes:
      records: one for each picture.
      categories: sorted by id.
    """

    records: tuple[Record, ...]
    categories: tuple[Category, ...]

    def __len__(self) -> int: ...

    def load_image(self, i: int) -> np.ndarray:
        """Returns picture `i` as uint8 [H, W, 3] RGB, of the size in its record. Raises: BadPictureError."""
        ...

    # A source may also have open_image(i), which returns the same as a Pillow image of mode RGB: it saves two copies;
    # and missing_files(), the paths of pictures that are not there.


# ---------------------------------------------------------------------------------------------- picture files


def decode_rgb(image: Image.Image) -> np.ndarray:
    """Converts a Pillow image of any integer mode to uint8 [H, W, 3] RGB; see `rgb_image`."""
    return np.array(rgb_image(image))


def rgb_image(image: Image.Image) -> Image.Image:
    """Decodes a Pillow image of any integer mode and converts it to mode RGB.

    16 bits become the upper 8 (Pillow alone would clip them to white); alpha is dropped; CMYK and palettes are
    resolved.
    Raises: ValueError, if the pixels are floating-point numbers, whose range nobody states; whatever Pillow raises
      when the data are damaged.
    """
    if image.mode == "F":
        raise ValueError("the pixels are floating-point numbers; save the picture with 8 bits per channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        gray = np.minimum(np.asarray(image).astype(np.int64).clip(min=0) >> 8, 255).astype(np.uint8)
        return Image.fromarray(gray).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns when such a palette goes to RGB in one step
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def open_picture(path: str | Path) -> np.ndarray:
    """Reads a picture that has no annotation, turned the way its EXIF tag says: uint8 [H, W, 3] RGB.

    Args:
      path: of a file, or an address that starts with http:// or https://.
    Raises: BadPictureError, if it is missing or cannot be decoded.
    """
    try:
        with open_checked(_download(path) if is_address(path) else path) as image:
            return decode_rgb(ImageOps.exif_transpose(image))
    except PICTURE_ERRORS as error:
        raise bad_picture(path, error) from error


def is_address(path: str | Path) -> bool:
    """Whether something is to be fetched from the web."""
    return str(path).startswith(("http://", "https://"))


def _download(address: str) -> IO[bytes]:
    """Raises: OSError; ValueError, if it is a web page."""
    import urllib.request

    request = urllib.request.Request(address, headers={"User-Agent": "cdetr_jax"})  # some refuse Python's own
    with urllib.request.urlopen(request, timeout=30) as answer:
        if "text/html" in answer.headers.get("Content-Type", ""):
            raise ValueError("this is the address of a web page, expected that of a picture")
        return io.BytesIO(answer.read())


def open_checked(file: str | Path | IO[bytes]) -> Image.Image:
    """Opens a picture; reads no more than its header. Raises: one of `PICTURE_ERRORS`, also if it is far too large."""
    image = Image.open(file)
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise ValueError(f"{image.width} x {image.height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS")
    return image


def bad_picture(path: str | Path, error: Exception, advice: str = "") -> BadPictureError:
    """The error to raise instead of one of `PICTURE_ERRORS`."""
    cause = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
    return BadPictureError(f"{path}: cannot read this picture ({cause}){advice}")


# --------------------------------------------------------------------------------------------- picture folders


class PictureFolder:
    """Annotated pictures in a folder, whatever format the annotations came in.

    Attributes:
      folder: that `file_name` of the records is relative to.
      records, categories: see `Source`.
      annotations: the file or folder of the annotations, for messages.
      places: of each record, the annotation file and the line of each of its boxes; None: all in one file.
    """

    def __init__(
        self,
        folder: Path,
        records: Sequence[Record],
        categories: Sequence[Category],
        annotations: str | Path,
        *,
        places: Sequence[tuple[str, Sequence[int]]] | None = None,
        turned: bool = False,
    ):
        """Holds what a reader found.

        Args:
          places: see the class.
          turned: sizes and boxes are of the picture turned as its EXIF tag says; else see `open_image`.
        """
        self.folder, self.annotations = folder, annotations
        self.records, self.categories = tuple(records), tuple(sorted(categories, key=lambda c: c.id))
        self.places, self._turned = places, turned
        _report_equal_names(annotations, self.categories)
        if places is not None:
            where = [(i, k) for i, record in enumerate(self.records) for k in range(len(record.category_ids))]
            report_unusable(annotations, self.records, lambda n: self.place_of(*where[n]))

    def __len__(self) -> int:
        return len(self.records)

    def load_image(self, i: int) -> np.ndarray:
        """Returns picture `i` as uint8 [H, W, 3] RGB; see `open_image`."""
        return np.array(self.open_image(i))

    def open_image(self, i: int) -> Image.Image:
        """Returns picture `i` as a Pillow image of mode RGB.

        It comes as stored, as in the published code, if that is the annotated size; if only the picture turned by its
        EXIF tag has the annotated size, it is turned. With `turned` it always is.
        Raises: BadPictureError, if the file is missing or damaged, or its size is not the annotated one: damage to a
          header and a wrong annotation look alike.
        """
        record = self.records[i]
        path = self.folder / record.file_name
        wanted = record.width, record.height
        picture = None
        try:
            with open_checked(path) as image:
                stored = image.size
                if stored in (wanted, wanted[::-1]):  # else not worth decoding, however large its header says it is
                    as_stored = stored == wanted and not self._turned
                    picture = rgb_image(image if as_stored else ImageOps.exif_transpose(image))
        except PICTURE_ERRORS as error:
            raise bad_picture(path, error) from error
        if picture is None or picture.size != wanted:
            raise BadPictureError(
                f"{path}: the picture is {stored[0]} x {stored[1]} pixels but image {record.image_id} is annotated as "
                f"{record.width} x {record.height} (width x height); its boxes would be wrong"
            )
        return picture

    def missing_files(self) -> list[str]:
        """Paths of the pictures that are not there; lists folders, which costs less than asking for each file."""
        by_folder: dict[Path, list[str]] = {}
        for record in self.records:
            path = self.folder / record.file_name
            by_folder.setdefault(path.parent, []).append(path.name)
        missing = []
        for folder, names in by_folder.items():
            there = set(os.listdir(folder)) if folder.is_dir() else set()
            missing += [str(folder / name) for name in names if name not in there and not (folder / name).exists()]
        return missing

    def place_of(self, i: int, k: int) -> str:
        """Says where box `k` of record `i` is annotated: file and line, or file, picture and number."""
        if self.places is None:
            return f"{self.annotations}: box {k + 1} of {self.records[i].file_name}"
        file, lines = self.places[i]
        return f"{file}:{lines[k]}"

    def part(self, indices: Sequence[int]) -> "PictureFolder":
        """Some of the pictures, as a source of their own."""
        places = None if self.places is None else [self.places[i] for i in indices]
        records = [self.records[i] for i in indices]
        return PictureFolder(
            self.folder, records, self.categories, self.annotations, places=places, turned=self._turned
        )


def sizes_in_headers(
    folder: Path,
    names: Sequence[str],
    cache: str | Path,
    advice: Callable[[int], str] = lambda i: "",
    *,
    turned: bool = False,
) -> list[list[int]]:
    """Height and width of pictures, from the table cached in a file or from the pictures' headers.

    Args:
      names: of the pictures in the folder.
      cache: see `cached_table`.
      advice: what to add to the error about picture i.
      turned: as the EXIF tag says.
    Raises: BadPictureError, if one cannot be read.
    """
    if not names:
        return []

    @contextlib.contextmanager
    def naming(i: int) -> Iterator[Path]:
        try:
            yield folder / names[i]
        except PICTURE_ERRORS as error:
            raise bad_picture(folder / names[i], error, advice(i)) from error

    def state(i: int) -> tuple[str, int, int]:
        with naming(i) as path:
            found = path.stat()
            return names[i], found.st_size, found.st_mtime_ns

    def size(i: int) -> tuple[int, int]:
        with naming(i) as path, open_checked(path) as image:
            # A PNG without a tag before its pixels would be decoded to look for one after them.
            may_turn = turned and (image.format != "PNG" or "exif" in image.info)
            on_its_side = may_turn and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (image.width, image.height) if on_its_side else (image.height, image.width)

    def make() -> Table:
        return {"sizes_hw": np.array(in_parallel(size, range(len(names)), "picture sizes"), np.int32)}

    files = [folder.absolute(), turned, *in_parallel(state, range(len(names)), "picture files")]
    what = f"the sizes of {len(names)} pictures"
    return cached_table(cache, fingerprint_of(files), what, make)["sizes_hw"].tolist()


def files_in(folder: Path, suffixes: Container[str], *, deep: bool = False) -> list[Path]:
    """The files of a folder with one of the suffixes, sorted; with `deep` also of the folders and links in it."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        found += [Path(place, n) for n in names if n[0] != "." and os.path.splitext(n)[1].lower() in suffixes]
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if deep and os.path.realpath(os.path.join(place, name)) not in seen]
    return sorted(found)


def pictures_in(folder: Path, *, deep: bool = False) -> list[Path]:
    """The pictures of a folder; see `files_in`."""
    return files_in(folder, PICTURE_SUFFIXES, deep=deep)


def one_of_each_name(pictures: Sequence[Path]) -> dict[Path, Path]:
    """The pictures by their path without suffix. Raises: ValueError, if two differ in nothing else."""
    found: dict[Path, Path] = {}
    for path in pictures:
        if found.setdefault(path.with_suffix(""), path) != path:
            raise ValueError(
                f"{path}: of which of {found[path.with_suffix('')].name} and {path.name} are the boxes of "
                f"{path.stem}? delete or rename one of the two pictures"
            )
    return found


def read_text(file: Path) -> str:
    """A text in UTF-8, without the mark that some programs put before it. Raises: ValueError, naming it; OSError."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text in UTF-8 ({error}); save it as such") from error


def split_name(text: str) -> str:
    """`train`, `validation` or `test` of any of its spellings; another text as it is."""
    return next((name for name, spellings in SPLITS.items() if re.fullmatch(spellings, text.lower())), text)


def plain_record(
    image_id: int, name: str, size_hw: Sequence[int], boxes_xywh_px: np.ndarray, ids: np.ndarray
) -> Record:
    """A record of a format that knows neither crowds nor areas."""
    crowds, areas = np.zeros(len(ids), bool), boxes_xywh_px[:, 2] * boxes_xywh_px[:, 3]
    return Record(image_id, name, *map(int, size_hw), boxes_xywh_px, ids, crowds, areas)


# ------------------------------------------------------------------------------------------------ COCO folder


def open_image(source: Source, i: int) -> Image.Image:
    """Picture `i` of any source as a Pillow image; one that has it in that form need not make an array of it."""
    opened = getattr(source, "open_image", None)
    return opened(i) if opened else Image.fromarray(source.load_image(i))


def missing_files(source: Source) -> list[str]:
    """Paths of the picture files of a source that are not there; empty for one without files of its own."""
    find = getattr(source, "missing_files", None)
    return find() if find else []


def clip_to_picture(boxes_xywh_px: np.ndarray, heights: Any, widths: Any) -> tuple[np.ndarray, np.ndarray]:
    """Clips annotated boxes to their pictures.

    Args:
      boxes_xywh_px: [n, 4] left, top, width, height.
      heights, widths: of the picture of each box, [n], or of all, a number.
    Returns: [n, 4] left, top, right, bottom in pixels; [n] bool, True = some area is left.
    """
    left, top, width, height = boxes_xywh_px.T
    right, bottom = np.clip(left + width, 0, widths), np.clip(top + height, 0, heights)
    left, top = np.clip(left, 0, widths), np.clip(top, 0, heights)
    return np.stack([left, top, right, bottom], axis=-1), (right > left) & (bottom > top)


def report_unusable(path: str | Path, records: Sequence[Record], describe: Callable[[int], str]) -> None:
    """Logs how many boxes can be no training target; evaluation keeps them all.

    Args:
      describe: says which box is the k-th of all.
    """
    counts = [len(record.boxes_xywh_px) for record in records]
    if not sum(counts):
        return
    heights = np.repeat([record.height for record in records], counts)
    widths = np.repeat([record.width for record in records], counts)
    boxes = np.concatenate([record.boxes_xywh_px for record in records])
    inside = clip_to_picture(boxes, heights, widths)[1]
    unusable = np.flatnonzero(~inside & ~np.concatenate([record.is_crowd for record in records]))
    if unusable.size:
        first = int(unusable[0])
        record = records[np.searchsorted(np.cumsum(counts), first, side="right")]
        box = ", ".join(f"{side:g}" for side in boxes[first])
        logging.warning(
            "%s: %d of %d boxes have no area inside their picture and are left out of training; the first is %s of %s "
            "(%d x %d pixels): bbox [%s]",
            *(path, unusable.size, sum(counts), describe(first), record.file_name, record.width, record.height, box),
        )


def _report_equal_names(path: str | Path, categories: tuple[Category, ...]) -> None:
    """Logs categories of one name: each has a logit of its own, and nobody can tell them apart by name."""
    first: dict[str, int] = {}
    for category in categories:
        if first.setdefault(category.name, category.id) != category.id:
            logging.warning(
                "%s: categories %d and %d are both called %r and are two classes; if they are one, give their objects "
                "the same category_id",
                *(path, first[category.name], category.id, category.name),
            )
