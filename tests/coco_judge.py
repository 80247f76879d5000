"""Made-up pictures and detections, and pycocotools as the judge of them."""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cdetr_jax.structs import Category, Record

CATEGORIES = [Category(7, "dog"), Category(2, "cat")]  # not in the order of their ids


def make_record(image_id, boxes=(), category_ids=(), is_crowd=None):
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    return Record(
        image_id=image_id,
        file_name=f"{image_id}.jpg",
        height=480,
        width=640,
        boxes_xywh_px=boxes,
        category_ids=np.asarray(category_ids, np.int64),
        is_crowd=np.zeros(len(boxes), bool) if is_crowd is None else np.asarray(is_crowd, bool),
        areas=boxes[:, 2] * boxes[:, 3],
    )


def detection(image_id, category_id, box, score):
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def made_up_data(seed):
    rng = np.random.default_rng(seed)
    records, results = [], []
    for image_id in (3, 11, 2**40, 2**53 + 1, *range(100, 123)):
        n = rng.integers(0, 13)
        sizes = rng.choice([20, 60, 150], (n, 1)) * rng.uniform(0.5, 1.5, (n, 2))
        boxes = np.concatenate([rng.uniform(0, 300, (n, 2)), sizes], axis=1)
        category_ids = rng.choice([2, 5, 7, 90], n)  # 5 has objects and no detections
        records.append(make_record(image_id, boxes, category_ids, rng.random(n) < 0.15))
        for box, category_id in zip(boxes, category_ids, strict=True):
            for _ in range(rng.integers(0, 4) if category_id != 5 else 0):
                # Rounded scores give ties, whose order is part of the numbers.
                noisy = box + rng.normal(0, 0.06, 4) * np.tile(box[2:], 2)
                results.append(detection(image_id, int(category_id), noisy.tolist(), round(rng.random(), 2)))
        results += [
            detection(image_id, 2, rng.uniform(5, 200, 4).tolist(), round(rng.random(), 2))
            for _ in range(130 if image_id == 11 else 5)  # 130 exceeds the limit of 100
        ]
    order = rng.permutation(len(results))
    return records, [results[i] for i in order]


def judge(records, categories, results):
    """The 12 numbers, and AP by category id, from pycocotools."""
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": record.image_id} for record in records],
        "categories": [{"id": category.id, "name": category.name} for category in categories],
        "annotations": [
            {"image_id": r.image_id, "category_id": int(c), "bbox": b.tolist(), "area": float(a), "iscrowd": int(w)}
            for r in records
            for b, c, w, a in zip(r.boxes_xywh_px, r.category_ids, r.is_crowd, r.areas, strict=True)
        ],
    }
    for i, annotation in enumerate(truth.dataset["annotations"]):
        annotation["id"] = i + 1
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes([dict(result) for result in results]), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    per_class = {id_: precision[:, :, k].mean() for k, id_ in enumerate(evaluator.params.catIds)}
    return evaluator.stats, per_class
