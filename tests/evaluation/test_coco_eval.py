"""COCO AP: hand-computed cases, and pycocotools as the judge on made-up detections."""

import contextlib
import io
import logging

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cdetr_jax.evaluation.coco_eval import SUMMARY, coco_average_precision
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


def test_one_of_two_objects_found_exactly():
    records = [make_record(1, [[10, 10, 40, 40], [200, 200, 50, 40]], [7, 7])]
    metrics = coco_average_precision(records, CATEGORIES, [detection(1, 7, [10, 10, 40, 40], 0.9)])
    # Recall reaches 1/2: of COCO's 101 recall points, 0.00 to 0.50 have precision 1 and the rest 0.
    assert metrics.summary["AP"] == pytest.approx(51 / 101)
    assert metrics.summary["AR100"] == pytest.approx(0.5)
    assert metrics.summary["APM"] == pytest.approx(51 / 101)
    assert metrics.summary["APS"] == metrics.summary["APL"] == -1.0
    assert metrics.per_class == {"dog": pytest.approx(51 / 101), "cat": -1.0}
    assert list(metrics.per_class) == ["dog", "cat"]
    assert metrics.boxes_per_class == {"dog": 2, "cat": 0}


def test_overlap_decides_which_thresholds_count():
    # IoU = 80/100: found at the thresholds 0.50 to 0.80, 7 of 10; a wrong class never counts.
    records = [make_record(1, [[0, 0, 100, 100]], [2])]
    results = [detection(1, 2, [0, 0, 100, 80.5], 0.5), detection(1, 7, [0, 0, 100, 100], 0.9)]
    metrics = coco_average_precision(records, CATEGORIES, results)
    assert metrics.summary["AP"] == pytest.approx(0.7)
    assert (metrics.summary["AP50"], metrics.summary["AP75"]) == (pytest.approx(1), pytest.approx(1))
    assert metrics.per_class["cat"] == pytest.approx(0.7)


def test_false_alarm_before_the_hit_halves_precision():
    records = [make_record(1, [[0, 0, 100, 100]], [2])]
    hit, alarm = detection(1, 2, [0, 0, 100, 100], 0.5), detection(1, 2, [300, 300, 50, 50], 0.6)
    assert coco_average_precision(records, CATEGORIES, [hit, alarm]).summary["AP"] == pytest.approx(0.5)


def test_detections_inside_a_crowd_are_no_false_alarms():
    records = [make_record(1, [[0, 0, 100, 100], [200, 200, 200, 200]], [2, 2], is_crowd=[False, True])]
    results = [detection(1, 2, [210 + 30 * i, 210, 20, 20], 0.9) for i in range(3)]
    results.append(detection(1, 2, [0, 0, 100, 100], 0.1))
    metrics = coco_average_precision(records, CATEGORIES, results)
    assert metrics.summary["AP"] == pytest.approx(1.0)
    assert metrics.boxes_per_class["cat"] == 1


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


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_number_equals_pycocotools(seed):
    categories = [Category(90, "d"), Category(2, "a"), Category(7, "c"), Category(5, "b"), Category(6, "absent")]
    records, results = made_up_data(seed)
    metrics = coco_average_precision(records, categories, results)
    expected, expected_per_class = judge(records, categories, results)
    # Both average the same float64 values, in another order: the last bits may differ.
    np.testing.assert_allclose([metrics.summary[name] for name in SUMMARY], expected, rtol=0, atol=1e-9)
    for category in categories:
        assert metrics.per_class[category.name] == pytest.approx(expected_per_class[category.id], rel=0, abs=1e-9)
    assert 0.1 < metrics.summary["AP"] < 0.9  # the data is neither trivial nor hopeless
    assert metrics.per_class["b"] == 0.0
    assert metrics.per_class["absent"] == -1.0


def test_no_results_score_zero():
    metrics = coco_average_precision([make_record(1, [[0, 0, 50, 50]], [7])], CATEGORIES, [])
    assert metrics.summary["AP"] == metrics.summary["AR100"] == metrics.per_class["dog"] == 0.0
    assert metrics.per_class["cat"] == -1.0


@pytest.mark.parametrize("results", [[], [detection(1, 7, [0, 0, 9, 9], 0.5)]])
def test_no_annotations_give_minus_one(results):
    metrics = coco_average_precision([make_record(1)], CATEGORIES, results)
    assert list(metrics.summary.values()) == [-1.0] * 12
    assert metrics.per_class == {"dog": -1.0, "cat": -1.0}


def test_classes_that_are_not_listed_are_ignored():
    records = [make_record(1, [[0, 0, 50, 50], [90, 90, 50, 50]], [7, 12])]
    results = [detection(1, 7, [0, 0, 50, 50], 0.5), detection(1, 0, [0, 0, 50, 50], 0.9)]
    assert coco_average_precision(records, CATEGORIES, results).summary["AP"] == pytest.approx(1.0)


def test_classes_of_the_same_name_stay_apart():
    categories = [Category(1, "cat"), Category(2, "cat"), Category(3, "dog")]
    records = [make_record(1, [[0, 0, 50, 50], [90, 90, 50, 50]], [1, 2])]
    metrics = coco_average_precision(records, categories, [detection(1, 1, [0, 0, 50, 50], 0.5)])
    assert metrics.per_class == {"cat (1)": pytest.approx(1.0), "cat (2)": 0.0, "dog": -1.0}


def test_results_may_hold_numpy_numbers_and_are_left_as_they_were():
    result = detection(np.int64(1), np.int32(7), np.float32([0, 0, 50, 50]), np.float32(0.5))
    metrics = coco_average_precision([make_record(1, [[0, 0, 50, 50]], [7])], CATEGORIES, [result])
    assert metrics.summary["AP"] == pytest.approx(1.0)
    assert set(result) == {"image_id", "category_id", "bbox", "score"}


def test_nothing_is_printed(capfd, caplog):
    caplog.set_level(logging.DEBUG)
    coco_average_precision([make_record(1, [[0, 0, 50, 50]], [7])], CATEGORIES, [detection(1, 7, [0, 0, 9, 9], 0.5)])
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.levelno >= logging.INFO]


def test_table_is_aligned_and_shows_a_dash_where_nothing_is_to_find():
    records = [make_record(1, [[0, 0, 50, 50], [90, 90, 50, 50]], [7, 7])]
    table = coco_average_precision(records, CATEGORIES, [detection(1, 7, [0, 0, 50, 50], 0.5)]).format_table()
    lines = table.splitlines()
    assert lines[0].startswith("AP     0.505  average precision")
    assert lines[3].startswith("APS        -  ")
    assert lines[-3:] == ["class    id     AP   boxes", "dog       7  0.505       2", "cat       2      -       0"]


def test_a_result_without_record_is_refused():
    with pytest.raises(ValueError, match="1 image ids of the results have no record, the smallest is 4"):
        coco_average_precision([make_record(1)], CATEGORIES, [detection(4, 7, [0, 0, 9, 9], 0.5)])


def test_ids_that_occur_twice_are_refused():
    with pytest.raises(ValueError, match="image_id 1 occurs 2 times"):
        coco_average_precision([make_record(1), make_record(1)], CATEGORIES, [])
    with pytest.raises(ValueError, match="category id 7 occurs 2 times"):
        coco_average_precision([make_record(1)], [Category(7, "dog"), Category(7, "cat")], [])
