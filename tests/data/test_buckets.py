"""Padded shapes: how batches are made for them, how good the searched ones are, and the table of them."""

import dataclasses
import itertools
import time

import numpy as np
import pytest
from published import PUBLISHED, draw_plan, plan_settings

from cdetr_jax.data.buckets import batch_by_bucket, best_shapes, bucket_of, by_area
from cdetr_jax.data.plan import (
    bucket_table,
    eval_plan,
    may_be_scaled_down,
    real_pixels,
    real_pixels_otherwise,
    search_eval_shapes,
    search_shapes,
)

# Heights and widths of the 128 pictures of coco128, the first of COCO train2017, and how many have them.
COCO128 = {
    (218, 640): 1, (226, 640): 1, (248, 640): 1, (312, 460): 1, (313, 500): 1, (327, 640): 1, (332, 500): 1,
    (333, 500): 1, (336, 448): 1, (360, 640): 1, (374, 500): 1, (375, 500): 3, (389, 640): 1, (406, 640): 1,
    (407, 640): 1, (416, 640): 1, (424, 640): 1, (425, 640): 3, (426, 640): 5, (427, 640): 12, (428, 640): 4,
    (446, 640): 1, (478, 640): 1, (480, 640): 35, (481, 640): 2, (484, 640): 1, (488, 640): 1, (491, 640): 1,
    (495, 500): 1, (500, 333): 1, (500, 375): 1, (500, 381): 1, (500, 409): 1, (500, 473): 1, (500, 600): 1,
    (513, 640): 1, (536, 640): 1, (573, 640): 1, (580, 640): 1, (600, 600): 1, (611, 640): 1, (612, 612): 1,
    (640, 359): 1, (640, 360): 1, (640, 416): 1, (640, 423): 1, (640, 426): 1, (640, 427): 6, (640, 428): 1,
    (640, 446): 1, (640, 480): 9, (640, 481): 1, (640, 512): 1, (640, 516): 1, (640, 520): 1, (640, 565): 1,
    (640, 591): 1, (640, 638): 1,
}  # fmt: skip
SIZES_128 = np.repeat(list(COCO128), list(COCO128.values()), axis=0)


@pytest.fixture(scope="module")
def coco_sizes():
    """As many sizes as COCO train2017 has pictures."""
    return SIZES_128[np.random.default_rng(0).integers(0, 128, 118_287)]


@pytest.fixture(scope="module")
def coco_shapes(coco_sizes):
    return {count: search_shapes(coco_sizes, PUBLISHED, count) for count in (12, 24)}


def _batches(sizes, shapes, batch_size):
    sizes = np.array(sizes)
    buckets = by_area(shapes)
    return batch_by_bucket(sizes, buckets, bucket_of(sizes, buckets), batch_size)


def test_what_does_not_fill_a_batch_is_joined_by_the_next_smaller():
    # Of (90, 90): pictures 1, 4 and 6; of (50, 100): 0 and 5; of (40, 40): 2, 3, 7 and 8.
    sizes = [(50, 100), (90, 90), (40, 40), (9, 9), (80, 80), (50, 90), (70, 70), (20, 20), (30, 30)]
    found = _batches(sizes, [(40, 40), (90, 90), (50, 100)], 3)
    assert found.members.tolist() == [[1, 4, 6], [0, 5, 2], [3, 7, 8]]
    assert found.bucket.tolist() == [2, 1, 0]
    # One more of (90, 90): picture 5 loses least there, then any of (40, 40); picture 0 does not fit.
    found = _batches([*sizes[:7], (88, 88), (30, 30)], [(40, 40), (90, 90), (50, 90), (50, 100)], 3)
    assert found.members.tolist() == [[1, 4, 6], [7, 5, 2], [0, 3, 8]]
    assert found.remainder.size == 0


def test_batches_go_up_where_too_few_can_join():
    # No second picture fits (10, 80), so it is joined in (80, 80), which fits both.
    found = _batches([(10, 80), (60, 10)], [(10, 80), (60, 10), (80, 80)], 2)
    assert (found.members.tolist(), found.bucket.tolist(), found.remainder.tolist()) == ([[0, 1]], [2], [])
    # Without it, neither gets a batch.
    found = _batches([(10, 80), (60, 10)], [(10, 80), (60, 10)], 2)
    assert (found.members.shape, sorted(found.remainder)) == ((0, 2), [0, 1])


@pytest.mark.parametrize("seed", range(20))
def test_everything_is_in_one_batch_and_fits(seed):
    rng = np.random.default_rng(seed)
    shapes = rng.integers(20, 100, (6, 2)).tolist()
    whole = np.max(shapes, 0)
    sizes = rng.integers(1, whole + 1, (420, 2))
    sizes = sizes[(sizes[:, None] <= shapes).all(-1).any(-1)]
    sizes = sizes[: len(sizes) // 7 * 7]
    found = _batches(sizes, shapes, 7)
    assert sorted([*found.members.ravel(), *found.remainder]) == list(range(len(sizes)))
    assert len(found.remainder) % 7 == 0
    buckets = by_area(shapes)
    assert (sizes[found.members] <= buckets[found.bucket][:, None]).all()
    # At most one batch has to be made up for each shape.
    smallest = bucket_of(sizes, buckets)
    mixed = found.bucket[(smallest[found.members] != found.bucket[:, None]).any(-1)]
    assert len(mixed) <= len(buckets)
    # A shape that holds all others can always take what is left over.
    assert not _batches(sizes, [*shapes, tuple(whole)], 7).remainder.size


def _padded_area(sizes, shapes):
    return sum(min(h * w for h, w in shapes if h >= a and w >= b) for a, b in sizes)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_search_finds_the_best_shapes(seed, count):
    """Against trying all; sides of up to 6 times 32 pixels."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6 * 32 + 1, (30, 2))
    sides = [(h, w) for h in range(32, 193, 32) for w in range(32, 193, 32)]
    top = -(-sizes.max(0) // 32) * 32
    best = min(
        _padded_area(sizes.tolist(), shapes)
        for shapes in itertools.combinations(sides, count)
        if all(any(h >= a and w >= b for h, w in shapes) for a, b in sizes.tolist())
    )
    shapes = best_shapes(sizes, count)
    assert len(shapes) <= count
    assert np.max(shapes, 0).tolist() == top.tolist()
    assert _padded_area(sizes.tolist(), shapes) == best


def test_search_keeps_to_what_is_needed():
    sizes = np.array([(30, 60), (32, 64), (64, 33), (65, 1)])
    assert best_shapes(sizes, 9) == ((32, 64), (96, 32), (64, 64))  # no more would save anything
    assert best_shapes(sizes, 1) == ((96, 64),)
    # A rare size is held even where that costs many others.
    common = np.tile([(32, 32)], (10_000, 1))
    assert best_shapes(common, 1, np.array([(320, 640)])) == ((320, 640),)
    assert best_shapes(common, 2, np.array([(320, 640), (640, 320)])) == ((32, 32), (640, 640))
    with pytest.raises(ValueError, match="number of padded shapes is 0, expected at least 1"):
        best_shapes(sizes, 0)


@pytest.mark.parametrize(
    "settings",
    [
        PUBLISHED,
        dataclasses.replace(PUBLISHED, crop_probability=1.0, crop_sides_px=(100, 900), short_sides_px=(500, 900)),
        dataclasses.replace(PUBLISHED, crop_probability=0.001, crop_sides_px=(50, 600), long_side_max_px=700),
    ],
)
def test_searched_shapes_hold_whatever_is_drawn(settings):
    shapes = search_shapes(SIZES_128, settings, 6)
    assert search_shapes(SIZES_128, settings, 6) == shapes
    assert len(shapes) == 6
    assert not may_be_scaled_down(plan_settings(SIZES_128, settings, shapes, batch_size=1)).any()
    sizes = np.tile(SIZES_128, (300, 1))
    for epoch in range(3):
        plan = draw_plan(sizes, settings, shapes, batch_size=8, seed=5, epoch=epoch)
        assert (plan.rows["size_hw"] <= plan.shapes_hw[:, None]).all()
        assert {tuple(shape) for shape in plan.shapes_hw.tolist()} <= set(shapes)


@pytest.mark.parametrize(("count", "expected"), [(12, 0.83), (24, 0.88)])
@pytest.mark.parametrize(
    ("batch_size", "micro"),
    [(1, 1), (2, 1), (8, 1), (16, 1), (64, 1), (256, 1), (1024, 4), (4096, 8), (16_384, 32)],
)
def test_little_is_padded_at_any_batch_size(coco_sizes, coco_shapes, count, expected, batch_size, micro):
    """An epoch of COCO's size, everything counted: batches made up of several shapes, too."""
    started = time.process_time()
    plan = draw_plan(
        coco_sizes,
        PUBLISHED,
        coco_shapes[count],
        batch_size=batch_size,
        accumulation_steps=micro,
        seed=0,
        epoch=0,
    )
    assert time.process_time() - started < 3
    steps = 118_287 // batch_size
    assert plan.rows.shape == (steps * micro, batch_size // micro)
    assert len(np.unique(plan.rows["index"])) == steps * batch_size
    assert (plan.rows["size_hw"] <= plan.shapes_hw[:, None]).all()
    assert len({tuple(shape) for shape in plan.shapes_hw.tolist()}) <= count
    assert not (plan.shapes_hw % 32).any()
    real = sum(h * w for h, w in plan.rows["size_hw"].reshape(-1, 2).tolist())
    computed = sum(h * w * (batch_size // micro) for h, w in plan.shapes_hw.tolist())
    assert real / computed >= expected
    assert real_pixels(plan) == pytest.approx(real / computed, rel=1e-12)


def test_search_is_fast(coco_sizes):
    started = time.process_time()
    search_shapes(coco_sizes, PUBLISHED, 24)
    assert time.process_time() - started < 6  # 1.5 on an idle core


@pytest.mark.parametrize(("batch_size", "random"), [(2, 0.79), (8, 0.54), (16, 0.47)])
def test_the_usual_ways_pad_much_more(coco_sizes, coco_shapes, batch_size, random):
    """The figures of the project's first simulation, which had another sample of sizes."""
    plan = draw_plan(coco_sizes, PUBLISHED, coco_shapes[12], batch_size=batch_size, seed=0, epoch=0)
    otherwise = real_pixels_otherwise(plan, 1333)
    assert otherwise["square"] == pytest.approx(0.297, abs=0.01)
    assert otherwise["random"] == pytest.approx(random, abs=0.01)


def test_padding_of_the_usual_ways_by_hand():
    plan = eval_plan(np.array([(20, 40), (20, 40), (20, 40)]), np.zeros(3, int), 20, 40, [(32, 64)], batch_size=2)
    assert real_pixels(plan) == 3 * 800 / (4 * 2048)
    assert real_pixels_otherwise(plan, 40) == {"square": 0.5, "random": 1.0}  # the incomplete batch is left out


def test_evaluation_pads_little():
    shapes = search_eval_shapes(SIZES_128, 800, 1333, 5)
    plan = eval_plan(SIZES_128, np.zeros(128, int), 800, 1333, shapes, batch_size=8)
    indices = plan.rows["index"].ravel()
    assert sorted(indices[indices >= 0]) == list(range(128))
    assert len(plan) <= 17  # of 16 that are full
    assert real_pixels(plan) > 0.85
    large = np.tile(SIZES_128, (39, 1))
    assert real_pixels(eval_plan(large, np.zeros(len(large), int), 800, 1333, shapes, batch_size=8)) > 0.92


def test_table_of_buckets():
    sizes = np.array([(32, 64)] * 4 + [(64, 32)] * 3)
    plan = eval_plan(sizes, np.zeros(7, int), 32, 64, [(32, 64), (64, 64)], batch_size=2)
    assert bucket_table(plan) == [
        "padded shape    batches  pictures   share  padding",
        "   32 x 64            2         3   42.9%    25.0%",
        "   64 x 64            2         4   57.1%    50.0%",
        "2 shapes              4         7  100.0%    41.7%",
        "4 targets in 100.0% of the batches",
    ]
    plan = dataclasses.replace(plan, max_targets=np.array([8, 8, 4, 8]))
    assert bucket_table(plan)[4:] == [
        "4 targets in 25.0% of the batches",
        "8 targets in 75.0% of the batches",
    ]
