"""Executes plans: reads, augments and pads pictures into host batches, ahead of the consumer and in order.

Threads do it, themselves or through worker processes. Calls no jax function; the batches hold NumPy arrays. All the
state there is between two batches is their position (epoch, batch), and any number of threads or processes gives the
same bytes.
"""

import collections
import dataclasses
import functools
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from cdetr_jax.data.plan import (
    Augmentation,
    EpochPlan,
    Shapes,
    check_shapes,
    eval_plan,
    redraw_row,
    steps_per_epoch,
    train_plan,
)
from cdetr_jax.data.sources import BadPictureError, Source
from cdetr_jax.data.transforms import count_training_objects, transform_boxes
from cdetr_jax.data.workers import WorkerDiedError, Workers, write_picture
from cdetr_jax.structs import Batch, Record, Targets

Redraw = Callable[[int, int, Sequence[int]], np.ndarray]  # epoch, index, padded shape -> ROW


@dataclasses.dataclass(frozen=True)
class Reading:
    """How pictures are read, for training and evaluation alike.

    Attributes:
      workers: processes that read; 0: this one does.
      threads: of each process that reads; 0: as many as make one for each core, all processes together.
      max_targets: T, objects a picture can hold; 0: as many as the batch needs, see `plan.target_sizes`.
      on_error: "raise" stops at a damaged picture; "skip" does without it.
      max_bad_fraction: with "skip", more damaged pictures than this stop after all.
      host_index, host_count: this host loads its contiguous part of every global batch.
    """

    workers: int
    threads: int
    max_targets: int
    on_error: str
    max_bad_fraction: float
    host_index: int = 0
    host_count: int = 1

    def __post_init__(self):
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"config.data.on_error is {self.on_error!r}, expected 'raise' or 'skip'")
        for name in ("workers", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"config.data.{name} is {getattr(self, name)}, expected 0 or more")
        if self.max_targets < 0:
            raise ValueError(f"config.data.max_targets is {self.max_targets}, expected 0 or the number of objects")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"config.data.max_bad_fraction is {self.max_bad_fraction}, expected a number from 0 to 1")
        if not 0 <= self.host_index < self.host_count:
            raise ValueError(f"host_index is {self.host_index}, expected 0 to {self.host_count - 1}")

    @property
    def threads_each(self) -> int:
        """Threads of each process that reads, at least 1."""
        return self.threads or max(1, usable_cores() // max(1, self.workers))

    @property
    def at_once(self) -> int:
        """Number of pictures that are read at the same time."""
        return max(1, self.workers) * self.threads_each


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train_batches(
    source: Source,
    label_of: Mapping[int, int],
    augmentation: Augmentation,
    shapes: Shapes,
    reading: Reading,
    *,
    batch_size: int,
    seed: int,
    accumulation_steps: int = 1,
    last_batch: str = "drop",
    start: tuple[int, int] = (0, 0),
) -> "Batches":
    """Endless augmented batches, epoch after epoch, from a position on.

    With on_error "skip", the row of a damaged picture goes to the nearest following readable one that has no more
    objects than the batch has room for, drawn anew.
    Args:
      label_of: logit index of each category id that occurs.
      shapes: padded heights and widths.
      batch_size: pictures of an optimiser step.
      accumulation_steps: a batch is one of so many parts of a step; a host gets batch_size / accumulation_steps /
        host_count pictures. See `train_plan`.
      last_batch: see `plan.steps_per_epoch`.
      start: (epoch, batch) of the first batch, as `Batches.position` gave it.
    Raises: ValueError, if the settings do not fit each other or the source.
    """
    batches = steps_per_epoch(len(source), batch_size, last_batch) * accumulation_steps
    epoch, batch = start
    if epoch < 0 or not 0 <= batch < batches:
        raise ValueError(f"start is {start}, expected (epoch, batch) with a batch from 0 to {batches - 1}")
    sizes = sizes_hw(source)
    _call_for(source, lambda some: check_shapes(some, augmentation, shapes))
    counts = count_training_objects(source.records)
    plan = functools.partial(
        train_plan,
        sizes,
        augmentation,
        shapes,
        batch_size=batch_size,
        seed=seed,
        accumulation_steps=accumulation_steps,
        last_batch=last_batch,
        object_counts=None if reading.max_targets else counts,
    )

    def jobs() -> Iterator[_Job]:
        first_batch = batch
        with ThreadPoolExecutor(1, thread_name_prefix="plan") as planner:
            coming = planner.submit(plan, epoch=epoch)
            for current in itertools.count(epoch):
                now, coming = coming.result(), planner.submit(plan, epoch=current + 1)
                yield from _jobs(now, current, first_batch, reading)
                first_batch = 0

    def redraw(current: int, index: int, shape_hw: Sequence[int]) -> np.ndarray:
        size_hw = tuple(sizes[index])
        return redraw_row(size_hw, augmentation, shape_hw, seed=seed, epoch=current, index=index)

    reader = _Reader(source, label_of, reading, counts, redraw)
    return Batches(reader, jobs(), reading, batch_size // accumulation_steps, batches, shapes, start)


def eval_batches(
    source: Source,
    label_of: Mapping[int, int],
    shapes: Shapes,
    reading: Reading,
    *,
    short_side_px: int,
    long_side_max_px: int,
    batch_size: int,
) -> "Batches":
    """One pass over every picture, each once, without randomness; see `eval_plan`.

    Rows that hold no picture have index -1 and full-size black images (so that no mask is empty). With on_error "skip",
    the row of a damaged picture becomes such a row.
    Args: see `train_batches`.
    Raises: ValueError, if the settings do not fit each other or the source.
    """
    plan = _call_for(
        source, lambda some: eval_plan(some, short_side_px, long_side_max_px, shapes, batch_size=batch_size)
    )
    reader = _Reader(source, label_of, reading, count_training_objects(source.records), None)
    return Batches(reader, _jobs(plan, 0, 0, reading), reading, batch_size, len(plan), shapes, (0, 0))


class Batches:
    """An iterator of host batches. Close it when done before its end: it owns threads and processes.

    Attributes:
      reading: the settings.
      batches_per_epoch: the same for every epoch.
      max_targets: the largest T of a batch.
      position: (epoch, batch) of the batch that comes next.
      bad_files: names of the damaged pictures that were met so far, in the batches that came out.
    """

    def __init__(
        self,
        reader: "_Reader",
        jobs: Iterator["_Job"],
        reading: Reading,
        batch_size: int,
        batches_per_epoch: int,
        shapes: Shapes,
        start: tuple[int, int],
    ):
        if batch_size % reading.host_count:
            raise ValueError(
                f"batch size {batch_size} is not divisible by {reading.host_count} hosts; use a multiple of "
                f"{reading.host_count}"
            )
        self.reading = reading
        self.batches_per_epoch = batches_per_epoch
        self.max_targets = reader.max_targets
        self.position = tuple(start)
        self.bad_files: set[str] = set()
        self._reader = reader
        self._jobs = jobs
        rows = batch_size // reading.host_count
        self._ahead = 1 + max(1, math.ceil(reading.at_once / rows))  # keeps every thread busy across batches
        self._workers = None
        if reading.workers:
            height, width = np.max(shapes, axis=0).tolist()  # also what pictures left over from several shapes get
            self._workers = Workers(reader.source, reading.workers, reading.threads_each, height * width)
            reader.write_picture = self._workers.write_picture
        self._threads = ThreadPoolExecutor(reading.at_once, thread_name_prefix="picture")
        self._pending: collections.deque[tuple[Batch, list[Future]]] = collections.deque()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        """Returns the next host batch; see `structs.Batch`. After an error or the end, nothing more comes.

        Raises: BadPictureError, for a damaged picture, or with on_error "skip" for too many; WorkerDiedError;
          ValueError or RuntimeError, naming the picture, for whatever else went wrong with it.
        """
        try:
            for job in self._jobs:
                self._submit(job)
                if len(self._pending) > self._ahead:
                    break
            if not self._pending:
                raise StopIteration
            batch, rows = self._pending.popleft()
            for future in rows:
                self._note_bad(future.result())
        except BaseException:
            self.close()
            raise
        epoch, step = self.position
        self.position = (epoch, step + 1) if step + 1 < self.batches_per_epoch else (epoch + 1, 0)
        return batch

    def wait(self) -> None:
        """Waits until all that was asked for ahead has been read."""
        futures.wait([future for _, waiting in self._pending for future in waiting])

    def cpu_s(self) -> float:
        """Seconds of one core that this process and the workers' reading have taken so far."""
        return time.process_time() + (self._workers.cpu_s() if self._workers else 0.0)

    def close(self) -> None:
        """Ends threads and processes, once each has finished its picture, and gives up what was read ahead."""
        self._jobs.close()
        self._pending.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._workers:
            self._workers.close()

    def _submit(self, job: "_Job") -> None:
        batch = _empty_batch(len(job.rows), job.shape_hw, job.max_targets or self.max_targets)
        rows = [self._threads.submit(self._reader.fill, batch, slot, job) for slot in range(len(job.rows))]
        self._pending.append((batch, rows))

    def _note_bad(self, bad: dict[str, str]) -> None:
        """Counts damaged pictures as their batches come out, so that the count depends on no thread's speed."""
        for name, reason in bad.items():
            if name not in self.bad_files:
                logging.warning("skipped a damaged picture: %s", reason)
                self.bad_files.add(name)
        if len(self.bad_files) > self._reader.max_bad:
            raise BadPictureError(
                f"{len(self.bad_files)} of {len(self._reader.source)} pictures are damaged, more than "
                f"config.data.max_bad_fraction allows ({self._reader.max_bad:g}), among them "
                f"{', '.join(sorted(self.bad_files)[:5])}; repair the data or raise that fraction"
            )


@dataclasses.dataclass(frozen=True)
class _Job:
    """One host batch to be made: its epoch, padded shape, T (0: the largest) and rows."""

    epoch: int
    shape_hw: tuple[int, int]
    max_targets: int
    rows: np.ndarray


def _jobs(plan: EpochPlan, epoch: int, first_batch: int, reading: Reading) -> Iterator[_Job]:
    for batch in range(first_batch, len(plan)):
        rows = plan.rows_for(batch, reading.host_index, reading.host_count)
        max_targets = 0 if plan.max_targets is None else int(plan.max_targets[batch])
        yield _Job(epoch, tuple(plan.shapes_hw[batch].tolist()), max_targets, rows)


class _Reader:
    """Makes one row of a batch; called from many threads, changes nothing but that row.

    Attributes:
      write_picture: takes a ROW and the pixels to write to.
    """

    def __init__(
        self,
        source: Source,
        label_of: Mapping[int, int],
        reading: Reading,
        object_counts: np.ndarray,
        redraw: Redraw | None,
    ):
        """`redraw` gives a replacement's ROW; None: a damaged picture's row stays empty."""
        _check_categories(source, label_of)
        self.source = source
        self.max_targets = _max_targets(source.records, object_counts, reading.max_targets)
        self.max_bad = reading.max_bad_fraction * len(source)
        self.write_picture = functools.partial(write_picture, source)
        self._label_of = label_of
        self._object_counts = object_counts
        self._skip = reading.on_error == "skip"
        self._redraw = redraw

    def fill(self, batch: Batch, slot: int, job: _Job) -> dict[str, str]:
        """Writes one row of a job into its batch. Returns: why each damaged picture that it met was skipped, by name.

        Raises: as `Batches.__next__`.
        """
        row = job.rows[slot]
        bad: dict[str, str] = {}
        if row["index"] < 0:
            return bad
        room = batch.targets.valid.shape[1]
        tried = set()
        while True:
            index = int(row["index"])
            tried.add(index)
            record = self.source.records[index]
            try:
                self._write(batch, slot, record, row)
                return bad
            except BadPictureError as error:
                if not self._skip:
                    raise
                bad[record.file_name] = str(error)
            except WorkerDiedError:
                raise
            except ValueError as error:
                raise ValueError(f"{record.file_name} (picture {index}): {error}") from error
            except Exception as error:
                raise RuntimeError(f"{record.file_name} (picture {index}): {type(error).__name__}: {error}") from error
            if self._redraw is None or len(bad) > self.max_bad:
                return bad  # the row stays empty; where too many are damaged, the consumer raises
            others = itertools.chain(range(index + 1, len(self.source)), range(index))
            follower = next((i for i in others if i not in tried and self._object_counts[i] <= room), None)
            if follower is None:
                raise BadPictureError(
                    f"none of the {len(bad)} pictures can be read, the last because of {bad.popitem()[1]}"
                )
            row = self._redraw(job.epoch, follower, job.shape_hw)

    def _write(self, batch: Batch, slot: int, record: Record, row: np.ndarray) -> None:
        self.write_picture(row, batch.images[slot])
        boxes, category_ids = transform_boxes(record, row)
        batch.sizes_hw[slot] = row["size_hw"]
        batch.original_sizes_hw[slot] = record.height, record.width
        count = len(boxes)
        batch.targets.labels[slot, :count] = [self._label_of[c] for c in category_ids.tolist()]
        batch.targets.boxes_cxcywh[slot, :count] = boxes
        batch.targets.valid[slot, :count] = True
        batch.index[slot] = row["index"]


def _empty_batch(rows: int, shape_hw: tuple[int, int], max_targets: int) -> Batch:
    """A host batch in which every row is padding, to be written into."""
    sizes_hw = np.tile(np.array(shape_hw, np.int32), (rows, 1))
    return Batch(
        images=np.zeros((rows, *shape_hw, 3), np.uint8),
        sizes_hw=sizes_hw,
        original_sizes_hw=sizes_hw.copy(),
        index=np.full(rows, -1, np.int32),
        targets=Targets(
            labels=np.zeros((rows, max_targets), np.int32),
            boxes_cxcywh=np.zeros((rows, max_targets, 4), np.float32),
            valid=np.zeros((rows, max_targets), bool),
        ),
    )


def sizes_hw(source: Source) -> np.ndarray:
    """Height and width [n, 2] of every picture. Raises: ValueError, if there is none, or one is absurdly large."""
    if not len(source):
        raise ValueError("the data hold no picture; look at the list of images in the annotation file")
    largest = max(source.records, key=lambda record: record.height * record.width)
    if Image.MAX_IMAGE_PIXELS and largest.height * largest.width > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{largest.file_name} is annotated as {largest.width} x {largest.height} pixels (width x height), more "
            f"than any picture that is read (PIL.Image.MAX_IMAGE_PIXELS, {Image.MAX_IMAGE_PIXELS}); correct it"
        )
    return np.array([(record.height, record.width) for record in source.records], np.int64)


def _call_for(source: Source, function: Callable[[np.ndarray], Any]) -> Any:
    """A function of the pictures' sizes. Where it fails because of one of them, the error names that picture."""
    sizes = sizes_hw(source)
    try:
        return function(sizes)
    except ValueError:
        for i in np.sort(np.unique(sizes, axis=0, return_index=True)[1]).tolist():
            try:
                function(sizes[i : i + 1])
            except ValueError as error:
                raise ValueError(f"{source.records[i].file_name}: {error}") from None
        raise


def _check_categories(source: Source, label_of: Mapping[int, int]) -> None:
    occurring = np.unique(np.concatenate([record.category_ids for record in source.records])).tolist()
    unknown = [c for c in occurring if c not in label_of]
    if unknown:
        names = {category.id: category.name for category in source.categories}
        listed = ", ".join(f"{c} ({names[c]})" for c in unknown[:5])
        raise ValueError(
            f"{len(unknown)} categories of the data have no class logit, among them {listed}; was the model made for "
            "other classes? See config.data.class_ids and config.model.num_classes"
        )


def _max_targets(records: Sequence[Record], counts: np.ndarray, wanted: int) -> int:
    fullest = int(counts.argmax())
    if wanted == 0:
        return max(4, -(-int(counts[fullest]) // 4) * 4)
    if counts[fullest] > wanted:
        raise ValueError(
            f"{records[fullest].file_name} has {counts[fullest]} objects but config.data.max_targets is {wanted}; set "
            f"it to at least {counts[fullest]}, or to 0 to let the data decide"
        )
    return wanted
