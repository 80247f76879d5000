"""Pascal VOC's XML, one file for each picture."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from absl import logging

from cdetr_jax.data.cache import in_parallel
from cdetr_jax.data.sources import (
    PictureFolder,
    files_in,
    one_of_each_name,
    pictures_in,
    plain_record,
    read_text,
    sizes_in_headers,
)
from cdetr_jax.records import Category

Convention = tuple[str, np.ndarray]


def read_voc(
    annotations: Path, pictures: Path, convention: Callable[[], Convention], listed: Path | None = None
) -> PictureFolder:
    """XML files with the pictures of the same names.

    Args:
      convention: see `read_convention`; of all splits, which a split may be too small to show.
      listed: a file with the names that count.
    """
    there = {path.relative_to(pictures): of for path, of in one_of_each_name(pictures_in(pictures, deep=True)).items()}
    files = files_in(annotations, (".xml",), deep=True)
    known = {file.relative_to(annotations).with_suffix(""): file for file in files}
    if listed:
        files = []
        for number, line in enumerate(read_text(listed).splitlines(), 1):
            if words := line.split():
                names = (line.strip(), words[0], Path(words[0]).stem)  # "a picture", "a  -1" and "a.jpg"
                files.append(next((known[Path(name)] for name in names if Path(name) in known), None))
                if files[-1] is None:
                    raise FileNotFoundError(f"{listed}:{number}: no such file, {annotations / names[0]}.xml")
    elif unannotated := sorted(there.keys() - known.keys()):
        logging.warning(
            "%s: %d pictures have no XML and are left out; the first is %s",
            *(pictures, len(unannotated), there[unannotated[0]]),
        )
    pages = in_parallel(_read_xml, files, "XML files")
    file_names = []
    for file, page in zip(files, pages, strict=True):
        path = there.get(file.relative_to(annotations).with_suffix("")) or pictures / page.file_name
        if not path.is_file():
            raise FileNotFoundError(f"{file}: an annotation without its picture, {pictures / file.stem}.* or {path}")
        file_names.append(str(path.relative_to(pictures)))
    unsized = [i for i, page in enumerate(pages) if not all(page.size_hw)]
    of_headers = sizes_in_headers(
        pictures, [file_names[i] for i in unsized], annotations / f"{listed.stem if listed else 'all'}.sizes.npz"
    )
    sizes = [page.size_hw for page in pages]
    for i, size in zip(unsized, of_headers, strict=True):
        sizes[i] = tuple(size)
    what, shift = convention()
    logging.info("%s: %s", listed or annotations, what)
    ids = {name: i + 1 for i, name in enumerate(sorted({name for page in pages for name in page.names}))}
    records = []
    for i, (name, page, size_hw) in enumerate(zip(file_names, pages, sizes, strict=True)):
        left, top, right, bottom = (page.corners - shift).T
        boxes = np.stack([left, top, right - left, bottom - top], axis=-1)
        labels = np.array([ids[name] for name in page.names], np.int64)
        records.append(plain_record(i + 1, name, size_hw, boxes, labels))
    places = [(str(file), page.lines) for file, page in zip(files, pages, strict=True)]
    categories = [Category(i, name) for name, i in ids.items()]
    return PictureFolder(pictures, records, categories, listed or annotations, places=places)


@dataclasses.dataclass(frozen=True)
class _Page:
    """What an XML file says: size (0, 0 where it does not), database, and of each object name, corners and line."""

    file_name: str
    size_hw: tuple[int, int]
    database: str
    names: list[str]
    corners: np.ndarray
    lines: list[int]


def _read_xml(file: Path) -> _Page:
    """Raises: ValueError, naming the line."""
    text = file.read_bytes()
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{file}:{error.position[0]}: not valid XML ({error}); is the file complete?") from error
    if root.tag != "annotation":
        raise ValueError(f"{file}: its element is <{root.tag}>, expected <annotation>, as of Pascal VOC")
    text = text.replace(b"\0", b"")  # of UTF-16
    starts = [text.count(b"\n", 0, found.start()) + 1 for found in re.finditer(rb"<object[\s>]", text)]
    names, corners = [], []
    for line, item in zip(starts, root.iter("object"), strict=False):
        names.append((item.findtext("name") or "").strip())
        values = [_number(item.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
        if not names[-1] or None in values:
            missing = "name" if not names[-1] else "bndbox with numbers xmin, ymin, xmax and ymax"
            raise ValueError(f"{file}:{line}: this object has no {missing}; correct it or take it out")
        if max(values) <= 1 and any(value % 1 for value in values):
            raise ValueError(f"{file}:{line}: the corners are {values}, expected pixels; these look like fractions")
        corners.append(values)
    size = [int(_number(root.findtext(f"size/{side}")) or 0) for side in ("height", "width")]
    corners = np.array(corners, np.float64).reshape(-1, 4)
    database = root.findtext("source/database") or ""
    return _Page((root.findtext("filename") or "").strip(), tuple(size), database, names, corners, starts)


def read_convention(places: Sequence[Path]) -> Convention:
    """What the corners in the XML of these folders mean, in words and as what to take off to get edges counted from 0.

    The devkit's are the first and the last pixel, counted from 1: left = xmin - 1, right = xmax. That is how
    supervision writes them, too. Roboflow has written edges counted from 1, where a box may end at width + 1; LabelImg,
    CVAT and VoTT, whose database is Unknown, write edges counted from 0. Boxes at the border tell them apart.
    """
    files = [file for place in places for file in files_in(place, (".xml",), deep=True)]

    def page_of(file: Path) -> _Page | None:
        try:
            return _read_xml(file)
        except ValueError:  # which the reading of its split says
            return None

    pages = [page for page in in_parallel(page_of, files, "XML files") if page]
    low = np.concatenate([[], *(page.corners[:, :2].ravel() for page in pages)])
    beyond = np.concatenate([[], *((page.corners[:, 2:] - page.size_hw[::-1]).ravel() for page in pages)])
    unknown = sum(page.database.strip().lower() == "unknown" for page in pages)
    if np.sum(beyond == 1) > np.sum(beyond == 0):
        return "corners are edges counted from 1, as Roboflow has them", np.array([1, 1, 1, 1])
    if np.sum(low == 0) > np.sum(low == 1) or 2 * unknown > len(pages):
        return "corners are edges counted from 0, as LabelImg has them", np.array([0, 0, 0, 0])
    return "corners are the first and last pixel counted from 1, as Pascal VOC has them", np.array([1, 1, 0, 0])


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
