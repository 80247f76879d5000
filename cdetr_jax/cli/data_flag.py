"""`--data`: the config for a data set that is named on the command line, with values that suit it."""

import os
import re
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging

from cdetr_jax import build
from cdetr_jax.checkpoints import workdir as run_files
from cdetr_jax.classes import class_table
from cdetr_jax.cli.settings import change_config, quiet, read_config
from cdetr_jax.config_check import check_config, count_train_devices
from cdetr_jax.data.buckets import by_area
from cdetr_jax.data.folders import HELD_OUT, find_layout
from cdetr_jax.data.sources import Source
from cdetr_jax.data.tfds_source import splits_of
from cdetr_jax.data.transforms import count_training_objects
from cdetr_jax.files import as_path
from cdetr_jax.training.memory import GIB, parts_that_fit
from cdetr_jax.training.parallel import Trainer
from cdetr_jax.training.step import new_rng
from cdetr_jax.weights import torch_files
from cdetr_jax.weights.load import Weights

TFDS = "tfds:"
# Where training starts, best first: a recipe and its config.init. The last needs nothing, and is what a CPU can train.
STARTS = (
    ("coco_folder", "hf://microsoft/conditional-detr-resnet-50"),
    ("coco_folder", "hf://timm/resnet50.tv_in1k"),
    ("coco_folder_small", ""),
)
EXPECT = {
    "coco_folder": "",
    "coco_folder_small": "; expect a rough detector, such as AP 0.37 on 205 pictures of blood cells after 50 epochs: "
    "with a GPU and a network --data starts from weights trained on COCO",
}


# Of a device's memory: for what the runtime takes itself, pictures on their way, and holes between arrays.
SPARE = 0.1


class Choice(NamedTuple):
    """A field of the config, its value, and why."""

    field: str
    value: Any
    reason: str


def config_of(
    recipe: str | None, data: str | None, fields: list[str], workdir: str | os.PathLike = ""
) -> ml_collections.ConfigDict:
    """The config of a command that takes `--config`, `--data`, or both, and single fields, which count most.

    With a recipe, all but the place of the data is as the recipe has it. Without one a run that was begun goes on with
    its own config, and a new one gets `STARTS` and `choices`, which are logged.
    Raises: ValueError, FileNotFoundError, if one cannot be read.
    """
    if data is None:
        return read_config(recipe, fields)
    set_by_hand = _by_hand(fields)
    is_begun = bool(recipe is None and workdir and (as_path(workdir) / run_files.CONFIG).is_file())
    if is_begun:
        logging.info("the config is that of the run in %s", workdir)
        config = run_files.with_all_fields(run_files.load_config(workdir))
    else:
        config = read_config(recipe or STARTS[0][0], [])
    place = place_of(data, set_by_hand.get("data.tfds_data_dir", config.data.tfds_data_dir), workdir)
    if is_begun and (before := _other_data(config.data, place)):
        raise ValueError(
            f"the run in {workdir} is trained on {before}, not on {data}; use another --workdir"
            + f", or, for a copy of the folder, --data={before} --config.data.folder={data}" * (TFDS not in before)
        )
    if recipe is not None or is_begun:
        return change_config(changed(config, place), fields)
    if init := set_by_hand.get("init"):
        recipe = STARTS[0][0]
    else:
        recipe, init = start(jax.default_backend() != "cpu" and init is None)
    config = change_config(changed(read_config(recipe, []), place | {"init": init}), fields)
    with quiet():  # it is read again
        source = build.make_source(config, "train")
    chosen = [
        choice for choice in choices(config, source, jax.device_count(), set_by_hand) if choice.field not in set_by_hand
    ]
    changed(config, {field: value for field, value, _ in chosen})
    if "train.accumulation_steps" not in set_by_hand and (available := _memory_of_a_device()):
        chosen.append(_parts(config, source, available))
        changed(config, {chosen[-1].field: chosen[-1].value})
    logging.info("the recipe is %s, starting from %s; chosen for these data:", recipe, init or "random weights")
    shown = [f"--config.{field}={value}".replace(" ", "") for field, value, _ in chosen]
    for field, choice in zip(shown, chosen, strict=True):
        logging.info("  %-*s  %s", max(map(len, shown)), field, choice.reason)
    return config


def _other_data(before: ml_collections.ConfigDict, place: dict[str, Any]) -> str:
    """What a run was trained on, if that is there and is something else; else empty."""
    if place["data.source"] == "tfds":
        return f"{TFDS}{before.tfds_name}" * (before.source == "tfds" and before.tfds_name != place["data.tfds_name"])
    is_there = before.folder and Path(before.folder).exists()
    return before.folder if is_there and not Path(before.folder).samefile(place["data.folder"]) else ""


def evaluation_of(weights: Weights, data: str | None, fields: list[str]) -> ml_collections.ConfigDict:
    """The config to evaluate weights with: their run's, or the recipe for one's own pictures with their sizes.

    Args:
      data: as for `place_of`; None: the run's own.
    Raises: as `config_of`.
    """
    if weights.config is None and data is None:
        raise ValueError(
            f"{weights.source} does not say on which pictures to evaluate it; name them, --data=FOLDER, or a recipe, "
            "such as --config=conditional_detr_r50"
        )
    if weights.config is not None:
        config = run_files.with_all_fields(weights.config)
    else:
        sides = weights.preprocessing
        config = changed(
            read_config(STARTS[0][0], []),
            {
                "data.eval_short_side_px": sides.short_side_px,
                "data.long_side_max_px": sides.long_side_max_px,
                "data.eval_shapes": sides.shapes_hw,
            },
        )
    if data is not None:
        place = place_of(data, _by_hand(fields).get("data.tfds_data_dir", config.data.tfds_data_dir))
        config = changed(config, {"data.eval_split": "validation", **place})
    return change_config(config, fields)


def _by_hand(fields: list[str]) -> dict[str, str]:
    """Names and values of fields of the command line, `--config.name=value`."""
    return {name: value for name, _, value in (field[9:].partition("=") for field in fields)}


def default_workdir(data: str) -> str:
    """Where a run goes that is given no workdir."""
    if data.startswith(TFDS):
        return f"runs/{re.sub('[^A-Za-z0-9]+', '-', data.removeprefix(TFDS))}"
    path = Path(data).resolve()
    return f"runs/{path.parent.name if path.is_file() else path.name}"


def place_of(data: str, tfds_data_dir: str, workdir: str | os.PathLike = "") -> dict[str, Any]:
    """The fields that say where the data are; says in a line what was found.

    Args:
      data: a folder, or the name of a TFDS set, as `tfds:coco/2017`.
      workdir: of the run, where a split that is made is written down.
    Raises: ValueError, FileNotFoundError, if it is neither; ModuleNotFoundError, if it needs TFDS.
    """
    if data.startswith(TFDS):
        name = data.removeprefix(TFDS)
        splits = splits_of(name, tfds_data_dir)
        held_out = round(100 * (1 - HELD_OUT))
        train, evaluation = "train", next((split for split in ("validation", "test") if split in splits), None)
        if evaluation is None:
            train, evaluation = f"train[:{held_out}%]", f"train[{held_out}%:]"
        logging.info("%s is a TFDS set: %s; evaluated on %s", name, ", ".join(splits), evaluation)
        return {
            "data.source": "tfds", "data.tfds_name": name, "data.train_split": train, "data.eval_split": evaluation,
        }  # fmt: skip
    layout = find_layout(data)
    logging.info("%s", layout.describe())
    place = {"data.source": "folder", "data.folder": data}
    if layout.must_be_divided:
        return place | {"data.split_file": str(as_path(workdir) / "split.json") if workdir else ""}
    return place if "validation" in layout.splits else place | {"data.eval_split": "test"}


def start(has_accelerator: bool) -> tuple[str, str]:
    """The first recipe and init of `STARTS` that can be had."""
    for recipe, init in STARTS[:-1] if has_accelerator else ():
        try:
            torch_files.download(init)
        except OSError as error:
            logging.warning("cannot start from %s: %s", init, error)
        else:
            return recipe, init
    recipe, init = STARTS[-1]
    logging.info("%s: random weights%s", "no accelerator" if not has_accelerator else "no weights", EXPECT[recipe])
    return recipe, init


def choices(
    config: ml_collections.ConfigDict, source: Source, device_count: int, fixed: Container[str] = ()
) -> Iterator[Choice]:
    """Values of fields that suit the training pictures.

    Args:
      fixed: names of fields whose value in the config stays, and decides on others, as the epochs do on the drop.
    """
    data, n = config.data, len(source)
    counts = count_training_objects(source.records)
    most = int(counts.max(initial=0))
    # Pictures to be seen in all, least and most epochs.
    seen, least, longest = (20_000, 50, 300) if not config.init else (40_000, 12, 200)
    if config.init == STARTS[1][1]:
        seen, least, longest = 80_000, 50, 300
    epochs = int(np.clip(round(seen / n), least, longest))
    yield Choice("train.num_epochs", epochs, f"{n} pictures, about {seen} to be seen, {least} to {longest} epochs")
    epochs = config.train.num_epochs if "train.num_epochs" in fixed else epochs
    yield Choice("optimizer.drop_epoch", round(0.8 * epochs), "after 80 % of them, as published")
    yield Choice("eval.every_epochs", max(epochs // 10, 1), "about ten times a run")

    batch = -(-config.train.batch_size // device_count) * device_count
    if batch != config.train.batch_size:
        yield Choice("train.batch_size", batch, f"a multiple of {device_count} devices")
    if n < 20 * batch:
        yield Choice("data.last_batch", "fill", "so few pictures that none is to be left out of an epoch")

    if most > config.model.num_queries // 2 and not _is_detector(config.init):
        yield Choice(
            "model.num_queries", -(-2 * most // 10) * 10, f"up to {most} objects a picture, twice as many queries"
        )
    elif most > config.model.num_queries:
        logging.warning(
            "pictures have up to %d objects: %d queries cannot find them all", most, config.model.num_queries
        )
    if most > config.eval.top_k:
        yield Choice(
            "eval.top_k", -(-2 * most // 10) * 10, f"up to {most} objects a picture; COCO's AP counts 100 of them"
        )

    short = float(np.median([min(record.height, record.width) for record in source.records]))
    factor = max(short, 32) / data.eval_short_side_px  # the backbone's stride
    if factor < 1 and not _is_detector(config.init):
        reason = f"half of the pictures have a short side of at most {short:.0f} pixels"
        names = ("short_sides_px", "long_side_max_px", "crop_short_sides_px", "crop_sides_px", "eval_short_side_px")
        for name in names:
            yield Choice(f"data.{name}", _scaled(data[name], factor), reason)
    shapes = int(np.clip(n // 500, 3, 12))
    yield Choice("data.train_shapes", (), "padded shapes come from the sizes of the pictures")
    yield Choice("data.eval_shapes", (), "the same")
    yield Choice("data.num_train_shapes", shapes, "each is compiled, and is to have pictures enough for its batches")
    yield Choice("data.num_eval_shapes", min(shapes, data.num_eval_shapes), "the same")


def _memory_of_a_device() -> int:
    """Bytes that a program may use, the least of this process's devices; 0 on a CPU, which does not say."""
    return min((device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices())


def _parts(config: ml_collections.ConfigDict, source: Source, available: int) -> Choice:
    """In how many parts a step is cut so that it fits the memory: the batch stays what its learning rate is for.

    Compiles the programs of the largest padded shape, which the run then finds in JAX's cache.
    """
    check_config(config)
    with quiet():
        settings = build.make_plan_settings(config, source)
    classes = class_table(source.categories, config.data.class_ids, config.model.num_classes)
    count = count_train_devices(config.train.batch_size, 1, jax.local_device_count(), jax.process_count())
    schedules = build.make_schedules(config, settings.steps_per_epoch)
    functions = build.make_step_functions(config, len(classes), schedules)
    trainer = Trainer(functions, jax.local_devices()[:count])
    state = trainer.shapes(jax.eval_shape(lambda: functions.init(new_rng(0), (64, 64))))
    pictures = config.train.batch_size // trainer.device_count
    height, width = by_area(settings.shapes)[-1].tolist()
    logging.info(
        "compiling a step of %d pictures of %dx%d pixels a device, to see whether it fits ...", pictures, height, width
    )
    parts, peak = parts_that_fit(
        trainer, state, pictures, (height, width), max(settings.target_sizes), (1 - SPARE) * available,
        len(settings.shapes),
    )  # fmt: skip
    takes = "more than there is" if peak is None else f"{peak / GIB:.1f} GiB, an estimate"
    reason = (
        f"{pictures // parts} of a device's {pictures} pictures at a time ({height}x{width} pixels) take {takes}; it "
        f"has {available / GIB:.1f} GiB, of which {100 * SPARE:.0f} % are kept free"
    )
    return Choice("train.accumulation_steps", parts, reason)


def _is_detector(init: str) -> bool:
    return bool(init) and init != STARTS[1][1]


def _scaled(sides_px: int | Sequence[int], factor: float) -> int | tuple[int, ...]:
    """Sides in pixels, smaller, whole multiples of 8 from 32 on."""
    if isinstance(sides_px, int):
        return max(round(sides_px * factor / 8) * 8, 32)
    return tuple(max(round(side * factor / 8) * 8, 32) for side in sides_px)


def changed(config: ml_collections.ConfigDict, fields: dict[str, Any]) -> ml_collections.ConfigDict:
    """The config, with other values in some fields."""
    config.update_from_flattened_dict(fields)
    return config
