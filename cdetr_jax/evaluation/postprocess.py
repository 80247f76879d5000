"""From pictures, or the last layer's predictions, to the best detections in pixels of the original picture."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from cdetr_jax import boxes
from cdetr_jax.structs import Detections, Predictions


def class_probs(logits: Float[Array, "... C"], class_loss: str) -> Float[Array, "... K"]:
    """Scores in [0, 1] of the classes, without "no object"."""
    return jax.nn.sigmoid(logits) if class_loss == "focal" else jax.nn.softmax(logits, axis=-1)[..., :-1]


def postprocess(
    predictions: Predictions,
    original_sizes_hw: Int[Array, "B 2"],
    *,
    class_loss: str,
    top_k: int,
    known: tuple[int, ...] | None = None,
) -> Detections:
    """Keeps the best `top_k` detections of each picture, best first. No suppression of overlaps.

    Source: reference `PostProcess`. Focal: the best of all query-and-class pairs, so one query may answer twice.
    Softmax (DETR): each query's best class other than "no object". Differs there: sorted by score. As published, boxes
    may reach over the side of the picture, and are evaluated so; `Detector` and exported files clip them.
    Args:
      predictions: of every layer; the last counts.
      original_sizes_hw: what the boxes are scaled to, in pixels.
      class_loss: `focal` or `softmax`, the loss that the logits were trained with.
      top_k: K; less where there are fewer candidates.
      known: the logits that may be chosen, ascending; None: all, as published. Under softmax the others count as "no
        object".
    """
    logits = predictions.logits[-1]
    focal = class_loss == "focal"
    probs = class_probs(logits, class_loss)
    if known is not None:
        probs = probs[..., jnp.array(known)]
    batch, num_queries, num_classes = probs.shape
    if focal:
        scores, best = jax.lax.top_k(probs.reshape(batch, -1), min(top_k, num_queries * num_classes))
        queries, labels = best // num_classes, best % num_classes
    else:
        scores, queries = jax.lax.top_k(probs.max(-1), min(top_k, num_queries))
        labels = jnp.take_along_axis(probs.argmax(-1), queries, axis=1)
    if known is not None:
        labels = jnp.array(known)[labels]
    kept = jnp.take_along_axis(predictions.boxes_cxcywh[-1], queries[..., None], axis=1)
    height, width = original_sizes_hw[:, 0], original_sizes_hw[:, 1]
    scale = jnp.stack([width, height, width, height], axis=-1).astype(kept.dtype)
    boxes_xyxy_px = boxes.cxcywh_to_xyxy(kept) * scale[:, None, :]
    return Detections(scores=scores, labels=labels, boxes_xyxy_px=boxes_xyxy_px, queries=queries)


def detect(
    model: nn.Module,
    variables: Any,
    images: UInt8[Array, "B H W 3"],
    sizes_hw: Int[Array, "B 2"],
    original_sizes_hw: Int[Array, "B 2"],
    *,
    top_k: int,
    known: tuple[int, ...] | None = None,
) -> Detections:
    """A detector and `postprocess`: what evaluation, prediction and exported files run. Arguments: see both."""
    predictions = model.apply(variables, images, sizes_hw)
    return postprocess(predictions, original_sizes_hw, class_loss=model.class_loss, top_k=top_k, known=known)
