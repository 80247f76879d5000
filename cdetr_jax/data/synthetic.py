"""Made-up pictures of filled shapes with their annotations, for trials and tests without any file."""

import colorsys
import dataclasses
import math

import numpy as np
from PIL import Image

from cdetr_jax.records import Category, Record

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
SIDES = (0.12, 0.5)
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

    Picture `i` depends on its number and on what the set was made with, but not on the set's size. A box is the whole
    shape's, also where a later shape covers a part of it.
    """

    categories = _KINDS

    def __init__(
        self,
        *,
        seed: int,
        size: int,
        height: int,
        width: int,
        max_objects: int,
        sides: tuple[float, float] = SIDES,
        hue_by_class: bool = True,
    ):
        """Draws where the shapes lie; pixels are rendered on demand.

        Args:
          seed: not negative; two seeds give two unrelated sets.
          size: number of pictures.
          height, width: of every picture, in pixels, at least 32.
          max_objects: a picture holds 1 to this many.
          sides: a box's longer side, from and to, as fractions of the picture's shorter side.
          hue_by_class: each class has a hue of its own, which is learnt sooner than a shape; else any.
        Raises: ValueError, if a number is out of range.
        """
        if seed < 0 or size < 1 or max_objects < 1 or min(height, width) < 32:
            raise ValueError(
                f"synthetic shapes with seed {seed}, {size} pictures of {height} x {width} pixels, up to {max_objects} "
                "objects: expected a seed of at least 0, a picture, an object, and sides of at least 32 pixels"
            )
        self._seed = seed
        self._hue_by_class = hue_by_class
        self._shapes = [
            _draw_shapes(np.random.default_rng([seed, i, 0]), height, width, max_objects, sides) for i in range(size)
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
            pixels[where] += coverage[..., None] * (self._draw_colour(rng, shape.kind) - pixels[where])
        pixels += rng.integers(-12, 13, pixels.shape, np.int8)
        return pixels.clip(0, 255).astype(np.uint8)

    def _draw_colour(self, rng: np.random.Generator, kind: Category) -> np.ndarray:
        spread = 0.3 if self._hue_by_class else len(_KINDS) / 2
        hue = (_KINDS.index(kind) + rng.uniform(-spread, spread)) / len(_KINDS)
        saturation, value = rng.uniform(0.6, 1.0), rng.uniform(0.6, 1.0)
        return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def _draw_shapes(
    rng: np.random.Generator, height: int, width: int, max_objects: int, sides: tuple[float, float]
) -> list[_Shape]:
    """Places shapes inside the picture, first to last; one that would hide an earlier one is drawn again."""
    shapes: list[_Shape] = []
    covered: list[float] = []
    for _ in range(rng.integers(1, max_objects + 1)):
        for _ in range(_ATTEMPTS):
            shape = _draw_shape(rng, height, width, sides)
            grown = [c + _share_covered(a.box_xywh, shape.box_xywh) for a, c in zip(shapes, covered, strict=True)]
            if all(share <= _MAX_COVERED for share in grown):
                shapes.append(shape)
                covered = [*grown, 0.0]
                break
    return shapes


def _draw_shape(rng: np.random.Generator, height: int, width: int, sides: tuple[float, float]) -> _Shape:
    kind = _KINDS[rng.integers(len(_KINDS))]
    angle = rng.uniform(-_MAX_TURN, _MAX_TURN)
    low, high = np.array([-1.0, -1.0]), np.array([1.0, 1.0])
    if kind.name in _CORNERS:
        cos, sin = math.cos(angle), math.sin(angle)
        corners = _CORNERS[kind.name] @ np.array([[cos, sin], [-sin, cos]])
        low, high = corners.min(0), corners.max(0)
    radius = rng.uniform(*sides) * min(height, width) / (high - low).max()
    size = (high - low) * radius
    corner = rng.uniform(0, 1, 2) * ([width, height] - size)
    return _Shape(kind, corner - low * radius, radius, angle, np.concatenate([corner, size]))


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
