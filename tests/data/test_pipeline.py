import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from fatal_source import FatalShapes
from PIL import Image

from cdetr_jax.data.coco import CocoFolder
from cdetr_jax.data.pipeline import eval_batches, sizes_hw, train_batches
from cdetr_jax.data.plan import ROW, Augmentation, PlanSettings, eval_plan, redraw_row, train_plan
from cdetr_jax.data.reader import ReadSettings
from cdetr_jax.data.sources import BadPictureError
from cdetr_jax.data.synthetic import SyntheticShapes
from cdetr_jax.data.transforms import count_training_objects, transform_boxes, transform_picture
from cdetr_jax.data.workers import WorkerDiedError, Workers
from cdetr_jax.structs import Category, Record

AUGMENTATION = Augmentation((24, 30, 36), 50, 0.5, 0.5, (28, 34), (20, 30))
SHAPES = ((40, 44), (44, 40), (52, 52))
HANGS_S = 600  # far beyond what any machine needs: only a hang takes so long
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


def _reading(threads=2, on_error="raise", max_bad_fraction=0.0, workers=0, **process):
    return ReadSettings(workers, threads, on_error, max_bad_fraction, **process)


def _plan_settings(source, shapes=SHAPES, batch_size=4, **settings):
    counts = count_training_objects(source.records)
    return PlanSettings(sizes_hw(source), counts, AUGMENTATION, shapes, batch_size, seed=9, **settings)


def _train(source, reading=None, *, start=(0, 0), label_of=LABEL_OF, **settings):
    return train_batches(source, label_of, _plan_settings(source, **settings), reading or _reading(), start)


def _eval(source, reading=None):
    plan = eval_plan(sizes_hw(source), count_training_objects(source.records), 36, 50, SHAPES, batch_size=4)
    return eval_batches(source, LABEL_OF, plan, reading or _reading())


def _transformed(source, row):
    record, image = source.records[row["index"]], source.load_image(row["index"])
    return np.asarray(transform_picture(Image.fromarray(image), row)), *transform_boxes(record, row)


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
    plans = [train_plan(_plan_settings(source), epoch) for epoch in range(2)]
    batches = _take(_train(source), 8)
    for k, batch in enumerate(batches):
        plan, step = plans[k // 4], k % 4
        assert batch.images.shape == (4, *plan.shapes_hw[step], 3)
        np.testing.assert_array_equal(batch.index, plan.rows[step]["index"])
        np.testing.assert_array_equal(batch.sizes_hw, plan.rows[step]["size_hw"])
        for slot, row in enumerate(plan.rows[step]):
            record = source.records[row["index"]]
            image, boxes, category_ids = _transformed(source, row)
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


def test_any_number_of_threads_gives_the_same_bytes():
    source = Pictures()
    expected = [_bytes(batch) for batch in _take(_train(source, _reading(threads=1)), 9)]
    for threads in (3, 8):
        assert [_bytes(batch) for batch in _take(_train(source, _reading(threads=threads)), 9)] == expected


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


def test_the_micro_batches_of_a_step_come_one_after_the_other():
    source = Pictures()
    settings = {"batch_size": 6, "accumulation_steps": 3}
    batches = _train(source, **settings)
    steps = len(source) // 6
    assert batches.batches_per_epoch == 3 * steps
    taken = _take(batches, 3 * steps + 2)
    assert {len(batch.index) for batch in taken} == {2}
    assert batches.position == (1, 2)
    assert len({int(i) for batch in taken[:-2] for i in batch.index}) == 6 * steps
    resumed = _take(_train(source, start=(0, 3), **settings), 3 * steps - 1)
    assert list(map(_bytes, resumed)) == list(map(_bytes, taken[3:]))


def test_the_shares_of_processes_make_the_global_batch():
    source = Pictures()
    whole = _take(_train(source, batch_size=6), 3)
    shares = [_take(_train(source, _reading(process_index=k, process_count=3), batch_size=6), 3) for k in range(3)]
    for step, batch in enumerate(whole):
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(share[step] for share in shares))
        assert _bytes(joined) == _bytes(batch)


def test_reads_only_so_far_ahead():
    seen = set()

    class Watched(Pictures):
        def load_image(self, i):
            seen.add(i)
            return super().load_image(i)

    batches = _train(Watched(count=64), batch_size=2)
    next(batches)
    batches.wait()
    assert 2 <= len(seen) <= 2 * 3  # the batch that came out and two more
    batches.close()
    assert not _threads()


def test_close_does_not_wait_for_pictures_that_are_not_begun(monkeypatch):
    begun, is_held, may_go_on = [], threading.Event(), threading.Event()

    class Held(Pictures):
        """The first batch comes; the picture after it waits until the threads have been told to end."""

        def load_image(self, i):
            begun.append(i)
            if len(begun) > 4:
                is_held.set()
                assert may_go_on.wait(HANGS_S)
            return super().load_image(i)

    batches = _train(Held(), _reading(threads=1))
    shutdown = batches._threads.shutdown

    def shutdown_and_go_on(wait=True, **how):
        shutdown(wait=False, **how)
        may_go_on.set()
        shutdown(wait=wait)

    monkeypatch.setattr(batches._threads, "shutdown", shutdown_and_go_on)
    next(batches)
    assert is_held.wait(HANGS_S)
    batches.close()
    assert len(begun) == 4 + 1  # of the 12 that were asked for
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
    batches = _train(Pictures(bad=[5]), _reading(threads=4))
    with pytest.raises(BadPictureError, match=r'/there/picture-5\.png.*set config\.data\.on_error = "skip"'):
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
    with caplog.at_level(logging.WARNING, logger="absl"):
        taken = _take(batches, 12)
    assert "on_error" not in caplog.text  # which is "skip" already
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
            row = redraw_row(_plan_settings(good), other.images.shape[1:3], k // 4, follower)
            image = _transformed(good, row)[0]
            assert one.index[slot] == follower
            np.testing.assert_array_equal(one.images[slot, : image.shape[0], : image.shape[1]], image)
            replaced += 1
    assert replaced > 5
    for threads in (1, 7):
        again = _take(_train(damaged, _reading(threads, on_error="skip", max_bad_fraction=0.2)), 12)
        assert [_bytes(batch) for batch in again] == [_bytes(batch) for batch in taken]


def test_too_many_damaged_pictures_stop_the_run():
    reading = _reading(on_error="skip", max_bad_fraction=0.1)  # 1.7 of 17
    message = r"2 of 17 .* damaged, more than the 1 that config\.data\.max_bad_fraction = 0\.1 allows.*-11.*-2\.png"
    with pytest.raises(BadPictureError, match=message):
        _take(_train(Pictures(bad=[2, 11]), reading), 12)
    assert len(_take(_train(Pictures(bad=[2]), reading), 12)) == 12
    with pytest.raises(BadPictureError, match=r"2 of 17 pictures are damaged"):
        list(_eval(Pictures(bad=[2, 11]), reading))
    assert not _threads()


@pytest.mark.parametrize(
    ("fraction", "pictures", "allowed"), [(0.01, 32, 1), (0.01, 250, 2), (0.0, 250, 0), (1.0, 17, 17)]
)
def test_number_of_pictures_that_may_be_damaged(fraction, pictures, allowed):
    assert _reading(max_bad_fraction=fraction).max_bad(pictures) == allowed


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


# -------------------------------------------------------------------------------------------- worker processes

SHAPES_OF_SYNTHETIC = ((40, 56), (52, 52))


def _train_shapes(source, reading, **settings):
    return _train(source, reading, shapes=SHAPES_OF_SYNTHETIC, **settings)


def _processes():
    return multiprocessing.active_children()


def test_processes_go_on_with_the_same_bytes():
    source = SyntheticShapes(seed=0, size=41, height=48, width=64, max_objects=5)
    expected = [_bytes(batch) for batch in _take(_train_shapes(source, _reading()), 57)]
    resumed = _train_shapes(source, _reading(workers=2, threads=2), start=(0, 7))
    assert [_bytes(batch) for batch in _take(resumed, 50)] == expected[7:]
    processes = [
        _train_shapes(source, _reading(threads=1, workers=k, process_index=k, process_count=2)) for k in range(2)
    ]
    shares = [_take(batches, 3) for batches in processes]
    for step in range(3):
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(share[step] for share in shares))
        assert _bytes(joined) == expected[step]
    assert not _processes()
    assert not _threads()


def test_damaged_pictures_in_processes(content, write):
    content["images"] += [{"id": 20 + i, "file_name": f"{i}.png", "height": 30, "width": 40} for i in range(4)]
    folder, file = write(content)
    (folder / "2.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "b.png").unlink()
    source = CocoFolder(folder, file)
    settings = {"batch_size": 3, "label_of": {2: 0, 700: 1}}
    taken = []
    for workers in (0, 1):
        batches = _train(source, _reading(workers=workers, on_error="skip", max_bad_fraction=0.5), **settings)
        taken.append([_bytes(batch) for batch in _take(batches, 4)])
        assert batches.bad_files == {"2.png", "b.png"}
    assert taken[0] == taken[1]
    with pytest.raises(BadPictureError, match=r"pictures/(2|b)\.png: cannot read this picture"):
        _take(_train(source, _reading(workers=1), **settings), 4)
    assert not _processes()


@pytest.mark.parametrize(
    ("happening", "error", "message"),
    [
        (
            "killed",
            WorkerDiedError,
            r"by signal 9 \(SIGKILL, as .* memory runs out\) while it read .*-5 \(picture 5\).*; use fewer",
        ),
        ("exits", WorkerDiedError, r"worker process \d+ ended with exit status 3 .* while it read .*-5 \(picture 5\)"),
        ("error", RuntimeError, r"synthetic-0-5 \(picture 5\): KeyError: 'surprise'"),
        ("unportable", RuntimeError, r"synthetic-0-5 \(picture 5\): .*one and two"),
        ("wrong size", ValueError, r"synthetic-0-5 \(picture 5\): .* 63 x 48 pixels, but its record says 64 x 48"),
    ],
)
def test_what_goes_wrong_in_a_process(happening, error, message):
    batches = _train_shapes(FatalShapes(happening, at=5), _reading(workers=1))
    with pytest.raises(error, match=message):
        _take(batches, 6)
    assert not _processes()
    assert not _threads()


def test_killed_process_does_not_hang_the_run():
    batches = _train_shapes(FatalShapes("nothing"), _reading(workers=2, threads=1))
    next(batches)
    os.kill(_processes()[0].pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match=r"signal 9 \(SIGKILL.*; use fewer config\.data\.workers"):
        _take(batches, 100)
    assert not _processes()


def test_a_process_that_stands_still_does_not_hold_up_the_end(monkeypatch):
    """As one that waits for a network disk for good."""
    monkeypatch.setattr("cdetr_jax.data.workers._END_S", 1.0)
    batches = _train_shapes(FatalShapes("nothing"), _reading(workers=2, threads=1))
    next(batches)
    os.kill(_processes()[0].pid, signal.SIGSTOP)
    batches.close()
    assert not _processes()
    assert not _threads()


def test_nobody_waits_for_processes_that_have_been_ended():
    """As a reader does that goes on to the next picture after a damaged one while the run ends."""
    source = SyntheticShapes(seed=0, size=1, height=32, width=32, max_objects=1)
    workers = Workers(source, processes=2, threads=1, max_pixels=32 * 32)
    workers.close()
    row, out = np.zeros((), ROW), np.zeros((32, 32, 3), np.uint8)
    with ThreadPoolExecutor(3) as threads:
        for future in [threads.submit(workers.write_picture, row, out) for _ in range(3)]:
            with pytest.raises(WorkerDiedError, match="have been ended"):
                future.result(timeout=HANGS_S)


def test_processes_do_not_outlive_a_killed_run():
    code = (
        "import os, signal, multiprocessing, sys\n"
        "from cdetr_jax.data.workers import Workers\n"
        "from cdetr_jax.data.synthetic import SyntheticShapes\n"
        "if __name__ == '__main__':\n"
        "    workers = Workers(SyntheticShapes(seed=0, size=2, height=32, width=32, max_objects=1), 1, 2, 1024)\n"
        "    print(*(process.pid for process in multiprocessing.active_children()), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS_S)
    (pid,) = map(int, run.stdout.split())
    end = time.monotonic() + HANGS_S
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # ended, and nobody of this machine has asked how
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} is still there")


def test_processes_import_no_jax():
    with pytest.raises(RuntimeError, match="KeyError: ''"):
        _take(_train_shapes(FatalShapes("modules"), _reading(workers=1)), 6)


def test_source_that_cannot_travel():
    source = FatalShapes("nothing")
    source.convert = lambda image: image
    with pytest.raises(ValueError, match=r"cannot be sent to worker processes .*config\.data\.workers=0"):
        _train_shapes(source, _reading(workers=1))
    assert not _processes()


@pytest.mark.slow
def test_memory_stays_flat_over_2000_batches():
    source = SyntheticShapes(seed=0, size=400, height=96, width=128, max_objects=5)
    batches = _train(source, _reading(workers=1, threads=1), shapes=[(52, 52)], batch_size=8)
    resident = []
    for k, _ in zip(range(2000), batches, strict=False):
        if k % 100 == 99:
            pids = [os.getpid(), *(process.pid for process in _processes())]
            resident.append([int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20 for pid in pids])
    batches.close()
    growth = np.max(resident[5:], axis=0) - resident[4]
    assert (growth < 20).all(), resident  # MiB, after the first 500 batches


# ---------------------------------------------------------------------------------------------------- settings


def test_max_targets():
    source = Pictures()
    assert _take(_train(source, max_targets=7), 1)[0].targets.labels.shape == (4, 7)
    six = SyntheticShapes(seed=0, size=50, height=64, width=64, max_objects=6)
    assert train_plan(_plan_settings(six, [(52, 52)]), 0).max_targets.max() == 8  # six, rounded up to a multiple of 4
    with pytest.raises(ValueError, match=r"picture-3\.png has 3 objects but config\.data\.max_targets is 2; .* 3"):
        _train(source, max_targets=2)


def test_settings_that_do_not_fit_each_other():
    source = Pictures()
    with pytest.raises(ValueError, match="17 pictures do not fill one batch of 18"):
        _train(source, batch_size=18)
    with pytest.raises(ValueError, match="batch size 4 is not divisible by 3 processes; use a multiple of 3"):
        _train(source, _reading(process_count=3))
    with pytest.raises(ValueError, match=r"categories of the data have no class logit.*8 \(class 8\)"):
        _train(source, label_of={1: 0})
    with pytest.raises(ValueError, match=r"start is \(0, 4\), expected .* from 0 to 3"):
        _train(source, start=(0, 4))
    with pytest.raises(ValueError, match="hold no picture"):
        _eval(Pictures(count=0))
    assert not _threads()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"on_error": "ignore"}, r"config\.data\.on_error is 'ignore', expected 'raise' or 'skip'"),
        ({"workers": -1}, r"config\.data\.workers is -1, expected 0 or more"),
        ({"threads": -1}, r"config\.data\.threads is -1, expected 0 or more"),
        ({"max_bad_fraction": 2.0}, r"config\.data\.max_bad_fraction is 2.0, expected a number from 0 to 1"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2, expected 0 to 1"),
    ],
)
def test_reading_is_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        _reading(**wrong)
