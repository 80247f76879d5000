"""The one place that turns a config into objects."""

from typing import Any, NamedTuple

import ml_collections
from absl import logging

from cdetr_jax.classes import ClassTable, class_table, label_of
from cdetr_jax.data.joined import JoinedSource
from cdetr_jax.data.pipeline import Batches, eval_batches, sizes_hw, train_batches
from cdetr_jax.data.plan import (
    Augmentation,
    EpochPlan,
    Shapes,
    bucket_table,
    search_eval_shapes,
    search_shapes,
    steps_per_epoch,
    train_plan,
)
from cdetr_jax.data.reader import Reading
from cdetr_jax.data.sources import CocoFolder, Source
from cdetr_jax.data.synthetic import SyntheticShapes
from cdetr_jax.data.tfds_source import TfdsSource
from cdetr_jax.data.transforms import count_training_objects
from cdetr_jax.files import as_path
from cdetr_jax.losses.criterion import LossSettings
from cdetr_jax.matching.cost import CostSettings
from cdetr_jax.models.detector import DetectionTransformer, model_of
from cdetr_jax.models.resnet import frozen_modules
from cdetr_jax.training.optimizer import make_optimizer, step_schedule
from cdetr_jax.training.step import StepFunctions

# How `train` does without a split.
_OR_WITHOUT = {"train": "", "eval": "; or train without evaluation: --config.eval.every_epochs=0"}


def make_source(config: ml_collections.ConfigDict, split: str) -> Source:
    """The source of a split, `train` or `eval`.

    Raises: ValueError, FileNotFoundError, if its fields are empty or the files are not right; ModuleNotFoundError, if
      it needs TFDS and that is not installed.
    """
    data = config.data
    if data.source == "synthetic":
        # Seeds of the two sets must never meet, whatever the run's seed.
        seed = 2 * config.seed + (split == "eval")
        size = data.synthetic.train_pictures if split == "train" else data.synthetic.eval_pictures
        shapes = data.synthetic
        return SyntheticShapes(
            seed=seed, size=size, height=shapes.height, width=shapes.width, max_objects=shapes.max_objects
        )
    parts = []
    if "coco_folder" in data.source:
        parts += [(images, CocoFolder(images, annotations)) for images, annotations in _folders(data, split)]
    if "tfds" in data.source:
        parts += [(f"{name} {part}", TfdsSource(name, data.tfds_data_dir, part)) for name, part in _sets(data, split)]
    if not parts:
        raise ValueError(
            f"config.data has no data for {split!r}: name a folder of pictures or a TFDS split{_OR_WITHOUT[split]}"
        )
    return parts[0][1] if len(parts) == 1 else JoinedSource(parts)


def _folders(data: ml_collections.ConfigDict, split: str) -> list[tuple[str, str]]:
    """Folders of pictures, each with its instances JSON."""
    images, annotations = _paths(data[f"{split}_images"]), _paths(data[f"{split}_annotations"])
    if not any(images + annotations) and data.source != "coco_folder":
        return []
    if not all(images + annotations) or len(images) != len(annotations):
        raise ValueError(
            f"config.data.{split}_images and config.data.{split}_annotations must name a folder of pictures and its "
            f"instances JSON, or as many of both; they are {data[f'{split}_images']!r} and "
            f"{data[f'{split}_annotations']!r}: add --config.data.{split}_images=... "
            f"--config.data.{split}_annotations=...{_OR_WITHOUT[split]}"
        )
    return list(zip(images, annotations, strict=True))


def _sets(data: ml_collections.ConfigDict, split: str) -> list[tuple[str, str]]:
    """Names of TFDS sets, each with its split; one split may stand for all."""
    names, splits = _words(data.tfds_name), _words(data[f"{split}_split"])
    splits = splits * len(names) if len(splits) == 1 else splits
    if not all(names) or len(names) != len(splits) or (data.source == "tfds" and not any(splits)):
        raise ValueError(
            f"config.data.tfds_name and config.data.{split}_split must name a TFDS set and its split, or as many of "
            f"both; they are {data.tfds_name!r} and {data[f'{split}_split']!r}{_OR_WITHOUT[split]}"
        )
    return [pair for pair in zip(names, splits, strict=True) if pair[1]]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _paths(text: str) -> list[str]:
    """Paths with commas between them; or one that has a comma itself, if all of the text is there."""
    return [text] if "," in text and as_path(text).exists() else _words(text)


def make_model(config: ml_collections.ConfigDict, num_classes: int) -> DetectionTransformer:
    """The detector, with so many class logits (`config.model.num_classes` may leave it to the data)."""
    return model_of(config.model.to_dict() | {"num_classes": num_classes})


class Schedules(NamedTuple):
    """Learning rates over optimiser steps."""

    lr: Any
    backbone_lr: Any


def make_schedules(config: ml_collections.ConfigDict, steps_per_epoch: int) -> Schedules:
    """Both learning rates' schedules."""
    optimizer = config.optimizer
    shape = {
        "warmup_steps": optimizer.warmup_steps,
        "drop_step": optimizer.drop_epoch * steps_per_epoch,
        "drop_factor": optimizer.drop_factor,
    }
    return Schedules(step_schedule(optimizer.lr, **shape), step_schedule(optimizer.backbone_lr, **shape))


def make_step_functions(config: ml_collections.ConfigDict, num_classes: int, schedules: Schedules) -> StepFunctions:
    """Model, optimiser and losses of a config, as the pure functions of a step."""
    model, loss = config.model, config.loss
    focal = {"focal_alpha": loss.focal_alpha, "focal_gamma": loss.focal_gamma}
    return StepFunctions(
        model=make_model(config, num_classes),
        optimizer=make_optimizer(
            lr=schedules.lr,
            backbone_lr=schedules.backbone_lr,
            weight_decay=config.optimizer.weight_decay,
            clip_norm=config.optimizer.clip_norm,
            frozen_modules=frozen_modules(model.backbone, model.frozen_stages),
        ),
        cost_settings=CostSettings(class_loss=model.class_loss, **config.matcher, **focal),
        loss_settings=LossSettings(class_loss=model.class_loss, **config.loss),
        ema_decay=config.optimizer.ema_decay,
        top_k=config.eval.top_k,
    )


def _reading(config: ml_collections.ConfigDict, max_targets: int, host: tuple[int, int]) -> Reading:
    data = config.data
    return Reading(
        workers=data.workers,
        threads=data.threads,
        max_targets=max_targets,
        on_error=data.on_error,
        max_bad_fraction=data.max_bad_fraction,
        host_index=host[0],
        host_count=host[1],
    )


def make_train_batches(
    config: ml_collections.ConfigDict,
    source: Source,
    classes: ClassTable,
    start: tuple[int, int],
    host: tuple[int, int] = (0, 1),
) -> Batches:
    """Augmented parts of batches from a position (epoch, part) on, for a host (index, count).

    An optimiser step takes `config.train.accumulation_steps` of them. The first host logs the buckets.
    """
    data = config.data
    shapes = train_shapes(config, source)
    if host[0] == 0:
        plan = make_plan(config, source, shapes, start[0])
        logging.info("Buckets of epoch %d:\n%s", start[0] + 1, "\n".join(bucket_table(plan)))
    return train_batches(
        source,
        label_of(classes),
        _augmentation(config),
        shapes,
        _reading(config, data.max_targets, host),
        batch_size=config.train.batch_size,
        seed=config.seed,
        accumulation_steps=config.train.accumulation_steps,
        last_batch=data.last_batch,
        start=start,
    )


def make_plan(config: ml_collections.ConfigDict, source: Source, shapes: Shapes, epoch: int) -> EpochPlan:
    """The plan of a training epoch, to look at; `make_train_batches` follows the same."""
    return train_plan(
        sizes_hw(source),
        _augmentation(config),
        shapes,
        batch_size=config.train.batch_size,
        seed=config.seed,
        epoch=epoch,
        accumulation_steps=config.train.accumulation_steps,
        last_batch=config.data.last_batch,
        object_counts=None if config.data.max_targets else count_training_objects(source.records),
    )


def train_shapes(config: ml_collections.ConfigDict, source: Source) -> Shapes:
    """Padded shapes of training: the config's, or chosen from the sizes of the pictures."""
    data = config.data
    return data.train_shapes or search_shapes(sizes_hw(source), _augmentation(config), data.num_train_shapes)


def count_steps(config: ml_collections.ConfigDict, source: Source) -> int:
    """Steps of a training epoch. Raises: ValueError, if there would be none."""
    return steps_per_epoch(len(source), config.train.batch_size, config.data.last_batch)


def make_eval_batches(
    config: ml_collections.ConfigDict, source: Source, host: tuple[int, int] = (0, 1), device_count: int = 1
) -> Batches:
    """Every picture once, resized as published, for a host (index, count); its labels are the categories' ranks.

    A batch is `config.eval.batch_size`, rounded up to a multiple of `device_count`, all hosts' devices.
    """
    data = config.data
    sides = data.eval_short_side_px, data.long_side_max_px
    shapes = data.eval_shapes or search_eval_shapes(sizes_hw(source), *sides, data.num_eval_shapes)
    return eval_batches(
        source,
        label_of(class_table(source.categories, "contiguous", 0)),
        shapes,
        _reading(config, 0, host),
        short_side_px=data.eval_short_side_px,
        long_side_max_px=data.long_side_max_px,
        batch_size=-(-config.eval.batch_size // device_count) * device_count,
    )


def _augmentation(config: ml_collections.ConfigDict) -> Augmentation:
    data = config.data
    return Augmentation(
        short_sides_px=data.short_sides_px,
        long_side_max_px=data.long_side_max_px,
        flip_probability=data.flip_probability,
        crop_probability=data.crop_probability,
        crop_short_sides_px=data.crop_short_sides_px,
        crop_sides_px=data.crop_sides_px,
    )
