"""Box losses of aligned pairs, element-wise and unreduced."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from cdetr_jax import boxes


def l1_loss(predicted: Float[Array, "... 4"], wanted: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Sum of the four absolute differences."""
    return jnp.abs(predicted - wanted).sum(-1)


def giou_loss(predicted_cxcywh: Float[Array, "... 4"], wanted_cxcywh: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """1 - GIoU, arXiv:1902.09630."""
    return 1.0 - boxes.giou(boxes.cxcywh_to_xyxy(predicted_cxcywh), boxes.cxcywh_to_xyxy(wanted_cxcywh))
