"""COCO average precision of a whole data set, on the host; faster-coco-eval decides every number."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import faster_coco_eval
import numpy as np

from cdetr_jax.structs import Category, Record

# COCO's 12 numbers in COCO's order, under the names that papers print.
SUMMARY = {
    "AP": "average precision, mean over IoU 0.50 to 0.95",
    "AP50": "average precision at IoU 0.50",
    "AP75": "average precision at IoU 0.75",
    "APS": "AP of small objects, area below 32 x 32 pixels",
    "APM": "AP of medium objects, up to 96 x 96 pixels",
    "APL": "AP of large objects",
    "AR1": "average recall with 1 detection a picture and class",
    "AR10": "average recall with 10 detections a picture and class",
    "AR100": "average recall with 100 detections a picture and class",
    "ARS": "AR100 of small objects",
    "ARM": "AR100 of medium objects",
    "ARL": "AR100 of large objects",
}


Results = list[dict[str, Any]]  # in COCO's format


@dataclasses.dataclass(frozen=True)
class CocoMetrics:
    """What COCO evaluation says of one set of detections. All values are in [0, 1].

    -1, COCO's own sign, stands wherever there is no object to find.

    Attributes:
      summary: the 12 numbers under the names of `SUMMARY`.
      per_class: AP (IoU 0.50 to 0.95, all areas) under the category's name, in the order of the categories. A name
        that several categories share is followed by their ids: "cat (17)".
      boxes_per_class: number of annotated boxes that count, crowds left out, under the same keys.
      category_ids: the data set's own, under the same keys.
      precision: [10, 101, 4] each, under the same keys: at the IoU thresholds 0.50, 0.55, ..., the recalls 0.00, 0.01,
        ..., and of objects of all sizes, small, medium and large ones.
    """

    summary: dict[str, float]
    per_class: dict[str, float]
    boxes_per_class: dict[str, int]
    category_ids: dict[str, int]
    precision: dict[str, np.ndarray]

    def class_summary(self, key: str) -> dict[str, float]:
        """The first six of the 12 numbers, AP to APL, of one class."""
        precision = self.precision[key]
        of = [precision[..., 0], precision[0, :, 0], precision[5, :, 0], *(precision[..., area] for area in (1, 2, 3))]
        return {name: float(values.mean()) for name, values in zip(SUMMARY, of, strict=False)}

    def format_table(self) -> str:
        """The 12 numbers with their meaning, then id, AP and number of boxes of each class, as aligned lines."""
        lines = [f"{name:<5}  {format_number(value)}  {SUMMARY[name]}" for name, value in self.summary.items()]
        width = max(map(len, ("class", *self.per_class)))
        lines += ["", f"{'class':<{width}}    id     AP   boxes"]
        lines += [
            f"{name:<{width}}  {self.category_ids[name]:>4}  {format_number(value)}  {self.boxes_per_class[name]:>6}"
            for name, value in self.per_class.items()
        ]
        return "\n".join(lines)


def coco_average_precision(records: Sequence[Record], categories: Sequence[Category], results: Results) -> CocoMetrics:
    """Compares detections with annotations as COCO does: at most 100 detections a picture and class, crowds ignored.

    Args:
      records: every picture that was evaluated, those without detections or annotations too.
      categories: the classes that count; annotations and detections of other classes are ignored.
      results: COCO's results format, one {"image_id", "category_id", "bbox": [left, top, width, height] in pixels of
        the original picture, "score"} per detection, in any order.

    Returns: the 12 numbers and AP per class.
    Raises: ValueError, if two records or two categories share an id, or a result names a picture without a record.
    """
    image_ids = _distinct([record.image_id for record in records], "image_id")
    category_ids = _distinct([category.id for category in categories], "category id")
    unknown = {result["image_id"] for result in results} - image_ids
    if unknown:
        raise ValueError(
            f"{len(unknown)} image ids of the results have no record, the smallest is {min(unknown)}; "
            "evaluate against the annotations of the pictures that were predicted"
        )
    annotations = _annotations(records)
    counts = Counter(a["category_id"] for a in annotations if not a["iscrowd"])
    keys = _unique_keys(categories)

    truth = faster_coco_eval.COCO(
        {
            "images": [{"id": int(r.image_id), "height": int(r.height), "width": int(r.width)} for r in records],
            "categories": [{"id": int(c.id), "name": c.name} for c in categories],
            "annotations": annotations,
        },
        print_function=_silent,
    )
    detections = truth.loadRes([_plain(result) for result in results])
    evaluator = faster_coco_eval.COCOeval_faster(truth, detections, iouType="bbox", print_function=_silent)
    evaluator.run()

    # [IoU thresholds, recall points, classes by id, areas (0 = all), detection limits (-1 = 100)]
    precision = np.asarray(evaluator.eval["precision"])[..., -1]
    of_id = {category_id: precision[:, :, k] for k, category_id in enumerate(sorted(category_ids))}
    return CocoMetrics(
        summary={name: float(value) for name, value in zip(SUMMARY, evaluator.stats, strict=True)},
        per_class={
            key: float(of_id[category.id][..., 0].mean()) for key, category in zip(keys, categories, strict=True)
        },
        boxes_per_class={key: counts[category.id] for key, category in zip(keys, categories, strict=True)},
        category_ids={key: category.id for key, category in zip(keys, categories, strict=True)},
        precision={key: of_id[category.id] for key, category in zip(keys, categories, strict=True)},
    )


def _annotations(records: Sequence[Record]) -> list[dict]:
    """All boxes in COCO's layout; ids start at 1, because 0 means "not matched" inside the evaluation."""
    annotations = []
    for record in records:
        for box, category_id, is_crowd, area in zip(
            record.boxes_xywh_px.tolist(),
            record.category_ids.tolist(),
            record.is_crowd.tolist(),
            record.areas.tolist(),
            strict=True,
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": int(record.image_id),
                    "category_id": category_id,
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(is_crowd),
                }
            )
    return annotations


def _plain(result: dict) -> dict:
    """A copy in Python's own types: the library writes into what it is given, and wants no NumPy scalars."""
    return {
        "image_id": int(result["image_id"]),
        "category_id": int(result["category_id"]),
        "bbox": [float(value) for value in result["bbox"]],
        "score": float(result["score"]),
    }


def _unique_keys(categories: Sequence[Category]) -> list[str]:
    """One key per category: its name, followed by the id where several categories share the name."""
    uses = Counter(category.name for category in categories)
    return [c.name if uses[c.name] == 1 else f"{c.name} ({c.id})" for c in categories]


def _distinct(ids: list[int], what: str) -> set[int]:
    """The ids as a set; twice the same one would silently merge two pictures or classes."""
    id_, count = max(Counter(ids).items(), key=lambda item: item[1], default=(0, 0))
    if count > 1:
        raise ValueError(f"{what} {id_} occurs {count} times; every {what} must occur once")
    return set(ids)


def format_number(value: float) -> str:
    """Three decimals, or a dash where COCO says -1."""
    return f"{value:5.3f}" if value >= 0 else "    -"


def _silent(*_: object) -> None:
    """Takes the place of the library's printing."""
