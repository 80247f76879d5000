"""Box formats, areas and overlaps against hand-computed boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cdetr_jax import boxes

# One rounding per operation in float32.
EXACT = 1e-6


def test_corners_of_hand_computed_boxes():
    cxcywh = jnp.array([[5.0, 7.0, 4.0, 6.0], [0.5, 0.25, 1.0, 0.5], [2.0, 3.0, 0.0, 0.0]])
    xyxy = [[3.0, 4.0, 7.0, 10.0], [0.0, 0.0, 1.0, 0.5], [2.0, 3.0, 2.0, 3.0]]
    np.testing.assert_array_equal(boxes.cxcywh_to_xyxy(cxcywh), xyxy)


def test_corners_keep_centre_and_size_on_any_batch():
    random = np.random.default_rng(0).uniform(size=(2, 3, 5, 4)).astype(np.float32)
    low, high = np.split(np.asarray(boxes.cxcywh_to_xyxy(jnp.asarray(random))), 2, axis=-1)
    np.testing.assert_allclose(np.concatenate([(low + high) / 2, high - low], -1), random, atol=EXACT)


def test_area():
    xyxy = jnp.array([[1.0, 2.0, 4.0, 7.0], [1.0, 2.0, 1.0, 7.0], [4.0, 2.0, 1.0, 7.0]])
    np.testing.assert_array_equal(boxes.area(xyxy), [15.0, 0.0, -15.0])


# a, b, IoU, union, GIoU; boxes xyxy.
PAIRS = {
    "equal": ([0, 0, 2, 3], [0, 0, 2, 3], 1, 6, 1),
    # intersection 1x1, union 4 + 4 - 1, hull 3x3
    "overlapping": ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7, 7, 1 / 7 - 2 / 9),
    # hull 3x2: nothing of it is uncovered
    "sharing an edge": ([0, 0, 2, 2], [2, 0, 3, 2], 0, 6, 0),
    # hull 2x2, half of it covered
    "sharing a corner": ([0, 0, 1, 1], [1, 1, 2, 2], 0, 2, -1 / 2),
    # hull 5x7
    "disjoint": ([0, 0, 1, 1], [3, 5, 5, 7], 0, 5, -30 / 35),
    "nested": ([0, 0, 5, 4], [1, 1, 3, 2], 2 / 20, 20, 2 / 20),
    # the hull is a's box
    "a point inside": ([0, 0, 2, 2], [1, 1, 1, 1], 0, 4, 0),
    # hull 4x3, of which 4 are covered
    "a point outside": ([0, 0, 2, 2], [4, 3, 4, 3], 0, 4, -8 / 12),
    "the same point twice": ([1, 1, 1, 1], [1, 1, 1, 1], 0, 0, 0),
    # hull 1x2 without any box in it
    "two points": ([0, 0, 0, 0], [1, 2, 1, 2], 0, 0, -1),
    "two points on a line": ([0, 0, 0, 0], [0, 2, 0, 2], 0, 0, 0),
}


@pytest.mark.parametrize("name", PAIRS)
def test_overlaps_of_hand_computed_pairs(name):
    a, b, iou, union, giou = PAIRS[name]
    a, b = jnp.array(a, jnp.float32), jnp.array(b, jnp.float32)
    for first, second in ((a, b), (b, a)):
        np.testing.assert_allclose(boxes.iou_and_union(first, second), (iou, union), rtol=EXACT)
        np.testing.assert_allclose(boxes.giou(first, second), giou, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_finite(name):
    a, b = (jnp.array(box, jnp.float32) for box in PAIRS[name][:2])
    centre_and_size = jnp.concatenate([(a[:2] + a[2:]) / 2, a[2:] - a[:2]])
    for gradient in jax.grad(boxes.giou, argnums=(0, 1))(a, b):
        assert np.isfinite(gradient).all()
    through_format = jax.grad(lambda x: boxes.giou(boxes.cxcywh_to_xyxy(x), b))(centre_and_size)
    assert np.isfinite(through_format).all()


def test_giou_gradient_is_that_of_finite_differences():
    a, b = np.array([0.0, 0.0, 2.0, 2.0]), np.array([1.0, 0.5, 3.0, 4.0])

    def literal(a):
        intersection = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
        hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
        return intersection / union - (hull - union) / hull

    step = 1e-5 * np.eye(4)
    expected = [(literal(a + d) - literal(a - d)) / 2e-5 for d in step]
    actual = jax.grad(boxes.giou)(jnp.array(a, jnp.float32), jnp.array(b, jnp.float32))
    # float64 central differences are right to 1e-9; the other side is float32.
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_all_pairs_broadcast():
    rng = np.random.default_rng(1)
    centres = rng.uniform(0.2, 0.8, (2, 5, 2)), rng.uniform(0.2, 0.8, (2, 3, 2))
    a, b = (np.concatenate([c, rng.uniform(0.1, 0.4, c.shape)], axis=-1).astype(np.float32) for c in centres)
    a, b = (boxes.cxcywh_to_xyxy(jnp.asarray(x)) for x in (a, b))
    pairs = boxes.giou(a[:, :, None], b[:, None])
    assert pairs.shape == (2, 5, 3)
    for i, q, t in np.ndindex(2, 5, 3):
        np.testing.assert_allclose(pairs[i, q, t], boxes.giou(a[i, q], b[i, t]), rtol=EXACT, atol=EXACT)
    assert (np.asarray(pairs) >= -1).all()
    assert (np.asarray(pairs) <= 1).all()
