import itertools
import logging
import threading
import time

import jax
import numpy as np
import pytest

from cdetr_jax.data.pipeline import Reading, eval_batches, train_batches
from cdetr_jax.data.plan import Augmentation, redraw_row, train_plan
from cdetr_jax.data.sources import BadPictureError, CocoFolder, SyntheticShapes
from cdetr_jax.data.transforms import apply_row
from cdetr_jax.structs import Category, Record

AUGMENTATION = Augmentation((24, 30, 36), 50, 0.5, 0.5, (28, 34), (20, 30))
SHAPES = ((40, 44), (44, 40), (52, 52))
LABEL_OF = {1: 4, 2: 3, 3: 2, 5: 1, 8: 0}


class Pictures:
    """Noise pictures of changing sizes, read at changing speed, some not at all; picture i has i % 4 objects."""

    categories = tuple(Category(i, f"class {i}") for i in LABEL_OF)

    def __init__(self, count=17, bad=(), broken=()):
        rng = np.random.default_rng(0)
        self._bad, self._broken = set(bad), set(broken)
        self.records = tuple(
            Record(
                image_id=100 + i,
                file_name=f"picture-{i}.png",
                height=30 + 5 * (i % 3),
                width=34 + 3 * (i % 5),
                boxes_xywh_px=rng.uniform(2, 12, (i % 4, 4)),
                category_ids=rng.choice(list(LABEL_OF), i % 4),
                is_crowd=np.zeros(i % 4, bool),
                areas=np.ones(i % 4),
            )
            for i in range(count)
        )

    def __len__(self):
        return len(self.records)

    def load_image(self, i):
        time.sleep(0.003 * (i * 7 % 3))
        record = self.records[i]
        if i in self._bad:
            raise BadPictureError(f"/there/{record.file_name}: cannot read this picture")
        if i in self._broken:
            raise KeyError("surprise")
        return np.random.default_rng(i).integers(0, 256, (record.height, record.width, 3), np.uint8)


def _reading(workers=2, max_targets=0, on_error="raise", max_bad_fraction=0.0, **hosts):
    return Reading(workers, max_targets, on_error, max_bad_fraction, **hosts)


def _train(source, reading=None, *, batch_size=4, start=(0, 0), shapes=SHAPES, label_of=LABEL_OF):
    reading = reading or _reading()
    return train_batches(source, label_of, AUGMENTATION, shapes, reading, batch_size=batch_size, seed=9, start=start)


def _eval(source, reading=None, batch_size=4):
    reading = reading or _reading()
    return eval_batches(source, LABEL_OF, SHAPES, reading, short_side_px=36, long_side_max_px=50, batch_size=batch_size)


def _take(batches, count):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def _bytes(batch):
    return [(leaf.shape, leaf.dtype, leaf.tobytes()) for leaf in jax.tree.leaves(batch)]


def _threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("picture")]


def test_batches_hold_what_the_plan_says():
    source = Pictures()
    plans = [
        train_plan(
            [(r.height, r.width) for r in source.records], AUGMENTATION, SHAPES, batch_size=4, seed=9, epoch=epoch
        )
        for epoch in range(2)
    ]
    batches = _take(_train(source), 8)
    for k, batch in enumerate(batches):
        plan, step = plans[k // 4], k % 4
        assert batch.images.shape == (4, *plan.shapes_hw[step], 3)
        np.testing.assert_array_equal(batch.index, plan.rows[step]["index"])
        np.testing.assert_array_equal(batch.sizes_hw, plan.rows[step]["size_hw"])
        for slot, row in enumerate(plan.rows[step]):
            record = source.records[row["index"]]
            image, boxes, category_ids = apply_row(source.load_image(row["index"]), record, row)
            height, width = row["size_hw"]
            np.testing.assert_array_equal(batch.images[slot, :height, :width], image)
            assert not batch.images[slot, height:].any()
            assert not batch.images[slot, :, width:].any()
            np.testing.assert_array_equal(batch.original_sizes_hw[slot], [record.height, record.width])
            n = len(boxes)
            np.testing.assert_array_equal(batch.targets.valid[slot], np.arange(4) < n)
            np.testing.assert_array_equal(batch.targets.labels[slot, :n], [LABEL_OF[c] for c in category_ids])
            np.testing.assert_array_equal(batch.targets.boxes_cxcywh[slot, :n], boxes)
            assert not batch.targets.boxes_cxcywh[slot, n:].any()
    assert any(not valid.any() for batch in batches for valid in batch.targets.valid)  # pictures without objects
    dtypes = [str(leaf.dtype) for leaf in jax.tree.leaves(batches[0])]
    assert dtypes == ["uint8", "int32", "int32", "int32", "int32", "float32", "bool"]


def test_any_number_of_workers_gives_the_same_bytes():
    source = Pictures()
    expected = [_bytes(batch) for batch in _take(_train(source, _reading(workers=1)), 9)]
    for workers in (3, 8):
        assert [_bytes(batch) for batch in _take(_train(source, _reading(workers=workers)), 9)] == expected


def test_resumes_at_every_position():
    source = Pictures()
    batches = _train(source)
    positions, expected = [], []
    for _ in range(9):
        positions.append(batches.position)
        expected.append(_bytes(next(batches)))
    batches.close()
    assert positions == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]
    for k, position in enumerate(positions[:-1]):
        resumed = _train(source, start=position)
        assert resumed.position == position
        assert [_bytes(batch) for batch in _take(resumed, 2)] == expected[k : k + 2]


def test_hosts_parts_make_the_global_batch():
    source = Pictures()
    whole = _take(_train(source, batch_size=6), 3)
    parts = [_take(_train(source, _reading(host_index=k, host_count=3), batch_size=6), 3) for k in range(3)]
    for step, batch in enumerate(whole):
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(part[step] for part in parts))
        assert _bytes(joined) == _bytes(batch)


def test_reads_only_so_far_ahead():
    seen = set()

    class Watched(Pictures):
        def load_image(self, i):
            seen.add(i)
            return super().load_image(i)

    batches = _train(Watched(count=64), batch_size=2)
    next(batches)
    time.sleep(0.2)
    assert 2 <= len(seen) <= 2 * 3  # the batch that came out and two more
    batches.close()
    assert not _threads()


def test_close_does_not_wait_for_pictures_that_are_not_begun():
    begun = []

    class Slow(Pictures):
        def load_image(self, i):
            begun.append(i)
            time.sleep(0.1)
            return super().load_image(i)

    batches = _train(Slow(), _reading(workers=1))
    next(batches)
    batches.close()
    assert len(begun) <= 4 + 2  # of the 12 that were asked for
    assert list(batches) == []


def test_evaluation_gives_every_picture_once():
    source = Pictures()
    batches = _eval(source)
    taken = list(batches)
    assert len(taken) == batches.batches_per_epoch
    assert not _threads()
    index = np.concatenate([batch.index for batch in taken])
    np.testing.assert_array_equal(np.sort(index[index >= 0]), np.arange(17))
    empty = [(batch, slot) for batch in taken for slot in np.flatnonzero(batch.index < 0)]
    assert empty
    for batch, slot in empty:
        assert not batch.images[slot].any()
        assert not batch.targets.valid[slot].any()
        np.testing.assert_array_equal(batch.sizes_hw[slot], batch.images.shape[1:3])


def test_synthetic_and_coco_folder_sources(content, write):
    shapes = SyntheticShapes(seed=0, size=6, height=32, width=40, max_objects=3)
    assert _take(_train(shapes), 1)[0].targets.valid.any(-1).all()
    label_of = {2: 0, 700: 1}
    (batch,) = _take(_train(CocoFolder(*write(content)), batch_size=3, label_of=label_of), 1)
    # The crowd of image 0 is no target, image 1 has both classes, image 2 nothing.
    found = {
        int(i): set(labels[valid])
        for i, labels, valid in zip(batch.index, batch.targets.labels, batch.targets.valid, strict=True)
    }
    assert found[0] == found[2] == set()
    assert found[1] <= {0, 1}


# --------------------------------------------------------------------------------------------- damaged pictures


def test_damaged_picture_stops_the_run_and_ends_the_threads():
    batches = _train(Pictures(bad=[5]), _reading(workers=4))
    with pytest.raises(BadPictureError, match=r"/there/picture-5\.png"):
        _take(batches, 9)
    assert not _threads()
    with pytest.raises(StopIteration):
        next(batches)


def test_other_errors_name_the_picture():
    with pytest.raises(RuntimeError, match=r"picture-6\.png \(picture 6\): KeyError: 'surprise'"):
        _take(_train(Pictures(broken=[6]), _reading(on_error="skip", max_bad_fraction=1.0)), 9)
    assert not _threads()


def test_skipped_pictures_are_replaced_by_the_next_readable_one(caplog):
    good, damaged = Pictures(), Pictures(bad=[5, 6, 16])
    reading = _reading(on_error="skip", max_bad_fraction=0.2)
    expected = _take(_train(good), 12)
    batches = _train(damaged, reading)
    with caplog.at_level(logging.WARNING):
        taken = _take(batches, 12)
    assert batches.bad_files == {"picture-5.png", "picture-6.png", "picture-16.png"}
    assert sorted(record.getMessage().split("/there/")[1].split(":")[0] for record in caplog.records) == [
        "picture-16.png",
        "picture-5.png",
        "picture-6.png",
    ]
    replaced = 0
    for k, (one, other) in enumerate(zip(taken, expected, strict=True)):
        assert one.images.shape == other.images.shape
        for slot, index in enumerate(other.index):
            if index not in (5, 6, 16):
                np.testing.assert_array_equal(one.images[slot], other.images[slot])
                assert one.index[slot] == index
                continue
            follower = {5: 7, 6: 7, 16: 0}[int(index)]
            record = good.records[follower]
            shape_hw = other.images.shape[1:3]
            row = redraw_row(
                (record.height, record.width), AUGMENTATION, shape_hw, seed=9, epoch=k // 4, index=follower
            )
            image, _, _ = apply_row(good.load_image(follower), record, row)
            assert one.index[slot] == follower
            np.testing.assert_array_equal(one.images[slot, : image.shape[0], : image.shape[1]], image)
            replaced += 1
    assert replaced > 5
    for workers in (1, 7):
        again = _take(_train(damaged, _reading(workers, on_error="skip", max_bad_fraction=0.2)), 12)
        assert [_bytes(batch) for batch in again] == [_bytes(batch) for batch in taken]


def test_too_many_damaged_pictures_stop_the_run():
    reading = _reading(on_error="skip", max_bad_fraction=0.1)  # 1.7 of 17
    with pytest.raises(BadPictureError, match=r"2 of 17 pictures are damaged.*max_bad_fraction.*picture-11.*picture-2"):
        _take(_train(Pictures(bad=[2, 11]), reading), 12)
    assert len(_take(_train(Pictures(bad=[2]), reading), 12)) == 12
    with pytest.raises(BadPictureError, match=r"2 of 17 pictures are damaged"):
        list(_eval(Pictures(bad=[2, 11]), reading))
    assert not _threads()


def test_no_readable_picture_at_all():
    reading = _reading(on_error="skip", max_bad_fraction=1.0)
    with pytest.raises(BadPictureError, match=r"none of the 5 pictures can be read.*/there/picture-"):
        next(_train(Pictures(count=5, bad=range(5)), reading))


def test_evaluation_leaves_damaged_pictures_empty():
    batches = _eval(Pictures(bad=[4, 9]), _reading(on_error="skip", max_bad_fraction=0.5))
    index = np.concatenate([batch.index for batch in batches])
    np.testing.assert_array_equal(np.sort(index[index >= 0]), [i for i in range(17) if i not in (4, 9)])
    assert batches.bad_files == {"picture-4.png", "picture-9.png"}
    with pytest.raises(BadPictureError, match=r"picture-4\.png"):
        list(_eval(Pictures(bad=[4])))


# ---------------------------------------------------------------------------------------------------- settings


def test_max_targets():
    source = Pictures()
    assert _take(_train(source, _reading(max_targets=7)), 1)[0].targets.labels.shape == (4, 7)
    six = SyntheticShapes(seed=0, size=50, height=64, width=64, max_objects=6)
    batches = _train(six, shapes=[(52, 52)])
    assert batches.max_targets == 8  # six, rounded up to a multiple of 4
    batches.close()
    with pytest.raises(ValueError, match=r"picture-3\.png has 3 objects but config\.data\.max_targets is 2; .* 3"):
        _train(source, _reading(max_targets=2))


def test_settings_that_do_not_fit_each_other():
    source = Pictures()
    with pytest.raises(ValueError, match="17 pictures do not fill one batch of 18"):
        _train(source, batch_size=18)
    with pytest.raises(ValueError, match="batch size 4 is not divisible by 3 hosts; use a multiple of 3"):
        _train(source, _reading(host_count=3))
    with pytest.raises(ValueError, match=r"categories of the data have no class logit.*8 \(class 8\)"):
        _train(source, label_of={1: 0})
    with pytest.raises(ValueError, match="holds all the others"):
        _train(source, shapes=SHAPES[:2])
    with pytest.raises(ValueError, match=r"start is \(0, 4\), expected .* from 0 to 3"):
        _train(source, start=(0, 4))
    with pytest.raises(ValueError, match="hold no picture"):
        _eval(Pictures(count=0))
    assert not _threads()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"on_error": "ignore"}, r"config\.data\.on_error is 'ignore', expected 'raise' or 'skip'"),
        ({"workers": 0}, r"config\.data\.workers is 0, expected at least 1"),
        ({"max_targets": -1}, r"config\.data\.max_targets is -1"),
        ({"max_bad_fraction": 2.0}, r"config\.data\.max_bad_fraction is 2.0, expected a number from 0 to 1"),
        ({"host_index": 2, "host_count": 2}, "host_index is 2, expected 0 to 1"),
    ],
)
def test_reading_is_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        _reading(**wrong)
