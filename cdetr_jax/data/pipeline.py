"""Executes plans: reads, augments and pads pictures into this process's batches, ahead of the consumer and in order.

Threads do it, themselves or through worker processes. Calls no jax function; the batches hold NumPy arrays. All the
state there is between two batches is their position (epoch, batch), and any number of threads or processes gives the
same bytes.
"""

import collections
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from absl import logging
from PIL import Image

from cdetr_jax.data.plan import EpochPlan, PlanSettings, Shapes, bucket_table, train_plan
from cdetr_jax.data.reader import Job, Reader, ReadSettings, empty_batch
from cdetr_jax.data.sources import BadPictureError, Source
from cdetr_jax.data.workers import Workers
from cdetr_jax.structs import Batch


def train_batches(
    source: Source,
    label_of: Mapping[int, int],
    plan_settings: PlanSettings,
    read_settings: ReadSettings,
    start: tuple[int, int] = (0, 0),
) -> "Batches":
    """Endless augmented batches, epoch after epoch, from a position on; the first process logs the first one's buckets.

    With on_error "skip", the row of a damaged picture goes to the nearest following readable one that has no more
    objects than the batch has room for, drawn anew.
    Args:
      label_of: logit index of each category id that occurs.
      plan_settings: made of this source's pictures. A batch is one of the accumulation_steps micro-batches of a step;
        a process gets micro_batch_size / process_count pictures of each.
      start: (epoch, batch) of the first batch, as `Batches.position` gave it.
    Raises: ValueError, if the settings do not fit each other or the source.
    """
    counts = plan_settings.object_counts
    fullest = int(np.argmax(counts))
    if 0 < plan_settings.max_targets < counts[fullest]:
        raise ValueError(
            f"{source.records[fullest].file_name} has {counts[fullest]} objects but config.data.max_targets is "
            f"{plan_settings.max_targets}; set it to at least {counts[fullest]}, or to 0 to let the data decide"
        )
    batches_per_epoch = plan_settings.steps_per_epoch * plan_settings.accumulation_steps
    first_epoch, first_batch = start
    if first_epoch < 0 or not 0 <= first_batch < batches_per_epoch:
        raise ValueError(f"start is {start}, expected (epoch, batch) with a batch from 0 to {batches_per_epoch - 1}")
    first_plan = train_plan(plan_settings, first_epoch)
    if read_settings.process_index == 0:
        logging.info("Buckets of epoch %d:\n%s", first_epoch + 1, "\n".join(bucket_table(first_plan)))

    def jobs() -> Iterator[Job]:
        plan, begin = first_plan, first_batch
        with ThreadPoolExecutor(1, thread_name_prefix="plan") as planner:
            for epoch in itertools.count(first_epoch):
                coming = planner.submit(train_plan, plan_settings, epoch + 1)
                yield from _jobs(plan, epoch, begin, read_settings)
                plan, begin = coming.result(), 0

    reader = Reader(source, label_of, read_settings, plan_settings)
    return Batches(reader, jobs(), read_settings, first_plan, plan_settings.shapes, start)


def eval_batches(
    source: Source, label_of: Mapping[int, int], plan: EpochPlan, read_settings: ReadSettings
) -> "Batches":
    """One pass over the pictures of an `eval_plan`.

    Rows that hold no picture have index -1 and full-size black images (so that no mask is empty). With on_error "skip",
    the row of a damaged picture becomes such a row.
    Args: see `train_batches`.
    Raises: ValueError, if the settings do not fit each other or the source.
    """
    reader = Reader(source, label_of, read_settings, None)
    return Batches(reader, _jobs(plan, 0, 0, read_settings), read_settings, plan, plan.shapes_hw, (0, 0))


class Batches:
    """An iterator of this process's batches. Close it when done before its end: it owns threads and processes.

    Attributes:
      settings: how pictures are read.
      plan: of the epoch that the first batch is of.
      batches_per_epoch: the same for every epoch.
      position: (epoch, batch) of the batch that comes next.
      bad_files: names of the damaged pictures that were met so far, in the batches that came out.
    """

    def __init__(
        self,
        reader: Reader,
        jobs: Iterator[Job],
        settings: ReadSettings,
        plan: EpochPlan,
        shapes: Shapes,
        start: tuple[int, int],
    ):
        batch_size = plan.rows.shape[1]
        if batch_size % settings.process_count:
            raise ValueError(
                f"batch size {batch_size} is not divisible by {settings.process_count} processes; use a multiple of "
                f"{settings.process_count}"
            )
        self.settings, self.plan = settings, plan
        self.batches_per_epoch = len(plan)
        self.position = tuple(start)
        self.bad_files: set[str] = set()
        self._reader = reader
        self._jobs = jobs
        rows = batch_size // settings.process_count
        self._prefetch = 1 + max(1, math.ceil(settings.at_once / rows))  # keeps every thread busy across batches
        self._workers = None
        if settings.workers:
            max_pixels = int(np.prod(shapes, axis=-1).max())
            self._workers = Workers(reader.source, settings.workers, settings.threads_each, max_pixels)
            reader.write_picture = self._workers.write_picture
        self._threads = ThreadPoolExecutor(settings.at_once, thread_name_prefix="picture")
        self._pending: collections.deque[tuple[Batch, list[Future]]] = collections.deque()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        """Returns the next batch; see `structs.Batch`. After an error or the end, nothing more comes.

        Raises: BadPictureError, for a damaged picture, or with on_error "skip" for too many; WorkerDiedError;
          ValueError or RuntimeError, naming the picture, for whatever else went wrong with it.
        """
        try:
            for job in self._jobs:
                self._submit(job)
                if len(self._pending) > self._prefetch:
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
    def prefetched(self) -> int:
        """Number of batches that were asked for and have not come out yet."""
        return len(self._pending)

    def wait(self) -> None:
        """Waits until all batches that were asked for have been read."""
        futures.wait([future for _, waiting in self._pending for future in waiting])

    def cpu_s(self) -> float:
        """Seconds of one core that this process and the workers' reading have taken so far."""
        return time.process_time() + (self._workers.cpu_s() if self._workers else 0.0)

    def close(self) -> None:
        """Ends threads and processes, once each has finished its picture, and gives up what was prefetched."""
        self._jobs.close()
        self._pending.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._workers:
            self._workers.close()
        self._threads.shutdown(wait=True)

    def _submit(self, job: Job) -> None:
        batch = empty_batch(len(job.rows), job.shape_hw, job.max_targets)
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
                f"{len(self.bad_files)} of {len(self._reader.source)} pictures are damaged, more than the "
                f"{self._reader.max_bad} that config.data.max_bad_fraction = {self.settings.max_bad_fraction:g} "
                f"allows, among them {', '.join(sorted(self.bad_files)[:5])}; repair the data or raise that fraction"
            )


def _jobs(plan: EpochPlan, epoch: int, first_batch: int, settings: ReadSettings) -> Iterator[Job]:
    for batch in range(first_batch, len(plan)):
        rows = plan.rows_for(batch, settings.process_index, settings.process_count)
        yield Job(epoch, tuple(plan.shapes_hw[batch].tolist()), int(plan.max_targets[batch]), rows)


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
