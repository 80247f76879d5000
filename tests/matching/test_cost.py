"""The matching cost against a literal loop."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cdetr_jax.matching.cost import CostSettings, focal_class_cost, matching_cost
from cdetr_jax.structs import Predictions, Targets

L, B, Q, T, C = 2, 3, 5, 4, 7
SETTINGS = {"class_cost": 2.0, "l1_cost": 5.0, "giou_cost": 2.0, "focal_alpha": 0.25, "focal_gamma": 2.0}
# Against the loop in float64, on sums of terms of size 10. In the focal term a p of up to 0.9975 is taken from 1: in
# float32 its last bit is 2.4e-5 of what is left, and the logarithm of that counts 2 * 0.75 times.
TOLERANCES = {jnp.float32: 1e-4, jnp.float64: 1e-12}


def problem(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    predictions = Predictions(
        logits=jnp.array(rng.normal(scale=3.0, size=(L, B, Q, C)), dtype),
        boxes_cxcywh=jnp.array(rng.uniform(0.1, 0.9, (L, B, Q, 4)), dtype),
    )
    targets = Targets(
        labels=jnp.array(rng.integers(0, C, (B, T)), jnp.int32),
        boxes_cxcywh=jnp.array(rng.uniform(0.1, 0.9, (B, T, 4)), dtype),
        valid=jnp.ones((B, T), bool),
    )
    return predictions, targets


def literal_giou(a, b):
    a, b = ([c[0] - c[2] / 2, c[1] - c[3] / 2, c[0] + c[2] / 2, c[1] + c[3] / 2] for c in (a, b))
    intersection = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return intersection / union - (hull - union) / hull


def literal_class_cost(logits, label, class_loss):
    if class_loss == "softmax":
        return -math.exp(logits[label]) / sum(math.exp(x) for x in logits)
    p = 1 / (1 + math.exp(-logits[label]))
    return 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8) - 0.75 * p**2 * -math.log(1 - p + 1e-8)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("class_loss", ["focal", "softmax"])
def test_cost_is_the_literal_loop(class_loss, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        predictions, targets = problem(dtype=dtype)
        actual = matching_cost(predictions, targets, CostSettings(class_loss=class_loss, **SETTINGS))
    logits, predicted = (np.asarray(x, np.float64) for x in (predictions.logits, predictions.boxes_cxcywh))
    wanted, labels = np.asarray(targets.boxes_cxcywh, np.float64), np.asarray(targets.labels)
    expected = np.zeros((L, B, Q, T))
    for layer, b, q, t in np.ndindex(L, B, Q, T):
        cost = literal_class_cost(logits[layer, b, q], labels[b, t], class_loss)
        l1 = sum(abs(x - y) for x, y in zip(predicted[layer, b, q], wanted[b, t], strict=True))
        giou = literal_giou(predicted[layer, b, q], wanted[b, t])
        expected[layer, b, q, t] = 2 * cost + 5 * l1 - 2 * giou
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("term", ["class_cost", "l1_cost", "giou_cost"])
def test_each_factor_scales_its_own_term(term):
    predictions, targets = problem()
    none = dict(SETTINGS, class_cost=0.0, l1_cost=0.0, giou_cost=0.0)
    one = matching_cost(predictions, targets, CostSettings(class_loss="focal", **{**none, term: 1.0}))
    three = matching_cost(predictions, targets, CostSettings(class_loss="focal", **{**none, term: 3.0}))
    assert np.abs(one).min() > 0
    np.testing.assert_allclose(three, 3 * np.asarray(one), rtol=1e-6)


def test_padded_targets_get_a_finite_cost():
    predictions, targets = problem()
    targets = targets.replace(labels=jnp.zeros_like(targets.labels), boxes_cxcywh=jnp.zeros_like(targets.boxes_cxcywh))
    for class_loss in ("focal", "softmax"):
        assert np.isfinite(matching_cost(predictions, targets, CostSettings(class_loss=class_loss, **SETTINGS))).all()


def test_extreme_logits_get_a_finite_cost():
    logits = jnp.array([[[[-200.0, 200.0]]]])
    actual = focal_class_cost(logits, jnp.array([[0, 1]]), 0.25, 2.0)
    # p = 0 and p = 1: only the 1e-8 under the logarithm is left.
    np.testing.assert_allclose(np.asarray(actual).ravel(), [0.25 * -math.log(1e-8), -0.75 * -math.log(1e-8)], rtol=1e-5)


def test_a_better_query_is_cheaper():
    target = Targets(
        labels=jnp.array([[1]]), boxes_cxcywh=jnp.array([[[0.5, 0.5, 0.2, 0.4]]]), valid=jnp.ones((1, 1), bool)
    )
    predictions = Predictions(
        logits=jnp.array([[[[-3.0, 3.0], [3.0, -3.0], [-3.0, 3.0]]]]),
        boxes_cxcywh=jnp.array([[[[0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 0.2, 0.4], [0.2, 0.2, 0.2, 0.2]]]]),
    )
    for class_loss in ("focal", "softmax"):
        cost = np.asarray(matching_cost(predictions, target, CostSettings(class_loss=class_loss, **SETTINGS))).ravel()
        assert cost[0] < cost[1]
        assert cost[0] < cost[2]
