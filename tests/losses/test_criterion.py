"""The loss terms against literal NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cdetr_jax.losses import box, focal
from cdetr_jax.losses.criterion import LossSettings, criterion
from cdetr_jax.structs import Counts, Match, Predictions, Targets

L, B, Q, T, C = 2, 3, 5, 4, 7
SETTINGS = {
    "class_weight": 2.0,
    "l1_weight": 5.0,
    "giou_weight": 3.0,
    "focal_alpha": 0.25,
    "focal_gamma": 2.0,
    "no_object_weight": 0.1,
}
# float32 against float64: sums of some hundred terms.
FLOAT32 = 1e-5
COUNTS = [3, 0, 2]  # real targets of each picture
MATCH = np.array(
    [[[4, 0, 2, -1], [-1, -1, -1, -1], [1, 3, -1, -1]], [[1, 2, 3, -1], [-1, -1, -1, -1], [0, 4, -1, -1]]], np.int32
)


def problem(seed=0):
    rng = np.random.default_rng(seed)
    valid = np.arange(T)[None, :] < np.array(COUNTS)[:, None]
    predictions = Predictions(
        logits=jnp.array(rng.normal(scale=2.0, size=(L, B, Q, C)), jnp.float32),
        boxes_cxcywh=jnp.array(rng.uniform(0.1, 0.9, (L, B, Q, 4)), jnp.float32),
    )
    targets = Targets(
        # The last class is left out: with the softmax loss it means "no object".
        labels=jnp.array(np.where(valid, rng.integers(0, C - 1, (B, T)), 0), jnp.int32),
        boxes_cxcywh=jnp.array(np.where(valid[..., None], rng.uniform(0.1, 0.9, (B, T, 4)), 0), jnp.float32),
        valid=jnp.array(valid),
    )
    return predictions, targets


def counts(targets, matched=None, queries=B * Q):
    matched = targets if matched is None else matched
    return Counts(*(jnp.array(float(x)) for x in (targets, matched, queries)))


def run(class_loss, predictions, targets, match, counts, **changes):
    settings = LossSettings(class_loss=class_loss, **SETTINGS | changes)
    return criterion(predictions, targets, Match(jnp.array(match)), counts, settings)


def literal_giou(a, b):
    a, b = ([c[0] - c[2] / 2, c[1] - c[3] / 2, c[0] + c[2] / 2, c[1] + c[3] / 2] for c in (a, b))
    intersection = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return intersection / union - (hull - union) / hull


def literal_terms(predictions, targets, match, class_loss, divisor):
    """Class, L1 and GIoU terms per layer, by loops; `divisor` is the number of targets."""
    logits, predicted = (np.asarray(x, np.float64) for x in (predictions.logits, predictions.boxes_cxcywh))
    wanted, labels = np.asarray(targets.boxes_cxcywh, np.float64), np.asarray(targets.labels)
    class_terms, l1_terms, giou_terms = [], [], []
    for layer in range(L):
        class_term = weight_sum = l1 = giou = 0.0
        for b in range(B):
            label_of = {match[layer, b, t]: labels[b, t] for t in range(T) if match[layer, b, t] >= 0}
            for q in range(Q):
                z = logits[layer, b, q]
                if class_loss == "softmax":
                    label, weight = (label_of[q], 1.0) if q in label_of else (C - 1, 0.1)
                    class_term += weight * (np.log(np.exp(z).sum()) - z[label])
                    weight_sum += weight
                    continue
                for c in range(C):
                    p = 1 / (1 + np.exp(-z[c]))
                    if label_of.get(q) == c:
                        class_term += 0.25 * (1 - p) ** 2 * -np.log(p)
                    else:
                        class_term += 0.75 * p**2 * -np.log(1 - p)
            for t in range(T):
                q = match[layer, b, t]
                if q >= 0:
                    l1 += np.abs(predicted[layer, b, q] - wanted[b, t]).sum()
                    giou += 1 - literal_giou(predicted[layer, b, q], wanted[b, t])
        class_terms.append(class_term / (weight_sum if class_loss == "softmax" else divisor))
        l1_terms.append(l1 / divisor)
        giou_terms.append(giou / divisor)
    return np.array(class_terms), np.array(l1_terms), np.array(giou_terms)


@pytest.mark.parametrize("class_loss", ["focal", "softmax"])
def test_terms_are_the_literal_loops(class_loss):
    predictions, targets = problem()
    losses = run(class_loss, predictions, targets, MATCH, counts(5))
    class_term, l1, giou = literal_terms(predictions, targets, MATCH, class_loss, 5.0)
    np.testing.assert_allclose(losses.class_loss, class_term, rtol=FLOAT32)
    np.testing.assert_allclose(losses.l1_loss, l1, rtol=FLOAT32)
    np.testing.assert_allclose(losses.giou_loss, giou, rtol=FLOAT32)
    np.testing.assert_allclose(losses.total, (2 * class_term + 5 * l1 + 3 * giou).sum(), rtol=FLOAT32)


def test_counts_normalise():
    predictions, targets = problem()
    five, ten = (run("focal", predictions, targets, MATCH, counts(n)) for n in (5, 10))
    for name in ("class_loss", "l1_loss", "giou_loss", "total"):
        np.testing.assert_allclose(getattr(five, name), 2 * getattr(ten, name), rtol=1e-6)
    # At least 1: fewer targets than devices give a mean below it.
    one, less = (run("focal", predictions, targets, MATCH, counts(n)) for n in (1, 0.25))
    np.testing.assert_array_equal(one.total, less.total)


def test_softmax_divides_by_the_weights_of_the_whole_step():
    """Twice as many pictures elsewhere in the step: twice the divisor."""
    predictions, targets = problem()
    alone = run("softmax", predictions, targets, MATCH, counts(5))
    shared = run("softmax", predictions, targets, MATCH, counts(10, queries=2 * B * Q))
    np.testing.assert_allclose(alone.class_loss, 2 * shared.class_loss, rtol=1e-6)
    fewer = run("softmax", predictions, targets, MATCH, counts(7, matched=5))
    np.testing.assert_array_equal(alone.class_loss, fewer.class_loss)
    np.testing.assert_allclose(alone.l1_loss * 5, fewer.l1_loss * 7, rtol=1e-6)


@pytest.mark.parametrize("class_loss", ["focal", "softmax"])
def test_unmatched_targets_contribute_to_nothing(class_loss):
    """Padding with other contents, and more of it, changes neither losses nor gradients."""
    predictions, targets = problem()
    unmatched = (MATCH < 0).all(0)
    rng = np.random.default_rng(1)
    other = Targets(
        labels=jnp.where(unmatched, 3, targets.labels),
        boxes_cxcywh=jnp.where(unmatched[..., None], jnp.array(rng.uniform(size=(B, T, 4))), targets.boxes_cxcywh),
        valid=targets.valid,
    )
    wider = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 3)) + ((0, 0),) * (x.ndim - 2)), targets)
    wider_match = np.pad(MATCH, ((0, 0), (0, 0), (0, 3)), constant_values=-1)

    def total_and_gradient(targets, match):
        def total(predictions):
            losses = run(class_loss, predictions, targets, match, counts(5))
            return losses.total, losses

        gradient, losses = jax.grad(total, has_aux=True)(predictions)
        return losses, gradient

    expected = total_and_gradient(targets, MATCH)
    for actual in (total_and_gradient(other, MATCH), total_and_gradient(wider, wider_match)):
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
    # Boxes of queries without a target have no gradient.
    has_gradient = np.abs(expected[1].boxes_cxcywh).max(-1) > 0
    for layer, b, q in np.ndindex(L, B, Q):
        assert has_gradient[layer, b, q] == (q in MATCH[layer, b])


def test_a_target_without_a_query_leaves_its_label_out():
    """More targets than queries: the last real target of picture 0 gets none."""
    predictions, targets = problem()
    match = MATCH.copy()
    match[:, 0, 2] = -1
    losses = run("focal", predictions, targets, match, counts(5, matched=4))
    class_term, l1, giou = literal_terms(predictions, targets, match, "focal", 5.0)
    np.testing.assert_allclose(losses.class_loss, class_term, rtol=FLOAT32)
    np.testing.assert_allclose(losses.l1_loss, l1, rtol=FLOAT32)
    np.testing.assert_allclose(losses.giou_loss, giou, rtol=FLOAT32)


@pytest.mark.parametrize("class_loss", ["focal", "softmax"])
@pytest.mark.parametrize("columns", [0, T])
def test_zero_targets(class_loss, columns):
    predictions, targets = problem()
    targets = jax.tree.map(lambda x: jnp.zeros_like(x[:, :columns]), targets)
    match = np.full((L, B, columns), -1, np.int32)

    def total(predictions):
        losses = run(class_loss, predictions, targets, match, counts(0))
        return losses.total, losses

    gradient, losses = jax.grad(total, has_aux=True)(predictions)
    class_term, _, _ = literal_terms(predictions, problem()[1], np.full_like(MATCH, -1), class_loss, 1.0)
    np.testing.assert_allclose(losses.class_loss, class_term, rtol=FLOAT32)
    np.testing.assert_array_equal(losses.l1_loss, np.zeros(L))
    np.testing.assert_array_equal(losses.giou_loss, np.zeros(L))
    assert losses.class_error == 0
    assert np.isfinite(gradient.logits).all()
    assert np.abs(gradient.logits).max() > 0
    np.testing.assert_array_equal(gradient.boxes_cxcywh, np.zeros((L, B, Q, 4)))


def test_class_and_cardinality_errors_by_hand():
    # 2 layers, 2 pictures, 3 queries, 4 classes; the best class of each query:
    best = np.array([[[3, 3, 3], [0, 1, 2]], [[0, 3, 1], [2, 3, 3]]])
    predictions = Predictions(
        logits=jnp.array(10.0 * np.eye(4)[best], jnp.float32), boxes_cxcywh=jnp.full((2, 2, 3, 4), 0.5)
    )
    targets = Targets(
        labels=jnp.array([[0, 2], [2, 0]]),
        boxes_cxcywh=jnp.full((2, 2, 4), 0.5),
        valid=jnp.array([[True, True], [True, False]]),
    )
    # Layer 1: query 0 says 0 for label 0 (right), query 2 says 1 for label 2 (wrong), query 0 says 2 for 2 (right).
    match = np.array([[[1, 2], [0, -1]], [[0, 2], [0, -1]]])
    losses = run("focal", predictions, targets, match, counts(3, queries=6))
    np.testing.assert_allclose(losses.class_error, 100 / 3, rtol=1e-6)
    # Queries whose best class is not the last one: (0, 3), then (2, 1); targets: (2, 1).
    np.testing.assert_allclose(losses.cardinality_error, [(2 + 2) / 2, 0])


def test_focal_loss_of_single_decisions():
    logits = jnp.array([np.log(0.9 / 0.1), np.log(0.9 / 0.1), 0.0, -100.0, 100.0, 100.0], jnp.float32)
    is_class = jnp.array([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    expected = [
        0.25 * 0.1**2 * -np.log(0.9),
        0.75 * 0.9**2 * -np.log(0.1),
        0.25 * 0.5**2 * np.log(2),
        0.25 * 100.0,
        0.0,
        0.75 * 100.0,
    ]
    actual = focal.sigmoid_focal_loss(logits, is_class, alpha=0.25, gamma=2.0)
    # 1 - p of a p near 1 loses digits in float32.
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-12)
    gradient = jax.grad(lambda x: focal.sigmoid_focal_loss(x, is_class, alpha=0.25, gamma=2.0).sum())(logits)
    assert np.isfinite(gradient).all()


def test_softmax_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]]))
    actual = focal.softmax_cross_entropy(logits, jnp.array([2, 1]))
    np.testing.assert_allclose(actual, -np.log([0.5, 0.2]), rtol=1e-6)


def test_box_losses_by_hand():
    a, b = jnp.array([0.5, 0.5, 0.2, 0.4]), jnp.array([0.6, 0.4, 0.2, 0.2])
    np.testing.assert_allclose(box.l1_loss(a, b), 0.1 + 0.1 + 0.2, rtol=1e-6)
    # a: x 0.4..0.6, y 0.3..0.7; b: x 0.5..0.7, y 0.3..0.5; intersection 0.02, union 0.1, hull 0.12.
    np.testing.assert_allclose(box.giou_loss(a, b), 1 - (0.2 - 0.02 / 0.12), rtol=1e-5)
    np.testing.assert_allclose(box.giou_loss(a, a), 0.0, atol=1e-6)
