"""The one place that turns a config into objects."""

from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging

from cdetr_jax.classes import ClassTable, class_table, label_of
from cdetr_jax.data.buckets import bucket_of, by_area
from cdetr_jax.data.coco import CocoFolder
from cdetr_jax.data.folders import read_split
from cdetr_jax.data.joined import JoinedSource
from cdetr_jax.data.pipeline import Batches, eval_batches, sizes_hw, train_batches
from cdetr_jax.data.plan import (
    Augmentation,
    EpochPlan,
    PlanSettings,
    eval_plan,
    may_be_scaled_down,
    resized_hw,
    search_eval_shapes,
    search_shapes,
)
from cdetr_jax.data.reader import ReadSettings
from cdetr_jax.data.sources import Source
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
            seed=seed,
            size=size,
            height=shapes.height,
            width=shapes.width,
            max_objects=shapes.max_objects,
            sides=shapes.sides,
            hue_by_class=shapes.hue_by_class,
        )
    if data.source == "folder":
        return read_split(data.folder, data[f"{split}_split"], data.split_seed, data.split_file)
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
    frozen = frozen_modules(model.backbone, model.frozen_stages)
    return StepFunctions(
        model=make_model(config, num_classes),
        optimizer=make_optimizer(
            lr=schedules.lr,
            backbone_lr=schedules.backbone_lr,
            weight_decay=config.optimizer.weight_decay,
            clip_norm=config.optimizer.clip_norm,
            frozen_modules=frozen,
        ),
        cost_settings=CostSettings(class_loss=model.class_loss, **config.matcher, **focal),
        loss_settings=LossSettings(class_loss=model.class_loss, **config.loss),
        ema_decay=config.optimizer.ema_decay,
        top_k=config.eval.top_k,
        frozen_modules=frozen,
    )


def _read_settings(config: ml_collections.ConfigDict) -> ReadSettings:
    data = config.data
    return ReadSettings(
        workers=data.workers,
        threads=data.threads,
        on_error=data.on_error,
        max_bad_fraction=data.max_bad_fraction,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def make_plan_settings(config: ml_collections.ConfigDict, source: Source) -> PlanSettings:
    """What the training epochs' plans depend on; the padded shapes are the config's, or chosen from the sizes.

    Logs how many pictures may be scaled down to fit them.
    Raises: ValueError, if no picture has an object, or an epoch would have no step.
    """
    data = config.data
    sizes, counts = sizes_hw(source), count_training_objects(source.records)
    if not counts.any():
        annotated = sum(len(record.boxes_xywh_px) for record in source.records)
        raise ValueError(
            f"none of the {len(source)} training pictures has an object to learn from: {annotated} boxes are annotated"
            + ", and all are crowds or have no area inside their picture" * bool(annotated)
            + f"; look at the annotations of {_origin(data, 'train')}"
        )
    augmentation = _augmentation(config)
    settings = PlanSettings(
        sizes_hw=sizes,
        object_counts=counts,
        augmentation=augmentation,
        shapes=data.train_shapes or search_shapes(sizes, augmentation, data.num_train_shapes),
        batch_size=config.train.batch_size,
        seed=config.seed,
        accumulation_steps=config.train.accumulation_steps,
        last_batch=data.last_batch,
        max_targets=data.max_targets,
    )
    _log_scaled_down(source, may_be_scaled_down(settings), "train_shapes")
    return settings


def make_train_batches(
    config: ml_collections.ConfigDict,
    source: Source,
    classes: ClassTable,
    plan_settings: PlanSettings,
    start: tuple[int, int] = (0, 0),
) -> Batches:
    """Augmented micro-batches from a position (epoch, micro-batch) on; a step takes accumulation_steps of them."""
    return train_batches(source, label_of(classes), plan_settings, _read_settings(config), start)


def make_eval_plan(config: ml_collections.ConfigDict, source: Source, device_count: int = 1) -> EpochPlan:
    """Every picture once, resized as published, in padded shapes as for training; the same for every evaluation.

    A batch is `config.eval.batch_size`, rounded up to a multiple of `device_count`, all processes' devices.
    """
    data = config.data
    sizes, sides = sizes_hw(source), (data.eval_short_side_px, data.long_side_max_px)
    if all(record.is_crowd.all() for record in source.records):
        logging.warning(
            "none of the %d pictures of %s has an object: their AP will be -1, which means that there is none",
            len(source), _origin(data, "eval"),
        )  # fmt: skip
    shapes = data.eval_shapes or search_eval_shapes(sizes, *sides, data.num_eval_shapes)
    batch_size = -(-config.eval.batch_size // device_count) * device_count
    _log_scaled_down(source, bucket_of(resized_hw(sizes, *sides), by_area(shapes)) < 0, "eval_shapes")
    return eval_plan(sizes, count_training_objects(source.records), *sides, shapes, batch_size)


def make_eval_batches(config: ml_collections.ConfigDict, source: Source, plan: EpochPlan) -> Batches:
    """The pictures of `make_eval_plan`; their labels are the categories' ranks."""
    labels = label_of(class_table(source.categories, "contiguous", 0))
    return eval_batches(source, labels, plan, _read_settings(config))


def _log_scaled_down(source: Source, is_scaled: np.ndarray, field: str) -> None:
    if is_scaled.any():
        first = source.records[int(is_scaled.argmax())]
        logging.info(
            "%d of %d pictures are scaled down where config.data.%s cannot hold them, such as %s, %d x %d pixels",
            is_scaled.sum(), len(source), field, first.file_name, first.width, first.height,
        )  # fmt: skip


def _origin(data: ml_collections.ConfigDict, split: str) -> str:
    """Where a split's annotations come from."""
    if data.source == "folder":
        return f"config.data.folder, {data.folder}"
    if "coco_folder" in data.source and data[f"{split}_annotations"]:
        return f"config.data.{split}_annotations, {data[f'{split}_annotations']}"
    return f"config.data.tfds_name and {split}_split, {data.tfds_name} {data[f'{split}_split']}"


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
