"""One row of a batch: its picture read, augmented and written where it belongs, its boxes and labels beside it."""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Mapping

import numpy as np

from cdetr_jax.data.plan import PlanSettings, redraw_row
from cdetr_jax.data.sources import BadPictureError, Source
from cdetr_jax.data.transforms import transform_boxes
from cdetr_jax.data.workers import WorkerDiedError, write_picture
from cdetr_jax.structs import Batch, Record, Targets

_ADVICE = '; replace or correct it, or set config.data.on_error = "skip" to do without damaged pictures'


@dataclasses.dataclass(frozen=True)
class ReadSettings:
    """How pictures are read, for training and evaluation alike.

    Attributes:
      workers: processes that read; 0: this one does.
      threads: of each process that reads; 0: as many as make one for each core, all processes together.
      on_error: "raise" stops at a damaged picture; "skip" does without it.
      max_bad_fraction: with "skip", a process that has met more damaged pictures than this stops after all.
      process_index, process_count: of JAX's processes; each reads its contiguous share of every global batch.
    """

    workers: int
    threads: int
    on_error: str
    max_bad_fraction: float
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"config.data.on_error is {self.on_error!r}, expected 'raise' or 'skip'")
        for name in ("workers", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"config.data.{name} is {getattr(self, name)}, expected 0 or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"config.data.max_bad_fraction is {self.max_bad_fraction}, expected a number from 0 to 1")
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(f"process_index is {self.process_index}, expected 0 to {self.process_count - 1}")

    def max_bad(self, pictures: int) -> int:
        """How many of so many pictures may be damaged, with "skip": at least one, unless max_bad_fraction is 0."""
        return math.ceil(self.max_bad_fraction) and max(1, int(self.max_bad_fraction * pictures))

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


@dataclasses.dataclass(frozen=True)
class Job:
    """One batch of this process to be made: its epoch, padded shape, T and rows."""

    epoch: int
    shape_hw: tuple[int, int]
    max_targets: int
    rows: np.ndarray


class Reader:
    """Makes one row of a batch; called from many threads, changes nothing but that row.

    Attributes:
      write_picture: takes a ROW and the pixels to write to.
      max_bad: damaged pictures that may be skipped.
    """

    def __init__(
        self,
        source: Source,
        label_of: Mapping[int, int],
        settings: ReadSettings,
        plan_settings: PlanSettings | None,
    ):
        """`plan_settings` say how a damaged picture's replacement is drawn; None: its row stays empty."""
        _check_categories(source, label_of)
        self.source = source
        self.max_bad = settings.max_bad(len(source))
        self.write_picture = functools.partial(write_picture, source)
        self._label_of = label_of
        self._skip = settings.on_error == "skip"
        self._plan_settings = plan_settings

    def fill(self, batch: Batch, slot: int, job: Job) -> dict[str, str]:
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
                    raise BadPictureError(f"{error}{_ADVICE}") from error
                bad[record.file_name] = str(error)
            except WorkerDiedError:
                raise
            except ValueError as error:
                raise ValueError(f"{record.file_name} (picture {index}): {error}") from error
            except Exception as error:
                raise RuntimeError(f"{record.file_name} (picture {index}): {type(error).__name__}: {error}") from error
            if self._plan_settings is None or len(bad) > self.max_bad:
                return bad  # the row stays empty; where too many are damaged, the consumer raises
            others = itertools.chain(range(index + 1, len(self.source)), range(index))
            counts = self._plan_settings.object_counts
            follower = next((i for i in others if i not in tried and counts[i] <= room), None)
            if follower is None:
                raise BadPictureError(
                    f"none of the {len(bad)} pictures can be read, the last because of {bad.popitem()[1]}"
                )
            row = redraw_row(self._plan_settings, job.shape_hw, job.epoch, follower)

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


def empty_batch(rows: int, shape_hw: tuple[int, int], max_targets: int) -> Batch:
    """A batch of NumPy arrays in which every row is padding, to be written into."""
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
