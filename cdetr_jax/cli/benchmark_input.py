"""`cdetr benchmark input`: how fast pictures come, where their time goes, and whether a train step has to wait."""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from cdetr_jax import build
from cdetr_jax.classes import class_table
from cdetr_jax.cli.data_flag import config_of
from cdetr_jax.config_check import check_config, count_train_devices
from cdetr_jax.data.pipeline import Batches
from cdetr_jax.data.plan import EpochPlan, real_pixels, real_pixels_otherwise, train_plan
from cdetr_jax.data.reader import usable_cores
from cdetr_jax.data.sources import BadPictureError, PictureFolder, Source, open_image
from cdetr_jax.data.transforms import transform_picture
from cdetr_jax.models.detector import MEAN_RGB, STD_RGB
from cdetr_jax.structs import Batch
from cdetr_jax.training.parallel import Trainer
from cdetr_jax.training.step import new_rng

_SAMPLE = 64  # pictures whose stages are timed
_TURNS = 5  # of each way, with --plain

_Plans = Callable[[int], EpochPlan]  # of each epoch


def run(arguments: argparse.Namespace, fields: list[str]) -> None:
    """Prints one screen of figures.

    Raises: ValueError, FileNotFoundError, if the config or its data are wrong.
    """
    config = config_of(arguments.config, arguments.data, fields)
    check_config(config)
    batch_size, parts = config.train.batch_size, config.train.accumulation_steps
    device_count = count_train_devices(batch_size, parts, jax.local_device_count())
    source = build.make_source(config, "train")
    classes = class_table(source.categories, config.data.class_ids, config.model.num_classes)
    plan_settings = build.make_plan_settings(config, source)
    plan_of = functools.cache(functools.partial(train_plan, plan_settings))
    start = time.perf_counter()
    plan = plan_of(0)
    plan_s = time.perf_counter() - start

    with contextlib.closing(build.make_train_batches(config, source, classes, plan_settings)) as batches:
        reading = batches.settings
        size = plan.rows.shape[1]
        noun = "batch" if parts == 1 else "micro-batch"
        batched = f"{noun}es of {size}" + f", {parts} a step" * (parts > 1)
        print(f"{arguments.config or arguments.data}: {len(source)} pictures of {config.data.source}, {batched}")
        how = [_count(reading.workers, "process", "es")] * bool(reading.workers)
        how += [_count(reading.threads_each, "thread", "s")]
        print(f"read by {' x '.join(how)} on {_count(usable_cores(), 'core', 's')}\n")
        first_s, flow = _time_flow(batches, arguments.batches, plan.shapes_hw.prod(-1).mean())
        plain = _time_plain(batches, source, plan_of, arguments.batches) if arguments.plain else {}
    _print_line("plan of an epoch", plan_s, "s", f"{len(plan)} {noun}es")
    _print_line(f"first {noun} after", first_s, "s")
    used = len(np.unique(plan.shapes_hw, axis=0))
    _print_line("padded shapes", used, "", f"of {len(plan_settings.shapes)}, in this epoch")
    _print_line("real pixels", 100 * real_pixels(plan), "%", _other_paddings(plan, config.data.long_side_max_px))
    _print_line("input", flow.pictures / flow.wall_s, "images/s", f"{flow.pictures} pictures in {flow.wall_s:.1f} s")
    per_core = flow.pictures / flow.cpu_s
    _print_line("input, per core", per_core, "images/s", f"{1000 / per_core:.1f} ms of one core for a picture")

    stages, timed = _time_stages(config, source, plan)
    stages |= _time_transfer(flow.batch)
    print(f"\nstages of a picture, one after the other on one core; means of {timed}")
    for stage, seconds in stages.items():
        _print_line("  " + stage, 1000 * seconds, "ms", f"{100 * seconds / sum(stages.values()):3.0f} %")
    if plain:
        print(f"\na straightforward loader of one process and thread, on the same pictures; medians of {_TURNS} turns")
    for name, figures in plain.items():
        note = f"the input is {figures.times:.2f} times as fast, {figures.times_per_core:.2f} times per core"
        _print_line("  " + name, figures.speed, "images/s", note)
    if arguments.step:
        step_s = _time_step(config, len(classes), flow.batch, arguments.steps, device_count)
        eats = batch_size / step_s
        height, width = flow.batch.images.shape[1:3]
        print()
        note = f"{step_s:.3f} s a step at {height} x {width}, the timed shape nearest to the mean area"
        _print_line("train step eats", eats, "images/s", note)
        enough = flow.pictures / flow.wall_s / eats
        cores = eats / per_core
        _print_line("input / step", enough, "times", f"a step's pictures take {cores:.2g} cores to read")
        if enough < 1:
            print("the devices wait for pictures: raise config.data.threads or config.data.workers")


def _count(number: int, noun: str, plural: str) -> str:
    return f"{number} {noun}{plural if number != 1 else ''}"


def _print_line(name: str, value: float, unit: str, note: str = "") -> None:
    number = f"{value:10d}" if isinstance(value, int) else f"{value:10.3g}" if value < 1 else f"{value:10.1f}"
    print(f"{name:24s}{number} {unit:9s} {note}".rstrip())


@dataclasses.dataclass(frozen=True)
class _Flow:
    """What a number of batches took, which they were, and one of them.

    Attributes:
      first: the first that was read, counted from the start of epoch 0.
      batch: the one whose padded area is nearest to what was wanted.
    """

    first: int
    batch: Batch
    pictures: int
    wall_s: float
    cpu_s: float


def _time_flow(batches: Batches, count: int, area_px: float = 0.0) -> tuple[float, _Flow]:
    """Seconds until the first batch, and what `count` more took, with a consumer that does nothing else."""

    def distance(batch: Batch) -> float:
        return abs(math.prod(batch.images.shape[1:3]) - area_px)

    start = time.perf_counter()
    next(batches)
    first_s = time.perf_counter() - start
    batches.wait()  # what is prefetched before the first timed batch must not count, what is before the last must
    epoch, batch = batches.position
    first = epoch * batches.batches_per_epoch + batch + batches.prefetched
    start, cpu = time.perf_counter(), batches.cpu_s()
    pictures, nearest = 0, None
    for batch in itertools.islice(batches, count):
        pictures += int((batch.index >= 0).sum())
        nearest = min(nearest or batch, batch, key=distance)
    batches.wait()
    return first_s, _Flow(first, nearest, pictures, time.perf_counter() - start, batches.cpu_s() - cpu)


def _other_paddings(plan: EpochPlan, long_side_max_px: int) -> str:
    other = real_pixels_otherwise(plan, long_side_max_px)
    side = f"{long_side_max_px} x {long_side_max_px}"
    return f"all of {side}: {100 * other['square']:.0f} %; the largest of each batch: {100 * other['random']:.0f} %"


class _Plain(NamedTuple):
    """Images a second of a plain loader, and how many times as many ours reads, a second and a second of one core."""

    speed: float
    times: float
    times_per_core: float


def _time_plain(batches: Batches, source: Source, plan_of: _Plans, count: int) -> dict[str, _Plain]:
    """Ours and two plain loaders in turns, each time on the same batches, so that all meet the same machine."""
    normalised = {"as uint8, as ours": False, "as normalised float32": True}
    skip = batches.settings.on_error == "skip"
    speeds: dict[str, list[tuple[float, float]]] = {"ours": [], **{name: [] for name in normalised}}
    for _ in range(_TURNS):
        flow = _time_flow(batches, -(-count // _TURNS))[1]
        speeds["ours"].append((flow.pictures / flow.wall_s, flow.pictures / flow.cpu_s))
        places = [divmod(flow.first + i, batches.batches_per_epoch) for i in range(-(-count // _TURNS))]
        same = [(plan_of(epoch).rows[batch], plan_of(epoch).shapes_hw[batch]) for epoch, batch in places]
        for name, normalise in normalised.items():
            start, cpu = time.perf_counter(), time.process_time()
            pictures = sum(len(_load_plainly(source, *batch, normalise, skip)) for batch in same)
            speeds[name].append((pictures / (time.perf_counter() - start), pictures / (time.process_time() - cpu)))
    ours = np.array(speeds.pop("ours"))
    return {
        name: _Plain(np.median(turns, axis=0)[0], *np.median(ours / turns, axis=0)) for name, turns in speeds.items()
    }


def _load_plainly(
    source: Source, rows: np.ndarray, shape_hw: np.ndarray, normalise: bool, skip: bool = False
) -> np.ndarray:
    """A batch as anyone would read it: one picture after the other; with `normalise` made ready for a network.

    With `skip`, damaged pictures are left out.
    """
    images = np.zeros((len(rows), *shape_hw, 3), np.float32 if normalise else np.uint8)
    count = 0
    for row in rows:
        try:
            picture = transform_picture(open_image(source, int(row["index"])), row)
        except BadPictureError:
            if not skip:
                raise
            continue
        pixels = np.array(picture)
        if normalise:
            pixels = (pixels.astype(np.float32) / 255 - np.float32(MEAN_RGB)) / np.float32(STD_RGB)
        images[count, : picture.height, : picture.width] = pixels
        count += 1
    return images[:count]


def _time_stages(config: ml_collections.ConfigDict, source: Source, plan: EpochPlan) -> tuple[dict[str, float], int]:
    """Mean seconds of each stage, of pictures from all over the plan, in this thread; and of how many."""
    rows = plan.rows.reshape(-1)
    rows = rows[np.linspace(0, len(rows) - 1, _SAMPLE).astype(int)]
    shapes_hw = np.repeat(plan.shapes_hw, plan.rows.shape[1], axis=0)
    shapes_hw = shapes_hw[np.linspace(0, len(shapes_hw) - 1, _SAMPLE).astype(int)]
    folder = source.folder if isinstance(source, PictureFolder) else None
    names = [*(["read", "decode"] if folder else ["read and decode"]), "flip, crop, resize", "pad"]
    seconds = []
    for row, shape_hw in zip(rows, shapes_hw, strict=True):
        index = int(row["index"])
        times = [time.perf_counter()]
        try:
            if folder:  # after this the file is in memory, so that opening it is decoding it
                (folder / source.records[index].file_name).read_bytes()
                times.append(time.perf_counter())
            picture = open_image(source, index)
        except (BadPictureError, OSError):  # OSError: the file is missing
            if config.data.on_error != "skip":
                raise
            continue
        times.append(time.perf_counter())
        picture = transform_picture(picture, row)
        times.append(time.perf_counter())
        padded = np.zeros((*shape_hw, 3), np.uint8)
        padded[: picture.height, : picture.width] = np.asarray(picture)
        times.append(time.perf_counter())
        seconds.append(np.diff(times))
    if not seconds:
        raise BadPictureError(f"none of {_SAMPLE} pictures can be read")
    return dict(zip(names, np.mean(seconds, axis=0), strict=True)), len(seconds)


def _time_transfer(batch: Batch) -> dict[str, float]:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(jax.device_put(batch.images, may_alias=False))
        seconds.append(time.perf_counter() - start)
    return {f"transfer to {jax.devices()[0].device_kind}": statistics.median(seconds) / len(batch.index)}


def _time_step(
    config: ml_collections.ConfigDict, num_classes: int, batch: Batch, steps: int, device_count: int
) -> float:
    """Median seconds of a train step, compiled before."""
    functions = build.make_step_functions(config, num_classes, build.make_schedules(config, 1000))
    trainer = Trainer(functions, jax.local_devices()[:device_count])
    state = trainer.replicate(functions.init(new_rng(0), batch.images.shape[1:3]))
    micro_batches = [batch] * config.train.accumulation_steps
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = trainer.step(state, micro_batches)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
