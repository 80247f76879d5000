"""`cdetr benchmark input`: how fast pictures come, where their time goes, and whether a train step has to wait."""

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from PIL import Image

from cdetr_jax import build
from cdetr_jax.cli.settings import read_config
from cdetr_jax.data.pipeline import Batches
from cdetr_jax.data.plan import EpochPlan, real_pixels, real_pixels_otherwise
from cdetr_jax.data.reader import usable_cores
from cdetr_jax.data.sources import CocoFolder, Source
from cdetr_jax.data.transforms import transform_picture
from cdetr_jax.models.detector import MEAN_RGB, STD_RGB
from cdetr_jax.structs import Batch
from cdetr_jax.training.parallel import Trainer
from cdetr_jax.training.step import new_rng

_SAMPLE = 64  # pictures whose stages are timed
_TURNS = 5  # of each way, with --plain


def run(arguments: argparse.Namespace, fields: list[str]) -> None:
    """Prints one screen of figures.

    Raises: ValueError, FileNotFoundError, if the config or its data are wrong.
    """
    config = read_config(arguments.config, fields)
    if arguments.batches < 1:
        raise ValueError(f"--batches is {arguments.batches}, expected at least 1")
    build.check_config(config, jax.local_device_count())
    source = build.make_source(config, "train")
    classes = build.class_table(source.categories, config.data.class_ids, config.model.num_classes)
    shapes = build.train_shapes(config, source)
    start = time.perf_counter()
    plan = build.make_plan(config, source, shapes, 0)
    plan_s = time.perf_counter() - start

    with contextlib.closing(build.make_train_batches(config, source, classes, (0, 0))) as batches:
        reading = batches.reading
        print(f"{arguments.config}: {len(source)} pictures of {config.data.source}, batches of {plan.rows.shape[1]}")
        how = [_count(reading.workers, "process", "es")] * bool(reading.workers)
        how += [_count(reading.threads_each, "thread", "s")]
        print(f"read by {' x '.join(how)} on {_count(usable_cores(), 'core', 's')}\n")
        first_s, flow = _time_flow(batches, arguments.batches)
        plain = _time_plain(batches, source, plan, arguments.batches) if arguments.plain else {}
    _print_line("plan of an epoch", plan_s, "s", f"{len(plan)} batches")
    _print_line("first batch after", first_s, "s")
    _print_line("padded shapes", len(np.unique(plan.shapes_hw, axis=0)), "", f"of {len(shapes)}, in this epoch")
    _print_line("real pixels", 100 * real_pixels(plan), "%", _other_paddings(plan, config.data.long_side_max_px))
    _print_line("input", flow.pictures / flow.wall_s, "images/s", f"{flow.pictures} pictures in {flow.wall_s:.1f} s")
    per_core = flow.pictures / flow.cpu_s
    _print_line("input, per core", per_core, "images/s", f"{1000 / per_core:.1f} ms of one core for a picture")

    print(f"\nstages of a picture, one after the other on one core; means of {_SAMPLE}")
    stages = _time_stages(config, source, plan) | _time_transfer(flow.batch)
    for stage, seconds in stages.items():
        _print_line("  " + stage, 1000 * seconds, "ms", f"{100 * seconds / sum(stages.values()):3.0f} %")
    if plain:
        print(f"\na straightforward loader of one process and thread, same work; medians of {_TURNS} turns")
    for name, figures in plain.items():
        note = f"the input is {figures.times:.2f} times as fast, {figures.times_per_core:.2f} times per core"
        _print_line("  " + name, figures.speed, "images/s", note)
    if arguments.step:
        step_s = _time_step(config, len(classes), flow.batch, arguments.steps)
        eats = config.train.batch_size / step_s
        height, width = flow.batch.images.shape[1:3]
        print()
        _print_line("train step eats", eats, "images/s", f"{step_s:.3f} s a step at {height} x {width}")
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
    """What a number of batches took, and the last of them."""

    batch: Batch
    pictures: int
    wall_s: float
    cpu_s: float


def _time_flow(batches: Batches, count: int) -> tuple[float, _Flow]:
    """Seconds until the first batch, and what `count` more took, with a consumer that does nothing else."""
    start = time.perf_counter()
    batch = next(batches)
    first_s = time.perf_counter() - start
    batches.wait()  # what is read ahead of the first timed batch must not count, what is read ahead of the last must
    start, cpu = time.perf_counter(), batches.cpu_s()
    pictures = 0
    for batch in itertools.islice(batches, count):
        pictures += int((batch.index >= 0).sum())
    batches.wait()
    return first_s, _Flow(batch, pictures, time.perf_counter() - start, batches.cpu_s() - cpu)


def _other_paddings(plan: EpochPlan, long_side_max_px: int) -> str:
    other = real_pixels_otherwise(plan, long_side_max_px)
    side = f"{long_side_max_px} x {long_side_max_px}"
    return f"all of {side}: {100 * other['square']:.0f} %; the largest of each batch: {100 * other['random']:.0f} %"


class _Plain(NamedTuple):
    """Images a second of a plain loader, and how many times as many ours reads, a second and a second of one core."""

    speed: float
    times: float
    times_per_core: float


def _time_plain(batches: Batches, source: Source, plan: EpochPlan, count: int) -> dict[str, _Plain]:
    """Ours and two plain loaders in turns, so that all meet the same machine."""
    normalised = {"as uint8, as ours": False, "as normalised float32": True}
    order = itertools.cycle(range(len(plan)))
    speeds: dict[str, list[tuple[float, float]]] = {"ours": [], **{name: [] for name in normalised}}
    for _ in range(_TURNS):
        flow = _time_flow(batches, -(-count // _TURNS))[1]
        speeds["ours"].append((flow.pictures / flow.wall_s, flow.pictures / flow.cpu_s))
        for name, normalise in normalised.items():
            start, cpu, pictures = time.perf_counter(), time.process_time(), 0
            for batch in itertools.islice(order, -(-count // _TURNS)):
                _load_plainly(source, plan.rows[batch], plan.shapes_hw[batch], normalise)
                pictures += plan.rows.shape[1]
            speeds[name].append((pictures / (time.perf_counter() - start), pictures / (time.process_time() - cpu)))
    speed, per_core = np.median(speeds.pop("ours"), axis=0)
    medians = {name: np.median(turns, axis=0) for name, turns in speeds.items()}
    return {name: _Plain(wall, speed / wall, per_core / cpu) for name, (wall, cpu) in medians.items()}


def _load_plainly(source: Source, rows: np.ndarray, shape_hw: np.ndarray, normalise: bool) -> np.ndarray:
    """A batch as anyone would read it: one picture after the other; with `normalise` made ready for a network."""
    images = np.zeros((len(rows), *shape_hw, 3), np.float32 if normalise else np.uint8)
    for image, row in zip(images, rows, strict=True):
        index = int(row["index"])
        picture = source.open_image(index) if isinstance(source, CocoFolder) else source.load_image(index)
        picture = transform_picture(picture if isinstance(picture, Image.Image) else Image.fromarray(picture), row)
        pixels = np.array(picture)
        if normalise:
            pixels = (pixels.astype(np.float32) / 255 - np.float32(MEAN_RGB)) / np.float32(STD_RGB)
        image[: picture.height, : picture.width] = pixels
    return images


def _time_stages(config: ml_collections.ConfigDict, source: Source, plan: EpochPlan) -> dict[str, float]:
    """Mean seconds of each stage, of pictures from all over the plan, in this thread."""
    rows = plan.rows.reshape(-1)
    rows = rows[np.linspace(0, len(rows) - 1, _SAMPLE).astype(int)]
    shapes_hw = np.repeat(plan.shapes_hw, plan.rows.shape[1], axis=0)
    shapes_hw = shapes_hw[np.linspace(0, len(shapes_hw) - 1, _SAMPLE).astype(int)]
    folder = config.data.train_images if config.data.source == "coco_folder" else None
    stages = {"read": 0.0} if folder else {}
    decode = "decode" if folder else "read and decode"
    for row, shape_hw in zip(rows, shapes_hw, strict=True):
        index = int(row["index"])
        times = [time.perf_counter()]
        if folder:  # after this the file is in memory, so that loading it is decoding it
            (Path(folder) / source.records[index].file_name).read_bytes()
            times.append(time.perf_counter())
        image = source.load_image(index)
        times.append(time.perf_counter())
        picture = transform_picture(Image.fromarray(image), row)
        times.append(time.perf_counter())
        padded = np.zeros((*shape_hw, 3), np.uint8)
        padded[: picture.height, : picture.width] = np.asarray(picture)
        times.append(time.perf_counter())
        names = [*(["read"] if folder else []), decode, "flip, crop, resize", "pad"]
        for name, seconds in zip(names, np.diff(times), strict=True):
            stages[name] = stages.get(name, 0.0) + seconds / _SAMPLE
    return stages


def _time_transfer(batch: Batch) -> dict[str, float]:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(jax.device_put(batch.images, may_alias=False))
        seconds.append(time.perf_counter() - start)
    return {f"transfer to {jax.devices()[0].device_kind}": statistics.median(seconds) / len(batch.index)}


def _time_step(config: ml_collections.ConfigDict, num_classes: int, batch: Batch, steps: int) -> float:
    """Median seconds of a train step, compiled before."""
    functions = build.make_step_functions(config, num_classes, build.make_schedules(config, 1000))
    trainer = Trainer(functions)
    state = trainer.replicate(functions.init(new_rng(0), batch.images.shape[1:3]))
    parts = [batch] * config.train.accumulation_steps
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, losses, _ = trainer.step(state, parts)
        jax.block_until_ready((state, losses))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
