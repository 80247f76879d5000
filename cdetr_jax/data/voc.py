"""Pascal VOC's XML, one file for each picture."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from absl import logging

from cdetr_jax.data.cache import in_parallel
from cdetr_jax.data.sources import PictureFolder, pictures_in, plain_record, sizes_in_headers
from cdetr_jax.records import Category


def read_voc(annotations: Path, pictures: Path, listed: Path | None = None) -> PictureFolder:
    """XML files with the pictures of the same names. `listed`: a file with the names that count."""
    there = {path.stem: path.name for path in pictures_in(pictures)}
    files = sorted(annotations.glob("*.xml"))
    if listed:
        files = []
        for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), 1):
            if words := line.split():
                files.append(annotations / f"{words[0]}.xml")
                if not files[-1].is_file():
                    raise FileNotFoundError(f"{listed}:{number}: no such file, {files[-1]}")
    elif unannotated := sorted(there.keys() - {file.stem for file in files}):
        logging.warning(
            "%s: %d pictures have no XML and are left out; the first is %s",
            pictures,
            len(unannotated),
            there[unannotated[0]],
        )
    pages = in_parallel(_read_xml, files, "XML files")
    file_names = []
    for file, page in zip(files, pages, strict=True):
        name = there.get(file.stem) or page.file_name
        if not (pictures / name).is_file():
            raise FileNotFoundError(f"{file}: an annotation without its picture, {pictures / file.stem}.* or {name}")
        file_names.append(name)
    unsized = [i for i, page in enumerate(pages) if not all(page.size_hw)]
    of_headers = sizes_in_headers(
        pictures, [file_names[i] for i in unsized], annotations / f"{listed.stem if listed else 'all'}.sizes.npz"
    )
    sizes = [page.size_hw for page in pages]
    for i, size in zip(unsized, of_headers, strict=True):
        sizes[i] = tuple(size)
    convention, shift = _convention(pages, sizes)
    logging.info("%s: %s", listed or annotations, convention)
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
    starts = [text.count(b"\n", 0, found.start()) + 1 for found in re.finditer(rb"<object[\s>]", text)]
    names, corners = [], []
    for line, item in zip(starts, root.iter("object"), strict=False):
        names.append((item.findtext("name") or "").strip())
        values = [_number(item.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
        if not names[-1] or None in values:
            missing = "name" if not names[-1] else "bndbox with numbers xmin, ymin, xmax and ymax"
            raise ValueError(f"{file}:{line}: this object has no {missing}; correct it or take it out")
        corners.append(values)
    size = [int(_number(root.findtext(f"size/{side}")) or 0) for side in ("height", "width")]
    corners = np.array(corners, np.float64).reshape(-1, 4)
    database = root.findtext("source/database") or ""
    return _Page((root.findtext("filename") or "").strip(), tuple(size), database, names, corners, starts)


def _convention(pages: Sequence[_Page], sizes: Iterable[tuple[int, int]]) -> tuple[str, np.ndarray]:
    """What the corners of a split mean, in words and as what to take off to get edges counted from 0.

    The devkit's are the first and the last pixel, counted from 1: left = xmin - 1, right = xmax. That is how
    supervision writes them, too. Roboflow has written edges counted from 1, where a box may end at width + 1; LabelImg,
    CVAT and VoTT, whose database is Unknown, write edges counted from 0. Boxes at the border tell them apart.
    """
    low = np.concatenate([page.corners[:, :2].ravel() for page in pages])
    beyond = np.concatenate(
        [(page.corners[:, 2:] - size[::-1]).ravel() for page, size in zip(pages, sizes, strict=True)]
    )
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
