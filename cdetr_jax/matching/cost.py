"""The cost of matching a query with a target, for all decoder layers at once."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cdetr_jax import boxes
from cdetr_jax.structs import Predictions, Targets


def focal_class_cost(
    logits: Float[Array, "L B Q C"], labels: Int[Array, "B T"], alpha: float, gamma: float
) -> Float[Array, "L B Q T"]:
    """The focal loss of calling a query the target's class, minus that of not calling it so."""
    probs = jax.nn.sigmoid(_at_labels(logits, labels))
    positive = alpha * (1 - probs) ** gamma * -jnp.log(probs + 1e-8)
    negative = (1 - alpha) * probs**gamma * -jnp.log(1 - probs + 1e-8)
    return positive - negative


def softmax_class_cost(logits: Float[Array, "L B Q C"], labels: Int[Array, "B T"]) -> Float[Array, "L B Q T"]:
    """DETR's: minus the probability of the target's class."""
    return -_at_labels(jax.nn.softmax(logits, axis=-1), labels)


def _at_labels(values: Float[Array, "L B Q C"], labels: Int[Array, "B T"]) -> Float[Array, "L B Q T"]:
    return jnp.take_along_axis(values, labels[None, :, None, :], axis=-1)


@dataclasses.dataclass(frozen=True)
class CostSettings:
    """What the matching cost weighs, and how.

    Attributes:
      class_loss: `focal` or `softmax`, the loss that the logits are trained with.
      class_cost, l1_cost, giou_cost: factors of the three terms.
      focal_alpha, focal_gamma: of the focal class cost.
    """

    class_loss: str
    class_cost: float
    l1_cost: float
    giou_cost: float
    focal_alpha: float
    focal_gamma: float


def matching_cost(
    predictions: Predictions,
    targets: Targets,
    settings: CostSettings,
) -> Float[Array, "L B Q T"]:
    """Cost of matching every query with every target, one to one.

    Source: arXiv:2005.12872, section 3.1, with the focal class cost of arXiv:2010.04159; reference models/matcher.py.
    Differs: targets are padded, and all decoder layers come at once.
    Args:
      predictions: of every layer.
      targets: padded; the columns of padded targets hold a finite cost that nobody reads.
    Returns: cost, in the dtype of the predictions.
    """
    if settings.class_loss == "focal":
        class_term = focal_class_cost(predictions.logits, targets.labels, settings.focal_alpha, settings.focal_gamma)
    else:
        class_term = softmax_class_cost(predictions.logits, targets.labels)
    predicted = predictions.boxes_cxcywh[:, :, :, None, :]
    wanted = targets.boxes_cxcywh[None, :, None, :, :].astype(predicted.dtype)
    l1 = jnp.abs(predicted - wanted).sum(-1)
    giou = boxes.giou(boxes.cxcywh_to_xyxy(predicted), boxes.cxcywh_to_xyxy(wanted))
    return settings.class_cost * class_term + settings.l1_cost * l1 - settings.giou_cost * giou
