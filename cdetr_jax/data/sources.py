"""Random-access sources of annotated pictures: a COCO folder and made-up shapes. Both give the same record."""

import colorsys
import dataclasses
import json
import logging
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from cdetr_jax.structs import Category, Record

_PICTURE_ERRORS = (
    OSError,  # missing, not a picture, truncated
    ValueError,
    SyntaxError,  # Pillow's word for a broken PNG
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class BadPictureError(ValueError):
    """A picture file that is missing or cannot be decoded; the message starts with its path."""


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


# ---------------------------------------------------------------------------------------------- picture files


def decode_rgb(image: Image.Image) -> np.ndarray:
    """Converts a Pillow image of any integer mode to uint8 [H, W, 3] RGB.

    16 bits become the upper 8 (Pillow alone would clip them to white); alpha is dropped; CMYK and palettes are
    resolved.
    Raises: ValueError, if the pixels are floating-point numbers, whose range nobody states; whatever Pillow raises
      when the data are damaged.
    """
    if image.mode == "F":
        raise ValueError("the pixels are floating-point numbers; save the picture with 8 bits per channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        gray = np.minimum(np.asarray(image).astype(np.int64).clip(min=0) >> 8, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=-1)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns when such a palette goes to RGB in one step
    return np.array(image.convert("RGB"))


def open_picture(path: str | Path) -> np.ndarray:
    """Reads a picture that has no annotation, turned the way its EXIF tag says: uint8 [H, W, 3] RGB.

    Raises: BadPictureError, if the file is missing or cannot be decoded.
    """
    try:
        with _open_checked(path) as image:
            return decode_rgb(ImageOps.exif_transpose(image))
    except _PICTURE_ERRORS as error:
        raise _bad_picture(path, error) from error


def _open_checked(path: str | Path) -> Image.Image:
    image = Image.open(path)
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise ValueError(f"{image.width} x {image.height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS")
    return image


def _bad_picture(path: str | Path, error: Exception, advice: str = "") -> BadPictureError:
    cause = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
    return BadPictureError(f"{path}: cannot read this picture ({cause}){advice}")


# ------------------------------------------------------------------------------------------------ COCO folder


class CocoFolder:
    """A folder of pictures with a COCO instances JSON; records in order of image id, boxes as annotated."""

    def __init__(self, images: str | Path, annotations: str | Path):
        """Reads the annotations; opens a picture only if its record lacks height or width.

        Args:
          images: the folder that `file_name` is relative to.
          annotations: JSON with `images`, `annotations` and `categories`. `iscrowd` is 0 and `area` is width * height
            where they are not given.
        Raises: FileNotFoundError, if the folder or the file is missing; ValueError, if the file is not as COCO
          defines it; BadPictureError, if a height or width is missing and the picture cannot be read either.
        """
        self._folder = Path(images)
        if not self._folder.is_dir():
            raise FileNotFoundError(
                f"{self._folder}: no such folder of pictures; it goes with {annotations}: set config.data.train_images "
                "and config.data.eval_images to the folders that hold the pictures"
            )
        content = _read_json(Path(annotations))
        categories = _Table.of(annotations, content, "categories")
        ids = categories.unique_ids()
        names = categories.column("name", "a text", lambda v: type(v) is str)
        self.categories = tuple(sorted((Category(*pair) for pair in zip(ids, names, strict=True)), key=lambda c: c.id))
        self.records = self._read_records(_Table.of(annotations, content, "images"), content, set(ids))

    def __len__(self) -> int:
        return len(self.records)

    def load_image(self, i: int) -> np.ndarray:
        """Returns picture `i` as uint8 [H, W, 3] RGB.

        It comes as stored, as in the published code, if that is the annotated size; if only the picture turned by its
        EXIF tag has the annotated size, it is turned.
        Raises: BadPictureError, if the file is missing or damaged; ValueError, if its size is not the annotated one.
        """
        record = self.records[i]
        path = self._folder / record.file_name
        try:
            with _open_checked(path) as image:
                stored = image.size
                if stored != (record.width, record.height):
                    image = ImageOps.exif_transpose(image)
                pixels = decode_rgb(image)
        except _PICTURE_ERRORS as error:
            advice = '; replace it, or set config.data.on_error = "skip" to do without damaged pictures'
            raise _bad_picture(path, error, advice) from error
        if pixels.shape[:2] != (record.height, record.width):
            raise ValueError(
                f"{path}: the picture is {stored[0]} x {stored[1]} pixels but image {record.image_id} is annotated as "
                f"{record.width} x {record.height} (width x height); its boxes would be wrong: correct the "
                "annotation or the file"
            )
        return pixels

    def _read_records(self, images: "_Table", content: dict, category_ids: set[int]) -> tuple[Record, ...]:
        image_ids = images.unique_ids()
        names = images.column("file_name", "a text", lambda v: type(v) is str and v != "")
        sizes = [
            images.column(field, "a whole number of pixels", lambda v: v is None or (_is_int(v) and v > 0), None)
            for field in ("height", "width")
        ]
        order = sorted(range(len(image_ids)), key=image_ids.__getitem__)
        rank_of = {image_ids[i]: rank for rank, i in enumerate(order)}

        objects = _Table.of(images.path, content, "annotations")
        owners = objects.column("image_id", "the id of one of the images", lambda v: _is_int(v) and v in rank_of)
        labels = objects.column("category_id", "the id of a category", lambda v: _is_int(v) and v in category_ids)
        boxes = objects.column("bbox", "4 finite numbers, [left, top, width, height] in pixels", _is_box)
        crowds = objects.column("iscrowd", "0 or 1", lambda v: type(v) in (int, bool) and v in (0, 1), 0)
        areas = objects.column("area", "a number", lambda v: type(v) in (int, float), math.nan)

        rank = np.array([rank_of[owner] for owner in owners], np.int64)
        by_image = np.argsort(rank, kind="stable")
        starts = np.searchsorted(rank[by_image], np.arange(len(order) + 1))
        boxes = np.array(boxes, np.float64).reshape(-1, 4)[by_image]
        labels = np.array(labels, np.int64)[by_image]
        crowds = np.array(crowds, bool)[by_image]
        areas = np.array(areas, np.float64)[by_image]
        areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)

        records = []
        for i, start, stop in zip(order, starts[:-1], starts[1:], strict=True):
            height, width = sizes[0][i], sizes[1][i]
            if height is None or width is None:
                height, width = self._size_in_header(images, i, names[i])
            cut = slice(start, stop)
            records.append(
                Record(image_ids[i], names[i], height, width, boxes[cut], labels[cut], crowds[cut], areas[cut])
            )
        _report_unusable(images.path, records, objects.rows, by_image)
        return tuple(records)

    def _size_in_header(self, images: "_Table", i: int, name: str) -> tuple[int, int]:
        try:
            with _open_checked(self._folder / name) as image:
                return image.height, image.width
        except _PICTURE_ERRORS as error:
            advice = f"; {images.path}: {images.name_of(i)} has no height and width: add them, or take it out"
            raise _bad_picture(self._folder / name, error, advice) from error


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


def _report_unusable(path: str | Path, records: list[Record], objects: list[dict], by_image: np.ndarray) -> None:
    """Logs how many boxes can be no training target; evaluation keeps them all."""
    if not by_image.size:
        return
    counts = [len(record.boxes_xywh_px) for record in records]
    heights = np.repeat([record.height for record in records], counts)
    widths = np.repeat([record.width for record in records], counts)
    inside = clip_to_picture(np.concatenate([record.boxes_xywh_px for record in records]), heights, widths)[1]
    unusable = np.flatnonzero(~inside & ~np.concatenate([record.is_crowd for record in records]))
    if unusable.size:
        first = objects[by_image[unusable[0]]]
        record = records[np.searchsorted(np.cumsum(counts), unusable[0], side="right")]
        logging.warning(
            "%s: %d of %d boxes have no area inside their picture and are left out of training; the first is "
            "annotation %s of %s (%d x %d pixels): bbox %s",
            *(path, unusable.size, by_image.size, first.get("id", "without id"), record.file_name),
            *(record.width, record.height, first["bbox"]),
        )


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_box(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and all(type(v) in (int, float) and abs(v) < 1e15 for v in value)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such annotation file; set config.data.train_annotations and config.data.eval_annotations to "
            "COCO instances JSON files"
        ) from None
    except ValueError as error:  # what json raises for a wrong character, and for bytes that are no text
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

    def column(self, field: str, expected: str, accept: Callable[[Any], bool], *default: Any) -> list:
        """Returns one field of every row. Raises: ValueError, at the first value that is missing or not accepted."""
        values = [row.get(field, *default) for row in self.rows]
        for i, value in enumerate(values):
            if not accept(value):
                found = "is missing" if field not in self.rows[i] else f"is {json.dumps(value)[:60]}"
                raise ValueError(
                    f"{self.path}: {self.name_of(i)}: field '{field}' {found}, expected {expected}; correct this entry "
                    "or take it out"
                )
        return values

    def unique_ids(self) -> list[int]:
        ids = self.column("id", "a whole number", _is_int)
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


# -------------------------------------------------------------------------------------------- synthetic shapes

# On purpose neither from 0 nor without gaps, as in COCO.
_KINDS = (
    Category(1, "disc"),
    Category(2, "square"),
    Category(3, "triangle"),
    Category(5, "cross"),
    Category(8, "ring"),
)
_ARM = 1 / 3  # half the width of a cross's arm, as a fraction of half its length
_CORNERS = {  # outermost points, y down; a disc and a ring reach from -1 to 1 however they are turned
    "square": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]),
    "triangle": np.array([[0, -1], [math.sqrt(0.75), 0.5], [-math.sqrt(0.75), 0.5]]),
    "cross": np.array([[x, y] for a in (-1, 1) for b in (-_ARM, _ARM) for x, y in ((a, b), (b, a))]),
}
_SIDES = (0.12, 0.5)  # longer side of a box, as a fraction of the picture's shorter side
_MAX_TURN = math.radians(20)
_MAX_COVERED = 0.3  # of a box, by later boxes; keeps at least half of even a cross visible
_ATTEMPTS = 20


@dataclasses.dataclass(frozen=True)
class _Shape:
    kind: Category
    centre_xy: np.ndarray
    radius: float  # pixels per unit of the outline
    angle: float
    box_xywh: np.ndarray


class SyntheticShapes:
    """Made-up pictures of filled shapes on a grey textured background, for trials and tests without any file.

    Picture `i` depends on (seed, i, height, width, max_objects) alone. A box is the whole shape's, also where a later
    shape covers a part of it.
    """

    categories = _KINDS

    def __init__(self, *, seed: int, size: int, height: int, width: int, max_objects: int):
        """Draws where the shapes lie; pixels are rendered on demand.

        Args:
          seed: not negative; two seeds give two unrelated sets.
          size: number of pictures.
          height, width: of every picture, in pixels, at least 32.
          max_objects: a picture holds 1 to this many.
        Raises: ValueError, if a number is out of range.
        """
        if seed < 0 or size < 1 or max_objects < 1 or min(height, width) < 32:
            raise ValueError(
                f"synthetic shapes with seed {seed}, {size} pictures of {height} x {width} pixels, up to {max_objects} "
                "objects: expected a seed of at least 0, a picture, an object, and sides of at least 32 pixels"
            )
        self._seed = seed
        self._shapes = [
            _draw_shapes(np.random.default_rng([seed, i, 0]), height, width, max_objects) for i in range(size)
        ]
        self.records = tuple(
            Record(
                image_id=i + 1,
                file_name=f"synthetic-{seed}-{i}",
                height=height,
                width=width,
                boxes_xywh_px=np.stack([shape.box_xywh for shape in shapes]),
                category_ids=np.array([shape.kind.id for shape in shapes], np.int64),
                is_crowd=np.zeros(len(shapes), bool),
                areas=np.array([shape.box_xywh[2] * shape.box_xywh[3] for shape in shapes]),
            )
            for i, shapes in enumerate(self._shapes)
        )

    def __len__(self) -> int:
        return len(self.records)

    def load_image(self, i: int) -> np.ndarray:
        """Renders picture `i` as uint8 [H, W, 3] RGB."""
        record = self.records[i]
        rng = np.random.default_rng([self._seed, i, 1])
        base = rng.uniform(70, 185) + rng.uniform(-15, 15, 3)
        coarse = (
            (base + rng.uniform(-45, 45, (4, 4, 1)) + rng.uniform(-15, 15, (4, 4, 3))).clip(0, 255).astype(np.uint8)
        )
        smooth = Image.fromarray(coarse).resize((record.width, record.height), Image.Resampling.BICUBIC)
        pixels = np.array(smooth, np.float32)
        for shape in self._shapes[i]:
            where, coverage = _rasterise(shape, record.height, record.width)
            pixels[where] += coverage[..., None] * (_draw_colour(rng, shape.kind) - pixels[where])
        pixels += rng.integers(-12, 13, pixels.shape, np.int8)
        return pixels.clip(0, 255).astype(np.uint8)


def _draw_shapes(rng: np.random.Generator, height: int, width: int, max_objects: int) -> list[_Shape]:
    """Places shapes inside the picture, first to last; one that would hide an earlier one is drawn again."""
    shapes: list[_Shape] = []
    covered: list[float] = []
    for _ in range(rng.integers(1, max_objects + 1)):
        for _ in range(_ATTEMPTS):
            shape = _draw_shape(rng, height, width)
            grown = [c + _share_covered(a.box_xywh, shape.box_xywh) for a, c in zip(shapes, covered, strict=True)]
            if all(share <= _MAX_COVERED for share in grown):
                shapes.append(shape)
                covered = [*grown, 0.0]
                break
    return shapes


def _draw_shape(rng: np.random.Generator, height: int, width: int) -> _Shape:
    kind = _KINDS[rng.integers(len(_KINDS))]
    angle = rng.uniform(-_MAX_TURN, _MAX_TURN)
    low, high = np.array([-1.0, -1.0]), np.array([1.0, 1.0])
    if kind.name in _CORNERS:
        cos, sin = math.cos(angle), math.sin(angle)
        corners = _CORNERS[kind.name] @ np.array([[cos, sin], [-sin, cos]])
        low, high = corners.min(0), corners.max(0)
    radius = rng.uniform(*_SIDES) * min(height, width) / (high - low).max()
    size = (high - low) * radius
    corner = rng.uniform(0, 1, 2) * ([width, height] - size)
    return _Shape(kind, corner - low * radius, radius, angle, np.concatenate([corner, size]))


def _draw_colour(rng: np.random.Generator, kind: Category) -> np.ndarray:
    """A colour around the class's own hue: shape and hue together can be learnt in minutes on a CPU."""
    hue = (_KINDS.index(kind) + rng.uniform(-0.3, 0.3)) / len(_KINDS)
    saturation, value = rng.uniform(0.6, 1.0), rng.uniform(0.6, 1.0)
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def _share_covered(box: np.ndarray, cover: np.ndarray) -> float:
    left, top, width, height = box.tolist()
    x, y, w, h = cover.tolist()
    across = max(0.0, min(left + width, x + w) - max(left, x))
    down = max(0.0, min(top + height, y + h) - max(top, y))
    return across * down / (width * height)


def _rasterise(shape: _Shape, height: int, width: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """Returns where the shape lies, and how much of each pixel there it covers, [h, w] float32 from 0 to 1."""
    left, top, w, h = shape.box_xywh
    rows = slice(max(math.floor(top) - 1, 0), min(math.ceil(top + h) + 1, height))
    columns = slice(max(math.floor(left) - 1, 0), min(math.ceil(left + w) + 1, width))
    dx = (np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5 - shape.centre_xy[0]) / shape.radius
    dy = (np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5 - shape.centre_xy[1]) / shape.radius
    cos, sin = math.cos(shape.angle), math.sin(shape.angle)
    x, y = cos * dx + sin * dy, cos * dy - sin * dx
    distance = _outside_distance(shape.kind.name, x, y) * shape.radius
    return (rows, columns), (0.5 - distance).clip(0, 1).astype(np.float32)


def _outside_distance(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance from the outline of the unit shape, negative inside."""
    across, down = np.abs(x), np.abs(y)
    match name:
        case "disc":
            return np.hypot(x, y) - 1
        case "ring":
            return np.abs(np.hypot(x, y) - 0.75) - 0.25
        case "square":
            return np.maximum(across, down) - 1
        case "triangle":
            return np.maximum(y, math.sqrt(0.75) * across - 0.5 * y) - 0.5
        case "cross":
            return np.minimum(np.maximum(across - 1, down - _ARM), np.maximum(across - _ARM, down - 1))
    raise AssertionError(name)
