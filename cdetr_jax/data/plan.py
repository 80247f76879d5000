"""An epoch as tables: every augmentation draw, output size, padded shape and global batch, from a seed and sizes alone.

No picture is opened here, so every process computes the same plan, and a run resumes at any batch bit for bit.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cdetr_jax.data.buckets import (
    Shapes,
    batch_by_bucket,
    best_shapes,
    bucket_of,
    by_area,
    fit_to_shapes,
    fitted_hw,
)

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

LAST_BATCH = ("drop", "fill")

_SIMULATED_DRAWS = 100_000  # of the augmentation, for the search of shapes


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


@dataclasses.dataclass(frozen=True, eq=False)
class PlanSettings:
    """What the plan of every training epoch depends on.

    Attributes:
      sizes_hw: [n, 2] int, height and width of every picture of the source.
      object_counts: [n] int, objects of every picture that training uses.
      augmentation: what is drawn for a picture.
      shapes: padded heights and widths.
      batch_size: pictures of an optimiser step, a multiple of accumulation_steps.
      seed: of all draws.
      accumulation_steps: micro-batches of a step.
      last_batch: see `steps_per_epoch`.
      max_targets: T; 0: one of `target_sizes`, by what each micro-batch needs.
    """

    sizes_hw: np.ndarray
    object_counts: np.ndarray
    augmentation: Augmentation
    shapes: Shapes
    batch_size: int
    seed: int
    accumulation_steps: int = 1
    last_batch: str = "drop"
    max_targets: int = 0

    def __post_init__(self):
        """Raises: ValueError, if the micro-batches are not equal, or there would be no batch."""
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"a batch of {self.batch_size} pictures cannot be cut in {self.accumulation_steps} equal micro-batches"
            )
        by_area(self.shapes)
        steps_per_epoch(len(self.sizes_hw), self.batch_size, self.last_batch)

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimiser steps of an epoch."""
        return steps_per_epoch(len(self.sizes_hw), self.batch_size, self.last_batch)

    @property
    def micro_batch_size(self) -> int:
        """Pictures of a micro-batch."""
        return self.batch_size // self.accumulation_steps

    @property
    def target_sizes(self) -> tuple[int, ...]:
        """What T of a micro-batch can be, smallest first."""
        return (self.max_targets,) if self.max_targets else target_sizes(self.object_counts, self.micro_batch_size)


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """One pass over the data in global batches of one padded shape each; in training, micro-batches of the steps.

    Attributes:
      rows: [batches, B] of ROW.
      shapes_hw: [batches, 2] int, padded height and width in pixels.
      max_targets: [batches] int, T: no row of the batch has more objects, before any is cropped away.
    """

    rows: np.ndarray
    shapes_hw: np.ndarray
    max_targets: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def rows_for(self, batch: int, process_index: int = 0, process_count: int = 1) -> np.ndarray:
        """Returns a process's contiguous share of a global batch, [B / process_count] of ROW."""
        return np.split(self.rows[batch], process_count)[process_index]


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

    Raises: ValueError, if a size fits none of the shapes; see `fit_to_shapes`.
    """
    buckets = by_area(shapes)
    found = bucket_of(sizes_hw, buckets)
    if (found < 0).any():
        raise ValueError(f"{sizes_hw[found.argmin()].tolist()} fits none of the padded shapes {buckets.tolist()}")
    return buckets[found]


def evaluation_shapes(short_side_px: int, long_side_max_px: int) -> Shapes:
    """Padded shapes, multiples of 32, for every picture resized so: up to 4:3, up to the longest side, and square."""

    def up(side: int) -> int:
        return -(-side // 32) * 32

    short, long = up(short_side_px), up(long_side_max_px)
    middle = min(up(-(-short_side_px * 4 // 3)), long)
    return tuple(dict.fromkeys(((short, middle), (middle, short), (short, long), (long, short), (long, long))))


def search_shapes(sizes_hw: np.ndarray, augmentation: Augmentation, count: int) -> Shapes:
    """Padded shapes for training that waste the fewest pixels; see `best_shapes`.

    Simulates the augmentation with a seed of its own, so that the shapes depend on the arguments alone.
    Args:
      sizes_hw: [n, 2] height and width of every picture of the source.
      count: of shapes at most, the number of programs to be compiled.
    Returns: shapes that hold whatever can be drawn, smallest area first.
    """
    rng = np.random.default_rng(0)
    pictures_hw = np.asarray(sizes_hw, np.int64).reshape(-1, 2)
    simulated = np.resize(rng.permutation(pictures_hw), (_SIMULATED_DRAWS, 2))
    drawn = _draw_rows(simulated, augmentation, rng)["size_hw"]
    largest = _largest_draws(np.unique(pictures_hw, axis=0), augmentation)
    return best_shapes(drawn, count, also_hold_hw=largest.reshape(-1, 2))


def search_eval_shapes(sizes_hw: np.ndarray, short_side_px: int, long_side_max_px: int, count: int) -> Shapes:
    """Padded shapes for evaluation that waste the fewest pixels; see `best_shapes`. Args: as `search_shapes`."""
    return best_shapes(resized_hw(sizes_hw, short_side_px, long_side_max_px), count)


def steps_per_epoch(num_pictures: int, batch_size: int, last_batch: str) -> int:
    """Number of optimiser steps of an epoch.

    Args:
      last_batch: what becomes of the pictures that do not fill one. `drop`: they are left out (as published), chosen
        anew each epoch; `fill`: pictures of the same epoch, drawn anew, join them.
    Raises: ValueError, if it is neither, or there would be no batch.
    """
    if last_batch not in LAST_BATCH:
        raise ValueError(f"config.data.last_batch is {last_batch!r}, expected one of {', '.join(LAST_BATCH)}")
    steps = num_pictures // batch_size if last_batch == "drop" else -(-num_pictures // batch_size)
    if steps == 0:
        raise ValueError(
            f"{num_pictures} pictures do not fill one batch of {batch_size}; use a smaller config.train.batch_size"
            + (", or --config.data.last_batch=fill" if num_pictures else "")
        )
    return steps


def target_sizes(object_counts: np.ndarray, batch_size: int) -> tuple[int, ...]:
    """The few numbers of targets T that batches are padded to, multiples of 4.

    Args:
      object_counts: [n], objects of every picture.
    Returns: what holds 95 % of random batches, and what holds the fullest picture; one number, where they agree.
    """
    most = np.quantile(object_counts, 0.95 ** (1 / batch_size), method="inverted_cdf")
    return tuple(sorted({max(4, -(-int(count) // 4) * 4) for count in (most, np.max(object_counts))}))


def train_plan(settings: PlanSettings, epoch: int) -> EpochPlan:
    """Draws one epoch of training: `steps_per_epoch` batches, each picture once but for what `last_batch` does.

    What the plan calls a batch is one of the `accumulation_steps` micro-batches of an optimiser step, which come one
    after the other: they are put together on their own, so that a large batch wastes no more than a micro-batch would.
    A micro-batch has the smallest shape that holds its pictures, but for what does not come out even; see
    `batch_by_bucket`. Pictures of several shapes that remain at the end go together into the smallest that holds them.
    Where none does, as with lying and upright panoramas, it is the shape that shows most of them, and those that it
    does not hold are scaled down, as is a picture that no shape holds: no epoch brings a shape of its own.
    """
    sizes = np.asarray(settings.sizes_hw, np.int64).reshape(-1, 2)
    buckets = by_area(settings.shapes)
    pictures, micro_batch_size = settings.steps_per_epoch * settings.batch_size, settings.micro_batch_size
    rng = np.random.default_rng(np.random.SeedSequence([settings.seed, epoch]))
    drawn = _draw_rows(sizes, settings.augmentation, rng)
    shuffled = rng.permutation(len(sizes))
    rows = drawn[shuffled[:pictures]]
    order = rng.permutation(settings.steps_per_epoch * settings.accumulation_steps)
    if len(rows) < pictures:
        again = np.resize(shuffled, pictures - len(rows))
        extra = _draw_rows(sizes[again], settings.augmentation, rng)
        extra["index"] = again
        rows = np.concatenate([rows, extra])

    rows["size_hw"] = fit_to_shapes(rows["size_hw"], settings.shapes)
    batches = batch_by_bucket(rows["size_hw"], buckets, bucket_of(rows["size_hw"], buckets), micro_batch_size)
    mixed = batches.remainder.reshape(-1, micro_batch_size)
    mixed_shapes = buckets[[_shows_most(rows["size_hw"][some], buckets) for some in mixed]]
    rows["size_hw"][mixed] = fitted_hw(rows["size_hw"][mixed], mixed_shapes[:, None])
    members = np.concatenate([batches.members, mixed])[order]
    shapes_hw = np.concatenate([buckets[batches.bucket], mixed_shapes])[order]
    choices = np.array(settings.target_sizes)
    fullest = np.asarray(settings.object_counts)[rows["index"]][members].max(-1)
    max_targets = choices[np.searchsorted(choices, fullest)]
    return EpochPlan(rows[members], shapes_hw, max_targets)


def eval_plan(
    sizes_hw: np.ndarray,
    object_counts: np.ndarray,
    short_side_px: int,
    long_side_max_px: int,
    shapes: Shapes,
    batch_size: int,
) -> EpochPlan:
    """Every picture once, resized without any randomness, batches of large shapes first.

    What no shape holds is scaled down to fit. Rows of index -1 fill the last batch, and any other that no remaining
    picture is small enough for. Args: see `PlanSettings`.
    """
    sizes = np.asarray(sizes_hw, np.int64).reshape(-1, 2)
    buckets = by_area(shapes)
    rows = np.zeros(len(sizes) + len(buckets) * (batch_size - 1), ROW)
    rows["index"] = -1
    pictures = rows[: len(sizes)]
    pictures["index"] = np.arange(len(sizes))
    pictures["size_hw"] = fit_to_shapes(resized_hw(sizes, short_side_px, long_side_max_px), shapes)
    smallest = np.full(len(rows), -1)
    smallest[: len(sizes)] = bucket_of(pictures["size_hw"], buckets)
    batches = batch_by_bucket(rows["size_hw"], buckets, smallest, batch_size)
    max_targets = np.full(len(batches.members), target_sizes(object_counts, batch_size)[-1])
    return EpochPlan(rows[batches.members], buckets[batches.bucket], max_targets)


def real_pixels(plan: EpochPlan) -> float:
    """The share of a plan's computed pixels that belong to pictures."""
    return _area(plan.rows["size_hw"]) / (_area(plan.shapes_hw) * plan.rows.shape[1])


def real_pixels_otherwise(plan: EpochPlan, long_side_max_px: int) -> dict[str, float]:
    """What `real_pixels` would be for the same pictures, padded in the usual ways.

    Returns: `square`, all padded to long_side_max_px squared; `random`, batches of as many pictures in random order,
      each padded to the largest height and width in it (as PyTorch does, without multiples of 32).
    """
    sizes = plan.rows["size_hw"][plan.rows["index"] >= 0]
    mixed = np.random.default_rng(0).permutation(sizes)[: len(sizes) // plan.rows.shape[1] * plan.rows.shape[1]]
    mixed = mixed.reshape(-1, plan.rows.shape[1], 2)
    return {
        "square": _area(sizes) / (len(sizes) * long_side_max_px**2),
        "random": _area(mixed) / (_area(mixed.max(1)) * mixed.shape[1]),
    }


def bucket_table(plan: EpochPlan) -> list[str]:
    """Lines to print: the shapes of a plan, how much goes into each, and how much of it is padding."""

    def line(name: str, chosen: EpochPlan) -> str:
        pictures = np.sum(chosen.rows["index"] >= 0)
        share = pictures / max(np.sum(plan.rows["index"] >= 0), 1)
        return f"{name:<15}{len(chosen):>8}{pictures:>10}{share:>8.1%}{1 - real_pixels(chosen):>9.1%}"

    lines = [f"{'padded shape':<15}{'batches':>8}{'pictures':>10}{'share':>8}{'padding':>9}"]
    shapes = by_area(plan.shapes_hw)
    for height, width in shapes.tolist():
        chosen = (plan.shapes_hw == (height, width)).all(-1)
        some = EpochPlan(plan.rows[chosen], plan.shapes_hw[chosen], plan.max_targets[chosen])
        lines.append(line(f"{height:>5} x {width:<5}", some))
    lines.append(line(f"{len(shapes)} shapes", plan))
    for size, batches in zip(*np.unique(plan.max_targets, return_counts=True), strict=True):
        lines.append(f"{size} targets in {batches / len(plan):.1%} of the batches")
    return lines


def redraw_row(settings: PlanSettings, shape_hw: Sequence[int], epoch: int, index: int) -> np.ndarray:
    """Draws picture `index` for a batch whose padded shape is already decided; a ROW.

    It depends on (seed, epoch, index) alone; a result larger than the shape is scaled down to fit it.
    """
    rng = np.random.default_rng(np.random.SeedSequence([settings.seed, epoch], spawn_key=(index,)))
    row = _draw_rows(np.array([settings.sizes_hw[index]]), settings.augmentation, rng)[0]
    row["index"] = index
    row["size_hw"] = fitted_hw(row["size_hw"], np.asarray(shape_hw))
    return row


def may_be_scaled_down(settings: PlanSettings) -> np.ndarray:
    """Which of the pictures [n] the augmentation can make larger than every padded shape, and so are scaled down."""
    sizes, which = np.unique(np.asarray(settings.sizes_hw, np.int64).reshape(-1, 2), axis=0, return_inverse=True)
    largest = _largest_draws(sizes, settings.augmentation)
    unfit = bucket_of(largest.reshape(-1, 2), by_area(settings.shapes)) < 0
    return unfit.reshape(largest.shape[:2]).any(0)[which.ravel()]


def _shows_most(sizes_hw: np.ndarray, buckets: np.ndarray) -> int:
    """Position of the shape [k, 2] that leaves most of the pictures' area when they are scaled down to fit it."""
    factor = np.minimum(1, (buckets[:, None] / sizes_hw).min(-1))
    return int((factor**2 * sizes_hw.prod(-1)).sum(-1).argmax())


def _area(sizes_hw: np.ndarray) -> int:
    return int(sizes_hw.astype(np.int64).prod(-1).sum())


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


def _largest_draws(sizes: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """Sizes [m, n, 2] such that every size that can be drawn for picture i of n is within one of [:, i].

    Each picture at each short side: whole, and cropped to the most elongated windows.
    """
    longest = augmentation.long_side_max_px
    largest = []
    if augmentation.crop_probability < 1:
        largest += [resized_hw(sizes, short, longest) for short in augmentation.short_sides_px]
    for first_short in augmentation.crop_short_sides_px if augmentation.crop_probability > 0 else ():
        low, high = _window_sides(resized_hw(sizes, first_short, None), augmentation)
        for window in (np.stack([low[:, 0], high[:, 1]], -1), np.stack([high[:, 0], low[:, 1]], -1)):
            # A less elongated one reaches the longest side, or what rounding makes of it, with a longer short side.
            limit = longest + window.max(-1, keepdims=True) // (2 * window.min(-1, keepdims=True))
            largest += [np.minimum(resized_hw(window, short, None), limit) for short in augmentation.short_sides_px]
    return np.stack(largest)
