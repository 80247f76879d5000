"""An epoch as tables: every augmentation draw, output size, padded shape and global batch, from a seed and sizes alone.

No picture is opened here, so every host computes the same plan, and a run resumes at any batch bit for bit.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

# What is to be done to one picture, in this order: flip; if crop: resize to first_hw, cut window; resize to size_hw.
ROW = np.dtype(
    [
        ("index", np.int64),  # position in the source; -1 = no picture, the row is padding
        ("flip", np.bool_),  # horizontally
        ("crop", np.bool_),  # False: first_hw and window mean nothing
        ("first_hw", np.int32, 2),
        ("window", np.int32, 4),  # top, left, height, width in the picture of first_hw
        ("size_hw", np.int32, 2),  # of the result, without padding
    ]
)

Shapes = Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Settings of the training augmentation (arXiv:2108.06152 takes over that of arXiv:2005.12872); sizes in pixels.

    Attributes:
      short_sides_px: the short side of the result is one of these, unless the long side would exceed
        long_side_max_px.
      flip_probability: of a horizontal flip.
      crop_probability: of a crop before that resize.
      crop_short_sides_px: the short side is resized to one of these before a crop, whatever the long side.
      crop_sides_px: from and to, for each side of the window; "to" and, if need be, "from" give way to the picture.
    """

    short_sides_px: tuple[int, ...]
    long_side_max_px: int
    flip_probability: float
    crop_probability: float
    crop_short_sides_px: tuple[int, ...]
    crop_sides_px: tuple[int, int]

    def __post_init__(self):
        for name in ("short_sides_px", "crop_short_sides_px"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least one size, each at least 1 pixel")
        for name in ("flip_probability", "crop_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number from 0 to 1")
        if self.long_side_max_px < 1:
            raise ValueError(f"long_side_max_px is {self.long_side_max_px}, expected at least 1 pixel")
        if len(self.crop_sides_px) != 2 or not 1 <= self.crop_sides_px[0] <= self.crop_sides_px[1]:
            raise ValueError(f"crop_sides_px is {self.crop_sides_px}, expected (from, to) with 1 <= from <= to")


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """One pass over the data in global batches of one padded shape each.

    Attributes:
      rows: [batches, B] of ROW.
      shapes_hw: [batches, 2] int, padded height and width in pixels.
    """

    rows: np.ndarray
    shapes_hw: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def rows_for(self, batch: int, host_index: int = 0, host_count: int = 1) -> np.ndarray:
        """Returns a host's contiguous part of a global batch, [B / host_count] of ROW."""
        return np.split(self.rows[batch], host_count)[host_index]


def resized_hw(sizes_hw: np.ndarray, short_side_px: np.ndarray | int, long_side_max_px: int | None) -> np.ndarray:
    """Sizes after a resize that keeps the aspect ratio, with the published rounding.

    Args:
      sizes_hw: [n, 2] int.
      short_side_px: wanted short side, one for all or [n].
      long_side_max_px: where the long side would exceed this, the short side is made smaller (rounded to the nearest
        pixel, so that the long side of a very elongated picture can still be a few pixels over); None: no limit.
    Returns: [n, 2] int64, the long side rounded down, each at least 1.
    """
    sizes = np.asarray(sizes_hw, np.int64).reshape(-1, 2)
    shorter, longer = sizes.min(-1), sizes.max(-1)
    short = np.broadcast_to(np.asarray(short_side_px, np.int64), shorter.shape)
    if long_side_max_px is not None:
        limited = np.rint(long_side_max_px * shorter / longer).astype(np.int64)
        short = np.where(longer / shorter * short > long_side_max_px, np.maximum(limited, 1), short)
    long = (short * longer / shorter).astype(np.int64)  # in floating point, as published
    tall = sizes[:, 0] > sizes[:, 1]
    return np.stack([np.where(tall, long, short), np.where(tall, short, long)], axis=-1)


def smallest_shape(sizes_hw: np.ndarray, shapes: Shapes) -> np.ndarray:
    """Returns [n, 2] int, the padded shape with the smallest area that holds each of the sizes [n, 2].

    Raises: ValueError, if a size fits none of the shapes.
    """
    ordered = _by_area(shapes)
    return ordered[_first_that_holds(sizes_hw, ordered, sizes_hw)]


def evaluation_shapes(short_side_px: int, long_side_max_px: int) -> Shapes:
    """Padded shapes, multiples of 32, for every picture resized so: up to 4:3, up to the longest side, and square."""

    def up(side: int) -> int:
        return -(-side // 32) * 32

    short, long = up(short_side_px), up(long_side_max_px)
    middle = min(up(-(-short_side_px * 4 // 3)), long)
    return tuple(dict.fromkeys(((short, middle), (middle, short), (short, long), (long, short), (long, long))))


def train_plan(
    sizes_hw: np.ndarray, augmentation: Augmentation, shapes: Shapes, *, batch_size: int, seed: int, epoch: int
) -> EpochPlan:
    """Draws one epoch of training: pictures // batch_size global batches, each picture at most once.

    As with PyTorch's shuffled loader, pictures that do not fill a batch are left out, chosen anew each epoch. A picture
    goes into the smallest shape that holds it; those that do not fill a batch there go up to the next that holds them.
    Args:
      sizes_hw: [n, 2] height and width of every picture of the source.
      shapes: padded heights and widths; one of them must hold all the others, to take what is left over.
    Raises: ValueError, if no shape holds all others, or a resized picture fits none.
    """
    sizes = np.asarray(sizes_hw, np.int64).reshape(-1, 2)
    ordered = _by_area(shapes)
    _check_one_holds_all(ordered)
    rng = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
    drawn = _draw_rows(sizes, augmentation, rng)
    steps = len(sizes) // batch_size
    rows = drawn[rng.permutation(len(sizes))[: steps * batch_size]]

    shape_of = _first_that_holds(rows["size_hw"], ordered, sizes[rows["index"]])
    batches = [np.empty((0, batch_size), np.int64)]
    batch_shapes = [np.empty((0, 2), np.int64)]
    for k, shape in enumerate(ordered):
        members = np.flatnonzero(shape_of == k)
        full = len(members) // batch_size
        batches.append(members[: full * batch_size].reshape(full, batch_size))
        batch_shapes.append(np.tile(shape, (full, 1)))
        left = members[full * batch_size :]
        if left.size:  # never in the last shape: steps * batch_size pictures have been dealt out in whole batches
            larger = _first_that_holds(rows["size_hw"][left], ordered[k + 1 :], sizes[rows["index"][left]])
            shape_of[left] = k + 1 + larger
    order = rng.permutation(steps)
    return EpochPlan(rows[np.concatenate(batches)[order]], np.concatenate(batch_shapes)[order])


def eval_plan(
    sizes_hw: np.ndarray, short_side_px: int, long_side_max_px: int, shapes: Shapes, *, batch_size: int
) -> EpochPlan:
    """Every picture once, resized without any randomness, grouped by shape in the source's order.

    The last batch of each shape is filled up with rows of index -1.
    Raises: ValueError, if a resized picture fits none of the shapes.
    """
    sizes = np.asarray(sizes_hw, np.int64).reshape(-1, 2)
    ordered = _by_area(shapes)
    rows = np.zeros(len(sizes), ROW)
    rows["index"] = np.arange(len(sizes))
    rows["size_hw"] = resized_hw(sizes, short_side_px, long_side_max_px)
    shape_of = _first_that_holds(rows["size_hw"], ordered, sizes)
    batches = [np.empty((0, batch_size), ROW)]
    batch_shapes = [np.empty((0, 2), np.int64)]
    for k, shape in enumerate(ordered):
        members = rows[shape_of == k]
        count = -(-len(members) // batch_size)
        padded = np.zeros(count * batch_size, ROW)
        padded["index"] = -1
        padded[: len(members)] = members
        batches.append(padded.reshape(count, batch_size))
        batch_shapes.append(np.tile(shape, (count, 1)))
    return EpochPlan(np.concatenate(batches), np.concatenate(batch_shapes))


def redraw_row(
    size_hw: tuple[int, int], augmentation: Augmentation, shape_hw: Sequence[int], *, seed: int, epoch: int, index: int
) -> np.ndarray:
    """Draws picture `index` for a batch whose padded shape is already decided; a ROW.

    It depends on (seed, epoch, index) alone; a result larger than the shape is scaled down to fit it.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, epoch], spawn_key=(index,)))
    row = _draw_rows(np.array([size_hw]), augmentation, rng)[0]
    row["index"] = index
    factor = min(1.0, *(np.asarray(shape_hw) / row["size_hw"]))
    row["size_hw"] = np.maximum((row["size_hw"] * factor).astype(np.int32), 1)
    return row


def check_shapes(sizes_hw: np.ndarray, augmentation: Augmentation, shapes: Shapes) -> None:
    """Finds out before the first epoch whether a later one could draw a picture that fits none of the shapes.

    Tries each size of picture at each short side: whole, and cropped to the most elongated windows.
    Raises: ValueError, if one does not fit, or if no shape holds all the others.
    """
    ordered = _by_area(shapes)
    _check_one_holds_all(ordered)
    sizes = np.unique(np.asarray(sizes_hw, np.int64).reshape(-1, 2), axis=0)
    cases = [(sizes, sizes)] if augmentation.crop_probability < 1 else []
    for short in augmentation.crop_short_sides_px if augmentation.crop_probability > 0 else ():
        first = resized_hw(sizes, short, None)
        low, high = _window_sides(first, augmentation)
        cases += [(np.stack([low[:, 0], high[:, 1]], -1), sizes), (np.stack([high[:, 0], low[:, 1]], -1), sizes)]
    for before, original in cases:
        for short in augmentation.short_sides_px:
            _first_that_holds(resized_hw(before, short, augmentation.long_side_max_px), ordered, original)


def _draw_rows(sizes: np.ndarray, augmentation: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """The published draws for every picture of sizes [n, 2], in order; [n] of ROW, index counting from 0."""
    n = len(sizes)
    rows = np.zeros(n, ROW)
    rows["index"] = np.arange(n)
    rows["flip"] = rng.random(n) < augmentation.flip_probability
    rows["crop"] = crop = rng.random(n) < augmentation.crop_probability
    first = resized_hw(sizes, rng.choice(augmentation.crop_short_sides_px, n), None)
    low, high = _window_sides(first, augmentation)
    window = rng.integers(low, high + 1)
    corner = rng.integers(0, first - window + 1)
    rows["first_hw"] = first * crop[:, None]
    rows["window"] = np.concatenate([corner, window], axis=-1) * crop[:, None]
    short = rng.choice(augmentation.short_sides_px, n)
    rows["size_hw"] = resized_hw(np.where(crop[:, None], window, sizes), short, augmentation.long_side_max_px)
    return rows


def _window_sides(first_hw: np.ndarray, augmentation: Augmentation) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest height and width of the crop window in pictures of sizes [n, 2]."""
    low, high = augmentation.crop_sides_px
    return np.minimum(low, first_hw), np.minimum(high, first_hw)


def _by_area(shapes: Shapes) -> np.ndarray:
    """The distinct shapes [k, 2], smallest area first. Raises: ValueError, if they are not pairs of sizes."""
    table = np.asarray(shapes)
    if table.ndim != 2 or table.shape[1] != 2 or not len(table) or table.dtype.kind != "i" or table.min() < 1:
        raise ValueError(
            f"padded shapes are {shapes}, expected a list of (height, width) in pixels, such as (800, 1344)"
        )
    table = np.unique(table.astype(np.int64), axis=0)
    return table[np.argsort(table.prod(-1), kind="stable")]


def _check_one_holds_all(ordered: np.ndarray) -> None:
    needed = ordered.max(0)
    if (ordered[-1] < needed).any():
        raise ValueError(
            f"no padded shape of {ordered.tolist()} holds all the others, so pictures left over from one shape may "
            f"have nowhere to go; add {tuple(needed.tolist())} to config.data.train_shapes"
        )


def _first_that_holds(sizes: np.ndarray, ordered: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Position [n] of the first shape that holds each size [n, 2]; originals [n, 2] are for the error message."""
    holds = (sizes[:, None, :] <= ordered[None, :, :]).all(-1)
    unfit = np.flatnonzero(~holds.any(-1))
    if unfit.size:
        original, size = originals[unfit[0]], sizes[unfit[0]]
        raise ValueError(
            f"a picture of {original[0]} x {original[1]} pixels (height x width) becomes {size[0]} x {size[1]}, which "
            f"fits none of the padded shapes {ordered.tolist()}; add a larger one to config.data.train_shapes or "
            "config.data.eval_shapes, or choose smaller sides"
        )
    return holds.argmax(-1)
