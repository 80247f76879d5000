"""Executes plans: reads, augments and pads pictures into host batches, ahead of the consumer and in order.

Threads do it, themselves or through worker processes. Calls no jax function; the batches hold NumPy arrays. All the
state there is between two batches is their position (epoch, batch), and any number of threads or processes gives the
same bytes.
"""

import collections
import functools
import itertools
import logging
import math
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
from cdetr_jax.data.reader import Job, Reader, Reading, empty_batch
from cdetr_jax.data.sources import BadPictureError, Source
from cdetr_jax.data.transforms import count_training_objects
from cdetr_jax.data.workers import Workers
from cdetr_jax.structs import Batch


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

    def jobs() -> Iterator[Job]:
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

    reader = Reader(source, label_of, reading, counts, redraw)
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
    reader = Reader(source, label_of, reading, count_training_objects(source.records), None)
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
        reader: Reader,
        jobs: Iterator[Job],
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
            max_pixels = int(np.prod(shapes, axis=-1).max())
            self._workers = Workers(reader.source, reading.workers, reading.threads_each, max_pixels)
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

    @property
    def read_ahead(self) -> int:
        """Number of batches that were asked for and have not come out yet."""
        return len(self._pending)

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
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._workers:
            self._workers.close()
        self._threads.shutdown(wait=True)

    def _submit(self, job: Job) -> None:
        batch = empty_batch(len(job.rows), job.shape_hw, job.max_targets or self.max_targets)
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


def _jobs(plan: EpochPlan, epoch: int, first_batch: int, reading: Reading) -> Iterator[Job]:
    for batch in range(first_batch, len(plan)):
        rows = plan.rows_for(batch, reading.host_index, reading.host_count)
        max_targets = 0 if plan.max_targets is None else int(plan.max_targets[batch])
        yield Job(epoch, tuple(plan.shapes_hw[batch].tolist()), max_targets, rows)


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
