"""Post-processing of literal small examples."""

import jax.numpy as jnp
import numpy as np
import pytest

from cdetr_jax.evaluation.postprocess import postprocess
from cdetr_jax.structs import Predictions

# float32 sigmoid, exp and products against float64.
FLOAT32 = 1e-6


def logit(p):
    p = np.array(p)
    return np.log(p / (1 - p))


def two_layers(logits, boxes):
    """The first layer holds numbers that must not be used."""
    logits, boxes = np.array(logits, np.float32), np.array(boxes, np.float32)
    return Predictions(
        logits=jnp.array(np.stack([-logits + 50, logits])), boxes_cxcywh=jnp.array(np.stack([boxes + 9, boxes]))
    )


BOXES = [
    [[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 0.5], [0.1, 0.2, 0.2, 0.1]],
    [[0.5, 0.5, 1.0, 1.0], [0.3, 0.4, 0.2, 0.2], [0.9, 0.9, 0.4, 0.2]],
]
# 2 pictures, 3 queries, 2 classes
PROBS = [[[0.1, 0.8], [0.7, 0.2], [0.3, 0.05]], [[0.01, 0.02], [0.04, 0.9], [0.06, 0.95]]]
SIZES = np.array([[100, 200], [31, 17]])


def test_focal_keeps_the_best_pairs():
    found = postprocess(two_layers(logit(PROBS), BOXES), jnp.array(SIZES), class_loss="focal", top_k=3)
    np.testing.assert_allclose(found.scores, [[0.8, 0.7, 0.3], [0.95, 0.9, 0.06]], rtol=FLOAT32)
    np.testing.assert_array_equal(found.queries, [[0, 1, 2], [2, 1, 2]])  # query 2 answers twice
    np.testing.assert_array_equal(found.labels, [[1, 0, 0], [1, 1, 0]])


def test_boxes_are_scaled_to_the_original_picture():
    found = postprocess(two_layers(logit(PROBS), BOXES), jnp.array(SIZES), class_loss="focal", top_k=3)
    expected = [
        # height 100, width 200
        [[80, 30, 120, 70], [0, 25, 100, 75], [0, 15, 40, 25]],
        # height 31, width 17; boxes are not clipped
        [
            [0.7 * 17, 0.8 * 31, 1.1 * 17, 31],
            [0.2 * 17, 0.3 * 31, 0.4 * 17, 0.5 * 31],
            [0.7 * 17, 0.8 * 31, 1.1 * 17, 31],
        ],
    ]
    # Corners are differences of float32 fractions, times up to 200 pixels.
    np.testing.assert_allclose(found.boxes_xyxy_px, expected, rtol=FLOAT32, atol=3e-5)


def test_softmax_keeps_each_query_once_and_never_no_object():
    # The last class is "no object"; probabilities sum to one.
    probs = [[[0.2, 0.5, 0.3], [0.06, 0.04, 0.9], [0.7, 0.1, 0.2]]]
    found = postprocess(two_layers(np.log(probs), BOXES[:1]), jnp.array(SIZES[:1]), class_loss="softmax", top_k=2)
    np.testing.assert_allclose(found.scores, [[0.7, 0.5]], rtol=FLOAT32)
    np.testing.assert_array_equal(found.queries, [[2, 0]])
    np.testing.assert_array_equal(found.labels, [[0, 1]])
    np.testing.assert_allclose(found.boxes_xyxy_px, [[[0, 15, 40, 25], [80, 30, 120, 70]]], rtol=FLOAT32, atol=3e-5)


@pytest.mark.parametrize(("class_loss", "candidates"), [("focal", 6), ("softmax", 3)])
def test_top_k_larger_than_the_candidates_keeps_them_all(class_loss, candidates):
    found = postprocess(two_layers(logit(PROBS), BOXES), jnp.array(SIZES), class_loss=class_loss, top_k=100)
    assert found.scores.shape == (2, candidates)
    assert found.boxes_xyxy_px.shape == (2, candidates, 4)
    assert (np.diff(found.scores) <= 0).all()
    if class_loss == "focal":
        np.testing.assert_allclose(found.scores[0], [0.8, 0.7, 0.3, 0.2, 0.1, 0.05], rtol=FLOAT32)
        pairs = set(zip(np.asarray(found.queries[0]).tolist(), np.asarray(found.labels[0]).tolist(), strict=True))
        assert len(pairs) == candidates
    else:
        assert sorted(np.asarray(found.queries[0]).tolist()) == [0, 1, 2]
        assert (np.asarray(found.labels) == 0).all()  # one class beside "no object"
