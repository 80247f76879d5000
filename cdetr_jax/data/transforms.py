"""Executes one row of a plan on a picture and its boxes. Nothing is random here."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from cdetr_jax.data.buckets import Shapes, fit_to_shapes
from cdetr_jax.data.plan import resized_hw
from cdetr_jax.data.sources import clip_to_picture
from cdetr_jax.records import Record


def training_objects(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Returns what of a record can be a target: crowds left out, boxes clipped to the picture, empty ones dropped.

    Returns: boxes [n, 4] float64, left, top, right, bottom in pixels; category ids [n].
    """
    boxes, has_area = clip_to_picture(record.boxes_xywh_px, record.height, record.width)
    keep = has_area & ~record.is_crowd
    return boxes[keep], record.category_ids[keep]


def count_training_objects(records: Sequence[Record]) -> np.ndarray:
    """Returns [n] int, how many objects `training_objects` gives for each record, for all records at once."""
    owners = np.repeat(np.arange(len(records)), [len(record.boxes_xywh_px) for record in records])
    boxes = np.concatenate([record.boxes_xywh_px for record in records])
    sizes = np.array([(record.height, record.width) for record in records])[owners]
    has_area = clip_to_picture(boxes, sizes[:, 0], sizes[:, 1])[1]
    keep = has_area & ~np.concatenate([record.is_crowd for record in records])
    return np.bincount(owners[keep], minlength=len(records))


def transform_picture(picture: Image.Image, row: np.ndarray) -> Image.Image:
    """Flips, then perhaps resizes and crops, then resizes a picture, as a plan's ROW says.

    Source: facebookresearch/detr datasets/transforms.py; the random numbers were drawn in the plan.
    """
    if row["flip"]:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if row["crop"]:
        picture = _resize(picture, row["first_hw"])
        top, left, height, width = row["window"].tolist()
        picture = picture.crop((left, top, left + width, top + height))
    return _resize(picture, row["size_hw"])


def transform_boxes(record: Record, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flips, crops and scales a picture's boxes, as `transform_picture` does the pixels.

    Returns: boxes, float32 [n, 4] cxcywh, fractions of the resulting picture; category ids, [n].
    """
    boxes, category_ids = training_objects(record)
    size_xy = np.array([record.width, record.height])
    if row["flip"]:
        boxes = boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [record.width, 0, record.width, 0]
    if row["crop"]:
        boxes = boxes * np.tile(row["first_hw"][::-1] / size_xy, 2)
        top, left, height, width = row["window"].tolist()
        boxes = (boxes - [left, top, left, top]).clip(0, [width, height, width, height])
        keep = (boxes[:, 2:] > boxes[:, :2]).all(-1)
        boxes, category_ids = boxes[keep], category_ids[keep]
        size_xy = np.array([width, height])
    final_xy = row["size_hw"][::-1]
    boxes = boxes * np.tile(final_xy / size_xy, 2)
    corners = boxes / np.tile(final_xy, 2)
    low, high = corners[:, :2], corners[:, 2:]
    return np.concatenate([(low + high) / 2, high - low], axis=-1).astype(np.float32), category_ids


def resize_for_evaluation(image: np.ndarray, short_side_px: int, long_side_max_px: int, shapes: Shapes) -> np.ndarray:
    """Resizes uint8 [H, W, 3] as the evaluation plan does, for a picture that is in no plan; uint8 [h, w, 3].

    Args:
      shapes: padded heights and widths; a picture that none of them would hold is scaled down to fit.
    """
    resized = resized_hw(np.array([image.shape[:2]]), short_side_px, long_side_max_px)
    height, width = fit_to_shapes(resized, shapes)[0].tolist()
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _resize(picture: Image.Image, size_hw: np.ndarray) -> Image.Image:
    height, width = size_hw.tolist()
    return picture.resize((width, height), Image.Resampling.BILINEAR)
