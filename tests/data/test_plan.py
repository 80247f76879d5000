import dataclasses
import random

import numpy as np
import pytest
from published import PUBLISHED, draw_plan, plan_settings

from cdetr_jax.data.buckets import fit_to_shapes
from cdetr_jax.data.plan import (
    eval_plan,
    may_be_scaled_down,
    real_pixels,
    redraw_row,
    resized_hw,
    search_shapes,
    smallest_shape,
    steps_per_epoch,
    target_sizes,
)

SHAPES = ((800, 1088), (1088, 800), (800, 1344), (1344, 800), (1344, 1344))
SIZES = np.array([(480, 640), (640, 427), (375, 500), (333, 500), (612, 612), (240, 640), (640, 480)])


def _published_size(height, width, short, longest):
    """`get_size_with_aspect_ratio` of the published code, on Python numbers."""
    low, high = min(height, width), max(height, width)
    if longest is not None and high / low * short > longest:
        short = round(longest * low / high)
    if low == short:
        return height, width
    return (int(short * height / width), short) if width < height else (short, int(short * width / height))


def _published_draws(height, width, rng):
    """One draw of METHOD's training augmentation in plain words: flip, crop, window, final size."""
    flip = rng.random() < 0.5
    if rng.random() < 0.5:
        return flip, False, (0, 0, 0, 0), _published_size(height, width, rng.choice(range(480, 801, 32)), 1333)
    height, width = _published_size(height, width, rng.choice([400, 500, 600]), None)
    w, h = rng.randint(384, min(width, 600)), rng.randint(384, min(height, 600))
    window = rng.randint(0, height - h), rng.randint(0, width - w), h, w
    return flip, True, window, _published_size(h, w, rng.choice(range(480, 801, 32)), 1333)


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1066)),  # 1066.67, rounded down
        ((640, 480), 800, 1333, (1066, 800)),
        ((300, 1000), 800, 1333, (400, 1333)),  # 399.9, rounded to the nearest
        ((200, 1000), 800, 1333, (267, 1335)),  # the published rounding can go over the longest side
        ((1200, 2001), 800, 1333, (799, 1332)),  # 1334, one pixel over
        ((800, 1067), 800, 1333, (800, 1067)),  # as it is: no rounding at all
        ((200, 1000), 800, None, (800, 4000)),
        ((1, 5000), 800, 1333, (1, 5000)),  # rounds to no pixel at all, so one is kept
    ],
)
def test_resized_size(size, short, longest, expected):
    assert tuple(resized_hw(np.array([size]), short, longest)[0]) == expected


def test_resized_size_is_the_published_one():
    rng = random.Random(0)
    sizes = [(rng.randint(50, 900), rng.randint(50, 900)) for _ in range(4000)]
    shorts = [rng.choice((400, 480, 500, 512, 800)) for _ in sizes]
    for longest in (None, 1333):
        expected = [_published_size(h, w, s, longest) for (h, w), s in zip(sizes, shorts, strict=True)]
        np.testing.assert_array_equal(resized_hw(np.array(sizes), np.array(shorts), longest), expected)


def _ks(a, b):
    """The largest difference between two samples' cumulative distributions."""
    at = np.union1d(a, b)
    fractions = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (a, b)]
    return np.abs(fractions[0] - fractions[1]).max()


@pytest.mark.parametrize("size", [(480, 640), (640, 427), (240, 640)])
def test_draws_have_the_published_distribution(size):
    """100,000 draws of the plan against 30,000 of the plain simulation.

    Each half, with and without a crop, of two such samples differs by more than 0.0207 once in 10,000 tries
    (Kolmogorov-Smirnov).
    """
    rows = draw_plan(np.tile(size, (100_000, 1)), PUBLISHED, SHAPES, batch_size=1, seed=0, epoch=0).rows[:, 0]
    rng = random.Random(1)
    simulated = [_published_draws(*size, rng) for _ in range(30_000)]
    flips, crops, windows, sizes = (np.array(x) for x in zip(*simulated, strict=True))
    assert abs(rows["flip"].mean() - 0.5) < 0.006  # 4 standard deviations
    assert abs(rows["crop"].mean() - 0.5) < 0.006
    assert abs(np.mean(rows["flip"] & rows["crop"]) - 0.25) < 0.006  # independent of each other
    assert abs(np.mean(flips & crops) - 0.25) < 0.01
    for k in range(4):
        assert _ks(rows["window"][rows["crop"], k], windows[crops, k]) < 0.0207
    for k in range(2):
        assert _ks(rows["size_hw"][rows["crop"], k], sizes[crops, k]) < 0.0207
        assert _ks(rows["size_hw"][~rows["crop"], k], sizes[~crops, k]) < 0.0207
        assert (np.unique(rows["size_hw"][~rows["crop"], k]) == np.unique(sizes[~crops, k])).all()
    # The window's place depends on its size, and its height not on its width.
    cropped = rows[rows["crop"]]
    first_choices = {tuple(x) for x in resized_hw(np.array([size] * 3), np.array([400, 500, 600]), None)}
    assert {tuple(x) for x in cropped["first_hw"]} == first_choices
    assert (cropped["window"][:, :2] + cropped["window"][:, 2:] <= cropped["first_hw"]).all()
    for first in first_choices:
        window = cropped["window"][(cropped["first_hw"] == first).all(-1)]
        assert window[:, 2:].min(0).tolist() == [384, 384]
        assert window[:, 2:].max(0).tolist() == [min(600, side) for side in first]
        assert abs(np.corrcoef(window[:, 2], window[:, 3])[0, 1]) < 0.04


def _histogram(values, *, above=0):
    """Counts of values in bins of 16 pixels."""
    return np.bincount(np.asarray(values) // 16, minlength=above // 16 + 1)


def test_histograms_are_those_of_the_description():
    """100,000 draws of the plan, and as many of the plain simulation, over pictures of seven sizes.

    Two counts a and b of the same probability differ with a variance of at most a + b. Beyond 5 of its roots (and 5
    for the discreteness of small counts) lies less than one in a million of them; there are 365.
    """
    sizes = np.tile(SIZES, (14_286, 1))[:100_000]
    rows = draw_plan(sizes, PUBLISHED, SHAPES, batch_size=1, seed=0, epoch=0).rows[:, 0]
    rng = random.Random(2)
    simulated = [_published_draws(*size, rng) for size in sizes.tolist()]
    flip, crop, window, size = (np.array(column) for column in zip(*simulated, strict=True))
    ours = {"flip": rows["flip"], "crop": rows["crop"]}
    theirs = {"flip": flip, "crop": crop}
    for k, side in enumerate(("top", "left", "height", "width")):
        ours[f"window {side}"], theirs[f"window {side}"] = rows["window"][rows["crop"], k], window[crop, k]
    for branch, (a, b) in {"crop": (rows["crop"], crop), "whole": (~rows["crop"], ~crop)}.items():
        for k, side in enumerate(("height", "width")):
            ours[f"{branch} {side}"], theirs[f"{branch} {side}"] = rows["size_hw"][a, k], size[b, k]
        ours[f"{branch} area"] = rows["size_hw"][a].prod(-1) // 1000
        theirs[f"{branch} area"] = size[b].prod(-1) // 1000
    # Rates: 5 standard deviations of a binomial, sqrt(0.25 / 100,000) each.
    for name in ("flip", "crop"):
        assert abs(np.mean(ours.pop(name)) - 0.5) < 0.0079
        assert abs(np.mean(theirs.pop(name)) - 0.5) < 0.0079
    bins = 0
    for name, values in ours.items():
        top = int(max(values.max(), theirs[name].max()))
        a, b = _histogram(values, above=top), _histogram(theirs[name], above=top)
        assert (abs(a - b) <= 5 * np.sqrt(a + b) + 5).all(), name
        bins += np.count_nonzero(a + b)
    assert bins > 300


def test_probabilities_at_their_ends():
    for flip, crop in ((0.0, 1.0), (1.0, 0.0)):
        settings = dataclasses.replace(PUBLISHED, flip_probability=flip, crop_probability=crop)
        rows = draw_plan(np.tile(SIZES, (9, 1)), settings, SHAPES, batch_size=3, seed=0, epoch=0).rows
        assert (rows["flip"] == bool(flip)).all()
        assert (rows["crop"] == bool(crop)).all()


def test_windows_give_way_to_pictures_smaller_than_them():
    settings = dataclasses.replace(PUBLISHED, crop_probability=1.0, crop_short_sides_px=(100,))
    rows = draw_plan(np.tile((50, 70), (500, 1)), settings, SHAPES, batch_size=5, seed=0, epoch=0).rows
    assert (rows["first_hw"] == (100, 140)).all()
    assert (rows["window"] == (0, 0, 100, 140)).all()


@pytest.mark.parametrize("seed", range(5))
def test_batches_of_an_epoch(seed):
    """Each batch fits its shape, no picture comes twice, and the number of batches is the same for every draw."""
    sizes = np.tile(SIZES, (43, 1))
    plan = draw_plan(sizes, PUBLISHED, SHAPES, batch_size=8, seed=seed, epoch=2)
    assert len(plan) == len(sizes) // 8 == 37
    assert len(np.unique(plan.rows["index"])) == 37 * 8
    assert (plan.rows["size_hw"] <= plan.shapes_hw[:, None]).all()
    assert {tuple(shape) for shape in plan.shapes_hw} <= set(SHAPES)
    # At most one batch of each shape is made up with pictures that a smaller shape would have held.
    smallest = smallest_shape(plan.rows["size_hw"].reshape(-1, 2), SHAPES).reshape(37, 8, 2)
    mixed = (smallest != plan.shapes_hw[:, None]).any((1, 2))
    assert mixed.any()
    assert np.unique(plan.shapes_hw[mixed], axis=0, return_counts=True)[1].max() == 1


def test_filled_epochs_hold_every_picture():
    sizes = np.tile(SIZES, (43, 1))  # 301
    dropped = draw_plan(sizes, PUBLISHED, SHAPES, batch_size=8, seed=3, epoch=2)
    filled = draw_plan(sizes, PUBLISHED, SHAPES, batch_size=8, seed=3, epoch=2, last_batch="fill")
    assert (len(dropped), len(filled)) == (37, 38)
    indices, counts = np.unique(filled.rows["index"], return_counts=True)
    np.testing.assert_array_equal(indices, np.arange(301))
    assert sorted(counts) == [1] * 298 + [2] * 3
    assert (filled.rows["size_hw"] <= filled.shapes_hw[:, None]).all()
    # Both draw the same; the three that come again are drawn anew.
    once = {row["index"]: row for row in dropped.rows.ravel()}
    rows = filled.rows.ravel()
    same = [row for row in rows if row["index"] in once and row == once[row["index"]]]
    again = [row for row in rows if row["index"] in once and row != once[row["index"]]]
    assert (len(same), len(again)) == (296, 3)
    # Where everything comes out even, there is nothing to choose.
    even = [
        draw_plan(sizes, PUBLISHED, SHAPES, batch_size=7, seed=3, epoch=2, last_batch=choice)
        for choice in ("drop", "fill")
    ]
    assert even[0].rows.tobytes() == even[1].rows.tobytes()


def test_panoramas_bring_no_shape_of_their_own():
    sizes = np.repeat([(1080, 1920), (1920, 1080)], 300, axis=0)
    whole = dataclasses.replace(PUBLISHED, crop_probability=0.0)
    shapes = search_shapes(sizes, whole, 12)
    for epoch in range(5):
        plan = draw_plan(sizes, whole, shapes, batch_size=16, seed=0, epoch=epoch)
        assert set(map(tuple, plan.shapes_hw.tolist())) <= set(shapes)
        assert (plan.rows["size_hw"] <= plan.shapes_hw[:, None]).all()
        alone = draw_plan(sizes, whole, shapes, batch_size=1, seed=0, epoch=epoch).rows.ravel()
        drawn = dict(zip(alone["index"].tolist(), alone["size_hw"].tolist(), strict=True))
        changed = [row for row in plan.rows.ravel() if row["size_hw"].tolist() != drawn[row["index"]]]
        assert 0 < len(changed) < 16


def test_micro_batches_have_to_be_equal():
    with pytest.raises(ValueError, match="a batch of 6 pictures cannot be cut in 4 equal micro-batches"):
        draw_plan(SIZES, PUBLISHED, SHAPES, batch_size=6, accumulation_steps=4, seed=0, epoch=0)


def test_the_micro_batches_of_a_step_have_shapes_of_their_own():
    sizes, counts = np.tile(SIZES, (43, 1)), np.tile(np.arange(7), 43)  # 301
    settings = {"seed": 3, "epoch": 2, "object_counts": counts}
    plan = draw_plan(sizes, PUBLISHED, SHAPES, batch_size=48, accumulation_steps=6, **settings)
    smaller = draw_plan(sizes, PUBLISHED, SHAPES, batch_size=8, **settings)
    assert plan.rows.shape == (36, 8)  # 6 steps; 13 pictures are left, although 8 of them would fill a micro-batch
    assert len(np.unique(plan.rows["index"])) == 288
    assert (plan.rows["size_hw"] <= plan.shapes_hw[:, None]).all()
    shapes_of_step = [len(np.unique(shapes, axis=0)) for shapes in plan.shapes_hw.reshape(6, 6, 2)]
    assert min(shapes_of_step) > 1
    # Each is what a batch of its size would be.
    assert real_pixels(plan) == pytest.approx(real_pixels(smaller), abs=0.02)
    assert set(plan.max_targets) <= set(target_sizes(counts, 8))


def test_a_batch_larger_than_the_source_can_be_filled():
    plan = draw_plan(SIZES, PUBLISHED, SHAPES, batch_size=18, seed=0, epoch=0, last_batch="fill")
    assert sorted(np.bincount(plan.rows["index"][0]).tolist()) == [2, 2, 2, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("pictures", "batch_size", "drop", "fill"), [(17, 4, 4, 5), (16, 4, 4, 4), (4, 4, 1, 1), (118_287, 16, 7392, 7393)]
)
def test_steps_of_an_epoch(pictures, batch_size, drop, fill):
    assert steps_per_epoch(pictures, batch_size, "drop") == drop
    assert steps_per_epoch(pictures, batch_size, "fill") == fill


def test_epochs_need_a_batch():
    assert steps_per_epoch(3, 4, "fill") == 1
    with pytest.raises(ValueError, match=r"3 pictures do not fill one batch of 4; .*batch_size, or .*last_batch=fill"):
        steps_per_epoch(3, 4, "drop")
    with pytest.raises(ValueError, match=r"config\.data\.last_batch is 'pad', expected one of drop, fill"):
        draw_plan(SIZES, PUBLISHED, SHAPES, batch_size=2, seed=0, epoch=0, last_batch="pad")


def test_target_sizes_hold_most_batches_and_the_fullest():
    counts = np.array([3] * 90 + [10] * 9 + [61])
    assert target_sizes(counts, 1) == (12, 64)  # 95 of 100 pictures have up to 10
    assert target_sizes(counts[:94], 1) == (4, 12)
    assert target_sizes(counts, 4) == (12, 64)  # 0.99 ** 4 of the batches do without the fullest, which is 96 %
    assert target_sizes(counts, 8) == (64,)  # but 0.99 ** 8 only 92 %
    assert target_sizes(np.zeros(5, int), 2) == (4,)


def test_targets_are_padded_alike_in_every_process():
    rng = np.random.default_rng(0)
    sizes, counts = np.tile(SIZES, (300, 1)), rng.geometric(0.1, 2100)
    plan = draw_plan(sizes, PUBLISHED, SHAPES, batch_size=6, seed=0, epoch=0, object_counts=counts)
    small, large = target_sizes(counts, 6)
    fullest = [max(counts[row["index"]] for row in batch) for batch in plan.rows]
    assert plan.max_targets.tolist() == [small if most <= small else large for most in fullest]
    assert 0.93 < np.mean(plan.max_targets == small) < 0.99
    assert large - 4 < counts.max() <= large
    plain = draw_plan(sizes, PUBLISHED, SHAPES, batch_size=6, seed=0, epoch=0)
    assert (plain.max_targets == 4).all()
    given = draw_plan(sizes, PUBLISHED, SHAPES, batch_size=6, epoch=0, object_counts=counts, max_targets=90)
    assert (given.max_targets == 90).all()
    assert plain.rows.tobytes() == plan.rows.tobytes()


def test_left_out_pictures_change_with_the_epoch():
    left_out = set()
    for epoch in range(60):
        plan = draw_plan(SIZES, PUBLISHED, SHAPES, batch_size=5, seed=0, epoch=epoch)
        left_out |= set(range(7)) - set(plan.rows["index"].ravel())
    assert left_out == set(range(7))


def test_plan_depends_on_seed_and_epoch_alone():
    def plan(seed, epoch, batch_size=4):
        return draw_plan(np.tile(SIZES, (8, 1)), PUBLISHED, SHAPES, batch_size=batch_size, seed=seed, epoch=epoch)

    assert plan(3, 5).rows.tobytes() == plan(3, 5).rows.tobytes()
    assert plan(3, 5).shapes_hw.tobytes() == plan(3, 5).shapes_hw.tobytes()
    assert len({p.rows.tobytes() for p in (plan(3, 5), plan(3, 6), plan(4, 5))}) == 3
    # What happens to a picture does not depend on the batch it lands in.
    rows = [np.sort(plan(3, 5, batch_size).rows.ravel(), order="index") for batch_size in (4, 7)]
    assert rows[0].tobytes() == rows[1].tobytes()


@pytest.mark.parametrize("last_batch", ["drop", "fill"])
def test_the_shares_of_processes_make_the_whole(last_batch):
    """Each process makes its own plan; together they read what one would have read alone, and nothing twice."""
    plans = [
        draw_plan(np.tile(SIZES, (5, 1)), PUBLISHED, SHAPES, batch_size=6, seed=4, epoch=1, last_batch=last_batch)
        for _ in range(3)
    ]
    assert len(plans[0]) == {"drop": 5, "fill": 6}[last_batch]
    for batch in range(len(plans[0])):
        shares = [plan.rows_for(batch, process, 3) for process, plan in enumerate(plans)]
        assert [len(share) for share in shares] == [2, 2, 2]
        assert np.concatenate(shares).tobytes() == plans[0].rows[batch].tobytes()


def test_evaluation_holds_every_picture_once():
    plan = eval_plan(SIZES, np.arange(7), 800, 1333, SHAPES, batch_size=2)
    assert [(tuple(s), r.tolist()) for s, r in zip(plan.shapes_hw, plan.rows["index"], strict=True)] == [
        ((1344, 800), [1, 6]),  # 6 would fit (1088, 800), and fills the batch
        ((800, 1344), [3, 5]),
        ((800, 1088), [0, 2]),
        ((800, 1088), [4, -1]),
    ]
    assert plan.max_targets.tolist() == [8] * 4
    rows = plan.rows[plan.rows["index"] >= 0]
    assert not rows["flip"].any()
    assert not rows["crop"].any()
    expected = [_published_size(*SIZES[i], 800, 1333) for i in rows["index"]]
    np.testing.assert_array_equal(rows["size_hw"], expected)


def test_smallest_shape():
    sizes = np.array([(800, 1066), (801, 700), (700, 1333), (900, 900)])
    np.testing.assert_array_equal(smallest_shape(sizes, SHAPES), [SHAPES[0], SHAPES[1], SHAPES[2], SHAPES[4]])


def test_redrawn_row_fits_and_repeats():
    shape, seen = (512, 608), []
    settings = plan_settings([(480, 640)] * 40, PUBLISHED, [shape], seed=1, batch_size=1)
    for index in range(40):
        row = redraw_row(settings, shape, 2, index)
        assert row["index"] == index
        assert (row["size_hw"] <= shape).all()
        assert row["size_hw"][1] == 608 or row["size_hw"][0] >= 480  # scaled down no further than needed
        assert row == redraw_row(settings, shape, 2, index)
        seen.append(tuple(row["window"]))
    assert len(set(seen)) > 10  # about half of the 40 have a window, each another one


def test_pictures_that_fit_no_shape_are_scaled_down():
    """To the shape that shows most of them; the others keep the published rounding."""
    shapes = ((240, 320), (320, 240), (320, 320))
    elongated = np.array([(300, 100), (100, 300), (2000, 60), (60, 2000), (240, 320), (1, 4000)])
    small = dataclasses.replace(PUBLISHED, crop_probability=0.0, short_sides_px=(240,), long_side_max_px=320)
    expected = {0: [320, 106], 1: [106, 320], 2: [320, 9], 3: [9, 320], 4: [240, 320], 5: [1, 320]}
    for plan in (
        eval_plan(elongated, np.zeros(6, int), 240, 320, shapes, batch_size=1),
        draw_plan(elongated, small, shapes, batch_size=1, epoch=0),
    ):
        assert {row["index"]: row["size_hw"].tolist() for row in plan.rows.ravel()} == expected
    np.testing.assert_array_equal(fit_to_shapes(resized_hw(SIZES, 800, 1333), SHAPES), resized_hw(SIZES, 800, 1333))
    assert fit_to_shapes([(321, 107), (500, 500)], [(320, 320), (200, 640)]).tolist() == [[320, 106], [320, 320]]
    settings = plan_settings(elongated, small, shapes, batch_size=1)
    assert may_be_scaled_down(settings).tolist() == [True] * 4 + [False, True]


def test_what_may_be_scaled_down_is_known_before_the_first_epoch():
    def found(sizes, shapes, **changes):
        settings = plan_settings(sizes, dataclasses.replace(PUBLISHED, **changes), shapes, batch_size=1)
        return may_be_scaled_down(settings).tolist()

    assert found(SIZES, SHAPES) == [False] * 7
    whole = {"crop_probability": 0.0}
    assert found(SIZES[[0, 0, 1]], [(800, 1065), (1344, 800)], **whole) == [True, True, False]
    # Whole, a square picture needs 800 x 800, but the most elongated window of it 800 x 1250.
    square = np.array([(600, 600)])
    assert found(square, [(800, 800)], **whole) == [False]
    assert found(square, [(1344, 1240)]) == [True]
    # A picture that is always cropped need not fit as a whole.
    assert found(SIZES[5:6], [(1250, 1250)], crop_probability=1.0) == [False]
    # The most elongated window of 200 x 600 becomes 444 x 1333, but one of 300 x 500 becomes 800 x 1333.
    windows = {"crop_probability": 1.0, "crop_sides_px": (200, 600), "short_sides_px": (800,)}
    assert found(square, [(448, 1344), (1344, 448), (1280, 800), (800, 1280)], **windows) == [True]
    assert found(square, [(800, 1344), (1344, 800)], **windows) == [False]


def test_what_fits_no_shape_together_is_scaled_down():
    """Two pictures that are not cropped, one upright and one lying, make one batch, and no shape of their own."""
    whole = dataclasses.replace(PUBLISHED, crop_probability=0.0, short_sides_px=(800,))
    sizes, shapes = np.array([(640, 480), (480, 640)]), [(1088, 800), (800, 1344)]
    plan = draw_plan(sizes, whole, shapes, batch_size=2, seed=0, epoch=0)
    assert plan.shapes_hw.tolist() == [[1088, 800]]
    assert {row["index"]: row["size_hw"].tolist() for row in plan.rows[0]} == {0: [1066, 800], 1: [600, 800]}
    # Of longer shapes the one that shows most of both.
    plan = draw_plan(sizes, whole, [(1088, 800), (1056, 1088), (800, 1344)], batch_size=2, seed=0, epoch=0)
    assert plan.shapes_hw.tolist() == [[1056, 1088]]
    assert {row["index"]: row["size_hw"].tolist() for row in plan.rows[0]} == {0: [1056, 792], 1: [800, 1066]}
    # The smallest that is listed comes first.
    plan = draw_plan(sizes, whole, [*shapes, (1120, 1120), (1344, 1344)], batch_size=2, seed=0, epoch=0)
    assert plan.shapes_hw.tolist() == [[1120, 1120]]


@pytest.mark.parametrize("shapes", [[], [800, 1344], [(800, 0)], [(800.0, 1344.0)], [(800, 1344, 3)]])
def test_shapes_must_be_pairs_of_sizes(shapes):
    with pytest.raises(ValueError, match="expected a list of"):
        smallest_shape(SIZES, shapes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("short_sides_px", ()),
        ("crop_short_sides_px", (0,)),
        ("flip_probability", 1.5),
        ("crop_probability", -0.1),
        ("long_side_max_px", 0),
        ("crop_sides_px", (600, 384)),
    ],
)
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=rf"{field} is .*expected"):
        dataclasses.replace(PUBLISHED, **{field: value})
