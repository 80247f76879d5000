"""The training loss of matched predictions, summed over the decoder layers."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from cdetr_jax.losses import box, focal
from cdetr_jax.structs import Counts, Losses, Match, Predictions, Targets


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """What the criterion weighs, and how.

    Attributes:
      class_loss: `focal` or `softmax`.
      class_weight, l1_weight, giou_weight: factors of the three terms.
      focal_alpha, focal_gamma: see `sigmoid_focal_loss`.
      no_object_weight: what a query without a target weighs in the softmax loss.
    """

    class_loss: str
    class_weight: float
    l1_weight: float
    giou_weight: float
    focal_alpha: float
    focal_gamma: float
    no_object_weight: float


def criterion(
    predictions: Predictions,
    targets: Targets,
    match: Match,
    counts: Counts,
    settings: LossSettings,
) -> Losses:
    """Weighs classification, L1 and GIoU losses and sums them over the decoder layers with equal weight.

    Source: arXiv:2005.12872, equation (2); reference `SetCriterion`. The box terms are divided by the number of
    targets, at least 1; so is the focal term, a sum over all queries and classes; the softmax term is divided by the
    sum of its class weights.
    Args:
      predictions, targets, match: of one micro-batch on one device.
      counts: the mean over devices of what the whole optimiser step sees.
    """
    logits = predictions.logits
    layers, batch, _, num_logits = logits.shape
    is_matched = match.queries >= 0  # L B T
    # An index outside of the queries: scatters drop it, gathers are masked below.
    queries = jnp.where(is_matched, match.queries, logits.shape[2])
    layer_axis, batch_axis = jnp.arange(layers)[:, None, None], jnp.arange(batch)[None, :, None]
    labels = jnp.broadcast_to(targets.labels, queries.shape)

    num_targets = jnp.maximum(counts.targets, 1.0)
    if settings.class_loss == "focal":
        is_class = jnp.zeros_like(logits).at[layer_axis, batch_axis, queries, labels].set(1.0, mode="drop")
        per_logit = focal.sigmoid_focal_loss(logits, is_class, alpha=settings.focal_alpha, gamma=settings.focal_gamma)
        class_term = per_logit.sum(axis=(1, 2, 3)) / num_targets
    else:
        no_object = num_logits - 1
        wanted = jnp.full(logits.shape[:3], no_object).at[layer_axis, batch_axis, queries].set(labels, mode="drop")
        weights = jnp.where(wanted == no_object, settings.no_object_weight, 1.0)
        per_query = weights * focal.softmax_cross_entropy(logits, wanted)
        class_term = per_query.sum(axis=(1, 2)) / (
            counts.matched + settings.no_object_weight * (counts.queries - counts.matched)
        )

    matched_boxes = _at_queries(predictions.boxes_cxcywh, match.queries)
    wanted_boxes = jnp.broadcast_to(targets.boxes_cxcywh, matched_boxes.shape).astype(matched_boxes.dtype)
    l1 = jnp.where(is_matched, box.l1_loss(matched_boxes, wanted_boxes), 0.0)
    giou = jnp.where(is_matched, box.giou_loss(matched_boxes, wanted_boxes), 0.0)
    l1_term, giou_term = (term.sum(axis=(1, 2)) / num_targets for term in (l1, giou))

    total = settings.class_weight * class_term + settings.l1_weight * l1_term + settings.giou_weight * giou_term
    best = logits.argmax(-1)
    is_wrong = _at_queries(best[-1:, ..., None], match.queries[-1:])[..., 0] != targets.labels[None]
    is_wrong = jnp.where(is_matched[-1:], is_wrong, False)
    num_predicted = (best != num_logits - 1).sum(-1)
    return Losses(
        total=total.sum(),
        class_loss=class_term,
        l1_loss=l1_term,
        giou_loss=giou_term,
        class_error=100.0 * is_wrong.sum() / jnp.maximum(is_matched[-1:].sum(), 1) / counts.micro_batches,
        cardinality_error=jnp.abs(num_predicted - targets.valid.sum(-1)[None]).mean(-1) / counts.micro_batches,
    )


def _at_queries(values: Shaped[Array, "l B Q X"], queries: Int[Array, "l B T"]) -> Shaped[Array, "l B T X"]:
    """The values of the matched queries; those of query 0 where there is none (-1)."""
    return jnp.take_along_axis(values, jnp.maximum(queries, 0)[..., None], axis=2)
