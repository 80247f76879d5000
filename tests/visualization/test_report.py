"""The report of an evaluation: matches against pycocotools, mistakes counted by hand, and what is written."""

import json

import numpy as np
import pytest
from coco_judge import CATEGORIES, detection, judge, made_up_data, make_record

from cdetr_jax.evaluation.coco_eval import coco_average_precision
from cdetr_jax.structs import Category
from cdetr_jax.visualization.report import confusion, match, thresholds, write_report

DOG, CAT = 7, 2


def test_precision_and_recall_are_those_of_coco():
    categories = [Category(90, "d"), Category(2, "a"), Category(7, "c")]
    records, results = made_up_data(0)
    best = np.random.default_rng(0).permutation(len(results)) / len(results)  # without ties, whose order COCO decides
    results = [result | {"score": score} for result, score in zip(results, best.tolist(), strict=True)]
    picture = records[1].image_id  # the one with more detections than COCO looks at
    records, results = records[2:], [result for result in results if result["image_id"] != picture]
    records += [make_record(3)]
    results = [result for result in results if result["image_id"] != 3]
    metrics = coco_average_precision(records, categories, results)
    matches = match(records, categories, results)
    for category in categories:
        curve = thresholds(matches, category.id)
        at = np.searchsorted(curve.recall, np.linspace(0, 1, 101))  # COCO: the best precision from a recall on
        from_here_on = np.append(np.maximum.accumulate(curve.precision[::-1])[::-1], 0)
        np.testing.assert_allclose(from_here_on[at], metrics.precision[category.name][0, :, 0], rtol=0, atol=1e-12)
    assert 0.1 < metrics.summary["AP50"] < 0.9


def mistakes():
    """A dog found, a cat taken for a dog, a dog missed, one alarm, one detection in a crowd, one of low score."""
    crowd = [False, False, False, True]
    boxes = [[0, 0, 50, 50], [100, 0, 50, 50], [200, 0, 50, 50], [0, 200, 300, 90]]
    record = make_record(1, boxes, [DOG, CAT, DOG, DOG], crowd)
    results = [
        detection(1, DOG, [0, 0, 50, 48], 0.9),
        detection(1, DOG, [102, 0, 50, 50], 0.8),
        detection(1, CAT, [400, 0, 50, 50], 0.7),
        detection(1, DOG, [10, 210, 30, 30], 0.6),
        detection(1, DOG, [200, 0, 50, 50], 0.1),
        detection(1, 12, [0, 0, 50, 50], 0.9),  # of a class that does not count
    ]
    return [record, make_record(2)], results


def test_every_mistake_is_counted_once():
    records, results = mistakes()
    matches = match(records, CATEGORIES, results)
    counts = confusion(matches, CATEGORIES, 0.5)  # dog, cat, nothing
    np.testing.assert_array_equal(counts, [[1, 0, 1], [1, 0, 0], [0, 1, 0]])
    counts = confusion(matches, CATEGORIES, 0.05)
    np.testing.assert_array_equal(counts, [[2, 0, 0], [1, 0, 0], [0, 1, 0]])


def test_the_best_threshold_keeps_the_best_f1():
    records, results = mistakes()
    curve = thresholds(match(records, CATEGORIES, results))
    np.testing.assert_allclose(curve.scores, [0.9, 0.8, 0.7, 0.1])
    np.testing.assert_allclose(curve.precision, [1, 1 / 2, 1 / 3, 2 / 4])
    np.testing.assert_allclose(curve.recall, [1 / 3, 1 / 3, 1 / 3, 2 / 3])
    np.testing.assert_allclose(curve.f1, [2 / 4, 2 / 5, 2 / 6, 4 / 7])
    assert curve.best == 0.1
    assert thresholds(match(records, CATEGORIES, results[:-2])).best == pytest.approx((0.9 + 0.8) / 2)
    assert thresholds(match(records, CATEGORIES, [])).best == 0.5


class Pictures:
    """A source of grey pictures."""

    categories = CATEGORIES

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def load_image(self, i):
        return np.full((self.records[i].height, self.records[i].width, 3), 128, np.uint8)


def test_the_report_says_what_the_metrics_say(tmp_path):
    records, results = mistakes()
    results[-2]["score"] = 0.85  # nothing is missed any more
    metrics = coco_average_precision(records, CATEGORIES, results)
    best = write_report(tmp_path / "new", Pictures(records), results, metrics, "a <title>", "cdetr evaluate")
    said = json.loads((tmp_path / "new" / "report.json").read_text())
    assert said["summary"] == metrics.summary
    assert said["threshold"] == best == pytest.approx((0.85 + 0.8) / 2)
    assert said["at_threshold"] == {
        "found": 2,
        "missed": 1,
        "false alarms": 0,
        "precision": 1,
        "recall": 2 / 3,
        "F1": 0.8,
    }
    dog, cat = said["classes"]
    stats, _ = judge(records, [Category(7, "dog")], [r for r in results if r["category_id"] == 7])
    assert [dog[name] for name in ("AP", "AP50", "AP75", "APS", "APM", "APL")] == pytest.approx(list(stats[:6]))
    assert (dog["found"], cat["missed"], cat["objects"], cat["precision"]) == (2, 1, 1, -1)
    assert said["confusion"]["counts"] == [[2, 0, 0], [0, 0, 1], [0, 0, 0]]
    page = (tmp_path / "new" / "report.html").read_text()
    assert f"{metrics.summary['AP']:.3f}" in page
    assert "1.jpg" in page
    assert "2.jpg" not in page, "nothing is wrong in it"
    names = {"report.html", "report.json", "classes.csv", "confusion.csv", "results.json"}
    pictures = {"precision_recall.png", "threshold.png", "confusion.png", "worst.png"}
    assert {file.name for file in (tmp_path / "new").iterdir()} == names | pictures
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == results
