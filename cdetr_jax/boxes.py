"""Box formats, areas and overlaps, on the last axis of any batch."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def cxcywh_to_xyxy(boxes_cxcywh: Float[Array, "... 4"]) -> Float[Array, "... 4"]:
    """Centre and size to corners, in the same unit."""
    centre, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return jnp.concatenate([centre - 0.5 * size, centre + 0.5 * size], axis=-1)


def area(boxes_xyxy: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Width times height; negative where exactly one side is turned around."""
    size = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    return size[..., 0] * size[..., 1]


def iou_and_union(
    a_xyxy: Float[Array, "... 4"], b_xyxy: Float[Array, "... 4"]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Intersection over union, and the union's area, of boxes that broadcast against each other.

    A union without area (two boxes of size zero) counts as an IoU of 0, where the published code divides 0 by 0.
    """
    size = jnp.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - jnp.maximum(a_xyxy[..., :2], b_xyxy[..., :2])
    size = jnp.maximum(size, 0.0)
    intersection = size[..., 0] * size[..., 1]
    union = area(a_xyxy) + area(b_xyxy) - intersection
    return intersection / jnp.where(union > 0, union, 1.0), union


def giou(a_xyxy: Float[Array, "... 4"], b_xyxy: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Generalised IoU, in [-1, 1], of boxes that broadcast against each other.

    Source: arXiv:1902.09630, algorithm 1. For all pairs of `[B, Q, 4]` and `[B, T, 4]`, insert axes:
    `giou(a[:, :, None], b[:, None])`. A hull without area counts as fully covered.
    """
    overlap, union = iou_and_union(a_xyxy, b_xyxy)
    size = jnp.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - jnp.minimum(a_xyxy[..., :2], b_xyxy[..., :2])
    hull = size[..., 0] * size[..., 1]
    return overlap - (hull - union) / jnp.where(hull > 0, hull, 1.0)
