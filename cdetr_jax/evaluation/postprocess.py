"""From the last layer's predictions to the best detections in pixels of the original picture."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from cdetr_jax import boxes
from cdetr_jax.structs import Detections, Predictions


def postprocess(
    predictions: Predictions, original_sizes_hw: Int[Array, "B 2"], *, class_loss: str, top_k: int
) -> Detections:
    """Keeps the best `top_k` detections of each picture, best first. No suppression of overlaps.

    Source: reference `PostProcess`. Focal: the best of all query-and-class pairs, so one query may answer twice.
    Softmax (DETR): each query's best class other than "no object". Differs there: sorted by score.
    Args:
      predictions: of every layer; the last counts.
      original_sizes_hw: what the boxes are scaled to, in pixels.
      class_loss: `focal` or `softmax`, the loss that the logits were trained with.
      top_k: K; less where there are fewer candidates.
    """
    logits = predictions.logits[-1]
    batch, num_queries, num_classes = logits.shape
    if class_loss == "focal":
        scores = jax.nn.sigmoid(logits).reshape(batch, -1)
        scores, best = jax.lax.top_k(scores, min(top_k, num_queries * num_classes))
        queries, labels = best // num_classes, best % num_classes
    else:
        probs = jax.nn.softmax(logits, axis=-1)[..., :-1]
        scores, queries = jax.lax.top_k(probs.max(-1), min(top_k, num_queries))
        labels = jnp.take_along_axis(probs.argmax(-1), queries, axis=1)
    kept = jnp.take_along_axis(predictions.boxes_cxcywh[-1], queries[..., None], axis=1)
    height, width = original_sizes_hw[:, 0], original_sizes_hw[:, 1]
    scale = jnp.stack([width, height, width, height], axis=-1).astype(jnp.float32)
    boxes_xyxy_px = boxes.cxcywh_to_xyxy(kept) * scale[:, None, :]
    return Detections(scores=scores, labels=labels, boxes_xyxy_px=boxes_xyxy_px, queries=queries)
