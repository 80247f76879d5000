"""A folder of pictures with a COCO instances JSON, as many exporters write it."""

import contextlib
import dataclasses
import gc
import json
import logging
import re
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cdetr_jax.data.sources import PictureFolder, report_unusable, sizes_in_headers
from cdetr_jax.records import Category, Record


class CocoFolder(PictureFolder):
    """A folder of pictures with a COCO instances JSON; records in order of image id, boxes as annotated."""

    def __init__(self, images: str | Path, annotations: str | Path):
        """Reads the annotations; opens the pictures whose records lack height or width.

        That is done once: their sizes are kept beside the annotations, in `<annotations>.sizes.npz`, until one of
        these files changes.

        Args:
          images: the folder that `file_name` is relative to.
          annotations: JSON with `images`, `annotations` and `categories`. `iscrowd` is 0 and `area` is width * height
            where they are not given.
        Raises: FileNotFoundError, if the folder or the file is missing; ValueError, if the file is not as COCO
          defines it; BadPictureError, if a height or width is missing and the picture cannot be read either.
        """
        folder = Path(images)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no such folder of pictures; it goes with {annotations}: set config.data.train_images "
                "and config.data.eval_images to the folders that hold the pictures"
            )
        with _without_garbage_collection():
            content = _read_json(Path(annotations))
            table = _Table.of(annotations, content, "categories")
            ids = table.unique_ids()
            categories = list(map(Category, ids, table.column("name", "a text", _text)))
            records = self._read_records(folder, _Table.of(annotations, content, "images"), content, set(ids))
        root = _supercategory(table.rows, ids, records)
        if root is not None:
            logging.info("%s: category %d names no object but all the others, and is left out", annotations, root)
        super().__init__(folder, records, [c for c in categories if c.id != root], annotations)

    @staticmethod
    def _read_records(folder: Path, images: "_Table", content: dict, category_ids: set[int]) -> list[Record]:
        image_ids = images.unique_ids()
        names = images.column("file_name", "a text", lambda v: (_text(v) or "").replace("\\", "/") or None)
        sizes = [
            images.column(field, "a whole number of pixels", _side, required=False) for field in ("height", "width")
        ]
        order = sorted(range(len(image_ids)), key=image_ids.__getitem__)
        rank_of = {image_ids[i]: rank for rank, i in enumerate(order)}

        objects = _Table.of(images.path, content, "annotations")
        owners = objects.column("image_id", "the id of one of the images", lambda v: _one_of(rank_of, v))
        labels = objects.column("category_id", "the id of a category", lambda v: _one_of(category_ids, v))
        boxes = objects.column("bbox", "4 finite numbers, [left, top, width, height] in pixels", _box)
        crowds = objects.column("iscrowd", "0 or 1", _flag, required=False)
        areas = objects.column("area", "a number", lambda v: v if v != v else _finite(v), required=False)

        rank = np.array([rank_of[owner] for owner in owners], np.int64)
        by_image = np.argsort(rank, kind="stable")
        starts = np.searchsorted(rank[by_image], np.arange(len(order) + 1))
        boxes = np.array(boxes, np.float64).reshape(-1, 4)[by_image]
        labels = np.array(labels, np.int64)[by_image]
        crowds = np.array(crowds, bool)[by_image]
        areas = np.array(areas, np.float64)[by_image]  # None becomes NaN
        areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)

        records = []
        heights, widths = sizes
        unknown = [i for i in order if heights[i] is None or widths[i] is None]

        def advice(k: int) -> str:
            return f"; {images.path}: {images.name_of(unknown[k])} has no height and width: add them, or take it out"

        found = sizes_in_headers(folder, [names[i] for i in unknown], f"{images.path}.sizes.npz", advice)
        for i, (height, width) in zip(unknown, found, strict=True):
            heights[i], widths[i] = height, width
        for i, start, stop in zip(order, starts[:-1], starts[1:], strict=True):
            cut = slice(start, stop)
            records.append(
                Record(image_ids[i], names[i], heights[i], widths[i], boxes[cut], labels[cut], crowds[cut], areas[cut])
            )

        def describe(k: int) -> str:
            return f"annotation {objects.rows[by_image[k]].get('id', 'without id')}"

        report_unusable(images.path, records, describe)
        return records


def _supercategory(rows: list[dict], ids: list[int], records: Sequence[Record]) -> int | None:
    """The id of the category that Roboflow puts before the classes: above all of the others, and without objects."""
    above = {str(row.get("supercategory")) for row in rows} - {"none"}
    roots = [i for row, i in zip(rows, ids, strict=True) if {row["name"]} == above and row["supercategory"] == "none"]
    is_used = any((record.category_ids == root).any() for root in roots for record in records)
    return roots[0] if len(roots) == 1 and not is_used else None


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """COCO's JSON is millions of small objects, which the collector would look through again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# What exporters write for one value: 80, 80.0 or "80". Each returns the value, or None where it can mean nothing else.


def _number(value: Any) -> float | None:
    if type(value) is str and re.fullmatch(r"\s*-?\d{1,19}(\.\d*)?\s*", value):
        value = float(value) if "." in value else int(value)
    return value if type(value) in (int, float) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    if type(number) is float:  # from 2^53 on it may stand for a neighbour
        return int(number) if abs(number) < 2**53 and number.is_integer() else None
    return number if number is not None and abs(number) < 2**63 else None


def _finite(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and abs(number) < 1e15 else None


def _side(value: Any) -> int | None:
    whole = _whole(value)
    return whole if whole is not None and whole > 0 else None


def _one_of(known: Container[int], value: Any) -> int | None:
    whole = _whole(value)
    return whole if whole in known else None


def _flag(value: Any) -> int | None:
    return _one_of((0, 1), int(value) if type(value) is bool else value)


def _text(value: Any) -> str | None:
    return value if type(value) is str else None


def _box(value: Any) -> list[float] | None:
    numbers = [_finite(v) for v in value] if type(value) is list and len(value) == 4 else [None]
    return None if None in numbers else numbers


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such annotation file; set config.data.train_annotations and config.data.eval_annotations to "
            "COCO instances JSON files"
        ) from None
    except (ValueError, RecursionError) as error:  # a wrong character, bytes that are no text, endless brackets
        raise ValueError(f"{path}: not valid JSON ({error}); is the file complete?") from error
    if type(content) is not dict:
        raise ValueError(
            f"{path}: the top level is a {type(content).__name__}, expected an object with images, annotations and "
            "categories; is it a file of results rather than of instances?"
        )
    return content


@dataclasses.dataclass(frozen=True)
class _Table:
    """One of the lists of an instances file, with what its error messages need."""

    path: str | Path
    name: str
    rows: list[dict]

    @staticmethod
    def of(path: str | Path, content: dict, name: str) -> "_Table":
        rows = content.get(name)
        if type(rows) is not list:
            found = "is missing" if name not in content else f"is a {type(rows).__name__}"
            raise ValueError(f"{path}: '{name}' {found}, expected a list of objects; use a COCO instances file")
        for i, row in enumerate(rows):
            if type(row) is not dict:
                raise ValueError(f"{path}: {name}[{i}] is a {type(row).__name__}, expected an object; correct the file")
        return _Table(path, name, rows)

    def column(self, field: str, expected: str, convert: Callable[[Any], Any], *, required: bool = True) -> list[Any]:
        """Returns one field of every row, converted; None where it is missing or null and not required.

        Args:
          expected: what the error message calls it.
          convert: returns the value, or None if it is not as expected.
        Raises: ValueError, at the first value that is missing or not as expected.
        """
        values = []
        for i, row in enumerate(self.rows):
            raw = row.get(field)
            value = None if raw is None else convert(raw)
            if value is None and (required or raw is not None):
                found = "is missing" if field not in row else f"is {json.dumps(raw)[:60]}"
                raise ValueError(
                    f"{self.path}: {self.name_of(i)}: field '{field}' {found}, expected {expected}; correct this entry "
                    "or take it out"
                )
            values.append(value)
        return values

    def unique_ids(self) -> list[int]:
        ids = self.column("id", "a whole number", _whole)
        seen = {}
        for i, value in enumerate(ids):
            if seen.setdefault(value, i) != i:
                raise ValueError(
                    f"{self.path}: {self.name_of(seen[value])} and {self.name_of(i)} have the same id, expected each "
                    "id once; renumber one of them"
                )
        return ids

    def name_of(self, i: int) -> str:
        """Says which row it is: its place, id, and the file's name for a picture."""
        row = self.rows[i]
        known = [f"{key} {row[key]}" for key in ("id", "file_name") if key in row]
        return f"{self.name}[{i}]" + (f" ({', '.join(known)})" if known else "")
