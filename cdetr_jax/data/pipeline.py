"""Executes plans: threads read, augment and pad pictures into host batches, ahead of the consumer and in order.

Calls no jax function; the batches hold NumPy arrays. All the state there is between two batches is their position
(epoch, batch), and any number of threads gives the same bytes.
"""

import collections
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from cdetr_jax.data.plan import Augmentation, EpochPlan, Shapes, check_shapes, eval_plan, redraw_row, train_plan
from cdetr_jax.data.sources import BadPictureError, Source
from cdetr_jax.data.transforms import apply_row, count_training_objects
from cdetr_jax.structs import Batch, Record, Targets

Redraw = Callable[[int, int, Sequence[int]], np.ndarray]  # epoch, index, padded shape -> ROW


@dataclasses.dataclass(frozen=True)
class Reading:
    """How pictures are read, for training and evaluation alike.

    Attributes:
      workers: decoding threads, at least 1.
      max_targets: T, objects a picture can hold; 0: as many as the fullest has, rounded up to a multiple of 4.
      on_error: "raise" stops at a damaged picture; "skip" does without it.
      max_bad_fraction: with "skip", more damaged pictures than this stop after all.
      host_index, host_count: this host loads its contiguous part of every global batch.
    """

    workers: int
    max_targets: int
    on_error: str
    max_bad_fraction: float
    host_index: int = 0
    host_count: int = 1

    def __post_init__(self):
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"config.data.on_error is {self.on_error!r}, expected 'raise' or 'skip'")
        if self.workers < 1:
            raise ValueError(f"config.data.workers is {self.workers}, expected at least 1 thread")
        if self.max_targets < 0:
            raise ValueError(f"config.data.max_targets is {self.max_targets}, expected 0 or the number of objects")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"config.data.max_bad_fraction is {self.max_bad_fraction}, expected a number from 0 to 1")
        if not 0 <= self.host_index < self.host_count:
            raise ValueError(f"host_index is {self.host_index}, expected 0 to {self.host_count - 1}")


def train_batches(
    source: Source,
    label_of: Mapping[int, int],
    augmentation: Augmentation,
    shapes: Shapes,
    reading: Reading,
    *,
    batch_size: int,
    seed: int,
    start: tuple[int, int] = (0, 0),
) -> "Batches":
    """Endless augmented batches, epoch after epoch, from a position on.

    With on_error "skip", the row of a damaged picture goes to the nearest following readable one, drawn anew.
    Args:
      label_of: logit index of each category id that occurs.
      shapes: padded heights and widths; one must hold all the others.
      batch_size: pictures of a global batch; a host gets batch_size / host_count of them.
      start: (epoch, batch) of the first batch, as `Batches.position` gave it.
    Raises: ValueError, if the settings do not fit each other or the source.
    """
    steps = len(source) // batch_size
    if steps == 0:
        raise ValueError(
            f"{len(source)} pictures do not fill one batch of {batch_size}; use a smaller config.train.batch_size"
        )
    epoch, batch = start
    if epoch < 0 or not 0 <= batch < steps:
        raise ValueError(f"start is {start}, expected (epoch, batch) with a batch from 0 to {steps - 1}")
    sizes_hw = _sizes_hw(source)
    check_shapes(sizes_hw, augmentation, shapes)

    def jobs() -> Iterator[_Job]:
        first_batch = batch
        for current in itertools.count(epoch):
            plan = train_plan(sizes_hw, augmentation, shapes, batch_size=batch_size, seed=seed, epoch=current)
            yield from _jobs(plan, current, first_batch, reading)
            first_batch = 0

    def redraw(current: int, index: int, shape_hw: Sequence[int]) -> np.ndarray:
        size_hw = tuple(sizes_hw[index])
        return redraw_row(size_hw, augmentation, shape_hw, seed=seed, epoch=current, index=index)

    return Batches(_Reader(source, label_of, reading, redraw), jobs(), reading, batch_size, steps, start)


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
    plan = eval_plan(_sizes_hw(source), short_side_px, long_side_max_px, shapes, batch_size=batch_size)
    reader = _Reader(source, label_of, reading, None)
    return Batches(reader, _jobs(plan, 0, 0, reading), reading, batch_size, len(plan), (0, 0))


class Batches:
    """An iterator of host batches. Close it when done before its end: it owns threads.

    Attributes:
      batches_per_epoch: the same for every epoch.
      max_targets: T of every batch.
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
        start: tuple[int, int],
    ):
        if batch_size % reading.host_count:
            raise ValueError(
                f"batch size {batch_size} is not divisible by {reading.host_count} hosts; use a multiple of "
                f"{reading.host_count}"
            )
        self.batches_per_epoch = batches_per_epoch
        self.max_targets = reader.max_targets
        self.position = tuple(start)
        self.bad_files: set[str] = set()
        self._reader = reader
        self._jobs = jobs
        rows = batch_size // reading.host_count
        self._ahead = 1 + max(1, math.ceil(reading.workers / rows))  # keeps every thread busy across batches
        self._threads = ThreadPoolExecutor(reading.workers, thread_name_prefix="picture")
        self._pending: collections.deque[tuple[Batch, list[Future]]] = collections.deque()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        """Returns the next host batch; see `structs.Batch`. After an error or the end, nothing more comes.

        Raises: BadPictureError, for a damaged picture, or with on_error "skip" for too many; RuntimeError, naming the
          picture, for whatever else went wrong with it.
        """
        try:
            for job in self._jobs:
                self._submit(job)
                if len(self._pending) > self._ahead:
                    break
            if not self._pending:
                raise StopIteration
            batch, futures = self._pending.popleft()
            for future in futures:
                self._note_bad(future.result())
        except BaseException:
            self.close()
            raise
        epoch, step = self.position
        self.position = (epoch, step + 1) if step + 1 < self.batches_per_epoch else (epoch + 1, 0)
        return batch

    def close(self) -> None:
        """Ends the threads, once each has finished its picture, and gives up what was read ahead."""
        self._jobs = iter(())
        self._pending.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _submit(self, job: "_Job") -> None:
        batch = _empty_batch(len(job.rows), job.shape_hw, self.max_targets)
        futures = [self._threads.submit(self._reader.fill, batch, slot, job) for slot in range(len(job.rows))]
        self._pending.append((batch, futures))

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
    """One host batch to be made: its epoch, padded shape and rows."""

    epoch: int
    shape_hw: tuple[int, int]
    rows: np.ndarray


def _jobs(plan: EpochPlan, epoch: int, first_batch: int, reading: Reading) -> Iterator[_Job]:
    for batch in range(first_batch, len(plan)):
        rows = plan.rows_for(batch, reading.host_index, reading.host_count)
        yield _Job(epoch, tuple(plan.shapes_hw[batch].tolist()), rows)


class _Reader:
    """Makes one row of a batch; called from many threads, changes nothing but that row."""

    def __init__(self, source: Source, label_of: Mapping[int, int], reading: Reading, redraw: Redraw | None):
        """`redraw` gives a replacement's ROW; None: a damaged picture's row stays empty."""
        _check_categories(source, label_of)
        self.source = source
        self.max_targets = _max_targets(source.records, reading.max_targets)
        self.max_bad = reading.max_bad_fraction * len(source)
        self._label_of = label_of
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
        for _ in range(len(self.source)):
            index = int(row["index"])
            record = self.source.records[index]
            try:
                self._write(batch, slot, record, row)
                return bad
            except BadPictureError as error:
                if not self._skip:
                    raise
                bad[record.file_name] = str(error)
            except Exception as error:
                raise RuntimeError(f"{record.file_name} (picture {index}): {type(error).__name__}: {error}") from error
            if self._redraw is None or len(bad) > self.max_bad:
                return bad  # the row stays empty; where too many are damaged, the consumer raises
            row = self._redraw(job.epoch, (index + 1) % len(self.source), job.shape_hw)
        raise BadPictureError(f"none of the {len(bad)} pictures can be read, the last because of {bad.popitem()[1]}")

    def _write(self, batch: Batch, slot: int, record: Record, row: np.ndarray) -> None:
        image, boxes, category_ids = apply_row(self.source.load_image(int(row["index"])), record, row)
        height, width = image.shape[:2]
        batch.images[slot, :height, :width] = image
        batch.sizes_hw[slot] = height, width
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


def _sizes_hw(source: Source) -> np.ndarray:
    if not len(source):
        raise ValueError("the data hold no picture; look at the list of images in the annotation file")
    return np.array([(record.height, record.width) for record in source.records], np.int64)


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


def _max_targets(records: Sequence[Record], wanted: int) -> int:
    counts = count_training_objects(records)
    fullest = int(counts.argmax())
    if wanted == 0:
        return max(4, -(-int(counts[fullest]) // 4) * 4)
    if counts[fullest] > wanted:
        raise ValueError(
            f"{records[fullest].file_name} has {counts[fullest]} objects but config.data.max_targets is {wanted}; set "
            f"it to at least {counts[fullest]}, or to 0 to let the data decide"
        )
    return wanted
