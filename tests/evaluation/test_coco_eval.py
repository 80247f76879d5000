"""COCO AP: hand-computed cases, and pycocotools as the judge on made-up detections."""

import logging

import numpy as np
import pytest
from coco_judge import CATEGORIES, detection, judge, made_up_data, make_record

from cdetr_jax.evaluation.coco_eval import SUMMARY, coco_average_precision
from cdetr_jax.structs import Category


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
