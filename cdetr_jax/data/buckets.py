"""Buckets: padded shapes, which picture goes into which, batches of one shape each, and which few waste the least.

Knows sizes only. Everything is exact integer work and the same in every process.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Shapes = Sequence[tuple[int, int]]

MULTIPLE_PX = 32  # padded sides are multiples of the backbone's stride

# The search's random kicks out of a local optimum: with 12 and 24 shapes for COCO it finds nothing more after 20.
_KICKS = 40
_NOT_HELD = 1e9  # cost of a size that no shape holds, above any saving


def by_area(shapes: Shapes) -> np.ndarray:
    """Returns the distinct shapes [k, 2], smallest area first. Raises: ValueError, if they are not pairs of sizes."""
    table = np.asarray(shapes)
    if table.ndim != 2 or table.shape[1] != 2 or not len(table) or table.dtype.kind != "i" or table.min() < 1:
        raise ValueError(
            f"padded shapes are {shapes}, expected a list of (height, width) in pixels, such as (800, 1344)"
        )
    table = np.unique(table.astype(np.int64), axis=0)
    return table[np.argsort(table.prod(-1), kind="stable")]


def bucket_of(sizes_hw: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """Position [n] of the first bucket [k, 2], of `by_area`, that holds each size [n, 2]; -1 where none does."""
    holds = _holds(buckets, sizes_hw)
    return np.where(holds.any(0), holds.argmax(0), -1)


def fit_to_shapes(sizes_hw: np.ndarray, shapes: Shapes) -> np.ndarray:
    """Sizes [n, 2], those that no shape holds scaled down to the shape that shows most of them.

    Returns: [n, 2] int64; what fits one of the shapes is unchanged.
    """
    sizes, buckets = np.asarray(sizes_hw, np.int64).reshape(-1, 2), by_area(shapes)
    unfit = bucket_of(sizes, buckets) < 0
    largest = (buckets / sizes[unfit, None]).min(-1).argmax(-1)
    sizes = sizes.copy()
    sizes[unfit] = fitted_hw(sizes[unfit], buckets[largest])
    return sizes


def fitted_hw(sizes_hw: np.ndarray, shapes_hw: np.ndarray) -> np.ndarray:
    """Sizes [..., 2] scaled down to fit their shapes [..., 2]; those that fit stay as they are."""
    sizes, shapes = np.asarray(sizes_hw, np.int64), np.asarray(shapes_hw)
    by_side = sizes[..., None, :] * shapes[..., :, None] // sizes[..., :, None]  # so that height, or width, just fits
    return np.minimum(sizes, by_side.min(-2)).clip(min=1)


class BucketedBatches(NamedTuple):
    """Pictures in batches of one padded shape each.

    Attributes:
      members: [batches, B] int, positions of the pictures.
      bucket: [batches] int, positions of the shapes.
      remainder: [m] int, the pictures that could not be brought together in a batch of any shape.
    """

    members: np.ndarray
    bucket: np.ndarray
    remainder: np.ndarray


def batch_by_bucket(
    sizes_hw: np.ndarray, buckets: np.ndarray, smallest: np.ndarray, batch_size: int
) -> BucketedBatches:
    """Puts pictures into full batches of the smallest shapes that hold them, the largest shapes first.

    What does not fill a batch of its shape is joined by pictures that a smaller shape would have held, those that lose
    least first. So each shape has at most one mixed batch, and what is missing at the end is missing in the smallest
    shape. Where too few pictures are small enough to join, the batch takes a larger shape that more of them fit.
    Args:
      sizes_hw: [n, 2]; pictures that are equally good are taken in this order.
      buckets: [k, 2], of `by_area`.
      smallest: [n], of `bucket_of`; -1: padding of no size, good for any batch, which need not be used up.
    """
    holds = _holds(buckets, sizes_hw)
    unused = np.ones(len(sizes_hw), bool)
    members, bucket = [np.empty((0, batch_size), np.int64)], [np.empty(0, np.int64)]
    remainder = [np.empty(0, np.int64)]
    for own in reversed(range(len(buckets))):
        mine = np.flatnonzero(unused & (smallest == own))
        full = len(mine) // batch_size
        members.append(mine[: full * batch_size].reshape(full, batch_size))
        bucket.append(np.full(full, own))
        unused[mine] = False
        rest = mine[full * batch_size :]
        if not rest.size:
            continue
        missing = batch_size - len(rest)
        for larger in range(own, len(buckets)):
            joining = np.flatnonzero(unused & holds[larger]) if holds[larger, rest].all() else rest[:0]
            if len(joining) >= missing:
                joining = joining[np.argsort(-smallest[joining], kind="stable")[:missing]]
                members.append(np.concatenate([rest, joining])[None])
                bucket.append(np.array([larger]))
                unused[joining] = False
                break
        else:
            remainder.append(rest)
    return BucketedBatches(np.concatenate(members), np.concatenate(bucket), np.concatenate(remainder))


def best_shapes(sizes_hw: np.ndarray, count: int, also_hold_hw: np.ndarray | None = None) -> Shapes:
    """Searches the shapes that pad the least, each picture in the smallest that holds it.

    A greedy choice, then each shape in turn is put where it saves most, until none moves; that again from random kicks.
    Args:
      sizes_hw: [n, 2], as they are going to occur.
      count: of shapes at most; fewer, where more would save nothing.
      also_hold_hw: [m, 2], rare sizes that have to fit, too.
    Returns: heights and widths, multiples of 32, smallest area first; every size fits one of them.
    """
    if count < 1:
        raise ValueError(f"the number of padded shapes is {count}, expected at least 1")
    common, often = np.unique(_in_multiples(sizes_hw), axis=0, return_counts=True)
    rare = np.unique(_in_multiples(np.empty((0, 2)) if also_hold_hw is None else also_hold_hw), axis=0)
    cells, cell_of = np.unique(np.concatenate([common, rare]), axis=0, return_inverse=True)
    weights = np.bincount(cell_of.ravel(), np.concatenate([often, np.ones(len(rare))]))

    sides = [np.unique(cells[:, axis]) for axis in range(2)]
    candidates = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 2)
    holds = _holds(candidates, cells)
    needed = [np.where(holds, cells[:, axis], 0).max(1) for axis in range(2)]
    tight = (np.stack(needed, -1) == candidates).all(-1)
    candidates, holds = candidates[tight], holds[tight]

    areas = candidates.prod(-1).astype(np.float64)  # whole numbers below 2^53: exact in any order of summation
    held_weights = holds * weights
    costs = np.where(holds, areas[:, None], _NOT_HELD)

    def best_addition(chosen: list[int]) -> tuple[int, float]:
        cost = costs[chosen].min(0, initial=_NOT_HELD)
        saved = np.einsum("ij,ij->i", np.maximum(cost - areas[:, None], 0), held_weights)
        best = int(saved.argmax())
        return best, float(cost @ weights - saved[best])

    def descend(chosen: list[int]) -> tuple[list[int], float]:
        while len(chosen) < min(count, len(candidates)):
            chosen = [*chosen, best_addition(chosen)[0]]
        total = np.inf
        while True:
            before = total
            for k in range(len(chosen)):
                others = chosen[:k] + chosen[k + 1 :]
                added, total = best_addition(others)
                chosen = [*others[:k], added, *others[k:]]
            if total >= before:
                return chosen, total

    chosen, total = descend([])
    rng = np.random.default_rng(0)
    for _ in range(_KICKS):
        kept = rng.permutation(chosen)[: max(len(chosen) - 2, 0)].tolist()
        kicked, kicked_total = descend([*kept, int(rng.integers(len(candidates)))])
        if kicked_total < total:
            chosen, total = kicked, kicked_total
    used = np.unique(costs[chosen].argmin(0))
    return tuple((h, w) for h, w in by_area(candidates[np.array(chosen)[used]] * MULTIPLE_PX).tolist())


def _holds(shapes: np.ndarray, sizes_hw: np.ndarray) -> np.ndarray:
    """Returns [k, n], True where a shape [k, 2] holds a size [n, 2]."""
    shapes, sizes = np.asarray(shapes), np.asarray(sizes_hw)
    return (sizes[:, 0] <= shapes[:, :1]) & (sizes[:, 1] <= shapes[:, 1:])


def _in_multiples(sizes_hw: np.ndarray) -> np.ndarray:
    return -(-np.asarray(sizes_hw, np.int64) // MULTIPLE_PX)
